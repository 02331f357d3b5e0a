//! Makes the cluster as it is wanted: writes what differs, in the order of kinds, and takes away last what is not wanted any more.
//!
//! One child's failure keeps no other from being written, but nothing is taken away while anything failed. What stands under one
//! of our names and is not ours (its controller is not this model) is neither written nor deleted. A write names the object's uid, so
//! that one which somebody has replaced in the meantime is not taken for ours; and its version, except for workloads,
//! whose version moves with every pod that starts.

use crate::child::{Applied, Child, Kind, Objects, Planned};
use crate::cluster::{Cluster, MANAGER, Resource, SEED_MANAGER};
use crate::differs::{difference, owns_replicas};
use crate::failure::{Class, Failure};
use crate::memory::{Mark, Memory};
use crate::metrics::{Metrics, Write};
use crate::observe::{kept, role_of, text};
use crate::observed::Observed;
use crate::plan::{Plan, WorkloadRole};
use crate::site::Owner;
use baton_crds::labels::{REVISION, WORKLOAD_ROLE};
use futures_util::stream::{self, StreamExt as _};
use kube::api::Preconditions;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Writes of one reconcile that run at once, all of one kind.
const WRITES_AT_ONCE: usize = 4;

/// Writes a model's objects.
#[derive(Clone, Copy, Debug)]
pub struct Apply<'a> {
    /// Where.
    pub cluster: &'a Cluster,
    /// What earlier reconciles learnt.
    pub memory: &'a Memory,
    /// What is counted.
    pub metrics: &'a Metrics,
    /// The model that owns them.
    pub owner: &'a Owner,
    /// The model's name.
    pub model: &'a str,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// The objects that stand as they are wanted.
    pub objects: Objects<Applied>,
    /// What could not be written.
    pub failures: Vec<Failure>,
    /// How many objects were written or deleted.
    pub writes: usize,
}

impl Apply<'_> {
    /// Writes what differs and takes away what is not wanted. What was written is put in the place of what was observed.
    pub async fn run(&self, plan: &Plan, objects: Objects<Planned>, observed: &mut Observed) -> Outcome {
        let mut failures: Vec<Failure> = Vec::new();
        let mut writes = 0;
        for kind in Kind::ALL {
            let live = &observed.children;
            let has_secrets = !failures.iter().any(|failure| failure.kind == Kind::Secret);
            let of_kind = objects.children().iter().filter(|child| child.kind == kind);
            let written: Vec<_> = of_kind
                .map(|child| async move {
                    let live = live.get(&(child.kind, child.name.clone()));
                    if live.is_none() && !has_secrets && is_workload(child.kind) {
                        // Its pods would mount what stands there under the Secret's name.
                        let words = "waits until the model's Secrets are there".to_owned();
                        return (child, Err(fail(child, Class::Transient, words)));
                    }
                    let seed = plan.seed_replicas.get(&role(&child.body).unwrap_or(WorkloadRole::Decode)).copied();
                    (child, self.write(child, live, seed).await)
                })
                .collect();
            let results: Vec<(&Child, Result<Option<Value>, Failure>)> =
                stream::iter(written).buffer_unordered(WRITES_AT_ONCE).collect().await;
            for (child, result) in results {
                match result {
                    Ok(written) => {
                        if let Some(written) = written {
                            writes += 1;
                            observed.children.insert((child.kind, child.name.clone()), kept(written));
                        }
                    }
                    Err(failure) => {
                        tracing::warn!(%failure, class = failure.class.as_str(), "a child can't be written");
                        failures.push(failure);
                    }
                }
            }
        }
        if failures.is_empty() {
            writes += self.prune(plan, &objects, observed, &mut failures).await;
        }
        failures.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
        let failed = |child: &Child| failures.iter().any(|one| one.kind == child.kind && one.name == child.name);
        Outcome { objects: objects.applied(|child| !failed(child)), failures, writes }
    }

    /// Writes one child if it differs; the object as it then stands, if it was written.
    async fn write(&self, child: &Child, live: Option<&Value>, seed: Option<u32>) -> Result<Option<Value>, Failure> {
        let hidden = match live {
            Some(_) => None,
            // A list by label does not show what stands there without our label. Secrets are read by name anyway.
            None if child.kind == Kind::Secret => None,
            None => self.get(child).await?,
        };
        let Some(live) = live.or(hidden.as_ref()) else {
            return self.create(child, seed).await.map(Some);
        };
        if let Some(failure) = stranger(child, live, self.owner, self.model) {
            return Err(failure);
        }
        if text(live, "/metadata/deletionTimestamp").is_some() {
            // Its end is an event, upon which it is made anew.
            return Err(fail(child, Class::Transient, "is being deleted, and made anew when it is gone".to_owned()));
        }
        let Some(field) = difference(&child.body, live, MANAGER) else { return Ok(None) };
        let mark = mark(&child.body, live);
        if self.memory.is_unchanged((&self.owner.namespace, self.model), child.kind, &child.name, &mark) {
            return Ok(None);
        }
        tracing::info!(kind = child.kind.as_str(), name = child.name, field, "differs from what is wanted, writing it");
        if is_workload(child.kind) && wanted_replicas(&child.body).is_none() && owns_replicas(live, MANAGER) {
            // Else the API server would set the count to its default, 1, when we cease to say one.
            let count = live.pointer("/spec/replicas").and_then(Value::as_u64).unwrap_or(1);
            self.seed(child, count).await?;
        }
        let written = self.apply(child, &self.guarded(child, live), MANAGER).await?;
        if version(&written) == version(live) {
            self.memory.unchanged((&self.owner.namespace, self.model), child.kind, &child.name, mark);
            return Ok(None);
        }
        self.metrics.wrote(child.kind, Write::Apply);
        Ok(Some(written))
    }

    /// Makes a child that is not there. A workload that somebody else scales starts at a count of ours, which is then nobody's.
    async fn create(&self, child: &Child, seed: Option<u32>) -> Result<Value, Failure> {
        tracing::info!(kind = child.kind.as_str(), name = child.name, "is missing, making it");
        if child.kind == Kind::Secret {
            // Never by an apply: one that was on its way when its sender died would land on the key that pods have by now.
            let made = self.cluster.create(Resource::of(child.kind), &self.owner.namespace, &child.body, MANAGER).await;
            let made = made.map_err(|error| fail(child, Class::of(&error), message(&error)))?;
            self.metrics.wrote(child.kind, Write::Apply);
            return Ok(made);
        }
        let seed = seed.filter(|_| is_workload(child.kind) && wanted_replicas(&child.body).is_none());
        let Some(seed) = seed else {
            let made = self.apply(child, &child.body, MANAGER).await?;
            self.metrics.wrote(child.kind, Write::Apply);
            return Ok(made);
        };
        let mut body = child.body.clone();
        if let Some(spec) = body.get_mut("spec").and_then(Value::as_object_mut) {
            spec.insert("replicas".to_owned(), seed.into());
        }
        self.apply(child, &body, MANAGER).await?;
        self.metrics.wrote(child.kind, Write::Apply);
        self.seed(child, seed.into()).await?;
        self.apply(child, &child.body, MANAGER).await
    }

    /// Makes the replicas of a workload a field of the manager that nobody else is.
    async fn seed(&self, child: &Child, count: u64) -> Result<(), Failure> {
        let body = json!({
            "apiVersion": child.kind.api_version(),
            "kind": child.kind.as_str(),
            "metadata": {"name": child.name, "namespace": self.owner.namespace},
            "spec": {"replicas": count},
        });
        self.apply(child, &body, SEED_MANAGER).await.map(|_| ())
    }

    /// The wanted fields, for exactly the object that was read.
    fn guarded(&self, child: &Child, live: &Value) -> Value {
        let mut body = child.body.clone();
        if let Some(metadata) = body.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.extend(live.pointer("/metadata/uid").map(|uid| ("uid".to_owned(), uid.clone())));
            if !is_workload(child.kind) {
                let version = live.pointer("/metadata/resourceVersion");
                metadata.extend(version.map(|version| ("resourceVersion".to_owned(), version.clone())));
            }
        }
        body
    }

    async fn get(&self, child: &Child) -> Result<Option<Value>, Failure> {
        let found = self.cluster.get(Resource::of(child.kind), &self.owner.namespace, &child.name).await;
        found.map_err(|error| fail(child, Class::Transient, message(&error)))
    }

    async fn apply(&self, child: &Child, body: &Value, manager: &str) -> Result<Value, Failure> {
        let resource = Resource::of(child.kind);
        let written = self.cluster.apply(resource, &self.owner.namespace, &child.name, body, manager).await;
        written.map_err(|error| fail(child, Class::of(&error), message(&error)))
    }

    /// Takes away what is not wanted any more, in the order opposite to that of writing. How many objects that were.
    async fn prune(
        &self,
        plan: &Plan,
        objects: &Objects<Planned>,
        observed: &Observed,
        failures: &mut Vec<Failure>,
    ) -> usize {
        let mut pruned = 0;
        for (kind, name, live) in unwanted(plan, objects, &observed.children, self.owner) {
            tracing::info!(kind = kind.as_str(), name, "is not wanted any more, deleting it");
            let only = Preconditions {
                uid: text(live, "/metadata/uid").map(str::to_owned),
                resource_version: text(live, "/metadata/resourceVersion").map(str::to_owned),
            };
            match self.cluster.delete(Resource::of(kind), &self.owner.namespace, name, only).await {
                Ok(()) => {
                    pruned += 1;
                    self.metrics.wrote(kind, Write::Delete);
                }
                Err(error) => {
                    let name = name.to_owned();
                    failures.push(Failure { kind, name, class: Class::of(&error), message: message(&error) });
                    // What shows that this one is there may be what would go next.
                    break;
                }
            }
        }
        pruned
    }
}

/// What is there, is this model's, and is not wanted any more: neither among the target revision's objects nor among those of a
/// revision that is kept, and not needed by a role that a kept revision has.
fn unwanted<'a>(
    plan: &Plan,
    objects: &Objects<Planned>,
    live: &'a BTreeMap<(Kind, String), Value>,
    owner: &Owner,
) -> Vec<(Kind, &'a str, &'a Value)> {
    let is_kept =
        |revision: &str| revision != plan.target && (revision == plan.serving || plan.keep.contains(revision));
    let label = |object: &Value, key: &str| object.pointer("/metadata/labels")?.get(key)?.as_str().map(str::to_owned);
    let kept_roles: BTreeSet<WorkloadRole> = live
        .iter()
        .filter(|((kind, _), object)| is_workload(*kind) && is_controlled(object, owner))
        .filter(|(_, object)| label(object, REVISION).is_some_and(|revision| is_kept(&revision)))
        .filter_map(|(_, object)| role(object))
        .collect();
    live.iter()
        .rev()
        .filter(|((kind, name), _)| !objects.contains(*kind, name))
        .filter(|(_, object)| is_controlled(object, owner))
        .filter(|(_, object)| text(object, "/metadata/deletionTimestamp").is_none())
        .filter(|(_, object)| match (label(object, REVISION), role(object)) {
            (Some(revision), _) => !is_kept(&revision),
            (None, Some(role)) => !kept_roles.contains(&role),
            (None, None) => true,
        })
        .map(|((kind, name), object)| (*kind, name.as_str(), object))
        .collect()
}

fn role(object: &Value) -> Option<WorkloadRole> {
    role_of(object.pointer("/metadata/labels")?.get(WORKLOAD_ROLE)?.as_str()?)
}

fn is_workload(kind: Kind) -> bool {
    match kind {
        Kind::Deployment | Kind::LeaderWorkerSet => true,
        Kind::ServiceAccount
        | Kind::Secret
        | Kind::ConfigMap
        | Kind::NetworkPolicy
        | Kind::PodDisruptionBudget
        | Kind::Service
        | Kind::PodMonitor => false,
    }
}

fn wanted_replicas(body: &Value) -> Option<&Value> {
    body.pointer("/spec/replicas").filter(|replicas| !replicas.is_null())
}

/// Kind, name and uid of what controls an object.
fn controller(object: &Value) -> Option<(&str, &str, &str)> {
    let owners = object.pointer("/metadata/ownerReferences")?.as_array()?;
    let owner = owners.iter().find(|owner| owner.get("controller") == Some(&Value::Bool(true)))?;
    Some((text(owner, "/kind")?, text(owner, "/name")?, text(owner, "/uid")?))
}

/// Whether an object is this model's.
pub(crate) fn is_controlled(object: &Value, owner: &Owner) -> bool {
    controller(object).is_some_and(|(_, _, uid)| Some(uid) == owner.uid.as_deref())
}

/// Why an object that stands where a child would go is left alone; none where it is the model's own.
fn stranger(child: &Child, live: &Value, owner: &Owner, model: &str) -> Option<Failure> {
    if is_controlled(live, owner) {
        return None;
    }
    let found = controller(live);
    if found.is_some_and(|(kind, name, _)| kind == baton_crds::KIND && name == model) {
        // A model that was deleted and made anew at once: the garbage collector takes what the first one owned, in seconds.
        let words = "is left from an earlier model of this name, and made anew when it is gone";
        return Some(fail(child, Class::Transient, words.to_owned()));
    }
    let owner = found.map_or_else(|| "nobody".to_owned(), |(kind, name, _)| format!("{kind} {name}"));
    Some(fail(child, Class::NameTaken, format!("exists and belongs to {owner}, so it is left alone")))
}

fn version(object: &Value) -> Option<&str> {
    text(object, "/metadata/resourceVersion")
}

fn mark(body: &Value, live: &Value) -> Mark {
    Mark {
        uid: text(live, "/metadata/uid").unwrap_or_default().to_owned(),
        version: version(live).unwrap_or_default().to_owned(),
        body: *blake3::hash(body.to_string().as_bytes()).as_bytes(),
    }
}

fn fail(child: &Child, class: Class, message: String) -> Failure {
    Failure { kind: child.kind, name: child.name.clone(), class, message }
}

/// What the API server said; it repeats no values of Secrets.
fn message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> Owner {
        Owner { namespace: "models".to_owned(), uid: Some("uid-1".to_owned()) }
    }

    fn object(uid: &str, role: Option<&str>, revision: Option<&str>) -> Value {
        let labels: BTreeMap<&str, &str> = [(WORKLOAD_ROLE, role), (REVISION, revision)]
            .into_iter()
            .filter_map(|(key, value)| Some((key, value?)))
            .collect();
        json!({
            "metadata": {
                "labels": labels,
                "ownerReferences": [{"kind": "DisaggregatedModel", "name": "tiny", "uid": uid, "controller": true}],
            }
        })
    }

    fn plan(target: &str, serving: &str) -> Plan {
        Plan {
            target: target.to_owned(),
            serving: serving.to_owned(),
            entrance: WorkloadRole::Decode,
            keep: BTreeSet::new(),
            seed_replicas: BTreeMap::new(),
        }
    }

    fn live() -> BTreeMap<(Kind, String), Value> {
        let all = [
            (Kind::ServiceAccount, "tiny-prefill", object("uid-1", Some("prefill"), None)),
            (Kind::ServiceAccount, "tiny-decode", object("uid-1", Some("decode"), None)),
            (Kind::Secret, "tiny-ca", object("uid-1", None, None)),
            (Kind::Deployment, "tiny-prefill-old", object("uid-1", Some("prefill"), Some("old"))),
            (Kind::Deployment, "tiny-decode-old", object("uid-1", Some("decode"), Some("old"))),
            (Kind::Deployment, "tiny-decode-new", object("uid-1", Some("decode"), Some("new"))),
            (Kind::Service, "theirs", object("uid-2", None, None)),
        ];
        all.into_iter().map(|(kind, name, object)| ((kind, name.to_owned()), object)).collect()
    }

    fn wanted() -> Objects<Planned> {
        let names =
            [(Kind::ServiceAccount, "tiny-decode"), (Kind::Secret, "tiny-ca"), (Kind::Deployment, "tiny-decode-new")];
        Objects::new(names.map(|(kind, name)| Child { kind, name: name.to_owned(), body: json!({}) }).into())
    }

    fn pruned(plan: &Plan) -> Vec<String> {
        unwanted(plan, &wanted(), &live(), &owner()).into_iter().map(|(_, name, _)| name.to_owned()).collect()
    }

    #[test]
    fn a_kept_revision_stays_with_what_its_roles_need() {
        assert!(pruned(&plan("new", "old")).is_empty());
        let mut kept = plan("new", "new");
        kept.keep.insert("old".to_owned());
        assert!(pruned(&kept).is_empty());
    }

    #[test]
    fn an_old_revision_goes_workloads_before_what_they_run_as_and_nobody_elses_objects_ever() {
        assert_eq!(pruned(&plan("new", "new")), ["tiny-prefill-old", "tiny-decode-old", "tiny-prefill"]);
    }

    #[test]
    fn what_is_going_already_is_not_deleted_again() {
        let mut live = live();
        for object in live.values_mut() {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        assert!(unwanted(&plan("new", "new"), &wanted(), &live, &owner()).is_empty());
    }

    #[test]
    fn what_an_earlier_model_of_the_same_name_left_is_waited_for_and_what_is_anothers_is_told_of() {
        let child = Child { kind: Kind::Secret, name: "tiny-ca".to_owned(), body: json!({}) };
        let class = |live: &Value| stranger(&child, live, &owner(), "tiny").map(|failure| failure.class);
        assert_eq!(class(&object("uid-1", None, None)), None);
        assert_eq!(class(&object("uid-0", None, None)), Some(Class::Transient));
        assert_eq!(class(&json!({"metadata": {}})), Some(Class::NameTaken));
        let mut others = object("uid-2", None, None);
        others["metadata"]["ownerReferences"][0]["name"] = json!("other");
        assert_eq!(class(&others), Some(Class::NameTaken));
        others["metadata"]["ownerReferences"][0] =
            json!({"kind": "App", "name": "tiny", "uid": "a", "controller": true});
        assert_eq!(class(&others), Some(Class::NameTaken));
    }

    #[test]
    fn an_object_without_a_controller_is_nobodys_and_so_not_ours() {
        assert!(!is_controlled(&json!({"metadata": {}}), &owner()));
        assert!(is_controlled(&object("uid-1", None, None), &owner()));
    }
}
