//! Which worker served a session last, so that its next request finds its KV there. Bounded in number and in time.
//!
//! A session is known by a hash that the caller makes of the session's name and its tenant with a key, so that nobody can
//! choose one that collides with another's.

use super::candidate::WorkerKey;
use std::collections::{BTreeMap, HashMap};

/// Sessions that are remembered: about 100 bytes each, and hours of a busy proxy; the one unused for longest leaves first.
const SESSIONS_MAX: usize = 16_384;

/// How long a session is remembered without a request, unless configured: past it, a worker's prefix cache has in most cases
/// given its blocks to others.
pub(crate) const SESSION_TTL_MS: u64 = 10 * 60 * 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Session {
    worker: WorkerKey,
    used_ms: u64,
    /// When it was used, as a number that no other session has.
    turn: u64,
}

/// The sessions and their workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sessions {
    ttl_ms: u64,
    by_hash: HashMap<u64, Session>,
    by_turn: BTreeMap<u64, u64>,
    next_turn: u64,
}

impl Sessions {
    pub(super) fn new(ttl_ms: u64) -> Self {
        Sessions { ttl_ms, by_hash: HashMap::new(), by_turn: BTreeMap::new(), next_turn: 0 }
    }

    /// The worker that served the session last, unless that is too long ago.
    pub(super) fn worker(&self, session: u64, now_ms: u64) -> Option<WorkerKey> {
        let known = self.by_hash.get(&session)?;
        (now_ms.saturating_sub(known.used_ms) < self.ttl_ms).then_some(known.worker)
    }

    /// Remembers who serves the session now.
    pub(super) fn bind(&mut self, session: u64, worker: WorkerKey, now_ms: u64) {
        let turn = self.next_turn;
        self.next_turn += 1;
        if let Some(before) = self.by_hash.insert(session, Session { worker, used_ms: now_ms, turn }) {
            self.by_turn.remove(&before.turn);
        }
        self.by_turn.insert(turn, session);
        if self.by_hash.len() > SESSIONS_MAX
            && let Some((_, oldest)) = self.by_turn.pop_first()
        {
            self.by_hash.remove(&oldest);
        }
    }

    /// Sessions that are remembered, those that nobody will ask for again included.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_hash.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: WorkerKey = WorkerKey(1);
    const B: WorkerKey = WorkerKey(2);

    #[test]
    fn a_session_is_remembered_until_it_was_unused_for_its_time() {
        let mut sessions = Sessions::new(1000);
        assert_eq!(sessions.worker(7, 0), None);
        sessions.bind(7, A, 0);
        assert_eq!((sessions.worker(7, 999), sessions.worker(7, 1000)), (Some(A), None));
        sessions.bind(7, A, 900);
        assert_eq!((sessions.worker(7, 1899), sessions.worker(7, 1900)), (Some(A), None));
        sessions.bind(7, B, 1000);
        assert_eq!(sessions.worker(7, 1001), Some(B));
        assert_eq!(sessions.len(), 1);
    }

    #[test]
    fn the_session_unused_for_longest_leaves_first() {
        let mut sessions = Sessions::new(u64::MAX);
        for session in 0..SESSIONS_MAX as u64 {
            sessions.bind(session, A, session);
        }
        sessions.bind(0, B, 1 << 20);
        sessions.bind(u64::MAX, A, 1 << 20);
        assert_eq!(sessions.len(), SESSIONS_MAX);
        assert_eq!((sessions.worker(0, 1 << 20), sessions.worker(1, 1 << 20)), (Some(B), None));
        assert_eq!(sessions.worker(2, 1 << 20), Some(A));
    }

    proptest! {
        #[test]
        fn both_maps_hold_the_same_sessions(uses in prop::collection::vec((0u64..9, 0u64..3), 0..60)) {
            let mut sessions = Sessions::new(100);
            for (now, (session, worker)) in uses.iter().enumerate() {
                sessions.bind(*session, WorkerKey(*worker), now as u64);
                prop_assert_eq!(sessions.worker(*session, now as u64), Some(WorkerKey(*worker)));
            }
            prop_assert_eq!(sessions.by_hash.len(), sessions.by_turn.len());
            prop_assert!(sessions.by_turn.iter().all(|(turn, session)| sessions.by_hash[session].turn == *turn));
        }
    }
}
