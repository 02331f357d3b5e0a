//! KV that a vLLM prefill engine holds for decode legs to come: each handle has one owner and one deadline. Pure; the
//! time comes in.

use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// What an engine holds, and how each hold ended.
#[derive(Debug)]
pub(crate) struct Holds {
    lease: Duration,
    /// Number of the next handle. Lower ones that are not held were freed.
    next: u64,
    held: HashMap<u64, Hold>,
    pub(crate) counts: HoldCounts,
}

#[derive(Debug)]
struct Hold {
    since: Instant,
    deadline: Instant,
    blocks: u64,
    /// What the prefill leg was called, to be compared with the decode leg.
    request_id: Option<String>,
}

/// How holds ended, since start or reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct HoldCounts {
    /// Begun.
    pub(crate) total: u64,
    /// Pulled by a decode leg.
    pub(crate) consumed: u64,
    /// Let go by a decode leg that was aborted before its pull.
    pub(crate) released: u64,
    /// Nobody came: what a router has stranded.
    pub(crate) expired: u64,
    /// Leases extended.
    pub(crate) renewed: u64,
}

/// Why there is nothing to pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotHeld {
    /// Never was.
    Unknown,
    /// No longer.
    Freed,
}

impl Holds {
    pub(crate) fn new(lease: Duration) -> Self {
        Holds { lease, next: 1, held: HashMap::new(), counts: HoldCounts::default() }
    }

    /// Holds blocks; gives the handle's number.
    pub(crate) fn hold(&mut self, now: Instant, blocks: u64, request_id: Option<String>) -> u64 {
        let number = self.next;
        self.next += 1;
        self.counts.total += 1;
        self.held.insert(number, Hold { since: now, deadline: now + self.lease, blocks, request_id });
        number
    }

    /// Takes the blocks over; gives the name of the prefill leg.
    ///
    /// # Errors
    /// When they are not held.
    pub(crate) fn pull(&mut self, now: Instant, number: u64) -> Result<Option<String>, NotHeld> {
        self.expire(now);
        let hold = self.held.remove(&number).ok_or_else(|| self.not_held(number))?;
        self.counts.consumed += 1;
        Ok(hold.request_id)
    }

    /// Lets the blocks go. Those that are not held any more are as wanted, so nothing is said of them.
    pub(crate) fn release(&mut self, now: Instant, number: u64) {
        self.expire(now);
        if self.held.remove(&number).is_some() {
            self.counts.released += 1;
        }
    }

    /// Begins the lease anew.
    ///
    /// # Errors
    /// When they are not held.
    pub(crate) fn renew(&mut self, now: Instant, number: u64) -> Result<(), NotHeld> {
        self.expire(now);
        let not_held = self.not_held(number);
        let hold = self.held.get_mut(&number).ok_or(not_held)?;
        hold.deadline = now + self.lease;
        self.counts.renewed += 1;
        Ok(())
    }

    /// Gives up what nobody came for.
    pub(crate) fn expire(&mut self, now: Instant) {
        let before = self.held.len();
        self.held.retain(|_, hold| now < hold.deadline);
        self.counts.expired += (before - self.held.len()) as u64;
    }

    /// Held now.
    pub(crate) fn now(&self) -> usize {
        self.held.len()
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.held.values().map(|hold| hold.blocks).sum()
    }

    /// How long the oldest has been held.
    pub(crate) fn oldest(&self, now: Instant) -> Option<Duration> {
        self.held.values().map(|hold| now - hold.since).max()
    }

    /// Forgets what is held and what was counted; handles given so far count as freed.
    pub(crate) fn reset(&mut self) {
        self.held.clear();
        self.counts = HoldCounts::default();
    }

    fn not_held(&self, number: u64) -> NotHeld {
        if (1..self.next).contains(&number) { NotHeld::Freed } else { NotHeld::Unknown }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(30);

    fn holds() -> (Holds, Instant) {
        (Holds::new(LEASE), Instant::now())
    }

    #[test]
    fn a_hold_is_pulled_once() {
        let (mut holds, now) = holds();
        let number = holds.hold(now, 4, Some("r".into()));
        assert_eq!((holds.now(), holds.blocks()), (1, 4));
        assert_eq!(holds.pull(now, number), Ok(Some("r".into())));
        assert_eq!(holds.pull(now, number), Err(NotHeld::Freed));
        assert_eq!(holds.pull(now, number + 1), Err(NotHeld::Unknown));
        assert_eq!(holds.pull(now, 0), Err(NotHeld::Unknown));
        assert_eq!(holds.counts, HoldCounts { total: 1, consumed: 1, ..HoldCounts::default() });
    }

    #[test]
    fn a_hold_that_nobody_comes_for_is_stranded_at_the_end_of_its_lease() {
        let (mut holds, now) = holds();
        let number = holds.hold(now, 1, None);
        holds.expire(now + LEASE - Duration::from_millis(1));
        assert_eq!(holds.now(), 1);
        assert_eq!(holds.oldest(now + Duration::from_secs(7)), Some(Duration::from_secs(7)));
        assert_eq!(holds.pull(now + LEASE, number), Err(NotHeld::Freed));
        assert_eq!(holds.counts, HoldCounts { total: 1, expired: 1, ..HoldCounts::default() });
    }

    #[test]
    fn a_renewed_lease_is_a_whole_one() {
        let (mut holds, now) = holds();
        let number = holds.hold(now, 1, None);
        assert_eq!(holds.renew(now + LEASE / 2, number), Ok(()));
        holds.expire(now + LEASE);
        assert_eq!(holds.now(), 1);
        holds.expire(now + LEASE + LEASE / 2);
        assert_eq!(holds.now(), 0);
        assert_eq!(holds.renew(now + LEASE * 2, number), Err(NotHeld::Freed));
    }

    #[test]
    fn a_release_is_counted_once_and_harmless_after_a_pull() {
        let (mut holds, now) = holds();
        let (pulled, left) = (holds.hold(now, 1, None), holds.hold(now, 1, None));
        holds.pull(now, pulled).expect("held");
        for number in [pulled, left, left] {
            holds.release(now, number);
        }
        assert_eq!(holds.counts, HoldCounts { total: 2, consumed: 1, released: 1, ..HoldCounts::default() });
    }
}
