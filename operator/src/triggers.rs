//! What is watched: models and everything that belongs to one, by metadata alone.
//!
//! Objects find their model by the controller reference and by label, both, so that neither being edited hides a change.
//! Secrets are not watched, because the operator has no right to: what happens to one is seen at the model's next reconcile, of
//! which there is one at least every half hour ([`crate::controller`]). Kinds that a cluster may lack are looked for every
//! [`LOOK_EVERY`] and watched while they are there.

use crate::child::Kind;
use crate::cluster::{Cluster, Resource};
use crate::metrics::Metrics;
use crate::queue::{ModelMeta, Trigger};
use crate::site::OptionalKind;
use baton_crds::labels::{APP_MANAGED_BY, APP_MANAGED_BY_VALUE, MODEL};
use futures_util::StreamExt as _;
use kube::core::{DynamicObject, PartialObjectMeta};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio_util::task::AbortOnDropHandle;

/// Time between two looks for kinds that a cluster may lack.
pub const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The places whose models are the operator's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Places {
    /// All namespaces: every watch is one for the cluster.
    All,
    /// These: every watch is one for each, and nothing is ever asked of the cluster as a whole.
    Namespaces(Vec<String>),
}

impl Places {
    /// The places one by one; none stands for all namespaces.
    pub fn each(&self) -> Vec<Option<&str>> {
        match self {
            Places::All => vec![None],
            Places::Namespaces(names) => names.iter().map(|name| Some(name.as_str())).collect(),
        }
    }
}

/// How many of the watches have shown their first list.
#[derive(Debug, Default)]
pub struct Synced {
    watches: AtomicUsize,
    listed: AtomicUsize,
}

impl Synced {
    /// Whether all have.
    pub fn is_complete(&self) -> bool {
        let watches = self.watches.load(Ordering::Relaxed);
        watches > 0 && self.listed.load(Ordering::Relaxed) >= watches
    }
}

/// Everything that is watched, until it is dropped.
#[derive(Debug)]
pub struct Watches {
    tasks: Vec<AbortOnDropHandle<()>>,
}

impl Watches {
    /// Starts to watch, and to look for optional kinds.
    pub fn start(
        cluster: &Cluster,
        places: &Places,
        triggers: &mpsc::Sender<Trigger>,
        kinds: watch::Sender<BTreeSet<OptionalKind>>,
        synced: &Arc<Synced>,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let desk = Desk {
            client: cluster.client(),
            triggers: triggers.clone(),
            synced: synced.clone(),
            metrics: metrics.clone(),
        };
        let mut tasks = Vec::new();
        let mut start = |task: tokio::task::JoinHandle<()>| tasks.push(AbortOnDropHandle::new(task));
        for (number, place) in places.each().into_iter().enumerate() {
            start(tokio::spawn(desk.clone().models(number, place.map(str::to_owned))));
            let always = Kind::ALL.into_iter().filter(|kind| !kind.is_optional() && *kind != Kind::Secret);
            for resource in always.map(Resource::of).chain([Resource::PODS]) {
                start(tokio::spawn(desk.clone().children(resource, place.map(str::to_owned), First::Counts)));
            }
        }
        start(tokio::spawn(desk.optional(cluster.clone(), places.clone(), kinds)));
        Watches { tasks }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.tasks.len()
    }
}

/// Whether readiness waits for a watch's first list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    /// It does.
    Counts,
    /// It does not: the kind came later.
    IsExtra,
}

#[derive(Clone)]
struct Desk {
    client: Client,
    triggers: mpsc::Sender<Trigger>,
    synced: Arc<Synced>,
    metrics: Arc<Metrics>,
}

impl Desk {
    async fn models(self, number: usize, place: Option<String>) {
        let api: Api<ModelMeta> = match &place {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        let mut restarts = Restarts::new(&self, Resource::MODELS, First::Counts);
        let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
        while let Some(event) = events.next().await {
            restarts.see(&event);
            let Ok(event) = event else { continue };
            if self.triggers.send(Trigger::Models(number, event.into())).await.is_err() {
                return;
            }
        }
    }

    async fn children(self, resource: Resource, place: Option<String>, first: First) {
        let kind = resource.api_resource();
        let api: Api<PartialObjectMeta<DynamicObject>> = match &place {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &kind),
            None => Api::all_with(self.client.clone(), &kind),
        };
        let ours = watcher::Config::default().labels(&format!("{APP_MANAGED_BY}={APP_MANAGED_BY_VALUE}"));
        let mut restarts = Restarts::new(&self, resource, first);
        let mut events = watcher(api, ours).default_backoff().boxed();
        while let Some(event) = events.next().await {
            let again = restarts.see(&event);
            let triggers = match event {
                Ok(Event::Apply(object) | Event::InitApply(object) | Event::Delete(object)) => models_of(&object),
                // What was deleted while nobody watched is in no event: every model looks for itself.
                Ok(Event::InitDone) if again => vec![Trigger::All],
                Ok(Event::Init | Event::InitDone) | Err(_) => Vec::new(),
            };
            for trigger in triggers {
                if self.triggers.send(trigger).await.is_err() {
                    return;
                }
            }
        }
    }

    async fn optional(self, cluster: Cluster, places: Places, kinds: watch::Sender<BTreeSet<OptionalKind>>) {
        let mut watched: BTreeMap<OptionalKind, Vec<AbortHandle>> = BTreeMap::new();
        let mut tasks = tokio::task::JoinSet::new();
        loop {
            match cluster.optional_kinds().await {
                Ok(found) => {
                    watched.retain(|kind, tasks| {
                        let stays = found.contains(kind);
                        if !stays {
                            tracing::info!(kind = kind.names().0, "the cluster has this kind no more");
                            tasks.iter().for_each(AbortHandle::abort);
                        }
                        stays
                    });
                    for kind in [OptionalKind::LeaderWorkerSet, OptionalKind::PodMonitor] {
                        if found.contains(&kind) && !watched.contains_key(&kind) {
                            tracing::info!(kind = kind.names().0, "the cluster has this kind");
                            let resource = owned(kind);
                            let started = places.each().into_iter().map(|place| {
                                tasks.spawn(self.clone().children(resource, place.map(str::to_owned), First::IsExtra))
                            });
                            watched.insert(kind, started.collect());
                        }
                    }
                    let changed = kinds.send_if_modified(|kinds| {
                        let changed = *kinds != found;
                        *kinds = found;
                        changed
                    });
                    if changed && self.triggers.send(Trigger::All).await.is_err() {
                        return;
                    }
                }
                Err(error) => tracing::warn!(%error, "can't ask which kinds the cluster has"),
            }
            tokio::time::sleep(crate::lease::jittered(LOOK_EVERY)).await;
        }
    }
}

/// The resource of an optional kind that models own.
fn owned(kind: OptionalKind) -> Resource {
    match kind {
        OptionalKind::LeaderWorkerSet => Resource::of(Kind::LeaderWorkerSet),
        OptionalKind::PodMonitor
        | OptionalKind::HttpRoute
        | OptionalKind::InferencePool
        | OptionalKind::ScaledObject => Resource::of(Kind::PodMonitor),
    }
}

/// The models that an object belongs to: by its controller reference, and by its label where that says otherwise.
fn models_of(object: &PartialObjectMeta<DynamicObject>) -> Vec<Trigger> {
    let Some(namespace) = &object.metadata.namespace else { return Vec::new() };
    let owners = object.metadata.owner_references.iter().flatten();
    let owner = owners.filter(|owner| owner.kind == baton_crds::KIND).map(|owner| &owner.name);
    let label = object.metadata.labels.as_ref().and_then(|labels| labels.get(MODEL));
    let names: BTreeSet<&String> = owner.chain(label).collect();
    names.into_iter().map(|name| Trigger::Child(namespace.clone(), name.clone())).collect()
}

/// Sees when a watch begins anew.
struct Restarts {
    resource: Resource,
    metrics: Arc<Metrics>,
    synced: Arc<Synced>,
    first: First,
    listed: bool,
}

impl Restarts {
    fn new(desk: &Desk, resource: Resource, first: First) -> Self {
        if first == First::Counts {
            desk.synced.watches.fetch_add(1, Ordering::Relaxed);
        }
        Restarts { resource, metrics: desk.metrics.clone(), synced: desk.synced.clone(), first, listed: false }
    }

    /// Whether the watch was listed before this event.
    fn see<K>(&mut self, event: &watcher::Result<Event<K>>) -> bool {
        let before = self.listed;
        match event {
            Err(error) => {
                self.metrics.watch_restarted(self.resource.plural());
                tracing::warn!(resource = self.resource.plural(), %error, "a watch broke, it begins again");
            }
            Ok(Event::Init) if before => self.metrics.watch_restarted(self.resource.plural()),
            Ok(Event::InitDone) => {
                if !before && self.first == First::Counts {
                    self.synced.listed.fetch_add(1, Ordering::Relaxed);
                }
                self.listed = true;
            }
            Ok(Event::Init | Event::InitApply(_) | Event::Apply(_) | Event::Delete(_)) => {}
        }
        before
    }
}
