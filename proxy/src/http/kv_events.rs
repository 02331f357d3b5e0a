//! `/kv-events` on the proxy's port: what this pod's engine tells of its prefix cache, for other pods' proxies alone. Its bytes go on as
//! they come; a draining pod ends the stream, because what its cache holds is of no use to anybody then.

use super::body::Body;
use super::{Request, Response, leg, respond};
use crate::proxy::Proxy;
use crate::status::StatusError;
use crate::upstream::{self, Request as UpstreamRequest, UpstreamError, by};
use baton_wire::ErrorBody;
use baton_wire::names::paths;
use bytes::Bytes;
use http::StatusCode;
use http::uri::PathAndQuery;
use http_body::Frame;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_util::sync::WaitForCancellationFutureOwned;

/// How long the engine may take for the head of its answer.
const HEAD_TIMEOUT: Duration = Duration::from_secs(4);

/// Bytes of a query: a number, 32 digits and two names.
const QUERY_BYTES_MAX: usize = 128;

/// `GET /kv-events`.
pub(super) async fn serve(proxy: &Proxy, request: &Request) -> Response {
    if !leg::is_signed(proxy, paths::KV_EVENTS, request.headers()) {
        return respond::unauthorised("KV events are for other pods' proxies of this model");
    }
    let table = proxy.workers.table();
    let Some(engine) = table.own().map(|own| &own.upstream) else {
        return respond::no_status(&StatusError::NoEngine);
    };
    if proxy.drain.is_draining() {
        return respond::draining();
    }
    let Ok(permit) = Arc::clone(&proxy.kv_event_slots).try_acquire_owned() else { return respond::too_many(None) };
    let query = request.uri().query().filter(|query| query.len() <= QUERY_BYTES_MAX);
    let mut asked = UpstreamRequest::get(paths::KV_EVENTS);
    if let Some(query) = query {
        asked.path = PathAndQuery::try_from(format!("{}?{query}", paths::KV_EVENTS)).expect("it was a query before");
    }
    match by(Instant::now() + HEAD_TIMEOUT, engine.address(), engine.send(&asked)).await {
        Ok(answer) => {
            let draining = Box::pin(proxy.drain.begun());
            let mut response = Response::new(Body::KvEvents(Box::new(KvEvents {
                body: Some(answer.body),
                draining,
                _permit: permit,
            })));
            *response.status_mut() = answer.status;
            *response.headers_mut() = respond::for_client(answer.headers);
            response
        }
        Err(error) => {
            let body = ErrorBody::server_error(error.to_string(), Some("engine_unreachable"));
            respond::error(StatusCode::BAD_GATEWAY, &body)
        }
    }
}

/// The engine's lines on their way to another pod's proxy.
#[derive(Debug)]
pub(crate) struct KvEvents {
    /// Gone once the pod drains, and with it the connection to the engine.
    body: Option<upstream::Body>,
    draining: Pin<Box<WaitForCancellationFutureOwned>>,
    _permit: OwnedSemaphorePermit,
}

impl http_body::Body for KvEvents {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        if self.draining.as_mut().poll(cx).is_ready() {
            self.body = None;
        }
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }
}
