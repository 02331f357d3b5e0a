//! Identity of a model as far as its KV cache goes: two processes may exchange blocks exactly where their fingerprints
//! agree.
//!
//! A blake3 hash over the configuration that arithmetic depends on, the layout of blocks, and the weights: of each file
//! its length and all its bytes, or for files above [`WHOLE_FILE_BYTES_MAX`] the header and [`SAMPLES`] evenly spaced
//! windows of [`SAMPLE_BYTES`]. Sampling keeps the start of a large model short; it tells any two trainings apart, but
//! not a file that was altered on purpose between the windows: this is a check against mistakes, not against an
//! attacker.

use crate::config::{Dtype, ModelConfig, RopeParameters, RopeScaling};
use crate::kv_pool::BLOCK_TOKENS;
use crate::loader::{MappedFile, Shard};

/// Bumped when the bytes of a block change meaning, or the arithmetic changes bits.
const LAYOUT_VERSION: u64 = 1;

/// Files up to this size are hashed whole (a tenth of a second).
const WHOLE_FILE_BYTES_MAX: usize = 64 << 20;

/// Windows hashed of larger files.
const SAMPLES: usize = 64;

/// Bytes a window.
const SAMPLE_BYTES: usize = 1 << 20;

/// The fingerprint of a model loaded as `dtype`.
pub(crate) fn fingerprint(config: &ModelConfig, dtype: Dtype, shard: &Shard, files: &[MappedFile]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("baton engine model fingerprint");
    let mut number = |number: u64| {
        hasher.update(&number.to_le_bytes());
    };
    // Taken apart field by field, so that a new one can't be forgotten here.
    let ModelConfig {
        architecture,
        hidden_size,
        intermediate_size,
        vocab_size,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        rms_norm_eps,
        // Limits, recommendations and the publisher's type don't change what a block holds.
        max_position_embeddings: _,
        dtype: _,
        eos_token_ids: _,
        generation: _,
        rope: RopeParameters { theta, scaling },
        tie_word_embeddings,
        qkv_bias,
        o_bias,
        mlp_bias,
        qk_norm,
        sliding_windows,
    } = config;
    let sizes = [*hidden_size, *intermediate_size, *vocab_size, *num_layers, *num_heads, *num_kv_heads, *head_dim];
    number(LAYOUT_VERSION);
    number(BLOCK_TOKENS as u64);
    sizes.iter().for_each(|&size| number(size as u64));
    [shard.index, shard.count, shard.layers.start, shard.layers.end].iter().for_each(|&n| number(n as u64));
    [tie_word_embeddings, qkv_bias, o_bias, mlp_bias, qk_norm].iter().for_each(|&&flag| number(u64::from(flag)));
    sliding_windows.iter().for_each(|window| number(window.map_or(0, |w| w as u64)));
    number(u64::from(rms_norm_eps.to_bits()));
    number(theta.to_bits());
    rope_scaling(scaling).iter().for_each(|value| number(value.to_bits()));
    text(&mut hasher, architecture.class_name());
    text(&mut hasher, dtype.as_str());
    for file in files {
        hash_file(&mut hasher, file.header(), file.bytes());
    }
    *hasher.finalize().as_bytes()
}

fn text(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(text.as_bytes());
}

fn hash_file(hasher: &mut blake3::Hasher, header: &[u8], bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    if bytes.len() <= WHOLE_FILE_BYTES_MAX {
        hasher.update(bytes);
        return;
    }
    hasher.update(header);
    let last = bytes.len() - SAMPLE_BYTES;
    for sample in 0..SAMPLES {
        // In u128: the product of a file's length and the index may pass 64 bits.
        let start = (last as u128 * sample as u128 / (SAMPLES as u128 - 1)) as usize;
        hasher.update(&bytes[start..start + SAMPLE_BYTES]);
    }
}

/// A kind's number and its parameters.
fn rope_scaling(scaling: &RopeScaling) -> Vec<f64> {
    match *scaling {
        RopeScaling::Default => vec![0.0],
        RopeScaling::Linear { factor } => vec![1.0, factor],
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            vec![2.0, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings as f64]
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor,
        } => {
            let original = original_max_position_embeddings as f64;
            vec![3.0, factor, original, beta_fast, beta_slow, f64::from(u8::from(truncate)), attention_factor]
        }
        RopeScaling::Dynamic => vec![4.0],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_file_is_told_apart_by_its_length_header_and_windows() {
        let hash = |header: &[u8], bytes: &[u8]| {
            let mut hasher = blake3::Hasher::new();
            hash_file(&mut hasher, header, bytes);
            hasher.finalize()
        };
        let mut bytes = vec![0_u8; WHOLE_FILE_BYTES_MAX + (8 << 20)];
        let len = bytes.len();
        let original = hash(b"header", &bytes);
        assert_eq!(original, hash(b"header", &bytes));
        assert_ne!(original, hash(b"Header", &bytes));
        assert_ne!(original, hash(b"header", &bytes[..len - 1]));
        for place in [0, SAMPLE_BYTES - 1, len / 3, len - 1] {
            bytes[place] ^= 1;
            let sampled = hash(b"header", &bytes) != original;
            // The spacing is 1.1 MiB here, so only the ends are certain.
            assert!(sampled || place == len / 3, "byte {place}");
            bytes[place] ^= 1;
        }
    }
}
