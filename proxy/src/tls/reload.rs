//! Certificates as their files have them now: read again each second, so that a renewed one is used by the next connection.
//! Connections that run keep what they began with, and a broken file changes nothing.

use super::{Files, Loaded, TlsError};
use crate::entropy;
use crate::watched::{self, Complaint};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How often the files are read. They are compared by content, because a mounted Secret changes by a swapped link whose times
/// say nothing. The kubelet takes up to a minute to bring a Secret, so this adds nothing that counts.
const INTERVAL: Duration = Duration::from_secs(1);

/// Bytes of one file: a bundle of a few hundred authorities is about 300 KiB.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The configuration as of now; clones see the same one.
#[derive(Debug)]
pub(crate) struct Current<C>(watch::Receiver<Loaded<C>>);

impl<C> Clone for Current<C> {
    fn clone(&self) -> Self {
        Current(self.0.clone())
    }
}

impl<C> Current<C> {
    /// One that no file changes.
    #[cfg(test)]
    pub(crate) fn fixed(loaded: Loaded<C>) -> Self {
        Current(watch::channel(loaded).1)
    }

    pub(crate) fn config(&self) -> Arc<C> {
        Arc::clone(&self.0.borrow().config)
    }
}

/// Keeps a [`Current`] as the files have it, while it runs.
#[derive(Debug)]
pub(crate) struct Follower<F: Files> {
    files: F,
    sender: watch::Sender<Loaded<F::Config>>,
    /// What was made into the current configuration.
    used: Vec<Vec<u8>>,
    /// What could not be used, the last time.
    refused: Option<Vec<Vec<u8>>>,
    complaint: Complaint,
}

/// Reads the files once, to begin with.
///
/// # Errors
/// See [`TlsError`]: a proxy that was told to speak TLS does not start without.
pub(crate) async fn open<F: Files>(files: F) -> Result<(Current<F::Config>, Follower<F>), TlsError> {
    let used = read(&files).await?;
    let (sender, current) = watch::channel(files.load(&used, now_unix_seconds())?);
    Ok((Current(current), Follower { files, sender, used, refused: None, complaint: Complaint::default() }))
}

impl<F: Files> Follower<F> {
    /// Follows the files. Ends with its caller. `tell` is given when the certificate that we show expires, in seconds since the Unix epoch:
    /// at once and after each look, which costs less than to know whether it changed.
    pub(crate) async fn follow(mut self, tell: impl Fn(i64)) {
        loop {
            let expires = self.sender.borrow().expires_unix_seconds;
            expires.iter().copied().for_each(&tell);
            tokio::time::sleep(INTERVAL).await;
            self.look(now_unix_seconds()).await;
        }
    }

    /// Reads the files once. What is missing or wrong leaves the configuration as it was.
    async fn look(&mut self, now_unix_seconds: i64) {
        let contents = match read(&self.files).await {
            Ok(contents) => contents,
            Err(error) => return self.complain(&error),
        };
        if contents == self.used {
            self.refused = None;
            self.complaint.is_over();
            return;
        }
        match self.files.load(&contents, now_unix_seconds) {
            Ok(loaded) => {
                tracing::info!(expires_unix_seconds = loaded.expires_unix_seconds, "the certificates changed");
                self.sender.send_replace(loaded);
                self.used = contents;
                self.refused = None;
                self.complaint.is_over();
            }
            // Between two files the link may be swapped, or a writer may be half done: only what stays wrong is a fault.
            Err(_) if self.refused.as_ref() != Some(&contents) => self.refused = Some(contents),
            Err(error) => self.complain(&error),
        }
    }

    fn complain(&mut self, error: &TlsError) {
        let text = error.to_string();
        if self.complaint.is_new(&text) {
            let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            tracing::warn!(cause, "{text}; the certificates in use stay");
        }
    }
}

async fn read(files: &impl Files) -> Result<Vec<Vec<u8>>, TlsError> {
    let mut contents = Vec::new();
    for file in files.paths() {
        let content = watched::read(file, FILE_BYTES_MAX).await;
        contents.push(content.map_err(|source| TlsError::Read { file: file.to_owned(), source })?);
    }
    Ok(contents)
}

fn now_unix_seconds() -> i64 {
    i64::try_from(entropy::now_unix_ms() / 1000).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    /// One file whose content is a number, or is wrong.
    struct Number(PathBuf);

    impl Files for Number {
        type Config = u32;

        fn paths(&self) -> Vec<&Path> {
            vec![&self.0]
        }

        fn load(&self, contents: &[Vec<u8>], _: i64) -> Result<Loaded<u32>, TlsError> {
            let number = std::str::from_utf8(&contents[0]).ok().and_then(|text| text.parse().ok());
            let wrong = || TlsError::Certificate { file: self.0.clone() };
            Ok(Loaded { config: Arc::new(number.ok_or_else(wrong)?), expires_unix_seconds: number.map(i64::from) })
        }
    }

    #[tokio::test]
    async fn a_renewed_file_is_used_and_a_broken_one_is_complained_of_and_changes_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("number");
        std::fs::write(&file, "1").expect("written");
        let (current, mut follower) = open(Number(file.clone())).await.expect("a number");
        assert_eq!(*current.config(), 1);
        for (content, expect, stands) in
            [("2", 2, false), ("half", 2, false), ("half", 2, true), ("3", 3, false), ("x", 3, false), ("3", 3, false)]
        {
            std::fs::write(&file, content).expect("written");
            follower.look(0).await;
            assert_eq!((*current.config(), follower.complaint.stands()), (expect, stands), "{content}");
        }
        std::fs::remove_file(&file).expect("removed");
        follower.look(0).await;
        assert_eq!((*current.config(), follower.complaint.stands()), (3, true));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_follows_is_told_of_every_certificate_in_use_and_of_no_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("number");
        std::fs::write(&file, "7").expect("written");
        let (_current, follower) = open(Number(file.clone())).await.expect("a number");
        let (told, mut hears) = tokio::sync::mpsc::unbounded_channel();
        let following = follower.follow(|expires| told.send(expires).expect("somebody hears"));
        let hearing = async {
            assert_eq!(hears.recv().await, Some(7), "before the first look");
            std::fs::write(&file, "wrong").expect("written");
            // Two looks are what it takes to be sure that it stays wrong.
            for _ in 0..3 {
                assert_eq!(hears.recv().await, Some(7));
            }
            std::fs::write(&file, "8").expect("written");
            while hears.recv().await.expect("it goes on") != 8 {}
        };
        tokio::select! {
            () = following => panic!("following never ends"),
            () = hearing => {}
        }
    }

    #[tokio::test]
    async fn what_is_wrong_to_begin_with_is_an_error() {
        let missing = open(Number("/nowhere".into())).await.map(drop).expect_err("no file");
        assert!(missing.to_string().contains("/nowhere"), "{missing}");
    }
}
