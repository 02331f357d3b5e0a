//! Statuses of whole models: what is told for each cause, and what holds whatever the cluster looks like.

use super::*;
use crate::child::{Child, Kind};
use crate::desired::desired;
use crate::failure::Class;
use crate::observed::Missing;
use crate::plan::{self, WorkloadRole};
use crate::site::OptionalKind;
use crate::{manifest, revision};
use baton_crds::status::{LAST_ERROR_CHARS_MAX, LAST_ERRORS_MAX};
use baton_crds::{ConditionType, Reason};
use baton_wire::progress::{Phase, Progress};
use k8s_openapi::api::core::v1::Pod;
use proptest::prelude::*;
use serde_json::{Value, json};

const OLD: &str = "00000000";
const GENERATION: i64 = 7;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_769_760_000 + second).expect("a time of this century")
}

fn model(spec: &str) -> Validated {
    let text = format!(
        "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {{name: tiny}}\nspec: {{{spec}}}\n"
    );
    manifest::read_one(&text).expect("a right manifest").validated
}

/// A model with what is seen of it, to be changed by each test in one place.
#[derive(Debug)]
struct World {
    model: Validated,
    site: Site,
    owner: Owner,
    target: String,
    observed: Observed,
    failures: Vec<Failure>,
    previous: Option<DisaggregatedModelStatus>,
    now: Timestamp,
}

impl World {
    fn new(spec: &str) -> Self {
        let model = model(spec);
        let site = Site {
            worker_image: "baton/worker:0.1.0".to_owned(),
            proxy_image: "baton/proxy:0.1.0".to_owned(),
            kinds: [].into(),
            operator_namespace: None,
        };
        World {
            target: revision(&model, &site.worker_image),
            model,
            site,
            owner: Owner { namespace: "team-a".to_owned(), uid: Some("u1".to_owned()) },
            observed: Observed::default(),
            failures: Vec::new(),
            previous: None,
            now: at(0),
        }
    }

    /// One prefill and one decode replica, of which all that is wanted takes work.
    fn healthy() -> Self {
        let mut world = World::new("model: {uri: pvc://models}");
        let target = world.target.clone();
        for role in [WorkloadRole::Prefill, WorkloadRole::Decode] {
            world.deployment(role, &target, 1, 1, |_| ());
            world.pod(role, &target, ready());
        }
        world.service(&target);
        world
    }

    /// The same with its only decode pod in this state.
    fn with_decode_pod(pod: Value) -> Self {
        let mut world = World::healthy();
        let target = world.target.clone();
        world.observed.pods.retain(|pod| pods::role(pod) != Some(WorkloadRole::Decode));
        world.deployment(WorkloadRole::Decode, &target, 1, 0, |_| ());
        world.pod(WorkloadRole::Decode, &target, pod);
        world
    }

    fn meta(&self, name: &str, role: &str, revision: &str) -> Value {
        json!({
            "name": name,
            "generation": 2,
            "labels": {"baton.dev/model": "tiny", "baton.dev/workload-role": role, "baton.dev/revision": revision},
            "ownerReferences": [{"kind": "DisaggregatedModel", "name": "tiny", "uid": "u1", "controller": true}],
        })
    }

    fn deployment(
        &mut self,
        role: WorkloadRole,
        revision: &str,
        replicas: u32,
        available: u32,
        change: impl FnOnce(&mut Value),
    ) {
        let name = names::workload("tiny", role, revision);
        let mut object = json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": self.meta(&name, role.as_str(), revision),
            "spec": {"replicas": replicas, "template": {"metadata": {"labels": {"llm-d.ai/role": role.as_str()}}}},
            "status": {
                "observedGeneration": 2, "replicas": replicas, "updatedReplicas": replicas,
                "readyReplicas": available, "availableReplicas": available,
                "conditions": [{"type": "Progressing", "status": "True", "reason": if available >= replicas { "NewReplicaSetAvailable" } else { "ReplicaSetUpdated" }}],
            },
        });
        change(&mut object);
        self.observed.children.insert((Kind::Deployment, name), object);
    }

    fn service(&mut self, revision: &str) {
        let object = json!({
            "metadata": self.meta("tiny", "model", revision),
            "spec": {"selector": {"baton.dev/model": "tiny", "baton.dev/workload-role": "decode", "baton.dev/revision": revision}},
        });
        self.observed.children.insert((Kind::Service, "tiny".to_owned()), object);
    }

    fn pod(&mut self, role: WorkloadRole, revision: &str, mut pod: Value) {
        let number = self.observed.pods.len();
        pod["metadata"]["name"] = json!(format!("{}-{number}", names::workload("tiny", role, revision)));
        pod["metadata"]["labels"] = json!({"baton.dev/model": "tiny", "baton.dev/workload-role": role.as_str(), "baton.dev/revision": revision});
        self.observed.pods.push(serde_json::from_value(pod).expect("a pod"));
    }

    fn fail(&mut self, kind: Kind, name: &str, class: Class, message: &str) {
        self.failures.push(Failure { kind, name: name.to_owned(), class, message: message.to_owned() });
    }

    fn status(&self) -> DisaggregatedModelStatus {
        let plan = plan::plan(&self.model, &self.site, &self.owner, &self.observed);
        let planned = desired(&self.model, &self.site, &self.owner, &plan, &self.observed.credentials);
        let failed = |child: &Child| {
            self.failures.iter().any(|failure| failure.kind == child.kind && failure.name == child.name)
        };
        let objects =
            Objects::new(planned.children().iter().filter(|child| !failed(child)).cloned().collect()).applied();
        self.of(&Outcome::Applied {
            model: &self.model,
            plan: &plan,
            observed: &self.observed,
            objects: &objects,
            failures: &self.failures,
        })
    }

    fn of(&self, outcome: &Outcome<'_>) -> DisaggregatedModelStatus {
        status(&Facts {
            generation: GENERATION,
            previous: self.previous.as_ref(),
            now: self.now,
            outcome,
            site: &self.site,
            owner: &self.owner,
            name: "tiny",
        })
    }
}

fn ready() -> Value {
    json!({
        "metadata": {},
        "spec": {"nodeName": "node-1", "containers": [{"name": "engine", "image": "baton/worker:0.1.0"}]},
        "status": {
            "phase": "Running",
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "ContainersReady", "status": "True"},
                {"type": "Ready", "status": "True"},
            ],
            "containerStatuses": [
                {"name": "engine", "image": "", "imageID": "", "restartCount": 0, "ready": true, "started": true, "state": {"running": {}}},
            ],
        },
    })
}

/// A pod of which one container is in this state.
fn container(name: &str, state: Value) -> Value {
    let mut pod = ready();
    pod["status"]["conditions"][1]["status"] = json!("False");
    pod["status"]["conditions"][2]["status"] = json!("False");
    pod["spec"]["initContainers"] = json!([
        {"name": "model-download", "image": "baton/worker:0.1.0"},
        {"name": "routing-proxy", "image": "baton/proxy:0.1.0", "restartPolicy": "Always"},
    ]);
    let status = json!({"name": name, "image": "", "imageID": "", "restartCount": 1, "ready": false, "started": false, "state": state});
    let field = if name == "engine" { "containerStatuses" } else { "initContainerStatuses" };
    pod["status"]["containerStatuses"] = json!([]);
    pod["status"][field] = json!([status]);
    pod
}

fn unschedulable(message: &str) -> Value {
    json!({
        "metadata": {},
        "spec": {"containers": []},
        "status": {
            "phase": "Pending",
            "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}],
        },
    })
}

fn crashed(message: &str, second: i64) -> Value {
    let ended = json!({"exitCode": 1, "reason": "Error", "message": message, "finishedAt": at(second).to_string()});
    container("engine", json!({"terminated": ended}))
}

/// `Type=Status/Reason` of each condition, as one line.
fn line(status: &DisaggregatedModelStatus) -> String {
    let words: Vec<_> = status
        .conditions
        .iter()
        .map(|condition| format!("{}={}/{}", condition.type_, condition.status, condition.reason))
        .collect();
    words.join(" ")
}

fn message(status: &DisaggregatedModelStatus, kind: ConditionType) -> &str {
    let found = status.conditions.iter().find(|condition| condition.type_ == kind.as_str());
    found.map(|condition| condition.message.as_str()).expect("the condition is there")
}

fn reason(status: &DisaggregatedModelStatus, kind: ConditionType) -> String {
    let found = status.conditions.iter().find(|condition| condition.type_ == kind.as_str());
    found.map(|condition| format!("{}/{}", condition.status, condition.reason)).unwrap_or_default()
}

#[test]
fn a_model_that_serves_says_so_in_full() {
    let world = World::healthy();
    let target = &world.target;
    let status = world.status();
    assert_eq!(
        line(&status),
        "Accepted=True/Accepted ModelAvailable=True/ModelAvailable PrefillReady=True/AllReplicasReady \
         DecodeReady=True/AllReplicasReady RoutingReady=True/RoutingReady Progressing=False/Settled Ready=True/AllRolesReady"
    );
    assert_eq!(message(&status, ConditionType::Ready), "prefill 1/1, decode 1/1");
    assert_eq!(status.observed_generation, Some(GENERATION));
    assert_eq!(status.url.as_deref(), Some("http://tiny.team-a.svc:8000"));
    assert_eq!((status.revision.as_ref(), status.update_revision.as_ref()), (Some(target), None));
    let summary = status.summary.expect("roles in words");
    assert_eq!((summary.prefill.as_deref(), summary.decode.as_deref()), (Some("1/1"), Some("1/1")));
    assert_eq!(
        serde_json::to_value(&status.roles[1]).expect("numbers and strings"),
        json!({
            "name": "decode", "desiredReplicas": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1,
            "selector": format!("baton.dev/model=tiny,baton.dev/revision={target},baton.dev/workload-role=decode"),
            "workloadRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": format!("tiny-decode-{target}")},
        })
    );
    assert_eq!((status.download, status.last_errors.len()), (None, 0));
    assert!(status.conditions.iter().all(|condition| condition.observed_generation == Some(GENERATION)));
}

#[test]
fn a_model_of_which_nothing_is_there_yet_is_being_created() {
    let status = World::new("model: {uri: pvc://models}").status();
    assert_eq!(
        line(&status),
        "Accepted=True/Accepted ModelAvailable=Unknown/WaitingForPods PrefillReady=False/WaitingForPods \
         DecodeReady=False/WaitingForPods RoutingReady=False/WaitingForPair Progressing=True/Creating Ready=False/WaitingForPods"
    );
    let target = status.revision.expect("the first revision serves");
    assert_eq!(
        status.conditions[2].message,
        format!("0 of 1 prefill replicas take work; tiny-prefill-{target} is being made")
    );
}

/// With the only decode pod in this state: DecodeReady, ModelAvailable, Ready, and Ready's words.
#[track_caller]
fn check_pod(pod: Value, decode: Reason, available: &str, ready: &str) {
    let world = World::with_decode_pod(pod);
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::DecodeReady), format!("False/{decode}"));
    assert_eq!(reason(&status, ConditionType::ModelAvailable), available);
    assert_eq!(reason(&status, ConditionType::RoutingReady), "False/WaitingForPair");
    assert!(!line(&status).contains("Stalled"), "what may heal by itself does not stall");
    let said = message(&status, ConditionType::Ready).replace(&world.target, "REV");
    assert_eq!(said, ready);
}

#[test]
fn each_trouble_of_a_pod_reaches_ready_in_the_same_reconcile() {
    let waiting =
        |reason: &str, message: &str| container("engine", json!({"waiting": {"reason": reason, "message": message}}));
    check_pod(
        unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        Reason::InsufficientCapacity,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: no node takes it: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu",
    );
    check_pod(
        unschedulable("0/3 nodes are available: persistentvolumeclaim \"models\" not found."),
        Reason::VolumeMissing,
        "False/VolumeMissing",
        "ModelAvailable: pod tiny-decode-REV-1: 0/3 nodes are available: persistentvolumeclaim \"models\" not found",
    );
    check_pod(
        unschedulable("0/3 nodes are available: persistentvolumeclaim \"scratch\" not found."),
        Reason::VolumeMissing,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: 0/3 nodes are available: persistentvolumeclaim \"scratch\" not found",
    );
    check_pod(
        waiting("ErrImagePull", "not found"),
        Reason::ImagePullFailed,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: image baton/worker:0.1.0 of container engine can't be pulled: not found",
    );
    check_pod(
        waiting("CreateContainerConfigError", "secret \"keys\" not found"),
        Reason::ConfigurationMissing,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: container engine can't be made: secret \"keys\" not found",
    );
    check_pod(
        crashed("no such directory", 1),
        Reason::EngineCrashLooping,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: container engine ended with exit code 1: no such directory",
    );
    check_pod(
        container("routing-proxy", json!({"terminated": {"exitCode": 2, "message": "bad flag"}})),
        Reason::ProxyCrashLooping,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: container routing-proxy ended with exit code 2: bad flag",
    );
    check_pod(
        container("model-download", json!({"terminated": {"exitCode": 1, "message": "401: the token is not valid"}})),
        Reason::ModelDownloadFailed,
        "False/ModelDownloadFailed",
        "ModelAvailable: pod tiny-decode-REV-1: container model-download ended with exit code 1: 401: the token is not valid",
    );
    check_pod(
        container("engine", json!({"running": {}})),
        Reason::EngineStarting,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: the engine loads the model",
    );
}

#[test]
fn a_healed_cause_leaves_no_trace_but_its_last_words() {
    let mut world = World::healthy();
    let before = world.status();
    let mut failing = World::with_decode_pod(crashed("no such directory", 1));
    (failing.previous, failing.now) = (Some(before.clone()), at(10));
    let failed = failing.status();
    (world.previous, world.now) = (Some(failed), at(20));
    let healed = world.status();
    let without_times = |mut status: DisaggregatedModelStatus| {
        status.conditions.iter_mut().for_each(|condition| condition.last_transition_time.0 = at(0));
        status
    };
    assert_eq!(without_times(healed), without_times(before));
}

#[test]
fn what_the_manifest_refers_to_and_is_missing_is_named_before_any_pod_says_so() {
    let mut world = World::new("model: {uri: pvc://models}");
    world.observed.missing = vec![Missing::Claim("models".to_owned())];
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::ModelAvailable), "False/VolumeMissing");
    assert_eq!(reason(&status, ConditionType::DecodeReady), "False/VolumeMissing");
    assert_eq!(reason(&status, ConditionType::Ready), "False/VolumeMissing");
    let words = "ModelAvailable: PersistentVolumeClaim models does not exist: create it, or name another in spec.model";
    assert_eq!(message(&status, ConditionType::Ready), words);
    world.observed.missing = vec![Missing::Secret("hub".to_owned())];
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "False/CredentialsMissing");
    assert!(message(&status, ConditionType::Ready).contains("Secret hub does not exist"));
    // Pods that run already need it no more.
    let mut world = World::healthy();
    world.observed.missing = vec![Missing::Secret("hub".to_owned())];
    assert_eq!(reason(&world.status(), ConditionType::DecodeReady), "True/AllReplicasReady");
}

#[test]
fn pods_that_no_controller_can_make_are_told_by_what_refuses_them() {
    for (words, expect) in [
        (
            "pods \"tiny-decode-x\" is forbidden: exceeded quota: team-a, requested: cpu=4, used: cpu=8, limited: cpu=8",
            Reason::QuotaExceeded,
        ),
        (
            "pods \"tiny-decode-x\" is forbidden: violates PodSecurity \"restricted:latest\": hostPath",
            Reason::PodsRefused,
        ),
        ("pods \"tiny-decode-x\" is forbidden: no PriorityClass with name gold was found", Reason::PodsRefused),
        (
            "pods \"tiny-decode-\" is forbidden: error looking up service account team-a/tiny-decode: serviceaccount \"tiny-decode\" not found",
            Reason::ConfigurationMissing,
        ),
    ] {
        let mut world = World::healthy();
        let target = world.target.clone();
        world.deployment(WorkloadRole::Decode, &target, 1, 0, |object| {
            object["status"]["conditions"] =
                json!([{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": words}]);
        });
        let status = world.status();
        assert_eq!(reason(&status, ConditionType::DecodeReady), format!("False/{expect}"));
        assert!(message(&status, ConditionType::Ready).contains(words), "{}", message(&status, ConditionType::Ready));
    }
}

#[test]
fn a_download_is_told_with_its_progress() {
    let mut world = World::new("model: {uri: hf://org/repo}");
    let target = world.target.clone();
    world.deployment(WorkloadRole::Decode, &target, 1, 0, |_| ());
    world.pod(WorkloadRole::Decode, &target, container("model-download", json!({"running": {}})));
    let progress = |phase, bytes_done, bytes_total, error: Option<&str>| Progress {
        uri: "hf://org/repo".to_owned(),
        phase,
        bytes_done,
        bytes_total,
        files_done: 0,
        files_total: 3,
        bytes_per_second: 1,
        error: error.map(str::to_owned),
    };
    let told = |world: &World| {
        let status = world.status();
        let words = message(&status, ConditionType::ModelAvailable).replace(&world.target, "REV");
        assert_eq!(reason(&status, ConditionType::Ready), "False/ModelDownloading");
        (words, status.download.map(|download| (download.pod, download.percent, download.bytes_total)))
    };
    let alone = "pod tiny-decode-REV-0: downloads the model";
    assert_eq!(told(&world), (alone.to_owned(), None));
    world.observed.downloads.insert("b".to_owned(), progress(Phase::Downloading, 430, 1000, None));
    assert_eq!(told(&world), (format!("{alone} (43 %)"), Some(("b".to_owned(), Some(43), Some(1000)))));
    // One that waits for the other's work is behind in bytes but not what is waited for.
    world.observed.downloads.insert("a".to_owned(), progress(Phase::Waiting, 0, 0, None));
    world.observed.downloads.insert("c".to_owned(), progress(Phase::Downloading, 10, 1000, Some("503: try later")));
    world.observed.downloads.insert("d".to_owned(), progress(Phase::Complete, 1000, 1000, None));
    assert_eq!(
        told(&world),
        (format!("{alone} (1 %; last error: 503: try later)"), Some(("c".to_owned(), Some(1), Some(1000))))
    );
    world.observed.downloads.retain(|pod, _| pod == "a");
    assert_eq!(told(&world), (format!("{alone} (waiting)"), Some(("a".to_owned(), None, None))));
    world.observed.downloads.insert("a".to_owned(), progress(Phase::Downloading, u64::MAX, u64::MAX, None));
    assert_eq!(told(&world).1, Some(("a".to_owned(), Some(100), Some(9_007_199_254_740_991))));
}

/// With this child not written: Accepted, Ready, and whether it stalls.
#[track_caller]
fn check_failure(kind: Kind, class: Class, accepted: &str, ready: &str, stalls: bool) {
    let mut world = World::healthy();
    world.fail(kind, "tiny", class, "in the API server's words");
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Accepted), accepted);
    assert_eq!(reason(&status, ConditionType::Ready), ready);
    let stalled = status.conditions.iter().find(|condition| condition.type_ == "Stalled");
    assert_eq!(stalled.is_some(), stalls);
    assert_eq!(
        reason(&status, ConditionType::Progressing) == format!("False/{}", ready.trim_start_matches("False/")),
        stalls
    );
    assert!(
        message(&status, ConditionType::Ready).contains(&format!("{} tiny: in the API server's words", kind.as_str()))
    );
}

#[test]
fn a_child_that_the_api_server_did_not_take_is_told_by_what_kind_of_no_it_was() {
    check_failure(Kind::NetworkPolicy, Class::Refused, "False/ChildRefused", "False/ChildRefused", true);
    check_failure(Kind::ConfigMap, Class::NameTaken, "False/NameTaken", "False/NameTaken", true);
    check_failure(Kind::PodMonitor, Class::KindMissing, "False/CRDNotInstalled", "False/CRDNotInstalled", true);
    check_failure(Kind::Service, Class::Quota, "False/QuotaExceeded", "False/QuotaExceeded", false);
    check_failure(Kind::ConfigMap, Class::Transient, "Unknown/ClusterUnreadable", "False/ClusterUnreadable", false);
    check_failure(Kind::ConfigMap, Class::Conflict, "Unknown/ClusterUnreadable", "False/ClusterUnreadable", false);
}

#[test]
fn of_several_failures_the_one_that_needs_a_person_is_told_with_the_number_of_the_others() {
    let mut world = World::healthy();
    world.fail(Kind::ConfigMap, "tiny", Class::Transient, "timed out");
    world.fail(Kind::Service, "tiny", Class::Refused, "no");
    let status = world.status();
    assert_eq!(message(&status, ConditionType::Accepted), "Service tiny: no (and 1 more)");
    assert_eq!(reason(&status, ConditionType::RoutingReady), "False/ChildRefused");
}

#[test]
fn a_repair_that_is_late_changes_nothing_but_a_new_manifest_that_was_not_taken_does() {
    let mut world = World::healthy();
    world.previous = Some(world.status());
    world.fail(Kind::ConfigMap, "tiny", Class::Transient, "timed out");
    assert_eq!(Some(world.status()), world.previous);
    let conditions = &mut world.previous.as_mut().expect("just set").conditions;
    conditions.iter_mut().for_each(|condition| condition.observed_generation = Some(GENERATION - 1));
    assert_eq!(reason(&world.status(), ConditionType::Ready), "False/ClusterUnreadable");
}

#[test]
fn a_workload_that_was_not_written_is_not_ready_whatever_its_older_self_says() {
    let mut world = World::healthy();
    let name = names::workload("tiny", WorkloadRole::Decode, &world.target);
    world.fail(Kind::Deployment, &name, Class::Refused, "admission webhook \"policy\" denied the request");
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::DecodeReady), "False/ChildRefused");
    assert_eq!(reason(&status, ConditionType::PrefillReady), "True/AllReplicasReady");
}

#[test]
fn a_kind_that_the_cluster_lacks_is_named_with_what_asks_for_it() {
    let mut world = World::new("model: {uri: pvc://models}, observability: {monitor: PodMonitor}");
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Stalled), "True/CRDNotInstalled");
    let words = "the cluster has no PodMonitor (monitoring.coreos.com/v1), for which spec.observability.monitor asks: install it, or take that back";
    assert_eq!(message(&status, ConditionType::Stalled), words);
    world.site.kinds.insert(OptionalKind::PodMonitor);
    assert_eq!(reason(&world.status(), ConditionType::Accepted), "True/Accepted");
}

#[test]
fn replicas_that_span_nodes_need_their_kind_and_are_counted_by_their_leaders() {
    let spec = "model: {uri: pvc://models}, engine: {type: VLLM, image: 'vllm:1'}, prefill: {nodesPerReplica: 2}, decode: {nodesPerReplica: 2}";
    let mut world = World::new(spec);
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Accepted), "False/CRDNotInstalled");
    assert_eq!(reason(&status, ConditionType::DecodeReady), "False/CRDNotInstalled");
    world.site.kinds.insert(OptionalKind::LeaderWorkerSet);
    let name = names::workload("tiny", WorkloadRole::Decode, &world.target);
    let object = json!({
        "metadata": world.meta(&name, "decode", &world.target),
        "spec": {"replicas": 1, "leaderWorkerTemplate": {"size": 2, "workerTemplate": {}}},
        "status": {"observedGeneration": 2, "replicas": 1, "readyReplicas": 1, "updatedReplicas": 1},
    });
    world.observed.children.insert((Kind::LeaderWorkerSet, name), object);
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::DecodeReady), "True/AllReplicasReady");
    let decode = status.roles.iter().find(|role| role.name == "decode").expect("the role is there");
    assert!(
        decode
            .selector
            .as_deref()
            .is_some_and(|selector| selector.ends_with(",leaderworkerset.sigs.k8s.io/worker-index=0"))
    );
    assert_eq!(decode.workload_ref.as_ref().map(|reference| reference.kind.as_str()), Some("LeaderWorkerSet"));
}

#[test]
fn an_engine_that_the_proxy_does_not_speak_to_is_said_to_be_so() {
    let status = World::new("model: {uri: pvc://models}, engine: {type: SGLang, image: 'sglang:1'}").status();
    assert_eq!(reason(&status, ConditionType::RoutingReady), "False/ConnectorNotAvailable");
    assert_eq!(reason(&status, ConditionType::Stalled), "True/ConnectorNotAvailable");
    assert!(message(&status, ConditionType::RoutingReady).contains("engine type SGLang"));
}

#[test]
fn without_disaggregation_no_prefill_is_needed() {
    let mut world = World::new("model: {uri: pvc://models}, disaggregation: {policy: Never}");
    let target = world.target.clone();
    world.deployment(WorkloadRole::Decode, &target, 1, 1, |object| {
        object["spec"]["template"]["metadata"]["labels"]["llm-d.ai/role"] = json!("prefill-decode");
    });
    world.service(&target);
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::PrefillReady), "True/NotNeeded");
    assert_eq!(reason(&status, ConditionType::Ready), "True/AllRolesReady");
    let summary = status.summary.expect("roles in words");
    assert_eq!((summary.prefill, summary.decode.as_deref()), (None, Some("1/1")));
    assert_eq!(status.roles.len(), 1);
}

#[test]
fn in_a_rollout_the_old_revision_serves_and_the_new_one_is_reported() {
    let mut world = World::healthy();
    let target = world.target.clone();
    for role in [WorkloadRole::Prefill, WorkloadRole::Decode] {
        world.deployment(role, OLD, 3, 3, |_| ());
    }
    world.deployment(WorkloadRole::Decode, &target, 1, 0, |_| ());
    world.service(OLD);
    let status = world.status();
    assert_eq!((status.revision.as_deref(), status.update_revision.as_ref()), (Some(OLD), Some(&target)));
    assert_eq!(reason(&status, ConditionType::RoutingReady), "True/RoutingReady");
    assert_eq!(reason(&status, ConditionType::Progressing), "True/RolloutInProgress");
    assert_eq!(reason(&status, ConditionType::Ready), "False/PodsNotReady".replace("PodsNotReady", "WaitingForPods"));
    assert!(message(&status, ConditionType::Ready).ends_with("; revision 00000000 serves meanwhile"));
    let decode = &status.roles[1];
    let counts = (
        decode.desired_replicas,
        decode.replicas,
        decode.updated_replicas,
        decode.ready_replicas,
        decode.available_replicas,
    );
    assert_eq!(counts, (1, 4, 1, 3, 3), "of both revisions, but for what is updated");
    assert_eq!(decode.workload_ref.as_ref().map(|reference| reference.name.as_str()), Some("tiny-decode-00000000"));
}

#[test]
fn what_is_left_of_an_old_revision_keeps_a_model_progressing_but_ready() {
    let mut world = World::healthy();
    world.deployment(WorkloadRole::Decode, OLD, 1, 1, |_| ());
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "True/AllRolesReady");
    assert_eq!(reason(&status, ConditionType::Progressing), "True/RolloutInProgress");
    assert_eq!(message(&status, ConditionType::Progressing), "revision 00000000 is being removed");
    assert_eq!(status.roles[1].replicas, 1, "what is neither wanted nor serves does not count");
}

#[test]
fn an_old_revision_that_is_kept_without_serving_says_how_to_be_rid_of_it() {
    let mut world = World::healthy();
    let target = world.target.clone();
    for role in [WorkloadRole::Prefill, WorkloadRole::Decode] {
        world.deployment(role, &target, 1, 0, |_| ());
        world.deployment(role, OLD, 1, 0, |object| {
            object["status"]["conditions"][0]["reason"] = json!("NewReplicaSetAvailable")
        });
    }
    world.service(OLD);
    let status = world.status();
    assert_eq!(status.revision.as_deref(), Some(OLD));
    assert!(message(&status, ConditionType::Progressing).contains("delete its workloads"));
}

#[test]
fn counts_that_are_about_an_older_spec_are_not_ready() {
    let mut world = World::healthy();
    let target = world.target.clone();
    world.deployment(WorkloadRole::Decode, &target, 1, 1, |object| object["metadata"]["generation"] = json!(3));
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "False/WaitingForPods");
    assert!(message(&status, ConditionType::DecodeReady).ends_with("has yet to follow the last change"));
    assert_eq!(reason(&status, ConditionType::Progressing), "True/Scaling");
}

#[test]
fn pods_that_are_replaced_in_place_are_a_rollout() {
    let mut world = World::healthy();
    let target = world.target.clone();
    world.deployment(WorkloadRole::Decode, &target, 1, 1, |object| {
        (object["status"]["replicas"], object["status"]["updatedReplicas"]) = (json!(2), json!(1));
    });
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::DecodeReady), "False/WaitingForPods");
    assert_eq!(reason(&status, ConditionType::Progressing), "True/RolloutInProgress");
}

#[test]
fn surplus_replicas_are_ready_and_on_their_way_out() {
    let mut world = World::healthy();
    let target = world.target.clone();
    world.deployment(WorkloadRole::Decode, &target, 1, 1, |object| {
        for count in ["replicas", "updatedReplicas", "readyReplicas", "availableReplicas"] {
            object["status"][count] = json!(3);
        }
    });
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "True/AllRolesReady");
    assert_eq!(reason(&status, ConditionType::Progressing), "True/Scaling");
    assert_eq!(message(&status, ConditionType::DecodeReady), "1 of 1 decode replicas take work");
}

#[test]
fn a_role_that_its_scaler_has_set_to_zero_is_not_ready_and_says_why() {
    let mut world = World::new("model: {uri: pvc://models}, decode: {autoscaling: {provider: External}}");
    let target = world.target.clone();
    world.deployment(WorkloadRole::Prefill, &target, 1, 1, |_| ());
    world.deployment(WorkloadRole::Decode, &target, 0, 0, |_| ());
    world.service(&target);
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::DecodeReady), "False/ScaledToZero");
    assert_eq!(reason(&status, ConditionType::RoutingReady), "False/WaitingForPair");
    assert_eq!(reason(&status, ConditionType::Ready), "False/ScaledToZero");
    world.deployment(WorkloadRole::Decode, &target, 4, 4, |_| ());
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "True/AllRolesReady");
    assert_eq!(status.roles[1].desired_replicas, 4);
}

#[test]
fn a_front_door_is_part_of_routing() {
    let mut world = World::new("model: {uri: pvc://models}, routing: {mode: Standalone}");
    let target = world.target.clone();
    for role in [WorkloadRole::Prefill, WorkloadRole::Decode] {
        world.deployment(role, &target, 1, 1, |_| ());
    }
    world.deployment(WorkloadRole::Proxy, &target, 1, 0, |_| ());
    world.service(&target);
    world.pod(WorkloadRole::Proxy, &target, unschedulable("0/1 nodes are available: 1 Insufficient cpu."));
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::RoutingReady), "False/InsufficientCapacity");
    assert_eq!(reason(&status, ConditionType::Ready), "False/InsufficientCapacity");
    world.deployment(WorkloadRole::Proxy, &target, 1, 1, |_| ());
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "True/AllRolesReady");
    assert_eq!(message(&status, ConditionType::Ready), "prefill 1/1, decode 1/1, proxy 1/1");
    let words = format!("requests to http://tiny.team-a.svc:8000 reach proxy pods of revision {target}");
    assert_eq!(message(&status, ConditionType::RoutingReady), words);
}

#[test]
fn an_error_goes_before_what_merely_waits_and_what_stalls_before_both() {
    let mut world = World::with_decode_pod(crashed("no such directory", 1));
    let target = world.target.clone();
    world.observed.pods.retain(|pod| pods::role(pod) == Some(WorkloadRole::Decode));
    world.deployment(WorkloadRole::Prefill, &target, 1, 0, |_| ());
    world.pod(WorkloadRole::Prefill, &target, container("engine", json!({"running": {}})));
    assert_eq!(reason(&world.status(), ConditionType::Ready), "False/EngineCrashLooping");
    world.fail(Kind::Service, "tiny", Class::NameTaken, "is somebody else's");
    assert_eq!(reason(&world.status(), ConditionType::Ready), "False/NameTaken");
}

#[test]
fn a_refused_manifest_is_told_field_by_field_and_forgets_nothing_of_what_runs() {
    let mut world = World::healthy();
    let before = world.status();
    (world.previous, world.now) = (Some(before.clone()), at(60));
    let violations = [
        Violation {
            path: "spec.decode.replicas".to_owned(),
            message: "somebody has to generate".to_owned(),
            allowed: "at least 1".to_owned(),
        },
        Violation {
            path: "spec.model.uri".to_owned(),
            message: "not a\nmodel source".to_owned(),
            allowed: String::new(),
        },
    ];
    let status = world.of(&Outcome::Invalid(&violations));
    assert_eq!(
        line(&status),
        "Accepted=False/InvalidSpec ModelAvailable=True/ModelAvailable PrefillReady=True/AllReplicasReady \
         DecodeReady=True/AllReplicasReady RoutingReady=True/RoutingReady Progressing=False/InvalidSpec Ready=False/InvalidSpec \
         Stalled=True/InvalidSpec"
    );
    let words = "spec.decode.replicas: somebody has to generate: at least 1; spec.model.uri: not a model source";
    assert_eq!(message(&status, ConditionType::Stalled), words);
    assert_eq!(status.observed_generation, Some(GENERATION));
    assert_eq!((&status.roles, &status.url, &status.revision), (&before.roles, &before.url, &before.revision));
    // Corrected: nothing is left of it.
    (world.previous, world.now) = (Some(status), at(90));
    assert_eq!(reason(&world.status(), ConditionType::Stalled), "");
    assert_eq!(reason(&world.status(), ConditionType::Ready), "True/AllRolesReady");
}

#[test]
fn a_manifest_that_was_refused_from_the_start_has_no_roles_to_speak_of() {
    let world = World::healthy();
    let violations = [Violation { path: "spec".to_owned(), message: "x".repeat(5000), allowed: String::new() }];
    let status = world.of(&Outcome::Invalid(&violations));
    assert_eq!(
        line(&status),
        "Accepted=False/InvalidSpec Progressing=False/InvalidSpec Ready=False/InvalidSpec Stalled=True/InvalidSpec"
    );
    assert_eq!(message(&status, ConditionType::Ready).chars().count(), words::MESSAGE_CHARS_MAX);
    assert!(status.roles.is_empty());
}

#[test]
fn a_cluster_that_cannot_be_read_makes_ready_unknown_and_leaves_the_rest() {
    let mut world = World::healthy();
    let before = world.status();
    (world.previous, world.now) = (Some(before.clone()), at(60));
    let status = world.of(&Outcome::Unreadable("can't read pods: pods is forbidden"));
    assert_eq!(reason(&status, ConditionType::Ready), "Unknown/ClusterUnreadable");
    assert_eq!(message(&status, ConditionType::Ready), "can't read pods: pods is forbidden");
    let others = |status: &DisaggregatedModelStatus| -> Vec<_> {
        status.conditions.iter().filter(|condition| condition.type_ != "Ready").cloned().collect()
    };
    assert_eq!(others(&status), others(&before));
    assert_eq!(DisaggregatedModelStatus { conditions: before.conditions.clone(), ..status }, before);
    world.previous = None;
    assert_eq!(world.of(&Outcome::Unreadable("no")).observed_generation, None, "nothing was acted on");
}

#[test]
fn a_condition_of_somebody_else_is_theirs() {
    let mut world = World::healthy();
    let mut before = world.status();
    let mut foreign = before.conditions[0].clone();
    foreign.type_ = "example.com/Audited".to_owned();
    before.conditions.push(foreign);
    world.previous = Some(before);
    assert!(!line(&world.status()).contains("Audited"));
    assert!(!line(&world.of(&Outcome::Unreadable("no"))).contains("Audited"));
}

#[test]
fn a_transition_time_moves_only_with_the_status_it_is_about() {
    let mut world = World::healthy();
    world.previous = Some(world.status());
    let mut failing = World::with_decode_pod(crashed("a", 1));
    (failing.previous, failing.now) = (world.previous.take(), at(30));
    let failed = failing.status();
    let since = |status: &DisaggregatedModelStatus, kind: ConditionType| {
        status
            .conditions
            .iter()
            .find(|condition| condition.type_ == kind.as_str())
            .expect("it is there")
            .last_transition_time
            .0
    };
    assert_eq!(since(&failed, ConditionType::DecodeReady), at(30));
    assert_eq!(since(&failed, ConditionType::PrefillReady), at(0));
    // Another reason is no other status.
    let mut starting = World::with_decode_pod(container("engine", json!({"running": {}})));
    (starting.previous, starting.now) = (Some(failed), at(60));
    assert_eq!(since(&starting.status(), ConditionType::DecodeReady), at(30));
}

#[test]
fn times_are_whole_seconds_because_kubernetes_keeps_no_more() {
    let mut world = World::healthy();
    world.now = Timestamp::new(1_769_760_000, 987_654_321).expect("a time of this century");
    let written = serde_json::to_value(world.status()).expect("a status");
    assert_eq!(written["conditions"][0]["lastTransitionTime"], json!("2026-01-30T08:00:00Z"));
    let read: DisaggregatedModelStatus = serde_json::from_value(written).expect("its own form reads");
    assert_eq!(read, world.status());
}

#[test]
fn last_words_are_the_newest_first_bounded_and_told_once() {
    let mut world = World::healthy();
    let target = world.target.clone();
    for second in 1..=7 {
        world.pod(WorkloadRole::Decode, &target, crashed(&format!("cause {second}"), second));
    }
    world.pod(WorkloadRole::Decode, &target, crashed("cause 7", 0));
    world.pod(WorkloadRole::Prefill, &target, crashed(&format!("{}the end", "x".repeat(3000)), 9));
    let errors = world.status().last_errors;
    assert_eq!(errors.len(), LAST_ERRORS_MAX);
    assert_eq!(errors[0].role, "prefill");
    assert_eq!(errors[0].message.chars().count(), LAST_ERROR_CHARS_MAX);
    assert!(errors[0].message.starts_with("ended with exit code 1: …x") && errors[0].message.ends_with("the end"));
    let said: Vec<_> = errors[1..].iter().map(|error| error.message.as_str()).collect();
    assert_eq!(said, ["7", "6", "5", "4"].map(|n| format!("ended with exit code 1: cause {n}")));
    assert_eq!(errors[1].time.0, at(7));
    assert_eq!(errors[1].reason, "EngineCrashLooping");
    assert_eq!(errors[1].container.as_deref(), Some("engine"));
    let mut reversed = world;
    reversed.observed.pods.reverse();
    assert_eq!(reversed.status().last_errors, errors, "whatever the order of the list");
}

#[test]
fn last_words_go_with_their_pod_and_stay_while_it_works_again() {
    let mut world = World::healthy();
    let target = world.target.clone();
    let mut works = ready();
    works["status"]["containerStatuses"][0]["lastState"] =
        json!({"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-01-30T08:00:00Z"}});
    works["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": "2Gi"}});
    world.pod(WorkloadRole::Decode, &target, works.clone());
    let told = world.status().last_errors;
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].message, "was killed at its memory limit of 2Gi (OOMKilled)");
    world.observed.pods.pop();
    works["metadata"]["deletionTimestamp"] = json!("2026-01-30T08:00:00Z");
    world.pod(WorkloadRole::Decode, &target, works);
    assert!(world.status().last_errors.is_empty(), "it is on its way out");
    world.observed.pods.pop();
    // An init container that ended well and a failed one without words.
    world.pod(WorkloadRole::Decode, &target, container("model-download", json!({"terminated": {"exitCode": 0}})));
    assert!(world.status().last_errors.is_empty());
}

/// A pod in one of many states, by number.
fn any_pod(which: usize) -> Value {
    let states = [
        ready(),
        unschedulable("0/1 nodes are available: 1 Insufficient cpu."),
        unschedulable("0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."),
        crashed("no such directory", 3),
        container("engine", json!({"running": {}})),
        container("engine", json!({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off"}})),
        container(
            "engine",
            json!({"waiting": {"reason": "\u{1F980}".repeat(2000), "message": "\u{0}\u{7}".repeat(900)}}),
        ),
        container("model-download", json!({"running": {}})),
        container("model-download", json!({"terminated": {"exitCode": 1, "message": "\n\n"}})),
        container("routing-proxy", json!({"terminated": {"exitCode": -1}})),
        json!({"metadata": {}}),
        json!({"metadata": {}, "status": {"phase": "Failed", "reason": "Evicted"}}),
    ];
    states[which % states.len()].clone()
}

prop_compose! {
    fn any_world()(
        which in 0..5usize,
        workloads in proptest::collection::vec((0..3usize, any::<bool>(), 0..3u32, 0..3u32, 0..4u32, 0..4u32, any::<bool>(), any::<bool>()), 0..6),
        selected in proptest::option::of(any::<bool>()),
        pods in proptest::collection::vec((0..3usize, any::<bool>(), 0..12usize), 0..8),
        failures in proptest::collection::vec((0..6usize, 0..9usize), 0..3),
        missing in proptest::option::of(any::<bool>()),
        fixed in prop::bool::weighted(0.3),
    ) -> World {
        if fixed {
            return World::healthy();
        }
        let mut world = World::new([
            "model: {uri: pvc://models}",
            "model: {uri: hf://org/repo}, decode: {autoscaling: {provider: External}}",
            "model: {uri: pvc://models}, routing: {mode: Standalone}",
            "model: {uri: pvc://models}, disaggregation: {policy: Never}",
            "model: {uri: pvc://models}, engine: {type: VLLM, image: 'vllm:1'}, decode: {nodesPerReplica: 2}",
        ][which]);
        let target = world.target.clone();
        let revision = |is_target: bool| if is_target { target.clone() } else { OLD.to_owned() };
        for (role, is_target, replicas, available, status_replicas, updated, current, odd) in workloads {
            world.deployment(WorkloadRole::ALL[role], &revision(is_target), replicas, available, |object| {
                object["status"]["replicas"] = json!(status_replicas);
                object["status"]["updatedReplicas"] = json!(updated);
                if !current {
                    object["metadata"]["generation"] = json!(3);
                }
                if odd {
                    object["status"]["conditions"] = json!([{"type": "ReplicaFailure", "status": "True"}]);
                }
            });
        }
        if let Some(is_target) = selected {
            world.service(&revision(is_target));
        }
        for (role, is_target, state) in pods {
            world.pod(WorkloadRole::ALL[role], &revision(is_target), any_pod(state));
        }
        for (class, kind) in failures {
            let name = names::workload("tiny", WorkloadRole::Decode, &target);
            let name = if Kind::ALL[kind] == Kind::Deployment { name.as_str() } else { "tiny" };
            world.fail(Kind::ALL[kind], name, Class::ALL[class], "words");
        }
        world.observed.missing = missing
            .map(|claim| if claim { Missing::Claim("models".to_owned()) } else { Missing::Secret("hub".to_owned()) })
            .into_iter()
            .collect();
        world
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_seen_the_status_holds_together(world in any_world()) {
        let mut world = world;
        let status = world.status();
        let truth = |kind: ConditionType| reason(&status, kind);

        prop_assert_eq!(status.observed_generation, Some(GENERATION));
        prop_assert!(status.conditions.iter().all(|condition| condition.observed_generation == Some(GENERATION)));
        prop_assert!(status.conditions.iter().all(|condition| condition.message.chars().count() <= words::MESSAGE_CHARS_MAX && !condition.message.is_empty()));
        prop_assert!(status.last_errors.len() <= LAST_ERRORS_MAX);
        prop_assert!(status.last_errors.iter().all(|error| error.message.chars().count() <= LAST_ERROR_CHARS_MAX));
        prop_assert!(!line(&status).contains("KVTransferReady"), "until there is a real check");

        let stalled = status.conditions.iter().find(|condition| condition.type_ == "Stalled");
        if let Some(stalled) = stalled {
            let known = Reason::ALL.into_iter().find(|reason| reason.as_str() == stalled.reason).expect("a reason of the list");
            prop_assert!(known.stalls() && stalled.status == "True");
            prop_assert_eq!(truth(ConditionType::Ready), format!("False/{known}"));
        }
        if truth(ConditionType::Ready).starts_with("True") {
            prop_assert!(stalled.is_none() && status.update_revision.is_none() && world.failures.is_empty());
            prop_assert_eq!(status.revision.as_ref(), Some(&world.target));
            let workloads = world.observed.workloads("tiny", &world.owner);
            for role in crate::desired::roles(&world.model) {
                let own = workloads.iter().find(|workload| workload.role == role && workload.revision == world.target);
                let own = own.expect("what is ready exists");
                let wanted = plan::wanted(plan::replicas(&world.model, role).expect("it is wanted"), Some(own));
                prop_assert!(own.current && own.available >= wanted && own.updated >= wanted && wanted > 0);
            }
        }

        // A second look at the same world, later, says the same; and Kubernetes gives back what was written.
        let read: DisaggregatedModelStatus =
            serde_json::from_value(serde_json::to_value(&status).expect("a status")).expect("its own form reads");
        prop_assert_eq!(&read, &status);
        (world.previous, world.now) = (Some(read), at(1000));
        prop_assert_eq!(&world.status(), &status);
        prop_assert!(transitions::events(Some(&status), &world.status()).is_empty());
        // Pods in another order are the same pods.
        world.observed.pods.reverse();
        prop_assert_eq!(&world.status(), &status);
    }

    #[test]
    fn no_pod_makes_classification_fail(text in any::<String>(), code in any::<i32>(), kind in 0..3usize, name in 0..4usize) {
        let name = ["engine", "routing-proxy", "model-download", "other"][name];
        let state = match kind {
            0 => json!({"waiting": {"reason": text, "message": text}}),
            1 => json!({"terminated": {"exitCode": code, "reason": text, "message": text}}),
            _ => json!({}),
        };
        let pod: Pod = serde_json::from_value(container(name, state)).expect("a pod");
        let _ = pods::holdup(&pod);
        let _ = last_errors::last_errors(&[pod]);
    }
}
