//! Every metric of the worker: name, unit, help and labels.
//!
//! Labels come from closed lists only (roles, endpoints, reasons), so that their number is bounded; the role is a label of all.
//! `/status` reads its totals from here, so that both always tell the same.

use crate::transfer::consumer::ConsumerStats;
use crate::transfer::producer::{ExportReason, ProducerStats};
use baton_engine::engine::{Counters, Load};
use baton_wire::kv::ErrorCode;
use baton_wire::status::Totals;
use baton_wire::{Path, PathReason, Role};
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// From 1 ms (a decode step of a tiny model) in factors of about 2 to 100 s (a long prompt on a CPU).
const LATENCY_BUCKETS: [f64; 17] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 100.0];

/// Exposed transfer time is small where it works: from 0.1 ms.
const TRANSFER_BUCKETS: [f64; 13] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];

/// What was asked of the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A client's request, or the decode leg of one.
    Generate,
    /// The prefill leg of one.
    Prefill,
}

impl Kind {
    const ALL: [Kind; 2] = [Kind::Generate, Kind::Prefill];

    const fn as_str(self) -> &'static str {
        match self {
            Kind::Generate => "generate",
            Kind::Prefill => "prefill",
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Served to its end.
    Completed,
    /// Failed here.
    Failed,
    /// The client, or the proxy, hung up.
    Cancelled,
}

impl Outcome {
    const ALL: [Outcome; 3] = [Outcome::Completed, Outcome::Failed, Outcome::Cancelled];

    const fn as_str(self) -> &'static str {
        match self {
            Outcome::Completed => "completed",
            Outcome::Failed => "failed",
            Outcome::Cancelled => "cancelled",
        }
    }
}

/// A request that is being served: counted when it is dropped, as cancelled unless its end is told.
#[derive(Debug)]
pub struct Served {
    metrics: Arc<Metrics>,
    kind: Kind,
    since: Instant,
    outcome: Outcome,
}

impl Served {
    /// A request that begins now.
    pub fn begin(metrics: Arc<Metrics>, kind: Kind) -> Self {
        Served { metrics, kind, since: Instant::now(), outcome: Outcome::Cancelled }
    }

    /// How it ended.
    pub fn end(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.metrics.request(self.kind, self.outcome, self.since.elapsed());
    }
}

/// The metrics of one worker.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    errors: IntCounterVec,
    paths: IntCounterVec,
    request_duration: HistogramVec,
    queue_time: Histogram,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    running: IntGauge,
    waiting: IntGauge,
    queued_prompt_tokens: IntGauge,
    kv_blocks_used: IntGauge,
    kv_blocks: IntGauge,
    steps: IntCounter,
    failed_steps: IntCounter,
    preemptions: IntCounter,
    prefix_query_tokens: IntCounter,
    prefix_hit_tokens: IntCounter,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    exports: IntCounterVec,
    imports: IntCounterVec,
    kv_sent: IntCounter,
    kv_received: IntCounter,
    transfer_time: Histogram,
    exposed_transfer_time: Histogram,
    kv_checksum_failures: IntCounter,
    kv_frames_sent: IntCounter,
    kv_frames_received: IntCounter,
    kv_frames_discarded: IntCounter,
    kv_subscriptions_refused: IntCounterVec,
    kv_subscriptions_parked: IntGauge,
    kv_sessions: IntGauge,
    kv_imports_open: IntGauge,
    kv_exports_open: IntGauge,
    kv_oldest_export_age: Gauge,
    /// Two scrapes at once would both add the same difference.
    reading_transfers: Mutex<()>,
    last_exposed_transfer_ms: Mutex<Option<f64>>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

/// Label of a handover that went well.
const NO_REASON: &str = "none";

impl Metrics {
    /// Metrics of a worker, all at zero.
    pub fn new(role: Role, revision: &str, model: &str) -> Self {
        let registry = Registry::new_custom(None, Some(HashMap::from([("role".to_owned(), role.as_str().to_owned())])))
            .expect("a registry without prefix is always made");
        let make = Make { registry: &registry };
        let info = make.gauge_with(
            "baton_worker_info",
            "Constantly 1; the labels say what runs here.",
            [("revision", revision), ("model", model), ("version", env!("CARGO_PKG_VERSION"))],
        );
        info.set(1.0);
        let metrics = Metrics {
            requests: make.counters("baton_worker_requests_total", "Requests that ended.", &["kind", "outcome"]),
            errors: make.counters("baton_worker_errors_total", "Requests that were answered with an error.", &["code"]),
            paths: make.counters(
                "baton_worker_paths_total",
                "Generating requests by the path that they really took.",
                &["path", "reason"],
            ),
            request_duration: make.histograms(
                "baton_worker_request_duration_seconds",
                "From admission to the last byte.",
                &["kind"],
            ),
            queue_time: make.histogram(
                "baton_worker_queue_seconds",
                "From submission to the engine until it is admitted into a step.",
                &LATENCY_BUCKETS,
            ),
            time_to_first_token: make.histogram(
                "baton_worker_time_to_first_token_seconds",
                "From admission of a generating request to its first token.",
                &LATENCY_BUCKETS,
            ),
            inter_token_latency: make.histogram(
                "baton_worker_inter_token_latency_seconds",
                "Between two tokens of one choice.",
                &LATENCY_BUCKETS,
            ),
            running: make.gauge("baton_worker_running_sequences", "Sequences being computed."),
            waiting: make.gauge("baton_worker_waiting_sequences", "Sequences that wait for room or for their KV."),
            queued_prompt_tokens: make
                .gauge("baton_worker_queued_prompt_tokens", "Prompt tokens that still have to be computed here."),
            kv_blocks_used: make.gauge("baton_worker_kv_blocks_used", "KV blocks that somebody holds."),
            kv_blocks: make.gauge("baton_worker_kv_blocks", "KV blocks in all."),
            steps: make.counter("baton_worker_engine_steps_total", "Forward passes."),
            failed_steps: make.counter("baton_worker_engine_failed_steps_total", "Forward passes that failed."),
            preemptions: make.counter(
                "baton_worker_preemptions_total",
                "Sequences that lost their KV blocks to older ones and were computed again.",
            ),
            prefix_query_tokens: make.counter(
                "baton_worker_prefix_cache_query_tokens_total",
                "Prompt tokens that were looked up in the prefix cache.",
            ),
            prefix_hit_tokens: make.counter(
                "baton_worker_prefix_cache_hit_tokens_total",
                "Prompt tokens that were found in the prefix cache.",
            ),
            prompt_tokens: make.counter("baton_worker_prompt_tokens_total", "Prompt tokens computed here."),
            generation_tokens: make.counter("baton_worker_generation_tokens_total", "Tokens sampled here."),
            exports: make.counters(
                "baton_worker_kv_exports_total",
                "Handovers of KV to other workers that ended.",
                &["reason"],
            ),
            imports: make.counters(
                "baton_worker_kv_imports_total",
                "Handovers of KV from other workers that ended.",
                &["outcome", "reason"],
            ),
            kv_sent: make.counter("baton_worker_kv_sent_bytes_total", "KV bytes sent to other workers."),
            kv_received: make.counter("baton_worker_kv_received_bytes_total", "KV bytes received from other workers."),
            transfer_time: make.histogram(
                "baton_worker_kv_transfer_seconds",
                "From subscribing to verified KV, waiting for its computation and for room here included.",
                &LATENCY_BUCKETS,
            ),
            exposed_transfer_time: make.histogram(
                "baton_worker_kv_exposed_transfer_seconds",
                "Of a handover into this worker, the part after the last layer was computed, waiting for room here included.",
                &TRANSFER_BUCKETS,
            ),
            kv_checksum_failures: make.counter(
                "baton_worker_kv_checksum_failures_total",
                "Frames, digests and headers from other workers that did not match their checksum.",
            ),
            kv_frames_sent: make.counter("baton_worker_kv_sent_frames_total", "KV frames sent to other workers."),
            kv_frames_received: make.counter(
                "baton_worker_kv_received_frames_total",
                "KV frames from other workers that were verified and written.",
            ),
            kv_frames_discarded: make.counter(
                "baton_worker_kv_discarded_frames_total",
                "KV frames from other workers that came after the end of their handover.",
            ),
            kv_subscriptions_refused: make.counters(
                "baton_worker_kv_subscriptions_refused_total",
                "Subscriptions and connections of other workers that were refused here.",
                &["code"],
            ),
            kv_subscriptions_parked: make.gauge(
                "baton_worker_kv_subscriptions_parked",
                "Subscriptions of other workers whose prefill leg has not come yet.",
            ),
            kv_sessions: make.gauge("baton_worker_kv_sessions", "Other workers that are connected to fetch KV."),
            kv_imports_open: make.gauge(
                "baton_worker_kv_imports_open",
                "Handovers from other workers that are not over, those that wait for their prefill or for room here included.",
            ),
            kv_exports_open: make
                .gauge("baton_worker_kv_exports_open", "Handovers to other workers that are not over."),
            kv_oldest_export_age: make.gauge_with(
                "baton_worker_kv_oldest_export_age_seconds",
                "Age of the oldest of them: what to look at when KV blocks do not come back.",
                [],
            ),
            reading_transfers: Mutex::default(),
            last_exposed_transfer_ms: Mutex::default(),
            registry: registry.clone(),
        };
        metrics.touch();
        metrics
    }

    /// Makes every series exist from the start: a rate over a series that appears with its first event misses that event.
    fn touch(&self) {
        for kind in Kind::ALL {
            self.request_duration.with_label_values(&[kind.as_str()]);
            for outcome in Outcome::ALL {
                self.requests.with_label_values(&[kind.as_str(), outcome.as_str()]);
            }
        }
        self.imports.with_label_values(&[Outcome::Completed.as_str(), NO_REASON]);
        for reason in ExportReason::ALL {
            self.exports.with_label_values(&[reason.as_str()]);
        }
        for code in ErrorCode::ALL {
            self.kv_subscriptions_refused.with_label_values(&[code.as_str()]);
        }
        for reason in PathReason::ALL {
            self.imports.with_label_values(&[Outcome::Failed.as_str(), reason.as_str()]);
        }
    }

    /// An error was answered; `code` is one of `ApiError`'s.
    pub fn error(&self, code: &'static str) {
        self.errors.with_label_values(&[code]).inc();
    }

    /// A request ended.
    fn request(&self, kind: Kind, outcome: Outcome, duration: Duration) {
        self.requests.with_label_values(&[kind.as_str(), outcome.as_str()]).inc();
        self.request_duration.with_label_values(&[kind.as_str()]).observe(duration.as_secs_f64());
    }

    /// A generating request has its first token.
    pub fn first_token(&self, path: Path, since_admission: Duration) {
        let reason = match path {
            Path::RemotePrefill => NO_REASON,
            Path::LocalPrefill(reason) | Path::Fallback(reason) => reason.as_str(),
        };
        self.paths.with_label_values(&[path.kind(), reason]).inc();
        self.time_to_first_token.observe(since_admission.as_secs_f64());
    }

    /// A choice has another token.
    pub fn next_token(&self, since_last: Duration) {
        self.inter_token_latency.observe(since_last.as_secs_f64());
    }

    /// A request left the engine's queue.
    pub fn queued(&self, since_submission: Duration) {
        self.queue_time.observe(since_submission.as_secs_f64());
    }

    /// A handover into this worker is complete and in use.
    pub fn imported(&self, total: Duration, exposed: Duration) {
        self.transfer_time.observe(total.as_secs_f64());
        self.exposed_transfer_time.observe(exposed.as_secs_f64());
        *self.last_exposed_transfer_ms.lock().expect("no one panics while holding it") =
            Some(exposed.as_secs_f64() * 1e3);
    }

    /// What both sides of transfer have counted; called before metrics or totals are read.
    pub fn transfers(&self, producer: Option<&ProducerStats>, consumer: &ConsumerStats) {
        let _reading = self.reading_transfers.lock().expect("no one panics while holding it");
        if let Some(stats) = producer {
            advance(&self.kv_sent, stats.kv_bytes_sent);
            advance(&self.kv_frames_sent, stats.frames_sent);
            for (code, total) in &stats.subscriptions_refused {
                advance(&self.kv_subscriptions_refused.with_label_values(&[code.as_str()]), *total);
            }
            set(&self.kv_subscriptions_parked, stats.now.subscriptions_parked);
            set(&self.kv_sessions, stats.now.sessions);
            for (reason, total) in &stats.exports_ended {
                advance(&self.exports.with_label_values(&[reason.as_str()]), *total);
            }
            set(&self.kv_exports_open, stats.now.exports_open);
            self.kv_oldest_export_age.set(stats.now.oldest_export_age.as_secs_f64());
        }
        let import = |outcome: Outcome, reason| self.imports.with_label_values(&[outcome.as_str(), reason]);
        advance(&self.kv_received, consumer.kv_bytes_received);
        advance(&self.kv_frames_received, consumer.frames_received);
        advance(&self.kv_frames_discarded, consumer.frames_discarded);
        advance(&self.kv_checksum_failures, consumer.checksum_failures);
        set(&self.kv_imports_open, usize::try_from(consumer.fetches_active).unwrap_or(usize::MAX));
        advance(&import(Outcome::Completed, NO_REASON), consumer.fetches_completed);
        advance(&import(Outcome::Cancelled, NO_REASON), consumer.fetches_cancelled);
        for (reason, total) in &consumer.fetches_failed {
            advance(&import(Outcome::Failed, reason.as_str()), *total);
        }
    }

    /// What the engine has to do, and its totals.
    pub fn engine(&self, load: &Load, totals: &Counters) {
        set(&self.running, load.running);
        set(&self.waiting, load.waiting);
        set(&self.queued_prompt_tokens, load.queued_prompt_tokens);
        set(&self.kv_blocks_used, load.blocks_used);
        set(&self.kv_blocks, load.blocks_total);
        advance(&self.steps, totals.steps);
        advance(&self.failed_steps, totals.failed_steps);
        advance(&self.preemptions, totals.preemptions);
        advance(&self.prefix_query_tokens, totals.prefix_query_tokens);
        advance(&self.prefix_hit_tokens, totals.prefix_hit_tokens);
        advance(&self.prompt_tokens, totals.computed_prompt_tokens);
        advance(&self.generation_tokens, totals.generated_tokens);
    }

    /// The totals that `/status` shows.
    pub fn totals(&self) -> Totals {
        let acked = self.exports.with_label_values(&[ExportReason::Acked.as_str()]).get();
        let not_acked = ExportReason::ALL.into_iter().filter(|reason| *reason != ExportReason::Acked);
        let exports_failed =
            not_acked.map(|reason| self.exports.with_label_values(&[reason.as_str()]).get()).sum::<u64>();
        let import = |outcome: Outcome, reason| self.imports.with_label_values(&[outcome.as_str(), reason]).get();
        let fetches_failed =
            PathReason::ALL.into_iter().map(|reason| import(Outcome::Failed, reason.as_str())).sum::<u64>();
        Totals {
            prefill_tokens: self.prompt_tokens.get(),
            decode_tokens: self.generation_tokens.get(),
            kv_bytes_sent: self.kv_sent.get(),
            kv_bytes_received: self.kv_received.get(),
            transfers_completed: acked + import(Outcome::Completed, NO_REASON),
            transfers_failed: exports_failed + fetches_failed,
            last_exposed_transfer_ms: *self.last_exposed_transfer_ms.lock().expect("no one panics while holding it"),
        }
    }

    /// All metrics in Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("writing to memory does not fail");
        String::from_utf8(text).expect("the text format is text")
    }
}

/// Brings a counter to a total that is counted elsewhere. Each counter has one writer at a time.
fn advance(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

fn set(gauge: &IntGauge, value: usize) {
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
}

/// Makes metrics and registers them; names are distinct by the test below.
struct Make<'a> {
    registry: &'a Registry,
}

impl Make<'_> {
    fn register<C: prometheus::core::Collector + Clone + 'static>(&self, collector: prometheus::Result<C>) -> C {
        let collector = collector.expect("names and labels are well-formed constants");
        self.registry.register(Box::new(collector.clone())).expect("each name is registered once");
        collector
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::new(name, help))
    }

    fn gauge_with<const N: usize>(&self, name: &str, help: &str, labels: [(&str, &str); N]) -> Gauge {
        let labels = labels.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
        self.register(Gauge::with_opts(Opts::new(name, help).const_labels(labels.collect())))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.register(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str]) -> HistogramVec {
        let opts = HistogramOpts::new(name, help).buckets(LATENCY_BUCKETS.to_vec());
        self.register(HistogramVec::new(opts, labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::stats::ProducerGauges;

    fn metrics() -> Metrics {
        Metrics::new(Role::Decode, "r1", "tiny")
    }

    #[test]
    fn every_metric_has_our_prefix_and_the_role() {
        let text = metrics().text();
        let samples: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert!(samples.len() > 40);
        for line in samples {
            assert!(line.starts_with("baton_worker_") && line.contains(r#"role="decode""#), "{line}");
        }
    }

    #[test]
    fn the_engines_totals_are_added_once() {
        let metrics = metrics();
        for total in [5, 5, 9] {
            metrics.engine(&Load::default(), &Counters { generated_tokens: total, ..Counters::default() });
        }
        assert_eq!(metrics.totals().decode_tokens, 9);
    }

    #[test]
    fn totals_count_both_directions() {
        let metrics = metrics();
        let producer = ProducerStats {
            frames_sent: 2,
            kv_bytes_sent: 13,
            exports_ended: vec![(ExportReason::Acked, 1), (ExportReason::LeaseExpired, 2)],
            subscriptions_refused: vec![(ErrorCode::NotOpened, 6)],
            now: ProducerGauges { subscriptions_parked: 8, sessions: 9, ..ProducerGauges::default() },
        };
        let consumer = ConsumerStats {
            frames_received: 1,
            frames_discarded: 0,
            kv_bytes_received: 7,
            fetches_completed: 4,
            fetches_cancelled: 0,
            checksum_failures: 0,
            fetches_failed: vec![(PathReason::Timeout, 1)],
            fetches_active: 10,
        };
        for _ in 0..2 {
            metrics.transfers(Some(&producer), &consumer);
        }
        metrics.imported(Duration::from_millis(20), Duration::from_millis(2));
        let totals = metrics.totals();
        assert_eq!((totals.transfers_completed, totals.transfers_failed), (5, 3));
        assert_eq!((totals.kv_bytes_sent, totals.kv_bytes_received), (13, 7));
        assert_eq!(totals.last_exposed_transfer_ms, Some(2.0));
        let text = metrics.text();
        for line in [
            r#"kv_sent_frames_total{role="decode"} 2"#,
            r#"kv_received_frames_total{role="decode"} 1"#,
            r#"kv_subscriptions_refused_total{code="not-opened",role="decode"} 6"#,
            r#"kv_subscriptions_parked{role="decode"} 8"#,
            r#"kv_sessions{role="decode"} 9"#,
            r#"kv_imports_open{role="decode"} 10"#,
        ] {
            assert!(text.contains(&format!("\nbaton_worker_{line}\n")), "{line} is not in {text}");
        }
    }
}
