//! Which worker's prefix cache holds how much of a prompt's beginning.
//!
//! Two indexes with one question. [`exact::ExactIndex`] is told by the workers themselves, block by block
//! ([`crate::kv_events`]), and needs a prompt's token ids to be asked. [`approximate::ApproximateIndex`] needs neither: it
//! remembers where prompts were sent, by their bytes, and serves engines that tell nothing. Both answer with hints: the worker
//! alone decides what it reuses, so a wrong answer costs time and is never a wrong text. Neither locks, sleeps or does I/O.

pub(crate) mod approximate;
pub(crate) mod chain;
pub(crate) mod exact;
mod holdings;

use baton_wire::BlockHash;

/// One prefix cache: that of one data-parallel rank of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Holder {
    /// The worker's number, which names no other worker as long as this process lives.
    pub(crate) worker: u32,
    /// The rank; 0 where there is one.
    pub(crate) dp_rank: u32,
}

impl Holder {
    /// The cache of a worker that has but one.
    pub(crate) const fn of(worker: u32) -> Self {
        Holder { worker, dp_rank: 0 }
    }
}

/// How much of the beginning of a prompt a prefix cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Overlap {
    /// Whose cache.
    pub(crate) holder: Holder,
    /// Leading blocks (exact) or chunks (approximate), at least one.
    pub(crate) leading: u32,
}

/// What a prefix cache's events change in the exact index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It holds these too.
    Stored(Vec<BlockHash>),
    /// It holds these no more.
    Removed(Vec<BlockHash>),
    /// It holds nothing, or nobody knows what.
    Cleared,
    /// A part of all that it holds. What was known before stays until the last part is there, and then is replaced at once.
    Snapshot {
        /// The part.
        blocks: Vec<BlockHash>,
        /// Whether earlier parts of an unfinished snapshot are to be forgotten.
        first: bool,
        /// Whether this is the last part.
        last: bool,
    },
}
