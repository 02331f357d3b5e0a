//! The gate that every write to the cluster passes: open only while the lease is surely ours.
//!
//! A process can be frozen at any point (a paused virtual machine, a stopped process, a starved node) and wake long after somebody
//! else has taken the lease over. So the lease loop does not say "we lead" but "we lead until", on a clock that runs on while the
//! process sleeps, and the gate looks at that clock for each request. It stands twice: around the HTTP client, where a mutating
//! request is refused with a clear error, and at the socket, where nothing more leaves once the time is over, however long a
//! request has waited in between for a token or a connection. Requests for the lease itself go by a client without a gate.

use futures_util::future::{Either, ErrInto, Ready, TryFutureExt as _, ready};
use http::{Method, Request};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tower::{BoxError, Layer, Service};

/// A clock that only goes forward, and goes on while the process or the machine sleeps.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Time since some fixed point.
    fn now(&self) -> Duration;
}

/// The machine's time since boot, suspension included.
#[derive(Clone, Copy, Debug)]
pub struct BootClock;

impl Clock for BootClock {
    fn now(&self) -> Duration {
        #[cfg(target_os = "linux")]
        const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Boottime;
        // Elsewhere the operator is only run by people at their desks.
        #[cfg(not(target_os = "linux"))]
        const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Monotonic;
        let time = rustix::time::clock_gettime(CLOCK);
        let seconds = u64::try_from(time.tv_sec).expect("time since boot is not negative");
        let nanos = u32::try_from(time.tv_nsec).expect("less than a second");
        Duration::new(seconds, nanos)
    }
}

/// Why a request was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the operator's lease is not surely held, so nothing is written")]
pub struct NotLeading;

/// Until when writes may leave.
#[derive(Clone, Debug)]
pub struct Fence {
    clock: Arc<dyn Clock>,
    open_until_nanos: Arc<AtomicU64>,
}

impl Fence {
    /// A gate that is closed until the lease loop opens it.
    pub fn closed(clock: Arc<dyn Clock>) -> Self {
        Fence { clock, open_until_nanos: Arc::new(AtomicU64::new(0)) }
    }

    /// A gate for a process that is alone by its configuration.
    pub fn without_election() -> Self {
        Fence { clock: Arc::new(BootClock), open_until_nanos: Arc::new(AtomicU64::new(u64::MAX)) }
    }

    /// Lets writes pass until that time of the gate's clock.
    pub fn open_until(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.open_until_nanos.store(nanos, Ordering::SeqCst);
    }

    /// Lets nothing pass any more.
    pub fn close(&self) {
        self.open_until_nanos.store(0, Ordering::SeqCst);
    }

    /// Whether a write may leave now.
    pub fn is_open(&self) -> bool {
        self.clock.now().as_nanos() < u128::from(self.open_until_nanos.load(Ordering::SeqCst))
    }
}

impl<S> Layer<S> for Fence {
    type Service = Fenced<S>;

    fn layer(&self, inner: S) -> Fenced<S> {
        Fenced { inner, fence: self.clone() }
    }
}

/// A client behind the gate.
#[derive(Clone, Debug)]
pub struct Fenced<S> {
    inner: S,
    fence: Fence,
}

impl<S, B> Service<Request<B>> for Fenced<S>
where
    S: Service<Request<B>>,
    S::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = Either<Ready<Result<S::Response, BoxError>>, ErrInto<S::Future, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if mutates(request.method()) && !self.fence.is_open() {
            return Either::Left(ready(Err(NotLeading.into())));
        }
        Either::Right(self.inner.call(request).err_into())
    }
}

/// Everything but reading, so that a method that we have not thought of counts as a write.
fn mutates(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// A clock that a test sets.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct SetClock(AtomicU64);

#[cfg(test)]
impl SetClock {
    pub(crate) fn set(&self, time: Duration) {
        self.0.store(u64::try_from(time.as_nanos()).expect("a test's time"), Ordering::SeqCst);
    }
}

#[cfg(test)]
impl Clock for SetClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use tower::{ServiceExt as _, service_fn};

    async fn passes(fence: &Fence, method: Method) -> bool {
        let client = fence.layer(service_fn(|_: Request<()>| ready(Ok::<_, Infallible>(()))));
        let request = Request::builder().method(method).body(()).expect("a method and no body");
        match client.oneshot(request).await {
            Ok(()) => true,
            Err(error) => {
                assert!(error.is::<NotLeading>(), "{error}");
                false
            }
        }
    }

    #[tokio::test]
    async fn a_write_passes_only_while_the_lease_is_surely_held_and_a_read_always() {
        let clock = Arc::new(SetClock::default());
        let fence = Fence::closed(clock.clone());
        for (time, open) in [(0, false), (1, true), (9, true), (10, false), (600, false)] {
            if time == 1 {
                fence.open_until(Duration::from_secs(10));
            }
            clock.set(Duration::from_secs(time));
            for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
                assert_eq!(passes(&fence, method.clone()).await, open, "{method} at {time} s");
            }
            assert!(passes(&fence, Method::GET).await);
        }
    }

    #[tokio::test]
    async fn a_closed_gate_stays_closed() {
        let fence = Fence::without_election();
        assert!(passes(&fence, Method::PATCH).await);
        fence.close();
        assert!(!passes(&fence, Method::PATCH).await);
    }

    #[test]
    fn the_boot_clock_goes_forward() {
        let before = BootClock.now();
        assert!(BootClock.now() >= before && before > Duration::ZERO);
    }
}
