//! One mock: its settings and all that its requests share.

use super::args::MockEngineArgs;
use super::ask::Ask;
use super::call::Refusal;
use super::fail::{Fails, Failure};
use super::holds::Holds;
use super::ledger::{Head, Ledger};
use super::leg::Leg;
use super::link::Links;
use super::ranks::{self, Ranks};
use super::rooms::Rooms;
use super::rule::Rule;
use baton_wire::signing::KeyError;
use baton_wire::{Epoch, Fingerprint, PromptHash};
use ed25519_dalek::VerifyingKey;
use http::HeaderMap;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Headers by which a router's clients choose workers. None is an engine's business.
const STEERING_HEADERS: [&str; 4] =
    ["x-prefiller-host-port", "x-encoder-hosts-ports", "x-data-parallel-host-port", "x-kv-cache-source-host-port"];

/// The header that joins the logs of both legs.
pub(crate) const REQUEST_ID: &str = baton_wire::names::headers::REQUEST_ID;

/// Why a mock can't be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// Somebody else is there, or the address is not ours.
    #[error("cannot listen at {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    /// The file of --public-key.
    #[error("{path}: cannot be read")]
    KeyFile {
        path: String,
        #[source]
        source: std::io::Error,
    },
    /// What is in it.
    #[error("{path}: no public key")]
    Key {
        path: String,
        #[source]
        source: KeyError,
    },
    /// The system gives no random numbers.
    #[error("no random numbers")]
    Random(#[source] getrandom::Error),
}

/// One mock.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) args: MockEngineArgs,
    /// Where HTTP is served.
    pub(crate) address: SocketAddr,
    /// Where peers reach the side channel.
    pub(crate) side: SocketAddr,
    /// This life of this process.
    pub(crate) epoch: Epoch,
    pub(crate) fingerprint: Fingerprint,
    /// Of the proxies whose transfers are checked.
    pub(crate) key: Option<VerifyingKey>,
    pub(crate) rooms: Arc<Rooms>,
    pub(crate) links: Links,
    ledger: Mutex<Ledger>,
    holds: Mutex<Holds>,
    fails: Mutex<Fails>,
    ranks: Mutex<Ranks>,
    /// One prompt at a time on each rank, where prompts take time by their length.
    prefill: Semaphore,
    waiting: AtomicU64,
    requests: AtomicU64,
    /// How often connections were made stale, and how many were closed for it.
    stale: [AtomicU64; 2],
}

impl Engine {
    /// # Errors
    /// When the system gives no random numbers, or the key can't be read.
    pub(crate) fn new(args: MockEngineArgs, address: SocketAddr, side: SocketAddr) -> Result<Self, StartError> {
        let mut epoch = [0; 16];
        getrandom::fill(&mut epoch).map_err(StartError::Random)?;
        let model: Vec<u32> = args.model.bytes().map(u32::from).collect();
        Ok(Engine {
            address,
            side,
            epoch: Epoch(epoch),
            fingerprint: Fingerprint(PromptHash::of(&model).0),
            key: read_key(&args)?,
            rooms: Arc::default(),
            links: Links::default(),
            ledger: Mutex::new(Ledger::new(args.keep)),
            holds: Mutex::new(Holds::new(args.lease)),
            fails: Mutex::new(Fails::new(&args.fail)),
            ranks: Mutex::new(Ranks::new(args.dp)),
            prefill: Semaphore::new(args.dp as usize),
            waiting: AtomicU64::new(0),
            requests: AtomicU64::new(1),
            stale: Default::default(),
            args,
        })
    }

    /// What handles call this engine. A restart is another.
    pub(crate) fn id(&self) -> String {
        format!("{}-{}", self.args.name, self.epoch)
    }

    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().expect("no code that holds the ledger panics")
    }

    pub(crate) fn holds(&self) -> MutexGuard<'_, Holds> {
        self.holds.lock().expect("no code that has the holds panics")
    }

    pub(crate) fn fails(&self) -> MutexGuard<'_, Fails> {
        self.fails.lock().expect("no code that has the failures panics")
    }

    pub(crate) fn ranks(&self) -> MutexGuard<'_, Ranks> {
        self.ranks.lock().expect("no code that has the ranks panics")
    }

    /// Finds the rank that serves a request: the one that it names, the one of its room, or the next in turn.
    ///
    /// # Errors
    /// When there is no such rank, as both engines refuse it.
    pub(crate) fn enter_rank(
        &self,
        work: &mut Work,
        number: u64,
        headers: &HeaderMap,
        ask: &Ask<'_>,
    ) -> Result<(), Refusal> {
        let (contract, size) = (self.args.contract, self.args.dp);
        let named = ranks::named(contract, size, headers, ask).map_err(|(rule, found)| {
            self.violated(rule, number, found);
            Refusal::new(400, rule.sentence())
        })?;
        let room =
            || ask.bootstrap_room.and_then(|room| room.get().parse().ok()).map(|room| ranks::of_room(room, size));
        let in_turn = || (number % u64::from(size)) as u32;
        let rank = named.or_else(room).unwrap_or_else(in_turn);
        self.ranks().add(rank, work.leg, named.is_some());
        work.rank = Some(rank);
        Ok(())
    }

    pub(crate) fn next_number(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed)
    }

    /// Of which age a connection is that is accepted now; an older one is stale.
    pub(crate) fn age(&self) -> u64 {
        self.stale[0].load(Ordering::Relaxed)
    }

    /// All connections that are open now are closed without an answer when another request comes on them.
    pub(crate) fn make_stale(&self) {
        self.stale[0].fetch_add(1, Ordering::Relaxed);
    }

    /// A stale connection is closed.
    pub(crate) fn closes_stale(&self) {
        self.stale[1].fetch_add(1, Ordering::Relaxed);
    }

    /// Prompts that wait for their turn.
    pub(crate) fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// A request begins: it is counted and shown, its headers are checked, and what it meets is drawn.
    pub(crate) fn begin(self: &Arc<Self>, head: Head) -> (Work, Option<Failure>) {
        let (leg, number) = (head.leg, head.number);
        let failure = self.fails().meet(leg);
        let mut ledger = self.ledger();
        ledger.requests.add(leg);
        ledger.running.add(leg);
        if failure.is_some() {
            ledger.failed.add(leg);
        }
        if leg != Leg::Probe {
            for (rule, found) in broken_by(&head.headers) {
                ledger.violated(rule, number, found);
            }
        }
        ledger.remember(head);
        drop(ledger);
        (Work { engine: Arc::clone(self), leg, rank: None, ended: false }, failure)
    }

    pub(crate) fn violated(&self, rule: Rule, number: u64, found: impl Into<String>) {
        self.ledger().violated(rule, number, found.into());
    }

    /// Computes a prompt. Dropped, it stops at once and the next begins.
    pub(crate) async fn compute(&self, prompt_tokens: u64) {
        let uncached = prompt_tokens - self.args.cached_tokens.min(prompt_tokens);
        if let Some(rate) = self.args.prefill_tokens_per_second {
            let waiting = Waiting::new(&self.waiting);
            let turn = self.prefill.acquire().await.expect("the semaphore is never closed");
            drop(waiting);
            // A day at most: a rate may be so low that the quotient is no duration.
            tokio::time::sleep(Duration::from_secs_f64((uncached as f64 / rate).min(86_400.0))).await;
            drop(turn);
        } else {
            pause(self.args.prefill_delay).await;
        }
        self.ledger().prompt_tokens += uncached;
    }

    /// What is reported as cached by who computed the prompt.
    pub(crate) fn cached_tokens(&self, prompt_tokens: u64) -> u64 {
        self.args.cached_tokens.min(prompt_tokens)
    }

    /// All that `/mock/ledger` shows.
    pub(crate) fn told(&self, with_bodies: bool) -> Value {
        let now = Instant::now();
        let holds = {
            let mut holds = self.holds();
            holds.expire(now);
            let counts = holds.counts;
            json!({
                "now": holds.now(),
                "blocks_now": holds.blocks(),
                "oldest_ms": holds.oldest(now).map(|age| age.as_millis() as u64),
                "total": counts.total,
                "consumed": counts.consumed,
                "released": counts.released,
                "expired": counts.expired,
                "renewed": counts.renewed,
            })
        };
        let mut rooms = json!(self.rooms.counts());
        rooms["now"] = self.rooms.now().into();
        let fails: Vec<Value> = self.fails().told().map(|(spec, hits)| json!({"spec": spec, "hits": hits})).collect();
        let others = json!({
            "name": self.args.name,
            "contract": self.args.contract.as_str(),
            "role": self.args.role.as_str(),
            "engine_id": self.id(),
            "side_channel": self.side.to_string(),
            "holds": holds,
            "rooms": rooms,
            "ranks": self.ranks().json(),
            "waiting": self.waiting(),
            "stale_closed": self.stale[1].load(Ordering::Relaxed),
            "fail": fails,
        });
        self.ledger().json(others, with_bodies)
    }

    /// Forgets all that was counted, and what is held.
    pub(crate) fn reset(&self) {
        self.ledger().reset();
        self.holds().reset();
        self.rooms.reset();
        self.ranks().reset();
    }
}

/// Counts a prompt that waits for its turn, for as long as it does.
struct Waiting<'a>(&'a AtomicU64);

impl<'a> Waiting<'a> {
    fn new(waiting: &'a AtomicU64) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request that is being served. Dropped before its end, it was given up by the other side.
#[derive(Debug)]
pub(crate) struct Work {
    engine: Arc<Engine>,
    pub(crate) leg: Leg,
    /// Of the engine, once one is found.
    rank: Option<u32>,
    ended: bool,
}

impl Work {
    /// Answered in full.
    pub(crate) fn answered(&mut self, completion_tokens: u64) {
        self.end(|ledger, leg| {
            ledger.answered.add(leg);
            ledger.completion_tokens += completion_tokens;
        });
    }

    /// Refused, as an engine does or because it met a failure.
    pub(crate) fn refused(&mut self) {
        self.end(|ledger, leg| ledger.refused.add(leg));
    }

    /// Broken off because it met a failure.
    pub(crate) fn broken(&mut self) {
        self.end(|_, _| {});
    }

    fn end(&mut self, count: impl FnOnce(&mut Ledger, Leg)) {
        if !self.ended {
            self.ended = true;
            if let Some(rank) = self.rank {
                self.engine.ranks().take(rank);
            }
            let mut ledger = self.engine.ledger();
            ledger.running.take(self.leg);
            count(&mut ledger, self.leg);
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.end(|ledger, leg| ledger.aborts.add(leg));
    }
}

/// What a request's headers break.
fn broken_by(headers: &HeaderMap) -> Vec<(Rule, String)> {
    let mut broken = Vec::new();
    if headers.get_all(REQUEST_ID).iter().nth(1).is_some() {
        broken.push((Rule::RequestIdTwice, format!("{} of them", headers.get_all(REQUEST_ID).iter().count())));
    }
    for name in STEERING_HEADERS {
        if headers.contains_key(name) {
            broken.push((Rule::SteeringHeader, name.to_owned()));
        }
    }
    broken
}

/// Sleeps, unless there is nothing to wait for: even a timer of no time costs a turn of the runtime.
pub(crate) async fn pause(lasts: Duration) {
    if !lasts.is_zero() {
        tokio::time::sleep(lasts).await;
    }
}

fn read_key(args: &MockEngineArgs) -> Result<Option<VerifyingKey>, StartError> {
    let Some(file) = &args.public_key else { return Ok(None) };
    let path = file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|source| StartError::KeyFile { path: path.clone(), source })?;
    let key = baton_wire::signing::parse_verifying_key(&text).map_err(|source| StartError::Key { path, source })?;
    Ok(Some(key))
}
