//! However a request is run, it is told the same: token for token, log-probability for log-probability, and by a hash of the logits.
//!
//! The reference is each request alone in an engine without prefix cache, its prompt in one piece. Against it run: company, chunk
//! sizes, a warm prefix cache, a pool so small that sequences are preempted, and prefill and decode in two engines with the KV
//! transferred block by block. On a fake model first, whose tokens depend on every byte of KV; then on a real one.

mod engine_support;

use baton_engine::config::Dtype;
use baton_engine::engine::EngineConfig;
use baton_engine::kv_pool::BLOCK_TOKENS;
use engine_support::{
    Arriving, FAKE_VOCAB, FakeModel, Fixture, Model, Outcome, alone, blocks_of_largest, requests, run, run_alone,
    run_apart, run_in,
};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseResult, TestRunner};
use std::cell::Cell;

/// Limits other than the roomy ones of [`alone`].
#[derive(Clone, Copy, Debug)]
struct Limits {
    chunk_blocks: usize,
    spare_batch_tokens: usize,
    max_num_seqs: usize,
    spare_blocks: usize,
    prefix_cache: bool,
}

fn limits() -> impl Strategy<Value = Limits> {
    (1usize..4, 0usize..100, 3usize..8, 0usize..6, any::<bool>()).prop_map(
        |(chunk_blocks, spare_batch_tokens, max_num_seqs, spare_blocks, prefix_cache)| Limits {
            chunk_blocks,
            spare_batch_tokens,
            max_num_seqs,
            spare_blocks,
            prefix_cache,
        },
    )
}

impl Limits {
    /// For these requests: each fits, and few fit together.
    fn tight(self, requests: &[Arriving]) -> EngineConfig {
        EngineConfig {
            num_blocks: blocks_of_largest(requests) + self.spare_blocks,
            max_batch_tokens: self.max_num_seqs + BLOCK_TOKENS + self.spare_batch_tokens,
            max_num_seqs: self.max_num_seqs,
            prefill_chunk_tokens: self.chunk_blocks * BLOCK_TOKENS,
            prefix_cache: self.prefix_cache,
            max_waiting: 64,
        }
    }
}

/// The size of random cases: those of a real model are smaller, since each takes longer.
#[derive(Clone, Copy)]
struct Size {
    cases: u32,
    requests: usize,
    prompt_tokens: usize,
    max_tokens: usize,
}

fn check<S: Strategy>(size: Size, strategy: S, test: impl Fn(S::Value) -> TestCaseResult) {
    let config = ProptestConfig { cases: size.cases, failure_persistence: None, ..ProptestConfig::default() };
    if let Err(error) = TestRunner::new(config).run(&strategy, test) {
        panic!("{error}");
    }
}

fn company<M: Model>(model: &M, size: Size) -> impl Strategy<Value = Vec<Arriving>> {
    requests(model.vocab(), 1..size.requests + 1, size.prompt_tokens, size.max_tokens)
}

fn batched_equals_alone<M: Model>(model: &M, size: Size) {
    check(size, company(model, size), |requests| {
        let config = EngineConfig { num_blocks: 256, ..alone() };
        prop_assert_eq!(run(model, config, &requests).0, run_alone(model, &requests));
        Ok(())
    });
}

fn chunked_prefill_equals_whole<M: Model>(model: &M, size: Size) {
    check(size, (company(model, Size { requests: 1, ..size }), limits()), |(requests, limits)| {
        let config = EngineConfig { num_blocks: 64, prefix_cache: false, ..limits.tight(&requests) };
        prop_assert_eq!(run(model, config, &requests).0, run_alone(model, &requests));
        Ok(())
    });
}

fn with_prefix_cache_equals_without<M: Model>(model: &M, size: Size) {
    let hits = Cell::new(0);
    check(size, (company(model, Size { requests: 2, ..size }), limits()), |(requests, limits)| {
        let config = EngineConfig { num_blocks: 64, prefix_cache: true, ..limits.tight(&requests) };
        let (mut engine, _pool) = engine_support::engine(model, config);
        let expected = run_alone(model, &requests);
        prop_assert_eq!(&run_in(&mut engine, &requests), &expected, "on a cold cache");
        prop_assert_eq!(&run_in(&mut engine, &requests), &expected, "on a warm cache");
        hits.set(hits.get() + engine.counters().prefix_hit_tokens);
        Ok(())
    });
    assert!(hits.get() > 0, "no case met the prefix cache");
}

fn preempted_and_resumed_equals_not<M: Model>(model: &M, size: Size) {
    let preemptions = Cell::new(0);
    check(size, (company(model, size), limits()), |(requests, limits)| {
        let (outcome, counters) = run(model, limits.tight(&requests), &requests);
        prop_assert_eq!(outcome, run_alone(model, &requests));
        preemptions.set(preemptions.get() + counters.preemptions);
        Ok(())
    });
    assert!(preemptions.get() > 0, "no case was preempted");
}

fn prefill_transfer_decode_equals_aggregated<M: Model>(model: &M, size: Size) {
    let preemptions = Cell::new(0);
    check(size, (company(model, size), limits(), limits()), |(requests, prefill, decode)| {
        let (outcome, counters) = run_apart(model, prefill.tight(&requests), decode.tight(&requests), &requests);
        prop_assert_eq!(outcome, run_alone(model, &requests));
        preemptions.set(preemptions.get() + counters.preemptions);
        Ok(())
    });
    assert!(preemptions.get() > 0, "no case was preempted after its transfer");
}

/// Each request cut somewhere in each of its choices and gone on with by another engine, in company and with little room.
fn resumed_elsewhere_equals_uninterrupted<M: Model>(model: &M, size: Size) {
    let (preemptions, hits) = (Cell::new(0), Cell::new(0));
    let cuts = prop::collection::vec(any::<prop::sample::Index>(), 32);
    check(size, (company(model, size), limits(), cuts), |(requests, limits, cuts)| {
        let Outcome(whole) = run_alone(model, &requests);
        let mut cuts = cuts.iter().cycle();
        let mut expected = Outcome::default();
        let mut resumed = requests.clone();
        for Arriving { request, .. } in &mut resumed {
            let cut = |choice| {
                let told = &whole[&(request.id, choice)];
                let (given, rest) = told.split_at(cuts.next().expect("a cycle").index(told.len() + 1));
                if rest.is_empty() {
                    return None;
                }
                expected.0.insert((request.id, choice), rest.to_vec());
                Some(given.iter().map(|(token, _)| token.id).collect())
            };
            request.resumed = (0..request.choices).map(cut).collect();
        }
        resumed.retain(|arriving| arriving.request.resumed.iter().any(Option::is_some));
        let (outcome, counters) = run(model, limits.tight(&requests), &resumed);
        prop_assert_eq!(outcome, expected);
        preemptions.set(preemptions.get() + counters.preemptions);
        hits.set(hits.get() + counters.prefix_hit_tokens);
        Ok(())
    });
    assert!(hits.get() > 0, "no case met the prefix cache");
    // What is left of a completion shorter than a block seldom needs another one.
    assert!(size.max_tokens < BLOCK_TOKENS || preemptions.get() > 0, "no case was preempted");
}

macro_rules! equalities {
    ($name:ident, $model:expr, $size:expr, $transfers:expr) => {
        mod $name {
            use super::*;

            #[test]
            fn batched_equals_alone() {
                super::batched_equals_alone(&$model, $size);
            }

            #[test]
            fn chunked_prefill_equals_whole() {
                super::chunked_prefill_equals_whole(&$model, $size);
            }

            #[test]
            fn with_prefix_cache_equals_without() {
                super::with_prefix_cache_equals_without(&$model, $size);
            }

            #[test]
            fn preempted_and_resumed_equals_not() {
                super::preempted_and_resumed_equals_not(&$model, $size);
            }

            #[test]
            fn resumed_elsewhere_equals_uninterrupted() {
                super::resumed_elsewhere_equals_uninterrupted(&$model, $size);
            }

            #[test]
            fn prefill_transfer_decode_equals_aggregated() {
                super::prefill_transfer_decode_equals_aggregated(&$model, Size { cases: $transfers, ..$size });
            }
        }
    };
}

const FAKE: Size = Size { cases: 256, requests: 6, prompt_tokens: 150, max_tokens: 60 };

equalities!(fake_model, FakeModel, FAKE, 512);

const REAL: Size = Size { cases: 256, requests: 3, prompt_tokens: 100, max_tokens: 10 };

equalities!(
    llama3_f32,
    Fixture { directory: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama3"), vocab: 203, dtype: Dtype::F32 },
    REAL,
    256
);
equalities!(
    qwen3_bf16,
    Fixture { directory: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/qwen3"), vocab: 157, dtype: Dtype::Bf16 },
    REAL,
    256
);

#[test]
fn the_fake_model_notices_one_wrong_byte_of_kv() {
    // The equalities above are worth something only if this holds.
    use baton_engine::kv_pool::BlockId;
    let tell = |spoil: Option<(usize, usize)>| {
        let (mut engine, pool) = engine_support::engine(&FakeModel, alone());
        engine.submit(engine_support::request(1, engine_support::prompt(5, 40, FAKE_VOCAB), 4)).expect("it fits");
        engine.step(&mut ()).expect("the device works");
        if let Some((layer, byte)) = spoil {
            let mut bytes = vec![0; pool.layout().block_bytes()];
            let generation = pool.generation(BlockId(1));
            pool.export(layer, BlockId(1), generation, &mut bytes).expect("it is current");
            bytes[byte] ^= 1;
            pool.import(layer, BlockId(1), generation, &bytes).expect("it is current");
        }
        let events = engine.step(&mut ()).expect("the device works");
        format!("{events:?}")
    };
    let right = tell(None);
    assert_eq!(tell(None), right);
    let values = BLOCK_TOKENS * 8;
    for spoil in [(0, 0), (1, 7), (1, values), (0, values + 7 * 8 + 3)] {
        assert_ne!(tell(Some(spoil)), right, "{spoil:?}");
    }
    // A slot beyond the context is nobody's business.
    assert_eq!(tell(Some((0, 20 * 8))), right);
}
