//! Names of blocks of tokens: the chained hash that our worker's engine has too (`prefix_hash` there), for blocks of any size.
//!
//! Where a block has 32 tokens the names are the engine's own, and a test holds both to the same value. An engine with other
//! blocks gets names by the same rule; its names can't be mistaken for ours, because the hash is over a text of another length.

use baton_wire::BlockHash;

/// Separates these hashes from every other use of BLAKE3; the engine's text, letter for letter.
const CONTEXT: &str = "baton 2026 prefix block hash v1";

/// Separates what is mixed into a chain beside tokens from the tokens.
const EXTRA_CONTEXT: &str = "baton 2026 prefix block extra v1";

/// What the first block is chained to.
pub(crate) fn root(salt: u64) -> BlockHash {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(&salt.to_le_bytes());
    truncate(&hasher)
}

/// The hash of a full block whose predecessor (or root) is `parent`.
pub(crate) fn chain(parent: BlockHash, tokens: &[u32]) -> BlockHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&parent.0);
    // In pieces on the stack: a block is short, and a call of the hasher for each token costs more than the hash.
    for tokens in tokens.chunks(64) {
        let mut bytes = [0u8; 256];
        for (place, token) in bytes.chunks_exact_mut(4).zip(tokens) {
            place.copy_from_slice(&token.to_le_bytes());
        }
        hasher.update(&bytes[..tokens.len() * 4]);
    }
    truncate(&hasher)
}

/// A predecessor that differs by what a block depends on beside its tokens: an adapter, a salt, an image.
pub(crate) fn with_extra(parent: BlockHash, extra: &[u8]) -> BlockHash {
    let mut hasher = blake3::Hasher::new_derive_key(EXTRA_CONTEXT);
    hasher.update(&parent.0);
    hasher.update(extra);
    truncate(&hasher)
}

/// The hashes of all full blocks of `tokens`, in order; a last part of a block is left out. None where `block_tokens` is 0.
#[cfg(test)]
pub(crate) fn block_hashes(salt: u64, block_tokens: usize, tokens: &[u32]) -> Vec<BlockHash> {
    if block_tokens == 0 {
        return Vec::new();
    }
    let mut parent = root(salt);
    let next = |block| {
        parent = chain(parent, block);
        parent
    };
    tokens.chunks_exact(block_tokens).map(next).collect()
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
    fn the_names_are_those_of_the_engine() {
        let hash = block_hashes(42, 32, &tokens(64))[1];
        assert_eq!(hash.to_string(), "729c456ebfbceef2bd4b616861baaf1c", "the engine's prefix_hash has the same test");
    }

    #[test]
    fn blocks_of_another_size_salt_or_extra_have_other_names() {
        let all = tokens(256);
        let long = block_hashes(0, 128, &all);
        let names = [
            long[0],
            block_hashes(0, 64, &all)[1],
            block_hashes(1, 128, &all)[0],
            chain(with_extra(root(0), b"x"), &all[..128]),
        ];
        for (index, name) in names.iter().enumerate() {
            assert!(!names[..index].contains(name), "{index}");
        }
        assert_eq!(block_hashes(0, 16, &all[..47]).len(), 2);
        assert_eq!(block_hashes(0, 0, &all), []);
    }
}
