//! A user's overlay laid over a pod template, as Kubernetes merges a strategic patch.
//!
//! Maps are merged, `null` deletes, lists whose entries have a key are merged entry by entry, and every other list is
//! replaced. Entries keep their order, new ones come last.

use serde_json::{Map, Value};

/// Lists whose entries are told apart by fields, and which fields: as Kubernetes' own types say for such patches. An entry
/// without the first field is like no other; a further one that a patch leaves out (a port's protocol) is any.
const LIST_KEYS: &[(&str, &[&str])] = &[
    ("containers", &["name"]),
    ("initContainers", &["name"]),
    ("volumes", &["name"]),
    ("env", &["name"]),
    ("imagePullSecrets", &["name"]),
    ("resourceClaims", &["name"]),
    ("claims", &["name"]),
    ("volumeMounts", &["mountPath"]),
    ("volumeDevices", &["devicePath"]),
    ("ports", &["containerPort", "protocol"]),
    ("hostAliases", &["ip"]),
    ("topologySpreadConstraints", &["topologyKey"]),
    ("schedulingGates", &["name"]),
    ("readinessGates", &["conditionType"]),
];

/// Lays `patch` over `base`.
pub(super) fn overlay(base: &mut Value, patch: &Value) {
    match (base, patch) {
        (Value::Object(base), Value::Object(patch)) => merge_maps(base, patch),
        (base, patch) => *base = without_nulls(patch),
    }
}

fn merge_maps(base: &mut Map<String, Value>, patch: &Map<String, Value>) {
    for (field, patch) in patch {
        match (base.get_mut(field), patch) {
            (_, Value::Null) => _ = base.shift_remove(field),
            (Some(Value::Array(base)), Value::Array(patch)) if keys(field).is_some() => {
                merge_lists(base, patch, keys(field).unwrap_or_default());
            }
            (Some(base), patch) => overlay(base, patch),
            (None, patch) => _ = base.insert(field.clone(), without_nulls(patch)),
        }
    }
}

fn merge_lists(base: &mut Vec<Value>, patch: &[Value], keys: &[&str]) {
    for entry in patch {
        match base.iter_mut().find(|one| is_same(one, entry, keys)) {
            Some(one) => overlay(one, entry),
            None => base.push(without_nulls(entry)),
        }
    }
}

fn is_same(base: &Value, patch: &Value, keys: &[&str]) -> bool {
    let Some((first, further)) = keys.split_first() else { return false };
    let named = base.get(first).is_some_and(|value| patch.get(first) == Some(value));
    named && further.iter().all(|key| patch.get(key).is_none_or(|value| base.get(key) == Some(value)))
}

fn keys(field: &str) -> Option<&'static [&'static str]> {
    LIST_KEYS.iter().find(|(name, _)| *name == field).map(|(_, keys)| *keys)
}

/// What is new has nothing that a `null` could delete.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(field, value)| (field.clone(), without_nulls(value)))
                .collect(),
        ),
        Value::Array(list) => Value::Array(list.iter().map(without_nulls).collect()),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn check(mut base: Value, patch: Value, expect: Value) {
        overlay(&mut base, &patch);
        assert_eq!(base, expect);
    }

    #[test]
    fn maps_are_merged_and_null_deletes() {
        check(
            json!({"spec": {"a": 1, "b": {"c": 2}, "d": 3}}),
            json!({"spec": {"b": {"e": 4}, "d": null, "f": {"g": null, "h": 5}, "i": null}}),
            json!({"spec": {"a": 1, "b": {"c": 2, "e": 4}, "f": {"h": 5}}}),
        );
    }

    #[test]
    fn entries_with_a_key_are_merged_and_new_ones_come_last() {
        check(
            json!({"containers": [{"name": "engine", "image": "a", "env": [{"name": "X", "value": "1"}]}]}),
            json!({"containers": [{"name": "log", "image": "b"}, {"name": "engine", "env": [{"name": "X", "value": "2"}, {"name": "Y", "value": "3"}]}]}),
            json!({"containers": [
                {"name": "engine", "image": "a", "env": [{"name": "X", "value": "2"}, {"name": "Y", "value": "3"}]},
                {"name": "log", "image": "b"},
            ]}),
        );
        check(
            json!({"ports": [{"containerPort": 80, "protocol": "TCP"}]}),
            json!({"ports": [{"containerPort": 80, "name": "web"}, {"containerPort": 80, "protocol": "UDP"}]}),
            json!({"ports": [{"containerPort": 80, "protocol": "TCP", "name": "web"}, {"containerPort": 80, "protocol": "UDP"}]}),
        );
        check(
            json!({"volumeMounts": [{"name": "a", "mountPath": "/x"}]}),
            json!({"volumeMounts": [{"name": "b", "mountPath": "/x"}, {"name": "b", "mountPath": "/y"}]}),
            json!({"volumeMounts": [{"name": "b", "mountPath": "/x"}, {"name": "b", "mountPath": "/y"}]}),
        );
    }

    #[test]
    fn lists_without_keys_are_replaced() {
        check(json!({"args": ["a", "b"]}), json!({"args": ["c"]}), json!({"args": ["c"]}));
        check(json!({"drop": ["ALL"]}), json!({"drop": []}), json!({"drop": []}));
    }

    #[test]
    fn shapes_that_do_not_fit_each_other_are_replaced() {
        check(json!({"a": [1]}), json!({"a": {"b": 1}}), json!({"a": {"b": 1}}));
        check(
            json!({"volumes": [1, {"name": "x"}]}),
            json!({"volumes": [2]}),
            json!({"volumes": [1, {"name": "x"}, 2]}),
        );
    }
}
