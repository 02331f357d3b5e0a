//! What to write so that a status stands as it is wanted, whatever stands there.
//!
//! Server-side apply takes away what it knows to be ours, and so not what got there in another way; and it refuses an object of which
//! any part has a type that its definition does not allow, as an older definition may have. A merge patch does neither.

use baton_crds::ConditionType;
use serde_json::{Map, Value};

/// Whether something of ours stands that is not wanted any more. Conditions of other types than ours are somebody else's.
pub(crate) fn holds_more(stands: &Value, wanted: &Value) -> bool {
    match (stands, wanted) {
        (Value::Object(stands), Value::Object(wanted)) => {
            stands.iter().any(|(field, stands)| wanted.get(field).is_none_or(|wanted| holds_more(stands, wanted)))
        }
        (Value::Array(stands), Value::Array(wanted)) => stands.iter().any(|one| match key(one) {
            Some(key_of_one) => match wanted.iter().find(|other| key(other) == Some(key_of_one)) {
                Some(other) => holds_more(one, other),
                None => !is_others(one),
            },
            // A list without keys is written as a whole.
            None => !one.is_object(),
        }),
        (stands, wanted) => std::mem::discriminant(stands) != std::mem::discriminant(wanted),
    }
}

/// The merge patch (RFC 7386) that makes `wanted` of what stands, and leaves conditions that are somebody else's.
pub(crate) fn replacing(stands: &Value, wanted: &Value) -> Value {
    let mut wanted = wanted.clone();
    let others = stands.get("conditions").and_then(Value::as_array).into_iter().flatten().filter(|one| is_others(one));
    if let Some(conditions) = wanted.get_mut("conditions").and_then(Value::as_array_mut) {
        conditions.extend(others.cloned());
    }
    merge_patch(stands, wanted)
}

fn merge_patch(stands: &Value, wanted: Value) -> Value {
    match (stands, wanted) {
        (Value::Object(stands), Value::Object(wanted)) => {
            let gone = stands.keys().filter(|field| !wanted.contains_key(*field));
            let mut patch: Map<String, Value> = gone.map(|field| (field.clone(), Value::Null)).collect();
            for (field, wanted) in wanted {
                let value = merge_patch(stands.get(&field).unwrap_or(&Value::Null), wanted);
                patch.insert(field, value);
            }
            Value::Object(patch)
        }
        (_, wanted) => wanted,
    }
}

/// What tells an entry of a list apart: a condition's type, a role's name.
fn key(entry: &Value) -> Option<&str> {
    entry.get("type").or_else(|| entry.get("name")).and_then(Value::as_str)
}

/// Whether it is a whole condition of a type that is not ours.
fn is_others(condition: &Value) -> bool {
    let text = |field: &str| condition.get(field).and_then(Value::as_str);
    let is_whole = ["status", "reason", "message", "lastTransitionTime"].iter().all(|field| text(field).is_some());
    is_whole && text("type").is_some_and(|kind| !ConditionType::ALL.iter().any(|ours| ours.as_str() == kind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn condition(kind: &str, status: &str) -> Value {
        json!({"type": kind, "status": status, "reason": "R", "message": "m", "lastTransitionTime": "2026-01-30T08:15:00Z"})
    }

    #[test]
    fn what_changes_is_no_more_and_what_is_to_go_is() {
        let check = |stands: Value, wanted: Value, expect: bool| {
            assert_eq!(holds_more(&stands, &wanted), expect, "{stands} {wanted}");
        };
        check(json!({"revision": "a"}), json!({"revision": "b", "url": "u"}), false);
        check(json!({"revision": "a", "updateRevision": "b"}), json!({"revision": "b"}), true);
        check(json!({"summary": {"prefill": "1/1"}}), json!({"summary": {"decode": "1/1"}}), true);
        check(json!({"roles": {}}), json!({"roles": []}), true);
        check(json!({"lastErrors": [{"role": "decode"}]}), json!({"lastErrors": []}), false);
        let of = |kinds: &[&str]| -> Value {
            json!({"conditions": kinds.iter().map(|kind| condition(kind, "True")).collect::<Vec<_>>()})
        };
        check(of(&["Ready", "Stalled"]), of(&["Ready"]), true);
        check(of(&["Ready", "Audited"]), of(&["Ready", "Accepted"]), false);
        check(json!({"conditions": [7]}), of(&["Ready"]), true);
    }

    #[test]
    fn the_patch_takes_away_what_is_ours_and_leaves_what_is_others() {
        let stands = json!({
            "download": {"pod": "a"}, "roles": {}, "summary": {"prefill": "1/1"},
            "conditions": [condition("Ready", "True"), condition("Audited", "True"), {"type": "Half"}, 7],
        });
        let wanted = json!({"summary": {"decode": "0/1"}, "conditions": [condition("Ready", "False")]});
        let expect = json!({
            "download": null, "roles": null, "summary": {"prefill": null, "decode": "0/1"},
            "conditions": [condition("Ready", "False"), condition("Audited", "True")],
        });
        assert_eq!(replacing(&stands, &wanted), expect);
        assert_eq!(replacing(&json!("nonsense"), &wanted), wanted);
    }
}
