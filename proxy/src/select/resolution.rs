//! What a choice of a worker comes to, and why: for the pipeline, for debug pages and for metric labels.

use super::candidate::WorkerId;
use super::rank::NoSuchRank;
use baton_wire::PathReason;

/// What a choice comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Resolution {
    /// This worker.
    Chosen(Chosen),
    /// No worker of this phase has been seen since the proxy started: the pool is not there yet.
    NotActivated,
    /// The pool has been there, and none of it can serve this request now.
    Unavailable(Unavailable),
}

/// The worker that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Chosen {
    /// Among the candidates.
    pub(crate) index: usize,
    /// In the table.
    pub(crate) id: WorkerId,
    /// The data-parallel rank; absent where the worker has but one and none was asked for.
    pub(crate) dp_rank: Option<u32>,
    /// What decided.
    pub(crate) because: Because,
}

/// What decided a choice. A closed list: these are metric labels too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Because {
    /// The request named the worker.
    Pinned,
    /// It served the session before.
    Session,
    /// It is this pod's own engine.
    OwnEngine,
    /// It cost the least, or was drawn by cost.
    Cost,
    /// It was its turn.
    RoundRobin,
    /// It was drawn.
    Random,
    /// It had the least to do.
    LeastLoaded,
    /// It had less to do than another drawn one.
    PowerOfTwo,
}

impl Because {
    /// The reason as JSON and metric labels spell it.
    #[cfg(test)]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Because::Pinned => "pinned",
            Because::Session => "session",
            Because::OwnEngine => "own-engine",
            Because::Cost => "cost",
            Because::RoundRobin => "round-robin",
            Because::Random => "random",
            Because::LeastLoaded => "least-loaded",
            Because::PowerOfTwo => "power-of-two",
        }
    }
}

/// Why no worker can serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Unavailable {
    /// There is none that takes work.
    #[error("no worker takes work")]
    NoWorker,
    /// The request allows none of those that take work.
    #[error("none of the allowed workers takes work")]
    NoneAllowed,
    /// None can be paired with the other leg's worker. Where they differ in why, the reason that stands first in the list.
    #[error("no worker can be paired: {0}")]
    Unpaired(PathReason),
    /// Every one's circuit breaker is open.
    #[error("every worker has failed too often of late")]
    BreakersOpen,
    /// None has the rank that the request asks for.
    #[error(transparent)]
    NoSuchRank(NoSuchRank),
    /// The worker that the request names can't serve it.
    #[error("the worker that the request names can't serve it: {0}")]
    Pinned(PinError),
}

/// Why a worker can't serve the request that names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PinError {
    /// It is not among those that take work.
    #[error("it takes no work")]
    Absent,
    /// The same request does not allow it.
    #[error("it is not among the allowed workers")]
    NotAllowed,
    /// It can't be paired with the other leg's worker.
    #[error("it can't be paired: {0}")]
    Unpaired(PathReason),
    /// Its circuit breaker is open.
    #[error("it has failed too often of late")]
    BreakerOpen,
    /// It has not got the rank that the request asks for.
    #[error(transparent)]
    NoSuchRank(NoSuchRank),
}

impl Unavailable {
    /// The reason for which a decode worker computes the prompt itself, where it may; `None` where the request asked for
    /// something that this pool has not got, which another path would only hide.
    pub(crate) const fn path_reason(self) -> Option<PathReason> {
        match self {
            Unavailable::NoWorker | Unavailable::NoneAllowed => Some(PathReason::NoPrefillWorker),
            Unavailable::Unpaired(reason) => Some(reason),
            Unavailable::BreakersOpen => Some(PathReason::PrefillUnreachable),
            Unavailable::NoSuchRank(_) | Unavailable::Pinned(_) => None,
        }
    }
}

/// What happens to a request for which there is no prefill worker. Dynamo's `enforce_disagg` as a type.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Enforcement {
    /// The decode worker computes the prompt itself.
    #[default]
    MayDecodeAlone,
    /// It fails. For pools whose decode workers are not sized for prompts.
    Enforced,
}

/// What to do after the choice of a prefill worker.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// Send it the prefill leg.
    Chosen(Chosen),
    /// Let the decode worker compute the prompt, for this reason.
    DecodeAlone(PathReason),
    /// Refuse the request.
    Refused(Refusal),
}

/// Why a request that must be handed over, or that names its worker, is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Refusal {
    /// There has been no prefill worker yet.
    #[cfg_attr(not(test), expect(dead_code, reason = "the state machine has words of its own for it"))]
    #[error("no prefill worker has been seen yet")]
    NotActivated,
    /// There is none for this request.
    #[error(transparent)]
    Unavailable(Unavailable),
}

impl Resolution {
    /// The worker, where one was chosen.
    pub(crate) const fn chosen(self) -> Option<Chosen> {
        match self {
            Resolution::Chosen(chosen) => Some(chosen),
            Resolution::NotActivated | Resolution::Unavailable(_) => None,
        }
    }

    /// What to do, where this was the choice of a prefill worker.
    #[cfg(test)]
    pub(crate) const fn settle(self, enforcement: Enforcement) -> Settled {
        let (refusal, reason) = match self {
            Resolution::Chosen(chosen) => return Settled::Chosen(chosen),
            Resolution::NotActivated => (Refusal::NotActivated, Some(PathReason::NoPrefillWorker)),
            Resolution::Unavailable(unavailable) => (Refusal::Unavailable(unavailable), unavailable.path_reason()),
        };
        match (enforcement, reason) {
            (Enforcement::MayDecodeAlone, Some(reason)) => Settled::DecodeAlone(reason),
            (Enforcement::Enforced, _) | (Enforcement::MayDecodeAlone, None) => Settled::Refused(refusal),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHOSEN: Chosen = Chosen { index: 2, id: WorkerId(5), dp_rank: None, because: Because::Cost };

    #[test]
    fn a_request_without_prefill_worker_is_decoded_alone_unless_that_is_forbidden() {
        let check = |resolution: Resolution, alone, enforced| {
            assert_eq!(resolution.settle(Enforcement::MayDecodeAlone), alone, "{resolution:?}");
            assert_eq!(resolution.settle(Enforcement::Enforced), enforced, "{resolution:?}");
        };
        check(Resolution::Chosen(CHOSEN), Settled::Chosen(CHOSEN), Settled::Chosen(CHOSEN));
        check(
            Resolution::NotActivated,
            Settled::DecodeAlone(PathReason::NoPrefillWorker),
            Settled::Refused(Refusal::NotActivated),
        );
        let refused = |unavailable| Settled::Refused(Refusal::Unavailable(unavailable));
        let alone = |unavailable: Unavailable, reason| {
            check(Resolution::Unavailable(unavailable), Settled::DecodeAlone(reason), refused(unavailable));
        };
        alone(Unavailable::NoWorker, PathReason::NoPrefillWorker);
        alone(Unavailable::NoneAllowed, PathReason::NoPrefillWorker);
        alone(Unavailable::Unpaired(PathReason::FingerprintMismatch), PathReason::FingerprintMismatch);
        alone(Unavailable::BreakersOpen, PathReason::PrefillUnreachable);
    }

    #[test]
    fn a_request_that_asks_for_what_is_not_there_is_never_decoded_alone() {
        let rank = NoSuchRank { asked: 4, size: 2 };
        let absent = Unavailable::Pinned(PinError::Absent);
        for unavailable in [absent, Unavailable::NoSuchRank(rank), Unavailable::Pinned(PinError::NoSuchRank(rank))] {
            let resolution = Resolution::Unavailable(unavailable);
            let refused = Settled::Refused(Refusal::Unavailable(unavailable));
            assert_eq!(resolution.settle(Enforcement::MayDecodeAlone), refused);
            assert_eq!(resolution.chosen(), None);
        }
    }

    #[test]
    fn every_refusal_says_what_was_missing() {
        let check = |unavailable: Unavailable, expect: &str| {
            assert_eq!(Refusal::Unavailable(unavailable).to_string(), expect);
        };
        check(Unavailable::NoWorker, "no worker takes work");
        check(
            Unavailable::Pinned(PinError::NoSuchRank(NoSuchRank { asked: 4, size: 2 })),
            "the worker that the request names can't serve it: data-parallel rank 4 was asked for, and there are 2",
        );
        check(Unavailable::Unpaired(PathReason::FingerprintMismatch), "no worker can be paired: fingerprint-mismatch");
    }

    #[test]
    fn a_choice_explains_itself_in_json() {
        let json = serde_json::to_value(Resolution::Chosen(CHOSEN)).expect("it serialises");
        let expect = serde_json::json!({"chosen": {"index": 2, "id": 5, "dp_rank": null, "because": "cost"}});
        assert_eq!(json, expect);
        assert_eq!(serde_json::to_value(CHOSEN.because).expect("it serialises"), CHOSEN.because.as_str());
    }
}
