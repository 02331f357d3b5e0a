//! Bodies that come from a worker piece by piece. Each is pulled by the connection that it goes out on, so a slow reader
//! slows the worker down and nothing piles up here; and each owns what its request holds, so that dropping it, which is what
//! happens when the reader leaves, ends everything that was under way for it.

use super::respond::{DEADLINE_EXCEEDED, DECODE_WORKER_LOST};
use crate::account::Account;
use crate::drain::Work;
use crate::metrics::Cut;
use crate::pipeline::Events;
use crate::sse::Filter;
use crate::upstream::{Body, UpstreamError};
use baton_wire::ErrorBody;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// A decode worker's events on their way to a client.
#[derive(Debug)]
pub(crate) struct EventStream {
    filter: Filter,
    idle_timeout: Duration,
    last_piece: Instant,
    /// Fires at the deadline or when the worker could have been silent for too long, whichever is earlier. It is set anew
    /// only when it fires, not at every piece.
    alarm: Pin<Box<Sleep>>,
    account: Account,
    _work: Work,
    /// Gone once the stream has ended.
    events: Option<Events>,
}

impl EventStream {
    pub(super) fn new(events: Events, idle_timeout: Duration, account: Account, work: Work) -> Self {
        let now = Instant::now();
        let alarm = Box::pin(tokio::time::sleep_until(events.deadline.min(now + idle_timeout)));
        EventStream {
            filter: Filter::default(),
            idle_timeout,
            last_piece: now,
            alarm,
            account,
            _work: work,
            events: Some(events),
        }
    }

    /// The worker has ended its stream as it should.
    fn finish(&mut self) -> Option<Bytes> {
        if let Some(Events { prefill: Some(leg), .. }) = self.events.take() {
            leg.leave();
        }
        self.account.generated_tokens = Some(self.filter.tokens());
        self.account.end();
        Some(self.filter.finish()).filter(|rest| !rest.is_empty())
    }

    /// The stream can't go on: drops what it holds and says so to the client, in an event of its own.
    fn cut(&mut self, cut: Cut, code: &str) -> Bytes {
        let worker = self.events.take().map(|events| events.decode_worker.to_string()).unwrap_or_default();
        self.account.generated_tokens = Some(self.filter.tokens());
        self.account.cut(cut);
        let message = format!("decode worker {worker} did not complete its answer");
        let error = serde_json::to_string(&ErrorBody::server_error(message, Some(code)))
            .expect("an error body is strings, which always serialise");
        let before = self.filter.cut();
        [before, b"data: ", error.as_bytes(), b"\n\n"].concat().into()
    }

    fn poll_alarm(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        loop {
            ready!(self.alarm.as_mut().poll(cx));
            let Some(deadline) = self.events.as_ref().map(|events| events.deadline) else { return Poll::Pending };
            let now = Instant::now();
            if now >= deadline {
                return Poll::Ready(self.cut(Cut::DeadlineExceeded, DEADLINE_EXCEEDED));
            }
            let silent_until = self.last_piece + self.idle_timeout;
            if now >= silent_until {
                return Poll::Ready(self.cut(Cut::IdleTimeout, "decode_worker_silent"));
            }
            self.alarm.as_mut().reset(deadline.min(silent_until));
        }
    }
}

impl http_body::Body for EventStream {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        let this = &mut *self;
        loop {
            let Some(events) = &mut this.events else { return Poll::Ready(None) };
            let out = match Pin::new(&mut events.source).poll_frame(cx) {
                Poll::Pending => ready!(this.poll_alarm(cx)),
                Poll::Ready(Some(Ok(frame))) => {
                    this.last_piece = Instant::now();
                    // A frame that is not data is a trailer, which HTTP/1.1 clients of ours have no use for.
                    match frame.into_data() {
                        Ok(data) => this.filter.push(&data),
                        Err(_) => continue,
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(cause = std::error::Error::source(&error), "{error}");
                    this.cut(Cut::DecodeWorkerLost, DECODE_WORKER_LOST)
                }
                Poll::Ready(None) => match this.finish() {
                    Some(rest) => rest,
                    None => return Poll::Ready(None),
                },
            };
            if !out.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(out))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.events.is_none()
    }
}

/// The engine's answer to another pod's leg, as it is: lines of ours included, which are for the proxy that asked. When the
/// engine breaks off, the connection does, too, so that proxy learns of it.
#[derive(Debug)]
pub(crate) struct Relay {
    body: Body,
    deadline: Pin<Box<Sleep>>,
    _work: Work,
}

impl Relay {
    /// The deadline ends a leg whose proxy has vanished without a word.
    pub(super) fn new(body: Body, deadline: Instant, work: Work) -> Self {
        Relay { body, deadline: Box::pin(tokio::time::sleep_until(deadline)), _work: work }
    }
}

impl http_body::Body for Relay {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if frame.is_pending() && self.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Err(self.body.too_late())));
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
