//! Which headers of a client's request go on to engines that are not ours, and which headers of it steer this proxy. Pure.
//!
//! Everything goes on as it came, `Authorization` and unknown headers included, but for four kinds: those of the connection that it
//! came over; those that this proxy writes itself (length, host, request id, trace); `accept-encoding`, because answers are read
//! here; and those that name workers, by any name that a router of the field reads, because an engine or a router behind us
//! must never be steered by a client.

use crate::trace;
use baton_wire::names::headers;
use http::header::{self, HeaderName};
use http::{HeaderMap, HeaderValue};
use std::time::Duration;

/// Headers by which routers of the field are told where to send a request: llm-d's sidecar and scheduler, vLLM's router,
/// Dynamo's frontend, Gateway API's endpoint picker.
const STEERING: [&str; 17] = [
    "x-prefiller-host-port",
    "x-prefiller-url",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
    "x-gateway-destination-endpoint",
    "x-gateway-destination-endpoint-subset",
    "x-gateway-destination-endpoint-served",
    "x-worker-instance-id",
    "x-prefill-instance-id",
    "x-decode-instance-id",
    "x-dynamo-routing-mode",
    "x-dp-rank",
    "x-data-parallel-rank",
    "x-prefill-dp-rank",
    "x-smg-target-worker",
    "x-smg-routing-key",
];

/// Headers that belong to one connection and never cross a proxy (RFC 9110, section 7.6.1, and what came before it).
pub(crate) const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// Headers that this proxy writes itself, or would have to keep to.
const OURS: [HeaderName; 7] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::EXPECT,
    header::ACCEPT_ENCODING,
    header::FORWARDED,
    trace::TRACEPARENT,
    trace::TRACESTATE,
];

/// The client's headers as engines get them; request id and trace are put in by the caller.
pub(crate) fn for_engine(client: &HeaderMap) -> HeaderMap {
    let named_by_connection = |name: &HeaderName| {
        client
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|named| named.trim().eq_ignore_ascii_case(name.as_str())))
    };
    let has_named = client.contains_key(header::CONNECTION);
    let stays_behind = |name: &HeaderName| {
        HOP_BY_HOP.contains(name)
            || OURS.contains(name)
            || name.as_str().starts_with(headers::PREFIX)
            || name == headers::REQUEST_ID
            || STEERING.contains(&name.as_str())
            || (has_named && named_by_connection(name))
    };
    let mut headers = HeaderMap::with_capacity(client.len() + 2);
    for (name, value) in client {
        if !stays_behind(name) {
            headers.append(name, value.clone());
        }
    }
    headers
}

/// What a request's headers ask of the choice of workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hints {
    /// Which conversation it belongs to: the next request of it goes where the last one went.
    pub(crate) session: Option<String>,
    /// The decode worker, by address.
    pub(crate) decode_worker: Option<String>,
    /// The prefill worker, by address.
    pub(crate) prefill_worker: Option<String>,
    /// Workers that may serve it, by address; none named means all.
    pub(crate) allowed_workers: Vec<String>,
    /// Data-parallel rank of the decode worker.
    pub(crate) decode_rank: Option<u32>,
    /// Data-parallel rank of the prefill worker.
    pub(crate) prefill_rank: Option<u32>,
    /// By how much earlier than it came its prefill engine serves it, because the request tells it a priority.
    pub(crate) priority_jump: Option<Duration>,
}

/// Characters of a session's name: a UUID has 36.
const SESSION_CHARACTERS_MAX: usize = 128;

/// Workers that one request may name.
const ALLOWED_MAX: usize = 64;

/// Seconds of a priority jump: longer than any queue that is worth waiting in.
const PRIORITY_JUMP_SECONDS_MAX: f64 = 3600.0;

/// What a request's headers ask for. Of a client that is not trusted only the session is taken: it can't name a worker.
pub(crate) fn hints(client: &HeaderMap, trusted: bool) -> Hints {
    let text = |name: &'static str| client.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).map(str::trim);
    let session = ["x-session-id", "x-smg-session-id"].into_iter().find_map(text);
    let session = session.filter(|session| !session.is_empty() && session.len() <= SESSION_CHARACTERS_MAX);
    let session = session.map(str::to_owned);
    if !trusted {
        return Hints { session, ..Hints::default() };
    }
    let number = |name| text(name).and_then(|value| value.parse().ok());
    Hints {
        session,
        decode_worker: text("x-worker-instance-id").map(str::to_owned),
        prefill_worker: text("x-prefill-instance-id").map(str::to_owned),
        allowed_workers: text("x-baton-allowed-workers").map_or_else(Vec::new, |list| {
            list.split(',').map(|one| one.trim().to_owned()).filter(|one| !one.is_empty()).take(ALLOWED_MAX).collect()
        }),
        decode_rank: number("x-data-parallel-rank").or_else(|| number("x-dp-rank")),
        prefill_rank: number("x-prefill-dp-rank"),
        priority_jump: text(headers::PRIORITY_JUMP).and_then(|value| {
            let seconds = value.parse().ok().filter(|seconds| (0.0..=PRIORITY_JUMP_SECONDS_MAX).contains(seconds))?;
            Some(Duration::from_secs_f64(seconds))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                let name: HeaderName = name.parse().expect("a name");
                (name, HeaderValue::from_str(value).expect("a value"))
            })
            .collect()
    }

    #[test]
    fn what_a_client_sends_goes_on_but_for_what_is_of_the_connection_ours_or_steers() {
        let client = map(&[
            ("authorization", "Bearer x"),
            ("openai-organization", "o"),
            ("connection", "keep-alive, X-Private"),
            ("x-private", "1"),
            ("host", "h"),
            ("content-length", "3"),
            ("transfer-encoding", "chunked"),
            ("expect", "100-continue"),
            ("accept-encoding", "gzip"),
            ("x-baton-leg", "forged"),
            ("x-request-id", "r"),
            ("traceparent", "wrong"),
            ("tracestate", "a=1"),
            ("content-type", "application/json"),
        ]);
        let passed = for_engine(&client);
        let names: Vec<&str> = passed.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["authorization", "openai-organization", "content-type"]);
    }

    #[test]
    fn no_header_that_names_a_worker_goes_on() {
        let client: HeaderMap = STEERING
            .iter()
            .map(|name| (HeaderName::from_static(name), HeaderValue::from_static("10.0.0.1:1")))
            .collect();
        assert_eq!(for_engine(&client).len(), 0);
    }

    #[test]
    fn a_header_given_twice_goes_on_twice() {
        let client = map(&[("x-a", "1"), ("x-a", "2")]);
        assert_eq!(for_engine(&client).get_all("x-a").iter().count(), 2);
    }

    #[test]
    fn hints_that_name_workers_are_for_trusted_clients() {
        let client = map(&[
            ("x-session-id", "s"),
            ("x-worker-instance-id", "10.0.0.1:8000"),
            ("x-prefill-instance-id", "10.0.0.2:8000"),
            ("x-baton-allowed-workers", "10.0.0.1:8000, 10.0.0.2:8000"),
            ("x-data-parallel-rank", "3"),
            ("x-prefill-dp-rank", "-1"),
            ("x-baton-priority-jump", "1.5"),
        ]);
        let stranger = hints(&client, false);
        assert_eq!(stranger, Hints { session: Some("s".into()), ..Hints::default() });
        let trusted = hints(&client, true);
        assert_eq!(trusted.allowed_workers.len(), 2);
        assert_eq!((trusted.decode_rank, trusted.prefill_rank), (Some(3), None));
        assert_eq!(trusted.decode_worker.as_deref(), Some("10.0.0.1:8000"));
        assert_eq!(trusted.priority_jump, Some(Duration::from_millis(1500)));
        for wrong in ["", "-1", "NaN", "inf", "3601", "soon"] {
            assert_eq!(hints(&map(&[("x-baton-priority-jump", wrong)]), true).priority_jump, None, "{wrong}");
        }
    }

    #[test]
    fn a_session_has_a_bound() {
        let long = "x".repeat(SESSION_CHARACTERS_MAX + 1);
        assert_eq!(hints(&map(&[("x-session-id", &long)]), true).session, None);
    }
}
