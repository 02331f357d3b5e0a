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
use crate::watched::Watched;
use baton_crds::labels::{APP_MANAGED_BY, APP_MANAGED_BY_VALUE, MODEL};
use futures_util::StreamExt as _;
use kube::core::DynamicObject;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// Time between two looks for kinds that a cluster may lack.
pub const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Looks in a row that must not find a kind before it counts as gone: an API server that starts answers for a moment without the
/// kinds that definitions add.
const LOOKS_BEFORE_GONE: u32 = 3;
/// Time between two looks while a kind is missed, and before the first: what the answers before it left out is seen soon.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Time between a watch's end and its next beginning, from the first to the longest. While a watch is down its events are not seen,
/// so the longest is well below the 10 s within which everything is as wanted once the API server answers again.
const REWATCH: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(4));
/// A watch that has held for this long may break again without a longer pause. Longer than it takes to list, so that a watch
/// which is refused each time after its list does not go round without pause.
const CALM: Duration = Duration::from_secs(20);

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
        let mut events = watcher(api, watcher::Config::default()).backoff(Rewatch::default()).boxed();
        while let Some(event) = events.next().await {
            restarts.see(&event);
            let trigger = match event {
                Ok(event) => Trigger::Models(number, event.into()),
                Err(watcher::Error::InitialListFailed(_)) => Trigger::Unlisted(number),
                Err(_) => continue,
            };
            if self.triggers.send(trigger).await.is_err() {
                return;
            }
        }
    }

    async fn children(self, resource: Resource, place: Option<String>, first: First) {
        let kind = resource.api_resource();
        let api: Api<Watched<DynamicObject>> = match &place {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &kind),
            None => Api::all_with(self.client.clone(), &kind),
        };
        let ours = watcher::Config::default().labels(&format!("{APP_MANAGED_BY}={APP_MANAGED_BY_VALUE}"));
        let mut restarts = Restarts::new(&self, resource, first);
        let mut events = watcher(api, ours).backoff(Rewatch::default()).boxed();
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
        let mut missed = Missed::default();
        let mut pause = LOOK_AGAIN;
        loop {
            match cluster.optional_kinds().await {
                Ok(found) => {
                    let found = missed.believe(&kinds.borrow(), found);
                    pause = if missed.is_empty() { LOOK_EVERY } else { LOOK_AGAIN };
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
            tokio::time::sleep(crate::lease::jittered(pause)).await;
        }
    }
}

/// Kinds that were known and not found, and by how many looks in a row.
#[derive(Debug, Default)]
struct Missed(BTreeMap<OptionalKind, u32>);

impl Missed {
    /// The kinds to go by: those that were found, and those that were known until so many looks have missed them.
    fn believe(&mut self, known: &BTreeSet<OptionalKind>, found: BTreeSet<OptionalKind>) -> BTreeSet<OptionalKind> {
        self.0.retain(|kind, _| !found.contains(kind));
        let mut believed = found;
        for kind in known.difference(&believed.clone()) {
            let looks = self.0.entry(*kind).or_default();
            *looks += 1;
            if *looks < LOOKS_BEFORE_GONE {
                believed.insert(*kind);
            } else {
                self.0.remove(kind);
            }
        }
        believed
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
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
fn models_of(object: &Watched<DynamicObject>) -> Vec<Trigger> {
    let Some(namespace) = &object.metadata.namespace else { return Vec::new() };
    let owners = object.metadata.owner_references.iter().flatten();
    let owner = owners.filter(|owner| owner.kind == baton_crds::KIND).map(|owner| &owner.name);
    let label = object.metadata.labels.as_ref().and_then(|labels| labels.get(MODEL));
    let names: BTreeSet<&String> = owner.chain(label).collect();
    names.into_iter().map(|name| Trigger::Child(namespace.clone(), name.clone())).collect()
}

/// How long a broken watch waits: twice as long each time, until it has held for a while.
///
/// Not kube's own default, which goes up to 30 s and forgets earlier breaks only after 2 min: an API server that is restarted twice
/// would leave the operator blind for half a minute.
#[derive(Debug, Default)]
struct Rewatch {
    /// The last pause, and when it was over.
    last: Option<(Duration, Instant)>,
}

impl Iterator for Rewatch {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let (shortest, longest) = REWATCH;
        let now = Instant::now();
        let recent = self.last.filter(|(_, over)| now.saturating_duration_since(*over) < CALM);
        let pause = recent.map_or(shortest, |(last, _)| (last * 2).min(longest));
        self.last = Some((pause, now + pause));
        Some(crate::lease::jittered(pause))
    }
}

impl Backoff for Rewatch {
    /// Called at each event, of which a list alone brings some; only time makes it calm.
    fn reset(&mut self) {}
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_gone_when_several_looks_in_a_row_have_missed_it() {
        let lws = BTreeSet::from([OptionalKind::LeaderWorkerSet]);
        let none = BTreeSet::new();
        let mut missed = Missed::default();
        assert_eq!(missed.believe(&none, none.clone()), none);
        assert_eq!(missed.believe(&none, lws.clone()), lws);
        assert_eq!(missed.believe(&lws, none.clone()), lws);
        assert_eq!(missed.believe(&lws, lws.clone()), lws, "it was there all the time");
        assert!(missed.is_empty());
        for _ in 1..LOOKS_BEFORE_GONE {
            assert_eq!(missed.believe(&lws, none.clone()), lws);
            assert!(!missed.is_empty(), "so the next look is soon");
        }
        assert_eq!(missed.believe(&lws, none.clone()), none);
        assert!(missed.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_breaks_again_waits_longer_up_to_a_bound_until_it_has_held() {
        let mut rewatch = Rewatch::default();
        let mut next = || rewatch.next().expect("it never gives up").as_millis();
        for expected in [500, 1000, 2000, 4000, 4000] {
            let pause = next();
            assert!((expected * 9 / 10..=expected * 11 / 10).contains(&pause), "{pause} is not about {expected} ms");
        }
        tokio::time::advance(CALM + REWATCH.1).await;
        assert!(next() <= 550);
    }

    #[tokio::test(start_paused = true)]
    async fn the_events_of_a_list_do_not_shorten_the_next_pause() {
        let mut rewatch = Rewatch::default();
        rewatch.next();
        rewatch.reset();
        assert!(rewatch.next().is_some_and(|pause| pause >= Duration::from_millis(900)));
    }
}
