//! The admin port: whether the process lives and is ready, and its metrics.

use crate::fence::Clock;
use crate::lease::{Beat, Standing};
use crate::metrics::Metrics;
use crate::triggers::Synced;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How old the lease loop's last round may be: two requests of 3 s and a pause of 2 s, thrice over.
const LEASE_BEAT_MAX: Duration = Duration::from_secs(30);
/// How old the queue's last heartbeat may be: longer than the longest reconcile (60 s), because each may have to wait for one.
const QUEUE_BEAT_MAX: Duration = Duration::from_secs(120);

/// What health is judged by.
#[derive(Debug)]
pub struct Health {
    /// The clock of the beats.
    pub clock: Arc<dyn Clock>,
    /// The lease loop's; never beaten where there is no election.
    pub lease: Arc<Beat>,
    /// The queue's, which goes through the same slots as reconciles do.
    pub queue: Arc<Beat>,
    /// Whether this replica leads.
    pub standing: watch::Receiver<Standing>,
    /// Whether the cluster knows DisaggregatedModels.
    pub definition: AtomicBool,
    /// Whether every watch has shown its first list.
    pub synced: Arc<Synced>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

impl Health {
    /// Why the process had better be started again; none while it works.
    fn stuck(&self) -> Option<&'static str> {
        let now = self.clock.now();
        let is_old = |beat: &Beat, max| beat.age(now).is_some_and(|age| age > max);
        if is_old(&self.lease, LEASE_BEAT_MAX) {
            return Some("the lease loop is stuck");
        }
        is_old(&self.queue, QUEUE_BEAT_MAX).then_some("the reconcile queue is stuck")
    }

    /// Why the replica can't do its part; none where it can. Standing by is its part while another leads.
    fn unready(&self) -> Option<&'static str> {
        let standing = *self.standing.borrow();
        match standing {
            Standing::Lost => Some("the lease is lost, the process ends"),
            Standing::Standby if self.lease.age(self.clock.now()).is_none() => Some("the lease was not asked for yet"),
            Standing::Standby => None,
            Standing::Leading if !self.definition.load(Ordering::Relaxed) => {
                Some("the cluster has no DisaggregatedModel: install the CRD disaggregatedmodels.baton.dev")
            }
            Standing::Leading => (!self.synced.is_complete()).then_some("the first lists are not complete"),
        }
    }
}

/// Serves until `stop` is cancelled.
///
/// # Errors
/// When the listener breaks.
pub async fn serve(listener: TcpListener, health: Arc<Health>, stop: CancellationToken) -> std::io::Result<()> {
    axum::serve(listener, router(health)).with_graceful_shutdown(stop.cancelled_owned()).await
}

fn router(health: Arc<Health>) -> Router {
    Router::new()
        .route("/livez", get(|State(health): State<Arc<Health>>| async move { verdict(health.stuck()) }))
        .route("/readyz", get(|State(health): State<Arc<Health>>| async move { verdict(health.unready()) }))
        .route("/metrics", get(metrics))
        .with_state(health)
}

fn verdict(wrong: Option<&'static str>) -> Response {
    match wrong {
        None => (StatusCode::OK, "ok\n").into_response(),
        Some(wrong) => (StatusCode::SERVICE_UNAVAILABLE, format!("{wrong}\n")).into_response(),
    }
}

async fn metrics(State(health): State<Arc<Health>>) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], health.metrics.render()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fence::SetClock;

    struct Bench {
        clock: Arc<SetClock>,
        standing: watch::Sender<Standing>,
        health: Health,
    }

    fn bench() -> Bench {
        let clock = Arc::new(SetClock::default());
        clock.set(Duration::from_secs(1000));
        let (standing, receiver) = watch::channel(Standing::Standby);
        let health = Health {
            clock: clock.clone(),
            lease: Arc::default(),
            queue: Arc::default(),
            standing: receiver,
            definition: AtomicBool::new(false),
            synced: Arc::default(),
            metrics: Arc::default(),
        };
        Bench { clock, standing, health }
    }

    #[test]
    fn a_replica_that_stands_by_is_ready_once_it_has_asked_for_the_lease() {
        let Bench { health, clock, .. } = bench();
        assert!(health.unready().is_some());
        health.lease.beat(clock.now());
        assert_eq!((health.unready(), health.stuck()), (None, None));
    }

    #[test]
    fn a_leader_is_ready_when_it_knows_the_cluster() {
        let Bench { health, standing, .. } = bench();
        standing.send_replace(Standing::Leading);
        assert!(health.unready().expect("no CRD").contains("disaggregatedmodels.baton.dev"));
        health.definition.store(true, Ordering::Relaxed);
        assert_eq!(health.unready(), Some("the first lists are not complete"));
        standing.send_replace(Standing::Lost);
        assert!(health.unready().is_some());
    }

    #[test]
    fn a_queue_or_lease_loop_that_stands_still_is_not_alive() {
        for (which, max) in [("lease", LEASE_BEAT_MAX), ("queue", QUEUE_BEAT_MAX)] {
            let Bench { health, clock, .. } = bench();
            let beat = if which == "lease" { &health.lease } else { &health.queue };
            beat.beat(clock.now());
            clock.set(Duration::from_secs(1000) + max);
            assert_eq!(health.stuck(), None, "{which}");
            clock.set(Duration::from_secs(1001) + max);
            assert!(health.stuck().is_some_and(|why| why.contains(which)), "{which}");
        }
    }
}
