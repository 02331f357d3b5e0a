//! `/kv-events`: what the prefix cache holds, as lines of JSON: a greeting, a snapshot where the events alone would not do, then events.
//!
//! The lines stand in the order in which a follower applies them; nothing is sent that it would have to reorder. A follower that reads
//! slowly holds up nobody: lines are made as it takes them, and once the ring is ahead of it, it gets another snapshot.

use super::Worker;
use crate::error::ApiError;
use crate::kv_events::{Change, EVENT_HASHES_MAX, KvEvent};
use crate::serving::Serving;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use baton_engine::kv_pool::BLOCK_TOKENS;
use baton_engine::prefix_hash::BlockHash;
use baton_wire::status::State as LifeState;
use baton_wire::{BlockHash as WireHash, Epoch};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, header};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

/// Time without an event after which a line says so: a follower can tell a worker with nothing new from a broken connection.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Where a follower goes on.
#[derive(Debug, Deserialize)]
pub(super) struct Position {
    /// The last event that it has applied.
    after: Option<u64>,
    /// The life of the worker that the number belongs to.
    epoch: Option<Epoch>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Line {
    Hello { hello: Hello },
    Snapshot { snapshot: Snapshot },
    Stored { seq: u64, stored: Vec<WireHash> },
    Removed { seq: u64, removed: Vec<WireHash> },
    Idle { next: u64 },
}

#[derive(Serialize)]
struct Hello {
    epoch: Epoch,
    block_tokens: usize,
    first: u64,
    next: u64,
}

#[derive(Serialize)]
struct Snapshot {
    blocks: Vec<WireHash>,
    next: u64,
    more: bool,
}

/// `/kv-events`. Ends when the worker drains: what its cache holds is of no use to anybody then.
pub(super) async fn kv_events(
    State(worker): State<Arc<Worker>>,
    position: Result<Query<Position>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(position) = position.map_err(|_| ApiError::MalformedInternal {
        what: "query",
        reason: "after is a number and epoch 32 hexadecimal digits".to_owned(),
    })?;
    let serving = worker.serving.get().ok_or(ApiError::Loading)?.clone();
    if worker.lifecycle.state() == LifeState::Draining {
        return Err(ApiError::Draining);
    }
    let epoch = worker.identity.epoch;
    let (first, next) = serving.engine.kv_events().range();
    let hello = Line::Hello { hello: Hello { epoch, block_tokens: BLOCK_TOKENS, first, next } };
    // Any number that is in the ring no more stands for "a snapshot, please".
    let from = match position {
        Position { after: Some(after), epoch: Some(of) } if of == epoch => after.saturating_add(1),
        Position { .. } => 0,
    };
    let feed = Feed { worker, serving, from, snapshot: None, greeting: Some(hello) };
    let lines = stream::unfold(feed, |mut feed| async {
        let lines = feed.next().await?;
        Some((Ok::<_, Infallible>(lines), feed))
    });
    let mut response = Response::new(Body::from_stream(lines));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(response)
}

/// The lines of one follower.
struct Feed {
    worker: Arc<Worker>,
    serving: Arc<Serving>,
    /// The next event that it wants.
    from: u64,
    /// What is left of a snapshot.
    snapshot: Option<Vec<BlockHash>>,
    greeting: Option<Line>,
}

impl Feed {
    /// The next lines; `None` when there will be no more.
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(greeting) = self.greeting.take() {
            return Some(text([greeting]));
        }
        loop {
            if let Some(rest) = self.snapshot.take() {
                return Some(text([self.snapshot_line(rest)]));
            }
            match self.serving.engine.kv_events().read(self.from) {
                Ok(events) if events.is_empty() => {
                    if let Some(idle) = self.wait().await? {
                        return Some(text([idle]));
                    }
                }
                Ok(events) => {
                    self.from += events.len() as u64;
                    return Some(text(events.iter().map(|event| line(event))));
                }
                Err(_missed) => {
                    let (blocks, next) = self.serving.engine.cached_blocks().await.ok()?;
                    self.snapshot = Some(blocks);
                    self.from = next;
                }
            }
        }
    }

    /// Waits for an event, but not for ever; `None` when none will come that anybody wants.
    async fn wait(&self) -> Option<Option<Line>> {
        tokio::select! {
            reached = self.serving.engine.kv_events().reached(self.from) => reached.then_some(None),
            () = self.worker.lifecycle.draining() => None,
            () = tokio::time::sleep(KEEP_ALIVE) => Some(Some(Line::Idle { next: self.from })),
        }
    }

    /// As much of a snapshot as goes into one line; the rest is kept.
    fn snapshot_line(&mut self, mut rest: Vec<BlockHash>) -> Line {
        let blocks = rest.split_off(rest.len().saturating_sub(EVENT_HASHES_MAX));
        let more = !rest.is_empty();
        self.snapshot = more.then_some(rest);
        Line::Snapshot { snapshot: Snapshot { blocks: wire(&blocks), next: self.from, more } }
    }
}

fn line(KvEvent { seq, change }: &KvEvent) -> Line {
    match change {
        Change::Stored(hashes) => Line::Stored { seq: *seq, stored: wire(hashes) },
        Change::Removed(hashes) => Line::Removed { seq: *seq, removed: wire(hashes) },
    }
}

fn wire(hashes: &[BlockHash]) -> Vec<WireHash> {
    hashes.iter().map(|hash| WireHash(hash.0)).collect()
}

fn text(lines: impl IntoIterator<Item = Line>) -> Bytes {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, &line).expect("lines are numbers and hashes, which always serialise");
        text.push(b'\n');
    }
    Bytes::from(text)
}
