//! Manifests that tests apply, and what lies beside them in a namespace.

use super::{Admin, Type};
use anyhow::Result;
use serde_json::{Value, json};

/// The claim that the manifests' models lie on.
pub const CLAIM: &str = "models";

/// A small model of Baton's own engine: one prefill and one decode worker.
pub fn tiny(name: &str) -> Value {
    json!({
        "apiVersion": baton_crds::API_VERSION,
        "kind": baton_crds::KIND,
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": format!("pvc://{CLAIM}/tiny")},
            "prefill": {"replicas": 1},
            "decode": {"replicas": 1},
        },
    })
}

/// A model of an engine that computes across pods.
pub fn foreign(name: &str) -> Value {
    with(tiny(name), &json!({"spec": {"engine": {"type": "VLLM", "image": "registry.example.com/vllm:v1"}}}))
}

/// The same with a patch laid over it: objects are merged, null removes, anything else replaces (RFC 7386).
#[must_use]
pub fn with(mut manifest: Value, patch: &Value) -> Value {
    merge(&mut manifest, patch);
    manifest
}

fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key.as_str()).or_insert(Value::Null), value);
        }
    }
}

/// Makes the claim [`CLAIM`] with a volume of its own, bound as soon as the controllers see it.
///
/// # Errors
/// When the API server refuses.
pub fn claim(admin: &Admin, namespace: &str) -> Result<()> {
    let volume = format!("{CLAIM}-{namespace}");
    let size = json!({"storage": "1Gi"});
    admin.apply(
        Type::VOLUME,
        "",
        &json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume},
            "spec": {
                "capacity": size, "accessModes": ["ReadOnlyMany"], "storageClassName": "none",
                "persistentVolumeReclaimPolicy": "Retain",
                // Nothing is mounted on a hollow node.
                "hostPath": {"path": "/var/empty"},
                "claimRef": {"namespace": namespace, "name": CLAIM},
            },
        }),
    )?;
    admin.apply(
        Type::CLAIM,
        namespace,
        &json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": CLAIM},
            "spec": {
                "accessModes": ["ReadOnlyMany"], "storageClassName": "none", "volumeName": volume,
                "resources": {"requests": size},
            },
        }),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_merges_replaces_and_removes() {
        let base = json!({"a": {"b": 1, "c": [1, 2]}, "d": 4});
        let patch = json!({"a": {"b": null, "c": [3], "e": {"f": 5}}});
        assert_eq!(with(base, &patch), json!({"a": {"c": [3], "e": {"f": 5}}, "d": 4}));
    }

    #[test]
    fn the_manifests_are_ones_that_the_operator_takes() {
        for manifest in
            [tiny("m"), foreign("m"), with(foreign("m"), &json!({"spec": {"decode": {"nodesPerReplica": 2}}}))]
        {
            let text = serde_yaml::to_string(&manifest).expect("JSON is YAML");
            assert!(baton_operator::manifest::read_one(&text).is_ok(), "{text}");
        }
    }
}
