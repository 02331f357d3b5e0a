//! Which of the operator's replicas leads: a Lease that is held by writing it again and again.
//!
//! [`Elector`] decides and does no I/O; [`Campaign`] asks the API server. Both rest on three rules. A holder counts the lease's
//! time from *before* it sent the renewal that succeeded, everybody else from *after* they saw it, so that differing clocks and
//! slow answers only ever lengthen the gap between two holders; the times that are written into the Lease are for people. Every
//! write names the version that it replaces, so that of two writers one fails. And the holder stops writing ([`Fence`]) and ends a
//! third of the lease before anybody else may begin.

use crate::fence::{Clock, Fence};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Api;
use kube::api::PostParams;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a lease lasts that nobody renews. What the components of Kubernetes use.
pub const DURATION: Duration = Duration::from_secs(15);
/// How long a holder trusts a renewal. A third of the lease is left for clocks that run at different speeds and for what is
/// already on its way to the API server.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Time between two renewals: four fit before the deadline.
const RENEW_EVERY: Duration = Duration::from_secs(2);
/// How long one request may take, so that three fit before the deadline.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// A Lease as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Who holds it; empty when it was released.
    pub holder: String,
    /// How long it lasts without renewal.
    pub duration: Duration,
    /// How often it has changed hands.
    pub transitions: i32,
    /// When it was written, by its writer's clock: tells one write from another, and nothing is computed from it.
    pub stamp: Option<Timestamp>,
    /// The version that the next write must name.
    pub version: String,
}

/// What to do about the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Write it: nobody holds it.
    Acquire,
    /// Write it again: we hold it.
    Renew,
    /// Somebody else holds it.
    Wait,
    /// We held it, and must not act any more.
    Lost,
}

/// What one replica knows of the lease.
#[derive(Clone, Debug)]
pub struct Elector {
    identity: String,
    /// The lease as last read, and the time at which it was first seen to be so.
    seen: Option<(Record, Duration)>,
    /// Before this time the last write that succeeded was sent; absent while we don't lead.
    confirmed: Option<Duration>,
    /// A write whose answer is unknown.
    attempt: Option<Attempt>,
}

#[derive(Clone, Copy, Debug)]
struct Attempt {
    sent_at: Duration,
    stamp: Timestamp,
}

impl Elector {
    /// A replica that knows nothing yet. Of two processes with one identity, the second takes the other's lease over at once: that
    /// is for a container that is started again, so an identity is a pod's name.
    pub fn new(identity: impl Into<String>) -> Self {
        Elector { identity: identity.into(), seen: None, confirmed: None, attempt: None }
    }

    /// What is to be done now.
    pub fn decide(&self, now: Duration) -> Decision {
        let seen = self.seen.as_ref().map(|(record, since)| (record, *since));
        match (self.confirmed, seen) {
            (Some(confirmed), Some((record, _))) if record.holder == self.identity => {
                if now.saturating_sub(confirmed) < DEADLINE { Decision::Renew } else { Decision::Lost }
            }
            (Some(_), _) => Decision::Lost,
            (None, None) => Decision::Acquire,
            (None, Some((record, since))) => {
                let free = record.holder.is_empty() || record.holder == self.identity;
                let expired = now.saturating_sub(since) >= record.duration;
                if free || expired { Decision::Acquire } else { Decision::Wait }
            }
        }
    }

    /// Takes in what a read showed; none where there is no Lease.
    pub fn observe(&mut self, now: Duration, record: Option<Record>) {
        let Some(record) = record else {
            // Deleted by a person: who held it goes on only with a new one, like everybody.
            self.seen = None;
            return;
        };
        // An own write whose answer did not arrive did succeed if the lease bears its stamp.
        let own = self.attempt.filter(|attempt| record.holder == self.identity && record.stamp == Some(attempt.stamp));
        if let Some(attempt) = own {
            self.confirmed = Some(attempt.sent_at);
            self.attempt = None;
        } else if self.seen.as_ref().is_some_and(|(seen, _)| seen.version != record.version) && self.confirmed.is_some()
        {
            // Somebody else wrote it, be it in our name.
            self.confirmed = Some(Duration::ZERO);
        }
        match &mut self.seen {
            Some((seen, _)) if *seen == record => {}
            seen => *seen = Some((record, now)),
        }
    }

    /// What to write now, in order to acquire or renew.
    pub fn write(&mut self, now: Duration, stamp: Timestamp) -> Record {
        self.attempt = Some(Attempt { sent_at: now, stamp });
        let (transitions, version) = match &self.seen {
            Some((seen, _)) => {
                (seen.transitions.saturating_add(i32::from(seen.holder != self.identity)), seen.version.clone())
            }
            None => (0, String::new()),
        };
        Record { holder: self.identity.clone(), duration: DURATION, transitions, stamp: Some(stamp), version }
    }

    /// What to write in order to let the lease go, where it is held.
    pub fn release(&self) -> Option<Record> {
        let (seen, _) =
            self.seen.as_ref().filter(|(seen, _)| self.confirmed.is_some() && seen.holder == self.identity)?;
        // One second is the shortest that the API server takes; nobody waits for an empty holder anyway.
        Some(Record { holder: String::new(), duration: Duration::from_secs(1), ..seen.clone() })
    }

    /// Until when writes to the cluster are surely the holder's; none where the lease isn't held.
    pub fn open_until(&self) -> Option<Duration> {
        self.confirmed.filter(|confirmed| *confirmed > Duration::ZERO).map(|confirmed| confirmed + DEADLINE)
    }
}

/// Where a replica stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Another leads.
    Standby,
    /// This one does.
    Leading,
    /// This one did, and must end.
    Lost,
}

/// The loop that keeps one replica's standing true.
#[derive(Debug)]
pub struct Campaign {
    /// The Lease's API, by a client that no fence stands before.
    pub api: Api<Lease>,
    /// The Lease's name.
    pub name: String,
    /// What this replica knows.
    pub elector: Elector,
    /// What its renewals keep open.
    pub fence: Fence,
    /// The clock of both.
    pub clock: Arc<dyn Clock>,
}

impl Campaign {
    /// Runs until the lease is lost, or is released because `release` was cancelled.
    pub async fn run(mut self, standing: watch::Sender<Standing>, beat: Arc<Beat>, release: CancellationToken) {
        loop {
            beat.beat(self.clock.now());
            if let Err(error) = self.step().await {
                tracing::warn!(lease = self.name, %error, "can't reach the lease");
            }
            // Read again after the step: it may have taken longer than the lease lasts.
            let now = self.clock.now();
            let next = match (self.elector.decide(now), self.elector.open_until()) {
                (Decision::Renew, Some(time)) => {
                    self.fence.open_until(time);
                    Standing::Leading
                }
                (Decision::Lost, _) => Standing::Lost,
                (Decision::Renew, None) | (Decision::Acquire | Decision::Wait, _) => Standing::Standby,
            };
            standing.send_if_modified(|standing| std::mem::replace(standing, next) != next);
            if next == Standing::Lost {
                self.fence.close();
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(jittered(RENEW_EVERY)) => {}
                () = release.cancelled() => return self.release().await,
            }
        }
    }

    async fn step(&mut self) -> Result<(), LeaseError> {
        if self.elector.seen.is_none() || self.elector.confirmed.is_none() || self.elector.attempt.is_some() {
            let found = by_deadline(self.api.get_opt(&self.name)).await?;
            self.elector.observe(self.clock.now(), found.map(record));
        }
        match self.elector.decide(self.clock.now()) {
            Decision::Wait | Decision::Lost => Ok(()),
            Decision::Acquire | Decision::Renew => {
                let wanted = self.elector.write(self.clock.now(), micros(Timestamp::now()));
                let lease = lease(&self.name, &wanted);
                let written = if wanted.version.is_empty() {
                    by_deadline(self.api.create(&PostParams::default(), &lease)).await?
                } else {
                    by_deadline(self.api.replace(&self.name, &PostParams::default(), &lease)).await?
                };
                self.elector.observe(self.clock.now(), Some(record(written)));
                Ok(())
            }
        }
    }

    /// Lets the lease go, so that the next replica need not wait for its end.
    async fn release(self) {
        self.fence.close();
        let Some(wanted) = self.elector.release() else { return };
        let lease = lease(&self.name, &wanted);
        match by_deadline(self.api.replace(&self.name, &PostParams::default(), &lease)).await {
            Ok(_) => tracing::info!(lease = self.name, "released the lease"),
            Err(error) => tracing::warn!(lease = self.name, %error, "can't release the lease, it ends by itself"),
        }
    }
}

/// When a loop last came round.
#[derive(Debug, Default)]
pub struct Beat(std::sync::atomic::AtomicU64);

impl Beat {
    /// Says that it did so now.
    pub fn beat(&self, now: Duration) {
        let millis = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        self.0.store(millis, std::sync::atomic::Ordering::Relaxed);
    }

    /// Time since then; none before the first time.
    pub fn age(&self, now: Duration) -> Option<Duration> {
        let millis = self.0.load(std::sync::atomic::Ordering::Relaxed);
        (millis > 0).then(|| now.saturating_sub(Duration::from_millis(millis)))
    }
}

#[derive(Debug, thiserror::Error)]
enum LeaseError {
    #[error("no answer within {} s", REQUEST_TIMEOUT.as_secs())]
    NoAnswer,
    #[error(transparent)]
    Api(kube::Error),
}

async fn by_deadline<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, LeaseError> {
    match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
        Ok(answer) => answer.map_err(LeaseError::Api),
        Err(_) => Err(LeaseError::NoAnswer),
    }
}

fn record(lease: Lease) -> Record {
    let spec = lease.spec.unwrap_or_default();
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        duration: seconds(spec.lease_duration_seconds),
        transitions: spec.lease_transitions.unwrap_or_default(),
        stamp: spec.renew_time.map(|time| time.0),
        version: lease.metadata.resource_version.unwrap_or_default(),
    }
}

/// A Lease without a duration, or with a senseless one, is waited for as long as one of ours.
fn seconds(found: Option<i32>) -> Duration {
    found
        .and_then(|seconds| u64::try_from(seconds).ok())
        .filter(|seconds| *seconds > 0)
        .map_or(DURATION, Duration::from_secs)
}

fn lease(name: &str, record: &Record) -> Lease {
    Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            resource_version: Some(record.version.clone()).filter(|version| !version.is_empty()),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(record.holder.clone()),
            lease_duration_seconds: i32::try_from(record.duration.as_secs()).ok(),
            lease_transitions: Some(record.transitions),
            renew_time: record.stamp.map(MicroTime),
            acquire_time: None,
            ..LeaseSpec::default()
        }),
    }
}

/// As a Lease stores it, so that a stamp that was written compares equal to itself when it is read.
fn micros(time: Timestamp) -> Timestamp {
    Timestamp::from_microsecond(time.as_microsecond()).unwrap_or(time)
}

/// Up to a tenth more or less, so that replicas don't ask in step.
pub(crate) fn jittered(time: Duration) -> Duration {
    let mut byte = [0u8; 1];
    // Without entropy the time is what it is.
    let share = getrandom::fill(&mut byte).map_or(0.5, |()| f64::from(byte[0]) / 255.0);
    time.mul_f64(0.9 + 0.2 * share)
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
