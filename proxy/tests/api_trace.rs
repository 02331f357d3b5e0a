//! W3C trace context with our own workers: each call of a request belongs to the client's trace, from a span of its own; what is wrong is
//! dropped and never relayed.

mod support;

use baton_wire::leg::LegRequest;
use baton_wire::names::{headers, paths};
use baton_wire::render::Endpoint;
use baton_wire::signing::{self, LegClaims};
use baton_wire::{Path, PathReason, Role};
use http::{HeaderName, HeaderValue, Request};
use http_body_util::Full;
use serde_json::json;
use serde_json::value::RawValue;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use support::{CLIENT_EVENTS, Decode, Mock, Proxy, Reply, Setup, completion, key, post_json};
use tokio::sync::Notify;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

fn parent() -> String {
    format!("00-{TRACE}-{SPAN}-01")
}

/// A request with these headers, each as often as it is given.
fn with(mut request: Request<Full<bytes::Bytes>>, given: &[(&'static str, &str)]) -> Request<Full<bytes::Bytes>> {
    for (name, value) in given {
        let value = HeaderValue::from_str(value).expect("a header value");
        request.headers_mut().append(HeaderName::from_static(name), value);
    }
    request
}

async fn ask(proxy: &Proxy, given: &[(&'static str, &str)]) -> Reply {
    proxy.send(with(completion(json!({"prompt": "hello", "stream": true})), given)).await
}

/// What the calls of a path said of their trace: parent and state.
fn said(mock: &Mock, path: &str) -> Vec<(Option<String>, Option<String>)> {
    let seen = mock.scenario.seen.borrow();
    let text = |value: &HeaderValue| value.to_str().expect("text").to_owned();
    seen.on(path)
        .map(|call| {
            assert!(call.headers.get_all(headers::TRACEPARENT).iter().count() <= 1, "given once");
            (call.headers.get(headers::TRACEPARENT).map(text), call.headers.get(headers::TRACESTATE).map(text))
        })
        .collect()
}

/// The span of a call that is of our trace, with these flags.
fn span(said: &(Option<String>, Option<String>), flags: &str) -> String {
    let parent = said.0.as_deref().expect("a trace");
    let parts: Vec<&str> = parent.split('-').collect();
    assert_eq!((parts[0], parts[1], parts[3], parts.len()), ("00", TRACE, flags, 4), "{parent}");
    assert_eq!(parts[2].len(), 16, "{parent}");
    parts[2].to_owned()
}

/// What the prefill legs said of their trace, once there are so many: nobody waits for them, so an answer may be there before they are.
async fn prefills_said(prefill: &Mock, count: usize) -> Vec<(Option<String>, Option<String>)> {
    prefill.sees("its legs", |seen| seen.on(paths::PREFILL_LEG).count() == count).await;
    said(prefill, paths::PREFILL_LEG)
}

/// Prefill and decode in two pods; the proxy is that of the decode pod.
async fn pods() -> (Mock, Mock, Proxy) {
    let (own, prefill) = (Mock::start(Role::Decode), Mock::start(Role::Prefill));
    let proxy = Setup::new().own(&own).peer(&prefill).start().await;
    (own, prefill, proxy)
}

#[tokio::test]
async fn every_call_of_a_request_is_of_its_trace_and_from_a_span_of_its_own() {
    let (own, prefill, proxy) = pods().await;
    for (index, (flags, expect)) in [("01", "01"), ("00", "00"), ("03", "03"), ("ff", "03")].into_iter().enumerate() {
        let given = format!("00-{TRACE}-{SPAN}-{flags}");
        let state = "vendor=a:1,other@tenant=b 2";
        let reply = ask(&proxy, &[("traceparent", &given), ("tracestate", state)]).await;
        assert_eq!(reply.header(headers::PATH), "remote-prefill");
        assert_eq!(reply.text().await, CLIENT_EVENTS);
        let prefills = prefills_said(&prefill, index + 1).await;
        let calls = [said(&own, paths::RENDER), prefills, said(&own, paths::DECODE_LEG)];
        let calls = calls.map(|calls| calls.last().expect("a call").clone());
        let spans = calls.each_ref().map(|call| span(call, expect));
        assert!(spans[0] != spans[1] && spans[1] != spans[2] && spans[0] != spans[2], "{spans:?}");
        assert!(!spans.contains(&SPAN.to_owned()), "the client's own span");
        assert!(calls.iter().all(|(_, passed)| passed.as_deref() == Some(state)), "{calls:?}");
    }
}

#[tokio::test]
async fn a_later_version_goes_on_as_the_one_that_is_known() {
    let (own, prefill, proxy) = pods().await;
    let given = format!("cc-{TRACE}-{SPAN}-01-what-the-future-brings");
    assert_eq!(ask(&proxy, &[("traceparent", &given)]).await.text().await, CLIENT_EVENTS);
    span(&said(&own, paths::DECODE_LEG)[0], "01");
    span(&prefills_said(&prefill, 1).await[0], "01");
}

#[tokio::test]
async fn a_wrong_or_missing_trace_is_neither_relayed_nor_replaced() {
    let (own, prefill, proxy) = pods().await;
    let (right, upper) = (parent(), parent().to_uppercase());
    let zeros = format!("00-{}-{SPAN}-01", "0".repeat(32));
    let long = format!("{right}-more");
    let cases: [&[(&'static str, &str)]; 7] = [
        &[],
        &[("tracestate", "a=1")],
        &[("traceparent", &upper), ("tracestate", "a=1")],
        &[("traceparent", &zeros)],
        &[("traceparent", &long)],
        &[("traceparent", "")],
        &[("traceparent", &right), ("traceparent", &right), ("tracestate", "a=1")],
    ];
    for given in cases {
        assert_eq!(ask(&proxy, given).await.text().await, CLIENT_EVENTS, "{given:?}");
    }
    let prefills = prefills_said(&prefill, cases.len()).await;
    for calls in [said(&own, paths::RENDER), prefills, said(&own, paths::DECODE_LEG)] {
        assert_eq!(calls, vec![(None, None); cases.len()]);
    }
}

#[tokio::test]
async fn several_states_become_one_and_a_wrong_one_goes_alone() {
    let (own, _prefill, proxy) = pods().await;
    let right = parent();
    for (states, expect) in [(["a=1", "b=2"], Some("a=1,b=2")), (["a=1", "B=2"], None)] {
        let given = [("traceparent", right.as_str()), ("tracestate", states[0]), ("tracestate", states[1])];
        assert_eq!(ask(&proxy, &given).await.status, 200);
        let last = said(&own, paths::DECODE_LEG).pop().expect("a leg");
        span(&last, "01");
        assert_eq!(last.1.as_deref(), expect);
    }
}

#[tokio::test]
async fn the_worker_that_goes_on_with_a_stream_is_told_of_the_trace() {
    let (own, other, told) = (Mock::start(Role::Decode), Mock::start(Role::Decode), Arc::new(Notify::new()));
    own.decodes(Decode::Dies(Arc::clone(&told)));
    let proxy = Setup::new().own(&own).peer(&other).start().await;
    let mut reply = ask(&proxy, &[("traceparent", &parent()), ("tracestate", "a=1")]).await;
    let first = reply.piece().await.expect("an event");
    told.notify_one();
    assert_eq!(first + &reply.text().await, CLIENT_EVENTS);
    let (lost, next) = (said(&own, paths::DECODE_LEG), said(&other, paths::DECODE_LEG));
    assert_ne!(span(&lost[0], "01"), span(&next[0], "01"));
    assert_eq!(next[0].1.as_deref(), Some("a=1"));
}

#[tokio::test]
async fn another_proxys_leg_keeps_its_span_on_the_way_to_the_engine() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let leg = LegRequest {
        request_id: "r".into(),
        endpoint: Endpoint::Completions,
        body: RawValue::from_string("{}".into()).expect("JSON"),
        prompts: vec![vec![1]],
        seed: 1,
        transfers: Vec::new(),
        planned: Path::LocalPrefill(PathReason::PolicyNever),
        created: None,
        tenant_salt: None,
        resume: None,
    };
    let body = serde_json::to_string(&leg).expect("JSON");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as u64;
    let claims = LegClaims {
        path: paths::DECODE_LEG.into(),
        body_blake3: signing::body_blake3(body.as_bytes()),
        expires_unix_ms: now + 30_000,
    };
    let token = signing::sign(&key(), &claims);
    let right = parent();
    for (given, expect) in [(right.as_str(), Some(right.clone())), ("00-wrong", None)] {
        let leg = with(post_json(paths::DECODE_LEG, body.clone()), &[(headers::LEG, &token), ("traceparent", given)]);
        assert_eq!(proxy.send(leg).await.status, 200);
        assert_eq!(said(&own, paths::DECODE_LEG).pop().expect("a leg").0, expect);
    }
}
