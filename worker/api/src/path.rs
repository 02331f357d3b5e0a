//! The path that a request really took, as one response header says it.

use serde::{Deserialize, Serialize};

/// The path that a request took, with the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "path", content = "reason", rename_all = "kebab-case")]
pub enum Path {
    /// The prompt's KV was computed by a prefill worker and continued by a decode worker.
    RemotePrefill,
    /// The decode worker computed the prompt itself, as planned.
    LocalPrefill(PathReason),
    /// Remote prefill was planned and failed; the decode worker recomputed the prompt.
    Fallback(PathReason),
}

/// Why a request did not take the remote path. A closed list: these are metric labels too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathReason {
    /// The worker serves both phases.
    Aggregated,
    /// No prefill worker of this revision is ready.
    NoPrefillWorker,
    /// The prompt is shorter than the manifest's threshold for remote prefill.
    ShortPrompt,
    /// The manifest's policy is to never hand over.
    PolicyNever,
    /// Several choices are asked for, or beams are searched, and this engine's KV can be handed to one alone.
    SeveralChoices,
    /// Several prompts are in one request, and this engine hands over one.
    SeveralPrompts,
    /// Log probabilities of the prompt are asked for, which only who computes the prompt has.
    PromptLogprobs,
    /// The request goes on from an answer that one worker has stored.
    StoredConversation,
    /// By what was measured, the decode worker is sooner done with the prompt itself.
    CheaperLocal,
    /// Prefill worker could not be reached, or the connection to it broke.
    PrefillUnreachable,
    /// The prefill worker refused or failed the request.
    PrefillFailed,
    /// The two workers' fingerprints differ.
    FingerprintMismatch,
    /// What arrived did not match its checksum, digest or prompt hash.
    Corrupt,
    /// Nothing arrived for too long.
    Timeout,
    /// The lease on the KV had run out.
    LeaseExpired,
    /// The transfer's token was refused.
    Unauthorized,
    /// The other side broke the protocol.
    Protocol,
    /// The decode worker was lost in the middle of the answer; another one goes on with it.
    DecodeWorkerLost,
}

impl PathReason {
    /// Every reason.
    pub const ALL: [PathReason; 18] = [
        PathReason::Aggregated,
        PathReason::NoPrefillWorker,
        PathReason::ShortPrompt,
        PathReason::PolicyNever,
        PathReason::SeveralChoices,
        PathReason::SeveralPrompts,
        PathReason::PromptLogprobs,
        PathReason::StoredConversation,
        PathReason::CheaperLocal,
        PathReason::PrefillUnreachable,
        PathReason::PrefillFailed,
        PathReason::FingerprintMismatch,
        PathReason::Corrupt,
        PathReason::Timeout,
        PathReason::LeaseExpired,
        PathReason::Unauthorized,
        PathReason::Protocol,
        PathReason::DecodeWorkerLost,
    ];

    /// The reason as headers and metric labels spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            PathReason::Aggregated => "aggregated",
            PathReason::NoPrefillWorker => "no-prefill-worker",
            PathReason::ShortPrompt => "short-prompt",
            PathReason::PolicyNever => "policy-never",
            PathReason::SeveralChoices => "several-choices",
            PathReason::SeveralPrompts => "several-prompts",
            PathReason::PromptLogprobs => "prompt-logprobs",
            PathReason::StoredConversation => "stored-conversation",
            PathReason::CheaperLocal => "cheaper-local",
            PathReason::PrefillUnreachable => "prefill-unreachable",
            PathReason::PrefillFailed => "prefill-failed",
            PathReason::FingerprintMismatch => "fingerprint-mismatch",
            PathReason::Corrupt => "corrupt",
            PathReason::Timeout => "timeout",
            PathReason::LeaseExpired => "lease-expired",
            PathReason::Unauthorized => "unauthorized",
            PathReason::Protocol => "protocol",
            PathReason::DecodeWorkerLost => "decode-worker-lost",
        }
    }
}

impl std::fmt::Display for PathReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Path {
    /// The path without its reason: the value of a metric label.
    pub const fn kind(self) -> &'static str {
        match self {
            Path::RemotePrefill => "remote-prefill",
            Path::LocalPrefill(_) => "local-prefill",
            Path::Fallback(_) => "fallback",
        }
    }
}

/// The header's value: `remote-prefill`, `local-prefill; reason=short-prompt`, `fallback; reason=timeout`.
impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Path::RemotePrefill => f.write_str(self.kind()),
            Path::LocalPrefill(reason) | Path::Fallback(reason) => write!(f, "{}; reason={reason}", self.kind()),
        }
    }
}

impl std::str::FromStr for Path {
    type Err = UnknownPath;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || UnknownPath(text.chars().take(80).collect());
        let reason =
            |rest: &str| PathReason::ALL.into_iter().find(|reason| reason.as_str() == rest).ok_or_else(unknown);
        match text.split_once("; reason=") {
            None if text == "remote-prefill" => Ok(Path::RemotePrefill),
            Some(("local-prefill", rest)) => Ok(Path::LocalPrefill(reason(rest)?)),
            Some(("fallback", rest)) => Ok(Path::Fallback(reason(rest)?)),
            _ => Err(unknown()),
        }
    }
}

/// A header value that is no path.
#[derive(Debug, thiserror::Error)]
#[error("unknown path {0:?}")]
pub struct UnknownPath(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_survives_its_header_form() {
        let with_reasons = PathReason::ALL.into_iter().flat_map(|r| [Path::LocalPrefill(r), Path::Fallback(r)]);
        for path in with_reasons.chain([Path::RemotePrefill]) {
            assert_eq!(path.to_string().parse::<Path>().expect("own form parses"), path);
        }
        assert!("fallback".parse::<Path>().is_err());
        assert!("remote-prefill; reason=timeout".parse::<Path>().is_err());
    }
}
