//! The private folder of one `baton up`: keys, endpoints, logs, and the record by which other commands find it.
//!
//! It lies at a place that is known beforehand, below a folder that only its owner can enter. A lock that the kernel drops
//! with the process tells a running one from what a killed one has left behind.

use crate::pods::{Files, Pod};
use baton_wire::signing;
use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Folders of failed runs that are kept for their logs; older ones go.
const KEPT_MAX: usize = 5;

const LOCK: &str = "lock";
/// In the base: one run is created at a time.
const GATE: &str = "gate";
const RECORD: &str = "run.json";
/// Marks a folder that is kept for its logs.
const KEPT: &str = "kept";
const SIGNING_KEY: &str = "signing.key";

/// Why there is no such folder.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunDirError {
    /// Something can't be created, read or written.
    #[error("{}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Somebody else could read keys in it.
    #[error("{}: belongs to somebody else or is open to others; remove it", path.display())]
    NotPrivate { path: PathBuf },
    /// The system gives no randomness.
    #[error("no randomness for a key: {0}")]
    NoRandomness(getrandom::Error),
}

/// What other commands need to know of a running `baton up`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// `metadata.name` of the manifest.
    pub(crate) name: String,
    /// Base URL for clients.
    pub(crate) url: String,
    pub(crate) pods: Vec<PodRecord>,
}

/// One pod of a running `baton up`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodRecord {
    pub(crate) name: String,
    /// Base URL of its proxy.
    pub(crate) url: String,
    /// Whether a worker is behind it.
    pub(crate) has_engine: bool,
}

/// The folder of this process's `baton up`.
pub(crate) struct RunDir {
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Creates the folder below `base`, with a fresh key pair, and sweeps what earlier runs have left there.
    ///
    /// # Errors
    /// When the place is not private to us, or not writable.
    pub(crate) fn create(base: &Path, name: &str) -> Result<Self, RunDirError> {
        create_private(base)?;
        // Held until our own lock is: another run that sweeps meanwhile must not take us for dead.
        let gate_path = base.join(GATE);
        let gate = File::create(&gate_path).map_err(io(&gate_path))?;
        gate.lock().map_err(io(&gate_path))?;
        sweep(base);
        let path = base.join(format!("{name}-{}", std::process::id()));
        // A left-over of an earlier process with our number: it is dead, or it would not be our number.
        if path.exists() {
            std::fs::remove_dir_all(&path).map_err(io(&path))?;
        }
        DirBuilder::new().mode(0o700).create(&path).map_err(io(&path))?;
        let lock_path = path.join(LOCK);
        let lock = File::create(&lock_path).map_err(io(&lock_path))?;
        lock.lock().map_err(io(&lock_path))?;
        let dir = RunDir { path, _lock: lock };
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(RunDirError::NoRandomness)?;
        let key = SigningKey::from_bytes(&secret);
        let files = dir.files();
        write_private(&files.signing_key, &signing::key_text(&key.to_bytes()))?;
        write_private(&files.public_key, &signing::key_text(&key.verifying_key().to_bytes()))?;
        Ok(dir)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The files that processes are given.
    pub(crate) fn files(&self) -> Files {
        Files {
            signing_key: self.path.join(SIGNING_KEY),
            public_key: self.path.join("public.key"),
            endpoints: self.path.join("endpoints.json"),
        }
    }

    /// The log of a process.
    pub(crate) fn log(&self, process: &str) -> PathBuf {
        self.path.join(format!("{}.log", process.replace('/', "-")))
    }

    /// Writes down where everything is.
    ///
    /// # Errors
    /// When it can't be written.
    pub(crate) fn record(&self, name: &str, url: &str, pods: &[Pod]) -> Result<(), RunDirError> {
        let endpoints = serde_json::json!({ "endpoints": crate::pods::endpoints(pods) });
        write_private(&self.files().endpoints, &endpoints.to_string())?;
        let pods = pods.iter().map(|pod| PodRecord {
            name: pod.name.clone(),
            url: pod.proxy_url(),
            has_engine: pod.kind != crate::pods::PodKind::FrontDoor,
        });
        let record = Record { name: name.to_owned(), url: url.to_owned(), pods: pods.collect() };
        let text = serde_json::to_string_pretty(&record).expect("a record is strings and lists");
        write_private(&self.path.join(RECORD), &text)
    }

    /// Removes the folder.
    pub(crate) fn remove(self) {
        // What can't be removed now is swept by the next run.
        let _ = std::fs::remove_dir_all(&self.path);
    }

    /// Keeps the logs, without the key, and says where they are.
    pub(crate) fn keep(self) -> PathBuf {
        let _ = std::fs::remove_file(self.path.join(SIGNING_KEY));
        let _ = File::create(self.path.join(KEPT));
        self.path
    }
}

/// Where the folders of this user's runs are. Below the system's folder for such things where there is one: the variable
/// outlives it in containers and under `sudo`.
pub(crate) fn base() -> PathBuf {
    base_below(std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from))
}

fn base_below(runtime_dir: Option<PathBuf>) -> PathBuf {
    match runtime_dir.filter(|dir| dir.is_dir()) {
        Some(dir) => dir.join("baton"),
        None => std::env::temp_dir().join(format!("baton-{}", rustix::process::getuid().as_raw())),
    }
}

/// The records of all runs below `base` that are alive.
pub(crate) fn running(base: &Path) -> Vec<Record> {
    let mut records: Vec<Record> = folders(base)
        .into_iter()
        .filter(|path| is_locked(path))
        .filter_map(|path| serde_json::from_slice(&std::fs::read(path.join(RECORD)).ok()?).ok())
        .collect();
    records.sort_by(|a: &Record, b: &Record| (&a.name, &a.url).cmp(&(&b.name, &b.url)));
    records
}

/// Removes what killed runs have left, and all but the latest of the kept ones.
fn sweep(base: &Path) {
    let (mut kept, dead): (Vec<PathBuf>, Vec<PathBuf>) =
        folders(base).into_iter().filter(|path| !is_locked(path)).partition(|path| path.join(KEPT).exists());
    kept.sort_by_key(|path| {
        std::cmp::Reverse(std::fs::metadata(path.join(KEPT)).and_then(|meta| meta.modified()).ok())
    });
    for path in dead.into_iter().chain(kept.into_iter().skip(KEPT_MAX)) {
        // Best effort: a left-over harms nobody.
        let _ = std::fs::remove_dir_all(path);
    }
}

fn folders(base: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(base).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.join(LOCK).exists()).collect()
}

fn is_locked(path: &Path) -> bool {
    File::open(path.join(LOCK)).is_ok_and(|lock| matches!(lock.try_lock(), Err(std::fs::TryLockError::WouldBlock)))
}

fn create_private(base: &Path) -> Result<(), RunDirError> {
    match DirBuilder::new().mode(0o700).create(base) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(source) => return Err(RunDirError::Io { path: base.to_owned(), source }),
    }
    // Without following a link that somebody else may have put there.
    let found = std::fs::symlink_metadata(base).map_err(io(base))?;
    let ours = found.is_dir() && found.uid() == rustix::process::getuid().as_raw() && found.mode() & 0o077 == 0;
    if ours { Ok(()) } else { Err(RunDirError::NotPrivate { path: base.to_owned() }) }
}

fn write_private(path: &Path, text: &str) -> Result<(), RunDirError> {
    let write = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(text.as_bytes());
    write().map_err(io(path))
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> RunDirError {
    let path = path.to_owned();
    |source| RunDirError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).expect("it is there").mode() & 0o777
    }

    #[test]
    fn keys_are_fresh_match_and_are_readable_by_their_owner_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let base = folder.path().join("baton");
        let dir = RunDir::create(&base, "m").expect("a run");
        let text = |path: &Path| std::fs::read_to_string(path).expect("a file");
        let files = dir.files();
        let signing = signing::parse_signing_key(&text(&files.signing_key)).expect("a key");
        let public = signing::parse_verifying_key(&text(&files.public_key)).expect("a key");
        assert_eq!(signing.verifying_key(), public);
        assert_eq!((mode(&base), mode(dir.path()), mode(&files.signing_key)), (0o700, 0o700, 0o600));
    }

    #[test]
    fn a_run_is_found_while_it_lives_and_not_after() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = RunDir::create(folder.path(), "m").or_else(|_| RunDir::create(&folder.path().join("b"), "m"));
        let dir = dir.expect("a run");
        let base = dir.path().parent().expect("it lies below its base").to_owned();
        dir.record("m", "http://127.0.0.1:8000", &[]).expect("a record");
        assert_eq!(running(&base).len(), 1);
        dir.remove();
        assert_eq!(running(&base), []);
    }

    #[test]
    fn a_kept_run_has_logs_and_no_key_and_the_next_run_leaves_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let base = folder.path().join("baton");
        let dir = RunDir::create(&base, "failed").expect("a run");
        std::fs::write(dir.log("worker"), "words").expect("a log");
        let key = dir.files().signing_key;
        let kept = dir.keep();
        let dead = base.join("dead-1");
        std::fs::create_dir(&dead).expect("a folder");
        std::fs::write(dead.join(LOCK), "").expect("a file");
        let _next = RunDir::create(&base, "next").expect("a run");
        assert!(kept.join("worker.log").exists() && !key.exists());
        assert!(!dead.exists(), "what a killed run left is swept");
    }

    #[test]
    fn a_runtime_folder_that_is_not_there_gives_way_to_the_one_for_temporary_files() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(base_below(Some(folder.path().to_owned())), folder.path().join("baton"));
        let instead = base_below(Some(folder.path().join("nothing")));
        assert_eq!(instead, base_below(None));
        assert!(instead.starts_with(std::env::temp_dir()));
    }

    #[test]
    fn a_base_that_others_can_enter_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("a folder");
        let base = folder.path().join("open");
        std::fs::create_dir(&base).expect("a folder");
        std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o755)).expect("own folder");
        assert!(matches!(RunDir::create(&base, "m"), Err(RunDirError::NotPrivate { .. })));
    }
}
