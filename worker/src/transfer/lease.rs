//! How long a producer keeps an export's blocks for a consumer: a pure clockwork that is told the time.

use super::limits::Timing;
use tokio::time::Instant;

/// The right of a consumer to find an export's blocks unchanged.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    renewed: Instant,
    worked: Instant,
    timing: Timing,
}

impl Lease {
    /// Begins at `now`.
    pub fn new(now: Instant, timing: Timing) -> Self {
        Lease { renewed: now, worked: now, timing }
    }

    /// The consumer still wants it.
    pub fn renew(&mut self, now: Instant) {
        self.renewed = self.renewed.max(now);
    }

    /// The producer computed something for it.
    pub fn work(&mut self, now: Instant) {
        self.worked = self.worked.max(now);
    }

    /// The first moment at which the blocks may be another sequence's.
    pub fn ends(&self) -> Instant {
        (self.renewed + self.timing.lease).min(self.worked + self.timing.lease_cap)
    }

    /// Whether that moment has come.
    pub fn expired(&self, now: Instant) -> bool {
        now >= self.ends()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    #[test]
    fn a_lease_lasts_from_its_last_renewal() {
        let (start, timing) = (Instant::now(), Timing::default());
        let mut lease = Lease::new(start, timing);
        assert!(!lease.expired(start + timing.lease - Duration::from_millis(1)));
        assert!(lease.expired(start + timing.lease));
        lease.renew(start + timing.lease / 2);
        assert_eq!(lease.ends(), start + timing.lease / 2 + timing.lease);
    }

    #[test]
    fn renewals_do_not_outlast_the_cap_but_work_moves_it() {
        let (start, timing) = (Instant::now(), Timing::default());
        let mut lease = Lease::new(start, timing);
        let mut now = start;
        while now < start + timing.lease_cap {
            lease.renew(now);
            now += timing.lease_renew;
        }
        assert_eq!(lease.ends(), start + timing.lease_cap);
        lease.work(start + timing.lease_cap / 2);
        assert!(!lease.expired(start + timing.lease_cap));
    }

    proptest! {
        #[test]
        fn a_lease_ends_at_most_one_term_after_its_last_renewal_and_one_cap_after_the_last_work(
            steps in prop::collection::vec((0..20_000u64, any::<bool>()), 0..50),
        ) {
            let (start, timing) = (Instant::now(), Timing::default());
            let (mut lease, mut renewed, mut worked) = (Lease::new(start, timing), start, start);
            for (at, is_renewal) in steps {
                let now = start + Duration::from_millis(at);
                if is_renewal {
                    lease.renew(now);
                    renewed = renewed.max(now);
                } else {
                    lease.work(now);
                    worked = worked.max(now);
                }
                prop_assert!(lease.ends() <= renewed + timing.lease);
                prop_assert!(lease.ends() <= worked + timing.lease_cap);
                prop_assert!(lease.ends() == renewed + timing.lease || lease.ends() == worked + timing.lease_cap);
            }
        }
    }
}
