//! From what happened in the cluster to which models are reconciled when.
//!
//! Triggers of one model within [`WINDOW`] of the first become one reconcile, which so sees all that they were about, and is never
//! put off by those that follow. Knows the models that there are, over all namespaces that are watched.

use crate::metrics::Metrics;
use crate::watched::Watched;
use baton_crds::DisaggregatedModel;
use kube::ResourceExt as _;
use kube::core::ObjectMeta;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::Event;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// A model's metadata: all that is kept of it between two reconciles, so that a thousand models take little memory, and that an
/// object which this version can't read breaks no watch. A reconcile reads the rest anew.
pub type ModelMeta = Watched<DisaggregatedModel>;
/// Names one model.
pub type ModelRef = ObjectRef<ModelMeta>;

/// From a model's first trigger to its reconcile. Long enough for the events of one rollout step to meet, short enough that a
/// failing pod is told of within a second.
pub const WINDOW: Duration = Duration::from_millis(150);

/// The name of no model, because no object's name may begin with a dot: its reconcile is the queue's heartbeat.
const HEARTBEAT: &str = ".heartbeat";

/// Something that calls for a reconcile.
#[derive(Debug)]
pub enum Trigger {
    /// Something about models, in one of the places that are watched.
    Models(usize, Box<Event<ModelMeta>>),
    /// The models in one of the places can't be listed now, for want of a right or of the whole API server.
    Unlisted(usize),
    /// An object that belongs to a model changed: its namespace and the model's name.
    Child(String, String),
    /// Something that concerns all models.
    All,
}

/// What is told of models that went.
pub trait Forget: Send + Sync {
    /// A model is gone.
    fn forget(&self, namespace: &str, name: &str, uid: Option<&str>);
    /// Whether this version of a model was made by our own write of its status, and so is no news.
    fn wrote(&self, uid: &str, version: &str) -> bool;
}

/// The queue before the reconciles.
pub struct Queue {
    triggers: mpsc::Receiver<Trigger>,
    due: mpsc::Sender<ModelRef>,
    models: Writer<ModelMeta>,
    store: Store<ModelMeta>,
    places: Vec<Place>,
    ready: bool,
    waiting: VecDeque<(Instant, ModelRef)>,
    queued: HashSet<ModelRef>,
    memory: Arc<dyn Forget>,
    metrics: Arc<Metrics>,
}

/// One watched namespace, or all.
#[derive(Default)]
struct Place {
    /// What its present list has shown so far.
    listing: HashSet<ModelRef>,
    known: HashMap<ModelRef, Option<String>>,
    listed: bool,
}

impl Queue {
    /// A queue over that many watched places, that sends models whose time has come to `due`.
    pub fn new(
        places: usize,
        triggers: mpsc::Receiver<Trigger>,
        due: mpsc::Sender<ModelRef>,
        memory: Arc<dyn Forget>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let models = Writer::new(());
        let places = (0..places).map(|_| Place::default()).collect();
        Queue {
            store: models.as_reader(),
            triggers,
            due,
            models,
            places,
            ready: false,
            waiting: VecDeque::new(),
            queued: HashSet::new(),
            memory,
            metrics,
        }
    }

    /// The models that there are; ready once every place was listed.
    pub fn store(&self) -> Store<ModelMeta> {
        self.store.clone()
    }

    /// Runs until nobody can trigger any more, or nobody listens.
    pub async fn run(mut self) {
        loop {
            let next = self.waiting.front().map(|(time, _)| *time);
            let sleep = async {
                match next {
                    Some(time) => sleep_until(time).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                trigger = self.triggers.recv() => match trigger {
                    Some(trigger) => self.take(trigger),
                    None => return,
                },
                () = sleep => {
                    let Some((_, model)) = self.waiting.pop_front() else { continue };
                    self.queued.remove(&model);
                    self.count();
                    if self.due.send(model).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn take(&mut self, trigger: Trigger) {
        match trigger {
            Trigger::Models(place, event) => self.take_model(place, *event),
            // The others' models don't wait for these: they come when they can be listed.
            Trigger::Unlisted(place) => {
                self.places[place].listed = true;
                self.begin_once_listed();
            }
            Trigger::Child(namespace, name) => {
                let model = ModelRef::new(&name).within(&namespace);
                if self.places.iter().any(|place| place.known.contains_key(&model)) {
                    self.put(model);
                }
            }
            Trigger::All => {
                let all: Vec<ModelRef> = self.places.iter().flat_map(|place| place.known.keys().cloned()).collect();
                all.into_iter().for_each(|model| self.put(model));
            }
        }
    }

    fn take_model(&mut self, place: usize, event: Event<ModelMeta>) {
        match event {
            Event::Init => self.places[place].listing.clear(),
            Event::InitApply(model) => {
                self.places[place].listing.insert(ObjectRef::from_obj(&model));
                self.keep(place, model);
            }
            Event::Apply(model) => self.keep(place, model),
            Event::Delete(model) => self.drop_model(place, &ObjectRef::from_obj(&model)),
            Event::InitDone => {
                let listed = std::mem::take(&mut self.places[place].listing);
                let gone: Vec<ModelRef> =
                    self.places[place].known.keys().filter(|model| !listed.contains(model)).cloned().collect();
                gone.iter().for_each(|model| self.drop_model(place, model));
                self.places[place].listed = true;
                self.begin_once_listed();
            }
        }
        self.metrics.models.set(self.places.iter().map(|place| place.known.len() as i64).sum());
    }

    fn begin_once_listed(&mut self) {
        if !self.ready && self.places.iter().all(|place| place.listed) {
            self.ready = true;
            self.models.apply_watcher_event(&Event::InitDone);
            let beat = heartbeat();
            let name = ObjectRef::from_obj(&beat);
            self.models.apply_watcher_event(&Event::Apply(beat));
            self.put(name);
        }
    }

    fn keep(&mut self, place: usize, model: ModelMeta) {
        let name = ObjectRef::from_obj(&model);
        let uid = model.metadata.uid.clone();
        let own = uid.as_deref().zip(model.metadata.resource_version.as_deref());
        let is_news = !own.is_some_and(|(uid, version)| self.memory.wrote(uid, version));
        let was = self.places[place].known.insert(name.clone(), uid.clone());
        if let Some(was) = was.filter(|was| *was != uid) {
            // Deleted and made anew between two looks: what is remembered was about the other one.
            self.memory.forget(&model.namespace().unwrap_or_default(), &model.name_any(), was.as_deref());
        }
        let event = if self.ready { Event::Apply(model) } else { Event::InitApply(model) };
        self.models.apply_watcher_event(&event);
        if is_news {
            self.put(name);
        }
    }

    fn drop_model(&mut self, place: usize, model: &ModelRef) {
        let uid = self.places[place].known.remove(model).flatten();
        let namespace = model.namespace.clone().unwrap_or_default();
        self.memory.forget(&namespace, &model.name, uid.as_deref());
        let gone = ModelMeta::new(ObjectMeta {
            name: Some(model.name.clone()),
            namespace: model.namespace.clone(),
            ..ObjectMeta::default()
        });
        self.models.apply_watcher_event(&Event::Delete(gone));
    }

    fn put(&mut self, model: ModelRef) {
        if self.queued.insert(model.clone()) {
            self.waiting.push_back((Instant::now() + WINDOW, model));
            self.count();
        }
    }

    fn count(&self) {
        self.metrics.queued.set(self.waiting.len() as i64);
    }
}

fn heartbeat() -> ModelMeta {
    ModelMeta::new(ObjectMeta { name: Some(HEARTBEAT.to_owned()), ..ObjectMeta::default() })
}

/// Whether what is due is not a model but the queue's heartbeat.
pub fn is_heartbeat(model: &ModelMeta) -> bool {
    model.metadata.name.as_deref() == Some(HEARTBEAT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Memory {
        forgotten: Mutex<Vec<String>>,
    }

    impl Forget for Memory {
        fn forget(&self, _: &str, name: &str, _: Option<&str>) {
            self.forgotten.lock().expect("no test panics holding it").push(name.to_owned());
        }

        fn wrote(&self, _: &str, version: &str) -> bool {
            version == "own"
        }
    }

    fn model(namespace: &str, name: &str, version: &str) -> ModelMeta {
        ModelMeta::new(ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            uid: Some(format!("uid-{name}")),
            resource_version: Some(version.to_owned()),
            ..ObjectMeta::default()
        })
    }

    struct Desk {
        triggers: mpsc::Sender<Trigger>,
        due: mpsc::Receiver<ModelRef>,
        store: Store<ModelMeta>,
        memory: Arc<Memory>,
    }

    fn desk(places: usize) -> Desk {
        let (triggers, receiver) = mpsc::channel(100);
        let (sender, due) = mpsc::channel(100);
        let memory = Arc::new(Memory::default());
        let queue = Queue::new(places, receiver, sender, memory.clone(), Arc::new(Metrics::new()));
        let store = queue.store();
        tokio::spawn(queue.run());
        Desk { triggers, due, store, memory }
    }

    impl Desk {
        async fn send(&self, trigger: Trigger) {
            self.triggers.send(trigger).await.expect("the queue runs");
        }

        async fn list(&self, place: usize, models: Vec<ModelMeta>) {
            self.send(Trigger::Models(place, Event::Init.into())).await;
            for model in models {
                self.send(Trigger::Models(place, Event::InitApply(model).into())).await;
            }
            self.send(Trigger::Models(place, Event::InitDone.into())).await;
        }

        async fn next(&mut self) -> String {
            self.due.recv().await.expect("the queue runs").name
        }

        async fn rest(&mut self) -> Vec<String> {
            tokio::time::sleep(WINDOW * 2).await;
            let mut rest = Vec::new();
            while let Ok(model) = self.due.try_recv() {
                rest.push(model.name);
            }
            rest
        }
    }

    #[tokio::test(start_paused = true)]
    async fn triggers_within_a_window_become_one_reconcile_that_none_of_them_puts_off() {
        let mut desk = desk(1);
        desk.list(0, vec![model("a", "tiny", "1")]).await;
        assert_eq!(desk.rest().await, ["tiny", HEARTBEAT]);
        let begin = Instant::now();
        for _ in 0..20 {
            desk.send(Trigger::Child("a".to_owned(), "tiny".to_owned())).await;
            tokio::time::advance(WINDOW / 10).await;
        }
        assert_eq!(desk.next().await, "tiny");
        assert!(begin.elapsed() <= WINDOW * 2, "{:?}", begin.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn models_are_ready_once_every_namespace_was_listed() {
        let mut desk = desk(2);
        desk.list(0, vec![model("a", "tiny", "1")]).await;
        assert_eq!(desk.rest().await, ["tiny"]);
        assert!(desk.store.state().is_empty());
        desk.list(1, vec![model("b", "other", "1")]).await;
        assert_eq!(desk.rest().await, ["other", HEARTBEAT]);
        assert_eq!(desk.store.state().iter().filter(|model| !is_heartbeat(model)).count(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_namespace_that_can_not_be_listed_holds_up_no_other_and_comes_when_it_can() {
        let mut desk = desk(2);
        desk.list(0, vec![model("a", "tiny", "1")]).await;
        desk.send(Trigger::Unlisted(1)).await;
        assert_eq!(desk.rest().await, ["tiny", HEARTBEAT]);
        assert_eq!(desk.store.state().len(), 2);
        desk.list(1, vec![model("b", "other", "1")]).await;
        assert_eq!(desk.rest().await, ["other"]);
        assert_eq!(desk.store.state().len(), 3);
        // A later failure takes nothing away.
        desk.send(Trigger::Unlisted(0)).await;
        assert!(desk.rest().await.is_empty());
        assert_eq!(desk.store.state().len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_a_new_list_lacks_is_gone_and_those_of_other_namespaces_stay() {
        let mut desk = desk(2);
        desk.list(0, vec![model("a", "tiny", "1"), model("a", "more", "1")]).await;
        desk.list(1, vec![model("b", "other", "1")]).await;
        desk.rest().await;
        desk.list(0, vec![model("a", "more", "2")]).await;
        assert_eq!(desk.rest().await, ["more"]);
        assert_eq!(*desk.memory.forgotten.lock().expect("no test panics holding it"), ["tiny"]);
        let mut names: Vec<String> = desk.store.state().iter().map(|model| model.name_any()).collect();
        names.sort();
        assert_eq!(names, [HEARTBEAT, "more", "other"]);
    }

    #[tokio::test(start_paused = true)]
    async fn our_own_write_of_a_status_and_a_child_of_no_model_are_no_news() {
        let mut desk = desk(1);
        desk.list(0, vec![model("a", "tiny", "1")]).await;
        desk.rest().await;
        desk.send(Trigger::Models(0, Event::Apply(model("a", "tiny", "own")).into())).await;
        desk.send(Trigger::Child("a".to_owned(), "stranger".to_owned())).await;
        assert!(desk.rest().await.is_empty());
        desk.send(Trigger::All).await;
        assert_eq!(desk.rest().await, ["tiny"]);
    }
}
