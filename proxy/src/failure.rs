//! Why a client's request could not be answered by a worker. Says what went wrong and at which hop; the status code and the
//! text for the client are chosen at one place, `http/respond.rs`.

use crate::address::Address;
use crate::upstream::UpstreamError;
use bytes::Bytes;
use http::{HeaderMap, StatusCode};

/// A step of a request that another server takes for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    /// The prompt to token ids.
    Render,
    /// Generating.
    Decode,
}

impl Hop {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Hop::Render => "render",
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
            | Failure::Lost { .. }
            | Failure::FirstTokenTimeout { .. }
            | Failure::DeadlineExceeded
            | Failure::TooManyPrompts { .. } => false,
        }
    }
}
