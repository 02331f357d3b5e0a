//! A pod that is told to stop: its engine first, its proxy last. What the proxy does with requests that still come in between.

mod support;

use baton_proxy::app::Ended;
use baton_wire::Role;
use baton_wire::names::{headers, paths};
use baton_wire::status::State;
use serde_json::json;
use std::sync::Arc;
use support::{CLIENT_EVENTS, Decode, Mock, Setup, WITHIN};
use tokio::sync::Notify;

/// What a worker answers that takes nothing new.
const DRAINING: &str = r#"{"error":{"message":"this worker is draining","code":"draining"}}"#;

#[tokio::test]
async fn while_its_engine_drains_a_proxy_passes_new_requests_on_and_lets_streams_end() {
    let (own, other, go_on) = (Mock::start(Role::Decode), Mock::start(Role::Decode), Arc::new(Notify::new()));
    own.decodes(Decode::Pauses(Arc::clone(&go_on)));
    let mut proxy = Setup::new().own(&own).peer(&other).start().await;
    assert_eq!(proxy.admin(paths::READY).await.status, 200);
    let running = proxy.complete(json!({"prompt": "hello", "stream": true})).await;
    assert_eq!(running.header(headers::DECODE_WORKER), own.address);

    // The engine has been told, and the proxy has not heard of it yet: it hears it from the refusal.
    own.renders(503, DRAINING);
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((reply.status, reply.header(headers::DECODE_WORKER)), (200, other.address.as_str()));

    // Now it has.
    own.status(|status| status.state = State::Draining);
    proxy.workers("the engine to drain", |workers| workers[0]["not_for_decode"] == "draining").await;
    let asked = own.count(paths::RENDER);
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((reply.status, reply.header(headers::DECODE_WORKER)), (200, other.address.as_str()));
    assert_eq!(own.count(paths::RENDER), asked, "it is not bothered");
    for (what, reply) in [("admin", proxy.admin(paths::READY).await), ("clients", proxy.get(paths::READY).await)] {
        assert_eq!(reply.status, 503, "{what}: no new client is sent here");
    }
    assert_eq!(proxy.admin(paths::HEALTH).await.status, 200, "it lives");

    go_on.notify_one();
    assert_eq!(running.text().await, CLIENT_EVENTS);

    // The engine has ended; now the proxy is told.
    proxy.shutdown.drain.cancel();
    let ended = tokio::time::timeout(WITHIN, &mut proxy.served).await.expect("it ends");
    assert_eq!(ended.expect("it does not panic"), Ended::Drained);
}

#[tokio::test]
async fn with_nobody_to_pass_them_on_to_new_requests_are_told_to_come_again() {
    let mut own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    own.renders(503, DRAINING);
    let check = async |what: &str| {
        let reply = proxy.complete(json!({"prompt": "hello"})).await;
        assert_eq!((reply.status, reply.header("retry-after")), (503, "2"), "{what}");
    };
    check("told, and not known").await;
    own.status(|status| status.state = State::Draining);
    proxy.workers("the engine to drain", |workers| workers[0]["not_for_decode"] == "draining").await;
    check("known").await;
    own.kill();
    check("gone").await;
    proxy.workers("the engine to be gone", |workers| workers[0]["not_for_decode"] == "unreachable").await;
    check("known to be gone").await;
}

#[tokio::test]
async fn a_peer_that_is_not_ready_is_asked_until_it_is() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    prefill.status(|status| status.state = State::Loading);
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    let path = async || proxy.complete(json!({"prompt": "hello"})).await.header(headers::PATH).to_owned();
    assert_eq!(path().await, "local-prefill; reason=no-prefill-worker");
    prefill.status(|status| status.state = State::Ready);
    proxy.workers("the peer to be ready", |workers| workers[1]["not_for_prefill"].is_null()).await;
    assert_eq!(path().await, "remote-prefill");
}

#[tokio::test]
async fn a_front_door_is_ready_while_somebody_decodes() {
    let mut decode = Mock::start(Role::Decode);
    let proxy = Setup::new().peer(&decode).start().await;
    assert_eq!(proxy.admin(paths::READY).await.status, 200);
    decode.kill();
    proxy.workers("the worker to be gone", |workers| workers[0]["not_for_decode"] == "unreachable").await;
    let reply = proxy.admin(paths::READY).await;
    assert_eq!((reply.status, reply.text().await.as_str()), (503, "no decode worker is ready\n"));
}
