//! Why a model can't be had. Each text is read in a pod's termination message, so it names the thing and the cure, in the words of the
//! manifest.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Why a model can't be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The admin port can't be had.
    #[error("can't listen on {address} for progress")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is nothing to check servers by.
    #[error("can't set up TLS: {why}; certificates of authorities are read from the system's place or SSL_CERT_FILE")]
    Tls {
        /// What the library says.
        why: String,
    },
    /// A bucket's address can't be made.
    #[error("{uri} gives no address: {why}")]
    Bucket {
        /// Which bucket.
        uri: String,
        /// What is wrong with it.
        why: String,
    },
    /// The server says no.
    #[error("{host} answers {status} for {what}: {cure}")]
    Refused {
        /// Who.
        host: String,
        /// Its status, and its own code for why.
        status: String,
        /// What it was asked for.
        what: String,
        /// What helps.
        cure: String,
    },
    /// It went wrong too often.
    #[error(
        "{what} can't be had: {failures} failures in a row, the last one: {last}; the next start goes on from here"
    )]
    GaveUp {
        /// What was to be had.
        what: String,
        /// How often.
        failures: u32,
        /// What went wrong last.
        last: String,
    },
    /// What comes is not what was announced.
    #[error(
        "{file} of {uri} is not what the listing says, {times} times over: {why}; a proxy or a mirror on the way may change it"
    )]
    Mismatch {
        /// Which file.
        file: String,
        /// Of which model.
        uri: String,
        /// How often.
        times: u32,
        /// What differs.
        why: String,
    },
    /// The listing is not understood.
    #[error("the listing of {what} can't be read: {why}; is --endpoint the right server?")]
    Listing {
        /// Of what.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// A name that could leave the directory.
    #[error("{uri} lists a file named {name:?}, which could lead out of the model's directory: nothing was downloaded")]
    UnsafeName {
        /// Which model.
        uri: String,
        /// The name.
        name: String,
    },
    /// Weights in other formats alone.
    #[error(
        "{uri} has {found} and no *.safetensors, which alone are read: convert the model, or give one that is published so"
    )]
    OtherFormat {
        /// Which model.
        uri: String,
        /// What it has.
        found: String,
    },
    /// No model.
    #[error(
        "{uri} has no {missing}: give the place of a model directory as it is published, not one above or below it"
    )]
    NoModel {
        /// Where.
        uri: String,
        /// What is not there.
        missing: &'static str,
    },
    /// The index names what is not there.
    #[error("{index} of {uri} names {file:?}, which is not there: the model was published incompletely")]
    ShardMissing {
        /// Which model.
        uri: String,
        /// Which index.
        index: String,
        /// Which shard.
        file: String,
    },
    /// The index is no index.
    #[error("{index} of {uri} is no index of a checkpoint: {why}")]
    Index {
        /// Which model.
        uri: String,
        /// Which file.
        index: String,
        /// What is wrong with it.
        why: String,
    },
    /// Another model is there.
    #[error("{} holds {uri}{}: give another directory, or empty this one", dir.display(), at(requested.as_deref()))]
    Occupied {
        /// Where.
        dir: PathBuf,
        /// What is there.
        uri: String,
        /// Which revision of it was asked for.
        requested: Option<String>,
    },
    /// The volume is too small.
    #[error(
        "the volume of {} has {} free, and {} more are needed: make it larger (spec.model.cache), or empty it",
        dir.display(), size(*available), size(*needed)
    )]
    NoRoom {
        /// Where.
        dir: PathBuf,
        /// Bytes that are free.
        available: u64,
        /// Bytes that are still to come.
        needed: u64,
    },
    /// The volume can't be locked.
    #[error("{} can't be locked, without which two pods could write the same files: use a volume with file locks", path.display())]
    Lock {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The volume can't be written.
    #[error("{} can't be written: mount the volume writable for the pod's user (fsGroup)", path.display())]
    NotWritable {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The volume fails otherwise.
    #[error("{} can't be read or written", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

fn at(requested: Option<&str>) -> String {
    requested.map_or_else(String::new, |revision| format!(" at {revision}"))
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{bytes} bytes"),
        1_048_576..1_073_741_824 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

/// An error with all that caused it, in one line.
pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
