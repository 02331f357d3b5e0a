//! Names for prefixes: a chained 128-bit hash of each full block of a token sequence.
//!
//! Equal hashes mean equal salt and equal tokens from the start on, so a block found by its hash can be used without comparing tokens.
//! The chain is BLAKE3 in key-derivation mode for the root and plain for each link; it depends on nothing of this process, machine
//! or build, because hashes travel to routers and other workers. The idea of chaining is vLLM's
//! (<https://docs.vllm.ai/en/latest/design/prefix_caching/>); unlike there the hash is not seeded per process.

use crate::kv_pool::BLOCK_TOKENS;

/// Separates these hashes from every other use of BLAKE3; a change of what is hashed changes the text.
const CONTEXT: &str = "baton 2026 prefix block hash v1";

/// Hash of one full block and of everything before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 16]);

impl std::fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlockHash(")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(")")
    }
}

/// What the first block is chained to.
pub fn root(salt: u64) -> BlockHash {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(&salt.to_le_bytes());
    truncate(&hasher)
}

/// The hash of a full block whose predecessor (or root) is `parent`.
///
/// # Panics
/// When `tokens` is not one block's worth: a part of a block has no name.
pub fn chain(parent: BlockHash, tokens: &[u32]) -> BlockHash {
    assert_eq!(tokens.len(), BLOCK_TOKENS, "only full blocks are hashed");
    let mut hasher = blake3::Hasher::new();
    hasher.update(&parent.0);
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    truncate(&hasher)
}

/// The hashes of all full blocks of `tokens`, in order; a last part of a block is left out.
pub fn block_hashes(salt: u64, tokens: &[u32]) -> Vec<BlockHash> {
    let mut parent = root(salt);
    tokens
        .chunks_exact(BLOCK_TOKENS)
        .map(|block| {
            parent = chain(parent, block);
            parent
        })
        .collect()
}

fn truncate(hasher: &blake3::Hasher) -> BlockHash {
    let mut hash = [0; 16];
    hasher.finalize_xof().fill(&mut hash);
    BlockHash(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(count: usize) -> Vec<u32> {
        (0..count as u32).map(|index| index * 7 + 3).collect()
    }

    #[test]
    fn only_full_blocks_have_a_hash() {
        for (count, blocks) in [(0, 0), (31, 0), (32, 1), (63, 1), (64, 2), (100, 3)] {
            assert_eq!(block_hashes(0, &tokens(count)).len(), blocks, "{count} tokens");
        }
    }

    #[test]
    fn a_block_is_named_by_all_that_precedes_it() {
        let whole = block_hashes(0, &tokens(96));
        assert_eq!(block_hashes(0, &tokens(64)), whole[..2], "a longer sequence keeps the names of its prefix");

        let mut changed = tokens(96);
        changed[0] += 1;
        let changed = block_hashes(0, &changed);
        assert!(whole.iter().zip(&changed).all(|(a, b)| a != b), "a change in the first block renames all");
    }

    #[test]
    fn different_salts_share_no_name() {
        assert_ne!(block_hashes(1, &tokens(32)), block_hashes(2, &tokens(32)));
    }

    #[test]
    fn the_names_are_the_same_in_every_process_and_release() {
        let hash = block_hashes(42, &tokens(64))[1];
        assert_eq!(format!("{hash:?}"), "BlockHash(729c456ebfbceef2bd4b616861baaf1c)");
    }
}
