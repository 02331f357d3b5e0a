//! Which worker serves a leg, among those that take work of its phase, and why. Pure but for what it remembers itself: whose
//! turn it was, which worker served which session, what was said of workers from outside. Numbers, a draw and the time come
//! in, an index or a reason goes out; whoever calls holds the lock and takes the reservation before sending anything.
//!
//! ```text
//! pinned?          the worker that the request names, or the reason why not        nothing below is asked
//! narrow           allowed, can be paired, breaker closed, has the rank            or the reason why nobody is left
//!                  not overloaded, has the adapter                                 where that leaves somebody
//! session          the worker that served the session, if it is left
//! own engine       this pod's engine, for decode, if it is left: it saves a hop
//! mode             cost, turn, chance, load
//! rank             as asked for, or the least loaded of the chosen worker's
//! ```
//!
//! [`Selector::peek`] is the same function as [`Selector::resolve`] without the remembering: the decision between remote and
//! local prefill looks at the prefill worker that would be chosen, and must not use up its turn.

mod candidate;
mod cost;
mod mode;
mod narrow;
mod rank;
mod registered;
mod resolution;
mod sessions;
mod softmax;

pub use mode::Mode;

pub(crate) use candidate::{Candidate, LoadView, Overlap, WorkerId, WorkerKey};
pub(crate) use cost::{Job, Terms, Weights, overtaken_tokens};
pub(crate) use resolution::{Because, Chosen, Refusal, Resolution, Unavailable};
pub(crate) use sessions::SESSION_TTL_MS;
#[cfg(test)]
use {rank::NoSuchRank, resolution::PinError};

use crate::eligible::Phase;
use registered::Registered;
use sessions::Sessions;

/// How workers of one phase are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Settings {
    /// The phase.
    pub(crate) phase: Phase,
    /// The mode.
    pub(crate) mode: Mode,
    /// What costs how much, for [`Mode::KvAware`].
    pub(crate) weights: Weights,
    /// How far from the cheapest a draw may go; 0 takes the cheapest.
    pub(crate) temperature: f64,
    /// How long a session keeps its worker without a request; 0 for no affinity.
    pub(crate) session_ttl_ms: u64,
}

impl Settings {
    /// What is right where nothing else is configured.
    pub(crate) const fn new(phase: Phase, mode: Mode) -> Self {
        let weights = match phase {
            Phase::Prefill => Weights::PREFILL,
            Phase::Decode => Weights::DECODE,
        };
        Settings { phase, mode, weights, temperature: 0.0, session_ttl_ms: SESSION_TTL_MS }
    }
}

/// What a choice depends on beside the workers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    /// The work.
    pub(crate) job: Job,
    /// The worker that the request names.
    pub(crate) pinned: Option<WorkerId>,
    /// The workers that the request allows; all where it does not say.
    pub(crate) allowed: Option<&'a [WorkerId]>,
    /// The data-parallel rank that the request asks for.
    pub(crate) dp_rank: Option<u32>,
    /// Hash of the name of the LoRA adapter that it uses.
    pub(crate) lora: Option<u64>,
    /// Hash of its session with its tenant.
    pub(crate) session: Option<u64>,
    /// 64 random bits.
    pub(crate) draw: u64,
    /// The time, by any clock that only goes forward.
    pub(crate) now_ms: u64,
}

/// Chooses the workers of one phase.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Selector {
    settings: Settings,
    activated: bool,
    last: Option<WorkerKey>,
    sessions: Sessions,
    registered: Registered,
}

impl Selector {
    /// A selector that has seen no worker yet.
    pub(crate) fn new(settings: Settings) -> Self {
        Selector {
            settings,
            activated: false,
            last: None,
            sessions: Sessions::new(settings.session_ttl_ms),
            registered: Registered::default(),
        }
    }

    /// How workers are chosen.
    pub(crate) fn mode(&self) -> Mode {
        self.settings.mode
    }

    /// Whether a worker of this phase has ever been seen or registered.
    #[cfg(test)]
    pub(crate) fn is_activated(&self) -> bool {
        self.activated
    }

    /// Sessions that are remembered.
    #[cfg(test)]
    pub(crate) fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Makes workers known that the discovery has not brought, each with the load that it is said to have. They still must be
    /// among the candidates to be chosen.
    #[cfg(test)]
    pub(crate) fn register(&mut self, workers: &[(WorkerKey, LoadView)], now_ms: u64) {
        for (worker, load) in workers {
            self.registered.register(*worker, *load, now_ms);
        }
        self.activated |= !workers.is_empty();
    }

    /// Forgets what was said of a worker from outside. Sessions that it served find another once it is no candidate.
    #[cfg(test)]
    pub(crate) fn forget(&mut self, worker: WorkerKey) {
        self.registered.forget(worker);
    }

    /// Notes that there is a pool, where it is not chosen from.
    pub(crate) fn see(&mut self, candidates: &[Candidate<'_>]) {
        self.activated |= !candidates.is_empty();
    }

    /// Chooses, and remembers the choice.
    pub(crate) fn resolve(&mut self, candidates: &[Candidate<'_>], request: &Request<'_>) -> Resolution {
        let resolution = self.peek(candidates, request);
        self.activated |= !candidates.is_empty();
        if let Resolution::Chosen(Chosen { index, because, .. }) = resolution {
            let worker = candidates[index].key;
            if because == Because::RoundRobin {
                self.last = Some(worker);
            }
            if let Some(session) = request.session.filter(|_| self.settings.session_ttl_ms > 0) {
                self.sessions.bind(session, worker, request.now_ms);
            }
        }
        resolution
    }

    /// What [`Selector::resolve`] would choose.
    pub(crate) fn peek(&self, candidates: &[Candidate<'_>], request: &Request<'_>) -> Resolution {
        if candidates.is_empty() && !self.activated {
            return Resolution::NotActivated;
        }
        match self.choose(candidates, request) {
            Ok((index, because)) => {
                let dp_rank = rank::choose(&candidates[index], request.dp_rank, request.draw);
                Resolution::Chosen(Chosen { index, id: candidates[index].id, dp_rank, because })
            }
            Err(unavailable) => Resolution::Unavailable(unavailable),
        }
    }

    /// What the request would cost on each candidate, whether or not it may be chosen: for the debug page.
    #[cfg(test)]
    pub(crate) fn explain(&self, candidates: &[Candidate<'_>], request: &Request<'_>) -> Vec<Terms> {
        let all: Vec<usize> = (0..candidates.len()).collect();
        self.costs(candidates, &all, request)
    }

    fn choose(&self, candidates: &[Candidate<'_>], request: &Request<'_>) -> Result<(usize, Because), Unavailable> {
        if let Some(id) = request.pinned {
            let index = narrow::pinned(candidates, request, id).map_err(Unavailable::Pinned)?;
            return Ok((index, Because::Pinned));
        }
        let load = |candidate: &Candidate<'_>| self.registered.load(candidate, request.now_ms);
        let left = narrow::considered(candidates, request, load)?;
        if let Some(index) = self.of_session(candidates, &left, request) {
            return Ok((index, Because::Session));
        }
        let own = left.iter().find(|index| candidates[**index].own);
        if let (Phase::Decode, Some(index)) = (self.settings.phase, own) {
            return Ok((*index, Because::OwnEngine));
        }
        let to_do = |index: usize| match self.settings.phase {
            Phase::Prefill => load(&candidates[index]).tokens_ahead(),
            Phase::Decode => load(&candidates[index]).sequences(),
        };
        let (index, because) = match self.settings.mode {
            Mode::KvAware => (self.by_cost(candidates, &left, request), Because::Cost),
            Mode::RoundRobin => (mode::in_turn(candidates, &left, self.last), Because::RoundRobin),
            Mode::Random => (mode::random(&left, request.draw), Because::Random),
            Mode::LeastLoaded => (mode::least(&left, to_do, request.draw), Because::LeastLoaded),
            Mode::PowerOfTwo => (mode::power_of_two(&left, to_do, request.draw), Because::PowerOfTwo),
        };
        Ok((index.expect("narrowing leaves somebody or says why not"), because))
    }

    fn of_session(&self, candidates: &[Candidate<'_>], left: &[usize], request: &Request<'_>) -> Option<usize> {
        let worker = self.sessions.worker(request.session?, request.now_ms)?;
        left.iter().copied().find(|index| candidates[*index].key == worker)
    }

    fn by_cost(&self, candidates: &[Candidate<'_>], left: &[usize], request: &Request<'_>) -> Option<usize> {
        let costs: Vec<f64> = self.costs(candidates, left, request).iter().map(|terms| terms.cost).collect();
        let positions: Vec<usize> = (0..left.len()).collect();
        let position = if self.settings.temperature > 0.0 {
            softmax::sample(&costs, self.settings.temperature, request.draw)
        } else {
            mode::least(&positions, |position| costs[position], request.draw)
        };
        position.map(|position| left[position])
    }

    /// The costs on those at `indices`, compared with each other.
    fn costs(&self, candidates: &[Candidate<'_>], indices: &[usize], request: &Request<'_>) -> Vec<Terms> {
        let Settings { weights, .. } = self.settings;
        let load = |index: usize| self.registered.load(&candidates[index], request.now_ms);
        let load_min = cost::load_min(weights, request.job, indices.iter().map(|index| load(*index)));
        let terms = |index: usize| cost::terms(weights, request.job, load(index), candidates[index].overlap, load_min);
        indices.iter().map(|index| terms(*index)).collect()
    }
}

#[cfg(test)]
mod fixtures {
    //! A request for the tests of what a choice depends on.
    use super::*;

    pub(super) const REQUEST: Request<'static> = Request {
        job: Job { prompt_tokens: 2048, block_tokens: 32, overtakes_tokens: 0 },
        pinned: None,
        allowed: None,
        dp_rank: None,
        lora: None,
        session: None,
        draw: 0,
        now_ms: 0,
    };
}

#[cfg(test)]
mod tests;
