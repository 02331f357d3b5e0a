//! What the worker was told, checked: nothing is read or bound before this succeeds, and nothing is read from flags after it.

use crate::args::Args;
use crate::openai::limits::CHOICES_MAX;
use baton_engine::config::Dtype;
use baton_engine::kv_pool::BLOCK_TOKENS;
use baton_wire::Role;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// What the worker was told.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Which phases to serve.
    pub role: Role,
    /// The model's directory.
    pub model_dir: PathBuf,
    /// Its name towards clients.
    pub served_model_name: String,
    /// Workers of equal revisions are paired.
    pub revision: String,
    /// Where HTTP listens.
    pub http: SocketAddr,
    /// Where KV is handed out, for workers that do.
    pub kv: Option<KvConfig>,
    /// Type to compute in, where it is not the model's own.
    pub dtype: Option<Dtype>,
    /// Bytes for KV blocks, where not chosen by us.
    pub kv_cache_bytes: Option<u64>,
    /// Prompt plus completion in tokens, where it is not the model's own.
    pub max_model_length: Option<usize>,
    /// Tokens a step computes at most.
    pub max_batch_tokens: usize,
    /// Sequences that run at once at most.
    pub max_num_seqs: usize,
    /// Tokens of one prompt that a step computes at most.
    pub prefill_chunk_tokens: usize,
    /// How long running requests may take to finish.
    pub drain_timeout: Duration,
    /// Whether the log is JSON.
    pub log_json: bool,
}

/// How KV is handed out.
#[derive(Clone, Debug, PartialEq)]
pub struct KvConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// The address that peers are told; the port is the listener's.
    pub advertise: IpAddr,
    /// File with the public key of who may grant transfers.
    pub proxy_public_key_file: PathBuf,
}

/// A flag that can't be used. Its text names the flag.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// `--role` is none of ours.
    #[error("--role is {found:?}; it must be one of prefill, decode, prefill-decode")]
    UnknownRole {
        /// What it is.
        found: String,
    },
    /// `--dtype` is none of ours.
    #[error("--dtype is {found:?}; it must be one of bf16, f16, f32")]
    UnknownDtype {
        /// What it is.
        found: String,
    },
    /// The served name is neither given nor to be had from the directory.
    #[error("--model {} has no last part to name the model after; give --served-model-name", path.display())]
    Unnamed {
        /// The directory.
        path: PathBuf,
    },
    /// A flag that must say something is empty.
    #[error("{flag} must not be empty")]
    Empty {
        /// Which flag.
        flag: &'static str,
    },
    /// A count is too small.
    #[error("{flag} is {found}; it must be at least {min}: {reason}")]
    TooSmall {
        /// Which flag.
        flag: &'static str,
        /// What it is.
        found: usize,
        /// What it must at least be.
        min: usize,
        /// Why.
        reason: &'static str,
    },
    /// Chunks end where blocks end.
    #[error("--prefill-chunk-tokens is {found}; it must be a multiple of {BLOCK_TOKENS}, the tokens of a KV block")]
    ChunkNotWholeBlocks {
        /// What it is.
        found: usize,
    },
    /// A prefill worker without a key could hand its KV to nobody.
    #[error(
        "--role prefill needs --proxy-public-key-file: KV is handed only to who brings a token of this model's proxies"
    )]
    KeyMissing,
    /// Peers can't dial "any address".
    #[error("--advertise-address must be given: {flag} {host} is no address that other workers could dial")]
    AdvertiseMissing {
        /// Which flag says where KV is listened for.
        flag: &'static str,
        /// What is listened on.
        host: IpAddr,
    },
    /// As above, but given so.
    #[error("--advertise-address {found} is no address that other workers could dial")]
    AdvertiseUnspecified {
        /// What it is.
        found: IpAddr,
    },
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        let role = args.role.parse::<Role>().map_err(|_| ConfigError::UnknownRole { found: args.role.clone() })?;
        at_least("--max-num-seqs", args.max_num_seqs, CHOICES_MAX as usize, "a request may ask for that many choices")?;
        at_least(
            "--max-batch-tokens",
            args.max_batch_tokens,
            args.max_num_seqs + BLOCK_TOKENS,
            "a step must hold a token of each of --max-num-seqs sequences and one block of a prompt",
        )?;
        at_least(
            "--prefill-chunk-tokens",
            args.prefill_chunk_tokens,
            BLOCK_TOKENS,
            "a chunk is at least one KV block",
        )?;
        if !args.prefill_chunk_tokens.is_multiple_of(BLOCK_TOKENS) {
            return Err(ConfigError::ChunkNotWholeBlocks { found: args.prefill_chunk_tokens });
        }
        if let Some(length) = args.max_model_length {
            at_least("--max-model-length", length, 2, "a prompt and a completion have a token each")?;
        }
        if args.revision.is_empty() {
            return Err(ConfigError::Empty { flag: "--revision" });
        }
        Ok(Config {
            role,
            served_model_name: served_model_name(&args)?,
            dtype: args.dtype.as_deref().map(dtype).transpose()?,
            http: SocketAddr::new(args.host, args.port),
            kv: kv(role, &args)?,
            model_dir: args.model,
            revision: args.revision,
            kv_cache_bytes: args.kv_cache_bytes,
            max_model_length: args.max_model_length,
            max_batch_tokens: args.max_batch_tokens,
            max_num_seqs: args.max_num_seqs,
            prefill_chunk_tokens: args.prefill_chunk_tokens,
            drain_timeout: Duration::from_secs(args.drain_timeout_seconds),
            log_json: args.log_format == "json",
        })
    }
}

fn at_least(flag: &'static str, found: usize, min: usize, reason: &'static str) -> Result<(), ConfigError> {
    if found >= min { Ok(()) } else { Err(ConfigError::TooSmall { flag, found, min, reason }) }
}

fn served_model_name(args: &Args) -> Result<String, ConfigError> {
    match &args.served_model_name {
        Some(name) if name.is_empty() => Err(ConfigError::Empty { flag: "--served-model-name" }),
        Some(name) => Ok(name.clone()),
        None => match args.model.file_name() {
            Some(name) => Ok(name.to_string_lossy().into_owned()),
            None => Err(ConfigError::Unnamed { path: args.model.clone() }),
        },
    }
}

fn dtype(text: &str) -> Result<Dtype, ConfigError> {
    let known = [Dtype::Bf16, Dtype::F16, Dtype::F32].into_iter().find(|dtype| dtype.as_str() == text);
    known.ok_or_else(|| ConfigError::UnknownDtype { found: text.to_owned() })
}

fn kv(role: Role, args: &Args) -> Result<Option<KvConfig>, ConfigError> {
    let key_file = match (role, &args.proxy_public_key_file) {
        (Role::Decode, _) | (Role::PrefillDecode, None) => return Ok(None),
        (Role::Prefill, None) => return Err(ConfigError::KeyMissing),
        (Role::Prefill | Role::PrefillDecode, Some(file)) => file.clone(),
    };
    let (flag, host) = args.kv_host.map_or(("--host", args.host), |host| ("--kv-host", host));
    let advertise = match args.advertise_address {
        Some(found) if found.is_unspecified() => return Err(ConfigError::AdvertiseUnspecified { found }),
        Some(address) => address,
        None if host.is_unspecified() => return Err(ConfigError::AdvertiseMissing { flag, host }),
        None => host,
    };
    let listen = SocketAddr::new(host, args.kv_port);
    Ok(Some(KvConfig { listen, advertise, proxy_public_key_file: key_file }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, CommandLine};
    use clap::error::ErrorKind;
    use clap::{CommandFactory, Parser};

    fn config(flags: &str) -> Result<Config, ConfigError> {
        let words = format!("baton-worker --model /models/tiny {flags}");
        let line = CommandLine::try_parse_from(words.split_whitespace()).expect("the command line parses");
        Config::try_from(line.serve.expect("no command"))
    }

    #[test]
    fn flags_alone_serve_and_a_word_asks_for_something_else() {
        CommandLine::command().debug_assert();
        let parse = |words: &str| CommandLine::try_parse_from(words.split_whitespace());
        assert_eq!(parse("baton-worker").expect_err("incomplete").kind(), ErrorKind::MissingRequiredArgument);
        assert_eq!(
            parse("baton-worker --role decode").expect_err("incomplete").kind(),
            ErrorKind::MissingRequiredArgument
        );
        let fetch = parse("baton-worker fetch --uri hf://a/b --to /m").expect("a command");
        assert!(matches!(fetch, CommandLine { command: Some(Command::Fetch(_)), serve: None }));
        let probe = parse("baton-worker probe ready --port 8200").expect("a command");
        assert!(matches!(probe, CommandLine { command: Some(Command::Probe(_)), serve: None }));
        assert!(parse("baton-worker --role decode --model m probe ready").is_err(), "one or the other");
        assert!(parse("baton-worker probe well").is_err());
    }

    #[test]
    fn defaults_are_a_pod_of_its_own() {
        let config = config("--role prefill-decode").expect("valid");
        assert_eq!(config.served_model_name, "tiny");
        assert_eq!(config.http, "0.0.0.0:8200".parse().expect("an address"));
        assert_eq!(config.kv, None, "no key, no KV port");
    }

    #[test]
    fn a_prefill_worker_says_where_its_kv_is() {
        let key = "--role prefill --proxy-public-key-file /key";
        let kv = config(&format!("{key} --host 127.0.0.2")).expect("valid").kv.expect("hands out KV");
        assert_eq!((kv.listen.to_string(), kv.advertise.to_string()), ("127.0.0.2:5600".into(), "127.0.0.2".into()));
        let kv = config(&format!("{key} --advertise-address 10.1.2.3")).expect("valid").kv.expect("hands out KV");
        assert_eq!((kv.listen.to_string(), kv.advertise.to_string()), ("0.0.0.0:5600".into(), "10.1.2.3".into()));
        assert!(matches!(config(key), Err(ConfigError::AdvertiseMissing { flag: "--host", .. })));
    }

    #[test]
    fn http_may_be_the_pods_own_matter_while_kv_is_reached_from_outside() {
        let flags = "--role prefill --proxy-public-key-file /key --host 127.0.0.1 --kv-host 0.0.0.0";
        assert!(matches!(config(flags), Err(ConfigError::AdvertiseMissing { flag: "--kv-host", .. })));
        let config = config(&format!("{flags} --advertise-address 10.1.2.3")).expect("valid");
        assert_eq!(config.http.to_string(), "127.0.0.1:8200");
        let kv = config.kv.expect("hands out KV");
        assert_eq!((kv.listen.to_string(), kv.advertise.to_string()), ("0.0.0.0:5600".into(), "10.1.2.3".into()));
    }

    #[test]
    fn each_wrong_flag_is_named() {
        for (flags, flag) in [
            ("--role both", "--role"),
            ("--role prefill", "--proxy-public-key-file"),
            ("--role decode --dtype int8", "--dtype"),
            ("--role decode --max-num-seqs 7", "--max-num-seqs"),
            ("--role decode --max-batch-tokens 64", "--max-batch-tokens"),
            ("--role decode --prefill-chunk-tokens 16", "--prefill-chunk-tokens"),
            ("--role decode --prefill-chunk-tokens 33", "--prefill-chunk-tokens"),
            ("--role decode --max-model-length 1", "--max-model-length"),
            ("--role decode --served-model-name=", "--served-model-name"),
            ("--role prefill --proxy-public-key-file /k --advertise-address 0.0.0.0", "--advertise-address"),
        ] {
            let error = config(flags).expect_err(flags).to_string();
            assert!(error.contains(flag), "{flags}: {error}");
        }
    }

    #[test]
    fn a_decode_worker_takes_the_key_that_all_pods_mount_and_opens_no_kv_port() {
        assert_eq!(config("--role decode --proxy-public-key-file /key").expect("valid").kv, None);
    }
}
