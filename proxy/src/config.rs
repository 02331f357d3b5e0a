//! What the proxy was told to do, checked, before any file is read or port bound. Never consulted for anything outside it.

mod endpoint_slices;
mod llm_d;

pub use crate::connector::Connector;
pub use crate::request_state::Fallback;
use crate::request_state::LEASE_MARGIN;
pub use crate::select::Mode;
pub use endpoint_slices::{ApiServer, EndpointSlices, EndpointSlicesError, ServicePort};
pub use llm_d::{AllowedPrefiller, PrefillerHeader};

use crate::address::{Address, AddressError};
use crate::args::{Args, FallbackWord, LogFormat, Switch};
use crate::estimate::Policy;
use crate::tls::{ServerFiles, TlsFiles, UpstreamFiles};
use crate::workers::ranks::RANKS_MAX;
use baton_wire::Role;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Names to look up: one for each role, twice during a rollout, and room for a setup by hand.
const NAMES_MAX: usize = 16;

/// The revision of a proxy that has no others to pair with.
const NO_REVISION: &str = "static";

/// Threads at most: a proxy that keeps more cores busy wants replicas.
const THREADS_MAX: usize = 64;

/// A configuration that can be built from.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where clients and other pods' proxies connect.
    pub listen: SocketAddr,
    /// Where metrics and debug pages are served.
    pub admin_listen: SocketAddr,
    /// Protocol between the engines.
    pub connector: Connector,
    /// This pod's engine.
    pub engine: Option<Engine>,
    /// Engines without a proxy of ours.
    pub direct: Vec<Engine>,
    /// Certificates.
    pub tls: TlsFiles,
    /// File with the addresses of the model's proxies.
    pub endpoints_file: Option<PathBuf>,
    /// Names that stand for the addresses of the model's proxies.
    pub discover_dns: Vec<Address>,
    /// Services whose EndpointSlices are the addresses of the model's proxies.
    pub endpoint_slices: Option<EndpointSlices>,
    /// File with the signing key; a proxy that knows no other one draws a key.
    pub signing_key_file: Option<PathBuf>,
    /// Revision whose workers are paired.
    pub revision: String,
    /// Which prompts go to a prefill worker.
    pub policy: PolicySource,
    /// What follows when no prefill worker computes a prompt.
    pub resilience: Resilience,
    /// How workers are chosen.
    pub selection: Selection,
    /// Whether and where workers are asked what their prefix caches hold.
    pub kv_events: KvEvents,
    /// Clients' keys.
    pub api_keys_file: Option<PathBuf>,
    /// Prefill workers that requests may name.
    pub prefiller_header: Option<PrefillerHeader>,
    /// Whether clients' headers that name workers are believed.
    pub trust_routing_hints: bool,
    /// Bounds on what a client may ask for and on how long it may take.
    pub limits: Limits,
    /// How long running requests may go on after SIGTERM.
    pub drain_timeout: Duration,
    /// Threads that serve.
    pub threads: usize,
    /// How log lines look.
    pub log_format: LogFormat,
}

/// An engine that is reached without another proxy of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engine {
    /// Where it is dialled.
    pub address: Address,
    /// What it serves; Baton's own worker says so itself.
    pub role: Option<Role>,
    /// Where its bootstrap server listens, with SGLang.
    pub bootstrap_port: Option<u16>,
    /// Its data-parallel ranks, where it was said how many; else its metrics show them.
    pub dp_size: Option<u32>,
    /// Whether it is spoken to through TLS.
    pub is_tls: bool,
}

/// Where the policy stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicySource {
    /// On the command line, for the life of the process.
    Flags(Policy),
    /// In a file that is read again when it changes.
    File(PathBuf),
}

/// What follows when a leg fails.
#[derive(Clone, Copy, Debug)]
pub struct Resilience {
    /// Whether the decode worker computes a prompt that no prefill worker could.
    pub fallback: Fallback,
    /// Whether a prompt that no prefill worker can compute is refused, whatever the cause.
    pub enforce_disaggregation: bool,
    /// How long a prefill engine holds KV.
    pub lease: Duration,
}

/// How workers are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Selection {
    /// For the prefill leg.
    pub prefill: Mode,
    /// For the decode leg.
    pub decode: Mode,
}

/// Whether workers are asked what their prefix caches hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvEvents {
    /// They are not.
    Off,
    /// Our own workers are; vLLM engines where it is said at which ports.
    On(Option<VllmEvents>),
}

/// Where vLLM engines publish their events, each at its own host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VllmEvents {
    /// Events as they happen.
    pub port: u16,
    /// Those that were missed.
    pub replay_port: Option<u16>,
}

/// Bounds on requests.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a client's body.
    pub body_bytes_max: usize,
    /// Clients' requests at once; other pods' legs at once, too.
    pub in_flight_max: usize,
    /// Clients' requests that wait for room.
    pub queued_max: usize,
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
    /// An engine's URL is none that we can dial.
    #[error("{flag} is an URL of the form http://HOST:PORT or https://HOST:PORT, found {found:?}")]
    EngineUrl {
        /// Which flag.
        flag: &'static str,
        /// What was given.
        found: String,
        /// What is wrong with its address, where the form was right.
        #[source]
        source: Option<AddressError>,
    },
    /// What stands behind an engine's URL is none of what may.
    #[error(
        "behind an engine's URL may stand ,dp=RANKS (1 to {RANKS_MAX}), and behind one of --prefill ,bootstrap=PORT: {flag} is {found:?}"
    )]
    EngineOption {
        /// Which flag.
        flag: &'static str,
        /// What was given.
        found: String,
    },
    /// Nothing says whom to believe that it is the engine.
    #[error("an engine with https goes with --upstream-tls-ca-file: the authorities that its certificate may be of")]
    EngineTls,
    /// Nobody to send requests to.
    #[error(
        "give --engine (beside an engine), --prefill and --decode, --discover-dns, --discover-endpoint-slices or --endpoints-file (as a front door)"
    )]
    NoWorkers,
    /// A name to look up is none.
    #[error("--discover-dns is HOST:PORT, found {found:?}")]
    DiscoverDns {
        /// What was given.
        found: String,
    },
    /// More names than a model has Services.
    #[error(
        "--discover-dns and --discover-endpoint-slices are given {found} times; at most {NAMES_MAX}: a model has one name for each role"
    )]
    TooManyNames {
        /// How many.
        found: usize,
    },
    /// A protocol of which this version knows nothing.
    #[error("--connector is {found:?}: one of baton, vllm-nixl (or nixlv2), sglang")]
    Connector {
        /// What was given.
        found: String,
    },
    /// A flag that goes with another connector.
    #[error("{flag} is not for connector {connector}: {cure}")]
    NotWithConnector {
        /// Which flag.
        flag: &'static str,
        /// The connector that was given.
        connector: Connector,
        /// What to do instead.
        cure: &'static str,
    },
    /// A role that there is not.
    #[error("--role is prefill, decode or prefill-decode, found {found:?}")]
    Role {
        /// What was given.
        found: String,
    },
    /// Another engine can't be asked for its role.
    #[error("with connector {connector}, say what the engine serves: --role prefill, decode or prefill-decode")]
    NoRole {
        /// The connector that was given.
        connector: Connector,
    },
    /// Something that other pods' proxies are told apart by is missing.
    #[error("{flag} is required with connector baton, --discover-dns, --discover-endpoint-slices and --endpoints-file")]
    Required {
        /// Which flag.
        flag: &'static str,
    },
    /// Only one of the policies has a threshold.
    #[error("--min-uncached-prompt-tokens goes with --disaggregation conditional")]
    Threshold,
    /// A bound of nothing would refuse everything.
    #[error("{flag} must be above 0")]
    Zero {
        /// Which flag.
        flag: &'static str,
    },
    /// More than makes sense.
    #[error("{flag} is {found}, at most {max}")]
    TooMuch {
        /// Which flag.
        flag: &'static str,
        /// What was given.
        found: u64,
        /// The most.
        max: u64,
    },
    /// A lease that is over before it is used.
    #[error("--kv-lease-seconds is {found}: at least {}, for a decode worker is sent {} s before its end at the latest", LEASE_MARGIN.as_secs() + 1, LEASE_MARGIN.as_secs())]
    Lease {
        /// What was given.
        found: u64,
    },
    /// An empty revision would pair with workers that have none.
    #[error("--revision must not be empty")]
    EmptyRevision,
    /// Services that can't be asked for.
    #[error(transparent)]
    EndpointSlices(#[from] EndpointSlicesError),
    /// A flag of llm-d's sidecar that can't be kept.
    #[error(transparent)]
    LlmD(#[from] llm_d::LlmDError),
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        let args = llm_d::translated(args)?;
        // Taken apart in full, so that a flag that nothing reads doesn't compile without a warning.
        let Args {
            listen,
            admin_listen,
            engine,
            role,
            bootstrap_port,
            prefill,
            decode,
            aggregated,
            tls_cert_file,
            tls_key_file,
            tls_client_ca_file,
            upstream_tls_ca_file,
            upstream_tls_cert_file,
            upstream_tls_key_file,
            upstream_tls_server_name,
            endpoints_file,
            discover_dns,
            discover_endpoint_slices,
            service_account_folder,
            kubernetes_service_host,
            kubernetes_service_port,
            connector,
            signing_key_file,
            revision,
            disaggregation,
            min_uncached_prompt_tokens,
            routing_file,
            fallback,
            fallback_prompt_tokens,
            enforce_disaggregation,
            prefill_selection,
            decode_selection,
            kv_lease_seconds,
            kv_events,
            kv_events_port,
            kv_events_replay_port,
            api_keys_file,
            trust_routing_hints,
            llm_d,
            threads,
            max_body_bytes,
            max_in_flight,
            max_queued,
            request_timeout_seconds,
            first_token_timeout_seconds,
            upstream_idle_timeout_seconds,
            drain_timeout_seconds,
            log_format,
        } = args;
        let connector: Connector = connector.parse().map_err(|_| ConfigError::Connector { found: connector })?;
        let direct = direct(connector, prefill, decode, aggregated)?;
        let cure = "Baton's own decode workers compute a prompt that no prefill worker has";
        for (flag, given) in [
            ("--fallback", fallback != FallbackWord::Always),
            ("--enforce-disaggregation", enforce_disaggregation),
            ("--prefiller-header", llm_d.prefiller_header),
        ] {
            if connector == Connector::Baton && given {
                return Err(ConfigError::NotWithConnector { flag, connector, cure });
            }
        }
        let names = discover_dns.len() + discover_endpoint_slices.len();
        let finds_peers = endpoints_file.is_some() || names > 0;
        if engine.is_none() && direct.is_empty() && !finds_peers {
            return Err(ConfigError::NoWorkers);
        }
        if names > NAMES_MAX {
            return Err(ConfigError::TooManyNames { found: names });
        }
        let prefiller_header = PrefillerHeader::of(&llm_d)?;
        let engine = engine.map(|url| own_engine(connector, &url, role.as_deref(), bootstrap_port)).transpose()?;
        let has_others = connector == Connector::Baton || finds_peers;
        let required =
            |flag, given: bool| if given || !has_others { Ok(()) } else { Err(ConfigError::Required { flag }) };
        required("--signing-key-file", signing_key_file.is_some())?;
        required("--revision", revision.is_some())?;
        if revision.as_ref().is_some_and(String::is_empty) {
            return Err(ConfigError::EmptyRevision);
        }
        let policy = match routing_file {
            Some(file) => PolicySource::File(file),
            None => PolicySource::Flags(
                Policy::new(disaggregation, min_uncached_prompt_tokens).map_err(|_| ConfigError::Threshold)?,
            ),
        };
        let is_engine_tls = engine.as_ref().is_some_and(|engine| engine.is_tls);
        let is_direct_tls = direct.iter().any(|engine| engine.is_tls);
        if (is_engine_tls || is_direct_tls) && upstream_tls_ca_file.is_none() {
            return Err(ConfigError::EngineTls);
        }
        let tls = TlsFiles {
            server: tls_cert_file.zip(tls_key_file).map(|(certificate, key)| ServerFiles {
                certificate,
                key,
                client_ca: tls_client_ca_file,
            }),
            upstream: upstream_tls_ca_file.map(|ca| UpstreamFiles {
                ca,
                identity: upstream_tls_cert_file.zip(upstream_tls_key_file),
                server_name: upstream_tls_server_name,
            }),
            is_engine_tls,
        };
        let seconds = |flag, value| match value {
            0 => Err(ConfigError::Zero { flag }),
            value => Ok(Duration::from_secs(value)),
        };
        let count = |flag, value| if value == 0 { Err(ConfigError::Zero { flag }) } else { Ok(value) };
        let lease = Duration::from_secs(kv_lease_seconds);
        if lease <= LEASE_MARGIN {
            return Err(ConfigError::Lease { found: kv_lease_seconds });
        }
        if threads > THREADS_MAX {
            return Err(ConfigError::TooMuch { flag: "--threads", found: threads as u64, max: THREADS_MAX as u64 });
        }
        if kv_events_port.is_some() && connector != Connector::VllmNixl {
            let cure = "Baton's own workers tell theirs without it, and no other engine is followed";
            return Err(ConfigError::NotWithConnector { flag: "--kv-events-port", connector, cure });
        }
        let kv_events = match kv_events {
            Switch::Off => KvEvents::Off,
            Switch::On => {
                KvEvents::On(kv_events_port.map(|port| VllmEvents { port, replay_port: kv_events_replay_port }))
            }
        };
        Ok(Config {
            listen,
            admin_listen,
            connector,
            engine,
            direct,
            tls,
            endpoints_file,
            discover_dns: discover_dns
                .into_iter()
                .map(|name| name.parse().map_err(|_| ConfigError::DiscoverDns { found: name }))
                .collect::<Result<_, _>>()?,
            endpoint_slices: EndpointSlices::of(
                discover_endpoint_slices,
                service_account_folder,
                kubernetes_service_host,
                kubernetes_service_port,
            )?,
            signing_key_file,
            revision: revision.unwrap_or_else(|| NO_REVISION.to_owned()),
            policy,
            resilience: Resilience {
                fallback: match fallback {
                    FallbackWord::Always => Fallback::Always,
                    FallbackWord::Short => Fallback::Short { tokens_max: fallback_prompt_tokens },
                    FallbackWord::Never => Fallback::Never,
                },
                enforce_disaggregation,
                lease,
            },
            selection: Selection { prefill: prefill_selection, decode: decode_selection },
            kv_events,
            api_keys_file,
            prefiller_header,
            trust_routing_hints,
            limits: Limits {
                body_bytes_max: count("--max-body-bytes", max_body_bytes)?,
                in_flight_max: count("--max-in-flight", max_in_flight)?,
                queued_max: max_queued,
                request_timeout: seconds("--request-timeout-seconds", request_timeout_seconds)?,
                first_token_timeout: seconds("--first-token-timeout-seconds", first_token_timeout_seconds)?,
                idle_timeout: seconds("--upstream-idle-timeout-seconds", upstream_idle_timeout_seconds)?,
            },
            drain_timeout: Duration::from_secs(drain_timeout_seconds),
            threads: count("--threads", threads)?,
            log_format,
        })
    }
}

fn own_engine(connector: Connector, url: &str, role: Option<&str>, bootstrap: u16) -> Result<Engine, ConfigError> {
    let engine = match connector {
        Connector::Baton => engine_address("--engine", url).map(|(address, is_tls)| Engine::at(address, is_tls))?,
        Connector::VllmNixl | Connector::Sglang => engine_with_options("--engine", url, false)?,
    };
    let role = role.map(|role| role.parse::<Role>().map_err(|_| ConfigError::Role { found: role.to_owned() }));
    let (role, bootstrap_port) = match (connector, role.transpose()?) {
        (Connector::Baton, None) => (None, None),
        (Connector::Baton, Some(_)) => {
            let cure = "Baton's own worker says itself what it serves";
            return Err(ConfigError::NotWithConnector { flag: "--role", connector, cure });
        }
        (Connector::VllmNixl | Connector::Sglang, None) => return Err(ConfigError::NoRole { connector }),
        (Connector::VllmNixl, role) => (role, None),
        (Connector::Sglang, role) => (role, Some(bootstrap)),
    };
    Ok(Engine { role, bootstrap_port, ..engine })
}

/// The engines of `--prefill` and `--decode`.
fn direct(
    connector: Connector,
    prefill: Vec<String>,
    decode: Vec<String>,
    aggregated: Vec<String>,
) -> Result<Vec<Engine>, ConfigError> {
    let given = [("--prefill", &prefill), ("--decode", &decode), ("--aggregated", &aggregated)];
    if let Some((flag, _)) = given.into_iter().find(|(_, urls)| connector == Connector::Baton && !urls.is_empty()) {
        let cure = "beside each of Baton's own workers stands a proxy: list these with --endpoints-file";
        return Err(ConfigError::NotWithConnector { flag, connector, cure });
    }
    let mut engines = Vec::new();
    for (flag, urls, role) in [
        ("--prefill", prefill, Role::Prefill),
        ("--decode", decode, Role::Decode),
        ("--aggregated", aggregated, Role::PrefillDecode),
    ] {
        for url in urls {
            let engine = engine_with_options(flag, &url, role == Role::Prefill)?;
            engines.push(Engine { role: Some(role), ..engine });
        }
    }
    Ok(engines)
}

impl Engine {
    fn at(address: Address, is_tls: bool) -> Self {
        Engine { address, role: None, bootstrap_port: None, dp_size: None, is_tls }
    }
}

/// An engine by its URL and what stands behind it.
fn engine_with_options(flag: &'static str, text: &str, may_bootstrap: bool) -> Result<Engine, ConfigError> {
    let mut parts = text.split(',');
    let (address, is_tls) = engine_address(flag, parts.next().unwrap_or_default())?;
    let mut engine = Engine::at(address, is_tls);
    for option in parts {
        let wrong = || ConfigError::EngineOption { flag, found: text.to_owned() };
        match option.split_once('=').ok_or_else(wrong)? {
            ("bootstrap", port) if may_bootstrap => engine.bootstrap_port = Some(port.parse().map_err(|_| wrong())?),
            ("dp", size) => {
                let size = size.parse().ok().filter(|size| (1..=RANKS_MAX).contains(size));
                engine.dp_size = Some(size.ok_or_else(wrong)?);
            }
            _ => return Err(wrong()),
        }
    }
    Ok(engine)
}

/// An engine's address, and whether it is spoken to through TLS.
fn engine_address(flag: &'static str, url: &str) -> Result<(Address, bool), ConfigError> {
    let wrong = |source| ConfigError::EngineUrl { flag, found: url.to_owned(), source };
    let (address, is_tls) = match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
        (Some(address), _) => (address, false),
        (None, Some(address)) => (address, true),
        (None, None) => return Err(wrong(None)),
    };
    let address = address.strip_suffix('/').unwrap_or(address).parse().map_err(|source| wrong(Some(source)))?;
    Ok((address, is_tls))
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
        assert_eq!(config.engine.expect("given").address.as_str(), "127.0.0.1:8200");
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
    fn a_front_door_finds_its_workers_by_services_whose_slices_it_watches() {
        let api = ["--kubernetes-service-host", "10.96.0.1", "--kubernetes-service-port", "443"];
        let services =
            ["--discover-endpoint-slices", "tiny-prefill-peers", "--discover-endpoint-slices", "ns/decode:http"];
        let found = config(&[&services[..], &api].concat()).expect("a right command line").endpoint_slices;
        let found = found.expect("it was asked for");
        assert_eq!(found.services.iter().map(ToString::to_string).collect::<Vec<_>>(), [services[1], services[3]]);
        assert_eq!(found.api.account, std::path::Path::new("/var/run/secrets/kubernetes.io/serviceaccount"));
        // Every container of a pod has the variables: alone they ask for nothing.
        let beside =
            config(&[&["--engine", "http://127.0.0.1:8200"], &api[..]].concat()).expect("a right command line");
        assert!(beside.endpoint_slices.is_none());
        let many = ["--discover-endpoint-slices", "peers"].repeat(17);
        let error = config(&[&many[..], &api].concat()).expect_err("too many").to_string();
        assert!(error.contains("given 17 times"), "{error}");
    }

    #[test]
    fn certificates_come_in_pairs_and_an_https_engine_is_dialled_with_tls() {
        let config = config(&[
            "--engine",
            "https://engine.svc:8200",
            "--tls-cert-file",
            "tls.crt",
            "--tls-key-file",
            "tls.key",
            "--upstream-tls-ca-file",
            "ca.crt",
        ])
        .expect("a right command line");
        assert_eq!(config.engine.expect("given").address.as_str(), "engine.svc:8200");
        let files = config.tls.server.expect("given");
        assert_eq!((files.certificate, files.key, files.client_ca), ("tls.crt".into(), "tls.key".into(), None));
        let upstream = config.tls.upstream.expect("given");
        assert_eq!((upstream.ca, upstream.identity, config.tls.is_engine_tls), ("ca.crt".into(), None, true));
        let fixed = ["baton-proxy", "--signing-key-file", "key", "--revision", "r1", "--engine", "http://h:1"];
        for alone in ["--tls-cert-file", "--tls-key-file", "--tls-client-ca-file", "--upstream-tls-cert-file"] {
            assert!(Args::try_parse_from(fixed.iter().chain(&[alone, "file"])).is_err(), "{alone}");
        }
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
        check(&["--engine", "https://127.0.0.1:8200"], "--upstream-tls-ca-file");
        check(&["--engine", "http://127.0.0.1:8200/v1"], "http://HOST:PORT");
        check(&["--discover-dns", "tiny-peers.default.svc"], "--discover-dns is HOST:PORT");
        check(
            &["--discover-endpoint-slices", "tiny-peers:8000/x"],
            "--discover-endpoint-slices is [NAMESPACE/]SERVICE",
        );
        check(&["--engine", engine, "--connector", "mooncake"], "one of baton, vllm-nixl");
        check(&["--engine", engine, "--connector", "vllm-nixl"], "say what the engine serves");
        check(&["--engine", engine, "--connector", "sglang", "--role", "both"], "--role is prefill");
        check(&["--engine", engine, "--role", "decode"], "--role is not for connector baton");
        check(&["--prefill", engine], "--prefill is not for connector baton");
        check(&["--engine", engine, "--fallback", "never"], "--fallback is not for connector baton");
        check(&["--engine", engine, "--enforce-disaggregation"], "--enforce-disaggregation is not for connector baton");
        let behind = "behind an engine's URL may stand";
        check(&["--connector", "sglang", "--prefill", "http://127.0.0.1:1,bootstrap=x"], behind);
        check(&["--connector", "sglang", "--decode", "http://127.0.0.1:1,bootstrap=1"], behind);
        check(&["--connector", "vllm-nixl", "--decode", "http://127.0.0.1:1,dp=0"], behind);
        check(&["--connector", "vllm-nixl", "--decode", "http://127.0.0.1:1,dp=1025"], behind);
        check(&["--connector", "vllm-nixl", "--aggregated", "http://127.0.0.1:1,dp"], behind);
        check(&["--engine", "http://127.0.0.1:8200,dp=2"], "--engine is an URL");
        check(&["--engine", engine, "--kv-events-port", "5557"], "--kv-events-port is not for connector baton");
        check(&["--engine", engine, "--kv-lease-seconds", "2"], "--kv-lease-seconds is 2");
        check(&["--engine", engine, "--threads", "0"], "--threads must be above 0");
        check(&["--engine", engine, "--threads", "65"], "--threads is 65, at most 64");
        check(&["--engine", engine, "--min-uncached-prompt-tokens", "5"], "goes with");
        check(&["--engine", engine, "--max-in-flight", "0"], "--max-in-flight must be above 0");
        check(&["--engine", engine, "--request-timeout-seconds", "0"], "--request-timeout-seconds");
        check(&["--engine", engine, "--revision", ""], "--revision");
    }

    fn without_key(flags: &[&str]) -> Result<Config, ConfigError> {
        Config::try_from(Args::try_parse_from([&["baton-proxy"], flags].concat()).expect("flags that clap takes"))
    }

    #[test]
    fn a_front_door_of_other_engines_needs_neither_key_nor_revision() {
        let flags = ["--connector", "sglang", "--prefill", "http://10.0.0.1:30000,bootstrap=9000", "--decode"];
        let config = without_key(&[&flags[..], &["http://10.0.0.2:30000"]].concat()).expect("a right command line");
        let ports: Vec<_> = config.direct.iter().map(|engine| (engine.role, engine.bootstrap_port)).collect();
        assert_eq!(ports, [(Some(Role::Prefill), Some(9000)), (Some(Role::Decode), None)]);
        let ranks = ["--connector", "sglang", "--prefill", "http://10.0.0.1:1,dp=8,bootstrap=9000", "--decode"];
        let config = without_key(&[&ranks[..], &["http://10.0.0.2:1,dp=4"]].concat()).expect("a right command line");
        let ranks: Vec<_> = config.direct.iter().map(|engine| (engine.dp_size, engine.bootstrap_port)).collect();
        assert_eq!(ranks, [(Some(8), Some(9000)), (Some(4), None)]);
        let missing = |flags: &[&str]| without_key(flags).expect_err("something is missing").to_string();
        assert!(missing(&["--engine", "http://127.0.0.1:8200"]).starts_with("--signing-key-file is required"));
        let found = ["--connector", "vllm-nixl", "--discover-dns", "peers:8000", "--signing-key-file", "key"];
        assert!(missing(&found).starts_with("--revision is required"));
    }

    #[test]
    fn llm_ds_sidecar_can_be_replaced_flag_by_flag() {
        let flags =
            ["--port=8000", "--vllm-port=8200", "--kv-connector=nixlv2", "--secure-proxy=false", "--prefiller-header"];
        let config = without_key(&[&flags[..], &["--allow-prefiller", "10.0.0.0/8:8000"]].concat()).expect("right");
        assert_eq!((config.listen.port(), config.connector), (8000, Connector::VllmNixl));
        let engine = config.engine.expect("given");
        assert_eq!((engine.address.as_str(), engine.role), ("127.0.0.1:8200", Some(Role::Decode)));
        assert!(config.prefiller_header.is_some());
        let check = |flag: &str, expect: &str| {
            let error = without_key(&[&flags[..], &[flag]].concat()).expect_err("refused").to_string();
            assert!(error.contains(expect), "{flag}: {error}");
        };
        check("--data-parallel-size=2", "one rank");
        check("--allow-prefiller=10.0.0.0/8", "NETWORK:PORT");
        check("--enable-ssrf-protection=false", "can't be turned off");
    }
}
