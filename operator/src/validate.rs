//! Validation: the one place where a user is told that a manifest is wrong. Collects everything that is, so that it can be
//! corrected in one go; pure, and the only way to a [`Validated`].
//!
//! What the schema can say is read from it (`structural`); the cross-field rules are written here a second time (`rules`),
//! beside the CEL of `baton_crds::rules` with whose words they answer, because CEL gives a verdict and we need types. What
//! the schema leaves open (volumes, the pod template) is read as Kubernetes' own types (`open`).

mod open;
mod pod;
mod rules;

use crate::structural::{self, quoted};
use crate::validated::{
    Cache, Colocation, Download, Engine, EngineKind, Monitor, PodSettings, Replicas, Routing, Validated,
};
use crate::{Disaggregation, ModelSource, RoleSettings, Violation};
use baton_crds::rules::Rule;
use baton_crds::{
    API_VERSION, CacheType, ColocationMode, DisaggregatedModel, DisaggregationPolicy, EngineType, KIND, ModelSpec,
    MonitorMode, NetworkPolicyMode, RoleSpec, RoutingMode,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::Value;
use std::collections::BTreeSet;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

/// Checks a manifest.
///
/// # Errors
/// Everything that is wrong with it.
pub fn validate(model: &DisaggregatedModel) -> Result<Validated, Vec<Violation>> {
    let object = serde_json::to_value(model).expect("an object is strings, numbers, lists and maps");
    let mut violations = structural::check(&object);
    violations.extend(rules::broken(model));
    violations.extend(open::check(model));
    if violations.is_empty() { parse(model).map_err(|violation| vec![violation]) } else { Err(violations) }
}

/// Checks an object as it came, before it has a type.
///
/// # Errors
/// Everything that is wrong with it: unknown fields too, which the type would lose.
pub fn validate_object(object: &Value) -> Result<(DisaggregatedModel, Validated), Vec<Violation>> {
    let object = &structural::without_nulls(&whole_numbers(object));
    let mut violations = Vec::new();
    for (field, expected) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        if let Some(found) = object.get(field).filter(|found| found.as_str().is_some_and(|found| found != expected)) {
            violations.push(Violation::new(
                field,
                format!("unknown value {}", quoted(found)),
                format!("one of {expected}"),
            ));
        }
    }
    violations.extend(structural::check(object));
    // An object with unknown fields still has a type, so that its rules are checked in the same go.
    match serde_path_to_error::deserialize::<_, DisaggregatedModel>(object) {
        Ok(model) => match (validate(&model), violations.is_empty()) {
            (Ok(validated), true) => Ok((model, validated)),
            (Ok(_), false) => Err(violations),
            (Err(more), _) => {
                violations.extend(more);
                let mut seen = BTreeSet::new();
                violations.retain(|violation| seen.insert((violation.path.clone(), violation.message.clone())));
                Err(violations)
            }
        },
        Err(error) => {
            if violations.is_empty() {
                // Only a schema that allows what the type does not leads here; the path still helps.
                violations.push(Violation::new(error.path().to_string(), error.inner().to_string(), ""));
            }
            Err(violations)
        }
    }
}

/// `2.0` as `2`, which it becomes on its way to the API server.
fn whole_numbers(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            Value::Object(fields.iter().map(|(name, value)| (name.clone(), whole_numbers(value))).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(whole_numbers).collect()),
        Value::Number(number) if number.is_f64() => match number.as_f64() {
            // Below 2^53 every whole number has an exact floating-point form.
            Some(float) if float.fract() == 0.0 && float.abs() < 9_007_199_254_740_992.0 => (float as i64).into(),
            Some(_) | None => value.clone(),
        },
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

/// An object without violations as types. Fallible all the same: a hole in the checks above must be an error, not a panic.
fn parse(model: &DisaggregatedModel) -> Result<Validated, Violation> {
    let spec = &model.spec;
    let name = model.metadata.name.clone().ok_or_else(|| broken("metadata.name", baton_crds::rules::NAME))?;
    let prefill = || role("spec.prefill", &spec.prefill);
    let disaggregation = match (spec.disaggregation.policy, spec.disaggregation.min_uncached_prompt_tokens) {
        (DisaggregationPolicy::Always, _) => Disaggregation::Always { prefill: prefill()? },
        (DisaggregationPolicy::Conditional, Some(tokens)) => Disaggregation::Conditional {
            prefill: prefill()?,
            min_uncached_prompt_tokens: positive("spec.disaggregation.minUncachedPromptTokens", tokens)?,
        },
        (DisaggregationPolicy::Conditional, None) => {
            let path = "spec.disaggregation.minUncachedPromptTokens";
            return Err(broken(path, baton_crds::rules::THRESHOLD_WITH_CONDITIONAL));
        }
        (DisaggregationPolicy::Never, _) => Disaggregation::Never,
    };
    let colocation = spec.placement.as_ref().and_then(|placement| placement.colocation.as_ref());
    Ok(Validated {
        served_name: spec.model.served_name.clone().unwrap_or_else(|| name.clone()),
        name,
        source: source(&spec.model)?,
        engine: Engine {
            kind: match spec.engine.type_ {
                EngineType::Baton => EngineKind::Baton,
                EngineType::Vllm => EngineKind::Vllm,
                EngineType::Sglang => EngineKind::Sglang,
            },
            image: spec.engine.image.clone(),
            args: spec.engine.args.clone(),
        },
        dtype: spec.engine.dtype,
        max_model_length: spec
            .engine
            .max_model_length
            .map(|tokens| positive("spec.engine.maxModelLength", tokens))
            .transpose()?,
        // One role alone has nothing to be near to.
        colocation: colocation.filter(|_| disaggregation.prefill().is_some()).map(|colocation| Colocation {
            topology_key: colocation.topology_key.clone(),
            required: match colocation.mode {
                ColocationMode::Required => true,
                ColocationMode::Preferred => false,
            },
        }),
        disaggregation,
        decode: role("spec.decode", &spec.decode)?,
        routing: match spec.routing.mode {
            RoutingMode::Sidecar => Routing::Sidecar,
            RoutingMode::Standalone => {
                let replicas = spec.routing.standalone.clone().unwrap_or_default().replicas;
                Routing::Standalone { replicas: positive("spec.routing.standalone.replicas", replicas)? }
            }
        },
        discovery: spec.routing.discovery,
        network_policy: match spec.security.network_policy {
            NetworkPolicyMode::Restricted => true,
            NetworkPolicyMode::Disabled => false,
        },
        monitor: match spec.observability.monitor {
            MonitorMode::Auto => Monitor::Auto,
            MonitorMode::PodMonitor => Monitor::Required,
            MonitorMode::None => Monitor::None,
        },
    })
}

fn source(spec: &ModelSpec) -> Result<ModelSource, Violation> {
    let unknown = || broken("spec.model.uri", baton_crds::rules::MODEL_URI);
    let secret = spec.credentials_secret_ref.as_ref().map(|secret| secret.name.clone());
    let (scheme, location) = spec.uri.split_once("://").ok_or_else(unknown)?;
    match scheme {
        "pvc" => {
            let (claim, path) = location.split_once('/').unwrap_or((location, ""));
            Ok(ModelSource::Claim { claim: claim.to_owned(), path: path.to_owned() })
        }
        "oci" => Ok(ModelSource::Image { reference: location.to_owned(), pull_secret: secret }),
        "hf" | "s3" => Ok(ModelSource::Download(Download {
            uri: spec.uri.clone(),
            revision: spec.revision.clone(),
            endpoint: spec.endpoint.clone(),
            region: spec.region.clone(),
            credentials_secret: secret,
            cache: cache(spec)?,
        })),
        // Of a user's text, not of an enum of ours.
        _ => Err(unknown()),
    }
}

fn cache(spec: &ModelSpec) -> Result<Cache, Violation> {
    let spec = spec.cache.clone().unwrap_or_default();
    match spec.type_ {
        CacheType::EmptyDir => {
            Ok(Cache::EmptyDir { size_limit: spec.size_limit.and_then(|limit| limit.text()).map(Quantity) })
        }
        CacheType::PersistentVolumeClaim => {
            let missing = || broken("spec.model.cache.claimName", baton_crds::rules::CLAIM_NAME_WITH_CLAIM);
            Ok(Cache::Claim { claim: spec.claim_name.ok_or_else(missing)? })
        }
    }
}

fn role(path: &str, spec: &RoleSpec) -> Result<RoleSettings, Violation> {
    let positive = |field: &str, value: i32| positive(&format!("{path}.{field}"), value);
    let memory = || broken(&format!("{path}.kvCacheMemory"), baton_crds::rules::MEMORY);
    let pod: PodSettings = pod::settings(path, spec)?;
    Ok(RoleSettings {
        replicas: match (&spec.autoscaling, spec.replicas) {
            (Some(_), _) => Replicas::External,
            (None, Some(replicas)) => Replicas::Fixed(positive("replicas", replicas)?),
            (None, None) => Replicas::Fixed(NonZeroU32::MIN),
        },
        nodes_per_replica: positive("nodesPerReplica", spec.nodes_per_replica)?,
        kv_cache_bytes: bytes(&spec.kv_cache_memory).and_then(NonZeroU64::new).ok_or_else(memory)?,
        max_batch_tokens: positive("maxBatchTokens", spec.max_batch_tokens)?,
        max_sequences: positive("maxSequences", spec.max_sequences)?,
        prefill_chunk_tokens: positive("prefillChunkTokens", spec.prefill_chunk_tokens)?,
        drain_timeout: Duration::from_secs(positive("drainTimeoutSeconds", spec.drain_timeout_seconds)?.get().into()),
        max_unavailable: u32::try_from(spec.disruption.max_unavailable).map_err(|_| {
            out_of_range(&format!("{path}.disruption.maxUnavailable"), spec.disruption.max_unavailable, 0)
        })?,
        pod,
    })
}

fn broken(path: &str, rule: Rule) -> Violation {
    Violation::new(path, rule.message, rule.allowed)
}

fn positive(path: &str, value: i32) -> Result<NonZeroU32, Violation> {
    let number = u32::try_from(value).ok().and_then(NonZeroU32::new);
    number.ok_or_else(|| out_of_range(path, value, 1))
}

fn out_of_range(path: &str, value: i32, least: u32) -> Violation {
    Violation::new(path, format!("{value} is out of range"), format!("at least {least}"))
}

/// An amount of memory in bytes.
fn bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &text[digits.len()..] {
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
