//! What the operator was told to do, checked, before anything is asked of a cluster.

use crate::args::{Args, LogFormat};
use crate::triggers::Places;
use std::collections::BTreeSet;
use std::net::SocketAddr;

/// A configuration that can be run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Image of Baton's own engine.
    pub worker_image: String,
    /// Image of the routing proxy.
    pub proxy_image: String,
    /// Whose models are run.
    pub places: Places,
    /// How replicas of the operator find out which of them works; none where there is but one.
    pub election: Option<Election>,
    /// The operator's namespace, where it was said.
    pub namespace: Option<String>,
    /// Who this replica is.
    pub identity: String,
    /// Where health and metrics are served.
    pub admin_listen: SocketAddr,
    /// How log lines look.
    pub log_format: LogFormat,
}

/// The Lease that is held.
#[derive(Clone, Debug)]
pub struct Election {
    /// Its name.
    pub lease: String,
}

/// A command line that can't be run.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not the name of a namespace.
    #[error(
        "--watch-namespaces has {found:?}, which is no namespace's name: lower-case letters, digits and hyphens, at most 63"
    )]
    Namespace {
        /// What was given.
        found: String,
    },
    /// A value that must be something is nothing.
    #[error("{flag} must not be empty")]
    Empty {
        /// Which flag.
        flag: &'static str,
    },
    /// The system gives no randomness.
    #[error("the system gives no randomness for a name of this replica, give --identity: {0}")]
    Entropy(#[source] getrandom::Error),
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        // Taken apart in full, so that a flag that nothing reads doesn't compile without a warning.
        let Args {
            worker_image,
            proxy_image,
            watch_namespaces,
            leader_elect,
            lease_name,
            lease_namespace,
            identity,
            admin_listen,
            log_format,
        } = args;
        let given = |flag, text: String| if text.is_empty() { Err(ConfigError::Empty { flag }) } else { Ok(text) };
        let namespaces: BTreeSet<String> =
            watch_namespaces.into_iter().map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
        if let Some(found) = namespaces.iter().find(|name| !is_namespace(name)) {
            return Err(ConfigError::Namespace { found: found.clone() });
        }
        let places =
            if namespaces.is_empty() { Places::All } else { Places::Namespaces(namespaces.into_iter().collect()) };
        let identity = match identity.filter(|identity| !identity.is_empty()) {
            Some(identity) => identity,
            None => random_identity()?,
        };
        Ok(Config {
            worker_image: given("--worker-image", worker_image)?,
            proxy_image: given("--proxy-image", proxy_image)?,
            places,
            election: if leader_elect { Some(Election { lease: given("--lease-name", lease_name)? }) } else { None },
            namespace: lease_namespace.filter(|namespace| !namespace.is_empty()),
            identity,
            admin_listen,
            log_format,
        })
    }
}

fn is_namespace(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let edges = [name.bytes().next(), name.bytes().next_back()];
    name.len() <= 63
        && name.bytes().all(|byte| inner(byte) || byte == b'-')
        && edges.into_iter().all(|edge| edge.is_some_and(inner))
}

fn random_identity() -> Result<String, ConfigError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(ConfigError::Entropy)?;
    Ok(format!("baton-operator-{:016x}", u64::from_be_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn config(args: &[&str]) -> Result<Config, ConfigError> {
        let args = ["baton-operator"].iter().chain(args);
        Config::try_from(Args::try_parse_from(args).expect("these parse"))
    }

    #[test]
    fn namespaces_are_a_set_and_none_is_all() {
        assert_eq!(config(&[]).expect("defaults run").places, Places::All);
        assert_eq!(config(&["--watch-namespaces", ""]).expect("empty is all").places, Places::All);
        let places = config(&["--watch-namespaces", "b, a,b,"]).expect("two names").places;
        assert_eq!(places, Places::Namespaces(vec!["a".to_owned(), "b".to_owned()]));
        for wrong in ["A", "a/b", "-a", "a-", &"a".repeat(64)] {
            assert!(config(&[&format!("--watch-namespaces={wrong}")]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_replica_without_a_name_draws_one_of_its_own() {
        let identity = |args: &[&str]| config(args).expect("they run").identity;
        assert_eq!(identity(&["--identity", "pod-1"]), "pod-1");
        assert_ne!(identity(&[]), identity(&[]));
    }

    #[test]
    fn election_is_on_unless_it_is_turned_off() {
        assert!(config(&[]).expect("defaults run").election.is_some());
        assert!(config(&["--leader-elect", "false"]).expect("it runs alone").election.is_none());
        assert!(config(&["--lease-name", ""]).is_err());
        assert!(config(&["--lease-name", "", "--leader-elect=false"]).is_ok());
    }
}
