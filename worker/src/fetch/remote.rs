//! Where a model comes from, whichever kind of place it is.

use super::config::Source;
use super::error::FetchError;
use super::hub::Hub;
use super::pace::{Pace, Patience};
use super::progress::Tracker;
use super::s3::S3;
use super::web::{Question, Refusal, Trouble, Web};

/// A file that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its name, relative to the model's directory.
    pub(super) name: String,
    /// Its bytes.
    pub(super) size: u64,
    /// By which it is verified, where the listing has one.
    pub(super) digest: Option<Digest>,
    /// Its version, where it has one of its own.
    pub(super) tag: Option<String>,
}

/// What a file's bytes come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Digest {
    Sha256([u8; 32]),
    Md5([u8; 16]),
}

/// All files of one version.
#[derive(Debug)]
pub(super) struct Listing {
    /// Which version: what a branch was resolved to, or a hash of the listing.
    pub(super) revision: String,
    pub(super) entries: Vec<Entry>,
}

/// Where a model comes from.
#[derive(Debug)]
pub(super) enum Remote {
    Hub(Hub),
    S3(S3),
}

impl Remote {
    pub(super) fn new(source: &Source) -> Result<Self, FetchError> {
        Ok(match source {
            Source::Hub(source) => Remote::Hub(Hub::new(source.clone())),
            Source::S3(source) => Remote::S3(S3::new(source)?),
        })
    }

    /// Lists what is there, patiently.
    pub(super) async fn list(&self, web: &Web, tracker: &Tracker, pace: &Pace) -> Result<Listing, FetchError> {
        let mut patience = Patience::new(pace);
        loop {
            let listed = match self {
                Remote::Hub(hub) => hub.list(web).await,
                Remote::S3(s3) => s3.list(web).await,
            };
            let (why, asked) = match listed {
                Ok(listing) => return Ok(listing),
                Err(Trouble::Final(error)) => return Err(*error),
                Err(Trouble::Refused(refusal)) => return Err(self.refused(refusal, "the listing")),
                Err(Trouble::Mismatch { why }) => (why, None),
                Err(Trouble::Again { why, asked }) => (why, asked),
            };
            tracing::warn!("listing: {why}");
            tracker.stumbled(&why);
            if !patience.is_left(asked).await {
                let what = format!("the listing of {}", self.place());
                return Err(FetchError::GaveUp { what, failures: patience.failures(), last: why });
            }
        }
    }

    /// The question for a file's bytes from one on.
    pub(super) fn question(&self, revision: &str, entry: &Entry, from: u64) -> Question {
        match self {
            Remote::Hub(hub) => hub.question(revision, entry, from),
            Remote::S3(s3) => s3.question(entry, from),
        }
    }

    /// What a server's no means, for whoever wrote the manifest.
    pub(super) fn refused(&self, refusal: Refusal, what: &str) -> FetchError {
        let cure = match self {
            Remote::Hub(hub) => hub.cure(&refusal),
            Remote::S3(s3) => s3.cure(&refusal),
        };
        let status = match &refusal.code {
            Some(code) => format!("{} ({code})", refusal.status.as_u16()),
            None => refusal.status.as_u16().to_string(),
        };
        FetchError::Refused { host: refusal.host, status, what: format!("{what} of {}", self.place()), cure }
    }

    fn place(&self) -> &str {
        match self {
            Remote::Hub(hub) => hub.place(),
            Remote::S3(s3) => s3.place(),
        }
    }
}
