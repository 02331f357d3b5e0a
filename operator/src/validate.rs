//! Validation: the one place where a user is told that a manifest is wrong. Collects everything that is, so that it can be
//! corrected in one go; pure, and the only way to a [`Validated`].
//!
//! What the schema can say is read from it (`structural`); the cross-field rules are written here a second time, beside
//! the CEL of `baton_crds::rules` with whose words they answer, because CEL gives a verdict and we need types.

use crate::structural::{self, quoted};
use crate::{Disaggregation, ModelSource, RoleSettings, Validated, Violation};
use baton_crds::rules::{self, Rule};
use baton_crds::{API_VERSION, DisaggregatedModel, DisaggregationPolicy, KIND, RoleSpec};
use regex::Regex;
use serde_json::Value;
use std::num::{NonZeroU32, NonZeroU64};
use std::sync::LazyLock;
use std::time::Duration;

/// Checks a manifest.
///
/// # Errors
/// Everything that is wrong with it.
pub fn validate(model: &DisaggregatedModel) -> Result<Validated, Vec<Violation>> {
    let object = serde_json::to_value(model).expect("an object is strings, numbers, lists and maps");
    let mut violations = structural::check(&object);
    violations.extend(broken_rules(model));
    if violations.is_empty() { parse(model).map_err(|violation| vec![violation]) } else { Err(violations) }
}

/// Checks an object as it came, before it has a type.
///
/// # Errors
/// Everything that is wrong with it: unknown fields too, which the type would lose.
pub(crate) fn validate_object(object: &Value) -> Result<(DisaggregatedModel, Validated), Vec<Violation>> {
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
                let mut seen = std::collections::BTreeSet::new();
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

fn broken_rules(model: &DisaggregatedModel) -> Vec<Violation> {
    let spec = &model.spec;
    let mut violations = Vec::new();
    let mut keep = |kept: bool, rule: Rule, path: &str, found: Option<&str>| {
        if !kept {
            let found = found.map_or_else(String::new, |found| format!("{}: ", quoted(&Value::from(found))));
            violations.push(Violation::new(path, format!("{found}{}", rule.message), rule.allowed));
        }
    };
    let name = model.metadata.name.as_deref().unwrap_or_default();
    let name_fits = name.len() <= rules::NAME_CHARS_MAX && PATTERNS.name.is_match(name);
    keep(name_fits, rules::NAME, "metadata.name", Some(name));
    let uri = spec.model.uri.as_str();
    keep(PATTERNS.uri.is_match(uri), rules::MODEL_URI, "spec.model.uri", Some(uri));
    if let Some(served) = spec.model.served_name.as_deref() {
        keep(PATTERNS.served_name.is_match(served), rules::SERVED_NAME, "spec.model.servedName", Some(served));
    }
    let threshold = spec.disaggregation.min_uncached_prompt_tokens.is_some();
    let conditional = spec.disaggregation.policy == DisaggregationPolicy::Conditional;
    let path = "spec.disaggregation.minUncachedPromptTokens";
    keep(threshold == conditional, rules::THRESHOLD_WITH_CONDITIONAL, path, None);
    let fits = match spec.disaggregation.policy {
        DisaggregationPolicy::Always | DisaggregationPolicy::Conditional => spec.prefill.replicas >= 1,
        DisaggregationPolicy::Never => spec.prefill.replicas == 0,
    };
    keep(fits, rules::PREFILL_REPLICAS_FOLLOW_POLICY, "spec.prefill.replicas", None);
    keep(spec.decode.replicas >= 1, rules::DECODE_REPLICAS, "spec.decode.replicas", None);
    for (role, settings) in [("prefill", &spec.prefill), ("decode", &spec.decode)] {
        let memory = settings.kv_cache_memory.as_str();
        let at = |rule: Rule| format!("spec.{role}{}", rule.at);
        keep(PATTERNS.memory.is_match(memory), rules::MEMORY, &format!("spec.{role}.kvCacheMemory"), Some(memory));
        let chunk_fits = settings.prefill_chunk_tokens <= settings.max_batch_tokens;
        keep(chunk_fits, rules::CHUNK_FITS_BATCH, &at(rules::CHUNK_FITS_BATCH), None);
        let sequences_fit =
            settings.max_sequences.saturating_add(rules::PROMPT_TOKENS_MIN) <= settings.max_batch_tokens;
        keep(sequences_fit, rules::SEQUENCES_FIT_BATCH, &at(rules::SEQUENCES_FIT_BATCH), None);
    }
    violations
}

/// An object without violations as types. Fallible all the same: a hole in the checks above must be an error, not a panic.
fn parse(model: &DisaggregatedModel) -> Result<Validated, Violation> {
    let spec = &model.spec;
    let name = model.metadata.name.clone().ok_or_else(|| broken("metadata.name", rules::NAME))?;
    let location = spec.model.uri.strip_prefix("pvc://").ok_or_else(|| broken("spec.model.uri", rules::MODEL_URI))?;
    let (claim, path) = location.split_once('/').unwrap_or((location, ""));
    let prefill = || role("spec.prefill", &spec.prefill);
    let disaggregation = match (spec.disaggregation.policy, spec.disaggregation.min_uncached_prompt_tokens) {
        (DisaggregationPolicy::Always, _) => Disaggregation::Always { prefill: prefill()? },
        (DisaggregationPolicy::Conditional, Some(tokens)) => Disaggregation::Conditional {
            prefill: prefill()?,
            min_uncached_prompt_tokens: positive("spec.disaggregation.minUncachedPromptTokens", tokens)?,
        },
        (DisaggregationPolicy::Conditional, None) => {
            let path = "spec.disaggregation.minUncachedPromptTokens";
            return Err(broken(path, rules::THRESHOLD_WITH_CONDITIONAL));
        }
        (DisaggregationPolicy::Never, _) => Disaggregation::Never,
    };
    Ok(Validated {
        served_name: spec.model.served_name.clone().unwrap_or_else(|| name.clone()),
        name,
        source: ModelSource::Claim { claim: claim.to_owned(), path: path.to_owned() },
        dtype: spec.engine.dtype,
        max_model_length: spec
            .engine
            .max_model_length
            .map(|tokens| positive("spec.engine.maxModelLength", tokens))
            .transpose()?,
        disaggregation,
        decode: role("spec.decode", &spec.decode)?,
        routing: spec.routing.mode,
    })
}

fn role(path: &str, spec: &RoleSpec) -> Result<RoleSettings, Violation> {
    let positive = |field: &str, value: i32| positive(&format!("{path}.{field}"), value);
    let memory = || broken(&format!("{path}.kvCacheMemory"), rules::MEMORY);
    Ok(RoleSettings {
        replicas: positive("replicas", spec.replicas)?,
        kv_cache_bytes: bytes(&spec.kv_cache_memory).and_then(NonZeroU64::new).ok_or_else(memory)?,
        max_batch_tokens: positive("maxBatchTokens", spec.max_batch_tokens)?,
        max_sequences: positive("maxSequences", spec.max_sequences)?,
        prefill_chunk_tokens: positive("prefillChunkTokens", spec.prefill_chunk_tokens)?,
        drain_timeout: Duration::from_secs(positive("drainTimeoutSeconds", spec.drain_timeout_seconds)?.get().into()),
    })
}

fn broken(path: &str, rule: Rule) -> Violation {
    Violation::new(path, rule.message, rule.allowed)
}

fn positive(path: &str, value: i32) -> Result<NonZeroU32, Violation> {
    let number = u32::try_from(value).ok().and_then(NonZeroU32::new);
    number.ok_or_else(|| Violation::new(path, format!("{value} is out of range"), "at least 1"))
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

struct Patterns {
    name: Regex,
    uri: Regex,
    served_name: Regex,
    memory: Regex,
}

static PATTERNS: LazyLock<Patterns> = LazyLock::new(|| {
    let compile = |pattern| Regex::new(pattern).expect("the rules' patterns are regular expressions");
    Patterns {
        name: compile(rules::NAME_PATTERN),
        uri: compile(rules::URI_PATTERN),
        served_name: compile(rules::SERVED_NAME_PATTERN),
        memory: compile(rules::MEMORY_PATTERN),
    }
});

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
