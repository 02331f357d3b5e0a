//! One connection of a consumer: HELLO, then its control messages in, or frames out.

use super::Registry;
use super::subscription::{self, Subscription};
use crate::transfer::error::SessionError;
use crate::transfer::session::{self, Link, NO_TRANSFER};
use crate::transfer::stats::ExportReason;
use baton_wire::kv::control::{decode, encode};
use baton_wire::kv::{Credit, ErrorCode, ErrorReport, HEADER_BYTES, Header, Hello, Kind, Stream, Subscribe};
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A consumer with which there is a session.
pub(super) struct Peer {
    pub(super) link: Arc<Link>,
    /// Where its frames go, once its bulk connection is there. Fair: transfers that share it take turns frame by frame.
    pub(super) bulk: OnceLock<tokio::sync::Mutex<BulkWriter>>,
}

/// The bulk connection's writing half, with the one frame that is being put together for it.
pub(super) struct BulkWriter {
    half: OwnedWriteHalf,
    buffer: Vec<u8>,
}

impl BulkWriter {
    /// Room for a payload of `len` bytes.
    pub(super) fn payload(&mut self, len: usize) -> &mut [u8] {
        if self.buffer.len() < HEADER_BYTES + len {
            self.buffer.resize(HEADER_BYTES + len, 0);
        }
        &mut self.buffer[HEADER_BYTES..HEADER_BYTES + len]
    }

    /// Sends the frame whose payload was put together last.
    pub(super) async fn send(&mut self, header: &Header, stall: std::time::Duration) -> Result<(), SessionError> {
        self.buffer[..HEADER_BYTES].copy_from_slice(&header.encode());
        session::write_all(&mut self.half, &self.buffer[..HEADER_BYTES + header.len as usize], stall).await
    }
}

/// Serves one connection in tasks of its own, or refuses it.
pub(super) fn spawn(registry: &Arc<Registry>, tasks: &TaskTracker, stream: TcpStream, from: SocketAddr) {
    let registry = Arc::clone(registry);
    if let Ok(permit) = Arc::clone(&registry.connections).try_acquire_owned() {
        let inner = tasks.clone();
        tasks.spawn(async move {
            if let Err(error) = serve(&registry, &inner, stream, permit).await {
                tracing::debug!(%from, %error, "KV connection refused");
            }
        });
    } else if let Ok(permit) = Arc::clone(&registry.refusals).try_acquire_owned() {
        registry.counters.refused.add(ErrorCode::TooManyConnections as usize);
        tasks.spawn(async move {
            refuse(&registry, stream, ErrorCode::TooManyConnections).await;
            drop(permit);
        });
    }
}

/// Reads HELLO, answers it, and hands the connection to what it is for.
async fn serve(
    registry: &Arc<Registry>,
    tasks: &TaskTracker,
    mut stream: TcpStream,
    permit: OwnedSemaphorePermit,
) -> Result<(), SessionError> {
    let timing = registry.config.timing;
    stream.set_nodelay(true)?;
    let hello = match session::read_hello(&mut stream, timing.hello).await {
        Ok(hello) => hello,
        Err(error) => {
            if let Some(code) = error.report() {
                registry.counters.refused.add(code as usize);
                refuse(registry, stream, code).await;
            }
            return Err(error);
        }
    };
    let (local, remote) = (registry.config.fingerprint, hello.fingerprint);
    let answer = Hello::new(local, registry.config.epoch, hello.session, hello.stream);
    if local != remote {
        // Our HELLO comes first, so that the consumer can name both fingerprints.
        session::write_hello(&mut stream, &answer, timing.write_stall).await?;
        registry.counters.refused.add(ErrorCode::FingerprintMismatch as usize);
        refuse(registry, stream, ErrorCode::FingerprintMismatch).await;
        return Err(SessionError::FingerprintMismatch { local, remote });
    }
    match hello.stream {
        Stream::Control => control(registry, tasks, stream, &hello, &answer, permit).await,
        Stream::Bulk => bulk(registry, stream, &hello, &answer, permit).await,
    }
}

/// Says why, and closes so that the peer can read it: what it has sent is read first, or its TCP would be reset.
async fn refuse(registry: &Registry, mut stream: TcpStream, code: ErrorCode) {
    let message = encode(NO_TRANSFER, 0, &ErrorReport { code }).expect("a code fits every limit");
    let told = async {
        stream.write_all(&message).await?;
        stream.shutdown().await?;
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await? > 0 {}
        std::io::Result::Ok(())
    };
    let _ = timeout(registry.config.timing.flush, told).await;
}

/// The control connection: its end is the session's. HELLO is answered once the session can be found, since the bulk connection
/// may follow at once.
async fn control(
    registry: &Arc<Registry>,
    tasks: &TaskTracker,
    mut stream: TcpStream,
    hello: &Hello,
    answer: &Hello,
    permit: OwnedSemaphorePermit,
) -> Result<(), SessionError> {
    let timing = registry.config.timing;
    let (link, outbox) = Link::new(hello, CancellationToken::new());
    let peer = Arc::new(Peer { link: Arc::clone(&link), bulk: OnceLock::new() });
    registry.add_session(hello.session, Arc::clone(&peer))?;
    if let Err(error) = session::write_hello(&mut stream, answer, timing.write_stall).await {
        link.end(error.clone());
        registry.remove_session(hello.session);
        return Err(error);
    }
    let (mut from, to) = stream.into_split();
    tasks.spawn({
        let link = Arc::clone(&link);
        async move { session::write_outbox(&link, outbox, to, timing).await }
    });
    // In a task of its own, so that a long prefill or a slow consumer cannot keep it from being heard.
    tasks.spawn({
        let link = Arc::clone(&link);
        async move {
            tokio::join!(link.watch_silence(timing.lease), ping(&link, timing.ping));
        }
    });
    let error = tokio::select! {
        () = link.ended() => link.cause(),
        error = read_control(registry, tasks, &peer, &mut from) => error,
    };
    if error.report().is_some() {
        tracing::debug!(peer = %link.peer, %error, "KV session ended");
    }
    link.end(error);
    registry.remove_session(hello.session);
    drop(permit);
    Ok(())
}

async fn ping(link: &Link, every: std::time::Duration) {
    let mut tick = tokio::time::interval(every);
    loop {
        tokio::select! {
            () = link.ended() => return,
            _ = tick.tick() => link.send_bare(Kind::Ping, NO_TRANSFER, 0),
        }
    }
}

async fn read_control(
    registry: &Arc<Registry>,
    tasks: &TaskTracker,
    peer: &Arc<Peer>,
    from: &mut OwnedReadHalf,
) -> SessionError {
    loop {
        let message = session::read_message(from, &peer.link.negotiated).await;
        peer.link.heard();
        let taken = message.and_then(|(header, payload)| take(registry, tasks, peer, &header, &payload));
        if let Err(error) = taken {
            return error;
        }
    }
}

fn take(
    registry: &Arc<Registry>,
    tasks: &TaskTracker,
    peer: &Arc<Peer>,
    header: &Header,
    payload: &[u8],
) -> Result<(), SessionError> {
    let Header { transfer, attempt, .. } = *header;
    // Only the subscriber's own messages count: nobody can renew, acknowledge or cancel another consumer's transfer.
    let export = || registry.find(transfer, attempt).filter(|export| export.is_subscribed_by(&peer.link));
    match header.kind {
        Kind::Subscribe => {
            let asked: Subscribe = decode(header, payload)?;
            match subscription::check(registry, peer, header, asked) {
                Ok(meeting) => {
                    tasks.spawn(Subscription::new(registry, peer, transfer, attempt).run(meeting));
                }
                Err(code) => subscription::refuse(registry, &peer.link, transfer, attempt, code),
            }
        }
        Kind::Credit => {
            let credit: Credit = decode(header, payload)?;
            if export().is_some_and(|export| !export.credit(&peer.link, credit)) {
                return Err(SessionError::Unexpected(Kind::Credit));
            }
        }
        Kind::LeaseRenew => {
            if let Some(export) = export() {
                export.renew(&peer.link, Instant::now());
            }
        }
        Kind::CommitAck => {
            if let Some(export) = export() {
                registry.finish(&export, ExportReason::Acked);
            }
        }
        Kind::Cancel => match export() {
            Some(export) => registry.finish(&export, ExportReason::Cancelled),
            // Or it has ended already.
            None => {
                registry.unpark(transfer, attempt, &peer.link);
            }
        },
        Kind::Error => {
            let report: ErrorReport = decode(header, payload)?;
            if transfer == NO_TRANSFER {
                return Err(SessionError::Refused(report.code));
            }
            if let Some(export) = export() {
                tracing::warn!(%transfer, attempt, code = %report.code, "consumer failed a transfer");
                registry.finish(&export, ExportReason::ConsumerFailed);
            }
        }
        Kind::Ping => peer.link.send_bare(Kind::Pong, NO_TRANSFER, 0),
        Kind::Pong => {}
        Kind::Hello | Kind::Frame | Kind::Commit | Kind::Started => return Err(SessionError::Unexpected(header.kind)),
    }
    Ok(())
}

/// The bulk connection: frames are written by the subscriptions; here its end is waited for. HELLO is answered once frames can be
/// written, since a SUBSCRIBE may follow at once.
async fn bulk(
    registry: &Registry,
    mut stream: TcpStream,
    hello: &Hello,
    answer: &Hello,
    permit: OwnedSemaphorePermit,
) -> Result<(), SessionError> {
    let stall = registry.config.timing.write_stall;
    let peer = registry.session(hello.session).filter(|peer| peer.link.peer == hello.epoch);
    let Some(peer) = peer else {
        session::write_hello(&mut stream, answer, stall).await?;
        registry.counters.refused.add(ErrorCode::UnknownSession as usize);
        refuse(registry, stream, ErrorCode::UnknownSession).await;
        return Err(SessionError::Refused(ErrorCode::UnknownSession));
    };
    let (mut from, half) = stream.into_split();
    let Ok(()) = peer.bulk.set(tokio::sync::Mutex::new(BulkWriter { half, buffer: Vec::new() })) else {
        // A second bulk connection: none of our consumers opens one.
        peer.link.end(SessionError::Unexpected(Kind::Hello));
        return Ok(());
    };
    let until_closed = async {
        let writer = peer.bulk.get().expect("set just now");
        session::write_hello(&mut writer.lock().await.half, answer, stall).await?;
        // The consumer says nothing on it, so whatever is read is its end.
        match from.read(&mut [0; 1]).await? {
            0 => Err::<(), _>(SessionError::Closed),
            _ => Err(SessionError::Unexpected(Kind::Hello)),
        }
    };
    tokio::select! {
        () = peer.link.ended() => {}
        closed = until_closed => peer.link.end(closed.err().unwrap_or(SessionError::Closed)),
    }
    drop(permit);
    Ok(())
}
