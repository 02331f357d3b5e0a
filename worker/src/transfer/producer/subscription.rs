//! One consumer's subscription to one export: checks its right to it, waits for it, sends frames as layers are done, commits.

use super::Registry;
use super::connection::Peer;
use super::registry::Meeting;
use crate::transfer::commit::Commit;
use crate::transfer::export::{ExportState, Step};
use crate::transfer::session::Link;
use crate::transfer::stats::ExportReason;
use crate::transfer::watermark::Run;
use baton_engine::kv_pool::{BLOCK_TOKENS, BlockId, KvLayout, StaleBlock};
use baton_wire::TransferId;
use baton_wire::kv::{self, BlockChecksums, Codec, ErrorCode, Header, Kind, Subscribe};
use baton_wire::signing::{self, TransferClaims};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Checks a SUBSCRIBE against its token and against what can be served; then it meets its export, or waits for it.
///
/// # Errors
/// With the code that the consumer is told.
pub(super) fn check(registry: &Registry, peer: &Peer, header: &Header, asked: Subscribe) -> Result<Meeting, ErrorCode> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let claims: TransferClaims =
        signing::verify(&registry.config.verifying_key, &asked.token, now).map_err(|_| ErrorCode::Unauthorized)?;
    let may = claims.transfer == header.transfer
        && claims.attempt == header.attempt
        && claims.consumer == peer.link.peer
        && claims.fingerprint == registry.config.fingerprint;
    if !may {
        return Err(ErrorCode::Unauthorized);
    }
    let layout = registry.pool.layout();
    let blocks = (asked.prompt_tokens as usize).div_ceil(BLOCK_TOKENS);
    let missing = blocks.checked_sub(asked.have_prefix_blocks as usize);
    let whole = asked.head_start == 0 && asked.head_count as usize == layout.kv_heads && asked.codec == Codec::None;
    // None is for now; but less than one block would never let a frame leave.
    let enough_credit = asked.credit_bytes == 0 || asked.credit_bytes >= layout.block_bytes() as u64;
    let (Some(missing), true, true) = (missing, whole, enough_credit) else { return Err(ErrorCode::Unsupported) };
    if missing as u64 * layout.block_bytes_all_layers() as u64 > claims.byte_budget {
        return Err(ErrorCode::BudgetExceeded);
    }
    if peer.bulk.get().is_none() {
        return Err(ErrorCode::ProtocolViolation);
    }
    registry.meet((header.transfer, header.attempt), &peer.link, asked, Instant::now())
}

/// Tells a consumer that its subscription is refused.
pub(super) fn refuse(registry: &Registry, link: &Link, transfer: TransferId, attempt: u32, code: ErrorCode) {
    registry.counters.refused.add(code as usize);
    tracing::debug!(%transfer, attempt, %code, peer = %link.peer, "subscription refused");
    link.send_error(transfer, attempt, code);
}

/// A subscription that has been checked.
pub(super) struct Subscription {
    registry: Arc<Registry>,
    peer: Arc<Peer>,
    transfer: TransferId,
    attempt: u32,
}

impl Subscription {
    pub(super) fn new(registry: &Arc<Registry>, peer: &Arc<Peer>, transfer: TransferId, attempt: u32) -> Self {
        Subscription { registry: Arc::clone(registry), peer: Arc::clone(peer), transfer, attempt }
    }

    /// From the meeting to the end of the export or of the session.
    pub(super) async fn run(self, meeting: Meeting) {
        let export = match meeting {
            Meeting::Open(export) => export,
            Meeting::Parked(export) => match self.wait_for(export).await {
                Ok(Some(export)) => export,
                Ok(None) => return,
                Err(code) => return self.refuse(code),
            },
        };
        let reason = tokio::select! {
            // A frame that is half written when the session ends does not matter any more.
            () = self.peer.link.ended() => ExportReason::ConsumerLost,
            reason = self.send(&export) => reason,
        };
        self.registry.finish(&export, reason);
    }

    /// Waits for the export to be opened and to take this subscription. `None`: nobody wants to know any more.
    async fn wait_for(
        &self,
        mut export: oneshot::Receiver<Result<Arc<ExportState>, ErrorCode>>,
    ) -> Result<Option<Arc<ExportState>>, ErrorCode> {
        let Self { registry, peer, transfer, attempt } = self;
        let given_up = tokio::select! {
            met = &mut export => return met.map_or(Ok(None), |met| met.map(Some)),
            () = peer.link.ended() => Ok(None),
            () = tokio::time::sleep(registry.config.timing.park) => Err(ErrorCode::NotOpened),
        };
        if registry.unpark(*transfer, *attempt, &peer.link) {
            return given_up;
        }
        // It was opened, or ended otherwise, at this very moment: the answer is on its way and decides.
        export.await.map_or(Ok(None), |met| met.map(Some))
    }

    fn refuse(&self, code: ErrorCode) {
        refuse(&self.registry, &self.peer.link, self.transfer, self.attempt, code);
    }

    /// Sends what is computed until the export ends, and says how it does.
    async fn send(&self, export: &Arc<ExportState>) -> ExportReason {
        let layout = *self.registry.pool.layout();
        // Made when the first frame, or the COMMIT, is due: by then it is known which blocks are wanted.
        let mut sent: Option<Sent> = None;
        let nothing = || Sent { frames: 0, checksums: BlockChecksums::new(layout.layers, export.wanted()) };
        loop {
            let frame_bytes_max = self.peer.link.negotiated.frame_bytes_max;
            let ended = match export.next_step(layout.block_bytes(), frame_bytes_max, Instant::now()) {
                Step::TellOfStart => {
                    self.peer.link.send_bare(Kind::Started, self.transfer, self.attempt);
                    None
                }
                Step::Send(run, blocks) => {
                    let sent = sent.get_or_insert_with(nothing);
                    self.send_frame(export, &layout, run, &blocks, sent).await.err()
                }
                Step::Commit(commit, since_compute_end) => {
                    self.commit(export, sent.get_or_insert_with(nothing), commit, since_compute_end).err()
                }
                Step::Wait(until) => {
                    tokio::select! {
                        () = export.changed() => {}
                        () = tokio::time::sleep_until(until) => {}
                    }
                    None
                }
                Step::LeaseExpired => Some(ExportReason::LeaseExpired),
                // Whoever ended it has noted why: what is said here comes second and is not taken.
                Step::Over => Some(ExportReason::Cancelled),
            };
            if let Some(reason) = ended {
                return reason;
            }
        }
    }

    /// Copies a run out of the pool and writes it as one frame. The copy (at most 4 MiB, about a millisecond) is made under the
    /// connection's lock: so there is one frame in memory for each connection, however many transfers share it.
    async fn send_frame(
        &self,
        export: &ExportState,
        layout: &KvLayout,
        run: Run,
        blocks: &[(BlockId, u64)],
        sent: &mut Sent,
    ) -> Result<(), ExportReason> {
        let bulk = self.peer.bulk.get().expect("checked before the subscription began, and never taken away");
        let mut bulk = bulk.lock().await;
        if !export.may_send(Instant::now()) {
            // Or it has ended for another reason, which was noted first and stays.
            return Err(ExportReason::LeaseExpired);
        }
        let payload = bulk.payload(blocks.len() * layout.block_bytes());
        let len = u32::try_from(payload.len()).expect("a run fits a frame");
        let payload_crc =
            self.copy_out(export, layout, run, blocks, payload, sent).map_err(|_| ExportReason::StaleBlock)?;
        let header = Header {
            seq: sent.frames,
            layer: u32::try_from(run.layer).expect("a model has few layers"),
            first_block: run.first_block,
            block_count: run.count,
            len,
            head_start: 0,
            head_count: u16::try_from(layout.kv_heads).expect("a model has few heads"),
            payload_crc,
            ..Header::bare(Kind::Frame, self.transfer, self.attempt)
        };
        if let Err(error) = bulk.send(&header, self.registry.config.timing.write_stall).await {
            self.peer.link.end(error);
            return Err(ExportReason::ConsumerLost);
        }
        sent.frames += 1;
        self.registry.counters.frame(len as usize);
        export.frame_left(len as usize);
        Ok(())
    }

    /// Copies a run's blocks to `payload`, notes their checksums, and gives the payload's.
    fn copy_out(
        &self,
        export: &ExportState,
        layout: &KvLayout,
        run: Run,
        blocks: &[(BlockId, u64)],
        payload: &mut [u8],
        sent: &mut Sent,
    ) -> Result<u32, StaleBlock> {
        let mut payload_crc = 0;
        let places = payload.chunks_exact_mut(layout.block_bytes());
        for ((index, &(block, generation)), place) in (run.first_block..).zip(blocks).zip(places) {
            self.registry.pool.export(run.layer, block, generation, place)?;
            let tokens = export.spec.prompt_tokens - index as usize * BLOCK_TOKENS;
            if tokens < BLOCK_TOKENS {
                clear_unused(place, layout, tokens);
            }
            let crc = BlockChecksums::of_block(place);
            sent.checksums.set(run.layer, index, crc);
            payload_crc = BlockChecksums::append(payload_crc, crc, place.len());
        }
        Ok(payload_crc)
    }

    fn commit(
        &self,
        export: &ExportState,
        sent: &Sent,
        commit: Commit,
        since_compute_end: Duration,
    ) -> Result<(), ExportReason> {
        let message = kv::Commit {
            tokens: u32::try_from(export.spec.prompt_tokens)
                .expect("equal to the consumer's number, which has 32 bits"),
            frames: sent.frames,
            digest: sent.checksums.digest(),
            prompt_hash: export.spec.prompt_hash,
            cached_tokens: u32::try_from(commit.cached_tokens).unwrap_or(u32::MAX),
            choices: commit.choices,
            since_compute_end_us: u64::try_from(since_compute_end.as_micros()).unwrap_or(u64::MAX),
        };
        self.peer.link.send(self.transfer, self.attempt, &message).map_err(|error| {
            tracing::error!(transfer = %self.transfer, %error, "COMMIT cannot be sent");
            ExportReason::PrefillFailed
        })
    }
}

/// What has left.
struct Sent {
    frames: u32,
    checksums: BlockChecksums,
}

/// Zeroes the places of a prompt's last block that hold none of its `tokens` tokens: what an earlier owner left there is another
/// request's, and must not leave this worker.
fn clear_unused(block: &mut [u8], layout: &KvLayout, tokens: usize) {
    let used = layout.head_bytes() / BLOCK_TOKENS * tokens;
    for head in block.chunks_exact_mut(layout.head_bytes()) {
        head[used..].fill(0);
    }
}
