//! Causal attention over paged K and V: online softmax (arXiv 1805.02867) over splits of fixed size.
//!
//! A row's result is a function of its query and the K and V that it sees, nothing else: splits lie at absolute
//! positions, are taken in ascending order, and every sum has a fixed grouping. Chunking, company and threads only
//! decide which row is computed where. Reads memory through [`Layer`]; must not know how it is laid out.

use rayon::prelude::*;

use super::kv_memory::{Layer, Side};
use crate::backend::Heads;
use crate::kv_pool::{BLOCK_TOKENS, BlockId};

/// Positions a split: K and V of one head (256 KiB at head size 128) stay in the L2 cache while a chunk of rows goes
/// over them.
const SPLIT: usize = 256;

/// Rows that share one reading of K and V; small enough that a long prefill still gives every thread work.
const ROWS: usize = 32;

/// Sums run in this many lanes, then fold in a fixed tree: what the compiler needs to vectorise without changing the
/// order.
const LANES: usize = 16;

/// Rows of one sequence and where its KV lies.
#[derive(Clone, Copy)]
pub(super) struct Sequence<'a> {
    /// Its first row of q.
    pub(super) first_row: usize,
    /// How many it has.
    pub(super) rows: usize,
    /// Position of the first; the others follow.
    pub(super) first_position: usize,
    /// Its blocks.
    pub(super) blocks: &'a [BlockId],
}

/// One KV head's group of query heads over a few rows of one sequence.
struct Task<'a> {
    sequence: Sequence<'a>,
    kv_head: usize,
}

/// `[T, H D] -> [T, H D]`, not rounded.
pub(super) fn attend<'a>(
    q: &[f32],
    heads: Heads,
    window: Option<usize>,
    memory: &Layer<'_>,
    sequences: impl Iterator<Item = Sequence<'a>>,
) -> Vec<f32> {
    let mut tasks = Vec::new();
    for sequence in sequences {
        for start in (0..sequence.rows).step_by(ROWS) {
            let chunk = Sequence {
                first_row: sequence.first_row + start,
                rows: ROWS.min(sequence.rows - start),
                first_position: sequence.first_position + start,
                blocks: sequence.blocks,
            };
            tasks.extend((0..heads.kv).map(|kv_head| Task { sequence: chunk, kv_head }));
        }
    }
    let results: Vec<Vec<f32>> = tasks.par_iter().map(|task| task.run(q, heads, window, memory)).collect();

    let (width, group) = (heads.query * heads.dim, heads.query / heads.kv * heads.dim);
    let mut output = vec![0.0; q.len()];
    for (task, result) in tasks.iter().zip(results) {
        for (row, values) in result.chunks_exact(group).enumerate() {
            let start = (task.sequence.first_row + row) * width + task.kv_head * group;
            output[start..start + group].copy_from_slice(values);
        }
    }
    output
}

/// Running softmax of one row and head.
struct Online {
    max: f32,
    sum: f32,
}

impl Task<'_> {
    /// `[rows, group, D]`
    fn run(&self, q: &[f32], heads: Heads, window: Option<usize>, memory: &Layer<'_>) -> Vec<f32> {
        let group = heads.query / heads.kv;
        let stride = heads.dim.next_multiple_of(LANES);
        let Sequence { first_row, rows, first_position, blocks } = self.sequence;
        // Head rows padded with zeroes to whole lanes: a padded product adds zero.
        let mut queries = vec![0.0; rows * group * stride]; // [rows, group, stride]
        for (index, query) in queries.chunks_exact_mut(stride).enumerate() {
            let (row, head) = (index / group, self.kv_head * group + index % group);
            let start = ((first_row + row) * heads.query + head) * heads.dim;
            query[..heads.dim].copy_from_slice(&q[start..start + heads.dim]);
        }
        let mut sums = vec![0.0; rows * group * stride]; // [rows, group, stride]
        let mut states: Vec<Online> = (0..rows * group).map(|_| Online { max: f32::NEG_INFINITY, sum: 0.0 }).collect();
        let scale = (1.0 / (heads.dim as f64).sqrt()) as f32;

        let first_seen = |position: usize| window.map_or(0, |window| (position + 1).saturating_sub(window));
        let (start, end) = (first_seen(first_position), first_position + rows);
        let (mut k, mut v) = (vec![0.0; SPLIT * stride], vec![0.0; SPLIT * stride]);
        for split in (start / SPLIT * SPLIT..end).step_by(SPLIT) {
            let (from, to) = (split.max(start), end.min(split + SPLIT));
            let mut position = from;
            while position < to {
                let offset = position % BLOCK_TOKENS;
                let count = (BLOCK_TOKENS - offset).min(to - position);
                let range = (position - split) * stride..(position - split + count) * stride;
                for (side, out) in [(Side::K, &mut k), (Side::V, &mut v)] {
                    let block = blocks[position / BLOCK_TOKENS];
                    memory.read(side, block, self.kv_head, (offset, count), &mut out[range.clone()], stride);
                }
                position += count;
            }
            for row in 0..rows {
                let position = first_position + row;
                let (from, to) = (first_seen(position).max(split), (position + 1).min(split + SPLIT));
                if from >= to {
                    continue;
                }
                let seen = (from - split) * stride..(to - split) * stride;
                let group = row * group..(row + 1) * group;
                for (index, state) in group.clone().zip(&mut states[group]) {
                    let range = index * stride..(index + 1) * stride;
                    absorb(&queries[range.clone()], &k[seen.clone()], &v[seen.clone()], scale, state, &mut sums[range]);
                }
            }
        }
        let mut output = Vec::with_capacity(rows * group * heads.dim);
        for (sum, state) in sums.chunks_exact(stride).zip(states) {
            output.extend(sum[..heads.dim].iter().map(|x| x / state.sum));
        }
        output
    }
}

/// Takes the keys of one split into a row's running softmax. At most `SPLIT` keys.
fn absorb(query: &[f32], k: &[f32], v: &[f32], scale: f32, state: &mut Online, sum: &mut [f32]) {
    let stride = query.len();
    let mut weights = [0.0; SPLIT];
    let weights = &mut weights[..k.len() / stride];
    let mut max = state.max;
    for (weight, key) in weights.iter_mut().zip(k.chunks_exact(stride)) {
        *weight = dot(query, key) * scale;
        max = max.max(*weight);
    }
    let correction = (state.max - max).exp(); // exp(-inf) = 0 on the first split
    state.max = max;
    state.sum *= correction;
    sum.iter_mut().for_each(|x| *x *= correction);
    for (weight, value) in weights.iter().zip(v.chunks_exact(stride)) {
        let weight = (weight - max).exp();
        state.sum += weight;
        sum.iter_mut().zip(value).for_each(|(x, v)| *x += weight * v);
    }
}

/// Sum of products, in lanes.
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    for (x, y) in x.chunks_exact(LANES).zip(y.chunks_exact(LANES)) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::KvLayer;
    use crate::config::Dtype;
    use crate::kv_pool::{HeapPool, KvLayout};

    fn noise(seed: u32) -> impl FnMut() -> f32 {
        let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 * 2.0 - 2.0
        }
    }

    /// Softmax over all seen keys at once, in f64.
    fn naive(
        q: &[f32],
        k: &[Vec<f32>],
        v: &[Vec<f32>],
        heads: Heads,
        window: Option<usize>,
        position: usize,
    ) -> Vec<f64> {
        let from = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let mut output = Vec::new();
        for head in 0..heads.query {
            let kv = head / (heads.query / heads.kv) * heads.dim;
            let query = &q[head * heads.dim..][..heads.dim];
            let score = |j: usize| -> f64 {
                let key = &k[j][kv..kv + heads.dim];
                query.iter().zip(key).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>()
                    / (heads.dim as f64).sqrt()
            };
            let weights: Vec<f64> = (from..=position).map(|j| score(j).exp()).collect();
            let total: f64 = weights.iter().sum();
            output
                .extend((0..heads.dim).map(|d| {
                    weights.iter().zip(from..).map(|(w, j)| w * f64::from(v[j][kv + d])).sum::<f64>() / total
                }));
        }
        output
    }

    #[test]
    fn attention_is_the_naive_one_over_odd_shapes_and_any_chunk_gives_the_same_bits() {
        let cases = [
            (Heads { query: 4, kv: 2, dim: 8 }, None, 70),
            (Heads { query: 3, kv: 1, dim: 20 }, Some(1), 40),
            (Heads { query: 6, kv: 2, dim: 12 }, Some(33), 300),
            (Heads { query: 2, kv: 2, dim: 34 }, None, 523),
            (Heads { query: 5, kv: 5, dim: 16 }, Some(257), 530),
        ];
        for (heads, window, tokens) in cases {
            let layout =
                KvLayout { layers: 1, kv_heads: heads.kv, head_dim: heads.dim, dtype: Dtype::F32, num_blocks: 40 };
            let pool = HeapPool::new(layout);
            let memory = Layer::new(KvLayer { pool: &pool, layer: 0 }, heads).expect("shapes agree");
            // A table that is neither ascending nor contiguous.
            let blocks: Vec<BlockId> = (0..20).map(|i| BlockId((i * 7 + 3) % 40)).collect();
            let mut next = noise(tokens as u32);
            let mut row = |width: usize| (0..width).map(|_| next()).collect::<Vec<f32>>();
            let q: Vec<f32> = row(tokens * heads.query * heads.dim);
            let (mut k, mut v) = (Vec::new(), Vec::new());
            for position in 0..tokens {
                k.push(row(heads.kv * heads.dim));
                v.push(row(heads.kv * heads.dim));
                for head in 0..heads.kv {
                    let range = head * heads.dim..(head + 1) * heads.dim;
                    let (block, offset) = (blocks[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
                    memory.write(block, head, offset, &k[position][range.clone()], &v[position][range]);
                }
            }
            let width = heads.query * heads.dim;
            let whole = Sequence { first_row: 0, rows: tokens, first_position: 0, blocks: &blocks };
            let all = attend(&q, heads, window, &memory, [whole].into_iter());
            for position in (0..tokens).step_by(13).chain([tokens - 1]) {
                let expected = naive(&q[position * width..][..width], &k, &v, heads, window, position);
                for (x, expected) in all[position * width..][..width].iter().zip(expected) {
                    assert!((f64::from(*x) - expected).abs() < 2e-5, "{heads:?} {window:?} at {position}");
                }
            }
            for chunk in [1, 7, 50] {
                for start in (0..tokens).step_by(chunk) {
                    let rows = chunk.min(tokens - start);
                    let part = Sequence { first_row: 0, rows, first_position: start, blocks: &blocks };
                    let range = start * width..(start + rows) * width;
                    let some = attend(&q[range.clone()], heads, window, &memory, [part].into_iter());
                    assert_eq!(some, all[range], "{heads:?} {window:?} in chunks of {chunk}");
                }
            }
        }
    }
}
