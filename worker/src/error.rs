//! Why a request is not served, for all that can happen between its arrival and its last token.
//!
//! The messages are for the client: causes inside us (a device's words) go to the log alone. Which HTTP status each becomes is decided in
//! `http/error.rs`.

use crate::engine_thread::{EngineStopped, EntryError};
use crate::openai::RequestError;
use baton_engine::request::SubmitError;
use baton_wire::Role;

/// Why a request is not served.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ApiError {
    /// The client must change the request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The body is longer than is read.
    #[error("the request body is longer than {max} bytes")]
    BodyTooLarge {
        /// Bytes accepted.
        max: usize,
    },
    /// The connection broke while the body was read.
    #[error("the request body ended early")]
    BodyCut,
    /// A leg or a render request that the proxy wrote wrongly.
    #[error("malformed {what}: {reason}")]
    MalformedInternal {
        /// What should have come.
        what: &'static str,
        /// What the parser says: names and positions.
        reason: String,
    },
    /// A resumed leg whose events, token ids and request can't be of one stream.
    #[error("malformed decode leg: the events and token ids that it resumes contradict each other")]
    ResumeContradiction,
    /// No such path.
    #[error("there is nothing at {path}")]
    NoSuchPath {
        /// Which path.
        path: String,
    },
    /// The path has no such method.
    #[error("{path} does not answer to this method")]
    NoSuchMethod {
        /// Which path.
        path: String,
    },
    /// The worker does not serve this phase.
    #[error("this is a {role} worker: it does not serve {path}")]
    WrongRole {
        /// What this worker is.
        role: Role,
        /// What was asked for.
        path: &'static str,
    },
    /// The model is still being loaded.
    #[error("the model is being loaded; /status shows how far it is")]
    Loading,
    /// The worker finishes what it has.
    #[error("this worker is draining and takes no new requests")]
    Draining,
    /// The drain's time is over.
    #[error("this worker ended before the request did")]
    CutOff,
    /// As many requests wait as may.
    #[error("{waiting} requests are waiting already")]
    QueueFull {
        /// How many wait.
        waiting: usize,
    },
    /// The engine refuses for a reason that checking the request should have caught.
    #[error("the engine refused the request: {0}")]
    Refused(SubmitError),
    /// As many transfers are open as may, or this one can't be opened.
    #[error("the KV transfer can't be opened: {reason}")]
    TransferRefused {
        /// Why.
        reason: String,
    },
    /// Tokenising the prompt ended in a bug; the panic's message is in the log.
    #[error("the prompt could not be rendered")]
    RenderPanicked,
    /// The forward pass failed.
    #[error("the forward pass of this request failed")]
    ForwardFailed,
    /// The KV did not get to the decode worker.
    #[error("the KV was not fetched: {reason}")]
    KvNotFetched {
        /// The export's end.
        reason: &'static str,
    },
    /// The engine is gone, and the process is about to end.
    #[error("the engine has stopped")]
    EngineStopped,
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::QueueFull { waiting } => ApiError::QueueFull { waiting },
            SubmitError::EmptyPrompt
            | SubmitError::PromptTooLong { .. }
            | SubmitError::PromptNeverFits { .. }
            | SubmitError::ChoicesOutOfRange { .. }
            | SubmitError::NoTokensWanted
            | SubmitError::ResumedMisfit
            | SubmitError::DuplicateId(_) => ApiError::Refused(error),
        }
    }
}

impl From<EntryError> for ApiError {
    fn from(error: EntryError) -> Self {
        match error {
            EntryError::Refused(error) => error.into(),
            EntryError::Stopped(error) => error.into(),
        }
    }
}

impl From<EngineStopped> for ApiError {
    fn from(_: EngineStopped) -> Self {
        ApiError::EngineStopped
    }
}
