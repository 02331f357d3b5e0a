//! Clients' keys: on every route but the probes', read again while the proxy runs, and never asked of other pods' proxies.

mod support;

use baton_wire::names::{headers, paths};
use baton_wire::signing::{self, LegClaims};
use baton_wire::{ErrorBody, Role};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use serde_json::json;
use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};
use support::{Mock, Proxy, Setup, completion, key};

/// The digests of "key-of-a" and "key-of-b".
const A: &str = "ee063bb3d7270fdf6148f09dde510a5cf346c4aa4dd2ff4b2caec5348d799043";
const B: &str = "caad66a34f6dbd2c56b4fceb13caf74761aba0720534d6e33185edd493ea0f63";

fn keys(digests: &[(&str, &str)]) -> String {
    let keys: Vec<_> = digests.iter().map(|(tenant, sha256)| json!({"tenant": tenant, "sha256": sha256})).collect();
    json!({ "keys": keys }).to_string()
}

async fn status(proxy: &Proxy, key: Option<(&'static str, &str)>) -> u16 {
    let mut request = completion(json!({"prompt": "hello"}));
    if let Some((name, value)) = key {
        request.headers_mut().insert(name, value.parse().expect("a header"));
    }
    proxy.send(request).await.status
}

#[tokio::test]
async fn every_route_but_the_probes_wants_a_key() {
    let own = Mock::start(Role::Decode);
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(keys(&[("a", A)]).as_bytes()).expect("written");
    let proxy = Setup::new().own(&own).api_keys(file.path()).start().await;
    for path in [paths::MODELS, "/v1/models/tiny", paths::STATUS] {
        assert_eq!(proxy.get(path).await.status, 401, "{path}");
    }
    for path in [paths::HEALTH, paths::READY] {
        assert_eq!(proxy.get(path).await.status, 200, "{path}");
    }
    assert_eq!(proxy.get("/nothing").await.status, 404);
    let refused = proxy.send(completion(json!({"prompt": "hello"}))).await;
    assert_eq!((refused.status, refused.header("www-authenticate")), (401, "Bearer"));
    let body: ErrorBody = serde_json::from_str(&refused.text().await).expect("an error body");
    assert_eq!(body.error.code.as_deref(), Some("invalid_api_key"));
    assert_eq!(own.count(paths::RENDER), 0);
    let check = async |key, expect| assert_eq!(status(&proxy, Some(key)).await, expect, "{key:?}");
    check(("authorization", "Bearer key-of-a"), 200).await;
    check(("x-api-key", "key-of-a"), 200).await;
    check(("authorization", "Bearer key-of-b"), 401).await;
    check(("authorization", "key-of-a"), 401).await;
    check(("authorization", "Bearer "), 401).await;
    check(("x-api-key", A), 401).await;
}

#[tokio::test]
async fn keys_change_while_requests_are_served() {
    let own = Mock::start(Role::Decode);
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), keys(&[("a", A)])).expect("written");
    let proxy = Setup::new().own(&own).api_keys(file.path()).start().await;
    assert_eq!(status(&proxy, Some(("x-api-key", "key-of-b"))).await, 401);
    std::fs::write(file.path(), keys(&[("b", B)])).expect("written");
    let turned = async {
        while status(&proxy, Some(("x-api-key", "key-of-b"))).await != 200 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(support::WITHIN, turned).await.expect("the file is read again");
    assert_eq!(status(&proxy, Some(("x-api-key", "key-of-a"))).await, 401);
}

#[tokio::test]
async fn pods_ask_each_other_without_a_clients_key() {
    let own = Mock::start(Role::Decode);
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), keys(&[("a", A)])).expect("written");
    let proxy = Setup::new().own(&own).api_keys(file.path()).start().await;
    let asked = async |path: &str| {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        let claims = LegClaims {
            path: path.to_owned(),
            body_blake3: signing::body_blake3(&[]),
            expires_unix_ms: since.as_millis() as u64 + 30_000,
        };
        let mut request = Request::get(paths::STATUS).body(Full::new(Bytes::new())).expect("a request");
        request.headers_mut().insert(headers::LEG, signing::sign(&key(), &claims).parse().expect("a header"));
        proxy.send(request).await.status
    };
    assert_eq!(asked(paths::STATUS).await, 200);
    assert_eq!(asked(paths::RENDER).await, 401, "a signature for another path is none for this one");
}
