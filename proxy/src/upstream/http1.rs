//! One HTTP/1.1 connection to a server, driven by whoever waits for its answer.
//!
//! Not a general client, because of what a relay costs: with one, each connection has a task of its own that hands over one chunk
//! at a time and is woken in between, so that each token of a stream costs two changes of task and a system call, even where
//! many have arrived together. Here the answer's body is read where it is wanted, and all that one read brings goes on as one
//! piece. Nothing waits for more to come.

mod framing;
mod head;

pub(crate) use framing::BadChunk;
pub(crate) use head::BadHead;

use super::{HalfClose, Request};
use crate::tls::stream::Stream;
use bytes::{Buf as _, Bytes, BytesMut};
use framing::Framing;
use http::HeaderValue;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};
use tokio::io::{AsyncReadExt as _, AsyncWrite as _};

/// Bytes for which there is room at each read: a dozen events of a stream, and most answers whole.
const READ_BYTES: usize = 8 << 10;

/// As long as there is room for this much, no more is made. It is one event; a longer one then takes two reads.
const READ_BYTES_MIN: usize = 1 << 10;

/// Room for one read that is made at most. It is doubled whenever a read has filled all of it.
const READ_BYTES_MAX: usize = 128 << 10;

/// Pieces of a request that one system call takes: the head, and a body with a long prompt between two changes.
const PIECES_AT_ONCE: usize = 4;

/// Why an answer is not there, or not all of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BrokenError {
    /// The socket failed.
    #[error("the socket failed")]
    Io {
        /// Whether nothing at all came back.
        is_unanswered: bool,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The server closed the connection before the end of its answer.
    #[error("the server closed the connection {}", if *.is_unanswered { "without an answer" } else { "within its answer" })]
    Ended {
        /// Whether nothing at all came back.
        is_unanswered: bool,
    },
    /// What came back is no answer.
    #[error(transparent)]
    Head(#[from] BadHead),
    /// The answer's body is not framed as its head says.
    #[error(transparent)]
    Chunk(#[from] BadChunk),
}

/// A connection, between two requests or within one.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    /// Read and not taken.
    read: BytesMut,
    /// Bytes of room that the next read gets.
    room: usize,
    /// Not yet sent of the request: its head, and the pieces of its body. None is empty.
    unsent: VecDeque<Bytes>,
    /// Whether all that was written has left our side; through TLS that is a step of its own.
    is_flushed: bool,
    /// Why the rest could not be sent.
    failed: Option<io::Error>,
    is_half_closed: bool,
    /// Nothing of an answer has come.
    is_unanswered: bool,
}

/// The head of an answer whose body is read from the same connection.
pub(super) struct Answer {
    pub(super) status: http::StatusCode,
    pub(super) headers: http::HeaderMap,
    pub(super) reading: Reading,
}

/// How far the body of an answer has been read.
#[derive(Debug)]
pub(super) struct Reading {
    framing: Framing,
    is_kept: bool,
}

impl Reading {
    pub(super) fn is_done(&self) -> bool {
        self.framing.is_done()
    }

    /// Bytes that are still to come, where that is known.
    pub(super) fn missing(&self) -> Option<u64> {
        match self.framing {
            Framing::Length(missing) => Some(missing),
            Framing::Chunked(_) | Framing::UntilClose => None,
        }
    }
}

impl Connection {
    pub(super) fn new(stream: Stream) -> Self {
        Connection {
            stream,
            read: BytesMut::new(),
            room: READ_BYTES,
            unsent: VecDeque::new(),
            is_flushed: true,
            failed: None,
            is_half_closed: false,
            is_unanswered: true,
        }
    }

    /// Whether it is still open and silent, as far as the system has told by now.
    pub(super) fn is_idle(&mut self) -> bool {
        let mut byte = [0; 1];
        // A task that has used up its turn would be told to wait whatever the socket has to say.
        let read = pin!(tokio::task::coop::unconstrained(self.stream.read(&mut byte)));
        // Nobody is woken by it: the next request waits for its own answer.
        read.poll(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Sends a request and waits for the head of its answer. Where that comes before all of the request is sent, the rest is sent
    /// while the body is read.
    ///
    /// # Errors
    /// When the connection fails first or what comes back is no HTTP/1.1.
    pub(super) async fn exchange(
        &mut self,
        request: &Request,
        host: &HeaderValue,
        half_close: Option<&HalfClose>,
    ) -> Result<Answer, BrokenError> {
        self.unsent.push_back(head::write(request, host));
        self.unsent.extend(request.body.pieces().cloned());
        (self.is_flushed, self.is_unanswered) = (false, true);
        let head = std::future::poll_fn(|cx| self.poll_head(cx, half_close)).await?;
        let reading = Reading { framing: head.framing, is_kept: head.is_kept };
        Ok(Answer { status: head.status, headers: head.headers, reading })
    }

    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        half_close: Option<&HalfClose>,
    ) -> Poll<Result<head::Head, BrokenError>> {
        self.poll_send(cx, half_close);
        loop {
            if let Some(head) = head::take(&mut self.read)? {
                return Poll::Ready(Ok(head));
            }
            if ready!(self.poll_read(cx))? == 0 {
                let is_unanswered = self.is_unanswered;
                return Poll::Ready(Err(match self.failed.take() {
                    Some(source) => BrokenError::Io { is_unanswered, source },
                    None => BrokenError::Ended { is_unanswered },
                }));
            }
        }
    }

    /// The next piece of the body: all that is there. None behind its end.
    ///
    /// # Errors
    /// When the connection fails before that.
    pub(super) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        reading: &mut Reading,
        half_close: Option<&HalfClose>,
    ) -> Poll<Option<Result<Bytes, BrokenError>>> {
        loop {
            if reading.is_done() {
                return Poll::Ready(None);
            }
            match reading.framing.take(&mut self.read) {
                Ok(data) if data.is_empty() => {}
                taken => return Poll::Ready(Some(taken.map_err(BrokenError::from))),
            }
            if reading.is_done() {
                return Poll::Ready(None);
            }
            self.poll_send(cx, half_close);
            match ready!(self.poll_read(cx)) {
                Ok(0) if matches!(reading.framing, Framing::UntilClose) => return Poll::Ready(None),
                Ok(0) => return Poll::Ready(Some(Err(BrokenError::Ended { is_unanswered: false }))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    /// Ends an exchange; whether another request may go out. Between two requests it keeps no room for an answer.
    pub(super) fn settle(&mut self, reading: &Reading) -> bool {
        let is_sent = self.unsent.is_empty() && self.is_flushed && self.failed.is_none();
        // Bytes behind an answer belong to none, and would be taken for the next one's.
        let is_whole = self.read.is_empty();
        (self.read, self.room) = (BytesMut::new(), READ_BYTES);
        reading.is_done() && reading.is_kept && is_sent && !self.is_half_closed && is_whole
    }

    /// Sends what can be sent now. A failure is kept: a server that has gone may have answered first, and where it hasn't, reading
    /// ends in its turn.
    fn poll_send(&mut self, cx: &mut Context<'_>, half_close: Option<&HalfClose>) {
        if half_close.is_some_and(|half_close| half_close.poll_asked(cx)) && !self.is_half_closed {
            self.unsent.clear();
            // A half that is gone already is what was asked for.
            self.is_half_closed = Pin::new(&mut self.stream).poll_shutdown(cx).is_ready();
        }
        while !self.is_half_closed && !self.unsent.is_empty() {
            let mut slices = [IoSlice::new(&[]); PIECES_AT_ONCE];
            slices.iter_mut().zip(&self.unsent).for_each(|(slice, piece)| *slice = IoSlice::new(piece));
            let slices = &slices[..self.unsent.len().min(PIECES_AT_ONCE)];
            match Pin::new(&mut self.stream).poll_write_vectored(cx, slices) {
                Poll::Pending => return,
                Poll::Ready(Ok(written)) if written > 0 => self.sent(written),
                Poll::Ready(Ok(_)) => self.give_up(ErrorKind::WriteZero.into()),
                Poll::Ready(Err(error)) => self.give_up(error),
            }
        }
        if !self.is_flushed
            && let Poll::Ready(flushed) = Pin::new(&mut self.stream).poll_flush(cx)
        {
            self.is_flushed = true;
            if let Err(error) = flushed {
                self.give_up(error);
            }
        }
    }

    fn give_up(&mut self, error: io::Error) {
        self.unsent.clear();
        self.failed.get_or_insert(error);
    }

    fn sent(&mut self, mut written: usize) {
        while let Some(piece) = self.unsent.front_mut() {
            if written < piece.len() {
                return piece.advance(written);
            }
            written -= piece.len();
            self.unsent.pop_front();
        }
    }

    /// Reads what is there; 0 at the end of the connection.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, BrokenError>> {
        if self.read.capacity() - self.read.len() < READ_BYTES_MIN {
            self.read.reserve(self.room);
        }
        let is_unanswered = self.is_unanswered;
        let failed = |source| BrokenError::Io { is_unanswered, source };
        let count = match pin!(self.stream.read_buf(&mut self.read)).poll(cx) {
            Poll::Ready(read) => read.map_err(failed)?,
            // These end reading too, as soon as what came before them has been read; of others reading need not hear.
            Poll::Pending if self.failed.as_ref().is_none_or(|error| ends_reading(error.kind())) => {
                return Poll::Pending;
            }
            Poll::Pending => return Poll::Ready(self.failed.take().map_or(Ok(0), |error| Err(failed(error)))),
        };
        if count >= self.room {
            self.room = (self.room * 2).min(READ_BYTES_MAX);
        }
        self.is_unanswered &= count == 0;
        Poll::Ready(Ok(count))
    }
}

/// Whether a socket that could not be written to for this reason ends for its reader too.
fn ends_reading(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::TimedOut
    )
}

impl BrokenError {
    /// Whether the connection had been closed by the time that the request went out, as far as can be told: nothing came back.
    pub(super) fn is_unanswered(&self) -> bool {
        match self {
            BrokenError::Ended { is_unanswered } => *is_unanswered,
            BrokenError::Io { is_unanswered, source } => {
                // The last is a server's end without TLS's goodbye, which is how one that is killed ends.
                let kinds = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::UnexpectedEof];
                *is_unanswered && kinds.contains(&source.kind())
            }
            BrokenError::Head(_) | BrokenError::Chunk(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payload::Payload;
    use http::{HeaderMap, Method, StatusCode};
    use std::time::Duration;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::{TcpListener, TcpStream};

    async fn pair() -> (Connection, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (ours, theirs) = tokio::join!(TcpStream::connect(address), listener.accept());
        (Connection::new(Stream::Plain(ours.expect("it listens"))), theirs.expect("a connection").0)
    }

    fn request(body: Payload) -> Request {
        let path = "/".parse().expect("a path");
        Request { method: Method::POST, path, headers: HeaderMap::new(), body }
    }

    fn host() -> HeaderValue {
        HeaderValue::from_static("worker")
    }

    /// Reads until the head is complete; what is already there of the body.
    async fn head(stream: &mut TcpStream) -> Vec<u8> {
        let mut read = Vec::new();
        loop {
            assert_ne!(stream.read_buf(&mut read).await.expect("read"), 0, "the request ends early");
            if let Some(end) = read.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                return read.split_off(end + 4);
            }
        }
    }

    async fn piece(connection: &mut Connection, reading: &mut Reading) -> Option<Result<Bytes, BrokenError>> {
        std::future::poll_fn(|cx| connection.poll_body(cx, reading, None)).await
    }

    async fn whole(connection: &mut Connection, reading: &mut Reading) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(data) = piece(connection, reading).await {
            all.extend_from_slice(&data.expect("a piece"));
        }
        all
    }

    #[tokio::test]
    async fn the_pieces_of_a_body_arrive_as_one_and_the_connection_is_kept() {
        let (mut connection, mut server) = pair().await;
        let mut body = Payload::default();
        (0..2 * PIECES_AT_ONCE + 1).for_each(|index| body.push(Bytes::from(vec![b'a' + index as u8; 10_000])));
        let sent = request(body.clone());
        let serve = async {
            let mut got = head(&mut server).await;
            while got.len() < body.len() {
                assert_ne!(server.read_buf(&mut got).await.expect("read"), 0);
            }
            server.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.expect("written");
            got
        };
        let host = host();
        let (got, answer) = tokio::join!(serve, connection.exchange(&sent, &host, None));
        assert_eq!(got, sent.body.to_bytes());
        let mut answer = answer.expect("an answer");
        assert_eq!(whole(&mut connection, &mut answer.reading).await, b"ok");
        assert!(connection.settle(&answer.reading) && connection.is_idle());
        drop(server);
        // The system tells of the end a moment later.
        let end = async {
            while connection.is_idle() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), end).await.expect("the end is noticed");
    }

    #[tokio::test]
    async fn chunks_that_arrive_together_go_on_together_and_those_that_do_not_are_not_waited_for() {
        let (mut connection, mut server) = pair().await;
        let serve = async {
            head(&mut server).await;
            let first = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n";
            server.write_all(first).await.expect("written");
        };
        let (sent, host) = (request(Payload::default()), host());
        let ((), answer) = tokio::join!(serve, connection.exchange(&sent, &host, None));
        let mut reading = answer.expect("an answer").reading;
        assert_eq!(piece(&mut connection, &mut reading).await.expect("data").expect("right"), "abc");
        server.write_all(b"1\r\nd\r\n0\r\n\r\n").await.expect("written");
        assert_eq!(whole(&mut connection, &mut reading).await, b"d");
        assert!(connection.settle(&reading));
    }

    #[tokio::test]
    async fn an_answer_that_comes_before_the_request_is_sent_is_read_and_ends_the_connection() {
        let (mut connection, mut server) = pair().await;
        let sent = request(Bytes::from(vec![b'x'; 32 << 20]).into());
        let serve = async {
            head(&mut server).await;
            let refusal = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 8\r\n\r\ntoo long";
            server.write_all(refusal).await.expect("written");
        };
        let host = host();
        let ((), answer) = tokio::join!(serve, connection.exchange(&sent, &host, None));
        let mut answer = answer.expect("the refusal");
        assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(whole(&mut connection, &mut answer.reading).await, b"too long");
        assert!(!connection.settle(&answer.reading));
    }

    #[tokio::test]
    async fn the_rest_of_a_request_is_sent_while_its_answer_is_read() {
        let (mut connection, mut server) = pair().await;
        const LENGTH: usize = 32 << 20;
        let sent = request(Bytes::from(vec![b'x'; LENGTH]).into());
        let serve = async move {
            let mut got = head(&mut server).await.len();
            server.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n").await.expect("written");
            let mut buffer = vec![0; 1 << 20];
            while got < LENGTH {
                let more = server.read(&mut buffer).await.expect("the rest comes");
                assert_ne!(more, 0, "the request ends early");
                got += more;
            }
            server.write_all(b"ok").await.expect("written");
            server
        };
        let host = host();
        let exchange = async {
            let mut answer = connection.exchange(&sent, &host, None).await.expect("a head");
            let body = whole(&mut connection, &mut answer.reading).await;
            (body, connection.settle(&answer.reading))
        };
        let (_server, outcome) = tokio::join!(serve, exchange);
        assert_eq!(outcome, (b"ok".to_vec(), true));
    }

    #[tokio::test]
    async fn what_comes_behind_an_answer_is_no_part_of_the_next_one() {
        for (answer, is_reusable) in [
            (&b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"[..], true),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n", false),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nx", false),
            (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", false),
        ] {
            let (mut connection, mut server) = pair().await;
            let serve = async {
                head(&mut server).await;
                server.write_all(answer).await.expect("written");
            };
            let (sent, host) = (request(Payload::default()), host());
            let ((), read) = tokio::join!(serve, connection.exchange(&sent, &host, None));
            let mut reading = read.expect("an answer").reading;
            assert_eq!(whole(&mut connection, &mut reading).await, b"ok");
            assert_eq!(connection.settle(&reading), is_reusable, "{}", String::from_utf8_lossy(answer));
        }
    }

    #[tokio::test]
    async fn a_broken_answer_says_whether_anything_came() {
        for (answer, is_unanswered) in [
            (&b""[..], true),
            (b"HTTP/1.1 200 OK\r\n", false),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no", false),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", false),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nz\r\n", false),
            (b"hello\r\n\r\n", false),
        ] {
            let (mut connection, mut server) = pair().await;
            let serve = async move {
                head(&mut server).await;
                server.write_all(answer).await.expect("written");
            };
            let (sent, host) = (request(Payload::default()), host());
            let ((), read) = tokio::join!(serve, connection.exchange(&sent, &host, None));
            let error = match read {
                Err(error) => error,
                Ok(mut read) => loop {
                    match piece(&mut connection, &mut read.reading).await {
                        Some(Ok(_)) => {}
                        Some(Err(error)) => break error,
                        None => panic!("{} is not whole", String::from_utf8_lossy(answer)),
                    }
                },
            };
            assert_eq!(error.is_unanswered(), is_unanswered, "{error}");
        }
    }
}
