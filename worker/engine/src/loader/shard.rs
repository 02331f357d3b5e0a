//! Which part of a model is loaded: a range of layers and a share of the heads. Integers only.

use std::ops::Range;

use crate::backend::Heads;
use crate::config::ModelConfig;

/// A part of a model: share `index` of `count` of each layer's heads and inner MLP columns, for a range of its layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which share.
    pub index: usize,
    /// Shares in all.
    pub count: usize,
    /// Which layers. The first stage embeds, the last one has the head.
    pub layers: Range<usize>,
}

impl Shard {
    /// All of a model.
    pub fn whole(config: &ModelConfig) -> Self {
        Shard { index: 0, count: 1, layers: 0..config.num_layers }
    }

    /// Checks that the part can be cut out of a model of this shape.
    ///
    /// # Errors
    /// [`ShardError`] says what doesn't divide or lies outside.
    pub fn validate(&self, config: &ModelConfig) -> Result<(), ShardError> {
        if self.index >= self.count {
            return Err(ShardError::Index { index: self.index, count: self.count });
        }
        if self.layers.is_empty() || self.layers.end > config.num_layers {
            return Err(ShardError::Layers { layers: self.layers.clone(), available: config.num_layers });
        }
        for (what, size) in [("KV heads", config.num_kv_heads), ("MLP columns", config.intermediate_size)] {
            if size % self.count != 0 {
                return Err(ShardError::Indivisible { what, size, count: self.count });
            }
        }
        Ok(())
    }

    /// This share of `size` equal items.
    pub fn share(&self, size: usize) -> Range<usize> {
        let each = size / self.count;
        self.index * each..(self.index + 1) * each
    }

    /// Heads of each layer in this share.
    pub fn heads(&self, config: &ModelConfig) -> Heads {
        Heads { query: config.num_heads / self.count, kv: config.num_kv_heads / self.count, dim: config.head_dim }
    }

    /// Whether tokens enter here.
    pub fn is_first(&self) -> bool {
        self.layers.start == 0
    }

    /// Whether logits leave here.
    pub fn is_last(&self, config: &ModelConfig) -> bool {
        self.layers.end == config.num_layers
    }
}

/// A part that can't be cut out of a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// A share beyond the last.
    #[error("share {index} of {count} does not exist")]
    Index {
        /// Which.
        index: usize,
        /// Of how many.
        count: usize,
    },
    /// No layers, or some that the model has not.
    #[error("layers {layers:?} are not a range of the model's {available}")]
    Layers {
        /// The range asked for.
        layers: Range<usize>,
        /// What there is.
        available: usize,
    },
    /// The shares would be unequal.
    #[error("{size} {what} can't be shared by {count}")]
    Indivisible {
        /// What is shared.
        what: &'static str,
        /// How many there are.
        size: usize,
        /// Shares.
        count: usize,
    },
}
