//! Addresses of a name that is looked up again and again, such as that of a headless Service.
//!
//! A list that is too long costs little: whoever is on it and gone does not answer for its status, and whoever came in its place
//! can't sign one. A list that is too short takes workers away from requests. So a look-up that fails leaves the list as it was,
//! and "no such name", which is how DNS says that a headless Service has no pods, is believed only once it has been said
//! several times.

use super::{ENDPOINTS_MAX, List};
use crate::address::Address;
use crate::watched::Complaint;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

/// How often a name is looked up, counted from the answer before, so that there is one look-up of a name at a time. The system's
/// resolver bounds how long it takes.
const INTERVAL: Duration = Duration::from_secs(1);

/// How often in a row a name must be unknown before it stands for nobody: a DNS server that has just started may not know all of
/// its Services yet.
const UNKNOWN_MIN: u32 = 3;

/// What the system's C library (glibc) says of a name that is not there, or has no address. There is no code for it that the
/// standard library would pass on. Another library's words count as a failed look-up, which leaves the list as it is.
const UNKNOWN: [&str; 2] = ["Name or service not known", "No address associated with hostname"];

/// Why there is no list.
#[derive(Debug, thiserror::Error)]
pub(super) enum LookupError {
    /// There is no such name, or nothing behind it.
    #[error("the name is not known")]
    Unknown,
    /// Nobody could say.
    #[error("the name can't be looked up")]
    Failed(#[source] std::io::Error),
    /// There are too many.
    #[error("the name stands for {found} addresses, more than {ENDPOINTS_MAX}")]
    TooMany {
        /// How many.
        found: usize,
    },
}

/// Who knows what a name stands for.
pub(super) trait Resolver: Send + Sync + 'static {
    /// Looks a name up.
    fn lookup(&self, name: &Address) -> impl Future<Output = Result<Vec<SocketAddr>, LookupError>> + Send;
}

/// The system's resolver: what `/etc/resolv.conf` says, search path included, as every other program in the pod sees it.
pub(super) struct System;

impl Resolver for System {
    async fn lookup(&self, name: &Address) -> Result<Vec<SocketAddr>, LookupError> {
        match tokio::net::lookup_host(name.as_str()).await {
            Ok(found) => Ok(found.collect()),
            Err(error) if UNKNOWN.iter().any(|unknown| error.to_string().contains(unknown)) => {
                Err(LookupError::Unknown)
            }
            Err(error) => Err(LookupError::Failed(error)),
        }
    }
}

/// Keeps the list as the name has it. Ends with its caller.
pub(super) async fn follow(name: Address, list: List, resolver: impl Resolver) {
    let mut name = Name { name, list, unknown: 0, complaint: Complaint::default() };
    loop {
        let answer = resolver.lookup(&name.name).await;
        name.heard(answer);
        tokio::time::sleep(INTERVAL).await;
    }
}

/// A name and what has been heard of it.
struct Name {
    name: Address,
    list: List,
    /// Times in a row that it was not known.
    unknown: u32,
    complaint: Complaint,
}

impl Name {
    fn heard(&mut self, answer: Result<Vec<SocketAddr>, LookupError>) {
        let answer = answer.and_then(|found| match found.len() {
            0 => Err(LookupError::Unknown),
            1..=ENDPOINTS_MAX => Ok(found),
            found => Err(LookupError::TooMany { found }),
        });
        match answer {
            Ok(found) => {
                self.unknown = 0;
                self.complaint.is_over();
                self.list.set(found.iter().map(address).collect());
            }
            Err(LookupError::Unknown) => {
                self.unknown = self.unknown.saturating_add(1);
                if self.complaint.is_new("unknown") {
                    // No warning: a role's Service has no addresses before its first pod and after its last.
                    tracing::info!(name = %self.name, "nobody is behind this name yet, or any more");
                }
                if self.unknown >= UNKNOWN_MIN {
                    self.list.set(BTreeSet::new());
                }
            }
            Err(error @ (LookupError::Failed(_) | LookupError::TooMany { .. })) => {
                self.unknown = 0;
                let text = error.to_string();
                if self.complaint.is_new(&text) {
                    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                    tracing::warn!(name = %self.name, cause, "{text}; the addresses read last stay");
                }
            }
        }
    }
}

fn address(found: &SocketAddr) -> Address {
    found.to_string().parse().expect("a socket address with a port is an address")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::fixtures;
    use std::sync::Mutex;

    const NAME: &str = "tiny-decode-0a1b2c3d-peers.default.svc:8000";

    fn name() -> (Name, tokio::sync::watch::Receiver<BTreeSet<Address>>) {
        let (list, peers) = fixtures::list();
        let name = Name { name: NAME.parse().expect("an address"), list, unknown: 0, complaint: Complaint::default() };
        (name, peers)
    }

    fn found(hosts: &[u8]) -> Result<Vec<SocketAddr>, LookupError> {
        Ok(hosts.iter().map(|host| SocketAddr::from(([10, 0, 0, *host], 8000))).collect())
    }

    fn failed() -> Result<Vec<SocketAddr>, LookupError> {
        Err(LookupError::Failed(std::io::Error::other("temporary failure in name resolution")))
    }

    #[test]
    fn the_list_follows_the_name_and_outlives_what_fails() {
        let (mut name, peers) = name();
        for (answer, expect, complains) in [
            (Err(LookupError::Unknown), 0, true),
            (found(&[1]), 1, false),
            (failed(), 1, true),
            (found(&[1, 2]), 2, false),
            (Err(LookupError::Unknown), 2, true),
            (failed(), 2, true),
            (Err(LookupError::Unknown), 2, true),
            (Err(LookupError::Unknown), 2, true),
            (Err(LookupError::Unknown), 0, true),
            (failed(), 0, true),
            (found(&[3]), 1, false),
            (Ok(Vec::new()), 1, true),
            (found(&[3; 1001]), 1, true),
        ] {
            let what = format!("{answer:?}");
            name.heard(answer);
            assert_eq!((peers.borrow().len(), name.complaint.stands()), (expect, complains), "{what}");
        }
        assert_eq!(peers.borrow().first().map(Address::as_str), Some("10.0.0.3:8000"));
    }

    /// Gives its answers one by one, the last one for ever.
    struct Scripted(Mutex<Vec<Result<Vec<SocketAddr>, LookupError>>>);

    impl Resolver for Scripted {
        async fn lookup(&self, name: &Address) -> Result<Vec<SocketAddr>, LookupError> {
            assert_eq!(name.as_str(), NAME);
            let mut answers = self.0.lock().expect("unpoisoned");
            if answers.len() > 1 { answers.remove(0) } else { Err(LookupError::Unknown) }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_looked_up_again_and_again() {
        let (list, mut peers) = fixtures::list();
        let script = Scripted(Mutex::new(vec![found(&[1]), failed(), found(&[1, 2]), failed()]));
        let following = tokio::spawn(follow(NAME.parse().expect("an address"), list, script));
        let mut sizes = Vec::new();
        for _ in 0..3 {
            peers.changed().await.expect("it is followed");
            sizes.push(peers.borrow_and_update().len());
        }
        assert_eq!(sizes, [1, 2, 0], "at last the Service is empty");
        following.abort();
    }

    #[tokio::test]
    async fn the_systems_words_for_no_such_name_are_known() {
        // No DNS server is asked for a name with a space in it.
        let error = System.lookup(&"127.0.0.1:1".parse().expect("an address")).await.map(|found| found.len());
        assert!(matches!(error, Ok(1)), "{error:?}");
        let error = tokio::net::lookup_host("no such name:1").await.map(Iterator::count).expect_err("no name");
        assert!(UNKNOWN.iter().any(|unknown| error.to_string().contains(unknown)), "{error}");
    }
}
