//! Which of a model's pods Prometheus Operator scrapes, and at which port.

use super::labels;
use super::pod::{ADMIN_PORT, HTTP_PORT};
use super::scope::{Scope, child, json};
use crate::child::{Child, Kind};
use crate::site::OptionalKind;
use crate::validated::Monitor;
use baton_crds::labels::{MODEL, REVISION, WORKLOAD_ROLE};
use baton_wire::names::paths;
use serde_json::json;

/// The model's PodMonitor, where it is wanted and the cluster knows the kind.
pub(super) fn of_model(scope: &Scope<'_>) -> Option<Child> {
    let wanted = match scope.model.monitor {
        Monitor::Auto | Monitor::Required => true,
        Monitor::None => false,
    };
    if !wanted || !scope.site.kinds.contains(&OptionalKind::PodMonitor) {
        return None;
    }
    // Without a proxy it is the engine that has metrics, at its own port.
    let port = if scope.connector.is_some() { ADMIN_PORT } else { HTTP_PORT };
    let metadata = scope.of_model(scope.model.name.clone());
    let monitor = json!({
        "apiVersion": Kind::PodMonitor.api_version(),
        "kind": Kind::PodMonitor.as_str(),
        "metadata": json(&metadata),
        "spec": {
            "selector": {"matchLabels": labels::select_model(&scope.model.name)},
            "podTargetLabels": [MODEL, WORKLOAD_ROLE, REVISION],
            "podMetricsEndpoints": [{"port": port, "path": paths::METRICS}],
        },
    });
    Some(child(Kind::PodMonitor, &metadata, &monitor))
}
