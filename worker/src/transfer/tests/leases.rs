//! How long blocks are kept, and that they are never sent after that.

use super::fixture::*;
use crate::transfer::error::FetchError;
use crate::transfer::limits::Timing;
use crate::transfer::producer::ExportReason;
use baton_engine::kv_pool::{BLOCK_TOKENS, KvPool};
use baton_wire::PathReason;
use baton_wire::kv::ErrorCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;

const SHORT: Duration = Duration::from_millis(200);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_that_nobody_fetches_ends_with_its_lease() {
    let producer_timing = Timing { lease: SHORT, sweep: SHORT / 10, ..Timing::default() };
    let pair = Pair::start(Setup { producer_timing, ..Setup::default() }).await;
    let prompt = pair.prompt(BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    pair.compute_all(&export, &prompt);
    export.commit(commit());
    until("its age is seen", || pair.producer.stats().now.oldest_export_age >= SHORT / 4).await;
    let outcome = soon("the lease's end", export.finished()).await;
    assert_eq!((outcome.reason, outcome.kv_bytes), (ExportReason::LeaseExpired, 0));
    let error = soon("a late fetch", pair.fetch(&prompt)).await.expect_err("too late");
    assert!(matches!(error, FetchError::Refused(ErrorCode::AlreadyTaken)), "{error:?}");
    assert_eq!(pair.producer.stats().kv_bytes_sent, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_does_not_renew_loses_its_lease() {
    let producer_timing = Timing { lease: SHORT, ping: SHORT / 10, ..Timing::default() };
    let consumer_timing = Timing { lease_renew: DEADLINE, ..Timing::default() };
    let pair = Pair::start(Setup { producer_timing, consumer_timing, ..Setup::default() }).await;
    let prompt = pair.prompt(2 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    export.progress(0, &prompt.source_blocks, prompt.tokens);
    let error = soon("the lease's end", pair.fetch(&prompt)).await.expect_err("not renewed");
    assert!(matches!(error, FetchError::Refused(ErrorCode::LeaseExpired)), "{error:?}");
    assert_eq!(error.path_reason(), PathReason::LeaseExpired);
    assert_eq!(soon("the outcome", export.finished()).await.reason, ExportReason::LeaseExpired);
    let sent = pair.producer.stats().kv_bytes_sent;
    export.progress(1, &prompt.source_blocks, prompt.tokens);
    export.commit(commit());
    pair.assert_nothing_held().await;
    assert_eq!(pair.producer.stats().kv_bytes_sent, sent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_is_renewed_for_as_long_as_the_consumer_wants_it() {
    let producer_timing = Timing { lease: SHORT * 5, ping: SHORT, ..Timing::default() };
    let consumer_timing = Timing { lease_renew: SHORT / 4, ..Timing::default() };
    let pair = Pair::start(Setup { producer_timing, consumer_timing, ..Setup::default() }).await;
    let prompt = pair.prompt(BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    let fetch = tokio::spawn(pair.fetch(&prompt));
    let opened = std::time::Instant::now();
    until("two leases have passed", || opened.elapsed() > SHORT * 10 || fetch.is_finished()).await;
    pair.compute_all(&export, &prompt);
    export.commit(commit());
    soon("the fetch", fetch).await.expect("no panic").expect("the lease holds");
    pair.assert_arrived(&prompt);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_is_kept_for_a_consumer_that_waits_for_room_of_its_own() {
    let producer_timing = Timing { lease: SHORT, sweep: SHORT / 10, ..Timing::default() };
    let consumer_timing = Timing { lease_renew: SHORT / 8, ..Timing::default() };
    let pair = Pair::start(Setup { producer_timing, consumer_timing, ..Setup::default() }).await;
    let prompt = pair.prompt(2 * BLOCK_TOKENS, 1);
    let export = pair.open(&prompt);
    pair.compute_all(&export, &prompt);
    export.commit(commit());
    let (room, no_room) = oneshot::channel();
    let destination = async move { no_room.await.expect("there is room in the end") };
    let fetch = tokio::spawn(pair.consumer.fetch(prompt.fetch_from(pair.address), destination));
    let opened = std::time::Instant::now();
    until("five leases have passed", || opened.elapsed() > SHORT * 5 || fetch.is_finished()).await;
    assert_eq!(pair.producer.stats().kv_bytes_sent, 0, "nothing leaves before there is room for it");
    room.send(prompt.destination().await).expect("it waits");
    soon("the fetch", fetch).await.expect("no panic").expect("the lease holds");
    pair.assert_arrived(&prompt);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_room_is_taken_for_a_prefill_that_has_not_begun() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(2 * BLOCK_TOKENS, 0);
    let asked = Arc::new(AtomicBool::new(false));
    let destination = {
        let (asked, destination) = (asked.clone(), prompt.destination());
        async move {
            asked.store(true, Ordering::Relaxed);
            destination.await
        }
    };
    let fetch = tokio::spawn(pair.consumer.fetch(prompt.fetch_from(pair.address), destination));
    until("it subscribes", || pair.producer.stats().now.subscriptions_parked == 1).await;
    let export = pair.open(&prompt);
    // Another transfer of the same session goes all the way meanwhile: messages are taken in order.
    let other = pair.prompt(BLOCK_TOKENS, 0);
    let other_export = pair.open(&other);
    pair.compute_all(&other_export, &other);
    other_export.commit(commit());
    soon("the other", pair.fetch(&other)).await.expect("nothing goes wrong");
    assert!(!asked.load(Ordering::Relaxed), "its prefill has not begun");
    pair.compute_all(&export, &prompt);
    export.commit(commit());
    soon("the fetch", fetch).await.expect("no panic").expect("nothing goes wrong");
    assert!(asked.load(Ordering::Relaxed));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renewals_cannot_hold_blocks_past_the_cap() {
    let producer_timing = Timing { lease_cap: SHORT, ..Timing::default() };
    let consumer_timing = Timing { lease_renew: SHORT / 20, ..Timing::default() };
    let pair = Pair::start(Setup { producer_timing, consumer_timing, ..Setup::default() }).await;
    let prompt = pair.prompt(2 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    let error = soon("the cap", pair.fetch(&prompt)).await.expect_err("nothing is computed");
    assert!(matches!(error, FetchError::Refused(ErrorCode::LeaseExpired)), "{error:?}");
    assert_eq!(soon("the outcome", export.finished()).await.reason, ExportReason::LeaseExpired);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_that_was_given_away_fails_the_transfer_instead_of_being_sent() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(3 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    pair.compute_all(&export, &prompt);
    export.commit(commit());
    pair.source.begin_generation(prompt.source_blocks[1].0);
    let error = soon("the failure", pair.fetch(&prompt)).await.expect_err("a stale block");
    assert!(matches!(error, FetchError::Refused(ErrorCode::StaleBlock)), "{error:?}");
    let outcome = soon("the outcome", export.finished()).await;
    assert_eq!((outcome.reason, outcome.kv_bytes), (ExportReason::StaleBlock, 0));
    assert!(pair.arrived(&prompt).iter().all(|&byte| byte == UNTOUCHED));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_block_that_was_given_away_is_not_written() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(2 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    pair.compute_all(&export, &prompt);
    export.commit(commit());
    let (block, _) = prompt.sink_blocks[0];
    let generation = pair.sink.begin_generation(block);
    let error = soon("the failure", pair.fetch(&prompt)).await.expect_err("not ours any more");
    assert!(matches!(error, FetchError::StaleDestination(_)), "{error:?}");
    let mut bytes = vec![0; pair.layout.block_bytes()];
    pair.sink.export(0, block, generation, &mut bytes).expect("its present generation");
    assert!(bytes.iter().all(|&byte| byte == UNTOUCHED));
    assert_eq!(soon("the outcome", export.finished()).await.reason, ExportReason::Cancelled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_that_is_dropped_fails_its_fetch() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(2 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    let fetch = tokio::spawn(pair.fetch(&prompt));
    export.progress(0, &prompt.source_blocks, prompt.tokens);
    until("a frame is here", || pair.consumer.stats().frames_received == 1).await;
    let finished = export.finished();
    drop(export);
    assert_eq!(soon("the outcome", finished).await.reason, ExportReason::PrefillFailed);
    let error = soon("the failure", fetch).await.expect("no panic").expect_err("prefill was aborted");
    assert!(matches!(error, FetchError::Refused(ErrorCode::PrefillFailed)), "{error:?}");
    assert_eq!(error.path_reason(), PathReason::PrefillFailed);
}
