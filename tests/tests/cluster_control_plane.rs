//! The test cluster itself: what it gives tests comes up, and nothing of it stays.

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Api, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};
use system_tests::kube::node::Node;
use system_tests::kube::{ControlPlane, LAST_WORDS, Tier, client_of, eventually, say};

const PATIENCE: Duration = Duration::from_secs(60);

fn lives(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).exists()
}

#[tokio::test]
async fn the_api_tier_checks_and_keeps_objects_and_goes_without_a_trace() -> Result<()> {
    let Some(plane) = ControlPlane::start(Tier::Api).or_skip() else { return Ok(()) };
    say(&format!("api tier: ready after {:?}", plane.startup()));
    let Ok(folder) = plane.own_folder().map(Path::to_owned) else { return Ok(()) };
    let processes = plane.processes();

    let namespace = plane.namespace("api")?;
    let audit = plane.audit()?;
    let maps: Api<ConfigMap> = Api::namespaced(plane.client().await?, namespace.name());
    let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "kept" }, "data": { "a": "b" } });
    maps.patch("kept", &PatchParams::apply("tests"), &Patch::Apply(&map)).await?;
    let version = plane.kubectl(&["version"])?.ok()?;
    ensure!(version.contains("Server Version: v1.36"), "{version}");

    plane.kubectl(&["create", "serviceaccount", "reader", "-n", namespace.name()])?.ok()?;
    let as_reader = client_of(&plane.kubeconfig_for_service_account(namespace.name(), "reader")?).await?;
    let refused = Api::<ConfigMap>::namespaced(as_reader, namespace.name()).get("kept").await;
    ensure!(matches!(&refused, Err(kube::Error::Api(status)) if status.code == 403), "{refused:?}");
    let user = format!("system:serviceaccount:{}:reader", namespace.name());
    eventually(PATIENCE, "the refusal is on record", async || {
        Ok(audit.requests_of(&user)?.into_iter().find(|request| request.is_forbidden() && request.name == "kept"))
    })
    .await?;
    let writes =
        audit.requests_of("test-admin")?.into_iter().filter(|r| r.is_write() && r.resource == "configmaps").count();
    ensure!(writes == 1, "{writes} writes");

    let begun = Instant::now();
    plane.restart_api_server()?;
    say(&format!("api server: back after {:?}", begun.elapsed()));
    let kept: Api<ConfigMap> = Api::namespaced(plane.client().await?, namespace.name());
    ensure!(kept.get("kept").await?.data.context("data")?.contains_key("a"), "the object has stayed");

    let restricted = plane.restricted_namespace("strict")?;
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: root}\nspec: {containers: [{name: c, image: i}]}\n";
    let said = plane.kubectl_with(&["apply", "-n", restricted.name(), "-f", "-"], pod)?;
    ensure!(!said.success && said.stderr.contains("restricted"), "{said:?}");

    drop((namespace, restricted));
    let begun = Instant::now();
    drop(plane);
    say(&format!("api tier: gone after {:?}", begun.elapsed()));
    ensure!(!folder.exists(), "{} is left", folder.display());
    ensure!(!processes.iter().any(|&(_, pid)| lives(pid)), "a process is left of {processes:?}");
    Ok(())
}

#[tokio::test]
async fn on_hollow_nodes_workloads_become_what_their_images_say() -> Result<()> {
    let tier = Tier::Behaviour { nodes: 2, lws: true };
    let Some(plane) = ControlPlane::start(tier).or_skip() else { return Ok(()) };
    say(&format!(
        "behaviour tier with two nodes and the LeaderWorkerSet controller: ready after {:?}",
        plane.startup()
    ));
    let folder = plane.own_folder()?.to_owned();
    let namespace = plane.namespace("behaviour")?;
    let client = plane.client().await?;
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), namespace.name());
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace.name());
    let params = PatchParams::apply("tests");

    let begun = Instant::now();
    for (name, image) in
        [("fine", "fine:1"), ("crashing", "crashes:1"), ("missing", "never-pulls:1"), ("slow", "never-ready:1")]
    {
        deployments.patch(name, &params, &Patch::Apply(deployment(name, image))).await?;
    }
    eventually(PATIENCE, "the Deployment is available", async || {
        let status = deployments.get_status("fine").await?.status.context("a status")?;
        Ok((status.available_replicas == Some(3)).then_some(()))
    })
    .await?;
    say(&format!("three pods with init container and sidecar: available after {:?}", begun.elapsed()));
    let of = async |name: &str| -> Result<Vec<Value>> {
        let list = pods.list(&ListParams::default().labels(&format!("app={name}"))).await?;
        list.items.iter().map(|pod| Ok(serde_json::to_value(&pod.status)?)).collect()
    };
    let fine = of("fine").await?;
    let sidecar = &fine[0]["initContainerStatuses"][1];
    ensure!(sidecar["ready"] == true && sidecar["state"]["running"].is_object(), "the sidecar runs: {sidecar}");
    ensure!(fine[0]["podIP"] != fine[1]["podIP"], "pods have addresses of their own: {fine:?}");

    eventually(PATIENCE, "the crash's last words", async || {
        let statuses = of("crashing").await?;
        let status = statuses.first().context("a pod")?;
        let text = status["containerStatuses"][0].to_string();
        Ok((text.contains(LAST_WORDS) && text.contains("CrashLoopBackOff")).then_some(()))
    })
    .await?;
    eventually(PATIENCE, "the image that can't be pulled", async || {
        let statuses = of("missing").await?;
        let text = statuses.first().context("a pod")?["containerStatuses"][0]["state"].to_string();
        Ok((text.contains("ErrImagePull") || text.contains("ImagePullBackOff")).then_some(()))
    })
    .await?;
    let slow = of("slow").await?;
    ensure!(slow[0]["containerStatuses"][0]["ready"] == false, "never ready: {slow:?}");

    let kind = GroupVersionKind::gvk("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet");
    let resource = kube::api::ApiResource::from_gvk(&kind);
    let groups: Api<DynamicObject> = Api::namespaced_with(client, namespace.name(), &resource);
    let begun = Instant::now();
    groups.patch("groups", &params, &Patch::Apply(lws())).await?;
    eventually(PATIENCE, "the groups are available", async || {
        let groups = groups.get("groups").await?;
        Ok((groups.data["status"]["readyReplicas"] == 2).then_some(()))
    })
    .await?;
    say(&format!("two groups of two: ready after {:?}", begun.elapsed()));

    let begun = Instant::now();
    plane.kubectl(&["delete", "deployment,leaderworkerset", "--all", "-n", namespace.name()])?.ok()?;
    eventually(PATIENCE, "the pods are gone", async || {
        Ok(pods.list(&ListParams::default()).await?.items.is_empty().then_some(()))
    })
    .await?;
    say(&format!("pods: gone after {:?}", begun.elapsed()));

    let processes = plane.processes();
    drop(namespace);
    drop(plane);
    ensure!(!folder.exists(), "{} is left", folder.display());
    ensure!(!processes.iter().any(|&(_, pid)| lives(pid)), "a process is left of {processes:?}");
    Ok(())
}

fn deployment(name: &str, image: &str) -> Value {
    let replicas = if name == "fine" { 3 } else { 1 };
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": { "name": name },
        "spec": {
            "replicas": replicas,
            "selector": { "matchLabels": { "app": name } },
            "template": {
                "metadata": { "labels": { "app": name } },
                "spec": {
                    "initContainers": [
                        { "name": "fetch", "image": "fetch:1" },
                        { "name": "sidecar", "image": "sidecar:1", "restartPolicy": "Always",
                          "startupProbe": { "httpGet": { "port": 8000, "path": "/" } } },
                    ],
                    "containers": [{
                        "name": "engine",
                        "image": image,
                        "terminationMessagePolicy": "FallbackToLogsOnError",
                        "readinessProbe": { "httpGet": { "port": 8200, "path": "/" } },
                        "resources": { "limits": { "nvidia.com/gpu": "1" } },
                        "volumeMounts": [{ "name": "model", "mountPath": "/model" }],
                    }],
                    "volumes": [{ "name": "model", "image": { "reference": "model:1" } }],
                },
            },
        },
    })
}

fn lws() -> Value {
    let template = json!({ "spec": { "containers": [{ "name": "engine", "image": "fine:1" }] } });
    json!({
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": { "name": "groups" },
        "spec": { "replicas": 2, "leaderWorkerTemplate": { "size": 2, "workerTemplate": template } },
    })
}

#[tokio::test]
async fn a_real_node_runs_a_pod_and_goes_without_a_trace() -> Result<()> {
    let Some(plane) = ControlPlane::start(Tier::Node).or_skip() else { return Ok(()) };
    let mounts = || std::fs::read_to_string("/proc/self/mounts");
    let before = mounts()?;
    let Some(node) = Node::start(&plane)? else { return Ok(()) };
    say(&format!("control plane: ready after {:?}; node: after {:?} more", plane.startup(), node.startup()));
    let folder = plane.own_folder()?.to_owned();
    let namespace = plane.namespace("node")?;
    let in_namespace = ["-n", namespace.name()];

    // The pause image is the one image that every machine has; as a container it runs until it is told to end.
    let begun = Instant::now();
    let host_path = tempfile::tempdir()?;
    let manifest = json!({ "apiVersion": "v1", "kind": "List", "items": [volume(namespace.name(), host_path.path()), claim(), pod(), service()] });
    plane.kubectl_with(&[&["apply", "-f", "-"][..], &in_namespace].concat(), &manifest.to_string())?.ok()?;
    plane
        .kubectl(&[&["wait", "pod/runs", "--for=condition=Ready", "--timeout=60s"][..], &in_namespace].concat())?
        .ok()?;
    say(&format!("a pod with a claim: ready after {:?}", begun.elapsed()));
    let ip = plane
        .kubectl(&[&["get", "pod", "runs", "-o", "jsonpath={.status.podIP}"][..], &in_namespace].concat())?
        .ok()?;
    ensure!(ip.starts_with("10.214.0."), "{ip}");
    let logs = node.logs(namespace.name(), "runs", "pause")?;
    ensure!(logs.is_empty(), "it says nothing: {logs}");

    let begun = Instant::now();
    plane.kubectl(&[&["delete", "pod", "runs", "--wait=true", "--timeout=60s"][..], &in_namespace].concat())?.ok()?;
    say(&format!("the pod: gone after {:?}", begun.elapsed()));
    let begun = Instant::now();
    drop(namespace);
    drop(plane);
    say(&format!("node and control plane: gone after {:?}", begun.elapsed()));
    ensure!(!folder.exists(), "{} is left", folder.display());
    ensure!(mounts()? == before, "mounts are left: {}", mounts()?);
    let link = format!("/sys/class/net/baton{}", std::process::id());
    ensure!(!Path::new(&link).exists(), "{link} is left");
    ensure!(!Path::new(&format!("/sys/fs/cgroup/cpu/baton-{}", std::process::id())).exists(), "a cgroup is left");
    Ok(())
}

fn pod() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": "runs", "labels": { "app": "runs" } },
        "spec": {
            "terminationGracePeriodSeconds": 5,
            "containers": [{
                "name": "pause",
                "image": "docker.io/baton/pause:test",
                "volumeMounts": [{ "name": "model", "mountPath": "/model", "readOnly": true }],
            }],
            "volumes": [{ "name": "model", "persistentVolumeClaim": { "claimName": "model" } }],
        },
    })
}

fn claim() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": { "name": "model" },
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "resources": { "requests": { "storage": "1Mi" } },
        },
    })
}

fn volume(namespace: &str, path: &Path) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": { "name": namespace },
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "capacity": { "storage": "1Mi" },
            "storageClassName": "",
            "hostPath": { "path": path },
            "claimRef": { "namespace": namespace, "name": "model" },
        },
    })
}

fn service() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": "runs" },
        "spec": { "selector": { "app": "runs" }, "ports": [{ "port": 80 }] },
    })
}
