//! How long to wait before something is tried again, and when not to any more.

use std::time::Duration;

/// How long to wait, and for what.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// The first wait after a failure; each further one is twice as long.
    pub first: Duration,
    /// The longest wait. Also when a server asks for a longer one: a pod that waits for hours looks hung.
    pub longest: Duration,
    /// Failures in a row, without a byte in between, after which it is given up. Whoever started us starts us again.
    pub failures_max: u32,
    /// How often a directory that another pod fills is looked at.
    pub lock: Duration,
}

impl Default for Pace {
    /// A minute and a half in all: longer than a server restarts, shorter than anybody waits for a message.
    fn default() -> Self {
        Pace {
            first: Duration::from_secs(1),
            longest: Duration::from_secs(30),
            failures_max: 8,
            lock: Duration::from_secs(1),
        }
    }
}

impl Pace {
    /// The wait after `failures` failures in a row, of which a server may have asked for the length. `draw` is random: pods
    /// that failed together shall not come again together.
    pub(super) fn wait(&self, failures: u32, asked: Option<Duration>, draw: u8) -> Duration {
        let doubled = self.first.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(self.longest);
        let spread = doubled.mul_f64(0.5 + f64::from(draw) / 512.0);
        asked.map_or(spread, |asked| asked.min(self.longest).max(spread))
    }
}

/// Failures in a row of one thing.
#[derive(Debug)]
pub(super) struct Patience<'a> {
    pace: &'a Pace,
    failures: u32,
}

impl<'a> Patience<'a> {
    pub(super) fn new(pace: &'a Pace) -> Self {
        Patience { pace, failures: 0 }
    }

    /// It goes on again.
    pub(super) fn restore(&mut self) {
        self.failures = 0;
    }

    /// Waits before the next attempt; `false` when there shall be none. How many failures there were: [`Self::failures`].
    pub(super) async fn is_left(&mut self, asked: Option<Duration>) -> bool {
        self.failures += 1;
        if self.failures >= self.pace.failures_max {
            return false;
        }
        let mut draw = [0];
        getrandom::fill(&mut draw).expect("the system has random numbers once it has started");
        tokio::time::sleep(self.pace.wait(self.failures, asked, draw[0])).await;
        true
    }

    pub(super) fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_bound_and_a_server_may_ask_for_longer_ones() {
        let pace = Pace::default();
        let seconds = |failures, asked: Option<u64>, draw| {
            pace.wait(failures, asked.map(Duration::from_secs), draw).as_secs_f64()
        };
        assert_eq!(seconds(1, None, 0), 0.5);
        assert_eq!(seconds(3, None, 0), 2.0);
        assert_eq!(seconds(u32::MAX, None, 0), 15.0);
        assert!(seconds(1, None, 255) < 1.0 && seconds(u32::MAX, None, 255) < 30.0);
        assert_eq!(seconds(1, Some(7), 255), 7.0);
        assert_eq!(seconds(1, Some(86_400), 0), 30.0, "not for a day");
        assert_eq!(seconds(6, Some(0), 0), 15.0, "nor at once");
    }
}
