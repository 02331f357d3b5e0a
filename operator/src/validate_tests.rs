//! Validation against tables, against random objects, and against the CEL rules that the API server runs.

use super::*;
use baton_crds::definition;
use proptest::prelude::*;
use serde_json::json;

fn object(spec: Value) -> Value {
    json!({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "tiny"}, "spec": spec})
}

#[track_caller]
fn paths(object: &Value) -> Vec<String> {
    match validate_object(object) {
        Ok(_) => Vec::new(),
        Err(violations) => violations.into_iter().map(|violation| violation.path).collect(),
    }
}

#[test]
fn a_minimal_manifest_gets_the_defaults() {
    let (_, validated) = validate_object(&object(json!({"model": {"uri": "pvc://models/llama/8b"}}))).expect("right");
    assert_eq!(validated.served_name, "tiny");
    assert_eq!(validated.source, ModelSource::Claim { claim: "models".to_owned(), path: "llama/8b".to_owned() });
    assert_eq!(validated.disaggregation.prefill(), Some(&validated.decode));
    assert_eq!(validated.decode.kv_cache_bytes.get(), 1 << 30);
    assert_eq!(validated.decode.drain_timeout, Duration::from_secs(120));
}

#[test]
fn each_rule_is_told_at_its_field() {
    let model = json!({"uri": "pvc://models"});
    let check = |spec: Value, expect: &[&str]| assert_eq!(paths(&object(spec)), expect);
    check(json!({"model": {"uri": "hf://Qwen/Qwen3-0.6B"}}), &["spec.model.uri"]);
    check(json!({"model": {"uri": "pvc://models/../etc"}}), &["spec.model.uri"]);
    check(json!({"model": {"uri": "pvc://models//x"}}), &["spec.model.uri"]);
    check(json!({"model": {"uri": "pvc://models", "servedName": "/x"}}), &["spec.model.servedName"]);
    check(
        json!({"model": model, "disaggregation": {"policy": "Conditional"}}),
        &["spec.disaggregation.minUncachedPromptTokens"],
    );
    check(
        json!({"model": model, "disaggregation": {"minUncachedPromptTokens": 5}}),
        &["spec.disaggregation.minUncachedPromptTokens"],
    );
    check(json!({"model": model, "disaggregation": {"policy": "Never"}}), &["spec.prefill.replicas"]);
    check(json!({"model": model, "disaggregation": {"policy": "Never"}, "prefill": {"replicas": 0}}), &[]);
    check(json!({"model": model, "prefill": {"replicas": 0}}), &["spec.prefill.replicas"]);
    check(json!({"model": model, "decode": {"replicas": 0}}), &["spec.decode.replicas"]);
    check(
        json!({"model": model, "decode": {"maxBatchTokens": 64}}),
        &["spec.decode.prefillChunkTokens", "spec.decode.maxSequences"],
    );
    check(json!({"model": model, "decode": {"kvCacheMemory": "1.5Gi"}}), &["spec.decode.kvCacheMemory"]);
}

#[test]
fn a_name_leaves_room_for_what_is_appended() {
    for (name, right) in
        [("a", true), (&"a".repeat(30), true), (&"a".repeat(31), false), ("1a", false), ("a.b", false), ("a-", false)]
    {
        let mut object = object(json!({"model": {"uri": "pvc://models"}}));
        object["metadata"]["name"] = json!(name);
        assert_eq!(paths(&object).is_empty(), right, "{name}");
    }
}

#[test]
fn amounts_of_memory_are_exact_up_to_the_largest() {
    for (text, expect) in [("1k", 1_000), ("256Mi", 256 << 20), ("3G", 3_000_000_000), ("9999999Ti", 9_999_999 << 40)] {
        assert_eq!(bytes(text), Some(expect), "{text}");
    }
    for text in ["", "Mi", "1", "1Pi", "-1Mi", "99999999999999999999Ti"] {
        assert_eq!(bytes(text), None, "{text}");
    }
}

/// Values that a person might write in a field, right and wrong ones.
fn value() -> impl Strategy<Value = Value> {
    let words = [
        "Always",
        "Conditional",
        "Never",
        "Standalone",
        "BF16",
        "pvc://a/b",
        "pvc://a/../b",
        "1Gi",
        "512Mi",
        "0Mi",
        "x/y",
        "",
    ];
    prop_oneof![
        6 => (-2i64..600).prop_map(Value::from),
        6 => proptest::sample::select(words.to_vec()).prop_map(Value::from),
        1 => (0u64..20).prop_map(|n| Value::from(n * 32)),
        1 => Just(Value::Null),
        1 => Just(json!({})),
        1 => Just(json!([1])),
        1 => any::<i64>().prop_map(Value::from),
        1 => "\\PC{0,8}".prop_map(Value::from),
    ]
}

const FIELDS: [&str; 17] = [
    "/metadata/name",
    "/spec/model/uri",
    "/spec/model/servedName",
    "/spec/engine/dtype",
    "/spec/engine/maxModelLength",
    "/spec/disaggregation/policy",
    "/spec/disaggregation/minUncachedPromptTokens",
    "/spec/prefill/replicas",
    "/spec/prefill/kvCacheMemory",
    "/spec/prefill/maxBatchTokens",
    "/spec/prefill/maxSequences",
    "/spec/prefill/prefillChunkTokens",
    "/spec/decode/replicas",
    "/spec/decode/drainTimeoutSeconds",
    "/spec/routing/mode",
    "/spec/decode",
    "/spec/unknown",
];

fn mutated() -> impl Strategy<Value = Value> {
    proptest::collection::vec((proptest::sample::select(FIELDS.to_vec()), value()), 0..4).prop_map(|changes| {
        let mut object = object(json!({
            "model": {"uri": "pvc://models"}, "engine": {}, "disaggregation": {}, "prefill": {}, "decode": {}, "routing": {}
        }));
        for (path, value) in changes {
            let (parent, field) = path.rsplit_once('/').expect("each path has a parent");
            if let Some(parent) = object.pointer_mut(parent).and_then(Value::as_object_mut) {
                parent.insert(field.to_owned(), value);
            }
        }
        object
    })
}

/// The verdict of the rules in the definition, run as the API server runs them: on an object whose defaults are filled in.
fn cel_accepts(model: &DisaggregatedModel) -> bool {
    let definition = serde_json::to_value(definition::definition()).expect("a definition serialises");
    let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let object = serde_json::to_value(model).expect("an object serialises");
    kube_cel::Validator::new().validate(schema, &object, None).is_ok()
}

#[test]
fn the_api_servers_rules_refuse_each_of_these_too() {
    let model = json!({"uri": "pvc://models"});
    for spec in [
        json!({"model": {"uri": "hf://Qwen/Qwen3-0.6B"}}),
        json!({"model": {"uri": "pvc://models", "servedName": "/x"}}),
        json!({"model": model, "disaggregation": {"policy": "Conditional"}}),
        json!({"model": model, "disaggregation": {"policy": "Never"}}),
        json!({"model": model, "decode": {"replicas": 0}}),
        json!({"model": model, "decode": {"maxSequences": 481}}),
        json!({"model": model, "prefill": {"prefillChunkTokens": 1024}}),
        json!({"model": model, "prefill": {"kvCacheMemory": "much"}}),
    ] {
        let typed = serde_json::from_value::<DisaggregatedModel>(object(spec.clone())).expect("well typed");
        assert!(!cel_accepts(&typed), "{spec}");
    }
    let mut long = object(json!({"model": model}));
    long["metadata"]["name"] = json!("a".repeat(31));
    assert!(!cel_accepts(&serde_json::from_value(long).expect("well typed")), "a name of 31 characters");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_offline_rules_and_the_api_servers_agree(object in mutated()) {
        // Objects without a type are refused by the schema, before any rule.
        if let Ok(model) = serde_json::from_value::<DisaggregatedModel>(object) {
            prop_assert_eq!(broken_rules(&model).is_empty(), cel_accepts(&model));
        }
    }

    #[test]
    fn whatever_is_written_is_refused_with_paths_or_accepted_whole(object in mutated()) {
        match validate_object(&object) {
            Ok((model, validated)) => prop_assert_eq!(validate(&model), Ok(validated)),
            Err(violations) => {
                prop_assert!(!violations.is_empty());
                prop_assert!(violations.iter().all(|violation| !violation.path.is_empty()));
            }
        }
    }
}
