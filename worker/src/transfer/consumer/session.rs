//! One session with a producer: dials its two connections, reads both, renews leases, and ends when it is no longer used.

use super::ConsumerConfig;
use super::incoming::{Incoming, Taken};
use crate::transfer::error::{FetchError, SessionError};
use crate::transfer::limits::{FETCHES_PER_SESSION_MAX, Timing};
use crate::transfer::session::{self, Link, NO_TRANSFER};
use crate::transfer::stats::ConsumerCounters;
use baton_wire::kv::control::decode;
use baton_wire::kv::{Commit, Credit, ErrorCode, ErrorReport, Header, Hello, Kind, Stream};
use baton_wire::{SessionId, TransferId};
use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// A session with a producer.
pub(super) struct Session {
    pub(super) link: Arc<Link>,
    /// `None` once no transfer may be entered any more.
    active: Mutex<Option<HashMap<TransferId, Arc<Incoming>>>>,
    counters: Arc<ConsumerCounters>,
}

impl Session {
    /// Connects to the producer at `address`: control first, because the bulk connection is attached to it.
    pub(super) async fn dial(
        address: &str,
        config: &ConsumerConfig,
        counters: &Arc<ConsumerCounters>,
        ended: CancellationToken,
    ) -> Result<Arc<Session>, FetchError> {
        let timing = config.timing;
        let id = mint_session();
        let (control, hello) = connect(address, config, id, Stream::Control).await?;
        let (bulk, again) = connect(address, config, id, Stream::Bulk).await?;
        if hello.epoch != again.epoch {
            return Err(FetchError::Session(SessionError::Restarted));
        }
        let (link, outbox) = Link::new(&hello, ended);
        let counters = Arc::clone(counters);
        let session = Arc::new(Session { link, active: Mutex::new(Some(HashMap::new())), counters });
        let (from, to) = control.into_split();
        let each = || Arc::clone(&session);
        tokio::spawn({
            let session = each();
            async move { session::write_outbox(&session.link, outbox, to, timing).await }
        });
        tokio::spawn({
            let session = each();
            async move { session.until_ended(session.read_control(from)).await }
        });
        tokio::spawn({
            let session = each();
            async move {
                // Open until the session's end is noted: were it closed before, the producer's answer could be noted first.
                let mut bulk = bulk;
                session.until_ended(session.read_bulk(&mut bulk)).await;
            }
        });
        tokio::spawn({
            let session = each();
            async move {
                tokio::join!(session.link.watch_silence(timing.silent), session.renew(timing));
            }
        });
        Ok(session)
    }

    /// Whether a transfer may be entered.
    pub(super) fn is_usable(&self) -> bool {
        !self.link.is_over() && self.active().is_some()
    }

    /// Enters a transfer; a lower attempt at the same one is over.
    pub(super) fn enter(&self, incoming: &Arc<Incoming>) -> Result<(), FetchError> {
        let Incoming { transfer, attempt, .. } = **incoming;
        let mut active = self.active();
        let Some(transfers) = active.as_mut() else { return Err(FetchError::Session(self.link.cause())) };
        if transfers.len() >= FETCHES_PER_SESSION_MAX {
            return Err(FetchError::TooMany {
                what: "transfers from one prefill worker",
                max: FETCHES_PER_SESSION_MAX,
            });
        }
        if transfers.get(&transfer).is_some_and(|other| other.attempt >= attempt) {
            return Err(FetchError::Superseded { transfer, attempt });
        }
        let lower = transfers.insert(transfer, Arc::clone(incoming));
        drop(active);
        if let Some(lower) = lower {
            lower.fail(FetchError::Superseded { transfer, attempt: lower.attempt });
        }
        Ok(())
    }

    /// Takes a transfer out, unless a higher attempt has its place.
    pub(super) fn leave(&self, incoming: &Arc<Incoming>) {
        if let Some(transfers) = self.active().as_mut()
            && transfers.get(&incoming.transfer).is_some_and(|known| Arc::ptr_eq(known, incoming))
        {
            transfers.remove(&incoming.transfer);
        }
    }

    fn find(&self, header: &Header) -> Option<Arc<Incoming>> {
        let active = self.active();
        let incoming = active.as_ref()?.get(&header.transfer)?;
        (incoming.attempt == header.attempt).then(|| Arc::clone(incoming))
    }

    fn active(&self) -> MutexGuard<'_, Option<HashMap<TransferId, Arc<Incoming>>>> {
        self.active.lock().expect("nothing under this lock panics")
    }

    /// Runs a reader until it or the session ends; either ends both.
    async fn until_ended(&self, reader: impl Future<Output = SessionError>) {
        tokio::select! {
            () = self.link.ended() => {}
            error = reader => {
                if error.report() == Some(ErrorCode::Corrupt) {
                    self.counters.checksum_failures.fetch_add(1, Relaxed);
                }
                tracing::debug!(peer = %self.link.peer, %error, "KV session ended");
                self.link.end(error);
            }
        }
        *self.active() = None;
    }

    async fn read_control(&self, mut from: OwnedReadHalf) -> SessionError {
        loop {
            let message = session::read_message(&mut from, &self.link.negotiated).await;
            self.link.heard();
            if let Err(error) = message.and_then(|(header, payload)| self.take(&header, &payload)) {
                return error;
            }
        }
    }

    fn take(&self, header: &Header, payload: &[u8]) -> Result<(), SessionError> {
        match header.kind {
            Kind::Commit => {
                let commit: Commit = decode(header, payload)?;
                if let Some(incoming) = self.find(header) {
                    incoming.commit(commit, Instant::now());
                }
            }
            Kind::Error => {
                let ErrorReport { code } = decode(header, payload)?;
                if header.transfer == NO_TRANSFER {
                    return Err(SessionError::Refused(code));
                }
                if let Some(incoming) = self.find(header) {
                    incoming.fail(FetchError::Refused(code));
                }
            }
            Kind::Started => {
                if let Some(incoming) = self.find(header) {
                    incoming.started(Instant::now());
                }
            }
            Kind::Ping => self.link.send_bare(Kind::Pong, NO_TRANSFER, 0),
            Kind::Pong => {}
            Kind::Hello
            | Kind::Subscribe
            | Kind::Frame
            | Kind::CommitAck
            | Kind::Cancel
            | Kind::Credit
            | Kind::LeaseRenew => return Err(SessionError::Unexpected(header.kind)),
        }
        Ok(())
    }

    /// Reads frames. The stream is not split, because closing its writing half would tell the producer that we are gone.
    async fn read_bulk(&self, from: &mut TcpStream) -> SessionError {
        let mut buffer = Vec::new();
        loop {
            if let Err(error) = self.read_frame(from, &mut buffer).await {
                return error;
            }
        }
    }

    async fn read_frame(&self, from: &mut TcpStream, buffer: &mut Vec<u8>) -> Result<(), SessionError> {
        let header = session::read_header(from, &self.link.negotiated).await?;
        let payload = session::read_payload(from, &header, buffer).await?;
        self.link.heard();
        match header.kind {
            Kind::Frame => {}
            Kind::Error => return Err(SessionError::Refused(decode::<ErrorReport>(&header, payload)?.code)),
            Kind::Hello
            | Kind::Subscribe
            | Kind::Commit
            | Kind::CommitAck
            | Kind::Cancel
            | Kind::Credit
            | Kind::LeaseRenew
            | Kind::Ping
            | Kind::Pong
            | Kind::Started => return Err(SessionError::Unexpected(header.kind)),
        }
        // Frames of a transfer that was cancelled may still be under way: they are read and dropped.
        let taken =
            self.find(&header).map_or(Taken::Dropped, |incoming| incoming.frame(&header, payload, Instant::now()));
        match taken {
            Taken::Written { credit } => {
                self.counters.frames.fetch_add(1, Relaxed);
                self.counters.kv_bytes.fetch_add(payload.len() as u64, Relaxed);
                if credit > 0 {
                    self.link.send(
                        header.transfer,
                        header.attempt,
                        &Credit { bytes: credit, have_prefix_blocks: 0 },
                    )?;
                }
            }
            Taken::Dropped => {
                self.counters.frames_discarded.fetch_add(1, Relaxed);
            }
        }
        Ok(())
    }

    /// Renews the leases of all transfers, and closes the session once it has had none for long.
    async fn renew(&self, timing: Timing) {
        let mut tick = tokio::time::interval(timing.lease_renew);
        let mut used = Instant::now();
        loop {
            tokio::select! {
                () = self.link.ended() => return,
                _ = tick.tick() => {}
            }
            let mut active = self.active();
            let Some(transfers) = active.as_mut() else { return };
            for incoming in transfers.values() {
                self.link.send_bare(Kind::LeaseRenew, incoming.transfer, incoming.attempt);
            }
            if !transfers.is_empty() {
                used = Instant::now();
            } else if used.elapsed() >= timing.session_idle {
                *active = None;
                return self.link.end(SessionError::ClosedHere);
            }
        }
    }
}

/// Opens one connection and exchanges HELLOs on it.
async fn connect(
    address: &str,
    config: &ConsumerConfig,
    id: SessionId,
    kind: Stream,
) -> Result<(TcpStream, Hello), FetchError> {
    let ConsumerConfig { epoch, fingerprint, timing } = *config;
    let failed = |error: std::io::Error| FetchError::Connect { address: address.to_owned(), source: Arc::new(error) };
    let mut stream = timeout(timing.connect, TcpStream::connect(address))
        .await
        .map_err(|_| FetchError::ConnectTimeout { address: address.to_owned(), limit: timing.connect })?
        .map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let greet = async {
        session::write_hello(&mut stream, &Hello::new(fingerprint, epoch, id, kind), timing.hello).await?;
        let hello = session::read_hello(&mut stream, timing.hello).await?;
        if hello.fingerprint != fingerprint {
            return Err(SessionError::FingerprintMismatch { local: fingerprint, remote: hello.fingerprint });
        }
        if (hello.session, hello.stream) != (id, kind) {
            return Err(SessionError::Unexpected(Kind::Hello));
        }
        Ok(hello)
    };
    let hello = greet.await.map_err(FetchError::Session)?;
    Ok((stream, hello))
}

fn mint_session() -> SessionId {
    let mut id = SessionId([0; 16]);
    getrandom::fill(&mut id.0).expect("the kernel's random source does not fail after boot");
    id
}
