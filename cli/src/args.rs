//! The command line as it is typed: names, defaults and help texts, and nothing decided from them.

use crate::mock_engine::args::MockEngineArgs;
use std::ffi::OsString;
use std::path::PathBuf;

/// Serves one large language model with prefill and decode apart.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "baton", version, max_term_width = 110)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Clone, Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Serve a manifest on this machine: a proxy and a worker process for each replica (Linux only).
    Up(UpArgs),
    /// Talk to a model in the terminal.
    Chat(ChatArgs),
    /// Validate a manifest offline, with the rules that a cluster applies.
    Check(CheckArgs),
    /// Print the objects that a cluster's operator would make of a manifest; needs no cluster.
    Plan(PlanArgs),
    /// Show the pods of a running model: role, state and load.
    Status(StatusArgs),
    /// Print a fresh key pair as the two Secrets that a model's pods mount, for clusters without the operator.
    Keygen(KeygenArgs),
    /// An engine without a model, for tests and measurements of routers: keeps its side of a disaggregation contract and counts
    /// where the router breaks its own.
    MockEngine(Box<MockEngineArgs>),
    /// Become PROGRAM, and be killed when the process that started this one ends.
    #[command(name = "__exec", hide = true)]
    Exec(ExecArgs),
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct UpArgs {
    /// The manifest (YAML). Without it, one prefill and one decode worker serve --model.
    #[arg(short, long, value_name = "FILE", required_unless_present = "model")]
    pub(crate) file: Option<PathBuf>,
    /// Model directory as published (config.json, safetensors, tokenizer.json); overrides where the manifest's uri points.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Where a PersistentVolumeClaim that the manifest names is on this machine. May be repeated. Without it, a
    /// directory named like the claim is looked for beside the manifest.
    #[arg(long, value_name = "CLAIM=DIR", value_parser = parse_volume)]
    pub(crate) volume: Vec<Volume>,
    /// When all is ready, complete this text, print what it took, and stop. The exit code tells whether the request took
    /// the path that the manifest plans.
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// With --prompt: tokens to generate at most.
    #[arg(long, value_name = "TOKENS", default_value_t = 64, requires = "prompt")]
    pub(crate) max_tokens: u32,
    /// With --prompt: sampling temperature; 0 is greedy. Default: the model's own.
    #[arg(long, value_name = "TEMPERATURE", requires = "prompt")]
    pub(crate) temperature: Option<f64>,
    /// With --prompt: seed of the random draws, for the same completion every time. Default: another one each time.
    #[arg(long, value_name = "SEED", requires = "prompt")]
    pub(crate) seed: Option<u64>,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ChatArgs {
    /// Base URL of the server. Default: the only `baton up` of yours that runs on this machine.
    #[arg(long, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// Model to ask for. Default: the first that the server lists.
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// System message that opens the conversation.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Tokens of each answer at most.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub(crate) max_tokens: u32,
    /// Sampling temperature; 0 is greedy. Default: the model's own.
    #[arg(long, value_name = "TEMPERATURE")]
    pub(crate) temperature: Option<f64>,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct CheckArgs {
    /// The manifest (YAML). Every DisaggregatedModel in it is checked.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: PathBuf,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct PlanArgs {
    /// The manifest (YAML), with one DisaggregatedModel in it.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// What is printed: the whole objects, or one kind and name a line.
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = PlanOutput::Yaml)]
    pub(crate) output: PlanOutput,
    /// Namespace of the objects. Default: the manifest's, or "default".
    #[arg(short, long, value_name = "NAME")]
    pub(crate) namespace: Option<String>,
    /// Image of Baton's own engine, as the operator is told it. The default is the one of this version.
    #[arg(long, value_name = "IMAGE", default_value = concat!("baton/worker:", env!("CARGO_PKG_VERSION")))]
    pub(crate) worker_image: String,
    /// Image of the routing proxy, as the operator is told it. The default is the one of this version.
    #[arg(long, value_name = "IMAGE", default_value = concat!("baton/proxy:", env!("CARGO_PKG_VERSION")))]
    pub(crate) proxy_image: String,
    /// APIs that not every cluster has and that are taken to be there, separated by commas. Objects of the others are left out.
    #[arg(long, value_name = "KINDS", value_enum, value_delimiter = ',')]
    pub(crate) assume: Vec<AssumedKind>,
}

/// What `baton plan` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum PlanOutput {
    /// The objects, as the operator applies them.
    Yaml,
    /// Their kinds and names.
    Names,
}

/// A kind that not every cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum AssumedKind {
    /// Workloads whose replicas span nodes.
    #[value(name = "leaderworkerset")]
    LeaderWorkerSet,
    /// Scraping by Prometheus Operator.
    #[value(name = "podmonitor")]
    PodMonitor,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct StatusArgs {
    /// Base URL of one pod's proxy.
    #[arg(long, value_name = "URL", conflicts_with = "endpoints_file")]
    pub(crate) url: Option<String>,
    /// File with the addresses of the pods' proxies: {"endpoints": ["127.0.101.1:8000"]}. Default: those of every
    /// `baton up` of yours that runs on this machine.
    #[arg(long, value_name = "FILE")]
    pub(crate) endpoints_file: Option<PathBuf>,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct KeygenArgs {
    /// The model's name, with which the Secrets' names begin.
    #[arg(long, value_name = "NAME", default_value = "modelservice", value_parser = parse_model_name)]
    pub(crate) name: String,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ExecArgs {
    /// Process id of who starts this.
    #[arg(long, value_name = "PID")]
    pub(crate) parent: u32,
    /// Program and its arguments.
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub(crate) command: Vec<OsString>,
}

/// A claim's name and where it is on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    pub(crate) claim: String,
    pub(crate) dir: PathBuf,
}

fn parse_volume(text: &str) -> Result<Volume, String> {
    match text.split_once('=') {
        Some((claim, dir)) if !claim.is_empty() && !dir.is_empty() => {
            Ok(Volume { claim: claim.to_owned(), dir: PathBuf::from(dir) })
        }
        _ => Err("expected CLAIM=DIR, such as models=/srv/models".to_owned()),
    }
}

/// Characters of a model's name: what Kubernetes appends to the names of its objects has to fit.
const MODEL_NAME_CHARACTERS_MAX: usize = 30;

fn parse_model_name(text: &str) -> Result<String, String> {
    let is_inside = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let is_edge = |c: Option<char>| c.is_some_and(|c| c != '-');
    let is_name = text.len() <= MODEL_NAME_CHARACTERS_MAX
        && text.bytes().all(is_inside)
        && is_edge(text.chars().next())
        && is_edge(text.chars().last());
    if is_name {
        Ok(text.to_owned())
    } else {
        Err(format!("expected at most {MODEL_NAME_CHARACTERS_MAX} of a-z, 0-9 and -, the last not at either end"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory as _, Parser as _};

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn keys_are_made_for_names_that_a_cluster_takes() {
        let parse = |name: &str| Args::try_parse_from(["baton", "keygen", "--name", name]).is_ok();
        assert!(parse("tiny-1") && Args::try_parse_from(["baton", "keygen"]).is_ok());
        assert!(!parse("") && !parse("-a") && !parse("a-") && !parse("A") && !parse("a: b") && !parse(&"a".repeat(31)));
    }

    #[test]
    fn up_wants_a_manifest_or_a_model() {
        assert!(Args::try_parse_from(["baton", "up"]).is_err());
        assert!(Args::try_parse_from(["baton", "up", "--model", "m"]).is_ok());
        assert!(
            Args::try_parse_from(["baton", "up", "-f", "m.yaml", "--seed", "1"]).is_err(),
            "--seed without --prompt"
        );
        assert!(Args::try_parse_from(["baton", "up", "-f", "m.yaml", "--volume", "models"]).is_err());
    }
}
