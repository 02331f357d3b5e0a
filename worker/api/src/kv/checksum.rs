//! The checksum of each block of each layer, and the digest over them that a COMMIT carries.
//!
//! A CRC-32C is taken of each block once, where its bytes are copied anyway. Combined they give a frame's checksum (catches
//! damage on the way, frame by frame); in a table by (layer, block of the prompt) they give the digest (catches a frame that is
//! whole but belongs elsewhere, is missing, or came twice). Neither depends on where the blocks lie in a pool or on how they were
//! cut into frames.

use crate::KvDigest;
use std::ops::Range;

/// Checksums of a prompt's blocks in all layers, from the first block that is handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockChecksums {
    layers: usize,
    blocks: Range<u32>,
    /// `[layer][block - blocks.start]`
    crcs: Vec<u32>,
}

impl BlockChecksums {
    /// A table of zeroes for `layers` layers of the prompt's blocks `blocks`.
    pub fn new(layers: usize, blocks: Range<u32>) -> Self {
        BlockChecksums { layers, crcs: vec![0; layers * blocks.len()], blocks }
    }

    /// Enters the checksum of one layer of one block.
    ///
    /// # Panics
    /// When layer or block are outside of what the table was made for: the caller has checked them against the same bounds.
    pub fn set(&mut self, layer: usize, block: u32, crc: u32) {
        let place = self.place(layer, block).expect("layer and block were checked against the table's own bounds");
        self.crcs[place] = crc;
    }

    /// The digest: BLAKE3 over the table's shape and then the checksums, layer by layer, all as little-endian numbers.
    pub fn digest(&self) -> KvDigest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"baton-kv-digest-v1\0");
        hasher.update(&(self.layers as u64).to_le_bytes());
        hasher.update(&self.blocks.start.to_le_bytes());
        hasher.update(&self.blocks.end.to_le_bytes());
        for crc in &self.crcs {
            hasher.update(&crc.to_le_bytes());
        }
        KvDigest(*hasher.finalize().as_bytes())
    }

    /// Checksum of one block's bytes.
    pub fn of_block(bytes: &[u8]) -> u32 {
        crc32c::crc32c(bytes)
    }

    /// Checksum of `so_far` followed by a block of `block_bytes` bytes, without looking at the bytes again.
    pub fn append(so_far: u32, block_crc: u32, block_bytes: usize) -> u32 {
        crc32c::crc32c_combine(so_far, block_crc, block_bytes)
    }

    fn place(&self, layer: usize, block: u32) -> Option<usize> {
        let within = layer < self.layers && self.blocks.contains(&block);
        within.then(|| layer * self.blocks.len() + (block - self.blocks.start) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn blocks_checksums_combine_to_the_frames(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..99), 0..9)) {
            let combined = blocks.iter().fold(0, |crc, block| {
                BlockChecksums::append(crc, BlockChecksums::of_block(block), block.len())
            });
            prop_assert_eq!(combined, crc32c::crc32c(&blocks.concat()));
        }

        #[test]
        fn the_digest_depends_on_each_checksum_and_its_place_but_not_on_the_order(
            layers in 1..4usize, first in 0..5u32, count in 1..5u32, crcs in prop::collection::vec(1..u32::MAX, 16), at in any::<prop::sample::Index>(),
        ) {
            let places: Vec<_> = (0..layers).flat_map(|l| (first..first + count).map(move |b| (l, b))).collect();
            let mut forward = BlockChecksums::new(layers, first..first + count);
            places.iter().zip(&crcs).for_each(|(&(l, b), &crc)| forward.set(l, b, crc));
            let mut backward = BlockChecksums::new(layers, first..first + count);
            places.iter().zip(&crcs).rev().for_each(|(&(l, b), &crc)| backward.set(l, b, crc));
            prop_assert_eq!(forward.digest(), backward.digest());
            let (l, b) = places[at.index(places.len())];
            backward.set(l, b, 0);
            prop_assert_ne!(forward.digest(), backward.digest());
        }
    }

    #[test]
    fn the_digest_depends_on_the_shape() {
        let digests = [(1, 0..2), (2, 0..1), (1, 1..3), (2, 0..0), (3, 0..0)]
            .map(|(layers, blocks)| BlockChecksums::new(layers, blocks).digest());
        for (i, digest) in digests.iter().enumerate() {
            assert!(!digests[..i].contains(digest), "shape {i}");
        }
    }
}
