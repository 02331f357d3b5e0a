//! Grouped-query attention (arXiv 2305.13245) over a KV cache that is passed in.
//!
//! In two steps, because between them the layer's K and V can leave for another worker while attention still computes.

use crate::backend::{Backend, BackendError, Heads, KvLayer, QkNorm};
use crate::layers::linear::Linear;
use crate::loader::{Cut, LoadError, WeightReader};

/// One layer's attention, or the shard's share of its heads.
pub struct Attention<W> {
    /// `[(H + 2 K) D, hidden]`
    qkv: Linear<W>,
    /// `[D]` each.
    norms: Option<(W, W)>,
    /// `[hidden, H D]`
    o: Linear<W>,
    heads: Heads,
    window: Option<usize>,
    eps: f32,
}

impl<W> Attention<W> {
    /// Takes `q_proj`, `k_proj`, `v_proj`, `o_proj` and, where the family has them, `q_norm` and `k_norm` below `name`.
    ///
    /// # Errors
    /// When a weight is missing or not what it should be.
    pub fn load<B: Backend<Weight = W>>(
        reader: &mut WeightReader<'_, B>,
        name: &str,
        layer: usize,
    ) -> Result<Self, LoadError> {
        let (config, shard) = (reader.config, reader.shard);
        let (hidden, dim) = (config.hidden_size, config.head_dim);
        // A shard has whole groups: its KV heads and the query heads that read them.
        let q_rows = config.num_heads * dim;
        let kv_rows = config.num_kv_heads * dim;
        let [q, k, v, o] = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|part| format!("{name}.{part}"));
        let share = |name, rows| Cut { row_range: shard.share(rows), ..Cut::whole(name, rows, hidden) };
        let qkv = [share(&q, q_rows), share(&k, kv_rows), share(&v, kv_rows)];
        let qkv = Linear::load(reader, &qkv, config.qkv_bias)?;
        let norms = if config.qk_norm {
            Some((reader.norm(&format!("{name}.q_norm"), dim)?, reader.norm(&format!("{name}.k_norm"), dim)?))
        } else {
            None
        };
        let o = Cut { col_range: shard.share(q_rows), ..Cut::whole(&o, hidden, q_rows) };
        // The shares' outputs are summed, so the bias belongs to one of them.
        let o = Linear::load(reader, &[o], config.o_bias && shard.index == 0)?;
        let window = config.sliding_windows[layer];
        Ok(Attention { qkv, norms, o, heads: shard.heads(config), window, eps: config.rms_norm_eps })
    }

    /// Projects, normalises and rotates; K and V go to the cache, q comes back. `[T, hidden] -> [T, H D]`
    ///
    /// # Errors
    /// When the device fails.
    pub fn project_and_store<B: Backend<Weight = W>>(
        &self,
        backend: &B,
        x: &B::Buffer,
        kv: KvLayer<'_>,
        plan: &B::Plan,
    ) -> Result<B::Buffer, BackendError> {
        let qkv = self.qkv.forward(backend, x)?; // [T, (H + 2 K) D]
        let norm = self.norms.as_ref().map(|(q, k)| QkNorm { q, k, eps: self.eps });
        backend.rope_write_kv(qkv, norm, self.heads, kv, plan) // [T, H D]
    }

    /// Attends to the cache and projects back. `[T, H D] -> [T, hidden]`
    ///
    /// # Errors
    /// When the device fails.
    pub fn attend<B: Backend<Weight = W>>(
        &self,
        backend: &B,
        q: &B::Buffer,
        kv: KvLayer<'_>,
        plan: &B::Plan,
    ) -> Result<B::Buffer, BackendError> {
        let x = backend.paged_attention(q, self.heads, self.window, kv, plan)?; // [T, H D]
        self.o.forward(backend, &x) // [T, hidden]
    }
}
