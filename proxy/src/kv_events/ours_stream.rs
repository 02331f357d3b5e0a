//! The loop that keeps one worker of ours followed: asks for `/kv-events` (of the own engine directly, of another pod's through its
//! proxy, signed), hands lines to [`Follower`] and changes to the index, and begins again when the stream ends. It never ends by itself.

use super::lines::{LineTooLong, Lines};
use super::ours::{Follower, Resync};
use crate::entropy;
use crate::legs;
use crate::prefix::Holder;
use crate::proxy::Proxy;
use crate::upstream::{Answer, Request, UpstreamError, by};
use crate::workers::Worker;
use baton_wire::kv_events::{KEEP_ALIVE, Line};
use baton_wire::names::paths;
use http::StatusCode;
use http::uri::PathAndQuery;
use http_body_util::BodyExt as _;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// The first pause before another connection, and the longest. Each is twice the one before, and between half and all of that, so that
/// proxies don't come back to a worker at the same moment.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long the head of the answer may take: it is sent before anything is looked up.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Silence after which the connection counts as dead: two lines that say "nothing new" are missing, and a third is late.
const SILENCE_MAX: Duration = KEEP_ALIVE.saturating_mul(3);

/// Why a stream has ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    #[error("the answer is {0}")]
    Answered(StatusCode),
    #[error("nothing came for {SILENCE_MAX:?}")]
    Silent,
    #[error("the worker ended it")]
    Ended,
    #[error(transparent)]
    LineTooLong(#[from] LineTooLong),
    #[error("a line can't be read")]
    Line(#[from] serde_json::Error),
    #[error(transparent)]
    Resync(#[from] Resync),
}

/// Follows a worker until it is dropped.
pub(super) async fn follow(proxy: &Proxy, worker: &Worker) {
    let mut follower = Follower::default();
    let mut pause_max = PAUSE_MIN;
    loop {
        let mut session = Session { proxy, worker, follower: &mut follower, was_in_step: false };
        let Err(error) = session.run().await;
        let was_in_step = session.was_in_step;
        proxy.followed.lost(Holder::of(worker.number), Instant::now());
        if matches!(error, StreamError::Resync(_) | StreamError::LineTooLong(_) | StreamError::Line(_)) {
            proxy.followed.resync();
        }
        if matches!(error, StreamError::Ended) {
            // As a worker that drains does.
            tracing::info!(worker = %worker.address(), "KV events have ended");
        } else if was_in_step || pause_max == PAUSE_MIN {
            tracing::warn!(worker = %worker.address(), "KV events have ended: {error}");
        }
        if was_in_step {
            pause_max = PAUSE_MIN;
        }
        tokio::time::sleep(pause(pause_max, entropy::quick())).await;
        pause_max = (2 * pause_max).min(PAUSE_MAX);
    }
}

fn pause(pause_max: Duration, draw: u64) -> Duration {
    let half = pause_max / 2;
    half + Duration::from_micros(draw % (half.as_micros() as u64 + 1))
}

/// One connection.
struct Session<'a> {
    proxy: &'a Proxy,
    worker: &'a Worker,
    follower: &'a mut Follower,
    was_in_step: bool,
}

impl Session<'_> {
    async fn run(&mut self) -> Result<std::convert::Infallible, StreamError> {
        let answer = self.ask().await?;
        if answer.status != StatusCode::OK {
            return Err(StreamError::Answered(answer.status));
        }
        let (mut body, mut lines) = (answer.body, Lines::default());
        loop {
            let frame = timeout(SILENCE_MAX, body.frame()).await.map_err(|_| StreamError::Silent)?;
            let Ok(piece) = frame.ok_or(StreamError::Ended)??.into_data() else { continue };
            lines.push::<StreamError>(&piece, |line| self.line(serde_json::from_slice(line)?))?;
        }
    }

    async fn ask(&mut self) -> Result<Answer, UpstreamError> {
        let Session { proxy, worker, .. } = *self;
        let query = self.follower.connect().to_string();
        let mut request = Request::get(paths::KV_EVENTS);
        if !query.is_empty() {
            let path = format!("{}?{query}", paths::KV_EVENTS);
            request.path = PathAndQuery::try_from(path).expect("a number and hexadecimal digits make a query");
        }
        legs::sign(proxy, worker, paths::KV_EVENTS, &mut request);
        by(Instant::now() + HEAD_TIMEOUT, worker.address(), worker.upstream.send(&request)).await
    }

    fn line(&mut self, line: Line) -> Result<(), StreamError> {
        if let Some(change) = self.follower.line(line)? {
            self.proxy.followed.apply(Holder::of(self.worker.number), &change);
        }
        if self.follower.is_in_step() && !self.was_in_step {
            self.was_in_step = true;
            self.proxy.followed.in_step(Holder::of(self.worker.number), self.follower.block_tokens());
            tracing::debug!(worker = %self.worker.address(), "following KV events");
        }
        Ok(())
    }
}
