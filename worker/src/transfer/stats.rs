//! Counters of both sides, as plain atomics; the worker's metrics read them.

use baton_wire::PathReason;
use baton_wire::kv::ErrorCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// How an export ended. A closed list: these are metric labels too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExportReason {
    /// The consumer has and verified everything.
    Acked,
    /// The consumer no longer wanted it.
    Cancelled,
    /// The consumer did not come, or stopped renewing.
    LeaseExpired,
    /// A higher attempt took its place.
    Superseded,
    /// The connection to the consumer was lost.
    ConsumerLost,
    /// The consumer reported that what arrived was wrong.
    ConsumerFailed,
    /// The prefill failed or was aborted.
    PrefillFailed,
    /// The blocks were given to another sequence too early.
    StaleBlock,
    /// This process is going away.
    ShuttingDown,
}

impl ExportReason {
    /// Every reason.
    pub const ALL: [ExportReason; 9] = [
        ExportReason::Acked,
        ExportReason::Cancelled,
        ExportReason::LeaseExpired,
        ExportReason::Superseded,
        ExportReason::ConsumerLost,
        ExportReason::ConsumerFailed,
        ExportReason::PrefillFailed,
        ExportReason::StaleBlock,
        ExportReason::ShuttingDown,
    ];

    /// The reason as logs and metric labels spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            ExportReason::Acked => "acked",
            ExportReason::Cancelled => "cancelled",
            ExportReason::LeaseExpired => "lease-expired",
            ExportReason::Superseded => "superseded",
            ExportReason::ConsumerLost => "consumer-lost",
            ExportReason::ConsumerFailed => "consumer-failed",
            ExportReason::PrefillFailed => "prefill-failed",
            ExportReason::StaleBlock => "stale-block",
            ExportReason::ShuttingDown => "shutting-down",
        }
    }

    /// What the consumer is told; `None` where it knows, or is gone.
    pub(super) const fn report(self) -> Option<ErrorCode> {
        match self {
            ExportReason::LeaseExpired => Some(ErrorCode::LeaseExpired),
            ExportReason::Superseded => Some(ErrorCode::Superseded),
            ExportReason::PrefillFailed => Some(ErrorCode::PrefillFailed),
            ExportReason::StaleBlock => Some(ErrorCode::StaleBlock),
            ExportReason::ShuttingDown => Some(ErrorCode::ShuttingDown),
            ExportReason::Acked
            | ExportReason::Cancelled
            | ExportReason::ConsumerLost
            | ExportReason::ConsumerFailed => None,
        }
    }
}

/// One counter for each value of a closed list.
#[derive(Debug)]
pub(super) struct Tally<const N: usize>([AtomicU64; N]);

impl<const N: usize> Default for Tally<N> {
    fn default() -> Self {
        Tally([const { AtomicU64::new(0) }; N])
    }
}

impl<const N: usize> Tally<N> {
    pub(super) fn add(&self, place: usize) {
        self.0[place].fetch_add(1, Relaxed);
    }

    fn read<K: Copy>(&self, keys: [K; N]) -> Vec<(K, u64)> {
        keys.into_iter().zip(&self.0).map(|(key, count)| (key, count.load(Relaxed))).collect()
    }
}

/// What a producer counts while it runs.
#[derive(Debug, Default)]
pub(super) struct ProducerCounters {
    pub(super) frames: AtomicU64,
    pub(super) kv_bytes: AtomicU64,
    pub(super) ended: Tally<{ ExportReason::ALL.len() }>,
    pub(super) refused: Tally<{ ErrorCode::ALL.len() }>,
}

impl ProducerCounters {
    pub(super) fn frame(&self, bytes: usize) {
        self.frames.fetch_add(1, Relaxed);
        self.kv_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn snapshot(&self, now: ProducerGauges) -> ProducerStats {
        ProducerStats {
            frames_sent: self.frames.load(Relaxed),
            kv_bytes_sent: self.kv_bytes.load(Relaxed),
            exports_ended: self.ended.read(ExportReason::ALL),
            subscriptions_refused: self.refused.read(ErrorCode::ALL),
            now,
        }
    }
}

/// What a producer has done since it started, and has now.
#[derive(Clone, Debug, PartialEq)]
pub struct ProducerStats {
    /// FRAMEs sent.
    pub frames_sent: u64,
    /// Payload bytes of those.
    pub kv_bytes_sent: u64,
    /// Exports that ended, by reason.
    pub exports_ended: Vec<(ExportReason, u64)>,
    /// Subscriptions and connections refused, by code.
    pub subscriptions_refused: Vec<(ErrorCode, u64)>,
    /// As of now.
    pub now: ProducerGauges,
}

impl ProducerStats {
    /// Exports that ended for `reason`.
    pub fn ended(&self, reason: ExportReason) -> u64 {
        self.exports_ended.iter().find(|(key, _)| *key == reason).map_or(0, |(_, count)| *count)
    }

    /// Subscriptions and connections refused with `code`.
    pub fn refused(&self, code: ErrorCode) -> u64 {
        self.subscriptions_refused.iter().find(|(key, _)| *key == code).map_or(0, |(_, count)| *count)
    }
}

/// What a producer has now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProducerGauges {
    /// Exports open.
    pub exports_open: usize,
    /// Age of the oldest of them: the first thing to look at when blocks do not come back.
    pub oldest_export_age: Duration,
    /// Subscriptions that wait for their export.
    pub subscriptions_parked: usize,
    /// Sessions with consumers.
    pub sessions: usize,
}

/// What a consumer counts while it runs.
#[derive(Debug, Default)]
pub(super) struct ConsumerCounters {
    pub(super) frames: AtomicU64,
    pub(super) frames_discarded: AtomicU64,
    pub(super) kv_bytes: AtomicU64,
    pub(super) completed: AtomicU64,
    pub(super) cancelled: AtomicU64,
    pub(super) checksum_failures: AtomicU64,
    pub(super) failed: Tally<{ PathReason::ALL.len() }>,
    pub(super) active: AtomicU64,
}

impl ConsumerCounters {
    pub(super) fn snapshot(&self) -> ConsumerStats {
        ConsumerStats {
            frames_received: self.frames.load(Relaxed),
            frames_discarded: self.frames_discarded.load(Relaxed),
            kv_bytes_received: self.kv_bytes.load(Relaxed),
            fetches_completed: self.completed.load(Relaxed),
            fetches_cancelled: self.cancelled.load(Relaxed),
            checksum_failures: self.checksum_failures.load(Relaxed),
            fetches_failed: self.failed.read(PathReason::ALL),
            fetches_active: self.active.load(Relaxed),
        }
    }
}

/// What a consumer has done since it started, and has now.
#[derive(Clone, Debug, PartialEq)]
pub struct ConsumerStats {
    /// FRAMEs verified and written to our blocks.
    pub frames_received: u64,
    /// FRAMEs of transfers that were no longer active: read and dropped.
    pub frames_discarded: u64,
    /// Payload bytes of the FRAMEs received.
    pub kv_bytes_received: u64,
    /// Fetches whose KV was complete and verified.
    pub fetches_completed: u64,
    /// Fetches that the caller dropped.
    pub fetches_cancelled: u64,
    /// Transfers and sessions that ended because something did not match its checksum, digest or prompt hash.
    pub checksum_failures: u64,
    /// Fetches that failed, by reason.
    pub fetches_failed: Vec<(PathReason, u64)>,
    /// Fetches under way now.
    pub fetches_active: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_counts_in_its_own_place() {
        for (place, reason) in ExportReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place);
        }
        for (place, code) in ErrorCode::ALL.into_iter().enumerate() {
            assert_eq!(code as usize, place);
        }
        for (place, reason) in PathReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place);
        }
    }
}
