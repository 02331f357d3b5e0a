//! Where the two legs of one handover meet: SGLang's bootstrap rooms and our own transfers. A room lives in the prefill
//! engine, from the first leg that comes until the last that leaves.

use super::tokens::Seed;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::watch;

/// Number of a room or transfer.
pub(crate) type Room = u128;

/// Rooms of the past that are remembered, to tell a fresh one from a used one: 2 MiB.
const REMEMBERED_MAX: usize = 1 << 16;

/// How far a room has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stage {
    prefill: Option<Seed>,
    decode: Option<Seed>,
    /// The rank at which the decode leg looks for its KV, where it said one.
    sought: Option<u32>,
    /// The KV has gone over.
    done: bool,
}

/// What has happened in rooms, since start or reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct RoomCounts {
    /// Entered by their prefill leg.
    pub(crate) total: u64,
    /// Where KV went over.
    pub(crate) done: u64,
    /// Entered while in use.
    pub(crate) duplicate: u64,
    /// Entered again after their end: fresh ones are wanted for each attempt.
    pub(crate) reused: u64,
    /// Left by a prefill leg whose decode leg had not come.
    pub(crate) prefill_left: u64,
    /// Left by a decode leg before the KV was there.
    pub(crate) decode_left: u64,
}

/// The rooms of one prefill engine.
#[derive(Debug, Default)]
pub(crate) struct Rooms {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    rooms: HashMap<Room, watch::Sender<Stage>>,
    used: HashSet<Room>,
    used_in_order: VecDeque<Room>,
    counts: RoomCounts,
}

/// Which of the two legs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Prefill,
    Decode,
}

/// A leg of that side is in the room already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Duplicate;

/// A leg's place in a room; it leaves when this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    rooms: Arc<Rooms>,
    room: Room,
    side: Side,
    stage: watch::Receiver<Stage>,
}

impl Rooms {
    /// A leg comes into a room.
    ///
    /// # Errors
    /// When one of its side is there.
    pub(crate) fn enter(self: &Arc<Self>, room: Room, side: Side, seed: Seed) -> Result<Place, Duplicate> {
        self.enter_seeking(room, side, seed, None)
    }

    /// A leg comes into a room, and looks for its KV at this rank of the prefill engine.
    ///
    /// # Errors
    /// When one of its side is there.
    pub(crate) fn enter_seeking(
        self: &Arc<Self>,
        room: Room,
        side: Side,
        seed: Seed,
        sought: Option<u32>,
    ) -> Result<Place, Duplicate> {
        let mut inner = self.lock();
        let taken = inner.rooms.get(&room).is_some_and(|stage| stage.borrow().is_taken(side));
        if taken {
            inner.counts.duplicate += 1;
            return Err(Duplicate);
        }
        if side == Side::Prefill {
            inner.counts.total += 1;
            inner.remember(room);
        }
        let sender = inner.rooms.entry(room).or_default();
        sender.send_modify(|stage| match side {
            Side::Prefill => stage.prefill = Some(seed),
            Side::Decode => (stage.decode, stage.sought) = (Some(seed), sought),
        });
        let stage = sender.subscribe();
        drop(inner);
        Ok(Place { rooms: Arc::clone(self), room, side, stage })
    }

    pub(crate) fn counts(&self) -> RoomCounts {
        self.lock().counts
    }

    /// In use now.
    pub(crate) fn now(&self) -> usize {
        self.lock().rooms.len()
    }

    /// Forgets what was counted and which rooms were used; legs stay where they are.
    pub(crate) fn reset(&self) {
        let mut inner = self.lock();
        inner.counts = RoomCounts::default();
        inner.used.clear();
        inner.used_in_order.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no code that holds the rooms panics")
    }
}

impl Inner {
    fn remember(&mut self, room: Room) {
        if !self.used.insert(room) {
            self.counts.reused += 1;
            return;
        }
        self.used_in_order.push_back(room);
        if self.used_in_order.len() > REMEMBERED_MAX
            && let Some(oldest) = self.used_in_order.pop_front()
        {
            self.used.remove(&oldest);
        }
    }
}

impl Stage {
    fn is_taken(self, side: Side) -> bool {
        match side {
            Side::Prefill => self.prefill.is_some(),
            Side::Decode => self.decode.is_some(),
        }
    }
}

impl Place {
    /// Waits for the other leg; says whether it has the same prompt.
    pub(crate) async fn other(&mut self, seed: Seed) -> bool {
        let side = self.side;
        let there = |stage: &Stage| match side {
            Side::Prefill => stage.decode.is_some(),
            Side::Decode => stage.prefill.is_some(),
        };
        // The sender lives in the table for as long as a leg is in the room, and this one is.
        let stage = self.stage.wait_for(there).await.map(|stage| *stage);
        let others = stage.map(|stage| match side {
            Side::Prefill => stage.decode,
            Side::Decode => stage.prefill,
        });
        match others {
            Ok(other) => other == Some(seed),
            Err(_) => std::future::pending().await,
        }
    }

    /// The room, and the rank at which the decode leg looks for its KV, where it said one.
    pub(crate) fn sought(&self) -> (Room, Option<u32>) {
        (self.room, self.stage.borrow().sought)
    }

    /// Waits until the KV is there.
    pub(crate) async fn done(&mut self) {
        let is_lost = self.stage.wait_for(|stage| stage.done).await.is_err();
        if is_lost {
            std::future::pending::<()>().await;
        }
    }

    /// The KV has gone over, where a decode leg is there to take it.
    pub(crate) fn hand_over(&self) {
        let mut inner = self.rooms.lock();
        let Some(sender) = inner.rooms.get(&self.room) else { return };
        let taken = sender.borrow().decode.is_some();
        if taken {
            sender.send_modify(|stage| stage.done = true);
            inner.counts.done += 1;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.rooms.lock();
        let Some(sender) = inner.rooms.get(&self.room) else { return };
        sender.send_modify(|stage| match self.side {
            Side::Prefill => stage.prefill = None,
            Side::Decode => stage.decode = None,
        });
        let stage = *sender.borrow();
        if stage.prefill.is_none() && stage.decode.is_none() {
            inner.rooms.remove(&self.room);
        }
        if !stage.done {
            match self.side {
                Side::Prefill => inner.counts.prefill_left += 1,
                Side::Decode => inner.counts.decode_left += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: Seed = Seed(7);

    fn now<T>(future: impl Future<Output = T>) -> Option<T> {
        let mut future = std::pin::pin!(future);
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        }
    }

    #[test]
    fn legs_meet_whichever_comes_first() {
        for first in [Side::Prefill, Side::Decode] {
            let rooms = Arc::new(Rooms::default());
            let second = if first == Side::Prefill { Side::Decode } else { Side::Prefill };
            let mut one = rooms.enter(5, first, SEED).expect("free");
            assert_eq!(now(one.other(SEED)), None);
            let mut two = rooms.enter(5, second, SEED).expect("free");
            assert_eq!((now(one.other(SEED)), now(two.other(Seed(8)))), (Some(true), Some(false)));
            let (prefill, mut decode) = if first == Side::Prefill { (one, two) } else { (two, one) };
            assert_eq!(now(decode.done()), None);
            prefill.hand_over();
            drop(prefill);
            assert_eq!(now(decode.done()), Some(()));
            drop(decode);
            assert_eq!(rooms.now(), 0);
            assert_eq!(rooms.counts(), RoomCounts { total: 1, done: 1, ..RoomCounts::default() });
        }
    }

    #[test]
    fn a_room_that_is_left_waits_on_for_the_other_leg() {
        let rooms = Arc::new(Rooms::default());
        let mut decode = rooms.enter(5, Side::Decode, SEED).expect("free");
        drop(rooms.enter(5, Side::Prefill, SEED).expect("free"));
        assert_eq!(now(decode.other(SEED)), None);
        assert_eq!(rooms.now(), 1);
        drop(decode);
        assert_eq!(rooms.now(), 0);
        let counts = rooms.counts();
        assert_eq!((counts.prefill_left, counts.decode_left), (1, 1));
    }

    #[test]
    fn a_second_leg_of_a_side_is_a_duplicate_and_a_later_one_a_reuse() {
        let rooms = Arc::new(Rooms::default());
        let place = rooms.enter(5, Side::Prefill, SEED).expect("free");
        assert_eq!(rooms.enter(5, Side::Prefill, SEED).err(), Some(Duplicate));
        drop(place);
        drop(rooms.enter(5, Side::Prefill, SEED).expect("free again"));
        let counts = rooms.counts();
        assert_eq!((counts.duplicate, counts.reused), (1, 1));
    }
}
