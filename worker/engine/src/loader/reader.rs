//! Hands out weights by name while a model is built, cut to the shard and widened to f32.
//!
//! Knows the checkpoint, the shard and what has been asked for. Must not know which weights an architecture has.

use std::collections::HashSet;
use std::ops::Range;

use rayon::prelude::*;

use super::checkpoint::{Checkpoint, TensorView};
use super::{LoadError, Shard};
use crate::backend::Backend;
use crate::config::{Dtype, ModelConfig};
use half::{bf16, f16};

/// Elements that one task widens: large enough to hide its own cost, small enough to spread.
const CHUNK: usize = 1 << 16;

/// A checkpoint being read.
pub struct WeightReader<'a, B: Backend> {
    checkpoint: &'a Checkpoint,
    /// Where the weights go.
    pub backend: &'a B,
    /// The model's shape.
    pub config: &'a ModelConfig,
    /// The part of it that is wanted.
    pub shard: &'a Shard,
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    total: u64,
    used: HashSet<String>,
}

/// A part of a stored matrix.
#[derive(Clone, Debug)]
pub struct Cut<'a> {
    /// Name in the checkpoint, without `.weight` or `.bias`.
    pub name: &'a str,
    /// Rows of the stored matrix (output features).
    pub rows: usize,
    /// Which of them.
    pub row_range: Range<usize>,
    /// Columns of the stored matrix (input features).
    pub cols: usize,
    /// Which of them.
    pub col_range: Range<usize>,
}

impl<'a> Cut<'a> {
    /// All of a matrix.
    pub fn whole(name: &'a str, rows: usize, cols: usize) -> Self {
        Cut { name, rows, row_range: 0..rows, cols, col_range: 0..cols }
    }
}

impl<'a, B: Backend> WeightReader<'a, B> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        backend: &'a B,
        config: &'a ModelConfig,
        shard: &'a Shard,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        let wanted =
            |name: &str| !is_known_extra(name, config) && layer_of(name).is_none_or(|l| shard.layers.contains(&l));
        let total = checkpoint.tensors().filter(|(name, _)| wanted(name)).map(|(_, bytes)| bytes).sum();
        progress(0, total);
        WeightReader { checkpoint, backend, config, shard, progress, done: 0, total, used: HashSet::new() }
    }

    /// Reads the parts one below the other into one weight: `[sum of the parts' rows, cols]`.
    ///
    /// # Errors
    /// When a tensor is missing or not what it should be.
    pub fn matrix(&mut self, cuts: &[Cut<'_>]) -> Result<B::Weight, LoadError> {
        let cols = cuts.first().map_or(0, |cut| cut.col_range.len());
        let rows = cuts.iter().map(|cut| cut.row_range.len()).sum();
        let mut values = Vec::with_capacity(rows * cols);
        for cut in cuts {
            let tensor = self.take(&format!("{}.weight", cut.name), &[cut.rows, cut.cols])?;
            let size = tensor.dtype.size();
            if cut.col_range == (0..cut.cols) {
                let range = cut.row_range.start * cut.cols * size..cut.row_range.end * cut.cols * size;
                widen(tensor.dtype, &tensor.bytes[range], &mut values);
            } else {
                for row in cut.row_range.clone() {
                    let start = row * cut.cols;
                    let range = (start + cut.col_range.start) * size..(start + cut.col_range.end) * size;
                    widen(tensor.dtype, &tensor.bytes[range], &mut values);
                }
            }
        }
        Ok(self.backend.matrix(rows, cols, values)?)
    }

    /// Reads the biases that belong to the parts' rows, one after the other.
    ///
    /// # Errors
    /// When a tensor is missing or not what it should be.
    pub fn bias(&mut self, cuts: &[Cut<'_>]) -> Result<B::Weight, LoadError> {
        let mut values = Vec::new();
        for cut in cuts {
            let tensor = self.take(&format!("{}.bias", cut.name), &[cut.rows])?;
            let size = tensor.dtype.size();
            widen(tensor.dtype, &tensor.bytes[cut.row_range.start * size..cut.row_range.end * size], &mut values);
        }
        Ok(self.backend.vector(values)?)
    }

    /// Reads the weight of a norm.
    ///
    /// # Errors
    /// When the tensor is missing or not what it should be.
    pub fn norm(&mut self, name: &str, len: usize) -> Result<B::Weight, LoadError> {
        let tensor = self.take(&format!("{name}.weight"), &[len])?;
        let mut values = Vec::new();
        widen(tensor.dtype, tensor.bytes, &mut values);
        Ok(self.backend.vector(values)?)
    }

    /// Reports the end and names the tensors that nobody asked for, except those that published checkpoints are known
    /// to carry.
    pub(super) fn finish(self) -> Vec<String> {
        (self.progress)(self.total, self.total);
        let mut unexpected: Vec<String> = self
            .checkpoint
            .tensors()
            .map(|(name, _)| name)
            .filter(|name| !self.used.contains(*name) && !is_known_extra(name, self.config))
            .filter(|name| layer_of(name).is_none_or(|l| l >= self.config.num_layers || self.shard.layers.contains(&l)))
            // A stage of a split model leaves the other stages' ends alone.
            .filter(|name| self.shard.layers.len() == self.config.num_layers || layer_of(name).is_some())
            .map(str::to_owned)
            .collect();
        unexpected.sort();
        unexpected
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<TensorView<'a>, LoadError> {
        let tensor = self.checkpoint.tensor(name, shape)?;
        if self.used.insert(name.to_owned()) {
            self.done += tensor.bytes.len() as u64;
            (self.progress)(self.done.min(self.total), self.total);
        }
        Ok(tensor)
    }
}

/// Old Llama checkpoints store the rotary frequencies, which follow from the configuration; a tied head is the
/// embedding again.
fn is_known_extra(name: &str, config: &ModelConfig) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight")
}

fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// Appends little-endian numbers as f32. All three types are exact in f32.
fn widen(dtype: Dtype, bytes: &[u8], values: &mut Vec<f32>) {
    let start = values.len();
    values.resize(start + bytes.len() / dtype.size(), 0.0);
    let pairs = values[start..].par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * dtype.size()));
    pairs.for_each(|(values, bytes)| match dtype {
        Dtype::F32 => {
            let numbers = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
            values.iter_mut().zip(numbers).for_each(|(x, n)| *x = n);
        }
        Dtype::Bf16 => {
            let numbers = bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32());
            values.iter_mut().zip(numbers).for_each(|(x, n)| *x = n);
        }
        Dtype::F16 => {
            let numbers = bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32());
            values.iter_mut().zip(numbers).for_each(|(x, n)| *x = n);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_numbers_widen_exactly() {
        let expected = [1.5, -0.25, 65504.0];
        let mut values = Vec::new();
        widen(Dtype::F32, &expected.map(f32::to_le_bytes).concat(), &mut values);
        widen(Dtype::F16, &expected.map(|x| f16::from_f32(x).to_le_bytes()).concat(), &mut values);
        assert_eq!(values, [expected, expected].concat());
        values.clear();
        widen(Dtype::Bf16, &[0x80, 0x3f, 0x49, 0xc0], &mut values);
        assert_eq!(values, [1.0, -3.140625]);
    }
}
