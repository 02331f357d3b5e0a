//! The ledger of KV that prefill workers hold for this proxy: what is held where, since when, until when, and how it ended.
//!
//! It knows no protocol and frees nothing. Each hold is a guard that has to be told its end; one that is dropped without is
//! a leak, which is counted and must never happen. The number of holds is bounded by the requests in flight, each of which
//! holds at most once, so the ledger refuses nothing: a hold that it did not know of would be one that nobody looks for.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::time::Instant;

/// The ledger. Clones are the same ledger.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    slots: Mutex<Slots>,
    begun: AtomicU64,
    ended: [AtomicU64; End::ALL.len()],
}

/// How a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// A decode worker that answered took it.
    Consumed,
    /// It was given back by a release request.
    Released,
    /// The prefill worker freed it by itself when its lease ended.
    Expired,
    /// Its guard was dropped without an end: a bug of ours.
    Leaked,
}

impl End {
    pub(crate) const ALL: [End; 4] = [End::Consumed, End::Released, End::Expired, End::Leaked];

    /// The end as a metric's label spells it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            End::Consumed => "consumed",
            End::Released => "released",
            End::Expired => "expired",
            End::Leaked => "leaked",
        }
    }
}

/// The entries by index, with a list of those that are free: taking, ending and adding take the same time at any size.
#[derive(Debug, Default)]
struct Slots {
    entries: Vec<Option<Entry>>,
    free: Vec<usize>,
}

#[derive(Debug)]
struct Entry {
    worker: Arc<str>,
    tenant: Arc<str>,
    prompt_tokens: u64,
    since: Instant,
    deadline: Instant,
}

/// KV that a prefill worker holds. It has to be told how it ends.
#[derive(Debug)]
#[must_use = "a hold that is dropped counts as leaked"]
pub(crate) struct Hold {
    ledger: Ledger,
    index: usize,
    id: u64,
    end: End,
}

impl Hold {
    /// Its number: no other hold of this ledger has or had it.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// A decode worker that answered took it.
    pub(crate) fn consumed(mut self) {
        self.end = End::Consumed;
    }

    /// It was given back.
    pub(crate) fn released(mut self) {
        self.end = End::Released;
    }

    /// Its lease ended first.
    pub(crate) fn expired(mut self) {
        self.end = End::Expired;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut slots = self.ledger.slots();
        slots.entries[self.index] = None;
        slots.free.push(self.index);
        drop(slots);
        self.ledger.0.ended[self.end as usize].fetch_add(1, Ordering::Relaxed);
        if self.end == End::Leaked {
            tracing::error!(hold = self.id, "KV that a prefill worker holds was left without an end");
        }
    }
}

/// The ledger at one moment, for the debug page and the metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Snapshot {
    pub(crate) held: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) oldest_age_ms: Option<u64>,
    /// Until the first lease ends; negative where it should have.
    pub(crate) next_lease_end_ms: Option<i64>,
    pub(crate) by_worker: BTreeMap<String, Held>,
    pub(crate) by_tenant: BTreeMap<String, u64>,
    pub(crate) begun: u64,
    pub(crate) consumed: u64,
    pub(crate) released: u64,
    pub(crate) expired: u64,
    pub(crate) leaked: u64,
}

/// What one worker holds.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Held {
    pub(crate) held: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) oldest_age_ms: u64,
    /// Until the first lease ends; negative where it should have.
    pub(crate) next_lease_end_ms: i64,
}

impl Ledger {
    /// Enters that a worker holds the KV of a prompt until `deadline`, unless somebody takes it.
    pub(crate) fn hold(
        &self,
        worker: Arc<str>,
        tenant: Arc<str>,
        prompt_tokens: u64,
        deadline: Instant,
        now: Instant,
    ) -> Hold {
        let id = self.0.begun.fetch_add(1, Ordering::Relaxed);
        let entry = Some(Entry { worker, tenant, prompt_tokens, since: now, deadline });
        let mut slots = self.slots();
        let index = if let Some(index) = slots.free.pop() {
            slots.entries[index] = entry;
            index
        } else {
            slots.entries.push(entry);
            slots.entries.len() - 1
        };
        drop(slots);
        Hold { ledger: self.clone(), index, id, end: End::Leaked }
    }

    /// How many holds ended so.
    pub(crate) fn ended(&self, end: End) -> u64 {
        self.0.ended[end as usize].load(Ordering::Relaxed)
    }

    /// How many holds there are.
    #[cfg(test)]
    pub(crate) fn held(&self) -> u64 {
        let slots = self.slots();
        (slots.entries.len() - slots.free.len()) as u64
    }

    /// The ledger now. Walks over all holds: for a page, not for each request.
    pub(crate) fn snapshot(&self, now: Instant) -> Snapshot {
        let mut snapshot = Snapshot {
            begun: self.0.begun.load(Ordering::Relaxed),
            consumed: self.ended(End::Consumed),
            released: self.ended(End::Released),
            expired: self.ended(End::Expired),
            leaked: self.ended(End::Leaked),
            ..Snapshot::default()
        };
        let slots = self.slots();
        for entry in slots.entries.iter().flatten() {
            let age_ms = millis(now.saturating_duration_since(entry.since));
            let ahead = i64::try_from(millis(entry.deadline.saturating_duration_since(now))).unwrap_or(i64::MAX);
            let behind = i64::try_from(millis(now.saturating_duration_since(entry.deadline))).unwrap_or(i64::MAX);
            let lease_end_ms = ahead - behind;
            snapshot.held += 1;
            snapshot.prompt_tokens += entry.prompt_tokens;
            snapshot.oldest_age_ms = snapshot.oldest_age_ms.max(Some(age_ms));
            snapshot.next_lease_end_ms =
                Some(snapshot.next_lease_end_ms.map_or(lease_end_ms, |next| next.min(lease_end_ms)));
            *snapshot.by_tenant.entry(entry.tenant.to_string()).or_default() += 1;
            let held = snapshot.by_worker.entry(entry.worker.to_string()).or_insert(Held {
                held: 0,
                prompt_tokens: 0,
                oldest_age_ms: 0,
                next_lease_end_ms: lease_end_ms,
            });
            held.held += 1;
            held.prompt_tokens += entry.prompt_tokens;
            held.oldest_age_ms = held.oldest_age_ms.max(age_ms);
            held.next_lease_end_ms = held.next_lease_end_ms.min(lease_end_ms);
        }
        snapshot
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.0.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn hold(ledger: &Ledger, worker: &str, prompt_tokens: u64, now: Instant) -> Hold {
        ledger.hold(worker.into(), "tenant".into(), prompt_tokens, now + Duration::from_secs(30), now)
    }

    #[test]
    fn a_hold_is_counted_by_how_it_ends() {
        let (ledger, now) = (Ledger::default(), Instant::now());
        hold(&ledger, "a", 1, now).consumed();
        hold(&ledger, "a", 1, now).released();
        hold(&ledger, "a", 1, now).expired();
        assert_eq!(End::ALL.map(|end| ledger.ended(end)), [1, 1, 1, 0]);
        assert_eq!(ledger.held(), 0);
    }

    #[test]
    fn a_hold_without_an_end_is_a_leak() {
        let (ledger, now) = (Ledger::default(), Instant::now());
        drop(hold(&ledger, "a", 1, now));
        assert_eq!((ledger.ended(End::Leaked), ledger.held()), (1, 0));
    }

    #[test]
    fn the_snapshot_says_what_is_held_where_and_for_how_long() {
        let (ledger, now) = (Ledger::default(), Instant::now());
        let holds = [
            hold(&ledger, "a", 10, now),
            hold(&ledger, "b", 20, now + Duration::from_secs(5)),
            hold(&ledger, "a", 30, now + Duration::from_secs(10)),
        ];
        let snapshot = ledger.snapshot(now + Duration::from_secs(31));
        assert_eq!((snapshot.held, snapshot.prompt_tokens, snapshot.begun), (3, 60, 3));
        assert_eq!((snapshot.oldest_age_ms, snapshot.next_lease_end_ms), (Some(31_000), Some(-1_000)));
        let a = Held { held: 2, prompt_tokens: 40, oldest_age_ms: 31_000, next_lease_end_ms: -1_000 };
        let b = Held { held: 1, prompt_tokens: 20, oldest_age_ms: 26_000, next_lease_end_ms: 4_000 };
        assert_eq!(snapshot.by_worker, BTreeMap::from([("a".to_owned(), a), ("b".to_owned(), b)]));
        assert_eq!(snapshot.by_tenant, BTreeMap::from([("tenant".to_owned(), 3)]));
        holds.into_iter().for_each(Hold::released);
        let after = Snapshot { begun: 3, released: 3, ..Snapshot::default() };
        assert_eq!(ledger.snapshot(now), after);
    }

    #[test]
    fn threads_share_one_ledger() {
        let ledger = Ledger::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|_| hold(&ledger, "a", 1, Instant::now()).consumed()));
            }
        });
        assert_eq!((ledger.ended(End::Consumed), ledger.ended(End::Leaked), ledger.held()), (2_000, 0, 0));
        assert!(ledger.slots().entries.len() <= 4, "slots are used again");
    }

    proptest! {
        #[test]
        fn the_ledger_holds_what_was_begun_and_not_ended(steps in prop::collection::vec((0_u8..4, 0_usize..8), 0..200)) {
            let (ledger, now) = (Ledger::default(), Instant::now());
            let mut open: Vec<Hold> = Vec::new();
            let mut expect = [0_u64; 4];
            let mut ids = std::collections::HashSet::new();
            for (kind, index) in steps {
                if kind == 0 || index >= open.len() {
                    open.push(hold(&ledger, "a", 1, now));
                    prop_assert!(ids.insert(open[open.len() - 1].id()));
                    continue;
                }
                let hold = open.swap_remove(index);
                match kind {
                    1 => hold.consumed(),
                    2 => hold.released(),
                    _ => hold.expired(),
                }
                expect[usize::from(kind) - 1] += 1;
                prop_assert_eq!(ledger.held(), open.len() as u64);
            }
            prop_assert_eq!(End::ALL.map(|end| ledger.ended(end)), expect);
            open.into_iter().for_each(Hold::expired);
            prop_assert_eq!(ledger.held(), 0);
        }
    }
}
