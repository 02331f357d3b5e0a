//! Follows one vLLM rank's events: batches in, changes of the index out, in names that this proxy can compute for a prompt.
//!
//! vLLM names a block by a hash that nobody outside can compute (its seed or its serialisation are its own), and says the
//! tokens once, when the block is stored. So each block gets a name by [`chain`] over the same tokens, and a table from vLLM's
//! names to ours lets removals and later blocks find it. The table is as large as the engine's cache and bounded.
//!
//! * vLLM keeps copies of a block under one hash and reports each: they are counted, and a block is gone when its last copy is.
//! * Numbers are missing when the publisher's queue was full, or after a reconnect, and nothing tells what happened meanwhile.
//!   Where the engine has no replay for them, [`Follower::lost`] takes all claims back. The names stay, so that later blocks
//!   still find their predecessors; and a block that is stored says that all before it are there, so the claims come back with
//!   the first use.
//! * Blocks in slower tiers, and those of groups of layers that need no whole prefix, are passed over.

use super::vllm::{Batch, EngineHash, Event, Place, Removed, Stored, extra_of};
use crate::prefix::exact::BLOCKS_PER_HOLDER_MAX;
use crate::prefix::{Change, chain};
use baton_wire::BlockHash;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// Most names, one for each block that the index takes. One takes 53 bytes over a hash table's fill of 44 to 88 %.
const NAMES_MAX: usize = BLOCKS_PER_HOLDER_MAX;

/// vLLM's events name no tenant but by the salt that a request carries, which is mixed in beside this.
const ROOT_SALT: u64 = 0;

/// How a batch fits to what came before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It was the next one.
    Applied,
    /// It had been applied before; nothing changed.
    Repeated,
    /// Batches before it are missing, and it was not applied: replay them from here, or call [`Follower::lost`] and apply it again.
    Gap {
        /// The number that is due.
        expected: u64,
    },
}

/// What was passed over, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Passed {
    /// Blocks whose predecessor has no name here: it was stored before this follower came.
    pub(crate) orphans: u64,
    /// Blocks beyond [`NAMES_MAX`].
    pub(crate) refused: u64,
    /// Removals of blocks that have no name here.
    pub(crate) unknown_removals: u64,
    /// Events of slower tiers, other groups of layers or unknown type.
    pub(crate) ignored: u64,
}

/// Where a rank's events stand.
#[derive(Debug, Default)]
pub(crate) struct Follower {
    next: Option<u64>,
    names: HashMap<EngineHash, Name>,
    /// The group that is followed: the first that needs whole prefixes.
    group: Option<Option<u32>>,
    block_tokens: Option<usize>,
    passed: Passed,
}

#[derive(Clone, Copy, Debug)]
struct Name {
    hash: BlockHash,
    parent: Option<EngineHash>,
    /// Copies that the engine has; 0 where that is not known any more.
    copies: u32,
}

impl Follower {
    /// Tokens of a block, as the engine says with each; `None` before the first.
    pub(crate) fn block_tokens(&self) -> Option<usize> {
        self.block_tokens
    }

    /// What was passed over.
    #[cfg(test)]
    pub(crate) fn passed(&self) -> Passed {
        self.passed
    }

    /// The number of the batch that is due; `None` where any will do.
    pub(crate) fn next(&self) -> Option<u64> {
        self.next
    }

    /// Events are missing for good, or another process may have taken the engine's place: takes all claims back, and goes on
    /// with whatever batch comes next.
    pub(crate) fn lost(&mut self) -> Change {
        self.next = None;
        self.names.values_mut().for_each(|name| name.copies = 0);
        Change::Cleared
    }

    /// Applies batch number `seq`.
    pub(crate) fn batch(&mut self, seq: u64, batch: Batch, changes: &mut Vec<Change>) -> Step {
        match self.next {
            Some(next) if seq < next => return Step::Repeated,
            Some(next) if seq > next => return Step::Gap { expected: next },
            _ => {}
        }
        self.next = Some(seq.saturating_add(1));
        self.passed.ignored += u64::from(batch.num_unknown);
        for event in batch.events {
            match event {
                Event::Stored(stored) => self.stored(&stored, changes),
                Event::Removed(removed) => self.removed(&removed, changes),
                Event::Cleared => {
                    self.names.clear();
                    changes.push(Change::Cleared);
                }
            }
        }
        Step::Applied
    }

    fn stored(&mut self, stored: &Stored, changes: &mut Vec<Change>) {
        if !stored.is_prefix || !self.follows(stored.place) {
            self.passed.ignored += 1;
            return;
        }
        self.block_tokens = Some(stored.block_tokens);
        let mut hash = match stored.parent {
            None => chain::root(ROOT_SALT),
            Some(parent) => match self.names.get(&parent) {
                Some(name) => name.hash,
                None => {
                    self.passed.orphans += stored.blocks.len() as u64;
                    return;
                }
            },
        };
        let mut held = self.held_again(stored.parent);
        let mut parent = stored.parent;
        let blocks = stored.blocks.iter().zip(stored.token_ids.chunks_exact(stored.block_tokens));
        for (index, (&block, tokens)) in blocks.enumerate() {
            let extra = stored.extras.get(index).and_then(Option::as_deref);
            hash = chain::chain(extra.map_or(hash, |extra| chain::with_extra(hash, extra)), tokens);
            if !self.name(block, Name { hash, parent, copies: 0 }) {
                self.passed.refused += (stored.blocks.len() - index) as u64;
                break;
            }
            if let Some(name) = self.names.get_mut(&block) {
                name.copies = name.copies.saturating_add(1);
                if name.copies == 1 {
                    held.push(name.hash);
                }
            }
            parent = Some(block);
        }
        if !held.is_empty() {
            changes.push(Change::Stored(held));
        }
    }

    fn removed(&mut self, removed: &Removed, changes: &mut Vec<Change>) {
        if !removed.place.is_device || self.group.is_some_and(|group| group != removed.place.group) {
            self.passed.ignored += 1;
            return;
        }
        let mut gone = Vec::new();
        for (index, &block) in removed.blocks.iter().enumerate() {
            let Entry::Occupied(mut entry) = self.names.entry(block) else {
                self.passed.unknown_removals += 1;
                continue;
            };
            let said = removed.copies_left.as_ref().and_then(|counts| counts.get(index).copied());
            let left = said.unwrap_or(entry.get().copies.saturating_sub(1));
            if left > 0 {
                entry.get_mut().copies = left;
            } else {
                gone.push(entry.remove().hash);
            }
        }
        if !gone.is_empty() {
            changes.push(Change::Removed(gone));
        }
    }

    fn follows(&mut self, place: Place) -> bool {
        place.is_device && *self.group.get_or_insert(place.group) == place.group
    }

    /// Whether the block has a name now. One that it had before stays: its copies are counted there.
    fn name(&mut self, block: EngineHash, name: Name) -> bool {
        if self.names.len() >= NAMES_MAX && !self.names.contains_key(&block) {
            // Names without a claim are only there to be found again; they make room for those that have one.
            self.names.retain(|_, name| name.copies > 0);
            if self.names.len() >= NAMES_MAX {
                return false;
            }
        }
        self.names.entry(block).or_insert(name);
        true
    }

    /// The blocks from the start of the sequence to `last` whose claims had been taken back: a block that is stored after them
    /// says that they are there.
    fn held_again(&mut self, last: Option<EngineHash>) -> Vec<BlockHash> {
        let mut held = Vec::new();
        let mut block = last;
        while let Some(name) = block.and_then(|block| self.names.get_mut(&block)).filter(|name| name.copies == 0) {
            name.copies = 1;
            held.push(name.hash);
            block = name.parent;
        }
        held.reverse();
        held
    }
}

/// The names of a prompt's full blocks, for a request with this adapter and salt to an engine with blocks of this size.
pub(crate) fn block_hashes(
    block_tokens: usize,
    token_ids: &[u32],
    lora_name: Option<&str>,
    cache_salt: Option<&str>,
) -> Vec<BlockHash> {
    if block_tokens == 0 {
        return Vec::new();
    }
    let (first, later) = extra_of(lora_name, cache_salt);
    let mut hash = chain::root(ROOT_SALT);
    let next = |(index, tokens): (usize, &[u32])| {
        let extra = if index == 0 { &first } else { &later };
        hash = chain::chain(extra.as_ref().map_or(hash, |extra| chain::with_extra(hash, extra)), tokens);
        hash
    };
    token_ids.chunks_exact(block_tokens).enumerate().map(next).collect()
}

#[cfg(test)]
mod tests;
