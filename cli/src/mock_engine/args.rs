//! The command line of `baton mock-engine`: names, defaults and help texts, and nothing decided from them.

use super::fail::Spec;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Whose side of the handover is kept, and whose is checked.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct MockEngineArgs {
    /// The engine whose disaggregation contract is kept, and checked on the router's side.
    #[arg(long, value_name = "ENGINE", value_enum)]
    pub(crate) contract: Contract,
    /// Which legs it serves.
    #[arg(long, value_name = "ROLE", value_enum, default_value_t = MockRole::Both)]
    pub(crate) role: MockRole,
    /// Where HTTP is served; port 0 takes a free one, which is printed.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    pub(crate) listen: SocketAddr,
    /// Where mocks that decode fetch KV from this one (vllm and baton). Default: a free port at the address of --listen.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) kv_side_channel: Option<SocketAddr>,
    /// Port of the bootstrap server (sglang), at the address of --listen. Default: a free one.
    #[arg(long, value_name = "PORT", conflicts_with = "kv_side_channel")]
    pub(crate) bootstrap_port: Option<u16>,
    /// The address that peers are told, where --listen names none that they could reach. Default: that of --listen.
    #[arg(long, value_name = "IP")]
    pub(crate) advertise: Option<IpAddr>,
    /// Milliseconds between two tokens of an answer.
    #[arg(long, value_name = "MS", default_value = "0", value_parser = parse_ms)]
    pub(crate) token_delay: Duration,
    /// Milliseconds that each prompt takes, however many are computed at once.
    #[arg(long, value_name = "MS", default_value = "0", value_parser = parse_ms)]
    pub(crate) prefill_delay: Duration,
    /// Prompt tokens computed a second, one prompt after the other.
    #[arg(long, value_name = "TOKENS", value_parser = parse_rate, conflicts_with = "prefill_delay")]
    pub(crate) prefill_tokens_per_second: Option<f64>,
    /// Data-parallel ranks: requests may name one, metrics and the ledger tell them apart, and as many prompts are computed at once.
    #[arg(long, value_name = "RANKS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) dp: u32,
    /// An adapter (LoRA) that is in use, as vLLM's metrics name it; repeat for each.
    #[arg(long = "adapter", value_name = "NAME")]
    pub(crate) adapters: Vec<String>,
    /// Tokens of an answer whose request names no limit.
    #[arg(long, value_name = "TOKENS", default_value_t = 16)]
    pub(crate) tokens: u32,
    /// Prompt tokens that the prefill leg reports as cached, or all of a shorter prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    pub(crate) cached_tokens: u64,
    /// A failure to inject, such as status=503,leg=decode,count=1; may be repeated, and the first that applies is taken.
    #[arg(long, value_name = "SPEC")]
    pub(crate) fail: Vec<Spec>,
    /// Seconds that KV is held for a decode leg that does not come (vllm). The default is that of vLLM.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = parse_seconds)]
    pub(crate) lease: Duration,
    /// Seconds that one leg waits for the other (sglang and baton). The default is that of SGLang.
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = parse_seconds)]
    pub(crate) bootstrap_timeout: Duration,
    /// What a decode leg does whose KV can't be fetched (vllm).
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = KvLoadFailure::Fail)]
    pub(crate) kv_load_failure: KvLoadFailure,
    /// The model that it serves.
    #[arg(long, value_name = "NAME", default_value = "mock")]
    pub(crate) model: String,
    /// Its own name, in ids and in what it prints.
    #[arg(long, value_name = "NAME", default_value = "mock-engine", value_parser = parse_name)]
    pub(crate) name: String,
    /// The revision that it says it is of (baton).
    #[arg(long, value_name = "REVISION", default_value = "r1")]
    pub(crate) revision: String,
    /// The public half of the proxies' key: transfers' tokens are checked with it (baton).
    #[arg(long, value_name = "FILE")]
    pub(crate) public_key: Option<PathBuf>,
    /// Answers are of words that a careless router takes for usage, for the end or for a line of its own.
    #[arg(long)]
    pub(crate) awkward_text: bool,
    /// Requests whose heads and bodies the ledger shows.
    #[arg(long, value_name = "REQUESTS", default_value_t = 64)]
    pub(crate) keep: usize,
    /// Threads that serve.
    #[arg(long, value_name = "THREADS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) threads: u16,
}

/// An engine's disaggregation contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Contract {
    /// NixlConnector: prefill first, its handle goes to decode.
    Vllm,
    /// Bootstrap rooms: both legs at once.
    Sglang,
    /// Our own worker: both legs at once, with transfer ids.
    Baton,
}

impl Contract {
    /// As the command line spells it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Contract::Vllm => "vllm",
            Contract::Sglang => "sglang",
            Contract::Baton => "baton",
        }
    }
}

/// Which legs a mock serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum MockRole {
    /// Prefill legs.
    Prefill,
    /// Decode legs.
    Decode,
    /// Both, and requests that are not handed over.
    Both,
}

impl MockRole {
    /// As the command line spells it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            MockRole::Prefill => "prefill",
            MockRole::Decode => "decode",
            MockRole::Both => "both",
        }
    }
}

/// vLLM's `kv_load_failure_policy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum KvLoadFailure {
    /// The request fails.
    Fail,
    /// The prompt is computed again.
    Recompute,
}

/// A day: longer delays are mistakes of the unit.
const DURATION_SECONDS_MAX: f64 = 86_400.0;

fn parse_ms(text: &str) -> Result<Duration, String> {
    parse_duration(text, 1e3)
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    parse_duration(text, 1.0)
}

fn parse_duration(text: &str, units_a_second: f64) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().map(|units| units / units_a_second);
    match seconds {
        Some(seconds) if (0.0..=DURATION_SECONDS_MAX).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected a number that is not negative, of a day at most".to_owned()),
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate.is_finite() => Ok(rate),
        _ => Err("expected a number greater than 0".to_owned()),
    }
}

/// The name becomes a part of ids in JSON and in lines between mocks, so it must need no quoting in either.
fn parse_name(text: &str) -> Result<String, String> {
    let is_plain = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_' || c == b'.';
    if !text.is_empty() && text.len() <= 64 && text.bytes().all(is_plain) {
        Ok(text.to_owned())
    } else {
        Err("expected 1 to 64 of A-Z, a-z, 0-9, '-', '_' and '.'".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_of_their_unit_and_bounded() {
        assert_eq!(parse_ms("0.5"), Ok(Duration::from_micros(500)));
        assert_eq!(parse_seconds("2"), Ok(Duration::from_secs(2)));
        for text in ["", "-1", "x", "NaN", "inf", "86401"] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_rate_is_positive_and_a_name_is_plain() {
        assert!(parse_rate("0.1").is_ok() && parse_rate("0").is_err() && parse_rate("inf").is_err());
        assert!(parse_name("p-1.a_b").is_ok() && parse_name("").is_err() && parse_name("a b").is_err());
    }
}
