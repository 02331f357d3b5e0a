//! The comparison, case by case, on pieces of objects as an API server gives them back.

use super::*;
use proptest::prelude::*;
use serde_json::json;

const MANAGER: &str = "baton-operator";

/// What an API server notes of a manager that has applied this, as if it took every list as one.
fn applied(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            Value::Object(fields.iter().map(|(field, value)| (format!("f:{field}"), applied(value))).collect())
        }
        _ => json!({}),
    }
}

/// The live object, with that note where it has none.
fn noted(wanted: &Value, mut live: Value) -> Value {
    if live.pointer("/metadata/managedFields").is_none() {
        if live.get("metadata").is_none() {
            live["metadata"] = json!({});
        }
        live["metadata"]["managedFields"] = managed(applied(wanted));
    }
    live
}

#[track_caller]
fn same(wanted: Value, live: Value) {
    let live = noted(&wanted, live);
    assert_eq!(difference(&wanted, &live, MANAGER), None, "wanted {wanted}, live {live}");
}

#[track_caller]
fn differs(wanted: Value, live: Value, at: &str) {
    let live = noted(&wanted, live);
    assert_eq!(difference(&wanted, &live, MANAGER).as_deref(), Some(at), "wanted {wanted}, live {live}");
}

#[test]
fn what_others_add_is_no_difference() {
    same(
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"template": {"spec": {"containers": [{"name": "engine"}]}}}}),
        json!({
            "metadata": {"annotations": {"deployment.kubernetes.io/revision": "1"}},
            "spec": {
                "progressDeadlineSeconds": 600,
                "template": {"spec": {"containers": [{"name": "mesh"}, {"name": "engine", "imagePullPolicy": "Always"}]}},
            },
            "status": {"replicas": 1},
        }),
    );
}

#[test]
fn what_is_missing_or_other_is_named() {
    differs(json!({"spec": {"replicas": 2}}), json!({"spec": {"replicas": 1}}), "spec.replicas");
    differs(json!({"metadata": {"labels": {"a": "b"}}}), json!({"metadata": {}}), "metadata.labels");
    differs(
        json!({"spec": {"containers": [{"name": "engine", "env": [{"name": "A", "value": "1"}]}]}}),
        json!({"spec": {"containers": [{"name": "engine", "env": [{"name": "A", "value": "2"}]}]}}),
        "spec.containers[engine].env[A].value",
    );
    differs(
        json!({"spec": {"volumes": [{"name": "tmp", "emptyDir": {}}]}}),
        json!({"spec": {"volumes": [{"name": "tmp", "hostPath": {"path": "/"}}]}}),
        "spec.volumes[tmp].emptyDir",
    );
}

#[test]
fn amounts_are_compared_as_amounts_and_other_texts_as_texts() {
    for (wanted, live) in [
        (json!("1000m"), json!("1")),
        (json!("1024Mi"), json!("1Gi")),
        (json!(1), json!("1")),
        (json!("0.5"), json!("500m")),
        (json!("1e3"), json!("1k")),
        (json!("1500M"), json!("1.5G")),
    ] {
        let resources = |amount| json!({"spec": {"resources": {"limits": {"memory": amount}}}});
        same(resources(wanted.clone()), resources(live.clone()));
        let env = |amount| json!({"spec": {"args": [amount]}});
        differs(env(wanted), env(live), "spec.args[0]");
    }
    let limit = |amount: &str| json!({"spec": {"resources": {"limits": {"cpu": amount}}}});
    differs(limit("1"), limit("1001m"), "spec.resources.limits.cpu");
}

#[test]
fn a_number_and_a_name_are_different_targets() {
    same(json!({"spec": {"maxUnavailable": 1}}), json!({"spec": {"maxUnavailable": 1.0}}));
    differs(json!({"spec": {"targetPort": 8000}}), json!({"spec": {"targetPort": "8000"}}), "spec.targetPort");
    differs(json!({"spec": {"maxUnavailable": "1"}}), json!({"spec": {"maxUnavailable": 1}}), "spec.maxUnavailable");
}

#[test]
fn a_list_that_is_replaced_as_a_whole_has_no_further_items() {
    let policy = |ingress: Value| json!({"spec": {"ingress": ingress}});
    same(policy(json!([{"ports": [{"port": 8000}]}])), policy(json!([{"ports": [{"port": 8000, "protocol": "TCP"}]}])));
    differs(
        policy(json!([{"ports": [{"port": 8000}]}])),
        policy(json!([{"ports": [{"port": 8000}]}, {}])),
        "spec.ingress",
    );
    differs(
        policy(json!([{"ports": [{"port": 8000}]}])),
        policy(json!([{"ports": [{"port": 8000}, {"port": 22}]}])),
        "spec.ingress[0].ports",
    );
    differs(json!({"spec": {"args": ["a", "b"]}}), json!({"spec": {"args": ["b", "a"]}}), "spec.args[0]");
}

#[test]
fn a_services_ports_are_found_by_number_and_protocol() {
    same(
        json!({"spec": {"ports": [{"port": 8000, "name": "http"}]}}),
        json!({"spec": {"ports": [{"port": 9, "protocol": "UDP"}, {"port": 8000, "name": "http", "protocol": "TCP", "targetPort": 8000}]}}),
    );
}

#[test]
fn nothing_wanted_is_nothing_missing() {
    same(
        json!({"metadata": {"labels": {}}, "spec": {"tolerations": [], "nodeSelector": {}, "priorityClassName": null}}),
        json!({"metadata": {}, "spec": {}}),
    );
    differs(json!({"spec": {"podSelector": {}}}), json!({"spec": {}}), "spec.podSelector");
}

fn managed(fields: Value) -> Value {
    json!([
        {"manager": "kube-controller-manager", "operation": "Update", "subresource": "status", "fieldsV1": {"f:status": {}}},
        {"manager": MANAGER, "operation": "Update", "fieldsV1": {"f:spec": {"f:foreign": {}}}},
        {"manager": MANAGER, "operation": "Apply", "fieldsV1": fields},
    ])
}

#[test]
fn a_field_of_ours_that_is_not_wanted_any_more_is_a_difference() {
    let live = |fields: Value| {
        json!({
            "metadata": {"labels": {"a": "1", "b": "2"}, "managedFields": managed(fields)},
            "spec": {"replicas": 3, "ports": [{"port": 8000, "protocol": "TCP"}, {"port": 9, "protocol": "TCP"}]},
        })
    };
    let wanted = json!({"metadata": {"labels": {"a": "1"}}, "spec": {"ports": [{"port": 8000}]}});
    let port = |port: u16| json!({format!("k:{{\"port\":{port},\"protocol\":\"TCP\"}}"): {".": {}, "f:port": {}, "f:protocol": {}}});
    let ours = |labels: Value, spec: Value| json!({"f:metadata": {"f:labels": labels}, "f:spec": spec});
    let (label, ports) = (json!({"f:a": {}}), json!({"f:ports": port(8000)}));
    same(wanted.clone(), live(ours(label.clone(), ports.clone())));
    let mut both = port(8000);
    both.as_object_mut().expect("an object").extend(port(9).as_object().expect("an object").clone());
    differs(
        wanted.clone(),
        live(ours(label.clone(), json!({"f:ports": both}))),
        "spec.ports[{\"port\":9,\"protocol\":\"TCP\"}]",
    );
    differs(wanted.clone(), live(ours(json!({"f:a": {}, "f:b": {}}), ports)), "metadata.labels.b");
    differs(wanted.clone(), live(ours(label, json!({"f:ports": port(8000), "f:replicas": {}}))), "spec.replicas");
    assert!(owns_replicas(&live(json!({"f:spec": {"f:replicas": {}}})), MANAGER));
    assert!(!owns_replicas(&live(json!({"f:spec": {"f:ports": {}}})), MANAGER));
}

#[test]
fn a_wanted_value_that_another_has_taken_is_a_difference() {
    // The stranger's patch added a key to a selector, which Kubernetes takes as one value: our key is still in it.
    let wanted = json!({"metadata": {"name": "a", "labels": {"l": "1"}}, "spec": {"selector": {"model": "a"}, "type": "ClusterIP"}});
    let live = |fields: Value| {
        json!({
            "metadata": {"name": "a", "labels": {"l": "1"}, "managedFields": managed(fields)},
            "spec": {"selector": {"model": "a", "extra": "x"}, "type": "ClusterIP"},
        })
    };
    let labels = json!({"f:labels": {"f:l": {}}});
    differs(wanted.clone(), live(json!({"f:metadata": labels, "f:spec": {"f:type": {}}})), "spec.selector");
    same(wanted.clone(), live(json!({"f:metadata": labels, "f:spec": {"f:type": {}, "f:selector": {}}})));
    differs(wanted.clone(), live(json!({"f:spec": {"f:type": {}, "f:selector": {}}})), "metadata.labels");

    // The same in an item of a list, and with the item itself.
    let wanted = json!({"spec": {"containers": [{"name": "engine", "args": ["--a"]}]}});
    let live = |item: &str, fields: Value| {
        let managed = managed(json!({"f:spec": {"f:containers": {format!("k:{{\"name\":\"{item}\"}}"): fields}}}));
        json!({"metadata": {"managedFields": managed}, "spec": wanted["spec"]})
    };
    same(wanted.clone(), live("engine", json!({".": {}, "f:name": {}, "f:args": {}})));
    differs(wanted.clone(), live("engine", json!({".": {}, "f:name": {}})), "spec.containers[0].args");
    differs(wanted.clone(), live("mesh", json!({".": {}})), "spec.containers[{\"name\":\"mesh\"}]");
}

#[test]
fn an_object_without_notes_of_us_is_applied_once_more_and_one_that_we_created_is_not() {
    let wanted = json!({"metadata": {"name": "key"}, "data": {"k": "v"}});
    let live = |managed: Value| json!({"metadata": {"name": "key", "managedFields": managed}, "data": {"k": "v"}});
    differs(wanted.clone(), live(json!([])), "metadata.managedFields");
    differs(
        wanted.clone(),
        live(json!([{"manager": "stranger", "operation": "Apply", "fieldsV1": {"f:data": {}}}])),
        "metadata.managedFields",
    );
    let created = json!([{"manager": MANAGER, "operation": "Update", "fieldsV1": {"f:data": {".": {}, "f:k": {}}}}]);
    same(wanted, live(created));
}

fn object() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[a-z0-9]{1,6}".prop_map(Value::from)
    ];
    let tree = leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,6}", inner, 1..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    });
    prop::collection::btree_map("[a-z]{1,6}", tree, 0..4).prop_map(|map| Value::Object(map.into_iter().collect()))
}

proptest! {
    #[test]
    fn an_object_is_as_itself_and_stays_so_with_a_further_field(object in object(), name in "[A-Z]{1,4}") {
        prop_assert_eq!(difference(&object, &noted(&object, object.clone()), MANAGER), None);
        let mut more = object.clone();
        if let Some(fields) = more.as_object_mut() {
            fields.insert(name.clone(), Value::from(1));
        }
        prop_assert_eq!(difference(&object, &noted(&object, more.clone()), MANAGER), None);
        prop_assert_eq!(difference(&more, &noted(&object, object.clone()), MANAGER), Some(name));
    }

    #[test]
    fn nothing_that_is_compared_panics(wanted in object(), live in object()) {
        let _ = difference(&wanted, &live, MANAGER);
    }
}
