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

/// Reads a body whole. One whose announced length is over the bound is refused before anything of it is read.
pub(super) async fn read(
    headers: &HeaderMap,
    body: Incoming,
    bytes_max: usize,
    within: Duration,
) -> Result<Bytes, ReadError> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > bytes_max) {
        return Err(ReadError::TooLong { bytes_max });
    }
    let reading = async {
        let mut body = body;
        // Room for what is announced, but only as it arrives: a number in a header must not make us allocate.
        let mut all = BytesMut::new();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.map_err(ReadError::Broken)?.into_data() {
                if all.len() + data.len() > bytes_max {
                    return Err(ReadError::TooLong { bytes_max });
                }
                all.extend_from_slice(&data);
            }
        }
        Ok(all.freeze())
    };
    tokio::time::timeout(within, reading).await.map_err(|_| ReadError::TooSlow { within })?
}
