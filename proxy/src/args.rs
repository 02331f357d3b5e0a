//! The command line, as it is typed: names, defaults and help texts, and nothing decided from them.

mod llm_d;

pub use llm_d::LlmD;

use crate::estimate::Disaggregation;
use crate::select::Mode;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Routes requests for one model to its workers: computes the prompt on a prefill worker, generates on a decode worker,
/// and answers as one OpenAI-compatible server.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "baton-proxy", version)]
pub struct Args {
    /// Where clients and other pods' proxies connect.
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:8000")]
    pub listen: SocketAddr,
    /// Where metrics and debug pages are served. Never expose it to clients.
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:9090")]
    pub admin_listen: SocketAddr,
    /// The engine of this pod, as http://HOST:PORT, or https://HOST:PORT with --upstream-tls-ca-file. Leave it out for a front
    /// door that has none. Behind an engine that is not Baton's may stand ,dp=N, as with --prefill.
    #[arg(long, value_name = "URL")]
    pub engine: Option<String>,
    /// What the engine of this pod serves, where it is not Baton's own worker, which says so itself: prefill, decode or prefill-decode.
    #[arg(long, value_name = "ROLE")]
    pub role: Option<String>,
    /// With connector sglang: the port of this pod's bootstrap server, where it prefills. SGLang's own default.
    #[arg(long, value_name = "PORT", default_value_t = 8998)]
    pub bootstrap_port: u16,
    /// A prefill engine that has no proxy of ours beside it, as http://HOST:PORT, and with connector sglang its bootstrap port:
    /// http://HOST:PORT,bootstrap=8998. With ,dp=N behind it a data-parallel rank is chosen for each request, from 0 to N-1; left
    /// out, the engine's metrics show its ranks. Not with connector baton. May be repeated.
    #[arg(long, value_name = "URL")]
    pub prefill: Vec<String>,
    /// A decode engine that has no proxy of ours beside it, as http://HOST:PORT, with ,dp=N as above. Not with connector baton. May
    /// be repeated.
    #[arg(long, value_name = "URL")]
    pub decode: Vec<String>,
    /// An engine that computes and generates in one, as http://HOST:PORT: what can't be handed over may go there. With connector
    /// sglang it is the only kind that can serve then, because its decode engines compute no prompts. May be repeated.
    #[arg(long, value_name = "URL")]
    pub aggregated: Vec<String>,
    /// File with this proxy's certificate and those between it and its authority, in PEM: with it --listen speaks TLS. Read
    /// again when it changes, for new connections. The admin port, with the probes, stays plaintext.
    #[arg(long, value_name = "FILE", requires = "tls_key_file")]
    pub tls_cert_file: Option<PathBuf>,
    /// File with the private key of --tls-cert-file, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert_file")]
    pub tls_key_file: Option<PathBuf>,
    /// File with authorities in PEM: clients and other pods' proxies must show a certificate of one of them.
    #[arg(long, value_name = "FILE", requires = "tls_cert_file")]
    pub tls_client_ca_file: Option<PathBuf>,
    /// File with authorities in PEM, for what is dialled: other pods' proxies are dialled with TLS, and must show a certificate
    /// of one of them; so must an engine with https.
    #[arg(long, value_name = "FILE")]
    pub upstream_tls_ca_file: Option<PathBuf>,
    /// File with the certificate that is shown to what is dialled, in PEM.
    #[arg(long, value_name = "FILE", requires_all = ["upstream_tls_ca_file", "upstream_tls_key_file"])]
    pub upstream_tls_cert_file: Option<PathBuf>,
    /// File with the private key of --upstream-tls-cert-file, in PEM.
    #[arg(long, value_name = "FILE", requires = "upstream_tls_cert_file")]
    pub upstream_tls_key_file: Option<PathBuf>,
    /// Name that certificates of what is dialled must bear, in place of the host that was dialled: pods are dialled by their
    /// addresses, which certificates seldom bear.
    #[arg(long, value_name = "NAME", requires = "upstream_tls_ca_file")]
    pub upstream_tls_server_name: Option<String>,
    /// File with the addresses of all the model's proxies: {"endpoints": ["10.0.0.7:8000"]}. It is read again when it
    /// changes; this pod's own address may be among them.
    #[arg(long, value_name = "FILE")]
    pub endpoints_file: Option<PathBuf>,
    /// Name whose addresses are all the model's proxies, such as a headless Service: HOST:PORT. Looked up every second; this
    /// pod's own address may be among them. May be repeated, and given beside --endpoints-file: all that any of them lists
    /// are asked for their status, and need not be ready for it.
    #[arg(long, value_name = "HOST:PORT")]
    pub discover_dns: Vec<String>,
    /// Service whose EndpointSlices are all the model's proxies: [NAMESPACE/]SERVICE[:PORT_NAME], by default in the pod's own
    /// namespace and with its only port. Watched at the API server as the pod's service account, which needs the right to list and
    /// watch endpointslices there (docs/proxy.md). May be repeated, and given beside the two above.
    #[arg(long, value_name = "SERVICE")]
    pub discover_endpoint_slices: Vec<String>,
    /// With --discover-endpoint-slices: folder with the service account's token, ca.crt and namespace. The default is where
    /// Kubernetes mounts them.
    #[arg(long, value_name = "FOLDER", default_value = "/var/run/secrets/kubernetes.io/serviceaccount")]
    pub service_account_folder: PathBuf,
    /// With --discover-endpoint-slices: host of the API server.
    #[arg(long, value_name = "HOST", env = "KUBERNETES_SERVICE_HOST", hide_env_values = true)]
    pub kubernetes_service_host: Option<String>,
    /// With --discover-endpoint-slices: port of the API server.
    #[arg(long, value_name = "PORT", env = "KUBERNETES_SERVICE_PORT", hide_env_values = true)]
    pub kubernetes_service_port: Option<String>,
    /// Protocol between prefill and decode engines: baton (Baton's own worker), vllm-nixl (vLLM's NixlConnector, also written
    /// nixlv2), sglang (SGLang's bootstrap server).
    #[arg(long, visible_alias = "kv-connector", value_name = "NAME", default_value = "baton")]
    pub connector: String,
    /// File with the model's Ed25519 signing key: 64 hexadecimal digits. All proxies of a model have the same one. Required
    /// with connector baton and wherever other pods' proxies are found.
    #[arg(long, value_name = "FILE")]
    pub signing_key_file: Option<PathBuf>,
    /// Revision of the manifest that this pod was made for. Workers of other revisions are never paired with. Required
    /// with connector baton and wherever other pods' proxies are found.
    #[arg(long, value_name = "NAME")]
    pub revision: Option<String>,
    /// Which prompts go to a prefill worker: always, conditional (long ones), never.
    #[arg(long, value_name = "POLICY", default_value_t = Disaggregation::Always)]
    pub disaggregation: Disaggregation,
    /// With conditional: prompts with fewer tokens than this that are not in the decode worker's prefix cache stay there. From there on
    /// what takes less time is done, as far as it is measured. Not given, a prompt stays below 64 tokens.
    #[arg(long, value_name = "TOKENS")]
    pub min_uncached_prompt_tokens: Option<u64>,
    /// File with the policy, in place of the two flags above: {"disaggregation": "conditional", "minUncachedPromptTokens": 256}.
    /// It is read again when it changes, and requests that come after it go by the new policy.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["disaggregation", "min_uncached_prompt_tokens"])]
    pub routing_file: Option<PathBuf>,
    /// What is done with a request whose prefill failed on two workers: always (the decode worker computes the prompt), short
    /// (where the prompt has at most --fallback-prompt-tokens tokens), never (503 with Retry-After). Baton's own worker always
    /// computes the prompt itself.
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = FallbackWord::Always)]
    pub fallback: FallbackWord,
    /// With --fallback short: the longest such prompt, in tokens. The default takes an engine some hundred milliseconds.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    pub fallback_prompt_tokens: u64,
    /// Fail (503) rather than serve a request whose prompt can't be computed by a prefill worker, whatever the cause.
    #[arg(long)]
    pub enforce_disaggregation: bool,
    /// How a prefill worker is chosen: kv-aware (by cost: work ahead, less what its prefix cache saves), least-loaded,
    /// power-of-two, round-robin, random.
    #[arg(long, value_name = "MODE", default_value_t = Mode::KvAware)]
    pub prefill_selection: Mode,
    /// How a decode worker is chosen, where this pod's engine is not: the same modes.
    #[arg(long, value_name = "MODE", default_value_t = Mode::KvAware)]
    pub decode_selection: Mode,
    /// With connector vllm-nixl: how long a prefill engine holds KV for a decode engine, in seconds: vLLM's
    /// kv_lease_duration, whose default this is.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub kv_lease_seconds: u64,
    /// Follow what workers tell of their prefix caches: on or off. Off, prompts go where the least is to be done, and with other engines
    /// where prompts like them went before.
    #[arg(long, value_name = "SWITCH", value_enum, default_value_t = Switch::On)]
    pub kv_events: Switch,
    /// With connector vllm-nixl: the port at which each vLLM engine publishes its KV events (the port of `endpoint` in its
    /// --kv-events-config), at the host where it or the proxy beside it is dialled. Not given, they are not followed.
    #[arg(long, value_name = "PORT")]
    pub kv_events_port: Option<u16>,
    /// The port at which each vLLM engine repeats events that were missed (`replay_endpoint` there).
    #[arg(long, value_name = "PORT", requires = "kv_events_port")]
    pub kv_events_replay_port: Option<u16>,
    /// File with the API keys that clients must have, by their SHA-256 (docs/proxy.md). It is read again when it changes.
    /// Without it everybody is served.
    #[arg(long, value_name = "FILE")]
    pub api_keys_file: Option<PathBuf>,
    /// Believe headers of clients that name workers: x-worker-instance-id, x-prefill-instance-id, x-data-parallel-rank,
    /// x-prefill-dp-rank, x-baton-allowed-workers. For a front door behind a scheduler of your own; else they are removed.
    #[arg(long)]
    pub trust_routing_hints: bool,
    /// Flags of llm-d's routing sidecar.
    #[command(flatten)]
    pub llm_d: LlmD,
    /// Threads that serve requests. One does some 20,000 requests a second.
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub threads: usize,
    /// Largest body that a client may send, in bytes. 4 MiB is about a million tokens of text.
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20)]
    pub max_body_bytes: usize,
    /// Clients' requests served at once; more wait (--max-queued). Other pods' legs have a bound of the same size of their
    /// own. The default allows for eight times what one engine batches (64 sequences).
    #[arg(long, value_name = "COUNT", default_value_t = 512)]
    pub max_in_flight: usize,
    /// Clients' requests that wait for room, by priority and fairly by tenant; more are answered 429.
    #[arg(long, value_name = "COUNT", default_value_t = 512)]
    pub max_queued: usize,
    /// Longest life of a request, in seconds, from its first byte to its last token. The default is the time after which
    /// OpenAI's own client libraries give up.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub request_timeout_seconds: u64,
    /// Longest wait for the first token, in seconds. Long prompts on a busy CPU worker take minutes.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub first_token_timeout_seconds: u64,
    /// Longest silence of a decode worker in the midst of a stream, in seconds. A preempted sequence is silent while it
    /// is recomputed, so this is far above the time between two tokens.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub upstream_idle_timeout_seconds: u64,
    /// After SIGTERM, how long running requests may go on, in seconds. Keep it below the pod's termination grace period.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub drain_timeout_seconds: u64,
    /// How log lines look: text for people, json for collectors. What is logged: environment variable BATON_LOG.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For collectors: one JSON object a line.
    Json,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// It is done.
    On,
    /// It is not.
    Off,
}

/// What is done where no prefill worker computes the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum FallbackWord {
    /// The decode worker computes it.
    Always,
    /// The decode worker computes it where it is short.
    Short,
    /// The request fails.
    Never,
}
