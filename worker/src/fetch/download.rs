//! One file: asked for from where it is, written, verified, and given its name.

use super::error::FetchError;
use super::pace::{Pace, Patience};
use super::part::Part;
use super::progress::Tracker;
use super::remote::{Digest, Entry, Remote};
use super::store::Store;
use super::web::{Answer, Trouble, Web};
use reqwest::header::{CONTENT_RANGE, HeaderMap};
use reqwest::{Response, StatusCode};

/// How often a file may turn out to be another one than listed. A damaged connection damages once; a wrong server does always.
const MISMATCHES_MAX: u32 = 3;

/// What downloading files needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Download<'a> {
    pub(super) uri: &'a str,
    pub(super) web: &'a Web,
    pub(super) remote: &'a Remote,
    pub(super) store: &'a Store,
    pub(super) tracker: &'a Tracker,
    pub(super) pace: &'a Pace,
    pub(super) revision: &'a str,
}

impl Download<'_> {
    /// Makes a file be there, whole and verified.
    pub(super) async fn file(&self, entry: &Entry) -> Result<(), FetchError> {
        if self.store.has(entry)? {
            self.tracker.moved(0, entry.size);
            self.tracker.file_is_done();
            return Ok(());
        }
        let path = self.store.part(entry);
        let stopped = |source| self.store.stopped(&path, entry.size, source);
        let mut part = Part::open(&path, entry.size, entry.digest).await.map_err(stopped)?;
        self.tracker.moved(0, part.len());
        let mut patience = Patience::new(self.pace);
        let mut mismatches = 0;
        loop {
            let before = part.len();
            let (why, asked) = match self.attempt(entry, &mut part).await {
                Ok(()) => break,
                Err(Trouble::Final(error)) => return Err(*error),
                Err(Trouble::Refused(refusal)) => return Err(self.remote.refused(refusal, &entry.name)),
                Err(Trouble::Again { why, asked }) => {
                    if part.len() > before {
                        patience.restore();
                    }
                    (why, asked)
                }
                Err(Trouble::Mismatch { why }) => {
                    self.restart(entry, &mut part).await?;
                    mismatches += 1;
                    if mismatches == MISMATCHES_MAX {
                        let (file, uri) = (entry.name.clone(), self.uri.to_owned());
                        return Err(FetchError::Mismatch { file, uri, times: mismatches, why });
                    }
                    (why, None)
                }
            };
            tracing::warn!(file = entry.name, at = part.len(), "{why}");
            self.tracker.stumbled(&format!("{}: {why}", entry.name));
            if !patience.is_left(asked).await {
                let what = format!("{} of {}", entry.name, self.uri);
                return Err(FetchError::GaveUp { what, failures: patience.failures(), last: why });
            }
        }
        part.sync().await.map_err(stopped)?;
        self.store.put(entry)?;
        self.tracker.file_is_done();
        tracing::info!(file = entry.name, bytes = entry.size, "verified");
        Ok(())
    }

    /// One question, and as much of its answer as comes.
    async fn attempt(&self, entry: &Entry, part: &mut Part) -> Result<(), Trouble> {
        let mut expected = entry.digest;
        // Nothing is asked for what is all there, which may be nothing at all.
        if part.len() < entry.size {
            let question = self.remote.question(self.revision, entry, part.len());
            let Answer { mut response, sha256 } = self.web.ask(&question).await?;
            expected = match expected {
                Some(Digest::Md5(_)) if is_encrypted(response.headers()) => None,
                None => sha256.map(Digest::Sha256),
                expected => expected,
            };
            self.position(entry, part, &response).await?;
            let taken = self.take(entry, part, &mut response).await;
            // Whatever it was that ended it, what has come is kept.
            part.flush().await.map_err(|source| self.stopped(entry, part, source))?;
            taken?;
        }
        match expected {
            Some(digest) if !part.comes_to(digest) => {
                Err(Trouble::Mismatch { why: "its digest is another".to_owned() })
            }
            _ => Ok(()),
        }
    }

    /// Sees that the answer goes on where the part ends, or begins anew.
    async fn position(&self, entry: &Entry, part: &mut Part, response: &Response) -> Result<(), Trouble> {
        match response.status() {
            StatusCode::PARTIAL_CONTENT => match content_range(response.headers()) {
                Some((from, size)) if from == part.len() && size == entry.size => Ok(()),
                Some((_, size)) if size != entry.size => Err(other_size(entry, size)),
                Some(_) | None => {
                    Err(Trouble::Mismatch { why: "the server answered another range than was asked for".to_owned() })
                }
            },
            StatusCode::RANGE_NOT_SATISFIABLE => {
                Err(Trouble::Mismatch { why: format!("the server has no bytes after {}", part.len()) })
            }
            _ => {
                if let Some(size) = response.content_length().filter(|size| *size != entry.size) {
                    return Err(other_size(entry, size));
                }
                if part.len() > 0 {
                    tracing::info!(file = entry.name, "the server gives no ranges: from the beginning again");
                    self.restart(entry, part).await?;
                }
                Ok(())
            }
        }
    }

    async fn take(&self, entry: &Entry, part: &mut Part, response: &mut Response) -> Result<(), Trouble> {
        while let Some(bytes) = response.chunk().await.map_err(Trouble::broken)? {
            if part.len() + bytes.len() as u64 > entry.size {
                return Err(Trouble::Mismatch { why: format!("more than the listed {} bytes come", entry.size) });
            }
            part.append(&bytes).await.map_err(|source| self.stopped(entry, part, source))?;
            self.tracker.received(bytes.len() as u64);
        }
        if part.len() < entry.size {
            let why = format!("the answer ends after {} of {} bytes", part.len(), entry.size);
            return Err(Trouble::Again { why, asked: None });
        }
        Ok(())
    }

    async fn restart(&self, entry: &Entry, part: &mut Part) -> Result<(), FetchError> {
        self.tracker.moved(part.len(), 0);
        let restarted = part.restart().await;
        restarted.map_err(|source| self.store.stopped(&self.store.part(entry), entry.size, source))
    }

    fn stopped(&self, entry: &Entry, part: &Part, source: std::io::Error) -> FetchError {
        self.store.stopped(&self.store.part(entry), entry.size.saturating_sub(part.len()), source)
    }
}

fn other_size(entry: &Entry, size: u64) -> Trouble {
    Trouble::Mismatch { why: format!("it has {size} bytes and is listed with {}", entry.size) }
}

/// First byte and whole size of `bytes FIRST-LAST/SIZE`.
fn content_range(headers: &HeaderMap) -> Option<(u64, u64)> {
    let (range, size) = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, size.parse().ok()?))
}

/// Whether the tag of an object is no MD5 though it looks like one: with keys of the customer's, S3 has something else there.
/// (<https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html>, `ETag`)
fn is_encrypted(headers: &HeaderMap) -> bool {
    let by_kms = headers.get("x-amz-server-side-encryption").is_some_and(|by| by.as_bytes().starts_with(b"aws:kms"));
    by_kms || headers.contains_key("x-amz-server-side-encryption-customer-algorithm")
}
