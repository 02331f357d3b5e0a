//! Which worker gets which leg, what the legs carry, and what the client sees of it.

mod support;

use baton_proxy::estimate::Policy;
use baton_wire::names::{headers, paths};
use baton_wire::signing::{self, LegClaims, TransferClaims};
use baton_wire::{Fingerprint, Role};
use ed25519_dalek::SigningKey;
use http::HeaderValue;
use serde_json::json;
use std::sync::Arc;
use support::{CLIENT_EVENTS, Decode, JSON_ANSWER, MODEL, Mock, Prefill, Setup, completion, key};
use tokio::sync::Notify;

#[tokio::test]
async fn a_prompt_is_prefilled_by_one_worker_and_generated_by_another() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;

    let reply = proxy.complete(json!({"prompt": "hello", "model": "tiny"})).await;

    assert_eq!(reply.status, 200);
    assert_eq!(reply.header(headers::PATH), "remote-prefill");
    assert_eq!(reply.header(headers::PREFILL_WORKER), prefill.address);
    assert_eq!(reply.header(headers::DECODE_WORKER), own.address);
    assert_eq!(reply.header("x-engine"), "mock");
    assert!(!reply.header(headers::REQUEST_ID).is_empty());
    assert_eq!(reply.text().await, JSON_ANSWER);

    prefill.sees("its leg", |seen| seen.on(paths::PREFILL_LEG).count() == 1).await;
    let (prefill_leg, decode_leg) = (&prefill.legs(paths::PREFILL_LEG)[0], &own.legs(paths::DECODE_LEG)[0]);
    assert_eq!(decode_leg.prompts, [b"hello".map(u32::from)]);
    assert_eq!(prefill_leg.prompts, decode_leg.prompts);
    assert_eq!(prefill_leg.seed, decode_leg.seed);
    assert_eq!(prefill_leg.transfers, decode_leg.transfers);
    assert_eq!(decode_leg.body.get(), r#"{"prompt":"hello","model":"tiny"}"#);
    assert_eq!((own.count(paths::RENDER), own.count(paths::PREFILL_LEG), prefill.count(paths::DECODE_LEG)), (1, 0, 0));
}

#[tokio::test]
async fn a_transfer_may_be_fetched_by_the_chosen_decode_worker_alone() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    for _ in 0..2 {
        assert_eq!(proxy.complete(json!({"prompt": "hello"})).await.status, 200);
    }
    let legs = own.legs(paths::DECODE_LEG);
    assert_ne!(legs[0].transfers[0].id, legs[1].transfers[0].id);
    assert_ne!(legs[0].seed, legs[1].seed, "a seed is minted for each request that has none");
    let transfer = &legs[0].transfers[0];
    assert_eq!(transfer.source, "127.0.0.1:5600");
    let claims: TransferClaims = signing::verify(&key().verifying_key(), &transfer.token, 0).expect("signed by us");
    assert_eq!((claims.transfer, claims.attempt), (transfer.id, transfer.attempt));
    assert_eq!((claims.consumer, claims.fingerprint), (own.epoch(), MODEL));
}

#[tokio::test]
async fn a_leg_to_another_pod_is_signed_for_its_path_and_body() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    assert_eq!(proxy.complete(json!({"prompt": "hello"})).await.status, 200);
    prefill.sees("its leg", |seen| seen.on(paths::PREFILL_LEG).count() == 1).await;
    let seen = prefill.scenario.seen.borrow();
    let call = seen.on(paths::PREFILL_LEG).next().expect("one leg");
    let token = call.headers[headers::LEG].to_str().expect("text");
    let claims: LegClaims = signing::verify(&key().verifying_key(), token, 0).expect("signed by us");
    assert_eq!((claims.path.as_str(), claims.body_blake3), (paths::PREFILL_LEG, signing::body_blake3(&call.body)));
    let seen = own.scenario.seen.borrow();
    assert!(seen.calls.iter().all(|call| !call.headers.contains_key(headers::LEG)), "inside the pod nothing is signed");
}

#[tokio::test]
async fn a_clients_seed_is_kept() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    assert_eq!(proxy.complete(json!({"prompt": "hello", "seed": 42})).await.status, 200);
    assert_eq!(own.legs(paths::DECODE_LEG)[0].seed, 42);
}

#[tokio::test]
async fn events_reach_the_client_without_our_lines() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    let reply = proxy.complete(json!({"prompt": "hello", "stream": true})).await;
    assert_eq!(reply.header("content-type"), "text/event-stream");
    assert_eq!(reply.header(headers::PATH), "remote-prefill");
    assert_eq!(reply.text().await, CLIENT_EVENTS);
}

#[tokio::test]
async fn what_stays_local_says_why() {
    let conditional = Policy::Conditional { min_uncached_prompt_tokens: Some(6) };
    let check = async |policy, prompt: &str, with_prefill: bool, fingerprint, role, expect: &str| {
        let (own, prefill) = (Mock::start(role), Mock::start(Role::Prefill));
        prefill.status(|status| status.fingerprint = Some(fingerprint));
        let setup = Setup::new().own(&own).policy(policy);
        let proxy = if with_prefill { setup.peer(&prefill) } else { setup }.start().await;
        let reply = proxy.complete(json!({"prompt": prompt})).await;
        assert_eq!((reply.status, reply.header(headers::PATH)), (200, expect));
        assert_eq!(reply.header(headers::PREFILL_WORKER).is_empty(), expect != "remote-prefill");
        assert_eq!(prefill.count(paths::PREFILL_LEG), 0, "{expect}");
        assert!(own.legs(paths::DECODE_LEG)[0].transfers.is_empty());
    };
    let other = Fingerprint([8; 32]);
    check(Policy::Never, "hello", true, MODEL, Role::Decode, "local-prefill; reason=policy-never").await;
    check(conditional, "hello", true, MODEL, Role::Decode, "local-prefill; reason=short-prompt").await;
    check(Policy::Always, "hello", false, MODEL, Role::Decode, "local-prefill; reason=no-prefill-worker").await;
    check(Policy::Always, "hello", true, other, Role::Decode, "local-prefill; reason=fingerprint-mismatch").await;
    check(Policy::Always, "hello", true, MODEL, Role::PrefillDecode, "local-prefill; reason=aggregated").await;
}

#[tokio::test]
async fn tokens_in_the_decode_workers_cache_do_not_count_as_a_long_prompt() {
    let conditional = Policy::Conditional { min_uncached_prompt_tokens: Some(6) };
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let proxy = Setup::new().own(&own).peer(&prefill).policy(conditional).start().await;
    // Far from the threshold on either side: near it, a few requests go the other way to be measured.
    for (cached, expect) in [
        (0, "remote-prefill"),
        (10, "remote-prefill"),
        (35, "local-prefill; reason=short-prompt"),
        // More than there is: a worker that is wrong costs no more than a choice.
        (1000, "local-prefill; reason=short-prompt"),
    ] {
        let reply = proxy.complete(json!({"prompt": "x".repeat(40), "cached": cached})).await;
        assert_eq!((reply.status, reply.header(headers::PATH)), (200, expect), "{cached} cached");
    }
}

#[tokio::test]
async fn what_one_decode_worker_has_cached_says_nothing_of_another() {
    let conditional = Policy::Conditional { min_uncached_prompt_tokens: Some(6) };
    let (own, other, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Decode), Mock::start(Role::Prefill));
    own.decodes(Decode::Refuses(503));
    let proxy = Setup::new().own(&own).peer(&other).peer(&prefill).policy(conditional).start().await;
    let reply = proxy.complete(json!({"prompt": "x".repeat(40), "cached": 40})).await;
    assert_eq!((reply.status, reply.header(headers::PATH)), (200, "remote-prefill"));
    assert!(own.legs(paths::DECODE_LEG)[0].transfers.is_empty());
    assert_eq!(other.legs(paths::DECODE_LEG)[0].transfers.len(), 1);
}

#[tokio::test]
async fn unsigned_status_is_never_routed_to() {
    let own = Mock::start(Role::Decode);
    let (unsigned, foreign) = (Mock::start(Role::Prefill), Mock::start(Role::Prefill));
    unsigned.signed_by(None);
    foreign.signed_by(Some(SigningKey::from_bytes(&[6; 32])));
    let proxy = Setup::new().own(&own).peer(&unsigned).peer(&foreign).start().await;
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!(reply.header(headers::PATH), "local-prefill; reason=no-prefill-worker");
    assert_eq!(unsigned.scenario.seen.borrow().calls.len() + foreign.scenario.seen.borrow().calls.len(), 0);
    let is_unsigned = |worker: &serde_json::Value| worker["not_for_prefill"] == "unsigned";
    proxy.workers("both to be unsigned", |workers| workers.iter().filter(|w| is_unsigned(w)).count() == 2).await;
}

#[tokio::test]
async fn another_revision_is_never_paired_with() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    prefill.status(|status| status.revision = "r2".into());
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!(reply.header(headers::PATH), "local-prefill; reason=no-prefill-worker");
}

#[tokio::test]
async fn the_own_pod_in_the_endpoints_file_is_not_another_worker() {
    let own = Mock::start(Role::Decode);
    // The same process twice: as the engine inside the pod, and as a peer under the same epoch.
    let proxy = Setup::new().own(&own).peer(&own).start().await;
    proxy
        .workers("the peer to be known as ourselves", |workers| {
            workers.iter().any(|worker| worker["not_for_decode"] == "itself")
        })
        .await;
    own.decodes(Decode::Refuses(503));
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((reply.status, own.count(paths::DECODE_LEG)), (503, 1));
}

#[tokio::test]
async fn client_x_baton_headers_never_reach_a_worker() {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    let mut request = completion(json!({"prompt": "hello"}));
    for name in [headers::LEG, headers::PREFILL_WORKER, headers::DECODE_WORKER, headers::PATH] {
        request.headers_mut().insert(name, HeaderValue::from_static("10.6.6.6:8000"));
    }
    request.headers_mut().insert("authorization", HeaderValue::from_static("Bearer secret"));
    request.headers_mut().insert(headers::REQUEST_ID, HeaderValue::from_static("mine-1"));
    let reply = proxy.send(request).await;
    assert_eq!((reply.status, reply.header(headers::REQUEST_ID)), (200, "mine-1"));
    prefill.sees("its leg", |seen| seen.on(paths::PREFILL_LEG).count() == 1).await;
    for mock in [&own, &prefill] {
        for call in &mock.scenario.seen.borrow().calls {
            let text = format!("{:?}", call.headers);
            assert!(!text.contains("10.6.6.6") && !text.contains("secret"), "{text}");
            assert_eq!(call.headers[headers::REQUEST_ID], "mine-1");
        }
    }
}

#[tokio::test]
async fn a_full_own_engine_passes_requests_on() {
    let (own, other) = (Mock::start(Role::Decode), Mock::start(Role::Decode));
    own.status(|status| status.load.waiting = 8);
    let proxy = Setup::new().own(&own).peer(&other).start().await;
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((reply.status, reply.header(headers::DECODE_WORKER)), (200, other.address.as_str()));
    assert_eq!((own.count(paths::DECODE_LEG), own.count(paths::RENDER)), (0, 0));
}

#[tokio::test]
async fn two_requests_at_once_go_to_two_prefill_workers() {
    let own = Mock::start(Role::Decode);
    let (first, second) = (Mock::start(Role::Prefill), Mock::start(Role::Prefill));
    let told = Arc::new(Notify::new());
    first.prefills(Prefill::After(Arc::clone(&told), 200));
    second.prefills(Prefill::After(Arc::clone(&told), 200));
    let proxy = Setup::new().own(&own).peer(&first).peer(&second).start().await;
    let request = || proxy.complete(json!({"prompt": "hello", "stream": true}));
    // Both prefill legs are pending while the requests are decided, so only the reservations tell the workers apart.
    let (one, two) = tokio::join!(request(), request());
    first.sees("a leg", |seen| seen.on(paths::PREFILL_LEG).count() == 1).await;
    second.sees("a leg", |seen| seen.on(paths::PREFILL_LEG).count() == 1).await;
    told.notify_waiters();
    assert_eq!((one.text().await.as_str(), two.text().await.as_str()), (CLIENT_EVENTS, CLIENT_EVENTS));
    proxy
        .workers("all reservations to be returned", |workers| {
            workers.iter().all(|w| w["reserved_prompt_tokens"] == 0 && w["reserved_requests"] == 0)
        })
        .await;
}

#[tokio::test]
async fn a_front_door_without_engine_uses_peers_for_both_phases() {
    let (decode, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let proxy = Setup::new().peer(&decode).peer(&prefill).start().await;
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((reply.status, reply.header(headers::PATH)), (200, "remote-prefill"));
    assert_eq!(reply.header(headers::DECODE_WORKER), decode.address);
    let seen = decode.scenario.seen.borrow();
    assert!(seen.calls.iter().all(|call| call.headers.contains_key(headers::LEG)), "all its legs are signed");
}
