//! Clients' requests at the edge: admitted, read, given an id, handed to the pipeline, answered.

use super::body::{self, Body, ReadError};
use super::stream::EventStream;
use super::{Request, Response, respond};
use crate::account::Account;
use crate::api::Api;
use crate::drain::Work;
use crate::eligible::takes_work;
use crate::entropy;
use crate::metrics::Limit;
use crate::pipeline::{self, Answer, AnswerBody, ClientRequest};
use crate::proxy::Proxy;
use crate::trace::Trace;
use baton_wire::ErrorBody;
use baton_wire::names::headers;
use baton_wire::render::Endpoint;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body_util::Full;
use percent_encoding::percent_decode_str;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long a client's body may take to arrive: the largest one over a slow line (1 Mbit/s).
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(40);

/// Characters of a request id that are taken from a client. Longer than any tracing id, short enough for a log line.
const REQUEST_ID_CHARACTERS_MAX: usize = 128;

/// `POST /v1/chat/completions` and `/v1/completions`.
pub(super) async fn completion(proxy: Arc<Proxy>, endpoint: Endpoint, request: Request) -> Response {
    let arrived = Instant::now();
    let name = match endpoint {
        Endpoint::Chat => Api::Chat.as_str(),
        Endpoint::Completions => Api::Completions.as_str(),
    };
    let id = request_id(request.headers());
    let id_value = HeaderValue::from_str(&id).expect("a request id is checked to be visible ASCII");
    let mut response = match super::admit(&proxy, request.headers()).await {
        Err(refusal) => *refusal,
        Ok((work, tenant)) => {
            let account = Account::open(Arc::clone(&proxy), id.clone(), name, arrived, Trace::of(request.headers()));
            let tenant_salt = tenant.is_known().then(|| tenant.salt.as_u64());
            admitted(proxy, work, account, id, endpoint, tenant_salt, arrived, request).await
        }
    };
    response.headers_mut().insert(headers::REQUEST_ID, id_value);
    response
}

#[allow(clippy::too_many_arguments)] // What a request is made of; each is named where it is used.
async fn admitted(
    proxy: Arc<Proxy>,
    work: Work,
    mut account: Account,
    id: String,
    endpoint: Endpoint,
    tenant_salt: Option<u64>,
    arrived: Instant,
    request: Request,
) -> Response {
    let hints = crate::forward::hints(request.headers(), proxy.trust_routing_hints);
    // Of the client's headers its trace alone goes on: legs are requests of ours, so no header can steer a worker.
    let (head, incoming) = request.into_parts();
    let answered = match body::read(&head.headers, incoming, proxy.limits.body_bytes_max, BODY_TIMEOUT).await {
        Err(error) => Err(unread(&proxy, &error)),
        Ok(body) => match media_type(&head.headers).map(|()| json(&body)) {
            Err(message) => Err(respond::wrong_media_type(message)),
            Ok(Err(error)) => Err(respond::error(StatusCode::BAD_REQUEST, &error)),
            Ok(Ok(body)) => {
                let request = ClientRequest { id, endpoint, body, tenant_salt, hints, arrived };
                pipeline::run(&proxy, request, &mut account).await.map_err(|failure| {
                    tracing::debug!(cause = std::error::Error::source(&failure), "{failure}");
                    respond::failed(failure)
                })
            }
        },
    };
    match answered {
        Ok(answer) => answer_client(&proxy, work, account, answer),
        Err(response) => {
            account.answer(response.status());
            account.end();
            response
        }
    }
}

/// What a body that could not be read is answered; a bound that it met is counted.
pub(super) fn unread(proxy: &Proxy, error: &ReadError) -> Response {
    match error {
        ReadError::TooLong { .. } => proxy.metrics.refused(Limit::BodyBytes),
        ReadError::TooSlow { .. } => proxy.metrics.refused(Limit::BodyTime),
        ReadError::Broken(_) => {}
    }
    respond::unreadable(error)
}

pub(super) fn answer_client(proxy: &Proxy, work: Work, mut account: Account, answer: Answer) -> Response {
    let Answer { status, headers, body } = answer;
    let mut headers = respond::for_client(headers);
    let mut name = |header: &'static str, value: Option<String>| {
        if let Some(value) = value.and_then(|value| HeaderValue::from_str(&value).ok()) {
            headers.insert(header, value);
        }
    };
    name(headers::PATH, account.path.map(|path| path.to_string()));
    name(headers::PREFILL_WORKER, account.prefill_worker.as_ref().map(ToString::to_string));
    name(headers::DECODE_WORKER, account.decode_worker.as_ref().map(ToString::to_string));
    account.answer(status);
    let body = match body {
        AnswerBody::Whole(body) => {
            account.end();
            Body::Whole(Full::new(body))
        }
        AnswerBody::Events(events) => {
            Body::Events(Box::new(EventStream::new(events, proxy.limits.idle_timeout, account, work)))
        }
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// Whether the body says that it is JSON as it stands. One that says nothing is believed; one that a web page can send
/// anywhere without asking first (a form, plain text) is not, or any page could have a model on its visitor's machine compute.
pub(super) fn media_type(headers: &HeaderMap) -> Result<(), &'static str> {
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or_default().trim());
    if text(header::CONTENT_ENCODING).is_some_and(|encoding| !encoding.eq_ignore_ascii_case("identity")) {
        return Err("compressed bodies are not supported: send the JSON as it is, without content-encoding");
    }
    let is_json = |kind: &str| {
        let essence = kind.split(';').next().unwrap_or_default().trim();
        essence.eq_ignore_ascii_case("application/json")
    };
    match text(header::CONTENT_TYPE) {
        Some(kind) if !is_json(kind) => Err("the body must be JSON: send it with content-type application/json"),
        Some(_) | None => Ok(()),
    }
}

/// The body as JSON whose bytes stay as they are. What it says is the worker's to judge.
fn json(body: &Bytes) -> Result<Box<RawValue>, ErrorBody> {
    let wrong = |message: String| ErrorBody::invalid_request(message, None, Some("malformed_json"));
    let body: Box<RawValue> = serde_json::from_slice(body).map_err(|error| {
        // serde_json's own text may quote the body; where and what kind is enough for the client.
        let kind = if error.is_eof() { "ends too early" } else { "is not JSON" };
        wrong(format!("the body {kind} (line {}, column {})", error.line(), error.column()))
    })?;
    if body.get().starts_with('{') { Ok(body) } else { Err(wrong("the body is not a JSON object".into())) }
}

/// The client's id for its request where it is one that can be logged, otherwise one of ours.
pub(super) fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(headers::REQUEST_ID).and_then(|id| id.to_str().ok());
    let loggable = |id: &&str| {
        !id.is_empty() && id.len() <= REQUEST_ID_CHARACTERS_MAX && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    given.filter(loggable).map_or_else(entropy::hex, str::to_owned)
}

/// Names of the models that workers of our revision serve now, with their lengths.
fn served(proxy: &Proxy) -> BTreeMap<String, Option<u32>> {
    let table = proxy.workers.table();
    let own = proxy.own(&table);
    (table.workers.iter())
        .filter_map(|worker| takes_work(own, worker).ok())
        .map(|status| (status.model.clone(), status.max_model_length))
        .collect()
}

fn model_json(id: &str, max_model_length: Option<u32>) -> serde_json::Value {
    // `created` is a field of OpenAI's that clients require; a model directory has no such date.
    serde_json::json!({
        "id": id, "object": "model", "created": 0, "owned_by": "baton", "max_model_len": max_model_length,
    })
}

/// `GET /v1/models`.
pub(super) fn models(proxy: &Proxy) -> Response {
    let data: Vec<_> = served(proxy).iter().map(|(id, length)| model_json(id, *length)).collect();
    respond::json(StatusCode::OK, serde_json::json!({ "object": "list", "data": data }).to_string().into())
}

/// `GET /v1/models/{id}`, `id` as it stands in the path: OpenAI's client writes a name's slashes as `%2F`.
pub(super) fn model(proxy: &Proxy, id: &str) -> Response {
    let id = percent_decode_str(id).decode_utf8_lossy();
    match served(proxy).get(&*id) {
        Some(length) => respond::json(StatusCode::OK, model_json(&id, *length).to_string().into()),
        None => {
            let id: String = id.chars().take(200).collect();
            let message = format!("the model {id:?} is not served here");
            let error = ErrorBody::invalid_request(message, Some("model"), Some("model_not_found"));
            respond::error(StatusCode::NOT_FOUND, &error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_request_id_is_kept_where_it_can_be_logged() {
        let check = |given: &'static [u8], kept: bool| {
            let mut headers = HeaderMap::new();
            headers.insert(headers::REQUEST_ID, HeaderValue::from_bytes(given).expect("a header value"));
            let id = request_id(&headers);
            assert_eq!(id.as_bytes() == given, kept, "{id}");
            assert!(!id.is_empty());
        };
        check(b"req-1", true);
        check(b"", false);
        check(b"a b", false);
        check("é".as_bytes(), false);
        check(&[b'x'; REQUEST_ID_CHARACTERS_MAX + 1], false);
    }

    #[test]
    fn only_json_as_it_stands_is_read() {
        let check = |name: header::HeaderName, value: &'static str, taken: bool| {
            let headers = HeaderMap::from_iter([(name, HeaderValue::from_static(value))]);
            assert_eq!(media_type(&headers).is_ok(), taken, "{value}");
        };
        check(header::CONTENT_TYPE, "application/json", true);
        check(header::CONTENT_TYPE, "Application/JSON; charset=utf-8", true);
        check(header::CONTENT_TYPE, "text/plain", false);
        check(header::CONTENT_TYPE, "application/x-www-form-urlencoded", false);
        check(header::CONTENT_TYPE, "", false);
        check(header::CONTENT_ENCODING, "identity", true);
        check(header::CONTENT_ENCODING, "gzip", false);
        assert!(media_type(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn a_body_that_is_no_object_is_refused_without_quoting_it() {
        let check = |body: &'static str, expect: &str| {
            let error = json(&Bytes::from_static(body.as_bytes())).expect_err("no object").error;
            assert!(error.message.contains(expect) && !error.message.contains("secret"), "{}", error.message);
        };
        check("", "ends too early");
        check("{\"prompt\": \"secret", "ends too early");
        check("secret", "is not JSON");
        check("[\"secret\"]", "not a JSON object");
        assert!(json(&Bytes::from_static(b" {\"a\": 1} ")).is_ok());
    }
}
