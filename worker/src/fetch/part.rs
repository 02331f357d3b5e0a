//! A file that is not whole yet: its bytes so far, and what they come to.

use super::remote::Digest;
use md5::{Digest as _, Md5};
use sha2::Sha256;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use tokio::fs::File;
use tokio::io::{AsyncSeekExt, AsyncWriteExt, BufWriter};

/// Bytes that are written at once: pieces off the network are some kilobytes, and each write is a task of its own.
const WRITE_BYTES: usize = 1 << 20;

/// A file that is not whole yet.
#[derive(Debug)]
pub(super) struct Part {
    file: BufWriter<File>,
    hashes: Hashes,
    len: u64,
}

/// Which of the two will be asked for is known when the first answer has come; both together cost less than reading it all again.
#[derive(Clone, Debug, Default)]
struct Hashes {
    sha256: Sha256,
    /// Kept where the listing has such a digest.
    md5: Option<Md5>,
}

impl Hashes {
    fn new(listed: Option<Digest>) -> Self {
        Hashes { sha256: Sha256::new(), md5: matches!(listed, Some(Digest::Md5(_))).then(Md5::new) }
    }

    fn update(&mut self, bytes: &[u8]) {
        match &mut self.md5 {
            Some(md5) => md5.update(bytes),
            None => self.sha256.update(bytes),
        }
    }
}

impl Part {
    /// Opens what is there, or begins anew. What is longer than the file should be is none of it.
    pub(super) async fn open(path: &Path, size: u64, listed: Option<Digest>) -> std::io::Result<Self> {
        let path: PathBuf = path.to_owned();
        let opened = tokio::task::spawn_blocking(move || open(&path, size, Hashes::new(listed)));
        let (file, hashes, len) = opened.await.map_err(std::io::Error::other)??;
        Ok(Part { file: BufWriter::with_capacity(WRITE_BYTES, File::from_std(file)), hashes, len })
    }

    /// Bytes so far.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) async fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes).await?;
        self.hashes.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Writes out what is buffered, so that the next attempt finds it.
    pub(super) async fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush().await
    }

    /// Throws away what is there.
    pub(super) async fn restart(&mut self) -> std::io::Result<()> {
        self.file.flush().await?;
        self.file.get_mut().set_len(0).await?;
        self.file.seek(SeekFrom::Start(0)).await?;
        self.hashes = Hashes { sha256: Sha256::new(), md5: self.hashes.md5.as_ref().map(|_| Md5::new()) };
        self.len = 0;
        Ok(())
    }

    /// Whether the bytes come to this.
    pub(super) fn comes_to(&self, digest: Digest) -> bool {
        match (digest, &self.hashes.md5) {
            (Digest::Md5(expected), Some(md5)) => md5.clone().finalize().as_slice() == expected,
            (Digest::Sha256(expected), None) => self.hashes.sha256.clone().finalize().as_slice() == expected,
            // Another digest than was kept says nothing either way.
            (Digest::Md5(_), None) | (Digest::Sha256(_), Some(_)) => true,
        }
    }

    /// Writes all to the volume itself.
    pub(super) async fn sync(&mut self) -> std::io::Result<()> {
        self.file.flush().await?;
        self.file.get_ref().sync_all().await
    }
}

fn open(path: &Path, size: u64, mut hashes: Hashes) -> std::io::Result<(std::fs::File, Hashes, u64)> {
    let mut file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    if file.metadata()?.len() > size {
        file.set_len(0)?;
    }
    let mut piece = vec![0; WRITE_BYTES];
    let mut len = 0;
    loop {
        match file.read(&mut piece)? {
            0 => break,
            read => {
                hashes.update(&piece[..read]);
                len += read as u64;
            }
        }
    }
    file.seek(SeekFrom::Start(len))?;
    Ok((file, hashes, len))
}
