//! Responses that this proxy writes itself, and the one place where failures become status codes and texts.

use super::Response;
use super::body::{Body, ReadError};
use crate::failure::{Failure, Hop};
use crate::forward::HOP_BY_HOP;
use crate::status::StatusError;
use crate::upstream::UpstreamError;
use baton_wire::ErrorBody;
use baton_wire::names::headers;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body_util::Full;
use std::time::Duration;

/// Seconds after which a refused client may come again: by then each worker has been asked for its status anew.
const RETRY_AFTER_SECONDS: u32 = 2;

pub(super) fn text(status: StatusCode, text: impl Into<Bytes>) -> Response {
    whole(status, HeaderValue::from_static("text/plain; charset=utf-8"), text.into())
}

pub(super) fn json(status: StatusCode, body: Bytes) -> Response {
    whole(status, HeaderValue::from_static("application/json"), body)
}

pub(super) fn error(status: StatusCode, error: &ErrorBody) -> Response {
    json(status, serde_json::to_vec(error).expect("an error body is strings, which always serialise").into())
}

fn whole(status: StatusCode, kind: HeaderValue, body: Bytes) -> Response {
    let mut response = Response::new(Body::Whole(Full::new(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

fn retry_later(mut response: Response) -> Response {
    response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER_SECONDS.into());
    response
}

pub(super) fn no_such_path(method: &Method, path: &str) -> Response {
    let path: String = path.chars().take(200).collect();
    let message = format!("there is nothing at {method} {path}");
    error(StatusCode::NOT_FOUND, &ErrorBody::invalid_request(message, None, Some("unknown_url")))
}

pub(super) fn wrong_method(found: &Method, allowed: Method) -> Response {
    let message = format!("{found} is not allowed here: use {allowed}");
    let mut response =
        error(StatusCode::METHOD_NOT_ALLOWED, &ErrorBody::invalid_request(message, None, Some("method_not_supported")));
    let allowed = HeaderValue::from_str(allowed.as_str()).expect("a method is a token");
    response.headers_mut().insert(header::ALLOW, allowed);
    response
}

/// A request that came while the proxy ends.
pub(super) fn draining() -> Response {
    let body = ErrorBody::server_error("this proxy is shutting down: try again", Some("draining"));
    let mut response = retry_later(error(StatusCode::SERVICE_UNAVAILABLE, &body));
    // So that the client's next attempt makes a new connection, which a Service leads elsewhere.
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// A request for which there is no room; after how long there may be is told where it is known.
pub(super) fn too_many(retry_after: Option<Duration>) -> Response {
    let message = "too many requests at once: try again";
    let body = ErrorBody::new("rate_limit_error", message, None, Some("too_many_requests_in_flight"));
    let mut response = retry_later(error(StatusCode::TOO_MANY_REQUESTS, &body));
    if let Some(retry_after) = retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, retry_after.as_secs().max(1).into());
    }
    response
}

/// A request without a good key.
pub(super) fn no_key() -> Response {
    let message =
        "this request has no API key that is known here: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`";
    let body = ErrorBody::new("authentication_error", message, None, Some("invalid_api_key"));
    let mut response = error(StatusCode::UNAUTHORIZED, &body);
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

/// A body that could not be read.
pub(super) fn unreadable(failure: &ReadError) -> Response {
    let (status, code) = match failure {
        ReadError::TooLong { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "request_too_large"),
        ReadError::TooSlow { .. } => (StatusCode::REQUEST_TIMEOUT, "body_too_slow"),
        ReadError::Broken(_) => (StatusCode::BAD_REQUEST, "malformed_request"),
    };
    error(status, &ErrorBody::invalid_request(failure.to_string(), None, Some(code)))
}

/// A body that is something else than JSON as it stands; `message` says what to send instead.
pub(super) fn wrong_media_type(message: &str) -> Response {
    let body = ErrorBody::invalid_request(message, None, Some("unsupported_media_type"));
    error(StatusCode::UNSUPPORTED_MEDIA_TYPE, &body)
}

/// A leg without the right to be served.
pub(super) fn unauthorised(message: &str) -> Response {
    error(StatusCode::UNAUTHORIZED, &ErrorBody::invalid_request(message, Some(headers::LEG), Some("leg_unauthorized")))
}

pub(super) fn no_status(error: &StatusError) -> Response {
    let (status, code) = match error {
        StatusError::NoEngine => (StatusCode::NOT_FOUND, "no_engine"),
        // Told apart from an engine that is gone: whoever asks forgives a late one a few times.
        StatusError::Engine(UpstreamError::Timeout { .. }) => (StatusCode::GATEWAY_TIMEOUT, "engine_late"),
        StatusError::Engine(_) | StatusError::Garbled => (StatusCode::BAD_GATEWAY, "engine_unreachable"),
        StatusError::Answered { .. } => (StatusCode::BAD_GATEWAY, "engine_failed"),
    };
    self::error(status, &ErrorBody::server_error(error.to_string(), Some(code)))
}

/// The client's answer to a failure. A worker's 4xx is the client's own doing and passes as it is; everything else says which
/// hop failed, and not what the worker said about it.
pub(super) fn failed(failure: Failure) -> Response {
    let message = failure.to_string();
    let server = |status, code: &str| error(status, &ErrorBody::server_error(message.as_str(), Some(code)));
    let hop_code = |hop: Hop, what: &str| format!("{}_{what}", hop.as_str());
    match failure {
        Failure::NoDecodeWorker => retry_later(server(StatusCode::SERVICE_UNAVAILABLE, "no_decode_worker")),
        Failure::Unavailable { hop, .. } => {
            retry_later(server(StatusCode::SERVICE_UNAVAILABLE, &hop_code(hop, "unavailable")))
        }
        Failure::WorkerNotAllowed { header, .. } => {
            let body = ErrorBody::invalid_request(message.as_str(), Some(header), Some("worker_not_allowed"));
            error(StatusCode::FORBIDDEN, &body)
        }
        Failure::PassedThrough { status, headers, body } => {
            let mut response = Response::new(Body::Whole(Full::new(body)));
            *response.status_mut() = status;
            *response.headers_mut() = for_client(headers);
            if [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&status)
                && !response.headers().contains_key(header::RETRY_AFTER)
            {
                response = retry_later(response);
            }
            response
        }
        Failure::Unanswered { hop, .. } => {
            retry_later(server(StatusCode::SERVICE_UNAVAILABLE, &hop_code(hop, "unreachable")))
        }
        Failure::Answered { status, headers, body, .. } if is_clients_doing(status) => {
            let mut response = Response::new(Body::Whole(Full::new(body)));
            *response.status_mut() = status;
            *response.headers_mut() = for_client(headers);
            if status == StatusCode::TOO_MANY_REQUESTS && !response.headers().contains_key(header::RETRY_AFTER) {
                response = retry_later(response);
            }
            response
        }
        Failure::Answered { hop, status: StatusCode::SERVICE_UNAVAILABLE, .. } => {
            retry_later(server(StatusCode::SERVICE_UNAVAILABLE, &hop_code(hop, "refused")))
        }
        Failure::Answered { hop, .. } => retry_later(server(StatusCode::BAD_GATEWAY, &hop_code(hop, "failed"))),
        Failure::Misrendered { .. } => retry_later(server(StatusCode::BAD_GATEWAY, &hop_code(Hop::Render, "failed"))),
        Failure::Lost { .. } => retry_later(server(StatusCode::BAD_GATEWAY, DECODE_WORKER_LOST)),
        Failure::FirstTokenTimeout { .. } => server(StatusCode::GATEWAY_TIMEOUT, "first_token_timeout"),
        Failure::DeadlineExceeded => server(StatusCode::GATEWAY_TIMEOUT, DEADLINE_EXCEEDED),
        Failure::TooManyPrompts { .. } => {
            let body = ErrorBody::invalid_request(message.as_str(), Some("prompt"), Some("too_many_prompts"));
            error(StatusCode::BAD_REQUEST, &body)
        }
    }
}

/// Whether a worker's status code is about the client's request, or about how many there are, and not about our legs: a worker
/// has no say in who the client is, so a 401 or 403 of its proxy means that the two proxies disagree.
fn is_clients_doing(status: StatusCode) -> bool {
    let ours = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN, StatusCode::REQUEST_TIMEOUT];
    status.is_client_error() && !ours.contains(&status)
}

/// The decode worker went away in the midst of its answer.
pub(super) const DECODE_WORKER_LOST: &str = "decode_worker_lost";

/// The request took longer than a request may take.
pub(super) const DEADLINE_EXCEEDED: &str = "deadline_exceeded";

/// A worker's response headers as the client gets them: without those of the connection that they came over, without the
/// length (the body may lose lines of ours), and without ours, which the proxy sets itself.
pub(super) fn for_client(mut headers: HeaderMap) -> HeaderMap {
    let named: Vec<String> = (headers.get_all(header::CONNECTION).iter())
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').map(|name| name.trim().to_ascii_lowercase()))
        .collect();
    let leaves = |name: &header::HeaderName| {
        HOP_BY_HOP.contains(name)
            || name == header::CONTENT_LENGTH
            || name == headers::REQUEST_ID
            || name.as_str().starts_with(headers::PREFIX)
            || named.iter().any(|named| named == name.as_str())
    };
    let leaving: Vec<header::HeaderName> = headers.keys().filter(|name| leaves(name)).cloned().collect();
    for name in leaving {
        headers.remove(name);
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_one_connection_and_ours_stay_behind() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("content-type", "application/json"),
            ("connection", "keep-alive, X-Private"),
            ("keep-alive", "timeout=5"),
            ("x-private", "1"),
            ("transfer-encoding", "chunked"),
            ("x-baton-path", "remote-prefill"),
            ("x-baton-anything", "1"),
            ("openai-version", "2020-10-01"),
        ] {
            headers.append(header::HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let left = for_client(headers);
        let names: Vec<&str> = left.keys().map(header::HeaderName::as_str).collect();
        assert_eq!(names, ["content-type", "openai-version"]);
    }

    #[test]
    fn every_failure_of_ours_says_which_hop_failed() {
        let worker: crate::address::Address = "10.0.0.1:8000".parse().expect("an address");
        let answered = |status| Failure::Answered {
            hop: Hop::Decode,
            worker: worker.clone(),
            status,
            headers: HeaderMap::new(),
            body: Bytes::new(),
        };
        let check = |failure: Failure, status: u16, retry: bool| {
            let response = failed(failure);
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), retry, "{status}");
        };
        check(Failure::NoDecodeWorker, 503, true);
        check(answered(StatusCode::SERVICE_UNAVAILABLE), 503, true);
        check(answered(StatusCode::INTERNAL_SERVER_ERROR), 502, true);
        check(answered(StatusCode::TOO_MANY_REQUESTS), 429, true);
        check(answered(StatusCode::BAD_REQUEST), 400, false);
        check(answered(StatusCode::UNAUTHORIZED), 502, true);
        check(Failure::DeadlineExceeded, 504, false);
        check(Failure::TooManyPrompts { found: 2, max: 1 }, 400, false);
    }
}
