//! The program `baton-operator`: arguments, configuration, signals, exit code. Everything else is in the library.
#![forbid(unsafe_code)]

use anyhow::Context as _;
use baton_operator::app::{App, Ended};
use baton_operator::args::{Args, LogFormat};
use baton_operator::config::Config;
use baton_wire::names::env;
use clap::Parser as _;
use clap::error::ErrorKind;
use std::io::IsTerminal as _;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// A command line that can't be run (`EX_USAGE`).
const EXIT_USAGE: u8 = 64;
/// The lease is lost: starting again is the cure (`EX_TEMPFAIL`).
const EXIT_LEASE_LOST: u8 = 75;

// Two: reconciles wait for the API server most of the time, and each further thread holds memory of its own (with 16 of them, 30
// MiB more at 60 models). A large node gives a container as many as it has cores, whatever its limit.
#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<ExitCode> {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            error.print().context("can't write to the terminal")?;
            let told = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return Ok(if told { ExitCode::SUCCESS } else { ExitCode::from(EXIT_USAGE) });
        }
    };
    let log_format = args.log_format;
    log_to_stderr(log_format)?;
    let config = match Config::try_from(args) {
        Ok(config) => config,
        Err(error) => {
            tracing::error!(%error, "can't run this command line");
            return Ok(ExitCode::from(EXIT_USAGE));
        }
    };
    tracing::info!(?config, "starting");
    let stop = stop_on_signals().context("can't listen to signals")?;
    let app = App::build(config).await?;
    tracing::info!(address = %app.admin_address()?, "serving health and metrics");
    Ok(match app.run(stop).await {
        Ended::Drained => ExitCode::SUCCESS,
        Ended::Cut => ExitCode::FAILURE,
        Ended::LeaseLost => ExitCode::from(EXIT_LEASE_LOST),
    })
}

/// The first SIGTERM or SIGINT asks to stop, the second ends the process.
fn stop_on_signals() -> std::io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = stop.clone();
    tokio::spawn(async move {
        for _ in 0..2 {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if token.is_cancelled() {
                tracing::warn!("asked to stop a second time: ending at once");
                std::process::exit(1);
            }
            token.cancel();
        }
    });
    Ok(stop)
}

fn log_to_stderr(format: LogFormat) -> anyhow::Result<()> {
    let filter = match std::env::var(env::LOG) {
        Ok(directives) => EnvFilter::try_new(directives).with_context(|| format!("{} is wrong", env::LOG))?,
        // kube-client logs answers that it can't parse, as they are: a Secret may be among them.
        Err(_) => EnvFilter::new("info,kube_client=error"),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = log.with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
