//! A worker in this process and a client for it.

use baton_worker::args::CommandLine;
use baton_worker::config::Config;
use baton_worker::worker::{Bound, RunError};
use bytes::Bytes;
use clap::Parser;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Longest wait for anything: far above what a busy machine needs, so that only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(60);

/// A worker. Dropping it ends it.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) drain: CancellationToken,
    running: JoinHandle<Result<(), RunError>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.running.abort();
    }
}

/// The demo model.
pub(crate) fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny")
}

impl Server {
    /// An aggregated worker that is ready.
    pub(crate) async fn ready() -> Self {
        Self::ready_with("--role prefill-decode").await
    }

    /// A worker with these flags that is ready.
    pub(crate) async fn ready_with(flags: &str) -> Self {
        let server = Self::start(&model(), flags).await;
        until("the worker is ready", async || server.get("/ready").await.status == StatusCode::OK).await;
        server
    }

    /// A worker with these flags, loading.
    pub(crate) async fn start(model: &Path, flags: &str) -> Self {
        // Small, so that many workers fit beside each other; enough for one sequence of full length and more.
        let own = "--served-model-name tiny --host 127.0.0.1 --port 0 --kv-port 0 --kv-cache-bytes 33554432";
        let words = ["baton-worker", "--model", model.to_str().expect("a path in UTF-8")];
        let words = words.into_iter().chain(own.split_whitespace()).chain(flags.split_whitespace());
        let args = CommandLine::try_parse_from(words).expect("valid flags").serve.expect("no command");
        let bound = Bound::new(Config::try_from(args).expect("a valid configuration")).await.expect("ports are free");
        let address = bound.http_address();
        let drain = CancellationToken::new();
        let running = tokio::spawn(bound.run(drain.clone()));
        Server { address, drain, running }
    }

    /// Waits for the worker's end.
    pub(crate) async fn end(mut self) -> Result<(), RunError> {
        let ended = tokio::time::timeout(DEADLINE, &mut self.running).await;
        ended.expect("the worker ends").expect("without a panic")
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Full::default()).expect("a request")).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, &body.to_string()).await
    }

    pub(crate) async fn post_text(&self, path: &str, body: &str) -> Answer {
        self.send(Request::post(path).body(Full::from(body.to_owned())).expect("a request")).await
    }

    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Answer {
        let response = self.open(request).await;
        let (head, body) = response.into_parts();
        let body =
            tokio::time::timeout(DEADLINE, body.collect()).await.expect("the body ends").expect("the body is whole");
        let text = String::from_utf8(body.to_bytes().to_vec()).expect("answers are UTF-8");
        Answer { status: head.status, headers: head.headers, text }
    }

    /// Sends a request and returns with the response's head; dropping what it returns closes the connection.
    pub(crate) async fn open(&self, request: Request<Full<Bytes>>) -> http::Response<Incoming> {
        let stream = TcpStream::connect(self.address).await.expect("the worker listens");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP/1.1");
        // Ends when the response's body, and the sender, are dropped.
        tokio::spawn(connection);
        tokio::time::timeout(DEADLINE, sender.send_request(request)).await.expect("an answer").expect("an HTTP answer")
    }

    pub(crate) async fn status(&self) -> Value {
        self.get("/status").await.json()
    }

    /// A metric of one series, without its prefix.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").await.text;
        let start = format!("baton_worker_{name}{{");
        let line = text.lines().find(|line| line.starts_with(&start)).expect("the metric exists");
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a whole number")
    }

    /// Waits until no KV block is held and nothing runs.
    pub(crate) async fn is_idle(&self) {
        until("all blocks are free", async || {
            let load = self.status().await["load"].take();
            (&load["kv_blocks_used"], &load["running"], &load["waiting"]) == (&json!(0), &json!(0), &json!(0))
        })
        .await;
    }
}

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: http::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("not JSON ({error}): {}", self.text))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("a plain header"))
    }

    /// The JSON of a stream's events, which must end with `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        assert_eq!(self.header("content-type"), "text/event-stream");
        let mut data: Vec<_> = self.text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        data.into_iter().map(|data| serde_json::from_str(data).expect("events are JSON")).collect()
    }
}

/// The text of each choice of a stream, and why it ended.
pub(crate) fn streamed_choices(events: &[Value], choices: usize) -> Vec<(String, String)> {
    let mut streamed = vec![(String::new(), String::new()); choices];
    for choice in events.iter().flat_map(|event| event["choices"].as_array().expect("a list")) {
        let (text, reason) = &mut streamed[choice["index"].as_u64().expect("an index") as usize];
        let piece = choice["delta"]["content"].as_str().or(choice["text"].as_str());
        text.push_str(piece.unwrap_or_default());
        reason.push_str(choice["finish_reason"].as_str().unwrap_or_default());
    }
    streamed
}

/// Waits for a condition, with a deadline.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let since = Instant::now();
    while !condition().await {
        assert!(since.elapsed() < DEADLINE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
