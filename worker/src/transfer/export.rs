//! One prompt's KV on its way out: what is computed, who has asked for it, how long it is kept, how it ended.
//!
//! Told by the engine's thread (progress), the worker (commit, fail), the consumer's messages (credit, renewals, ack, cancel) and
//! the clock; asked by the subscription that sends ([`super::producer`]) what to do next. Does no I/O and copies no KV. Its
//! lock is held for a few integer operations, so that the engine's thread never waits for a socket or a copy.

use super::commit::Commit;
use super::lease::Lease;
use super::limits::Timing;
use super::producer::Registry;
use super::session::Link;
use super::stats::ExportReason;
use super::watermark::{Run, Watermark};
use baton_engine::kv_pool::{BLOCK_TOKENS, BlockId};
use baton_wire::kv::{Credit, ErrorCode, Subscribe};
use baton_wire::{PromptHash, TransferId};
use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// What is to be exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSpec {
    /// Which handover.
    pub transfer: TransferId,
    /// Which attempt at it; a higher one supersedes lower ones.
    pub attempt: u32,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Hash of the prompt.
    pub prompt_hash: PromptHash,
}

/// How an export ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportOutcome {
    /// Why.
    pub reason: ExportReason,
    /// Payload bytes that left.
    pub kv_bytes: u64,
}

/// The worker's hold on an export. Dropping it before the end fails the export.
pub struct Export {
    state: Arc<ExportState>,
    registry: Arc<Registry>,
}

impl Export {
    pub(super) fn new(state: Arc<ExportState>, registry: Arc<Registry>) -> Self {
        Export { state, registry }
    }

    /// KV of the prompt's first `tokens` tokens is complete in `layer`, in `blocks` (with their generations). Called by the
    /// engine's thread for each layer of each step; does not wait for anything.
    pub fn progress(&self, layer: usize, blocks: &[(BlockId, u64)], tokens: usize) {
        self.state.progress(layer, blocks, tokens, Instant::now());
    }

    /// The prefill is done: once all frames have left, the consumer gets the first token of each choice.
    pub fn commit(&self, commit: Commit) {
        self.state.commit(commit);
    }

    /// The prefill failed or was aborted.
    pub fn fail(&self) {
        self.registry.finish(&self.state, ExportReason::PrefillFailed);
    }

    /// Resolves when the export has ended, for whatever reason: from then on nothing of its blocks is sent, and they may be
    /// released.
    pub fn finished(&self) -> impl Future<Output = ExportOutcome> + Send + use<> {
        let mut outcome = self.state.outcome.subscribe();
        // The sender lives in the state, which is kept alive until the outcome is known.
        let state = Arc::clone(&self.state);
        async move {
            let outcome = outcome.wait_for(Option::is_some).await.map(|outcome| *outcome);
            drop(state);
            outcome.ok().flatten().expect("the sender is alive and has sent an outcome")
        }
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.fail();
    }
}

/// Shared by the worker's [`Export`], the registry and the subscription that sends.
pub(super) struct ExportState {
    pub(super) spec: ExportSpec,
    pub(super) opened: Instant,
    inner: Mutex<Inner>,
    changed: Notify,
    outcome: watch::Sender<Option<ExportOutcome>>,
}

struct Inner {
    /// The prompt's blocks so far, in order.
    blocks: Vec<(BlockId, u64)>,
    watermark: Watermark,
    lease: Lease,
    compute_end: Instant,
    /// Something of it is computed: the engine has given it all its blocks.
    started: bool,
    commit: Option<Commit>,
    subscriber: Option<Subscriber>,
    kv_bytes: u64,
}

struct Subscriber {
    link: Arc<Link>,
    /// Payload bytes that may still leave.
    credit: u64,
    /// It subscribed without credit, and its first CREDIT has not come.
    queued: bool,
    /// It knows that computing has begun, or does not ask.
    told_of_start: bool,
}

/// What the sending subscription is to do next.
#[derive(Debug)]
pub(super) enum Step {
    /// Tell the consumer that computing has begun.
    TellOfStart,
    /// Send these blocks.
    Send(Run, Vec<(BlockId, u64)>),
    /// All frames have left: say so.
    Commit(Commit, Duration),
    /// Nothing until something changes, or until the lease ends at this time.
    Wait(Instant),
    /// The lease has run out.
    LeaseExpired,
    /// The export has ended.
    Over,
}

impl ExportState {
    pub(super) fn new(spec: ExportSpec, layers: usize, now: Instant, timing: Timing) -> Self {
        let inner = Inner {
            blocks: Vec::new(),
            watermark: Watermark::new(layers, spec.prompt_tokens),
            lease: Lease::new(now, timing),
            compute_end: now,
            started: false,
            commit: None,
            subscriber: None,
            kv_bytes: 0,
        };
        ExportState {
            spec,
            opened: now,
            inner: Mutex::new(inner),
            changed: Notify::new(),
            outcome: watch::Sender::new(None),
        }
    }

    pub(super) fn progress(&self, layer: usize, blocks: &[(BlockId, u64)], tokens: usize, now: Instant) {
        let mut inner = self.lock();
        let same = inner.blocks.iter().zip(blocks).take_while(|(ours, theirs)| ours == theirs).count();
        if same < inner.blocks.len().min(blocks.len()) {
            inner.watermark.lost_from(u32::try_from(same).expect("a prompt's blocks are ids of 32 bits"));
            inner.blocks.truncate(same);
        }
        if inner.blocks.len() < blocks.len() {
            inner.blocks.extend_from_slice(&blocks[same..]);
        }
        inner.watermark.computed(layer, tokens.min(blocks.len() * BLOCK_TOKENS));
        inner.compute_end = now;
        inner.started = true;
        inner.lease.work(now);
        drop(inner);
        self.changed.notify_one();
    }

    pub(super) fn commit(&self, commit: Commit) {
        self.lock().commit.get_or_insert(commit);
        self.changed.notify_one();
    }

    /// Takes the consumer on `link` as the one subscriber. From here on its messages count, so this happens before the next
    /// message of its session is looked at: a CANCEL right behind the SUBSCRIBE must find it.
    ///
    /// # Errors
    /// With the code that the consumer is told.
    pub(super) fn subscribe(&self, link: &Arc<Link>, asked: &Subscribe, now: Instant) -> Result<(), ErrorCode> {
        let ExportSpec { prompt_tokens, prompt_hash, .. } = self.spec;
        if prompt_tokens != asked.prompt_tokens as usize || prompt_hash != asked.prompt_hash {
            return Err(ErrorCode::PromptMismatch);
        }
        let mut inner = self.lock();
        if inner.subscriber.is_some() || self.is_over() {
            return Err(ErrorCode::AlreadyTaken);
        }
        let queued = asked.credit_bytes == 0;
        let link = Arc::clone(link);
        inner.subscriber = Some(Subscriber { link, credit: asked.credit_bytes, queued, told_of_start: !queued });
        inner.watermark.skip_to(asked.have_prefix_blocks);
        inner.lease.renew(now);
        Ok(())
    }

    /// What to do next. A [`Step::Send`] counts as sent from here on; its bytes are taken from the credit.
    pub(super) fn next_step(&self, block_bytes: usize, frame_bytes_max: u32, now: Instant) -> Step {
        let mut inner = self.lock();
        if self.is_over() {
            return Step::Over;
        }
        if inner.lease.expired(now) {
            return Step::LeaseExpired;
        }
        let wait = Step::Wait(inner.lease.ends());
        let started = inner.started;
        let Some(subscriber) = &mut inner.subscriber else { return wait };
        if started && !subscriber.told_of_start {
            subscriber.told_of_start = true;
            return Step::TellOfStart;
        }
        let bytes_max = u64::from(frame_bytes_max).min(subscriber.credit);
        let count_max = u32::try_from(bytes_max / block_bytes as u64).expect("no more than a frame's bytes");
        if let Some(run) = inner.watermark.next_run(count_max) {
            inner.watermark.sent(run);
            let bytes = u64::from(run.count) * block_bytes as u64;
            if let Some(subscriber) = &mut inner.subscriber {
                subscriber.credit -= bytes;
            }
            let first = run.first_block as usize;
            return Step::Send(run, inner.blocks[first..first + run.count as usize].to_vec());
        }
        if !inner.watermark.all_sent() {
            return wait;
        }
        match inner.commit.take() {
            Some(commit) => Step::Commit(commit, now.saturating_duration_since(inner.compute_end)),
            None => wait,
        }
    }

    /// Whether a frame may leave now: asked again right before it is copied, since waiting for the connection takes time.
    pub(super) fn may_send(&self, now: Instant) -> bool {
        !self.is_over() && !self.lock().lease.expired(now)
    }

    /// A frame of `bytes` has left.
    pub(super) fn frame_left(&self, bytes: usize) {
        self.lock().kv_bytes += bytes as u64;
    }

    /// Bounds of what is sent, as indices in the prompt.
    pub(super) fn wanted(&self) -> Range<u32> {
        self.lock().watermark.wanted()
    }

    /// The consumer on `link` has room for more. With its first credit a queued one also says which blocks it has already. False
    /// where it says so at another time, or has more than there is.
    #[must_use]
    pub(super) fn credit(&self, link: &Arc<Link>, credit: Credit) -> bool {
        let mut inner = self.lock();
        let Inner { subscriber, watermark, .. } = &mut *inner;
        let Some(subscriber) = subscriber.as_mut().filter(|subscriber| Arc::ptr_eq(&subscriber.link, link)) else {
            return true;
        };
        let first = std::mem::replace(&mut subscriber.queued, false);
        if credit.have_prefix_blocks > if first { watermark.prompt_blocks() } else { 0 } {
            return false;
        }
        if first {
            watermark.skip_to(credit.have_prefix_blocks);
        }
        subscriber.credit = subscriber.credit.saturating_add(credit.bytes);
        self.changed.notify_one();
        true
    }

    /// The consumer on `link` still wants it.
    pub(super) fn renew(&self, link: &Arc<Link>, now: Instant) {
        if self.is_subscribed_by(link) {
            self.lock().lease.renew(now);
        }
    }

    /// Whether the consumer on `link` is the one that subscribed: only it may renew, acknowledge or cancel.
    pub(super) fn is_subscribed_by(&self, link: &Arc<Link>) -> bool {
        self.lock().subscriber.as_ref().is_some_and(|subscriber| Arc::ptr_eq(&subscriber.link, link))
    }

    /// Whether nobody subscribed in time. Those with a subscriber are watched by its subscription.
    pub(super) fn abandoned(&self, now: Instant) -> bool {
        let inner = self.lock();
        inner.subscriber.is_none() && inner.lease.expired(now)
    }

    /// Waits for something to change.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Ends the export; true for the one call that did. The subscriber is told what it does not know.
    pub(super) fn finish(&self, reason: ExportReason) -> bool {
        let inner = self.lock();
        let outcome = ExportOutcome { reason, kv_bytes: inner.kv_bytes };
        let subscriber = inner.subscriber.as_ref().map(|subscriber| Arc::clone(&subscriber.link));
        let first = self.outcome.send_if_modified(|slot| {
            let first = slot.is_none();
            slot.get_or_insert(outcome);
            first
        });
        drop(inner);
        if first {
            self.changed.notify_one();
            if let (Some(link), Some(code)) = (subscriber, reason.report()) {
                link.send_error(self.spec.transfer, self.spec.attempt, code);
            }
        }
        first
    }

    fn is_over(&self) -> bool {
        self.outcome.borrow().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing under this lock panics")
    }
}
