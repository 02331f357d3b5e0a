//! One server that we send requests to, with its pool of connections. Knows HTTP and sockets, never what a request is for.
//!
//! Each worker has an [`Upstream`] of its own, so a worker that leaves takes its connections along. A pool of our own rather
//! than a general client because two things must be exact. **Abort**: whoever drops a response (or the wait for one) closes
//! its connection at once, which is how a worker learns that nobody wants the answer any more. **Resend**: a request is sent
//! a second time only where it went out on a pooled connection that turned out to be closed before it was answered; the
//! second time always on a new one. Every socket has `TCP_NODELAY`: with Nagle's algorithm each small write waits for the
//! peer's delayed acknowledgement, which costs a stream 40 ms.
//!
//! An exchange moves only while somebody polls it: no task of its own sends or reads (`http1.rs` says why).

mod half_close;
mod http1;
mod transport;

pub(crate) use half_close::HalfClose;
pub(crate) use http1::BrokenError;
pub(crate) use transport::{ClientTls, Transport, Transports};

use crate::address::Address;
use crate::payload::Payload;
use bytes::{Bytes, BytesMut};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body_util::BodyExt as _;
use http1::{Connection, Reading};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Timeout};

/// Connections of one server that are kept for later: as many as an engine batches sequences.
const IDLE_CONNECTIONS_MAX: usize = 64;

/// How long a connection is kept without use. Below the time after which a proxy closes an idle connection (its deadline for
/// the next request's headers, 10 s), so that a request seldom meets a closed one.
const IDLE_MAX: Duration = Duration::from_secs(8);

/// Room that is made for an answer at once, by what its length says: a number in a header must not make us allocate.
const ROOM_BYTES_MAX: usize = 1 << 20;

/// Why a request got no answer, or not all of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    /// No connection: nothing of the request was sent.
    #[error("no connection to {address}")]
    Connect {
        /// Where to.
        address: Address,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke, or what came back was no HTTP.
    #[error("the connection to {address} broke")]
    Broken {
        /// Where to.
        address: Address,
        /// What went wrong.
        #[source]
        source: BrokenError,
    },
    /// It was given up before it was sent.
    #[error("the request to {address} was given up before it was sent")]
    GivenUp {
        /// Where to.
        address: Address,
    },
    /// The answer is longer than it can rightly be.
    #[error("the answer of {address} is longer than {bytes_max} bytes")]
    TooLong {
        /// Whose answer.
        address: Address,
        /// The bound that it went over.
        bytes_max: usize,
    },
    /// It took longer than the caller had time.
    #[error("no answer of {address} in time")]
    Timeout {
        /// Whose answer.
        address: Address,
    },
}

/// A request, complete with its body, so that it can be sent twice.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: Method,
    pub(crate) path: PathAndQuery,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Payload,
}

impl Request {
    /// A `GET` of a path.
    pub(crate) fn get(path: &'static str) -> Self {
        let path = PathAndQuery::from_static(path);
        Request { method: Method::GET, path, headers: HeaderMap::new(), body: Payload::default() }
    }
}

/// The head of an answer, and its body to be read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Body,
}

/// A server and the connections to it.
#[derive(Debug)]
pub(crate) struct Upstream {
    address: Address,
    /// The address as each request's header says it.
    host: HeaderValue,
    transport: Transport,
    pool: Pool,
    resends: Arc<AtomicU64>,
}

type Pool = Arc<Mutex<VecDeque<Idle>>>;

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Instant,
}

impl Upstream {
    /// Counts into `resends` each request that it sends a second time.
    pub(crate) fn new(address: Address, transport: Transport, resends: Arc<AtomicU64>) -> Self {
        let host = HeaderValue::from_str(address.as_str()).expect("an address was parsed as an authority");
        Upstream { address, host, transport, pool: Pool::default(), resends }
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// Sends a request and waits for the head of its answer, without any bound in time: callers have deadlines.
    pub(crate) async fn send(&self, request: &Request) -> Result<Answer, UpstreamError> {
        self.send_either(request, None).await
    }

    /// The same for a request whose caller may say that the answer is no longer wanted and still take it if it comes. One that
    /// was given up is not sent a second time.
    pub(crate) async fn send_with(&self, request: &Request, half_close: &HalfClose) -> Result<Answer, UpstreamError> {
        self.send_either(request, Some(half_close)).await
    }

    async fn send_either(&self, request: &Request, half_close: Option<&HalfClose>) -> Result<Answer, UpstreamError> {
        if let Some(pooled) = self.take_idle() {
            match self.send_on(pooled, request, half_close).await {
                Err(UpstreamError::Broken { source, .. })
                    if source.is_unanswered() && !half_close.is_some_and(HalfClose::is_asked) =>
                {
                    self.resends.fetch_add(1, Ordering::Relaxed);
                }
                outcome => return outcome,
            }
        }
        // Making one takes long and is seldom, so what it takes is not kept in every request.
        let connection = Box::pin(self.connect()).await?;
        self.send_on(connection, request, half_close).await
    }

    async fn connect(&self) -> Result<Connection, UpstreamError> {
        let failed = |source| UpstreamError::Connect { address: self.address.clone(), source };
        Ok(Connection::new(self.transport.dial(&self.address).await.map_err(failed)?))
    }

    async fn send_on(
        &self,
        mut connection: Connection,
        request: &Request,
        half_close: Option<&HalfClose>,
    ) -> Result<Answer, UpstreamError> {
        if half_close.is_some_and(|half_close| !half_close.begin()) {
            return Err(UpstreamError::GivenUp { address: self.address.clone() });
        }
        let broken = |source| UpstreamError::Broken { address: self.address.clone(), source };
        let http1::Answer { status, headers, reading } =
            connection.exchange(request, &self.host, half_close).await.map_err(broken)?;
        let lease = Lease { connection, pool: Arc::clone(&self.pool), half_close: half_close.cloned() };
        let mut body = Body { address: self.address.clone(), reading, lease: Some(lease) };
        body.give_back_at_end();
        Ok(Answer { status, headers, body })
    }

    fn take_idle(&self) -> Option<Connection> {
        let mut idle = lock(&self.pool);
        while let Some(Idle { mut connection, since }) = idle.pop_back() {
            if since.elapsed() < IDLE_MAX && connection.is_idle() {
                return Some(connection);
            }
        }
        None
    }
}

fn lock(pool: &Pool) -> MutexGuard<'_, VecDeque<Idle>> {
    // Nothing panics while it holds the lock, and a list of connections is whole after every step.
    pool.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The body of an answer. Read to its end it gives its connection back to the pool; dropped earlier it closes it.
#[derive(Debug)]
pub(crate) struct Body {
    address: Address,
    reading: Reading,
    lease: Option<Lease>,
}

#[derive(Debug)]
struct Lease {
    connection: Connection,
    pool: Pool,
    half_close: Option<HalfClose>,
}

impl Body {
    /// Reads it all.
    pub(crate) async fn collect(mut self, bytes_max: usize) -> Result<Bytes, UpstreamError> {
        // Most answers come in one piece, which is passed on as it lies; of others the room is made at once where it is known.
        let (mut first, mut all) = (Bytes::new(), BytesMut::new());
        while let Some(frame) = self.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            if first.len() + all.len() + data.len() > bytes_max {
                return Err(UpstreamError::TooLong { address: self.address, bytes_max });
            }
            if first.is_empty() && all.is_empty() {
                first = data;
                continue;
            }
            if all.is_empty() {
                let missing = usize::try_from(self.reading.missing().unwrap_or(0)).unwrap_or(usize::MAX);
                all.reserve(first.len() + data.len() + missing.min(ROOM_BYTES_MAX));
                all.extend_from_slice(&std::mem::take(&mut first));
            }
            all.extend_from_slice(&data);
        }
        Ok(if all.is_empty() { first } else { all.freeze() })
    }

    /// The error of a reader whose time is over.
    pub(crate) fn too_late(&self) -> UpstreamError {
        UpstreamError::Timeout { address: self.address.clone() }
    }

    fn give_back_at_end(&mut self) {
        if self.reading.is_done() {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        if let Some(Lease { mut connection, pool, half_close }) = self.lease.take() {
            let is_ended = half_close.is_none_or(|half_close| half_close.end());
            if !is_ended || !connection.settle(&self.reading) {
                return;
            }
            let (mut idle, now) = (lock(&pool), Instant::now());
            // Nobody reads on idle connections, so that one has closed is seen here or when it would be used.
            while idle.front_mut().is_some_and(|idle| now - idle.since >= IDLE_MAX || !idle.connection.is_idle()) {
                idle.pop_front();
            }
            if idle.len() < IDLE_CONNECTIONS_MAX {
                idle.push_back(Idle { connection, since: now });
            }
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, UpstreamError>>> {
        let Body { address, reading, lease } = &mut *self;
        let Some(Lease { connection, half_close, .. }) = lease else { return Poll::Ready(None) };
        match ready!(connection.poll_body(cx, reading, half_close.as_ref())) {
            Some(Ok(data)) => {
                self.give_back_at_end();
                Poll::Ready(Some(Ok(http_body::Frame::data(data))))
            }
            Some(Err(source)) => {
                let address = address.clone();
                self.lease = None;
                Poll::Ready(Some(Err(UpstreamError::Broken { address, source })))
            }
            None => {
                self.give_back();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.lease.is_none()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.reading.missing().map_or_else(http_body::SizeHint::default, http_body::SizeHint::with_exact)
    }
}

pin_project_lite::pin_project! {
    /// Work that ends by a deadline. A type of its own, because an `async fn` would hold the work twice: once as its argument, once
    /// where it waits for it.
    pub(crate) struct By<'a, F> {
        #[pin]
        work: Timeout<F>,
        address: &'a Address,
    }
}

/// Waits no longer than until the deadline.
pub(crate) fn by<T, F: Future<Output = Result<T, UpstreamError>>>(
    deadline: Instant,
    address: &Address,
    work: F,
) -> By<'_, F> {
    By { work: tokio::time::timeout_at(deadline, work), address }
}

impl<T, F: Future<Output = Result<T, UpstreamError>>> Future for By<'_, F> {
    type Output = Result<T, UpstreamError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let late = |_| UpstreamError::Timeout { address: this.address.clone() };
        this.work.poll(cx).map(|outcome| outcome.map_err(late)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

    /// Reads until a request's headers are complete; `false` at the end of the connection.
    async fn request(stream: &mut TcpStream) -> bool {
        let mut read = Vec::new();
        while !read.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => read.push(byte),
                Err(_) => return false,
            }
        }
        true
    }

    async fn listen() -> (TcpListener, Upstream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        (listener, Upstream::new(address.parse().expect("host and port"), Transport::Plain, Arc::default()))
    }

    async fn get(upstream: &Upstream) -> Result<Bytes, UpstreamError> {
        upstream.send(&Request::get("/")).await?.body.collect(100).await
    }

    #[tokio::test]
    async fn a_connection_is_used_again_and_a_closed_one_is_replaced_once() {
        let (listener, upstream) = listen().await;
        let server = tokio::spawn(async move {
            let (mut first, _) = listener.accept().await.expect("a connection");
            for _ in 0..2 {
                assert!(request(&mut first).await);
                first.write_all(ANSWER).await.expect("written");
            }
            // The third request arrives and the server goes without an answer.
            assert!(request(&mut first).await);
            drop(first);
            let (mut second, _) = listener.accept().await.expect("a new connection");
            assert!(request(&mut second).await);
            second.write_all(ANSWER).await.expect("written");
            second
        });
        for _ in 0..3 {
            assert_eq!(get(&upstream).await.expect("answered"), "ok");
        }
        assert_eq!(upstream.resends.load(Ordering::Relaxed), 1);
        server.await.expect("the server saw what it expected");
    }

    #[tokio::test]
    async fn a_new_connection_that_closes_unanswered_is_an_error_and_not_resent() {
        let (listener, upstream) = listen().await;
        let server = tokio::spawn(async move {
            let (mut only, _) = listener.accept().await.expect("a connection");
            assert!(request(&mut only).await);
            drop(only);
            listener
        });
        assert!(matches!(get(&upstream).await, Err(UpstreamError::Broken { .. })));
        let listener = server.await.expect("the server saw one request");
        drop(listener);
        assert!(matches!(get(&upstream).await, Err(UpstreamError::Connect { .. })));
    }

    #[tokio::test]
    async fn dropping_the_wait_for_an_answer_closes_the_connection() {
        let (listener, upstream) = listen().await;
        let message = Request::get("/");
        let mut sending = Box::pin(upstream.send(&message));
        let accept = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            assert!(request(&mut stream).await);
            stream
        };
        let mut stream = tokio::select! {
            stream = accept => stream,
            _ = &mut sending => panic!("nothing was answered"),
        };
        drop(sending);
        let mut byte = [0];
        let end = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut byte)).await;
        assert!(matches!(end, Ok(Ok(0) | Err(_))), "{end:?}");
    }

    #[tokio::test]
    async fn an_answer_beyond_the_bound_is_refused() {
        let (listener, upstream) = listen().await;
        let serve = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            assert!(request(&mut stream).await);
            stream.write_all(ANSWER).await.expect("written");
            stream
        };
        let message = Request::get("/");
        let (_stream, answer) = tokio::join!(serve, upstream.send(&message));
        let error = answer.expect("a head").body.collect(1).await.expect_err("two bytes");
        assert!(matches!(error, UpstreamError::TooLong { bytes_max: 1, .. }), "{error}");
    }

    /// Reads until the other side has closed its half.
    async fn end_of(stream: &mut TcpStream) {
        let mut byte = [0];
        let end = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut byte)).await;
        assert!(matches!(end, Ok(Ok(0))), "{end:?}");
    }

    #[tokio::test]
    async fn an_answer_that_comes_after_the_half_close_is_read_and_its_connection_left() {
        let (listener, upstream) = listen().await;
        let half_close = HalfClose::default();
        let asking = half_close.clone();
        let serve = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            assert!(request(&mut stream).await);
            asking.now();
            end_of(&mut stream).await;
            stream.write_all(ANSWER).await.expect("our half is open");
            let (mut second, _) = listener.accept().await.expect("a half-closed connection is not used again");
            assert!(request(&mut second).await);
            second.write_all(ANSWER).await.expect("written");
            (stream, second)
        };
        let message = Request::get("/");
        let exchange = async {
            let answer = upstream.send_with(&message, &half_close).await.expect("an answer all the same");
            assert_eq!(answer.body.collect(100).await.expect("whole"), "ok");
            assert_eq!(get(&upstream).await.expect("answered"), "ok");
        };
        tokio::join!(serve, exchange);
        assert!(half_close.is_asked());
        assert_eq!(upstream.resends.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn an_engine_that_aborts_at_the_half_close_is_not_asked_again() {
        let (listener, upstream) = listen().await;
        let half_close = HalfClose::default();
        let asking = half_close.clone();
        let serve = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            // Used once before, so that a connection which closes would be replaced.
            assert!(request(&mut stream).await);
            stream.write_all(ANSWER).await.expect("written");
            assert!(request(&mut stream).await);
            asking.now();
            end_of(&mut stream).await;
        };
        let message = Request::get("/");
        let exchange = async {
            assert_eq!(get(&upstream).await.expect("answered"), "ok");
            upstream.send_with(&message, &half_close).await
        };
        let ((), outcome) = tokio::join!(serve, exchange);
        assert!(matches!(outcome, Err(UpstreamError::Broken { .. })), "{outcome:?}");
        assert_eq!(upstream.resends.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_half_close_before_the_request_keeps_it_back_and_one_after_the_answer_does_nothing() {
        let (listener, upstream) = listen().await;
        let serve = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            for _ in 0..2 {
                assert!(request(&mut stream).await);
                stream.write_all(ANSWER).await.expect("written");
            }
            stream
        };
        let message = Request::get("/");
        let exchange = async {
            let after = HalfClose::default();
            let answer = upstream.send_with(&message, &after).await.expect("answered");
            assert_eq!(answer.body.collect(100).await.expect("whole"), "ok");
            after.now();
            assert!(!after.is_asked());
            assert_eq!(get(&upstream).await.expect("on the same connection"), "ok");
            let before = HalfClose::default();
            before.now();
            upstream.send_with(&message, &before).await
        };
        let (_stream, outcome) = tokio::join!(serve, exchange);
        assert!(matches!(outcome, Err(UpstreamError::GivenUp { .. })), "{outcome:?}");
    }
}
