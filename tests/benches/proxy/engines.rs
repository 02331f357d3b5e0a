//! The engines of a stage: a mock for prefill and one for decode, for each contract.

use crate::connection::Connection;
use crate::process::Process;
use crate::setup::Setup;
use crate::workload::Stage;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long a program may take until it answers: peers are Python at their start, and read engines' addresses every few seconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is asked.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Who speaks how with its engines.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Contract {
    /// Prefill first, decode with what it says.
    Vllm,
    /// Both at once, with a room.
    Sglang,
}

/// A prefill and a decode engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    pub(crate) prefill: SocketAddr,
    pub(crate) bootstrap_port: u16,
    pub(crate) decode: SocketAddr,
}

/// What a pair of engines has in its ledgers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// Prompts computed for decode.
    pub(crate) handed_over: u64,
    /// Rules of the router's side that were broken.
    pub(crate) violations: u64,
}

pub(crate) struct Engines {
    vllm: Pair,
    sglang: Pair,
    // Ended when this is dropped.
    _processes: Vec<Process>,
}

impl Engines {
    pub(crate) fn start(setup: &Setup, stage: Stage) -> Result<Self> {
        let mut processes = Vec::new();
        let vllm = Self::start_pair(setup, stage, Contract::Vllm, &mut processes)?;
        let sglang = Self::start_pair(setup, stage, Contract::Sglang, &mut processes)?;
        Ok(Engines { vllm, sglang, _processes: processes })
    }

    fn start_pair(setup: &Setup, stage: Stage, contract: Contract, processes: &mut Vec<Process>) -> Result<Pair> {
        let (prefill, bootstrap, decode) = (setup.free_address()?, setup.free_address()?, setup.free_address()?);
        let pair = Pair { prefill, bootstrap_port: bootstrap.port(), decode };
        let delay = stage.token_delay_ms().to_string();
        let bootstrap = pair.bootstrap_port.to_string();
        let (name, prefill, decode): (_, &[&str], &[&str]) = match contract {
            // Decode here is asked directly too, which is no leg of anything.
            Contract::Vllm => ("vllm", &["--role", "prefill"], &["--role", "both", "--token-delay", &delay]),
            Contract::Sglang => (
                "sglang",
                &["--role", "prefill", "--bootstrap-port", &bootstrap],
                &["--role", "decode", "--token-delay", &delay],
            ),
        };
        for (role, address, more) in [("prefill", pair.prefill, prefill), ("decode", pair.decode, decode)] {
            let name_of_engine = format!("{name}-{role}");
            let address_text = address.to_string();
            let first = [
                "mock-engine",
                "--contract",
                name,
                "--listen",
                &address_text,
                "--name",
                &name_of_engine,
                "--keep",
                "0",
            ];
            let args: Vec<String> = first.iter().chain(more).map(|arg| (*arg).to_owned()).collect();
            let log = setup.file(&format!("{name_of_engine}-{delay}.log"));
            let mut process = Process::start(setup.cores.load, &setup.programs.baton, &args, log)?;
            wait_for(&mut process, address).with_context(|| format!("engine {name_of_engine}"))?;
            processes.push(process);
        }
        Ok(pair)
    }

    pub(crate) fn pair(&self, contract: Contract) -> Pair {
        match contract {
            Contract::Vllm => self.vllm,
            Contract::Sglang => self.sglang,
        }
    }

    /// What both engines have seen so far; none where they keep no ledger.
    pub(crate) async fn seen(&self, contract: Contract) -> Option<Seen> {
        let pair = self.pair(contract);
        let (prefill, decode) = (ledger(pair.prefill).await?, ledger(pair.decode).await?);
        let violations = |ledger: &Value| ledger["violations"]["total"].as_u64();
        Some(Seen {
            handed_over: prefill["requests"]["prefill"].as_u64()?,
            violations: violations(&prefill)? + violations(&decode)?,
        })
    }
}

async fn ledger(engine: SocketAddr) -> Option<Value> {
    let ledger = Connection::new(engine).get("/mock/ledger").await.ok()?;
    serde_json::from_slice(&ledger).ok()
}

/// Waits until somebody listens.
fn wait_for(process: &mut Process, address: SocketAddr) -> Result<()> {
    let start = Instant::now();
    while std::net::TcpStream::connect(address).is_err() {
        process.check()?;
        ensure!(start.elapsed() < PATIENCE, "nobody listens at {address}");
        std::thread::park_timeout(LOOK_EVERY);
    }
    // Who listens may be another, who was faster.
    std::thread::park_timeout(LOOK_EVERY);
    process.check()
}
