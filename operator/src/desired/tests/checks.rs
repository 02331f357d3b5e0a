//! What must hold for any model's objects, whatever its manifest says.

use crate::child::{Child, Kind, Objects, Planned};
use baton_crds::labels::{MODEL, REVISION, SERVING_ROLE, WORKLOAD_ROLE};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Names that a manifest itself refers to.
#[derive(Debug, Default)]
pub(super) struct Referred {
    pub(super) secrets: BTreeSet<String>,
    pub(super) claims: BTreeSet<String>,
}

/// Everything at once.
pub(super) fn all(objects: &Objects<Planned>, referred: &Referred) {
    for child in objects.children() {
        identity(child);
    }
    names_are_told_apart(objects);
    for (child, template) in workloads(objects) {
        pod(objects, template, referred, &child.name);
        restricted(template, &child.name);
    }
    selectors(objects);
    services(objects);
}

/// Each pod template with the workload that it is in; a LeaderWorkerSet has two.
pub(super) fn workloads(objects: &Objects<Planned>) -> Vec<(&Child, &Value)> {
    let templates = |child: &'_ Child| match child.kind {
        Kind::Deployment => vec!["/spec/template"],
        Kind::LeaderWorkerSet => {
            vec!["/spec/leaderWorkerTemplate/leaderTemplate", "/spec/leaderWorkerTemplate/workerTemplate"]
        }
        Kind::ServiceAccount
        | Kind::Secret
        | Kind::ConfigMap
        | Kind::NetworkPolicy
        | Kind::PodDisruptionBudget
        | Kind::Service
        | Kind::PodMonitor => Vec::new(),
    };
    let each = objects.children().iter().flat_map(|child| {
        templates(child).into_iter().map(move |path| (child, child.body.pointer(path).expect("a template")))
    });
    each.collect()
}

fn list<'a>(value: &'a Value, path: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(path).and_then(Value::as_array).into_iter().flatten()
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

fn labels(value: &Value) -> BTreeMap<&str, &str> {
    let map = value.as_object().into_iter().flatten();
    map.map(|(key, value)| (key.as_str(), value.as_str().expect("a label is a text"))).collect()
}

fn is_dns_label(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !name.is_empty() && name.len() <= 63 && name.chars().all(plain) && !name.starts_with('-') && !name.ends_with('-')
}

fn identity(child: &Child) {
    let body = &child.body;
    assert_eq!(text(body, "/apiVersion"), child.kind.api_version());
    assert_eq!(text(body, "/kind"), child.kind.as_str());
    assert_eq!(text(body, "/metadata/name"), child.name);
    assert_eq!(text(body, "/metadata/namespace"), "team");
    assert!(is_dns_label(&child.name), "{}", child.name);
    assert_eq!(body.get("status"), None, "{}: the status is not ours", child.name);
    assert!(!holds_null(body), "{}: a null deletes: {body}", child.name);
    match child.kind {
        // 63, less the 10 of a ReplicaSet's hash and the 5 of a pod with their hyphens: what is cut off names no pod apart.
        Kind::Deployment | Kind::LeaderWorkerSet => assert!(child.name.len() <= 47, "{}", child.name),
        Kind::ServiceAccount
        | Kind::Secret
        | Kind::ConfigMap
        | Kind::NetworkPolicy
        | Kind::PodDisruptionBudget
        | Kind::Service
        | Kind::PodMonitor => {}
    }
    let owners: Vec<&Value> = list(body, "/metadata/ownerReferences").collect();
    assert!(matches!(owners[..], [owner] if owner["controller"] == true && owner["blockOwnerDeletion"] == true));
    let labels = labels(&body["metadata"]["labels"]);
    for key in ["app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component", MODEL] {
        assert!(labels.contains_key(key), "{}: no label {key}", child.name);
    }
    label_values(&labels);
}

fn holds_null(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.values().any(holds_null),
        Value::Array(list) => list.iter().any(holds_null),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

fn label_values(labels: &BTreeMap<&str, &str>) {
    for (key, value) in labels {
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let ends = value.starts_with(|c: char| c.is_ascii_alphanumeric())
            && value.ends_with(|c: char| c.is_ascii_alphanumeric());
        assert!(value.len() <= 63 && value.chars().all(inner) && ends, "{key}: {value:?} is no label's value");
    }
}

fn names_are_told_apart(objects: &Objects<Planned>) {
    let mut seen = BTreeSet::new();
    for child in objects.children() {
        assert!(seen.insert((child.kind, &child.name)), "{} twice", child.name);
    }
    assert!(objects.children().is_sorted_by_key(|child| (child.kind, &child.name)));
}

/// Volumes, mounts, ports, environment and references of a pod.
fn pod(objects: &Objects<Planned>, template: &Value, referred: &Referred, of: &str) {
    label_values(&labels(&template["metadata"]["labels"]));
    let spec = &template["spec"];
    let account = text(spec, "/serviceAccountName");
    assert!(objects.contains(Kind::ServiceAccount, account), "{of}: no ServiceAccount {account}");
    assert_eq!(spec["automountServiceAccountToken"], false, "{of}");
    assert_eq!(spec["enableServiceLinks"], false, "{of}");
    let volumes: BTreeSet<&str> = unique(list(spec, "/volumes").map(|volume| text(volume, "/name")), of);
    let claims: BTreeSet<&str> = unique(list(spec, "/resourceClaims").map(|claim| text(claim, "/name")), of);
    let mut mounted = BTreeSet::new();
    let mut containers = BTreeSet::new();
    for container in list(spec, "/initContainers").chain(list(spec, "/containers")) {
        let name = text(container, "/name");
        assert!(containers.insert(name), "{of}: container {name} twice");
        assert!(!text(container, "/image").is_empty(), "{of} {name}: no image");
        assert_eq!(text(container, "/terminationMessagePolicy"), "FallbackToLogsOnError", "{of} {name}");
        for path in ["/resources/requests/cpu", "/resources/requests/memory"] {
            let resources = &container["resources"];
            let limit = path.replace("requests", "limits");
            assert!(
                container.pointer(path).is_some() || container.pointer(&limit).is_some(),
                "{of} {name}: neither {path} nor a limit in {resources}"
            );
        }
        unique(list(container, "/ports").map(|port| text(port, "/name")), of);
        unique(list(container, "/env").map(|variable| text(variable, "/name")), of);
        unique(list(container, "/volumeMounts").map(|mount| text(mount, "/mountPath")), of);
        for mount in list(container, "/volumeMounts") {
            let volume = text(mount, "/name");
            assert!(volumes.contains(volume), "{of} {name}: no volume {volume}");
            mounted.insert(volume);
        }
        for claim in list(container, "/resources/claims") {
            assert!(claims.contains(text(claim, "/name")), "{of} {name}: {claim} is not a claim of the pod");
        }
        for variable in list(container, "/env") {
            if let Some(secret) = variable.pointer("/valueFrom/secretKeyRef/name").and_then(Value::as_str) {
                assert!(referred.secrets.contains(secret), "{of} {name}: no Secret {secret}");
            }
        }
        probes_name_ports(container, of);
    }
    assert_eq!(mounted, volumes, "{of}: a volume that nobody mounts");
    tokens_are_the_proxys(spec, of);
    for volume in list(spec, "/volumes") {
        if let Some(secret) = volume.pointer("/secret/secretName").and_then(Value::as_str) {
            assert!(objects.contains(Kind::Secret, secret), "{of}: no Secret {secret}");
            assert_eq!(volume["secret"]["defaultMode"], 0o440, "{of}");
        }
        if let Some(map) = volume.pointer("/configMap/name").and_then(Value::as_str) {
            assert!(objects.contains(Kind::ConfigMap, map), "{of}: no ConfigMap {map}");
        }
        if let Some(claim) = volume.pointer("/persistentVolumeClaim/claimName").and_then(Value::as_str) {
            assert!(referred.claims.contains(claim), "{of}: no claim {claim}");
        }
    }
    for secret in list(spec, "/imagePullSecrets") {
        assert!(referred.secrets.contains(text(secret, "/name")), "{of}: {secret} is not in the manifest");
    }
}

/// A token of the pod's account is for the routing proxy alone, whatever runs beside it.
fn tokens_are_the_proxys(spec: &Value, of: &str) {
    let has_token =
        |volume: &&Value| list(volume, "/projected/sources").any(|one| one.get("serviceAccountToken").is_some());
    for volume in list(spec, "/volumes").filter(has_token) {
        let name = text(volume, "/name");
        for container in list(spec, "/initContainers").chain(list(spec, "/containers")) {
            let mounts = list(container, "/volumeMounts").any(|mount| text(mount, "/name") == name);
            assert!(!mounts || text(container, "/name") == "routing-proxy", "{of}: {name} in {container}");
        }
    }
}

fn probes_name_ports(container: &Value, of: &str) {
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        if let Some(Value::String(port)) = container.pointer(&format!("/{probe}/httpGet/port")) {
            assert!(
                list(container, "/ports").any(|one| text(one, "/name") == port),
                "{of}: {probe} asks no port {port}"
            );
        }
    }
}

fn unique<'a>(names: impl Iterator<Item = &'a str>, of: &str) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    for name in names {
        assert!(seen.insert(name), "{of}: {name:?} twice");
    }
    seen
}

/// The Pod Security standard "restricted" (which holds "baseline"), rule by rule:
/// <https://kubernetes.io/docs/concepts/security/pod-security-standards/>.
pub(super) fn restricted(template: &Value, of: &str) {
    let spec = &template["spec"];
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        assert_ne!(spec[field], true, "{of}: {field}");
    }
    let allowed = [
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    ];
    for volume in list(spec, "/volumes") {
        let kinds: Vec<&String> = volume.as_object().expect("a volume").keys().filter(|key| *key != "name").collect();
        assert!(matches!(kinds[..], [kind] if allowed.contains(&kind.as_str())), "{of}: {volume}");
    }
    let pod = &spec["securityContext"];
    assert_eq!(pod["runAsNonRoot"], true, "{of}");
    assert_ne!(pod["runAsUser"], 0, "{of}");
    assert_eq!(pod["seccompProfile"]["type"], "RuntimeDefault", "{of}");
    assert_eq!(pod.get("sysctls"), None, "{of}");
    for container in list(spec, "/initContainers").chain(list(spec, "/containers")) {
        let security = &container["securityContext"];
        assert_eq!(security["allowPrivilegeEscalation"], false, "{of}");
        assert_eq!(
            security["readOnlyRootFilesystem"], true,
            "{of}: more than the standard asks, and ours all the same"
        );
        assert_eq!(security["capabilities"], serde_json::json!({"drop": ["ALL"]}), "{of}");
        for field in ["privileged", "procMount", "seLinuxOptions", "appArmorProfile", "runAsUser", "runAsNonRoot"] {
            assert_eq!(security.get(field), None, "{of}: {field}");
        }
        assert!(list(container, "/ports").all(|port| port.get("hostPort").is_none()), "{of}: a port of the host");
        for path in ["startupProbe", "livenessProbe", "readinessProbe"] {
            assert_eq!(container.pointer(&format!("/{path}/httpGet/host")), None, "{of}: a probe of another host");
        }
    }
    for (name, _) in template["metadata"]["annotations"].as_object().into_iter().flatten() {
        assert!(!name.contains("apparmor") && !name.contains("seccomp"), "{of}: {name}");
    }
}

/// A selector matches the pods that it is there for and no others, and uses none but the three labels that never change.
fn selectors(objects: &Objects<Planned>) {
    let pods = workloads(objects);
    for child in objects.children() {
        let path = match child.kind {
            Kind::Deployment | Kind::PodMonitor | Kind::PodDisruptionBudget => "/spec/selector/matchLabels",
            Kind::NetworkPolicy => "/spec/podSelector/matchLabels",
            Kind::Service => "/spec/selector",
            Kind::ServiceAccount | Kind::Secret | Kind::ConfigMap | Kind::LeaderWorkerSet => continue,
        };
        let selector = labels(child.body.pointer(path).expect("a selector"));
        let own = labels(&child.body["metadata"]["labels"]);
        let mut ours = selector.clone();
        ours.remove("leaderworkerset.sigs.k8s.io/worker-index");
        assert!(ours.keys().all(|key| [MODEL, WORKLOAD_ROLE, REVISION].contains(key)), "{}: {selector:?}", child.name);
        for (workload, template) in &pods {
            let pod = labels(&template["metadata"]["labels"]);
            let matches = ours.iter().all(|(key, value)| pod.get(key) == Some(value));
            // What the object says of itself is what it must select, wherever it says something.
            let meant = match own.get(WORKLOAD_ROLE).or(selector.get(WORKLOAD_ROLE)) {
                Some(role) => pod.get(WORKLOAD_ROLE) == Some(role),
                None => true,
            };
            assert_eq!(matches, meant, "{} {} and {}", child.kind.as_str(), child.name, workload.name);
        }
        if let Some(revision) = own.get(REVISION) {
            assert_eq!(selector.get(REVISION), Some(revision), "{}: pods of other revisions match", child.name);
        }
    }
    for child in objects.children() {
        let selecting = selecting_keys(&child.body);
        assert!(!selecting.contains(SERVING_ROLE), "{}: selects by a label that may change", child.name);
    }
}

/// Keys of every selector in an object, those of affinities and spreads included.
fn selecting_keys(value: &Value) -> BTreeSet<&str> {
    let mut keys = BTreeSet::new();
    match value {
        Value::Object(map) => {
            for (field, value) in map {
                match field.as_str() {
                    "matchLabels" => keys.extend(labels(value).keys()),
                    "matchExpressions" => keys.extend(list(value, "").map(|one| text(one, "/key"))),
                    _ => keys.extend(selecting_keys(value)),
                }
            }
        }
        Value::Array(list) => keys.extend(list.iter().flat_map(selecting_keys)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
    keys
}

/// Each Service's target port is one of the pods that it selects.
fn services(objects: &Objects<Planned>) {
    for child in objects.children().iter().filter(|child| child.kind == Kind::Service) {
        let role = text(&child.body, "/spec/selector/baton.dev~1workload-role");
        let is_role = |template: &Value| text(template, "/metadata/labels/baton.dev~1workload-role") == role;
        let Some((_, template)) = workloads(objects).into_iter().find(|(_, template)| is_role(template)) else {
            continue;
        };
        for port in list(&child.body, "/spec/ports") {
            let target = text(port, "/targetPort");
            let containers = list(template, "/spec/initContainers").chain(list(template, "/spec/containers"));
            let ports = containers.flat_map(|container| list(container, "/ports"));
            let count = ports.filter(|one| text(one, "/name") == target).count();
            assert_eq!(count, 1, "{}: port {target}", child.name);
        }
    }
}
