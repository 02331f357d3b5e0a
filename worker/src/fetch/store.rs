//! The directory on the volume: who may write it, what of it is whole, and the marker that all is.
//!
//! ```text
//!  DIR/config.json, model.safetensors, …     whole and verified, each by a rename
//!  DIR/.baton-fetch/lock                     held by who downloads; the kernel drops it with its holder
//!                   begun.json               of which version the rest is
//!                   parts/ID                 not whole yet
//!                   done/ID                  empty: the file of that name is whole and of this version
//!                   complete.json            all is there
//! ```

use super::error::FetchError;
use super::pace::Pace;
use super::progress::Tracker;
use super::remote::Entry;
use baton_wire::progress::Phase;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

const CONTROL: &str = ".baton-fetch";
const LOCK: &str = "lock";
const BEGUN: &str = "begun.json";
const COMPLETE: &str = "complete.json";
const PARTS: &str = "parts";
const DONE: &str = "done";

/// Bytes of a marker: a hundred for each file of a model.
const MARKER_BYTES_MAX: u64 = 4 << 20;

/// A directory that is to be filled.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    control: PathBuf,
}

/// All is there.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Marker {
    pub(super) uri: String,
    /// As it was asked for: a branch that has moved since is still what is here.
    pub(super) requested: Option<String>,
    /// What that was resolved to.
    pub(super) revision: String,
    pub(super) files: Vec<Kept>,
}

/// A file that is there.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) name: String,
    pub(super) size: u64,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Begun {
    uri: String,
    revision: String,
}

/// The right to write.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Store {
    pub(super) fn new(dir: &Path) -> Self {
        Store { dir: dir.to_owned(), control: dir.join(CONTROL) }
    }

    /// Whether there is nothing left to do. Needs no right to write.
    pub(super) fn is_complete(&self, uri: &str, requested: Option<&str>) -> Result<bool, FetchError> {
        let Some(marker) = self.json::<Marker>(COMPLETE)? else { return Ok(false) };
        if marker.uri != uri || marker.requested.as_deref() != requested {
            return Err(FetchError::Occupied { dir: self.dir.clone(), uri: marker.uri, requested: marker.requested });
        }
        for Kept { name, size } in &marker.files {
            if self.size_of(&self.dir.join(name))? != Some(*size) {
                tracing::warn!(file = name, "it was complete, and this file is not there any more as it was");
                return Ok(false);
            }
        }
        tracing::info!(revision = marker.revision, files = marker.files.len(), "it is there already");
        Ok(true)
    }

    /// Waits until nobody else writes here.
    pub(super) async fn lock(&self, tracker: &Tracker, pace: &Pace) -> Result<Lock, FetchError> {
        for folder in [&self.control, &self.control.join(PARTS), &self.control.join(DONE)] {
            std::fs::create_dir_all(folder).map_err(|source| self.failed(folder, source))?;
        }
        let path = self.control.join(LOCK);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|source| self.failed(&path, source))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock { _file: file }),
                Err(TryLockError::WouldBlock) => {
                    if tracker.now().phase != Phase::Waiting {
                        tracing::info!("another pod downloads into this volume: waiting for it");
                        tracker.is_in(Phase::Waiting);
                    }
                    tokio::time::sleep(pace.lock).await;
                }
                Err(TryLockError::Error(source)) => return Err(FetchError::Lock { path, source }),
            }
        }
    }

    /// From now on this version comes here. What is there of another one counts for nothing.
    pub(super) fn begin(&self, uri: &str, revision: &str) -> Result<(), FetchError> {
        self.remove(&self.control.join(COMPLETE))?;
        let begun = Begun { uri: uri.to_owned(), revision: revision.to_owned() };
        if self.json::<Begun>(BEGUN)?.as_ref() == Some(&begun) {
            return Ok(());
        }
        // First what would vouch for files, then the word of which version they are.
        for folder in [DONE, PARTS] {
            let folder = self.control.join(folder);
            std::fs::remove_dir_all(&folder)
                .and_then(|()| std::fs::create_dir(&folder))
                .map_err(|source| self.failed(&folder, source))?;
        }
        self.write(BEGUN, &begun)
    }

    /// Whether a file is there, whole and verified.
    pub(super) fn has(&self, entry: &Entry) -> Result<bool, FetchError> {
        let is_done = self.size_of(&self.control.join(DONE).join(id(entry)))?.is_some();
        Ok(is_done && self.size_of(&self.dir.join(&entry.name))? == Some(entry.size))
    }

    /// Where a file's bytes are until all of them are there.
    pub(super) fn part(&self, entry: &Entry) -> PathBuf {
        self.control.join(PARTS).join(id(entry))
    }

    /// Gives a verified file its name.
    pub(super) fn put(&self, entry: &Entry) -> Result<(), FetchError> {
        let path = self.dir.join(&entry.name);
        let failed = |source| self.failed(&path, source);
        std::fs::rename(self.part(entry), &path).map_err(failed)?;
        sync(&self.dir).map_err(failed)?;
        let done = self.control.join(DONE).join(id(entry));
        File::create(&done).map(drop).map_err(|source| self.failed(&done, source))
    }

    /// A small file that is there.
    pub(super) fn read(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>, FetchError> {
        let path = self.dir.join(name);
        let mut text = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(bytes_max).read_to_end(&mut text));
        read.map_err(|source| self.failed(&path, source))?;
        Ok(text)
    }

    /// All is there.
    pub(super) fn complete(&self, marker: &Marker) -> Result<(), FetchError> {
        self.write(COMPLETE, marker)
    }

    /// Refuses what can't fit, before hours of it are downloaded.
    pub(super) fn check_room(&self, files: &[Entry]) -> Result<(), FetchError> {
        let mut needed = 0;
        for entry in files {
            let there = if self.has(entry)? { entry.size } else { self.size_of(&self.part(entry))?.unwrap_or(0) };
            needed += entry.size.saturating_sub(there);
        }
        let available = self.available();
        if needed > available {
            return Err(FetchError::NoRoom { dir: self.dir.clone(), available, needed });
        }
        Ok(())
    }

    /// What a failure of the volume means; `missing` bytes were still to be written.
    pub(super) fn stopped(&self, path: &Path, missing: u64, source: std::io::Error) -> FetchError {
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                FetchError::NoRoom { dir: self.dir.clone(), available: self.available(), needed: missing }
            }
            _ => self.failed(path, source),
        }
    }

    /// Bytes that may still be written; where nobody can say, the writing will.
    fn available(&self) -> u64 {
        rustix::fs::statvfs(&self.dir).map_or(u64::MAX, |volume| volume.f_bavail.saturating_mul(volume.f_frsize))
    }

    fn failed(&self, path: &Path, source: std::io::Error) -> FetchError {
        let path = path.to_owned();
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                FetchError::NoRoom { dir: self.dir.clone(), available: self.available(), needed: 0 }
            }
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => FetchError::NotWritable { path, source },
            _ => FetchError::Io { path, source },
        }
    }

    fn size_of(&self, path: &Path) -> Result<Option<u64>, FetchError> {
        match std::fs::symlink_metadata(path) {
            Ok(found) => Ok(found.is_file().then_some(found.len())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed(path, source)),
        }
    }

    fn remove(&self, path: &Path) -> Result<(), FetchError> {
        match std::fs::remove_file(path) {
            Err(source) if source.kind() != ErrorKind::NotFound => Err(self.failed(path, source)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// A file of ours; nothing where it is not there or not ours.
    fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<Option<T>, FetchError> {
        let path = self.control.join(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(self.failed(&path, source)),
        };
        let mut text = Vec::new();
        file.take(MARKER_BYTES_MAX).read_to_end(&mut text).map_err(|source| self.failed(&path, source))?;
        Ok(serde_json::from_slice(&text).ok())
    }

    /// Writes a file of ours so that it is there whole or not at all.
    fn write(&self, name: &str, value: &impl Serialize) -> Result<(), FetchError> {
        let text = serde_json::to_vec_pretty(value).expect("names and numbers always serialise");
        let (path, new) = (self.control.join(name), self.control.join(format!("{name}.new")));
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            std::fs::rename(&new, &path)?;
            sync(&self.control)
        };
        write().map_err(|source| self.failed(&path, source))
    }
}

/// One version of one file.
fn id(entry: &Entry) -> String {
    let named = format!("{:?} {} {:?} {:?}", entry.name, entry.size, entry.digest, entry.tag);
    blake3::hash(named.as_bytes()).to_hex()[..32].to_owned()
}

/// Makes a rename outlive a crash of the machine.
fn sync(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(size: u64) -> Entry {
        Entry { name: "config.json".to_owned(), size, digest: None, tag: None }
    }

    async fn begun(dir: &Path, revision: &str) -> (Store, Lock) {
        let store = Store::new(dir);
        let lock = store.lock(&Tracker::new("u"), &Pace::default()).await.expect("nobody else is here");
        store.begin("u", revision).expect("writable");
        (store, lock)
    }

    #[tokio::test]
    async fn what_is_there_of_another_version_counts_for_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let (store, _lock) = begun(dir.path(), "r1").await;
        std::fs::write(store.part(&entry(3)), "abc").expect("written");
        assert!(!store.has(&entry(3)).expect("readable"));
        store.put(&entry(3)).expect("renamed");
        assert!(store.has(&entry(3)).expect("readable"));
        store.begin("u", "r1").expect("writable");
        assert!(store.has(&entry(3)).expect("readable"), "the same version again");
        store.begin("u", "r2").expect("writable");
        assert!(!store.has(&entry(3)).expect("readable"), "it has the size, and may be another file");
    }

    #[tokio::test]
    async fn complete_is_what_was_asked_for_and_is_still_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let (store, _lock) = begun(dir.path(), "r1").await;
        assert!(!store.is_complete("u", None).expect("readable"));
        std::fs::write(dir.path().join("config.json"), "abc").expect("written");
        let files = vec![Kept { name: "config.json".to_owned(), size: 3 }];
        let marker = Marker { uri: "u".to_owned(), requested: None, revision: "r1".to_owned(), files };
        store.complete(&marker).expect("writable");
        assert!(store.is_complete("u", None).expect("readable"));
        for (uri, requested) in [("v", None), ("u", Some("main"))] {
            let error = store.is_complete(uri, requested).expect_err("another model is there").to_string();
            assert!(error.contains("holds u"), "{error}");
        }
        std::fs::write(dir.path().join("config.json"), "ab").expect("written");
        assert!(!store.is_complete("u", None).expect("readable"));
    }

    #[tokio::test]
    async fn what_cannot_fit_is_refused_before_it_is_downloaded() {
        let dir = tempfile::tempdir().expect("a directory");
        let (store, _lock) = begun(dir.path(), "r1").await;
        store.check_room(&[entry(1)]).expect("one byte fits");
        let error = store.check_room(&[entry(1 << 60)]).expect_err("an exbibyte does not").to_string();
        assert!(error.contains("1073741824.0 GiB more") && error.contains("spec.model.cache"), "{error}");
        let full = std::io::Error::from(ErrorKind::StorageFull);
        let error = store.stopped(dir.path(), 5 << 20, full).to_string();
        assert!(error.contains("5 MiB more"), "{error}");
    }
}
