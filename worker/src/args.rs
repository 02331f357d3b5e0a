//! The command line as it is typed: names, units, defaults and why they are what they are. Checked in `config.rs` and `fetch/config.rs`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// What the program is told: flags alone serve a model, the first word may ask for something else.
#[derive(Clone, Debug, clap::Parser)]
#[command(
    name = "baton-worker",
    version,
    max_term_width = 120,
    about = "Serves one model: prefill, decode or both. Reached by the routing proxy beside it, and by other workers for KV.",
    long_about = LONG_ABOUT,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub struct CommandLine {
    /// Something else than serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// What is served; absent with a command.
    #[command(flatten)]
    pub serve: Option<Args>,
}

const LONG_ABOUT: &str = "\
Serves one model: prefill, decode or both. Reached by the routing proxy beside it, and by other workers for KV.

Starts its HTTP port at once and reports loading there (/status); takes work when /ready answers 200. SIGTERM or SIGINT drains;
a second one ends at once. Wrong usage exits 64, a model that can't be served 1.";

/// What the program does instead of serving.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Command {
    /// Download a model into a directory, verify it, and end. Starting it again goes on where it was.
    Fetch(FetchArgs),
    /// Ask the worker of this pod how it is, say it in one line, and exit 0 or 1.
    Probe(ProbeArgs),
}

/// `baton-worker fetch`. Credentials come from the environment alone: HF_TOKEN for hf://; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY
/// and AWS_SESSION_TOKEN for s3://.
#[derive(Clone, Debug, clap::Args)]
pub struct FetchArgs {
    /// What to download: hf://ORGANISATION/MODEL or s3://BUCKET/PREFIX. Of what is there only the files of a model directory are
    /// taken: configuration, tokenizer and safetensors.
    #[arg(long, value_name = "URI")]
    pub uri: String,

    /// Branch, tag or commit of an hf:// model. A branch is resolved once: what is in --to then stays. Default: main.
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,

    /// Directory that becomes the model's. Its volume needs room for all of it.
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,

    /// Another server than the public one, as http(s)://HOST[:PORT]: a mirror of the hub, or an S3 store (addressed with the bucket
    /// in the path). Default: https://huggingface.co, or AWS.
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,

    /// Region of an s3:// bucket. Default: the environment's AWS_REGION, else us-east-1.
    #[arg(long, value_name = "REGION")]
    pub region: Option<String>,

    /// Where GET /progress and /health are answered meanwhile. Default: nowhere.
    #[arg(long, value_name = "IP:PORT")]
    pub admin_listen: Option<SocketAddr>,

    /// Form of the log on stderr: text for people, json for collectors.
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json"])]
    pub log_format: String,
}

/// `baton-worker probe`.
#[derive(Clone, Debug, clap::Args)]
pub struct ProbeArgs {
    /// live: the process answers. ready: it takes new work.
    #[arg(value_enum, value_name = "WHAT")]
    pub what: ProbeKind,

    /// Address of the worker's HTTP port.
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub host: IpAddr,

    /// The worker's HTTP port.
    #[arg(long, value_name = "PORT", default_value_t = baton_wire::names::ports::ENGINE)]
    pub port: u16,

    /// Seconds to wait for the answer. Keep it below the probe's timeoutSeconds, or nobody reads why it failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub timeout_seconds: u64,
}

/// What a probe asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ProbeKind {
    /// The process answers.
    Live,
    /// It takes new work.
    Ready,
}

/// What is served, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Which phases of a request to serve: prefill, decode or prefill-decode (both: no KV has to move).
    #[arg(long, value_name = "ROLE")]
    pub role: String,

    /// Model directory as published on Hugging Face: config.json, safetensors, tokenizer.json and its companions.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,

    /// Name that clients give as "model". Default: the directory's name.
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,

    /// Revision of the manifest that this worker is started for. Proxies pair workers of equal revisions only.
    #[arg(long, value_name = "REVISION", default_value = "local")]
    pub revision: String,

    /// Address to listen on. In a pod 127.0.0.1 will do: only the proxy beside it needs to reach the HTTP port.
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub host: IpAddr,

    /// Address to listen on for KV, which other pods fetch. Default: --host.
    #[arg(long, value_name = "IP")]
    pub kv_host: Option<IpAddr>,

    /// Address at which other workers reach the KV port; in a pod, its IP. Default: --kv-host, where that is one address.
    #[arg(long, value_name = "IP")]
    pub advertise_address: Option<IpAddr>,

    /// HTTP port. Only the proxy of the same pod needs to reach it. 0 picks a free one.
    #[arg(long, value_name = "PORT", default_value_t = baton_wire::names::ports::ENGINE)]
    pub port: u16,

    /// Port on which decode workers fetch KV; opened by roles that prefill for others. 0 picks a free one.
    #[arg(long, value_name = "PORT", default_value_t = baton_wire::names::ports::KV)]
    pub kv_port: u16,

    /// Type to compute in and to keep KV in: bf16, f16 or f32. Default: the type that the model is published in.
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<String>,

    /// Bytes of memory for KV blocks. Default: a quarter of the memory that is available (cgroup or machine), at most 2 GiB and
    /// no more than --max-num-seqs sequences can fill, but room for one sequence of --max-model-length; the log says how much.
    #[arg(long, value_name = "BYTES")]
    pub kv_cache_bytes: Option<u64>,

    /// Tokens that prompt and completion may have together. Default: what the model was made for, or what --kv-cache-bytes holds
    /// where that is less.
    #[arg(long, value_name = "TOKENS")]
    pub max_model_length: Option<usize>,

    /// Tokens that a step computes at most, prefill chunks and decode steps together. More computes prompts faster, less keeps
    /// the time between tokens even.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub max_batch_tokens: usize,

    /// Sequences that are computed at once at most; each choice (n) of a request is one. More raise throughput and the time
    /// between tokens.
    #[arg(long, value_name = "SEQUENCES", default_value_t = 64)]
    pub max_num_seqs: usize,

    /// Tokens of one prompt that a step computes at most, in whole blocks of 32. A chunk's KV leaves while the next one computes, so
    /// smaller ones overlap more; larger ones compute faster.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub prefill_chunk_tokens: usize,

    /// File with the public key (64 hexadecimal digits) of this model's proxies: KV is handed only to who brings a token signed by
    /// them. Needed by --role prefill; without it a prefill-decode worker opens no KV port. A decode worker has no use for it.
    #[arg(long, value_name = "FILE")]
    pub proxy_public_key_file: Option<PathBuf>,

    /// Seconds that running requests may take to finish after SIGTERM before they are cut off. Keep it below the pod's
    /// terminationGracePeriodSeconds, which ends the process regardless.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub drain_timeout_seconds: u64,

    /// Form of the log on stderr: text for people, json for collectors. Its level is set by the environment variable BATON_LOG
    /// (such as "debug" or "baton_worker=debug"; default "info").
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json"])]
    pub log_format: String,
}
