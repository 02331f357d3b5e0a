//! The API server's own record of requests.

use anyhow::{Context, Result};
use serde_json::Value;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;

/// What the API server is told to record: one line per request of everybody but its own components.
///
/// A watch is recorded when it starts, since it may never end.
pub(super) const POLICY: &str = r#"
apiVersion: audit.k8s.io/v1
kind: Policy
rules:
- level: None
  users: [system:apiserver, system:kube-controller-manager, system:kube-scheduler]
- level: None
  userGroups: [system:nodes]
- level: None
  nonResourceURLs: [/healthz*, /livez*, /readyz*]
- level: Metadata
  verbs: [watch]
  omitStages: [RequestReceived]
- level: Metadata
  omitStages: [RequestReceived, ResponseStarted]
"#;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Who asked: `system:serviceaccount:<namespace>:<name>`, or a user's name.
    pub user: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub verb: String,
    /// API group; empty for the core one.
    pub group: String,
    /// Plural, with its subresource: `deployments`, `disaggregatedmodels/status`. Empty when no resource was asked for.
    pub resource: String,
    /// Namespace; empty when there is none.
    pub namespace: String,
    /// Name; empty when there is none.
    pub name: String,
    /// Path with its query.
    pub uri: String,
    /// HTTP status.
    pub code: u16,
}

impl Request {
    /// Whether it asked to change something.
    pub fn is_write(&self) -> bool {
        !matches!(self.verb.as_str(), "get" | "list" | "watch")
    }

    /// Whether it was refused for want of a right.
    pub fn is_forbidden(&self) -> bool {
        self.code == 403
    }
}

/// The requests since a point in time.
#[derive(Clone, Debug)]
pub struct Audit {
    pub(super) log: PathBuf,
    pub(super) from: u64,
}

impl Audit {
    /// Requests of one user that were answered since then, in the order of the answers.
    ///
    /// # Errors
    /// When the record can't be read.
    pub fn requests_of(&self, user: &str) -> Result<Vec<Request>> {
        Ok(self.requests()?.into_iter().filter(|request| request.user == user).collect())
    }

    /// Requests of everybody.
    ///
    /// # Errors
    /// When the record can't be read.
    pub fn requests(&self) -> Result<Vec<Request>> {
        let mut file = std::fs::File::open(&self.log).context("open the audit log")?;
        file.seek(SeekFrom::Start(self.from))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        // The last line may still be being written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().filter_map(|line| parse(line).transpose()).collect()
    }
}

fn parse(line: &str) -> Result<Option<Request>> {
    let event: Value = serde_json::from_str(line).context("a line of the audit log")?;
    let text = |at: &str| event.pointer(at).and_then(Value::as_str).unwrap_or_default().to_owned();
    let code = event.pointer("/responseStatus/code").and_then(Value::as_u64).unwrap_or_default() as u16;
    let verb = text("/verb");
    // A watch that had begun has been counted then.
    if verb == "watch" && text("/stage") == "ResponseComplete" && code < 400 {
        return Ok(None);
    }
    let subresource = text("/objectRef/subresource");
    let plural = text("/objectRef/resource");
    Ok(Some(Request {
        user: text("/user/username"),
        verb,
        group: text("/objectRef/apiGroup"),
        resource: if subresource.is_empty() { plural } else { format!("{plural}/{subresource}") },
        namespace: text("/objectRef/namespace"),
        name: text("/objectRef/name"),
        uri: text("/requestURI"),
        code,
    }))
}
