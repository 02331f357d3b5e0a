//! A proxy in this process and mock workers around it. A mock answers as an engine does, and as another pod's proxy where it
//! is listed as a peer; what it does with a leg is a scenario that a test can change at any time.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod h2raw;
pub(crate) mod tap;

use axum::body::{Body, Bytes};
use axum::extract::State as Shared;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use baton_proxy::app::{App, Ended};
use baton_proxy::args::Args;
use baton_proxy::config::{Config, KvEvents, Limits, PolicySource};
use baton_proxy::drain::Shutdown;
use baton_proxy::estimate::Policy;
use baton_proxy::tls::TlsFiles;
use baton_wire::kv_events::{Hello, Line, Snapshot};
use baton_wire::leg::{LegRequest, PrefillDone};
use baton_wire::names::{headers, paths};
use baton_wire::render::{RenderRequest, RenderResponse, RenderedPrompt};
use baton_wire::signing;
use baton_wire::status::{Load, State, Status, Totals};
use baton_wire::{BlockHash, Epoch, Fingerprint, Role};
use clap::Parser as _;
use ed25519_dalek::SigningKey;
use futures_util::StreamExt as _;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use std::io::Write as _;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

/// How long a condition may take to come true. Only a failing test waits so long.
pub(crate) const WITHIN: Duration = Duration::from_secs(20);

pub(crate) const MODEL: Fingerprint = Fingerprint([7; 32]);

/// Our key, in every test.
pub(crate) fn key() -> SigningKey {
    SigningKey::from_bytes(&[5; 32])
}

/// What a mock does with a prefill leg.
#[derive(Clone, Debug)]
pub(crate) enum Prefill {
    Done,
    /// Never answers.
    Pending,
    /// Answers with this status once it is told to.
    After(Arc<Notify>, u16),
}

/// What a mock does with a decode leg.
#[derive(Clone, Debug)]
pub(crate) enum Decode {
    /// The whole answer: events or JSON, as the client asked.
    Answers,
    Refuses(u16),
    /// Never answers.
    Pending,
    /// Pending while it has transfers, answering where it has none: a worker that waits for KV.
    WaitsForKv,
    /// The whole answer once it is told to, with a path that says that the KV did not come.
    FellBack(Arc<Notify>),
    /// Two events, then nothing more.
    FallsSilent,
    /// Two events and half of one (or half of the JSON); the connection breaks once it is told to.
    Dies(Arc<Notify>),
    /// Every event, `[DONE]` included; the connection breaks once it is told to.
    DiesDone(Arc<Notify>),
    /// Two events now, the rest once it is told to.
    Pauses(Arc<Notify>),
    /// So many events of [`FLOOD_EVENT_BYTES`], as fast as they are taken; counted as they are.
    Floods(u64, Arc<AtomicU64>),
}

/// A call that a mock has received.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Call {
    pub(crate) fn leg(&self) -> LegRequest {
        serde_json::from_slice(&self.body).expect("a leg")
    }
}

/// What a mock has seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) calls: Vec<Call>,
    /// Prefill legs that the other side gave up.
    pub(crate) prefill_aborts: usize,
    /// Decode legs that the other side gave up.
    pub(crate) decode_aborts: usize,
}

impl Seen {
    pub(crate) fn on<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a Call> {
        self.calls.iter().filter(move |call| call.path == path)
    }
}

pub(crate) struct Scenario {
    pub(crate) status: Mutex<Status>,
    pub(crate) prefill: Mutex<Prefill>,
    pub(crate) decode: Mutex<Decode>,
    /// What rendering answers instead of token ids; nothing ever, where the status is 0.
    pub(crate) render: Mutex<Option<(u16, &'static str)>>,
    pub(crate) signed_by: Mutex<Option<SigningKey>>,
    /// What its prefix cache holds, told to whoever asks for its KV events.
    pub(crate) holds: Mutex<Vec<BlockHash>>,
    /// So many requests for its status are answered as by a proxy whose engine is late.
    pub(crate) late: watch::Sender<u32>,
    pub(crate) seen: watch::Sender<Seen>,
}

/// A worker. Dropped or killed, its sockets close as if its process had died.
pub(crate) struct Mock {
    pub(crate) address: String,
    pub(crate) scenario: Arc<Scenario>,
    runtime: Option<Runtime>,
}

impl Mock {
    pub(crate) fn start(role: Role) -> Self {
        static EPOCHS: AtomicU8 = AtomicU8::new(1);
        let status = Status {
            role,
            revision: "r1".into(),
            epoch: Epoch([EPOCHS.fetch_add(1, Ordering::Relaxed); 16]),
            model: "tiny".into(),
            fingerprint: Some(MODEL),
            kv_address: Some("127.0.0.1:5600".into()),
            state: State::Ready,
            progress: None,
            max_model_length: Some(2048),
            block_tokens: 32,
            load: Load::default(),
            totals: Totals::default(),
            bootstrap_port: None,
            rank_loads: Vec::new(),
            adapters: Vec::new(),
        };
        let scenario = Arc::new(Scenario {
            status: Mutex::new(status),
            prefill: Mutex::new(Prefill::Done),
            decode: Mutex::new(Decode::Answers),
            render: Mutex::new(None),
            signed_by: Mutex::new(Some(key())),
            holds: Mutex::default(),
            late: watch::Sender::new(0),
            seen: watch::Sender::new(Seen::default()),
        });
        let router = axum::Router::new()
            .route(paths::STATUS, get(status_answer))
            .route(paths::METRICS, get(|| async { "baton_worker_up 1\n" }))
            .route(paths::KV_EVENTS, get(kv_events))
            .route(paths::RENDER, post(render))
            .route(paths::PREFILL_LEG, post(prefill))
            .route(paths::DECODE_LEG, post(decode))
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(Arc::clone(&scenario));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a socket");
        let address = listener.local_addr().expect("bound").to_string();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("threads");
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            axum::serve(listener, router).await.expect("serving never ends");
        });
        Mock { address, scenario, runtime: Some(runtime) }
    }

    pub(crate) fn prefills(&self, prefill: Prefill) {
        *self.scenario.prefill.lock().expect("unpoisoned") = prefill;
    }

    pub(crate) fn decodes(&self, decode: Decode) {
        *self.scenario.decode.lock().expect("unpoisoned") = decode;
    }

    pub(crate) fn renders(&self, status: u16, body: &'static str) {
        *self.scenario.render.lock().expect("unpoisoned") = Some((status, body));
    }

    pub(crate) fn status(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.scenario.status.lock().expect("unpoisoned"));
    }

    pub(crate) fn signed_by(&self, key: Option<SigningKey>) {
        *self.scenario.signed_by.lock().expect("unpoisoned") = key;
    }

    pub(crate) fn holds(&self, blocks: Vec<BlockHash>) {
        *self.scenario.holds.lock().expect("unpoisoned") = blocks;
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.scenario.status.lock().expect("unpoisoned").epoch
    }

    /// How many calls of a path it has received.
    pub(crate) fn count(&self, path: &str) -> usize {
        self.scenario.seen.borrow().on(path).count()
    }

    /// The legs that it has received on a path.
    pub(crate) fn legs(&self, path: &str) -> Vec<LegRequest> {
        self.scenario.seen.borrow().on(path).map(Call::leg).collect()
    }

    /// Waits until what it has seen is this.
    pub(crate) async fn sees(&self, what: &str, condition: impl FnMut(&Seen) -> bool) {
        let mut seen = self.scenario.seen.subscribe();
        tokio::time::timeout(WITHIN, seen.wait_for(condition))
            .await
            .unwrap_or_else(|_| panic!("{}: never saw {what}", self.address))
            .expect("the mock lives");
    }

    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Counts a leg that is dropped before its end.
struct AbortGuard {
    scenario: Arc<Scenario>,
    prefill: bool,
    done: bool,
}

impl AbortGuard {
    /// A method, so that a closure that calls it takes the whole guard along and not a copy of one field.
    fn done(&mut self) {
        self.done = true;
    }
}

impl Drop for AbortGuard {
    fn drop(&mut self) {
        if !self.done {
            self.scenario.seen.send_modify(|seen| match self.prefill {
                true => seen.prefill_aborts += 1,
                false => seen.decode_aborts += 1,
            });
        }
    }
}

fn note(scenario: &Scenario, path: &str, headers: &HeaderMap, body: &Bytes) {
    let call = Call { path: path.to_owned(), headers: headers.clone(), body: body.clone() };
    scenario.seen.send_modify(|seen| seen.calls.push(call));
}

async fn status_answer(Shared(scenario): Shared<Arc<Scenario>>, given: HeaderMap) -> Response {
    if *scenario.late.borrow() > 0 {
        scenario.late.send_modify(|late| *late -= 1);
        return StatusCode::GATEWAY_TIMEOUT.into_response();
    }
    let body = serde_json::to_vec(&*scenario.status.lock().expect("unpoisoned")).expect("a status");
    let signing = scenario.signed_by.lock().expect("unpoisoned").clone();
    let mut response = Response::new(Body::from(body.clone()));
    if let (Some(key), Some(nonce)) = (signing, given.get(headers::STATUS_NONCE)) {
        let signature = signing::sign_status(&key, nonce.to_str().expect("hexadecimal"), &body);
        response.headers_mut().insert(headers::STATUS_SIGNATURE, signature.parse().expect("base64url"));
    }
    response
}

/// A greeting and a snapshot, and nothing more.
async fn kv_events(Shared(scenario): Shared<Arc<Scenario>>, given: HeaderMap) -> Response {
    note(&scenario, paths::KV_EVENTS, &given, &Bytes::new());
    let epoch = scenario.status.lock().expect("unpoisoned").epoch;
    let blocks = scenario.holds.lock().expect("unpoisoned").clone();
    let next = blocks.len() as u64;
    let lines = [
        Line::Hello { hello: Hello { epoch, block_tokens: 32, first: 0, next } },
        Line::Snapshot { snapshot: Snapshot { blocks, next, more: false } },
    ];
    let text = lines.map(|line| serde_json::to_string(&line).expect("a line") + "\n").concat();
    let lines = futures_util::stream::iter([Ok::<_, std::convert::Infallible>(text)]);
    Body::from_stream(lines.chain(futures_util::stream::pending())).into_response()
}

/// Names of a prompt's full blocks, by a rule of the mocks' own.
pub(crate) fn block_names(prompt: &str, tenant_salt: Option<u64>) -> Vec<BlockHash> {
    let mut name = u128::from(tenant_salt.unwrap_or(0));
    let next = |block: &[u8]| {
        name =
            block.iter().fold(name, |name, byte| name.wrapping_mul(0x1_0000_01b3).wrapping_add(u128::from(*byte) + 1));
        BlockHash(name.to_le_bytes())
    };
    prompt.as_bytes().chunks_exact(32).map(next).collect()
}

/// One token for each character of the prompt (or of the whole body, where that names none), `cached` of them in the cache.
async fn render(Shared(scenario): Shared<Arc<Scenario>>, given: HeaderMap, body: Bytes) -> Response {
    note(&scenario, paths::RENDER, &given, &body);
    let instead = *scenario.render.lock().expect("unpoisoned");
    if let Some((status, body)) = instead {
        if status == 0 {
            std::future::pending::<()>().await;
        }
        return (StatusCode::from_u16(status).expect("a status"), body).into_response();
    }
    let request: RenderRequest = serde_json::from_slice(&body).expect("a render request");
    let body: serde_json::Value = serde_json::from_str(request.body.get()).expect("JSON");
    let prompt = body["prompt"].as_str().unwrap_or("a chat");
    let cached_tokens = body["cached"].as_u64().map_or(0, |tokens| tokens as u32);
    let rendered = RenderResponse {
        prompts: vec![RenderedPrompt {
            token_ids: prompt.bytes().map(u32::from).collect(),
            block_hashes: block_names(prompt, request.tenant_salt),
            cached_tokens,
        }],
        choices: 1,
        stream: body["stream"].as_bool().unwrap_or(false),
        seed: body["seed"].as_u64(),
    };
    serde_json::to_vec(&rendered).expect("a response").into_response()
}

async fn prefill(Shared(scenario): Shared<Arc<Scenario>>, given: HeaderMap, body: Bytes) -> Response {
    note(&scenario, paths::PREFILL_LEG, &given, &body);
    let behaviour = scenario.prefill.lock().expect("unpoisoned").clone();
    let mut guard = AbortGuard { scenario, prefill: true, done: false };
    let status = match behaviour {
        Prefill::Done => 200,
        Prefill::Pending => std::future::pending().await,
        Prefill::After(told, status) => {
            told.notified().await;
            status
        }
    };
    guard.done();
    let done = serde_json::to_vec(&PrefillDone { kv_bytes: 1000, ..PrefillDone::default() }).expect("JSON");
    (StatusCode::from_u16(status).expect("a status"), done).into_response()
}

/// The events of a whole answer, as a worker writes them.
pub(crate) const EVENTS: [&str; 4] = [
    ": baton-ids 0 5,6\ndata: {\"text\":\"one\"}\n\n",
    ": baton-ids 0 7\ndata: {\"text\":\"two\"}\n\n",
    ": baton-ids 0 8\ndata: {\"text\":\"three\"}\n\n",
    "data: [DONE]\n\n",
];

/// What a client sees of [`EVENTS`].
pub(crate) const CLIENT_EVENTS: &str =
    "data: {\"text\":\"one\"}\n\ndata: {\"text\":\"two\"}\n\ndata: {\"text\":\"three\"}\n\ndata: [DONE]\n\n";

/// Bytes of one event of a flood.
pub(crate) const FLOOD_EVENT_BYTES: u64 = 16 << 10;

fn flood(events: u64, taken: Arc<AtomicU64>, mut guard: AbortGuard) -> Body {
    let text = "x".repeat(FLOOD_EVENT_BYTES as usize - "data: \n\n".len());
    let event = Bytes::from(format!("data: {text}\n\n"));
    let events = futures_util::stream::iter(0..events).map(move |number| {
        taken.store(number + 1, Ordering::Relaxed);
        if number + 1 == events {
            guard.done();
        }
        Ok::<_, std::convert::Infallible>(event.clone())
    });
    Body::from_stream(events)
}

/// A whole answer that is not streamed.
pub(crate) const JSON_ANSWER: &str = r#"{"id": "x",  "usage": {"completion_tokens": 3}}"#;

async fn decode(Shared(scenario): Shared<Arc<Scenario>>, given: HeaderMap, body: Bytes) -> Response {
    note(&scenario, paths::DECODE_LEG, &given, &body);
    let leg: LegRequest = serde_json::from_slice(&body).expect("a leg");
    let streamed = leg.body.get().contains("\"stream\":true");
    let behaviour = scenario.decode.lock().expect("unpoisoned").clone();
    let mut guard = AbortGuard { scenario, prefill: false, done: false };
    let path = match behaviour {
        Decode::FellBack(_) => "fallback; reason=timeout".to_owned(),
        _ => leg.planned.to_string(),
    };
    let (head, tail): (&[&str], Tail) = match behaviour {
        Decode::Refuses(status) => {
            guard.done();
            return (StatusCode::from_u16(status).expect("a status"), "{\"error\":{\"message\":\"no\"}}")
                .into_response();
        }
        Decode::Floods(events, taken) => {
            let body = flood(events, taken, guard);
            return ([("content-type", "text/event-stream")], body).into_response();
        }
        Decode::Pending => std::future::pending().await,
        Decode::WaitsForKv if !leg.transfers.is_empty() => std::future::pending().await,
        Decode::Answers | Decode::WaitsForKv => (&EVENTS, Tail::End),
        Decode::FellBack(told) => {
            told.notified().await;
            (&EVENTS, Tail::End)
        }
        Decode::FallsSilent => (&EVENTS[..2], Tail::Silence),
        // Half an event comes before the break, so that the client must not see that half.
        Decode::Dies(told) => (&[EVENTS[0], EVENTS[1], "data: {\"te"], Tail::Break(told)),
        Decode::DiesDone(told) => (&EVENTS, Tail::Break(told)),
        Decode::Pauses(told) => (&EVENTS[..2], Tail::Rest(told)),
    };
    // What the client has is left out.
    let had: u32 = leg.resume.iter().flat_map(|resume| &resume.choices).map(|choice| choice.events).sum();
    let head = &head[head.len().min(had as usize)..];
    let kind = if streamed { "text/event-stream" } else { "application/json" };
    let head: Vec<Bytes> = if streamed {
        head.iter().map(|event| Bytes::from_static(event.as_bytes())).collect()
    } else if matches!(tail, Tail::End) {
        vec![Bytes::from_static(JSON_ANSWER.as_bytes())]
    } else {
        vec![Bytes::from_static(&JSON_ANSWER.as_bytes()[..5])]
    };
    let tail = futures_util::stream::once(async move {
        let piece = match tail {
            Tail::End => Ok(Bytes::new()),
            Tail::Silence => std::future::pending().await,
            Tail::Break(told) => {
                told.notified().await;
                Err(std::io::Error::other("the worker died"))
            }
            Tail::Rest(told) => {
                told.notified().await;
                Ok(Bytes::from(EVENTS[2..].concat()))
            }
        };
        guard.done();
        piece
    });
    let body = futures_util::stream::iter(head.into_iter().map(Ok)).chain(tail);
    Response::builder()
        .header("content-type", kind)
        .header(headers::PATH, path)
        .header("x-engine", "mock")
        .body(Body::from_stream(body))
        .expect("a response")
}

enum Tail {
    End,
    Silence,
    Break(Arc<Notify>),
    Rest(Arc<Notify>),
}

/// A proxy to be started.
pub(crate) struct Setup<'a> {
    own: Option<&'a Mock>,
    peers: Vec<&'a Mock>,
    others: Vec<String>,
    pub(crate) policy: Policy,
    pub(crate) limits: Limits,
    pub(crate) tls: TlsFiles,
    kv_events: KvEvents,
    api_keys_file: Option<std::path::PathBuf>,
    pub(crate) drain_timeout: Duration,
}

impl<'a> Setup<'a> {
    pub(crate) fn new() -> Self {
        Setup {
            own: None,
            peers: Vec::new(),
            others: Vec::new(),
            policy: Policy::Always,
            limits: Limits {
                body_bytes_max: 4 << 20,
                in_flight_max: 64,
                queued_max: 0,
                request_timeout: Duration::from_secs(60),
                first_token_timeout: Duration::from_secs(60),
                idle_timeout: Duration::from_secs(60),
            },
            tls: TlsFiles::default(),
            kv_events: KvEvents::Off,
            api_keys_file: None,
            drain_timeout: WITHIN,
        }
    }

    pub(crate) fn tls(mut self, tls: TlsFiles) -> Self {
        self.tls = tls;
        self
    }

    /// Workers are asked what their prefix caches hold.
    pub(crate) fn kv_events(mut self) -> Self {
        self.kv_events = KvEvents::On(None);
        self
    }

    /// Clients need a key of this file.
    pub(crate) fn api_keys(mut self, file: &std::path::Path) -> Self {
        self.api_keys_file = Some(file.to_owned());
        self
    }

    pub(crate) fn own(mut self, own: &'a Mock) -> Self {
        self.own = Some(own);
        self
    }

    pub(crate) fn peer(mut self, peer: &'a Mock) -> Self {
        self.peers.push(peer);
        self
    }

    /// An address in the endpoints file that is waited for by nobody.
    pub(crate) fn other(mut self, address: &str) -> Self {
        self.others.push(address.to_owned());
        self
    }

    pub(crate) fn policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    pub(crate) fn limits(mut self, change: impl FnOnce(&mut Limits)) -> Self {
        change(&mut self.limits);
        self
    }

    /// What it is started with, and the files that the configuration names.
    pub(crate) fn config(&self) -> (Config, [tempfile::NamedTempFile; 2]) {
        let mut key_file = tempfile::NamedTempFile::new().expect("a file");
        key_file.write_all(signing::key_text(&key().to_bytes()).as_bytes()).expect("written");
        let mut endpoints_file = tempfile::NamedTempFile::new().expect("a file");
        let endpoints: Vec<&str> =
            self.peers.iter().map(|peer| peer.address.as_str()).chain(self.others.iter().map(String::as_str)).collect();
        let endpoints = serde_json::json!({ "endpoints": endpoints }).to_string();
        endpoints_file.write_all(endpoints.as_bytes()).expect("written");
        let mut args = vec!["baton-proxy".to_owned(), "--revision=r1".into()];
        args.extend(["--listen=127.0.0.1:0".to_owned(), "--admin-listen=127.0.0.1:0".into()]);
        args.push(format!("--signing-key-file={}", key_file.path().display()));
        args.push(format!("--endpoints-file={}", endpoints_file.path().display()));
        args.extend(self.own.map(|own| format!("--engine=http://{}", own.address)));
        let args = Args::try_parse_from(args).expect("right arguments");
        let config = Config {
            tls: self.tls.clone(),
            policy: PolicySource::Flags(self.policy),
            kv_events: self.kv_events,
            api_keys_file: self.api_keys_file.clone(),
            limits: self.limits,
            drain_timeout: self.drain_timeout,
            ..Config::try_from(args).expect("a right configuration")
        };
        (config, [key_file, endpoints_file])
    }

    /// Starts it and waits until it has an opinion of each mock.
    pub(crate) async fn start(self) -> Proxy {
        let (config, files) = self.config();
        let app = App::build(config).await.expect("a right configuration");
        let (address, admin) = app.addresses().expect("bound");
        let shutdown = Shutdown::default();
        let served = tokio::spawn(app.serve(shutdown.clone()));
        let proxy = Proxy { address: address.to_string(), admin: admin.to_string(), shutdown, served, _files: files };
        let expected = self.peers.len() + self.others.len() + usize::from(self.own.is_some());
        proxy
            .workers("each worker to have been asked", |workers| {
                workers.len() == expected && workers.iter().all(|worker| worker["not_for_decode"] != "not-asked")
            })
            .await;
        proxy
    }
}

/// A running proxy.
pub(crate) struct Proxy {
    pub(crate) address: String,
    pub(crate) admin: String,
    pub(crate) shutdown: Shutdown,
    pub(crate) served: JoinHandle<Ended>,
    _files: [tempfile::NamedTempFile; 2],
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.served.abort();
    }
}

/// A response whose body has not been read.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: hyper::body::Incoming,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }

    /// The next piece of the body.
    pub(crate) async fn piece(&mut self) -> Option<String> {
        let frame = tokio::time::timeout(WITHIN, self.body.frame()).await.expect("a piece in time")?;
        let data = frame.expect("an unbroken body").into_data().expect("data");
        Some(String::from_utf8(data.to_vec()).expect("text"))
    }

    pub(crate) async fn text(self) -> String {
        let body = tokio::time::timeout(WITHIN, self.body.collect()).await.expect("an end in time");
        String::from_utf8(body.expect("an unbroken body").to_bytes().to_vec()).expect("text")
    }

    /// The machine-readable code of an error body.
    pub(crate) async fn code(self) -> String {
        let text = self.text().await;
        let body: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("an error body: {text}"));
        body["error"]["code"].as_str().unwrap_or_else(|| panic!("a code: {text}")).to_owned()
    }
}

impl Proxy {
    /// Sends a request and waits for the head of its answer. Dropping the wait or the reply closes the connection.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Reply {
        tokio::time::timeout(WITHIN, exchange(&self.address, request)).await.expect("an answer in time")
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).body(Full::default()).expect("a request")).await
    }

    pub(crate) async fn complete(&self, body: serde_json::Value) -> Reply {
        self.send(completion(body)).await
    }

    /// Waits until the table of workers is this.
    pub(crate) async fn workers(&self, what: &str, mut condition: impl FnMut(&[serde_json::Value]) -> bool) {
        let asked = async {
            let mut pause = tokio::time::interval(Duration::from_millis(10));
            loop {
                pause.tick().await;
                let request = Request::get("/debug/workers").body(Full::default()).expect("a request");
                let text = exchange(&self.admin, request).await.text().await;
                let page: serde_json::Value = serde_json::from_str(&text).expect("JSON");
                if condition(page["workers"].as_array().expect("a table")) {
                    return;
                }
            }
        };
        tokio::time::timeout(WITHIN, asked).await.unwrap_or_else(|_| panic!("waited in vain for {what}"));
    }

    /// Waits until the metrics have this line.
    pub(crate) async fn metric(&self, line: &str) {
        let asked = async {
            let mut pause = tokio::time::interval(Duration::from_millis(10));
            while !self.admin(paths::METRICS).await.text().await.lines().any(|has| has == line) {
                pause.tick().await;
            }
        };
        tokio::time::timeout(WITHIN, asked).await.unwrap_or_else(|_| panic!("waited in vain for {line}"));
    }

    pub(crate) async fn admin(&self, path: &str) -> Reply {
        let request = Request::get(path).body(Full::default()).expect("a request");
        tokio::time::timeout(WITHIN, exchange(&self.admin, request)).await.expect("an answer in time")
    }
}

pub(crate) fn completion(body: serde_json::Value) -> Request<Full<Bytes>> {
    post_json(paths::COMPLETIONS, body.to_string())
}

pub(crate) fn post_json(path: &str, body: String) -> Request<Full<Bytes>> {
    Request::builder()
        .method(Method::POST)
        .uri(path)
        .header("content-type", "application/json")
        .body(Full::new(body.into()))
        .expect("a request")
}

/// One request on a connection of its own.
pub(crate) async fn exchange(address: &str, mut request: Request<Full<Bytes>>) -> Reply {
    request.headers_mut().insert("host", address.parse().expect("a host"));
    let stream = tokio::net::TcpStream::connect(address).await.expect("a listening proxy");
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.expect("a connection");
    tokio::spawn(connection);
    let (head, body) = sender.send_request(request).await.expect("an answer").into_parts();
    Reply { status: head.status.as_u16(), headers: head.headers, body }
}

/// A connection of HTTP/2 over a stream that nothing has been said on.
pub(crate) async fn http2<S>(stream: S) -> hyper::client::conn::http2::SendRequest<Full<Bytes>>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let executor = hyper_util::rt::TokioExecutor::new();
    let io = hyper_util::rt::TokioIo::new(stream);
    let (sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.expect("a connection");
    tokio::spawn(connection);
    sender
}

/// A completion as HTTP/2 has it: its URI names the server.
pub(crate) fn completion2(body: serde_json::Value) -> Request<Full<Bytes>> {
    let mut request = completion(body);
    *request.uri_mut() = format!("https://proxy.test{}", paths::COMPLETIONS).parse().expect("a URI");
    request
}

impl Reply {
    pub(crate) fn of(response: http::Response<hyper::body::Incoming>) -> Self {
        let (head, body) = response.into_parts();
        Reply { status: head.status.as_u16(), headers: head.headers, body }
    }
}
