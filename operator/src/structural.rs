//! What the API server's schema validation says of an object, offline: types, required and unknown fields, enums, ranges,
//! patterns, sizes of lists and maps, keys of lists.
//!
//! Reads the same schema that the cluster enforces, so a new field needs no second list here. CEL rules are not its
//! matter (see `validate`), nor is filling in defaults: an absent field is in order unless the schema requires it.

use crate::Violation;
use baton_crds::{definition, rules};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use regex::Regex;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::LazyLock;

/// Longest piece of a user's value that a message repeats.
const QUOTED_CHARS_MAX: usize = 60;

/// What is said of a field that the schema does not have.
const UNKNOWN_FIELD: &str = "unknown field";

/// The definition's schema, completed by what every Kubernetes object has.
static SCHEMA: LazyLock<JSONSchemaProps> = LazyLock::new(|| {
    let mut schema = definition::definition()
        .spec
        .versions
        .into_iter()
        .find_map(|version| version.schema?.open_api_v3_schema)
        .expect("the generated definition has a schema");
    let text = || JSONSchemaProps { type_: Some("string".to_owned()), ..JSONSchemaProps::default() };
    let mut metadata = metadata_schema();
    metadata.required = Some(vec!["name".to_owned()]);
    schema.properties.get_or_insert_default().extend([
        ("apiVersion".to_owned(), text()),
        ("kind".to_owned(), text()),
        ("metadata".to_owned(), metadata),
    ]);
    schema.required.get_or_insert_default().extend(["apiVersion", "kind", "metadata"].map(str::to_owned));
    schema
});

/// The schema's patterns, compiled.
static PATTERNS: LazyLock<BTreeMap<String, Regex>> = LazyLock::new(|| {
    let mut patterns = BTreeMap::new();
    collect_patterns(&SCHEMA, &mut patterns);
    patterns
});

fn collect_patterns(schema: &JSONSchemaProps, patterns: &mut BTreeMap<String, Regex>) {
    if let Some(pattern) = &schema.pattern {
        let regex = Regex::new(pattern).expect("the definition's patterns are regular expressions");
        patterns.insert(pattern.clone(), regex);
    }
    for child in schema.properties.iter().flat_map(BTreeMap::values) {
        collect_patterns(child, patterns);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        collect_patterns(items, patterns);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
        collect_patterns(values, patterns);
    }
}

fn metadata_schema() -> JSONSchemaProps {
    let generator = schemars::generate::SchemaSettings::openapi3().with(|settings| settings.inline_subschemas = true);
    let schema = generator.into_generator().into_root_schema_for::<ObjectMeta>();
    serde_json::from_value(schema.to_value()).expect("ObjectMeta's schema is a plain one")
}

/// Everything in `object` that the schema does not allow, in the schema's order of checks and the object's order of fields.
pub(crate) fn check(object: &Value) -> Vec<Violation> {
    let mut violations = Vec::new();
    check_at("", &SCHEMA, object, &mut violations);
    violations
}

/// An object as the API server reads it: a field that is there with nothing in it is a field that is not there. What the schema
/// leaves open stays as it is.
pub(crate) fn without_nulls(object: &Value) -> Value {
    without_nulls_at(Some(&SCHEMA), object)
}

fn without_nulls_at(schema: Option<&JSONSchemaProps>, value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let below = |name: &String| schema.and_then(|schema| field(schema, name));
            let kept = fields.iter().filter(|(name, value)| !value.is_null() || below(name).is_none());
            Value::Object(kept.map(|(name, value)| (name.clone(), without_nulls_at(below(name), value))).collect())
        }
        Value::Array(items) => {
            let below = match schema.and_then(|schema| schema.items.as_ref()) {
                Some(JSONSchemaPropsOrArray::Schema(items)) => Some(items.as_ref()),
                Some(JSONSchemaPropsOrArray::Schemas(_)) | None => None,
            };
            Value::Array(items.iter().map(|item| without_nulls_at(below, item)).collect())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

/// What the schema says of a field, or of a map's value; none where it knows of neither.
fn field<'a>(schema: &'a JSONSchemaProps, name: &str) -> Option<&'a JSONSchemaProps> {
    let values = match &schema.additional_properties {
        Some(JSONSchemaPropsOrBool::Schema(values)) => Some(values.as_ref()),
        Some(JSONSchemaPropsOrBool::Bool(_)) | None => None,
    };
    schema.properties.as_ref().and_then(|known| known.get(name)).or(values)
}

/// The same of fields that this version knows: a newer definition may have let in others, which are no mistake.
pub(crate) fn check_known(object: &Value) -> Vec<Violation> {
    let mut violations = check(object);
    violations.retain(|violation| violation.message != UNKNOWN_FIELD);
    violations
}

fn check_at(path: &str, schema: &JSONSchemaProps, value: &Value, violations: &mut Vec<Violation>) {
    let mut wrong = |message: String, allowed: String| violations.push(Violation::new(shown(path), message, allowed));
    let expected = expected_type(schema);
    if !has_type(expected, value) {
        let article = if matches!(expected, "integer" | "object" | "array") { "an" } else { "a" };
        return wrong(format!("expected {article} {expected}, found {}", quoted(value)), String::new());
    }
    if let Some(allowed) = schema.enum_.as_ref().filter(|allowed| !allowed.iter().any(|one| &one.0 == value)) {
        let words: Vec<String> = allowed.iter().map(|one| plain(&one.0)).collect();
        wrong(format!("unknown value {}", quoted(value)), format!("one of {}", words.join(", ")));
    }
    if let Some(number) = value.as_f64() {
        if schema.minimum.is_some_and(|minimum| number < minimum)
            || schema.maximum.is_some_and(|maximum| number > maximum)
        {
            wrong(format!("{value} is out of range"), range(schema.minimum, schema.maximum));
        }
        if let Some(step) = schema.multiple_of.filter(|step| number % step != 0.0) {
            wrong(format!("{value} does not fit"), format!("a multiple of {step}"));
        }
    }
    if let Some(text) = value.as_str() {
        // Lengths are counted in characters, as the API server counts them.
        let chars = i64::try_from(text.chars().count()).unwrap_or(i64::MAX);
        if schema.min_length.is_some_and(|min| chars < min) || schema.max_length.is_some_and(|max| chars > max) {
            let bound = range(schema.min_length.map(|min| min as f64), schema.max_length.map(|max| max as f64));
            wrong(format!("{} has {chars} characters", quoted(value)), bound);
        }
        let pattern = schema.pattern.as_deref().and_then(|pattern| PATTERNS.get_key_value(pattern));
        if let Some((pattern, _)) = pattern.filter(|(_, regex)| !regex.is_match(text)) {
            let words = rules::PATTERN_WORDS.iter().find(|(known, _)| known == pattern);
            let allowed = words.map_or_else(|| pattern.clone(), |(_, words)| (*words).to_owned());
            wrong(format!("{} does not fit", quoted(value)), allowed);
        }
    }
    match value {
        Value::Object(fields) => check_fields(path, schema, fields, violations),
        Value::Array(items) => {
            if let Some(max) = schema.max_items.filter(|max| !fits(items.len(), *max)) {
                wrong(format!("{} entries", items.len()), format!("at most {max}"));
            }
            check_keys(path, schema, items, violations);
            if let Some(JSONSchemaPropsOrArray::Schema(schema)) = &schema.items {
                for (index, item) in items.iter().enumerate() {
                    check_at(&format!("{path}[{index}]"), schema, item, violations);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn check_fields(
    path: &str,
    schema: &JSONSchemaProps,
    fields: &serde_json::Map<String, Value>,
    violations: &mut Vec<Violation>,
) {
    if let Some(max) = schema.max_properties.filter(|max| !fits(fields.len(), *max)) {
        violations.push(Violation::new(shown(path), format!("{} entries", fields.len()), format!("at most {max}")));
    }
    let open = schema.x_kubernetes_preserve_unknown_fields == Some(true);
    let known = schema.properties.as_ref();
    for (name, value) in fields {
        let path = below(path, name);
        match field(schema, name) {
            Some(schema) => check_at(&path, schema, value, violations),
            // Without a list of fields, anything goes (`managedFields[].fieldsV1`).
            None => {
                if let Some(known) = known.filter(|_| !open) {
                    let names: Vec<&str> = known.keys().map(String::as_str).collect();
                    violations.push(Violation::new(path, UNKNOWN_FIELD, format!("one of {}", names.join(", "))));
                }
            }
        }
    }
    for name in schema.required.iter().flatten().filter(|name| !fields.contains_key(*name)) {
        violations.push(Violation::new(below(path, name), "required, but missing", ""));
    }
}

/// Of a list whose entries have a key, no two may have the same.
fn check_keys(path: &str, schema: &JSONSchemaProps, items: &[Value], violations: &mut Vec<Violation>) {
    let Some(keys) = schema.x_kubernetes_list_map_keys.as_ref() else { return };
    let mut seen = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let key: Vec<Option<&Value>> = keys.iter().map(|key| item.get(key)).collect();
        // An entry without its key is told as such.
        if key.iter().any(Option::is_none) {
            continue;
        }
        if seen.contains(&key) {
            let found = key.iter().flatten().map(|value| quoted(value)).collect::<Vec<_>>().join(", ");
            let allowed = format!("each {} once", keys.join(" and "));
            violations.push(Violation::new(format!("{path}[{index}]"), format!("{found} is there already"), allowed));
        } else {
            seen.push(key);
        }
    }
}

fn fits(count: usize, max: i64) -> bool {
    i64::try_from(count).is_ok_and(|count| count <= max)
}

fn expected_type(schema: &JSONSchemaProps) -> &str {
    if schema.x_kubernetes_int_or_string == Some(true) {
        "number or string"
    } else {
        schema.type_.as_deref().unwrap_or_default()
    }
}

fn below(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn shown(path: &str) -> &str {
    if path.is_empty() { "manifest" } else { path }
}

fn has_type(expected: &str, value: &Value) -> bool {
    match expected {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "number or string" => value.is_i64() || value.is_u64() || value.is_string(),
        // No type: `x-kubernetes-preserve-unknown-fields`, which takes everything.
        _ => true,
    }
}

fn range(minimum: Option<f64>, maximum: Option<f64>) -> String {
    match (minimum, maximum) {
        (Some(minimum), Some(maximum)) => format!("{minimum} to {maximum}"),
        (Some(minimum), None) => format!("at least {minimum}"),
        (None, Some(maximum)) => format!("at most {maximum}"),
        (None, None) => String::new(),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// A user's value for a message: a name for what is large, a bounded quotation of what is small.
pub(crate) fn quoted(value: &Value) -> String {
    match value {
        Value::Object(_) => "a map".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Null => "nothing".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) if text.chars().count() > QUOTED_CHARS_MAX => {
            let start: String = text.chars().take(QUOTED_CHARS_MAX).collect();
            format!("{start:?}...")
        }
        Value::String(text) => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(spec: Value) -> Value {
        json!({"apiVersion": "baton.dev/v1alpha1", "kind": "DisaggregatedModel", "metadata": {"name": "m"}, "spec": spec})
    }

    #[track_caller]
    fn check_one(spec: Value, expect: &str) {
        let found: Vec<String> = check(&object(spec)).iter().map(ToString::to_string).collect();
        assert_eq!(found, [expect]);
    }

    #[test]
    fn each_kind_of_mistake_is_named_with_path_and_what_is_allowed() {
        let model = json!({"uri": "pvc://models/tiny"});
        assert_eq!(check(&object(json!({"model": model}))), []);
        check_one(json!({}), "spec.model: required, but missing");
        check_one(
            json!({"model": model, "disaggregation": {"policy": "Sometimes"}}),
            "spec.disaggregation.policy: unknown value \"Sometimes\": one of Always, Conditional, Never",
        );
        check_one(
            json!({"model": model, "decod": {}}),
            "spec.decod: unknown field: one of decode, disaggregation, engine, model, observability, placement, prefill, routing, security",
        );
        check_one(
            json!({"model": model, "prefill": {"replicas": "2"}}),
            "spec.prefill.replicas: expected an integer, found \"2\"",
        );
        check_one(
            json!({"model": model, "prefill": {"replicas": -1}}),
            "spec.prefill.replicas: -1 is out of range: 0 to 1000",
        );
        check_one(
            json!({"model": model, "prefill": {"prefillChunkTokens": 33}}),
            "spec.prefill.prefillChunkTokens: 33 does not fit: a multiple of 32",
        );
        check_one(json!({"model": model, "engine": null}), "spec.engine: expected an object, found nothing");
        check_one(
            json!({"model": model, "prefill": {"resources": {"limits": {"cpu": true}}}}),
            "spec.prefill.resources.limits.cpu: expected a number or string, found true",
        );
        check_one(
            json!({"model": model, "prefill": {"resources": {"limits": {"cpu": "2 cores"}}}}),
            "spec.prefill.resources.limits.cpu: \"2 cores\" does not fit: an amount that is not negative, such as 2, 500m or 16Gi",
        );
        check_one(
            json!({"model": model, "prefill": {"resources": {"limits": {"cpu": -2}}}}),
            "spec.prefill.resources.limits.cpu: -2 is out of range: at least 0",
        );
        check_one(
            json!({"model": model, "decode": {"env": [{"name": "A", "value": ""}, {"name": "A", "value": ""}]}}),
            "spec.decode.env[1]: \"A\" is there already: each name once",
        );
        check_one(
            json!({"model": model, "engine": {"args": vec!["x"; 65]}}),
            "spec.engine.args: 65 entries: at most 64",
        );
        let many: serde_json::Map<String, Value> = (0..17).map(|key| (format!("k{key}"), json!("v"))).collect();
        check_one(
            json!({"model": model, "decode": {"nodeSelector": many}}),
            "spec.decode.nodeSelector: 17 entries: at most 16",
        );
        check_one(
            json!({"model": model, "decode": {"volumes": [{"emptyDir": {"anything": "goes"}}]}}),
            "spec.decode.volumes[0].name: required, but missing",
        );
    }

    #[test]
    fn a_field_with_nothing_in_it_is_one_that_is_not_there_but_where_the_schema_is_open() {
        let template = json!({"podTemplate": {"spec": {"a": null}, "metadata": null}});
        let read = without_nulls(&object(json!({
            "model": {"uri": null}, "engine": null, "prefill": template, "unknown": null,
            "decode": {"nodeSelector": {"a": null, "b": "c"}, "env": [{"name": "A", "value": null}, null]},
        })));
        let expect = object(json!({
            "model": {}, "prefill": {"podTemplate": {"spec": {"a": null}}}, "unknown": null,
            "decode": {"nodeSelector": {"b": "c"}, "env": [{"name": "A"}, null]},
        }));
        assert_eq!(read, expect);
    }

    #[test]
    fn a_field_of_a_newer_definition_is_no_mistake_of_a_stored_object() {
        let mut newer = object(json!({"model": {"uri": "pvc://models", "newer": 1}, "newer": {}, "decode": "x"}));
        newer["metadata"]["newer"] = json!({});
        let paths: Vec<String> = check_known(&newer).into_iter().map(|violation| violation.path).collect();
        assert_eq!(paths, ["spec.decode"]);
    }

    #[test]
    fn metadata_is_checked_like_the_rest() {
        let mut value = object(json!({"model": {"uri": "pvc://models"}}));
        value["metadata"] = json!({"nam": "m", "labels": {"team": 7}});
        let paths: Vec<String> = check(&value).into_iter().map(|violation| violation.path).collect();
        assert_eq!(paths, ["metadata.nam", "metadata.labels.team", "metadata.name"]);
    }

    #[test]
    fn a_long_value_is_quoted_in_part() {
        let text = quoted(&json!("ä".repeat(1000)));
        assert!(text.chars().count() < 80, "{text}");
    }
}
