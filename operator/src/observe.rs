//! Reads everything that a reconcile decides from, as it is now and not as a cache remembers it.
//!
//! Objects by label, one list for each kind; Secrets by name, because the operator may not list them. If any of it
//! can't be read there is no observation: nothing is decided from a part, and so nothing is ever deleted because a list was short.

use crate::child::Kind;
use crate::cluster::{Cluster, MANAGER, Resource};
use crate::desired::names;
use crate::observed::{Missing, Observed};
use crate::plan::WorkloadRole;
use crate::progress::ProgressReader;
use crate::site::OptionalKind;
use baton_crds::labels::{MODEL, WORKLOAD_ROLE};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Requests of one reconcile that run at once: with 8 reconciles, 32 connections at most.
const READS_AT_ONCE: usize = 4;

/// What could not be read.
#[derive(Debug, thiserror::Error)]
#[error("can't read {what}: {source}")]
pub struct ReadError {
    /// The kind of objects.
    pub what: &'static str,
    /// Why.
    #[source]
    pub source: kube::Error,
}

impl ReadError {
    pub(crate) fn of(what: &'static str) -> impl Fn(kube::Error) -> ReadError {
        move |source| ReadError { what, source }
    }
}

/// Reads everything about a model but itself. `manifest` is the model as it stands, right or wrong.
///
/// # Errors
/// When any of it can't be read.
pub async fn observe(
    cluster: &Cluster,
    progress: &ProgressReader,
    kinds: &BTreeSet<OptionalKind>,
    namespace: &str,
    name: &str,
    manifest: &Value,
) -> Result<Observed, ReadError> {
    let (children, pods, missing) = tokio::try_join!(
        children(cluster, kinds, namespace, name, manifest),
        pods(cluster, namespace, name),
        missing(cluster, namespace, manifest),
    )?;
    let downloads = progress.read(&pods).await;
    Ok(Observed { children, pods, missing, downloads, ..Observed::default() })
}

async fn children(
    cluster: &Cluster,
    kinds: &BTreeSet<OptionalKind>,
    namespace: &str,
    name: &str,
    manifest: &Value,
) -> Result<BTreeMap<(Kind, String), Value>, ReadError> {
    let listed = Kind::ALL.into_iter().filter(|kind| match kind {
        Kind::Secret => false,
        Kind::LeaderWorkerSet => kinds.contains(&OptionalKind::LeaderWorkerSet),
        Kind::PodMonitor => kinds.contains(&OptionalKind::PodMonitor),
        Kind::ServiceAccount
        | Kind::ConfigMap
        | Kind::NetworkPolicy
        | Kind::PodDisruptionBudget
        | Kind::Deployment
        | Kind::Service => true,
    });
    let selector = format!("{MODEL}={name}");
    let lists = stream::iter(listed.map(|kind| {
        let selector = &selector;
        async move {
            let items = cluster.list::<Value>(Resource::of(kind), namespace, selector).await;
            items.map(|items| (kind, items)).map_err(ReadError::of(kind.plural()))
        }
    }));
    let lists: Vec<(Kind, Vec<Value>)> = lists.buffer_unordered(READS_AT_ONCE).try_collect().await?;
    let mut children: BTreeMap<(Kind, String), Value> = BTreeMap::new();
    for (kind, items) in lists {
        let named =
            items.into_iter().filter_map(|item| Some(((kind, text(&item, "/metadata/name")?.to_owned()), kept(item))));
        children.extend(named);
    }
    let mut roles = wanted_roles(manifest);
    // Of a role that is wanted no more, as long as something of it is there.
    let labelled =
        children.values().filter_map(|child| child.pointer("/metadata/labels")?.get(WORKLOAD_ROLE)?.as_str());
    roles.extend(labelled.filter_map(role_of));
    let mut secrets = vec![names::signing_key(name), names::signing_public(name), names::authority(name)];
    secrets.extend(roles.iter().map(|role| names::certificate(name, *role)));
    let secrets = stream::iter(secrets.into_iter().map(|secret| async move {
        let found = cluster.get(Resource::of(Kind::Secret), namespace, &secret).await;
        found.map(|found| found.map(|found| ((Kind::Secret, secret), kept(found)))).map_err(ReadError::of("secrets"))
    }));
    let secrets: Vec<_> = secrets.buffer_unordered(READS_AT_ONCE).try_collect().await?;
    children.extend(secrets.into_iter().flatten());
    Ok(children)
}

/// What is kept of an object for as long as a reconcile takes: of its managed fields, which are half of it, our own.
pub(crate) fn kept(mut object: Value) -> Value {
    if let Some(Value::Array(entries)) = object.pointer_mut("/metadata/managedFields") {
        entries.retain(|entry| entry.get("manager").and_then(Value::as_str) == Some(MANAGER));
    }
    object
}

async fn pods(cluster: &Cluster, namespace: &str, name: &str) -> Result<Vec<Pod>, ReadError> {
    let pods = cluster.list::<Pod>(Resource::PODS, namespace, &format!("{MODEL}={name}")).await;
    let mut pods = pods.map_err(ReadError::of("pods"))?;
    // Half of a pod, and nobody asks for them.
    pods.iter_mut().for_each(|pod| pod.metadata.managed_fields = None);
    Ok(pods)
}

async fn missing(cluster: &Cluster, namespace: &str, manifest: &Value) -> Result<Vec<Missing>, ReadError> {
    let looked_for = stream::iter(references(manifest).into_iter().map(|reference| async move {
        let there = match &reference {
            Missing::Claim(claim) => cluster.exists(Resource::CLAIMS, namespace, claim).await,
            Missing::Secret(secret) => cluster.exists(Resource::of(Kind::Secret), namespace, secret).await,
        };
        there.map(|there| (!there).then_some(reference)).map_err(ReadError::of("what the manifest refers to"))
    }));
    let missing: Vec<Option<Missing>> = looked_for.buffered(READS_AT_ONCE).try_collect().await?;
    Ok(missing.into_iter().flatten().collect())
}

/// What a manifest refers to, right or wrong as it may be. A name that can't be one is left out, for it goes into a URL.
fn references(manifest: &Value) -> Vec<Missing> {
    // Nothing that would be another path in a URL.
    let named = |text: &str| {
        text.bytes().any(|byte| byte != b'.')
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'))
    };
    let claim = text(manifest, "/spec/model/uri").and_then(|uri| uri.strip_prefix("pvc://"));
    let claim = claim.map(|rest| rest.split('/').next().unwrap_or_default());
    let cache = text(manifest, "/spec/model/cache/claimName");
    let secret = text(manifest, "/spec/model/credentialsSecretRef/name");
    let claims = claim.into_iter().chain(cache).filter(|name| named(name)).map(|name| Missing::Claim(name.to_owned()));
    claims.chain(secret.filter(|name| named(name)).map(|name| Missing::Secret(name.to_owned()))).collect()
}

/// The roles that a manifest asks for, right or wrong as it may be.
fn wanted_roles(manifest: &Value) -> BTreeSet<WorkloadRole> {
    let mut roles = BTreeSet::from([WorkloadRole::Decode]);
    if text(manifest, "/spec/disaggregation/policy") != Some("Never") {
        roles.insert(WorkloadRole::Prefill);
    }
    if text(manifest, "/spec/routing/mode") == Some("Standalone") {
        roles.insert(WorkloadRole::Proxy);
    }
    roles
}

pub(crate) fn role_of(word: &str) -> Option<WorkloadRole> {
    WorkloadRole::ALL.into_iter().find(|role| role.as_str() == word)
}

pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> Option<&'a str> {
    value.pointer(pointer).and_then(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn of_managed_fields_those_of_ours_are_kept_and_objects_without_any_are_as_they_were() {
        let entry = |manager: &str| json!({"manager": manager, "fieldsV1": {"f:spec": {}}});
        let object = json!({"metadata": {"managedFields": [entry("kubelet"), entry(MANAGER)]}, "spec": 1});
        assert_eq!(kept(object), json!({"metadata": {"managedFields": [entry(MANAGER)]}, "spec": 1}));
        for bare in [json!({"metadata": {}}), json!({}), json!(null)] {
            assert_eq!(kept(bare.clone()), bare);
        }
    }

    #[test]
    fn what_a_manifest_refers_to_is_found_in_right_and_in_wrong_ones() {
        for (spec, expect) in [
            (json!({"model": {"uri": "pvc://models/tiny"}}), vec![Missing::Claim("models".to_owned())]),
            (json!({"model": {"uri": "pvc://models"}}), vec![Missing::Claim("models".to_owned())]),
            (json!({"model": {"uri": "pvc://../x"}}), vec![]),
            (json!({"model": {"uri": "pvc://a b"}}), vec![]),
            (json!({"model": 7}), vec![]),
            (
                json!({"model": {"uri": "hf://a/b", "cache": {"claimName": "cache"}, "credentialsSecretRef": {"name": "hub"}}}),
                vec![Missing::Claim("cache".to_owned()), Missing::Secret("hub".to_owned())],
            ),
        ] {
            assert_eq!(references(&json!({ "spec": spec })), expect, "{spec}");
        }
    }

    #[test]
    fn a_manifest_asks_for_prefill_unless_it_says_never_and_for_a_front_door_if_it_says_so() {
        let roles =
            |spec| wanted_roles(&json!({ "spec": spec })).into_iter().map(WorkloadRole::as_str).collect::<Vec<_>>();
        assert_eq!(roles(json!({})), ["prefill", "decode"]);
        assert_eq!(
            roles(json!({"disaggregation": {"policy": "Never"}, "routing": {"mode": "Standalone"}})),
            ["decode", "proxy"]
        );
    }
}
