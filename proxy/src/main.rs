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

/// A request makes about a hundred small allocations. With the system's allocator the same work took 2 % (JSON) to 15 % (streams at
/// 5 ms a token) more CPU and up to 3 MB more memory: `benches/proxy --only floor,ours`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Wrong usage: restarting with the same flags won't help. What clap exits with, too.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let config = match Config::try_from(Args::parse()) {
        Ok(config) => config,
        Err(error) => {
            last_words(&error.into());
            return ExitCode::from(EXIT_USAGE);
        }
    };
    run(config).unwrap_or_else(|error| {
        last_words(&error);
        ExitCode::FAILURE
    })
}

fn run(config: Config) -> anyhow::Result<ExitCode> {
    log_to_stderr(config.log_format)?;
    tracing::info!(?config, "starting");
    // One thread wakes nobody: between threads each piece of a stream would cost a wake-up more.
    let mut runtime = match config.threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime =
        runtime.worker_threads(config.threads).enable_all().build().context("can't start the async runtime")?;
    let ended = runtime.block_on(async {
        let shutdown = Shutdown::on_signals().context("can't listen to signals")?;
        let app = App::build(config).await?;
        let (address, admin_address) = app.addresses()?;
        tracing::info!(%address, %admin_address, "listening");
        anyhow::Ok(app.serve(shutdown).await)
    });
    // A name may still be being looked up, which nobody waits for.
    runtime.shutdown_background();
    Ok(match ended? {
        Ended::Drained => ExitCode::SUCCESS,
        Ended::Cut => ExitCode::FAILURE,
    })
}

/// Why this process ends, in one plain line whatever the log's form: Kubernetes shows the last lines of a failed container.
fn last_words(error: &anyhow::Error) {
    #[allow(clippy::print_stderr)] // For whoever looks after the pod, who has no reader for JSON.
    {
        eprintln!("baton-proxy: {error:#}");
    }
}

fn log_to_stderr(format: LogFormat) -> anyhow::Result<()> {
    let filter = match std::env::var(env::LOG) {
        Ok(directives) => EnvFilter::try_new(directives).with_context(|| format!("{} is wrong", env::LOG))?,
        // What goes wrong with the API server is said by discovery, once; the client would say it at each try.
        Err(_) => EnvFilter::new("info,kube_client=error,kube_runtime=error"),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = log.with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
