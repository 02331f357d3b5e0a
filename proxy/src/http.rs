//! The two HTTP servers: which path is served by what. Everything about HTTP itself is in the files below this one; what a
//! request means is decided elsewhere.

pub(crate) mod admin;
mod body;
mod client;
mod engines;
mod framing;
mod http2;
pub(crate) mod kv_events;
mod leg;
mod preface;
mod respond;
pub(crate) mod serve;
mod stall;
mod stream;

use crate::admission::{self, Admit, Class, Shed};
use crate::api::{Api, PassThrough};
use crate::api_keys::Tenant;
use crate::connector::Connector;
use crate::drain::Work;
use crate::eligible::is_ready;
use crate::metrics::Limit;
use crate::proxy::Proxy;
use crate::status::{self, NONCE_CHARACTERS_MAX};
use baton_wire::ErrorBody;
use baton_wire::names::{headers, paths};
use baton_wire::render::Endpoint;
use body::Body;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use hyper::body::Incoming;
use std::sync::Arc;
use std::time::Duration;

type Request = http::Request<Incoming>;
type Response = http::Response<Body>;

/// How long a client's request may wait for room: longer, and whoever waits for it has begun to doubt.
const ROOM_TIMEOUT: Duration = Duration::from_secs(30);

/// A header by which a client puts its request into a lower class than its key has; a higher one it can't get.
const PRIORITY: &str = "x-baton-priority";

/// Lets a leg in that has found room, unless the proxy drains; the refusal is counted.
fn admit_leg(proxy: &Proxy) -> Result<Work, Box<Response>> {
    let (limit, refusal) = match proxy.admit_leg() {
        _ if proxy.drain.is_draining() => (Limit::Draining, respond::draining()),
        None => (Limit::InFlight, respond::too_many(None)),
        Some(work) => return Ok(work),
    };
    proxy.metrics.refused(limit);
    Err(Box::new(refusal))
}

/// Whose request it is, where its key is good.
fn authenticate(proxy: &Proxy, headers: &HeaderMap) -> Result<Arc<Tenant>, Box<Response>> {
    proxy.tenant(headers).ok_or_else(|| {
        proxy.metrics.refused(Limit::ApiKey);
        Box::new(respond::no_key())
    })
}

/// Lets a client's request in: with a good key, when it is its turn. A refusal is counted.
async fn admit(proxy: &Proxy, headers: &HeaderMap) -> Result<(Work, Arc<Tenant>), Box<Response>> {
    let refused = |limit: Limit, refusal| {
        proxy.metrics.refused(limit);
        Err(Box::new(refusal))
    };
    if proxy.drain.is_draining() {
        return refused(Limit::Draining, respond::draining());
    }
    let tenant = authenticate(proxy, headers)?;
    let asked = headers.get(PRIORITY).and_then(|class| class.to_str().ok()?.parse::<Class>().ok());
    let bytes = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let request = admission::Request {
        class: asked.map_or(tenant.priority, |class| class.min(tenant.priority)),
        tenant: Arc::clone(&tenant.name),
        tenant_in_flight_max: tenant.in_flight_max,
        cost: 1,
        bytes: bytes.unwrap_or(0),
    };
    let permit = match proxy.admission.enter(request) {
        Admit::Entered(permit) => permit,
        Admit::Queued(waiting) => match tokio::time::timeout(ROOM_TIMEOUT, waiting).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(Shed { retry_after })) => return refused(Limit::InFlight, respond::too_many(Some(retry_after))),
            Err(_) => return refused(Limit::QueueTime, respond::too_many(None)),
        },
        Admit::Shed(Shed { retry_after }) => return refused(Limit::InFlight, respond::too_many(Some(retry_after))),
    };
    // It may have waited past the beginning of the end.
    if proxy.drain.is_draining() {
        return refused(Limit::Draining, respond::draining());
    }
    Ok((proxy.client_work(permit), tenant))
}

/// What a path of the proxy's port leads to.
enum Route<'a> {
    Completion(Endpoint),
    /// An interface of an engine that is not ours.
    Engine(Api),
    PassThrough(PassThrough),
    Models,
    Model(&'a str),
    Health,
    Ready,
    Status,
    KvEvents,
    Leg(&'static str),
}

impl<'a> Route<'a> {
    fn of(connector: Connector, path: &'a str) -> Option<Self> {
        if connector != Connector::Baton {
            if let Some(api) = Api::of_path(path) {
                return Some(Route::Engine(api));
            }
            if let Some(api) = PassThrough::of_path(path) {
                return Some(Route::PassThrough(api));
            }
        }
        Some(match path {
            paths::CHAT_COMPLETIONS => Route::Completion(Endpoint::Chat),
            paths::COMPLETIONS => Route::Completion(Endpoint::Completions),
            paths::MODELS => Route::Models,
            paths::HEALTH => Route::Health,
            paths::READY => Route::Ready,
            paths::STATUS => Route::Status,
            paths::RENDER | paths::PREFILL_LEG | paths::DECODE_LEG | paths::KV_EVENTS
                if connector != Connector::Baton =>
            {
                return None;
            }
            paths::KV_EVENTS => Route::KvEvents,
            paths::RENDER => Route::Leg(paths::RENDER),
            paths::PREFILL_LEG => Route::Leg(paths::PREFILL_LEG),
            paths::DECODE_LEG => Route::Leg(paths::DECODE_LEG),
            path => Route::Model(path.strip_prefix(paths::MODELS)?.strip_prefix('/')?),
        })
    }

    const fn method(&self) -> Method {
        match self {
            Route::Completion(_) | Route::Engine(_) | Route::PassThrough(_) | Route::Leg(_) => Method::POST,
            Route::Models | Route::Model(_) | Route::Health | Route::Ready | Route::Status | Route::KvEvents => {
                Method::GET
            }
        }
    }
}

/// Serves the port of clients and of other pods' proxies.
pub(crate) async fn proxy_port(proxy: Arc<Proxy>, request: Request) -> Response {
    let uri = request.uri().clone();
    let path = uri.path();
    let Some(route) = Route::of(proxy.connector, path) else {
        return respond::no_such_path(request.method(), path);
    };
    if request.method() != route.method() {
        return respond::wrong_method(request.method(), route.method());
    }
    match route {
        // A leg of another pod's proxy is for the engine of this pod, and never sent on again.
        Route::Engine(api) if !request.headers().contains_key(headers::LEG) => {
            engines::generate(proxy, api, request).await
        }
        // hyper moves this future three times for each request, so the state of the other routes is kept out of it.
        other => Box::pin(served(proxy, other, request)).await,
    }
}

async fn served(proxy: Arc<Proxy>, route: Route<'_>, request: Request) -> Response {
    match route {
        Route::Completion(endpoint) => client::completion(proxy, endpoint, request).await,
        Route::Engine(api) => leg::serve(proxy, api.path(), request).await,
        Route::PassThrough(api) if request.headers().contains_key(headers::LEG) => {
            leg::serve(proxy, api.path(), request).await
        }
        Route::PassThrough(api) => engines::pass_through(proxy, api, request).await,
        Route::Leg(path) => leg::serve(proxy, path, request).await,
        Route::Models => match authenticate(&proxy, request.headers()) {
            Ok(_) => client::models(&proxy),
            Err(refusal) => *refusal,
        },
        Route::Model(id) => match authenticate(&proxy, request.headers()) {
            Ok(_) => client::model(&proxy, id),
            Err(refusal) => *refusal,
        },
        Route::Health => respond::text(StatusCode::OK, "ok\n"),
        Route::Ready => ready(&proxy),
        // Other pods' proxies have no key of a client's, and sign that they ask.
        Route::Status if proxy.has_keys() && !leg::is_signed(&proxy, paths::STATUS, request.headers()) => {
            match authenticate(&proxy, request.headers()) {
                Ok(_) => status(&proxy, &request).await,
                Err(refusal) => *refusal,
            }
        }
        Route::Status => status(&proxy, &request).await,
        Route::KvEvents => kv_events::serve(&proxy, &request).await,
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
