//! HTTP/2 on one connection: many requests at once, so what bounds a connection of HTTP/1 must bound a stream here.
//!
//! What each bound is against, and who keeps it:
//!
//! ```text
//! streams reset before they are served (CVE-2023-44487)   h2: max_pending_accept_reset_streams, then GOAWAY
//! streams reset once they are served                      here: RESETS_MAX given up more than answered end the connection
//! streams that our side is made to reset (CVE-2025-8671)  h2: max_local_error_reset_streams, then GOAWAY
//! endless CONTINUATION frames                             h2: as many as max_header_list_size needs, then GOAWAY
//! large header lists                                      h2: max_header_list_size, answered 431
//! many header lines                                       framing.rs: 100, answered 431
//! answers that are not taken (no window)                  here: a stream that takes nothing for STALL_TIMEOUT is reset
//! a socket that is not read                               stall.rs, as with HTTP/1
//! connections without requests                            here: FIRST_REQUEST_TIMEOUT and IDLE_TIMEOUT; vanished peers: pings
//! ```

use super::body::Body;
use super::framing;
use super::serve::{HEADER_BYTES_MAX, HEADER_TIMEOUT, STALL_TIMEOUT};
use super::{Request, Response};
use crate::upstream::UpstreamError;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Requests of one connection at once; what browsers and libraries expect at least.
const STREAMS_MAX: u32 = 100;

/// Bytes of one request's body that may be under way unread: the protocol's own default.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;

/// Bytes of all bodies of one connection that may be under way unread: what a stranger can make us hold for a connection.
const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;

/// Bytes of one frame: the protocol's smallest.
const FRAME_BYTES_MAX: u32 = 16 << 10;

/// Bytes of one answer that wait to be written: a few events, so that a slow client slows its worker down.
const SEND_BYTES_MAX: usize = 64 << 10;

/// Streams that were reset before we looked at them; a client that cancels has a few under way.
const RESETS_UNSEEN_MAX: usize = 20;

/// Streams that our side reset for faults of the client's, for which there is no good reason at all.
const ERRORS_MAX: usize = 64;

/// By how much the requests that a client gave up unanswered may outnumber those that were answered: everything that may be
/// open at once, cancelled twice in a row.
const RESETS_MAX: u32 = 2 * STREAMS_MAX;

/// How long a connection may take to send its first request, as with HTTP/1.
const FIRST_REQUEST_TIMEOUT: Duration = HEADER_TIMEOUT;

/// How long a connection may be without a request. Longer than with HTTP/1, since one connection stands for many.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a peer is asked whether it is still there, and how long it may take to say so.
const PING_INTERVAL: Duration = Duration::from_secs(20);

/// How often a connection is looked at for requests.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Serves a connection whose peer speaks HTTP/2, until `closing` and the end of what is being answered.
pub(super) async fn serve<I, S, F>(io: I, service: S, closing: CancellationToken)
where
    I: AsyncRead + AsyncWrite + Unpin,
    S: Fn(Request) -> F,
    F: Future<Output = Response> + Send + 'static,
{
    let streams = Arc::new(Streams::default());
    let service = service_fn(|request| {
        streams.begun.fetch_add(1, Ordering::Relaxed);
        let mut outcome = Outcome { streams: Arc::clone(&streams), is_answered: false };
        let answer = framing::http2(&request).map(|()| service(request));
        async move {
            let response = match answer {
                Ok(answer) => answer.await,
                Err(refusal) => *refusal,
            };
            if http_body::Body::is_end_stream(response.body()) {
                outcome.answered();
            }
            let taking = TAKING.with(Arc::clone);
            Ok::<_, Infallible>(response.map(|body| Watched { body, taking, outcome }))
        }
    });
    let mut connection = std::pin::pin!(
        http2::Builder::new(OnStreams(Arc::clone(&streams)))
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS_MAX)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_send_buf_size(SEND_BYTES_MAX)
            .max_header_list_size(HEADER_BYTES_MAX as u32)
            .max_pending_accept_reset_streams(RESETS_UNSEEN_MAX)
            .max_local_error_reset_streams(ERRORS_MAX)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_INTERVAL)
            .serve_connection(TokioIo::new(io), service)
    );
    let mut look = tokio::time::interval(LOOK_INTERVAL);
    let (mut is_closing, mut used) = (false, Instant::now());
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!("connection ended: {error}");
                }
                return;
            }
            () = closing.cancelled(), if !is_closing => {
                is_closing = true;
                connection.as_mut().graceful_shutdown();
            }
            () = streams.flooded.notified() => {
                tracing::debug!("connection ended: its client gives up more requests than it waits for");
                return;
            }
            _ = look.tick() => {
                if streams.open.load(Ordering::Relaxed) > 0 {
                    used = Instant::now();
                }
                let has_begun = streams.begun.load(Ordering::Relaxed) > 0;
                if used.elapsed() >= if has_begun { IDLE_TIMEOUT } else { FIRST_REQUEST_TIMEOUT } {
                    if is_closing {
                        return;
                    }
                    is_closing = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

/// The streams of one connection.
#[derive(Debug, Default)]
struct Streams {
    /// Since the connection was made.
    begun: AtomicU64,
    open: AtomicU32,
    /// By how much those that were given up outnumber those that were answered.
    given_up: AtomicU32,
    flooded: Notify,
}

/// Notes what became of one request. Dropped before its answer was asked for, its client gave it up.
struct Outcome {
    streams: Arc<Streams>,
    is_answered: bool,
}

impl Outcome {
    fn answered(&mut self) {
        self.is_answered = true;
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        let given_up = &self.streams.given_up;
        let next = |count: u32| Some(if self.is_answered { count.saturating_sub(1) } else { count.saturating_add(1) });
        let before = given_up.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).unwrap_or_else(|count| count);
        if !self.is_answered && before >= RESETS_MAX {
            self.streams.flooded.notify_one();
        }
    }
}

/// Counts a stream until it is dropped.
struct Open(Arc<Streams>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs each stream as a task that ends when its client takes nothing: the stream is reset then, the others go on.
#[derive(Clone, Debug)]
struct OnStreams(Arc<Streams>);

impl<T> Executor<T> for OnStreams
where
    T: Future + Send + 'static,
{
    fn execute(&self, stream: T) {
        self.0.open.fetch_add(1, Ordering::Relaxed);
        let open = Open(Arc::clone(&self.0));
        tokio::spawn(async move {
            let taking = Arc::new(Taking::default());
            tokio::select! {
                _ = TAKING.scope(Arc::clone(&taking), stream) => {}
                () = taking.stalled() => tracing::debug!("a stream was reset: its client takes nothing of the answer"),
            }
            drop(open);
        });
    }
}

tokio::task_local! {
    /// How the answer of this task's stream is taken. The task's future is the HTTP library's own, so nothing can be handed in.
    static TAKING: Arc<Taking>;
}

/// Whether a client takes its answer.
#[derive(Debug, Default)]
struct Taking {
    /// Since when a piece that was handed over has kept the next one from being asked for. While a worker is silent there is
    /// none: its silence has bounds of its own.
    waits_since: Mutex<Option<Instant>>,
}

impl Taking {
    fn set(&self, since: Option<Instant>) {
        *self.waits_since.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    /// Comes to its end when nothing has been taken for too long.
    async fn stalled(&self) {
        loop {
            let since = *self.waits_since.lock().unwrap_or_else(PoisonError::into_inner);
            let until = since.unwrap_or_else(Instant::now) + STALL_TIMEOUT;
            if since.is_some() && Instant::now() >= until {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}

/// An answer's body that notes when it is asked for more. Where it never is, its stream was reset before the answer: a reset
/// also ends the reading of the request's body, which gives an answer of its own, so that there was one says nothing.
struct Watched {
    body: Body,
    taking: Arc<Taking>,
    outcome: Outcome,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        self.outcome.answered();
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        self.taking.set(frame.is_ready().then(Instant::now));
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

    #[tokio::test(start_paused = true)]
    async fn only_a_piece_that_is_not_taken_ends_a_stream() {
        let taking = Taking::default();
        let silent = tokio::time::timeout(10 * STALL_TIMEOUT, taking.stalled()).await;
        assert!(silent.is_err(), "a silent worker is not the client's doing");
        taking.set(Some(Instant::now()));
        let started = Instant::now();
        taking.stalled().await;
        assert!(started.elapsed() >= STALL_TIMEOUT);
    }

    #[tokio::test]
    async fn answers_make_up_for_requests_that_were_given_up() {
        let streams = Arc::new(Streams::default());
        let end = |is_answered| drop(Outcome { streams: Arc::clone(&streams), is_answered });
        for _ in 0..10 * RESETS_MAX {
            end(false);
            end(true);
        }
        assert_eq!(streams.given_up.load(Ordering::Relaxed), 0);
        for _ in 0..=RESETS_MAX {
            end(false);
        }
        streams.flooded.notified().await;
    }
}
