//! How far a download is, counted by those who do it and told to whoever asks.

use super::error::{FetchError, causes};
use super::remote::Entry;
use baton_wire::progress::{Phase, Progress};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Over how long the speed is measured: shards begin and end, and a person wants one figure.
const WINDOW: Duration = Duration::from_secs(10);

/// How often a point of the window is noted, so that it holds few of them.
const NOTE_INTERVAL: Duration = Duration::from_millis(500);

/// How far a download is.
#[derive(Clone, Debug)]
pub(super) struct Tracker(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    progress: Progress,
    /// Bytes that have come over the network, ever.
    received: u64,
    /// Moments of the last seconds, and what had been received by then.
    window: VecDeque<(Instant, u64)>,
}

impl Tracker {
    pub(super) fn new(uri: &str) -> Self {
        let progress = Progress {
            uri: uri.to_owned(),
            phase: Phase::Listing,
            bytes_done: 0,
            bytes_total: 0,
            files_done: 0,
            files_total: 0,
            bytes_per_second: 0,
            error: None,
        };
        Tracker(Arc::new(Mutex::new(State { progress, received: 0, window: VecDeque::new() })))
    }

    pub(super) fn is_in(&self, phase: Phase) {
        self.change(|state| {
            state.progress.phase = phase;
            state.progress.error = None;
        });
    }

    /// All that there is to download.
    pub(super) fn expects<'a>(&self, files: impl Iterator<Item = &'a Entry>) {
        self.change(|state| {
            (state.progress.files_total, state.progress.bytes_total) =
                files.fold((0, 0), |(files, bytes), entry| (files + 1, bytes + entry.size));
        });
    }

    /// A file's bytes on the volume went from so many to so many.
    pub(super) fn moved(&self, from: u64, to: u64) {
        self.change(|state| {
            state.progress.bytes_done = state.progress.bytes_done.saturating_sub(from).saturating_add(to);
        });
    }

    /// Bytes have come.
    pub(super) fn received(&self, bytes: u64) {
        self.change(|state| {
            state.received += bytes;
            state.progress.bytes_done += bytes;
            state.progress.error = None;
            let now = Instant::now();
            if state.window.back().is_none_or(|(noted, _)| now - *noted >= NOTE_INTERVAL) {
                state.window.push_back((now, state.received));
                while state.window.front().is_some_and(|(noted, _)| now - *noted > WINDOW) {
                    state.window.pop_front();
                }
            }
        });
    }

    /// A file is there and verified.
    pub(super) fn file_is_done(&self) {
        self.change(|state| state.progress.files_done += 1);
    }

    /// Something failed and is tried again.
    pub(super) fn stumbled(&self, why: &str) {
        self.change(|state| state.progress.error = Some(why.to_owned()));
    }

    pub(super) fn has_failed(&self, error: &FetchError) {
        self.change(|state| {
            state.progress.phase = Phase::Failed;
            state.progress.error = Some(causes(error));
        });
    }

    /// How far it is now.
    pub(super) fn now(&self) -> Progress {
        let mut progress = Progress::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner).progress);
        self.change(|state| {
            let oldest = state.window.iter().find(|(noted, _)| noted.elapsed() <= WINDOW);
            progress.bytes_per_second = oldest.map_or(0, |(noted, received)| {
                let seconds = noted.elapsed().max(NOTE_INTERVAL).as_secs_f64();
                ((state.received - received) as f64 / seconds) as u64
            });
        });
        progress
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_earlier_attempts_count_as_done_and_not_as_speed() {
        let tracker = Tracker::new("hf://a/b");
        tracker.moved(0, 1 << 30);
        assert_eq!((tracker.now().bytes_done, tracker.now().bytes_per_second), (1 << 30, 0));
        tracker.received(1000);
        tracker.received(500);
        let now = tracker.now();
        assert_eq!(now.bytes_done, (1 << 30) + 1500);
        assert!((1..=1000).contains(&now.bytes_per_second), "{}", now.bytes_per_second);
        tracker.moved(1500, 0);
        assert_eq!(tracker.now().bytes_done, 1 << 30, "what was thrown away is not there");
    }

    #[test]
    fn a_stumble_is_told_until_bytes_flow_again() {
        let tracker = Tracker::new("hf://a/b");
        tracker.stumbled("503");
        assert_eq!(tracker.now().error.as_deref(), Some("503"));
        tracker.received(1);
        assert_eq!(tracker.now().error, None);
    }
}
