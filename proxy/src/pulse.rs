//! How evenly the streams of one worker come, sampled by one of them: from it is known how long the others stood still while the worker
//! computed a prompt for its own decode. Pure; times come in.
//!
//! One stream is enough, because an engine's running sequences make their steps together: what holds one up holds up all. It costs a
//! lock that nobody else wants and a subtraction for each of its pieces, and nothing for all other streams.
//!
//! A prompt that is computed in one piece shows as one long gap; one that is computed in chunks between the steps of the others shows
//! as many gaps that are each a little longer. So what is measured is neither the longest gap nor a sum of what is above the usual, which
//! jitter alone would make grow, but by how much later the stream came than at its usual pace.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Gaps of which the usual one is the median: a second of a stream, and few enough to be sorted in a microsecond.
const GAPS_KEPT: usize = 16;

/// Gaps from which on a usual one is known: with eight, three may be odd.
const GAPS_MIN: usize = 8;

/// The streams of one worker.
#[derive(Debug, Default)]
pub(crate) struct Pulse(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The stream that is sampled, by its number; numbers begin at 1.
    sampled: Option<u64>,
    last_number: u64,
    /// The data-parallel rank on which it runs.
    rank: Option<u32>,
    last_piece: Option<Instant>,
    pieces: u64,
    /// The last gaps while no prompt was computed, in no order.
    gaps: Vec<Duration>,
    next_gap: usize,
    /// Prompts that are being computed, as far as they are watched.
    watches: u32,
    watches_begun: u64,
}

impl Pulse {
    /// For a stream that begins: whether it is the one that is sampled, which it stays until this is dropped.
    pub(crate) fn sample(self: &Arc<Self>, rank: Option<u32>) -> Option<Sampled> {
        let mut state = self.lock();
        if state.sampled.is_some() {
            return None;
        }
        let number = state.last_number + 1;
        let State { watches, watches_begun, .. } = *state;
        *state = State { sampled: Some(number), last_number: number, rank, watches, watches_begun, ..State::default() };
        Some(Sampled { pulse: Arc::clone(self) })
    }

    /// A prompt is going to be computed there: dropped or ended when it is.
    pub(crate) fn watch(self: &Arc<Self>, rank: Option<u32>, now: Instant) -> Watch {
        let mut state = self.lock();
        let is_alone = state.watches == 0;
        // One that is late already is held up by something else: a client that does not read, or an engine that holds text back.
        let is_in_time = |begin: &Begin| now.saturating_duration_since(begin.last_piece) <= 2 * begin.usual;
        let begin = state.begin().filter(|begin| is_alone && state.rank == rank && is_in_time(begin));
        state.watches += 1;
        state.watches_begun += 1;
        Watch { begin, number: state.watches_begun, pulse: Arc::clone(self) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Numbers that are only estimated from: what a panic left half done makes one of them wrong.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn begin(&self) -> Option<Begin> {
        Some(Begin {
            stream: self.sampled?,
            last_piece: self.last_piece?,
            pieces: self.pieces,
            usual: usual(&self.gaps)?,
        })
    }

    fn piece(&mut self, now: Instant) {
        if let Some(last) = self.last_piece.filter(|_| self.watches == 0) {
            let gap = now.saturating_duration_since(last);
            match self.gaps.get_mut(self.next_gap) {
                Some(oldest) => *oldest = gap,
                None => self.gaps.push(gap),
            }
            self.next_gap = (self.next_gap + 1) % GAPS_KEPT;
        }
        self.last_piece = Some(now);
        self.pieces += 1;
    }
}

/// The lower of the middle two, once there are enough.
fn usual(gaps: &[Duration]) -> Option<Duration> {
    let mut gaps = gaps.to_vec();
    gaps.sort_unstable();
    gaps.get((gaps.len().max(1) - 1) / 2).copied().filter(|_| gaps.len() >= GAPS_MIN)
}

/// The stream that is sampled.
#[derive(Debug)]
pub(crate) struct Sampled {
    pulse: Arc<Pulse>,
}

impl Sampled {
    /// A piece of it has come.
    pub(crate) fn piece(&self, now: Instant) {
        self.pulse.lock().piece(now);
    }
}

impl Drop for Sampled {
    fn drop(&mut self) {
        self.pulse.lock().sampled = None;
    }
}

/// Where the sampled stream was when a prompt began.
#[derive(Clone, Copy, Debug)]
struct Begin {
    stream: u64,
    last_piece: Instant,
    pieces: u64,
    usual: Duration,
}

/// A prompt that a worker computes beside its streams.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Nothing where no stream could be watched, or another prompt was being computed: whose doing a standstill is can't be told then.
    begin: Option<Begin>,
    number: u64,
    pulse: Arc<Pulse>,
}

impl Watch {
    /// The prompt is computed. How long the sampled stream stood still for it, where one was there from before its beginning until now
    /// and no other prompt came in between.
    pub(crate) fn end(self, now: Instant) -> Option<Duration> {
        let begin = self.begin?;
        let state = self.pulse.lock();
        if state.sampled != Some(begin.stream) || state.watches_begun != self.number {
            return None;
        }
        let last_piece = state.last_piece?;
        let pieces = u32::try_from(state.pieces - begin.pieces).ok()?;
        let due = begin.usual.checked_mul(pieces)?;
        // The piece that is due has its usual time before it is late.
        let late = now.saturating_duration_since(last_piece).saturating_sub(begin.usual);
        let took = last_piece.saturating_duration_since(begin.last_piece);
        Some((took + late).saturating_sub(due))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.pulse.lock().watches -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STEP: Duration = Duration::from_millis(10);

    /// A worker whose sampled stream has come every ten milliseconds, and the time of its last piece.
    fn steady() -> (Arc<Pulse>, Sampled, Instant) {
        let pulse = Arc::new(Pulse::default());
        let sampled = pulse.sample(None).expect("nobody else");
        let mut now = Instant::now();
        for _ in 0..20 {
            now += STEP;
            sampled.piece(now);
        }
        (pulse, sampled, now)
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_prompt_in_one_piece_is_one_long_gap() {
        let (pulse, sampled, now) = steady();
        let watch = pulse.watch(None, now);
        sampled.piece(now + ms(110));
        assert_eq!(watch.end(now + ms(111)), Some(ms(100)));
    }

    #[test]
    fn a_stream_that_has_not_come_back_yet_has_stood_still_until_now() {
        let (pulse, _sampled, now) = steady();
        assert_eq!(pulse.watch(None, now).end(now + ms(75)), Some(ms(65)));
        assert_eq!(pulse.watch(None, now).end(now + ms(7)), Some(ms(0)), "it is not late yet");
    }

    #[test]
    fn a_prompt_in_chunks_is_many_gaps_that_are_a_little_longer() {
        let (pulse, sampled, mut now) = steady();
        let watch = pulse.watch(None, now);
        for _ in 0..5 {
            now += ms(30);
            sampled.piece(now);
        }
        assert_eq!(watch.end(now), Some(ms(100)));
    }

    #[test]
    fn a_worker_that_is_not_disturbed_costs_its_streams_nothing_however_much_they_jitter() {
        let (pulse, sampled, mut now) = steady();
        let watch = pulse.watch(None, now);
        for round in 0..100 {
            now += if round % 2 == 0 { ms(4) } else { ms(16) };
            sampled.piece(now);
        }
        assert_eq!(watch.end(now), Some(ms(0)));
    }

    #[test]
    fn gaps_while_a_prompt_is_computed_are_not_usual() {
        let (pulse, sampled, mut now) = steady();
        let watch = pulse.watch(None, now);
        for _ in 0..50 {
            now += ms(90);
            sampled.piece(now);
        }
        drop(watch);
        sampled.piece(now + ms(10));
        assert_eq!(pulse.watch(None, now).end(now + ms(70)), Some(ms(50)));
    }

    #[test]
    fn nothing_is_said_where_it_cannot_be_told() {
        let (pulse, sampled, now) = steady();
        assert_eq!(pulse.watch(Some(1), now).end(now + ms(90)), None, "the stream runs on another rank");
        let (first, second) = (pulse.watch(None, now), pulse.watch(None, now));
        assert_eq!((first.end(now + ms(90)), second.end(now + ms(90))), (None, None), "two prompts at once");
        let watch = pulse.watch(None, now);
        drop(pulse.watch(None, now));
        assert_eq!(watch.end(now + ms(90)), None, "another one came and went");
        let watch = pulse.watch(None, now);
        drop(sampled);
        assert_eq!(watch.end(now + ms(90)), None, "the stream has ended");
        let another = pulse.sample(None).expect("the place is free");
        another.piece(now);
        assert_eq!(pulse.watch(None, now).end(now + ms(90)), None, "its usual pace is not known");
        assert_eq!(Arc::new(Pulse::default()).watch(None, now).end(now), None, "there is no stream");
    }

    #[test]
    fn a_stream_that_takes_over_is_not_taken_for_the_one_before() {
        let (pulse, sampled, now) = steady();
        let watch = pulse.watch(None, now);
        drop(sampled);
        let next = pulse.sample(None).expect("the place is free");
        next.piece(now + ms(50));
        assert_eq!(watch.end(now + ms(60)), None);
    }

    #[test]
    fn one_stream_at_a_time_is_sampled() {
        let pulse = Arc::new(Pulse::default());
        let first = pulse.sample(None);
        assert!(first.is_some() && pulse.sample(None).is_none());
        drop(first);
        assert!(pulse.sample(None).is_some());
    }

    #[test]
    fn a_stream_that_is_late_already_is_not_held_against_the_prompt() {
        let (pulse, sampled, now) = steady();
        assert!(pulse.watch(None, now + 2 * STEP).end(now + ms(100)).is_some());
        // A client that has not read for five seconds, and one that goes on again.
        let long_after = now + ms(5000);
        assert_eq!(pulse.watch(None, long_after).end(long_after + ms(100)), None);
        sampled.piece(long_after);
        assert!(pulse.watch(None, long_after).end(long_after + ms(100)).is_some());
    }

    proptest! {
        #[test]
        fn nobody_stands_still_for_longer_than_the_prompt_took_and_one_gap(gaps in prop::collection::vec(0u64..200, 0..40), rest in 0u64..200) {
            let (pulse, sampled, begun) = steady();
            let watch = pulse.watch(None, begun);
            let mut now = begun;
            for gap in gaps {
                now += ms(gap);
                sampled.piece(now);
            }
            now += ms(rest);
            let still = watch.end(now).expect("one stream, one prompt");
            prop_assert!(still <= now - begun);
        }
    }
}
