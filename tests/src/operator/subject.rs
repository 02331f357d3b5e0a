//! One installation whose models are changed while something breaks, with every pod counted: what the suites that break things
//! ask for in the end, however it came about.

use super::census::Census;
use super::manifest::{foreign, tiny, with};
use super::model::{Model, name_of};
use super::{Installation, NAME, PATIENCE, Stage, Type};
use crate::api_faults::{Mark, Verb};
use anyhow::{Context, Result, ensure};
use baton_operator::child::Kind;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Between two looks at a model: many are looked at at once, and the API server has its own work on the same cores.
const LOOK: Duration = Duration::from_millis(120);

/// Without a write for this long, the operator is done: what the last event calls for comes within its window.
const QUIET: Duration = Duration::from_millis(900);

/// A change of a model, and what it means for pods.
#[derive(Clone, Copy)]
pub struct Change {
    /// In one word.
    pub name: &'static str,
    /// What is done.
    pub act: Act,
    /// Pods that it may start, and must.
    pub starts: usize,
    /// Pods that there are in the end; those that it does not start were there before.
    pub total: usize,
}

/// What is done to a model. Manifests get the number of the time that they are made, to differ by.
#[derive(Clone, Copy)]
pub enum Act {
    /// It is made.
    Create(fn(&str) -> Value),
    /// Its spec is patched.
    Patch(fn(usize) -> Value),
    /// It is deleted, and made anew at once.
    Recreate(fn(&str) -> Value),
    /// It is deleted.
    Delete,
}

/// A model of single pods comes to be.
pub const CREATE: Change = Change { name: "create", act: Act::Create(tiny), starts: 2, total: 2 };
/// Both roles of it grow.
pub const GROW: Change = Change {
    name: "scale up",
    act: Act::Patch(|_| json!({"prefill": {"replicas": 2}, "decode": {"replicas": 3}})),
    starts: 3,
    total: 5,
};
/// And shrink again.
pub const SHRINK: Change = Change {
    name: "scale down",
    act: Act::Patch(|_| json!({"prefill": {"replicas": 1}, "decode": {"replicas": 1}})),
    starts: 0,
    total: 2,
};
/// Its workers' image changes, and so its revision.
pub const ROLL: Change = Change {
    name: "roll",
    act: Act::Patch(|time| json!({"engine": {"image": format!("registry.example.com/worker:v{time}")}})),
    starts: 2,
    total: 2,
};
/// A replica of decode becomes a group of two pods.
pub const WIDEN: Change = Change {
    name: "switch to LeaderWorkerSet",
    act: Act::Patch(|_| json!({"decode": {"nodesPerReplica": 2}})),
    starts: 3,
    total: 3,
};
/// And a single pod again.
pub const NARROW: Change = Change {
    name: "switch to Deployment",
    act: Act::Patch(|_| json!({"decode": {"nodesPerReplica": 1}})),
    starts: 2,
    total: 2,
};
/// It is deleted and made anew at once, under the same name.
pub const RECREATE: Change = Change { name: "delete and create", act: Act::Recreate(tiny), starts: 2, total: 2 };
/// It is deleted.
pub const DELETE: Change = Change { name: "delete", act: Act::Delete, starts: 0, total: 0 };

/// A model that can be [`WIDEN`]ed, with an image that [`ROLL`] changes.
pub fn wide(name: &str) -> Value {
    with(foreign(name), &json!({"spec": {"engine": {"image": "registry.example.com/worker:v0"}}}))
}

impl Change {
    /// Does it.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub fn begin(&self, model: &Model<'_>, time: usize) -> Result<()> {
        match self.act {
            Act::Create(manifest) => model.apply(&manifest(model.name)).map(|_| ()),
            Act::Patch(patch) => model.patch(&patch(time)).map(|_| ()),
            Act::Recreate(manifest) => {
                model.delete()?;
                model.apply(&manifest(model.name)).map(|_| ())
            }
            Act::Delete => model.delete(),
        }
    }
}

/// The pods of a model before a change.
#[derive(Clone, Debug)]
pub struct Before {
    pods: BTreeMap<String, String>,
    seen: usize,
}

/// An installation and the pods that were ever in its namespace.
pub struct Subject {
    /// Where from.
    pub stage: Stage,
    /// The operator's.
    pub installation: Installation<'static>,
    census: Census,
}

impl Subject {
    /// A new one. Its operator is not started.
    ///
    /// # Errors
    /// When the API server refuses something of it.
    pub fn new(stage: Stage, prefix: &str) -> Result<Self> {
        let installation = stage.install(prefix)?;
        let census = Census::start(stage.plane, installation.namespace.name())?;
        Ok(Subject { stage, installation, census })
    }

    /// A model of it.
    pub fn model<'a>(&'a self, name: &'a str) -> Model<'a> {
        Model::with_lws(self.stage.admin, self.installation.namespace.name(), name)
    }

    /// A model's pods as they are, to compare with.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn before(&self, model: &Model<'_>) -> Result<Before> {
        Ok(Before { pods: model.pods()?, seen: self.census.count() })
    }

    /// Whether everything that a model should have is there, whatever else still is: the operator's part of a change, as far as it
    /// waits for nobody else.
    ///
    /// # Errors
    /// What is missing.
    pub fn check_written(&self, model: &Model<'_>) -> Result<()> {
        let (expected, there) = (model.expected()?.children, model.children()?);
        let missing: Vec<_> = expected.iter().filter(|named| !there.contains_key(named)).collect();
        ensure!(missing.is_empty(), "missing: {missing:?}");
        Ok(())
    }

    /// Whether a change is made: exactly the wanted objects, a status that says so, and no pod ever there that it does not need.
    /// Pods that are to go may still be on their way.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn check_made(&self, model: &Model<'_>, change: &Change, before: &Before) -> Result<()> {
        let started = self.census.since(before.seen);
        ensure!(started.len() <= change.starts, "needless pods: {started:?}, needed are {}", change.starts);
        match change.act {
            Act::Create(_) | Act::Patch(_) | Act::Recreate(_) => model.check_settled(),
            Act::Delete => {
                let stored = self.stage.admin.get(Type::MODEL, model.namespace, model.name)?;
                ensure!(stored.is_none(), "the model is still there");
                let left: Vec<_> = model.children()?.into_keys().collect();
                ensure!(left.is_empty(), "left: {left:?}");
                Ok(())
            }
        }
    }

    /// Whether a change is done, down to the last pod: made, every pod that should stay still the same one, and those that
    /// should go gone.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn check(&self, model: &Model<'_>, change: &Change, before: &Before) -> Result<()> {
        self.check_made(model, change, before)?;
        let pods = model.pods()?;
        let stayed = pods.iter().filter(|(name, uid)| before.pods.get(*name) == Some(uid)).count();
        let (started, will_stay) = (self.census.since(before.seen).len(), change.total - change.starts);
        ensure!(
            pods.len() == change.total && stayed == will_stay && started == change.starts,
            "of {:?} came {pods:?}, where {} of {} are to be new, and {started} were",
            before.pods,
            change.starts,
            change.total
        );
        Ok(())
    }

    /// Whether the operator, whose requests begin at `since`, has looked at a model.
    ///
    /// # Errors
    /// When it has not.
    pub fn check_looked(&self, model: &Model<'_>, since: Mark) -> Result<()> {
        let looked = self.installation.proxy.since(since).iter().any(|one| {
            let asked = &one.request;
            asked.verb == Verb::Get && asked.resource == Type::MODEL.plural && asked.name == model.name
        });
        ensure!(looked, "the operator has not looked at the model");
        Ok(())
    }

    /// Whether a model and all that was made for it is gone, its pods too.
    ///
    /// # Errors
    /// What is left.
    pub fn check_gone(&self, model: &Model<'_>) -> Result<()> {
        let stored = self.stage.admin.get(Type::MODEL, model.namespace, model.name)?;
        ensure!(stored.is_none(), "the model is still there");
        let (children, pods) = (model.children()?, model.pods()?);
        ensure!(children.is_empty() && pods.is_empty(), "left: {:?} {pods:?}", children.keys());
        Ok(())
    }

    /// Waits until a change is done, down to the last pod.
    ///
    /// # Errors
    /// When that takes longer than [`PATIENCE`], or pods are started needlessly.
    pub fn wait_done(&self, model: &Model<'_>, change: &Change, before: &Before) -> Result<()> {
        let what = format!("{} of {}/{} is done", change.name, model.namespace, model.name);
        slowly(PATIENCE, &what, || self.check(model, change, before))
    }

    /// Waits until the operator has written nothing for a while; or, where `until` says so, for that.
    ///
    /// # Errors
    /// When it goes on writing, with the last writes.
    pub fn wait_quiet(&self, mut until: impl FnMut() -> bool) -> Result<()> {
        let proxy = &self.installation.proxy;
        let (mut mark, mut since) = (proxy.mark(), Instant::now());
        let deadline = Instant::now() + PATIENCE;
        while since.elapsed() < QUIET && !until() {
            let written = proxy.writes_since(mark);
            if !written.is_empty() {
                ensure!(Instant::now() < deadline, "still writing after {PATIENCE:?}: {written:#?}");
                (mark, since) = (proxy.mark(), Instant::now());
            }
            std::thread::park_timeout(LOOK / 4);
        }
        Ok(())
    }

    /// Whether the namespace holds, besides what the test itself put there, nothing but the objects and pods of these models:
    /// looked for without any label, so that nothing hides by lacking one.
    ///
    /// # Errors
    /// What is left over.
    pub fn check_no_orphans(&self, models: &[Model<'_>]) -> Result<()> {
        let namespace = self.installation.namespace.name();
        let mut expected = BTreeSet::new();
        let mut pods = BTreeSet::new();
        for model in models {
            expected.extend(model.expected()?.children);
            pods.extend(model.pods()?.into_keys());
        }
        let ours = |kind: Kind, name: &str| match kind {
            Kind::ServiceAccount => name == NAME || name == "default",
            Kind::ConfigMap => name == "kube-root-ca.crt",
            Kind::Secret
            | Kind::NetworkPolicy
            | Kind::PodDisruptionBudget
            | Kind::Deployment
            | Kind::LeaderWorkerSet
            | Kind::Service
            | Kind::PodMonitor => false,
        };
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::PodMonitor) {
            for object in self.stage.admin.list(Type::of_child(kind), namespace, "")? {
                let name = name_of(&object);
                let is_of_lws = object["metadata"]["ownerReferences"][0]["kind"] == "LeaderWorkerSet";
                let is_known = ours(kind, &name) || is_of_lws || expected.contains(&(kind, name.clone()));
                ensure!(is_known, "an orphan: {} {name}", kind.as_str());
            }
        }
        for pod in self.stage.admin.list(Type::POD, namespace, "")? {
            ensure!(pods.contains(&name_of(&pod)), "an orphan: Pod {}", name_of(&pod));
        }
        Ok(())
    }

    /// The operator's words and its last requests, for an error.
    pub fn evidence(&self) -> String {
        const REQUESTS: usize = 80;
        let log = self.installation.proxy.log();
        let last: String = log[log.len().saturating_sub(REQUESTS)..].iter().map(|one| format!("{one}\n")).collect();
        format!("{}== last requests of {}\n{last}", self.installation.logs(), self.installation.namespace.name())
    }
}

/// Asks `check` until it is content, now and then.
///
/// # Errors
/// When it is not within `patience`, with its last complaint.
pub fn slowly(patience: Duration, what: &str, mut check: impl FnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let Err(error) = check() else { return Ok(()) };
        if Instant::now() >= deadline {
            return Err(error).with_context(|| format!("waited {patience:?} in vain: {what}"));
        }
        std::thread::park_timeout(LOOK);
    }
}
