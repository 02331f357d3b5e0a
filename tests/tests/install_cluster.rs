//! Installing and uninstalling on a real Kubernetes API: what comes, what goes, and what stays.

use kube::api::DynamicObject;
use kube::{Api, Client, Discovery, discovery::verbs};
use std::collections::BTreeSet;
use system_tests::kube::{ControlPlane, Tier, skip};
use system_tests::repo;

/// A model, to see what becomes of users' objects.
const MODEL: &str = "
apiVersion: baton.dev/v1alpha1
kind: DisaggregatedModel
metadata:
  name: kept
spec:
  model:
    uri: pvc://models/tiny
";

/// Kinds that the API server makes by itself whenever it likes.
const ITS_OWN: [&str; 7] =
    ["Event", "IPAddress", "Lease", "EndpointSlice", "Endpoints", "APIService", "ComponentStatus"];

/// Every object of the cluster: kind, namespace and name.
async fn inventory(client: &Client) -> anyhow::Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    let discovery = Discovery::new(client.clone()).run().await?;
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            if !capabilities.supports_operation(verbs::LIST) || ITS_OWN.contains(&resource.kind.as_str()) {
                continue;
            }
            let objects: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
            for object in objects.list(&Default::default()).await? {
                let metadata = object.metadata;
                let (namespace, name) = (metadata.namespace.unwrap_or_default(), metadata.name.unwrap_or_default());
                all.insert(format!("{} {namespace}/{name}", resource.kind));
            }
        }
    }
    Ok(all)
}

/// A control plane of this test alone, and a way to look at all of it.
struct Cluster {
    plane: ControlPlane,
    runtime: tokio::runtime::Runtime,
}

impl Cluster {
    fn start() -> Option<Self> {
        let plane = ControlPlane::start(Tier::Api).or_skip()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Some(Cluster { plane, runtime })
    }

    fn inventory(&self) -> BTreeSet<String> {
        self.runtime
            .block_on(async { inventory(&self.plane.client().await?).await })
            .expect("the cluster can be looked at")
    }

    fn kubectl(&self, arguments: &[&str], input: &str) -> String {
        self.plane.kubectl_with(arguments, input).and_then(|ran| ran.ok()).expect("kubectl")
    }

    fn helm(&self, arguments: &[&str]) -> String {
        self.plane.helm(arguments).and_then(|ran| ran.ok()).expect("helm")
    }

    /// Applies the model once its kind is served: an established definition is not yet that.
    fn apply_model(&self, namespace: &str) {
        let definition = std::fs::read_to_string(repo::root().join("crds/disaggregatedmodels.baton.dev.yaml"));
        self.plane.install_crds(&definition.expect("the definition is generated")).expect("the kind is served");
        self.kubectl(&["apply", "--server-side", "-n", namespace, "-f", "-"], MODEL);
    }
}

fn operator_of(namespace: &str) -> BTreeSet<String> {
    ["Deployment", "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount"]
        .map(|kind| format!("{kind} {namespace}/baton-operator"))
        .into_iter()
        .chain(["Role", "RoleBinding"].map(|kind| format!("{kind} {namespace}/baton-operator-lease")))
        .chain([format!("Service {namespace}/baton-operator-metrics")])
        .collect()
}

fn cluster_wide() -> [String; 4] {
    [
        "ClusterRole /baton-operator",
        "ClusterRole /baton-operator-edit",
        "ClusterRole /baton-operator-view",
        "ClusterRoleBinding /baton-operator",
    ]
    .map(str::to_owned)
}

const DEFINITION: &str = "CustomResourceDefinition /disaggregatedmodels.baton.dev";

fn came(before: &BTreeSet<String>, after: &BTreeSet<String>) -> BTreeSet<String> {
    let gone: Vec<&String> = before.difference(after).collect();
    assert!(gone.is_empty(), "what was there before is gone: {gone:?}");
    after.difference(before).cloned().collect()
}

#[test]
fn helm_installs_what_it_says_and_uninstalls_all_but_the_api_and_the_models() {
    let Some(cluster) = Cluster::start() else { return };
    cluster.kubectl(&["create", "namespace", "baton-system"], "");
    cluster.kubectl(&["create", "namespace", "users"], "");
    let before = cluster.inventory();

    cluster.helm(&["install", "baton", "charts/baton", "-n", "baton-system"]);
    let mut expected = operator_of("baton-system");
    expected.extend(cluster_wide());
    expected.insert(DEFINITION.to_owned());
    let mut installed = came(&before, &cluster.inventory());
    // Helm's own record of the release.
    assert!(installed.remove("Secret baton-system/sh.helm.release.v1.baton.v1"));
    assert_eq!(installed, expected);

    cluster.apply_model("users");
    cluster.helm(&["uninstall", "baton", "-n", "baton-system"]);
    let stays = came(&before, &cluster.inventory());
    assert_eq!(stays, BTreeSet::from([DEFINITION.to_owned(), "DisaggregatedModel users/kept".to_owned()]));
}

#[test]
fn helm_installs_for_named_namespaces_without_a_cluster_role() {
    let Some(cluster) = Cluster::start() else { return };
    for namespace in ["ops", "team-a", "team-b"] {
        cluster.kubectl(&["create", "namespace", namespace], "");
    }
    let before = cluster.inventory();
    let values = "watchNamespaces={team-a,team-b}";
    cluster.helm(&["install", "baton", "charts/baton", "-n", "ops", "--set", values]);
    let mut expected = operator_of("ops");
    expected.insert(DEFINITION.to_owned());
    for namespace in ["team-a", "team-b"] {
        expected.extend(["Role", "RoleBinding"].map(|kind| format!("{kind} {namespace}/baton-operator")));
    }
    let mut installed = came(&before, &cluster.inventory());
    assert!(installed.remove("Secret ops/sh.helm.release.v1.baton.v1"));
    assert_eq!(installed, expected);

    cluster.helm(&["uninstall", "baton", "-n", "ops"]);
    assert_eq!(came(&before, &cluster.inventory()), BTreeSet::from([DEFINITION.to_owned()]));
}

#[test]
fn kustomize_installs_the_same_and_deletes_all_but_the_api_and_the_models() {
    let Some(cluster) = Cluster::start() else { return };
    cluster.kubectl(&["create", "namespace", "users"], "");
    let before = cluster.inventory();
    let apply = ["apply", "--server-side", "-k", "kustomize/overlays/cluster"];
    cluster.kubectl(&apply, "");
    let mut expected = operator_of("baton-system");
    expected.extend(cluster_wide());
    expected.extend([DEFINITION.to_owned(), "Namespace /baton-system".to_owned()]);
    assert_eq!(came(&before, &cluster.inventory()), expected);

    // A second apply changes nothing.
    let again = cluster.kubectl(&["diff", "--server-side", "-k", "kustomize/overlays/cluster"], "");
    assert_eq!(again, "");

    cluster.apply_model("users");
    cluster.kubectl(&["delete", "-k", "kustomize/operator/cluster"], "");
    let stays = came(&before, &cluster.inventory());
    let expected = [DEFINITION, "DisaggregatedModel users/kept", "Namespace /baton-system"].map(str::to_owned);
    assert_eq!(stays, BTreeSet::from(expected));
}

#[test]
fn the_definition_is_upgraded_by_server_side_apply_after_helm_installed_it() {
    let Some(cluster) = Cluster::start() else { return };
    cluster.kubectl(&["create", "namespace", "baton-system"], "");
    cluster.helm(&["install", "baton", "charts/baton", "-n", "baton-system"]);
    cluster.kubectl(&["apply", "--server-side", "--force-conflicts", "-k", "crds"], "");
    // From then on kubectl owns it, and a later one needs no force.
    cluster.kubectl(&["apply", "--server-side", "-k", "crds"], "");
    cluster.helm(&["upgrade", "baton", "charts/baton", "-n", "baton-system", "--set", "replicas=1"]);
    let replicas = ["get", "deployment", "baton-operator", "-n", "baton-system", "-o", "jsonpath={.spec.replicas}"];
    assert_eq!(cluster.kubectl(&replicas, ""), "1");
}

#[test]
fn argo_cds_script_stands_in_its_config_map() {
    let read =
        |path: &str| std::fs::read_to_string(repo::root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let map: serde_json::Value =
        serde_yaml::from_str(&read("docs/gitops/argocd-cm.yaml")).expect("a ConfigMap is YAML");
    let key = "resource.customizations.health.baton.dev_DisaggregatedModel";
    assert_eq!(map["data"][key].as_str(), Some(read("docs/gitops/argocd-health.lua").as_str()));
}

#[test]
fn argo_cds_script_tells_the_health_of_each_status() {
    let Some(lua) = ["lua", "lua5.4", "lua5.3", "lua5.1"]
        .into_iter()
        .find(|name| std::process::Command::new(name).arg("-v").output().is_ok_and(|output| output.status.success()))
    else {
        return skip("no Lua here (Debian: lua5.4)");
    };
    let condition =
        |kind: &str, status: &str| format!("{{type=\"{kind}\", status=\"{status}\", reason=\"R\", message=\"m\"}}");
    let status = |generation: u32, conditions: &[String]| {
        format!("{{observedGeneration={generation}, conditions={{{}}}}}", conditions.join(","))
    };
    let cases = [
        ("nil".to_owned(), "Progressing"),
        ("{}".to_owned(), "Progressing"),
        (status(1, &[condition("Ready", "True")]), "Progressing"),
        (status(2, &[condition("Ready", "True")]), "Healthy"),
        (status(2, &[condition("Ready", "False")]), "Progressing"),
        (status(2, &[condition("Ready", "Unknown")]), "Progressing"),
        (status(2, &[condition("Ready", "False"), condition("Stalled", "True")]), "Degraded"),
        (status(2, &[condition("Stalled", "False"), condition("Ready", "True")]), "Healthy"),
    ];
    for (status, expected) in cases {
        let program = format!(
            "obj = {{metadata={{generation=2}}, status={status}}}\nlocal health = dofile(\"docs/gitops/argocd-health.lua\")\nprint(health.status)"
        );
        let output = std::process::Command::new(lua).args(["-e", &program]).current_dir(repo::root()).output();
        let output = output.expect("Lua can be started");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            expected,
            "{status}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
