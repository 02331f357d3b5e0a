//! Bodies that come from a worker piece by piece. Each is pulled by the connection that it goes out on, so a slow reader
//! slows the worker down and nothing piles up here; and each owns what its request holds, so that dropping it, which is what
//! happens when the reader leaves, ends everything that was under way for it.

use super::respond::{DEADLINE_EXCEEDED, DECODE_WORKER_LOST};
use crate::account::Account;
use crate::address::Address;
use crate::api::Api;
use crate::drain::Work;
use crate::metrics::Cut;
use crate::pipeline::continuation::{Continued, GoingOn};
use crate::pipeline::{Events, Reading};
use crate::pulse::Sampled;
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
    idle_timeout: Duration,
    last_piece: Instant,
    /// Fires at the deadline or when the worker could have been silent for too long, whichever is earlier. It is set anew
    /// only when it fires, not at every piece.
    alarm: Pin<Box<Sleep>>,
    account: Account,
    _work: Work,
    /// Where this is the stream by which its worker's pulse is taken.
    sampled: Option<Sampled>,
    /// The first token has come.
    has_begun: bool,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Streaming(Box<Events>),
    /// The decode worker is lost, and another one is to go on.
    Switching(Switching),
    Ended,
}

/// A stream between two decode workers.
#[derive(Debug)]
struct Switching {
    going_on: GoingOn,
    reading: Reading,
    deadline: Instant,
    loss: Loss,
}

/// Whose answer broke off and why: what the client is told if nobody goes on.
#[derive(Debug)]
struct Loss {
    decode_worker: Address,
    cut: Cut,
    code: &'static str,
}

impl EventStream {
    pub(super) fn new(events: Box<Events>, idle_timeout: Duration, account: Account, work: Work) -> Self {
        let now = Instant::now();
        let alarm = Box::pin(tokio::time::sleep_until(events.deadline.min(now + idle_timeout)));
        let sampled = events.reservation.sample();
        EventStream {
            idle_timeout,
            last_piece: now,
            alarm,
            account,
            _work: work,
            sampled,
            has_begun: false,
            stage: Stage::Streaming(events),
        }
    }

    /// The worker has ended its stream as it should.
    fn finish(&mut self) -> Bytes {
        let Some(events) = self.take_events() else { return Bytes::new() };
        let Events { prefill, mut reading, .. } = *events;
        if let Some(leg) = prefill {
            leg.leave();
        }
        let rest = reading.finish();
        self.account.generated_tokens = reading.tokens();
        self.account.end();
        rest
    }

    fn take_events(&mut self) -> Option<Box<Events>> {
        self.sampled = None;
        match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Streaming(events) => Some(events),
            Stage::Switching(_) | Stage::Ended => None,
        }
    }

    /// The decode worker is lost. What was under way there is dropped, and another one is to go on; where none can, the client
    /// is told.
    fn lose(&mut self, cut: Cut, code: &'static str) -> Bytes {
        let Some(events) = self.take_events() else { return Bytes::new() };
        let Events { decode_worker, prefill, mut reading, deadline, continuation, .. } = *events;
        if reading.is_done() {
            // Only the connection's end is missing, of which the client knows nothing.
            if let Some(leg) = prefill {
                leg.leave();
            }
            self.account.generated_tokens = reading.tokens();
            self.account.end();
            return Bytes::new();
        }
        let loss = Loss { decode_worker, cut, code };
        match continuation.and_then(|continuation| continuation.go_on(&mut reading)) {
            Some(going_on) => {
                self.stage = Stage::Switching(Switching { going_on, reading, deadline, loss });
                Bytes::new()
            }
            None => self.cut(reading, &loss),
        }
    }

    /// Another worker goes on, or nobody does.
    fn switched(&mut self, continued: Option<Continued>) -> Bytes {
        let Stage::Switching(Switching { reading, deadline, mut loss, .. }) =
            std::mem::replace(&mut self.stage, Stage::Ended)
        else {
            return Bytes::new();
        };
        let Some(Continued { source, decode_worker, public_address, reservation, continuation }) = continued else {
            if Instant::now() >= deadline {
                loss = Loss { cut: Cut::DeadlineExceeded, code: DEADLINE_EXCEEDED, ..loss };
            }
            return self.cut(reading, &loss);
        };
        self.account.continued(public_address);
        self.last_piece = Instant::now();
        self.sampled = reservation.sample();
        self.stage = Stage::Streaming(Box::new(Events {
            source,
            decode_worker,
            prefill: None,
            reading,
            reservation,
            first_piece: None,
            deadline,
            continuation: Some(continuation),
        }));
        Bytes::new()
    }

    /// The stream can't go on: says so to the client, in an event of its own.
    fn cut(&mut self, mut reading: Reading, loss: &Loss) -> Bytes {
        let Loss { decode_worker, cut, code } = loss;
        self.account.generated_tokens = reading.tokens();
        self.account.cut(*cut);
        let message = format!("decode worker {decode_worker} did not complete its answer");
        let error = ErrorBody::server_error(message, Some(code));
        [reading.cut(), error_event(reading.api(), &error).as_bytes()].concat().into()
    }

    fn poll_alarm(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        loop {
            ready!(self.alarm.as_mut().poll(cx));
            let Stage::Streaming(events) = &self.stage else { return Poll::Pending };
            let (deadline, now) = (events.deadline, Instant::now());
            if now >= deadline {
                let Some(events) = self.take_events() else { return Poll::Pending };
                let Events { decode_worker, reading, .. } = *events;
                let loss = Loss { decode_worker, cut: Cut::DeadlineExceeded, code: DEADLINE_EXCEEDED };
                return Poll::Ready(self.cut(reading, &loss));
            }
            let silent_until = self.last_piece + self.idle_timeout;
            if now >= silent_until {
                return Poll::Ready(self.lose(Cut::IdleTimeout, "decode_worker_silent"));
            }
            self.alarm.as_mut().reset(deadline.min(silent_until));
        }
    }
}

/// Whether a piece of a stream has something that was generated. vLLM begins a stream of Responses with two events before the request
/// has reached the engine; all other streams begin with a token.
fn has_token(api: Api, data: &[u8]) -> bool {
    match api {
        Api::Responses => memchr::memmem::find(data, b".delta\"").is_some(),
        Api::Chat | Api::Completions | Api::Generate | Api::SglangGenerate | Api::Messages => true,
    }
}

/// An error in the midst of a stream, in the form that clients of each interface read it in.
fn error_event(api: Api, error: &ErrorBody) -> String {
    let text = |value: &serde_json::Value| value.to_string();
    let ours = || serde_json::to_string(error).expect("an error body is strings, which always serialise");
    let detail = &error.error;
    match api {
        Api::Chat | Api::Completions | Api::Generate | Api::SglangGenerate => format!("data: {}\n\n", ours()),
        Api::Messages => {
            let body = serde_json::json!({"type": "error", "error": {"type": "api_error", "message": detail.message}});
            format!("event: error\ndata: {}\n\n", text(&body))
        }
        Api::Responses => {
            let body = serde_json::json!({
                "type": "error", "code": detail.code, "message": detail.message, "param": null,
            });
            format!("event: error\ndata: {}\n\n", text(&body))
        }
    }
}

impl http_body::Body for EventStream {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        let this = &mut *self;
        loop {
            let out = match &mut this.stage {
                Stage::Ended => return Poll::Ready(None),
                Stage::Switching(switching) => {
                    let continued = ready!(Pin::new(&mut switching.going_on).poll(cx));
                    this.switched(continued)
                }
                Stage::Streaming(events) => match Pin::new(&mut events.source).poll_frame(cx) {
                    Poll::Pending => ready!(this.poll_alarm(cx)),
                    Poll::Ready(Some(Ok(frame))) => {
                        this.last_piece = Instant::now();
                        if let Some(sampled) = &this.sampled {
                            sampled.piece(this.last_piece);
                        }
                        // A frame that is not data is a trailer, which HTTP/1.1 clients of ours have no use for.
                        let Ok(data) = frame.into_data() else { continue };
                        if !this.has_begun && has_token(events.reading.api(), &data) {
                            this.has_begun = true;
                            this.account.piece();
                            if let Some(first_piece) = events.first_piece.take() {
                                first_piece.came(this.last_piece);
                            }
                        }
                        events.reading.push(data)
                    }
                    Poll::Ready(Some(Err(error))) => {
                        tracing::debug!(cause = std::error::Error::source(&error), "{error}");
                        this.lose(Cut::DecodeWorkerLost, DECODE_WORKER_LOST)
                    }
                    Poll::Ready(None) => this.finish(),
                },
            };
            if !out.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(out))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.stage, Stage::Ended)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_vllm_sends_before_it_has_begun_is_no_token() {
        let check = |api, text: &str, expect| assert_eq!(has_token(api, text.as_bytes()), expect, "{text}");
        check(Api::Responses, "event: response.created\ndata: {\"type\":\"response.created\"}\n\n", false);
        check(Api::Responses, "data: {\"type\":\"response.output_item.added\"}\n\n", false);
        check(Api::Responses, "data: {\"type\":\"response.output_text.delta\",\"delta\":\"a\"}\n\n", true);
        check(Api::Chat, "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n", true);
    }
}
