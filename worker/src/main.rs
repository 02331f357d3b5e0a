//! The worker's program: flags in, exit status out. All else is in the library.

use anyhow::Context;
use baton_worker::args::Args;
use baton_worker::config::Config;
use baton_worker::worker::Bound;
use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Wrong usage, as `sysexits.h` has it: restarting with the same flags won't help.
const EXIT_USAGE: u8 = 64;

/// Ended by a second signal, as shells report SIGINT.
const EXIT_INTERRUPTED: i32 = 130;

/// Threads for sockets. The engine has a thread of its own, and computes on all CPUs; these only pass bytes on.
const ASYNC_THREADS: usize = 2;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // `--help` and `--version` come this way, too. A closed stderr leaves nobody to tell.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { 0 });
        }
    };
    let config = match Config::try_from(args) {
        Ok(config) => config,
        Err(error) => {
            #[allow(clippy::print_stderr)] // The log's form is not known to be right yet, and a person is waiting.
            {
                eprintln!("baton-worker: {error}\n\nFor more information, try '--help'.");
            }
            return ExitCode::from(EXIT_USAGE);
        }
    };
    start_log(config.log_json);
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    tracing::info!(?config, "starting");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(ASYNC_THREADS)
        .enable_all()
        .build()
        .context("can't start the async runtime")?;
    let outcome = runtime.block_on(async {
        let drain = drain_on_signal()?;
        let bound = Bound::new(config).await?;
        bound.run(drain).await?;
        anyhow::Ok(())
    });
    // Loading may still be reading files; the process does not wait for it.
    runtime.shutdown_background();
    outcome
}

/// SIGTERM or SIGINT cancels the token; a second one ends the process at once.
fn drain_on_signal() -> anyhow::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate()).context("can't listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("can't listen for SIGINT")?;
    let drain = CancellationToken::new();
    let token = drain.clone();
    tokio::spawn(async move {
        for first in [true, false] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if first {
                token.cancel();
            } else {
                tracing::warn!("second signal: ending at once");
                std::process::exit(EXIT_INTERRUPTED);
            }
        }
    });
    Ok(drain)
}

fn start_log(json: bool) {
    let filter = EnvFilter::try_from_env(baton_wire::names::env::LOG).unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    if json { log.json().init() } else { log.init() }
}
