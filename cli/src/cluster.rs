//! The processes of one manifest on this machine: started together, watched, stopped in the right order.
//!
//! Knows pods and processes; what is said about them to a person is `up`'s.

use crate::client::Client;
use crate::pods::{Pod, PodKind, Program, Subnet};
use crate::process::{CHANGES_MAX, Change, ChangeKind, Launcher, Process, ProcessSpec};
use crate::run_dir::RunDir;
use crate::view::{Phase, PodView};
use baton_wire::names::{paths, ports};
use baton_wire::status::Status;
use futures_util::future::join_all;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// How long a process on this machine may take to tell its status before it counts as not answering.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// What proxies get to end after their workers have: nothing runs through them any more.
const PROXY_DRAIN_MAX: Duration = Duration::from_secs(10);

/// Third octets that are tried: away from 127.0.0 and 127.0.1, where distributions put names of their own.
const SUBNETS: std::ops::RangeInclusive<u8> = 101..=200;

/// Why nothing was started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// A program is missing.
    #[error("{} is not there; `make build` puts all programs into one folder", path.display())]
    ProgramMissing { path: PathBuf },
    /// Nobody knows where this program is.
    #[error("cannot tell where baton itself is")]
    OwnPathUnknown(#[source] std::io::Error),
    /// Every network is in use, or something listens on a port on all addresses.
    #[error("no free addresses in 127.0.{}.0/24 to 127.0.{}.0/24; the last refusal was for {address}; stop what listens on that port on all addresses", SUBNETS.start(), SUBNETS.end())]
    AddressesTaken {
        address: String,
        #[source]
        source: std::io::Error,
    },
}

/// The programs, all in the folder of `baton` itself.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    baton: PathBuf,
    folder: PathBuf,
}

impl Programs {
    /// Finds them beside this program.
    ///
    /// # Errors
    /// When one is missing.
    pub(crate) fn find() -> Result<Self, StartError> {
        let baton = std::env::current_exe().map_err(StartError::OwnPathUnknown)?;
        let folder = baton.parent().unwrap_or(Path::new("/")).to_owned();
        let programs = Programs { baton, folder };
        for program in [Program::Worker, Program::Proxy] {
            let path = programs.path(program);
            if !path.is_file() {
                return Err(StartError::ProgramMissing { path });
            }
        }
        Ok(programs)
    }

    fn path(&self, program: Program) -> PathBuf {
        self.folder.join(program.file_name())
    }
}

/// A network of loopback addresses that nobody uses; ours for as long as this lives.
pub(crate) struct Claim {
    pub(crate) subnet: Subnet,
    // Bound by us, so that another `baton up` finds the network taken before our processes have bound their ports.
    _mark: TcpListener,
}

/// Finds a network with `pods` free addresses.
///
/// # Errors
/// When there is none.
pub(crate) fn claim(pods: usize) -> Result<Claim, StartError> {
    let bind = |address| TcpListener::bind(address).map_err(|source| (address, source));
    let attempt = |subnet: Subnet| {
        let mark = bind((subnet.mark(), ports::PROXY))?;
        for pod in 0..u8::try_from(pods).unwrap_or(u8::MAX) {
            for port in [ports::PROXY, ports::ENGINE, ports::KV, ports::ADMIN] {
                bind((subnet.host(pod), port))?;
            }
        }
        Ok(Claim { subnet, _mark: mark })
    };
    let mut refusal = None;
    for octet in SUBNETS {
        match attempt(Subnet(octet)) {
            Ok(claim) => return Ok(claim),
            Err(refused) => refusal = Some(refused),
        }
    }
    let ((host, port), source) = refusal.expect("the range of networks is not empty, and each try ended in a refusal");
    Err(StartError::AddressesTaken { address: format!("{host}:{port}"), source })
}

/// One process of one pod.
struct Running {
    pod: usize,
    program: Program,
    name: String,
    process: Process,
    state: ProcessState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProcessState {
    Running,
    Restarting,
    Stopped,
}

/// A running manifest.
pub(crate) struct Cluster {
    model: String,
    pub(crate) pods: Vec<Pod>,
    running: Vec<Running>,
    changes: mpsc::Receiver<Change>,
    client: Client,
    _claim: Claim,
}

/// What was seen of the pods.
pub(crate) struct Observation {
    pub(crate) views: Vec<PodView>,
    /// Of the workers that answered.
    pub(crate) statuses: Vec<Status>,
}

impl Observation {
    /// Whether every worker takes work.
    pub(crate) fn all_ready(&self) -> bool {
        self.views.iter().all(|view| view.kind == PodKind::FrontDoor || view.phase == Phase::Ready)
    }
}

/// What happened to a process, with its name.
#[derive(Debug)]
pub(crate) struct Happened {
    pub(crate) name: String,
    pub(crate) kind: ChangeKind,
}

/// A row of the proxy's debug page, as far as we read it.
#[derive(serde::Deserialize)]
struct WorkerRow {
    address: String,
    not_for_prefill: Option<String>,
}

#[derive(serde::Deserialize)]
struct WorkerRows {
    workers: Vec<WorkerRow>,
}

impl Cluster {
    /// Starts every process of the pods.
    pub(crate) fn start(model: &str, pods: Vec<Pod>, claim: Claim, programs: &Programs, run_dir: &RunDir) -> Self {
        let (sender, changes) = mpsc::channel(CHANGES_MAX);
        let mut running: Vec<Running> = Vec::new();
        for (pod, planned) in pods.iter().enumerate() {
            for process in &planned.processes {
                let what = process.program.file_name().trim_start_matches("baton-");
                let name = format!("{}/{what}", planned.name);
                let spec = ProcessSpec {
                    program: programs.path(process.program),
                    args: process.args.clone(),
                    log: run_dir.log(&name),
                };
                let launcher = Launcher::Tied(programs.baton.clone());
                let started = Process::start(running.len(), spec, launcher, sender.clone());
                running.push(Running {
                    pod,
                    program: process.program,
                    name,
                    process: started,
                    state: ProcessState::Running,
                });
            }
        }
        Cluster { model: model.to_owned(), pods, running, changes, client: Client::new(), _claim: claim }
    }

    /// Waits for the next thing to happen to a process.
    pub(crate) async fn next(&mut self) -> Happened {
        loop {
            // Every supervisor holds a sender; with none left, all is stopped and nothing will ever happen.
            let Some(change) = self.changes.recv().await else { return std::future::pending().await };
            if let Some(running) = self.running.get_mut(change.process) {
                running.state = match change.kind {
                    ChangeKind::Started => ProcessState::Running,
                    ChangeKind::Restarting { .. } => ProcessState::Restarting,
                    ChangeKind::Failed { .. } | ChangeKind::Stopped { .. } => ProcessState::Stopped,
                };
                return Happened { name: running.name.clone(), kind: change.kind };
            }
        }
    }

    /// Asks every worker for its status.
    pub(crate) async fn observe(&self) -> Observation {
        let ask = async |pod: &Pod| match pod.kind {
            PodKind::FrontDoor => None,
            PodKind::Worker(_) => {
                let url = format!("{}{}", pod.engine_url(), paths::STATUS);
                self.client.get_json::<Status>(&url, STATUS_TIMEOUT).await.ok()
            }
        };
        let statuses = join_all(self.pods.iter().map(ask)).await;
        let views = self.pods.iter().zip(&statuses).enumerate().map(|(index, (pod, status))| PodView {
            name: pod.short_name(&self.model).to_owned(),
            kind: pod.kind,
            phase: self.phase(index, status.as_ref()),
        });
        let views = views.collect();
        for (running, status) in self.running.iter().filter_map(|one| Some((one, statuses[one.pod].as_ref()?))) {
            if Phase::of(status) == Phase::Ready {
                running.process.has_served();
            }
        }
        Observation { views, statuses: statuses.into_iter().flatten().collect() }
    }

    fn phase(&self, pod: usize, status: Option<&Status>) -> Phase {
        let in_state = |state| self.running.iter().any(|one| one.pod == pod && one.state == state);
        match (status, self.pods[pod].kind) {
            _ if in_state(ProcessState::Restarting) => Phase::Restarting,
            _ if in_state(ProcessState::Stopped) => Phase::Stopped,
            (Some(status), _) => Phase::of(status),
            (None, PodKind::FrontDoor) => Phase::Ready,
            (None, PodKind::Worker(_)) => Phase::Starting,
        }
    }

    /// Why the proxy where clients enter would not serve a request as planned yet; nothing when it would.
    pub(crate) async fn not_yet(&self, entrance: &Pod) -> Option<String> {
        if let Err(error) = self.client.get(&format!("{}{}", entrance.proxy_url(), paths::READY), STATUS_TIMEOUT).await
        {
            return Some(error.to_string());
        }
        let url = format!("{}/debug/workers", entrance.admin_url());
        let rows = match self.client.get_json::<WorkerRows>(&url, STATUS_TIMEOUT).await {
            Ok(rows) => rows.workers,
            Err(error) => return Some(error.to_string()),
        };
        let prefill = self.pods.iter().filter(|pod| pod.kind == PodKind::Worker(baton_wire::Role::Prefill));
        prefill.into_iter().find_map(|pod| {
            let address = format!("{}:{}", pod.address, ports::PROXY);
            match rows.iter().find(|row| row.address == address) {
                None => Some(format!("{} is not known to the proxy yet", pod.name)),
                Some(row) => row.not_for_prefill.as_ref().map(|why| format!("{} cannot be used: {why}", pod.name)),
            }
        })
    }

    /// Notes that all of it has served: from now on whatever dies is started again.
    pub(crate) fn has_served(&self) {
        self.running.iter().for_each(|running| running.process.has_served());
    }

    /// Asks workers (or, in their turn, proxies) to finish and end. Proxies go last: running answers pass through them.
    pub(crate) fn drain(&self, program: Program) {
        self.running.iter().filter(|running| running.program == program).for_each(|running| running.process.drain());
    }

    /// Ends everything at once.
    pub(crate) fn kill(&self) {
        self.running.iter().for_each(|running| running.process.kill());
    }

    /// Whether every process of a program has ended.
    pub(crate) fn has_stopped(&self, program: Program) -> bool {
        self.running
            .iter()
            .filter(|running| running.program == program)
            .all(|running| running.state == ProcessState::Stopped)
    }

    /// Stops everything: workers first, then proxies, each within its time, then by force. `hurry` ends the patience.
    /// Gives the names of those that had to be killed or ended badly.
    pub(crate) async fn stop(&mut self, workers_within: Duration, mut hurry: impl AsyncFnMut()) -> Vec<String> {
        let mut unclean = Vec::new();
        for (program, within) in [(Program::Worker, workers_within), (Program::Proxy, PROXY_DRAIN_MAX)] {
            self.drain(program);
            let mut deadline = Some(Instant::now() + within);
            while !self.has_stopped(program) {
                let out_of_time = async {
                    match deadline {
                        Some(deadline) => tokio::time::sleep_until(deadline).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    happened = self.next() => {
                        if let ChangeKind::Stopped { clean: false, exit } = happened.kind {
                            unclean.push(format!("{} {exit}", happened.name));
                        }
                    }
                    () = out_of_time => {
                        deadline = None;
                        self.kill();
                    }
                    () = hurry() => {
                        deadline = None;
                        self.kill();
                    }
                }
            }
        }
        unclean
    }
}
