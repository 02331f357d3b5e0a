//! One decoder for Llama 2 and 3.x, Mistral, Qwen2 and Qwen3.
//!
//! Papers: Llama 2 (arXiv 2307.09288), Mistral 7B (arXiv 2310.06825), Qwen2 (arXiv 2407.10671), Qwen3 (arXiv
//! 2505.09388). Followed to the order of roundings: `modeling_llama.py`, `modeling_mistral.py`, `modeling_qwen2.py` and
//! `modeling_qwen3.py` of Hugging Face transformers 5.23
//! (<https://github.com/huggingface/transformers/tree/v5.23.0/src/transformers/models>). They differ in flags alone:
//! biases, norms over q and k, head size, tied head, rotary scaling, sliding window (see
//! [`ModelConfig`](crate::config::ModelConfig)). Where we differ: rotary cos and sin and the softmax stay in f32
//! whatever the model's type is, which is the same in f32 and more exact otherwise.
//!
//! Shapes: `T` tokens of a ragged batch, `R` rows of logits; no batch dimension, no padding.

use std::collections::VecDeque;

use crate::backend::{Backend, BackendError, Head, KvLayer};
use crate::batch::Batch;
use crate::kv_pool::KvPool;
use crate::layers::attention::Attention;
use crate::layers::mlp::Mlp;
use crate::loader::{Cut, LoadError, WeightReader};
use crate::rope::Rope;
use crate::runner::LayerHook;

/// A decoder, or a stage of one: a range of its layers.
pub struct Decoder<B: Backend> {
    /// `[vocab, hidden]`; where tokens enter, and where a tied head is.
    embedding: Option<B::Weight>,
    layers: Vec<DecoderLayer<B::Weight>>,
    head: Option<OutputHead<B::Weight>>,
    is_first: bool,
    rope: Rope,
    eps: f32,
}

struct DecoderLayer<W> {
    input_norm: W,
    attention: Attention<W>,
    post_attention_norm: W,
    mlp: Mlp<W>,
}

struct OutputHead<W> {
    /// `[hidden]`
    norm: W,
    /// `[vocab, hidden]`; the embedding where `None`.
    weight: Option<W>,
}

/// What leaves a stage.
#[derive(Debug)]
pub enum Output<T> {
    /// Hidden states for the next stage. `[T, hidden]`
    Hidden(T),
    /// Logits of the rows asked for. `[R, vocab]`
    Logits(T),
}

impl<B: Backend> Decoder<B> {
    /// Takes the weights of the reader's shard, by the names that checkpoints give them.
    ///
    /// # Errors
    /// When a weight is missing or not what it should be.
    pub fn load(reader: &mut WeightReader<'_, B>) -> Result<Self, LoadError> {
        let (config, shard) = (reader.config, reader.shard);
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let (is_first, is_last) = (shard.is_first(), shard.is_last(config));
        let embedding = if is_first || (is_last && config.tie_word_embeddings) {
            Some(reader.matrix(&[Cut::whole("model.embed_tokens", vocab, hidden)])?)
        } else {
            None
        };
        let mut layers = Vec::with_capacity(shard.layers.len());
        for layer in shard.layers.clone() {
            let name = format!("model.layers.{layer}");
            layers.push(DecoderLayer {
                input_norm: reader.norm(&format!("{name}.input_layernorm"), hidden)?,
                attention: Attention::load(reader, &format!("{name}.self_attn"), layer)?,
                post_attention_norm: reader.norm(&format!("{name}.post_attention_layernorm"), hidden)?,
                mlp: Mlp::load(reader, &format!("{name}.mlp"))?,
            });
        }
        let head = if is_last {
            let norm = reader.norm("model.norm", hidden)?;
            let weight = if config.tie_word_embeddings {
                None
            } else {
                Some(reader.matrix(&[Cut::whole("lm_head", vocab, hidden)])?)
            };
            Some(OutputHead { norm, weight })
        } else {
            None
        };
        let rope = Rope::new(&config.rope, config.head_dim);
        Ok(Decoder { embedding, layers, head, is_first, rope, eps: config.rms_norm_eps })
    }

    /// Runs the stage's layers over `batch`, writing K and V to `pool`, whose layer 0 is the stage's first. `hidden`
    /// comes from the stage before; the first one embeds the batch's tokens instead. `hook` hears of a layer as soon as
    /// its K and V are stored.
    ///
    /// # Errors
    /// When the batch is inconsistent or the device fails.
    pub fn forward(
        &self,
        backend: &B,
        batch: &Batch,
        hidden: Option<B::Buffer>,
        pool: &dyn KvPool,
        hook: &mut dyn LayerHook,
    ) -> Result<Output<B::Buffer>, BackendError> {
        let plan = backend.plan(batch, &self.rope, pool.layout())?;
        let mut residual = match (hidden, &self.embedding) {
            (None, Some(embedding)) if self.is_first => backend.embed(embedding, &batch.tokens)?, // [T, hidden]
            (Some(hidden), _) if !self.is_first => hidden,                                        // [T, hidden]
            (None | Some(_), _) => {
                let (expected, found) = ("tokens at the first stage, hidden states at later ones", "the other");
                return Err(BackendError::Shape {
                    operation: "forward",
                    expected: expected.into(),
                    found: found.into(),
                });
            }
        };
        let mut stored = VecDeque::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let kv = KvLayer { pool, layer: index };
            let x = backend.rms_norm(&mut residual, None, &layer.input_norm, self.eps)?; // [T, hidden]
            let q = layer.attention.project_and_store(backend, &x, kv, &plan)?; // [T, H D]
            stored.push_back((index, backend.record()?));
            report_stored(backend, &mut stored, hook)?;
            let x = layer.attention.attend(backend, &q, kv, &plan)?; // [T, hidden]
            let x = backend.rms_norm(&mut residual, Some(&x), &layer.post_attention_norm, self.eps)?; // [T, hidden]
            let x = layer.mlp.forward(backend, &x)?; // [T, hidden]
            backend.add(&mut residual, &x)?; // [T, hidden]
        }
        let output = match &self.head {
            None => Output::Hidden(residual),
            Some(head) => {
                let weight = head.weight.as_ref().or(self.embedding.as_ref()).expect("a tied head loads the embedding");
                let head = Head { norm: &head.norm, eps: self.eps, weight };
                Output::Logits(backend.head(&residual, &batch.logit_rows, head)?) // [R, vocab]
            }
        };
        for (index, event) in stored {
            backend.wait(&event)?;
            hook.layer_done(index);
        }
        Ok(output)
    }
}

/// Tells the hook of layers that are stored by now. A device that works asynchronously is not waited for here: it would
/// idle while the next layer is submitted.
fn report_stored<B: Backend>(
    backend: &B,
    stored: &mut VecDeque<(usize, B::Event)>,
    hook: &mut dyn LayerHook,
) -> Result<(), BackendError> {
    while let Some((index, event)) = stored.front() {
        if !backend.is_done(event)? {
            break;
        }
        hook.layer_done(*index);
        stored.pop_front();
    }
    Ok(())
}
