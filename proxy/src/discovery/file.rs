//! Addresses from a file that is read again and again.

use super::{ENDPOINTS_MAX, List};
use crate::address::{Address, AddressError};
use crate::watched::{self, Complaint};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often the file is read. It is compared by content, because a mounted ConfigMap changes by a swapped link whose times
/// say nothing.
const INTERVAL: Duration = Duration::from_millis(500);

/// Bytes of the file: [`ENDPOINTS_MAX`] addresses of at most 64 bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Why the file can't be used. The list that was read last stays.
#[derive(Debug, thiserror::Error)]
enum EndpointsError {
    /// It can't be read.
    #[error("the endpoints file can't be read")]
    Read(#[source] std::io::Error),
    /// It is not `{"endpoints": [...]}`.
    #[error("the endpoints file is not {{\"endpoints\": [\"address:port\", ...]}}")]
    Json(#[source] serde_json::Error),
    /// One of them is no address.
    #[error("endpoint {index} of the endpoints file is wrong")]
    Address {
        /// Which one, from 0.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: AddressError,
    },
    /// There are too many.
    #[error("the endpoints file lists {found} endpoints, more than {ENDPOINTS_MAX}")]
    TooMany {
        /// How many.
        found: usize,
    },
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    endpoints: Vec<String>,
}

/// Keeps the list as the file has it. Ends with its caller.
pub(super) async fn follow(file: PathBuf, list: List) {
    let mut complaint = Complaint::default();
    loop {
        refresh(&file, &list, &mut complaint).await;
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Reads the file once. One that is missing or wrong leaves the list as it was.
async fn refresh(file: &Path, list: &List, complaint: &mut Complaint) {
    match read(file).await {
        Ok(listed) => {
            complaint.is_over();
            list.set(listed);
        }
        Err(error) => {
            let text = error.to_string();
            if complaint.is_new(&text) {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                tracing::warn!(file = %file.display(), cause, "{text}; the endpoints read last stay");
            }
        }
    }
}

async fn read(file: &Path) -> Result<BTreeSet<Address>, EndpointsError> {
    parse(&watched::read(file, FILE_BYTES_MAX).await.map_err(EndpointsError::Read)?)
}

fn parse(content: &[u8]) -> Result<BTreeSet<Address>, EndpointsError> {
    let File { endpoints } = serde_json::from_slice(content).map_err(EndpointsError::Json)?;
    if endpoints.len() > ENDPOINTS_MAX {
        return Err(EndpointsError::TooMany { found: endpoints.len() });
    }
    let address =
        |(index, text): (usize, &String)| text.parse().map_err(|source| EndpointsError::Address { index, source });
    endpoints.iter().enumerate().map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::fixtures;

    #[test]
    fn a_file_is_a_set_of_addresses_or_an_error_that_says_where() {
        let listed = parse(br#"{"endpoints": ["10.0.0.2:8000", "10.0.0.1:8000", "10.0.0.2:8000"]}"#);
        let listed: Vec<String> = listed.expect("right").iter().map(ToString::to_string).collect();
        assert_eq!(listed, ["10.0.0.1:8000", "10.0.0.2:8000"]);
        assert!(parse(br#"{"endpoints": []}"#).expect("nobody is right").is_empty());

        let check = |content: &str, expect: &str| {
            let error = parse(content.as_bytes()).expect_err("wrong").to_string();
            assert!(error.contains(expect), "{content}: {error}");
        };
        check(r#"{"endpoints": ["10.0.0.1:8000", "10.0.0.1"]}"#, "endpoint 1");
        check(r#"["10.0.0.1:8000"]"#, "is not");
        check(r#"{"endpoints": [], "endpoint": []}"#, "is not");
        check(&serde_json::json!({"endpoints": vec!["h:1"; ENDPOINTS_MAX + 1]}).to_string(), "1001 endpoints");
    }

    #[tokio::test]
    async fn the_list_follows_the_file_and_outlives_a_broken_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("endpoints.json");
        let (list, peers) = fixtures::list();
        let mut complaint = Complaint::default();
        for (content, expect, complains) in
            [(r#"{"endpoints": ["h:1"]}"#, 1, false), ("{", 1, true), (r#"{"endpoints": ["h:1", "h:2"]}"#, 2, false)]
        {
            std::fs::write(&file, content).expect("written");
            refresh(&file, &list, &mut complaint).await;
            assert_eq!((peers.borrow().len(), complaint.stands()), (expect, complains), "{content}");
        }
        std::fs::remove_file(&file).expect("removed");
        refresh(&file, &list, &mut complaint).await;
        assert_eq!(peers.borrow().len(), 2);
    }
}
