//! `baton mock-engine`: an engine without a model that keeps its side of a disaggregation contract exactly, and counts where
//! a router breaks the other. Routers are tested and measured against it.

mod answer;
mod api;
pub(crate) mod args;
mod ask;
mod call;
mod engine;
mod events;
mod fail;
mod holds;
mod http;
mod ledger;
mod leg;
mod link;
mod ours;
mod peer;
mod probe;
mod ranks;
mod rooms;
mod rule;
mod sglang;
mod tokens;
mod vllm;

use crate::signals::Signals;
use crate::terminal;
use args::{Contract, MockEngineArgs};
use engine::{Engine, StartError};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio::time::Instant;

/// How often ended leases are looked for. Each pull looks as well, so this only decides when a gauge falls.
const SWEEP_INTERVAL: Duration = Duration::from_millis(500);

/// Serves until it is asked to stop.
///
/// # Errors
/// When it can't be started.
pub(crate) fn run(args: MockEngineArgs) -> anyhow::Result<ExitCode> {
    let mut builder = match args.threads {
        1 => Builder::new_current_thread(),
        threads => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(usize::from(threads));
            builder
        }
    };
    builder.enable_all().build()?.block_on(serve(args))
}

async fn serve(args: MockEngineArgs) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let listener = listen(args.listen).await?;
    let address = listener.local_addr()?;
    let side = listen(side_address(&args)).await?;
    let reached = SocketAddr::new(args.advertise.unwrap_or(args.listen.ip()), side.local_addr()?.port());
    let engine = Arc::new(Engine::new(args, address, reached)?);
    let what = if engine.args.contract == Contract::Sglang { "bootstrap server" } else { "KV side channel" };
    let (name, contract, role) = (&engine.args.name, engine.args.contract.as_str(), engine.args.role.as_str());
    terminal::print_line(&format!("{name} ({contract}, {role}) has its {what} at {reached}"));
    terminal::print_line(&format!("{name} ({contract}, {role}) serves at http://{address}"));
    tokio::spawn(link::serve(side, Arc::clone(&engine)));
    tokio::spawn(sweep(Arc::clone(&engine)));
    tokio::select! {
        // On a thread of the runtime of its own, where there are several.
        _ = tokio::spawn(http::serve(listener, engine)) => {}
        () = signals.next() => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn side_address(args: &MockEngineArgs) -> SocketAddr {
    let port = args.bootstrap_port.unwrap_or(0);
    args.kv_side_channel.unwrap_or(SocketAddr::new(args.listen.ip(), port))
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Listen { address, source })
}

async fn sweep(engine: Arc<Engine>) {
    let mut interval = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        interval.tick().await;
        engine.holds().expire(Instant::now());
    }
}
