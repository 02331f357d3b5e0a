//! The routing policy from a file that is read while the proxy runs, so that another policy reaches pods that live.

use crate::estimate::{Disaggregation, Policy, ThresholdError, UnknownPolicy};
use crate::watched::{self, Complaint};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;

/// How often the file is read. It is compared by content, because a mounted ConfigMap changes by a swapped link whose times
/// say nothing. The kubelet takes up to a minute to bring a ConfigMap, so this adds nothing that counts.
const INTERVAL: Duration = Duration::from_secs(1);

/// Bytes of the file: two fields, with room for whitespace.
const FILE_BYTES_MAX: u64 = 4 << 10;

/// Why the file says no policy.
#[derive(Debug, thiserror::Error)]
pub enum PolicyFileError {
    /// It can't be read.
    #[error("it can't be read")]
    Read(#[source] std::io::Error),
    /// It has another form.
    #[error(
        "it is not {{\"disaggregation\": \"always\", \"conditional\" or \"never\", \"minUncachedPromptTokens\": COUNT}}"
    )]
    Json(#[source] serde_json::Error),
    /// It names a policy that there is not.
    #[error("disaggregation in it is wrong")]
    Policy(#[source] UnknownPolicy),
    /// The threshold and the policy need each other.
    #[error("minUncachedPromptTokens in it goes with disaggregation conditional")]
    Threshold(#[source] ThresholdError),
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct File {
    disaggregation: String,
    min_uncached_prompt_tokens: Option<u64>,
}

/// The policy as the file has it now.
///
/// # Errors
/// See [`PolicyFileError`].
pub(crate) async fn read(file: &Path) -> Result<Policy, PolicyFileError> {
    parse(&watched::read(file, FILE_BYTES_MAX).await.map_err(PolicyFileError::Read)?)
}

fn parse(content: &[u8]) -> Result<Policy, PolicyFileError> {
    let File { disaggregation, min_uncached_prompt_tokens } =
        serde_json::from_slice(content).map_err(PolicyFileError::Json)?;
    let disaggregation: Disaggregation = disaggregation.parse().map_err(PolicyFileError::Policy)?;
    Policy::new(disaggregation, min_uncached_prompt_tokens).map_err(PolicyFileError::Threshold)
}

/// Keeps the policy as the file has it. Ends with its caller.
pub(crate) async fn follow(file: PathBuf, policy: watch::Sender<Policy>) {
    let mut complaint = Complaint::default();
    loop {
        refresh(&file, &policy, &mut complaint).await;
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Reads the file once. One that is missing or wrong leaves the policy as it was: requests go on as they did.
async fn refresh(file: &Path, policy: &watch::Sender<Policy>, complaint: &mut Complaint) {
    match read(file).await {
        Ok(read) => {
            complaint.is_over();
            if policy.send_if_modified(|now| std::mem::replace(now, read) != read) {
                tracing::info!(policy = ?read, "the routing policy changed");
            }
        }
        Err(error) => {
            let text = error.to_string();
            if complaint.is_new(&text) {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                tracing::warn!(file = %file.display(), cause, "the routing file is not used: {text}; the policy stays");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_a_policy_or_an_error_that_says_what_is_wrong() {
        let right = |content: &str| parse(content.as_bytes()).expect("right");
        assert_eq!(right(r#"{"disaggregation": "always"}"#), Policy::Always);
        assert_eq!(right(r#"{"disaggregation": "never"}"#), Policy::Never);
        let conditional = right(r#"{"disaggregation": "conditional", "minUncachedPromptTokens": 256}"#);
        assert_eq!(conditional, Policy::Conditional { min_uncached_prompt_tokens: Some(256) });

        let check = |content: &str, expect: &str| {
            let error = parse(content.as_bytes()).expect_err("wrong").to_string();
            assert!(error.contains(expect), "{content}: {error}");
        };
        check(r#"{"disaggregation": "sometimes"}"#, "disaggregation in it is wrong");
        check(r#"{"disaggregation": "always", "minUncachedPromptTokens": 1}"#, "goes with");
        check(r#"{"disaggregation": "always", "policy": 1}"#, "it is not");
        check("", "it is not");
    }

    #[tokio::test]
    async fn the_policy_follows_the_file_and_outlives_a_broken_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("routing.json");
        let (policy, seen) = watch::channel(Policy::Always);
        let mut complaint = Complaint::default();
        for (content, expect, stands) in [
            (r#"{"disaggregation": "never"}"#, Policy::Never, false),
            ("{", Policy::Never, true),
            (r#"{"disaggregation": "always"}"#, Policy::Always, false),
        ] {
            std::fs::write(&file, content).expect("written");
            refresh(&file, &policy, &mut complaint).await;
            assert_eq!((*seen.borrow(), complaint.stands()), (expect, stands), "{content}");
        }
        std::fs::remove_file(&file).expect("removed");
        refresh(&file, &policy, &mut complaint).await;
        assert_eq!((*seen.borrow(), complaint.stands()), (Policy::Always, true));
    }
}
