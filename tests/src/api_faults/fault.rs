//! What the proxy may do to a request instead of passing it on.

use super::request::ApiRequest;
use std::time::Duration;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It is answered with this code and never reaches the API server.
    Answer(u16),
    /// The API server acts on it, and its answer is replaced by this code.
    AnswerAfter(u16),
    /// The connection is closed, and the request never reaches the API server.
    Drop,
    /// The API server acts on it, and the connection is closed without an answer.
    DropAfter,
    /// It waits before it is passed on.
    Delay(Duration),
    /// A list is answered as it was answered when lists were last remembered.
    StaleList,
    /// A watch is accepted and then ends at once, because the version that it starts from is too old.
    ExpiredWatch,
}

/// What happens to open watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchFault {
    /// Their connections break.
    Cut,
    /// They end as a server ends them that has kept them long enough.
    End,
    /// They end with an error event of code 410.
    Expire,
    /// They stay open, and nothing comes any more.
    Silence,
}

/// Whether a request is meant.
pub type Meant = Box<dyn Fn(&ApiRequest) -> bool + Send>;

/// A fault that is in force.
pub(super) struct Fault {
    pub(super) meant: Meant,
    pub(super) effect: Effect,
    /// Of the requests that are meant, one in this many is hit: the first, and so on.
    pub(super) one_in: u32,
    pub(super) seen: u32,
}

impl Fault {
    pub(super) fn hits(&mut self, request: &ApiRequest) -> Option<Effect> {
        if !(self.meant)(request) {
            return None;
        }
        let is_hit = self.seen.is_multiple_of(self.one_in);
        self.seen += 1;
        is_hit.then_some(self.effect)
    }
}

/// Which side of a write the operator dies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The API server never sees the write.
    Before,
    /// The API server has acted on the write, and nobody hears its answer.
    After,
}

/// Writes are counted, and the one with this number is held on this side of the API server, with all that come after it.
pub(super) struct Hold {
    pub(super) number: usize,
    pub(super) side: Side,
    pub(super) seen: usize,
    pub(super) held: Option<ApiRequest>,
}

/// What becomes of a write while a hold is set.
pub(super) enum Held {
    /// It goes through.
    No,
    /// It never reaches the API server.
    Before,
    /// It reaches the API server, and its answer goes nowhere.
    After,
}

impl Hold {
    pub(super) fn count(&mut self, request: &ApiRequest) -> Held {
        if !request.is_write() || request.is_lease() {
            return Held::No;
        }
        self.seen += 1;
        match self.seen.cmp(&self.number) {
            std::cmp::Ordering::Less => Held::No,
            std::cmp::Ordering::Equal => match self.side {
                Side::Before => {
                    self.held = Some(request.clone());
                    Held::Before
                }
                Side::After => Held::After,
            },
            // What is sent at the same time must not slip past the crash.
            std::cmp::Ordering::Greater => Held::Before,
        }
    }
}
