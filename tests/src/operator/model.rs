//! One DisaggregatedModel in a cluster: what is made for it against what should be, and what its status says.

use super::{Admin, PATIENCE, PROXY_IMAGE, Type, WORKER_IMAGE, wait};
use anyhow::{Context, Result, bail, ensure};
use baton_crds::DisaggregatedModel;
use baton_operator::child::Kind;
use baton_operator::credentials::{Certificate, Credentials};
use baton_operator::plan::{Plan, WorkloadRole};
use baton_operator::site::{OptionalKind, Owner, Site};
use baton_operator::{desired, validate};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// An object by kind and name.
pub type Named = (Kind, String);

/// A condition of a status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// One word of the closed list.
    pub reason: String,
    /// For people.
    pub message: String,
    /// The generation that it is about.
    pub observed_generation: i64,
}

/// A model, there or not.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// Who looks.
    pub admin: &'a Admin,
    /// Where.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Whether the cluster has LeaderWorkerSets.
    pub has_lws: bool,
}

impl<'a> Model<'a> {
    /// A model of that name in a cluster without LeaderWorkerSets.
    pub fn new(admin: &'a Admin, namespace: &'a str, name: &'a str) -> Self {
        Model { admin, namespace, name, has_lws: false }
    }

    /// The same in a cluster with LeaderWorkerSets.
    pub fn with_lws(admin: &'a Admin, namespace: &'a str, name: &'a str) -> Self {
        Model { has_lws: true, ..Model::new(admin, namespace, name) }
    }

    /// Applies a manifest, whatever name stands in it.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub fn apply(&self, manifest: &Value) -> Result<Value> {
        let named = super::manifest::with(manifest.clone(), &json!({"metadata": {"name": self.name}}));
        Ok(self.admin.apply(Type::MODEL, self.namespace, &named)?)
    }

    /// Patches its spec.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub fn patch(&self, spec: &Value) -> Result<Value> {
        Ok(self.admin.merge(Type::MODEL, self.namespace, self.name, "", &json!({"spec": spec}))?)
    }

    /// The object as it is stored.
    ///
    /// # Errors
    /// When it is not there.
    pub fn object(&self) -> Result<Value> {
        self.admin.need(Type::MODEL, self.namespace, self.name)
    }

    /// Deletes it; what was made for it goes by the garbage collector.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn delete(&self) -> Result<()> {
        self.admin.delete(Type::MODEL, self.namespace, self.name)
    }

    /// What the operator's own pure half makes of the stored object, where all roles are at its newest revision.
    ///
    /// # Errors
    /// When the object is not one that the operator takes.
    pub fn expected(&self) -> Result<Expected> {
        let object = self.object()?;
        let uid = object["metadata"]["uid"].as_str().map(str::to_owned);
        let typed: DisaggregatedModel = serde_json::from_value(object)?;
        let validated = match validate(&typed) {
            Ok(validated) => validated,
            Err(violations) => bail!("not a right manifest: {violations:?}"),
        };
        let site = Site {
            worker_image: WORKER_IMAGE.to_owned(),
            proxy_image: PROXY_IMAGE.to_owned(),
            kinds: self.has_lws.then_some(OptionalKind::LeaderWorkerSet).into_iter().collect(),
            operator_namespace: None,
        };
        let owner = Owner { namespace: self.namespace.to_owned(), uid };
        let plan = Plan::first(&validated, &site);
        let roles = desired::roles(&validated);
        let credentials = Credentials {
            roles: roles.iter().map(|role| (*role, Certificate::default())).collect(),
            ..Credentials::default()
        };
        let objects = desired::desired(&validated, &site, &owner, &plan, &credentials);
        let children = objects.children().iter().map(|child| (child.kind, child.name.clone())).collect();
        Ok(Expected { children, revision: plan.target, roles })
    }

    /// Every object that carries the model's label, of the kinds that the operator makes.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn children(&self) -> Result<BTreeMap<Named, Value>> {
        let selector = format!("{}={}", baton_crds::labels::MODEL, self.name);
        let mut all = BTreeMap::new();
        for kind in Kind::ALL {
            let is_there = match kind {
                Kind::LeaderWorkerSet => self.has_lws,
                Kind::PodMonitor => false,
                Kind::ServiceAccount
                | Kind::Secret
                | Kind::ConfigMap
                | Kind::NetworkPolicy
                | Kind::PodDisruptionBudget
                | Kind::Deployment
                | Kind::Service => true,
            };
            if !is_there {
                continue;
            }
            for object in self.admin.list(Type::of_child(kind), self.namespace, &selector)? {
                // LeaderWorkerSet's controller gives its headless Service the labels of the workload.
                let ours = object["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "baton-operator"
                    && object["metadata"]["ownerReferences"][0]["kind"] != "LeaderWorkerSet";
                if ours {
                    all.insert((kind, name_of(&object)), object);
                }
            }
        }
        Ok(all)
    }

    /// Versions of its objects: two that are equal are the same bytes in the store.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn versions(&self) -> Result<BTreeMap<Named, String>> {
        let version = |object: &Value| object["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
        Ok(self.children()?.iter().map(|(named, object)| (named.clone(), version(object))).collect())
    }

    /// Versions of its objects without what their own controllers write to their status: uid and generation, or the version
    /// where there is no generation.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn generations(&self) -> Result<BTreeMap<Named, String>> {
        let version = |object: &Value| {
            let metadata = &object["metadata"];
            let generation =
                if metadata["generation"].is_null() { &metadata["resourceVersion"] } else { &metadata["generation"] };
            format!("{} {generation}", metadata["uid"])
        };
        Ok(self.children()?.iter().map(|(named, object)| (named.clone(), version(object))).collect())
    }

    /// Uids of its pods, by name.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn pods(&self) -> Result<BTreeMap<String, String>> {
        let selector = format!("{}={}", baton_crds::labels::MODEL, self.name);
        let pods = self.admin.list(Type::POD, self.namespace, &selector)?;
        let uid = |pod: &Value| pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        Ok(pods.iter().map(|pod| (name_of(pod), uid(pod))).collect())
    }

    /// A condition; none where the status has none of that type, or none about the newest generation.
    ///
    /// # Errors
    /// When the model is not there.
    pub fn condition(&self, kind: &str) -> Result<Option<Condition>> {
        let object = self.object()?;
        Ok(condition(&object, kind)
            .filter(|found| Some(found.observed_generation) == object["metadata"]["generation"].as_i64()))
    }

    /// Waits until a condition about the newest generation has this status and reason.
    ///
    /// # Errors
    /// When it does not within `patience`; with what it is instead.
    pub fn wait_condition(&self, patience: Duration, kind: &str, status: &str, reason: &str) -> Result<Condition> {
        let what = format!("{}/{}: {kind}={status} ({reason})", self.namespace, self.name);
        wait(patience, &what, || {
            let found = self.condition(kind)?.with_context(|| format!("no condition {kind}"))?;
            ensure!(found.status == status && found.reason == reason, "{found:?}");
            Ok(Some(found))
        })
    }

    /// Whether all is as the manifest says, and the status says so of its newest generation; else what is not.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn check_settled(&self) -> Result<()> {
        let object = self.object()?;
        let expected = self.expected()?;
        let status = &object["status"];
        ensure!(
            status["observedGeneration"] == object["metadata"]["generation"],
            "status is of an older generation: {status}"
        );
        for kind in ["Accepted", "PrefillReady", "DecodeReady"] {
            let found = condition(&object, kind).with_context(|| format!("no condition {kind}"))?;
            ensure!(found.status == "True", "{kind}: {found:?}");
        }
        ensure!(
            status["revision"] == expected.revision.as_str(),
            "serves {}, not {}",
            status["revision"],
            expected.revision
        );
        let progressing = condition(&object, "Progressing").context("no condition Progressing")?;
        ensure!(progressing.status == "False", "{progressing:?}");
        self.check_children(&expected)
    }

    /// Whether exactly the objects are there that should be, all controlled by the model.
    ///
    /// # Errors
    /// What is missing or too much.
    pub fn check_children(&self, expected: &Expected) -> Result<()> {
        let children = self.children()?;
        let there: BTreeSet<Named> = children.keys().cloned().collect();
        let missing: Vec<_> = expected.children.difference(&there).collect();
        let surplus: Vec<_> = there.difference(&expected.children).collect();
        ensure!(missing.is_empty() && surplus.is_empty(), "missing {missing:?}, too much {surplus:?}");
        let uid = self.object()?["metadata"]["uid"].clone();
        for (named, object) in &children {
            let owner = &object["metadata"]["ownerReferences"][0];
            ensure!(owner["uid"] == uid && owner["controller"] == true, "{named:?} is owned by {owner}");
        }
        Ok(())
    }

    /// Waits until all is as the manifest says.
    ///
    /// # Errors
    /// When that takes longer than [`PATIENCE`].
    pub fn wait_settled(&self) -> Result<()> {
        self.wait_settled_for(PATIENCE)
    }

    /// Waits until all is as the manifest says.
    ///
    /// # Errors
    /// When that takes longer than `patience`.
    pub fn wait_settled_for(&self, patience: Duration) -> Result<()> {
        let what = format!("{}/{} is as its manifest says", self.namespace, self.name);
        wait(patience, &what, || self.check_settled().map(Some))
    }

    /// Waits until it and everything made for it is gone.
    ///
    /// # Errors
    /// When that takes longer than [`PATIENCE`].
    pub fn wait_gone(&self) -> Result<()> {
        let what = format!("{}/{} and its objects are gone", self.namespace, self.name);
        wait(PATIENCE, &what, || {
            ensure!(self.admin.get(Type::MODEL, self.namespace, self.name)?.is_none(), "it is still there");
            let left: Vec<_> = self.children()?.into_keys().collect();
            ensure!(left.is_empty(), "left: {left:?}");
            Ok(Some(()))
        })
    }
}

/// What should be made for a model.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Kinds and names, in full.
    pub children: BTreeSet<Named>,
    /// The revision that serves in the end.
    pub revision: String,
    /// Roles that have pods.
    pub roles: Vec<WorkloadRole>,
}

/// A condition of an object's status.
pub fn condition(object: &Value, kind: &str) -> Option<Condition> {
    let conditions = object["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|condition| condition["type"] == kind)?;
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    Some(Condition {
        status: text("status"),
        reason: text("reason"),
        message: text("message"),
        observed_generation: found["observedGeneration"].as_i64().unwrap_or_default(),
    })
}

/// An object's name.
pub fn name_of(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}
