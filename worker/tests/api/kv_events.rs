//! `/kv-events`: whoever follows it knows what the prefix cache holds.

use crate::server::{Server, until};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde_json::{Value, json};
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

/// Far longer than a worker takes to write a line, and than its keep-alive.
const DEADLINE: Duration = Duration::from_secs(60);

/// One that follows.
struct Follower {
    body: Incoming,
    rest: Vec<u8>,
    lines: VecDeque<Value>,
    held: BTreeSet<String>,
    next: u64,
    snapshots: usize,
}

impl Follower {
    async fn start(worker: &Server, query: &str) -> Self {
        let request = Request::get(format!("/kv-events{query}")).body(Full::<Bytes>::default()).expect("a request");
        let response = worker.open(request).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "application/x-ndjson");
        let (lines, held) = (VecDeque::new(), BTreeSet::new());
        let mut follower =
            Follower { body: response.into_body(), rest: Vec::new(), lines, held, next: 0, snapshots: 0 };
        let hello = follower.line().await.expect("a greeting");
        assert_eq!(hello["hello"]["epoch"], worker.status().await["epoch"]);
        assert_eq!(hello["hello"]["block_tokens"], 32);
        assert!(hello["hello"]["first"].as_u64() <= hello["hello"]["next"].as_u64(), "{hello}");
        follower
    }

    /// The next line; `None` at the end.
    async fn line(&mut self) -> Option<Value> {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Some(line);
            }
            let frame = tokio::time::timeout(DEADLINE, self.body.frame()).await.expect("a line comes in time")?;
            self.rest.extend_from_slice(&frame.expect("the stream is whole").into_data().expect("data"));
            while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                self.lines.push_back(serde_json::from_slice(&line).expect("a line of JSON"));
            }
        }
    }

    /// Takes in one line as the contract says.
    async fn apply(&mut self) {
        let line = self.line().await.expect("it goes on");
        let hashes = |list: &Value| -> Vec<String> {
            list.as_array().expect("a list").iter().map(|hash| hash.as_str().expect("a hash").to_owned()).collect()
        };
        if let Some(snapshot) = line.get("snapshot") {
            self.held = hashes(&snapshot["blocks"]).into_iter().collect();
            self.next = snapshot["next"].as_u64().expect("a number");
            assert_eq!(snapshot["more"], false, "a small cache fits one line");
            self.snapshots += 1;
        } else if let Some(seq) = line.get("seq") {
            assert_eq!(*seq, self.next, "{line}");
            self.next += 1;
            match (line.get("stored"), line.get("removed")) {
                (Some(stored), None) => self.held.extend(hashes(stored)),
                (None, Some(removed)) => hashes(removed).iter().for_each(|hash| assert!(self.held.remove(hash))),
                _ => panic!("{line}"),
            }
        } else {
            assert_eq!(line["next"], self.next, "{line}");
        }
    }
}

async fn complete(worker: &Server, prompt: &str) {
    let body = json!({"model": "tiny", "prompt": prompt.repeat(30), "max_tokens": 40, "ignore_eos": true});
    assert_eq!(worker.post("/v1/completions", &body).await.status, StatusCode::OK);
}

/// All that is held, as one who comes now is told.
async fn snapshot(worker: &Server) -> (BTreeSet<String>, u64) {
    let mut follower = Follower::start(worker, "").await;
    follower.apply().await;
    (follower.held, follower.next)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_knows_what_the_cache_holds() {
    let worker = Server::ready().await;
    complete(&worker, "before ").await;
    let mut early = Follower::start(&worker, "").await;
    early.apply().await;
    assert!(early.snapshots == 1 && !early.held.is_empty());
    let (held, last) = (early.held.clone(), early.next - 1);
    complete(&worker, "and after ").await;
    worker.is_idle().await;
    let (expected, next) = snapshot(&worker).await;
    while early.next < next {
        early.apply().await;
    }
    assert_eq!((&early.held, early.snapshots), (&expected, 1));
    assert!(early.held.is_superset(&held) && early.held.len() > held.len());

    // Whoever was away for a moment hears the events alone, and from another life, or of numbers not given out, a snapshot.
    let epoch = worker.status().await["epoch"].as_str().expect("an epoch").to_owned();
    let mut again = Follower::start(&worker, &format!("?after={last}&epoch={epoch}")).await;
    (again.held, again.next) = (held, last + 1);
    while again.next < next {
        again.apply().await;
    }
    assert_eq!((again.held, again.snapshots), (expected.clone(), 0));
    for query in [
        format!("?after={last}"),
        format!("?epoch={epoch}"),
        format!("?after={last}&epoch={}", "0".repeat(32)),
        format!("?after={next}&epoch={epoch}"),
        format!("?after={}&epoch={epoch}", u64::MAX),
    ] {
        let mut other = Follower::start(&worker, &query).await;
        other.apply().await;
        assert_eq!((other.held, other.snapshots), (expected.clone(), 1), "{query}");
    }
    let wrong = worker.get("/kv-events?after=x").await;
    assert_eq!((wrong.status, &wrong.json()["error"]["code"]), (StatusCode::BAD_REQUEST, &json!("malformed_request")));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_follows_an_idle_worker_hears_that_it_is_idle_and_when_it_drains() {
    let worker = Server::ready().await;
    let epoch = worker.status().await["epoch"].as_str().expect("an epoch").to_owned();
    let mut follower = Follower::start(&worker, &format!("?after=0&epoch={epoch}")).await;
    assert_eq!(follower.line().await, Some(json!({"next": 1})));
    worker.drain.cancel();
    until("it hears the end", async || follower.line().await.is_none()).await;
    worker.end().await.expect("nobody who follows holds up its end");
}
