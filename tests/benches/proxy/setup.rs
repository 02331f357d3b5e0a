//! What a run is made of: programs, cores, rounds, and who takes part.

use crate::contestant::Contestant;
use crate::line;
use crate::workload::Workload;
use anyhow::{Context as _, Result, bail, ensure};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Connections are made and memory is taken in this time, before anything counts.
const WARM_UP: Duration = Duration::from_millis(400);
/// Of a short run, turns are so much shorter.
const QUICK: u32 = 3;
/// As many as a median with a range needs.
const ROUNDS: usize = 5;

pub(crate) struct Setup {
    pub(crate) programs: Programs,
    pub(crate) cores: Cores,
    pub(crate) contestants: Vec<Contestant>,
    pub(crate) rounds: usize,
    is_quick: bool,
    /// For logs, and for the file that names the engines to who wants one.
    folder: TempDir,
    /// Given away in this run.
    ports: RefCell<BTreeSet<u16>>,
}

/// Where the programs are: `benches/proxy` says it in the environment.
pub(crate) struct Programs {
    /// The command line, which is also the engines: `BENCH_BATON`.
    pub(crate) baton: PathBuf,
    /// `BENCH_PROXY`.
    pub(crate) proxy: PathBuf,
    /// `BENCH_FLOOR`.
    pub(crate) floor: PathBuf,
    /// The virtual environment of the peers: `BENCH_PEERS`.
    peers: PathBuf,
}

/// One core, by its number.
pub(crate) type Core = usize;

/// Who runs where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cores {
    pub(crate) contestant: Core,
    /// The engines' and the load's.
    pub(crate) load: Core,
}

impl Setup {
    /// `[--quick] [--rounds N] [--only NAME,NAME]`
    ///
    /// # Errors
    /// When that isn't the command line, or a program isn't named.
    pub(crate) fn read(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let (mut is_quick, mut rounds, mut contestants) = (false, None, Contestant::DEFAULT.to_vec());
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} has a value"));
            match word.as_str() {
                // `cargo bench` gives this to every target.
                "--bench" => {}
                "--quick" => is_quick = true,
                "--rounds" => rounds = Some(value()?.parse().context("--rounds is a number")?),
                "--only" => contestants = value()?.split(',').map(Contestant::named).collect::<Result<_>>()?,
                other => bail!("no flag {other}: [--quick] [--rounds N] [--only NAME,NAME]"),
            }
        }
        let program =
            |name: &str| std::env::var_os(name).map(PathBuf::from).with_context(|| format!("{name} is not set"));
        Ok(Setup {
            programs: Programs {
                baton: program("BENCH_BATON")?,
                proxy: program("BENCH_PROXY")?,
                floor: program("BENCH_FLOOR")?,
                peers: program("BENCH_PEERS")?,
            },
            cores: Cores::choose()?,
            contestants,
            rounds: rounds.unwrap_or(if is_quick { 1 } else { ROUNDS }),
            is_quick,
            folder: tempfile::tempdir()?,
            ports: RefCell::default(),
        })
    }

    /// How long a workload's turn is warmed up, and lasts.
    pub(crate) fn times(&self, workload: &Workload) -> (Duration, Duration) {
        let shorter = if self.is_quick { QUICK } else { 1 };
        (WARM_UP / shorter, workload.turn() / shorter)
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A port that was free a moment ago, and is given once: the system may well offer one twice before it is taken.
    pub(crate) fn free_address(&self) -> Result<SocketAddr> {
        loop {
            let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
            if self.ports.borrow_mut().insert(address.port()) {
                return Ok(address);
            }
        }
    }

    /// Says what is compared, and on what.
    pub(crate) fn introduce(&self) -> Result<()> {
        let processor = std::fs::read_to_string("/proc/cpuinfo")?;
        let processor = processor.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        line(&format!(
            "load average: {}; {}, {} cores",
            load_average()?,
            processor.map_or("a processor without a name", |(_, name)| name),
            std::thread::available_parallelism()?,
        ));
        line(&format!("{}; {}", self.programs.version(&self.programs.proxy), self.programs.peers()?));
        line(&self.cores.to_string());
        line(&format!(
            "{} rounds; CPU is user and system time of the contestant's processes; times at the client; median (range) of rounds",
            self.rounds
        ));
        Ok(())
    }
}

impl Programs {
    /// A peer's program.
    ///
    /// # Errors
    /// When it is not installed.
    pub(crate) fn peer(&self, name: &str) -> Result<PathBuf> {
        let program = self.peers.join("bin").join(name);
        ensure!(program.exists(), "{name} could not be installed");
        Ok(program)
    }

    /// The peers that are there, with their versions.
    fn peers(&self) -> Result<String> {
        let mut found = Vec::new();
        for lib in std::fs::read_dir(self.peers.join("lib")).into_iter().flatten() {
            for entry in std::fs::read_dir(lib?.path().join("site-packages"))? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                let Some((name, version)) = name.strip_suffix(".dist-info").and_then(|name| name.split_once('-'))
                else {
                    continue;
                };
                let name = name.replace('_', "-");
                if Contestant::PEERS.iter().any(|peer| peer.to_string() == name) {
                    found.push(format!("{name} {version}"));
                }
            }
        }
        found.sort();
        Ok(if found.is_empty() { "no peers".to_owned() } else { found.join(", ") })
    }

    fn version(&self, program: &Path) -> String {
        let output = Command::new(program).arg("--version").stderr(Stdio::null()).output();
        let said = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
        if said.is_empty() { format!("{} is not there", program.display()) } else { said }
    }
}

impl Cores {
    /// The first two that this process may use.
    fn choose() -> Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let mut allowed = Vec::new();
        for range in list.context("a process has cores")?.trim().split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            allowed.extend(first.parse::<Core>()?..=last.parse::<Core>()?);
        }
        let contestant = *allowed.first().context("a process has a core")?;
        Ok(Cores { contestant, load: allowed.get(1).copied().unwrap_or(contestant) })
    }

    /// Binds this process, which is the load; what it starts is bound at its start.
    pub(crate) fn stay_at_load(self) -> Result<()> {
        let own = std::process::id().to_string();
        let core = self.load.to_string();
        let status = Command::new("taskset").args(["-a", "-c", "-p", &core, &own]).stdout(Stdio::null()).status()?;
        ensure!(status.success(), "taskset can't bind this to core {core}");
        Ok(())
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cores { contestant, load } = self;
        write!(f, "contestants by turns on core {contestant}, bound by taskset, the others stopped meanwhile; ")?;
        if contestant == load {
            return write!(f, "engines and load on the same core, for there is no other: no time means anything");
        }
        write!(f, "engines and load on core {load}")
    }
}

pub(crate) fn load_average() -> Result<String> {
    let load = std::fs::read_to_string("/proc/loadavg")?;
    Ok(load.split(' ').take(3).collect::<Vec<_>>().join(" "))
}
