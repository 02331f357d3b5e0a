//! Whatever is cut, changed, stopped or cancelled, wherever: a typed end in time, never wrong KV, nothing held afterwards.

use super::fixture::*;
use super::relay::{Fault, Harm, Relay, Way};
use crate::transfer::error::FetchError;
use crate::transfer::limits::Timing;
use crate::transfer::producer::{Export, ExportReason};
use baton_engine::kv_pool::BLOCK_TOKENS;
use baton_wire::PathReason;
use proptest::prelude::*;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_after_any_frame_frees_both_sides_and_writes_no_more() {
    let pair = Pair::start(Setup::default()).await;
    let blocks = 3;
    let frames = blocks * pair.layout.layers;
    for stop_after in 0..=frames {
        let prompt = pair.prompt(blocks * BLOCK_TOKENS, 0);
        let export = pair.open(&prompt);
        let fetch = tokio::spawn(pair.fetch(&prompt));
        until("the subscription is there", || pair.consumer.stats().fetches_active == 1).await;
        let received = pair.consumer.stats().frames_received;
        let steps = (1..=blocks).flat_map(|end| (0..pair.layout.layers).map(move |layer| (layer, end)));
        for (count, (layer, end)) in steps.take(stop_after).enumerate() {
            export.progress(layer, &prompt.source_blocks[..end], end * BLOCK_TOKENS);
            let expect = received + count as u64 + 1;
            until("its frame is here", || pair.consumer.stats().frames_received == expect).await;
        }
        fetch.abort();
        assert!(soon("the drop", fetch).await.expect_err("aborted").is_cancelled());
        let at_drop = pair.arrived(&prompt);
        pair.compute_all(&export, &prompt);
        export.commit(commit());
        if stop_after == 0 {
            // The drop may have come before the subscription was sent; then the worker gives the export up.
            export.fail();
        }
        let reason = soon("the outcome", export.finished()).await.reason;
        assert!(reason == ExportReason::Cancelled || stop_after == 0, "after {stop_after} frames: {reason:?}");
        pair.assert_nothing_held().await;
        assert_eq!(pair.arrived(&prompt), at_drop, "written after the drop, after {stop_after} frames");
    }
    assert_eq!(pair.consumer.stats().fetches_cancelled, frames as u64 + 1);
    // The session has survived all of them.
    assert_eq!(pair.producer.stats().now.sessions, 1);
}

/// Fetches through a relay with one fault. The result, whether the fault happened at all, and the export.
async fn fetch_with(pair: &Pair, prompt: &Prompt, fault: Fault) -> (Result<(), FetchError>, bool, Export) {
    let relay = Relay::start(pair.address, fault).await;
    let export = pair.open(prompt);
    let fetch = tokio::spawn(pair.consumer.fetch(prompt.fetch_from(relay.address), prompt.destination()));
    for end in 1..=prompt.source_blocks.len() {
        let tokens = (end * BLOCK_TOKENS).min(prompt.tokens);
        (0..pair.layout.layers).for_each(|layer| export.progress(layer, &prompt.source_blocks[..end], tokens));
        tokio::task::yield_now().await;
    }
    export.commit(commit());
    let result = soon("the fetch", fetch).await.expect("no panic").map(|_| ());
    (result, relay.happened.is_cancelled(), export)
}

fn ways() -> impl Strategy<Value = Way> {
    prop_oneof![
        1 => Just(Way::ControlToConsumer),
        1 => Just(Way::ControlToProducer),
        4 => Just(Way::BulkToConsumer),
        1 => Just(Way::BulkToProducer),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_changed_byte_anywhere_ends_in_a_typed_error_or_does_not_matter(
        way in ways(), at in 0..2000usize, mask in 1..=255u8, tokens in 65..=96usize,
    ) {
        run(async {
            let pair = Pair::start(Setup::default()).await;
            let prompt = pair.prompt(tokens, 0);
            let fault = Fault { way, at, harm: Harm::Flip { mask } };
            let (result, happened, export) = fetch_with(&pair, &prompt, fault).await;
            match result {
                // A PING after the last frame, or nothing at all, was hit.
                Ok(()) => {
                    pair.assert_arrived(&prompt);
                    assert!(!happened || way != Way::BulkToConsumer, "{fault:?} was not noticed");
                }
                Err(error) => {
                    assert!(happened, "{error:?} without a fault");
                    let ours = matches!(way, Way::ControlToConsumer | Way::BulkToConsumer);
                    let reason = error.path_reason();
                    // What the producer notices reaches us as its ERROR, or as its closing of the other connection.
                    let expected = matches!(reason, PathReason::Corrupt | PathReason::Protocol)
                        || (!ours && reason == PathReason::PrefillUnreachable);
                    assert!(expected, "{fault:?}: {error:?}");
                }
            }
            // The worker's own end of it: a consumer that never got as far as a subscription leaves the export waiting.
            drop(export);
            pair.assert_nothing_held().await;
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_was_changed_leaves_its_blocks_alone_and_the_session_alive() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(BLOCK_TOKENS, 0);
    // HELLO is under 500 bytes, then come a header and the first layer's 1024: this is inside them.
    let fault = Fault { way: Way::BulkToConsumer, at: 1000, harm: Harm::Flip { mask: 1 } };
    let (result, happened, export) = fetch_with(&pair, &prompt, fault).await;
    let error = result.expect_err("a changed byte");
    assert!(happened);
    assert_eq!(error.path_reason(), PathReason::Corrupt, "{error:?}");
    assert_eq!(pair.consumer.stats().checksum_failures, 1);
    assert!(pair.arrived(&prompt)[..pair.layout.block_bytes()].iter().all(|&byte| byte == UNTOUCHED));
    assert_eq!(soon("the producer has heard it", export.finished()).await.reason, ExportReason::ConsumerFailed);
    assert_eq!(pair.producer.stats().now.sessions, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_cut_anywhere_is_a_typed_error_at_once() {
    for way in [Way::ControlToConsumer, Way::ControlToProducer, Way::BulkToConsumer, Way::BulkToProducer] {
        for at in (0..3500).step_by(125) {
            let pair = Pair::start(Setup::default()).await;
            let prompt = pair.prompt(BLOCK_TOKENS + 1, 0);
            let started = Instant::now();
            let (result, happened, export) = fetch_with(&pair, &prompt, Fault { way, at, harm: Harm::Cut }).await;
            match result {
                Ok(()) => {
                    assert!(!happened || way == Way::ControlToConsumer || way == Way::ControlToProducer, "{way:?} {at}")
                }
                Err(error) => {
                    assert!(happened, "{way:?} {at}: {error:?} without a fault");
                    assert_eq!(error.path_reason(), PathReason::PrefillUnreachable, "{way:?} {at}: {error:?}");
                    // Within every timeout of the protocol that could end it, so it was the close that was noticed.
                    assert!(started.elapsed() < Timing::default().hello, "{way:?} {at}: {:?}", started.elapsed());
                }
            }
            drop(export);
            pair.assert_nothing_held().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_stopped_is_given_up_in_time() {
    let silent = Duration::from_millis(300);
    // As in the defaults, a consumer gives up sooner than a producer: a stalled consumer has no PING to answer either, and whoever
    // closes first decides what the other one sees.
    let timing = Timing { silent, hello: silent, ping: silent / 10, lease: silent * 3, ..Timing::default() };
    for (way, at) in [(Way::ControlToConsumer, 100), (Way::ControlToConsumer, 500), (Way::BulkToConsumer, 700)] {
        let setup = Setup { producer_timing: timing, consumer_timing: timing, ..Setup::default() };
        let pair = Pair::start(setup).await;
        let prompt = pair.prompt(3 * BLOCK_TOKENS, 0);
        let relay = Relay::start(pair.address, Fault { way, at, harm: Harm::Stall }).await;
        let export = pair.open(&prompt);
        let fetch = tokio::spawn(pair.consumer.fetch(prompt.fetch_from(relay.address), prompt.destination()));
        export.progress(0, &prompt.source_blocks, prompt.tokens);
        soon("the stop", relay.happened.cancelled()).await;
        let error = soon("the end", fetch).await.expect("no panic").expect_err("nothing comes any more");
        assert_eq!(error.path_reason(), PathReason::Timeout, "{way:?}: {error:?}");
        let reason = soon("the outcome", export.finished()).await.reason;
        assert!(matches!(reason, ExportReason::ConsumerLost | ExportReason::LeaseExpired), "{way:?}: {reason:?}");
        pair.assert_nothing_held().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_prefill_is_not_taken_for_a_stopped_peer() {
    let silent = Duration::from_millis(500);
    let producer_timing = Timing { ping: silent / 20, ..Timing::default() };
    let consumer_timing = Timing { silent, ..Timing::default() };
    let pair = Pair::start(Setup { producer_timing, consumer_timing, ..Setup::default() }).await;
    let prompt = pair.prompt(BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    let fetch = tokio::spawn(pair.fetch(&prompt));
    let opened = Instant::now();
    until("three silences have passed", || opened.elapsed() > silent * 3 || fetch.is_finished()).await;
    pair.compute_all(&export, &prompt);
    export.commit(commit());
    soon("the fetch", fetch).await.expect("no panic").expect("PINGs say that the producer lives");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_lives_but_sends_nothing_is_given_up() {
    let idle = Duration::from_millis(200);
    let consumer_timing = Timing { fetch_idle: idle, ..Timing::default() };
    let pair = Pair::start(Setup { consumer_timing, ..Setup::default() }).await;
    let prompt = pair.prompt(BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    let error = soon("the end", pair.fetch(&prompt)).await.expect_err("nothing comes");
    assert!(matches!(error, FetchError::Idle(_)), "{error:?}");
    assert_eq!(error.path_reason(), PathReason::Timeout);
    assert_eq!(soon("the outcome", export.finished()).await.reason, ExportReason::Cancelled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_goes_away_tells_its_consumers() {
    let pair = Pair::start(Setup::default()).await;
    let [fetched, parked] = [0; 2].map(|cached| pair.prompt(BLOCK_TOKENS, cached));
    let export = pair.open(&fetched);
    let fetches = [&fetched, &parked].map(|prompt| tokio::spawn(pair.fetch(prompt)));
    export.progress(0, &fetched.source_blocks, fetched.tokens);
    until("both are there", || {
        pair.producer.stats().now.subscriptions_parked == 1 && pair.consumer.stats().frames_received == 1
    })
    .await;
    pair.shutdown.cancel();
    for fetch in fetches {
        let error = soon("the end", fetch).await.expect("no panic").expect_err("going away");
        assert_eq!(error.path_reason(), PathReason::PrefillUnreachable, "{error:?}");
    }
    assert_eq!(soon("the outcome", export.finished()).await.reason, ExportReason::ShuttingDown);
    pair.assert_nothing_held().await;
    assert!(pair.producer.open(parked.spec()).is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_dial_answers_everybody_who_waits_for_it() {
    let pair = Pair::start(Setup::default()).await;
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a loopback port is free");
    let nobody = closed.local_addr().expect("bound");
    drop(closed);
    let prompts = [0; 4].map(|cached| pair.prompt(BLOCK_TOKENS, cached));
    let fetches =
        prompts.map(|prompt| tokio::spawn(pair.consumer.fetch(prompt.fetch_from(nobody), prompt.destination())));
    for fetch in fetches {
        let error = soon("the failure", fetch).await.expect("no panic").expect_err("nobody listens");
        assert!(matches!(error, FetchError::Connect { .. }), "{error:?}");
        assert_eq!(error.path_reason(), PathReason::PrefillUnreachable);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_session_is_dialled_again() {
    let pair = Pair::start(Setup::default()).await;
    let fault = Fault { way: Way::BulkToConsumer, at: 1500, harm: Harm::Cut };
    let relay = Relay::start(pair.address, fault).await;
    for lost in [true, false, false] {
        let prompt = pair.prompt(BLOCK_TOKENS, 0);
        let export = pair.open(&prompt);
        pair.compute_all(&export, &prompt);
        export.commit(commit());
        let fetched =
            soon("the fetch", pair.consumer.fetch(prompt.fetch_from(relay.address), prompt.destination())).await;
        assert_eq!(fetched.is_err(), lost, "{fetched:?}");
        pair.assert_nothing_held().await;
    }
    until("the lost one is forgotten", || pair.producer.stats().now.sessions == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unused_session_is_closed_and_dialled_again_when_needed() {
    let idle = Duration::from_millis(100);
    let consumer_timing = Timing { session_idle: idle, lease_renew: idle / 10, ..Timing::default() };
    let pair = Pair::start(Setup { consumer_timing, ..Setup::default() }).await;
    for _ in 0..2 {
        let prompt = pair.prompt(BLOCK_TOKENS, 0);
        let export = pair.open(&prompt);
        pair.compute_all(&export, &prompt);
        export.commit(commit());
        soon("the fetch", pair.fetch(&prompt)).await.expect("nothing goes wrong");
        pair.assert_arrived(&prompt);
        until("the session is closed", || pair.producer.stats().now.sessions == 0).await;
    }
}
