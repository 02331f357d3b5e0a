//! One supervised process: started, watched, started again when it dies, stopped when told.
//!
//! Knows processes, log files and signals; `restart` decides, `up` orders. A child gets a process group of its own, so that
//! a Ctrl-C in the terminal reaches `baton` alone, which then stops the children in the right order.

use crate::restart::{Death, Next, Restarts};
use crate::tie;
use rustix::process::{Pid, Signal};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

/// Bytes from the end of a log in which the last words are looked for: ten lines of 400 characters.
const LAST_WORDS_BYTES: u64 = 4096;

/// Lines of last words: an error with its causes, seldom more.
const LAST_WORDS_LINES: usize = 8;

/// Characters of a line of last words: three rows of a wide terminal.
const LAST_WORDS_CHARS: usize = 400;

/// Changes on their way to who watches. A process makes two a life, and lives are a quarter of a second apart at least;
/// when nobody takes them the supervisors wait.
pub(crate) const CHANGES_MAX: usize = 64;

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct ProcessSpec {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// Standard output and error of all its lives.
    pub(crate) log: PathBuf,
}

/// How children are started.
#[derive(Clone, Debug)]
pub(crate) enum Launcher {
    /// Tied to this process by way of `baton` itself (the path), so that not even SIGKILL leaves them behind.
    Tied(PathBuf),
    /// As they are.
    #[cfg(test)]
    Direct,
}

/// What happened to a process.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    /// Its number, as given to [`Process::start`].
    pub(crate) process: usize,
    pub(crate) kind: ChangeKind,
}

/// What happened.
#[derive(Clone, Debug)]
pub(crate) enum ChangeKind {
    /// It runs.
    Started,
    /// It died and will be started again.
    Restarting { exit: String, last_words: Vec<String>, after: std::time::Duration },
    /// It died, and starting it again would end the same way.
    Failed { exit: String, last_words: Vec<String> },
    /// It ended as it was told to; `clean` if with success.
    Stopped { clean: bool, exit: String },
}

/// What a process is told. Each is stronger than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Order {
    Run,
    Drain,
    Kill,
}

/// A supervised process. Dropping it kills the child.
pub(crate) struct Process {
    orders: watch::Sender<Order>,
    served: Arc<AtomicBool>,
    supervisor: tokio::task::JoinHandle<()>,
}

impl Process {
    /// Starts supervising; what happens goes to `changes`.
    pub(crate) fn start(number: usize, spec: ProcessSpec, launcher: Launcher, changes: mpsc::Sender<Change>) -> Self {
        let (orders, receiver) = watch::channel(Order::Run);
        let served = Arc::new(AtomicBool::new(false));
        let supervisor = Supervisor { number, spec, launcher, orders: receiver, served: served.clone(), changes };
        Process { orders, served, supervisor: tokio::spawn(supervisor.run()) }
    }

    /// Notes that it has served: from now on it is always started again.
    pub(crate) fn has_served(&self) {
        self.served.store(true, Ordering::Relaxed);
    }

    /// Asks it to finish and end (SIGTERM), and starts it no more.
    pub(crate) fn drain(&self) {
        self.order(Order::Drain);
    }

    /// Ends it at once (SIGKILL).
    pub(crate) fn kill(&self) {
        self.order(Order::Kill);
    }

    fn order(&self, order: Order) {
        self.orders.send_if_modified(|current| {
            let stronger = order > *current;
            *current = (*current).max(order);
            stronger
        });
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

struct Supervisor {
    number: usize,
    spec: ProcessSpec,
    launcher: Launcher,
    orders: watch::Receiver<Order>,
    served: Arc<AtomicBool>,
    changes: mpsc::Sender<Change>,
}

impl Supervisor {
    async fn run(mut self) {
        let mut restarts = Restarts::default();
        loop {
            let born = Instant::now();
            let log_start = std::fs::metadata(&self.spec.log).map_or(0, |log| log.len());
            let mut child = match self.spawn() {
                Ok(child) => child,
                Err(error) => {
                    let exit = format!("cannot be started: {error}");
                    return self.tell(ChangeKind::Failed { exit, last_words: Vec::new() }).await;
                }
            };
            self.tell(ChangeKind::Started).await;
            let status = self.wait(&mut child).await;
            let exit = status.as_ref().map_or_else(|error| format!("lost: {error}"), describe);
            if *self.orders.borrow() > Order::Run {
                let clean = status.is_ok_and(|status| status.success());
                return self.tell(ChangeKind::Stopped { clean, exit }).await;
            }
            let death = if status.is_ok_and(|status| status.code().is_some()) { Death::Exited } else { Death::Killed };
            let last_words = last_words(&self.spec.log, log_start);
            match restarts.after(death, self.served.load(Ordering::Relaxed), born.elapsed()) {
                Next::GiveUp => return self.tell(ChangeKind::Failed { exit, last_words }).await,
                Next::Restart(after) => {
                    self.tell(ChangeKind::Restarting { exit: exit.clone(), last_words, after }).await;
                    tokio::select! {
                        () = tokio::time::sleep(after) => {}
                        _ = self.orders.changed() => return self.tell(ChangeKind::Stopped { clean: true, exit }).await,
                    }
                }
            }
        }
    }

    fn spawn(&self) -> std::io::Result<Child> {
        let log = File::options().create(true).append(true).open(&self.spec.log)?;
        let command = match &self.launcher {
            Launcher::Tied(baton) => tie::command(baton, &self.spec.program, &self.spec.args),
            #[cfg(test)]
            Launcher::Direct => {
                let mut command = std::process::Command::new(&self.spec.program);
                command.args(&self.spec.args);
                command
            }
        };
        let mut command = Command::from(command);
        // A log file is no terminal, whatever ours is.
        command.env("NO_COLOR", "1").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        command.process_group(0).kill_on_drop(true).spawn()
    }

    /// Waits for the end, passing orders on as signals.
    async fn wait(&mut self, child: &mut Child) -> std::io::Result<ExitStatus> {
        loop {
            tokio::select! {
                status = child.wait() => return status,
                changed = self.orders.changed() => {
                    let order = *self.orders.borrow();
                    if changed.is_err() {
                        return child.wait().await;
                    }
                    // Not reaped yet, so the number is still this child's. An error means that it is ending already.
                    let _ = match (order, child.id().and_then(|id| Pid::from_raw(id.cast_signed()))) {
                        (Order::Drain, Some(pid)) => rustix::process::kill_process(pid, Signal::TERM),
                        (Order::Kill, Some(pid)) => rustix::process::kill_process_group(pid, Signal::KILL),
                        (Order::Run, _) | (_, None) => Ok(()),
                    };
                }
            }
        }
    }

    async fn tell(&self, kind: ChangeKind) {
        // Nobody listens any more only when all of `baton` is ending.
        let _ = self.changes.send(Change { process: self.number, kind }).await;
    }
}

/// How a process ended, for people.
fn describe(status: &ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// The last lines that a life has logged.
fn last_words(log: &Path, from: u64) -> Vec<String> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(from.max(end.saturating_sub(LAST_WORDS_BYTES))))?;
        let mut bytes = Vec::new();
        file.take(LAST_WORDS_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    // A log that can't be read is no reason to hide how the process ended.
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    // What a process says of an ordinary life only hides why it ended, unless that is all it said.
    let is_ordinary = |line: &&&str| [" INFO ", " DEBUG ", " TRACE "].iter().any(|level| line.contains(level));
    let telling: Vec<&str> = lines.iter().filter(|line| !is_ordinary(line)).copied().collect();
    let lines = if telling.is_empty() { lines } else { telling };
    let last = &lines[lines.len().saturating_sub(LAST_WORDS_LINES)..];
    last.iter().map(|line| line.chars().take(LAST_WORDS_CHARS).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Longest wait for a shell to do something; a busy machine needs a second.
    const PATIENCE: Duration = Duration::from_secs(20);

    struct Fixture {
        folder: tempfile::TempDir,
        process: Process,
        changes: mpsc::Receiver<Change>,
    }

    /// Runs a shell script in a folder of its own.
    fn script(text: &str) -> Fixture {
        let folder = tempfile::tempdir().expect("a folder");
        let spec = ProcessSpec {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), format!("cd {}\n{text}", folder.path().display()).into()],
            log: folder.path().join("log"),
        };
        let (sender, changes) = mpsc::channel(CHANGES_MAX);
        Fixture { process: Process::start(0, spec, Launcher::Direct, sender), folder, changes }
    }

    impl Fixture {
        async fn next(&mut self) -> ChangeKind {
            let change = tokio::time::timeout(PATIENCE, self.changes.recv()).await.expect("a change in time");
            change.expect("the supervisor lives").kind
        }

        async fn file(&self, name: &str) {
            let path = self.folder.path().join(name);
            let wait = async {
                while !path.exists() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(PATIENCE, wait).await.expect("the script gets there");
        }
    }

    #[tokio::test]
    async fn an_exit_before_serving_is_final_and_tells_the_last_words() {
        let mut fixture =
            script("echo 'now INFO loading'; echo 'now ERROR tensor is missing' >&2; echo because; exit 3");
        assert!(matches!(fixture.next().await, ChangeKind::Started));
        let ChangeKind::Failed { exit, last_words } = fixture.next().await else { panic!("not given up") };
        assert_eq!(exit, "exited with 3");
        assert_eq!(last_words, ["now ERROR tensor is missing", "because"]);
    }

    #[tokio::test]
    async fn what_has_served_is_restarted_and_tells_the_words_of_that_life_only() {
        let mut fixture = script(
            "if [ -e lived ]; then echo second; touch again; read never </dev/null; while :; do sleep 1; done; fi\ntouch lived; echo first; while [ ! -e die ]; do sleep 0.01; done; exit 1",
        );
        fixture.process.has_served();
        assert!(matches!(fixture.next().await, ChangeKind::Started));
        fixture.file("lived").await;
        std::fs::write(fixture.folder.path().join("die"), "").expect("a file");
        let ChangeKind::Restarting { last_words, .. } = fixture.next().await else { panic!("not restarted") };
        assert_eq!(last_words, ["first"]);
        assert!(matches!(fixture.next().await, ChangeKind::Started));
        fixture.file("again").await;
        fixture.process.kill();
        let ChangeKind::Stopped { clean, exit } = fixture.next().await else { panic!("not stopped") };
        assert_eq!((clean, exit.as_str()), (false, "killed by signal 9"));
    }

    #[tokio::test]
    async fn draining_lets_a_process_finish_and_starts_it_no_more() {
        let mut fixture = script("trap 'touch finished; exit 0' TERM; touch up; while :; do sleep 0.01; done");
        assert!(matches!(fixture.next().await, ChangeKind::Started));
        fixture.file("up").await;
        fixture.process.drain();
        let ChangeKind::Stopped { clean, .. } = fixture.next().await else { panic!("not stopped") };
        assert!(clean);
        assert!(fixture.folder.path().join("finished").exists());
        assert!(fixture.changes.recv().await.is_none(), "nothing follows");
    }

    #[tokio::test]
    async fn killing_ends_what_will_not_drain() {
        let mut fixture = script("trap '' TERM; touch up; while :; do sleep 0.01; done");
        assert!(matches!(fixture.next().await, ChangeKind::Started));
        fixture.file("up").await;
        fixture.process.drain();
        fixture.process.kill();
        let ChangeKind::Stopped { clean, .. } = fixture.next().await else { panic!("not stopped") };
        assert!(!clean);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_told_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let spec =
            ProcessSpec { program: folder.path().join("nothing"), args: Vec::new(), log: folder.path().join("log") };
        let (sender, mut changes) = mpsc::channel(CHANGES_MAX);
        let _process = Process::start(0, spec, Launcher::Direct, sender);
        let change = changes.recv().await.expect("a change");
        assert!(matches!(change.kind, ChangeKind::Failed { .. }), "{change:?}");
    }
}
