//! The worker's program: flags in, exit status out. All else is in the library.

use anyhow::Context;
use baton_worker::args::{Args, Command, CommandLine, FetchArgs, ProbeArgs};
use baton_worker::config::Config;
use baton_worker::worker::Bound;
use baton_worker::{fetch, probe};
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

/// A download that was told to stop, as shells report SIGTERM.
const EXIT_TERMINATED: u8 = 143;

/// Threads for sockets. The engine has a thread of its own, and computes on all CPUs; these only pass bytes on.
const ASYNC_THREADS: usize = 2;

fn main() -> ExitCode {
    let line = match CommandLine::try_parse() {
        Ok(line) => line,
        Err(error) => {
            // `--help` and `--version` come this way, too. A closed stderr leaves nobody to tell.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { 0 });
        }
    };
    match line {
        CommandLine { command: Some(Command::Fetch(args)), serve: _ } => fetch(args),
        CommandLine { command: Some(Command::Probe(args)), serve: _ } => probe(&args),
        CommandLine { command: None, serve: Some(args) } => serve(args),
        CommandLine { command: None, serve: None } => unreachable!("clap asks for the flags that are required"),
    }
}

fn serve(args: Args) -> ExitCode {
    let config = match Config::try_from(args) {
        Ok(config) => config,
        Err(error) => return wrong_usage(&error),
    };
    start_log(config.log_json);
    tracing::info!(?config, "starting");
    ended(run(async {
        let drain = drain_on_signal()?;
        let bound = Bound::new(config).await?;
        bound.run(drain).await?;
        anyhow::Ok(ExitCode::SUCCESS)
    }))
}

fn fetch(args: FetchArgs) -> ExitCode {
    let config = match fetch::Config::new(args, &|name| std::env::var(name).ok()) {
        Ok(config) => config,
        Err(error) => return wrong_usage(&error),
    };
    start_log(config.log_json);
    tracing::info!(?config, "starting");
    ended(run(async {
        let stop = drain_on_signal()?;
        tokio::select! {
            fetched = fetch::run(config) => fetched.map(|()| ExitCode::SUCCESS).map_err(anyhow::Error::from),
            () = stop.cancelled() => {
                tracing::info!("told to stop: the next start goes on from here");
                Ok(ExitCode::from(EXIT_TERMINATED))
            }
        }
    }))
}

fn probe(args: &ProbeArgs) -> ExitCode {
    match probe::probe(args) {
        Ok(word) => {
            #[allow(clippy::print_stdout)] // What a probe says is its purpose, and it has no log.
            {
                println!("{word}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            last_words(&error.into());
            ExitCode::FAILURE
        }
    }
}

fn run(work: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(ASYNC_THREADS)
        .enable_all()
        .build()
        .context("can't start the async runtime")?;
    let outcome = runtime.block_on(work);
    // Loading may still be reading files; the process does not wait for it.
    runtime.shutdown_background();
    outcome
}

fn wrong_usage(error: &dyn std::error::Error) -> ExitCode {
    #[allow(clippy::print_stderr)] // The log's form is not known to be right yet, and a person is waiting.
    {
        eprintln!("For more information, try '--help'.\n\nbaton-worker: {error}");
    }
    ExitCode::from(EXIT_USAGE)
}

fn ended(outcome: anyhow::Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        last_words(&error);
        ExitCode::FAILURE
    })
}

/// Why this process ends, in one plain line whatever the log's form: Kubernetes shows the last lines of a failed container.
fn last_words(error: &anyhow::Error) {
    #[allow(clippy::print_stderr)] // For whoever looks after the pod, who has no reader for JSON.
    {
        eprintln!("baton-worker: {error:#}");
    }
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
