//! What arrives when all goes well: the right bytes, while prefill still runs, for many at once.

use super::fixture::*;
use crate::transfer::producer::{ExportOutcome, ExportReason};
use baton_engine::kv_pool::{BLOCK_TOKENS, KvDtype, KvLayout};
use proptest::prelude::*;
use std::time::Duration;

fn layouts() -> impl Strategy<Value = KvLayout> {
    let dtypes = prop_oneof![Just(KvDtype::Bf16), Just(KvDtype::F16), Just(KvDtype::F32)];
    (1..5usize, 1..4usize, 1..9usize, dtypes).prop_map(|(layers, kv_heads, head_dim, dtype)| KvLayout {
        layers,
        kv_heads,
        head_dim,
        dtype,
        num_blocks: 64,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn bytes_arrive_equal_whatever_the_layout_the_prompt_the_prefix_and_the_chunks(
        layout in layouts(), tokens in 1..400usize, cached in any::<prop::sample::Index>(),
        chunk in 1..12usize, subscribe_first in any::<bool>(),
    ) {
        run(async {
            let pair = Pair::start(Setup { layout, ..Setup::default() }).await;
            let prompt = pair.prompt(tokens, cached.index(tokens.div_ceil(BLOCK_TOKENS) + 1));
            let mut fetch = None;
            if subscribe_first {
                fetch = Some(tokio::spawn(pair.fetch(&prompt)));
                until("the subscription waits", || pair.producer.stats().now.subscriptions_parked == 1).await;
            }
            let export = pair.open(&prompt);
            let ends = (1..).map(|i| (i * chunk * BLOCK_TOKENS).min(tokens));
            for end in ends.take(tokens.div_ceil(chunk * BLOCK_TOKENS)) {
                (0..layout.layers).for_each(|layer| {
                    export.progress(layer, &prompt.source_blocks[..end.div_ceil(BLOCK_TOKENS)], end);
                });
                tokio::task::yield_now().await;
            }
            export.commit(commit());
            let fetch = fetch.unwrap_or_else(|| tokio::spawn(pair.fetch(&prompt)));
            let fetched = soon("the fetch", fetch).await.expect("no panic").expect("nothing goes wrong");
            pair.assert_arrived(&prompt);
            assert_eq!(fetched.commit, commit());
            let missing = prompt.sink_blocks.len() - prompt.cached_blocks;
            let kv_bytes = (missing * layout.block_bytes_all_layers()) as u64;
            assert_eq!(fetched.kv_bytes, kv_bytes);
            let outcome = soon("the acknowledgement", export.finished()).await;
            assert_eq!(outcome, ExportOutcome { reason: ExportReason::Acked, kv_bytes });
            pair.assert_nothing_held().await;
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_arrive_while_prefill_still_runs() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(4 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    let fetch = tokio::spawn(pair.fetch(&prompt));
    let mut frames = 0;
    for end in 1..=4 {
        for layer in 0..pair.layout.layers {
            export.progress(layer, &prompt.source_blocks[..end], end * BLOCK_TOKENS);
            frames += 1;
            until("the layer's frame is here", || pair.consumer.stats().frames_received == frames).await;
            assert!(!fetch.is_finished());
        }
    }
    export.commit(commit());
    soon("the fetch", fetch).await.expect("no panic").expect("nothing goes wrong");
    pair.assert_arrived(&prompt);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_does_not_make_a_prompt_complete_whose_blocks_are_not() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(2 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    let fetch = tokio::spawn(pair.fetch(&prompt));
    export.commit(commit());
    export.progress(0, &prompt.source_blocks, prompt.tokens);
    until("the first layer is here", || pair.consumer.stats().kv_bytes_received == prompt.byte_budget / 2).await;
    assert!(!fetch.is_finished());
    export.progress(1, &prompt.source_blocks, prompt.tokens);
    soon("the fetch", fetch).await.expect("no panic").expect("nothing goes wrong");
    pair.assert_arrived(&prompt);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_transfers_share_one_session() {
    let layout = KvLayout { num_blocks: 1024, ..small() };
    let pair = Pair::start(Setup { layout, ..Setup::default() }).await;
    let prompts: Vec<_> = (1..33).map(|i| pair.prompt(i * 29, i / 20)).collect();
    let fetches: Vec<_> = prompts.iter().map(|prompt| tokio::spawn(pair.fetch(prompt))).collect();
    let exports: Vec<_> = prompts.iter().map(|prompt| pair.open(prompt)).collect();
    for layer in 0..layout.layers {
        for (export, prompt) in exports.iter().zip(&prompts).rev() {
            export.progress(layer, &prompt.source_blocks, prompt.tokens);
        }
    }
    exports.iter().for_each(|export| export.commit(commit()));
    for (fetch, prompt) in fetches.into_iter().zip(&prompts) {
        soon("the fetch", fetch).await.expect("no panic").expect("nothing goes wrong");
        pair.assert_arrived(prompt);
    }
    assert_eq!(pair.producer.stats().now.sessions, 1);
    pair.assert_nothing_held().await;
    assert_eq!(pair.producer.stats().ended(ExportReason::Acked), 32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_larger_than_its_credit_and_than_a_frame_completes() {
    // 80 blocks of 64 KiB in 4 layers are 20 MiB, past the credit of 16 MiB; a layer's 5 MiB are past a frame's 4.
    let layout = KvLayout { layers: 4, kv_heads: 8, head_dim: 64, dtype: KvDtype::Bf16, num_blocks: 80 };
    let pair = Pair::start(Setup { layout, ..Setup::default() }).await;
    let prompt = pair.prompt(80 * BLOCK_TOKENS - 5, 0);
    let export = pair.open(&prompt);
    pair.compute_all(&export, &prompt);
    export.commit(commit());
    let fetched = soon("the fetch", pair.fetch(&prompt)).await.expect("nothing goes wrong");
    assert_eq!(fetched.kv_bytes, 20 << 20);
    assert!(fetched.exposed >= Duration::ZERO && fetched.total > Duration::ZERO);
    pair.assert_arrived(&prompt);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_that_was_preempted_and_computed_elsewhere_arrives_whole() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(4 * BLOCK_TOKENS, 0);
    let elsewhere = pair.prompt(4 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    let fetch = tokio::spawn(pair.fetch(&prompt));
    (0..2).for_each(|layer| export.progress(layer, &prompt.source_blocks[..2], 2 * BLOCK_TOKENS));
    until("the first half is here", || pair.consumer.stats().kv_bytes_received == prompt.byte_budget / 2).await;
    // Its second block is lost; what has been sent of it stays, what has not comes from the new blocks.
    let moved: Vec<_> = [&prompt.source_blocks[..1], &elsewhere.source_blocks[1..]].concat();
    for end in 2..=4 {
        (0..2).for_each(|layer| export.progress(layer, &moved[..end], end * BLOCK_TOKENS));
    }
    export.commit(commit());
    soon("the fetch", fetch).await.expect("no panic").expect("nothing goes wrong");
    let source_blocks = [&prompt.source_blocks[..2], &elsewhere.source_blocks[2..]].concat();
    pair.assert_arrived(&Prompt { source_blocks, ..prompt });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exposed_time_counts_from_the_last_computed_layer() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    let fetch = tokio::spawn(pair.fetch(&prompt));
    pair.compute_all(&export, &prompt);
    let computed = std::time::Instant::now();
    until("the frames are here", || pair.consumer.stats().kv_bytes_received == prompt.byte_budget).await;
    let before_commit = computed.elapsed();
    export.commit(commit());
    let fetched = soon("the fetch", fetch).await.expect("no panic").expect("nothing goes wrong");
    assert!(fetched.exposed >= before_commit, "{:?} < {before_commit:?}", fetched.exposed);
    assert!(fetched.exposed <= computed.elapsed() + Duration::from_millis(1));
}
