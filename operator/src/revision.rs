//! The revision of a manifest: equal where prefill and decode workers may be paired, different where pods must be replaced.

use crate::validated::{Colocation, EngineKind, PodSettings};
use crate::{ModelSource, RoleSettings, Validated};
use baton_crds::Dtype;
use serde::Serialize;

/// Hexadecimal digits of a revision: with 2^32 values, 100 revisions of one model collide with probability 10^-6.
const DIGITS: usize = 8;

/// Everything that enters the hash: what the two sides of a handover must agree on, and what pods are made of. docs/objects.md has
/// the same list. What is not here changes without a new revision: replicas and who sets them, the drain timeout, disruption,
/// the policy between Always and Conditional, the routing mode, discovery, the network policy, the monitor, names of Secrets that only
/// fetch the model, and the routing proxy's image. Fields are only ever added, with `skip_serializing_if` on their default, so
/// that a new version of the operator does not roll every model.
#[derive(Serialize)]
struct Revised<'a> {
    source: &'a ModelSource,
    served_name: &'a str,
    engine: EngineKind,
    image: &'a str,
    args: &'a [String],
    dtype: Option<Dtype>,
    max_model_length: Option<u32>,
    prefill: Option<Role<'a>>,
    decode: Role<'a>,
    colocation: Option<&'a Colocation>,
}

#[derive(Serialize)]
struct Role<'a> {
    nodes_per_replica: u32,
    kv_cache_bytes: u64,
    max_batch_tokens: u32,
    max_sequences: u32,
    prefill_chunk_tokens: u32,
    pod: &'a PodSettings,
}

impl<'a> From<&'a RoleSettings> for Role<'a> {
    fn from(role: &'a RoleSettings) -> Self {
        Role {
            nodes_per_replica: role.nodes_per_replica.get(),
            kv_cache_bytes: role.kv_cache_bytes.get(),
            max_batch_tokens: role.max_batch_tokens.get(),
            max_sequences: role.max_sequences.get(),
            prefill_chunk_tokens: role.prefill_chunk_tokens.get(),
            pod: &role.pod,
        }
    }
}

/// The revision of a manifest: 8 hexadecimal digits over both roles. `worker_image` is the installation's image of Baton's
/// worker, which counts where the manifest names none: what runs is what the image says.
pub fn revision(model: &Validated, worker_image: &str) -> String {
    let revised = Revised {
        source: &model.source,
        served_name: &model.served_name,
        engine: model.engine.kind,
        image: model.engine.image.as_deref().unwrap_or(worker_image),
        args: &model.engine.args,
        dtype: model.dtype,
        max_model_length: model.max_model_length.map(std::num::NonZeroU32::get),
        prefill: model.disaggregation.prefill().map(Role::from),
        decode: (&model.decode).into(),
        colocation: model.colocation.as_ref(),
    };
    let bytes = serde_json::to_vec(&revised).expect("strings and numbers always serialise");
    blake3::hash(&bytes).to_hex()[..DIGITS].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    const IMAGE: &str = "baton/worker:1";

    fn revision_of(spec: &str) -> String {
        let text = format!(
            "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {{name: m}}\nspec: {{model: {{uri: pvc://models}}{spec}}}\n"
        );
        revision(&manifest::read_one(&text).expect("a right manifest").validated, IMAGE)
    }

    fn revision_of_model(model: &str) -> String {
        let text = format!(
            "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {{name: m}}\nspec: {{model: {{{model}}}}}\n"
        );
        revision(&manifest::read_one(&text).expect("a right manifest").validated, IMAGE)
    }

    #[test]
    fn what_may_change_on_living_pods_does_not_enter() {
        let base = revision_of("");
        for same in [
            ", prefill: {replicas: 3}",
            ", prefill: {replicas: 1}",
            ", decode: {autoscaling: {provider: External}}",
            ", decode: {drainTimeoutSeconds: 5}",
            ", decode: {disruption: {maxUnavailable: 0}}",
            ", routing: {mode: Standalone, standalone: {replicas: 3}}",
            ", routing: {discovery: EndpointSlices}",
            ", disaggregation: {policy: Conditional, minUncachedPromptTokens: 5}",
            ", security: {networkPolicy: Disabled}",
            ", observability: {monitor: None}",
            ", engine: {image: 'baton/worker:1'}",
        ] {
            assert_eq!(revision_of(same), base, "{same}");
        }
        let secret =
            |name: &str| revision_of_model(&format!("uri: 'hf://a/b', credentialsSecretRef: {{name: {name}}}"));
        assert_eq!(secret("old"), secret("new"), "a renewed password replaces no pod");
    }

    #[test]
    fn what_pods_are_made_of_enters() {
        let base = revision_of("");
        for other in [
            ", engine: {dtype: F32}",
            ", engine: {maxModelLength: 64}",
            ", engine: {image: 'baton/worker:2'}",
            ", engine: {args: [--threads=2]}",
            ", engine: {type: VLLM, image: 'baton/worker:1'}",
            ", disaggregation: {policy: Never}",
            ", prefill: {maxSequences: 9}",
            ", prefill: {nodeSelector: {pool: gpu}}",
            ", prefill: {gpu: {count: 1}}",
            ", prefill: {podTemplate: {spec: {schedulerName: volcano}}}",
            ", decode: {kvCacheMemory: 2Gi}",
            ", decode: {env: [{name: A, value: b}]}",
            ", decode: {tolerations: [{operator: Exists}]}",
            ", placement: {colocation: {topologyKey: zone}}",
        ] {
            assert_ne!(revision_of(other), base, "{other}");
        }
        let nodes = |count: u32| {
            revision_of(&format!(", engine: {{type: VLLM, image: x}}, decode: {{nodesPerReplica: {count}}}"))
        };
        assert_ne!(nodes(1), nodes(2));
        let models =
            ["uri: 'pvc://models'", "uri: 'pvc://models/a'", "uri: 'hf://a/b'", "uri: 'hf://a/b', revision: c"];
        let revisions: std::collections::BTreeSet<String> = models.into_iter().map(revision_of_model).collect();
        assert_eq!(revisions.len(), models.len());
    }

    #[test]
    fn the_installations_image_counts_where_the_manifest_names_none() {
        let text = "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {name: m}\nspec: {model: {uri: pvc://models}}\n";
        let model = manifest::read_one(text).expect("a right manifest").validated;
        assert_ne!(revision(&model, "baton/worker:1"), revision(&model, "baton/worker:2"));
    }

    #[test]
    fn a_revision_stays_what_it_was() {
        assert_eq!(revision_of(""), "57d2d37c");
    }
}
