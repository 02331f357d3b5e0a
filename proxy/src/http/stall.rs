//! A socket whose peer must keep reading: a write of which nothing is taken for too long fails, and so ends the connection with
//! all that its request holds. Knows time and bytes, never what they are.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// A stream that bounds how long a write may make no progress.
#[derive(Debug)]
pub(super) struct Unstalled<S> {
    stream: S,
    timeout: Duration,
    /// Runs from the first write of which nothing was taken until one of which something was.
    alarm: Option<Pin<Box<Sleep>>>,
}

impl<S> Unstalled<S> {
    pub(super) fn new(stream: S, timeout: Duration) -> Self {
        Unstalled { stream, timeout, alarm: None }
    }

    /// The outcome of a write, or the end of waiting for one.
    fn bounded<T>(&mut self, written: Poll<Result<T>>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        if written.is_ready() {
            self.alarm = None;
            return written;
        }
        let until = Instant::now() + self.timeout;
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        ready!(alarm.as_mut().poll(cx));
        Poll::Ready(Err(Error::new(ErrorKind::TimedOut, "the peer has stopped reading")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Unstalled<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Unstalled<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.bounded(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.bounded(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.bounded(flushed, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const TIMEOUT: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_never_reads_ends_the_write() {
        let (ours, _theirs) = tokio::io::duplex(16);
        let started = Instant::now();
        let error = Unstalled::new(ours, TIMEOUT).write_all(&[0; 17]).await.expect_err("nobody reads");
        assert_eq!((error.kind(), started.elapsed()), (ErrorKind::TimedOut, TIMEOUT));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_peer_gets_everything() {
        let (ours, mut theirs) = tokio::io::duplex(16);
        let write = async move { Unstalled::new(ours, TIMEOUT).write_all(&[0; 160]).await };
        let read = async {
            let mut byte = [0; 16];
            for _ in 0..10 {
                tokio::time::sleep(TIMEOUT - Duration::from_secs(1)).await;
                theirs.read_exact(&mut byte).await.expect("16 bytes");
            }
        };
        let (written, ()) = tokio::join!(write, read);
        written.expect("each piece was taken in time");
    }
}
