//! Memory for KV blocks: raw aligned regions with export, import and a generation for each block.
//!
//! Block `b` of layer `l` is one contiguous run of bytes, `[K|V][kv_head][block_tokens][head_dim]` (head-major: a range of heads is
//! a strided slice, a layer of a block one run on the wire). Who may touch a block is decided elsewhere, by holding it: the
//! pool only guarantees that a copy in or out names the block's present owner, and that a new owner waits for it to end.
#![allow(unsafe_code)] // The one place that turns shared memory into slices; each block below has its argument.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// Tokens a block. 32 matches the page size of the paged GPU kernels and makes a layer's block a good unit of transfer.
pub const BLOCK_TOKENS: usize = 32;

/// Index of a block in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Type of the stored elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl KvDtype {
    /// Bytes an element.
    pub const fn size(self) -> usize {
        match self {
            KvDtype::Bf16 | KvDtype::F16 => 2,
            KvDtype::F32 => 4,
        }
    }

    /// The type as configs, fingerprints and logs spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            KvDtype::Bf16 => "bf16",
            KvDtype::F16 => "f16",
            KvDtype::F32 => "f32",
        }
    }
}

/// Shape of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers.
    pub layers: usize,
    /// KV heads of each layer.
    pub kv_heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// Element type.
    pub dtype: KvDtype,
    /// Blocks in the pool.
    pub num_blocks: usize,
}

impl KvLayout {
    /// Bytes of one head's K (or V) in one block: the smallest contiguous run.
    pub const fn head_bytes(&self) -> usize {
        BLOCK_TOKENS * self.head_dim * self.dtype.size()
    }

    /// Bytes of one block in one layer, K and V of all heads.
    pub const fn block_bytes(&self) -> usize {
        2 * self.kv_heads * self.head_bytes()
    }

    /// Bytes of one block in all layers.
    pub const fn block_bytes_all_layers(&self) -> usize {
        self.layers * self.block_bytes()
    }

    /// Bytes of the whole pool.
    pub const fn pool_bytes(&self) -> usize {
        self.num_blocks * self.block_bytes_all_layers()
    }
}

/// A block changed hands between being exported and being read: its content is another sequence's now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("block {} is of generation {found}, not {expected}: it was freed and reused", block.0)]
pub struct StaleBlock {
    /// Which block.
    pub block: BlockId,
    /// The generation that the reader holds.
    pub expected: u64,
    /// The block's own.
    pub found: u64,
}

/// Memory for KV blocks, seen by engine and transfer alike.
pub trait KvPool: Send + Sync {
    /// Shape of the pool.
    fn layout(&self) -> &KvLayout;

    /// How often `block` has been given to a new owner.
    fn generation(&self, block: BlockId) -> u64;

    /// Marks `block` as given to a new owner; called by the block manager's owner on allocation, before anything is written. Copies
    /// under way end first, later ones of the old generation are refused.
    fn begin_generation(&self, block: BlockId) -> u64;

    /// Copies one layer of a block out.
    ///
    /// # Errors
    /// [`StaleBlock`] when the block was given to a new owner.
    fn export(&self, layer: usize, block: BlockId, generation: u64, out: &mut [u8]) -> Result<(), StaleBlock>;

    /// Copies one layer of a block in. Only the block's holder may call this.
    ///
    /// # Errors
    /// [`StaleBlock`] when the block is no longer the caller's.
    fn import(&self, layer: usize, block: BlockId, generation: u64, bytes: &[u8]) -> Result<(), StaleBlock>;

    /// Copies a block to another in all layers. Only the holder of both may call this.
    fn copy_block(&self, from: BlockId, to: BlockId) {
        let mut scratch = vec![0; self.layout().block_bytes()];
        for layer in 0..self.layout().layers {
            self.export(layer, from, self.generation(from), &mut scratch).expect("the caller holds the source");
            self.import(layer, to, self.generation(to), &scratch).expect("the caller holds the destination");
        }
    }

    /// The memory of one layer of a block, valid for `layout().block_bytes()` bytes and aligned to 64, as long as the pool lives.
    fn region(&self, layer: usize, block: BlockId) -> *mut u8;
}

/// A pool on the process's own heap.
pub struct HeapPool {
    layout: KvLayout,
    memory: Box<[CacheLine]>,
    /// Of each block: its generation, and in the low bits how many copies in or out are under way.
    owners: Box<[AtomicU64]>,
}

/// Bits of an owner word that count copies under way. A copy is one call on one thread, so 65,535 threads would have to copy the same
/// block at once to fill them.
const PIN_BITS: u32 = 16;
const PIN_MASK: u64 = (1 << PIN_BITS) - 1;

#[repr(C, align(64))]
struct CacheLine(UnsafeCell<[u8; 64]>);

// SAFETY: the memory is plain bytes without invariants. A block is written by its owner alone: the engine's thread, or for an import
// the one that fills it. A copy in or out pins the block's generation, and `begin_generation` waits for the pins, so a copy never
// meets the next owner's writes; within one generation bytes are written before their export is allowed.
unsafe impl Sync for HeapPool {}

impl HeapPool {
    /// A pool of zeroes.
    pub fn new(layout: KvLayout) -> Self {
        let lines = layout.pool_bytes().div_ceil(64);
        HeapPool {
            layout,
            memory: (0..lines).map(|_| CacheLine(UnsafeCell::new([0; 64]))).collect(),
            owners: (0..layout.num_blocks).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Keeps `block` in the generation `expected` until the pin is dropped.
    fn pin(&self, block: BlockId, expected: u64) -> Result<Pin<'_>, StaleBlock> {
        let owner = &self.owners[block.0 as usize];
        let pinned = owner.fetch_update(Ordering::Acquire, Ordering::Relaxed, |word| {
            (word >> PIN_BITS == expected && word & PIN_MASK < PIN_MASK).then_some(word + 1)
        });
        match pinned {
            Ok(_) => Ok(Pin(owner)),
            Err(word) => Err(StaleBlock { block, expected, found: word >> PIN_BITS }),
        }
    }
}

/// A copy under way.
struct Pin<'a>(&'a AtomicU64);

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl KvPool for HeapPool {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn generation(&self, block: BlockId) -> u64 {
        self.owners[block.0 as usize].load(Ordering::Acquire) >> PIN_BITS
    }

    /// Waits for copies of the block that are under way: at most the time of one copy of one layer, microseconds.
    fn begin_generation(&self, block: BlockId) -> u64 {
        let owner = &self.owners[block.0 as usize];
        loop {
            let word = owner.load(Ordering::Relaxed);
            let next = word + (1 << PIN_BITS);
            if word & PIN_MASK == 0 && owner.compare_exchange(word, next, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return next >> PIN_BITS;
            }
            std::thread::yield_now();
        }
    }

    fn export(&self, layer: usize, block: BlockId, generation: u64, out: &mut [u8]) -> Result<(), StaleBlock> {
        assert_eq!(out.len(), self.layout.block_bytes(), "an export is one layer of a block");
        let _pin = self.pin(block, generation)?;
        // SAFETY: `region` is valid for `block_bytes` bytes and `out` is as long (asserted). The pin keeps the next owner away, and the
        // present one has finished writing what it lets be exported.
        unsafe { std::ptr::copy_nonoverlapping(self.region(layer, block), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    fn import(&self, layer: usize, block: BlockId, generation: u64, bytes: &[u8]) -> Result<(), StaleBlock> {
        assert_eq!(bytes.len(), self.layout.block_bytes(), "an import is one layer of a block");
        let _pin = self.pin(block, generation)?;
        // SAFETY: `region` is valid for `block_bytes` bytes and `bytes` is as long (asserted). The caller holds the block, so nobody else
        // reads or writes it, and the pin keeps the next owner away where the caller loses it meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.region(layer, block), bytes.len()) };
        Ok(())
    }

    fn region(&self, layer: usize, block: BlockId) -> *mut u8 {
        assert!(layer < self.layout.layers && (block.0 as usize) < self.layout.num_blocks, "block out of the pool");
        let offset = (layer * self.layout.num_blocks + block.0 as usize) * self.layout.block_bytes();
        // SAFETY: the offset plus one block lies inside the allocation, by the assertion above and the size in `new`.
        unsafe { UnsafeCell::raw_get(self.memory.as_ptr().cast::<UnsafeCell<u8>>()).add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    const LAYOUT: KvLayout = KvLayout { layers: 2, kv_heads: 2, head_dim: 4, dtype: KvDtype::F32, num_blocks: 3 };

    fn bytes(fill: u8) -> Vec<u8> {
        vec![fill; LAYOUT.block_bytes()]
    }

    fn read(pool: &HeapPool, layer: usize, block: BlockId) -> Vec<u8> {
        let mut out = bytes(0xee);
        pool.export(layer, block, pool.generation(block), &mut out).expect("the generation is current");
        out
    }

    #[test]
    fn what_was_imported_is_exported_and_nothing_else_changes() {
        let pool = HeapPool::new(LAYOUT);
        let generation = pool.begin_generation(BlockId(1));
        pool.import(1, BlockId(1), generation, &bytes(7)).expect("the block is ours");
        assert_eq!(read(&pool, 1, BlockId(1)), bytes(7));
        for (layer, block) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)] {
            assert_eq!(read(&pool, layer, BlockId(block)), bytes(0), "layer {layer} of block {block}");
        }
    }

    #[test]
    fn a_block_that_changed_hands_is_neither_read_nor_written() {
        let pool = HeapPool::new(LAYOUT);
        let mine = pool.begin_generation(BlockId(0));
        let theirs = pool.begin_generation(BlockId(0));
        let stale = Err(StaleBlock { block: BlockId(0), expected: mine, found: theirs });
        assert_eq!(pool.import(0, BlockId(0), mine, &bytes(9)), stale);
        assert_eq!(pool.export(0, BlockId(0), mine, &mut bytes(0)), stale);
        assert_eq!(read(&pool, 0, BlockId(0)), bytes(0), "the refused write left no trace");
    }

    #[test]
    fn a_copy_takes_all_layers_along() {
        let pool = HeapPool::new(LAYOUT);
        let generation = pool.begin_generation(BlockId(0));
        pool.import(0, BlockId(0), generation, &bytes(3)).expect("the block is ours");
        pool.import(1, BlockId(0), generation, &bytes(4)).expect("the block is ours");
        pool.copy_block(BlockId(0), BlockId(2));
        assert_eq!((read(&pool, 0, BlockId(2)), read(&pool, 1, BlockId(2))), (bytes(3), bytes(4)));
    }

    #[test]
    fn an_export_is_all_of_one_owner_or_refused() {
        let pool = HeapPool::new(LAYOUT);
        let done = AtomicBool::new(false);
        let block = BlockId(0);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut reads = 0;
                while !done.load(Ordering::Relaxed) || reads == 0 {
                    let generation = pool.generation(block);
                    let mut out = bytes(0);
                    if pool.export(0, block, generation, &mut out).is_ok() && generation.is_multiple_of(2) {
                        // Even generations are those that have been filled; see below.
                        assert!(out.iter().all(|&byte| byte == out[0]), "a torn read was taken for good");
                        reads += 1;
                    }
                }
            });
            for fill in 0..2000u32 {
                // Fill under an odd generation, which the reader doesn't look at, then let it look at the even one that follows.
                let generation = pool.begin_generation(block);
                pool.import(0, block, generation, &bytes(fill as u8)).expect("the block is ours");
                pool.begin_generation(block);
            }
            done.store(true, Ordering::Relaxed);
            reader.join().expect("no torn read");
        });
    }
}
