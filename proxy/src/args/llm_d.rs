//! Flags of llm-d's routing sidecar, by its names, so that its pods can run this proxy in its place. Each one either does here
//! what it does there or is refused with a reason (`config/llm_d.rs`); none is taken and ignored.

/// Flags that llm-d's routing sidecar has.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "In place of llm-d's routing sidecar")]
pub struct LlmD {
    /// Port for clients, on all addresses: --listen 0.0.0.0:PORT.
    #[arg(long, value_name = "PORT", conflicts_with = "listen")]
    pub port: Option<u16>,
    /// Port of this pod's engine: --engine http://127.0.0.1:PORT.
    #[arg(long, visible_alias = "model-server-port", value_name = "PORT", conflicts_with = "engine")]
    pub vllm_port: Option<u16>,
    /// Take the prefill worker from the request's header x-prefiller-host-port (a list: the first), which llm-d's scheduler
    /// writes. Only targets of --allow-prefiller are dialled; others are answered 403.
    #[arg(long)]
    pub prefiller_header: bool,
    /// With --prefiller-header: where prefill workers may be, as NETWORK:PORT, such as 10.0.0.0/8:8000 or [fd00::]/8:8000.
    /// Address and port are both compared. Without it nothing is allowed. May be repeated.
    #[arg(long, value_name = "NETWORK:PORT")]
    pub allow_prefiller: Vec<String>,
    /// With --prefiller-header: take one of the listed prefill workers at random.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub enable_prefiller_sampling: Option<bool>,
    /// llm-d's switch for its allowlist. Ours is always on: give --allow-prefiller.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub enable_ssrf_protection: Option<bool>,
    /// Serve TLS with tls.crt and tls.key of --cert-path.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub secure_proxy: Option<bool>,
    /// Folder with tls.crt and tls.key: --tls-cert-file and --tls-key-file.
    #[arg(long, value_name = "FOLDER")]
    pub cert_path: Option<std::path::PathBuf>,
    /// Data-parallel ranks of the engine. One alone is served behind one port here.
    #[arg(long, value_name = "COUNT")]
    pub data_parallel_size: Option<u32>,
}
