//! One layer of the KV pool as rows of f32: the only place of the backend that touches the pool's memory.
//!
//! Knows the layout of a block (`[K|V][kv_head][block_tokens][head_dim]`) and the stored types. Must not know
//! attention. Rows are rounded to the stored type when written, and read back as stored: so a token sees the same K and
//! V whether they were computed in its own step, in an earlier one, or by another process.
#![allow(unsafe_code)] // Turns addresses of the pool into reads and writes; each block below has its argument.

use half::f16;

use super::rounding::bf16_bits;
use crate::backend::{BackendError, Heads, KvLayer};
use crate::config::Dtype;
use crate::kv_pool::{BLOCK_TOKENS, BlockId};

/// A layer whose shape is that of `heads`.
pub(super) struct Layer<'a> {
    kv: KvLayer<'a>,
    dtype: Dtype,
    num_blocks: usize,
    heads: Heads,
}

/// Which half of a block.
#[derive(Clone, Copy)]
pub(super) enum Side {
    K,
    V,
}

impl<'a> Layer<'a> {
    /// Checks once what all accesses rely on.
    pub(super) fn new(kv: KvLayer<'a>, heads: Heads) -> Result<Self, BackendError> {
        let layout = kv.pool.layout();
        if (layout.kv_heads, layout.head_dim) != (heads.kv, heads.dim) || kv.layer >= layout.layers {
            return Err(super::shape(
                "KV pool",
                format!("layer {} with {} heads of {}", kv.layer, heads.kv, heads.dim),
                format!("{} layers with {} heads of {}", layout.layers, layout.kv_heads, layout.head_dim),
            ));
        }
        Ok(Layer { kv, dtype: layout.dtype, num_blocks: layout.num_blocks, heads })
    }

    /// Address of a token's row. Each row is whole: the arithmetic stays inside the block for any argument that passes.
    fn row(&self, side: Side, block: BlockId, head: usize, offset: usize) -> *mut u8 {
        assert!(
            (block.0 as usize) < self.num_blocks && head < self.heads.kv && offset < BLOCK_TOKENS,
            "row out of the block"
        );
        let side = match side {
            Side::K => 0,
            Side::V => 1,
        };
        let row = (side * self.heads.kv + head) * BLOCK_TOKENS + offset;
        // SAFETY: `region` is valid for a whole block, which is 2 * kv heads * BLOCK_TOKENS rows of `dim` elements
        // (`new` compared the shape), and `row` is below that by the assertion.
        unsafe { self.kv.pool.region(self.kv.layer, block).add(row * self.heads.dim * self.dtype.size()) }
    }

    /// Stores one token's K and V of one head. The batch's sequences hold their blocks, so nobody else writes these
    /// bytes; exports may copy other tokens of the block meanwhile.
    pub(super) fn write(&self, block: BlockId, head: usize, offset: usize, k: &[f32], v: &[f32]) {
        for (side, values) in [(Side::K, k), (Side::V, v)] {
            assert_eq!(values.len(), self.heads.dim, "a row is one head");
            let row = self.row(side, block, head, offset);
            // SAFETY: `row` is valid for `dim` elements; regions are aligned to 64 and rows start at multiples of the
            // element size. No reference to these bytes exists: this type only makes them within `read`, on the same
            // thread's call.
            unsafe {
                match self.dtype {
                    Dtype::F32 => std::ptr::copy_nonoverlapping(values.as_ptr(), row.cast(), values.len()),
                    Dtype::Bf16 => {
                        values.iter().enumerate().for_each(|(i, &x)| row.cast::<u16>().add(i).write(bf16_bits(x)));
                    }
                    Dtype::F16 => {
                        values.iter().enumerate().for_each(|(i, &x)| row.cast::<f16>().add(i).write(f16::from_f32(x)));
                    }
                }
            }
        }
    }

    /// Reads `count` tokens of one head from `offset` on, all in one block, to rows of `stride` elements; elements
    /// beyond the head's are left alone.
    pub(super) fn read(
        &self,
        side: Side,
        block: BlockId,
        head: usize,
        (offset, count): (usize, usize),
        out: &mut [f32],
        stride: usize,
    ) {
        assert!(count > 0 && offset + count <= BLOCK_TOKENS && out.len() == count * stride, "rows within a block");
        let (dim, row) = (self.heads.dim, self.row(side, block, head, offset));
        let len = count * dim;
        // SAFETY: rows of a head are contiguous and `offset + count` of them are inside the block, so `row` is valid
        // for `len` elements and aligned to them. They are plain numbers, all bit patterns valid. Nobody writes them
        // while the slice lives: the batch's sequences hold the block, and their writes happened before, in
        // `rope_write_kv`.
        unsafe {
            match self.dtype {
                Dtype::F32 => spread(std::slice::from_raw_parts(row.cast::<f32>(), len), dim, out, stride, |x| x),
                Dtype::Bf16 => spread(std::slice::from_raw_parts(row.cast::<u16>(), len), dim, out, stride, |x| {
                    f32::from_bits(u32::from(x) << 16)
                }),
                Dtype::F16 => spread(std::slice::from_raw_parts(row.cast::<f16>(), len), dim, out, stride, f16::to_f32),
            }
        }
    }
}

fn spread<T: Copy>(rows: &[T], dim: usize, out: &mut [f32], stride: usize, widen: impl Fn(T) -> f32) {
    for (row, out) in rows.chunks_exact(dim).zip(out.chunks_exact_mut(stride)) {
        row.iter().zip(out).for_each(|(&x, out)| *out = widen(x));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv_pool::{HeapPool, KvLayout, KvPool};

    #[test]
    fn rows_come_back_rounded_to_the_stored_type_and_lie_head_major() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            let layout = KvLayout { layers: 2, kv_heads: 3, head_dim: 6, dtype, num_blocks: 4 };
            let pool = HeapPool::new(layout);
            let heads = Heads { query: 3, kv: 3, dim: 6 };
            let layer = Layer::new(KvLayer { pool: &pool, layer: 1 }, heads).expect("shapes agree");
            let k: Vec<f32> = (0..6).map(|i| 1.0 + i as f32 / 1000.0).collect();
            let v: Vec<f32> = k.iter().map(|x| -x).collect();
            layer.write(BlockId(2), 1, 31, &k, &v);
            let mut rows = [7.0; 16];
            layer.read(Side::V, BlockId(2), 1, (30, 2), &mut rows, 8);
            assert_eq!(rows[..8], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 7.0]);
            let mut expected = v.clone();
            super::super::round(&mut expected, dtype);
            assert_eq!(rows[8..14], expected);

            let mut block = vec![0; layout.block_bytes()];
            pool.export(1, BlockId(2), 0, &mut block).expect("still ours");
            let start = ((3 + 1) * BLOCK_TOKENS + 31) * 6 * dtype.size();
            assert!(block[start..start + 6 * dtype.size()].iter().any(|&byte| byte != 0));
            assert_eq!(block.iter().filter(|&&byte| byte != 0).count(), {
                let written = |start: usize| block[start..start + 6 * dtype.size()].iter().filter(|&&b| b != 0).count();
                written(start) + written((BLOCK_TOKENS + 31) * 6 * dtype.size())
            });
        }
    }

    #[test]
    fn a_pool_of_another_shape_is_refused() {
        let pool = HeapPool::new(KvLayout { layers: 2, kv_heads: 2, head_dim: 8, dtype: Dtype::F32, num_blocks: 1 });
        for (layer, kv, dim) in [(2, 2, 8), (0, 1, 8), (0, 2, 4)] {
            assert!(Layer::new(KvLayer { pool: &pool, layer }, Heads { query: 2, kv, dim }).is_err());
        }
    }
}
