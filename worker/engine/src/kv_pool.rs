//! Memory for KV blocks: raw aligned regions with export, import and a generation for each block.
//!
//! Block `b` of layer `l` is one contiguous run of bytes, `[K|V][kv_head][block_tokens][head_dim]` (head-major: a range of heads is
//! a strided slice, a layer of a block one run on the wire). Who may touch a block is decided elsewhere, by holding it: the
//! pool only guarantees that a copy out of a block that has changed hands in between is noticed.
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

    /// Marks `block` as given to a new owner; called by the block manager's owner on allocation.
    fn begin_generation(&self, block: BlockId) -> u64;

    /// Copies one layer of a block out.
    ///
    /// # Errors
    /// [`StaleBlock`] when the block was given to a new owner before the copy was complete.
    fn export(&self, layer: usize, block: BlockId, generation: u64, out: &mut [u8]) -> Result<(), StaleBlock>;

    /// Copies one layer of a block in. Only the block's holder may call this.
    ///
    /// # Errors
    /// [`StaleBlock`] when the block is no longer the caller's.
    fn import(&self, layer: usize, block: BlockId, generation: u64, bytes: &[u8]) -> Result<(), StaleBlock>;

    /// The memory of one layer of a block, valid for `layout().block_bytes()` bytes and aligned to 64, as long as the pool lives.
    fn region(&self, layer: usize, block: BlockId) -> *mut u8;
}

/// A pool on the process's own heap.
pub struct HeapPool {
    layout: KvLayout,
    memory: Box<[CacheLine]>,
    generations: Box<[AtomicU64]>,
}

#[repr(C, align(64))]
struct CacheLine(UnsafeCell<[u8; 64]>);

// SAFETY: the memory is plain bytes without invariants. Two threads touch the same block only if one of them has lost it, and
// such a reader discards what it read (generation check in `export`); writers hold the block.
unsafe impl Sync for HeapPool {}

impl HeapPool {
    /// A pool of zeroes.
    pub fn new(layout: KvLayout) -> Self {
        let lines = layout.pool_bytes().div_ceil(64);
        HeapPool {
            layout,
            memory: (0..lines).map(|_| CacheLine(UnsafeCell::new([0; 64]))).collect(),
            generations: (0..layout.num_blocks).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn check(&self, block: BlockId, expected: u64) -> Result<(), StaleBlock> {
        let found = self.generation(block);
        if found == expected { Ok(()) } else { Err(StaleBlock { block, expected, found }) }
    }
}

impl KvPool for HeapPool {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn generation(&self, block: BlockId) -> u64 {
        self.generations[block.0 as usize].load(Ordering::Acquire)
    }

    fn begin_generation(&self, block: BlockId) -> u64 {
        self.generations[block.0 as usize].fetch_add(1, Ordering::AcqRel) + 1
    }

    fn export(&self, layer: usize, block: BlockId, generation: u64, out: &mut [u8]) -> Result<(), StaleBlock> {
        assert_eq!(out.len(), self.layout.block_bytes(), "an export is one layer of a block");
        self.check(block, generation)?;
        // SAFETY: `region` is valid for `block_bytes` bytes and `out` is as long (asserted). A concurrent writer can only be a new
        // owner, whose generation the check below sees; `out` is then not used.
        unsafe { std::ptr::copy_nonoverlapping(self.region(layer, block), out.as_mut_ptr(), out.len()) };
        std::sync::atomic::fence(Ordering::Acquire);
        self.check(block, generation)
    }

    fn import(&self, layer: usize, block: BlockId, generation: u64, bytes: &[u8]) -> Result<(), StaleBlock> {
        assert_eq!(bytes.len(), self.layout.block_bytes(), "an import is one layer of a block");
        self.check(block, generation)?;
        // SAFETY: `region` is valid for `block_bytes` bytes and `bytes` is as long (asserted); the caller holds the block, so nobody
        // else reads or writes it.
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
