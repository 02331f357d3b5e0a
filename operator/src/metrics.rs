//! Every metric of the operator: its name, unit, help and labels. Labels come from closed lists; the one that names models is
//! bounded by the models themselves and goes with them.

use crate::child::Kind;
use crate::failure::Class;
use crate::plan::WorkloadRole;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::time::Duration;

/// Seconds of a reconcile: from one without a write on an idle API server to one that is cut off.
const SECONDS: &[f64] = &[0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];

/// How a reconcile ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All stands as wanted.
    Settled,
    /// The manifest can't be acted on.
    Invalid,
    /// The model is gone, or going.
    Gone,
    /// A child could not be written.
    Failed(Class),
    /// The cluster could not be read, or the status not written.
    Unreachable,
    /// It took too long.
    TimedOut,
    /// It panicked.
    Panicked,
}

impl Outcome {
    /// As the label spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Outcome::Settled => "settled",
            Outcome::Invalid => "invalid",
            Outcome::Gone => "gone",
            Outcome::Failed(class) => class.as_str(),
            Outcome::Unreachable => "unreachable",
            Outcome::TimedOut => "timed-out",
            Outcome::Panicked => "panicked",
        }
    }
}

/// What a write did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Server-side apply of an object.
    Apply,
    /// Deletion of one that is not wanted any more.
    Delete,
}

impl Write {
    const fn as_str(self) -> &'static str {
        match self {
            Write::Apply => "apply",
            Write::Delete => "delete",
        }
    }
}

/// A count of replicas of a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaState {
    /// Asked for.
    Desired,
    /// Ready.
    Ready,
}

impl ReplicaState {
    const fn as_str(self) -> &'static str {
        match self {
            ReplicaState::Desired => "desired",
            ReplicaState::Ready => "ready",
        }
    }
}

/// All metrics of one operator.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    reconciles: IntCounterVec,
    duration: Histogram,
    /// Models whose reconcile is waited for.
    pub queued: IntGauge,
    /// Reconciles that run.
    pub active: IntGauge,
    requests: IntCounterVec,
    writes: IntCounterVec,
    /// 1 while this replica leads.
    pub leader: IntGauge,
    panics: IntCounter,
    watch_restarts: IntCounterVec,
    /// Models that are there.
    pub models: IntGauge,
    replicas: IntGaugeVec,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels).expect("name and labels are constants");
            registry.register(Box::new(metric.clone())).expect("each name is registered once");
            metric
        };
        let gauge = |name: &str, help: &str| {
            let metric = IntGauge::new(name, help).expect("the name is a constant");
            registry.register(Box::new(metric.clone())).expect("each name is registered once");
            metric
        };
        let duration = Histogram::with_opts(
            HistogramOpts::new("baton_operator_reconcile_seconds", "Seconds that a reconcile took.")
                .buckets(SECONDS.to_vec()),
        )
        .expect("name and buckets are constants");
        registry.register(Box::new(duration.clone())).expect("each name is registered once");
        let panics = IntCounter::new("baton_operator_panics_total", "Reconciles that panicked; each is a bug.")
            .expect("the name is a constant");
        registry.register(Box::new(panics.clone())).expect("each name is registered once");
        let replicas = IntGaugeVec::new(
            Opts::new(
                "baton_model_replicas",
                "Replicas of a model's role that are asked for (desired) and that are ready, over all revisions.",
            ),
            &["namespace", "model", "role", "state"],
        )
        .expect("name and labels are constants");
        registry.register(Box::new(replicas.clone())).expect("each name is registered once");
        Metrics {
            reconciles: counters(
                "baton_operator_reconciles_total",
                "Reconciles by how they ended; settled is all as wanted.",
                &["outcome"],
            ),
            duration,
            queued: gauge("baton_operator_queued", "Models whose reconcile waits for its turn."),
            active: gauge("baton_operator_active", "Reconciles that run."),
            requests: counters(
                "baton_operator_api_requests_total",
                "Requests to the API server by verb, resource and class of status code (error: no answer).",
                &["verb", "resource", "code"],
            ),
            writes: counters(
                "baton_operator_writes_total",
                "Children written, by kind and verb (apply, delete).",
                &["kind", "verb"],
            ),
            leader: gauge("baton_operator_leader", "1 while this replica leads."),
            panics,
            watch_restarts: counters(
                "baton_operator_watch_restarts_total",
                "Watches that broke or had to list anew, by resource.",
                &["resource"],
            ),
            models: gauge("baton_operator_models", "DisaggregatedModels that are there."),
            replicas,
            registry,
        }
    }

    /// Counts a reconcile.
    pub fn reconciled(&self, outcome: Outcome, took: Duration) {
        self.reconciles.with_label_values(&[outcome.as_str()]).inc();
        self.duration.observe(took.as_secs_f64());
        if outcome == Outcome::Panicked {
            self.panics.inc();
        }
    }

    /// Counts a request to the API server.
    pub(crate) fn requested(&self, verb: &'static str, resource: &'static str, code: &'static str) {
        self.requests.with_label_values(&[verb, resource, code]).inc();
    }

    /// Counts a child that was written.
    pub(crate) fn wrote(&self, kind: Kind, write: Write) {
        self.writes.with_label_values(&[kind.as_str(), write.as_str()]).inc();
    }

    /// Counts a watch that broke or began anew.
    pub(crate) fn watch_restarted(&self, resource: &'static str) {
        self.watch_restarts.with_label_values(&[resource]).inc();
    }

    /// Sets a role's counts.
    pub(crate) fn role(&self, namespace: &str, model: &str, role: WorkloadRole, state: ReplicaState, count: u32) {
        self.replicas.with_label_values(&[namespace, model, role.as_str(), state.as_str()]).set(count.into());
    }

    /// Drops what was said of a model that is gone.
    pub(crate) fn forget(&self, namespace: &str, model: &str) {
        for role in WorkloadRole::ALL {
            for state in [ReplicaState::Desired, ReplicaState::Ready] {
                // Not there when the role never had a workload.
                let _ = self.replicas.remove_label_values(&[namespace, model, role.as_str(), state.as_str()]);
            }
        }
    }

    /// All of it in Prometheus' text format.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).expect("metrics are text")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_of_a_model_goes_with_it() {
        let metrics = Metrics::new();
        metrics.role("models", "tiny", WorkloadRole::Decode, ReplicaState::Ready, 2);
        metrics.role("models", "other", WorkloadRole::Decode, ReplicaState::Ready, 1);
        let line = "baton_model_replicas{model=\"tiny\",namespace=\"models\",role=\"decode\",state=\"ready\"} 2";
        assert!(metrics.render().contains(line), "{}", metrics.render());
        metrics.forget("models", "tiny");
        assert!(!metrics.render().contains("tiny"));
        assert!(metrics.render().contains("other"));
    }

    #[test]
    fn a_panic_is_counted_twice_over() {
        let metrics = Metrics::new();
        metrics.reconciled(Outcome::Panicked, Duration::from_millis(3));
        let text = metrics.render();
        assert!(text.contains("baton_operator_panics_total 1"), "{text}");
        assert!(text.contains("baton_operator_reconciles_total{outcome=\"panicked\"} 1"), "{text}");
    }
}
