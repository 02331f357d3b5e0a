//! What workers tell of their prefix caches decides where prompts go, and nobody but a proxy of the model is told.

mod support;

use baton_wire::names::{headers, paths};
use baton_wire::signing::{self, LegClaims};
use baton_wire::{BlockHash, Role};
use bytes::Bytes;
use http::{HeaderValue, Request};
use http_body_util::Full;
use serde_json::json;
use std::io::Write as _;
use support::{Mock, Proxy, Setup, WITHIN, block_names, completion, key};

/// Ten blocks of the mocks.
fn prompt(letter: &str) -> String {
    letter.repeat(320)
}

async fn in_step(proxy: &Proxy, workers: usize) {
    proxy.metric(&format!(r#"baton_proxy_kv_event_streams{{state="in-step"}} {workers}"#)).await;
}

#[tokio::test]
async fn a_prompt_goes_to_the_prefill_worker_that_has_its_beginning() {
    let own = Mock::start(Role::Decode);
    let (first, second) = (Mock::start(Role::Prefill), Mock::start(Role::Prefill));
    first.holds(block_names(&prompt("a"), None));
    second.holds(block_names(&prompt("b"), None));
    let proxy = Setup::new().own(&own).peer(&first).peer(&second).kv_events().start().await;
    in_step(&proxy, 3).await;
    for (letter, holder) in
        [("a", &first), ("b", &second), ("a", &first), ("b", &second), ("b", &second), ("a", &first)]
    {
        let reply = proxy.complete(json!({"prompt": prompt(letter)})).await;
        assert_eq!((reply.status, reply.header(headers::PREFILL_WORKER)), (200, holder.address.as_str()), "{letter}");
        // A leg that still runs is work ahead of the next prompt, and may outweigh ten blocks.
        let none_runs = |workers: &[serde_json::Value]| workers.iter().all(|w| w["reserved_prompt_tokens"] == 0);
        proxy.workers("no prefill leg to run", none_runs).await;
    }
    let page: serde_json::Value = serde_json::from_str(&proxy.admin("/debug/prefix").await.text().await).expect("JSON");
    let blocks = |mock: &Mock| {
        let rows = page["workers"].as_array().expect("a list");
        rows.iter().find(|row| row["worker"] == mock.address.as_str()).map(|row| row["blocks"].clone())
    };
    assert_eq!([blocks(&own), blocks(&first), blocks(&second)], [Some(json!(0)), Some(json!(10)), Some(json!(10))]);
    let seen = first.scenario.seen.borrow();
    let call = seen.on(paths::KV_EVENTS).next().expect("it was asked");
    let token = call.headers[headers::LEG].to_str().expect("text");
    let claims: LegClaims = signing::verify(&key().verifying_key(), token, 0).expect("signed by us");
    assert_eq!(claims.path, paths::KV_EVENTS);
}

#[tokio::test]
async fn a_tenants_blocks_are_no_other_tenants() {
    let mut keys = tempfile::NamedTempFile::new().expect("a file");
    // The digests of "key-of-a" and "key-of-b".
    let file_of_keys = json!({"keys": [
        {"sha256": "ee063bb3d7270fdf6148f09dde510a5cf346c4aa4dd2ff4b2caec5348d799043", "tenant": "a"},
        {"sha256": "caad66a34f6dbd2c56b4fceb13caf74761aba0720534d6e33185edd493ea0f63", "tenant": "b"},
    ]});
    keys.write_all(file_of_keys.to_string().as_bytes()).expect("written");
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let proxy = Setup::new().own(&own).peer(&prefill).api_keys(keys.path()).start().await;
    let mut salts = Vec::new();
    for secret in ["key-of-a", "key-of-b", "key-of-a"] {
        let mut request = completion(json!({"prompt": prompt("a")}));
        request.headers_mut().insert("authorization", format!("Bearer {secret}").parse().expect("a header"));
        assert_eq!(proxy.send(request).await.status, 200);
        salts.push(own.legs(paths::DECODE_LEG).last().expect("a leg").tenant_salt.expect("a tenant has a salt"));
    }
    assert_eq!(salts[0], salts[2]);
    assert_ne!(salts[0], salts[1]);
    prefill.sees("three legs", |seen| seen.on(paths::PREFILL_LEG).count() == 3).await;
    let of_prefill: Vec<_> = prefill.legs(paths::PREFILL_LEG).iter().filter_map(|leg| leg.tenant_salt).collect();
    assert_eq!(of_prefill, salts);
    let rendered = own.scenario.seen.borrow().on(paths::RENDER).map(|call| call.body.clone()).collect::<Vec<Bytes>>();
    let of_render =
        |body: &Bytes| serde_json::from_slice::<serde_json::Value>(body).expect("JSON")["tenant_salt"].as_u64();
    assert_eq!(rendered.iter().filter_map(of_render).collect::<Vec<_>>(), salts);
}

fn asking(token: Option<&str>) -> Request<Full<Bytes>> {
    let mut request = Request::get(paths::KV_EVENTS).body(Full::default()).expect("a request");
    if let Some(token) = token {
        request.headers_mut().insert(headers::LEG, HeaderValue::from_str(token).expect("a header"));
    }
    request
}

#[tokio::test]
async fn only_a_proxy_of_the_model_is_told_and_the_pods_end_is_the_streams_end() {
    let own = Mock::start(Role::Decode);
    own.holds(vec![BlockHash([9; 16])]);
    let proxy = Setup::new().own(&own).start().await;
    let claims = |path: &str| LegClaims {
        path: path.to_owned(),
        body_blake3: signing::body_blake3(&[]),
        expires_unix_ms: u64::MAX,
    };
    let token = signing::sign(&key(), &claims(paths::KV_EVENTS));
    assert_eq!(proxy.send(asking(None)).await.status, 401);
    assert_eq!(proxy.send(asking(Some(&signing::sign(&key(), &claims(paths::STATUS))))).await.status, 401);
    let mut reply = proxy.send(asking(Some(&token))).await;
    assert_eq!(reply.status, 200);
    let lines = reply.piece().await.expect("lines");
    assert!(lines.contains("hello") && lines.contains(&BlockHash([9; 16]).to_string()), "{lines}");
    proxy.shutdown.drain.cancel();
    let rest = tokio::time::timeout(WITHIN, reply.piece()).await.expect("it ends");
    assert_eq!(rest, None);
}
