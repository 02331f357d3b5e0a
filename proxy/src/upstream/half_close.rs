//! Cancel and collect: closing our half of a connection while its answer is still awaited.
//!
//! An engine that watches its clients sees the end of the connection and aborts; one whose work is past that answers all the
//! same, and the answer, with the handle to what it keeps for us, still arrives. Dropping the wait would lose the second.
//!
//! The connection's own task closes it, at its next turn to read, where it is woken for it: no second descriptor of the socket
//! is needed, and through TLS the same call says `close_notify` first.

use crate::tls::stream::Stream;
use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Closes our half of the connection of one request. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub(crate) struct HalfClose(Arc<Mutex<State>>);

#[derive(Debug, Default)]
enum State {
    /// No connection yet.
    #[default]
    Before,
    On(Arc<Switch>),
    /// The answer has been read, and the connection is another's by now.
    After,
    Asked,
}

impl HalfClose {
    /// Says now that the answer is no longer wanted. Before the request is sent, it keeps it from being sent; after the answer,
    /// it does nothing.
    pub(crate) fn now(&self) {
        let mut state = lock(&self.0);
        match std::mem::replace(&mut *state, State::Asked) {
            State::On(switch) => switch.turn(),
            State::Before | State::Asked => {}
            State::After => *state = State::After,
        }
    }

    /// Whether it was said in time.
    pub(crate) fn is_asked(&self) -> bool {
        matches!(*lock(&self.0), State::Asked)
    }

    /// The request goes out on this connection; `false` where it must not any more.
    pub(super) fn begin(&self, switch: &Arc<Switch>) -> bool {
        let mut state = lock(&self.0);
        if matches!(*state, State::Asked) {
            return false;
        }
        *state = State::On(Arc::clone(switch));
        true
    }

    /// The answer is read to its end; whether its connection can be used again.
    pub(super) fn end(&self) -> bool {
        let mut state = lock(&self.0);
        let is_whole = !matches!(*state, State::Asked);
        if is_whole {
            *state = State::After;
        }
        is_whole
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks, and what they guard is whole after every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Of one connection: whether our half is to be closed, and whom to wake for it.
#[derive(Debug, Default)]
pub(super) struct Switch {
    is_turned: AtomicBool,
    task: Mutex<Option<Waker>>,
}

impl Switch {
    fn turn(&self) {
        self.is_turned.store(true, Ordering::Release);
        // After the flag: a task that registers later sees it.
        if let Some(task) = lock(&self.task).take() {
            task.wake();
        }
    }
}

/// A connection whose writing half can be closed by its [`Switch`].
#[derive(Debug)]
pub(super) struct Switched {
    stream: Stream,
    switch: Arc<Switch>,
    is_registered: bool,
    is_closed: bool,
}

impl Switched {
    pub(super) fn new(stream: Stream) -> (Self, Arc<Switch>) {
        let switch = Arc::<Switch>::default();
        let ours = Arc::clone(&switch);
        (Switched { stream, switch, is_registered: false, is_closed: false }, ours)
    }

    fn close_if_turned(&mut self, cx: &mut Context<'_>) {
        if !self.is_registered {
            // Once is enough: a connection is driven by one task for all its life.
            *lock(&self.switch.task) = Some(cx.waker().clone());
            self.is_registered = true;
        }
        if !self.is_closed && self.switch.is_turned.load(Ordering::Acquire) {
            // A half that is gone already is what was asked for.
            self.is_closed = Pin::new(&mut self.stream).poll_shutdown(cx).is_ready();
        }
    }
}

impl AsyncRead for Switched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        self.close_if_turned(cx);
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Switched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
