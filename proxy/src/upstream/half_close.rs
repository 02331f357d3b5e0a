//! Cancel and collect: closing our half of a connection while its answer is still awaited.
//!
//! An engine that watches its clients sees the end of the connection and aborts; one whose work is past that answers all the
//! same, and the answer, with the handle to what it keeps for us, still arrives. Dropping the wait would lose the second.
//!
//! Whoever waits for the answer closes it, and is woken for that: no second descriptor of the socket is needed, and through TLS the
//! same call says `close_notify` first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

/// Closes our half of the connection of one request. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub(crate) struct HalfClose(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    stage: Stage,
    /// Who waits for the answer.
    task: Option<Waker>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Stage {
    /// Nothing has been sent.
    #[default]
    Before,
    Sent,
    /// The answer has been read, and the connection is another's by now.
    After,
    Asked,
}

impl HalfClose {
    /// Says now that the answer is no longer wanted. Before the request is sent, it keeps it from being sent; after the answer,
    /// it does nothing.
    pub(crate) fn now(&self) {
        let mut state = self.lock();
        if state.stage != Stage::After {
            state.stage = Stage::Asked;
            if let Some(task) = state.task.take() {
                task.wake();
            }
        }
    }

    /// Whether it was said in time.
    pub(crate) fn is_asked(&self) -> bool {
        self.lock().stage == Stage::Asked
    }

    /// The request goes out; `false` where it must not any more.
    pub(super) fn begin(&self) -> bool {
        let mut state = self.lock();
        if state.stage == Stage::Asked {
            return false;
        }
        state.stage = Stage::Sent;
        true
    }

    /// Whether our half is to be closed; whoever asks is woken when it is.
    pub(super) fn poll_asked(&self, cx: &Context<'_>) -> bool {
        let mut state = self.lock();
        if state.stage == Stage::Asked {
            return true;
        }
        if !state.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            state.task = Some(cx.waker().clone());
        }
        false
    }

    /// The answer is read to its end; whether its connection can be used again.
    pub(super) fn end(&self) -> bool {
        let mut state = self.lock();
        let is_whole = state.stage != Stage::Asked;
        if is_whole {
            state.stage = Stage::After;
        }
        is_whole
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock, and what it guards is whole after every step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn whoever_waits_is_woken_once_and_told_from_then_on() {
        let (half_close, woken) = (HalfClose::default(), Arc::<Woken>::default());
        let waker = Waker::from(Arc::clone(&woken));
        let cx = Context::from_waker(&waker);
        assert!(half_close.begin() && !half_close.poll_asked(&cx) && !half_close.poll_asked(&cx));
        half_close.clone().now();
        half_close.now();
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert!(half_close.poll_asked(&cx) && half_close.is_asked() && !half_close.end());
    }
}
