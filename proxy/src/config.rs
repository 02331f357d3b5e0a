//! What the proxy was told to do, checked, before any file is read or port bound. Never consulted for anything outside it.

use crate::address::{Address, AddressError};
use crate::args::{Args, LogFormat};
use crate::plan::Policy;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The connector that there is.
const CONNECTOR: &str = "baton";

/// Names to look up: one for each role, twice during a rollout, and room for a setup by hand.
const NAMES_MAX: usize = 16;

/// A configuration that can be built from.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where clients and other pods' proxies connect.
    pub listen: SocketAddr,
    /// Where metrics and debug pages are served.
    pub admin_listen: SocketAddr,
    /// This pod's engine.
    pub engine: Option<Address>,
    /// File with the addresses of the model's proxies.
    pub endpoints_file: Option<PathBuf>,
    /// Names that stand for the addresses of the model's proxies.
    pub discover_dns: Vec<Address>,
    /// File with the signing key.
    pub signing_key_file: PathBuf,
    /// Revision whose workers are paired.
    pub revision: String,
    /// Which prompts go to a prefill worker.
    pub policy: PolicySource,
    /// Bounds on what a client may ask for and on how long it may take.
    pub limits: Limits,
    /// How long running requests may go on after SIGTERM.
    pub drain_timeout: Duration,
    /// How log lines look.
    pub log_format: LogFormat,
}

/// Where the policy stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicySource {
    /// On the command line, for the life of the process.
    Flags(Policy),
    /// In a file that is read again when it changes.
    File(PathBuf),
}

/// Bounds on requests.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a client's body.
    pub body_bytes_max: usize,
    /// Clients' requests at once; other pods' legs at once, too.
    pub in_flight_max: usize,
    /// From a request's first byte to its last token.
    pub request_timeout: Duration,
    /// From dispatch to the first token.
    pub first_token_timeout: Duration,
    /// Between two pieces of a stream.
    pub idle_timeout: Duration,
}

/// A command line that can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The engine's URL is none that we can dial.
    #[error("--engine is an URL of the form http://HOST:PORT, found {found:?}")]
    EngineUrl {
        /// What was given.
        found: String,
        /// What is wrong with its address, where the form was right.
        #[source]
        source: Option<AddressError>,
    },
    /// Nobody to send requests to.
    #[error("give --engine (beside an engine), --discover-dns or --endpoints-file (as a front door), or both")]
    NoWorkers,
    /// A name to look up is none.
    #[error("--discover-dns is HOST:PORT, found {found:?}")]
    DiscoverDns {
        /// What was given.
        found: String,
    },
    /// More names than a model has Services.
    #[error("--discover-dns is given {found} times; at most {NAMES_MAX}: a model has one name for each role")]
    TooManyNames {
        /// How many.
        found: usize,
    },
    /// A protocol of which this version knows nothing.
    #[error(
        "--connector is {found:?}; this version has baton alone, so leave it out and serve with Baton's own worker"
    )]
    Connector {
        /// What was given.
        found: String,
    },
    /// The threshold and the policy need each other.
    #[error("--min-uncached-prompt-tokens goes with --disaggregation conditional, and is required there")]
    Threshold,
    /// A bound of nothing would refuse everything.
    #[error("{flag} must be above 0")]
    Zero {
        /// Which flag.
        flag: &'static str,
    },
    /// An empty revision would pair with workers that have none.
    #[error("--revision must not be empty")]
    EmptyRevision,
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        // Taken apart in full, so that a flag that nothing reads doesn't compile without a warning.
        let Args {
            listen,
            admin_listen,
            engine,
            endpoints_file,
            discover_dns,
            connector,
            signing_key_file,
            revision,
            disaggregation,
            min_uncached_prompt_tokens,
            routing_file,
            max_body_bytes,
            max_in_flight,
            request_timeout_seconds,
            first_token_timeout_seconds,
            upstream_idle_timeout_seconds,
            drain_timeout_seconds,
            log_format,
        } = args;
        if engine.is_none() && endpoints_file.is_none() && discover_dns.is_empty() {
            return Err(ConfigError::NoWorkers);
        }
        if discover_dns.len() > NAMES_MAX {
            return Err(ConfigError::TooManyNames { found: discover_dns.len() });
        }
        if connector != CONNECTOR {
            return Err(ConfigError::Connector { found: connector });
        }
        if revision.is_empty() {
            return Err(ConfigError::EmptyRevision);
        }
        let policy = match routing_file {
            Some(file) => PolicySource::File(file),
            None => PolicySource::Flags(
                Policy::new(disaggregation, min_uncached_prompt_tokens).map_err(|_| ConfigError::Threshold)?,
            ),
        };
        let seconds = |flag, value| match value {
            0 => Err(ConfigError::Zero { flag }),
            value => Ok(Duration::from_secs(value)),
        };
        let count = |flag, value| if value == 0 { Err(ConfigError::Zero { flag }) } else { Ok(value) };
        Ok(Config {
            listen,
            admin_listen,
            engine: engine.map(engine_address).transpose()?,
            endpoints_file,
            discover_dns: discover_dns
                .into_iter()
                .map(|name| name.parse().map_err(|_| ConfigError::DiscoverDns { found: name }))
                .collect::<Result<_, _>>()?,
            signing_key_file,
            revision,
            policy,
            limits: Limits {
                body_bytes_max: count("--max-body-bytes", max_body_bytes)?,
                in_flight_max: count("--max-in-flight", max_in_flight)?,
                request_timeout: seconds("--request-timeout-seconds", request_timeout_seconds)?,
                first_token_timeout: seconds("--first-token-timeout-seconds", first_token_timeout_seconds)?,
                idle_timeout: seconds("--upstream-idle-timeout-seconds", upstream_idle_timeout_seconds)?,
            },
            drain_timeout: Duration::from_secs(drain_timeout_seconds),
            log_format,
        })
    }
}

fn engine_address(url: String) -> Result<Address, ConfigError> {
    let Some(address) = url.strip_prefix("http://") else {
        return Err(ConfigError::EngineUrl { found: url, source: None });
    };
    let address = address.strip_suffix('/').unwrap_or(address);
    address.parse().map_err(|source| ConfigError::EngineUrl { found: url.clone(), source: Some(source) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn config(flags: &[&str]) -> Result<Config, ConfigError> {
        let fixed = ["baton-proxy", "--signing-key-file", "key"];
        let revision: &[&str] = if flags.contains(&"--revision") { &[] } else { &["--revision", "r1"] };
        Config::try_from(
            Args::try_parse_from(fixed.iter().chain(revision).chain(flags)).expect("flags that clap takes"),
        )
    }

    #[test]
    fn defaults_with_an_engine_are_a_sidecar_that_always_hands_over() {
        let config = config(&["--engine", "http://127.0.0.1:8200"]).expect("a right command line");
        assert_eq!(config.policy, PolicySource::Flags(Policy::Always));
        assert_eq!(config.engine.expect("given").as_str(), "127.0.0.1:8200");
        assert_eq!(config.limits.body_bytes_max, 4 << 20);
    }

    #[test]
    fn a_front_door_finds_its_workers_by_name() {
        let names =
            ["--discover-dns", "tiny-prefill-peers.ns.svc:8000", "--discover-dns", "tiny-decode-peers.ns.svc:8000"];
        let config = config(&[&names[..], &["--connector", "baton"]].concat()).expect("a right command line");
        assert_eq!(config.discover_dns.iter().map(Address::as_str).collect::<Vec<_>>(), [names[1], names[3]]);
        assert_eq!(config.engine, None);
    }

    #[test]
    fn a_routing_file_stands_in_place_of_the_policys_flags() {
        let engine = ["--engine", "http://127.0.0.1:8200", "--routing-file", "routing.json"];
        let config = config(&engine).expect("a right command line");
        assert_eq!(config.policy, PolicySource::File("routing.json".into()));
        let both = [&["baton-proxy", "--signing-key-file", "key", "--revision", "r1"], &engine[..]].concat();
        let error =
            Args::try_parse_from(both.iter().chain(&["--disaggregation", "never"])).expect_err("one or the other");
        assert!(error.to_string().contains("--disaggregation"), "{error}");
    }

    #[test]
    fn each_wrong_command_line_is_refused_by_its_own_reason() {
        let engine = "http://127.0.0.1:8200";
        let check = |flags: &[&str], expect: &str| {
            let error = config(flags).expect_err("a wrong command line").to_string();
            assert!(error.contains(expect), "{flags:?}: {error}");
        };
        check(&[], "--endpoints-file");
        check(&["--engine", "127.0.0.1:8200"], "http://HOST:PORT");
        check(&["--engine", "http://127.0.0.1"], "http://HOST:PORT");
        check(&["--engine", "http://127.0.0.1:8200/v1"], "http://HOST:PORT");
        check(&["--discover-dns", "tiny-peers.default.svc"], "--discover-dns is HOST:PORT");
        check(&["--engine", engine, "--connector", "vllm-nixl"], "this version has baton alone");
        check(&["--engine", engine, "--disaggregation", "conditional"], "required there");
        check(&["--engine", engine, "--min-uncached-prompt-tokens", "5"], "goes with");
        check(&["--engine", engine, "--max-in-flight", "0"], "--max-in-flight must be above 0");
        check(&["--engine", engine, "--request-timeout-seconds", "0"], "--request-timeout-seconds");
        check(&["--engine", engine, "--revision", ""], "--revision");
    }
}
