//! What the schema leaves open, because Kubernetes' own types for it are larger than the rest of the definition: volumes,
//! mounts, the pod template. Read as those types, so that nothing in them is lost without a word.

use super::rules;
use crate::Violation;
use crate::structural::quoted;
use baton_crds::rules::{ENV_NOT_OURS, MOUNT_PATH, OUR_ENV, OUR_VOLUMES_PREFIX, VOLUME_NOT_OURS};
use baton_crds::{DisaggregatedModel, EngineType, PodTemplateOverlay, RoleSpec};
use k8s_openapi::api::core::v1::{PodTemplateSpec, Volume, VolumeMount};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Largest `podTemplate`, in bytes of JSON. It is for what has no field, not for a pod; two of them and what is made from
/// them stay far below the 1.5 MiB that the API server takes.
const TEMPLATE_BYTES_MAX: usize = 16 * 1024;

/// Containers that are the operator's, and the list in which each stands.
const OUR_CONTAINERS: [(&str, &str); 3] =
    [("engine", "containers"), ("routing-proxy", "initContainers"), ("model-download", "initContainers")];

/// Fields of the operator's containers that stay as they are, with what to use instead.
const CONTAINER_FIELDS_KEPT: [(&str, &str); 5] = [
    ("image", "spec.engine.image, or the operator's installation"),
    ("command", "none of the operator's containers takes one"),
    ("args", "spec.engine.args"),
    ("ports", "the ports that the operator gives"),
    ("restartPolicy", "the one that the operator gives"),
];

/// Fields of a pod that stay as they are, with what to use instead.
const POD_FIELDS_KEPT: [(&str, &str); 7] = [
    ("terminationGracePeriodSeconds", "drainTimeoutSeconds of the role"),
    ("restartPolicy", "always, as workloads need it"),
    ("activeDeadlineSeconds", "none, as workloads need it"),
    ("ephemeralContainers", "kubectl debug, on a pod that runs"),
    // Who may write models but no pods would act as any account of the namespace.
    ("serviceAccountName", "the role's own ServiceAccount, which you may annotate"),
    ("serviceAccount", "the role's own ServiceAccount, which you may annotate"),
    (
        "automountServiceAccountToken",
        "spec.routing.discovery, for the routing proxy; nothing else in these pods asks the API server",
    ),
];

/// Everything that is wrong with the open parts.
pub(super) fn check(model: &DisaggregatedModel) -> Vec<Violation> {
    let baton = model.spec.engine.type_ == EngineType::Baton;
    let mut violations = Vec::new();
    for (path, role) in [("spec.prefill", &model.spec.prefill), ("spec.decode", &model.spec.decode)] {
        violations.extend(volumes(path, role).err().unwrap_or_default());
        violations.extend(volume_mounts(path, role).err().unwrap_or_default());
        if let Some(template) = &role.pod_template {
            check_template(&format!("{path}.podTemplate"), template, baton, &mut violations);
        }
    }
    violations
}

/// A role's volumes.
pub(super) fn volumes(path: &str, role: &RoleSpec) -> Result<Vec<Volume>, Vec<Violation>> {
    let mut violations = Vec::new();
    let mut volumes = Vec::new();
    for (index, spec) in role.volumes.iter().enumerate() {
        let path = format!("{path}.volumes[{index}]");
        if spec.source.len() > 1 {
            let sources: Vec<&str> = spec.source.keys().map(String::as_str).collect();
            violations.push(Violation::new(&path, format!("several sources: {}", sources.join(", ")), "one"));
        }
        volumes.extend(typed(&path, spec, &mut violations));
    }
    if violations.is_empty() { Ok(volumes) } else { Err(violations) }
}

/// Where a role's engine container mounts them.
pub(super) fn volume_mounts(path: &str, role: &RoleSpec) -> Result<Vec<VolumeMount>, Vec<Violation>> {
    let mut violations = Vec::new();
    let mut mounts = Vec::new();
    for (index, spec) in role.volume_mounts.iter().enumerate() {
        mounts.extend(typed(&format!("{path}.volumeMounts[{index}]"), spec, &mut violations));
    }
    if violations.is_empty() { Ok(mounts) } else { Err(violations) }
}

fn check_template(path: &str, template: &PodTemplateOverlay, baton: bool, violations: &mut Vec<Violation>) {
    let value = serde_json::to_value(template).expect("a template is made of JSON");
    let size = value.to_string().len();
    if size > TEMPLATE_BYTES_MAX {
        let allowed = format!("at most {TEMPLATE_BYTES_MAX}");
        violations.push(Violation::new(path, format!("{size} bytes of JSON"), allowed));
        return;
    }
    if typed::<PodTemplateSpec>(path, template, violations).is_none() {
        return;
    }
    let Some(spec) = &template.spec else { return };
    let path = format!("{path}.spec");
    for (field, instead) in POD_FIELDS_KEPT {
        if spec.contains_key(field) {
            violations.push(Violation::new(format!("{path}.{field}"), "is the operator's to set", instead));
        }
    }
    for (index, volume) in entries(spec, "volumes").iter().enumerate() {
        let name = text(volume, "name");
        if name.is_some_and(|name| name.starts_with(OUR_VOLUMES_PREFIX)) {
            let path = format!("{path}.volumes[{index}].name");
            violations.push(Violation::new(path, VOLUME_NOT_OURS.message, VOLUME_NOT_OURS.allowed));
        }
    }
    for list in ["containers", "initContainers"] {
        let mut names = Vec::new();
        for (index, container) in entries(spec, list).iter().enumerate() {
            let path = format!("{path}.{list}[{index}]");
            match text(container, "name").filter(|name| !name.is_empty()) {
                None => violations.push(Violation::new(format!("{path}.name"), "required, but missing", "")),
                Some(name) if names.contains(&name) => {
                    violations.push(Violation::new(path, format!("{name:?} is there already"), "each name once"));
                }
                Some(name) => {
                    names.push(name);
                    check_container(&path, list, name, container, baton, violations);
                }
            }
        }
    }
}

fn check_container(
    path: &str,
    list: &str,
    name: &str,
    container: &Value,
    baton: bool,
    violations: &mut Vec<Violation>,
) {
    let entries = |field: &str| container.get(field).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    for (index, mount) in entries("volumeMounts").iter().enumerate() {
        // Else the model's signing key would be any container's to read.
        if text(mount, "name").is_some_and(|name| name.starts_with(OUR_VOLUMES_PREFIX)) {
            let path = format!("{path}.volumeMounts[{index}].name");
            violations.push(Violation::new(path, VOLUME_NOT_OURS.message, VOLUME_NOT_OURS.allowed));
        }
    }
    let Some((_, home)) = OUR_CONTAINERS.iter().find(|(ours, _)| *ours == name) else { return };
    if *home != list {
        violations.push(Violation::new(
            format!("{path}.name"),
            format!("{name:?} is the operator's"),
            format!("in {home}"),
        ));
        return;
    }
    for (field, instead) in CONTAINER_FIELDS_KEPT {
        // Another's image may need a command to be an engine.
        let users = field == "command" && name == "engine" && !baton;
        if container.get(field).is_some() && !users {
            violations.push(Violation::new(format!("{path}.{field}"), "is the operator's to set", instead));
        }
    }
    for (index, env) in entries("env").iter().enumerate() {
        if text(env, "name").is_some_and(|name| OUR_ENV.contains(&name)) {
            let path = format!("{path}.env[{index}].name");
            violations.push(Violation::new(path, ENV_NOT_OURS.message, ENV_NOT_OURS.allowed));
        }
    }
    for (index, mount) in entries("volumeMounts").iter().enumerate() {
        if text(mount, "mountPath").is_some_and(|path| !rules::is_users_mount(path)) {
            let path = format!("{path}.volumeMounts[{index}].mountPath");
            violations.push(Violation::new(path, MOUNT_PATH.message, MOUNT_PATH.allowed));
        }
    }
}

fn entries<'a>(map: &'a Map<String, Value>, field: &str) -> &'a [Value] {
    map.get(field).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn text<'a>(value: &'a Value, field: &str) -> Option<&'a str> {
    value.get(field).and_then(Value::as_str)
}

/// Something open as Kubernetes' type for it; none where a violation says why not.
fn typed<T: DeserializeOwned + Serialize>(
    path: &str,
    open: &impl Serialize,
    violations: &mut Vec<Violation>,
) -> Option<T> {
    let value = serde_json::to_value(open).expect("an open part is made of JSON");
    let before = violations.len();
    match serde_path_to_error::deserialize::<_, T>(&value) {
        Ok(typed) => {
            let read = serde_json::to_value(&typed).expect("Kubernetes' types are made of JSON");
            tell_lost(path, &value, &read, violations);
            (violations.len() == before).then_some(typed)
        }
        Err(error) => {
            let inner = error.path().to_string();
            let path = if inner == "." { path.to_owned() } else { format!("{path}.{inner}") };
            violations.push(Violation::new(path, error.inner().to_string(), "as in a Pod"));
            None
        }
    }
}

/// Tells each field that Kubernetes' type has not kept, because it knows none of that name, and each null: Kubernetes takes
/// some as an absent field and some as a mistake, and nobody means one.
fn tell_lost(path: &str, written: &Value, read: &Value, violations: &mut Vec<Violation>) {
    match written {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = format!("{path}.{name}");
                match (value, read.get(name)) {
                    (Value::Null, _) => {
                        violations.push(Violation::new(path, "found nothing", "a value, or no such field"))
                    }
                    (value, Some(read)) => tell_lost(&path, value, read, violations),
                    (_, None) => violations.push(Violation::new(path, "unknown field", "as in a Pod")),
                }
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                let path = format!("{path}[{index}]");
                match (item, read.get(index)) {
                    (Value::Null, _) | (_, None) => {
                        violations.push(Violation::new(path, format!("found {}", quoted(item)), "as in a Pod"));
                    }
                    (item, Some(read)) => tell_lost(&path, item, read, violations),
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
