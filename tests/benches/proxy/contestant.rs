//! Who is measured, and how each is started: as its own documents say, with what it does by default.

use crate::connection::Connection;
use crate::engines::{Contract, Engines, LOOK_EVERY, PATIENCE, Pair};
use crate::process::{Cpu, Process};
use crate::setup::Setup;
use crate::workload;
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Contestant {
    /// No proxy: the decode engine alone.
    Direct,
    Floor,
    Ours,
    VllmRouter,
    Smg,
    FloorSglang,
    OursSglang,
    SglangRouter,
}

/// One that is ready, and stands still.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    /// None where there is no proxy.
    pub(crate) process: Option<Process>,
}

impl Contestant {
    const ALL: [Contestant; 8] = [
        Contestant::Direct,
        Contestant::Floor,
        Contestant::Ours,
        Contestant::VllmRouter,
        Contestant::Smg,
        Contestant::FloorSglang,
        Contestant::OursSglang,
        Contestant::SglangRouter,
    ];

    /// Who takes part unless the command line says otherwise. The floor speaks SGLang's contract too, but no goal is about that.
    pub(crate) const DEFAULT: [Contestant; 7] = [
        Contestant::Direct,
        Contestant::Floor,
        Contestant::Ours,
        Contestant::VllmRouter,
        Contestant::Smg,
        Contestant::OursSglang,
        Contestant::SglangRouter,
    ];

    pub(crate) const PEERS: [Contestant; 3] = [Contestant::VllmRouter, Contestant::Smg, Contestant::SglangRouter];

    pub(crate) fn named(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|contestant| contestant.as_str() == name);
        found.with_context(|| format!("{name} is none of {}", Self::ALL.map(Self::as_str).join(", ")))
    }

    const fn as_str(self) -> &'static str {
        match self {
            Contestant::Direct => "direct",
            Contestant::Floor => "floor",
            Contestant::Ours => "ours",
            Contestant::VllmRouter => "vllm-router",
            Contestant::Smg => "smg",
            Contestant::FloorSglang => "floor-sglang",
            Contestant::OursSglang => "ours-sglang",
            Contestant::SglangRouter => "sglang-router",
        }
    }

    pub(crate) const fn contract(self) -> Contract {
        match self {
            Contestant::Direct | Contestant::Floor | Contestant::Ours | Contestant::VllmRouter | Contestant::Smg => {
                Contract::Vllm
            }
            Contestant::FloorSglang | Contestant::OursSglang | Contestant::SglangRouter => Contract::Sglang,
        }
    }

    pub(crate) const fn is_ours(self) -> bool {
        matches!(self, Contestant::Ours | Contestant::OursSglang)
    }

    /// Starts it, waits until a request gets through it, and makes it stand still.
    ///
    /// # Errors
    /// When it does not get so far.
    pub(crate) async fn start(self, setup: &Setup, engines: &Engines) -> Result<Running> {
        let pair = engines.pair(self.contract());
        let address = setup.free_address()?;
        let Some((program, args)) = self.command(setup, pair, address)? else {
            return Ok(Running { address: pair.decode, process: None });
        };
        let log = setup.file(&format!("{self}-{}.log", address.port()));
        let mut process = Process::start(setup.cores.contestant, &program, &args, log)?;
        let (request, mut connection) = (workload::JSON.request(), Connection::new(address));
        let start = Instant::now();
        while let Err(error) = connection.ask(&request, false, workload::JSON.tokens).await {
            process.check()?;
            ensure!(start.elapsed() < PATIENCE, "no request gets through it: {error:#}");
            tokio::time::sleep(LOOK_EVERY).await;
        }
        process.freeze()?;
        Ok(Running { address, process: Some(process) })
    }

    /// Its program and how that is called; none where there is no proxy.
    fn command(self, setup: &Setup, pair: Pair, address: SocketAddr) -> Result<Option<(PathBuf, Vec<String>)>> {
        let (prefill, decode) = (format!("http://{}", pair.prefill), format!("http://{}", pair.decode));
        let (listen, host, port) = (address.to_string(), address.ip().to_string(), address.port().to_string());
        let bootstrap = pair.bootstrap_port.to_string();
        let prefill_with_bootstrap = format!("{prefill},bootstrap={bootstrap}");
        let admin = setup.free_address()?;
        let (admin, metrics_port) = (admin.to_string(), admin.port().to_string());
        let programs = &setup.programs;
        let listen_as_peer =
            ["--host", &host, "--port", &port, "--prometheus-host", &host, "--prometheus-port", &metrics_port];
        let (program, args): (PathBuf, Vec<&str>) = match self {
            Contestant::Direct => return Ok(None),
            Contestant::Floor | Contestant::FloorSglang => {
                let (mode, prefill) = match self.contract() {
                    Contract::Vllm => ("vllm", &prefill),
                    Contract::Sglang => ("sglang", &prefill_with_bootstrap),
                };
                let args = ["--mode", mode, "--listen", &listen, "--prefill", prefill, "--decode", &decode];
                (programs.floor.clone(), args.to_vec())
            }
            Contestant::Ours | Contestant::OursSglang => {
                let (connector, prefill) = match self.contract() {
                    Contract::Vllm => ("vllm-nixl", &prefill),
                    Contract::Sglang => ("sglang", &prefill_with_bootstrap),
                };
                let listen = ["--listen", &listen, "--admin-listen", &admin, "--log-format", "text"];
                let engines = ["--connector", connector, "--prefill", prefill, "--decode", &decode];
                (programs.proxy.clone(), [&listen[..], &engines].concat())
            }
            Contestant::VllmRouter => {
                let engines = ["--vllm-pd-disaggregation", "--prefill", &prefill, "--decode", &decode];
                let rest = ["--policy", "round_robin", "--log-level", "warning"];
                (programs.peer("vllm-router")?, [&listen_as_peer[..], &engines, &rest].concat())
            }
            Contestant::SglangRouter => {
                let engines = ["--pd-disaggregation", "--prefill", &prefill, &bootstrap, "--decode", &decode];
                let rest = ["--policy", "round_robin", "--log-level", "warn"];
                (programs.peer("sglang-router")?, [&["launch"], &listen_as_peer[..], &engines, &rest].concat())
            }
            Contestant::Smg => {
                let file = smg_manifest(setup, pair)?;
                let engines = ["--pd-disaggregation", "--backend", "vllm", "--discovery-provider", "file"];
                let rest = ["--policy", "round_robin", "--log-level", "warn", "--worker-startup-check-interval", "1"];
                let mut args = [&["launch"], &listen_as_peer[..], &engines, &rest].concat();
                args.extend(["--discovery-file", &file]);
                let args = args.into_iter().map(str::to_owned).collect();
                return Ok(Some((programs.peer("smg")?, args)));
            }
        };
        Ok(Some((program, args.into_iter().map(str::to_owned).collect())))
    }
}

/// The engines as smg reads them from a file: on its command line there is no word for the connector, and without one it asks
/// prefill for nothing that decode could use.
fn smg_manifest(setup: &Setup, pair: Pair) -> Result<String> {
    let worker = |role: &str, address: SocketAddr, kv_role: &str| json!({"url": format!("http://{address}"), "worker_type": role, "kv_connector": "NixlConnector", "kv_role": kv_role});
    let workers = [worker("prefill", pair.prefill, "kv_producer"), worker("decode", pair.decode, "kv_consumer")];
    let path = setup.file(&format!("smg-{}.json", pair.prefill.port()));
    std::fs::write(&path, json!({"version": 1, "workers": workers}).to_string())?;
    path.into_os_string().into_string().ok().context("a temporary folder has a name in UTF-8")
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Running {
    /// CPU time so far; of no proxy, none.
    pub(crate) fn cpu(&self) -> Result<Cpu> {
        self.process.as_ref().map_or(Ok(Cpu::default()), Process::cpu)
    }

    pub(crate) fn freeze(&self) -> Result<()> {
        self.process.as_ref().map_or(Ok(()), Process::freeze)
    }

    pub(crate) fn thaw(&self) -> Result<()> {
        self.process.as_ref().map_or(Ok(()), Process::thaw)
    }
}
