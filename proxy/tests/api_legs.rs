//! Legs between pods: served by the local engine when rightly signed, refused otherwise, never forwarded again.

mod support;

use baton_wire::leg::LegRequest;
use baton_wire::names::{headers, paths};
use baton_wire::render::Endpoint;
use baton_wire::signing::{self, LegClaims};
use baton_wire::{Path, PathReason, Role};
use ed25519_dalek::SigningKey;
use http::Request;
use http_body_util::Full;
use serde_json::value::RawValue;
use std::time::{SystemTime, UNIX_EPOCH};
use support::{Decode, EVENTS, JSON_ANSWER, Mock, Setup, exchange, key, post_json};

fn body(stream: bool) -> String {
    let leg = LegRequest {
        request_id: "r".into(),
        endpoint: Endpoint::Completions,
        body: RawValue::from_string(format!("{{\"stream\":{stream}}}")).expect("JSON"),
        prompts: vec![vec![1]],
        seed: 1,
        transfers: Vec::new(),
        planned: Path::LocalPrefill(PathReason::PolicyNever),
        created: None,
        tenant_salt: None,
        resume: None,
    };
    serde_json::to_string(&leg).expect("JSON")
}

/// A leg whose header was signed for a path and a body that may be others than its own.
fn leg(
    path: &str,
    body: &str,
    key: &SigningKey,
    signed_path: &str,
    signed_body: &str,
    ttl_ms: i64,
) -> Request<Full<bytes::Bytes>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as i64;
    let claims = LegClaims {
        path: signed_path.into(),
        body_blake3: signing::body_blake3(signed_body.as_bytes()),
        expires_unix_ms: (now + ttl_ms) as u64,
    };
    let mut request = post_json(path, body.to_owned());
    let token = signing::sign(key, &claims).parse().expect("a header value");
    request.headers_mut().insert(headers::LEG, token);
    request.headers_mut().insert(headers::TOKEN_IDS, "1".parse().expect("a header value"));
    request
}

fn right_leg(path: &str, body: &str) -> Request<Full<bytes::Bytes>> {
    leg(path, body, &key(), path, body, 30_000)
}

#[tokio::test]
async fn a_signed_leg_is_served_by_the_engine_and_relayed_as_it_is() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let reply = proxy.send(right_leg(paths::DECODE_LEG, &body(false))).await;
    assert_eq!((reply.status, reply.header(headers::PATH)), (200, "local-prefill; reason=policy-never"));
    assert_eq!(reply.text().await, JSON_ANSWER);
    let reply = proxy.send(right_leg(paths::DECODE_LEG, &body(true))).await;
    assert_eq!(reply.text().await, EVENTS.concat(), "token ids are for the proxy that asked");
    let seen = own.scenario.seen.borrow();
    assert!(seen.calls.iter().all(|call| call.headers[headers::TOKEN_IDS] == "1"));
    assert_eq!(seen.calls.len(), 2);
}

#[tokio::test]
async fn leg_requests_without_signature_are_refused() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    for path in [paths::RENDER, paths::PREFILL_LEG, paths::DECODE_LEG] {
        let reply = proxy.send(post_json(path, body(false))).await;
        assert_eq!(reply.status, 401, "{path}");
        assert_eq!(reply.code().await, "leg_unauthorized");
    }
    let foreign = SigningKey::from_bytes(&[6; 32]);
    let body = body(false);
    let forged = leg(paths::DECODE_LEG, &body, &foreign, paths::DECODE_LEG, &body, 30_000);
    assert_eq!(proxy.send(forged).await.status, 401);
    assert_eq!(own.scenario.seen.borrow().calls.len(), 0);
}

#[tokio::test]
async fn replayed_leg_with_another_body_is_refused() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let replayed = leg(paths::DECODE_LEG, &body(true), &key(), paths::DECODE_LEG, &body(false), 30_000);
    let reply = proxy.send(replayed).await;
    assert_eq!((reply.status, own.scenario.seen.borrow().calls.len()), (401, 0));
    assert_eq!(reply.code().await, "leg_unauthorized");
}

#[tokio::test]
async fn a_leg_for_another_path_or_past_its_time_is_refused() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let body = body(false);
    let elsewhere = leg(paths::DECODE_LEG, &body, &key(), paths::PREFILL_LEG, &body, 30_000);
    assert_eq!(proxy.send(elsewhere).await.status, 401);
    let late = leg(paths::DECODE_LEG, &body, &key(), paths::DECODE_LEG, &body, -1000);
    assert_eq!(proxy.send(late).await.status, 401);
    assert_eq!(own.scenario.seen.borrow().calls.len(), 0);
}

#[tokio::test]
async fn a_leg_is_never_forwarded_to_another_pod() {
    let (mut own, other) = (Mock::start(Role::Decode), Mock::start(Role::Decode));
    let proxy = Setup::new().own(&own).peer(&other).start().await;
    own.kill();
    let reply = proxy.send(right_leg(paths::DECODE_LEG, &body(false))).await;
    assert_eq!(reply.status, 502);
    assert_eq!(reply.code().await, "engine_unreachable");
    assert_eq!(other.scenario.seen.borrow().calls.len(), 0);

    let front_door = Setup::new().peer(&other).start().await;
    let reply = front_door.send(right_leg(paths::DECODE_LEG, &body(false))).await;
    assert_eq!(reply.code().await, "no_engine");
    assert_eq!(other.scenario.seen.borrow().calls.len(), 0);
}

#[tokio::test]
async fn a_leg_that_is_given_up_is_given_up_at_the_engine() {
    let own = Mock::start(Role::Decode);
    own.decodes(Decode::Pending);
    let proxy = Setup::new().own(&own).start().await;
    {
        let mut waiting = std::pin::pin!(exchange(&proxy.address, right_leg(paths::DECODE_LEG, &body(true))));
        tokio::select! {
            _ = &mut waiting => panic!("nothing was answered"),
            () = own.sees("its leg", |seen| seen.on(paths::DECODE_LEG).count() == 1) => {}
        }
    }
    own.sees("its leg given up", |seen| seen.decode_aborts == 1).await;
}
