//! Follows our worker's `/kv-events` ([`baton_wire::kv_events`]): lines in, changes of the index out, or the verdict that the
//! stream has to be taken up anew.
//!
//! What the index holds stays while a stream is broken: it is hints, mostly still true, and the next snapshot replaces all of
//! it at once. Only another epoch empties it at the first line, because that process has begun with an empty cache.

use crate::prefix::Change;
use baton_wire::Epoch;
use baton_wire::kv_events::{Hello, Line, Query, Snapshot};

/// Why a stream can't be followed further. The next request starts from a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Resync {
    /// Events are missing, or came twice.
    #[error("event {found} came where {expected} was due")]
    Gap {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// A line that may not come here: no greeting, a second one, a snapshot after events, an event within a snapshot.
    #[error("a line came out of order")]
    OutOfOrder,
    /// An event without any state that it could be applied to.
    #[error("events came where a snapshot was due")]
    SnapshotMissing,
}

/// Where a worker's stream stands.
#[derive(Debug, Default)]
pub(crate) struct Follower {
    /// What has been applied: the epoch, and the number of the event that is due next.
    position: Option<Position>,
    phase: Phase,
    block_tokens: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    epoch: Epoch,
    next: u64,
}

/// What may come next on this connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// A greeting.
    #[default]
    Connected,
    /// A snapshot, or events right away.
    Greeted { epoch: Epoch },
    /// The rest of a snapshot.
    InSnapshot { epoch: Epoch, next: u64 },
    /// Events.
    InEvents,
    /// Nothing; what comes was sent before the other side noticed.
    Broken,
}

impl Follower {
    /// A connection begins: what to ask for.
    pub(crate) fn connect(&mut self) -> Query {
        self.phase = Phase::Connected;
        // Event 0 being due means that none was applied, and there is no number to name.
        let after = self.position.and_then(|position| Some((position.next.checked_sub(1)?, position.epoch)));
        Query { after: after.map(|(after, _)| after), epoch: after.map(|(_, epoch)| epoch) }
    }

    /// Tokens of a block, by the last greeting. Hashes of blocks of another size are never found, which is harmless and worth a
    /// warning.
    pub(crate) fn block_tokens(&self) -> Option<u32> {
        self.block_tokens
    }

    /// Whether the index follows the worker: a snapshot or the events since the last one are applied.
    pub(crate) fn is_in_step(&self) -> bool {
        self.phase == Phase::InEvents
    }

    /// Takes the next line.
    ///
    /// # Errors
    /// When the stream does not fit together: the connection is to be closed, and another made later.
    pub(crate) fn line(&mut self, line: Line) -> Result<Option<Change>, Resync> {
        let result = self.step(line);
        if result.is_err() {
            self.position = None;
            self.phase = Phase::Broken;
        }
        result
    }

    fn step(&mut self, line: Line) -> Result<Option<Change>, Resync> {
        match (line, self.phase) {
            (Line::Hello { hello }, Phase::Connected) => Ok(self.hello(hello)),
            (Line::Snapshot { snapshot }, Phase::Greeted { epoch }) => Ok(Some(self.part(epoch, snapshot, true))),
            (Line::Snapshot { snapshot }, Phase::InSnapshot { epoch, next }) => {
                if snapshot.next != next {
                    return Err(Resync::OutOfOrder);
                }
                Ok(Some(self.part(epoch, snapshot, false)))
            }
            (Line::Stored { seq, stored }, Phase::Greeted { .. } | Phase::InEvents) => {
                self.advance(seq)?;
                Ok(Some(Change::Stored(stored)))
            }
            (Line::Removed { seq, removed }, Phase::Greeted { .. } | Phase::InEvents) => {
                self.advance(seq)?;
                Ok(Some(Change::Removed(removed)))
            }
            (Line::Cleared { seq, .. }, Phase::Greeted { .. } | Phase::InEvents) => {
                self.advance(seq)?;
                Ok(Some(Change::Cleared))
            }
            (Line::Next { next }, Phase::Greeted { .. } | Phase::InEvents) => {
                self.expect(next)?;
                self.phase = Phase::InEvents;
                Ok(None)
            }
            (
                _,
                Phase::Connected | Phase::Greeted { .. } | Phase::InSnapshot { .. } | Phase::InEvents | Phase::Broken,
            ) => Err(Resync::OutOfOrder),
        }
    }

    fn hello(&mut self, hello: Hello) -> Option<Change> {
        self.block_tokens = Some(hello.block_tokens);
        self.phase = Phase::Greeted { epoch: hello.epoch };
        let is_another = self.position.is_some_and(|position| position.epoch != hello.epoch);
        if is_another {
            self.position = None;
        }
        is_another.then_some(Change::Cleared)
    }

    fn part(&mut self, epoch: Epoch, snapshot: Snapshot, first: bool) -> Change {
        let Snapshot { blocks, next, more } = snapshot;
        if more {
            self.phase = Phase::InSnapshot { epoch, next };
            // A connection that breaks from here on has no number to go on from: the events between are not known.
            self.position = None;
        } else {
            self.phase = Phase::InEvents;
            self.position = Some(Position { epoch, next });
        }
        Change::Snapshot { blocks, first, last: !more }
    }

    fn expect(&self, found: u64) -> Result<Position, Resync> {
        let position = self.position.ok_or(Resync::SnapshotMissing)?;
        if found != position.next {
            return Err(Resync::Gap { expected: position.next, found });
        }
        Ok(position)
    }

    fn advance(&mut self, seq: u64) -> Result<(), Resync> {
        let position = self.expect(seq)?;
        self.position = Some(Position { next: seq + 1, ..position });
        self.phase = Phase::InEvents;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prefix::{Holder, exact::ExactIndex};
    use baton_wire::BlockHash;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const EPOCH: Epoch = Epoch([1; 16]);
    const OTHER: Epoch = Epoch([2; 16]);

    fn hash(number: u8) -> BlockHash {
        BlockHash([number; 16])
    }

    fn hello(epoch: Epoch) -> Line {
        Line::Hello { hello: Hello { epoch, block_tokens: 32, first: 0, next: 0 } }
    }

    fn part(numbers: &[u8], next: u64, more: bool) -> Line {
        Line::Snapshot { snapshot: Snapshot { blocks: numbers.iter().copied().map(hash).collect(), next, more } }
    }

    fn stored(seq: u64, number: u8) -> Line {
        Line::Stored { seq, stored: vec![hash(number)] }
    }

    fn in_step(next: u64) -> Follower {
        let mut follower = Follower::default();
        assert_eq!(follower.connect(), Query::default());
        assert_eq!(follower.line(hello(EPOCH)), Ok(None));
        follower.line(part(&[], next, false)).expect("a snapshot fits after a greeting");
        follower
    }

    #[test]
    fn a_stream_is_resumed_after_its_last_event() {
        let mut follower = in_step(5);
        assert_eq!(follower.line(stored(5, 1)), Ok(Some(Change::Stored(vec![hash(1)]))));
        assert_eq!(follower.line(Line::Next { next: 6 }), Ok(None));
        let removed = Line::Removed { seq: 6, removed: vec![hash(1)] };
        assert_eq!(follower.line(removed), Ok(Some(Change::Removed(vec![hash(1)]))));
        assert_eq!(follower.line(Line::Cleared { seq: 7, cleared: true }), Ok(Some(Change::Cleared)));
        assert_eq!((follower.is_in_step(), follower.block_tokens()), (true, Some(32)));

        assert_eq!(follower.connect(), Query { after: Some(7), epoch: Some(EPOCH) });
        assert!(!follower.is_in_step());
        assert_eq!(follower.line(hello(EPOCH)), Ok(None));
        assert_eq!(follower.line(stored(8, 2)), Ok(Some(Change::Stored(vec![hash(2)]))));
        assert!(follower.is_in_step());
    }

    #[test]
    fn a_worker_that_was_restarted_is_forgotten_at_its_greeting() {
        let mut follower = in_step(5);
        follower.connect();
        assert_eq!(follower.line(hello(OTHER)), Ok(Some(Change::Cleared)));
        assert_eq!(follower.line(stored(5, 1)), Err(Resync::SnapshotMissing));
        assert_eq!(follower.connect(), Query::default());
    }

    #[test]
    fn what_does_not_fit_ends_the_stream_and_the_next_asks_for_a_snapshot() {
        let check = |before: &[Line], line: Line, expect: Resync| {
            let mut follower = in_step(5);
            before.iter().for_each(|line| {
                follower.line(line.clone()).expect("this much fits");
            });
            assert_eq!(follower.line(line.clone()), Err(expect), "{line:?}");
            assert_eq!(follower.line(stored(5, 1)), Err(Resync::OutOfOrder), "nothing is taken after a break");
            assert_eq!(follower.connect(), Query::default());
        };
        check(&[], stored(6, 1), Resync::Gap { expected: 5, found: 6 });
        check(&[stored(5, 1)], stored(5, 1), Resync::Gap { expected: 6, found: 5 });
        check(&[], Line::Next { next: 7 }, Resync::Gap { expected: 5, found: 7 });
        check(&[], hello(EPOCH), Resync::OutOfOrder);
        check(&[], part(&[], 5, false), Resync::OutOfOrder);
    }

    #[test]
    fn nothing_comes_between_the_parts_of_a_snapshot() {
        let check = |line: Line| {
            let mut follower = Follower::default();
            follower.connect();
            follower.line(hello(EPOCH)).expect("a greeting");
            follower.line(part(&[1], 5, true)).expect("a part");
            assert_eq!(follower.line(line.clone()), Err(Resync::OutOfOrder), "{line:?}");
        };
        check(stored(5, 1));
        check(Line::Next { next: 5 });
        check(part(&[2], 6, true));
        check(hello(EPOCH));
    }

    #[test]
    fn a_snapshot_that_was_cut_is_asked_for_again() {
        let mut follower = in_step(5);
        follower.connect();
        follower.line(hello(EPOCH)).expect("a greeting");
        follower.line(part(&[1], 9, true)).expect("a part");
        assert_eq!(follower.connect(), Query::default());
        follower.line(hello(EPOCH)).expect("a greeting");
        let first = follower.line(part(&[2], 9, true)).expect("a part");
        assert_eq!(first, Some(Change::Snapshot { blocks: vec![hash(2)], first: true, last: false }));
        let last = follower.line(part(&[3], 9, false)).expect("a part");
        assert_eq!(last, Some(Change::Snapshot { blocks: vec![hash(3)], first: false, last: true }));
        assert_eq!(follower.connect(), Query { after: Some(8), epoch: Some(EPOCH) });
    }

    #[test]
    fn a_fresh_worker_without_events_has_no_number_to_resume_from() {
        assert_eq!(in_step(0).connect(), Query::default());
    }

    /// A worker as the contract describes it.
    #[derive(Default)]
    struct Worker {
        held: BTreeSet<u8>,
        ring: Vec<Line>,
        first: u64,
    }

    impl Worker {
        fn next(&self) -> u64 {
            self.first + self.ring.len() as u64
        }

        fn happens(&mut self, number: u8) -> Line {
            let seq = self.next();
            let event = match number {
                0 => {
                    self.held.clear();
                    Line::Cleared { seq, cleared: true }
                }
                number if self.held.remove(&(number / 2)) => Line::Removed { seq, removed: vec![hash(number / 2)] },
                number => {
                    self.held.insert(number / 2);
                    stored(seq, number / 2)
                }
            };
            self.ring.push(event.clone());
            if self.ring.len() > 4 {
                self.ring.remove(0);
                self.first += 1;
            }
            event
        }

        fn answer(&self, query: Query) -> Vec<Line> {
            let hello = Hello { epoch: EPOCH, block_tokens: 32, first: self.first, next: self.next() };
            let mut lines = vec![Line::Hello { hello }];
            match query.after.filter(|after| (self.first..=self.next()).contains(&(after + 1))) {
                Some(after) => lines.extend(self.ring[(after + 1 - self.first) as usize..].iter().cloned()),
                None => {
                    let held: Vec<u8> = self.held.iter().copied().collect();
                    let parts: Vec<&[u8]> = if held.is_empty() { vec![&[]] } else { held.chunks(2).collect() };
                    let last = parts.len() - 1;
                    lines.extend(parts.iter().enumerate().map(|(index, held)| part(held, self.next(), index < last)));
                }
            }
            lines
        }
    }

    proptest! {
        #[test]
        fn the_index_ends_where_the_worker_is_whatever_breaks_or_is_lost(
            steps in prop::collection::vec((0u8..9, 0u8..12), 0..120),
        ) {
            let (mut worker, mut follower, mut index) = (Worker::default(), Follower::default(), ExactIndex::default());
            let holder = Holder { worker: 0, dp_rank: 0 };
            let mut apply = |follower: &mut Follower, line: Line| match follower.line(line) {
                Ok(change) => {
                    change.iter().for_each(|change| index.apply(holder, change));
                    true
                }
                Err(_) => false,
            };
            let mut is_connected = false;
            for (number, mishap) in steps {
                let event = worker.happens(number);
                match mishap {
                    // An event is lost.
                    0 => {}
                    // The connection breaks, at once or within its first lines.
                    1 | 2 => {
                        let lines = worker.answer(follower.connect());
                        let cut = if mishap == 1 { lines.len() } else { lines.len() / 2 };
                        is_connected = mishap == 1;
                        for line in lines.into_iter().take(cut) {
                            prop_assert!(apply(&mut follower, line), "an answer to the follower's own query fits");
                        }
                    }
                    _ => is_connected = is_connected && apply(&mut follower, event),
                }
            }
            for line in worker.answer(follower.connect()) {
                prop_assert!(apply(&mut follower, line));
            }
            for number in 0..5 {
                let is_found = !index.leading(&[hash(number)]).is_empty();
                prop_assert_eq!(is_found, worker.held.contains(&number), "block {}", number);
            }
        }
    }
}
