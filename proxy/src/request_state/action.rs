//! What the pipeline has to do next, as the state machine tells it.

use super::event::{HandleId, LegFailure};
use baton_wire::{Path, PathReason};
use std::time::Duration;

/// Why a decode worker computes the prompt itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Why {
    /// The plan says so.
    Planned(PathReason),
    /// There has been no prefill worker yet.
    NotActivated,
    /// None of the prefill workers may be used.
    NoneAvailable(PathReason),
    /// The last prefill attempt failed.
    Prefill(LegFailure),
    /// The prefill worker answered and holds nothing.
    NothingHeld,
    /// No decode worker could continue from the prefill worker's KV.
    Handover(LegFailure),
    /// The KV's lease ended first.
    LeaseExpired,
}

impl Why {
    /// The path as the client, the log and the metrics are told.
    pub(crate) fn path(self) -> Path {
        let class = |class| match class {
            LegFailure::Refused => PathReason::PrefillUnreachable,
            LegFailure::ServerError | LegFailure::Busy | LegFailure::ClientError => PathReason::PrefillFailed,
            LegFailure::Timeout => PathReason::Timeout,
        };
        match self {
            Why::Planned(reason) => Path::LocalPrefill(reason),
            Why::NotActivated => Path::LocalPrefill(PathReason::NoPrefillWorker),
            Why::NoneAvailable(reason) => Path::Fallback(reason),
            Why::Prefill(failure) => Path::Fallback(class(failure)),
            Why::Handover(LegFailure::Timeout) => Path::Fallback(PathReason::Timeout),
            Why::Handover(_) | Why::NothingHeld => Path::Fallback(PathReason::Protocol),
            Why::LeaseExpired => Path::Fallback(PathReason::LeaseExpired),
        }
    }
}

/// One thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Send the prefill leg, from the second attempt on to a worker that has not had it.
    SendPrefill { attempt: u32 },
    /// Send the decode leg with this handle.
    SendDecode { handle: HandleId },
    /// Send both legs, with ids that no attempt has had.
    SendBoth { attempt: u32 },
    /// Send the decode leg to a worker that has not had it: with the same handle, or again without one.
    RetryDecodeElsewhere { handle: Option<HandleId> },
    /// Ask the prefill worker to stop, by closing our half of the connection, and read on: a handle may be under way.
    CancelPrefill,
    /// Drop the prefill leg.
    AbortPrefill,
    /// Drop the decode leg.
    AbortDecode,
    /// Send a decode request for one token with this handle to any live decode worker and drop it after its headers, in a
    /// task that no client's leaving ends: that makes the prefill worker free the KV.
    Release { handle: HandleId },
    /// For the ledger: a decode worker took the KV.
    Consumed { handle: HandleId },
    /// For the ledger: the prefill worker has freed the KV by itself.
    Expired { handle: HandleId },
    /// Send the decode leg without a handle.
    DecodeLocally(Why),
    /// Pass the decode worker's answer on.
    Answer,
    /// Pass on the error that the leg's worker has just answered.
    PassThroughError,
    /// 503 with Retry-After.
    Unavailable { retry_after: Duration },
    /// 504.
    TimedOut,
    /// The answer has begun: end it with an error event that says why.
    EndWithTypedError,
}

/// The most that follow from one event: two legs dropped and the stream ended, or a leg dropped, a hold ended and an answer.
const ACTIONS_MAX: usize = 4;

/// What to do, in this order. Nothing, mostly: then it is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Actions {
    list: [Option<Action>; ACTIONS_MAX],
    count: usize,
}

impl Actions {
    pub(super) fn push(&mut self, action: Action) {
        debug_assert!(self.count < ACTIONS_MAX, "{action:?} after {:?}", self.list);
        if let Some(place) = self.list.get_mut(self.count) {
            *place = Some(action);
            self.count += 1;
        }
    }

    /// The actions in their order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Action> + '_ {
        self.list.iter().flatten().copied()
    }
}
