//! The command line as it is typed: names, units, defaults and why they are what they are. Checked in `config.rs`.

use std::net::IpAddr;
use std::path::PathBuf;

/// Serves one model: prefill, decode or both. Reached by the routing proxy beside it, and by other workers for KV.
///
/// Starts its HTTP port at once and reports loading there (/status); takes work when /ready answers 200. SIGTERM or SIGINT drains;
/// a second one ends at once. Wrong usage exits 64, a model that can't be served 1.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "baton-worker", version, max_term_width = 120)]
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

    /// Address to listen on, for HTTP and KV alike.
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub host: IpAddr,

    /// Address at which other workers reach the KV port; in a pod, its IP. Default: --host, where that is one address.
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
