//! The program `baton-proxy`: arguments, configuration, signals, exit code. Everything else is in the library.
#![forbid(unsafe_code)]

use anyhow::Context as _;
use baton_proxy::app::{App, Ended};
use baton_proxy::args::{Args, LogFormat};
use baton_proxy::config::Config;
use baton_proxy::drain::Shutdown;
use baton_wire::names::env;
use clap::Parser as _;
use std::io::IsTerminal as _;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let config = Config::try_from(Args::parse())?;
    log_to_stderr(config.log_format)?;
    tracing::info!(?config, "starting");
    let shutdown = Shutdown::on_signals().context("can't listen to signals")?;
    let app = App::build(config).await?;
    let (address, admin_address) = app.addresses()?;
    tracing::info!(%address, %admin_address, "listening");
    Ok(match app.serve(shutdown).await {
        Ended::Drained => ExitCode::SUCCESS,
        Ended::Cut => ExitCode::FAILURE,
    })
}

fn log_to_stderr(format: LogFormat) -> anyhow::Result<()> {
    let filter = match std::env::var(env::LOG) {
        Ok(directives) => EnvFilter::try_new(directives).with_context(|| format!("{} is wrong", env::LOG))?,
        Err(_) => EnvFilter::new("info"),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = log.with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
