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

    fn fields(path: &str, schema: &JSONSchemaProps, each: &mut dyn FnMut(&str, &JSONSchemaProps)) {
        for (name, child) in schema.properties.iter().flatten() {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            each(&path, child);
            fields(&path, child, each);
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
            assert!(
                path == "spec" || text.contains("Default: ") || text.contains("Required. "),
                "{path}: no default: {text:?}"
            );
            assert!(path == "spec" || text.contains("Example: `"), "{path}: no example: {text:?}");
        });
        assert!(count > 15, "only {count} fields were looked at");
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
            let known = matches!(schema.format.as_deref(), None | Some("int32" | "int64"));
            assert!(known, "{path}: format {:?}", schema.format);
        });
    }

    #[test]
    fn patterns_are_written_the_same_in_cel_and_in_rust() {
        for (rule, pattern) in [
            (rules::NAME, rules::NAME_PATTERN),
            (rules::MODEL_URI, rules::URI_PATTERN),
            (rules::SERVED_NAME, rules::SERVED_NAME_PATTERN),
            (rules::MEMORY, rules::MEMORY_PATTERN),
        ] {
            assert!(rule.cel.contains(&format!("matches('{pattern}')")), "{}", rule.cel);
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
