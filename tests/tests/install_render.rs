//! What the Helm chart and the kustomize tree render: the same objects, exact rights, accepted by a real API server.

use serde::Deserialize as _;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use system_tests::kube::{ControlPlane, Tier, skip};
use system_tests::repo;

/// A digest of the right form.
const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Where the programs of the test cluster are; none, and said so, where they have not been built.
fn programs() -> Option<&'static Path> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let said = Command::new(repo::root().join("scripts/test-cluster"))
            .arg("--installed")
            .output()
            .map_err(|error| format!("scripts/test-cluster can't be started: {error}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if said.status.success() { Ok(PathBuf::from(text(&said.stdout))) } else { Err(text(&said.stderr)) }
    });
    match found {
        Ok(folder) => Some(folder),
        Err(why) => {
            skip(why);
            None
        }
    }
}

fn run(programs: &Path, program: &str, arguments: &[&str]) -> Output {
    Command::new(programs.join(program))
        .args(arguments)
        .current_dir(repo::root())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Standard output, after a success.
fn rendered(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("manifests are text")
}

fn helm_template(programs: &Path, namespace: &str, more: &[&str]) -> String {
    let mut arguments = vec!["template", "baton", "charts/baton", "--namespace", namespace];
    arguments.extend(more);
    rendered(&run(programs, "helm", &arguments))
}

fn kustomize(programs: &Path, folder: &str) -> String {
    rendered(&run(programs, "kubectl", &["kustomize", folder]))
}

fn documents(text: &str) -> Vec<Value> {
    serde_yaml::Deserializer::from_str(text)
        .map(|document| Value::deserialize(document).expect("rendered manifests are YAML"))
        .filter(|document| !document.is_null())
        .collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Kind, namespace and name.
type Key = (String, String, String);

fn by_key(text_of_all: &str) -> BTreeMap<Key, Value> {
    documents(text_of_all)
        .into_iter()
        .map(|object| {
            let metadata = &object["metadata"];
            let key = [&object["kind"], &metadata["namespace"], &metadata["name"]].map(|part| text(part).to_owned());
            (key.into(), object)
        })
        .collect()
}

/// Takes out what says only which tool rendered it.
fn without_the_tools_labels(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| name != "helm.sh/chart" && name != "app.kubernetes.io/managed-by");
            fields.values_mut().for_each(without_the_tools_labels);
        }
        Value::Array(items) => items.iter_mut().for_each(without_the_tools_labels),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn assert_same(helm: &str, kustomize: &str) {
    let [mut helm, mut kustomize] = [helm, kustomize].map(by_key);
    helm.values_mut().chain(kustomize.values_mut()).for_each(without_the_tools_labels);
    assert_eq!(helm.keys().collect::<Vec<_>>(), kustomize.keys().collect::<Vec<_>>());
    for (key, object) in &helm {
        assert_eq!(object, &kustomize[key], "{key:?}: left the chart, right kustomize");
    }
}

#[test]
fn chart_and_kustomize_render_the_same_operator_for_all_namespaces() {
    let Some(programs) = programs() else { return };
    assert_same(&helm_template(programs, "baton-system", &[]), &kustomize(programs, "kustomize/operator/cluster"));
}

#[test]
fn chart_and_kustomize_render_the_same_operator_for_one_namespace() {
    let Some(programs) = programs() else { return };
    let helm = helm_template(programs, "baton", &["--set", "watchNamespaces={baton}"]);
    // kustomize has no values: there the kubelet puts the namespace in.
    let kustomize = kustomize(programs, "kustomize/operator/namespaced").replace("$(POD_NAMESPACE)", "baton");
    assert_same(&helm, &kustomize);
}

#[test]
fn the_overlays_add_the_api_and_a_restricted_namespace_and_nothing_else() {
    let Some(programs) = programs() else { return };
    for (overlay, namespace) in [("cluster", "baton-system"), ("namespaced", "baton")] {
        let all = by_key(&kustomize(programs, &format!("kustomize/overlays/{overlay}")));
        let operator = by_key(&kustomize(programs, &format!("kustomize/operator/{overlay}")));
        let added: Vec<&Key> = all.keys().filter(|key| !operator.contains_key(*key)).collect();
        let kinds: Vec<(&str, &str)> = added.iter().map(|(kind, _, name)| (kind.as_str(), name.as_str())).collect();
        assert_eq!(kinds, [("CustomResourceDefinition", "disaggregatedmodels.baton.dev"), ("Namespace", namespace),]);
        let key = ("Namespace".to_owned(), String::new(), namespace.to_owned());
        assert_eq!(all[&key]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "restricted");
        assert_eq!(all.len(), operator.len() + 2);
    }
}

#[test]
fn an_operator_of_named_namespaces_has_no_cluster_wide_right() {
    let Some(programs) = programs() else { return };
    let objects = by_key(&helm_template(programs, "ops", &["--set", "watchNamespaces={team-a,team-b}"]));
    for (kind, namespace, name) in objects.keys() {
        assert!(!kind.starts_with("Cluster") && !namespace.is_empty(), "{kind} {name} is of the whole cluster");
    }
    for namespace in ["team-a", "team-b"] {
        for kind in ["Role", "RoleBinding"] {
            assert!(objects.contains_key(&(kind.to_owned(), namespace.to_owned(), "baton-operator".to_owned())));
        }
    }
}

#[test]
fn the_shipped_rights_are_those_of_the_tables() {
    let Some(programs) = programs() else { return };
    let rules = |table: &[baton_operator::rbac::Rule]| {
        Value::Array(
            table.iter().map(|rule| serde_json::to_value(rule.policy_rule()).expect("a rule is JSON")).collect(),
        )
    };
    let models = rules(baton_operator::rbac::MODELS);
    let objects = by_key(&helm_template(programs, "baton-system", &[]));
    let cluster = |name: &str| &objects[&("ClusterRole".to_owned(), String::new(), name.to_owned())]["rules"];
    assert_eq!(cluster("baton-operator"), &models);
    assert_eq!(cluster("baton-operator-edit"), &rules(baton_operator::rbac::EDIT));
    assert_eq!(cluster("baton-operator-view"), &rules(baton_operator::rbac::VIEW));
    let lease = ("Role".to_owned(), "baton-system".to_owned(), "baton-operator-lease".to_owned());
    assert_eq!(objects[&lease]["rules"], rules(baton_operator::rbac::OWN));

    let namespaced = by_key(&helm_template(programs, "ops", &["--set", "watchNamespaces={team-a}"]));
    let role = ("Role".to_owned(), "team-a".to_owned(), "baton-operator".to_owned());
    assert_eq!(namespaced[&role]["rules"], models);
}

#[test]
fn the_chart_passes_helms_own_check() {
    let Some(programs) = programs() else { return };
    for more in [&[][..], &["--set", "watchNamespaces={team-a}", "--set", "metrics.podMonitor.enabled=true"]] {
        let mut arguments = vec!["lint", "charts/baton", "--strict"];
        arguments.extend(more);
        rendered(&run(programs, "helm", &arguments));
    }
}

#[test]
fn the_chart_has_the_workspaces_version_and_the_generated_definition() {
    let root = repo::root();
    let chart: Value = serde_yaml::from_str(&read("charts/baton/Chart.yaml")).expect("the chart is YAML");
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
    let name = "disaggregatedmodels.baton.dev.yaml";
    assert!(read(&format!("charts/baton/crds/{name}")) == read(&format!("crds/{name}")), "run `make generate`");
    assert_eq!(std::fs::read_dir(root.join("charts/baton/crds")).expect("the chart has a definition").count(), 1);
}

fn read(path: &str) -> String {
    std::fs::read_to_string(repo::root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn wrong_values_are_refused_by_the_name_of_the_field() {
    let Some(programs) = programs() else { return };
    let digest = format!("image.tag=1,image.digest={DIGEST}");
    let cases = [
        ("replica=2", "'replica'"),
        ("image.registry=x", "'registry'"),
        ("worker.image.pullPolicy=Always", "'pullPolicy'"),
        ("networkPolicy.port=1", "'port'"),
        ("replicas=0", "/replicas"),
        ("replicas=6", "/replicas"),
        ("replicas=two", "/replicas"),
        ("image.repository=", "/image/repository"),
        ("image.digest=sha256:12", "/image/digest"),
        ("image.tag=a b", "/image/tag"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
        ("watchNamespaces={a,a}", "/watchNamespaces"),
        ("watchNamespaces={Team}", "/watchNamespaces/0"),
        ("fullnameOverride=Baton_1", "/fullnameOverride"),
        ("metrics.podMonitor.interval=often", "/metrics/podMonitor/interval"),
        ("networkPolicy.apiServerPorts={70000}", "/networkPolicy/apiServerPorts/0"),
        ("podDisruptionBudget.maxUnavailable=200%", "/podDisruptionBudget/maxUnavailable"),
        // What contradicts itself.
        (digest.as_str(), "/image/tag"),
        ("serviceAccount.create=false", "/serviceAccount/name"),
        (
            "serviceAccount.create=false,serviceAccount.name=a,serviceAccount.annotations.b=c",
            "/serviceAccount/annotations",
        ),
    ];
    let mut wrong = String::new();
    for (values, named) in cases {
        let output = run(programs, "helm", &["template", "baton", "charts/baton", "--set", values]);
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() || !said.contains(named) {
            let _ = writeln!(wrong, "--set {values}: {}", if output.status.success() { "taken" } else { &said });
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn every_value_reaches_what_it_is_for() {
    let Some(programs) = programs() else { return };
    let digest = format!("image.digest={DIGEST},worker.image.tag=w,proxy.image.digest={DIGEST}");
    let cases: &[(&str, &str)] = &[
        (&digest, "image: baton/operator@sha256:0123"),
        (&digest, "--worker-image=baton/worker:w"),
        (&digest, "--proxy-image=baton/proxy@sha256:0123"),
        ("replicas=1", "replicas: 1"),
        ("image.pullPolicy=Always", "imagePullPolicy: Always"),
        ("imagePullSecrets[0].name=registry", "- name: registry"),
        ("fullnameOverride=other", "--lease-name=other"),
        ("serviceAccount.create=false,serviceAccount.name=mine", "serviceAccountName: mine"),
        ("serviceAccount.annotations.note=x", "note: x"),
        ("logLevel=debug", "value: \"debug\""),
        ("resources.limits.memory=1Gi", "memory: 1Gi"),
        ("priorityClassName=high", "priorityClassName: high"),
        ("podAnnotations.note=x", "note: x"),
        ("nodeSelector.pool=system", "pool: system"),
        ("tolerations[0].key=pool", "- key: pool"),
        ("affinity.nodeAffinity.note=x", "note: x"),
        ("podDisruptionBudget.maxUnavailable=50%", "maxUnavailable: 50%"),
        ("metrics.podMonitor.enabled=true,metrics.podMonitor.interval=5s", "interval: 5s"),
        ("metrics.podMonitor.enabled=true,metrics.podMonitor.labels.release=p", "release: p"),
        ("networkPolicy.metricsFrom[0].podSelector.matchLabels.a=b", "a: b"),
        ("networkPolicy.apiServerPorts={16443}", "port: 16443"),
    ];
    for (values, wanted) in cases {
        let all = helm_template(programs, "baton-system", &["--set", values]);
        assert!(all.contains(wanted), "--set {values} does not give {wanted:?}");
    }
    for (values, unwanted) in [
        ("podDisruptionBudget.enabled=false", "kind: PodDisruptionBudget"),
        ("networkPolicy.enabled=false", "kind: NetworkPolicy"),
        ("rbac.create=false", "rbac.authorization.k8s.io"),
        ("serviceAccount.create=false,serviceAccount.name=mine", "kind: ServiceAccount\nmetadata"),
    ] {
        let all = helm_template(programs, "baton-system", &["--set", values]);
        assert!(!all.contains(unwanted), "--set {values} still gives {unwanted:?}");
    }
}

fn replicas(objects: &BTreeMap<Key, Value>, kind: &str, name: &str) -> Option<i64> {
    objects.get(&(kind.to_owned(), String::new(), name.to_owned()))?["spec"]["replicas"].as_i64()
}

const WORKLOADS: [(&str, &str); 4] = [
    ("Deployment", "modelservice-prefill"),
    ("Deployment", "modelservice-decode"),
    ("LeaderWorkerSet", "modelservice-prefill-lws"),
    ("LeaderWorkerSet", "modelservice-decode-lws"),
];

/// A kustomization of its own, of the base and these components, in the checkout because kustomize leaves no folder upwards
/// but by a relative path.
fn composed(programs: &Path, components: &[&str]) -> BTreeMap<Key, Value> {
    let folder = tempfile::Builder::new()
        .prefix("composed-")
        .tempdir_in(repo::root().join("target"))
        .expect("the target folder can be written");
    let components: Vec<String> = components.iter().map(|name| format!("../../kustomize/components/{name}")).collect();
    let kustomization = json!({"resources": ["../../kustomize/base"], "components": components});
    std::fs::write(folder.path().join("kustomization.yaml"), kustomization.to_string()).expect("a file can be written");
    by_key(&kustomize(programs, folder.path().to_str().expect("a path of ours is text")))
}

#[test]
fn the_base_has_four_workloads_without_replicas() {
    let Some(programs) = programs() else { return };
    let base = by_key(&kustomize(programs, "kustomize/base"));
    for (kind, name) in WORKLOADS {
        assert_eq!(replicas(&base, kind, name), Some(0), "{kind} {name}");
    }
    let workloads = base.keys().filter(|(kind, ..)| kind == "Deployment" || kind == "LeaderWorkerSet");
    assert_eq!(workloads.count(), WORKLOADS.len());
}

#[test]
fn components_raise_the_replicas_that_they_are_for() {
    let Some(programs) = programs() else { return };
    let cases: &[(&[&str], [i64; 4])] = &[
        (&["prefill-disaggregation"], [1, 0, 0, 0]),
        (&["routing-proxy", "prefill-disaggregation"], [1, 0, 0, 0]),
        (&["prefill-disaggregation", "multinode"], [0, 0, 1, 1]),
    ];
    for (components, expected) in cases {
        let objects = composed(programs, components);
        for ((kind, name), expected) in WORKLOADS.into_iter().zip(expected) {
            assert_eq!(replicas(&objects, kind, name), Some(*expected), "{components:?}: {kind} {name}");
        }
    }
}

#[test]
fn pods_of_each_role_are_found_by_the_fields_label() {
    let Some(programs) = programs() else { return };
    let objects = composed(programs, &["routing-proxy"]);
    for (kind, name) in WORKLOADS {
        let spec = &objects[&(kind.to_owned(), String::new(), name.to_owned())]["spec"];
        let template =
            if kind == "Deployment" { &spec["template"] } else { &spec["leaderWorkerTemplate"]["leaderTemplate"] };
        let role = if name.contains("prefill") { "prefill" } else { "decode" };
        assert_eq!(template["metadata"]["labels"]["llm-d.ai/role"], role, "{name}");
        let sidecar = &template["spec"]["initContainers"][0];
        assert_eq!(
            (&sidecar["name"], &sidecar["restartPolicy"]),
            (&json!("routing-proxy"), &json!("Always")),
            "{name}"
        );
    }
}

#[test]
fn without_leaderworkersets_no_kind_is_left_that_kubernetes_lacks() {
    let Some(programs) = programs() else { return };
    let objects = by_key(&kustomize(programs, "kustomize/overlays/modelservice"));
    assert!(objects.values().all(|object| !text(&object["apiVersion"]).starts_with("leaderworkerset")));
    assert_eq!(replicas(&objects, "Deployment", "modelservice-prefill"), Some(1));
    assert_eq!(replicas(&objects, "Deployment", "modelservice-decode"), Some(1));
}

/// Everything that is rendered, by what it is rendered from.
fn everything(programs: &Path) -> Vec<(&'static str, String)> {
    let mut all = vec![
        ("helm-cluster", helm_template(programs, "baton-system", &[])),
        ("helm-namespaced", helm_template(programs, "baton-system", &["--set", "watchNamespaces={baton-system}"])),
    ];
    for folder in ["operator/cluster", "operator/namespaced", "overlays/modelservice"] {
        all.push((folder, kustomize(programs, &format!("kustomize/{folder}"))));
    }
    all
}

/// Pods of a manifest's Deployments, as their controller would make them, in a namespace.
fn pods(manifest: &str, namespace: &str) -> String {
    let mut text_of_all = String::new();
    for deployment in documents(manifest).into_iter().filter(|object| object["kind"] == "Deployment") {
        let mut pod = deployment["spec"]["template"].clone();
        pod["apiVersion"] = json!("v1");
        pod["kind"] = json!("Pod");
        pod["metadata"]["name"] = deployment["metadata"]["name"].clone();
        pod["metadata"]["namespace"] = json!(namespace);
        // Its account may be the controller's to make; the admission of the pod is what is asked.
        if let Some(spec) = pod["spec"].as_object_mut() {
            spec.remove("serviceAccountName");
        }
        let _ = writeln!(text_of_all, "---\n{pod}");
    }
    text_of_all
}

#[test]
fn a_real_api_server_takes_all_that_is_rendered_and_pod_security_its_pods() {
    let Some(programs) = programs() else { return };
    let Some(plane) = ControlPlane::shared(Tier::Api) else { return };
    plane.install_crds(&read("crds/disaggregatedmodels.baton.dev.yaml")).expect("the definition is taken");
    for (what, manifest) in everything(programs) {
        let namespace = plane.restricted_namespace("render").expect("a namespace");
        let placed = manifest
            .replace("namespace: baton-system", &format!("namespace: {}", namespace.name()))
            .replace("namespace: baton\n", &format!("namespace: {}\n", namespace.name()));
        let arguments =
            ["apply", "--server-side", "--dry-run=server", "--validate=strict", "-n", namespace.name(), "-f", "-"];
        plane
            .kubectl_with(&arguments, &placed)
            .and_then(|ran| ran.ok())
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let pods = pods(&placed, namespace.name());
        let arguments = ["create", "--dry-run=server", "--validate=strict", "-f", "-"];
        plane
            .kubectl_with(&arguments, &pods)
            .and_then(|ran| ran.ok())
            .unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

/// One accepted finding of checkov: where, and why it stands.
#[derive(serde::Deserialize)]
struct Accepted {
    check: String,
    /// Words of which one is in the finding's resource or file.
    resources: Vec<String>,
    reason: String,
}

#[test]
fn checkov_finds_nothing_that_has_no_written_reason() {
    let Some(programs) = programs() else { return };
    let script = Command::new(repo::root().join("scripts/checkov")).arg("--installed").output();
    let said = script.expect("scripts/checkov can be started");
    if !said.status.success() {
        return skip(String::from_utf8_lossy(&said.stderr).trim());
    }
    let checkov = String::from_utf8_lossy(&said.stdout).trim().to_owned();
    // Not a hidden folder, as temporary ones are: checkov passes those over.
    let folder = tempfile::Builder::new().prefix("rendered-").tempdir().expect("a folder for what is rendered");
    for (what, manifest) in everything(programs) {
        let file = folder.path().join(format!("{}.yaml", what.replace('/', "-")));
        std::fs::write(file, manifest).expect("what is rendered can be written");
    }
    let accepted: Vec<Accepted> =
        serde_yaml::from_str(&read("tests/checkov/accepted.yaml")).expect("the list of reasons is YAML");
    assert!(accepted.iter().all(|one| one.reason.len() > 20), "each accepted finding has its reason");

    let mut used = vec![false; accepted.len()];
    let mut findings = Vec::new();
    let mut passed = 0;
    for (framework, place) in [("kubernetes", folder.path().to_owned()), ("dockerfile", repo::root().join("images"))] {
        let output = Command::new(&checkov)
            .args(["--framework", framework, "--output", "json", "--compact", "--quiet", "--skip-download", "-d"])
            .arg(&place)
            // It works offline; whatever it would ask for is refused at once.
            .env("HTTPS_PROXY", "http://127.0.0.1:9")
            .output()
            .expect("checkov can be started");
        let said = String::from_utf8_lossy(&output.stdout);
        let report: Value = serde_json::from_str(&said)
            .unwrap_or_else(|error| panic!("checkov: {error}: {said}{}", String::from_utf8_lossy(&output.stderr)));
        passed += report["summary"]["passed"].as_u64().unwrap_or_default();
        for finding in report["results"]["failed_checks"].as_array().into_iter().flatten() {
            let (check, resource) = (text(&finding["check_id"]), text(&finding["resource"]));
            let place = format!("{} {resource}", text(&finding["file_path"]));
            let reason = accepted
                .iter()
                .position(|one| one.check == check && one.resources.iter().any(|word| place.contains(word.as_str())));
            match reason {
                Some(number) => used[number] = true,
                None => findings.push(format!("{check} {} at {place}", text(&finding["check_name"]))),
            }
        }
    }
    assert!(passed > 400, "checkov looked at next to nothing: {passed} checks passed");
    assert!(findings.is_empty(), "{findings:#?}");
    for (one, used) in accepted.iter().zip(used) {
        assert!(used, "{} is accepted for {:?}, and checkov does not find it any more", one.check, one.resources);
    }
}
