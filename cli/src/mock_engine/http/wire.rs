//! A connection that can be cut: it is reset after so many bytes of an answer.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Bytes that may still be written.
#[derive(Debug)]
pub(super) struct Cut(AtomicU64);

impl Default for Cut {
    fn default() -> Self {
        Cut(AtomicU64::new(u64::MAX))
    }
}

impl Cut {
    /// Nothing is written after so many bytes from now on.
    pub(super) fn after(&self, bytes: u64) {
        self.0.store(bytes, Ordering::Relaxed);
    }

    fn left(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|left| *left != u64::MAX)
    }
}

/// A connection that can be cut.
#[derive(Debug)]
pub(super) struct Wire {
    stream: TcpStream,
    cut: Arc<Cut>,
}

impl Wire {
    pub(super) fn new(stream: TcpStream, cut: Arc<Cut>) -> Self {
        Wire { stream, cut }
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let Some(left) = self.cut.left() else { return Pin::new(&mut self.stream).poll_write(context, bytes) };
        if left == 0 {
            // Closing without lingering sends a reset in place of an orderly end.
            let _ = self.stream.set_zero_linger();
            return Poll::Ready(Err(Error::from(ErrorKind::ConnectionReset)));
        }
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, &bytes[..length]))?;
        self.cut.after(left - written as u64);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        if self.cut.left().is_none() {
            return Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        }
        let first = parts.iter().find(|part| !part.is_empty()).map_or(&[][..], |part| part);
        self.poll_write(context, first)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
