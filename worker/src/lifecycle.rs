//! Where this worker is in its life, and how many requests are in its hands: admission and draining are one decision.
//!
//! State and count live under one lock, so that no request is admitted after draining has found the house empty.

use baton_wire::status::{Progress, State};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// The life of this process, shared by all who serve or wait.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    life: Arc<watch::Sender<Life>>,
    progress: Arc<Mutex<Option<Progress>>>,
}

#[derive(Clone, Copy, Debug)]
struct Life {
    state: State,
    in_flight: usize,
}

/// Why a request is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The model is still being loaded.
    Loading,
    /// The worker finishes what it has.
    Draining,
}

/// A request in the worker's hands; dropping it lets go. Draining waits for all of them.
#[derive(Debug)]
pub struct InFlight {
    life: Arc<watch::Sender<Life>>,
}

impl Lifecycle {
    /// The beginning: loading.
    pub fn loading() -> Self {
        let (life, _) = watch::channel(Life { state: State::Loading, in_flight: 0 });
        Lifecycle { life: Arc::new(life), progress: Arc::default() }
    }

    /// Where the worker is.
    pub fn state(&self) -> State {
        self.life.borrow().state
    }

    /// How far loading is, while it is.
    pub fn progress(&self) -> Option<Progress> {
        self.progress.lock().expect("no one panics while holding it").clone()
    }

    /// Tells how far loading is.
    pub fn report(&self, stage: &str, done: u64, total: u64) {
        let progress = Progress { stage: stage.to_owned(), done, total };
        *self.progress.lock().expect("no one panics while holding it") = Some(progress);
    }

    /// From loading to ready. A worker that drains already stays so.
    pub fn ready(&self) {
        *self.progress.lock().expect("no one panics while holding it") = None;
        self.life.send_modify(|life| match life.state {
            State::Loading | State::Ready => life.state = State::Ready,
            State::Draining => {}
        });
    }

    /// From anything to draining; there is no way back.
    pub fn drain(&self) {
        self.life.send_modify(|life| life.state = State::Draining);
    }

    /// Admits one request.
    ///
    /// # Errors
    /// When none is taken now.
    pub fn admit(&self) -> Result<InFlight, Refusal> {
        let mut outcome = Err(Refusal::Loading);
        self.life.send_if_modified(|life| {
            outcome = match life.state {
                State::Loading => Err(Refusal::Loading),
                State::Draining => Err(Refusal::Draining),
                State::Ready => Ok(()),
            };
            life.in_flight += usize::from(outcome.is_ok());
            outcome.is_ok()
        });
        outcome.map(|()| InFlight { life: self.life.clone() })
    }

    /// Requests in the worker's hands.
    pub fn in_flight(&self) -> usize {
        self.life.borrow().in_flight
    }

    /// Waits until nothing new is taken any more.
    pub async fn draining(&self) {
        let mut life = self.life.subscribe();
        life.wait_for(|life| life.state == State::Draining).await.expect("the sender lives in self");
    }

    /// Waits until there are none.
    pub async fn idle(&self) {
        let mut life = self.life.subscribe();
        life.wait_for(|life| life.in_flight == 0).await.expect("the sender lives in self");
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.life.send_modify(|life| life.in_flight -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_admitted_only_between_loading_and_draining() {
        let lifecycle = Lifecycle::loading();
        assert_eq!(lifecycle.admit().err(), Some(Refusal::Loading));
        lifecycle.ready();
        let held = lifecycle.admit().expect("ready");
        lifecycle.drain();
        assert_eq!(lifecycle.admit().err(), Some(Refusal::Draining));
        assert_eq!(lifecycle.in_flight(), 1, "what was admitted is still held");
        drop(held);
        assert_eq!(lifecycle.in_flight(), 0);
    }

    #[test]
    fn draining_is_for_good() {
        let lifecycle = Lifecycle::loading();
        lifecycle.drain();
        lifecycle.ready();
        assert_eq!(lifecycle.state(), State::Draining);
    }

    #[tokio::test]
    async fn idle_comes_when_the_last_request_is_let_go() {
        let lifecycle = Lifecycle::loading();
        lifecycle.ready();
        let (a, b) = (lifecycle.admit().expect("ready"), lifecycle.admit().expect("ready"));
        let waiting = tokio::spawn({
            let lifecycle = lifecycle.clone();
            async move { lifecycle.idle().await }
        });
        drop(a);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(b);
        waiting.await.expect("ends");
    }

    #[test]
    fn progress_is_told_until_ready() {
        let lifecycle = Lifecycle::loading();
        lifecycle.report("weights", 1, 2);
        assert_eq!(lifecycle.progress().map(|progress| (progress.done, progress.total)), Some((1, 2)));
        lifecycle.ready();
        assert_eq!(lifecycle.progress(), None);
    }
}
