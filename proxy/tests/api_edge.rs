//! The edge: limits, paths, status, models, metrics, and how it ends.

mod support;

use baton_proxy::app::Ended;
use baton_wire::names::{headers, paths};
use baton_wire::signing;
use baton_wire::status::{State, Status};
use baton_wire::{ErrorBody, Role};
use http::Request;
use http_body_util::Full;
use serde_json::json;
use std::sync::Arc;
use support::{CLIENT_EVENTS, Decode, Mock, Setup, WITHIN, completion, key, post_json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;

#[tokio::test]
async fn what_is_too_long_or_malformed_is_refused_before_any_worker_sees_it() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).limits(|limits| limits.body_bytes_max = 1000).start().await;
    let check = async |request: Request<Full<bytes::Bytes>>, status: u16, code: &str| {
        let reply = proxy.send(request).await;
        assert_eq!(reply.status, status);
        assert_eq!(reply.code().await, code);
    };
    check(completion(json!({"prompt": "x".repeat(1000)})), 413, "request_too_large").await;
    check(post_json(paths::CHAT_COMPLETIONS, "{\"messages\": [".into()), 400, "malformed_json").await;
    check(post_json(paths::CHAT_COMPLETIONS, "[]".into()), 400, "malformed_json").await;
    check(post_json("/v1/embeddings", "{}".into()), 404, "unknown_url").await;
    check(post_json("/v1/modelsx", "{}".into()), 404, "unknown_url").await;
    check(Request::get(paths::CHAT_COMPLETIONS).body(Full::default()).expect("a request"), 405, "method_not_supported")
        .await;
    check(post_json(paths::STATUS, "{}".into()), 405, "method_not_supported").await;

    let mut request = completion(json!({"prompt": "x"}));
    request.headers_mut().insert("x-long", "x".repeat(17 << 10).parse().expect("a header value"));
    assert_eq!(proxy.send(request).await.status, 431);

    let mut request = completion(json!({"prompt": "x"}));
    request.headers_mut().insert("content-type", "text/plain".parse().expect("a header value"));
    check(request, 415, "unsupported_media_type").await;
    assert_eq!(own.scenario.seen.borrow().calls.len(), 0);
}

#[tokio::test]
async fn a_client_that_sends_too_much_still_gets_its_answer() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).limits(|limits| limits.body_bytes_max = 1000).start().await;
    let exchange = async |head: &str, body: &[u8]| {
        let mut stream = tokio::net::TcpStream::connect(&proxy.address).await.expect("a listening proxy");
        let head = format!("POST {} HTTP/1.1\r\nhost: proxy\r\nconnection: close\r\n{head}\r\n", paths::COMPLETIONS);
        stream.write_all(head.as_bytes()).await.expect("written");
        stream.write_all(body).await.expect("all of the body is taken");
        let mut answer = String::new();
        let read = tokio::time::timeout(WITHIN, stream.read_to_string(&mut answer)).await.expect("an answer in time");
        read.expect("the connection is not reset");
        answer
    };
    let long = vec![b'a'; 8 << 20];
    let announced = exchange(&format!("content-length: {}\r\n", long.len()), &long).await;
    assert!(announced.starts_with("HTTP/1.1 413 ") && announced.contains("request_too_large"), "{announced}");
    let chunk = [format!("{:x}\r\n", long.len()).as_bytes(), &long, b"\r\n0\r\n\r\n"].concat();
    let unannounced = exchange("transfer-encoding: chunked\r\n", &chunk).await;
    assert!(unannounced.starts_with("HTTP/1.1 413 ") && unannounced.contains("request_too_large"), "{unannounced}");
    // One that asks before it sends is told not to.
    let asked = exchange("content-length: 1001\r\nexpect: 100-continue\r\n", b"").await;
    assert!(asked.starts_with("HTTP/1.1 413 "), "{asked}");
}

#[tokio::test]
async fn errors_have_the_shape_of_openais() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let text = proxy.get("/nothing").await.text().await;
    let body: ErrorBody = serde_json::from_str(&text).expect("an error body");
    assert_eq!(body.error.kind, "invalid_request_error");
    assert!(body.error.message.contains("/nothing"));
}

#[tokio::test]
async fn one_request_more_than_allowed_at_once_is_told_to_come_again() {
    let own = Mock::start(Role::Decode);
    own.decodes(Decode::FallsSilent);
    let proxy =
        Setup::new().own(&own).limits(|limits| (limits.in_flight_max, limits.queued_max) = (1, 0)).start().await;
    let first = proxy.complete(json!({"prompt": "hello", "stream": true})).await;
    let second = proxy.complete(json!({"prompt": "hello"})).await;
    let after: u32 = second.header("retry-after").parse().expect("seconds");
    assert_eq!((second.status, after > 0), (429, true));
    assert_eq!(second.code().await, "too_many_requests_in_flight");
    drop(first);
    own.sees("the first request's end", |seen| seen.decode_aborts == 1).await;
    let metrics = proxy.admin("/metrics").await.text().await;
    assert!(metrics.contains(r#"baton_proxy_refused_total{limit="in-flight"} 1"#), "{metrics}");
}

#[tokio::test]
async fn a_request_that_finds_no_room_waits_for_it() {
    let own = Mock::start(Role::Decode);
    own.decodes(Decode::FallsSilent);
    let proxy =
        Setup::new().own(&own).limits(|limits| (limits.in_flight_max, limits.queued_max) = (1, 1)).start().await;
    let first = proxy.complete(json!({"prompt": "hello", "stream": true})).await;
    let second = proxy.complete(json!({"prompt": "hello", "stream": true}));
    let leaves = async {
        // The third finds the queue full, so the second is in it.
        loop {
            let third = proxy.complete(json!({"prompt": "hello"})).await;
            if third.status == 429 {
                break drop(first);
            }
        }
    };
    let (second, ()) = tokio::join!(second, leaves);
    assert_eq!(second.status, 200);
}

#[tokio::test]
async fn the_status_is_the_engines_and_signed_over_the_askers_nonce() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let nonce = "0123456789abcdef0123456789abcdef";
    let request = Request::get(paths::STATUS).header(headers::STATUS_NONCE, nonce).body(Full::default());
    let reply = proxy.send(request.expect("a request")).await;
    let signature = reply.header(headers::STATUS_SIGNATURE).to_owned();
    let body = reply.text().await;
    signing::verify_status(&key().verifying_key(), nonce, body.as_bytes(), &signature).expect("our signature");
    assert_eq!(serde_json::from_str::<Status>(&body).expect("a status").epoch, own.epoch());

    assert_eq!(proxy.get(paths::STATUS).await.header(headers::STATUS_SIGNATURE), "");
    let request = Request::get(paths::STATUS).header(headers::STATUS_NONCE, "not hexadecimal").body(Full::default());
    assert_eq!(proxy.send(request.expect("a request")).await.status, 400);
}

#[tokio::test]
async fn models_are_those_that_workers_serve() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let models: serde_json::Value = serde_json::from_str(&proxy.get(paths::MODELS).await.text().await).expect("JSON");
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!("tiny"), &json!(2048)));
    assert_eq!(proxy.get("/v1/models/tiny").await.status, 200);
    let missing = proxy.get("/v1/models/other").await;
    assert_eq!(missing.status, 404);
    assert_eq!(missing.code().await, "model_not_found");
}

#[tokio::test]
async fn a_models_name_may_have_slashes_as_they_are_or_escaped() {
    let own = Mock::start(Role::Decode);
    own.status(|status| status.model = "org/tiny".into());
    let proxy = Setup::new().own(&own).start().await;
    for path in ["/v1/models/org/tiny", "/v1/models/org%2Ftiny"] {
        assert_eq!(proxy.get(path).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn metrics_are_the_proxys_followed_by_the_engines() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    prefill.status(|status| status.state = State::Loading);
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    let reply = proxy.complete(json!({"prompt": "hello", "stream": true})).await;
    assert_eq!(reply.text().await, CLIENT_EVENTS);
    let metrics = proxy.admin("/metrics").await.text().await;
    for line in [
        r#"baton_proxy_requests_total{class="2xx",endpoint="completions",path="local-prefill",reason="no-prefill-worker"} 1"#,
        r#"baton_proxy_workers{state="ready"} 1"#,
        r#"baton_proxy_workers{state="loading"} 1"#,
        r#"baton_proxy_ttft_seconds_count{path="local-prefill"} 1"#,
        "baton_proxy_generated_tokens_total 4",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    assert!(metrics.ends_with("baton_worker_up 1\n"), "{metrics}");
}

#[tokio::test]
async fn decisions_show_their_inputs_and_no_prompt() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    prefill.status(|status| status.load.queued_prompt_tokens = 77);
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    assert_eq!(proxy.complete(json!({"prompt": "a secret prompt"})).await.status, 200);
    let text = proxy.admin("/debug/decisions").await.text().await;
    let page: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let decision = &page["decisions"][0];
    assert_eq!(decision["planned"], json!({"path": "remote-prefill"}));
    assert_eq!(decision["prompt_tokens"], 15);
    assert_eq!(decision["prefill_worker"], json!(prefill.address));
    assert_eq!(decision["prefill_candidates"][0]["queued_prompt_tokens"], 77);
    assert!(!text.contains("secret"));
}

#[tokio::test]
async fn draining_refuses_the_new_finishes_the_old_and_ends() {
    let (own, go_on) = (Mock::start(Role::Decode), Arc::new(Notify::new()));
    own.decodes(Decode::Pauses(Arc::clone(&go_on)));
    let mut proxy = Setup::new().own(&own).start().await;
    assert_eq!(proxy.get(paths::READY).await.status, 200);
    let running = proxy.complete(json!({"prompt": "hello", "stream": true})).await;

    proxy.shutdown.drain.cancel();
    let drained = async {
        // The signal is taken by another task; the first answer that says so shows that it was.
        while proxy.get(paths::READY).await.status == 200 {}
    };
    tokio::time::timeout(WITHIN, drained).await.expect("draining begins");
    let refused = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((refused.status, refused.header("retry-after"), refused.header("connection")), (503, "2", "close"));
    assert_eq!(refused.code().await, "draining");
    let status: Status = serde_json::from_str(&proxy.get(paths::STATUS).await.text().await).expect("a status");
    assert_eq!(status.state, State::Draining);
    assert_eq!(proxy.get(paths::HEALTH).await.status, 200);

    go_on.notify_one();
    assert_eq!(running.text().await, CLIENT_EVENTS);
    let ended = tokio::time::timeout(WITHIN, &mut proxy.served).await.expect("it ends");
    assert_eq!(ended.expect("it does not panic"), Ended::Drained);
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let own = Mock::start(Role::Decode);
    own.decodes(Decode::FallsSilent);
    let mut proxy = Setup::new().own(&own).start().await;
    let _running = proxy.complete(json!({"prompt": "hello", "stream": true})).await;
    proxy.shutdown.drain.cancel();
    proxy.shutdown.stop.cancel();
    let ended = tokio::time::timeout(WITHIN, &mut proxy.served).await.expect("it ends");
    assert_eq!(ended.expect("it does not panic"), Ended::Cut);
}
