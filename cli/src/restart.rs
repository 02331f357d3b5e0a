//! When a process that has ended is started again. Pure: knows what happened, touches nothing.

use std::time::Duration;

/// First wait. A process that dies once is back before a client's own retry.
const WAIT_MIN: Duration = Duration::from_millis(250);

/// Longest wait: what dies again and again costs a load of the model each time, and a person looks within a minute.
const WAIT_MAX: Duration = Duration::from_secs(15);

/// A life this long counts as recovered: the next death starts at the first wait again.
const RECOVERED_AFTER: Duration = Duration::from_secs(60);

/// Deaths by signal in a row that are forgiven before a process has been ready once (somebody killed it; memory was short
/// for a moment). An exit of its own accord at that stage is its verdict on model or flags, and would only be repeated.
const FORGIVEN_BEFORE_READY: u32 = 3;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Death {
    /// It exited of its own accord.
    Exited,
    /// A signal killed it.
    Killed,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Start it again after a wait.
    Restart(Duration),
    /// Starting it again would end the same way.
    GiveUp,
}

/// The deaths of one process so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Restarts {
    in_a_row: u32,
}

impl Restarts {
    /// Decides after a death. `was_ready`: whether any life of this process has served; `lived`: how long the last one was.
    pub(crate) fn after(&mut self, death: Death, was_ready: bool, lived: Duration) -> Next {
        if lived >= RECOVERED_AFTER {
            self.in_a_row = 0;
        }
        let before = self.in_a_row;
        self.in_a_row = self.in_a_row.saturating_add(1);
        match death {
            Death::Exited if !was_ready => Next::GiveUp,
            Death::Killed if !was_ready && before >= FORGIVEN_BEFORE_READY => Next::GiveUp,
            Death::Exited | Death::Killed => Next::Restart(wait(before)),
        }
    }
}

/// Twice as long each time, up to the longest.
fn wait(before: u32) -> Duration {
    WAIT_MIN.saturating_mul(1u32.checked_shl(before).unwrap_or(u32::MAX)).min(WAIT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_model_that_cannot_be_loaded_is_not_tried_again() {
        assert_eq!(Restarts::default().after(Death::Exited, false, Duration::from_secs(600)), Next::GiveUp);
    }

    #[test]
    fn a_worker_killed_while_loading_is_tried_again_a_few_times() {
        let mut restarts = Restarts::default();
        let mut count = 0;
        while let Next::Restart(_) = restarts.after(Death::Killed, false, Duration::ZERO) {
            count += 1;
        }
        assert_eq!(count, FORGIVEN_BEFORE_READY);
    }

    proptest! {
        #[test]
        fn what_has_served_is_always_restarted_with_growing_bounded_waits(lives in proptest::collection::vec((0u64..120, any::<bool>()), 1..80)) {
            let mut restarts = Restarts::default();
            let mut last = Duration::ZERO;
            for (seconds, killed) in lives {
                let death = if killed { Death::Killed } else { Death::Exited };
                let lived = Duration::from_secs(seconds);
                let Next::Restart(wait) = restarts.after(death, true, lived) else { panic!("given up") };
                prop_assert!((WAIT_MIN..=WAIT_MAX).contains(&wait));
                if lived >= RECOVERED_AFTER {
                    prop_assert_eq!(wait, WAIT_MIN);
                } else {
                    prop_assert!(wait >= last, "{:?} after {:?}", wait, last);
                }
                last = wait;
            }
        }
    }
}
