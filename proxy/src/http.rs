//! The two HTTP servers: which path is served by what. Everything about HTTP itself is in the files below this one; what a
//! request means is decided elsewhere.

pub(crate) mod admin;
mod body;
mod client;
mod leg;
mod respond;
pub(crate) mod serve;
mod stall;
mod stream;

use crate::drain::Work;
use crate::eligible::is_ready;
use crate::metrics::Limit;
use crate::proxy::Proxy;
use crate::status::{self, NONCE_CHARACTERS_MAX};
use baton_wire::ErrorBody;
use baton_wire::names::{headers, paths};
use baton_wire::render::Endpoint;
use body::Body;
use http::{HeaderValue, Method, StatusCode};
use hyper::body::Incoming;
use std::sync::Arc;

type Request = http::Request<Incoming>;
type Response = http::Response<Body>;

/// Lets work in that has found room, unless the proxy drains; the refusal is counted.
fn admit(proxy: &Proxy, room: Option<Work>) -> Result<Work, Box<Response>> {
    let (limit, refusal) = match room {
        _ if proxy.drain.is_draining() => (Limit::Draining, respond::draining()),
        None => (Limit::InFlight, respond::too_many()),
        Some(work) => return Ok(work),
    };
    proxy.metrics.refused(limit);
    Err(Box::new(refusal))
}

/// What a path of the proxy's port leads to.
enum Route<'a> {
    Completion(Endpoint),
    Models,
    Model(&'a str),
    Health,
    Ready,
    Status,
    Leg(&'static str),
}

impl<'a> Route<'a> {
    fn of(path: &'a str) -> Option<Self> {
        Some(match path {
            paths::CHAT_COMPLETIONS => Route::Completion(Endpoint::Chat),
            paths::COMPLETIONS => Route::Completion(Endpoint::Completions),
            paths::MODELS => Route::Models,
            paths::HEALTH => Route::Health,
            paths::READY => Route::Ready,
            paths::STATUS => Route::Status,
            paths::RENDER => Route::Leg(paths::RENDER),
            paths::PREFILL_LEG => Route::Leg(paths::PREFILL_LEG),
            paths::DECODE_LEG => Route::Leg(paths::DECODE_LEG),
            path => Route::Model(path.strip_prefix(paths::MODELS)?.strip_prefix('/')?),
        })
    }

    const fn method(&self) -> Method {
        match self {
            Route::Completion(_) | Route::Leg(_) => Method::POST,
            Route::Models | Route::Model(_) | Route::Health | Route::Ready | Route::Status => Method::GET,
        }
    }
}

/// Serves the port of clients and of other pods' proxies.
pub(crate) async fn proxy_port(proxy: Arc<Proxy>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let Some(route) = Route::of(&path) else {
        return respond::no_such_path(request.method(), &path);
    };
    if request.method() != route.method() {
        return respond::wrong_method(request.method(), route.method());
    }
    match route {
        Route::Completion(endpoint) => client::completion(proxy, endpoint, request).await,
        Route::Leg(path) => leg::serve(proxy, path, request).await,
        Route::Models => client::models(&proxy),
        Route::Model(id) => client::model(&proxy, id),
        Route::Health => respond::text(StatusCode::OK, "ok\n"),
        Route::Ready => ready(&proxy),
        Route::Status => status(&proxy, &request).await,
    }
}

fn ready(proxy: &Proxy) -> Response {
    let table = proxy.workers.table();
    if proxy.drain.is_draining() {
        respond::text(StatusCode::SERVICE_UNAVAILABLE, "draining\n")
    } else if is_ready(proxy.own(&table), &table) {
        respond::text(StatusCode::OK, "ready\n")
    } else if table.own().is_some() {
        respond::text(StatusCode::SERVICE_UNAVAILABLE, "the engine of this pod takes no work\n")
    } else {
        respond::text(StatusCode::SERVICE_UNAVAILABLE, "no decode worker is ready\n")
    }
}

async fn status(proxy: &Proxy, request: &Request) -> Response {
    let nonce = request.headers().get(headers::STATUS_NONCE).map(HeaderValue::to_str);
    // Signing whatever a stranger sends, of any length, would lend the key out; a nonce is 32 hexadecimal digits.
    let nonce = match nonce {
        None => None,
        Some(Ok(nonce)) if nonce.len() <= NONCE_CHARACTERS_MAX && nonce.bytes().all(|c| c.is_ascii_hexdigit()) => {
            Some(nonce)
        }
        Some(_) => {
            let message = format!("{} is {NONCE_CHARACTERS_MAX} hexadecimal digits", headers::STATUS_NONCE);
            let error = ErrorBody::invalid_request(message, Some(headers::STATUS_NONCE), None);
            return respond::error(StatusCode::BAD_REQUEST, &error);
        }
    };
    match status::relay(proxy, nonce).await {
        Ok(relayed) => {
            let mut response = respond::json(StatusCode::OK, relayed.body);
            if let Some(signature) = relayed.signature {
                let signature = HeaderValue::from_str(&signature).expect("base64url is a header value");
                response.headers_mut().insert(headers::STATUS_SIGNATURE, signature);
            }
            response
        }
        Err(error) => respond::no_status(&error),
    }
}
