//! The body of an answer: whole, in two halves, or a stream that takes its time, each with the failure that it meets.

use crate::mock_engine::answer::Answer;
use crate::mock_engine::engine::Work;
use crate::mock_engine::events::Events;
use crate::mock_engine::fail::{Failure, StallAt};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use std::collections::VecDeque;
use std::io::{Error, ErrorKind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// An event whose JSON is cut.
const BAD_EVENT: &[u8] = b"data: {\"id\": \"x\", \"choices\": [{\n\n";

/// The body of an answer.
pub(super) enum Body {
    /// All at once.
    Whole(Option<Bytes>),
    /// With something between its halves.
    Halves(Box<Halves>),
    /// Event by event.
    Stream(Box<Stream>),
}

/// What is left of an answer that isn't sent at once.
pub(super) struct Halves {
    pieces: VecDeque<Bytes>,
    bytes: u64,
    pause: Option<Pin<Box<Sleep>>>,
    breaks: bool,
    work: Work,
    tokens: u64,
}

/// What is left of a stream.
pub(super) struct Stream {
    events: Events,
    work: Work,
    /// Tokens in all, counted when all are sent.
    tokens: u64,
    delay: Duration,
    /// When the token that comes next is due, once the first has been sent.
    due: Option<Instant>,
    timer: Pin<Box<Sleep>>,
    is_waiting: bool,
    /// Whether the runtime had its turn since the last event. Without it all events would leave in one write, and the
    /// tokens of an engine never do.
    yielded: bool,
    failure: Option<Failure>,
}

impl Body {
    /// What is no answer to a leg.
    pub(super) fn whole(text: String) -> Self {
        Body::Whole(Some(Bytes::from(text)))
    }

    /// An answer that is not streamed, with the failure that it meets.
    pub(super) fn sent(mut text: String, mut work: Work, tokens: u64, failure: Option<Failure>) -> Self {
        let pause = match failure {
            Some(Failure::BadJson) => {
                // The last two characters close the answer, and a multi-byte one is never among them.
                text.truncate(text.len().saturating_sub(2));
                None
            }
            Some(Failure::Stall { lasts, at: StallAt::Mid }) => Some(lasts),
            Some(Failure::BreakStreamAfter(_)) => Some(Duration::ZERO),
            _ => None,
        };
        let Some(pause) = pause else {
            work.answered(tokens);
            return Body::whole(text);
        };
        let bytes = Bytes::from(text);
        let half = bytes.len() / 2;
        Body::Halves(Box::new(Halves {
            pieces: VecDeque::from([bytes.slice(..half), bytes.slice(half..)]),
            bytes: bytes.len() as u64,
            pause: Some(Box::pin(tokio::time::sleep(pause))),
            breaks: matches!(failure, Some(Failure::BreakStreamAfter(_))),
            work,
            tokens,
        }))
    }

    /// An answer as a stream, with the failure that it meets.
    pub(super) fn streamed(answer: Answer, work: Work, tokens: u64, delay: Duration, failure: Option<Failure>) -> Self {
        Body::Stream(Box::new(Stream {
            events: Events::new(answer),
            work,
            tokens,
            delay,
            due: None,
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            is_waiting: false,
            yielded: true,
            failure,
        }))
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match &mut *self {
            Body::Whole(bytes) => {
                Poll::Ready(bytes.take().filter(|bytes| !bytes.is_empty()).map(|bytes| Ok(Frame::data(bytes))))
            }
            Body::Halves(halves) => halves.poll(context),
            Body::Stream(stream) => stream.poll(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Whole(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Body::Halves(halves) => halves.pieces.is_empty(),
            Body::Stream(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Body::Halves(halves) => SizeHint::with_exact(halves.bytes),
            Body::Stream(_) => SizeHint::default(),
        }
    }
}

type Polled = Poll<Option<Result<Frame<Bytes>, Error>>>;

fn broken() -> Polled {
    Poll::Ready(Some(Err(Error::from(ErrorKind::ConnectionAborted))))
}

impl Halves {
    fn poll(&mut self, context: &mut Context<'_>) -> Polled {
        if self.pieces.len() == 1
            && let Some(pause) = &mut self.pause
        {
            ready!(pause.as_mut().poll(context));
            self.pause = None;
            if self.breaks {
                self.work.broken();
                return broken();
            }
        }
        let Some(piece) = self.pieces.pop_front() else { return Poll::Ready(None) };
        self.bytes -= piece.len() as u64;
        if self.pieces.is_empty() {
            self.work.answered(self.tokens);
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }
}

impl Stream {
    fn poll(&mut self, context: &mut Context<'_>) -> Polled {
        loop {
            if self.is_waiting {
                ready!(self.timer.as_mut().poll(context));
                self.is_waiting = false;
            }
            if let Some(index) = self.events.next_token() {
                let middle = self.events.tokens() / 2;
                match self.failure {
                    Some(Failure::BreakStreamAfter(tokens)) if index >= tokens => {
                        self.work.broken();
                        return broken();
                    }
                    Some(Failure::Stall { lasts, at: StallAt::Mid }) if index == middle => {
                        self.failure = None;
                        self.due = None;
                        self.wait_until(Instant::now() + lasts);
                        continue;
                    }
                    Some(Failure::BadJson) if index == middle => {
                        self.failure = None;
                        return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(BAD_EVENT)))));
                    }
                    _ => {}
                }
                if let Some(due) = self.due.take() {
                    self.wait_until(due);
                    continue;
                }
            }
            if !self.yielded {
                self.yielded = true;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            let is_first_of_its_place = self.events.next_token().is_some();
            let Some(piece) = self.events.next() else { return Poll::Ready(None) };
            if is_first_of_its_place && !self.delay.is_zero() {
                self.due = Some(Instant::now() + self.delay);
            }
            // The timer gives the runtime its turn where there is a delay; the choices of one place leave together.
            self.yielded = !self.delay.is_zero() || self.events.next_token().is_none();
            if self.events.is_at_end() {
                self.work.answered(self.tokens);
            }
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
    }

    fn wait_until(&mut self, due: Instant) {
        self.timer.as_mut().reset(due);
        self.is_waiting = true;
    }
}
