//! Why a transfer or a session failed, as the two workers tell each other. A closed list; these are metric labels too.

use serde::{Deserialize, Serialize};

/// Why a transfer or a session failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The two workers speak different major versions of the protocol.
    UnsupportedVersion,
    /// The two workers' fingerprints differ: another model, or another layout of its KV.
    FingerprintMismatch,
    /// The listener has as many connections as it takes.
    TooManyConnections,
    /// A bulk connection for a session that has no control connection.
    UnknownSession,
    /// The token is malformed, expired, not signed by this model's proxies, or not for this consumer and transfer.
    Unauthorized,
    /// More bytes would leave than the token allows.
    BudgetExceeded,
    /// The producer has another prompt under this transfer.
    PromptMismatch,
    /// Head range, codec, prefix or credit that the producer cannot serve.
    Unsupported,
    /// As many subscriptions wait for their prefill as the producer keeps.
    TooManySubscriptions,
    /// No prefill of this transfer began in time.
    NotOpened,
    /// The transfer has been fetched, or is being fetched, by somebody already.
    AlreadyTaken,
    /// A higher attempt of the same transfer has taken its place.
    Superseded,
    /// The lease ran out: the blocks may be another sequence's by now.
    LeaseExpired,
    /// The blocks have been given to another sequence although the lease had not run out.
    StaleBlock,
    /// The prefill itself failed or was aborted.
    PrefillFailed,
    /// What arrived did not match its checksum or digest.
    Corrupt,
    /// A message that the protocol does not allow here.
    ProtocolViolation,
    /// Nothing was heard, or nothing was taken, for too long.
    PeerSilent,
    /// The worker is going away.
    ShuttingDown,
    /// A code of a newer version.
    #[serde(other)]
    Other,
}

impl ErrorCode {
    /// Every code.
    pub const ALL: [ErrorCode; 20] = [
        ErrorCode::UnsupportedVersion,
        ErrorCode::FingerprintMismatch,
        ErrorCode::TooManyConnections,
        ErrorCode::UnknownSession,
        ErrorCode::Unauthorized,
        ErrorCode::BudgetExceeded,
        ErrorCode::PromptMismatch,
        ErrorCode::Unsupported,
        ErrorCode::TooManySubscriptions,
        ErrorCode::NotOpened,
        ErrorCode::AlreadyTaken,
        ErrorCode::Superseded,
        ErrorCode::LeaseExpired,
        ErrorCode::StaleBlock,
        ErrorCode::PrefillFailed,
        ErrorCode::Corrupt,
        ErrorCode::ProtocolViolation,
        ErrorCode::PeerSilent,
        ErrorCode::ShuttingDown,
        ErrorCode::Other,
    ];

    /// The code as messages, logs and metric labels spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            ErrorCode::UnsupportedVersion => "unsupported-version",
            ErrorCode::FingerprintMismatch => "fingerprint-mismatch",
            ErrorCode::TooManyConnections => "too-many-connections",
            ErrorCode::UnknownSession => "unknown-session",
            ErrorCode::Unauthorized => "unauthorized",
            ErrorCode::BudgetExceeded => "budget-exceeded",
            ErrorCode::PromptMismatch => "prompt-mismatch",
            ErrorCode::Unsupported => "unsupported",
            ErrorCode::TooManySubscriptions => "too-many-subscriptions",
            ErrorCode::NotOpened => "not-opened",
            ErrorCode::AlreadyTaken => "already-taken",
            ErrorCode::Superseded => "superseded",
            ErrorCode::LeaseExpired => "lease-expired",
            ErrorCode::StaleBlock => "stale-block",
            ErrorCode::PrefillFailed => "prefill-failed",
            ErrorCode::Corrupt => "corrupt",
            ErrorCode::ProtocolViolation => "protocol-violation",
            ErrorCode::PeerSilent => "peer-silent",
            ErrorCode::ShuttingDown => "shutting-down",
            ErrorCode::Other => "other",
        }
    }
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_its_text_form() {
        for code in ErrorCode::ALL {
            let text = serde_json::to_string(&code).expect("a code serialises");
            assert_eq!(text, format!("\"{code}\""));
            assert_eq!(serde_json::from_str::<ErrorCode>(&text).expect("own form parses"), code);
        }
    }

    #[test]
    fn a_code_of_a_newer_version_is_still_an_error() {
        assert_eq!(serde_json::from_str::<ErrorCode>("\"from-the-future\"").expect("total"), ErrorCode::Other);
    }
}
