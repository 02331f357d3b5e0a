//! Events applied by hand, against what an engine with copies of blocks would hold.

use super::*;
use crate::prefix::{Holder, exact::ExactIndex};
use proptest::prelude::*;

const DEVICE: Place = Place { group: None, is_device: true };
const HOLDER: Holder = Holder { worker: 0, dp_rank: 0 };
const BLOCK_TOKENS: usize = 4;

fn engine_hash(number: u8) -> EngineHash {
    EngineHash([number; 16])
}

/// Block `number` of a sequence has its number as every token.
fn tokens(numbers: &[u8]) -> Vec<u32> {
    numbers.iter().flat_map(|&number| [u32::from(number); BLOCK_TOKENS]).collect()
}

fn stored(parent: Option<u8>, numbers: &[u8]) -> Stored {
    Stored {
        blocks: numbers.iter().copied().map(engine_hash).collect(),
        parent: parent.map(engine_hash),
        token_ids: tokens(numbers),
        block_tokens: BLOCK_TOKENS,
        extras: Vec::new(),
        place: DEVICE,
        is_prefix: true,
    }
}

fn removed(numbers: &[u8]) -> Event {
    let blocks = numbers.iter().copied().map(engine_hash).collect();
    Event::Removed(Removed { blocks, copies_left: None, place: DEVICE })
}

#[derive(Default)]
struct Rig {
    follower: Follower,
    index: ExactIndex,
    seq: u64,
}

impl Rig {
    fn event(&mut self, event: Event) -> Step {
        let mut changes = Vec::new();
        let batch = Batch { events: vec![event], ..Batch::default() };
        let step = self.follower.batch(self.seq, batch, &mut changes);
        self.seq += 1;
        changes.iter().for_each(|change| self.index.apply(HOLDER, change));
        step
    }

    fn stored(&mut self, parent: Option<u8>, numbers: &[u8]) {
        assert_eq!(self.event(Event::Stored(stored(parent, numbers))), Step::Applied);
    }

    fn removed(&mut self, numbers: &[u8]) {
        assert_eq!(self.event(removed(numbers)), Step::Applied);
    }

    fn lost(&mut self) {
        let change = self.follower.lost();
        self.index.apply(HOLDER, &change);
    }

    fn leading(&self, numbers: &[u8]) -> u32 {
        self.leading_of(&block_hashes(BLOCK_TOKENS, &tokens(numbers), None, None))
    }

    fn leading_of(&self, hashes: &[BlockHash]) -> u32 {
        self.index.leading(hashes).first().map_or(0, |overlap| overlap.leading)
    }
}

#[test]
fn blocks_are_found_by_a_prompts_tokens() {
    let mut rig = Rig::default();
    rig.stored(None, &[1, 2]);
    rig.stored(Some(2), &[3]);
    assert_eq!((rig.leading(&[1, 2, 3, 4]), rig.leading(&[2, 3]), rig.leading(&[1, 3])), (3, 0, 1));
    rig.removed(&[3]);
    assert_eq!(rig.leading(&[1, 2, 3]), 2);
    assert_eq!(rig.event(Event::Cleared), Step::Applied);
    assert_eq!((rig.leading(&[1]), rig.follower.names.len(), rig.follower.block_tokens()), (0, 0, Some(BLOCK_TOKENS)));
}

#[test]
fn a_block_is_gone_when_its_last_copy_is() {
    let mut rig = Rig::default();
    rig.stored(None, &[1]);
    rig.stored(None, &[1]);
    rig.removed(&[1]);
    assert_eq!(rig.leading(&[1]), 1);
    rig.removed(&[1]);
    assert_eq!(rig.leading(&[1]), 0);

    // An engine that says how many are left is believed.
    rig.stored(None, &[1]);
    let said = |left| Removed { blocks: vec![engine_hash(1)], copies_left: Some(vec![left]), place: DEVICE };
    rig.event(Event::Removed(said(2)));
    assert_eq!(rig.leading(&[1]), 1);
    rig.event(Event::Removed(said(0)));
    assert_eq!(rig.leading(&[1]), 0);
}

#[test]
fn numbers_that_repeat_or_jump_are_not_applied() {
    let mut rig = Rig { seq: 7, ..Rig::default() };
    rig.stored(None, &[1]);
    rig.seq = 7;
    assert_eq!(rig.event(removed(&[1])), Step::Repeated);
    rig.seq = 9;
    assert_eq!(rig.event(removed(&[1])), Step::Gap { expected: 8 });
    assert_eq!(rig.leading(&[1]), 1);
    rig.seq = 8;
    rig.removed(&[1]);
}

#[test]
fn claims_that_were_taken_back_return_with_the_next_use() {
    let mut rig = Rig::default();
    rig.stored(None, &[1, 2, 3]);
    rig.stored(Some(1), &[4]);
    rig.lost();
    assert_eq!(rig.leading(&[1, 2, 3]), 0);
    rig.seq = 100;
    rig.stored(Some(2), &[5]);
    assert_eq!((rig.leading(&[1, 2, 5]), rig.leading(&[1, 2, 3]), rig.leading(&[1, 4])), (3, 2, 1));
}

#[test]
fn a_block_after_an_unknown_one_has_no_name() {
    let mut rig = Rig::default();
    rig.stored(Some(9), &[1, 2]);
    rig.removed(&[1]);
    assert_eq!(rig.follower.passed(), Passed { orphans: 2, unknown_removals: 1, ..Passed::default() });
}

#[test]
fn slower_tiers_and_other_groups_are_passed_over() {
    let mut rig = Rig::default();
    let sliding = Stored { is_prefix: false, place: Place { group: Some(0), ..DEVICE }, ..stored(None, &[1]) };
    rig.event(Event::Stored(sliding));
    let whole = Stored { place: Place { group: Some(1), ..DEVICE }, ..stored(None, &[1]) };
    rig.event(Event::Stored(whole));
    let other = Stored { place: Place { group: Some(2), ..DEVICE }, ..stored(None, &[2]) };
    rig.event(Event::Stored(other));
    let slow = Stored { place: Place { group: Some(1), is_device: false }, ..stored(None, &[3]) };
    rig.event(Event::Stored(slow));
    rig.removed(&[1]);
    assert_eq!((rig.leading(&[1]), rig.leading(&[2]), rig.leading(&[3])), (1, 0, 0));
    assert_eq!(rig.follower.passed().ignored, 4);
}

#[test]
fn adapters_and_salts_keep_prompts_apart() {
    let prompt = tokens(&[1, 2]);
    let all = [(None, None), (Some("a"), None), (None, Some("a")), (Some("a"), Some("b")), (Some("ab"), None)];
    for (index, &(lora_name, cache_salt)) in all.iter().enumerate() {
        let (first, later) = extra_of(lora_name, cache_salt);
        let mut rig = Rig::default();
        rig.event(Event::Stored(Stored { extras: vec![first, later], ..stored(None, &[1, 2]) }));
        for (other, &(lora_name, cache_salt)) in all.iter().enumerate() {
            let leading = rig.leading_of(&block_hashes(BLOCK_TOKENS, &prompt, lora_name, cache_salt));
            // The first block of an adapter named like a salt has the same extra; vLLM itself can't tell those apart (the
            // second can).
            let expect = match (index, other) {
                (1, 2) | (2, 1) => 1,
                _ if index == other => 2,
                _ => 0,
            };
            assert_eq!(leading, expect, "{index} {other}");
        }
    }
}

proptest! {
    /// The model is a pool of copies; each sequence of blocks is a path in a tree where block 2n and 2n+1 follow block n.
    #[test]
    fn the_index_never_claims_more_than_the_engine_has_and_all_of_it_without_losses(
        steps in prop::collection::vec((1u8..32, 0u8..5, 0u8..20), 0..200),
        with_losses: bool,
    ) {
        let path = |block: u8| {
            let mut path = vec![block];
            while path[0] > 1 {
                path.insert(0, path[0] / 2);
            }
            path
        };
        let mut rig = Rig::default();
        let mut copies: HashMap<u8, u32> = HashMap::new();
        for (block, kind, mishap) in steps {
            let path = path(block);
            let event = if kind == 0 && copies.contains_key(&block) {
                copies.entry(block).and_modify(|copies| *copies -= 1);
                copies.retain(|_, copies| *copies > 0);
                removed(&[block])
            } else {
                // A request: what it finds is shared, the rest is stored anew.
                let found = path.iter().take_while(|block| copies.contains_key(block)).count().min(path.len() - 1);
                path[found..].iter().for_each(|&block| *copies.entry(block).or_default() += 1);
                Event::Stored(stored(found.checked_sub(1).map(|last| path[last]), &path[found..]))
            };
            if with_losses && mishap == 0 {
                rig.seq += 1;
                rig.lost();
            } else {
                prop_assert_eq!(rig.event(event), Step::Applied);
            }
            for block in 1u8..32 {
                let mut path = vec![block];
                while path[0] > 1 {
                    path.insert(0, path[0] / 2);
                }
                let has = path.iter().take_while(|block| copies.contains_key(block)).count() as u32;
                let claimed = rig.leading(&path);
                prop_assert!(claimed <= has, "block {}: {} of {}", block, claimed, has);
                prop_assert!(with_losses || claimed == has, "block {}: {} of {}", block, claimed, has);
            }
        }
    }
}
