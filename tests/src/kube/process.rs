//! The processes of one test cluster, their folder, and the janitor that ends them.

use crate::repo;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How much of each log a failing test shows.
const LOG_END: usize = 4000;

/// What the folders' names start with.
const PREFIX: &str = "baton-cluster-";

/// The file whose lock says that a folder's owner lives.
const OWNER: &str = "owner";

/// A process of the cluster ended by itself.
#[derive(Debug)]
pub(super) struct Ended {
    name: String,
    status: ExitStatus,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} has ended with {}", self.name, self.status)
    }
}

impl std::error::Error for Ended {}

/// A program that has ended.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Whether its exit code was 0.
    pub success: bool,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ran {
    /// Its standard output.
    ///
    /// # Errors
    /// When it failed; with what it said.
    pub fn ok(self) -> Result<String> {
        ensure!(self.success, "{}{}", self.stdout, self.stderr);
        Ok(self.stdout)
    }
}

pub(super) fn run(mut command: Command, input: &str) -> Result<Ran> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let mut stdin = child.stdin.take().context("its standard input was asked for")?;
    let output = std::thread::scope(|scope| {
        // A program may end without reading all; what it says then is what matters.
        scope.spawn(move || drop(stdin.write_all(input.as_bytes())));
        child.wait_with_output()
    })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Ran { success: output.status.success(), stdout: text(&output.stdout), stderr: text(&output.stderr) })
}

/// Processes that end, with all that they started, when this is dropped or the process that has it ends.
pub(super) struct Processes {
    folder: PathBuf,
    children: Mutex<BTreeMap<String, Child>>,
    janitor: Child,
    // Its end is what the janitor waits for.
    janitor_input: Option<ChildStdin>,
    // Closed last, as fields are after `drop`: then nothing is left.
    turns: Mutex<Vec<File>>,
    _owner: File,
}

impl Processes {
    pub(super) fn new() -> Result<Self> {
        sweep();
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir()?.keep();
        let owner = File::create(folder.join(OWNER))?;
        owner.lock()?;
        std::fs::create_dir(folder.join("tmp"))?;
        std::fs::create_dir(folder.join("home"))?;
        let mut janitor = janitor(&folder, Stdio::piped())?;
        let janitor_input = janitor.stdin.take();
        Ok(Processes {
            folder,
            children: Mutex::default(),
            janitor,
            janitor_input,
            turns: Mutex::default(),
            _owner: owner,
        })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    fn children(&self) -> MutexGuard<'_, BTreeMap<String, Child>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a program; its log is `<name>.log`.
    pub(super) fn spawn(&self, program: &Path, name: &str, arguments: &[String]) -> Result<()> {
        let mut command = Command::new(program);
        command.args(arguments);
        self.spawn_command(command, name)
    }

    pub(super) fn spawn_command(&self, mut command: Command, name: &str) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.folder.join(format!("{name}.log")))?;
        command
            .env("BATON_TEST_CLUSTER", &self.folder)
            .env("TMPDIR", self.folder.join("tmp"))
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for the test; then the janitor is for these.
            .process_group(0);
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        self.children().insert(name.to_owned(), child);
        Ok(())
    }

    /// Names something outside of the folder that is to be removed: `cgroup`, `netns` or `link`, and its path or name.
    pub(super) fn leaves(&self, kind: &str, name: &str) -> Result<()> {
        let mut list = File::options().create(true).append(true).open(self.folder.join("leftovers"))?;
        writeln!(list, "{kind} {name}")?;
        Ok(())
    }

    /// Keeps a locked file until nothing of the cluster is left: others wait for the lock to take its place.
    pub(super) fn keep_turn(&self, turn: File) {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner).push(turn);
    }

    pub(super) fn kill(&self, name: &str) -> Result<()> {
        let mut child = self.children().remove(name).with_context(|| format!("{name} does not run"))?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Fails when one of them has ended by itself.
    pub(super) fn check(&self) -> Result<()> {
        for (name, child) in self.children().iter_mut() {
            if let Some(status) = child.try_wait()? {
                return Err(Ended { name: name.clone(), status }.into());
            }
        }
        Ok(())
    }

    pub(super) fn living(&self) -> Vec<(String, u32)> {
        self.children().iter().map(|(name, child)| (name.clone(), child.id())).collect()
    }

    pub(super) fn logs(&self) -> String {
        let mut all = String::new();
        for name in self.children().keys() {
            let log = std::fs::read_to_string(self.folder.join(format!("{name}.log"))).unwrap_or_default();
            let from = log.ceil_char_boundary(log.len().saturating_sub(LOG_END));
            all += &format!("== the end of {name}'s log\n{}\n", &log[from..]);
        }
        all
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        drop(self.janitor_input.take());
        // It kills them; here they are only collected, and already ended is fine.
        let _ = self.janitor.wait();
        for child in self.children().values_mut() {
            let _ = child.wait();
        }
    }
}

fn janitor(folder: &Path, input: Stdio) -> Result<Child> {
    Command::new(repo::root().join("tests/cluster/janitor"))
        .arg(folder)
        .stdin(input)
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .context("start tests/cluster/janitor")
}

/// Removes what is left of clusters whose janitor was killed, too.
fn sweep() {
    let entries = std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    for folder in entries.map(|entry| entry.path()) {
        let is_cluster = folder.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PREFIX));
        let Ok(owner) = File::open(folder.join(OWNER)) else { continue };
        if is_cluster && owner.try_lock().is_ok() {
            // What can't be removed now is tried again by the next one.
            let _ = janitor(&folder, Stdio::null()).map(|mut child| child.wait());
        }
    }
}
