//! The files as they are spelled, and the one place that turns them into [`ModelConfig`] or says why not.

use serde::Deserialize;
use serde_json::Value;

use super::{Architecture, ConfigError, Dtype, GenerationDefaults, ModelConfig, RopeParameters, RopeScaling};

#[derive(Debug, Deserialize)]
pub(super) struct RawConfig {
    architectures: Option<Vec<String>>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    vocab_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    partial_rotary_factor: Option<f64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    torch_dtype: Option<String>,
    dtype: Option<String>,
    eos_token_id: Option<TokenIds>,
    quantization_config: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct RawGeneration {
    eos_token_id: Option<TokenIds>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    fn into_vec(self) -> Vec<u32> {
        match self {
            TokenIds::One(id) => vec![id],
            TokenIds::Many(ids) => ids,
        }
    }
}

/// Validates what the files say.
pub(super) fn model_config(raw: RawConfig, generation: RawGeneration) -> Result<ModelConfig, ConfigError> {
    let architecture = architecture(&raw)?;
    if let Some(method) = &raw.quantization_config {
        let method = method.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        return Err(unsupported("quantization_config.quant_method", method, "bf16, f16 and f32 checkpoints only"));
    }
    let act = raw.hidden_act.as_deref().unwrap_or("silu");
    if act != "silu" {
        return Err(unsupported("hidden_act", act, "silu"));
    }

    let hidden_size = positive("hidden_size", raw.hidden_size)?;
    let num_heads = positive("num_attention_heads", raw.num_attention_heads)?;
    let num_kv_heads = positive("num_key_value_heads", raw.num_key_value_heads.or(Some(num_heads)))?;
    if num_heads % num_kv_heads != 0 {
        return Err(invalid(
            "num_key_value_heads",
            format!("{num_kv_heads} does not divide num_attention_heads {num_heads}"),
        ));
    }
    let head_dim = match raw.head_dim {
        Some(dim) => positive("head_dim", Some(dim))?,
        // Qwen3's configuration class has a default of its own; the others derive it.
        None if architecture == Architecture::Qwen3 => 128,
        None if hidden_size % num_heads == 0 => hidden_size / num_heads,
        None => {
            return Err(invalid(
                "hidden_size",
                format!("{hidden_size} is no multiple of num_attention_heads {num_heads}, and there is no head_dim"),
            ));
        }
    };
    if head_dim % 2 != 0 {
        return Err(invalid("head_dim", format!("{head_dim} is odd; the rotary embedding turns pairs")));
    }
    let num_layers = positive("num_hidden_layers", raw.num_hidden_layers)?;
    let max_position_embeddings = positive("max_position_embeddings", raw.max_position_embeddings)?;
    let rms_norm_eps = raw.rms_norm_eps.unwrap_or(1e-6);
    if !(rms_norm_eps.is_finite() && rms_norm_eps >= 0.0) {
        return Err(invalid("rms_norm_eps", format!("{rms_norm_eps} is not a number of at least 0")));
    }
    let attention_bias = raw.attention_bias.unwrap_or(false);
    Ok(ModelConfig {
        architecture,
        hidden_size,
        intermediate_size: positive("intermediate_size", raw.intermediate_size)?,
        vocab_size: positive("vocab_size", raw.vocab_size)?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        rms_norm_eps: rms_norm_eps as f32,
        max_position_embeddings,
        rope: rope(&raw, max_position_embeddings)?,
        tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
        qkv_bias: match architecture {
            Architecture::Qwen2 => true,
            Architecture::Llama | Architecture::Qwen3 => attention_bias,
            Architecture::Mistral => false,
        },
        o_bias: match architecture {
            Architecture::Llama | Architecture::Qwen3 => attention_bias,
            Architecture::Mistral | Architecture::Qwen2 => false,
        },
        mlp_bias: architecture == Architecture::Llama && raw.mlp_bias.unwrap_or(false),
        qk_norm: architecture == Architecture::Qwen3,
        sliding_windows: sliding_windows(architecture, &raw, num_layers)?,
        dtype: dtype(&raw)?,
        eos_token_ids: generation.eos_token_id.or(raw.eos_token_id).map(TokenIds::into_vec).unwrap_or_default(),
        generation: GenerationDefaults {
            temperature: if generation.do_sample == Some(false) { Some(0.0) } else { generation.temperature },
            top_k: generation.top_k,
            top_p: generation.top_p,
            min_p: generation.min_p,
            repetition_penalty: generation.repetition_penalty,
        },
    })
}

fn unsupported(field: &'static str, found: impl Into<String>, supported: &'static str) -> ConfigError {
    ConfigError::Unsupported { field, found: found.into(), supported }
}

fn invalid(field: &'static str, problem: String) -> ConfigError {
    ConfigError::Invalid { field, problem }
}

fn positive(field: &'static str, value: Option<usize>) -> Result<usize, ConfigError> {
    match value {
        None => Err(ConfigError::Missing { field }),
        // A dimension beyond this is a broken file, and products of two of them must not overflow.
        Some(value) if value == 0 || value > u32::MAX as usize => {
            Err(invalid(field, format!("{value} is not between 1 and {}", u32::MAX)))
        }
        Some(value) => Ok(value),
    }
}

fn architecture(raw: &RawConfig) -> Result<Architecture, ConfigError> {
    let Some(found) = raw.architectures.as_ref().and_then(|names| names.first()) else {
        return Err(ConfigError::Missing { field: "architectures" });
    };
    Architecture::ALL
        .into_iter()
        .find(|a| a.class_name() == found)
        .ok_or_else(|| ConfigError::UnsupportedArchitecture { found: found.clone() })
}

fn dtype(raw: &RawConfig) -> Result<Option<Dtype>, ConfigError> {
    let Some(name) = raw.dtype.as_deref().or(raw.torch_dtype.as_deref()) else { return Ok(None) };
    match name.trim_start_matches("torch.") {
        "bfloat16" => Ok(Some(Dtype::Bf16)),
        "float16" => Ok(Some(Dtype::F16)),
        "float32" => Ok(Some(Dtype::F32)),
        other => Err(unsupported("dtype", other, "bfloat16, float16, float32")),
    }
}

fn sliding_windows(
    architecture: Architecture,
    raw: &RawConfig,
    num_layers: usize,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = match architecture {
        Architecture::Llama => None,
        Architecture::Mistral => raw.sliding_window,
        Architecture::Qwen2 | Architecture::Qwen3 => {
            raw.sliding_window.filter(|_| raw.use_sliding_window == Some(true))
        }
    };
    if window == Some(0) {
        return Err(invalid("sliding_window", "0 would let a token not even see itself".into()));
    }
    let Some(window) = window else { return Ok(vec![None; num_layers]) };
    if architecture == Architecture::Mistral {
        return Ok(vec![Some(window); num_layers]);
    }
    if let Some(types) = &raw.layer_types {
        if types.len() != num_layers {
            return Err(invalid("layer_types", format!("{} entries for {num_layers} layers", types.len())));
        }
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                "full_attention" => Ok(None),
                "sliding_attention" => Ok(Some(window)),
                other => Err(unsupported("layer_types", other, "full_attention, sliding_attention")),
            })
            .collect();
    }
    // The default of Qwen's configuration class, for files that leave it out.
    let full_layers = raw.max_window_layers.unwrap_or(28);
    Ok((0..num_layers).map(|layer| (layer >= full_layers).then_some(window)).collect())
}

fn rope(raw: &RawConfig, max_position_embeddings: usize) -> Result<RopeParameters, ConfigError> {
    // transformers 5 writes one object, `rope_parameters`, theta included; before it was `rope_scaling` beside
    // `rope_theta`.
    let (field, object) = match (&raw.rope_parameters, &raw.rope_scaling) {
        (Some(object), _) => ("rope_parameters", Some(object)),
        (None, scaling) => ("rope_scaling", scaling.as_ref()),
    };
    let empty = serde_json::Map::new();
    let object = match object {
        None | Some(Value::Null) => &empty,
        Some(Value::Object(object)) => object,
        Some(_) => return Err(invalid(field, "not an object".into())),
    };
    let number = |name: &'static str| -> Result<Option<f64>, ConfigError> {
        match object.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
                _ => Err(invalid(field, format!("{name} is not a number above 0"))),
            },
        }
    };
    let required = |name: &'static str| -> Result<f64, ConfigError> {
        number(name)?.ok_or_else(|| invalid(field, format!("{name} is missing")))
    };
    let factor = || -> Result<f64, ConfigError> {
        let factor = required("factor")?;
        if factor < 1.0 { Err(invalid(field, format!("factor {factor} is below 1"))) } else { Ok(factor) }
    };

    if let Some(partial) = number("partial_rotary_factor")?.or(raw.partial_rotary_factor).filter(|p| *p != 1.0) {
        return Err(unsupported("partial_rotary_factor", partial.to_string(), "1"));
    }
    let theta = number("rope_theta")?.or(raw.rope_theta).unwrap_or(10_000.0);
    if !(theta.is_finite() && theta > 1.0) {
        return Err(invalid("rope_theta", format!("{theta} is not above 1")));
    }
    let original = |given: Option<f64>| given.map_or(max_position_embeddings, |n| n as usize);
    let kind = object.get("rope_type").or_else(|| object.get("type")).and_then(Value::as_str).unwrap_or("default");
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" => RopeScaling::Dynamic,
        "llama3" => {
            let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
            if low >= high {
                return Err(invalid(field, format!("low_freq_factor {low} is not below high_freq_factor {high}")));
            }
            RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original(number("original_max_position_embeddings")?),
            }
        }
        "yarn" => {
            let factor = factor()?;
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original(number("original_max_position_embeddings")?),
                beta_fast: number("beta_fast")?.unwrap_or(32.0),
                beta_slow: number("beta_slow")?.unwrap_or(1.0),
                truncate: object.get("truncate").and_then(Value::as_bool).unwrap_or(true),
                attention_factor: match number("attention_factor")? {
                    Some(given) => given,
                    None => yarn_attention_factor(factor, number("mscale")?, number("mscale_all_dim")?),
                },
            }
        }
        other => return Err(unsupported("rope_type", other, "default, linear, dynamic, llama3, yarn")),
    };
    Ok(RopeParameters { theta, scaling })
}

/// Section 3.4 of the YaRN paper, with the two-factor form that later checkpoints use.
fn yarn_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    match (mscale, mscale_all_dim) {
        (Some(mscale), Some(all_dim)) => scale(mscale) / scale(all_dim),
        (None | Some(_), None) | (None, Some(_)) => scale(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "vocab_size": 101,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "eos_token_id": 2, "rope_theta": 500000.0
    }"#;

    fn with(changes: &str) -> Result<ModelConfig, ConfigError> {
        let mut config: Value = serde_json::from_str(LLAMA).expect("valid JSON");
        let changes: Value = serde_json::from_str(changes).expect("valid JSON");
        for (key, value) in changes.as_object().expect("an object") {
            config[key] = value.clone();
        }
        let raw = serde_json::from_value(config).expect("fields have their types");
        model_config(raw, RawGeneration::default())
    }

    fn error(changes: &str) -> String {
        with(changes).expect_err("must be refused").to_string()
    }

    #[test]
    fn both_spellings_of_rope_mean_the_same() {
        let old = with(
            r#"{"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}"#,
        );
        let new = with(
            r#"{"rope_theta": null, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                "original_max_position_embeddings": 64}}"#,
        );
        let old = old.expect("supported");
        assert_eq!(old.rope, new.expect("supported").rope);
        assert_eq!(old.max_model_length(), 256);
    }

    #[test]
    fn an_unsupported_architecture_is_named_with_the_supported_ones() {
        assert_eq!(
            error(r#"{"architectures": ["GPT2LMHeadModel"]}"#),
            "unsupported architecture \"GPT2LMHeadModel\": supported are LlamaForCausalLM, MistralForCausalLM, \
             Qwen2ForCausalLM, Qwen3ForCausalLM"
        );
    }

    #[test]
    fn options_that_would_change_the_result_are_refused_by_name() {
        let cases = [
            (r#"{"hidden_act": "gelu"}"#, "hidden_act \"gelu\""),
            (r#"{"rope_scaling": {"type": "longrope", "factor": 2}}"#, "rope_type \"longrope\""),
            (r#"{"rope_scaling": {"type": "linear", "factor": 0.5}}"#, "factor 0.5 is below 1"),
            (r#"{"rope_scaling": {"type": "linear"}}"#, "factor is missing"),
            (
                r#"{"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}"#,
                "low_freq",
            ),
            (r#"{"partial_rotary_factor": 0.5}"#, "partial_rotary_factor \"0.5\""),
            (r#"{"num_key_value_heads": 3}"#, "3 does not divide num_attention_heads 4"),
            (r#"{"hidden_size": 0}"#, "hidden_size: 0 is not between 1"),
            (r#"{"hidden_size": null}"#, "hidden_size is missing"),
            (r#"{"head_dim": 15}"#, "head_dim: 15 is odd"),
            (r#"{"hidden_size": 63}"#, "no multiple of num_attention_heads"),
            (r#"{"torch_dtype": "float8_e4m3fn"}"#, "dtype \"float8_e4m3fn\""),
            (r#"{"quantization_config": {"quant_method": "gptq"}}"#, "quant_method \"gptq\""),
            (
                r#"{"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": true, "sliding_window": 8, "layer_types": []}"#,
                "0 entries for 3 layers",
            ),
        ];
        for (changes, message) in cases {
            let error = error(changes);
            assert!(error.contains(message), "{changes}: {error}");
        }
    }

    #[test]
    fn windows_follow_each_familys_own_rule() {
        let windows = |changes| with(changes).expect("supported").sliding_windows;
        assert_eq!(windows(r#"{"sliding_window": 8}"#), [None; 3], "llama has none");
        assert_eq!(windows(r#"{"architectures": ["MistralForCausalLM"], "sliding_window": 8}"#), [Some(8); 3]);
        assert_eq!(windows(r#"{"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}"#), [None; 3]);
        let qwen = r#"{"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "use_sliding_window": true,
            "max_window_layers": 1}"#;
        assert_eq!(windows(qwen), [None, Some(8), Some(8)]);
    }
}
