//! How far the download of a model is: what `baton-worker fetch` answers on its admin port, and the operator reads into the status.

use serde::{Deserialize, Serialize};

/// How far the download of a model is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is downloaded, as it was asked for. It never holds a credential.
    pub uri: String,
    /// What is being done.
    pub phase: Phase,
    /// Bytes that are on the volume and belong to this download, those of earlier attempts included.
    pub bytes_done: u64,
    /// Bytes of all files; 0 until the files are known.
    pub bytes_total: u64,
    /// Files that are complete and verified.
    pub files_done: u32,
    /// Files of the model; 0 until they are known.
    pub files_total: u32,
    /// Over the last seconds.
    pub bytes_per_second: u64,
    /// What went wrong last and is being tried again, or what ended the download. Absent once bytes flow again.
    pub error: Option<String>,
}

/// What a download is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Another pod downloads into the same volume: its work is waited for.
    Waiting,
    /// Asks which files there are.
    Listing,
    /// Downloads them.
    Downloading,
    /// All files are there and verified.
    Complete,
    /// It can't be done; `error` says why.
    Failed,
}

impl Phase {
    /// The word that JSON, status texts and logs have for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Waiting => "waiting",
            Phase::Listing => "listing",
            Phase::Downloading => "downloading",
            Phase::Complete => "complete",
            Phase::Failed => "failed",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_has_one_spelling() {
        for phase in [Phase::Waiting, Phase::Listing, Phase::Downloading, Phase::Complete, Phase::Failed] {
            assert_eq!(serde_json::to_value(phase).expect("a word"), phase.to_string());
        }
    }
}
