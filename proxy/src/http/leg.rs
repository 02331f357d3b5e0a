//! Legs that other pods' proxies send: served by the engine of this pod and never forwarded again, so no loop can arise.
//! A leg without a signed header, for another path or with another body than was signed, is refused.

use super::body::{self, Body};
use super::client::request_id;
use super::stream::Relay;
use super::{Request, Response, respond};
use crate::connector::Connector;
use crate::drain::Work;
use crate::entropy;
use crate::forward;
use crate::proxy::Proxy;
use crate::status::StatusError;
use crate::trace;
use crate::upstream::{Request as UpstreamRequest, by};
use baton_wire::ErrorBody;
use baton_wire::names::headers;
use baton_wire::signing::{self, LegClaims};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long a leg's body may take to arrive: megabytes between two pods take milliseconds.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Times the largest client's body that a leg may be long: that body itself, and its prompts as numbers (8 characters for
/// each byte at worst), with a sixteenth of that for transfers and names.
const LEG_BYTES_PER_BODY_BYTE: usize = 10;

/// What a leg has on top, however small the client's body is.
const LEG_BYTES_MIN: usize = 2 << 20;

pub(super) async fn serve(proxy: Arc<Proxy>, path: &'static str, request: Request) -> Response {
    match super::admit_leg(&proxy) {
        Err(refusal) => *refusal,
        Ok(work) => authorised(proxy, work, path, request).await,
    }
}

/// Whether a request without a body is another proxy's of this model.
pub(super) fn is_signed(proxy: &Proxy, path: &str, given: &HeaderMap) -> bool {
    let token = given.get(headers::LEG).and_then(|token| token.to_str().ok()).unwrap_or_default();
    let claims = signing::verify::<LegClaims>(&proxy.key.verifying_key(), token, entropy::now_unix_ms());
    claims.is_ok_and(|claims| claims.path == path)
}

async fn authorised(proxy: Arc<Proxy>, work: Work, path: &'static str, request: Request) -> Response {
    let (head, incoming) = request.into_parts();
    // The token before the body, so that a stranger can't make us hold one.
    let token = head.headers.get(headers::LEG).and_then(|token| token.to_str().ok()).unwrap_or_default();
    let key = proxy.key.verifying_key();
    let claims: LegClaims = match signing::verify(&key, token, entropy::now_unix_ms()) {
        Ok(claims) => claims,
        Err(error) => return respond::unauthorised(&error.to_string()),
    };
    if claims.path != path {
        return respond::unauthorised("the leg was signed for another path");
    }
    let bytes_max = proxy.limits.body_bytes_max.saturating_mul(LEG_BYTES_PER_BODY_BYTE).saturating_add(LEG_BYTES_MIN);
    let body = match body::read(&head.headers, incoming, bytes_max, BODY_TIMEOUT).await {
        Ok(body) => body,
        Err(error) => return respond::unreadable(&error),
    };
    if signing::body_blake3(&body) != claims.body_blake3 {
        return respond::unauthorised("the leg was signed for another body");
    }
    to_engine(&proxy, work, path, &head.headers, body).await
}

async fn to_engine(proxy: &Proxy, work: Work, path: &'static str, given: &HeaderMap, body: bytes::Bytes) -> Response {
    let table = proxy.workers.table();
    let Some(engine) = table.own().map(|own| &own.upstream) else {
        return respond::no_status(&StatusError::NoEngine);
    };
    // Another engine gets the client's headers, which the asking proxy has passed on.
    let headers = if proxy.connector == Connector::Baton { HeaderMap::new() } else { forward::for_engine(given) };
    let mut request =
        UpstreamRequest { method: Method::POST, path: PathAndQuery::from_static(path), headers, body: body.into() };
    let id = HeaderValue::from_str(&request_id(given)).expect("a request id is checked to be visible ASCII");
    request.headers.entry(header::CONTENT_TYPE).or_insert(HeaderValue::from_static("application/json"));
    request.headers.insert(headers::REQUEST_ID, id);
    trace::relay(given, &mut request.headers);
    // What the asking proxy itself says to the engine; a client's headers of these names have not got past it.
    for name in [headers::TOKEN_IDS, headers::DATA_PARALLEL_RANK] {
        if let Some(value) = given.get(name) {
            request.headers.insert(name, value.clone());
        }
    }
    let deadline = Instant::now() + proxy.limits.request_timeout;
    match by(deadline, engine.address(), engine.send(&request)).await {
        Ok(answer) => {
            let mut response = Response::new(Body::Relay(Box::new(Relay::new(answer.body, deadline, work))));
            *response.status_mut() = answer.status;
            let path = answer.headers.get(headers::PATH).cloned();
            *response.headers_mut() = respond::for_client(answer.headers);
            if let Some(path) = path {
                response.headers_mut().insert(headers::PATH, path);
            }
            response
        }
        Err(error) => {
            let body = ErrorBody::server_error(error.to_string(), Some("engine_unreachable"));
            respond::error(StatusCode::BAD_GATEWAY, &body)
        }
    }
}
