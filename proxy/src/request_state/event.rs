//! What can happen to a request, as the pipeline tells the state machine.

use baton_wire::PathReason;
use tokio::time::Instant;

/// The ledger's number of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct HandleId(pub(crate) u64);

/// KV that a prefill worker keeps until somebody takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Handle {
    pub(crate) id: HandleId,
    /// When the worker frees it by itself.
    pub(crate) deadline: Instant,
}

/// How a leg failed before its first byte. Which status is which is the connector's to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LegFailure {
    /// No connection, or it broke.
    Refused,
    /// The worker is at fault.
    ServerError,
    /// The worker takes nothing more now (429).
    Busy,
    /// The request is at fault: every worker would say so.
    ClientError,
    /// No answer in time.
    Timeout,
}

impl LegFailure {
    #[cfg(test)]
    pub(crate) const ALL: [LegFailure; 5] =
        [LegFailure::Refused, LegFailure::ServerError, LegFailure::Busy, LegFailure::ClientError, LegFailure::Timeout];
}

/// Why no prefill worker is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum NoPrefill {
    /// The plan wants the prompt computed by the decode worker: no failure, and no policy is asked.
    Planned(PathReason),
    /// This model has had no prefill worker yet.
    NotActivated,
    /// There are prefill workers, and none may be used now.
    NoneAvailable(PathReason),
}

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// Remote prefill is planned and a worker is reserved.
    PrefillChosen,
    /// At the start, or in answer to a request to send a prefill to another worker.
    NoPrefill(NoPrefill),
    /// A decode leg was to be sent and no worker may take it.
    NoDecode,
    /// The prefill leg is done. Where legs run in sequence it comes with a handle.
    PrefillAnswered { handle: Option<Handle> },
    /// The prefill leg ended without.
    PrefillFailed { class: LegFailure },
    /// The decode worker's headers or first byte are there, and say success.
    DecodeAnswered,
    /// The decode leg ended before that. `reached`: some of the request was written to the worker.
    DecodeFailed { class: LegFailure, reached: bool },
    /// The whole answer is there.
    #[cfg_attr(not(test), expect(dead_code, reason = "an answer that has begun is its stream's own affair"))]
    StreamEnded,
    /// The decode leg ended in the middle of its answer.
    #[cfg_attr(not(test), expect(dead_code, reason = "an answer that has begun is its stream's own affair"))]
    StreamBroken,
    /// The client has hung up.
    ClientLeft,
    /// The request has reached its greatest age. It says nothing of the legs: one that ended at the same moment is told of
    /// as well, or it counts as under way and its KV stays held. Where a leg is collected after that, said again when that
    /// has taken too long.
    Deadline,
    /// The held KV has reached its deadline.
    #[cfg_attr(not(test), expect(dead_code, reason = "a lease is looked at when a leg fails"))]
    LeaseExpired,
}
