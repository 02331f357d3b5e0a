//! The table of workers: who there is, what each last said of itself, and what this proxy has under way there.
//!
//! The table is an immutable snapshot that is replaced whole, so a request decides on one consistent picture and nobody
//! waits for a lock. Polling fills it (`workers/poll.rs`), `eligible.rs` judges it; it judges nothing itself.

mod adapters;
pub(crate) mod poll;
pub(crate) mod probe;
pub(crate) mod ranks;

use crate::address::Address;
use crate::config::Engine;
use crate::pulse::{Pulse, Sampled};
use crate::upstream::{Transport, Transports, Upstream};
use baton_wire::Epoch;
use baton_wire::status::Status;
use ranks::RANKS_MAX;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// How a worker is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Link {
    /// The engine of this pod, directly: nothing between us needs a signature.
    Own,
    /// Another pod's proxy: what we ask of it is signed, and so is what it says of itself.
    Peer,
    /// An engine that is not ours, directly, in another pod or wherever a flag or a header says that it is.
    Direct,
}

/// What is known of a worker.
#[derive(Clone, Debug)]
pub(crate) enum Report {
    /// It has not been asked yet.
    NotAsked,
    /// It did not answer, or with an error.
    Unreachable,
    /// It answered without a right signature over our nonce.
    Unsigned,
    /// It answered with what is no status.
    Garbled,
    /// What it said of itself.
    Said(Arc<Status>),
}

/// A worker, as of one snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    /// No other worker that this process has known has it.
    pub(crate) number: u32,
    pub(crate) link: Link,
    pub(crate) report: Report,
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) reserved: Arc<Reserved>,
}

impl Worker {
    fn new(link: Link, address: Address, transport: Transport, resends: &Arc<AtomicU64>) -> Self {
        static NUMBERS: AtomicU32 = AtomicU32::new(0);
        Worker {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            link,
            report: Report::NotAsked,
            upstream: Arc::new(Upstream::new(address, transport, Arc::clone(resends))),
            reserved: Arc::default(),
        }
    }

    /// Where it is dialled, which is also its name in logs and tables.
    pub(crate) fn address(&self) -> &Address {
        self.upstream.address()
    }

    pub(crate) fn status(&self) -> Option<&Status> {
        match &self.report {
            Report::Said(status) => Some(status),
            Report::NotAsked | Report::Unreachable | Report::Unsigned | Report::Garbled => None,
        }
    }

    /// Sequences of each data-parallel rank, by its report; empty where there is but one.
    pub(crate) fn rank_loads(&self) -> &[u32] {
        let loads = self.status().map_or(&[][..], |status| &status.rank_loads);
        // One rank is no choice; more than there can be are a status that nobody should follow.
        if (2..=RANKS_MAX as usize).contains(&loads.len()) { loads } else { &[] }
    }
}

/// What this proxy has under way at a worker, across snapshots.
#[derive(Debug, Default)]
pub(crate) struct Reserved {
    prompt_tokens: AtomicU64,
    requests: AtomicU64,
    /// The parts of both that a data-parallel rank was chosen for; as long as the highest of them.
    ranks: Mutex<Vec<OnRank>>,
    pulse: Arc<Pulse>,
}

/// What this proxy has under way at one data-parallel rank of a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct OnRank {
    pub(crate) prompt_tokens: u64,
    pub(crate) requests: u64,
}

impl Reserved {
    /// Prompt tokens of prefill legs that have not ended.
    pub(crate) fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens.load(Ordering::Acquire)
    }

    /// Decode legs that have not ended.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Acquire)
    }

    /// How evenly its streams come.
    pub(crate) fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// Both by data-parallel rank; empty where none was ever chosen.
    pub(crate) fn ranks(&self) -> Vec<OnRank> {
        self.lock_ranks().clone()
    }

    /// Prompt tokens of prefill legs that have not ended: at this rank, or at the worker where it has but one.
    pub(crate) fn prompt_tokens_at(&self, rank: Option<u32>) -> u64 {
        match rank {
            None => self.prompt_tokens(),
            Some(rank) => self.lock_ranks().get(rank as usize).map_or(0, |on_rank| on_rank.prompt_tokens),
        }
    }

    /// Counts work there until the reservation is dropped.
    pub(crate) fn reserve(self: &Arc<Self>, prompt_tokens: u64, requests: u64) -> Reservation {
        self.reserve_at(None, prompt_tokens, requests)
    }

    /// The same for work that is to be done by this data-parallel rank.
    pub(crate) fn reserve_at(self: &Arc<Self>, rank: Option<u32>, prompt_tokens: u64, requests: u64) -> Reservation {
        self.prompt_tokens.fetch_add(prompt_tokens, Ordering::AcqRel);
        self.requests.fetch_add(requests, Ordering::AcqRel);
        self.on_rank(rank, |on_rank| {
            on_rank.prompt_tokens += prompt_tokens;
            on_rank.requests += requests;
        });
        Reservation { reserved: Arc::clone(self), rank, prompt_tokens, requests }
    }

    fn on_rank(&self, rank: Option<u32>, change: impl FnOnce(&mut OnRank)) {
        let Some(rank) = rank.filter(|rank| *rank < RANKS_MAX).map(|rank| rank as usize) else { return };
        let mut ranks = self.lock_ranks();
        if ranks.len() <= rank {
            ranks.resize(rank + 1, OnRank::default());
        }
        change(&mut ranks[rank]);
    }

    fn lock_ranks(&self) -> MutexGuard<'_, Vec<OnRank>> {
        // Each change is one sum, so what a panic leaves is whole.
        self.ranks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Work under way at a worker. Dropping it says that the work has ended, however it did.
#[derive(Debug)]
#[must_use = "dropping the reservation returns it"]
pub(crate) struct Reservation {
    reserved: Arc<Reserved>,
    rank: Option<u32>,
    prompt_tokens: u64,
    requests: u64,
}

impl Reservation {
    /// The data-parallel rank that was chosen for the work, where the worker has several or one was asked for.
    pub(crate) fn rank(&self) -> Option<u32> {
        self.rank
    }

    /// For a stream that is this work: whether the worker's pulse is taken by it.
    pub(crate) fn sample(&self) -> Option<Sampled> {
        self.reserved.pulse.sample(self.rank)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.reserved.prompt_tokens.fetch_sub(self.prompt_tokens, Ordering::AcqRel);
        self.reserved.requests.fetch_sub(self.requests, Ordering::AcqRel);
        self.reserved.on_rank(self.rank, |on_rank| {
            on_rank.prompt_tokens -= self.prompt_tokens;
            on_rank.requests -= self.requests;
        });
    }
}

/// All workers, as of one moment. This pod's engine stands first, where there is one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    pub(crate) workers: Vec<Arc<Worker>>,
}

impl Table {
    pub(crate) fn own(&self) -> Option<&Arc<Worker>> {
        self.workers.iter().find(|worker| worker.link == Link::Own)
    }

    pub(crate) fn own_epoch(&self) -> Option<Epoch> {
        self.own().and_then(|own| own.status()).map(|status| status.epoch)
    }

    /// The address under which other pods know a worker: for our own engine that of our own proxy, once the peers' table
    /// shows which one that is.
    pub(crate) fn public_address<'a>(&'a self, worker: &'a Worker) -> &'a Address {
        let itself = |peer: &&Arc<Worker>| {
            peer.link == Link::Peer && peer.status().map(|status| status.epoch) == self.own_epoch()
        };
        match (worker.link, self.own_epoch()) {
            (Link::Own, Some(_)) => self.workers.iter().find(itself).map_or(worker.address(), |peer| peer.address()),
            (Link::Own, None) | (Link::Peer | Link::Direct, _) => worker.address(),
        }
    }
}

/// The current table, and those who wait for it to change.
#[derive(Debug)]
pub(crate) struct Workers {
    table: watch::Sender<Arc<Table>>,
    peer_transport: Transport,
    resends: Arc<AtomicU64>,
    named: Mutex<HashMap<Address, Arc<Worker>>>,
}

/// Workers kept that requests have named: a pool of pods, twice over. Beyond it all are forgotten, which costs connections.
const NAMED_MAX: usize = 1024;

impl Workers {
    /// Workers that are reached without TLS.
    #[cfg(test)]
    pub(crate) fn new(engine: Option<Address>, direct: &[Engine]) -> Self {
        Self::over(Transports::default(), engine, direct)
    }

    pub(crate) fn over(transports: Transports, engine: Option<Address>, direct: &[Engine]) -> Self {
        let Transports { own, peers: peer_transport } = transports;
        let resends = Arc::default();
        let worker = |link, address, transport| Arc::new(Worker::new(link, address, transport, &resends));
        let own = engine.map(|address| worker(Link::Own, address, own));
        let direct = direct.iter().map(|engine| {
            let transport = if engine.is_tls { peer_transport.clone() } else { Transport::Plain };
            worker(Link::Direct, engine.address.clone(), transport)
        });
        let workers = own.into_iter().chain(direct).collect();
        Workers {
            table: watch::Sender::new(Arc::new(Table { workers })),
            peer_transport,
            resends,
            named: Mutex::default(),
        }
    }

    /// A worker that a request names: that of the table, or one that is in none, kept for its connections.
    pub(crate) fn named(&self, address: &Address) -> Arc<Worker> {
        if let Some(worker) = self.table().workers.iter().find(|worker| worker.address() == address) {
            return Arc::clone(worker);
        }
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        if named.len() >= NAMED_MAX && !named.contains_key(address) {
            named.clear();
        }
        let new = || Arc::new(Worker::new(Link::Direct, address.clone(), Transport::Plain, &self.resends));
        Arc::clone(named.entry(address.clone()).or_insert_with(new))
    }

    /// Requests that were sent a second time, to any worker, because a pooled connection turned out to be closed.
    pub(crate) fn resends(&self) -> u64 {
        self.resends.load(Ordering::Relaxed)
    }

    pub(crate) fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.borrow())
    }

    /// Replaces what is known of a worker. Does nothing where it has left the table meanwhile.
    pub(crate) fn report(&self, link: Link, address: &Address, report: Report) {
        self.table.send_modify(|table| {
            let mut workers = table.workers.clone();
            for worker in workers.iter_mut().filter(|worker| worker.link == link && worker.address() == address) {
                *worker = Arc::new(Worker { report: report.clone(), ..Worker::clone(worker) });
            }
            *table = Arc::new(Table { workers });
        });
    }

    /// Makes the peers be these. Those that stay keep what is known of them, their connections and their reservations.
    pub(crate) fn set_peers(&self, peers: &BTreeSet<Address>) {
        self.table.send_modify(|table| {
            let stays = |worker: &&Arc<Worker>| worker.link != Link::Peer || peers.contains(worker.address());
            let mut workers: Vec<Arc<Worker>> = table.workers.iter().filter(stays).cloned().collect();
            let known = |address: &&Address| {
                table.workers.iter().any(|worker| worker.link == Link::Peer && worker.address() == *address)
            };
            let new = peers.iter().filter(|address| !known(address));
            workers.extend(new.map(|address| {
                Arc::new(Worker::new(Link::Peer, address.clone(), self.peer_transport.clone(), &self.resends))
            }));
            *table = Arc::new(Table { workers });
        });
    }
}

#[cfg(test)]
pub(crate) mod fixtures {
    //! Workers for the tests of those who judge them.
    use super::*;
    use baton_wire::status::{Load, State, Totals};
    use baton_wire::{Fingerprint, Role};

    pub(crate) fn status(role: Role) -> Status {
        Status {
            role,
            revision: "r1".into(),
            epoch: Epoch([1; 16]),
            model: "tiny".into(),
            fingerprint: Some(Fingerprint([1; 32])),
            kv_address: Some("10.0.0.1:5600".into()),
            state: State::Ready,
            progress: None,
            max_model_length: Some(2048),
            block_tokens: 32,
            load: Load::default(),
            totals: Totals::default(),
            bootstrap_port: None,
            rank_loads: Vec::new(),
            adapters: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_wire::Role;

    fn address(text: &str) -> Address {
        text.parse().expect("an address")
    }

    #[test]
    fn a_peer_that_stays_keeps_what_is_known_of_it() {
        let workers = Workers::new(Some(address("127.0.0.1:8200")), &[]);
        let (a, b) = (address("10.0.0.1:8000"), address("10.0.0.2:8000"));
        workers.set_peers(&BTreeSet::from([a.clone(), b.clone()]));
        workers.report(Link::Peer, &a, Report::Said(Arc::new(fixtures::status(Role::Decode))));
        let before = workers.table();
        let _reservation = before.workers[1].reserved.reserve(7, 1);

        workers.set_peers(&BTreeSet::from([a.clone()]));
        workers.report(Link::Peer, &b, Report::Unreachable);

        let table = workers.table();
        let addresses: Vec<_> = table.workers.iter().map(|worker| worker.address().as_str()).collect();
        assert_eq!(addresses, ["127.0.0.1:8200", "10.0.0.1:8000"]);
        assert!(table.workers[1].status().is_some());
        assert_eq!(table.workers[1].reserved.prompt_tokens(), 7);
    }

    #[test]
    fn a_dropped_reservation_is_returned() {
        let reserved = Arc::new(Reserved::default());
        let first = reserved.reserve(10, 1);
        let second = reserved.reserve(5, 1);
        assert_eq!((reserved.prompt_tokens(), reserved.requests()), (15, 2));
        drop(first);
        drop(second);
        assert_eq!((reserved.prompt_tokens(), reserved.requests()), (0, 0));
    }

    #[test]
    fn what_is_reserved_is_known_by_rank_as_well() {
        let reserved = Arc::new(Reserved::default());
        let (third, first) = (reserved.reserve_at(Some(2), 10, 1), reserved.reserve_at(Some(0), 5, 0));
        let unranked = reserved.reserve(100, 1);
        // A rank that no worker can have takes no memory.
        let beyond = reserved.reserve_at(Some(u32::MAX), 7, 1);
        assert_eq!((third.rank(), unranked.rank(), beyond.rank()), (Some(2), None, Some(u32::MAX)));
        let on = |prompt_tokens, requests| OnRank { prompt_tokens, requests };
        assert_eq!(reserved.ranks(), [on(5, 0), on(0, 0), on(10, 1)]);
        let at = [None, Some(2), Some(9)].map(|rank| reserved.prompt_tokens_at(rank));
        assert_eq!(at, [122, 10, 0]);
        drop((third, first, unranked, beyond));
        assert_eq!(reserved.ranks(), [OnRank::default(); 3]);
        assert_eq!((reserved.prompt_tokens(), reserved.requests()), (0, 0));
    }

    #[test]
    fn the_own_engine_is_known_to_others_by_the_address_of_its_proxy() {
        let workers = Workers::new(Some(address("127.0.0.1:8200")), &[]);
        let itself = address("10.0.0.1:8000");
        workers.set_peers(&BTreeSet::from([itself.clone(), address("10.0.0.2:8000")]));
        let shown = |workers: &Workers| workers.table().public_address(&workers.table().workers[0]).to_string();
        assert_eq!(shown(&workers), "127.0.0.1:8200");
        let status = Arc::new(fixtures::status(Role::Decode));
        workers.report(Link::Own, &address("127.0.0.1:8200"), Report::Said(Arc::clone(&status)));
        workers.report(Link::Peer, &itself, Report::Said(status));
        assert_eq!(shown(&workers), "10.0.0.1:8000");
    }
}
