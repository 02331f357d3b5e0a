//! Clients' requests for engines that are not ours, at the edge: admitted, read, scanned where they lie, handed to the pipeline.

use super::body;
use super::client::{answer_client, media_type, request_id, unread};
use super::{Request, Response, respond};
use crate::account::Account;
use crate::api::{self, Api, PassThrough};
use crate::api_keys;
use crate::choose::{self, Prefix};
use crate::connector::Connector;
use crate::drain::Work;
use crate::entropy;
use crate::failure::Failure;
use crate::forward;
use crate::json::scan::{DEPTH_MAX, Fault, Object, ScanError, scan};
use crate::json::splice::{Change, splice};
use crate::pipeline::engines::{self, Ask, Prefiller, Says, Tenant};
use crate::proxy::Proxy;
use crate::trace::Trace;
use baton_wire::ErrorBody;
use baton_wire::names::headers;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::time::Instant;

/// A request with a prefill and a decode phase.
pub(super) async fn generate(proxy: Arc<Proxy>, api: Api, request: Request) -> Response {
    let arrived = Instant::now();
    let id = request_id(request.headers());
    let id_value = HeaderValue::from_str(&id).expect("a request id is checked to be visible ASCII");
    let mut response = match super::admit(&proxy, request.headers()).await {
        Err(refusal) => *refusal,
        Ok((work, tenant)) => {
            let trace = Trace::of(request.headers());
            let mut account = Account::open(Arc::clone(&proxy), id.clone(), api.as_str(), arrived, trace.clone());
            let (head, incoming) = request.into_parts();
            match read(&proxy, &head.headers, incoming).await {
                Err(response) => refused(account, *response),
                Ok(body) => match ask(&proxy, &tenant, api, id, id_value.clone(), trace, &head.headers, &body, arrived)
                {
                    Err(response) => refused(account, *response),
                    Ok(ask) => match engines::run(&proxy, ask, &mut account).await {
                        Ok(answer) => answer_client(&proxy, work, account, answer),
                        Err(failure) => {
                            tracing::debug!(cause = std::error::Error::source(&failure), "{failure}");
                            refused(account, respond::failed(failure))
                        }
                    },
                },
            }
        }
    };
    response.headers_mut().insert(headers::REQUEST_ID, id_value);
    response
}

/// A request without a decode phase: one worker serves it as it came.
pub(super) async fn pass_through(proxy: Arc<Proxy>, api: PassThrough, request: Request) -> Response {
    let arrived = Instant::now();
    let id = request_id(request.headers());
    let id_value = HeaderValue::from_str(&id).expect("a request id is checked to be visible ASCII");
    let mut response = match super::admit(&proxy, request.headers()).await {
        Err(refusal) => *refusal,
        Ok((work, _tenant)) => passed(&proxy, work, api, id, id_value.clone(), request, arrived).await,
    };
    response.headers_mut().insert(headers::REQUEST_ID, id_value);
    response
}

async fn passed(
    proxy: &Arc<Proxy>,
    work: Work,
    api: PassThrough,
    id: String,
    id_value: HeaderValue,
    request: Request,
    arrived: Instant,
) -> Response {
    let trace = Trace::of(request.headers());
    let mut account = Account::open(Arc::clone(proxy), id.clone(), "pass-through", arrived, trace);
    let (head, incoming) = request.into_parts();
    let body = match read(proxy, &head.headers, incoming).await {
        Err(response) => return refused(account, *response),
        Ok(body) => body,
    };
    let mut given = forward::for_engine(&head.headers);
    given.insert(headers::REQUEST_ID, id_value);
    match engines::pass::run(proxy, api.path(), &id, given, body, arrived, &mut account).await {
        Ok(answer) => answer_client(proxy, work, account, answer),
        Err(failure) => refused(account, respond::failed(failure)),
    }
}

fn refused(mut account: Account, response: Response) -> Response {
    account.answer(response.status());
    account.end();
    response
}

async fn read(proxy: &Proxy, given: &HeaderMap, incoming: hyper::body::Incoming) -> Result<Bytes, Box<Response>> {
    let body = body::read(given, incoming, proxy.limits.body_bytes_max, super::client::BODY_TIMEOUT).await;
    let body = body.map_err(|error| Box::new(unread(proxy, &error)))?;
    media_type(given).map_err(|message| Box::new(respond::wrong_media_type(message)))?;
    Ok(body)
}

#[allow(clippy::too_many_arguments)] // What a request is made of; each is named where it is used.
fn ask(
    proxy: &Proxy,
    tenant: &api_keys::Tenant,
    api: Api,
    id: String,
    id_value: HeaderValue,
    trace: Option<Arc<Trace>>,
    given: &HeaderMap,
    body: &Bytes,
    arrived: Instant,
) -> Result<Ask, Box<Response>> {
    let object =
        scan(body, DEPTH_MAX).map_err(|error| Box::new(respond::error(StatusCode::BAD_REQUEST, &malformed(&error))))?;
    let mut headers = forward::for_engine(given);
    headers.insert(headers::REQUEST_ID, id_value);
    let hints = forward::hints(given, proxy.trust_routing_hints);
    let object = if tenant.is_known() { salted(object, tenant) } else { object };
    let tenant = Tenant { name: Arc::clone(&tenant.name), salt: tenant.salt.as_u64() };
    let (says, prefix) = {
        let read = api::Hints::read(api, &object);
        let says = Says::of(proxy.connector, &read, choose::adapter(proxy, &read), &tenant, hints.session.as_deref());
        let blocks = match proxy.connector {
            Connector::VllmNixl => choose::blocks(proxy, &read, api::token_ids(api, &object)),
            Connector::Baton | Connector::Sglang => Vec::new(),
        };
        let prefix = Prefix { chunks: choose::chunks(proxy, &read, &tenant), blocks, said: None };
        (says, prefix)
    };
    let deadline = arrived + proxy.limits.request_timeout;
    let prefiller = prefiller(proxy, given).map_err(|failure| Box::new(respond::failed(failure)))?;
    Ok(Ask { id, api, object, says, headers, trace, hints, prefiller, tenant, prefix, deadline })
}

/// The header in which llm-d's scheduler names prefill workers.
const PREFILLER: &str = "x-prefiller-host-port";

/// The prefill worker that a header names, where this proxy goes by it: by address and port, and only an allowed one.
#[allow(clippy::result_large_err)] // A failure ends its request, and is made once.
fn prefiller(proxy: &Proxy, given: &HeaderMap) -> Result<Prefiller, Failure> {
    let Some(by_header) = &proxy.prefiller_header else { return Ok(Prefiller::Chosen) };
    let refused = |why: &str| Failure::WorkerNotAllowed { header: PREFILLER, why: why.to_owned() };
    let mut named = Vec::new();
    for value in given.get_all(PREFILLER) {
        let text = value.to_str().map_err(|_| refused("it is no text"))?;
        named.extend(text.split(',').map(str::trim).filter(|one| !one.is_empty()));
    }
    let place = if by_header.sample { entropy::quick() as usize % named.len().max(1) } else { 0 };
    let Some(target) = named.get(place) else { return Ok(Prefiller::None) };
    let target: SocketAddr = target.parse().map_err(|_| refused("it is not IP:PORT"))?;
    if !by_header.allows(target) {
        return Err(refused("it is not among those of --allow-prefiller"));
    }
    Ok(Prefiller::At(target.to_string().parse().expect("a socket's address is an address")))
}

/// The body with a salt by which engines keep the prefix caches of tenants apart: the tenant's, and the client's own within it.
fn salted(object: Object, tenant: &api_keys::Tenant) -> Object {
    let own = object.as_str("cache_salt").unwrap_or_default();
    let salt = serde_json::Value::String(format!("{}{own}", tenant.salt)).to_string();
    let body = splice(&object, &[("cache_salt", Change::Set(salt.as_bytes()))]);
    scan(&body, DEPTH_MAX).expect("a member set in an object leaves an object")
}

fn malformed(error: &ScanError) -> ErrorBody {
    let code = match error.fault {
        Fault::TooDeep => "json_too_deep",
        _ => "malformed_json",
    };
    ErrorBody::invalid_request(error.to_string(), None, Some(code))
}
