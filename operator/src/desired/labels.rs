//! Labels of a model's objects and pods, and the selectors that use three of them.

use crate::Validated;
use crate::plan::WorkloadRole;
use crate::validated::EngineKind;
use baton_crds::labels::{
    APP_COMPONENT, APP_INSTANCE, APP_MANAGED_BY, APP_MANAGED_BY_VALUE, APP_NAME, APP_NAME_VALUE, APP_PART_OF,
    APP_PART_OF_VALUE, ENGINE_TYPE, INFERENCE_SERVING, INFERENCE_SERVING_VALUE, MODEL, REVISION, SERVED_MODEL,
    SERVING_ROLE, SET_NAME, SET_REVISION, SET_ROLE, WORKLOAD_ROLE,
};
use baton_wire::Role;
use std::collections::BTreeMap;

/// Labels, by key.
pub type Labels = BTreeMap<String, String>;

/// Labels of an object that belongs to the model as a whole.
pub fn of_model(model: &str) -> Labels {
    labels(model, "model").collect()
}

/// Labels of an object that belongs to a role, whatever the revision.
pub fn of_role(model: &str, role: WorkloadRole) -> Labels {
    labels(model, role.as_str()).chain([pair(WORKLOAD_ROLE, role.as_str())]).collect()
}

/// Labels of an object that belongs to one revision of a role.
pub fn of_revision(model: &str, role: WorkloadRole, revision: &str) -> Labels {
    let mut labels = of_role(model, role);
    labels.insert(REVISION.to_owned(), revision.to_owned());
    labels
}

/// Labels of a pod. The front door's has none of those by which routers of the field find model servers: it is none.
pub fn of_pod(model: &Validated, role: WorkloadRole, revision: &str) -> Labels {
    let mut labels = of_revision(&model.name, role, revision);
    if let Some(serving) = serving_role(model, role) {
        labels.extend([
            pair(SERVING_ROLE, serving.as_str()),
            pair(INFERENCE_SERVING, INFERENCE_SERVING_VALUE),
            pair(SERVED_MODEL, &model.name),
            pair(ENGINE_TYPE, engine_type(model.engine.kind)),
            pair(SET_NAME, &model.name),
            pair(SET_ROLE, role.as_str()),
            pair(SET_REVISION, revision),
        ]);
    }
    labels
}

/// Selects the pods of a model.
pub fn select_model(model: &str) -> Labels {
    [pair(MODEL, model)].into()
}

/// Selects the pods of a role in all revisions.
pub fn select_role(model: &str, role: WorkloadRole) -> Labels {
    [pair(MODEL, model), pair(WORKLOAD_ROLE, role.as_str())].into()
}

/// Selects the pods of a role in one revision.
pub fn select_revision(model: &str, role: WorkloadRole, revision: &str) -> Labels {
    [pair(MODEL, model), pair(WORKLOAD_ROLE, role.as_str()), pair(REVISION, revision)].into()
}

/// What a role's workers serve: without disaggregation decode workers serve both phases. None for the front door.
pub fn serving_role(model: &Validated, role: WorkloadRole) -> Option<Role> {
    match (role, model.disaggregation.prefill()) {
        (WorkloadRole::Prefill, _) => Some(Role::Prefill),
        (WorkloadRole::Decode, Some(_)) => Some(Role::Decode),
        (WorkloadRole::Decode, None) => Some(Role::PrefillDecode),
        (WorkloadRole::Proxy, _) => None,
    }
}

/// The value of the label `llm-d.ai/engine-type`.
fn engine_type(kind: EngineKind) -> &'static str {
    match kind {
        EngineKind::Baton => "baton",
        EngineKind::Vllm => "vllm",
        EngineKind::Sglang => "sglang",
    }
}

fn labels(model: &str, component: &str) -> impl Iterator<Item = (String, String)> {
    [
        pair(APP_NAME, APP_NAME_VALUE),
        pair(APP_INSTANCE, model),
        pair(APP_COMPONENT, component),
        pair(APP_MANAGED_BY, APP_MANAGED_BY_VALUE),
        pair(APP_PART_OF, APP_PART_OF_VALUE),
        pair(MODEL, model),
    ]
    .into_iter()
}

fn pair(key: &str, value: &str) -> (String, String) {
    (key.to_owned(), value.to_owned())
}
