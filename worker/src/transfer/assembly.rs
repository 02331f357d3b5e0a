//! What has arrived of a transfer: every (layer, block) exactly once, each checksum, and whether it adds up to the COMMIT.
//!
//! Pure: it looks at a frame's bytes but does not keep them. Its memory is sized by what this side expects, never by what a
//! message claims.

use baton_wire::PromptHash;
use baton_wire::kv::{BlockChecksums, Commit, Header};
use std::ops::Range;

/// What the consumer is waiting for; all of it known before the first byte arrives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Layers of the model.
    pub layers: usize,
    /// KV heads of each layer.
    pub kv_heads: usize,
    /// Bytes of one layer of one block.
    pub block_bytes: usize,
    /// Blocks of the prompt that are to arrive.
    pub blocks: Range<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Hash of the prompt.
    pub prompt_hash: PromptHash,
}

/// What arrived does not add up. The transfer is over; none of its blocks may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssemblyError {
    /// Bits changed on the way.
    #[error("frame {seq} has checksum {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// The frame.
        seq: u32,
        /// In the header.
        found: u32,
        /// Of the payload.
        computed: u32,
    },
    /// The blocks' checksums do not add up to the COMMIT's digest.
    #[error("digest of all blocks differs from the one committed to")]
    Digest,
    /// The producer computed another prompt.
    #[error("KV is of another prompt")]
    PromptHash,
    /// A frame is missing or came twice.
    #[error("frame {found} where frame {expected} is next")]
    Sequence {
        /// Next.
        expected: u32,
        /// Arrived.
        found: u32,
    },
    /// A frame of layers, blocks or heads that were not asked for.
    #[error("frame of layer {layer}, blocks {first_block}+{count}, heads {head_start}+{head_count} was not asked for")]
    NotAskedFor {
        /// Layer.
        layer: u32,
        /// Index of the first block.
        first_block: u32,
        /// Blocks.
        count: u32,
        /// First KV head.
        head_start: u16,
        /// KV heads.
        head_count: u16,
    },
    /// A frame whose blocks have another size than ours.
    #[error("{found} bytes a block, {expected} here")]
    BlockBytes {
        /// Here.
        expected: usize,
        /// In the frame.
        found: usize,
    },
    /// A block came twice.
    #[error("block {block} of layer {layer} came twice")]
    Duplicate {
        /// Layer.
        layer: usize,
        /// Index in the prompt.
        block: u32,
    },
    /// As many frames as were committed to have arrived, and blocks are missing.
    #[error("{blocks} blocks of all layers are missing after the last frame")]
    Missing {
        /// Counted in each layer.
        blocks: usize,
    },
    /// More frames have arrived than the COMMIT counts.
    #[error("{found} frames have arrived, {committed} were committed to")]
    TooManyFrames {
        /// Counted by the producer.
        committed: u32,
        /// Arrived.
        found: u32,
    },
    /// The COMMIT is of another number of tokens.
    #[error("{found} tokens were committed to, the prompt has {expected}")]
    Tokens {
        /// In the prompt.
        expected: usize,
        /// In the COMMIT.
        found: u32,
    },
    /// The COMMIT brings no first token, or more cached tokens than the prompt has.
    #[error("COMMIT brings {choices} first tokens and {cached_tokens} cached tokens")]
    CommitShape {
        /// First tokens.
        choices: usize,
        /// Cached tokens.
        cached_tokens: u32,
    },
    /// A second COMMIT.
    #[error("a second COMMIT")]
    SecondCommit,
}

impl AssemblyError {
    /// Whether the bytes themselves are wrong, rather than how they were sent.
    pub const fn is_corruption(&self) -> bool {
        match self {
            AssemblyError::Checksum { .. } | AssemblyError::Digest | AssemblyError::PromptHash => true,
            AssemblyError::Sequence { .. }
            | AssemblyError::NotAskedFor { .. }
            | AssemblyError::BlockBytes { .. }
            | AssemblyError::Duplicate { .. }
            | AssemblyError::Missing { .. }
            | AssemblyError::TooManyFrames { .. }
            | AssemblyError::Tokens { .. }
            | AssemblyError::CommitShape { .. }
            | AssemblyError::SecondCommit => false,
        }
    }
}

/// What has arrived so far.
#[derive(Clone, Debug)]
pub struct Assembly {
    expected: Expected,
    /// `[layer][block - blocks.start]`
    arrived: Vec<bool>,
    missing: usize,
    frames: u32,
    checksums: BlockChecksums,
}

impl Assembly {
    /// Nothing yet.
    pub fn new(expected: Expected) -> Self {
        let missing = expected.layers * expected.blocks.len();
        Assembly {
            arrived: vec![false; missing],
            missing,
            frames: 0,
            checksums: BlockChecksums::new(expected.layers, expected.blocks.clone()),
            expected,
        }
    }

    /// Bytes of one layer of one block.
    pub fn block_bytes(&self) -> usize {
        self.expected.block_bytes
    }

    /// Checks a frame and marks its blocks. On success the caller may write `payload` to its own blocks.
    ///
    /// # Errors
    /// See [`AssemblyError`]; after one, the assembly is of no further use.
    pub fn accept(&mut self, header: &Header, payload: &[u8]) -> Result<(), AssemblyError> {
        if header.seq != self.frames {
            return Err(AssemblyError::Sequence { expected: self.frames, found: header.seq });
        }
        let layer = self.check_range(header)?;
        let block_bytes = self.expected.block_bytes;
        let found = payload.len() / header.block_count as usize;
        if found != block_bytes || !payload.len().is_multiple_of(header.block_count as usize) {
            return Err(AssemblyError::BlockBytes { expected: block_bytes, found });
        }
        let mut computed = 0;
        for (block, bytes) in (header.first_block..).zip(payload.chunks_exact(block_bytes)) {
            let place = layer * self.expected.blocks.len() + (block - self.expected.blocks.start) as usize;
            if std::mem::replace(&mut self.arrived[place], true) {
                return Err(AssemblyError::Duplicate { layer, block });
            }
            let crc = BlockChecksums::of_block(bytes);
            self.checksums.set(layer, block, crc);
            computed = BlockChecksums::append(computed, crc, block_bytes);
        }
        if computed != header.payload_crc {
            return Err(AssemblyError::Checksum { seq: header.seq, found: header.payload_crc, computed });
        }
        self.missing -= header.block_count as usize;
        self.frames += 1;
        Ok(())
    }

    /// Whether everything that `commit` speaks of has arrived; false while frames are still under way.
    ///
    /// # Errors
    /// See [`AssemblyError`].
    pub fn complete(&self, commit: &Commit) -> Result<bool, AssemblyError> {
        let Expected { prompt_tokens, prompt_hash, .. } = &self.expected;
        if commit.tokens as usize != *prompt_tokens {
            return Err(AssemblyError::Tokens { expected: *prompt_tokens, found: commit.tokens });
        }
        if commit.prompt_hash != *prompt_hash {
            return Err(AssemblyError::PromptHash);
        }
        if commit.choices.is_empty() || commit.cached_tokens > commit.tokens {
            let (choices, cached_tokens) = (commit.choices.len(), commit.cached_tokens);
            return Err(AssemblyError::CommitShape { choices, cached_tokens });
        }
        if self.frames < commit.frames {
            return Ok(false);
        }
        if self.frames > commit.frames {
            return Err(AssemblyError::TooManyFrames { committed: commit.frames, found: self.frames });
        }
        if self.missing > 0 {
            return Err(AssemblyError::Missing { blocks: self.missing });
        }
        if self.checksums.digest() != commit.digest {
            return Err(AssemblyError::Digest);
        }
        Ok(true)
    }

    fn check_range(&self, header: &Header) -> Result<usize, AssemblyError> {
        let Expected { layers, kv_heads, blocks, .. } = &self.expected;
        let Header { layer, first_block, block_count: count, head_start, head_count, .. } = *header;
        let last = first_block.checked_add(count);
        let asked_for = (layer as usize) < *layers
            && count > 0
            && first_block >= blocks.start
            && last.is_some_and(|last| last <= blocks.end)
            && head_start == 0
            && head_count as usize == *kv_heads;
        asked_for.then_some(layer as usize).ok_or(AssemblyError::NotAskedFor {
            layer,
            first_block,
            count,
            head_start,
            head_count,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_wire::kv::{FirstToken, Kind};
    use baton_wire::{KvDigest, TransferId};
    use proptest::prelude::*;

    const BLOCK_BYTES: usize = 24;

    fn expected(layers: usize, blocks: Range<u32>) -> Expected {
        let prompt_tokens = blocks.end as usize * 32;
        let prompt_hash = PromptHash([9; 32]);
        Expected { layers, kv_heads: 2, block_bytes: BLOCK_BYTES, blocks, prompt_tokens, prompt_hash }
    }

    fn frame(seq: u32, layer: usize, first_block: u32, count: u32) -> (Header, Vec<u8>) {
        let payload: Vec<u8> = (0..count)
            .flat_map(|i| {
                (0..BLOCK_BYTES).map(move |at| (layer * 101 + (first_block + i) as usize * 31 + at * 7) as u8)
            })
            .collect();
        let header = Header {
            seq,
            layer: layer as u32,
            first_block,
            block_count: count,
            len: payload.len() as u32,
            head_count: 2,
            payload_crc: crc32c::crc32c(&payload),
            ..Header::bare(Kind::Frame, TransferId([1; 16]), 1)
        };
        (header, payload)
    }

    /// All of `expected`, each layer cut at `cuts`.
    fn frames(expected: &Expected, cuts: &[u32]) -> Vec<(Header, Vec<u8>)> {
        let mut all = Vec::new();
        for layer in 0..expected.layers {
            let mut at = expected.blocks.start;
            for cut in cuts.iter().cycle() {
                if at == expected.blocks.end {
                    break;
                }
                let count = (*cut).min(expected.blocks.end - at);
                all.push(frame(all.len() as u32, layer, at, count));
                at += count;
            }
        }
        all
    }

    fn commit(expected: &Expected, frames: u32, digest: KvDigest) -> Commit {
        Commit {
            tokens: expected.prompt_tokens as u32,
            frames,
            digest,
            prompt_hash: expected.prompt_hash,
            cached_tokens: 0,
            choices: vec![FirstToken { id: 1, logprob: None, top_logprobs: vec![], logits_hash: None }],
            since_compute_end_us: 0,
        }
    }

    fn digest(expected: &Expected) -> KvDigest {
        let mut checksums = BlockChecksums::new(expected.layers, expected.blocks.clone());
        for (header, payload) in frames(expected, &[1]) {
            checksums.set(header.layer as usize, header.first_block, crc32c::crc32c(&payload));
        }
        checksums.digest()
    }

    proptest! {
        #[test]
        fn a_transfer_is_complete_exactly_when_its_last_frame_has_arrived_however_it_was_cut(
            layers in 1..4usize, first in 0..4u32, count in 0..6u32, cuts in prop::collection::vec(1..4u32, 1..4),
        ) {
            let expected = expected(layers, first..first + count);
            let all = frames(&expected, &cuts);
            let commit = commit(&expected, all.len() as u32, digest(&expected));
            let mut assembly = Assembly::new(expected);
            for (header, payload) in &all {
                prop_assert_eq!(assembly.complete(&commit), Ok(false));
                prop_assert_eq!(assembly.accept(header, payload), Ok(()));
            }
            prop_assert_eq!(assembly.complete(&commit), Ok(true));
        }

        #[test]
        fn a_changed_byte_in_any_frame_is_never_accepted(
            cuts in prop::collection::vec(1..4u32, 1..4), which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), flip in 1..=255u8,
        ) {
            let expected = expected(2, 1..6);
            let mut all = frames(&expected, &cuts);
            let which = which.index(all.len());
            let at = at.index(all[which].1.len());
            all[which].1[at] ^= flip;
            let mut assembly = Assembly::new(expected);
            for (seq, (header, payload)) in all.iter().enumerate() {
                let accepted = assembly.accept(header, payload);
                prop_assert_eq!(accepted.is_ok(), seq != which);
                if let Err(error) = accepted {
                    prop_assert!(error.is_corruption());
                    break;
                }
            }
        }

        #[test]
        fn any_header_is_accepted_or_refused_without_a_panic(
            numbers in any::<(u32, u32, u32)>(), block_count in 1..9u32, heads in any::<(u16, u16)>(), small in any::<bool>(), blocks in 0..5usize,
        ) {
            let mut assembly = Assembly::new(expected(2, 1..6));
            let (seq, layer, first_block) = numbers;
            let (seq, layer, first_block) = if small { (0, layer % 3, first_block % 8) } else { (seq, layer, first_block) };
            let header = Header {
                seq, layer, first_block, block_count, head_start: heads.0, head_count: heads.1, ..frame(0, 0, 1, 1).0
            };
            prop_assert!(assembly.accept(&header, &vec![0; blocks * BLOCK_BYTES]).is_err());
        }
    }

    #[test]
    fn each_way_to_be_wrong_has_its_own_error() {
        let check = |header: Header, payload: &[u8], expect: AssemblyError| {
            let mut assembly = Assembly::new(expected(2, 1..6));
            assembly.accept(&frame(0, 0, 1, 2).0, &frame(0, 0, 1, 2).1).expect("the first frame is right");
            assert_eq!(assembly.accept(&header, payload), Err(expect));
        };
        let (right, payload) = frame(1, 0, 3, 1);
        check(Header { seq: 0, ..right }, &payload, AssemblyError::Sequence { expected: 1, found: 0 });
        check(Header { seq: 2, ..right }, &payload, AssemblyError::Sequence { expected: 1, found: 2 });
        check(Header { first_block: 2, ..right }, &payload, AssemblyError::Duplicate { layer: 0, block: 2 });
        check(right, &payload[1..], AssemblyError::BlockBytes { expected: 24, found: 23 });
        let outside = |header: Header| {
            let Header { layer, first_block, block_count: count, head_start, head_count, .. } = header;
            check(header, &payload, AssemblyError::NotAskedFor { layer, first_block, count, head_start, head_count });
        };
        outside(Header { layer: 2, ..right });
        outside(Header { first_block: 0, ..right });
        outside(Header { first_block: 6, ..right });
        outside(Header { head_start: 1, ..right });
        outside(Header { head_count: 1, ..right });
    }

    #[test]
    fn a_commit_that_does_not_fit_is_refused() {
        let expected = expected(1, 0..2);
        let right = commit(&expected, 1, digest(&expected));
        let mut assembly = Assembly::new(expected.clone());
        let (header, payload) = frame(0, 0, 0, 2);
        assembly.accept(&header, &payload).expect("right");
        assert_eq!(assembly.complete(&right), Ok(true));
        let check = |commit: Commit, expect: AssemblyError| assert_eq!(assembly.complete(&commit), Err(expect));
        check(Commit { tokens: 63, ..right.clone() }, AssemblyError::Tokens { expected: 64, found: 63 });
        check(Commit { prompt_hash: PromptHash([0; 32]), ..right.clone() }, AssemblyError::PromptHash);
        check(Commit { digest: KvDigest([0; 32]), ..right.clone() }, AssemblyError::Digest);
        check(Commit { frames: 0, ..right.clone() }, AssemblyError::TooManyFrames { committed: 0, found: 1 });
        let shape = |choices, cached_tokens| AssemblyError::CommitShape { choices, cached_tokens };
        check(Commit { choices: vec![], ..right.clone() }, shape(0, 0));
        check(Commit { cached_tokens: 65, ..right.clone() }, shape(1, 65));
        let missing = Assembly::new(expected).complete(&Commit { frames: 0, ..right });
        assert_eq!(missing, Err(AssemblyError::Missing { blocks: 2 }));
    }
}
