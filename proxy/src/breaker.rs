//! A circuit breaker for one leg of one worker: whether requests may go there, by how the last ones went. Pure: time and
//! chance are arguments, and the caller keeps it behind its own lock.
//!
//! ```text
//! Closed --too many failures--> Open --pause over--> Half-open (one trial at a time) --success--> Closed
//!                                ^                        |
//!                                +---- a longer pause ----+ failure
//! ```
//!
//! It is fed by outcomes that say something of the worker; an error of the client's (4xx) is a [`Outcome::Success`], and a
//! client that left is [`Outcome::NoVerdict`]. Two things open it, because each misses what the other sees:
//! * Failures in a row: a worker that has died fails all at once, and five requests say so, long before a window is full.
//! * The share of failures among recent outcomes: a worker that fails every second request hardly ever fails many in a row
//!   (five: 1 time in 32), and would never be caught by counting those. It needs a least number of outcomes, or the first
//!   failure of a quiet worker would be a share of 100 %.
//!
//! Every worker open is no reason to answer nobody: see [`may_try`].

use std::time::Duration;
use tokio::time::Instant;

/// Outcomes that are remembered: the bits of one word. More would make a worker that got well pay longer for its past.
const WINDOW: u32 = u64::BITS;

/// After so long without an outcome the older ones say nothing about now.
const OUTCOMES_AGE_MAX: Duration = Duration::from_secs(60);

/// A trial without an outcome for so long does not keep others from trying: the longest a first token is waited for.
const TRIAL_MAX: Duration = Duration::from_secs(60);

/// The part of a pause that chance decides, so that many proxies don't try a worker at the same moment.
const JITTER: f64 = 0.2;

/// When a breaker opens and for how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Settings {
    /// So many failures in a row open it.
    pub(crate) failures_in_a_row: u32,
    /// So many outcomes at least are needed for a share; at most 64 are looked at.
    pub(crate) outcomes_min: u32,
    /// So many failures in a hundred open it.
    pub(crate) failure_percent: u32,
    /// The first pause.
    pub(crate) pause_first: Duration,
    /// Each pause is twice the one before, up to this.
    pub(crate) pause_max: Duration,
}

impl Default for Settings {
    /// Five in a row: by chance 1 time in 100,000 where a tenth fails. Half of 20: a worker of which every second request
    /// fails costs more than it gives. A second is less than a client's retry takes, 30 s about what a worker takes to start.
    fn default() -> Self {
        Settings {
            failures_in_a_row: 5,
            outcomes_min: 20,
            failure_percent: 50,
            pause_first: Duration::from_secs(1),
            pause_max: Duration::from_secs(30),
        }
    }
}

/// What a request says of its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It works, an error of the client's included.
    Success,
    /// Refused, broken off, 5xx, too late.
    Failure,
    /// The request ended for reasons of its own.
    NoVerdict,
}

/// What a breaker is now, as a metric and the debug page say it.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Condition {
    Closed,
    Open,
    HalfOpen,
}

/// What an outcome changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Opened { pause: Duration },
    Closed,
}

/// A request that goes to the worker. Its outcome counts only if the breaker has not changed since: what was sent before a
/// worker got well says nothing of it now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a trial without an outcome keeps others from trying"]
pub(crate) struct Attempt {
    period: u64,
    trial: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Closed {
        since: Instant,
    },
    Open {
        since: Instant,
        until: Instant,
    },
    HalfOpen {
        opened: Instant,
        /// When the trial that is under way began.
        trial: Option<Instant>,
    },
}

/// The breaker.
#[derive(Clone, Debug)]
pub(crate) struct Breaker {
    settings: Settings,
    state: State,
    /// Counts the changes of state.
    period: u64,
    /// Counts the trials.
    trials: u64,
    /// One bit an outcome, the newest lowest; 1 is a failure.
    outcomes: u64,
    outcomes_count: u32,
    in_a_row: u32,
    last_outcome: Instant,
    /// Pauses without a stretch of health between them, and the last one.
    pauses: u32,
    pause: Duration,
}

impl Breaker {
    /// A closed breaker.
    pub(crate) fn new(settings: Settings, now: Instant) -> Self {
        Breaker {
            settings,
            state: State::Closed { since: now },
            period: 0,
            trials: 0,
            outcomes: 0,
            outcomes_count: 0,
            in_a_row: 0,
            last_outcome: now,
            pauses: 0,
            pause: Duration::ZERO,
        }
    }

    /// Whether a request may go to the worker. Changes nothing, so it may be asked of every candidate.
    pub(crate) fn may_try(&self, now: Instant) -> bool {
        match self.state {
            State::Closed { .. } => true,
            State::Open { until, .. } => now >= until,
            State::HalfOpen { trial: None, .. } => true,
            State::HalfOpen { trial: Some(began), .. } => now >= began + TRIAL_MAX,
        }
    }

    /// A request goes to the worker: after a pause it is the trial. It may also go there while the breaker is open, where
    /// all are ([`may_try`]).
    pub(crate) fn begin(&mut self, now: Instant) -> Attempt {
        let trial = match self.state {
            State::Closed { .. } => None,
            State::Open { since, .. } => {
                self.change(State::HalfOpen { opened: since, trial: Some(now) });
                Some(self.next_trial())
            }
            // A second one at once where all are open. The verdict of each counts: if only the newest did, a busy proxy would
            // always begin another before it has one.
            State::HalfOpen { opened, .. } => {
                self.state = State::HalfOpen { opened, trial: Some(now) };
                Some(self.next_trial())
            }
        };
        Attempt { period: self.period, trial }
    }

    /// A request has ended. `draw` is evenly distributed.
    pub(crate) fn end(&mut self, attempt: Attempt, outcome: Outcome, now: Instant, draw: u64) -> Option<Change> {
        if attempt.period != self.period {
            return None;
        }
        match (self.state, outcome) {
            (State::Closed { .. }, Outcome::NoVerdict) | (State::Open { .. }, _) => None,
            (State::Closed { since }, Outcome::Success | Outcome::Failure) => {
                self.remember(outcome, now);
                self.is_too_much().then(|| {
                    // A worker that was well for longer than it was last left alone begins anew.
                    if now.saturating_duration_since(since) > self.pause {
                        self.pauses = 0;
                    }
                    self.open(now, draw)
                })
            }
            (State::HalfOpen { opened, .. }, Outcome::NoVerdict) => {
                if attempt.trial == Some(self.trials) {
                    self.state = State::HalfOpen { opened, trial: None };
                }
                None
            }
            (State::HalfOpen { .. }, Outcome::Failure) => Some(self.open(now, draw)),
            (State::HalfOpen { .. }, Outcome::Success) => {
                self.change(State::Closed { since: now });
                self.forget(now);
                Some(Change::Closed)
            }
        }
    }

    /// What it is now.
    #[cfg(test)]
    pub(crate) fn condition(&self, now: Instant) -> Condition {
        match self.state {
            State::Closed { .. } => Condition::Closed,
            State::Open { until, .. } if now < until => Condition::Open,
            State::Open { .. } | State::HalfOpen { .. } => Condition::HalfOpen,
        }
    }

    /// Since when requests are kept away.
    fn opened(&self) -> Option<Instant> {
        match self.state {
            State::Closed { .. } => None,
            State::Open { since, .. } | State::HalfOpen { opened: since, .. } => Some(since),
        }
    }

    fn remember(&mut self, outcome: Outcome, now: Instant) {
        if now.saturating_duration_since(self.last_outcome) > OUTCOMES_AGE_MAX {
            self.forget(now);
        }
        let failed = outcome == Outcome::Failure;
        self.outcomes = self.outcomes << 1 | u64::from(failed);
        self.outcomes_count = (self.outcomes_count + 1).min(WINDOW);
        self.in_a_row = if failed { self.in_a_row.saturating_add(1) } else { 0 };
        self.last_outcome = now;
    }

    /// Only a failure opens: the outcome that fills the window may be a success, and closing the door behind it would punish
    /// the worker for getting well.
    fn is_too_much(&self) -> bool {
        let failures = self.outcomes.count_ones();
        let share =
            u64::from(failures) * 100 >= u64::from(self.settings.failure_percent) * u64::from(self.outcomes_count);
        let enough = self.outcomes_count >= self.settings.outcomes_min.clamp(1, WINDOW);
        self.in_a_row >= self.settings.failures_in_a_row.max(1) || (self.in_a_row > 0 && enough && share)
    }

    fn open(&mut self, now: Instant, draw: u64) -> Change {
        let doubled = self.settings.pause_first.saturating_mul(1_u32.checked_shl(self.pauses).unwrap_or(u32::MAX));
        self.pause = doubled.min(self.settings.pause_max);
        self.pauses = self.pauses.saturating_add(1).min(u32::BITS - 1);
        // 53 bits are what a f64 holds exactly: evenly distributed from 0 to 1.
        let chance = (draw >> 11) as f64 / (1_u64 << 53) as f64;
        let pause = self.pause.mul_f64(1.0 + JITTER * (2.0 * chance - 1.0));
        self.change(State::Open { since: now, until: now + pause });
        self.forget(now);
        Change::Opened { pause }
    }

    fn change(&mut self, state: State) {
        self.state = state;
        self.period += 1;
    }

    fn next_trial(&mut self) -> u64 {
        self.trials += 1;
        self.trials
    }

    fn forget(&mut self, now: Instant) {
        self.outcomes = 0;
        self.outcomes_count = 0;
        self.in_a_row = 0;
        self.last_outcome = now;
    }
}

/// The indices of those that may be tried. Where none may, the one that was opened longest ago: when everything seems
/// broken, the fault may as well be ours or the network's, and one worker that is asked finds out. Never empty, unless
/// `breakers` is.
pub(crate) fn may_try<'a>(breakers: impl IntoIterator<Item = &'a Breaker>, now: Instant) -> Vec<usize> {
    let mut open: Option<(Instant, usize)> = None;
    let mut tried = Vec::new();
    for (index, breaker) in breakers.into_iter().enumerate() {
        match breaker.opened() {
            _ if breaker.may_try(now) => tried.push(index),
            Some(opened) => open = Some(open.map_or((opened, index), |least| least.min((opened, index)))),
            None => {}
        }
    }
    if tried.is_empty() {
        tried.extend(open.map(|(_, index)| index));
    }
    tried
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// In the middle: a pause as it is written.
    const EVEN: u64 = 1 << 63;
    const SECOND: Duration = Duration::from_secs(1);

    fn breaker() -> (Breaker, Instant) {
        let now = Instant::now();
        (Breaker::new(Settings::default(), now), now)
    }

    fn request(breaker: &mut Breaker, outcome: Outcome, now: Instant) -> Option<Change> {
        let attempt = breaker.begin(now);
        breaker.end(attempt, outcome, now, EVEN)
    }

    fn fail(breaker: &mut Breaker, times: u32, now: Instant) -> Option<Change> {
        (0..times).fold(None, |_, _| request(breaker, Outcome::Failure, now))
    }

    #[test]
    fn failures_in_a_row_open_it() {
        let (mut breaker, now) = breaker();
        assert_eq!(fail(&mut breaker, 4, now), None);
        assert_eq!(request(&mut breaker, Outcome::Success, now), None);
        assert_eq!(fail(&mut breaker, 4, now), None);
        assert_eq!(request(&mut breaker, Outcome::NoVerdict, now), None);
        assert_eq!(request(&mut breaker, Outcome::Failure, now), Some(Change::Opened { pause: SECOND }));
        assert!(!breaker.may_try(now + SECOND / 2));
        assert_eq!(breaker.condition(now), Condition::Open);
    }

    #[test]
    fn a_share_of_failures_opens_it_that_never_come_in_a_row() {
        let (mut breaker, now) = breaker();
        let mut outcomes = [Outcome::Success, Outcome::Failure].into_iter().cycle();
        let opened_at = (1..100).find(|_| {
            let outcome = outcomes.next().expect("endless");
            request(&mut breaker, outcome, now).is_some()
        });
        assert_eq!(opened_at, Some(20));
    }

    #[test]
    fn a_tenth_of_failures_never_opens_it() {
        let (mut breaker, now) = breaker();
        for index in 0..1_000 {
            let outcome = if index % 10 == 0 { Outcome::Failure } else { Outcome::Success };
            assert_eq!(request(&mut breaker, outcome, now), None);
        }
    }

    #[test]
    fn outcomes_of_long_ago_are_forgotten() {
        let (mut breaker, now) = breaker();
        assert_eq!(fail(&mut breaker, 4, now), None);
        assert_eq!(fail(&mut breaker, 4, now + OUTCOMES_AGE_MAX + SECOND), None);
    }

    #[test]
    fn after_a_pause_one_trial_at_a_time_decides() {
        let (mut breaker, now) = breaker();
        fail(&mut breaker, 5, now);
        let later = now + SECOND;
        assert!(breaker.may_try(later));
        let trial = breaker.begin(later);
        assert!(!breaker.may_try(later));
        assert_eq!(breaker.condition(later), Condition::HalfOpen);
        assert_eq!(breaker.end(trial, Outcome::NoVerdict, later, EVEN), None);
        assert!(breaker.may_try(later), "a trial without verdict lets the next one try");
        assert_eq!(request(&mut breaker, Outcome::Success, later), Some(Change::Closed));
        assert_eq!(fail(&mut breaker, 4, later), None, "it begins with a clean window");
    }

    #[test]
    fn the_verdict_of_each_forced_trial_counts() {
        let (mut breaker, now) = breaker();
        fail(&mut breaker, 5, now);
        let [first, _second] = [breaker.begin(now), breaker.begin(now)];
        assert_eq!(breaker.end(first, Outcome::NoVerdict, now, EVEN), None);
        assert!(!breaker.may_try(now), "the second is under way");
        assert_eq!(breaker.end(first, Outcome::Success, now, EVEN), Some(Change::Closed));
    }

    #[test]
    fn a_trial_that_is_lost_does_not_shut_the_worker_for_ever() {
        let (mut breaker, now) = breaker();
        fail(&mut breaker, 5, now);
        let _lost = breaker.begin(now + SECOND);
        assert!(!breaker.may_try(now + SECOND + TRIAL_MAX / 2));
        assert!(breaker.may_try(now + SECOND + TRIAL_MAX));
    }

    #[test]
    fn pauses_grow_while_it_fails_and_begin_anew_after_a_stretch_of_health() {
        let (mut breaker, mut now) = breaker();
        fail(&mut breaker, 5, now);
        for seconds in [2, 4, 8, 16, 30, 30] {
            now += Duration::from_secs(60);
            let pause = Duration::from_secs(seconds);
            assert_eq!(request(&mut breaker, Outcome::Failure, now), Some(Change::Opened { pause }));
        }
        now += Duration::from_secs(60);
        assert_eq!(request(&mut breaker, Outcome::Success, now), Some(Change::Closed));
        let flapping = fail(&mut breaker.clone(), 5, now + SECOND);
        assert_eq!(flapping, Some(Change::Opened { pause: Duration::from_secs(30) }));
        let well = fail(&mut breaker, 5, now + Duration::from_secs(31));
        assert_eq!(well, Some(Change::Opened { pause: SECOND }));
    }

    #[test]
    fn what_was_sent_before_a_change_says_nothing_after_it() {
        let (mut breaker, now) = breaker();
        let slow = breaker.begin(now);
        fail(&mut breaker, 5, now);
        assert_eq!(breaker.end(slow, Outcome::Success, now, EVEN), None);
        let later = now + SECOND;
        assert_eq!(request(&mut breaker, Outcome::Success, later), Some(Change::Closed));
        assert_eq!(fail(&mut breaker, 4, later), None);
        assert_eq!(breaker.end(slow, Outcome::Failure, later, EVEN), None);
        assert_eq!(breaker.condition(later), Condition::Closed);
    }

    #[test]
    fn where_all_are_open_the_one_that_was_opened_first_is_tried() {
        let (mut first, now) = breaker();
        let mut second = first.clone();
        let closed = first.clone();
        fail(&mut second, 5, now);
        fail(&mut first, 5, now + SECOND / 4);
        let soon = now + SECOND / 2;
        assert_eq!(may_try([&first, &closed, &second], soon), [1]);
        assert_eq!(may_try([&first, &second], soon), [1]);
        let trial = second.begin(soon);
        assert_eq!(may_try([&first, &second], soon), [1], "also while it is tried");
        assert_eq!(second.end(trial, Outcome::Success, soon, EVEN), Some(Change::Closed));
        assert_eq!(may_try([], now), [0_usize; 0]);
    }

    fn outcome() -> impl Strategy<Value = Outcome> {
        prop_oneof![Just(Outcome::Success), Just(Outcome::Failure), Just(Outcome::NoVerdict)]
    }

    proptest! {
        /// Any interleaving of requests: begun when allowed or forced, ended in any order, some never.
        #[test]
        fn no_history_shuts_a_worker_for_ever_or_lets_a_crowd_try(
            steps in prop::collection::vec((0_u8..4, 0_usize..6, outcome(), 0_u64..3_000, any::<u64>()), 0..300),
        ) {
            let (mut breaker, mut now) = breaker();
            let mut open: Vec<Attempt> = Vec::new();
            for (kind, index, outcome, millis, draw) in steps {
                now += Duration::from_millis(millis);
                match kind {
                    0 | 1 => {
                        let may = breaker.may_try(now);
                        if may || kind == 1 {
                            let was = breaker.condition(now);
                            open.push(breaker.begin(now));
                            if was != Condition::Closed {
                                prop_assert!(!breaker.may_try(now), "a second trial at once");
                            }
                        }
                    }
                    _ if index < open.len() => {
                        let attempt = open.swap_remove(index);
                        let before = breaker.condition(now);
                        match breaker.end(attempt, outcome, now, draw) {
                            Some(Change::Opened { pause }) => {
                                prop_assert_eq!(outcome, Outcome::Failure);
                                prop_assert!(pause >= SECOND.mul_f64(0.8) && pause <= Duration::from_secs(36));
                                prop_assert!(!breaker.may_try(now));
                                prop_assert!(breaker.may_try(now + pause));
                            }
                            Some(Change::Closed) => {
                                prop_assert_eq!((outcome, before), (Outcome::Success, Condition::HalfOpen));
                                prop_assert!(breaker.may_try(now));
                            }
                            None => {}
                        }
                    }
                    _ => {}
                }
                prop_assert!(breaker.may_try(now + Duration::from_secs(60)));
                prop_assert_eq!(may_try([&breaker], now), [0_usize]);
            }
        }

        #[test]
        fn failures_alone_open_it_whatever_came_before(
            before in prop::collection::vec(outcome(), 0..100),
        ) {
            let (mut breaker, now) = breaker();
            for outcome in before {
                let _ = request(&mut breaker, outcome, now);
                if breaker.condition(now) != Condition::Closed {
                    return Ok(());
                }
            }
            fail(&mut breaker, 5, now);
            prop_assert_eq!(breaker.condition(now), Condition::Open);
        }

        #[test]
        fn successes_alone_never_open_it(count in 0_u32..500) {
            let (mut breaker, now) = breaker();
            for _ in 0..count {
                prop_assert_eq!(request(&mut breaker, Outcome::Success, now), None);
            }
        }
    }
}
