//! The reference backend: candle for dense products, plain loops for the rest, on the CPU.
//!
//! Knows how to get the same bits for a row whatever batch, chunk, company or thread count it is computed in, and is
//! what faster kernels are checked against. Weights and activations are held in f32 and rounded to the model's type
//! after each operation: candle's own bf16 product on the CPU widens both operands whole at every call,
//! and products of bf16 values are exact in f32 anyway.

mod attention;
mod kv_memory;
mod matrix;
mod rounding;

use crate::backend::{Backend, BackendError, Draw, Head, Heads, KvLayer, QkNorm};
use crate::batch::Batch;
use crate::config::Dtype;
use crate::kv_pool::{BLOCK_TOKENS, BlockId, KvLayout};
use crate::rope::Rope;
use crate::sampling::{self, SampledToken};
use matrix::{Matrix, RowPaths};
use rounding::round;

/// The CPU backend on candle.
pub struct Reference {
    dtype: Dtype,
    row_paths: RowPaths,
}

impl Reference {
    /// A backend that rounds to `dtype`.
    pub fn new(dtype: Dtype) -> Self {
        Reference { dtype, row_paths: RowPaths::default() }
    }

    /// RMSNorm of one row in place. The sum of squares runs in f64 so that no grouping of it is visible in the result.
    fn norm_row(&self, row: &mut [f32], weight: &[f32], eps: f32) {
        let mean = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / row.len() as f64;
        let scale = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
        row.iter_mut().for_each(|x| *x *= scale);
        round(row, self.dtype);
        row.iter_mut().zip(weight).for_each(|(x, w)| *x *= w);
        round(row, self.dtype);
    }
}

/// Activations: rows of equal width.
#[derive(Clone, Debug, PartialEq)]
pub struct Buffer {
    values: Vec<f32>,
    width: usize,
}

impl Buffer {
    fn rows(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }
}

/// A parameter.
#[derive(Debug)]
pub enum Weight {
    /// Of a product, or an embedding.
    Matrix(Matrix),
    /// Of a norm, or a bias.
    Vector(Vec<f32>),
}

impl Weight {
    fn matrix(&self) -> Result<&Matrix, BackendError> {
        match self {
            Weight::Matrix(matrix) => Ok(matrix),
            Weight::Vector(values) => Err(shape("product", "a matrix", format!("a vector of {}", values.len()))),
        }
    }

    fn vector(&self, len: usize) -> Result<&[f32], BackendError> {
        match self {
            Weight::Vector(values) if values.len() == len => Ok(values),
            Weight::Vector(values) => {
                Err(shape("norm or bias", format!("a vector of {len}"), format!("one of {}", values.len())))
            }
            Weight::Matrix(_) => Err(shape("norm or bias", format!("a vector of {len}"), "a matrix")),
        }
    }
}

fn shape(operation: &'static str, expected: impl Into<String>, found: impl Into<String>) -> BackendError {
    BackendError::Shape { operation, expected: expected.into(), found: found.into() }
}

/// What all layers of a step share.
#[derive(Debug)]
pub struct Plan {
    /// For each token. `[T]`
    rows: Vec<PlanRow>,
    /// First and last-but-one row of each sequence's tokens.
    spans: Vec<std::ops::Range<usize>>,
    /// Blocks of each sequence.
    tables: Vec<Vec<BlockId>>,
    /// `[T, D / 2]`
    cos: Vec<f32>,
    /// `[T, D / 2]`
    sin: Vec<f32>,
}

#[derive(Clone, Copy, Debug)]
struct PlanRow {
    position: usize,
    block: BlockId,
    offset: usize,
}

fn plan_rows(batch: &Batch, layout: &KvLayout) -> Result<Plan, BackendError> {
    let problem = |text: &str| Err(BackendError::Batch(text.into()));
    let (tokens, sequences) = (batch.num_tokens(), batch.num_sequences());
    if batch.positions.len() != tokens || batch.slot_mapping.len() != tokens {
        return problem("positions, slots and tokens differ in number");
    }
    if batch.cu_seqlens_q.len() != sequences + 1 || batch.block_tables.len() != sequences {
        return problem("cu_seqlens_q, context_lens and block_tables differ in number");
    }
    if batch.cu_seqlens_q[0] != 0 || batch.cu_seqlens_q[sequences] as usize != tokens {
        return problem("cu_seqlens_q does not run from 0 to the number of tokens");
    }
    let mut plan = Plan {
        rows: Vec::with_capacity(tokens),
        spans: Vec::new(),
        tables: Vec::new(),
        cos: Vec::new(),
        sin: Vec::new(),
    };
    for sequence in 0..sequences {
        let (start, end) = (batch.cu_seqlens_q[sequence] as usize, batch.cu_seqlens_q[sequence + 1] as usize);
        let table = &batch.block_tables[sequence];
        let context = batch.context_lens[sequence] as usize;
        if start >= end || end > tokens || end - start > context {
            return problem("a sequence has no tokens, or more than its context");
        }
        if table.len() * BLOCK_TOKENS < context || table.iter().any(|block| block.0 as usize >= layout.num_blocks) {
            return problem("a block table is too short for its context, or names a block beyond the pool");
        }
        for index in start..end {
            let position = batch.positions[index] as usize;
            if position != context + index - end {
                return problem("positions are not the last of their context");
            }
            let slot = batch.slot_mapping[index];
            let (block, offset) = (slot / BLOCK_TOKENS as u64, (slot % BLOCK_TOKENS as u64) as usize);
            // Attention reads through the table, so a slot elsewhere would make a token blind to itself.
            if table[position / BLOCK_TOKENS].0 as u64 != block || offset != position % BLOCK_TOKENS {
                return problem("a slot is not where the block table has its position");
            }
            plan.rows.push(PlanRow { position, block: table[position / BLOCK_TOKENS], offset });
        }
        plan.spans.push(start..end);
        plan.tables.push(table.clone());
    }
    if batch.logit_rows.iter().any(|&row| row as usize >= tokens) {
        return problem("a logit row is beyond the tokens");
    }
    Ok(plan)
}

impl Backend for Reference {
    type Buffer = Buffer;
    type Weight = Weight;
    type Event = ();
    type Plan = Plan;

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn matrix(&self, rows: usize, cols: usize, mut values: Vec<f32>) -> Result<Weight, BackendError> {
        round(&mut values, self.dtype);
        Ok(Weight::Matrix(Matrix::new(rows, cols, values, &self.row_paths)?))
    }

    fn vector(&self, mut values: Vec<f32>) -> Result<Weight, BackendError> {
        round(&mut values, self.dtype);
        Ok(Weight::Vector(values))
    }

    fn plan(&self, batch: &Batch, rope: &Rope, layout: &KvLayout) -> Result<Plan, BackendError> {
        let mut plan = plan_rows(batch, layout)?;
        for &position in &batch.positions {
            rope.extend(position, &mut plan.cos, &mut plan.sin);
        }
        Ok(plan)
    }

    fn embed(&self, embedding: &Weight, tokens: &[u32]) -> Result<Buffer, BackendError> {
        let embedding = embedding.matrix()?;
        let mut values = Vec::with_capacity(tokens.len() * embedding.inputs());
        for &token in tokens {
            if token as usize >= embedding.outputs() {
                return Err(BackendError::Batch(format!("a token is not below {}", embedding.outputs())));
            }
            embedding.extend_row(token as usize, &mut values);
        }
        Ok(Buffer { values, width: embedding.inputs() }) // [T, hidden]
    }

    fn linear(&self, input: &Buffer, weight: &Weight, bias: Option<&Weight>) -> Result<Buffer, BackendError> {
        let weight = weight.matrix()?;
        if input.width != weight.inputs() {
            return Err(shape("linear", format!("rows of {}", weight.inputs()), format!("rows of {}", input.width)));
        }
        let width = weight.outputs();
        let mut values = weight.product(&input.values)?; // [T, out]
        round(&mut values, self.dtype);
        if let Some(bias) = bias {
            let bias = bias.vector(width)?;
            for row in values.chunks_exact_mut(width) {
                row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
            }
            round(&mut values, self.dtype);
        }
        Ok(Buffer { values, width })
    }

    fn rms_norm(
        &self,
        residual: &mut Buffer,
        input: Option<&Buffer>,
        weight: &Weight,
        eps: f32,
    ) -> Result<Buffer, BackendError> {
        if let Some(input) = input {
            self.add(residual, input)?;
        }
        let weight = weight.vector(residual.width)?;
        let mut output = residual.clone();
        for row in output.values.chunks_exact_mut(output.width) {
            self.norm_row(row, weight, eps);
        }
        Ok(output)
    }

    fn add(&self, residual: &mut Buffer, input: &Buffer) -> Result<(), BackendError> {
        if (residual.width, residual.values.len()) != (input.width, input.values.len()) {
            return Err(shape("add", format!("rows of {}", residual.width), format!("rows of {}", input.width)));
        }
        residual.values.iter_mut().zip(&input.values).for_each(|(x, y)| *x += y);
        round(&mut residual.values, self.dtype);
        Ok(())
    }

    fn rope_write_kv(
        &self,
        qkv: Buffer,
        norm: Option<QkNorm<'_, Weight>>,
        heads: Heads,
        kv: KvLayer<'_>,
        plan: &Plan,
    ) -> Result<Buffer, BackendError> {
        let (q_width, kv_width) = (heads.query * heads.dim, heads.kv * heads.dim);
        if qkv.width != q_width + 2 * kv_width || qkv.rows() != plan.rows.len() {
            let expected = format!("[{}, {}]", plan.rows.len(), q_width + 2 * kv_width);
            return Err(shape("rope_write_kv", expected, format!("[{}, {}]", qkv.rows(), qkv.width)));
        }
        let norms = match norm {
            Some(norm) => Some((norm.q.vector(heads.dim)?, norm.k.vector(heads.dim)?, norm.eps)),
            None => None,
        };
        let memory = kv_memory::Layer::new(kv, heads)?;
        let half = heads.dim / 2;
        let mut q = Vec::with_capacity(plan.rows.len() * q_width);
        let mut values = qkv.values;
        for (index, row) in values.chunks_exact_mut(qkv.width).enumerate() {
            let (cos, sin) = (&plan.cos[index * half..][..half], &plan.sin[index * half..][..half]);
            let (rotated, v) = row.split_at_mut(q_width + kv_width); // [(H + K) D], [K D]
            for (head, values) in rotated.chunks_exact_mut(heads.dim).enumerate() {
                if let Some((q_norm, k_norm, eps)) = norms {
                    self.norm_row(values, if head < heads.query { q_norm } else { k_norm }, eps);
                }
                // Hugging Face's pairing: element i with i + D / 2, not with its neighbour as in the paper.
                let (low, high) = values.split_at_mut(half);
                for i in 0..half {
                    let (x, y) = (low[i], high[i]);
                    low[i] = x * cos[i] - y * sin[i];
                    high[i] = y * cos[i] + x * sin[i];
                }
                round(values, self.dtype);
            }
            let (q_row, k) = rotated.split_at(q_width);
            q.extend_from_slice(q_row);
            let PlanRow { block, offset, .. } = plan.rows[index];
            for head in 0..heads.kv {
                let range = head * heads.dim..(head + 1) * heads.dim;
                memory.write(block, head, offset, &k[range.clone()], &v[range]);
            }
        }
        Ok(Buffer { values: q, width: q_width }) // [T, H D]
    }

    fn paged_attention(
        &self,
        q: &Buffer,
        heads: Heads,
        window: Option<usize>,
        kv: KvLayer<'_>,
        plan: &Plan,
    ) -> Result<Buffer, BackendError> {
        if q.width != heads.query * heads.dim || q.rows() != plan.rows.len() {
            let expected = format!("[{}, {}]", plan.rows.len(), heads.query * heads.dim);
            return Err(shape("paged_attention", expected, format!("[{}, {}]", q.rows(), q.width)));
        }
        let memory = kv_memory::Layer::new(kv, heads)?;
        let sequences = plan.spans.iter().zip(&plan.tables).map(|(span, blocks)| attention::Sequence {
            first_row: span.start,
            rows: span.len(),
            first_position: plan.rows[span.start].position,
            blocks,
        });
        let mut values = attention::attend(&q.values, heads, window, &memory, sequences);
        round(&mut values, self.dtype);
        Ok(Buffer { values, width: q.width }) // [T, H D]
    }

    fn silu_mul(&self, gate_up: Buffer) -> Result<Buffer, BackendError> {
        if !gate_up.width.is_multiple_of(2) {
            return Err(shape("silu_mul", "rows of even width", format!("rows of {}", gate_up.width)));
        }
        let width = gate_up.width / 2;
        let mut values = Vec::with_capacity(gate_up.values.len() / 2);
        for row in gate_up.values.chunks_exact(gate_up.width) {
            values.extend(row[..width].iter().map(|&x| x / (1.0 + (-x).exp())));
        }
        round(&mut values, self.dtype);
        for (out, row) in values.chunks_exact_mut(width).zip(gate_up.values.chunks_exact(gate_up.width)) {
            out.iter_mut().zip(&row[width..]).for_each(|(x, up)| *x *= up);
        }
        round(&mut values, self.dtype);
        Ok(Buffer { values, width }) // [T, inner]
    }

    fn head(&self, hidden: &Buffer, rows: &[u32], head: Head<'_, Weight>) -> Result<Buffer, BackendError> {
        let norm = head.norm.vector(hidden.width)?;
        let mut values = Vec::with_capacity(rows.len() * hidden.width);
        for &row in rows {
            let start = row as usize * hidden.width;
            let row = hidden.values.get(start..start + hidden.width);
            values
                .extend_from_slice(row.ok_or_else(|| BackendError::Batch("a logit row is beyond the tokens".into()))?);
        }
        values.chunks_exact_mut(hidden.width).for_each(|row| self.norm_row(row, norm, head.eps));
        self.linear(&Buffer { values, width: hidden.width }, head.weight, None) // [rows, vocab]
    }

    fn sample(&self, logits: &Buffer, draws: &[Draw<'_>]) -> Result<Vec<SampledToken>, BackendError> {
        if draws.iter().any(|draw| draw.logits_row >= logits.rows()) {
            return Err(BackendError::Batch("a draw is beyond the rows of logits".into()));
        }
        let row = |index: usize| &logits.values[index * logits.width..][..logits.width];
        Ok(draws.iter().map(|draw| sampling::sample(row(draw.logits_row), draw.row, draw.position)).collect())
    }

    fn read(&self, buffer: &Buffer) -> Result<Vec<f32>, BackendError> {
        Ok(buffer.values.clone())
    }

    fn record(&self) -> Result<(), BackendError> {
        // Every operation is complete when it returns.
        Ok(())
    }

    fn is_done(&self, _event: &()) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn wait(&self, _event: &()) -> Result<(), BackendError> {
        Ok(())
    }
}
