//! Bodies: what our responses carry, and reading a request's within its bounds.

use super::kv_events::KvEvents;
use super::stream::{EventStream, Relay};
use crate::upstream::UpstreamError;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body::{Frame, SizeHint};
use http_body_util::Full;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// The body of a response.
#[derive(Debug)]
pub(crate) enum Body {
    /// All there at once.
    Whole(Full<Bytes>),
    /// A decode worker's events on their way to a client.
    Events(Box<EventStream>),
    /// The engine's answer to another pod's leg, as it comes.
    Relay(Box<Relay>),
    /// What the engine tells of its prefix cache.
    KvEvents(Box<KvEvents>),
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        match self.get_mut() {
            Body::Whole(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Body::Events(body) => Pin::new(body.as_mut()).poll_frame(cx),
            Body::Relay(body) => Pin::new(body.as_mut()).poll_frame(cx),
            Body::KvEvents(body) => Pin::new(body.as_mut()).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Whole(body) => body.is_end_stream(),
            Body::Events(body) => body.is_end_stream(),
            Body::Relay(body) => body.is_end_stream(),
            Body::KvEvents(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Whole(body) => body.size_hint(),
            Body::Events(body) => body.size_hint(),
            Body::Relay(body) => body.size_hint(),
            Body::KvEvents(body) => body.size_hint(),
        }
    }
}

/// Why a request's body could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("the body is longer than {bytes_max} bytes")]
    TooLong { bytes_max: usize },
    #[error("the body did not arrive within {} seconds, at {RATE_MIN} bytes a second or more", within.as_secs())]
    TooSlow { within: Duration },
    #[error("the body broke off")]
    Broken(#[source] hyper::Error),
}

/// Bytes that a body may go over its bound and still be read to its end, to be thrown away. A client sends all of its body
/// before it reads the answer, and closing a socket with unread data resets it, so an answer that came earlier would be lost
/// and the client would never learn what was wrong. Sixteen times the largest body of the default configuration.
const DISCARDED_BYTES_MAX: usize = 64 << 20;

/// Bytes a second that must have arrived on average once [`GRACE`] is over. A hundredth of the slowest mobile connection; a
/// client that sends a byte now and then to keep its place is below it.
const RATE_MIN: u64 = 1 << 10;

/// How long a body may stand still before its rate is looked at: a connection that changes masts loses a few seconds.
const GRACE: Duration = Duration::from_secs(5);

/// Bytes for which room is made when a body has more than one piece: what two pieces usually have. More is made as it arrives,
/// since a number in a header must not make us allocate.
const ROOM_BYTES: usize = 64 << 10;

/// Reads a body whole. Of one that is over the bound nothing is kept, and nothing is even read where the client announced
/// its length and waits for our word before it sends.
pub(super) async fn read<B>(
    headers: &HeaderMap,
    mut body: B,
    bytes_max: usize,
    within: Duration,
) -> Result<Bytes, ReadError>
where
    B: http_body::Body<Data = Bytes, Error = hyper::Error> + Unpin,
{
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let read_max = bytes_max.saturating_add(DISCARDED_BYTES_MAX);
    let in_vain = if headers.contains_key(header::EXPECT) { bytes_max } else { read_max };
    if announced.is_some_and(|length| length > in_vain) {
        return Err(ReadError::TooLong { bytes_max });
    }
    let mut patience = Patience { within, started: None, alarm: None };
    let mut all = Gathered::Nothing;
    let mut length = 0;
    while length <= read_max && !body.is_end_stream() {
        let frame = std::future::poll_fn(|cx| match Pin::new(&mut body).poll_frame(cx) {
            Poll::Ready(frame) => Poll::Ready(Ok(frame)),
            Poll::Pending => patience.poll_end(length, cx).map(Err),
        });
        match frame.await.map_err(|()| ReadError::TooSlow { within })? {
            None => break,
            Some(frame) => {
                if let Ok(data) = frame.map_err(ReadError::Broken)?.into_data() {
                    length += data.len();
                    all = if length <= bytes_max { all.and(data) } else { Gathered::Nothing };
                }
            }
        }
    }
    if length <= bytes_max { Ok(all.into_bytes()) } else { Err(ReadError::TooLong { bytes_max }) }
}

/// The pieces of a body so far. Most bodies are one piece, which is not copied.
enum Gathered {
    Nothing,
    One(Bytes),
    Many(BytesMut),
}

impl Gathered {
    fn and(self, piece: Bytes) -> Self {
        match self {
            Gathered::Nothing => Gathered::One(piece),
            Gathered::One(first) => {
                let mut all = BytesMut::with_capacity((first.len() + piece.len()).max(ROOM_BYTES));
                all.extend_from_slice(&first);
                all.extend_from_slice(&piece);
                Gathered::Many(all)
            }
            Gathered::Many(mut all) => {
                all.extend_from_slice(&piece);
                Gathered::Many(all)
            }
        }
    }

    fn into_bytes(self) -> Bytes {
        match self {
            Gathered::Nothing => Bytes::new(),
            Gathered::One(only) => only,
            Gathered::Many(all) => all.freeze(),
        }
    }
}

/// How long a body is waited for. Nothing of it exists until there is something to wait for.
struct Patience {
    within: Duration,
    started: Option<Instant>,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Patience {
    /// Ready when a body of which `length` bytes have come is too late.
    fn poll_end(&mut self, length: usize, cx: &mut Context<'_>) -> Poll<()> {
        let started = *self.started.get_or_insert_with(Instant::now);
        let by_rate = GRACE + Duration::from_millis(length as u64 * 1000 / RATE_MIN);
        let until = started + by_rate.min(self.within);
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        // Set anew when it fires and not at each piece.
        while alarm.as_mut().poll(cx).is_ready() {
            if Instant::now() >= until {
                return Poll::Ready(());
            }
            alarm.as_mut().reset(until);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// A body of which each piece comes so long after the one before.
    struct Drip {
        pieces: VecDeque<Bytes>,
        pause: Duration,
        sleep: Option<Pin<Box<Sleep>>>,
    }

    impl Drip {
        fn new(pieces: usize, piece: &'static str, pause: Duration) -> Self {
            Drip { pieces: (0..pieces).map(|_| Bytes::from_static(piece.as_bytes())).collect(), pause, sleep: None }
        }
    }

    impl http_body::Body for Drip {
        type Data = Bytes;
        type Error = hyper::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
            let pause = self.pause;
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(pause)));
            std::task::ready!(sleep.as_mut().poll(cx));
            self.sleep = None;
            Poll::Ready(self.pieces.pop_front().map(|piece| Ok(Frame::data(piece))))
        }
    }

    const WITHIN: Duration = Duration::from_secs(40);

    async fn read_drip(drip: Drip, bytes_max: usize) -> (Result<Bytes, ReadError>, Duration) {
        let started = Instant::now();
        (read(&HeaderMap::new(), drip, bytes_max, WITHIN).await, started.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_drips_is_given_up_soon() {
        let (read, took) = read_drip(Drip::new(1000, "x", Duration::from_secs(1)), 1 << 20).await;
        assert!(matches!(read, Err(ReadError::TooSlow { .. })));
        assert!(took < GRACE + Duration::from_secs(2), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_body_is_read_and_a_long_pause_forgiven() {
        const PIECE: &str = kilobyte();
        let (read, _) = read_drip(Drip::new(30, PIECE, Duration::from_secs(1)), 1 << 20).await;
        assert_eq!(read.expect("a kilobyte a second is enough").len(), 30 * PIECE.len());
        let (read, _) = read_drip(Drip::new(1, "x", Duration::from_secs(2)), 1 << 20).await;
        assert_eq!(read.expect("two pauses are within the grace"), "x");
    }

    /// A kilobyte and a little.
    const fn kilobyte() -> &'static str {
        const BYTES: [u8; 1100] = [b'x'; 1100];
        match std::str::from_utf8(&BYTES) {
            Ok(text) => text,
            Err(_) => "",
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_body_takes_longer_than_it_may_altogether() {
        let (read, took) = read_drip(Drip::new(1000, kilobyte(), Duration::from_millis(900)), 1 << 30).await;
        assert!(matches!(read, Err(ReadError::TooSlow { .. })));
        assert_eq!(took.as_secs(), WITHIN.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn pieces_are_put_together_up_to_the_bound() {
        for (pieces, fits) in [(0, true), (1, true), (3, true), (4, false)] {
            let (read, _) = read_drip(Drip::new(pieces, "abc", Duration::ZERO), 9).await;
            match read {
                Ok(body) => assert!(fits && body == "abc".repeat(pieces)),
                Err(error) => assert!(!fits && matches!(error, ReadError::TooLong { bytes_max: 9 }), "{error}"),
            }
        }
    }
}
