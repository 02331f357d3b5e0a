//! Logits and greedy continuations are those of transformers.

use baton_engine::config::Dtype;
use baton_engine::model_runner::ModelRunner;
use baton_engine::runner::{LayerHook, Runner};
use baton_engine::sampling::{SampleRow, SamplingParams};

use crate::drive::{Driver, MODELS, batch, expected, load};

/// Largest difference relative to the largest logit.
fn deviation(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    let difference = found.iter().zip(expected).fold(0.0_f32, |max, (x, y)| max.max((x - y).abs()));
    difference / largest
}

#[test]
fn f32_logits_are_those_of_transformers_at_every_position() {
    for name in MODELS {
        let mut driver = Driver::new(load(name, None));
        for (index, expected) in expected(name).into_iter().enumerate() {
            let mut sequence = driver.sequence(&expected.prompt);
            let logits = driver.compute(&mut [(&mut sequence, expected.prompt.len())]);
            let deviation = deviation(&logits, &expected.logits);
            assert!(deviation <= 1e-4, "{name}, prompt {index}: {deviation:e} of the largest logit");
        }
    }
}

#[test]
fn greedy_continuations_of_64_tokens_are_those_of_transformers() {
    for name in MODELS {
        let mut driver = Driver::new(load(name, None));
        for (index, expected) in expected(name).into_iter().enumerate() {
            let mut sequence = driver.sequence(&expected.prompt);
            assert_eq!(driver.greedy(&mut sequence, 64), expected.greedy, "{name}, prompt {index}");
        }
    }
}

#[test]
fn narrower_types_stay_near_f32() {
    // bf16 has 8 bits of mantissa and f16 11: single roundings of 0.4 % and 0.05 %, some dozens of them in a row.
    for (dtype, tolerance) in [(Dtype::Bf16, 0.1), (Dtype::F16, 0.015)] {
        for name in MODELS {
            let mut driver = Driver::new(load(name, Some(dtype)));
            let expected = expected(name).remove(0);
            let mut sequence = driver.sequence(&expected.prompt);
            let logits = driver.compute(&mut [(&mut sequence, expected.prompt.len())]);
            let deviation = deviation(&logits, &expected.logits);
            assert!(deviation <= tolerance, "{name} {dtype:?}: {deviation:e} of the largest logit");
            assert!(deviation > 1e-5, "{name} {dtype:?}: nothing was rounded");
        }
    }
}

#[test]
fn what_a_publisher_recommends_is_read() {
    let config = load("llama3", None).config;
    assert_eq!(config.eos_token_ids, [2, 5]);
    assert_eq!((config.generation.temperature, config.generation.top_k), (Some(0.6), Some(20)));
    assert_eq!(config.generation.top_p, Some(0.95));
    assert_eq!(config.dtype, Some(Dtype::F32));
}

struct Layers(Vec<usize>);

impl LayerHook for Layers {
    fn layer_done(&mut self, layer: usize) {
        self.0.push(layer);
    }
}

#[test]
fn choices_share_a_row_and_every_layer_is_reported_once_in_order() {
    let mut driver = Driver::new(load("qwen3", None));
    let expected = expected("qwen3").remove(1);
    let mut sequence = driver.sequence(&expected.prompt);
    let mut work = batch(&[(&mut sequence, expected.prompt.len())]);
    let last = expected.prompt.len() as u32 - 1;
    work.logit_rows = vec![last - 1, last, last, last];
    let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let row = SampleRow { params: &params, prompt: &expected.prompt, generated: &[], seed: 1, choice: 0 };
    let mut layers = Layers(Vec::new());
    let rows = vec![row; 4];
    let tokens = driver.runner.run(&work, &rows, &mut layers).expect("the batch is consistent");
    assert_eq!(layers.0, [0, 1]);
    assert!(tokens[1..].iter().all(|token| token.id == expected.greedy[0]));
    let before_last = &expected.logits[(last as usize - 1) * driver.vocab..][..driver.vocab];
    let best = (0..driver.vocab).max_by(|&a, &b| before_last[a].total_cmp(&before_last[b])).expect("a vocabulary");
    assert_eq!(tokens[0].id as usize, best);
    let error = ModelRunner::run(&mut driver.runner, &work, &rows[..2], &mut ()).expect_err("too few rows");
    assert!(error.to_string().contains("2 rows to sample for 4"), "{error}");
}
