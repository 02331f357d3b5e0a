//! Statuses of whole models: the world that they are computed from, and those in which nothing is wrong.

mod conditions;
mod failures;
mod last_words;
mod properties;
mod rollouts;
mod troubles;

use super::*;
use crate::child::{Child, Kind};
use crate::desired::desired;
use crate::failure::Class;
use crate::plan::{self, WorkloadRole};
use crate::{manifest, revision};
use baton_crds::{ConditionType, Reason};
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
        let objects = planned.applied(|child| !failed(child));
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

#[test]
fn requests_are_routed_to_another_engine_as_to_batons_own() {
    for engine in ["VLLM", "SGLang"] {
        let mut world = World::new(&format!("model: {{uri: pvc://models}}, engine: {{type: {engine}, image: 'e:1'}}"));
        assert_eq!(reason(&world.status(), ConditionType::RoutingReady), "False/WaitingForPair", "{engine}");
        let target = world.target.clone();
        for role in [WorkloadRole::Prefill, WorkloadRole::Decode] {
            world.deployment(role, &target, 1, 1, |_| ());
            world.pod(role, &target, ready());
        }
        world.service(&target);
        let status = world.status();
        assert_eq!(reason(&status, ConditionType::RoutingReady), "True/RoutingReady", "{engine}");
        assert_eq!(reason(&status, ConditionType::Ready), "True/AllRolesReady", "{engine}");
        assert!(status.conditions.iter().all(|condition| condition.type_ != ConditionType::Stalled.as_str()));
    }
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
