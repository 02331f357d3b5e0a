//! What a watch keeps of an object: some of its metadata, read in a way that no object can break.
//!
//! `metadata.managedFields` is as deep as somebody wants it to be, and whoever may write an object may forge it. A parser that
//! follows it gives up at some depth, and with it the whole list, on which all models depend. Here what is not kept is passed
//! over without recursion, and takes no memory.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::Resource;
use kube::core::ObjectMeta;
use serde::{Deserialize, Deserializer};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::marker::PhantomData;

/// The metadata of an object of kind `K`.
#[derive(Clone, Debug)]
pub struct Watched<K> {
    /// Identity, version, generation, times, labels and owners; nothing else is filled.
    pub metadata: ObjectMeta,
    kind: PhantomData<fn() -> K>,
}

impl<K> Watched<K> {
    /// An object of which this is known.
    pub fn new(metadata: ObjectMeta) -> Self {
        Watched { metadata, kind: PhantomData }
    }
}

#[derive(Deserialize)]
struct Kept {
    #[serde(default)]
    metadata: KeptMetadata,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct KeptMetadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    labels: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
}

impl<'de, K> Deserialize<'de> for Watched<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Kept { metadata } = Kept::deserialize(deserializer)?;
        Ok(Watched::new(ObjectMeta {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            resource_version: metadata.resource_version,
            generation: metadata.generation,
            creation_timestamp: metadata.creation_timestamp,
            deletion_timestamp: metadata.deletion_timestamp,
            labels: metadata.labels,
            owner_references: metadata.owner_references,
            ..ObjectMeta::default()
        }))
    }
}

impl<K: Resource> Resource for Watched<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    /// The API server sends metadata alone, so that no spec travels either.
    fn metadata_api() -> bool {
        true
    }

    fn kind(kind: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(kind)
    }

    fn group(kind: &Self::DynamicType) -> Cow<'_, str> {
        K::group(kind)
    }

    fn version(kind: &Self::DynamicType) -> Cow<'_, str> {
        K::version(kind)
    }

    fn plural(kind: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(kind)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_crds::DisaggregatedModel;
    use kube::core::{ObjectList, WatchEvent};

    type Model = Watched<DisaggregatedModel>;

    /// An object whose managed fields nobody's parser follows to their end.
    fn deep(name: &str) -> String {
        let fields = format!("{}{{}}{}", r#"{"f:a":"#.repeat(5000), "}".repeat(5000));
        format!(
            r#"{{"apiVersion":"meta.k8s.io/v1","kind":"PartialObjectMetadata","metadata":{{"managedFields":[{{"fieldsV1":{fields}}}],
            "name":"{name}","namespace":"a","uid":"u","resourceVersion":"7","generation":3,"labels":{{"l":"1"}},"annotations":{{"x":"y"}}}}}}"#
        )
    }

    #[test]
    fn no_depth_of_managed_fields_breaks_a_list_or_a_watch() {
        let list = format!(
            r#"{{"kind":"PartialObjectMetadataList","apiVersion":"meta.k8s.io/v1","metadata":{{"resourceVersion":"9"}},"items":[{},{}]}}"#,
            deep("m"),
            deep("n")
        );
        let list: ObjectList<Model> = serde_json::from_str(&list).expect("a list");
        let names: Vec<_> = list.items.iter().map(|model| model.metadata.name.as_deref()).collect();
        assert_eq!(names, [Some("m"), Some("n")]);

        let event = format!(r#"{{"type":"MODIFIED","object":{}}}"#, deep("m"));
        let WatchEvent::Modified(model) = serde_json::from_str::<WatchEvent<Model>>(&event).expect("an event") else {
            panic!("it is a change");
        };
        let metadata = model.metadata;
        assert_eq!((metadata.uid.as_deref(), metadata.generation), (Some("u"), Some(3)));
        assert_eq!(metadata.labels, Some([("l".to_owned(), "1".to_owned())].into()));
        assert_eq!(
            (metadata.annotations, metadata.managed_fields),
            (None, None),
            "they are most of the bytes, and not used"
        );
    }
}
