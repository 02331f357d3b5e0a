//! Every metric of the proxy: its name, unit, help and labels. Labels come from closed lists, never from text.

use crate::eligible::{Ineligible, Own, takes_work};
use crate::workers::{Table, Workers};
use baton_wire::render::Endpoint;
use baton_wire::{Path, PathReason};
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::time::Duration;

/// Seconds to the first token and of whole requests: from a cached short prompt to the longest allowed request.
const SECONDS: &[f64] = &[0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0];

/// How a client's request ended, as far as its status code tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Success,
    ClientError,
    ServerError,
    /// The client left before there was an answer.
    ClientGone,
}

impl Class {
    const fn as_str(self) -> &'static str {
        match self {
            Class::Success => "2xx",
            Class::ClientError => "4xx",
            Class::ServerError => "5xx",
            Class::ClientGone => "client-gone",
        }
    }
}

/// Why an answer that had begun did not end as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    ClientGone,
    DecodeWorkerLost,
    IdleTimeout,
    DeadlineExceeded,
}

impl Cut {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Cut::ClientGone => "client-gone",
            Cut::DecodeWorkerLost => "decode-worker-lost",
            Cut::IdleTimeout => "idle-timeout",
            Cut::DeadlineExceeded => "deadline-exceeded",
        }
    }
}

/// A bound that a request met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    BodyBytes,
    BodyTime,
    InFlight,
    Draining,
}

impl Limit {
    const fn as_str(self) -> &'static str {
        match self {
            Limit::BodyBytes => "body-bytes",
            Limit::BodyTime => "body-time",
            Limit::InFlight => "in-flight",
            Limit::Draining => "draining",
        }
    }
}

/// How a prefill leg ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LegOutcome {
    Done,
    Failed(PathReason),
}

/// All metrics of one proxy.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    ttft: HistogramVec,
    duration: HistogramVec,
    cuts: IntCounterVec,
    pub(crate) generated_tokens: IntCounter,
    prefill_leg: HistogramVec,
    pub(crate) prefill_kv_bytes: IntCounter,
    pub(crate) overhead: Histogram,
    pub(crate) in_flight: IntGauge,
    pub(crate) legs_in_flight: IntGauge,
    retries: IntCounterVec,
    fallbacks: IntCounterVec,
    refused: IntCounterVec,
    workers: IntGaugeVec,
    resends: IntCounter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels).expect("name and labels are constants");
            registry.register(Box::new(metric.clone())).expect("each name is registered once");
            metric
        };
        let counter = |name: &str, help: &str| {
            let metric = IntCounter::new(name, help).expect("the name is a constant");
            registry.register(Box::new(metric.clone())).expect("each name is registered once");
            metric
        };
        let gauge = |name: &str, help: &str| {
            let metric = IntGauge::new(name, help).expect("the name is a constant");
            registry.register(Box::new(metric.clone())).expect("each name is registered once");
            metric
        };
        let histograms = |name: &str, help: &str, labels: &[&str], buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let metric = HistogramVec::new(options, labels).expect("name, labels and buckets are constants");
            registry.register(Box::new(metric.clone())).expect("each name is registered once");
            metric
        };
        let workers = IntGaugeVec::new(
            Opts::new("baton_proxy_workers", "Workers in the table, by whether they take work (ready) or why not."),
            &["state"],
        )
        .expect("name and labels are constants");
        registry.register(Box::new(workers.clone())).expect("each name is registered once");
        Metrics {
            requests: counters(
                "baton_proxy_requests_total",
                "Clients' requests by endpoint, path that they took, reason for that path, and class of status code.",
                &["endpoint", "path", "reason", "class"],
            ),
            ttft: histograms(
                "baton_proxy_ttft_seconds",
                "Seconds from a request's arrival to its first token.",
                &["path"],
                SECONDS,
            ),
            duration: histograms(
                "baton_proxy_request_seconds",
                "Seconds from a request's arrival to the end of its answer.",
                &["path"],
                SECONDS,
            ),
            cuts: counters(
                "baton_proxy_cut_answers_total",
                "Answers that had begun and did not end as they should, by cause.",
                &["cause"],
            ),
            generated_tokens: counter("baton_proxy_generated_tokens_total", "Tokens passed to clients."),
            prefill_leg: histograms(
                "baton_proxy_prefill_leg_seconds",
                "Seconds from a prefill leg's dispatch to its answer, which comes once its KV has been released.",
                &["outcome"],
                SECONDS,
            ),
            prefill_kv_bytes: counter(
                "baton_proxy_prefill_kv_bytes_total",
                "KV bytes that prefill workers said they had sent for this proxy's requests.",
            ),
            overhead: histograms(
                "baton_proxy_dispatch_seconds",
                "Seconds from a request's arrival to the dispatch of its legs: reading, rendering, deciding.",
                &[],
                &[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0],
            )
            .with_label_values::<&str>(&[]),
            in_flight: gauge("baton_proxy_in_flight", "Clients' requests being served."),
            legs_in_flight: gauge("baton_proxy_legs_in_flight", "Other proxies' legs being served."),
            retries: counters(
                "baton_proxy_retries_total",
                "Requests sent to another worker because the first one did not serve them, by leg.",
                &["leg"],
            ),
            fallbacks: counters(
                "baton_proxy_fallbacks_total",
                "Requests planned for remote prefill whose prompt the decode worker recomputed, by reason.",
                &["reason"],
            ),
            refused: counters(
                "baton_proxy_refused_total",
                "Requests and legs refused because of a limit, by limit.",
                &["limit"],
            ),
            workers,
            resends: counter(
                "baton_proxy_resends_total",
                "Requests sent a second time because a pooled connection turned out to be closed.",
            ),
            registry,
        }
    }

    /// A client's request has ended.
    pub(crate) fn request(&self, endpoint: Endpoint, path: Option<Path>, class: Class, took: Duration) {
        let endpoint = match endpoint {
            Endpoint::Chat => "chat",
            Endpoint::Completions => "completions",
        };
        let (path, reason) = labels(path);
        self.requests.with_label_values(&[endpoint, path, reason, class.as_str()]).inc();
        self.duration.with_label_values(&[path]).observe(took.as_secs_f64());
    }

    pub(crate) fn first_token(&self, path: Option<Path>, took: Duration) {
        self.ttft.with_label_values(&[labels(path).0]).observe(took.as_secs_f64());
    }

    pub(crate) fn cut(&self, cut: Cut) {
        self.cuts.with_label_values(&[cut.as_str()]).inc();
    }

    pub(crate) fn prefill_leg(&self, outcome: LegOutcome, took: Duration) {
        let outcome = match outcome {
            LegOutcome::Done => "done",
            LegOutcome::Failed(reason) => reason.as_str(),
        };
        self.prefill_leg.with_label_values(&[outcome]).observe(took.as_secs_f64());
    }

    pub(crate) fn retry(&self, leg: crate::failure::Hop) {
        self.retries.with_label_values(&[leg.as_str()]).inc();
    }

    pub(crate) fn fallback(&self, reason: PathReason) {
        self.fallbacks.with_label_values(&[reason.as_str()]).inc();
    }

    pub(crate) fn refused(&self, limit: Limit) {
        self.refused.with_label_values(&[limit.as_str()]).inc();
    }

    /// All of them in Prometheus' text format.
    pub(crate) fn render(&self, own: Own<'_>, table: &Table, workers: &Workers) -> String {
        self.resends.inc_by(workers.resends().saturating_sub(self.resends.get()));
        self.workers.reset();
        for worker in &table.workers {
            let state = takes_work(own, worker).map_or_else(Ineligible::as_str, |_| "ready");
            self.workers.with_label_values(&[state]).inc();
        }
        TextEncoder::new().encode_to_string(&self.registry.gather()).expect("text in memory can always be written")
    }
}

fn labels(path: Option<Path>) -> (&'static str, &'static str) {
    match path {
        None => ("none", "none"),
        Some(Path::RemotePrefill) => (Path::RemotePrefill.kind(), "none"),
        Some(path @ (Path::LocalPrefill(reason) | Path::Fallback(reason))) => (path.kind(), reason.as_str()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_rendered_under_our_prefix() {
        let metrics = Metrics::new();
        metrics.request(Endpoint::Chat, Some(Path::Fallback(PathReason::Timeout)), Class::Success, Duration::ZERO);
        let own = Own { revision: "r1", epoch: None };
        let text = metrics.render(own, &Table::default(), &Workers::new(None));
        let expect = r#"baton_proxy_requests_total{class="2xx",endpoint="chat",path="fallback",reason="timeout"} 1"#;
        assert!(text.contains(expect), "{text}");
        assert!(text.lines().all(|line| line.starts_with('#') || line.starts_with("baton_proxy_")), "{text}");
    }
}
