//! One program of a run: bound to a core, ended with the run, made to stand still while it isn't its turn.

use crate::setup::Core;
use anyhow::{Context as _, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use system_tests::operator::resident_bytes;

/// How much of a log is shown when its program has ended.
const LOG_BYTES_MAX: usize = 1500;

pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

/// User and system time of each thread so far. The kernel knows it to the nanosecond here, and to a hundredth of a second in the
/// sums that it tells of whole processes, which is too coarse for a turn in which the machine gives little.
#[derive(Debug, Default)]
pub(crate) struct Cpu(BTreeMap<PathBuf, Duration>);

impl Cpu {
    /// What has been taken since an earlier look.
    pub(crate) fn since(&self, before: &Cpu) -> Duration {
        let taken = |(thread, now): (&PathBuf, &Duration)| {
            now.saturating_sub(before.0.get(thread).copied().unwrap_or_default())
        };
        self.0.iter().map(taken).sum()
    }
}

impl Process {
    /// Starts a program on one core, its output in `log`.
    ///
    /// # Errors
    /// When it can't be started.
    pub(crate) fn start(core: Core, program: &Path, args: &[String], log: PathBuf) -> Result<Self> {
        let file = File::create(&log)?;
        // Both give way to the program, so that the process is the program. A stopped process gets no other signal: without
        // its own end bound to ours, one that stands still would stay behind when this is interrupted.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "taskset", "-c", &core.to_string()])
            .arg(program)
            .args(args)
            .env("BATON_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Process { child, log })
    }

    /// # Errors
    /// When it has ended, with the end of its log.
    pub(crate) fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let log = log.trim();
            bail!(
                "it has ended with {status}: {}",
                &log[log.ceil_char_boundary(log.len().saturating_sub(LOG_BYTES_MAX))..]
            );
        }
        Ok(())
    }

    /// CPU time of its threads and of its children's.
    pub(crate) fn cpu(&self) -> Result<Cpu> {
        let mut threads = BTreeMap::new();
        for pid in self.tree()? {
            for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
                let path = entry?.path();
                // One that has ended meanwhile counts for nothing; a process has all of its work in threads that stay.
                let Ok(text) = std::fs::read_to_string(path.join("schedstat")) else { continue };
                let on_cpu = text.split(' ').next().and_then(|nanoseconds| nanoseconds.parse().ok());
                threads.insert(path, on_cpu.map(Duration::from_nanos).context("schedstat begins with a time")?);
            }
        }
        Ok(Cpu(threads))
    }

    /// Memory that it and its children have in RAM, in millions of bytes.
    pub(crate) fn resident_mb(&self) -> Result<f64> {
        let bytes: u64 = self.tree()?.into_iter().map(resident_bytes).sum::<Result<u64>>()?;
        Ok(bytes as f64 / 1e6)
    }

    pub(crate) fn freeze(&self) -> Result<()> {
        self.signal("STOP")
    }

    pub(crate) fn thaw(&self) -> Result<()> {
        self.signal("CONT")
    }

    fn signal(&self, name: &str) -> Result<()> {
        let pids = self.tree()?.into_iter().map(|pid| pid.to_string());
        let output = Command::new("kill").arg(format!("-{name}")).args(pids).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// It and all that descend from it.
    fn tree(&self) -> Result<Vec<u32>> {
        let mut parents = Vec::new();
        for entry in std::fs::read_dir("/proc")? {
            let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
            // What has ended meanwhile is nobody's child any more.
            let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            // After the name, which stands in brackets and may hold anything: the state, the parent.
            let parent =
                stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
            parents.push((pid, parent));
        }
        let mut tree = vec![self.child.id()];
        let mut next = 0;
        while let Some(parent) = tree.get(next).copied() {
            tree.extend(parents.iter().filter(|(_, found)| *found == Some(parent)).map(|(pid, _)| *pid));
            next += 1;
        }
        Ok(tree)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already ended is fine.
        let _ = self.signal("KILL");
        let _ = self.child.wait();
    }
}
