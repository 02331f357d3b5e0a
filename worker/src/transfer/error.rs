//! How a session ends, and why each side's calls fail.
//!
//! A session's end is told to all of its transfers; a transfer's end concerns no other. Errors are `Clone` because one broken
//! connection or one failed dial is the answer to many fetches.

use super::assembly::AssemblyError;
use baton_engine::kv_pool::StaleBlock;
use baton_wire::kv::{BodyError, ErrorCode, FRAME_BYTES_MAX, HeaderError, Kind};
use baton_wire::{Fingerprint, PathReason, TransferId};
use std::sync::Arc;
use std::time::Duration;

/// Why a session (a pair of connections) ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SessionError {
    /// The peer closed a connection, or its process ended.
    #[error("connection closed by the peer")]
    Closed,
    /// A connection broke.
    #[error("connection broke")]
    Io(#[source] Arc<std::io::Error>),
    /// A header that no peer of ours would send.
    #[error("malformed header")]
    Header(#[source] HeaderError),
    /// A payload that no peer of ours would send.
    #[error("malformed payload")]
    Body(#[source] Arc<BodyError>),
    /// A message that does not belong here.
    #[error("unexpected {0}")]
    Unexpected(Kind),
    /// The peer says why it ends the session.
    #[error("peer ended the session: {0}")]
    Refused(ErrorCode),
    /// The peer sent nothing, or did not answer in time.
    #[error("peer sent nothing for {0:?}")]
    Silent(Duration),
    /// The peer does not read what we send.
    #[error("peer takes nothing any more")]
    NotReading,
    /// The peer's model or KV layout is another.
    #[error("peer's fingerprint is {remote}, ours {local}")]
    FingerprintMismatch {
        /// Ours.
        local: Fingerprint,
        /// The peer's.
        remote: Fingerprint,
    },
    /// The peer was restarted between two connections of a session.
    #[error("peer was restarted between two connections")]
    Restarted,
    /// The session was closed here: unused, or this process is going away.
    #[error("session closed here")]
    ClosedHere,
}

impl From<std::io::Error> for SessionError {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::UnexpectedEof {
            SessionError::Closed
        } else {
            SessionError::Io(Arc::new(error))
        }
    }
}

impl From<HeaderError> for SessionError {
    fn from(error: HeaderError) -> Self {
        SessionError::Header(error)
    }
}

impl From<BodyError> for SessionError {
    fn from(error: BodyError) -> Self {
        SessionError::Body(Arc::new(error))
    }
}

impl SessionError {
    /// What the peer is told, where there is something to tell and somebody to hear it.
    pub fn report(&self) -> Option<ErrorCode> {
        match self {
            SessionError::Header(HeaderError::Version(_)) => Some(ErrorCode::UnsupportedVersion),
            SessionError::Header(HeaderError::Checksum { .. }) => Some(ErrorCode::Corrupt),
            SessionError::Header(_) | SessionError::Unexpected(_) | SessionError::Restarted => {
                Some(ErrorCode::ProtocolViolation)
            }
            SessionError::Body(error) => Some(match **error {
                BodyError::Checksum { .. } => ErrorCode::Corrupt,
                BodyError::Kind { .. } | BodyError::Malformed { .. } | BodyError::TooLong { .. } => {
                    ErrorCode::ProtocolViolation
                }
            }),
            SessionError::Silent(_) => Some(ErrorCode::PeerSilent),
            SessionError::FingerprintMismatch { .. } => Some(ErrorCode::FingerprintMismatch),
            SessionError::ClosedHere => Some(ErrorCode::ShuttingDown),
            SessionError::Closed | SessionError::Io(_) | SessionError::Refused(_) | SessionError::NotReading => None,
        }
    }

    /// The reason as the path header and metrics have it.
    pub fn path_reason(&self) -> PathReason {
        match self {
            SessionError::Closed | SessionError::Io(_) | SessionError::Restarted | SessionError::ClosedHere => {
                PathReason::PrefillUnreachable
            }
            SessionError::Header(HeaderError::Checksum { .. }) => PathReason::Corrupt,
            SessionError::Header(_) | SessionError::Unexpected(_) => PathReason::Protocol,
            SessionError::Body(error) => match **error {
                BodyError::Checksum { .. } => PathReason::Corrupt,
                BodyError::Kind { .. } | BodyError::Malformed { .. } | BodyError::TooLong { .. } => {
                    PathReason::Protocol
                }
            },
            SessionError::Refused(code) => path_reason_of(*code),
            SessionError::Silent(_) | SessionError::NotReading => PathReason::Timeout,
            SessionError::FingerprintMismatch { .. } => PathReason::FingerprintMismatch,
        }
    }
}

/// Why a fetch failed. The caller recomputes the prompt, whatever it is.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// No connection to the producer.
    #[error("cannot connect to {address}")]
    Connect {
        /// The KV address that was dialled.
        address: String,
        /// Why.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// No connection to the producer in time.
    #[error("cannot connect to {address} within {limit:?}")]
    ConnectTimeout {
        /// The KV address that was dialled.
        address: String,
        /// The limit.
        limit: Duration,
    },
    /// The session with the producer ended.
    #[error("session with the producer ended")]
    Session(#[source] SessionError),
    /// The producer refused or failed this transfer.
    #[error("producer answered {0}")]
    Refused(ErrorCode),
    /// What arrived does not add up.
    #[error("what arrived does not add up")]
    Assembly(#[source] AssemblyError),
    /// The producer lives, but has sent nothing of this transfer.
    #[error("nothing of this transfer arrived for {0:?}")]
    Idle(Duration),
    /// A higher attempt at the same transfer was started here.
    #[error("attempt {attempt} of transfer {transfer} was superseded")]
    Superseded {
        /// The transfer.
        transfer: TransferId,
        /// This attempt.
        attempt: u32,
    },
    /// Our own destination blocks were given to somebody else meanwhile.
    #[error("a destination block is no longer ours")]
    StaleDestination(#[source] StaleBlock),
    /// The prompt does not fit the blocks that it was given.
    #[error("{blocks} blocks, {cached_blocks} of them cached, for a prompt of {prompt_tokens} tokens")]
    BadDestination {
        /// Destination blocks given.
        blocks: usize,
        /// Of those, already filled.
        cached_blocks: usize,
        /// Tokens of the prompt.
        prompt_tokens: usize,
    },
    /// As many transfers or peers as this side takes.
    #[error("{what}: {max} is the limit")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        max: usize,
    },
}

impl FetchError {
    /// The reason as the path header and metrics have it.
    pub fn path_reason(&self) -> PathReason {
        match self {
            FetchError::Connect { .. } | FetchError::ConnectTimeout { .. } => PathReason::PrefillUnreachable,
            FetchError::Session(error) => error.path_reason(),
            FetchError::Refused(code) => path_reason_of(*code),
            FetchError::Assembly(error) if error.is_corruption() => PathReason::Corrupt,
            FetchError::Assembly(_) => PathReason::Protocol,
            FetchError::Idle(_) => PathReason::Timeout,
            FetchError::Superseded { .. }
            | FetchError::StaleDestination(_)
            | FetchError::BadDestination { .. }
            | FetchError::TooMany { .. } => PathReason::Protocol,
        }
    }

    /// What the producer is told when this side ends a transfer; `None` where CANCEL says enough.
    pub fn report(&self) -> Option<ErrorCode> {
        match self {
            FetchError::Assembly(error) if error.is_corruption() => Some(ErrorCode::Corrupt),
            FetchError::Assembly(_) => Some(ErrorCode::ProtocolViolation),
            FetchError::Connect { .. }
            | FetchError::ConnectTimeout { .. }
            | FetchError::Session(_)
            | FetchError::Refused(_)
            | FetchError::Idle(_)
            | FetchError::Superseded { .. }
            | FetchError::StaleDestination(_)
            | FetchError::BadDestination { .. }
            | FetchError::TooMany { .. } => None,
        }
    }
}

/// A producer's code as the path header and metrics have it.
fn path_reason_of(code: ErrorCode) -> PathReason {
    match code {
        ErrorCode::FingerprintMismatch => PathReason::FingerprintMismatch,
        ErrorCode::Unauthorized | ErrorCode::BudgetExceeded | ErrorCode::AlreadyTaken => PathReason::Unauthorized,
        ErrorCode::LeaseExpired | ErrorCode::StaleBlock => PathReason::LeaseExpired,
        ErrorCode::Corrupt | ErrorCode::PromptMismatch => PathReason::Corrupt,
        ErrorCode::NotOpened | ErrorCode::PeerSilent => PathReason::Timeout,
        ErrorCode::TooManyConnections | ErrorCode::ShuttingDown => PathReason::PrefillUnreachable,
        ErrorCode::TooManySubscriptions | ErrorCode::PrefillFailed | ErrorCode::Superseded => PathReason::PrefillFailed,
        ErrorCode::UnsupportedVersion
        | ErrorCode::UnknownSession
        | ErrorCode::Unsupported
        | ErrorCode::ProtocolViolation
        | ErrorCode::Other => PathReason::Protocol,
    }
}

/// Why an export was not opened. The caller refuses the prefill leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// A higher or equal attempt is known already.
    #[error("attempt {attempt} of transfer {transfer} is no newer than attempt {by}")]
    Superseded {
        /// The transfer.
        transfer: TransferId,
        /// The attempt that was to be opened.
        attempt: u32,
        /// The newest attempt known.
        by: u32,
    },
    /// As many exports as are kept open at once.
    #[error("{open} exports are open, which is the limit")]
    TooManyOpen {
        /// Open now.
        open: usize,
    },
    /// An empty prompt has no KV.
    #[error("an empty prompt has no KV to export")]
    EmptyPrompt,
    /// The process is going away.
    #[error("the KV port is closed: this worker is shutting down")]
    ShuttingDown,
}

/// A KV layout that does not fit into frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("one layer of a KV block has {block_bytes} bytes, a frame at most {max}", max = FRAME_BYTES_MAX)]
pub struct BlockTooLarge {
    /// Bytes of one layer of one block.
    pub block_bytes: usize,
}

impl BlockTooLarge {
    /// Refuses a pool whose blocks do not fit into frames.
    ///
    /// # Errors
    /// [`BlockTooLarge`].
    pub(super) fn check(block_bytes: usize) -> Result<(), BlockTooLarge> {
        if block_bytes <= FRAME_BYTES_MAX as usize { Ok(()) } else { Err(BlockTooLarge { block_bytes }) }
    }
}
