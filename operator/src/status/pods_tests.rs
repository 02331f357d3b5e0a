//! Pod statuses as kubelets, schedulers and node controllers write them, and what is made of each.

use super::*;
use serde_json::{Value, json};

/// A decode pod that takes work.
fn ready() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "tiny-decode-aaaaaaaa-5d9f4-x2x7p",
            "namespace": "default",
            "labels": {"baton.dev/model": "tiny", "baton.dev/workload-role": "decode", "baton.dev/revision": "aaaaaaaa"},
        },
        "spec": {
            "nodeName": "node-1",
            "initContainers": [
                {"name": "model-download", "image": "baton/worker:0.1.0"},
                {"name": "routing-proxy", "image": "baton/proxy:0.1.0", "restartPolicy": "Always"},
            ],
            "containers": [{"name": "engine", "image": "baton/worker:0.1.0", "resources": {"limits": {"memory": "8Gi"}}}],
        },
        "status": {
            "phase": "Running",
            "startTime": "2026-01-30T08:00:00Z",
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Initialized", "status": "True"},
                {"type": "ContainersReady", "status": "True"},
                {"type": "Ready", "status": "True"},
            ],
            "initContainerStatuses": [
                container("model-download", json!({"terminated": {"exitCode": 0, "reason": "Completed"}}), true),
                container("routing-proxy", json!({"running": {"startedAt": "2026-01-30T08:00:05Z"}}), true),
            ],
            "containerStatuses": [container("engine", json!({"running": {"startedAt": "2026-01-30T08:00:06Z"}}), true)],
        },
    })
}

fn container(name: &str, state: Value, ready: bool) -> Value {
    json!({
        "name": name, "image": "", "imageID": "", "restartCount": 0, "ready": ready, "started": ready,
        "state": state, "lastState": {},
    })
}

/// The engine in this state, and so the pod not ready.
fn engine(state: Value) -> Value {
    let mut pod = ready();
    pod["status"]["containerStatuses"] = json!([container("engine", state, false)]);
    unready(pod)
}

/// An init container in this state, and what comes after it waiting.
fn init(name: &str, state: Value) -> Value {
    let mut pod = engine(json!({"waiting": {"reason": "PodInitializing"}}));
    let which = if name == "model-download" { 0 } else { 1 };
    pod["status"]["initContainerStatuses"][which] = container(name, state, false);
    if which == 0 {
        pod["status"]["initContainerStatuses"][1] =
            container("routing-proxy", json!({"waiting": {"reason": "PodInitializing"}}), false);
    }
    pod["status"]["phase"] = json!("Pending");
    pod
}

fn unready(mut pod: Value) -> Value {
    for which in [2, 3] {
        pod["status"]["conditions"][which]["status"] = json!("False");
    }
    pod
}

/// A pod that the scheduler can't place, in its words.
fn pending(reason: &str, message: &str) -> Value {
    let mut pod = ready();
    pod["spec"]["nodeName"] = Value::Null;
    pod["status"] = json!({
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "False", "reason": reason, "message": message}],
    });
    pod
}

fn with(mut pod: Value, pointer: &str, value: Value) -> Value {
    let (parent, field) = pointer.rsplit_once('/').expect("a path");
    pod.pointer_mut(parent).expect("it is there")[field] = value;
    pod
}

fn terminated(code: i32, reason: &str, message: &str) -> Value {
    json!({"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": "2026-01-30T08:15:00Z"}})
}

#[track_caller]
fn check(pod: Value, expect: Option<(Reason, &str)>) {
    let pod: Pod = serde_json::from_value(pod).expect("a pod");
    let found = holdup(&pod);
    assert_eq!(found.as_ref().map(|found| (found.reason, found.message.as_str())), expect);
}

#[test]
fn a_pod_that_takes_work_has_no_trouble() {
    check(ready(), None);
    // What it went through on its way is over.
    let restarted = with(ready(), "/status/containerStatuses/0/lastState", terminated(1, "Error", "no such file"));
    check(restarted, None);
}

#[test]
fn a_pod_that_is_only_just_there_waits() {
    check(json!({"metadata": {"name": "p"}}), Some((Reason::WaitingForPods, "waits for a node")));
    check(
        json!({"metadata": {"name": "p"}, "status": {"phase": "Pending"}}),
        Some((Reason::WaitingForPods, "waits for a node")),
    );
    check(
        engine(json!({"waiting": {"reason": "ContainerCreating"}})),
        Some((Reason::WaitingForPods, "its containers are being started")),
    );
    check(
        init("model-download", json!({"waiting": {"reason": "PodInitializing"}})),
        Some((Reason::WaitingForPods, "its containers are being started")),
    );
}

#[test]
fn what_the_scheduler_says_is_told_in_its_words() {
    check(
        pending(
            "Unschedulable",
            "0/3 nodes are available: 1 node(s) had untolerated taint(s), 2 Insufficient nvidia.com/gpu. no new claims to deallocate, preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling.",
        ),
        Some((
            Reason::InsufficientCapacity,
            "no node takes it: 0/3 nodes are available: 1 node(s) had untolerated taint(s), 2 Insufficient nvidia.com/gpu. no new claims to deallocate, preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling",
        )),
    );
    check(
        pending("Unschedulable", "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."),
        Some((
            Reason::InsufficientCapacity,
            "no node takes it: 0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector",
        )),
    );
    check(
        pending("SchedulingGated", "Scheduling is blocked due to non-empty scheduling gates"),
        Some((
            Reason::WaitingForPods,
            "waits for its scheduling gates: Scheduling is blocked due to non-empty scheduling gates",
        )),
    );
}

#[test]
fn a_claim_that_is_missing_or_not_bound_is_told_apart_from_a_lack_of_room() {
    check(
        pending(
            "Unschedulable",
            "0/1 nodes are available: persistentvolumeclaim \"models\" not found. preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling.",
        ),
        Some((
            Reason::VolumeMissing,
            "0/1 nodes are available: persistentvolumeclaim \"models\" not found. preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling",
        )),
    );
    check(
        pending("Unschedulable", "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."),
        Some((Reason::VolumeMissing, "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims")),
    );
    for (claims, said) in [(&["cache"][..], "(claim cache)"), (&["cache", "data"], "(one of the claims cache, data)")] {
        let mut pod = pending("Unschedulable", "pod has unbound immediate PersistentVolumeClaims. not found");
        let volumes = claims.iter().map(|claim| json!({"name": claim, "persistentVolumeClaim": {"claimName": claim}}));
        pod["spec"]["volumes"] = volumes.collect();
        let words = format!("pod has unbound immediate PersistentVolumeClaims. not found {said}");
        check(pod, Some((Reason::VolumeMissing, words.as_str())));
    }
    check(
        pending(
            "Unschedulable",
            "0/1 nodes are available: waiting for resource claim: resourceclaim.resource.k8s.io \"gpus\" not found.",
        ),
        Some((
            Reason::ConfigurationMissing,
            "0/1 nodes are available: waiting for resource claim: resourceclaim.resource.k8s.io \"gpus\" not found",
        )),
    );
}

#[test]
fn an_image_that_cannot_be_pulled_is_named_with_the_cause_in_both_of_the_kubelets_states() {
    let cause =
        "failed to pull and unpack image \"docker.io/baton/worker:0.1.0\": failed to resolve reference: not found";
    let expect = "image baton/worker:0.1.0 of container engine can't be pulled: failed to pull and unpack image \"docker.io/baton/worker:0.1.0\": failed to resolve reference: not found";
    check(
        engine(json!({"waiting": {"reason": "ErrImagePull", "message": cause}})),
        Some((Reason::ImagePullFailed, expect)),
    );
    let backed_off = format!("Back-off pulling image \"baton/worker:0.1.0\": ErrImagePull: {cause}");
    check(
        engine(json!({"waiting": {"reason": "ImagePullBackOff", "message": backed_off}})),
        Some((Reason::ImagePullFailed, expect)),
    );
    check(
        engine(
            json!({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image \"baton/worker:0.1.0\""}}),
        ),
        Some((Reason::ImagePullFailed, "image baton/worker:0.1.0 of container engine can't be pulled")),
    );
    check(
        init(
            "routing-proxy",
            json!({"waiting": {"reason": "InvalidImageName", "message": "Failed to apply default image tag \"Baton/Proxy\": couldn't parse image name"}}),
        ),
        Some((
            Reason::ImagePullFailed,
            "image baton/proxy:0.1.0 of container routing-proxy can't be pulled: Failed to apply default image tag \"Baton/Proxy\": couldn't parse image name",
        )),
    );
    check(
        engine(
            json!({"waiting": {"reason": "ErrImageNeverPull", "message": "Container image \"baton/worker:0.1.0\" is not present with pull policy of Never"}}),
        ),
        Some((
            Reason::ImagePullFailed,
            "image baton/worker:0.1.0 of container engine can't be pulled: Container image \"baton/worker:0.1.0\" is not present with pull policy of Never",
        )),
    );
}

#[test]
fn a_secret_that_is_missing_and_a_key_in_it_are_named() {
    check(
        engine(json!({"waiting": {"reason": "CreateContainerConfigError", "message": "secret \"hub\" not found"}})),
        Some((Reason::ConfigurationMissing, "container engine can't be made: secret \"hub\" not found")),
    );
    check(
        init(
            "model-download",
            json!({"waiting": {"reason": "CreateContainerConfigError", "message": "couldn't find key HF_TOKEN in Secret default/hub"}}),
        ),
        Some((
            Reason::ConfigurationMissing,
            "container model-download can't be made: couldn't find key HF_TOKEN in Secret default/hub",
        )),
    );
    check(
        engine(
            json!({"waiting": {"reason": "CreateContainerConfigError", "message": "container has runAsNonRoot and image will run as root (pod: \"x\", container: engine)"}}),
        ),
        Some((
            Reason::EngineCrashLooping,
            "container engine can't be started (CreateContainerConfigError): container has runAsNonRoot and image will run as root (pod: \"x\", container: engine)",
        )),
    );
}

#[test]
fn an_engine_that_keeps_ending_is_told_by_its_last_line_through_all_states_of_the_loop() {
    let log =
        "loading model\nerror: /models/volume/tiny/config.json: no such file: correct the path in spec.model.uri\n";
    let expect = Some((
        Reason::EngineCrashLooping,
        "container engine ended with exit code 1: error: /models/volume/tiny/config.json: no such file: correct the path in spec.model.uri",
    ));
    check(engine(terminated(1, "Error", log)), expect);
    let last = |pod| with(pod, "/status/containerStatuses/0/lastState", terminated(1, "Error", log));
    check(
        last(engine(
            json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container=engine"}}),
        )),
        expect,
    );
    check(last(engine(json!({"running": {"startedAt": "2026-01-30T08:16:00Z"}}))), expect);
    check(
        engine(json!({"waiting": {"reason": "CrashLoopBackOff"}})),
        Some((Reason::EngineCrashLooping, "container engine ends again and again")),
    );
    // It was to run on.
    check(
        engine(terminated(0, "Completed", "")),
        Some((Reason::EngineCrashLooping, "container engine ended with exit code 0")),
    );
}

#[test]
fn an_engine_that_was_killed_for_memory_is_told_with_its_limit() {
    let killed = || engine(terminated(137, "OOMKilled", ""));
    check(
        killed(),
        Some((Reason::EngineCrashLooping, "container engine was killed at its memory limit of 8Gi (OOMKilled)")),
    );
    check(
        with(killed(), "/spec/containers/0/resources", json!({})),
        Some((
            Reason::EngineCrashLooping,
            "container engine was killed because its node ran out of memory (OOMKilled)",
        )),
    );
    check(
        engine(terminated(137, "Error", "")),
        Some((Reason::EngineCrashLooping, "container engine was killed (exit code 137)")),
    );
    check(
        engine(terminated(139, "Error", "")),
        Some((Reason::EngineCrashLooping, "container engine ended with a segmentation fault (exit code 139)")),
    );
}

#[test]
fn a_container_that_the_runtime_cannot_start_is_told_in_the_runtimes_words() {
    check(
        engine(
            json!({"waiting": {"reason": "RunContainerError", "message": "exec: \"/bin/vllm\": no such file or directory"}}),
        ),
        Some((
            Reason::EngineCrashLooping,
            "container engine can't be started (RunContainerError): exec: \"/bin/vllm\": no such file or directory",
        )),
    );
    check(
        engine(terminated(128, "StartError", "exec: \"/bin/vllm\": no such file or directory")),
        Some((
            Reason::EngineCrashLooping,
            "container engine could not be started: exec: \"/bin/vllm\": no such file or directory",
        )),
    );
}

#[test]
fn a_proxy_and_a_download_that_fail_have_reasons_of_their_own() {
    check(
        init("routing-proxy", terminated(2, "Error", "error: unexpected argument '--connector'")),
        Some((
            Reason::ProxyCrashLooping,
            "container routing-proxy ended with exit code 2: error: unexpected argument '--connector'",
        )),
    );
    let failed = terminated(1, "Error", "hf://org/repo: 401: the token in Secret hub is not valid");
    let expect = Some((
        Reason::ModelDownloadFailed,
        "container model-download ended with exit code 1: hf://org/repo: 401: the token in Secret hub is not valid",
    ));
    check(init("model-download", failed.clone()), expect);
    let last = |pod| with(pod, "/status/initContainerStatuses/0/lastState", failed.clone());
    check(last(init("model-download", json!({"waiting": {"reason": "CrashLoopBackOff"}}))), expect);
    check(last(init("model-download", json!({"running": {}}))), expect);
}

#[test]
fn a_download_that_runs_and_an_engine_that_loads_are_on_their_way() {
    check(init("model-download", json!({"running": {}})), Some((Reason::ModelDownloading, "downloads the model")));
    check(engine(json!({"running": {}})), Some((Reason::EngineStarting, "the engine loads the model")));
}

#[test]
fn an_engine_that_ran_and_takes_no_work_any_more_is_told_apart_from_one_that_starts() {
    let stopped = with(engine(json!({"running": {}})), "/status/containerStatuses/0/started", json!(true));
    check(stopped, Some((Reason::PodsNotReady, "the engine runs and does not take work")));
}

#[test]
fn a_front_door_without_decode_workers_waits_for_them() {
    let mut pod = ready();
    pod["metadata"]["labels"]["baton.dev/workload-role"] = json!("proxy");
    pod["spec"]["initContainers"] = json!([]);
    pod["spec"]["containers"] = json!([{"name": "routing-proxy", "image": "baton/proxy:0.1.0"}]);
    pod["status"]["initContainerStatuses"] = json!([]);
    pod["status"]["containerStatuses"] = json!([container("routing-proxy", json!({"running": {}}), false)]);
    pod["status"]["containerStatuses"][0]["started"] = json!(true);
    check(unready(pod), Some((Reason::WaitingForPair, "the front door waits for a decode worker that takes work")));
}

#[test]
fn a_users_own_container_is_named() {
    let mut pod = ready();
    let statuses = pod["status"]["containerStatuses"].as_array_mut().expect("a list");
    statuses.push(container("logs", terminated(1, "Error", "no disk"), false));
    check(unready(pod), Some((Reason::EngineCrashLooping, "container logs ended with exit code 1: no disk")));
}

#[test]
fn the_most_urgent_of_a_pods_containers_is_told() {
    let mut pod = engine(json!({"running": {}}));
    pod["status"]["initContainerStatuses"][1] = container("routing-proxy", terminated(2, "Error", "bad flag"), false);
    check(pod, Some((Reason::ProxyCrashLooping, "container routing-proxy ended with exit code 2: bad flag")));
}

#[test]
fn a_node_that_does_not_answer_shows_in_conditions_that_no_kubelet_writes() {
    // The node controller sets Ready alone.
    let lost = with(ready(), "/status/conditions/3/status", json!("False"));
    check(lost.clone(), Some((Reason::NodeLost, "its node node-1 does not answer: bring it back, or delete the Node")));
    let gated = with(lost, "/spec/readinessGates", json!([{"conditionType": "example.com/warm"}]));
    check(gated, Some((Reason::PodsNotReady, "waits for its readiness gate example.com/warm")));
    let mut evicted = with(ready(), "/metadata/deletionTimestamp", json!("2026-01-30T08:20:00Z"));
    evicted["status"]["conditions"]
        .as_array_mut()
        .expect("a list")
        .push(json!({"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}));
    check(evicted, Some((Reason::NodeLost, "its node node-1 does not answer or is tainted NoExecute")));
    check(
        with(ready(), "/status/reason", json!("NodeLost")),
        Some((Reason::NodeLost, "its node node-1 does not answer or is tainted NoExecute")),
    );
}

#[test]
fn a_pod_on_its_way_out_is_no_trouble_of_its_own() {
    let leaving = with(ready(), "/metadata/deletionTimestamp", json!("2026-01-30T08:20:00Z"));
    check(leaving, Some((Reason::PodsNotReady, "finishes what it has and ends")));
}

#[test]
fn pods_that_ended_as_a_whole_say_why() {
    let failed = |reason: &str, message: &str| {
        let mut pod = ready();
        pod["status"] = json!({"phase": "Failed", "reason": reason, "message": message});
        pod
    };
    check(
        failed("Evicted", "The node was low on resource: memory. Threshold quantity: 100Mi, available: 64Mi. "),
        Some((
            Reason::InsufficientCapacity,
            "Evicted: The node was low on resource: memory. Threshold quantity: 100Mi, available: 64Mi",
        )),
    );
    check(
        failed(
            "UnexpectedAdmissionError",
            "Allocate failed due to requested number of devices unavailable for nvidia.com/gpu",
        ),
        Some((
            Reason::InsufficientCapacity,
            "UnexpectedAdmissionError: Allocate failed due to requested number of devices unavailable for nvidia.com/gpu",
        )),
    );
    check(failed("OutOfcpu", ""), Some((Reason::InsufficientCapacity, "OutOfcpu")));
    check(
        failed("Terminated", "Pod was terminated in response to imminent node shutdown."),
        Some((Reason::PodsNotReady, "Terminated: Pod was terminated in response to imminent node shutdown")),
    );
}

fn pods(pods: &[(&str, Value)]) -> Vec<Pod> {
    let named = pods.iter().map(|(name, pod)| with(pod.clone(), "/metadata/name", json!(name)));
    named.map(|pod| serde_json::from_value(pod).expect("a pod")).collect()
}

#[track_caller]
fn check_most_urgent(among: &[(&str, Value)], expect: Option<(Reason, &str)>) {
    let pods = pods(among);
    for pods in [pods.clone(), pods.into_iter().rev().collect()] {
        let found = most_urgent(pods.iter());
        assert_eq!(found.as_ref().map(|found| (found.reason, found.message.as_str())), expect);
    }
}

#[test]
fn of_several_pods_the_most_urgent_is_told_and_the_first_by_name_among_equals() {
    check_most_urgent(&[("a", ready())], None);
    let full = pending("Unschedulable", "0/1 nodes are available: 1 Insufficient cpu.");
    let starting = engine(json!({"running": {}}));
    let expect =
        Some((Reason::InsufficientCapacity, "pod b: no node takes it: 0/1 nodes are available: 1 Insufficient cpu"));
    check_most_urgent(&[("a", starting), ("b", full.clone()), ("c", full), ("d", ready())], expect);
}

#[test]
fn a_successors_trouble_is_told_instead_of_the_one_of_a_pod_that_is_gone() {
    let mut evicted = ready();
    evicted["status"] =
        json!({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."});
    let leaving = with(ready(), "/metadata/deletionTimestamp", json!("2026-01-30T08:20:00Z"));
    let starting = || engine(json!({"running": {}}));
    let expect = Some((Reason::EngineStarting, "pod c: the engine loads the model"));
    check_most_urgent(&[("a", evicted.clone()), ("b", leaving.clone()), ("c", starting())], expect);
    check_most_urgent(
        &[("a", evicted), ("b", leaving)],
        Some((Reason::InsufficientCapacity, "pod a: Evicted: The node was low on resource: memory")),
    );
}

#[test]
fn each_reason_of_a_pod_has_its_place_in_the_order() {
    let mut listed = BY_URGENCY.to_vec();
    listed.sort_unstable();
    listed.dedup();
    assert_eq!(listed.len(), BY_URGENCY.len());
    for container in [MODEL_DOWNLOAD, ROUTING_PROXY, ENGINE, "logs"] {
        assert!(BY_URGENCY.contains(&crash_reason(container)), "{container}");
    }
}

#[test]
fn what_an_engine_has_loaded_and_a_download_has_fetched_shows() {
    let parse = |pod: Value| -> Pod { serde_json::from_value(pod).expect("a pod") };
    assert!(has_loaded(&parse(ready())) && has_downloaded(&parse(ready())));
    let loading = parse(engine(json!({"running": {}})));
    assert!(!has_loaded(&loading) && has_downloaded(&loading));
    let downloading = parse(init("model-download", json!({"running": {}})));
    assert!(!has_loaded(&downloading) && !has_downloaded(&downloading));
    assert!(!has_downloaded(&parse(init("model-download", terminated(1, "Error", "")))));
}
