//! Which runs of blocks are computed and not yet sent: integers only, no memory and no sockets.
//!
//! Each layer has two marks on the prompt's blocks: `done` (KV complete) and `sent`. A run between them may leave. The
//! lowest layer goes first, because a decode worker needs it first; within a layer, blocks go in the prompt's order.

use baton_engine::kv_pool::BLOCK_TOKENS;

/// A run of blocks of one layer that is ready to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Layer.
    pub layer: usize,
    /// Index in the prompt of the first block.
    pub first_block: u32,
    /// Blocks.
    pub count: u32,
}

/// Progress of one prompt through compute and wire.
#[derive(Clone, Debug)]
pub struct Watermark {
    prompt_tokens: usize,
    /// Blocks that are never sent, because the consumer has them.
    skipped: u32,
    layers: Vec<Marks>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Marks {
    done: u32,
    sent: u32,
}

impl Watermark {
    /// A prompt of `prompt_tokens` tokens of which nothing is computed yet.
    pub fn new(layers: usize, prompt_tokens: usize) -> Self {
        Watermark { prompt_tokens, skipped: 0, layers: vec![Marks::default(); layers] }
    }

    /// Blocks of the whole prompt, the last one perhaps partly filled.
    pub fn prompt_blocks(&self) -> u32 {
        u32::try_from(self.prompt_tokens.div_ceil(BLOCK_TOKENS)).expect("a prompt's blocks are ids of 32 bits")
    }

    /// Nothing before `block` is to be sent. Called once, before the first run leaves.
    pub fn skip_to(&mut self, block: u32) {
        self.skipped = block;
        self.layers.iter_mut().for_each(|marks| marks.sent = marks.sent.max(block));
    }

    /// KV of the prompt's first `tokens` tokens is complete in `layer`. A block leaves when it is full: a partly filled one would
    /// be sent twice, unless it is the prompt's last.
    pub fn computed(&mut self, layer: usize, tokens: usize) {
        let blocks = if tokens >= self.prompt_tokens {
            self.prompt_blocks()
        } else {
            u32::try_from(tokens / BLOCK_TOKENS).expect("fewer than the prompt's blocks")
        };
        let marks = &mut self.layers[layer];
        marks.done = marks.done.max(blocks);
    }

    /// Blocks from `block` on were lost (preemption) and will be computed again, elsewhere. What was sent of them stays valid:
    /// equal tokens give equal KV.
    pub fn lost_from(&mut self, block: u32) {
        self.layers.iter_mut().for_each(|marks| marks.done = marks.done.min(block));
    }

    /// The next run that may leave, of at most `count_max` blocks.
    pub fn next_run(&self, count_max: u32) -> Option<Run> {
        let (layer, marks) = self.layers.iter().enumerate().find(|(_, marks)| marks.sent < marks.done)?;
        let count = (marks.done - marks.sent).min(count_max);
        (count > 0).then_some(Run { layer, first_block: marks.sent, count })
    }

    /// `run`, which [`Watermark::next_run`] gave, leaves.
    pub fn sent(&mut self, run: Run) {
        self.layers[run.layer].sent = run.first_block + run.count;
    }

    /// Whether every block of every layer that is to be sent has been.
    pub fn all_sent(&self) -> bool {
        self.layers.iter().all(|marks| marks.sent >= self.prompt_blocks())
    }

    /// Blocks that are to be sent, as indices in the prompt.
    pub fn wanted(&self) -> std::ops::Range<u32> {
        self.skipped..self.prompt_blocks()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_partly_filled_block_waits_unless_it_is_the_last() {
        let mut watermark = Watermark::new(1, 70);
        watermark.computed(0, 63);
        assert_eq!(watermark.next_run(9), Some(Run { layer: 0, first_block: 0, count: 1 }));
        watermark.computed(0, 70);
        assert_eq!(watermark.next_run(9), Some(Run { layer: 0, first_block: 0, count: 3 }));
    }

    #[test]
    fn blocks_that_the_consumer_has_are_never_sent() {
        let mut watermark = Watermark::new(2, 64);
        (0..2).for_each(|layer| watermark.computed(layer, 64));
        watermark.skip_to(2);
        assert_eq!(watermark.next_run(9), None);
        assert!(watermark.all_sent());
    }

    #[test]
    fn a_lost_block_is_not_sent_until_it_is_computed_again() {
        let mut watermark = Watermark::new(1, 96);
        watermark.computed(0, 96);
        watermark.sent(Run { layer: 0, first_block: 0, count: 1 });
        watermark.lost_from(0);
        assert_eq!(watermark.next_run(9), None);
        watermark.computed(0, 64);
        assert_eq!(watermark.next_run(9), Some(Run { layer: 0, first_block: 1, count: 1 }));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Computed(usize, usize),
        Lost(u32),
        Send(u32),
    }

    fn steps(layers: usize) -> impl Strategy<Value = Vec<Step>> {
        prop::collection::vec(
            prop_oneof![
                6 => (0..layers, 0..200usize).prop_map(|(layer, tokens)| Step::Computed(layer, tokens)),
                1 => (0..7u32).prop_map(Step::Lost),
                6 => (1..5u32).prop_map(Step::Send),
            ],
            0..80,
        )
    }

    proptest! {
        #[test]
        fn each_block_of_each_layer_leaves_once_and_only_when_computed(
            prompt_tokens in 1..200usize, skipped in 0..7u32, steps in steps(3),
        ) {
            let mut watermark = Watermark::new(3, prompt_tokens);
            let blocks = watermark.prompt_blocks();
            let skipped = skipped.min(blocks);
            watermark.skip_to(skipped);
            let mut done = [0usize; 3];
            let mut left = BTreeSet::new();
            let finish = (0..3).map(|layer| Step::Computed(layer, prompt_tokens)).chain((0..99).map(|_| Step::Send(1)));
            for step in steps.into_iter().chain(finish) {
                match step {
                    Step::Computed(layer, tokens) => {
                        let tokens = tokens.min(prompt_tokens);
                        watermark.computed(layer, tokens);
                        done[layer] = done[layer].max(tokens);
                    }
                    Step::Lost(block) => {
                        watermark.lost_from(block);
                        done.iter_mut().for_each(|done| *done = (*done).min(block as usize * BLOCK_TOKENS));
                    }
                    Step::Send(count_max) => {
                        let Some(run) = watermark.next_run(count_max) else { continue };
                        prop_assert!(run.count >= 1 && run.count <= count_max);
                        for block in run.first_block..run.first_block + run.count {
                            let needed = ((block as usize + 1) * BLOCK_TOKENS).min(prompt_tokens);
                            prop_assert!(done[run.layer] >= needed, "block {block} of layer {} left early", run.layer);
                            prop_assert!(left.insert((run.layer, block)), "block {block} left twice");
                        }
                        watermark.sent(run);
                    }
                }
                prop_assert_eq!(watermark.all_sent(), left.len() == 3 * (blocks - skipped) as usize);
            }
            prop_assert!(watermark.all_sent());
        }
    }
}
