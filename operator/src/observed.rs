//! What was read from the cluster before anything is decided: a value, so that decisions need no client.

use crate::child::Kind;
use crate::credentials::Credentials;
use crate::plan::{Workload, WorkloadRole};
use crate::site::Owner;
use baton_crds::labels::{MODEL, REVISION, WORKLOAD_ROLE};
use baton_wire::progress::Progress;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use std::collections::BTreeMap;

/// What was read.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Every object that carries the model's label, and each that stands where one of ours would go, whole, by kind and name.
    /// After apply: what the API server answered to a write, so that a workload's generation runs ahead of its counts.
    pub children: BTreeMap<(Kind, String), Value>,
    /// The model's pods.
    pub pods: Vec<Pod>,
    /// Keys and certificates, those found and those made because they were missing or will end soon.
    pub credentials: Credentials,
    /// What the manifest refers to and is not there, or not usable.
    pub missing: Vec<Missing>,
    /// How far a download is, by pod, as the pod itself tells.
    pub downloads: BTreeMap<String, Progress>,
}

/// Something that the manifest refers to and that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// A PersistentVolumeClaim of this name.
    Claim(String),
    /// A Secret of this name.
    Secret(String),
}

/// The pods that the client Service selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selected {
    /// Their revision.
    pub revision: String,
    /// Their role.
    pub role: WorkloadRole,
}

impl Observed {
    /// The model's workloads. What somebody else made under our labels counts for nothing, and neither does a workload that is
    /// being deleted: its pods go, whatever its counts still say.
    pub fn workloads(&self, model: &str, owner: &Owner) -> Vec<Workload> {
        let ours = self.children.iter().filter(|(_, object)| is_ours(object, model, owner));
        ours.filter_map(|((kind, _), object)| Workload::read(*kind, object)).collect()
    }

    /// The pods that the client Service selects; none where there is no such Service, or it selects by something else.
    pub fn selected(&self, model: &str, owner: &Owner) -> Option<Selected> {
        let service = self.children.get(&(Kind::Service, model.to_owned()))?;
        let selector = service.pointer("/spec/selector").filter(|_| is_ours(service, model, owner))?;
        let word = |key: &str| selector.get(key).and_then(Value::as_str);
        (word(MODEL) == Some(model)).then_some(())?;
        Some(Selected { revision: word(REVISION)?.to_owned(), role: WorkloadRole::from_word(word(WORKLOAD_ROLE)?)? })
    }
}

/// Whether an object was made for this very model and stays: the label alone could be anybody's, and an object of an earlier
/// model of the same name has another uid.
fn is_ours(object: &Value, model: &str, owner: &Owner) -> bool {
    let metadata = &object["metadata"];
    let owned = metadata["ownerReferences"].as_array().into_iter().flatten().any(|reference| {
        reference["controller"] == Value::Bool(true)
            && owner.uid.is_some()
            && reference["uid"].as_str() == owner.uid.as_deref()
    });
    owned && metadata["labels"][MODEL].as_str() == Some(model) && metadata.get("deletionTimestamp").is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn owner() -> Owner {
        Owner { namespace: "default".to_owned(), uid: Some("u1".to_owned()) }
    }

    fn service(change: impl FnOnce(&mut Value)) -> Observed {
        let mut object = json!({
            "metadata": {
                "name": "tiny",
                "labels": {MODEL: "tiny"},
                "ownerReferences": [{"kind": "DisaggregatedModel", "name": "tiny", "uid": "u1", "controller": true}],
            },
            "spec": {"selector": {MODEL: "tiny", REVISION: "aaaaaaaa", WORKLOAD_ROLE: "decode"}},
        });
        change(&mut object);
        Observed { children: [((Kind::Service, "tiny".to_owned()), object)].into(), ..Observed::default() }
    }

    fn check(change: impl FnOnce(&mut Value), found: bool) {
        let selected = service(change).selected("tiny", &owner());
        let expected = Selected { revision: "aaaaaaaa".to_owned(), role: WorkloadRole::Decode };
        assert_eq!(selected, found.then_some(expected));
    }

    #[test]
    fn the_client_service_is_read_only_where_it_is_ours_and_selects_by_our_labels() {
        check(|_| (), true);
        check(|object| object["metadata"]["ownerReferences"][0]["uid"] = json!("u2"), false);
        check(|object| object["metadata"]["ownerReferences"][0]["controller"] = json!(false), false);
        check(|object| object["metadata"]["ownerReferences"] = json!(null), false);
        check(|object| object["metadata"]["labels"] = json!(null), false);
        check(|object| object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"), false);
        check(|object| object["spec"]["selector"] = json!({"app": "tiny"}), false);
        check(|object| object["spec"]["selector"][MODEL] = json!("other"), false);
        check(|object| object["spec"]["selector"][WORKLOAD_ROLE] = json!("prefill-decode"), false);
        check(|object| object["spec"] = json!(null), false);
    }

    #[test]
    fn nothing_is_ours_where_no_cluster_gave_a_uid() {
        let nobody = Owner { uid: None, ..owner() };
        let mut observed = service(|object| object["metadata"]["ownerReferences"][0]["uid"] = json!(null));
        assert_eq!(observed.selected("tiny", &nobody), None);
        observed = service(|_| ());
        assert_eq!(observed.selected("tiny", &nobody), None);
    }
}
