//! The gated MLP: `down(silu(gate(x)) * up(x))` (arXiv 2002.05202), gate and up fused.

use crate::backend::{Backend, BackendError};
use crate::layers::linear::Linear;
use crate::loader::{Cut, LoadError, WeightReader};

/// One layer's MLP, or the shard's share of its inner columns.
pub struct Mlp<W> {
    /// `[2 inner, hidden]`
    gate_up: Linear<W>,
    /// `[hidden, inner]`
    down: Linear<W>,
}

impl<W> Mlp<W> {
    /// Takes `gate_proj`, `up_proj` and `down_proj` below `name`.
    ///
    /// # Errors
    /// When a weight is missing or not what it should be.
    pub fn load<B: Backend<Weight = W>>(reader: &mut WeightReader<'_, B>, name: &str) -> Result<Self, LoadError> {
        let (config, shard) = (reader.config, reader.shard);
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let share = shard.share(inner);
        let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"].map(|part| format!("{name}.{part}"));
        let half = |name| Cut { row_range: share.clone(), ..Cut::whole(name, inner, hidden) };
        let gate_up = Linear::load(reader, &[half(&gate), half(&up)], config.mlp_bias)?;
        let down = Cut { col_range: share.clone(), ..Cut::whole(&down, hidden, inner) };
        // The shares' outputs are summed, so the bias belongs to one of them.
        let down = Linear::load(reader, &[down], config.mlp_bias && shard.index == 0)?;
        Ok(Mlp { gate_up, down })
    }

    /// `[T, hidden] -> [T, hidden]`
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward<B: Backend<Weight = W>>(&self, backend: &B, x: &B::Buffer) -> Result<B::Buffer, BackendError> {
        let x = self.gate_up.forward(backend, x)?; // [T, 2 inner]
        let x = backend.silu_mul(x)?; // [T, inner]
        self.down.forward(backend, &x) // [T, hidden]
    }
}
