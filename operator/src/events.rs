//! Events of a model: one for each transition of its status, and none for what stays as it is.

use crate::status::transitions::{self, Severity};
use baton_crds::DisaggregatedModelStatus;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use serde_json::Value;

/// The most that the API server takes as a note.
const NOTE_BYTES_MAX: usize = 1024;

/// Publishes events in the name of one replica of the operator. There is one for each process: it folds repetitions.
pub fn recorder(client: Client, identity: &str) -> Recorder {
    Recorder::new(client, Reporter { controller: "baton-operator".to_owned(), instance: Some(identity.to_owned()) })
}

/// Tells what changed from one status to the next. An event that can't be written is let go: the status says the same.
pub async fn publish(
    recorder: &Recorder,
    object: &Value,
    previous: Option<&DisaggregatedModelStatus>,
    next: &DisaggregatedModelStatus,
) {
    let reference = reference(object);
    for told in transitions::events(previous, next) {
        let event = Event {
            type_: match told.severity {
                Severity::Normal => EventType::Normal,
                Severity::Warning => EventType::Warning,
            },
            reason: told.reason.to_string(),
            note: Some(cut(told.note, NOTE_BYTES_MAX)),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        if let Err(error) = recorder.publish(&event, &reference).await {
            tracing::warn!(%error, reason = event.reason, "can't write an event");
        }
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

    #[test]
    fn a_long_note_is_cut_between_characters() {
        assert_eq!(cut("short".to_owned(), 10), "short");
        let long = cut("é".repeat(1000), NOTE_BYTES_MAX);
        assert!(long.len() <= NOTE_BYTES_MAX && long.ends_with("é…"), "{} bytes", long.len());
    }
}
