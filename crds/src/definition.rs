//! The CustomResourceDefinition as an object and as the YAML that is committed.

use crate::DisaggregatedModel;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt as _;

/// Largest definition, in bytes of YAML. A client-side `kubectl apply` keeps a copy in an annotation of at most 256 KiB,
/// and a Helm release must fit a 1 MiB Secret with everything else in it.
pub const YAML_BYTES_MAX: usize = 100 * 1024;

const HEADER: &str = "# Generated from crds/src by `make generate`; edit the types there instead.\n";

/// The definition of `DisaggregatedModel`.
pub fn definition() -> CustomResourceDefinition {
    let mut definition = DisaggregatedModel::crd();
    for version in &mut definition.spec.versions {
        if let Some(schema) = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut()) {
            refuse_null(schema);
        }
    }
    definition
}

/// The YAML that `crdgen` writes.
pub fn yaml() -> String {
    let mut definition = serde_json::to_value(definition()).expect("a definition is strings, numbers, lists and maps");
    write_whole_numbers_whole(&mut definition);
    let body = serde_yaml::to_string(&definition).expect("JSON is YAML");
    format!("{HEADER}{body}")
}

/// Kubernetes' own type holds limits as floating point, which YAML would show as `32.0`.
fn write_whole_numbers_whole(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(map) => map.values_mut().for_each(write_whole_numbers_whole),
        serde_json::Value::Array(list) => list.iter_mut().for_each(write_whole_numbers_whole),
        serde_json::Value::Number(number) => {
            // Limits are below 2^53, where every whole number has an exact floating-point form.
            if let Some(whole) = number.as_f64().filter(|float| number.is_f64() && float.fract() == 0.0) {
                *number = (whole as i64).into();
            }
        }
        serde_json::Value::Null | serde_json::Value::Bool(_) | serde_json::Value::String(_) => {}
    }
}

/// An optional field is left out, never null: kube marks it `nullable`, under which CEL's `has()` is true for a null and a
/// default is not filled in.
fn refuse_null(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    for child in schema.properties.iter_mut().flat_map(|properties| properties.values_mut()) {
        refuse_null(child);
    }
    match &mut schema.items {
        Some(JSONSchemaPropsOrArray::Schema(items)) => refuse_null(items),
        Some(JSONSchemaPropsOrArray::Schemas(items)) => items.iter_mut().for_each(refuse_null),
        None => {}
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        refuse_null(values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules;

    fn schema() -> JSONSchemaProps {
        let version = definition().spec.versions.remove(0);
        version.schema.and_then(|schema| schema.open_api_v3_schema).expect("the version has a schema")
    }

    /// Every field, those of lists' entries included.
    fn fields(path: &str, schema: &JSONSchemaProps, each: &mut dyn FnMut(&str, &JSONSchemaProps)) {
        for (name, child) in schema.properties.iter().flatten() {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            each(&path, child);
            fields(&path, child, each);
        }
        if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
            fields(&format!("{path}[]"), items, each);
        }
    }

    /// Every schema that a value is checked against: fields, lists' entries, maps' values.
    fn schemas(path: &str, schema: &JSONSchemaProps, each: &mut dyn FnMut(&str, &JSONSchemaProps)) {
        each(path, schema);
        for (name, child) in schema.properties.iter().flatten() {
            schemas(&format!("{path}.{name}"), child, each);
        }
        if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
            schemas(&format!("{path}[]"), items, each);
        }
        if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
            schemas(&format!("{path}{{}}"), values, each);
        }
    }

    #[test]
    fn the_committed_definition_is_what_the_types_say() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/disaggregatedmodels.baton.dev.yaml");
        let committed = std::fs::read_to_string(path).expect("the definition is committed");
        assert!(committed == yaml(), "{path} is stale: run `make generate`");
    }

    #[test]
    fn the_definition_stays_small() {
        assert!(yaml().len() < YAML_BYTES_MAX, "{} bytes", yaml().len());
    }

    #[test]
    fn every_field_says_what_it_does_with_default_and_example() {
        let mut count = 0;
        fields("", &schema(), &mut |path, schema| {
            count += 1;
            let text = schema.description.as_deref().unwrap_or_default();
            if matches!(path, "spec" | "status") {
                return;
            }
            assert!(
                text.contains("Default: ") || text.contains("Required. ") || text.contains("Required.\n"),
                "{path}: no default: {text:?}"
            );
            assert!(text.contains("Example: `"), "{path}: no example: {text:?}");
        });
        assert!(count > 150, "only {count} fields were looked at");
    }

    #[test]
    fn a_field_that_names_its_default_has_it_in_the_schema() {
        fields("", &schema(), &mut |path, schema| {
            let text = schema.description.as_deref().unwrap_or_default();
            let Some((_, rest)) = text.split_once("Default: `") else { return };
            let said = rest.split('`').next().unwrap_or_default();
            let default = schema.default.as_ref().map(|value| &value.0).expect(path);
            let written: serde_json::Value = serde_yaml::from_str(said).expect("a default in a comment is YAML");
            assert_eq!(&written, default, "{path}");
        });
    }

    #[test]
    fn no_field_takes_null_and_no_integer_has_a_format_that_kubernetes_lacks() {
        fields("", &schema(), &mut |path, schema| {
            assert_eq!(schema.nullable, None, "{path}");
            let known = matches!(schema.format.as_deref(), None | Some("int32" | "int64" | "date-time"));
            assert!(known, "{path}: format {:?}", schema.format);
        });
    }

    #[test]
    fn every_string_list_map_and_number_has_a_bound() {
        schemas("", &schema(), &mut |path, schema| {
            let open = schema.x_kubernetes_preserve_unknown_fields == Some(true);
            let bounded = match schema.type_.as_deref() {
                Some("string") => schema.max_length.is_some() || schema.enum_.is_some() || schema.format.is_some(),
                Some("array") => schema.max_items.is_some(),
                Some("integer") => {
                    schema.minimum.is_some() && (path.starts_with(".status") || schema.maximum.is_some())
                }
                Some("object") => open || schema.additional_properties.is_none() || schema.max_properties.is_some(),
                None => schema.x_kubernetes_int_or_string == Some(true) && schema.max_length.is_some(),
                Some(other) => panic!("{path}: a field of type {other}"),
            };
            assert!(bounded, "{path}: no bound");
        });
    }

    #[test]
    fn every_pattern_of_the_schema_has_words() {
        schemas(".spec", &schema().properties.expect("it has fields")["spec"], &mut |path, schema| {
            if let Some(pattern) = &schema.pattern {
                assert!(rules::PATTERN_WORDS.iter().any(|(known, _)| known == pattern), "{path}: {pattern}");
            }
        });
    }

    #[test]
    fn columns_fit_eighty_characters() {
        // Longest contents: a name and a reason as long as they get, `False`, and a thousand replicas.
        let reason = crate::Reason::ALL.into_iter().map(|reason| reason.as_str().len()).max().unwrap_or(0);
        let columns = definition().spec.versions.remove(0).additional_printer_columns.expect("there are columns");
        let narrow: Vec<&str> =
            columns.iter().filter(|column| column.priority.is_none()).map(|column| column.name.as_str()).collect();
        assert_eq!(narrow, ["Ready", "Reason", "Prefill", "Decode", "Age"]);
        let usual =
            "a-model-with-a-name".len() + "False".len() + reason + "PREFILL".len() + "DECODE".len() + "5d23h".len();
        let gaps = 3 * narrow.len();
        assert!(usual + gaps <= 80, "{} characters", usual + gaps);
    }

    #[test]
    fn patterns_are_written_the_same_in_cel_and_in_rust() {
        for (rule, pattern) in [
            (rules::NAME, rules::NAME_PATTERN),
            (rules::MODEL_URI, rules::URI_PATTERN),
            (rules::REVISION, rules::REVISION_PATTERN),
            (rules::SERVED_NAME, rules::SERVED_NAME_PATTERN),
            (rules::ENDPOINT, rules::ENDPOINT_PATTERN),
            (rules::MEMORY, rules::MEMORY_PATTERN),
            (rules::ARGS_NOT_OURS, rules::OUR_FLAGS_PATTERN),
            (rules::MOUNT_PATH, rules::MOUNT_PATH_PATTERN),
            (rules::MOUNT_PATH, rules::OUR_MOUNTS_PATTERN),
            (rules::LABEL_KEYS, rules::LABEL_KEY_PATTERN),
            (rules::RESOURCE_NAMES, rules::RESOURCE_NAME_PATTERN),
            (rules::LABELS_NOT_OURS, rules::OUR_LABELS_PATTERN),
        ] {
            assert!(rule.cel.contains(&format!("matches('{pattern}')")), "{}", rule.cel);
        }
        for name in rules::OUR_ENV {
            assert!(rules::ENV_NOT_OURS.cel.contains(&format!("'{name}'")), "{name}");
        }
        assert!(rules::VOLUME_NOT_OURS.cel.contains(&format!("'{}'", rules::OUR_VOLUMES_PREFIX)));
        assert!(rules::GPU_CLASS_NOT_TWICE.cel.contains(&format!("'{}'", rules::GPU_CLASS_LABEL)));
        for label in crate::labels::SHARED {
            let name = label.strip_prefix("app.kubernetes.io/").expect("they share a domain");
            assert!(rules::OUR_LABELS_PATTERN.contains(name), "{label}");
        }
        for domain in crate::labels::DOMAINS {
            assert!(rules::OUR_LABELS_PATTERN.contains(&domain.replace('.', "[.]")), "{domain}");
        }
        for sizes in [rules::PREFILL_SIZES_NEED_BATON, rules::DECODE_SIZES_NEED_BATON] {
            let role = sizes.at;
            for expect in [
                format!("self{role}.kvCacheMemory == '{}'", rules::DEFAULT_KV_CACHE_MEMORY),
                format!("self{role}.maxBatchTokens == {}", rules::DEFAULT_MAX_BATCH_TOKENS),
                format!("self{role}.maxSequences == {}", rules::DEFAULT_MAX_SEQUENCES),
                format!("self{role}.prefillChunkTokens == {}", rules::DEFAULT_PREFILL_CHUNK_TOKENS),
            ] {
                assert!(sizes.cel.contains(&expect), "{expect}");
            }
        }
        assert!(rules::NAME.cel.contains(&format!("<= {}", rules::NAME_CHARS_MAX)));
        assert!(rules::SEQUENCES_FIT_BATCH.cel.contains(&format!("+ {} <=", rules::PROMPT_TOKENS_MIN)));
    }

    #[test]
    fn an_object_survives_its_yaml_form_and_defaults_fill_in() {
        let text = "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {name: tiny}\nspec: {model: {uri: 'pvc://models/tiny'}}\n";
        let model: DisaggregatedModel = serde_yaml::from_str(text).expect("a minimal manifest reads");
        assert_eq!(model.spec.prefill, crate::RoleSpec::default());
        let again: DisaggregatedModel =
            serde_yaml::from_str(&serde_yaml::to_string(&model).expect("an object serialises"))
                .expect("its own form reads");
        assert_eq!(again, model);
    }
}
