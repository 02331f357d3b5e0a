//! Which HTTP a plaintext connection speaks, told by its first bytes: HTTP/2 begins with a fixed text (RFC 9113, section 3.4),
//! and no request of HTTP/1 does.
//!
//! The bytes are read and given back to whoever speaks the protocol, not peeked at: a client that sends a part of the text
//! and waits would have us look at the same bytes again and again.

use bytes::{Buf as _, Bytes, BytesMut};
use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

/// What an HTTP/2 client sends before anything else.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes that are read first: a usual request's line and headers, so that telling costs no read of its own.
const FIRST_BYTES: usize = 4 << 10;

/// A version of HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Http1,
    Http2,
}

/// A stream of which some bytes have been read and are read again.
#[derive(Debug)]
pub(super) struct Replayed<S> {
    first: Bytes,
    stream: S,
}

impl<S> Replayed<S> {
    /// Nothing of this one has been read.
    pub(super) fn untouched(stream: S) -> Self {
        Replayed { first: Bytes::new(), stream }
    }
}

/// Waits until the first bytes tell. A connection that ends before they do is HTTP/1, where it is an error like any other.
pub(super) async fn told<S: AsyncRead + Unpin>(mut stream: S) -> Result<(Protocol, Replayed<S>)> {
    let mut first = BytesMut::with_capacity(FIRST_BYTES);
    let protocol = loop {
        let compared = first.len().min(PREFACE.len());
        if first[..compared] != PREFACE[..compared] {
            break Protocol::Http1;
        }
        if compared == PREFACE.len() {
            break Protocol::Http2;
        }
        if stream.read_buf(&mut first).await? == 0 {
            break Protocol::Http1;
        }
    };
    Ok((protocol, Replayed { first: first.freeze(), stream }))
}

impl<S: AsyncRead + Unpin> AsyncRead for Replayed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let length = self.first.len().min(buffer.remaining());
        buffer.put_slice(&self.first[..length]);
        self.first.advance(length);
        if self.first.is_empty() {
            // An empty slice would keep its memory for as long as the connection lives.
            self.first = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Replayed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    /// What is told of these pieces, and all that can be read afterwards.
    async fn told_of(pieces: &[&[u8]]) -> (Protocol, Vec<u8>) {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        let pieces: Vec<Vec<u8>> = pieces.iter().map(|piece| piece.to_vec()).collect();
        let write = async move {
            for piece in pieces {
                theirs.write_all(&piece).await.expect("room");
                tokio::task::yield_now().await;
            }
        };
        let read = async {
            let (protocol, mut stream) = told(ours).await.expect("a stream");
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.expect("an end");
            (protocol, all)
        };
        tokio::join!(write, read).1
    }

    #[tokio::test]
    async fn the_first_bytes_tell_and_none_is_lost() {
        let check = async |pieces: &[&[u8]], expect: Protocol| {
            assert_eq!(told_of(pieces).await, (expect, pieces.concat()), "{pieces:?}");
        };
        check(&[PREFACE, b"\0\0\0\x04"], Protocol::Http2).await;
        check(&[b"P", b"RI * HTTP/2.0\r\n\r\n", b"SM\r\n\r\n"], Protocol::Http2).await;
        check(&[b"POST / HTTP/1.1\r\n\r\n"], Protocol::Http1).await;
        check(&[b"P", b"OST / HTTP/1.1\r\n\r\n"], Protocol::Http1).await;
        check(&[b"PRI * HTTP/1.1\r\n\r\n"], Protocol::Http1).await;
        check(&[b"PRI * HT"], Protocol::Http1).await;
        check(&[], Protocol::Http1).await;
        check(&[b"GET / HTTP/1.1\r\n", &[b'a'; 9000], b"\r\n\r\n"], Protocol::Http1).await;
    }
}
