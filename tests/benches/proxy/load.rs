//! The load: so many clients, each of which asks again as soon as it has its answer.

use crate::connection::{Connection, Timing};
use crate::workload::Workload;
use anyhow::{Result, bail, ensure};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A client stops after so many failed requests of a turn: it shows nothing new, and would only spin.
const ERRORS_MAX: usize = 3;

pub(crate) struct Load {
    workload: &'static Workload,
    request: Vec<u8>,
    connections: Vec<Connection>,
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    timings: Vec<Timing>,
    errors: Vec<String>,
    took: Duration,
}

impl Load {
    pub(crate) fn new(address: SocketAddr, workload: &'static Workload) -> Self {
        let connections = (0..workload.connections).map(|_| Connection::new(address)).collect();
        Load { workload, request: workload.request(), connections }
    }

    /// Begins no request after `time`, and waits for those that are on their way.
    pub(crate) async fn run(&mut self, time: Duration) -> Outcome {
        let (workload, request, start) = (self.workload, &self.request, Instant::now());
        let clients = self.connections.iter_mut().map(async |connection| {
            let mut outcome = Outcome::default();
            while start.elapsed() < time && outcome.errors.len() < ERRORS_MAX {
                match connection.ask(request, workload.streams, workload.tokens).await {
                    Ok(timing) => outcome.timings.push(timing),
                    Err(error) => outcome.errors.push(format!("{error:#}")),
                }
            }
            outcome
        });
        // Each client is woken for itself: with `join_all` a few of them would all be asked whenever one is.
        let mut clients: FuturesUnordered<_> = clients.collect();
        let mut all = Outcome::default();
        while let Some(outcome) = clients.next().await {
            all.timings.extend(outcome.timings);
            all.errors.extend(outcome.errors);
        }
        all.took = start.elapsed();
        all
    }
}

impl Outcome {
    /// Those that were answered.
    pub(crate) fn requests(&self) -> usize {
        self.timings.len()
    }

    /// # Errors
    /// When not every request was answered as it should be.
    pub(crate) fn check(&self) -> Result<()> {
        if let Some(first) = self.errors.first() {
            bail!("{} failed requests, the first: {first}", self.errors.len());
        }
        ensure!(!self.timings.is_empty(), "no request was answered");
        Ok(())
    }

    pub(crate) fn per_second(&self) -> f64 {
        self.timings.len() as f64 / self.took.as_secs_f64()
    }

    /// Microseconds to the end of an answer, at a quantile.
    pub(crate) fn whole_us(&self, quantile: f64) -> f64 {
        at(quantile, self.timings.iter().map(|timing| timing.whole))
    }

    /// Microseconds to the first byte of an answer's body, at a quantile.
    pub(crate) fn first_us(&self, quantile: f64) -> f64 {
        at(quantile, self.timings.iter().map(|timing| timing.first))
    }
}

fn at(quantile: f64, times: impl Iterator<Item = Duration>) -> f64 {
    let mut times: Vec<Duration> = times.collect();
    times.sort_unstable();
    let rank = (times.len() as f64 * quantile).ceil() as usize;
    times.get(rank.saturating_sub(1)).map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
}
