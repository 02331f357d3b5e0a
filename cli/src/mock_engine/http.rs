//! The HTTP edge: connections, paths, and what a contract decides as an answer.

mod body;
mod wire;

use self::body::Body;
use self::wire::{Cut, Wire};
use super::api::Api;
use super::args::Contract;
use super::ask::Ask;
use super::call::{Call, Outcome, Refusal, injected};
use super::engine::{Engine, Work};
use super::fail::{Failure, Spec, StallAt};
use super::ledger::{self, Head};
use super::leg::Leg;
use super::probe::{self, Told};
use super::rule::Rule;
use super::{ours, sglang, vllm};
use baton_wire::names::paths;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};

/// Bytes of a request's body at most: sixteen times the largest prompt that tests send.
const BODY_BYTES_MAX: usize = 64 << 20;

/// How long to wait when no connection can be accepted, before it is tried again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Serves HTTP until the process ends.
pub(crate) async fn serve(listener: TcpListener, engine: Arc<Engine>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if engine.fails().refuses() => drop(stream),
            Ok((stream, _)) => {
                tokio::spawn(connection(stream, Arc::clone(&engine)));
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn connection(stream: TcpStream, engine: Arc<Engine>) {
    // Or each event would wait for the acknowledgement of the one before: 40 ms, which no engine takes.
    let _ = stream.set_nodelay(true);
    let cut = Arc::new(Cut::default());
    let wire = Wire::new(stream, Arc::clone(&cut));
    let age = engine.age();
    let service = service_fn(move |request| {
        let (engine, cut) = (Arc::clone(&engine), Arc::clone(&cut));
        async move {
            if engine.age() != age {
                // As an engine does that has just closed an idle connection: what was on its way is not read.
                engine.closes_stale();
                cut.after(0);
                return Ok(Response::new(Body::whole(String::new())));
            }
            Ok::<_, Infallible>(answer(&engine, &cut, request).await)
        }
    });
    // A connection ends when either side wants no more of it, or a failure ends it.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(wire), service).await;
}

/// What a path is for.
enum Route {
    Generate(Api),
    Ours(Leg),
    Probe,
    Mock,
}

fn route(engine: &Engine, method: &Method, path: &str) -> Route {
    let is_post = method == Method::POST;
    match (path, Api::of(path)) {
        (_, Some(api)) if is_post => Route::Generate(api),
        (paths::RENDER, _) if is_post && engine.args.contract == Contract::Baton => Route::Ours(Leg::Render),
        (paths::PREFILL_LEG, _) if is_post && engine.args.contract == Contract::Baton => Route::Ours(Leg::Prefill),
        (paths::DECODE_LEG, _) if is_post && engine.args.contract == Contract::Baton => Route::Ours(Leg::Decode),
        (path, _) if path.starts_with("/mock/") => Route::Mock,
        _ => Route::Probe,
    }
}

async fn answer(engine: &Arc<Engine>, cut: &Cut, request: Request<Incoming>) -> Response<Body> {
    let (parts, incoming) = request.into_parts();
    let Ok(body) = Limited::new(incoming, BODY_BYTES_MAX).collect().await else {
        return refused(&Refusal::new(413, format!("the body breaks off, or has more than {BODY_BYTES_MAX} bytes")));
    };
    let body = body.to_bytes();
    match route(engine, &parts.method, parts.uri.path()) {
        Route::Generate(api) => generate(engine, cut, api, parts, body).await,
        Route::Ours(leg) => leg_of_ours(engine, cut, leg, parts, body).await,
        Route::Mock => mock(engine, &parts, &body),
        Route::Probe => probed(engine, cut, parts, body).await,
    }
}

/// The request as the ledger shows it. The headers are copied, since the contract needs them too: a map of ten is cheap
/// beside reading a body.
fn head(number: u64, leg: Leg, parts: &Parts, body: &Bytes) -> Head {
    Head {
        number,
        leg,
        method: parts.method.clone(),
        target: parts.uri.to_string(),
        headers: parts.headers.clone(),
        body: ledger::Body::Kept(body.clone()),
    }
}

async fn generate(engine: &Arc<Engine>, cut: &Cut, api: Api, parts: Parts, body: Bytes) -> Response<Body> {
    let number = engine.next_number();
    let ask = Ask::read(&body);
    let raw = ask.as_ref().ok().and_then(|ask| ask.kv_transfer_params);
    let mut read = vllm::read(raw, engine.args.role);
    let leg = match engine.args.contract {
        Contract::Vllm => read.leg,
        Contract::Sglang => sglang::leg(engine.args.role),
        Contract::Baton => Leg::Plain,
    };
    let (mut work, failure) = engine.begin(head(number, leg, &parts, &body));
    if engine.args.contract == Contract::Vllm {
        vllm::check(engine, number, api, ask.as_ref().ok(), &mut read);
    }
    let outcome = async {
        front(cut, failure)?;
        let ask = ask.as_ref().map_err(|error| {
            if error.is_duplicate_key() {
                engine.violated(Rule::DuplicateKey, number, error.to_string());
            }
            Refusal::new(400, error.to_string())
        })?;
        engine.enter_rank(&mut work, number, &parts.headers, ask)?;
        let call = Call::new(number, api, ask, &parts.headers, failure)?;
        match engine.args.contract {
            Contract::Vllm => vllm::serve(engine, &call, &read).await,
            Contract::Sglang => sglang::serve(engine, &call).await,
            Contract::Baton => call.aggregated(engine).await,
        }
    };
    let outcome = outcome.await;
    finish(engine, tokens_of(&mut work, &outcome), work, failure, outcome)
}

async fn leg_of_ours(engine: &Arc<Engine>, cut: &Cut, leg: Leg, parts: Parts, body: Bytes) -> Response<Body> {
    let number = engine.next_number();
    let (mut work, failure) = engine.begin(head(number, leg, &parts, &body));
    let outcome = async {
        front(cut, failure)?;
        if leg == Leg::Render {
            return ours::render(engine, number, &body);
        }
        let request = ours::read(engine, number, &body)?;
        let ask = Ask::read(request.body.get().as_bytes())?;
        let call = ours::call(number, &request, &ask, &parts.headers, failure)?;
        match leg {
            Leg::Prefill => ours::prefill(engine, &call, &request).await,
            _ => ours::decode(engine, &call, &request).await,
        }
    };
    let outcome = outcome.await;
    finish(engine, tokens_of(&mut work, &outcome), work, failure, outcome)
}

/// What is met before the engine has the request.
fn front(cut: &Cut, failure: Option<Failure>) -> Result<(), Refusal> {
    match failure {
        Some(Failure::Status { code, admitted: false }) => Err(injected(code)),
        Some(Failure::ResetAfter(bytes)) => {
            cut.after(bytes);
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Tokens of an answer. A refusal is counted here; an answer is counted when its body has been given out.
fn tokens_of(work: &mut Work, outcome: &Result<Outcome, Refusal>) -> u64 {
    match outcome {
        Ok(Outcome::Answered(answer, _)) => u64::from(answer.tokens) * u64::from(answer.choices),
        Ok(Outcome::Json(_)) => 0,
        Err(_) => {
            work.refused();
            0
        }
    }
}

fn finish(
    engine: &Engine,
    tokens: u64,
    work: Work,
    failure: Option<Failure>,
    outcome: Result<Outcome, Refusal>,
) -> Response<Body> {
    let (answer, headers) = match outcome {
        Ok(Outcome::Answered(answer, headers)) => (answer, headers),
        Ok(Outcome::Json(text)) => return json(Body::sent(text, work, tokens, failure)),
        Err(refusal) => return refused(&refusal),
    };
    let mut response = if answer.streams {
        let body = Body::streamed(*answer, work, tokens, engine.args.token_delay, failure);
        let mut response = Response::new(body);
        let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, kind);
        response
    } else {
        json(Body::sent(answer.json(), work, tokens, failure))
    };
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::try_from(value) {
            response.headers_mut().insert(HeaderName::from_static(name), value);
        }
    }
    response
}

/// Questions about the engine, and what it has besides generating.
async fn probed(engine: &Arc<Engine>, cut: &Cut, parts: Parts, body: Bytes) -> Response<Body> {
    let path = parts.uri.path();
    let told = match parts.method {
        Method::GET | Method::HEAD => probe::get(engine, path).map(Ok),
        Method::POST => probe::post(engine, path, &body),
        _ => None,
    };
    let Some(told) = told else {
        engine.ledger().unknown_paths += 1;
        return refused(&Refusal::new(404, "Not Found"));
    };
    let failure = engine.fails().meet(Leg::Probe);
    {
        let mut ledger = engine.ledger();
        ledger.requests.add(Leg::Probe);
        if failure.is_some() {
            ledger.failed.add(Leg::Probe);
        }
        // What is posted is a client's and is shown; questions come by the second and would push all else out.
        if parts.method == Method::POST {
            ledger.remember(head(engine.next_number(), Leg::Probe, &parts, &body));
        }
    }
    if let Err(refusal) = front(cut, failure) {
        return refused(&refusal);
    }
    match failure {
        Some(Failure::Hang) => std::future::pending().await,
        Some(Failure::SlowHead(lasts) | Failure::Stall { lasts, at: StallAt::Head }) => tokio::time::sleep(lasts).await,
        _ => {}
    }
    match told {
        Ok(Told::Json(text)) => json(Body::whole(text)),
        Ok(Told::Text(text)) => Response::new(Body::whole(text)),
        Ok(Told::Empty) => Response::new(Body::whole(String::new())),
        Err(refusal) => refused(&refusal),
    }
}

/// The mock's own pages.
fn mock(engine: &Engine, parts: &Parts, body: &[u8]) -> Response<Body> {
    let told = match (&parts.method, parts.uri.path()) {
        (&Method::GET, "/mock/ledger") => {
            engine.told(parts.uri.query().is_some_and(|query| query.split('&').any(|pair| pair == "bodies=1")))
        }
        (&Method::POST, "/mock/reset") => {
            engine.reset();
            engine.told(false)
        }
        (&Method::POST, "/mock/stale") => {
            engine.make_stale();
            engine.told(false)
        }
        (&Method::POST, "/mock/fail") => match specs(body) {
            Ok(specs) => {
                specs.into_iter().for_each(|spec| engine.fails().add(spec));
                engine.told(false)["fail"].take()
            }
            Err(refusal) => return refused(&refusal),
        },
        (&Method::DELETE, "/mock/fail") => {
            engine.fails().clear();
            engine.told(false)["fail"].take()
        }
        _ => {
            return refused(&Refusal::new(
                404,
                "the mock's pages are GET /mock/ledger, POST /mock/reset, POST /mock/stale, POST and DELETE /mock/fail",
            ));
        }
    };
    json(Body::whole(format!("{told:#}\n")))
}

/// Specs, one a line.
fn specs(body: &[u8]) -> Result<Vec<Spec>, Refusal> {
    let text = std::str::from_utf8(body).map_err(|error| Refusal::new(400, error.to_string()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.map(|line| line.parse().map_err(|error| Refusal::new(400, format!("{line}: {error}")))).collect()
}

fn json(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

fn refused(refusal: &Refusal) -> Response<Body> {
    let mut response = json(Body::whole(refusal.json()));
    *response.status_mut() = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}
