//! What changed in the prefix cache, numbered: a ring that the engine's thread writes and any number of followers read.
//!
//! The thread appends after each step and waits for nobody. A follower asks for what comes after the last number that it has; where
//! the ring no longer holds that, it starts again from a snapshot ([`crate::engine_thread::EngineHandle::cached_blocks`]). How the
//! events look on the wire is in `http/kv_events.rs`.

use baton_engine::block_manager::CacheChange;
use baton_engine::prefix_hash::BlockHash;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// Hashes in the ring at most: 1 MiB of them. A follower that has missed more is better off with a snapshot, which is no longer than
/// this in caches of two million tokens.
const RING_HASHES_MAX: usize = 1 << 16;

/// Hashes in one event at most, as in one line of a snapshot: a line that nobody minds to hold in memory.
pub const EVENT_HASHES_MAX: usize = 1024;

/// Events that a follower is given at once: so few that the engine's thread never waits for the lock for longer than it takes to count
/// up as many references.
const READ_EVENTS_MAX: usize = 64;

/// The number of an epoch's first event. Not 0, so that a follower that has applied none can say so.
const FIRST: u64 = 1;

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These blocks can be found from now on.
    Stored(Vec<BlockHash>),
    /// These can't any more.
    Removed(Vec<BlockHash>),
}

/// One change with its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvEvent {
    /// Consecutive within an epoch.
    pub seq: u64,
    /// What happened.
    pub change: Change,
}

/// The reading side; clones read the same ring.
#[derive(Clone, Debug)]
pub struct KvEvents {
    ring: Arc<Mutex<Ring>>,
    /// The number that the next event will have.
    next: watch::Receiver<u64>,
}

/// The writing side, the engine's thread's own.
#[derive(Debug)]
pub struct Recorder {
    ring: Arc<Mutex<Ring>>,
    next: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Ring {
    events: VecDeque<Arc<KvEvent>>,
    num_hashes: usize,
}

/// The ring no longer holds, or never held, what a follower wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missed;

impl KvEvents {
    /// An empty ring.
    pub fn new() -> (Recorder, KvEvents) {
        let ring = Arc::new(Mutex::new(Ring::default()));
        let (sender, next) = watch::channel(FIRST);
        (Recorder { ring: ring.clone(), next: sender }, KvEvents { ring, next })
    }

    /// The number of the oldest event in the ring, and that of the next one to come.
    pub fn range(&self) -> (u64, u64) {
        let ring = self.ring.lock().expect(UNPOISONED);
        // Read under the lock, where it fits the ring.
        let next = *self.next.borrow();
        (ring.first(next), next)
    }

    /// Events from number `from` on, some of them where there are many; none where `from` is the next one to come.
    ///
    /// # Errors
    /// When `from` is no longer in the ring, or later than the next one.
    pub fn read(&self, from: u64) -> Result<Vec<Arc<KvEvent>>, Missed> {
        let ring = self.ring.lock().expect(UNPOISONED);
        let next = *self.next.borrow();
        let first = ring.first(next);
        if !(first..=next).contains(&from) {
            return Err(Missed);
        }
        let skipped = usize::try_from(from - first).expect("no more than the ring has");
        Ok(ring.events.iter().skip(skipped).take(READ_EVENTS_MAX).cloned().collect())
    }

    /// Waits until the event with this number has happened. `false` when none will any more.
    pub async fn reached(&self, seq: u64) -> bool {
        self.next.clone().wait_for(|next| *next > seq).await.is_ok()
    }
}

impl Recorder {
    /// The number that the next event will have.
    pub fn next(&self) -> u64 {
        *self.next.borrow()
    }

    /// Appends what has changed, each run of the same kind as one event.
    pub fn record(&mut self, changes: Vec<CacheChange>) {
        if changes.is_empty() {
            return;
        }
        let is_stored = |change: &CacheChange| matches!(change, CacheChange::Stored(_));
        let hash = |change: &CacheChange| match change {
            CacheChange::Stored(hash) | CacheChange::Removed(hash) => *hash,
        };
        let runs = changes.chunk_by(|a, b| is_stored(a) == is_stored(b)).flat_map(|run| run.chunks(EVENT_HASHES_MAX));
        let mut seq = self.next();
        let events: Vec<_> = runs
            .map(|run| {
                let hashes = run.iter().map(hash).collect();
                let change = if is_stored(&run[0]) { Change::Stored(hashes) } else { Change::Removed(hashes) };
                seq += 1;
                Arc::new(KvEvent { seq: seq - 1, change })
            })
            .collect();
        let mut ring = self.ring.lock().expect(UNPOISONED);
        events.into_iter().for_each(|event| ring.push(event));
        // Under the lock, so that whoever reads the ring finds the number that fits it.
        self.next.send_replace(seq);
    }
}

impl Ring {
    fn first(&self, next: u64) -> u64 {
        self.events.front().map_or(next, |event| event.seq)
    }

    fn push(&mut self, event: Arc<KvEvent>) {
        self.num_hashes += event.num_hashes();
        self.events.push_back(event);
        while self.num_hashes > RING_HASHES_MAX {
            let oldest = self.events.pop_front().expect("hashes are those of events");
            self.num_hashes -= oldest.num_hashes();
        }
    }
}

impl KvEvent {
    fn num_hashes(&self) -> usize {
        match &self.change {
            Change::Stored(hashes) | Change::Removed(hashes) => hashes.len(),
        }
    }
}

const UNPOISONED: &str = "nobody panics while holding the ring";

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(number: usize) -> BlockHash {
        BlockHash((number as u128).to_le_bytes())
    }

    fn stored(numbers: std::ops::Range<usize>) -> Vec<CacheChange> {
        numbers.map(|number| CacheChange::Stored(hash(number))).collect()
    }

    #[test]
    fn changes_of_one_kind_are_one_event_and_the_order_is_kept() {
        let (mut recorder, events) = KvEvents::new();
        assert_eq!((events.range(), events.read(1)), ((1, 1), Ok(Vec::new())));
        let again = [CacheChange::Removed(hash(0)), CacheChange::Stored(hash(0))];
        recorder.record([stored(0..2), again.to_vec()].concat());
        recorder.record(Vec::new());
        let changes: Vec<_> = events.read(1).expect("all is there").iter().map(|event| (**event).clone()).collect();
        assert_eq!(
            changes,
            [
                KvEvent { seq: 1, change: Change::Stored(vec![hash(0), hash(1)]) },
                KvEvent { seq: 2, change: Change::Removed(vec![hash(0)]) },
                KvEvent { seq: 3, change: Change::Stored(vec![hash(0)]) },
            ]
        );
        assert_eq!((events.range(), recorder.next()), ((1, 4), 4));
        assert_eq!(events.read(4), Ok(Vec::new()));
        assert_eq!(events.read(5), Err(Missed), "it has not been given out");
    }

    #[test]
    fn the_ring_forgets_the_oldest_and_says_so() {
        let (mut recorder, events) = KvEvents::new();
        let total = RING_HASHES_MAX + 2 * EVENT_HASHES_MAX;
        recorder.record(stored(0..total));
        let (first, next) = events.range();
        assert_eq!((first, next), (3, 1 + (total / EVENT_HASHES_MAX) as u64));
        assert_eq!(events.read(2), Err(Missed));
        let mut from = first;
        while from < next {
            let read = events.read(from).expect("it is in the ring");
            assert!(read.len() <= READ_EVENTS_MAX && read[0].seq == from);
            from += read.len() as u64;
        }
    }

    #[tokio::test]
    async fn a_follower_hears_of_the_next_event_and_of_the_end() {
        let (mut recorder, events) = KvEvents::new();
        let waiting = tokio::spawn(async move { (events.reached(1).await, events.reached(2).await) });
        recorder.record(stored(0..1));
        drop(recorder);
        assert_eq!(waiting.await.expect("no panic"), (true, false));
    }
}
