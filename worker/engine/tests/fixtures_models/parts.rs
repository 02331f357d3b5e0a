//! Stages and shares of a model compute what their part of the whole does; fingerprints tell models apart.

use std::sync::Arc;

use baton_engine::backend::Backend;
use baton_engine::config::Dtype;
use baton_engine::kv_pool::{BlockId, HeapPool, KvPool};
use baton_engine::loader::{self, LoadError, LoadOptions, LoadedModel, Shard, ShardError};
use baton_engine::model_runner::ModelRunnerError;
use baton_engine::models::decoder::Output;

use crate::drive::{Driver, MODELS, batch, bits, directory, expected, load};

fn part(name: &str, shard: Shard) -> Result<LoadedModel, LoadError> {
    loader::load(&directory(name), LoadOptions { dtype: None, shard: Some(shard) }, &mut |_, _| {})
}

#[test]
fn two_stages_compute_what_the_whole_model_does() {
    for name in ["llama3", "qwen2-tied"] {
        let prompt = expected(name).remove(0).prompt;
        let mut driver = Driver::new(load(name, None));
        let mut sequence = driver.sequence(&prompt);
        let mut work = batch(&[(&mut sequence, prompt.len())]);
        work.logit_rows = vec![0, 31, 69];
        let whole = driver.runner.logits(&work, &mut ()).expect("the batch is consistent");

        let mut hidden = None;
        for layers in [0..1, 1..2] {
            let model = part(name, Shard { index: 0, count: 1, layers }).expect("the stage loads");
            let pool = HeapPool::new(model.kv_layout(61));
            assert_eq!(pool.layout().layers, 1);
            let (backend, decoder) = model.into_parts();
            match decoder.forward(&backend, &work, hidden.take(), &pool, &mut ()).expect("the batch is consistent") {
                Output::Hidden(states) => hidden = Some(states),
                Output::Logits(logits) => {
                    assert_eq!(bits(&backend.read(&logits).expect("the CPU")), bits(&whole), "{name}");
                }
            }
        }
        assert!(hidden.is_none(), "the last stage ends in logits");
    }
}

#[test]
fn a_share_of_the_heads_stores_what_the_whole_model_stores_for_them() {
    let (name, prompt) = ("llama3", expected("llama3").remove(1).prompt);
    let whole = load(name, None);
    let pool = Arc::new(HeapPool::new(whole.kv_layout(61)));
    let mut driver = Driver::new(load(name, None));
    let mut sequence = driver.sequence(&prompt);
    let mut work = batch(&[(&mut sequence, prompt.len())]);
    work.logit_rows = vec![0];
    let block = BlockId(sequence.blocks[0].0);
    whole.into_runner(pool.clone()).expect("the shape fits").logits(&work, &mut ()).expect("the batch is consistent");
    let read = |pool: &HeapPool| {
        let mut bytes = vec![0; pool.layout().block_bytes()];
        pool.export(0, block, 0, &mut bytes).expect("nobody else has it");
        bytes
    };
    let stored = read(&pool);
    assert!(stored.iter().any(|&byte| byte != 0));

    // Of the first layer, whose input no other share has contributed to: K and V are [K|V][kv_head][...], two heads
    // here.
    let head = pool.layout().head_bytes();
    for index in 0..2 {
        let model = part(name, Shard { index, count: 2, layers: 0..2 }).expect("the share loads");
        let pool = HeapPool::new(model.kv_layout(61));
        assert_eq!(pool.layout().kv_heads, 1);
        let (backend, decoder) = model.into_parts();
        decoder.forward(&backend, &work, None, &pool, &mut ()).expect("the batch is consistent");
        let share = read(&pool);
        assert_eq!(share[..head], stored[index * head..][..head], "k of share {index}");
        assert_eq!(share[head..], stored[(2 + index) * head..][..head], "v of share {index}");
    }
}

#[test]
fn parts_that_do_not_exist_are_refused_and_parts_do_not_run_alone() {
    let refused = |name, index, count, layers| match part(name, Shard { index, count, layers }) {
        Err(LoadError::Shard(error)) => error,
        Err(other) => panic!("expected a refused shard, got {other}"),
        Ok(_) => panic!("expected a refused shard"),
    };
    assert_eq!(refused("llama3", 2, 2, 0..2), ShardError::Index { index: 2, count: 2 });
    assert_eq!(refused("llama3", 0, 1, 1..3), ShardError::Layers { layers: 1..3, available: 2 });
    assert_eq!(refused("llama-bias", 0, 2, 0..2), ShardError::Indivisible { what: "KV heads", size: 1, count: 2 });

    let model = part("llama3", Shard { index: 0, count: 1, layers: 0..1 }).expect("the stage loads");
    let pool = Arc::new(HeapPool::new(model.kv_layout(2)));
    assert!(matches!(model.into_runner(pool), Err(ModelRunnerError::PartOfModel { .. })));
    let model = load("llama3", None);
    let pool = Arc::new(HeapPool::new(load("qwen3", None).kv_layout(2)));
    assert!(matches!(model.into_runner(pool), Err(ModelRunnerError::PoolShape { .. })));
}

#[test]
fn fingerprints_are_equal_exactly_where_blocks_may_be_exchanged() {
    let mut seen = Vec::new();
    for name in MODELS {
        seen.push(load(name, None).fingerprint());
        assert_eq!(seen.last(), Some(&load(name, None).fingerprint()), "{name}");
        seen.push(load(name, Some(Dtype::Bf16)).fingerprint());
    }
    seen.push(part("llama3", Shard { index: 0, count: 1, layers: 0..1 }).expect("the stage loads").fingerprint());
    let count = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), count);

    // Pinned: another process, machine or build of the same layout must get the same.
    let hex: String = load("llama2", None).fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, "8469a804741c23612ad45afa6ea422e87339da0d9f424a235038cc090bcef5bd");
}
