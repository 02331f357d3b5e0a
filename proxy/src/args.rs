//! The command line, as it is typed: names, defaults and help texts, and nothing decided from them.

use crate::plan::Disaggregation;
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
    /// The engine of this pod, as http://HOST:PORT. Leave it out for a front door that has none.
    #[arg(long, value_name = "URL")]
    pub engine: Option<String>,
    /// File with the addresses of all the model's proxies: {"endpoints": ["10.0.0.7:8000"]}. It is read again when it
    /// changes; this pod's own address may be among them.
    #[arg(long, value_name = "FILE")]
    pub endpoints_file: Option<PathBuf>,
    /// Name whose addresses are all the model's proxies, such as a headless Service: HOST:PORT. Looked up every second; this
    /// pod's own address may be among them. May be repeated, and given beside --endpoints-file: all that any of them lists
    /// are asked for their status, and need not be ready for it.
    #[arg(long, value_name = "HOST:PORT")]
    pub discover_dns: Vec<String>,
    /// Protocol between prefill and decode workers: baton, that of our own worker.
    #[arg(long, value_name = "NAME", default_value = "baton")]
    pub connector: String,
    /// File with the model's Ed25519 signing key: 64 hexadecimal digits. All proxies of a model have the same one.
    #[arg(long, value_name = "FILE")]
    pub signing_key_file: PathBuf,
    /// Revision of the manifest that this pod was made for. Workers of other revisions are never paired with.
    #[arg(long, value_name = "NAME")]
    pub revision: String,
    /// Which prompts go to a prefill worker: always, conditional (long ones), never.
    #[arg(long, value_name = "POLICY", default_value_t = Disaggregation::Always)]
    pub disaggregation: Disaggregation,
    /// With conditional, and required there: prompts with fewer tokens than this that are not in the decode worker's prefix
    /// cache stay there. Where that worker is too busy to look within 5 ms, every token counts as uncached.
    #[arg(long, value_name = "TOKENS")]
    pub min_uncached_prompt_tokens: Option<u64>,
    /// File with the policy, in place of the two flags above: {"disaggregation": "conditional", "minUncachedPromptTokens": 256}.
    /// It is read again when it changes, and requests that come after it go by the new policy.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["disaggregation", "min_uncached_prompt_tokens"])]
    pub routing_file: Option<PathBuf>,
    /// Largest body that a client may send, in bytes. 4 MiB is about a million tokens of text.
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20)]
    pub max_body_bytes: usize,
    /// Clients' requests served at once; more are answered 429. Other pods' legs have a bound of the same size of their
    /// own. The default allows for eight times what one engine batches (64 sequences).
    #[arg(long, value_name = "COUNT", default_value_t = 512)]
    pub max_in_flight: usize,
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
