//! Facts about single blocks, and any series of operations against plain bookkeeping.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn hash(name: u8) -> BlockHash {
    BlockHash([name; 16])
}

fn allocate(manager: &mut BlockManager) -> BlockId {
    manager.allocate().expect("a block is free")
}

#[test]
fn every_block_is_given_out_once() {
    let mut manager = BlockManager::new(4, true);
    let mut given: Vec<_> = (0..4).map(|_| allocate(&mut manager)).collect();
    assert_eq!(manager.allocate(), None);
    given.sort();
    given.dedup();
    assert_eq!(given.len(), 4);
}

#[test]
fn a_shared_block_is_free_after_its_last_release() {
    let mut manager = BlockManager::new(1, true);
    let block = allocate(&mut manager);
    manager.share(block);
    manager.release(block);
    assert_eq!((manager.num_free(), manager.ref_count(block)), (0, 1));
    manager.release(block);
    assert_eq!((manager.num_free(), manager.ref_count(block)), (1, 0));
}

#[test]
#[should_panic(expected = "freed twice")]
fn a_double_free_is_noticed() {
    let mut manager = BlockManager::new(1, true);
    let block = allocate(&mut manager);
    manager.release(block);
    manager.release(block);
}

#[test]
#[should_panic(expected = "no content to share")]
fn a_free_block_without_a_name_cannot_be_shared() {
    BlockManager::new(1, true).share(BlockId(0));
}

#[test]
fn a_freed_block_keeps_its_name_until_it_is_given_out() {
    let mut manager = BlockManager::new(1, true);
    let block = allocate(&mut manager);
    manager.publish(block, hash(1));
    manager.release(block);
    assert_eq!(manager.cached_prefix(&[hash(1)]), [block]);
    allocate(&mut manager);
    assert_eq!(manager.cached_prefix(&[hash(1)]), []);
}

#[test]
fn nameless_blocks_are_reused_before_cached_ones_and_those_in_the_order_of_their_last_use() {
    let mut manager = BlockManager::new(4, true);
    let [old, recent, nameless, revived]: [BlockId; 4] = std::array::from_fn(|_| allocate(&mut manager));
    for (block, name) in [(old, 1), (recent, 2), (revived, 3)] {
        manager.publish(block, hash(name));
    }
    for block in [revived, old, recent, nameless] {
        manager.release(block);
    }
    manager.share(revived);
    manager.release(revived);
    let order: Vec<_> = (0..4).map(|_| allocate(&mut manager)).collect();
    assert_eq!(order, [nameless, old, recent, revived]);
}

#[test]
fn the_end_of_a_freed_sequence_is_evicted_before_its_beginning() {
    let mut manager = BlockManager::new(3, true);
    let table: Vec<_> = (0..3).map(|_| allocate(&mut manager)).collect();
    (1..).zip(&table).for_each(|(name, &block)| manager.publish(block, hash(name)));
    manager.release_all(table.clone());
    assert_eq!(allocate(&mut manager), table[2]);
    assert_eq!(manager.cached_prefix(&[hash(1), hash(2), hash(3)]), table[..2]);
}

#[test]
fn a_prefix_ends_at_its_first_unknown_block() {
    let mut manager = BlockManager::new(3, true);
    let first = allocate(&mut manager);
    let third = allocate(&mut manager);
    manager.publish(first, hash(1));
    manager.publish(third, hash(3));
    assert_eq!(manager.cached_prefix(&[hash(1), hash(2), hash(3)]), [first]);
}

#[test]
fn the_first_block_of_a_name_keeps_it() {
    let mut manager = BlockManager::new(2, true);
    let (first, second) = (allocate(&mut manager), allocate(&mut manager));
    manager.publish(first, hash(1));
    manager.publish(second, hash(1));
    assert_eq!(manager.cached_prefix(&[hash(1)]), [first]);
    // The second block's end must not take the name with it.
    manager.release(second);
    assert_eq!(allocate(&mut manager), second);
    assert_eq!(manager.cached_prefix(&[hash(1)]), [first]);
}

#[test]
fn without_a_prefix_cache_nothing_is_found() {
    let mut manager = BlockManager::new(1, false);
    let block = allocate(&mut manager);
    manager.publish(block, hash(1));
    assert_eq!(manager.cached_prefix(&[hash(1)]), []);
}

/// What the manager is asked to do; indices are taken modulo what there is.
#[derive(Clone, Debug)]
enum Operation {
    /// A new sequence with the given block names: shares the known prefix, allocates the rest, publishes what it allocated.
    Start { names: Vec<u8> },
    /// A sequence needs another block, and names it or not.
    Append { sequence: usize, name: Option<u8> },
    /// A sequence is forked: another holder of all its blocks.
    Fork { sequence: usize },
    /// A sequence gets its own copy of its last block.
    CopyLast { sequence: usize },
    /// A sequence ends.
    End { sequence: usize },
}

fn operation() -> impl Strategy<Value = Operation> {
    // Few names, so that sequences meet each other's blocks.
    prop_oneof![
        3 => prop::collection::vec(0u8..6, 0..5).prop_map(|names| Operation::Start { names }),
        3 => (any::<usize>(), prop::option::of(0u8..12)).prop_map(|(sequence, name)| Operation::Append { sequence, name }),
        1 => any::<usize>().prop_map(|sequence| Operation::Fork { sequence }),
        1 => any::<usize>().prop_map(|sequence| Operation::CopyLast { sequence }),
        3 => any::<usize>().prop_map(|sequence| Operation::End { sequence }),
    ]
}

/// The same books, kept so plainly that they are seen to be right: who holds what is counted anew each time, the free blocks are a
/// list, and each block remembers its name.
struct Naive {
    num_blocks: u32,
    sequences: Vec<Vec<BlockId>>,
    /// In the order in which they are given out.
    free: Vec<BlockId>,
    names: BTreeMap<BlockId, BlockHash>,
}

impl Naive {
    fn new(num_blocks: u32) -> Self {
        Naive {
            num_blocks,
            sequences: Vec::new(),
            free: (0..num_blocks).map(BlockId).collect(),
            names: BTreeMap::new(),
        }
    }

    fn ref_count(&self, block: BlockId) -> u32 {
        self.sequences.iter().flatten().filter(|&&held| held == block).count() as u32
    }

    fn find(&self, name: BlockHash) -> Option<BlockId> {
        self.names.iter().find(|(_, known)| **known == name).map(|(&block, _)| block)
    }

    fn allocate(&mut self) -> Option<BlockId> {
        let block = (!self.free.is_empty()).then(|| self.free.remove(0))?;
        self.names.remove(&block);
        Some(block)
    }

    fn publish(&mut self, block: BlockId, name: BlockHash) {
        if self.find(name).is_none() {
            self.names.entry(block).or_insert(name);
        }
    }

    /// Frees `block`, which its last holder has let go.
    fn free(&mut self, block: BlockId) {
        match self.names.contains_key(&block) {
            true => self.free.push(block),
            false => self.free.insert(0, block),
        }
    }

    fn end(&mut self, sequence: usize) -> Vec<BlockId> {
        let mut table = self.sequences.swap_remove(sequence);
        let ended = table.clone();
        while let Some(block) = table.pop() {
            let still_in_table = table.contains(&block);
            if self.ref_count(block) == 0 && !still_in_table {
                self.free(block);
            }
        }
        ended
    }
}

fn apply(manager: &mut BlockManager, naive: &mut Naive, operation: Operation) -> Result<(), TestCaseError> {
    let pick = |sequence: usize, naive: &Naive| (!naive.sequences.is_empty()).then(|| sequence % naive.sequences.len());
    match operation {
        Operation::Start { names } => {
            let hashes: Vec<_> = names.into_iter().map(hash).collect();
            let mut table = manager.cached_prefix(&hashes);
            let expected: Vec<_> = hashes.iter().map_while(|&name| naive.find(name)).collect();
            prop_assert_eq!(&table, &expected, "the longest known prefix");
            for &block in &table {
                manager.share(block);
                naive.free.retain(|&free| free != block);
            }
            for &name in &hashes[table.len()..] {
                let block = manager.allocate();
                prop_assert_eq!(block, naive.allocate(), "the next free block");
                let Some(block) = block else { break };
                manager.publish(block, name);
                naive.publish(block, name);
                table.push(block);
            }
            naive.sequences.push(table);
        }
        Operation::Append { sequence, name } => {
            let Some(sequence) = pick(sequence, naive) else { return Ok(()) };
            let block = manager.allocate();
            prop_assert_eq!(block, naive.allocate(), "the next free block");
            if let Some(block) = block {
                naive.sequences[sequence].push(block);
                if let Some(name) = name {
                    manager.publish(block, hash(name));
                    naive.publish(block, hash(name));
                }
            }
        }
        Operation::Fork { sequence } => {
            let Some(sequence) = pick(sequence, naive) else { return Ok(()) };
            let table = naive.sequences[sequence].clone();
            table.iter().for_each(|&block| manager.share(block));
            naive.sequences.push(table);
        }
        Operation::CopyLast { sequence } => {
            let Some(sequence) = pick(sequence, naive) else { return Ok(()) };
            let Some(&old) = naive.sequences[sequence].last() else { return Ok(()) };
            let new = manager.allocate();
            prop_assert_eq!(new, naive.allocate(), "the next free block");
            let Some(new) = new else { return Ok(()) };
            manager.release(old);
            *naive.sequences[sequence].last_mut().expect("it has a last block") = new;
            if naive.ref_count(old) == 0 {
                naive.free(old);
            }
        }
        Operation::End { sequence } => {
            let Some(sequence) = pick(sequence, naive) else { return Ok(()) };
            let table = naive.end(sequence);
            manager.release_all(table);
        }
    }
    Ok(())
}

fn agree(manager: &BlockManager, naive: &Naive) -> Result<(), TestCaseError> {
    prop_assert_eq!(manager.num_free(), naive.free.len());
    for block in (0..naive.num_blocks).map(BlockId) {
        prop_assert_eq!(manager.ref_count(block), naive.ref_count(block), "holders of {:?}", block);
        prop_assert_eq!(
            naive.ref_count(block) == 0,
            naive.free.contains(&block),
            "held or free, never both: {:?}",
            block
        );
    }
    for name in (0..12).map(hash) {
        prop_assert_eq!(manager.cached_prefix(&[name]), naive.find(name).into_iter().collect::<Vec<_>>());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Any history of sequences leaves the books as plain bookkeeping would have them, and all blocks free at the end.
    #[test]
    fn the_books_agree_with_plain_bookkeeping(
        num_blocks in 1u32..12,
        operations in prop::collection::vec(operation(), 0..60),
    ) {
        let mut manager = BlockManager::new(num_blocks as usize, true);
        let mut naive = Naive::new(num_blocks);
        for operation in operations {
            apply(&mut manager, &mut naive, operation)?;
            agree(&manager, &naive)?;
        }
        while !naive.sequences.is_empty() {
            apply(&mut manager, &mut naive, Operation::End { sequence: 0 })?;
            agree(&manager, &naive)?;
        }
        prop_assert_eq!(manager.num_free(), num_blocks as usize, "no block is lost");
        let given: std::collections::BTreeSet<_> = std::iter::from_fn(|| manager.allocate()).collect();
        prop_assert_eq!(given.len(), num_blocks as usize, "each is given out once");
    }
}
