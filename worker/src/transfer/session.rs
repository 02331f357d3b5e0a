//! Framed messages on a connection, and the one end that a pair of connections shares: what both sides of a session have.
//!
//! Knows headers, payload bounds and liveness; knows nothing of transfers.

use super::error::SessionError;
use super::limits::{OUTBOX_MESSAGES_MAX, Timing};
use baton_wire::kv::control::{decode, encode, encode_bare};
use baton_wire::kv::{Body, BodyError, ErrorCode, ErrorReport, HEADER_BYTES, Header, Hello, Kind, Negotiated};
use baton_wire::{Epoch, TransferId};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// Transfer id of messages that concern the session itself.
pub(super) const NO_TRANSFER: TransferId = TransferId([0; 16]);

/// The life of a session: when its peer was last heard, and how it ended.
pub(super) struct Link {
    started: Instant,
    /// Milliseconds after `started`.
    heard: AtomicU64,
    cause: OnceLock<SessionError>,
    ended: CancellationToken,
    outbox: mpsc::Sender<Vec<u8>>,
    /// What the HELLOs agreed on.
    pub(super) negotiated: Negotiated,
    /// The process on the other side.
    pub(super) peer: Epoch,
}

/// The messages that [`Link`] has to write, for [`write_outbox`].
pub(super) type Outbox = mpsc::Receiver<Vec<u8>>;

impl Link {
    /// A session with the sender of `hello`. It ends when `ended` is cancelled, or by [`Link::end`].
    pub(super) fn new(hello: &Hello, ended: CancellationToken) -> (Arc<Link>, Outbox) {
        let (outbox, messages) = mpsc::channel(OUTBOX_MESSAGES_MAX);
        let link = Link {
            started: Instant::now(),
            heard: AtomicU64::new(0),
            cause: OnceLock::new(),
            ended,
            outbox,
            negotiated: Negotiated::with_peer(hello.features, hello.frame_bytes_max),
            peer: hello.epoch,
        };
        (Arc::new(link), messages)
    }

    /// Resolves when the session is over.
    pub(super) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Whether the session is over.
    pub(super) fn is_over(&self) -> bool {
        self.ended.is_cancelled()
    }

    /// Why the session ended. Closed here is what is left where nothing else was noted.
    pub(super) fn cause(&self) -> SessionError {
        self.cause.get().cloned().unwrap_or(SessionError::ClosedHere)
    }

    /// Ends the session; the first cause stays. The peer is told what it can act on.
    pub(super) fn end(&self, cause: SessionError) {
        let report = cause.report();
        if self.cause.set(cause).is_ok() {
            if let Some(code) = report {
                // A full outbox means a peer that does not read: nobody to tell.
                let message = encode(NO_TRANSFER, 0, &ErrorReport { code }).expect("a code fits every limit");
                let _ = self.outbox.try_send(message);
            }
            self.ended.cancel();
        }
    }

    /// Queues a message without waiting. A peer that lets [`OUTBOX_MESSAGES_MAX`] pile up loses its session.
    ///
    /// # Errors
    /// When the body is longer than the peer would take.
    pub(super) fn send<B: Body>(&self, transfer: TransferId, attempt: u32, body: &B) -> Result<(), BodyError> {
        self.queue(encode(transfer, attempt, body)?);
        Ok(())
    }

    /// Queues a message without payload.
    pub(super) fn send_bare(&self, kind: Kind, transfer: TransferId, attempt: u32) {
        self.queue(encode_bare(kind, transfer, attempt).to_vec());
    }

    /// Tells the peer that a transfer has failed.
    pub(super) fn send_error(&self, transfer: TransferId, attempt: u32, code: ErrorCode) {
        self.queue(encode(transfer, attempt, &ErrorReport { code }).expect("a code fits every limit"));
    }

    fn queue(&self, message: Vec<u8>) {
        match self.outbox.try_send(message) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => self.end(SessionError::NotReading),
            // The writer has ended, and with it the session.
            Err(mpsc::error::TrySendError::Closed(_)) => {}
        }
    }

    /// Notes that the peer lives.
    pub(super) fn heard(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard.fetch_max(now, Ordering::Relaxed);
    }

    /// Ends the session once the peer has been silent for `limit`. Runs in a task of its own.
    pub(super) async fn watch_silence(&self, limit: Duration) {
        loop {
            let deadline = self.started + Duration::from_millis(self.heard.load(Ordering::Relaxed)) + limit;
            if Instant::now() >= deadline {
                return self.end(SessionError::Silent(limit));
            }
            tokio::select! {
                () = self.ended() => return,
                () = tokio::time::sleep_until(deadline) => {}
            }
        }
    }
}

/// Writes a session's control messages until the session is over; then the last ones, if the peer takes them soon.
pub(super) async fn write_outbox<W: AsyncWrite + Unpin>(link: &Link, mut outbox: Outbox, mut to: W, timing: Timing) {
    loop {
        let message = tokio::select! {
            biased;
            message = outbox.recv() => message,
            () = link.ended() => None,
        };
        let Some(message) = message else { break };
        if let Err(error) = write_all(&mut to, &message, timing.write_stall).await {
            return link.end(error);
        }
    }
    let _ = timeout(timing.flush, async {
        while let Ok(message) = outbox.try_recv() {
            to.write_all(&message).await?;
        }
        to.shutdown().await
    })
    .await;
}

/// Writes all of `bytes`; each piece has to be taken within `stall`.
pub(super) async fn write_all<W: AsyncWrite + Unpin>(
    to: &mut W,
    mut bytes: &[u8],
    stall: Duration,
) -> Result<(), SessionError> {
    while !bytes.is_empty() {
        let written = timeout(stall, to.write(bytes)).await.map_err(|_| SessionError::NotReading)??;
        if written == 0 {
            return Err(SessionError::Closed);
        }
        bytes = &bytes[written..];
    }
    Ok(())
}

/// Reads the next header. Not cancel-safe: whoever drops it ends the session.
pub(super) async fn read_header<R: AsyncRead + Unpin>(
    from: &mut R,
    negotiated: &Negotiated,
) -> Result<Header, SessionError> {
    let mut bytes = [0; HEADER_BYTES];
    from.read_exact(&mut bytes).await?;
    Ok(Header::decode(&bytes, negotiated)?)
}

/// Reads a header's payload to the front of `buffer`, whose length grows to the longest payload seen: at most what was
/// negotiated, which [`Header::decode`] has checked.
pub(super) async fn read_payload<'a, R: AsyncRead + Unpin>(
    from: &mut R,
    header: &Header,
    buffer: &'a mut Vec<u8>,
) -> Result<&'a [u8], SessionError> {
    let len = header.len as usize;
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    from.read_exact(&mut buffer[..len]).await?;
    Ok(&buffer[..len])
}

/// Reads one control message: its header and its payload's bytes.
pub(super) async fn read_message<R: AsyncRead + Unpin>(
    from: &mut R,
    negotiated: &Negotiated,
) -> Result<(Header, Vec<u8>), SessionError> {
    let header = read_header(from, negotiated).await?;
    if header.kind == Kind::Frame {
        return Err(SessionError::Unexpected(Kind::Frame));
    }
    let mut payload = Vec::new();
    read_payload(from, &header, &mut payload).await?;
    Ok((header, payload))
}

/// Reads the peer's HELLO, or its reason not to say it.
pub(super) async fn read_hello<R: AsyncRead + Unpin>(from: &mut R, limit: Duration) -> Result<Hello, SessionError> {
    let message = timeout(limit, read_message(from, &Negotiated::NOTHING)).await;
    let (header, payload) = message.map_err(|_| SessionError::Silent(limit))??;
    if header.kind == Kind::Error {
        return Err(SessionError::Refused(decode::<ErrorReport>(&header, &payload)?.code));
    }
    Ok(decode(&header, &payload)?)
}

/// Says HELLO.
pub(super) async fn write_hello<W: AsyncWrite + Unpin>(
    to: &mut W,
    hello: &Hello,
    limit: Duration,
) -> Result<(), SessionError> {
    write_all(to, &encode(NO_TRANSFER, 0, hello)?, limit).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_wire::kv::Stream;
    use baton_wire::{Fingerprint, SessionId};

    fn link() -> (Arc<Link>, Outbox) {
        let hello = Hello::new(Fingerprint([1; 32]), Epoch([2; 16]), SessionId([3; 16]), Stream::Control);
        Link::new(&hello, CancellationToken::new())
    }

    #[test]
    fn a_peer_that_reads_nothing_loses_its_session_and_no_memory_is_spent_on_it() {
        let (link, outbox) = link();
        for _ in 0..OUTBOX_MESSAGES_MAX {
            link.send_bare(Kind::Ping, NO_TRANSFER, 0);
        }
        assert!(!link.is_over());
        link.send_bare(Kind::Ping, NO_TRANSFER, 0);
        assert!(matches!(link.cause(), SessionError::NotReading));
        assert!(link.is_over());
        assert_eq!(outbox.len(), OUTBOX_MESSAGES_MAX);
    }

    #[tokio::test]
    async fn the_first_cause_of_an_end_stays_and_is_told_before_the_connection_closes() {
        let (link, outbox) = link();
        link.end(SessionError::Unexpected(Kind::Pong));
        link.end(SessionError::Closed);
        assert!(matches!(link.cause(), SessionError::Unexpected(Kind::Pong)));
        let (ours, mut theirs) = tokio::io::duplex(4096);
        write_outbox(&link, outbox, ours, Timing::default()).await;
        let (header, payload) = read_message(&mut theirs, &Negotiated::NOTHING).await.expect("an ERROR");
        let report: ErrorReport = decode(&header, &payload).expect("an ERROR");
        assert_eq!(report.code, ErrorCode::ProtocolViolation);
        assert!(matches!(read_message(&mut theirs, &Negotiated::NOTHING).await, Err(SessionError::Closed)));
    }

    #[tokio::test]
    async fn a_frame_on_the_control_connection_is_refused_before_its_payload_is_read() {
        let frame = Header { block_count: 1, len: 1 << 20, head_count: 1, ..Header::bare(Kind::Frame, NO_TRANSFER, 1) };
        let negotiated = Negotiated::with_peer(0, u32::MAX);
        let refused = read_message(&mut &frame.encode()[..], &negotiated).await;
        assert!(matches!(refused, Err(SessionError::Unexpected(Kind::Frame))), "{refused:?}");
    }
}
