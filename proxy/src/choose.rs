//! Chooses the workers of one request, whosever engines they are: makes candidates of the table, asks `select.rs` and `estimate.rs`
//! (pure), reserves before anything is sent, and writes down why. What legs come to is told to the breakers, the prefix index and the
//! estimates here, too.

pub(crate) mod first_piece;
pub(crate) mod ours;
mod ranks;

use crate::address::Address;
use crate::breaker::{self, Attempt, Breaker, Outcome};
use crate::connector::Connector;
use crate::decisions;
use crate::eligible::{Phase, eligible};
use crate::entropy;
use crate::estimate::{self, Estimates, Inputs, Policy, Prefill, Wait};
use crate::failure::Failure;
use crate::followed::Blocks;
use crate::forward;
use crate::pipeline::engines::{self, Ask, Says, Tenant};
use crate::prefix::Holder;
use crate::prefix::approximate::{ApproximateIndex, CHUNK_BYTES, Chunks};
use crate::proxy::Proxy;
use crate::pulse::Watch;
use crate::request_state::{LegFailure, NoPrefill};
use crate::select::{
    Candidate, Chosen as Selected, Job, LoadView, Mode, Overlap, Refusal, Request, Resolution, Selector, Settings,
    Unavailable, WorkerId, WorkerKey, overtaken_tokens,
};
use crate::workers::{Link, Reservation, Table, Worker};
use baton_wire::status::Load;
use baton_wire::status::Status;
use baton_wire::{Path, PathReason, Role};
use first_piece::{FirstPiece, For};
use ranks::Ranks;
use std::collections::HashMap;
use std::hash::RandomState;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Tokens that stand for a chunk of a prompt's bytes in the approximate index: four bytes a token, as `api.rs` estimates.
const TOKENS_PER_CHUNK: u32 = (CHUNK_BYTES / 4) as u32;

/// One request, as far as the choice of its workers depends on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    /// Its id.
    pub(crate) id: &'a str,
    pub(crate) says: Says,
    /// Workers that it names.
    pub(crate) hints: &'a forward::Hints,
    pub(crate) prefix: &'a Prefix,
}

/// By what the beginning of a request's prompts is found in prefix caches.
#[derive(Debug, Default)]
pub(crate) struct Prefix {
    /// By its bytes, where workers don't tell what they hold or the tokens are not known.
    pub(crate) chunks: Option<Chunks>,
    /// By the names of its blocks, for each size of block that workers have.
    pub(crate) blocks: Vec<Blocks>,
    /// A worker by number, and what it said itself of how many of the prompt's tokens it has.
    pub(crate) said: Option<(u32, u64)>,
}

/// What choices remember from one request to the next.
#[derive(Debug)]
pub(crate) struct Router {
    begun: Instant,
    prefill: Selector,
    decode: Selector,
    prefixes: ApproximateIndex,
    /// By worker and leg: a worker may fail one kind and serve the other.
    breakers: HashMap<(u32, Phase), Breaker>,
    estimates: Estimates,
}

/// A leg to choose a worker for.
#[derive(Clone, Copy)]
enum Leg<'a> {
    Prefill {
        /// Who takes the KV over.
        decode: &'a Worker,
    },
    Decode,
}

impl Leg<'_> {
    const fn phase(self) -> Phase {
        match self {
            Leg::Prefill { .. } => Phase::Prefill,
            Leg::Decode => Phase::Decode,
        }
    }

    /// Whether a worker can be paired with the other leg's. Engines that are not ours compare what they hold themselves.
    fn pairs(self, connector: Connector, status: &Status) -> Result<(), PathReason> {
        match (self, connector) {
            (Leg::Prefill { decode }, Connector::Baton) => {
                let wanted = decode.status().and_then(|status| status.fingerprint);
                let is_same = wanted.is_some() && status.fingerprint == wanted;
                if is_same { Ok(()) } else { Err(PathReason::FingerprintMismatch) }
            }
            (Leg::Prefill { .. }, Connector::VllmNixl | Connector::Sglang) | (Leg::Decode, _) => Ok(()),
        }
    }
}

impl Router {
    /// Nothing is remembered yet.
    pub(crate) fn new(selection: crate::config::Selection, now: Instant) -> Self {
        Router {
            begun: now,
            prefill: Selector::new(Settings::new(Phase::Prefill, selection.prefill)),
            decode: Selector::new(Settings::new(Phase::Decode, selection.decode)),
            prefixes: ApproximateIndex::new(RandomState::new()),
            breakers: HashMap::new(),
            estimates: Estimates::default(),
        }
    }

    fn now_ms(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    fn breaker(&mut self, worker: &Worker, phase: Phase, now: Instant) -> &mut Breaker {
        let new = || Breaker::new(breaker::Settings::default(), now);
        self.breakers.entry((worker.number, phase)).or_insert_with(new)
    }
}

/// A worker that is chosen, with its time reserved.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) worker: Arc<Worker>,
    /// Of its time, and of the data-parallel rank to ask for.
    pub(crate) reservation: Reservation,
    /// Prompt tokens to be computed there before those of this request.
    pub(crate) ahead: u64,
    pub(crate) trial: Trial,
}

/// An attempt at a worker, whose outcome its breaker is told. Dropped without one it says nothing against the worker.
#[derive(Debug)]
pub(crate) struct Trial {
    proxy: Arc<Proxy>,
    worker: u32,
    phase: Phase,
    attempt: Option<Attempt>,
}

impl Trial {
    /// Its worker has served it.
    pub(crate) fn ended_well(self) {
        self.end(Outcome::Success);
    }

    fn end(mut self, outcome: Outcome) {
        self.tell(outcome);
    }

    fn tell(&mut self, outcome: Outcome) {
        let Some(attempt) = self.attempt.take() else { return };
        let now = Instant::now();
        let change = match lock(&self.proxy).breakers.get_mut(&(self.worker, self.phase)) {
            Some(breaker) => breaker.end(attempt, outcome, now, entropy::quick()),
            None => None,
        };
        if let Some(change) = change {
            tracing::warn!(worker = self.worker, leg = ?self.phase, ?change, "circuit breaker");
        }
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.tell(Outcome::NoVerdict);
    }
}

/// What a choice has tried already.
#[derive(Debug, Default)]
pub(crate) struct Choice {
    tried_prefill: Vec<u32>,
    tried_decode: Vec<u32>,
}

/// Where the prompt of a decode leg is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// By a prefill worker.
    Remote,
    /// By the decode worker.
    Local,
}

/// Whether a decode worker may have such a leg. One of SGLang's serves either what was handed over or whole requests, by how it
/// was started; all others serve both.
pub(crate) fn may_decode(proxy: &Proxy, worker: &Worker, way: Way) -> bool {
    let role = worker.status().map(|status| status.role);
    match (proxy.connector, way) {
        (Connector::Baton | Connector::VllmNixl, _) => true,
        (Connector::Sglang, Way::Remote) => role == Some(Role::Decode),
        (Connector::Sglang, Way::Local) => role == Some(Role::PrefillDecode),
    }
}

/// One phase's candidates.
struct Pool<'a> {
    workers: Vec<&'a Arc<Worker>>,
    candidates: Vec<Candidate<'a>>,
}

impl Choice {
    /// A worker may be chosen once more: that its leg ended was not its fault.
    pub(crate) fn again(&mut self, phase: Phase, worker: &Worker) {
        let tried = match phase {
            Phase::Prefill => &mut self.tried_prefill,
            Phase::Decode => &mut self.tried_decode,
        };
        tried.retain(|number| *number != worker.number);
    }

    /// Another decode worker has to be found: a prefill worker that served the first one is no worse for it.
    pub(crate) fn prefill_anew(&mut self) {
        self.tried_prefill.clear();
    }

    /// The prefill worker that a request names where the proxy lets requests do so.
    pub(crate) fn named(
        &mut self,
        proxy: &Arc<Proxy>,
        asked: Asked<'_>,
        address: &Address,
    ) -> Result<Chosen, NoPrefill> {
        let worker = proxy.workers.named(address);
        if self.tried_prefill.contains(&worker.number) {
            return Err(NoPrefill::NoneAvailable(PathReason::PrefillUnreachable));
        }
        self.tried_prefill.push(worker.number);
        let now = Instant::now();
        let attempt = lock(proxy).breaker(&worker, Phase::Prefill, now).begin(now);
        let ahead = worker.reserved.prompt_tokens();
        let reservation = worker.reserved.reserve(asked.says.prompt_tokens, 0);
        let trial =
            Trial { proxy: Arc::clone(proxy), worker: worker.number, phase: Phase::Prefill, attempt: Some(attempt) };
        Ok(Chosen { worker, reservation, ahead, trial })
    }

    /// The decode worker: this pod's engine unless it can't.
    ///
    /// # Errors
    /// When there is none, or the one that the request names can't serve it.
    #[allow(clippy::result_large_err)] // A failure ends its request, and is made once.
    pub(crate) fn decode(&mut self, proxy: &Arc<Proxy>, asked: Asked<'_>, way: Way) -> Result<Chosen, Failure> {
        let table = proxy.workers.table();
        let mut router = lock(proxy);
        let cached = cached(proxy, &router, asked);
        let may = |worker: &Worker| !self.tried_decode.contains(&worker.number) && may_decode(proxy, worker, way);
        let wish = Wish::of(&table, asked.hints, Phase::Decode);
        let ranks = ranks_of(&router, &table, asked, &cached, Phase::Decode);
        let adapters = adapters_of(&table, asked);
        let seen = Seen { table: &table, cached: &cached, ranks: &ranks, rank: wish.rank, adapters: &adapters };
        let pool = pool(proxy, &mut router, asked, &seen, Leg::Decode, may);
        let request = wish.request(asked, &router);
        let resolution = router.decode.resolve(&pool.candidates, &request);
        match resolution {
            Resolution::Chosen(selected) => {
                let chosen = chosen(proxy, &mut router, &pool, selected, Leg::Decode, asked);
                self.tried_decode.push(chosen.worker.number);
                Ok(chosen)
            }
            Resolution::NotActivated => Err(Failure::NoDecodeWorker),
            Resolution::Unavailable(why) => Err(match why {
                Unavailable::Pinned(_) | Unavailable::NoneAllowed | Unavailable::NoSuchRank(_) => {
                    Failure::WorkerNotAllowed { header: "x-worker-instance-id", why: why.to_string() }
                }
                Unavailable::NoWorker | Unavailable::Unpaired(_) | Unavailable::BreakersOpen => Failure::NoDecodeWorker,
            }),
        }
    }

    /// The prefill worker, or why the decode worker computes the prompt.
    ///
    /// # Errors
    /// When the request names a prefill worker that can't serve it.
    #[allow(clippy::result_large_err)] // As above.
    pub(crate) fn prefill(
        &mut self,
        proxy: &Arc<Proxy>,
        asked: Asked<'_>,
        decode: &Worker,
    ) -> Result<Result<Chosen, NoPrefill>, Failure> {
        let policy = proxy.policy();
        let table = proxy.workers.table();
        let mut router = lock(proxy);
        let cached = cached(proxy, &router, asked);
        let leg = Leg::Prefill { decode };
        let may = |worker: &Worker| !self.tried_prefill.contains(&worker.number);
        let wish = Wish::of(&table, asked.hints, Phase::Prefill);
        let ranks = ranks_of(&router, &table, asked, &cached, Phase::Prefill);
        let adapters = adapters_of(&table, asked);
        let seen = Seen { table: &table, cached: &cached, ranks: &ranks, rank: wish.rank, adapters: &adapters };
        let pool = pool(proxy, &mut router, asked, &seen, leg, may);
        let mut request = wish.request(asked, &router);
        request.job.overtakes_tokens = overtakes(&router, &pool, asked.hints, request.now_ms);
        // Which one it would be, without using up its turn: whether it is worth it depends on it.
        let would_be = router.prefill.peek(&pool.candidates, &request).chosen();
        let decision = {
            let would_be = would_be.map(|chosen| (&**pool.workers[chosen.index], &pool.candidates[chosen.index]));
            let inputs = inputs(proxy, asked, &cached, decode, would_be, wish.pinned.is_some());
            router.estimates.decide(policy, inputs, request.now_ms)
        };
        let cached_tokens = asked.says.prompt_tokens.saturating_sub(decision.inputs.uncached_on_decode);
        let result = match decision.plan {
            estimate::Plan::Local(reason) => {
                // That there is a pool is learnt even where it is not used.
                router.prefill.see(&pool.candidates);
                Ok(Err(NoPrefill::Planned(reason.path_reason())))
            }
            estimate::Plan::Remote => match router.prefill.resolve(&pool.candidates, &request) {
                Resolution::Chosen(selected) => {
                    let chosen = chosen(proxy, &mut router, &pool, selected, leg, asked);
                    self.tried_prefill.push(chosen.worker.number);
                    Ok(Ok(chosen))
                }
                Resolution::NotActivated => Ok(Err(NoPrefill::NotActivated)),
                Resolution::Unavailable(why) => match why.path_reason() {
                    Some(reason) => Ok(Err(NoPrefill::NoneAvailable(reason))),
                    None => Err(Failure::WorkerNotAllowed {
                        header: "x-prefill-instance-id",
                        why: Refusal::Unavailable(why).to_string(),
                    }),
                },
            },
        };
        drop(router);
        let planned = match &result {
            Ok(Ok(_)) => Path::RemotePrefill,
            Ok(Err(why)) => without_prefill(proxy.connector, *why),
            Err(_) => Path::LocalPrefill(PathReason::NoPrefillWorker),
        };
        proxy.decisions.push(decisions::Decision {
            unix_ms: entropy::now_unix_ms(),
            request_id: asked.id.to_owned(),
            attempt: self.tried_prefill.len().max(self.tried_decode.len()) as u32,
            policy,
            estimate: Some(Box::new(decision)),
            prompts: asked.says.prompts,
            prompt_tokens: asked.says.prompt_tokens,
            cached_prompt_tokens: cached_tokens,
            decode_worker: table.public_address(decode).clone(),
            prefill_candidates: (pool.workers.iter().zip(&pool.candidates))
                .map(|(worker, candidate)| decisions::Candidate {
                    worker: worker.address().clone(),
                    queued_prompt_tokens: candidate.load.queued_prompt_tokens,
                    reserved_prompt_tokens: candidate.load.reserved_prompt_tokens,
                    cached_prompt_tokens: cached.of(worker),
                    unpaired: candidate.pairs.err(),
                })
                .collect(),
            prefill_worker: match &result {
                Ok(Ok(chosen)) => Some(chosen.worker.address().clone()),
                _ => None,
            },
            prefill_rank: result.as_ref().ok().and_then(|chosen| chosen.as_ref().ok()?.reservation.rank()),
            planned,
        });
        result
    }
}

/// The path of a request for which there is no prefill worker, where its decode worker may compute the prompt. Our own workers know
/// before anything is sent that nobody can be paired, so that is a plan and no fallback.
pub(crate) const fn without_prefill(connector: Connector, why: NoPrefill) -> Path {
    match (connector, why) {
        (_, NoPrefill::Planned(reason)) => Path::LocalPrefill(reason),
        (_, NoPrefill::NotActivated) => Path::LocalPrefill(PathReason::NoPrefillWorker),
        (
            Connector::Baton,
            NoPrefill::NoneAvailable(reason @ (PathReason::NoPrefillWorker | PathReason::FingerprintMismatch)),
        ) => Path::LocalPrefill(reason),
        (_, NoPrefill::NoneAvailable(reason)) => Path::Fallback(reason),
    }
}

/// The adapter that a request asks for. With vLLM whatever is asked for under another name than the model's own is one.
pub(crate) fn adapter<'a>(proxy: &Proxy, hints: &'a crate::api::Hints<'_>) -> Option<&'a str> {
    let by_model = || {
        let table = proxy.workers.table();
        let base = table.workers.iter().find_map(|worker| worker.status().map(|status| status.model.as_str()))?;
        hints.model.as_deref().filter(|model| *model != base)
    };
    let is_named_by_model = proxy.connector == Connector::VllmNixl;
    hints.lora.as_deref().or_else(|| is_named_by_model.then(by_model).flatten())
}

/// The names of a prompt's blocks, where the request gives its tokens and engines tell what they hold. Of text the tokens are not
/// known: this proxy has no model files.
pub(crate) fn blocks(proxy: &Proxy, hints: &crate::api::Hints<'_>, prompts: Option<Vec<Vec<u32>>>) -> Vec<Blocks> {
    let Some(prompts) = prompts else { return Vec::new() };
    let lora = adapter(proxy, hints);
    let salt = hints.cache_salt.as_deref();
    let named = |block_tokens: u32| Blocks {
        block_tokens,
        prompts: prompts
            .iter()
            .map(|prompt| crate::kv_events::vllm_follower::block_hashes(block_tokens as usize, prompt, lora, salt))
            .collect(),
    };
    proxy.followed.block_sizes(Instant::now()).into_iter().map(named).collect()
}

/// The beginning of a request's prompt, for the prefix index; nothing where there is no choice that it could turn.
pub(crate) fn chunks(proxy: &Proxy, hints: &crate::api::Hints<'_>, tenant: &Tenant) -> Option<Chunks> {
    let table = proxy.workers.table();
    let own = proxy.own(&table);
    let is_choice = |phase| table.workers.iter().filter(|worker| eligible(own, worker, phase).is_ok()).nth(1).is_some();
    let is_conditional = matches!(proxy.policy(), Policy::Conditional { .. });
    if !is_conditional && !is_choice(Phase::Prefill) && !is_choice(Phase::Decode) {
        return None;
    }
    Some(engines::chunks(&lock(proxy).prefixes, hints, tenant))
}

impl Prefix {
    /// Tokens of the blocks in which costs are counted.
    fn unit(&self) -> u32 {
        self.blocks.first().map_or(TOKENS_PER_CHUNK, |blocks| blocks.block_tokens).max(1)
    }
}

/// Prompt tokens of a request that workers have in their prefix caches, as far as is known.
struct Cached {
    by_holder: HashMap<Holder, u64>,
    prompt_tokens: u64,
}

impl Cached {
    fn at(&self, holder: Holder) -> u64 {
        self.by_holder.get(&holder).map_or(0, |tokens| (*tokens).min(self.prompt_tokens))
    }

    /// Where it has several ranks: of the one that has most.
    fn of(&self, worker: &Worker) -> u64 {
        let ranks = worker.rank_loads().len().max(1) as u32;
        (0..ranks).map(|dp_rank| self.at(Holder { worker: worker.number, dp_rank })).max().unwrap_or(0)
    }
}

/// What the candidates of one phase are made from.
struct Seen<'a> {
    table: &'a Table,
    cached: &'a Cached,
    ranks: &'a Ranks,
    /// The rank that the request asks for.
    rank: Option<u32>,
    /// Adapters in use, by place in the table; empty for a request that asks for none.
    adapters: &'a [Vec<u64>],
}

/// Adapters that workers have in use, where the request asks for one.
fn adapters_of(table: &Table, asked: Asked<'_>) -> Vec<Vec<u64>> {
    if asked.says.lora.is_none() {
        return Vec::new();
    }
    let keys = |status: &Status| status.adapters.iter().map(|name| engines::adapter_key(name)).collect();
    table.workers.iter().map(|worker| worker.status().map(keys).unwrap_or_default()).collect()
}

/// What the request would cost on the ranks of workers. Caches count only where workers are chosen by what they have cached.
fn ranks_of(router: &Router, table: &Table, asked: Asked<'_>, cached: &Cached, phase: Phase) -> Ranks {
    let mode = match phase {
        Phase::Prefill => router.prefill.mode(),
        Phase::Decode => router.decode.mode(),
    };
    let cached = |holder| if mode == Mode::KvAware { cached.at(holder) } else { 0 };
    Ranks::of(table, phase, asked.says.prompt_tokens, cached)
}

/// What workers told takes the place of what was guessed of them.
fn cached(proxy: &Proxy, router: &Router, asked: Asked<'_>) -> Cached {
    let now = Instant::now();
    let Prefix { chunks, blocks, said } = asked.prefix;
    let guessed = chunks.as_ref().map_or_else(Vec::new, |chunks| router.prefixes.matched(chunks, now.into_std()));
    let tokens = |leading: u32| u64::from(leading) * u64::from(TOKENS_PER_CHUNK);
    let mut by_holder: HashMap<Holder, u64> =
        guessed.iter().map(|overlap| (overlap.holder, tokens(overlap.leading))).collect();
    by_holder.extend(proxy.followed.cached_tokens(blocks, now));
    if let Some((worker, tokens)) = *said {
        let known = by_holder.entry(Holder::of(worker)).or_default();
        *known = tokens.max(*known);
    }
    Cached { by_holder, prompt_tokens: asked.says.prompt_tokens }
}

/// Prompt tokens that a worker would have to compute, as far as is known.
pub(crate) fn uncached_tokens(proxy: &Proxy, asked: Asked<'_>, worker: &Worker) -> u64 {
    let cached = cached(proxy, &lock(proxy), asked);
    asked.says.prompt_tokens - cached.of(worker)
}

/// Workers that a request names, as places in the table.
struct Wish {
    pinned: Option<WorkerId>,
    allowed: Option<Vec<WorkerId>>,
    rank: Option<u32>,
}

/// A place in the table that no worker has: what a name stands for that is nobody's.
const NOBODY: WorkerId = WorkerId(u32::MAX);

impl Wish {
    fn of(table: &Table, hints: &crate::forward::Hints, phase: Phase) -> Self {
        let place = |name: &String| {
            let place = table
                .workers
                .iter()
                .position(|worker| worker.address().as_str() == name || table.public_address(worker).as_str() == name);
            place.map_or(NOBODY, |place| WorkerId(place as u32))
        };
        let (named, rank) = match phase {
            Phase::Prefill => (&hints.prefill_worker, hints.prefill_rank),
            Phase::Decode => (&hints.decode_worker, hints.decode_rank),
        };
        let allowed = (!hints.allowed_workers.is_empty()).then(|| hints.allowed_workers.iter().map(place).collect());
        Wish { pinned: named.as_ref().map(place), allowed, rank }
    }

    fn request<'a>(&'a self, asked: Asked<'_>, router: &Router) -> Request<'a> {
        let Asked { says, prefix, .. } = asked;
        Request {
            job: Job { prompt_tokens: says.prompt_tokens, block_tokens: prefix.unit(), overtakes_tokens: 0 },
            pinned: self.pinned,
            allowed: self.allowed.as_deref(),
            dp_rank: self.rank,
            lora: says.lora,
            session: says.session,
            draw: entropy::quick(),
            now_ms: router.now_ms(),
        }
    }
}

/// A worker's load: what it said, and what this proxy has there; of one rank, where it has several.
fn load_view(worker: &Worker, load: Load, rank: Option<u32>) -> LoadView {
    if let Some((rank, sequences)) = rank.and_then(|rank| Some((rank, *worker.rank_loads().get(rank as usize)?))) {
        let reserved = worker.reserved.ranks().get(rank as usize).copied().unwrap_or_default();
        // Engines tell how many wait in all: its share of them, and it is not less loaded than it looks.
        let waiting = load.waiting.div_ceil(worker.rank_loads().len() as u32).min(sequences);
        return LoadView {
            running: sequences - waiting,
            waiting,
            queued_prompt_tokens: 0,
            kv_used: load.kv_blocks_used,
            kv_total: load.kv_blocks_total,
            reserved_prompt_tokens: reserved.prompt_tokens,
            reserved_requests: reserved.requests,
            active_blocks: 0,
        };
    }
    LoadView {
        running: load.running,
        waiting: load.waiting,
        queued_prompt_tokens: load.queued_prompt_tokens,
        kv_used: load.kv_blocks_used,
        kv_total: load.kv_blocks_total,
        reserved_prompt_tokens: worker.reserved.prompt_tokens(),
        reserved_requests: worker.reserved.requests(),
        active_blocks: 0,
    }
}

fn pool<'a>(
    proxy: &Proxy,
    router: &mut Router,
    asked: Asked<'_>,
    seen: &Seen<'a>,
    leg: Leg<'_>,
    may: impl Fn(&Worker) -> bool,
) -> Pool<'a> {
    let Seen { table, cached, ranks, rank: asked_rank, adapters } = *seen;
    let (now, phase) = (Instant::now(), leg.phase());
    let own = proxy.own(table);
    let blocks = |tokens: u64| u32::try_from(tokens / u64::from(asked.prefix.unit())).unwrap_or(u32::MAX);
    let mut pool = Pool { workers: Vec::new(), candidates: Vec::new() };
    let mut are_open = Vec::new();
    for (place, worker) in table.workers.iter().enumerate() {
        let Ok(status) = eligible(own, worker, phase) else { continue };
        if !may(worker) {
            continue;
        }
        let breaker_open = !router.breaker(worker, phase, now).may_try(now);
        are_open.push(breaker_open);
        let rank = ranks.would_be(place, asked_rank);
        let cached = match rank {
            Some(dp_rank) => cached.at(Holder { worker: worker.number, dp_rank }),
            None => cached.of(worker),
        };
        let rank_costs = ranks.costs(place);
        pool.workers.push(worker);
        pool.candidates.push(Candidate {
            id: WorkerId(place as u32),
            key: WorkerKey(u64::from(worker.number)),
            own: worker.link == Link::Own,
            reported: true,
            load: load_view(worker, status.load, rank),
            pairs: leg.pairs(proxy.connector, status),
            breaker_open,
            dp_size: rank_costs.len().max(1) as u32,
            rank_costs,
            loras: adapters.get(place).map_or(&[], Vec::as_slice),
            overlap: Overlap { device_blocks: blocks(cached), host_blocks: 0, disk_blocks: 0 },
        });
    }
    // With every breaker open, somebody must be tried, or nobody would learn that all is well again.
    if !are_open.is_empty() && are_open.iter().all(|open| *open) {
        let breakers = pool.workers.iter().filter_map(|worker| router.breakers.get(&(worker.number, phase)));
        for index in breaker::may_try(breakers, now) {
            pool.candidates[index].breaker_open = false;
        }
    }
    pool
}

/// Prompt tokens that a request with a priority jump overtakes: what the slowest of the workers computes in that time, as far as their
/// rates have been measured.
fn overtakes(router: &Router, pool: &Pool<'_>, hints: &forward::Hints, now_ms: u64) -> u64 {
    let Some(jump) = hints.priority_jump else { return 0 };
    let rates = pool.candidates.iter().map(|candidate| candidate.key);
    let rates = rates.filter_map(|worker| router.estimates.prefill_tokens_per_second(worker, now_ms));
    rates.reduce(f64::min).map_or(0, |rate| overtaken_tokens(jump.as_millis() as u64, rate))
}

fn chosen(
    proxy: &Arc<Proxy>,
    router: &mut Router,
    pool: &Pool<'_>,
    selected: Selected,
    leg: Leg<'_>,
    asked: Asked<'_>,
) -> Chosen {
    let (now, phase) = (Instant::now(), leg.phase());
    let worker = Arc::clone(pool.workers[selected.index]);
    let ahead = pool.candidates[selected.index].load.tokens_ahead();
    let attempt = router.breaker(&worker, phase, now).begin(now);
    let reservation = match phase {
        Phase::Prefill => worker.reserved.reserve_at(selected.dp_rank, asked.says.prompt_tokens, 0),
        Phase::Decode => worker.reserved.reserve_at(selected.dp_rank, 0, 1),
    };
    let trial = Trial { proxy: Arc::clone(proxy), worker: worker.number, phase, attempt: Some(attempt) };
    Chosen { worker, reservation, ahead, trial }
}

/// What the decision between remote and local prefill is made from.
fn inputs(
    proxy: &Proxy,
    asked: Asked<'_>,
    cached: &Cached,
    decode: &Worker,
    prefill: Option<(&Worker, &Candidate<'_>)>,
    prefill_pinned: bool,
) -> Inputs {
    let prompt_tokens = asked.says.prompt_tokens;
    let uncached = |worker: &Worker| prompt_tokens - cached.of(worker);
    let status = decode.status();
    let load = status.map(|status| status.load).unwrap_or_default();
    Inputs {
        decode_worker: WorkerKey(u64::from(decode.number)),
        prefill_worker: prefill.map_or(WorkerKey(u64::MAX), |(_, candidate)| candidate.key),
        decode_role: status.map_or(Role::Decode, |status| status.role),
        prefill_pinned,
        handover: asked.says.handover,
        prompt_tokens,
        uncached_on_decode: uncached(decode),
        uncached_on_prefill: prefill.map_or(prompt_tokens, |(worker, _)| uncached(worker)),
        moved_tokens: prompt_tokens,
        ahead_on_prefill: prefill.map(|(_, candidate)| candidate.load.tokens_ahead()),
        ahead_on_decode: match proxy.connector {
            Connector::Baton => Some(load.queued_prompt_tokens),
            // Other engines don't say how many prompt tokens they have before them; what they usually make one wait is measured.
            Connector::VllmNixl | Connector::Sglang => None,
        },
        active_decodes: u64::from(load.running).max(decode.reserved.requests().saturating_sub(1)),
        decode_overloaded: load_view(decode, load, None).is_overloaded(),
        draw: entropy::quick(),
    }
}

/// Another process has taken a worker's place, or none: its cache is empty, and what it took says nothing of the next one.
pub(crate) fn forget(proxy: &Proxy, worker: u32) {
    let mut router = lock(proxy);
    router.prefixes.forget_worker(worker);
    router.estimates.forget(WorkerKey(u64::from(worker)));
    router.breakers.retain(|(number, _), _| *number != worker);
}

/// A worker, or the rank of it that had the leg, has a prompt's beginning in its cache now.
fn holds(proxy: &Proxy, ask: &Ask, worker: &Worker, rank: Option<u32>) {
    if let Some(chunks) = &ask.prefix.chunks {
        let holder = Holder { worker: worker.number, dp_rank: rank.unwrap_or(0) };
        lock(proxy).prefixes.insert(holder, chunks, Instant::now().into_std());
    }
}

/// A prefill leg that is done.
pub(crate) struct Done {
    pub(crate) trial: Trial,
    pub(crate) took: Duration,
    /// Of the prompt, as the engine counted them.
    pub(crate) tokens: Option<u64>,
    /// Of them, in its cache.
    pub(crate) cached: u64,
    /// Prompt tokens that this proxy had there before it.
    pub(crate) ahead: u64,
    /// The data-parallel rank that computed it.
    pub(crate) rank: Option<u32>,
}

/// A prefill leg is done: its worker has the prompt cached, and took so long.
pub(crate) fn prefill_done(proxy: &Proxy, ask: &Ask, worker: &Worker, done: Done) {
    let Done { trial, took, tokens, cached, ahead, rank } = done;
    trial.end(Outcome::Success);
    let computed_tokens = tokens.unwrap_or(ask.says.prompt_tokens).saturating_sub(cached);
    let leg = Prefill { computed_tokens, wait: Wait::Behind(ahead), elapsed_ms: took.as_secs_f64() * 1e3 };
    {
        let mut router = lock(proxy);
        let now_ms = router.now_ms();
        router.estimates.record_prefill(WorkerKey(u64::from(worker.number)), leg, now_ms);
    }
    proxy.metrics.prefill_leg(crate::metrics::LegOutcome::Done, took);
    holds(proxy, ask, worker, rank);
}

/// A prefill leg has failed.
pub(crate) fn prefill_failed(proxy: &Proxy, trial: Trial, class: LegFailure, took: Duration) {
    trial.end(verdict(class));
    let reason = match class {
        LegFailure::Refused => PathReason::PrefillUnreachable,
        LegFailure::Timeout => PathReason::Timeout,
        LegFailure::ServerError | LegFailure::Busy | LegFailure::ClientError => PathReason::PrefillFailed,
    };
    proxy.metrics.prefill_leg(crate::metrics::LegOutcome::Failed(reason), took);
}

/// A decode leg that has been answered.
pub(crate) struct Answered<'a> {
    pub(crate) trial: Trial,
    /// Who holds the KV that it was sent with.
    pub(crate) held_by: Option<&'a Worker>,
    /// Where the worker computes the prompt itself: what its other streams do meanwhile.
    pub(crate) watch: Option<Watch>,
    /// When it was sent.
    pub(crate) since: Instant,
    /// The data-parallel rank that it was sent to.
    pub(crate) rank: Option<u32>,
}

/// A decode worker has answered: it has the prompt cached. What the first piece of its stream is to tell, where it tells something: one
/// of SGLang's that waits for a prefill worker waits for computing and transfer in one, and an answer in one piece comes with its end.
pub(crate) fn decode_answered(
    proxy: &Arc<Proxy>,
    ask: &Ask,
    worker: &Worker,
    answered: Answered<'_>,
) -> Option<FirstPiece> {
    let Answered { trial, held_by, watch, since, rank } = answered;
    trial.end(Outcome::Success);
    holds(proxy, ask, worker, rank);
    let key = |worker: &Worker| WorkerKey(u64::from(worker.number));
    let what = match (held_by, watch) {
        (Some(prefill), _) => For::Transfer(key(prefill)),
        (None, Some(watch)) => For::Local(key(worker), Box::new(watch)),
        (None, None) => return None,
    };
    ask.says.stream.then(|| FirstPiece { proxy: Arc::clone(proxy), since, prompt_tokens: ask.says.prompt_tokens, what })
}

impl Trial {
    /// It has failed like this.
    pub(crate) fn failed(self, class: LegFailure) {
        self.end(verdict(class));
    }
}

/// A decode leg has failed before its first byte.
pub(crate) fn decode_failed(trial: Trial, class: LegFailure) {
    trial.end(verdict(class));
}

/// What a failure says of its worker. One that is busy is well, and so is one that refuses a wrong request.
fn verdict(class: LegFailure) -> Outcome {
    match class {
        LegFailure::Refused | LegFailure::ServerError | LegFailure::Timeout => Outcome::Failure,
        LegFailure::Busy => Outcome::NoVerdict,
        LegFailure::ClientError => Outcome::Success,
    }
}

fn lock(proxy: &Proxy) -> MutexGuard<'_, Router> {
    // Every step leaves it whole; what a panic left out is a number that is a little old.
    proxy.router.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::fixtures::status;
    use crate::workers::{Report, Workers};
    use baton_wire::Fingerprint;

    #[test]
    fn our_workers_pair_by_fingerprint_and_one_without_pairs_with_nobody() {
        let check = |connector, of_decode: Option<u8>, of_prefill: Option<u8>, expect| {
            let said = |role, number: Option<u8>| Status {
                fingerprint: number.map(|number| Fingerprint([number; 32])),
                ..status(role)
            };
            let workers = Workers::new(Some("127.0.0.1:8200".parse().expect("an address")), &[]);
            let own = workers.table().workers[0].address().clone();
            workers.report(Link::Own, &own, Report::Said(Arc::new(said(Role::Decode, of_decode))));
            let decode = Arc::clone(&workers.table().workers[0]);
            let leg = Leg::Prefill { decode: &decode };
            assert_eq!(leg.pairs(connector, &said(Role::Prefill, of_prefill)), expect, "{of_decode:?} {of_prefill:?}");
        };
        check(Connector::Baton, Some(1), Some(1), Ok(()));
        check(Connector::Baton, Some(1), Some(2), Err(PathReason::FingerprintMismatch));
        check(Connector::Baton, Some(1), None, Err(PathReason::FingerprintMismatch));
        check(Connector::Baton, None, None, Err(PathReason::FingerprintMismatch));
        check(Connector::VllmNixl, None, None, Ok(()));
    }

    #[test]
    fn that_nobody_can_be_paired_is_a_plan_for_our_workers_and_a_fallback_for_others() {
        let check = |connector, why, expect: Path| assert_eq!(without_prefill(connector, why), expect, "{why:?}");
        let none = |reason| NoPrefill::NoneAvailable(reason);
        let (nobody, other) = (PathReason::NoPrefillWorker, PathReason::FingerprintMismatch);
        check(Connector::Baton, NoPrefill::NotActivated, Path::LocalPrefill(nobody));
        check(Connector::Baton, none(nobody), Path::LocalPrefill(nobody));
        check(Connector::Baton, none(other), Path::LocalPrefill(other));
        check(Connector::Baton, none(PathReason::PrefillUnreachable), Path::Fallback(PathReason::PrefillUnreachable));
        check(Connector::VllmNixl, none(nobody), Path::Fallback(nobody));
        let short = PathReason::ShortPrompt;
        check(Connector::VllmNixl, NoPrefill::Planned(short), Path::LocalPrefill(short));
    }

    #[test]
    fn costs_are_counted_in_the_blocks_that_are_named() {
        let named = Blocks { block_tokens: 32, prompts: Vec::new() };
        assert_eq!(Prefix::default().unit(), TOKENS_PER_CHUNK);
        assert_eq!(Prefix { blocks: vec![named.clone()], ..Prefix::default() }.unit(), 32);
        assert_eq!(Prefix { blocks: vec![Blocks { block_tokens: 0, ..named }], ..Prefix::default() }.unit(), 1);
    }
}
