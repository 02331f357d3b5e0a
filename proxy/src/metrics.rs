//! Every metric of the proxy: its name, unit, help and labels. Labels come from closed lists, never from text.

use crate::admission::Admission;
use crate::eligible::{Ineligible, Own, takes_work};
use crate::followed::{Followed, Stream};
use crate::ledger::{End, Ledger};
use crate::workers::{Table, Workers};
use baton_wire::{Path, PathReason};
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::time::Duration;
use tokio::time::Instant;

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

/// What became of a stream whose decode worker was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Continuation {
    /// Another decode worker goes on with it.
    Continued,
    /// There is no other decode worker.
    NoWorker,
    /// As many as may be tried have failed, or the request's time is over.
    Failed,
    /// What the client has of it was too much to remember.
    Unrecorded,
}

impl Continuation {
    const fn as_str(self) -> &'static str {
        match self {
            Continuation::Continued => "continued",
            Continuation::NoWorker => "no-worker",
            Continuation::Failed => "failed",
            Continuation::Unrecorded => "unrecorded",
        }
    }
}

/// A bound that a request met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    BodyBytes,
    BodyTime,
    InFlight,
    QueueTime,
    ApiKey,
    Draining,
}

impl Limit {
    const fn as_str(self) -> &'static str {
        match self {
            Limit::BodyBytes => "body-bytes",
            Limit::BodyTime => "body-time",
            Limit::InFlight => "in-flight",
            Limit::QueueTime => "queue-time",
            Limit::ApiKey => "api-key",
            Limit::Draining => "draining",
        }
    }
}

/// A certificate that this proxy shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Certificate {
    /// On the clients' port (`--tls-cert-file`).
    Server,
    /// To what is dialled (`--upstream-tls-cert-file`).
    Upstream,
}

impl Certificate {
    const fn as_str(self) -> &'static str {
        match self {
            Certificate::Server => "server",
            Certificate::Upstream => "upstream",
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
    continuations: IntCounterVec,
    fallbacks: IntCounterVec,
    refused: IntCounterVec,
    workers: IntGaugeVec,
    resends: IntCounter,
    queued: IntGaugeVec,
    shed: IntCounterVec,
    held: IntGauge,
    oldest_hold: Gauge,
    holds: IntCounterVec,
    kv_event_streams: IntGaugeVec,
    prefix_blocks: IntGauge,
    kv_event_resyncs: IntCounter,
    prefix_blocks_refused: IntCounter,
    certificate_expiry: IntGaugeVec,
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
        let queued = IntGaugeVec::new(
            Opts::new("baton_proxy_queued", "Clients' requests that wait for room, by class."),
            &["class"],
        )
        .expect("name and labels are constants");
        registry.register(Box::new(queued.clone())).expect("each name is registered once");
        let oldest_hold =
            Gauge::new("baton_proxy_oldest_hold_seconds", "Age of the oldest KV that is held; 0 if none is.")
                .expect("the name is a constant");
        registry.register(Box::new(oldest_hold.clone())).expect("each name is registered once");
        let kv_event_streams = IntGaugeVec::new(
            Opts::new(
                "baton_proxy_kv_event_streams",
                "Workers whose KV events are followed, by where their events stand.",
            ),
            &["state"],
        )
        .expect("name and labels are constants");
        registry.register(Box::new(kv_event_streams.clone())).expect("each name is registered once");
        let certificate_expiry = IntGaugeVec::new(
            Opts::new(
                "baton_proxy_tls_certificate_expiry_timestamp_seconds",
                "When a certificate that this proxy shows expires, in seconds since the Unix epoch. Absent where none is shown.",
            ),
            &["use"],
        )
        .expect("name and labels are constants");
        registry.register(Box::new(certificate_expiry.clone())).expect("each name is registered once");
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
            continuations: counters(
                "baton_proxy_continuations_total",
                "Streams whose decode worker was lost, by what became of them. continued: another one goes on with it.",
                &["outcome"],
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
            queued,
            shed: counters(
                "baton_proxy_shed_total",
                "Clients' requests turned away for want of room, by class.",
                &["class"],
            ),
            held: gauge("baton_proxy_held_kv", "Prompts whose KV a prefill engine holds for this proxy."),
            oldest_hold,
            holds: counters(
                "baton_proxy_holds_total",
                "Prompts whose KV a prefill engine held, by how that ended. expired: until its lease ended; leaked: a bug of ours.",
                &["end"],
            ),
            kv_event_streams,
            prefix_blocks: gauge(
                "baton_proxy_prefix_blocks",
                "Blocks that workers are known to have in their prefix caches.",
            ),
            kv_event_resyncs: counter(
                "baton_proxy_kv_event_resyncs_total",
                "Times that a worker's KV events had a gap or could not be read, so that they were asked for anew.",
            ),
            prefix_blocks_refused: counter(
                "baton_proxy_prefix_blocks_refused_total",
                "Blocks that workers told of and that found no room in the index.",
            ),
            certificate_expiry,
            registry,
        }
    }

    /// A client's request has ended.
    pub(crate) fn request(&self, endpoint: &'static str, path: Option<Path>, class: Class, took: Duration) {
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

    pub(crate) fn continuation(&self, outcome: Continuation) {
        self.continuations.with_label_values(&[outcome.as_str()]).inc();
    }

    pub(crate) fn fallback(&self, reason: PathReason) {
        self.fallbacks.with_label_values(&[reason.as_str()]).inc();
    }

    pub(crate) fn refused(&self, limit: Limit) {
        self.refused.with_label_values(&[limit.as_str()]).inc();
    }

    pub(crate) fn certificate_expires(&self, certificate: Certificate, expires_unix_seconds: i64) {
        self.certificate_expiry.with_label_values(&[certificate.as_str()]).set(expires_unix_seconds);
    }

    /// All of them in Prometheus' text format.
    pub(crate) fn render(
        &self,
        own: Own<'_>,
        table: &Table,
        workers: &Workers,
        ledger: &Ledger,
        followed: &Followed,
        admission: &Admission,
    ) -> String {
        let waiting = admission.snapshot();
        for class in &waiting.classes {
            let label = class.class.as_str();
            self.queued.with_label_values(&[label]).set(i64::try_from(class.queued).unwrap_or(i64::MAX));
            let shed = self.shed.with_label_values(&[label]);
            shed.inc_by(class.shed.saturating_sub(shed.get()));
        }
        let holds = ledger.snapshot(Instant::now());
        self.held.set(i64::try_from(holds.held).unwrap_or(i64::MAX));
        self.oldest_hold.set(holds.oldest_age_ms.unwrap_or(0) as f64 / 1e3);
        for end in End::ALL {
            let ended = self.holds.with_label_values(&[end.as_str()]);
            ended.inc_by(ledger.ended(end).saturating_sub(ended.get()));
        }
        let known = followed.known(Instant::now());
        for state in Stream::ALL {
            let workers = known.iter().filter(|worker| worker.stream == state).count();
            self.kv_event_streams.with_label_values(&[state.as_str()]).set(workers as i64);
        }
        self.prefix_blocks.set(known.iter().map(|worker| worker.blocks as i64).sum());
        let (resyncs, refused) = followed.troubles();
        self.kv_event_resyncs.inc_by(resyncs.saturating_sub(self.kv_event_resyncs.get()));
        self.prefix_blocks_refused.inc_by(refused.saturating_sub(self.prefix_blocks_refused.get()));
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
        metrics.request("chat", Some(Path::Fallback(PathReason::Timeout)), Class::Success, Duration::ZERO);
        let own = Own { revision: "r1", epoch: None, connector: crate::connector::Connector::Baton };
        let limits = crate::admission::Limits { in_flight_max: 1, queued_max: 1, queued_bytes_max: 1 };
        let (ledger, followed, admission) = (Ledger::default(), Followed::default(), Admission::new(limits));
        let text = metrics.render(own, &Table::default(), &Workers::new(None, &[]), &ledger, &followed, &admission);
        let expect = r#"baton_proxy_requests_total{class="2xx",endpoint="chat",path="fallback",reason="timeout"} 1"#;
        assert!(text.contains(expect), "{text}");
        assert!(text.lines().all(|line| line.starts_with('#') || line.starts_with("baton_proxy_")), "{text}");
    }
}
