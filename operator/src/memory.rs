//! What is remembered between two reconciles. None of it is needed: an operator that has just started knows nothing and does
//! the same, with a few requests more.

use crate::child::Kind;
use crate::metrics::Metrics;
use crate::queue::Forget;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is remembered, by model.
#[derive(Debug)]
pub struct Memory {
    models: Mutex<HashMap<(String, String), Remembered>>,
    versions: Mutex<HashMap<String, String>>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Remembered {
    failures: u32,
    unchanged: HashMap<(Kind, String), Mark>,
}

/// An object in a version, and what was applied to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The object.
    pub uid: String,
    /// Its version.
    pub version: String,
    /// Hash of what was applied.
    pub body: [u8; 32],
}

impl Memory {
    /// Nothing yet.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Memory { models: Mutex::default(), versions: Mutex::default(), metrics }
    }

    /// Whether applying this to the object left it unchanged, so that trying again is in vain: some difference that we see is none
    /// to the API server.
    pub fn is_unchanged(&self, model: (&str, &str), kind: Kind, name: &str, mark: &Mark) -> bool {
        let models = lock(&self.models);
        let found = models.get(&owned(model)).and_then(|model| model.unchanged.get(&(kind, name.to_owned())));
        found == Some(mark)
    }

    /// Remembers that applying left an object unchanged.
    pub fn unchanged(&self, model: (&str, &str), kind: Kind, name: &str, mark: Mark) {
        lock(&self.models).entry(owned(model)).or_default().unchanged.insert((kind, name.to_owned()), mark);
    }

    /// Counts a failed reconcile; how many there were in a row.
    pub fn failed(&self, model: (&str, &str)) -> u32 {
        let mut models = lock(&self.models);
        let failures = &mut models.entry(owned(model)).or_default().failures;
        *failures = failures.saturating_add(1);
        *failures
    }

    /// How many reconciles in a row have failed.
    pub fn failures(&self, model: (&str, &str)) -> u32 {
        lock(&self.models).get(&owned(model)).map_or(0, |model| model.failures)
    }

    /// Forgets failures.
    pub fn succeeded(&self, model: (&str, &str)) {
        if let Some(model) = lock(&self.models).get_mut(&owned(model)) {
            model.failures = 0;
        }
    }

    /// Remembers the version that writing a model's status made.
    pub fn wrote_status(&self, uid: &str, version: &str) {
        lock(&self.versions).insert(uid.to_owned(), version.to_owned());
    }
}

impl Forget for Memory {
    fn forget(&self, namespace: &str, name: &str, uid: Option<&str>) {
        lock(&self.models).remove(&owned((namespace, name)));
        if let Some(uid) = uid {
            lock(&self.versions).remove(uid);
        }
        self.metrics.forget(namespace, name);
    }

    fn wrote(&self, uid: &str, version: &str) -> bool {
        lock(&self.versions).get(uid).is_some_and(|wrote| wrote == version)
    }
}

fn owned((namespace, name): (&str, &str)) -> (String, String) {
    (namespace.to_owned(), name.to_owned())
}

/// A panic elsewhere leaves a map whole: each change is one call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
