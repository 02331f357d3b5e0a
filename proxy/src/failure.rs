//! Why a client's request could not be answered by a worker. Says what went wrong and at which hop; the status code and the
//! text for the client are chosen at one place, `http/respond.rs`.

use crate::address::Address;
use crate::request_state::LegFailure;
use crate::upstream::UpstreamError;
use bytes::Bytes;
use http::{HeaderMap, StatusCode};

/// A step of a request that another server takes for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    /// The prompt to token ids.
    Render,
    /// The prompt's KV.
    Prefill,
    /// Generating.
    Decode,
}

impl Hop {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Hop::Render => "render",
            Hop::Prefill => "prefill",
            Hop::Decode => "decode",
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// No worker may serve the decode leg now.
    #[error("no decode worker is ready")]
    NoDecodeWorker,
    /// A worker could not be reached, or broke off before it answered.
    #[error("{} worker {worker} did not answer", hop.as_str())]
    Unanswered {
        hop: Hop,
        worker: Address,
        #[source]
        source: UpstreamError,
    },
    /// A worker answered with an error.
    #[error("{} worker {worker} answered {status}", hop.as_str())]
    Answered { hop: Hop, worker: Address, status: StatusCode, headers: HeaderMap, body: Bytes },
    /// An engine that is not ours answered with an error, which is the client's as it is.
    #[error("the engine answered {status}")]
    PassedThrough { status: StatusCode, headers: HeaderMap, body: Bytes },
    /// All that may be tried was tried, and what failed last is this.
    #[error("no worker could serve the request: {} worker {worker} failed last", hop.as_str())]
    Unavailable { hop: Hop, worker: Address },
    /// A header names a worker that can't serve the request.
    #[error("header {header} names a worker that can't serve the request: {why}")]
    WorkerNotAllowed { header: &'static str, why: String },
    /// A worker's answer to a render request is none.
    #[error("decode worker {worker} rendered the prompt to something else than token ids")]
    Misrendered {
        worker: Address,
        #[source]
        source: serde_json::Error,
    },
    /// The decode worker began to answer and did not end.
    #[error("decode worker {worker} broke off its answer")]
    Lost {
        worker: Address,
        #[source]
        source: UpstreamError,
    },
    /// The first token did not come in time.
    #[error("decode worker {worker} gave no first token in time")]
    FirstTokenTimeout { worker: Address },
    /// The request is older than a request may get.
    #[error("the request's deadline has passed")]
    DeadlineExceeded,
    /// More prompts in one request than are handed over at once.
    #[error("{found} prompts in one request, at most {max}")]
    TooManyPrompts { found: usize, max: usize },
}

impl Failure {
    /// What it says of the decode worker; nothing where it is not that worker's doing.
    pub(crate) fn of_decode_worker(&self) -> Option<LegFailure> {
        match self {
            Failure::Unanswered { .. } | Failure::Lost { .. } => Some(LegFailure::Refused),
            Failure::Misrendered { .. } => Some(LegFailure::ServerError),
            Failure::FirstTokenTimeout { .. } => Some(LegFailure::Timeout),
            Failure::Answered { status, .. } => match *status {
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Some(LegFailure::Busy),
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::REQUEST_TIMEOUT => None,
                status if status.is_server_error() => Some(LegFailure::ServerError),
                _ => Some(LegFailure::ClientError),
            },
            Failure::NoDecodeWorker
            | Failure::PassedThrough { .. }
            | Failure::Unavailable { .. }
            | Failure::WorkerNotAllowed { .. }
            | Failure::DeadlineExceeded
            | Failure::TooManyPrompts { .. } => None,
        }
    }

    /// Whether another decode worker might serve the request: nothing was answered, and the request is not at fault. A first
    /// token that did not come in time is no such case, since a second worker would get what is left of the client's patience.
    pub(crate) fn another_may_serve(&self) -> bool {
        match self {
            Failure::Unanswered { .. } | Failure::Misrendered { .. } => true,
            Failure::Answered { status, .. } => {
                let of_that_worker = [
                    StatusCode::TOO_MANY_REQUESTS,
                    StatusCode::UNAUTHORIZED,
                    StatusCode::FORBIDDEN,
                    StatusCode::REQUEST_TIMEOUT,
                ];
                status.is_server_error() || of_that_worker.contains(status)
            }
            Failure::NoDecodeWorker
            | Failure::PassedThrough { .. }
            | Failure::Unavailable { .. }
            | Failure::WorkerNotAllowed { .. }
            | Failure::Lost { .. }
            | Failure::FirstTokenTimeout { .. }
            | Failure::DeadlineExceeded
            | Failure::TooManyPrompts { .. } => false,
        }
    }
}
