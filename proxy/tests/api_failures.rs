//! What happens to a request when something of it fails or leaves, at each point of its life.

mod support;

use baton_wire::names::{headers, paths};
use baton_wire::{Path, PathReason, Role};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use support::{CLIENT_EVENTS, Decode, FLOOD_EVENT_BYTES, Mock, Prefill, Setup, WITHIN, completion};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::Notify;

fn streamed() -> serde_json::Value {
    json!({"prompt": "hello", "stream": true})
}

#[tokio::test]
async fn tokens_flow_while_prefill_is_pending() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    prefill.prefills(Prefill::Pending);
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    let reply = proxy.complete(streamed()).await;
    assert_eq!(reply.header(headers::PATH), "remote-prefill");
    assert_eq!(reply.text().await, CLIENT_EVENTS);
}

#[tokio::test]
async fn late_prefill_failure_does_not_disturb_the_stream() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let (fail, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    prefill.prefills(Prefill::After(Arc::clone(&fail), 500));
    own.decodes(Decode::Pauses(Arc::clone(&go_on)));
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    let reply = proxy.complete(streamed()).await;
    assert_eq!(reply.header(headers::PATH), "remote-prefill");
    fail.notify_one();
    proxy
        .workers("the prefill leg to have ended", |workers| workers.iter().all(|w| w["reserved_prompt_tokens"] == 0))
        .await;
    go_on.notify_one();
    assert_eq!(reply.text().await, CLIENT_EVENTS);
    assert_eq!(own.count(paths::DECODE_LEG), 1);
}

#[tokio::test]
async fn a_refused_prefill_makes_the_decode_worker_compute_at_once() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let refuse = Arc::new(Notify::new());
    prefill.prefills(Prefill::After(Arc::clone(&refuse), 503));
    own.decodes(Decode::WaitsForKv);
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    let refusal = async {
        own.sees("its leg", |seen| seen.on(paths::DECODE_LEG).count() == 1).await;
        refuse.notify_one();
    };
    let (reply, ()) = tokio::join!(proxy.complete(streamed()), refusal);
    assert_eq!((reply.status, reply.header(headers::PATH)), (200, "fallback; reason=prefill-failed"));
    assert_eq!(reply.header(headers::PREFILL_WORKER), "");
    assert_eq!(reply.text().await, CLIENT_EVENTS);
    own.sees("its first leg given up", |seen| seen.decode_aborts == 1).await;
    let legs = own.legs(paths::DECODE_LEG);
    assert_eq!((legs[0].planned, legs[0].transfers.len()), (Path::RemotePrefill, 1));
    assert_eq!((legs[1].planned, legs[1].transfers.len()), (Path::Fallback(PathReason::PrefillFailed), 0));
    assert_eq!(legs[0].seed, legs[1].seed);
    assert_eq!(own.count(paths::RENDER), 1);
    let metrics = proxy.admin("/metrics").await.text().await;
    assert!(metrics.contains(r#"baton_proxy_fallbacks_total{reason="prefill-failed"} 1"#), "{metrics}");
}

#[tokio::test]
async fn a_prefill_worker_that_dies_under_its_leg_is_fallen_back_from() {
    let (own, mut prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    prefill.prefills(Prefill::Pending);
    own.decodes(Decode::WaitsForKv);
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    let answer = proxy.complete(streamed());
    let death = async {
        prefill.sees("its leg", |seen| seen.on(paths::PREFILL_LEG).count() == 1).await;
        own.sees("its leg", |seen| seen.on(paths::DECODE_LEG).count() == 1).await;
        prefill.kill();
    };
    let (reply, ()) = tokio::join!(answer, death);
    assert_eq!((reply.status, reply.header(headers::PATH)), (200, "fallback; reason=prefill-unreachable"));
    assert_eq!(reply.text().await, CLIENT_EVENTS);
}

#[tokio::test]
async fn a_decode_worker_that_fell_back_ends_the_prefill_leg() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    prefill.prefills(Prefill::Pending);
    let told = Arc::new(Notify::new());
    own.decodes(Decode::FellBack(Arc::clone(&told)));
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    let under_way = async {
        prefill.sees("its leg", |seen| seen.on(paths::PREFILL_LEG).count() == 1).await;
        told.notify_one();
    };
    let (reply, ()) = tokio::join!(proxy.complete(streamed()), under_way);
    assert_eq!(reply.header(headers::PATH), "fallback; reason=timeout");
    assert_eq!(reply.header(headers::PREFILL_WORKER), "");
    prefill.sees("its leg given up", |seen| seen.prefill_aborts == 1).await;
}

#[tokio::test]
async fn disconnected_client_aborts_both_legs() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    prefill.prefills(Prefill::Pending);
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    let returned = || {
        proxy.workers("all reservations to be returned", |workers| {
            workers.iter().all(|w| w["reserved_prompt_tokens"] == 0 && w["reserved_requests"] == 0)
        })
    };

    // Before the first token.
    own.decodes(Decode::Pending);
    {
        let mut waiting = std::pin::pin!(proxy.send(completion(streamed())));
        let both = async {
            own.sees("its leg", |seen| seen.on(paths::DECODE_LEG).count() == 1).await;
            prefill.sees("its leg", |seen| seen.on(paths::PREFILL_LEG).count() == 1).await;
        };
        tokio::select! {
            _ = &mut waiting => panic!("nothing was answered"),
            () = both => {}
        }
    }
    own.sees("its leg given up", |seen| seen.decode_aborts == 1).await;
    prefill.sees("its leg given up", |seen| seen.prefill_aborts == 1).await;
    returned().await;

    // In the midst of the stream.
    own.decodes(Decode::FallsSilent);
    let mut reply = proxy.complete(streamed()).await;
    assert!(reply.piece().await.is_some());
    // The decode leg may answer first, and a leg that has not arrived can't be seen to end.
    prefill.sees("its leg", |seen| seen.on(paths::PREFILL_LEG).count() == 2).await;
    drop(reply);
    own.sees("its leg given up", |seen| seen.decode_aborts == 2).await;
    prefill.sees("its leg given up", |seen| seen.prefill_aborts == 2).await;
    returned().await;
    let metrics = proxy.admin("/metrics").await.text().await;
    assert!(metrics.contains(r#"baton_proxy_cut_answers_total{cause="client-gone"} 2"#), "{metrics}");
    assert!(metrics.contains("baton_proxy_in_flight 0"), "{metrics}");
}

#[tokio::test]
async fn decode_refused_is_retried_on_another_worker_once() {
    let own = Mock::start(Role::Decode);
    let (other, third, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Decode), Mock::start(Role::Prefill));
    own.decodes(Decode::Refuses(503));
    // Only one of the two others can be the second attempt.
    third.status(|status| status.load.running = 9);
    let proxy = Setup::new().own(&own).peer(&other).peer(&third).peer(&prefill).start().await;

    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((reply.status, reply.header(headers::DECODE_WORKER)), (200, other.address.as_str()));
    assert_eq!((own.count(paths::RENDER), other.count(paths::RENDER)), (1, 0), "the prompt is rendered once");
    let (first, second) = (&own.legs(paths::DECODE_LEG)[0], &other.legs(paths::DECODE_LEG)[0]);
    assert_eq!((first.seed, &first.prompts), (second.seed, &second.prompts));
    assert_eq!((first.transfers[0].id, first.transfers[0].attempt), (second.transfers[0].id, 1));
    assert_eq!(second.transfers[0].attempt, 2, "a higher attempt cancels the lower ones at the prefill worker");
    assert_ne!(first.transfers[0].token, second.transfers[0].token);

    other.decodes(Decode::Refuses(500));
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((reply.status, reply.header("retry-after")), (502, "2"));
    assert_eq!(reply.code().await, "decode_failed");
    assert_eq!(third.count(paths::DECODE_LEG), 0);
}

#[tokio::test]
async fn a_dead_own_engine_is_replaced_by_another_decode_worker() {
    let (mut own, other) = (Mock::start(Role::Decode), Mock::start(Role::Decode));
    let proxy = Setup::new().own(&own).peer(&other).start().await;
    own.kill();
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((reply.status, reply.header(headers::DECODE_WORKER)), (200, other.address.as_str()));
}

#[tokio::test]
async fn all_decode_down_is_503_with_retry_after() {
    let (mut own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    assert_eq!(proxy.get(paths::READY).await.status, 200);
    own.kill();
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((reply.status, reply.header("retry-after")), (503, "2"));
    assert_eq!(reply.code().await, "render_unreachable");

    // The failed connection has taken the worker out of the table, before any poll did.
    assert_eq!(proxy.get(paths::READY).await.status, 503);
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((reply.status, reply.header("retry-after")), (503, "2"));
    assert_eq!(reply.code().await, "no_decode_worker");
    assert_eq!(prefill.count(paths::PREFILL_LEG), 0, "nothing is prefilled that nobody can decode");
}

#[tokio::test]
async fn a_decode_worker_lost_in_its_stream_with_nobody_to_go_on_is_an_error_event_without_done() {
    let own = Mock::start(Role::Decode);
    let told = Arc::new(Notify::new());
    own.decodes(Decode::Dies(Arc::clone(&told)));
    let proxy = Setup::new().own(&own).start().await;
    let mut reply = proxy.complete(streamed()).await;
    let first = reply.piece().await.expect("an event");
    told.notify_one();
    let text = first + &reply.text().await;
    let sent = "data: {\"text\":\"one\"}\n\ndata: {\"text\":\"two\"}\n\n";
    let error = text.strip_prefix(sent).unwrap_or_else(|| panic!("whole events first: {text:?}"));
    let error = error.strip_prefix("data: ").and_then(|e| e.strip_suffix("\n\n")).expect("one event");
    let error: serde_json::Value = serde_json::from_str(error).expect("JSON");
    assert_eq!(error["error"]["code"], "decode_worker_lost");
    proxy.metric(r#"baton_proxy_continuations_total{outcome="no-worker"} 1"#).await;
    proxy.metric(r#"baton_proxy_cut_answers_total{cause="decode-worker-lost"} 1"#).await;
}

#[tokio::test]
async fn a_decode_worker_lost_in_its_json_is_a_502() {
    let own = Mock::start(Role::Decode);
    let told = Arc::new(Notify::new());
    own.decodes(Decode::Dies(Arc::clone(&told)));
    let proxy = Setup::new().own(&own).start().await;
    let death = async {
        proxy.metric(r#"baton_proxy_ttft_seconds_count{path="local-prefill"} 1"#).await;
        told.notify_one();
    };
    let (reply, ()) = tokio::join!(proxy.complete(json!({"prompt": "hello"})), death);
    assert_eq!(reply.status, 502);
    assert_eq!(reply.code().await, "decode_worker_lost");
}

#[tokio::test]
async fn a_silent_decode_worker_is_cut_off() {
    let own = Mock::start(Role::Decode);
    own.decodes(Decode::FallsSilent);
    let proxy = Setup::new().own(&own).limits(|l| l.idle_timeout = Duration::from_millis(50)).start().await;
    let text = proxy.complete(streamed()).await.text().await;
    assert!(text.contains("\"code\":\"decode_worker_silent\""), "{text}");
    own.sees("its leg given up", |seen| seen.decode_aborts == 1).await;
}

#[tokio::test]
async fn a_first_token_that_does_not_come_is_a_504_and_ends_both_legs() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    own.decodes(Decode::Pending);
    prefill.prefills(Prefill::Pending);
    let setup = Setup::new().own(&own).peer(&prefill);
    let proxy = setup.limits(|limits| limits.first_token_timeout = Duration::from_millis(50)).start().await;
    let reply = proxy.complete(streamed()).await;
    assert_eq!(reply.status, 504);
    assert_eq!(reply.code().await, "first_token_timeout");
    own.sees("its leg given up", |seen| seen.decode_aborts == 1).await;
    prefill.sees("its leg given up", |seen| seen.prefill_aborts == 1).await;
}

#[tokio::test]
async fn a_request_past_its_deadline_is_ended_in_its_stream() {
    let own = Mock::start(Role::Decode);
    own.decodes(Decode::FallsSilent);
    let proxy = Setup::new().own(&own).limits(|l| l.request_timeout = Duration::from_millis(300)).start().await;
    let text = proxy.complete(streamed()).await.text().await;
    assert!(text.contains("\"code\":\"deadline_exceeded\""), "{text}");
}

#[tokio::test]
async fn a_client_error_of_the_worker_passes_as_it_is_before_any_leg() {
    let (own, other) = (Mock::start(Role::Decode), Mock::start(Role::Decode));
    let error = r#"{"error":{"message":"too long","type":"invalid_request_error","code":"context_length_exceeded"}}"#;
    own.renders(400, error);
    let proxy = Setup::new().own(&own).peer(&other).start().await;
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!(reply.status, 400);
    assert_eq!(reply.text().await, error);
    assert_eq!((own.count(paths::DECODE_LEG), other.scenario.seen.borrow().calls.len()), (0, 0));
}

#[tokio::test]
async fn events_reach_the_client_as_they_are_made() {
    let (own, go_on) = (Mock::start(Role::Decode), Arc::new(Notify::new()));
    own.decodes(Decode::Pauses(Arc::clone(&go_on)));
    let proxy = Setup::new().own(&own).start().await;
    let mut reply = proxy.complete(streamed()).await;
    let mut text = String::new();
    while text.len() < 2 * "data: {\"text\":\"one\"}\n\n".len() {
        text += &reply.piece().await.expect("the first two events");
    }
    assert!(CLIENT_EVENTS.starts_with(&text), "{text:?}");
    go_on.notify_one();
    text += &reply.text().await;
    assert_eq!(text, CLIENT_EVENTS);
}

#[tokio::test]
async fn a_client_that_leaves_before_any_leg_leaves_nothing_behind() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;

    // While its body is on the way.
    let mut stream = tokio::net::TcpStream::connect(&proxy.address).await.expect("a listening proxy");
    let half = format!("POST {} HTTP/1.1\r\nhost: proxy\r\ncontent-length: 100\r\n\r\n{{", paths::COMPLETIONS);
    stream.write_all(half.as_bytes()).await.expect("written");
    proxy.metric("baton_proxy_in_flight 1").await;
    drop(stream);
    proxy.metric("baton_proxy_in_flight 0").await;

    // While its prompt is rendered.
    own.renders(0, "");
    {
        let mut waiting = std::pin::pin!(proxy.send(completion(streamed())));
        tokio::select! {
            _ = &mut waiting => panic!("nothing was answered"),
            () = own.sees("the call", |seen| seen.on(paths::RENDER).count() == 1) => {}
        }
    }
    proxy.metric("baton_proxy_in_flight 0").await;
    proxy.workers("the reservation to be returned", |workers| workers[0]["reserved_requests"] == 0).await;
    assert_eq!(own.count(paths::DECODE_LEG), 0);
}

#[tokio::test]
async fn a_peer_whose_engine_is_late_now_and_then_stays_in_the_choice() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    prefill.scenario.late.send_replace(2);
    let mut late = prefill.scenario.late.subscribe();
    tokio::time::timeout(WITHIN, late.wait_for(|late| *late == 0)).await.expect("it is asked").expect("the mock lives");
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!(reply.header(headers::PATH), "remote-prefill");

    prefill.scenario.late.send_replace(u32::MAX);
    let unreachable = |worker: &serde_json::Value| worker["not_for_prefill"] == "unreachable";
    proxy.workers("it to count as unreachable", |workers| workers.iter().any(unreachable)).await;
}

/// Bytes that the sockets between worker, proxy and client may hold: Linux lets each side of a connection grow to 6 MiB.
const SOCKET_BYTES_MAX: u64 = 32 << 20;

#[tokio::test]
async fn a_reader_that_does_not_read_stops_the_worker_and_nothing_piles_up() {
    let (own, taken) = (Mock::start(Role::Decode), Arc::new(AtomicU64::new(0)));
    let events = 8 * SOCKET_BYTES_MAX / FLOOD_EVENT_BYTES;
    own.decodes(Decode::Floods(events, Arc::clone(&taken)));
    let proxy = Setup::new().own(&own).start().await;
    let mut reply = proxy.complete(streamed()).await;
    // Until nothing more is taken from the worker: so much is under way between it and a client that does not read.
    let mut before = 0;
    let mut look = tokio::time::interval(Duration::from_millis(200));
    let stopped = async {
        loop {
            look.tick().await;
            let now = taken.load(Ordering::Relaxed);
            if now == before && now > 0 {
                return now;
            }
            before = now;
        }
    };
    let held = tokio::time::timeout(WITHIN, stopped).await.expect("it stops") * FLOOD_EVENT_BYTES;
    assert!(held < SOCKET_BYTES_MAX, "{held} bytes are held for a client that does not read");
    assert!(reply.piece().await.is_some(), "it reads again and is served");
    drop(reply);
    own.sees("its leg given up", |seen| seen.decode_aborts == 1).await;
    proxy.metric("baton_proxy_in_flight 0").await;
}
