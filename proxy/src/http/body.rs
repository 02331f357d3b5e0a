//! Bodies: what our responses carry, and reading a request's within its bounds.

use super::stream::{EventStream, Relay};
use crate::upstream::UpstreamError;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

/// The body of a response.
#[derive(Debug)]
pub(crate) enum Body {
    /// All there at once.
    Whole(Full<Bytes>),
    /// A decode worker's events on their way to a client.
    Events(Box<EventStream>),
    /// The engine's answer to another pod's leg, as it comes.
    Relay(Box<Relay>),
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        match self.get_mut() {
            Body::Whole(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Body::Events(body) => Pin::new(body.as_mut()).poll_frame(cx),
            Body::Relay(body) => Pin::new(body.as_mut()).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Whole(body) => body.is_end_stream(),
            Body::Events(body) => body.is_end_stream(),
            Body::Relay(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Whole(body) => body.size_hint(),
            Body::Events(body) => body.size_hint(),
            Body::Relay(body) => body.size_hint(),
        }
    }
}

/// Why a request's body could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("the body is longer than {bytes_max} bytes")]
    TooLong { bytes_max: usize },
    #[error("the body did not arrive within {} seconds", within.as_secs())]
    TooSlow { within: Duration },
    #[error("the body broke off")]
    Broken(#[source] hyper::Error),
}

/// Bytes that a body may go over its bound and still be read to its end, to be thrown away. A client sends all of its body
/// before it reads the answer, and closing a socket with unread data resets it, so an answer that came earlier would be lost
/// and the client would never learn what was wrong. Sixteen times the largest body of the default configuration.
const DISCARDED_BYTES_MAX: usize = 64 << 20;

/// Reads a body whole. Of one that is over the bound nothing is kept, and nothing is even read where the client announced
/// its length and waits for our word before it sends.
pub(super) async fn read(
    headers: &HeaderMap,
    body: Incoming,
    bytes_max: usize,
    within: Duration,
) -> Result<Bytes, ReadError> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let read_max = bytes_max.saturating_add(DISCARDED_BYTES_MAX);
    let in_vain = if headers.contains_key(header::EXPECT) { bytes_max } else { read_max };
    if announced.is_some_and(|length| length > in_vain) {
        return Err(ReadError::TooLong { bytes_max });
    }
    let reading = async {
        let mut body = body;
        // Room for what is announced, but only as it arrives: a number in a header must not make us allocate.
        let mut all = BytesMut::new();
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.map_err(ReadError::Broken)?.into_data() {
                length += data.len();
                if length <= bytes_max {
                    all.extend_from_slice(&data);
                } else if length <= read_max {
                    all = BytesMut::new();
                } else {
                    break;
                }
            }
        }
        if length <= bytes_max { Ok(all.freeze()) } else { Err(ReadError::TooLong { bytes_max }) }
    };
    tokio::time::timeout(within, reading).await.map_err(|_| ReadError::TooSlow { within })?
}
