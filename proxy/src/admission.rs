//! Admission in front of the proxy's bound on requests in flight: by class and fairly between tenants, with a queue that has
//! a bound of its own. The decisions are `admission/queue.rs` (pure); here are the lock, the clock and the tasks that wait.
//!
//! A [`Permit`] is a place among those served at once and a [`Waiting`] one in the queue; each returns its place when it is
//! dropped, so a client that leaves at any moment leaves nothing behind.

mod class;
mod queue;

pub(crate) use class::Class;
pub(crate) use queue::{Limits, Request};

use queue::{Admitted, Entry, Queue, Ticket};
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Admission. Clones are the same admission.
#[derive(Clone, Debug)]
pub(crate) struct Admission(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    queue: Queue,
    /// Of each ticket in the queue.
    waiting: HashMap<Ticket, Notice>,
}

type Notice = oneshot::Sender<Result<Permit, Shed>>;

/// What becomes of a request.
#[derive(Debug)]
pub(crate) enum Admit {
    /// It is served now.
    Entered(Permit),
    /// It waits its turn.
    Queued(Waiting),
    /// There is no room for it.
    Shed(Shed),
}

/// No room, now: 429.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many requests wait already")]
pub(crate) struct Shed {
    /// When there may be room again, in whole seconds.
    pub(crate) retry_after: Duration,
}

/// A place among the requests that are served at once. Dropping it gives it to whoever goes next.
#[derive(Debug)]
#[must_use = "dropping it gives the place away"]
pub(crate) struct Permit {
    /// None where the place was given away already.
    admission: Option<Admission>,
    tenant: Arc<str>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(admission) = self.admission.take() {
            admission.leave(Arc::clone(&self.tenant));
        }
    }
}

/// A place in the queue. Dropping it leaves the queue.
#[derive(Debug)]
#[must_use = "dropping it leaves the queue"]
pub(crate) struct Waiting {
    admission: Admission,
    ticket: Ticket,
    notice: oneshot::Receiver<Result<Permit, Shed>>,
}

impl Future for Waiting {
    /// A place, or none because others took the place in the queue.
    type Output = Result<Permit, Shed>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let notice = Pin::new(&mut self.notice).poll(context);
        notice.map(|notice| notice.expect("whoever leaves the queue by another's doing is told so"))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.admission.state();
        // Otherwise it has had its notice. A place that came with it and was not looked at is given on when the notice is
        // dropped, which is after this lock is.
        if state.queue.cancel(self.ticket) {
            state.waiting.remove(&self.ticket);
        }
    }
}

/// How much is served, waits and was turned away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) in_flight: usize,
    pub(crate) queued_bytes: usize,
    /// The lowest class first.
    pub(crate) classes: Vec<ClassSnapshot>,
}

/// The same of one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClassSnapshot {
    pub(crate) class: Class,
    pub(crate) queued: usize,
    /// Since the start.
    pub(crate) shed: u64,
}

impl Admission {
    pub(crate) fn new(limits: Limits) -> Self {
        Admission(Arc::new(Mutex::new(State { queue: Queue::new(limits, Instant::now()), waiting: HashMap::new() })))
    }

    /// A request comes. How long it may wait is its own affair: put a timeout around [`Waiting`].
    pub(crate) fn enter(&self, request: Request) -> Admit {
        let now = Instant::now();
        let (tenant, class) = (Arc::clone(&request.tenant), request.class);
        let mut lost: Vec<(Notice, Shed)> = Vec::new();
        let mut state = self.state();
        let admit = match state.queue.enter(request, now) {
            Entry::Entered => Admit::Entered(Permit { admission: Some(self.clone()), tenant }),
            Entry::Shed => Admit::Shed(Shed { retry_after: state.queue.retry_after(class, now) }),
            Entry::Queued { ticket, evicted } => {
                for evicted in evicted {
                    let notice = state.waiting.remove(&evicted.ticket).expect("each ticket has its notice");
                    lost.push((notice, Shed { retry_after: state.queue.retry_after(evicted.class, now) }));
                }
                let (sender, notice) = oneshot::channel();
                state.waiting.insert(ticket, sender);
                Admit::Queued(Waiting { admission: self.clone(), ticket, notice })
            }
        };
        drop(state);
        for (notice, shed) in lost {
            // One whose client is just leaving does not hear it.
            let _ = notice.send(Err(shed));
        }
        admit
    }

    /// How it stands.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.state();
        let class = |class| ClassSnapshot { class, queued: state.queue.queued(class), shed: state.queue.shed(class) };
        Snapshot {
            in_flight: state.queue.in_flight(),
            queued_bytes: state.queue.bytes(),
            classes: Class::all().map(class).collect(),
        }
    }

    /// A place is free. It goes to whoever is next, and on to the next one where that one is just leaving. A loop, since as
    /// many may be leaving as there are in the queue; and no notice is sent under the lock, since one that can't be delivered
    /// is dropped with its permit.
    fn leave(&self, tenant: Arc<str>) {
        let (mut left, mut next) = (Vec::new(), Some(tenant));
        while let Some(tenant) = next {
            let mut state = self.state();
            let admitted = state.queue.leave(&tenant, Instant::now());
            let notices: Vec<(Notice, Arc<str>)> = (admitted.into_iter())
                .map(|Admitted { ticket, tenant }| {
                    (state.waiting.remove(&ticket).expect("each ticket has its notice"), tenant)
                })
                .collect();
            drop(state);
            for (notice, tenant) in notices {
                let permit = Permit { admission: Some(self.clone()), tenant };
                if let Err(Ok(mut permit)) = notice.send(Ok(permit)) {
                    permit.admission = None;
                    left.push(Arc::clone(&permit.tenant));
                }
            }
            next = left.pop();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { in_flight_max: 2, queued_max: 3, queued_bytes_max: 1_000 };

    fn request(class: Class) -> Request {
        Request { class, tenant: "tenant".into(), tenant_in_flight_max: None, cost: 1, bytes: 10 }
    }

    fn entered(admission: &Admission) -> Permit {
        match admission.enter(request(Class::NORMAL)) {
            Admit::Entered(permit) => permit,
            admit => panic!("{admit:?}"),
        }
    }

    fn queued(admission: &Admission, class: Class) -> Waiting {
        match admission.enter(request(class)) {
            Admit::Queued(waiting) => waiting,
            admit => panic!("{admit:?}"),
        }
    }

    fn count(admission: &Admission) -> (usize, usize) {
        let snapshot = admission.snapshot();
        let tickets = admission.state().waiting.len();
        let queued = snapshot.classes.iter().map(|class| class.queued).sum();
        assert_eq!(tickets, queued, "a notice for each who waits");
        (snapshot.in_flight, queued)
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_is_returned_wakes_whoever_goes_next() {
        let admission = Admission::new(LIMITS);
        let (first, _second) = (entered(&admission), entered(&admission));
        let (low, high) = (queued(&admission, Class::LOW), queued(&admission, Class::HIGH));
        assert_eq!(count(&admission), (2, 2));
        drop(first);
        let high = high.await.expect("a place");
        assert_eq!(count(&admission), (2, 1));
        drop(high);
        let low = low.await.expect("a place");
        drop(low);
        assert_eq!(count(&admission), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_leaves_the_queue_leaves_nothing_behind() {
        let admission = Admission::new(LIMITS);
        let places = [entered(&admission), entered(&admission)];
        let (left, woken, next) =
            (queued(&admission, Class::HIGH), queued(&admission, Class::HIGH), queued(&admission, Class::LOW));
        drop(left);
        assert_eq!(count(&admission), (2, 2));
        let [first, _second] = places;
        drop(first);
        // It has a place by now that nobody has looked at.
        drop(woken);
        let next = next.await.expect("the place went on");
        drop(next);
        assert_eq!(count(&admission), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_comes_to_somebody_who_is_just_leaving_goes_on() {
        let admission = Admission::new(LIMITS);
        let (first, _second) = (entered(&admission), entered(&admission));
        let (mut leaving, next) = (queued(&admission, Class::HIGH), queued(&admission, Class::LOW));
        // As if another thread were between here and the end of its drop.
        leaving.notice.close();
        drop(first);
        let next = next.await.expect("the place went on");
        drop(leaving);
        drop(next);
        assert_eq!(count(&admission), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_loses_its_place_in_the_queue_is_told_so() {
        let admission = Admission::new(LIMITS);
        let _places = [entered(&admission), entered(&admission)];
        let low = [(); 3].map(|()| queued(&admission, Class::LOW));
        assert!(matches!(admission.enter(request(Class::LOW)), Admit::Shed(_)));
        let critical = queued(&admission, Class::CRITICAL);
        let [_first, _second, newest] = low;
        let shed = newest.await.expect_err("its place is gone");
        assert!(shed.retry_after >= Duration::from_secs(1));
        let low = admission.snapshot().classes[Class::LOW.index()];
        assert_eq!((low.shed, low.queued), (2, 2));
        drop(critical);
        assert_eq!(count(&admission), (2, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_timeout_around_the_wait_leaves_the_queue() {
        let admission = Admission::new(LIMITS);
        let _places = [entered(&admission), entered(&admission)];
        let waiting = queued(&admission, Class::NORMAL);
        assert!(tokio::time::timeout(Duration::from_secs(5), waiting).await.is_err());
        assert_eq!(count(&admission), (2, 0));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_place_is_lost_or_given_twice_whoever_leaves_when() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let admission = Admission::new(Limits { in_flight_max: 3, queued_max: 16, queued_bytes_max: 10_000 });
        let (served, total) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let tasks: Vec<_> = (0..64_u64)
            .map(|seed| {
                let (admission, served, total) = (admission.clone(), Arc::clone(&served), Arc::clone(&total));
                tokio::spawn(async move {
                    for turn in 0..100_u64 {
                        let mixed = (seed * 131 + turn * 31) % 97;
                        let class = Class::try_from(mixed % 8).expect("a class");
                        let permit = match admission.enter(request(class)) {
                            Admit::Entered(permit) => permit,
                            Admit::Shed(_) => continue,
                            Admit::Queued(waiting) => {
                                let leave = async {
                                    for _ in 0..mixed % 5 {
                                        tokio::task::yield_now().await;
                                    }
                                };
                                tokio::select! {
                                    permit = waiting => match permit {
                                        Ok(permit) => permit,
                                        Err(_) => continue,
                                    },
                                    () = leave => continue,
                                }
                            }
                        };
                        assert!(served.fetch_add(1, Ordering::SeqCst) < 3, "more than are served at once");
                        total.fetch_add(1, Ordering::SeqCst);
                        tokio::task::yield_now().await;
                        served.fetch_sub(1, Ordering::SeqCst);
                        drop(permit);
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("no panic");
        }
        assert_eq!(count(&admission), (0, 0));
        assert!(total.load(Ordering::SeqCst) > 0);
    }
}
