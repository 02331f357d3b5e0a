//! Ending without cutting anybody off: what is under way is counted, and the end waits for it.

use crate::admission::Permit;
use prometheus::IntGauge;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// What the outside asks for, in this order.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Take nothing new, finish what runs, end.
    pub drain: CancellationToken,
    /// End now.
    pub stop: CancellationToken,
}

impl Shutdown {
    /// Listens to SIGTERM and SIGINT: the first asks to drain, the second to stop.
    ///
    /// # Errors
    /// When the process can't listen to signals.
    pub fn on_signals() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let shutdown = Shutdown::default();
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let tokens = [shutdown.drain.clone(), shutdown.stop.clone()];
        tokio::spawn(async move {
            for token in tokens {
                tokio::select! {
                    _ = terminate.recv() => token.cancel(),
                    _ = interrupt.recv() => token.cancel(),
                }
            }
        });
        Ok(shutdown)
    }
}

/// The count of what is under way, and whether anything new may be.
#[derive(Debug, Default)]
pub(crate) struct Drain {
    draining: CancellationToken,
    work: TaskTracker,
}

impl Drain {
    pub(crate) fn begin(&self) {
        self.draining.cancel();
        self.work.close();
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Ready once draining has begun.
    pub(crate) fn begun(&self) -> WaitForCancellationFutureOwned {
        self.draining.clone().cancelled_owned()
    }

    /// Counts a piece of work until it is dropped.
    pub(crate) fn work(&self, room: Room, gauge: IntGauge) -> Work {
        gauge.inc();
        Work { gauge, _room: room, _token: self.work.token() }
    }

    /// Starts a task that the end waits for.
    pub(crate) fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.work.spawn(task)
    }

    /// Waits, once draining has begun, until nothing is under way.
    pub(crate) async fn finished(&self) {
        self.work.wait().await;
    }
}

/// A place among the pieces of work that are allowed at once.
#[derive(Debug)]
pub(crate) enum Room {
    /// Among other pods' legs.
    Leg { _permit: OwnedSemaphorePermit },
    /// Among clients' requests.
    Client { _permit: Permit },
}

/// A piece of work under way: a place among those allowed at once, and a reason not to end yet.
#[derive(Debug)]
pub(crate) struct Work {
    gauge: IntGauge,
    _room: Room,
    _token: TaskTrackerToken,
}

impl Drop for Work {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}
