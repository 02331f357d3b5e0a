//! The proxy's HTTP side: one server, one client, and what happens to a request between them.

use super::fault::{Effect, Held, WatchFault};
use super::request::{ApiRequest, Verb};
use super::{Shared, State};
use anyhow::{Context, Result, ensure};
use futures_util::stream;
use http::header::{ACCEPT, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, RETRY_AFTER};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::Connect;
use hyper_util::rt::{TokioExecutor, TokioIo};
use kube::client::ConfigExt as _;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::broadcast;

/// Longest message that is kept of an error: the API server's own stay below it but for lists of many fields.
const MESSAGE_CHARS_MAX: usize = 400;

type Body = UnsyncBoxBody<Bytes, Broken>;

/// An answer to a list, kept to be given again.
#[derive(Clone)]
pub(super) struct Remembered {
    headers: HeaderMap,
    body: Bytes,
}

/// Why a connection is closed instead of answered: on purpose, or because the other side broke.
#[derive(Debug)]
struct Broken(String);

impl Broken {
    fn on_purpose() -> Self {
        Broken("closed by the fault proxy".to_owned())
    }

    fn by(error: impl std::fmt::Display) -> Self {
        Broken(error.to_string())
    }
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Broken {}

/// Where requests go.
struct Upstream<C> {
    client: Client<C, Full<Bytes>>,
    scheme: Scheme,
    authority: Authority,
}

/// Listens on a free port of loopback and serves until the runtime ends.
pub(super) async fn serve(shared: Arc<Shared>, upstream: &kube::Config) -> Result<SocketAddr> {
    let uri = upstream.cluster_url.clone();
    let (scheme, authority) = (uri.scheme().cloned(), uri.authority().cloned());
    ensure!(uri.path().trim_matches('/').is_empty(), "an API server below a path is not supported: {uri}");
    let mut anonymous = upstream.clone();
    anonymous.auth_info = kube::config::AuthInfo::default();
    let connector = anonymous.rustls_https_connector().context("TLS to the API server")?;
    let upstream = Arc::new(Upstream {
        client: Client::builder(TokioExecutor::new()).build(connector),
        scheme: scheme.context("the API server's URL has a scheme")?,
        authority: authority.context("the API server's URL has a host")?,
    });
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("listen")?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (shared, upstream) = (shared.clone(), upstream.clone());
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request| {
                    let (shared, upstream) = (shared.clone(), upstream.clone());
                    async move { exchange(&shared, &upstream, request).await }
                });
                // A connection that breaks is the client's end, or what was asked for.
                let _ =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    Ok(address)
}

async fn exchange<C: Connect + Clone + Send + Sync + 'static>(
    shared: &Shared,
    upstream: &Upstream<C>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Broken> {
    let (head, body) = request.into_parts();
    let asked = ApiRequest::read(&head.method, &head.uri);
    // Read whole before anything is decided, so that a write is either passed on entirely or not at all.
    let body = body.collect().await.map_err(Broken::by)?.to_bytes();
    let (number, effect, held) = shared.arrived(asked.clone());
    if let Held::Before = held {
        shared.answered(number, None, String::new(), true);
        return std::future::pending().await;
    }
    let injected = |code: Option<u16>| shared.answered(number, code, String::new(), true);
    match effect {
        Some(Effect::Answer(code)) => {
            injected(Some(code));
            return Ok(refusal(code));
        }
        Some(Effect::Drop) => {
            injected(None);
            return Err(Broken::on_purpose());
        }
        Some(Effect::StaleList) if asked.verb == Verb::List && !asked.continues() => {
            let remembered = shared.state().lists.get(&remembered_key(&asked, &head.headers)).cloned();
            if let Some(Remembered { headers, body }) = remembered {
                injected(Some(200));
                let mut response = Response::new(whole(body));
                *response.headers_mut() = headers;
                return Ok(response);
            }
        }
        Some(Effect::ExpiredWatch) if asked.verb == Verb::Watch => {
            injected(Some(200));
            let mut response = Response::new(whole(expired()));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            return Ok(response);
        }
        Some(Effect::Delay(time)) => tokio::time::sleep(time).await,
        Some(Effect::AnswerAfter(_) | Effect::DropAfter | Effect::StaleList | Effect::ExpiredWatch) | None => {}
    }

    let key = remembered_key(&asked, &head.headers);
    let response = upstream.forward(head, body).await.inspect_err(|error| {
        shared.answered(number, None, error.to_string(), false);
    })?;
    let (head, body) = response.into_parts();
    let code = head.status.as_u16();
    if asked.verb == Verb::Watch && head.status.is_success() {
        shared.answered(number, Some(code), String::new(), false);
        return Ok(Response::from_parts(head, watched(body, shared.watches.subscribe())));
    }
    let body = body.collect().await.map_err(Broken::by)?.to_bytes();
    if let Held::After = held {
        shared.answered(number, None, String::new(), true);
        shared.holds(number);
        return std::future::pending().await;
    }
    match effect {
        Some(Effect::AnswerAfter(code)) => {
            injected(Some(code));
            return Ok(refusal(code));
        }
        Some(Effect::DropAfter) => {
            injected(None);
            return Err(Broken::on_purpose());
        }
        Some(Effect::Answer(_) | Effect::Drop | Effect::Delay(_) | Effect::StaleList | Effect::ExpiredWatch) | None => {
        }
    }
    shared.answered(number, Some(code), message(head.status, &body), false);
    if asked.verb == Verb::List && head.status.is_success() && !asked.continues() {
        let mut state = shared.state();
        let State { remembers_lists, lists, .. } = &mut *state;
        if *remembers_lists {
            lists.insert(key, Remembered { headers: head.headers.clone(), body: body.clone() });
        }
    }
    Ok(Response::from_parts(head, whole(body)))
}

impl<C: Connect + Clone + Send + Sync + 'static> Upstream<C> {
    async fn forward(&self, mut head: http::request::Parts, body: Bytes) -> Result<Response<Incoming>, Broken> {
        let mut uri = Uri::builder().scheme(self.scheme.clone()).authority(self.authority.clone());
        uri = uri.path_and_query(head.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/")));
        head.uri = uri.build().map_err(Broken::by)?;
        head.headers.remove(HOST);
        self.client.request(Request::from_parts(head, Full::new(body))).await.map_err(Broken::by)
    }
}

/// A list of whole objects and one of their metadata have the same path and differ in what the client accepts.
fn remembered_key(asked: &ApiRequest, headers: &HeaderMap) -> String {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    format!("{accept} {}", asked.list_key())
}

fn whole(body: Bytes) -> Body {
    Full::new(body).map_err(|never| match never {}).boxed_unsync()
}

/// What an API server, or a balancer before it, says with this code.
fn refusal(code: u16) -> Response<Body> {
    let reason = match code {
        409 => "Conflict",
        410 => "Expired",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    let status = status_object(code, reason);
    let mut response = Response::new(whole(status.to_string().into()));
    *response.status_mut() = StatusCode::from_u16(code).expect("tests inject codes that exist");
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if code == 429 {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

fn status_object(code: u16, reason: &str) -> serde_json::Value {
    serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "injected by the fault proxy", "reason": reason, "code": code,
    })
}

/// The event with which a watch ends whose version is too old.
fn expired() -> Bytes {
    let event = serde_json::json!({"type": "ERROR", "object": status_object(410, "Expired")});
    format!("{event}\n").into()
}

/// A watch's events as they come, until it is told otherwise.
fn watched(body: Incoming, faults: broadcast::Receiver<WatchFault>) -> Body {
    let events = stream::unfold(Some((body, faults, false)), |state| async move {
        let (mut body, mut faults, mut is_silent) = state?;
        loop {
            tokio::select! {
                fault = faults.recv() => match fault {
                    Ok(WatchFault::Cut) => return Some((Err(Broken::on_purpose()), None)),
                    Ok(WatchFault::End) => return None,
                    Ok(WatchFault::Expire) => return Some((Ok(Frame::data(expired())), None)),
                    Ok(WatchFault::Silence) => is_silent = true,
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                },
                frame = body.frame() => match frame {
                    Some(Ok(_)) if is_silent => {}
                    Some(Ok(frame)) => return Some((Ok(frame), Some((body, faults, is_silent)))),
                    Some(Err(error)) => return Some((Err(Broken::by(error)), None)),
                    None => return None,
                },
            }
        }
    });
    StreamBody::new(events).boxed_unsync()
}

fn message(status: StatusCode, body: &Bytes) -> String {
    if status.is_success() {
        return String::new();
    }
    let told = serde_json::from_slice::<serde_json::Value>(body).ok();
    let told = told.as_ref().and_then(|status| status["message"].as_str());
    let text = told.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
    text.chars().take(MESSAGE_CHARS_MAX).collect()
}
