//! A stream whose decode worker is lost: it goes on at another one as if nothing had happened, or ends with an error that says so.

mod support;

use baton_wire::leg::{Resume, ResumedChoice};
use baton_wire::names::{headers, paths};
use baton_wire::{Fingerprint, Path, PathReason, Role};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use support::{CLIENT_EVENTS, Decode, Mock, Prefill, Proxy, Reply, Setup, completion};
use tokio::sync::Notify;

/// Workers that one stream is given after the first.
const CONTINUATIONS_MAX: usize = 3;

fn streamed() -> serde_json::Value {
    json!({"prompt": "hello", "stream": true})
}

/// A decode worker that dies in the midst of its answer, once it is told to.
fn dying() -> (Mock, Arc<Notify>) {
    let (mock, told) = (Mock::start(Role::Decode), Arc::new(Notify::new()));
    mock.decodes(Decode::Dies(Arc::clone(&told)));
    (mock, told)
}

/// The answer's text, with `then` after its first piece.
async fn text_with(mut reply: Reply, then: impl FnOnce()) -> String {
    let first = reply.piece().await.expect("an event");
    then();
    first + &reply.text().await
}

async fn nothing_is_held(proxy: &Proxy) {
    proxy.metric("baton_proxy_in_flight 0").await;
    proxy
        .workers("all reservations to be returned", |workers| {
            workers.iter().all(|w| w["reserved_prompt_tokens"] == 0 && w["reserved_requests"] == 0)
        })
        .await;
}

/// Waits until so many decode workers have gone on with streams. One that dies before its headers are out would be asked once more, on
/// a new connection, as any server is that closes an idle one.
async fn continued(proxy: &Proxy, count: usize) {
    if count > 0 {
        proxy.metric(&format!("baton_proxy_continuations_total{{outcome=\"continued\"}} {count}")).await;
    }
}

/// The code of the error that ends a stream behind what was sent of [`CLIENT_EVENTS`].
fn code_behind(sent: &str, text: &str) -> String {
    let error = text.strip_prefix(sent).unwrap_or_else(|| panic!("whole events first: {text:?}"));
    let error = error.strip_prefix("data: ").and_then(|e| e.strip_suffix("\n\n")).expect("one event");
    let error: serde_json::Value = serde_json::from_str(error).expect("JSON");
    error["error"]["code"].as_str().expect("a code").to_owned()
}

const TWO_EVENTS: &str = "data: {\"text\":\"one\"}\n\ndata: {\"text\":\"two\"}\n\n";

#[tokio::test]
async fn a_stream_goes_on_at_another_decode_worker() {
    let ((own, told), other) = (dying(), Mock::start(Role::Decode));
    let prefill = Mock::start(Role::Prefill);
    let proxy = Setup::new().own(&own).peer(&other).peer(&prefill).start().await;
    let reply = proxy.complete(json!({"prompt": "hello", "stream": true, "seed": 9})).await;
    assert_eq!(reply.header(headers::PATH), "remote-prefill");
    assert_eq!(text_with(reply, || told.notify_one()).await, CLIENT_EVENTS);

    let (first, second) = (&own.legs(paths::DECODE_LEG)[0], &other.legs(paths::DECODE_LEG)[0]);
    let choice = ResumedChoice { events: 2, token_ids: vec![5, 6, 7], cached_tokens: None };
    assert_eq!(second.resume, Some(Resume { choices: vec![choice], usage_sent: false }));
    assert_eq!((second.planned, second.transfers.len()), (Path::Fallback(PathReason::DecodeWorkerLost), 0));
    assert_eq!((&first.request_id, first.seed, &first.prompts), (&second.request_id, second.seed, &second.prompts));
    assert_eq!((first.seed, first.body.get()), (9, second.body.get()));
    assert!(first.created.is_some_and(|created| created > 1_700_000_000) && first.created == second.created);
    assert_eq!(first.resume, None);
    assert_eq!((own.count(paths::RENDER), other.count(paths::RENDER)), (1, 0), "the prompt is rendered once");

    nothing_is_held(&proxy).await;
    let metrics = proxy.admin(paths::METRICS).await.text().await;
    assert!(metrics.contains("baton_proxy_continuations_total{outcome=\"continued\"} 1"), "{metrics}");
    assert!(metrics.contains("baton_proxy_generated_tokens_total 4"), "{metrics}");
    assert!(!metrics.contains("baton_proxy_cut_answers_total"), "{metrics}");
}

#[tokio::test]
async fn a_silent_worker_is_left_for_another() {
    let (own, other) = (Mock::start(Role::Decode), Mock::start(Role::Decode));
    own.decodes(Decode::FallsSilent);
    let proxy =
        Setup::new().own(&own).peer(&other).limits(|l| l.idle_timeout = Duration::from_millis(50)).start().await;
    assert_eq!(proxy.complete(streamed()).await.text().await, CLIENT_EVENTS);
    own.sees("its leg given up", |seen| seen.decode_aborts == 1).await;
    assert_eq!(other.legs(paths::DECODE_LEG)[0].resume.as_ref().expect("resumed").choices[0].events, 2);
    nothing_is_held(&proxy).await;
}

#[tokio::test]
async fn whoever_refuses_is_passed_over_and_the_next_one_goes_on() {
    let ((own, told), refusing, third) = (dying(), Mock::start(Role::Decode), Mock::start(Role::Decode));
    refusing.decodes(Decode::Refuses(503));
    third.status(|status| status.load.running = 9);
    let proxy = Setup::new().own(&own).peer(&refusing).peer(&third).start().await;
    let text = text_with(proxy.complete(streamed()).await, || told.notify_one()).await;
    assert_eq!(text, CLIENT_EVENTS);
    assert_eq!((refusing.count(paths::DECODE_LEG), third.count(paths::DECODE_LEG)), (1, 1));
    nothing_is_held(&proxy).await;
}

#[tokio::test]
async fn a_stream_survives_several_losses_and_takes_no_more_workers_along_than_it_may() {
    let workers: Vec<(Mock, Arc<Notify>)> = (0..CONTINUATIONS_MAX + 3).map(|_| dying()).collect();
    let mut setup = Setup::new().own(&workers[0].0);
    for (peer, _) in &workers[1..] {
        setup = setup.peer(peer);
    }
    let proxy = setup.start().await;
    let mut reply = proxy.complete(streamed()).await;
    let first = reply.piece().await.expect("an event");
    for losses in 0..=CONTINUATIONS_MAX {
        continued(&proxy, losses).await;
        let asked = workers.iter().filter(|(worker, _)| worker.count(paths::DECODE_LEG) > 0);
        asked.for_each(|(_, told)| told.notify_one());
    }
    let text = first + &reply.text().await;
    assert_eq!(code_behind(TWO_EVENTS, &text), "decode_worker_lost");
    let asked: usize = workers.iter().map(|(worker, _)| worker.count(paths::DECODE_LEG)).sum();
    assert_eq!(asked, 1 + CONTINUATIONS_MAX);
    proxy.metric("baton_proxy_continuations_total{outcome=\"failed\"} 1").await;
    nothing_is_held(&proxy).await;
}

#[tokio::test]
async fn two_losses_in_a_row_are_one_stream() {
    let ((own, told), (second, second_told), third) = (dying(), dying(), Mock::start(Role::Decode));
    third.status(|status| status.load.running = 9);
    let proxy = Setup::new().own(&own).peer(&second).peer(&third).start().await;
    let mut reply = proxy.complete(streamed()).await;
    let first = reply.piece().await.expect("an event");
    told.notify_one();
    continued(&proxy, 1).await;
    second_told.notify_one();
    assert_eq!(first + &reply.text().await, CLIENT_EVENTS);
    assert_eq!((second.count(paths::DECODE_LEG), third.count(paths::DECODE_LEG)), (1, 1));
    let resumed = third.legs(paths::DECODE_LEG).remove(0).resume.expect("resumed");
    assert_eq!(resumed.choices[0].token_ids, [5, 6, 7]);
    nothing_is_held(&proxy).await;
}

#[tokio::test]
async fn a_worker_of_another_model_never_goes_on() {
    let ((own, told), other) = (dying(), Mock::start(Role::Decode));
    other.status(|status| status.fingerprint = Some(Fingerprint([8; 32])));
    let proxy = Setup::new().own(&own).peer(&other).start().await;
    let text = text_with(proxy.complete(streamed()).await, || told.notify_one()).await;
    assert_eq!(code_behind(TWO_EVENTS, &text), "decode_worker_lost");
    assert_eq!(other.count(paths::DECODE_LEG), 0);
    proxy.metric("baton_proxy_continuations_total{outcome=\"no-worker\"} 1").await;
    nothing_is_held(&proxy).await;
}

#[tokio::test]
async fn a_worker_lost_behind_done_is_no_loss() {
    let (own, other, told) = (Mock::start(Role::Decode), Mock::start(Role::Decode), Arc::new(Notify::new()));
    own.decodes(Decode::DiesDone(Arc::clone(&told)));
    let proxy = Setup::new().own(&own).peer(&other).start().await;
    let text = text_with(proxy.complete(streamed()).await, || told.notify_one()).await;
    assert_eq!(text, CLIENT_EVENTS);
    assert_eq!(other.count(paths::DECODE_LEG), 0);
    nothing_is_held(&proxy).await;
    let metrics = proxy.admin(paths::METRICS).await.text().await;
    assert!(!metrics.contains("baton_proxy_cut_answers_total"), "{metrics}");
}

#[tokio::test]
async fn a_client_that_leaves_during_the_switch_drops_all_of_it() {
    let ((own, told), other) = (dying(), Mock::start(Role::Decode));
    let prefill = Mock::start(Role::Prefill);
    prefill.prefills(Prefill::Pending);
    other.decodes(Decode::Pending);
    let proxy = Setup::new().own(&own).peer(&other).peer(&prefill).start().await;
    let mut reply = proxy.complete(streamed()).await;
    assert!(reply.piece().await.is_some());
    prefill.sees("its leg", |seen| seen.on(paths::PREFILL_LEG).count() == 1).await;
    told.notify_one();
    other.sees("its leg", |seen| seen.on(paths::DECODE_LEG).count() == 1).await;
    prefill.sees("its leg given up with the lost worker's", |seen| seen.prefill_aborts == 1).await;
    drop(reply);
    other.sees("its leg given up", |seen| seen.decode_aborts == 1).await;
    nothing_is_held(&proxy).await;
    proxy.metric(r#"baton_proxy_cut_answers_total{cause="client-gone"} 1"#).await;
}

#[tokio::test]
async fn the_requests_deadline_holds_during_the_switch() {
    let ((own, told), other) = (dying(), Mock::start(Role::Decode));
    other.decodes(Decode::Pending);
    let setup = Setup::new().own(&own).peer(&other).limits(|l| l.request_timeout = Duration::from_secs(1));
    let proxy = setup.start().await;
    let text = text_with(proxy.complete(streamed()).await, || told.notify_one()).await;
    assert_eq!(code_behind(TWO_EVENTS, &text), "deadline_exceeded");
    other.sees("its leg given up", |seen| seen.decode_aborts == 1).await;
    nothing_is_held(&proxy).await;
}

#[tokio::test]
async fn a_proxy_that_drains_goes_on_with_its_streams() {
    let ((own, told), other) = (dying(), Mock::start(Role::Decode));
    let mut proxy = Setup::new().own(&own).peer(&other).start().await;
    let reply = proxy.send(completion(streamed())).await;
    let drain = proxy.shutdown.drain.clone();
    let text = text_with(reply, || {
        drain.cancel();
        told.notify_one();
    });
    assert_eq!(text.await, CLIENT_EVENTS);
    tokio::time::timeout(support::WITHIN, &mut proxy.served).await.expect("it ends").expect("it does not panic");
}
