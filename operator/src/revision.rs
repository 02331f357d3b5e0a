//! The revision of a manifest: equal where prefill and decode workers may be paired, different where pods must be replaced.

use crate::{Disaggregation, ModelSource, RoleSettings, Validated};
use baton_crds::Dtype;
use serde::Serialize;

/// Hexadecimal digits of a revision: with 2^32 values, 100 revisions of one model collide with probability 10^-6.
const DIGITS: usize = 8;

/// Everything that enters the hash. What is not here may change on living pods: replicas, the drain timeout, the
/// policy between Always and Conditional, the routing mode. Fields are only ever added, with `skip_serializing_if` on
/// their default, so that a new version of the operator does not roll every model.
#[derive(Serialize)]
struct Revised<'a> {
    source: &'a ModelSource,
    served_name: &'a str,
    dtype: Option<Dtype>,
    max_model_length: Option<u32>,
    prefill: Option<Sizes>,
    decode: Sizes,
}

#[derive(Serialize)]
struct Sizes {
    kv_cache_bytes: u64,
    max_batch_tokens: u32,
    max_sequences: u32,
    prefill_chunk_tokens: u32,
}

impl From<&RoleSettings> for Sizes {
    fn from(role: &RoleSettings) -> Self {
        Sizes {
            kv_cache_bytes: role.kv_cache_bytes.get(),
            max_batch_tokens: role.max_batch_tokens.get(),
            max_sequences: role.max_sequences.get(),
            prefill_chunk_tokens: role.prefill_chunk_tokens.get(),
        }
    }
}

/// The revision of a manifest: 8 hexadecimal digits over both roles.
pub fn revision(model: &Validated) -> String {
    let prefill = match &model.disaggregation {
        Disaggregation::Always { prefill } | Disaggregation::Conditional { prefill, .. } => Some(prefill.into()),
        Disaggregation::Never => None,
    };
    let revised = Revised {
        source: &model.source,
        served_name: &model.served_name,
        dtype: model.dtype,
        max_model_length: model.max_model_length.map(std::num::NonZeroU32::get),
        prefill,
        decode: (&model.decode).into(),
    };
    let bytes = serde_json::to_vec(&revised).expect("strings and numbers always serialise");
    blake3::hash(&bytes).to_hex()[..DIGITS].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    fn revision_of(spec: &str) -> String {
        let text = format!(
            "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {{name: m}}\nspec: {{model: {{uri: pvc://models}}{spec}}}\n"
        );
        revision(&manifest::read_one(&text).expect("a right manifest").validated)
    }

    #[test]
    fn what_pods_are_built_from_enters_and_nothing_else() {
        let base = revision_of("");
        for same in [", prefill: {replicas: 3}", ", decode: {drainTimeoutSeconds: 5}", ", routing: {mode: Standalone}"]
        {
            assert_eq!(revision_of(same), base, "{same}");
        }
        for other in [", engine: {dtype: F32}", ", prefill: {maxSequences: 9}", ", decode: {kvCacheMemory: 2Gi}"] {
            assert_ne!(revision_of(other), base, "{other}");
        }
    }

    #[test]
    fn a_revision_stays_what_it_was() {
        assert_eq!(revision_of(""), "e3e3860a");
    }
}
