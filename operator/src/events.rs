//! Events of a model: one for each transition of its status, and none for what stays as it is.

use crate::status::transitions::{self, Severity};
use baton_crds::DisaggregatedModelStatus;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, Error};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The most that the API server takes as a note.
const NOTE_BYTES_MAX: usize = 1024;
/// How long the same words raise the count of the event that said them first; client-go's recorder has the same pause. An API
/// server keeps events for an hour.
const FOLDED_FOR: Duration = Duration::from_secs(6 * 60);

/// Publishes events in the name of one replica of the operator.
///
/// kube's own recorder is not used: it folds by reason alone, and so would tell of a second rollout in the words of the first.
pub struct Recorder {
    client: Client,
    identity: String,
    folds: Mutex<Folds>,
}

impl Recorder {
    /// The one of this process.
    pub fn new(client: Client, identity: &str) -> Self {
        Recorder { client, identity: identity.to_owned(), folds: Mutex::default() }
    }

    /// Tells what changed from one status to the next. An event that can't be written is let go: the status says the same.
    pub async fn publish(
        &self,
        object: &Value,
        previous: Option<&DisaggregatedModelStatus>,
        next: &DisaggregatedModelStatus,
    ) {
        let reference = reference(object);
        for told in transitions::events(previous, next) {
            let told = transitions::Event { note: cut(told.note, NOTE_BYTES_MAX), ..told };
            if let Err(error) = self.tell(&told, &reference).await {
                let namespace = reference.namespace.as_deref().unwrap_or_default();
                tracing::warn!(namespace, %error, reason = told.reason.as_str(), "can't write an event");
            }
        }
    }

    async fn tell(&self, told: &transitions::Event, reference: &ObjectReference) -> Result<(), Error> {
        let namespace = reference.namespace.as_deref().unwrap_or_default();
        let events: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        let now = Timestamp::now();
        let key = key(told, reference);
        let again = self.folds.lock().unwrap_or_else(PoisonError::into_inner).again(&key, now);
        if let Some((name, count)) = again {
            let series = json!({"series": {"count": count, "lastObservedTime": MicroTime(now)}});
            match events.patch(&name, &PatchParams::default(), &Patch::Merge(&series)).await {
                // Somebody has deleted it: it is told anew.
                Err(Error::Api(status)) if status.is_not_found() => {}
                answer => return answer.map(|_| ()),
            }
        }
        let event = event(told, reference, &self.identity, now);
        let name = event.metadata.name.clone().unwrap_or_default();
        events.create(&PostParams::default(), &event).await?;
        self.folds.lock().unwrap_or_else(PoisonError::into_inner).first(key, name, now);
        Ok(())
    }
}

/// Two events with one key say the same of the same object.
type Key = [u8; 32];

fn key(told: &transitions::Event, reference: &ObjectReference) -> Key {
    let loud = told.severity == Severity::Warning;
    let words = json!([reference.uid, reference.namespace, reference.name, loud, told.reason.as_str(), told.note]);
    *blake3::hash(words.to_string().as_bytes()).as_bytes()
}

/// Events of the last minutes: name, how often it was told, and when last.
#[derive(Default)]
struct Folds(HashMap<Key, (String, i32, Timestamp)>);

impl Folds {
    /// The event that said the same, and how often it is told with this time.
    fn again(&mut self, key: &Key, now: Timestamp) -> Option<(String, i32)> {
        self.0.retain(|_, (_, _, last)| now.duration_since(*last).unsigned_abs() < FOLDED_FOR);
        let (name, count, last) = self.0.get_mut(key)?;
        (*count, *last) = (count.saturating_add(1), now);
        Some((name.clone(), *count))
    }

    fn first(&mut self, key: Key, name: String, now: Timestamp) {
        self.0.insert(key, (name, 1, now));
    }
}

fn event(told: &transitions::Event, reference: &ObjectReference, identity: &str, now: Timestamp) -> Event {
    let name = format!("{}.{:x}", reference.name.as_deref().unwrap_or_default(), now.as_nanosecond());
    Event {
        metadata: ObjectMeta { name: Some(name), namespace: reference.namespace.clone(), ..ObjectMeta::default() },
        event_time: Some(MicroTime(now)),
        type_: Some(
            match told.severity {
                Severity::Normal => "Normal",
                Severity::Warning => "Warning",
            }
            .to_owned(),
        ),
        reason: Some(told.reason.to_string()),
        action: Some("Reconcile".to_owned()),
        note: Some(told.note.clone()),
        regarding: Some(reference.clone()),
        reporting_controller: Some("baton-operator".to_owned()),
        reporting_instance: Some(identity.to_owned()),
        ..Event::default()
    }
}

fn reference(object: &Value) -> ObjectReference {
    let field =
        |name: &str| object.pointer("/metadata").and_then(|metadata| metadata.get(name)?.as_str()).map(str::to_owned);
    ObjectReference {
        api_version: Some(baton_crds::API_VERSION.to_owned()),
        kind: Some(baton_crds::KIND.to_owned()),
        name: field("name"),
        namespace: field("namespace"),
        uid: field("uid"),
        resource_version: field("resourceVersion"),
        field_path: None,
    }
}

/// At most so many bytes, cut between characters.
fn cut(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        let end = (0..=bytes_max - '…'.len_utf8()).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_crds::Reason;

    fn told(note: &str) -> transitions::Event {
        transitions::Event { severity: Severity::Warning, reason: Reason::PodsNotReady, note: note.to_owned() }
    }

    #[test]
    fn the_same_words_about_the_same_object_are_counted_and_others_are_told_by_themselves() {
        let of = |uid: &str| ObjectReference { uid: Some(uid.to_owned()), ..ObjectReference::default() };
        let start = Timestamp::UNIX_EPOCH;
        let mut folds = Folds::default();
        let first = key(&told("a"), &of("1"));
        assert_eq!(folds.again(&first, start), None);
        folds.first(first, "event".to_owned(), start);
        assert_eq!(folds.again(&first, start), Some(("event".to_owned(), 2)));
        let later = start + FOLDED_FOR / 2;
        assert_eq!(folds.again(&first, later), Some(("event".to_owned(), 3)));
        for other in [key(&told("b"), &of("1")), key(&told("a"), &of("2"))] {
            assert_eq!(folds.again(&other, later), None);
        }
        // From one time to the next, not from the first.
        assert_eq!(folds.again(&first, later + FOLDED_FOR / 2), Some(("event".to_owned(), 4)));
        assert_eq!(folds.again(&first, later + FOLDED_FOR * 2), None);
        assert!(folds.0.is_empty(), "what is over is forgotten");
    }

    #[test]
    fn a_model_that_changes_is_the_same_model() {
        let reference_in = |version: &str| {
            reference(&json!({"metadata": {"name": "tiny", "namespace": "a", "uid": "1", "resourceVersion": version}}))
        };
        assert_eq!(key(&told("a"), &reference_in("1")), key(&told("a"), &reference_in("2")));
    }

    #[test]
    fn a_long_note_is_cut_between_characters() {
        assert_eq!(cut("short".to_owned(), 10), "short");
        let long = cut("é".repeat(1000), NOTE_BYTES_MAX);
        assert!(long.len() <= NOTE_BYTES_MAX && long.ends_with("é…"), "{} bytes", long.len());
    }
}
