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

fn accepted(spec: Value) -> Validated {
    match validate_object(&object(spec)) {
        Ok((_, validated)) => validated,
        Err(violations) => panic!("{violations:?}"),
    }
}

#[test]
fn a_minimal_manifest_gets_the_defaults() {
    let validated = accepted(json!({"model": {"uri": "pvc://models/llama/8b"}}));
    assert_eq!(validated.served_name, "tiny");
    assert_eq!(validated.source, ModelSource::Claim { claim: "models".to_owned(), path: "llama/8b".to_owned() });
    assert_eq!(validated.disaggregation.prefill(), Some(&validated.decode));
    assert_eq!(validated.decode.replicas, Replicas::Fixed(NonZeroU32::MIN));
    assert_eq!(validated.decode.kv_cache_bytes.get(), 1 << 30);
    assert_eq!(validated.decode.drain_timeout, Duration::from_secs(120));
    assert_eq!(validated.decode.max_unavailable, 1);
    assert_eq!(validated.decode.pod, PodSettings::default());
    assert_eq!(validated.engine, Engine { kind: EngineKind::Baton, image: None, args: Vec::new() });
    assert_eq!(validated.routing, Routing::Sidecar);
    assert_eq!(validated.discovery, baton_crds::DiscoveryMode::Dns);
    assert_eq!((validated.network_policy, validated.monitor, validated.colocation), (true, Monitor::Auto, None));
}

#[test]
fn each_source_is_taken_apart() {
    let secret = json!({"name": "s"});
    let image = accepted(json!({"model": {"uri": "oci://r.example.com:5000/a/b:v1", "credentialsSecretRef": secret}}));
    let expect =
        ModelSource::Image { reference: "r.example.com:5000/a/b:v1".to_owned(), pull_secret: Some("s".to_owned()) };
    assert_eq!(image.source, expect);
    let hub = accepted(json!({"model": {
        "uri": "hf://Qwen/Qwen3-0.6B", "revision": "abc", "credentialsSecretRef": secret,
        "cache": {"sizeLimit": "40Gi"},
    }}));
    let download = Download {
        uri: "hf://Qwen/Qwen3-0.6B".to_owned(),
        revision: Some("abc".to_owned()),
        endpoint: None,
        region: None,
        credentials_secret: Some("s".to_owned()),
        cache: Cache::EmptyDir { size_limit: Some(Quantity("40Gi".to_owned())) },
    };
    assert_eq!(hub.source, ModelSource::Download(download));
    let bucket = accepted(json!({"model": {
        "uri": "s3://models/llama/8b", "endpoint": "http://minio:9000", "region": "eu-central-1",
        "cache": {"type": "PersistentVolumeClaim", "claimName": "cache"},
    }}));
    let ModelSource::Download(bucket) = bucket.source else { panic!("a download") };
    assert_eq!(bucket.cache, Cache::Claim { claim: "cache".to_owned() });
    assert_eq!(
        (bucket.endpoint.as_deref(), bucket.region.as_deref()),
        (Some("http://minio:9000"), Some("eu-central-1"))
    );
}

#[test]
fn pod_settings_become_kubernetes_types() {
    let validated = accepted(json!({"model": {"uri": "pvc://models"}, "decode": {
        "resources": {"requests": {"cpu": 8, "memory": "32Gi"}, "limits": {"memory": "48Gi"}},
        "gpu": {"count": 2, "class": "NVIDIA-H100-80GB-HBM3"},
        "resourceClaims": [{"name": "nic", "resourceClaimTemplateName": "one-nic"}],
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "topologySpread": [{"topologyKey": "kubernetes.io/hostname"}],
        "env": [{"name": "A", "value": "b"}, {"name": "C", "secretKeyRef": {"name": "d", "key": "e"}}],
        "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}],
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch", "readOnly": true}],
        "podTemplate": {"metadata": {"labels": {"team": "a"}}, "spec": {"schedulerName": "volcano"}},
    }}));
    let pod = validated.decode.pod;
    assert_eq!(pod.requests["cpu"], Quantity("8".to_owned()));
    assert_eq!(pod.limits["nvidia.com/gpu"], Quantity("2".to_owned()));
    assert_eq!(pod.node_selector["nvidia.com/gpu.product"], "NVIDIA-H100-80GB-HBM3");
    assert_eq!(pod.node_selector["pool"], "gpu");
    assert_eq!(pod.tolerations[0].operator.as_deref(), Some("Exists"));
    assert!(!pod.topology_spread[0].required && pod.topology_spread[0].max_skew.get() == 1);
    let secret = pod.env[1].value_from.as_ref().and_then(|from| from.secret_key_ref.as_ref()).expect("a Secret");
    assert_eq!((secret.name.as_str(), secret.key.as_str()), ("d", "e"));
    let size = pod.volumes[0].empty_dir.as_ref().and_then(|dir| dir.size_limit.clone());
    assert_eq!(size, Some(Quantity("1Gi".to_owned())));
    assert_eq!(pod.volume_mounts[0].read_only, Some(true));
    let template = pod.template.expect("a template").0;
    assert_eq!(template, json!({"metadata": {"labels": {"team": "a"}}, "spec": {"schedulerName": "volcano"}}));
}

#[test]
fn each_rule_is_told_at_its_field() {
    let model = json!({"uri": "pvc://models"});
    let check = |spec: Value, expect: &[&str]| assert_eq!(paths(&object(spec)), expect);
    for uri in [
        "ftp://models",
        "pvc://models/../etc",
        "pvc://models//x",
        "hf://Qwen",
        "hf://a/b/c",
        "s3://bucket",
        "oci://A/b",
    ] {
        check(json!({"model": {"uri": uri}}), &["spec.model.uri"]);
    }
    let digest = format!("oci://r/a@sha256:{}", "0".repeat(64));
    for uri in
        ["hf://a/b", "oci://busybox", "oci://r.example.com/a/b:1@sha256", "oci://r/a", &digest, "s3://models/a-b/c=d"]
    {
        let right = !uri.ends_with("sha256");
        check(json!({"model": {"uri": uri}}), if right { &[] } else { &["spec.model.uri"] });
    }
    check(json!({"model": {"uri": "pvc://models", "servedName": "/x"}}), &["spec.model.servedName"]);
    check(json!({"model": {"uri": "pvc://models", "revision": "main"}}), &["spec.model.revision"]);
    check(json!({"model": {"uri": "hf://a/b", "revision": "a..b"}}), &["spec.model.revision"]);
    check(json!({"model": {"uri": "pvc://models", "region": "x"}}), &["spec.model.region"]);
    check(json!({"model": {"uri": "oci://a", "endpoint": "https://a.b:9000/c"}}), &["spec.model.endpoint"]);
    check(json!({"model": {"uri": "hf://a/b", "endpoint": "minio.local:9000"}}), &["spec.model.endpoint"]);
    check(
        json!({"model": {"uri": "pvc://models", "credentialsSecretRef": {"name": "s"}, "cache": {}}}),
        &["spec.model.credentialsSecretRef", "spec.model.cache"],
    );
    check(
        json!({"model": {"uri": "hf://a/b", "cache": {"type": "PersistentVolumeClaim", "sizeLimit": 1}}}),
        &["spec.model.cache.claimName", "spec.model.cache.sizeLimit"],
    );
    check(
        json!({"model": model, "disaggregation": {"policy": "Conditional"}}),
        &["spec.disaggregation.minUncachedPromptTokens"],
    );
    check(
        json!({"model": model, "disaggregation": {"minUncachedPromptTokens": 5}}),
        &["spec.disaggregation.minUncachedPromptTokens"],
    );
    check(
        json!({"model": model, "decode": {"maxBatchTokens": 64}}),
        &["spec.decode.prefillChunkTokens", "spec.decode.maxSequences"],
    );
    check(json!({"model": model, "decode": {"kvCacheMemory": "1.5Gi"}}), &["spec.decode.kvCacheMemory"]);
    check(json!({"model": model, "routing": {"standalone": {}}}), &["spec.routing.standalone"]);
    check(json!({"model": model, "routing": {"mode": "Standalone", "standalone": {}}}), &[]);
}

#[test]
fn replicas_follow_the_policy_and_have_one_owner() {
    let model = json!({"uri": "pvc://models"});
    let check = |spec: Value, expect: &[&str]| assert_eq!(paths(&object(spec)), expect);
    let never = json!({"policy": "Never"});
    let external = json!({"provider": "External"});
    check(json!({"model": model, "disaggregation": never}), &[]);
    check(json!({"model": model, "disaggregation": never, "prefill": {"replicas": 0}}), &[]);
    check(json!({"model": model, "disaggregation": never, "prefill": {"replicas": 1}}), &["spec.prefill.replicas"]);
    check(
        json!({"model": model, "disaggregation": never, "prefill": {"autoscaling": external}}),
        &["spec.prefill.autoscaling"],
    );
    check(json!({"model": model, "prefill": {"replicas": 0}}), &["spec.prefill.replicas"]);
    check(json!({"model": model, "decode": {"replicas": 0}}), &["spec.decode.replicas"]);
    check(json!({"model": model, "decode": {"replicas": 2, "autoscaling": external}}), &["spec.decode.autoscaling"]);
    check(json!({"model": model, "decode": {"autoscaling": {}}}), &["spec.decode.autoscaling.provider"]);
    let scaled = accepted(json!({"model": model, "prefill": {"autoscaling": external}}));
    assert_eq!(scaled.disaggregation.prefill().map(|prefill| prefill.replicas), Some(Replicas::External));
}

#[test]
fn a_foreign_engine_is_told_by_its_own_arguments() {
    let model = json!({"uri": "pvc://models"});
    let check = |spec: Value, expect: &[&str]| assert_eq!(paths(&object(spec)), expect);
    let vllm = json!({"type": "VLLM", "image": "vllm/vllm-openai:v1", "args": ["--model", "/models/volume"]});
    check(json!({"model": model, "engine": vllm, "decode": {"nodesPerReplica": 2}}), &[]);
    check(json!({"model": model, "engine": {"type": "SGLang"}}), &["spec.engine.image"]);
    check(json!({"model": model, "engine": {"args": ["--threads=2", "--port=1"]}}), &["spec.engine.args"]);
    check(
        json!({"model": model, "engine": {"type": "VLLM", "image": "x", "dtype": "F16", "maxModelLength": 64}}),
        &["spec.engine.dtype", "spec.engine.maxModelLength"],
    );
    check(json!({"model": model, "engine": vllm, "prefill": {"maxSequences": 9}}), &["spec.prefill"]);
    check(
        json!({"model": model, "prefill": {"nodesPerReplica": 2}, "decode": {"nodesPerReplica": 3}}),
        &["spec.prefill.nodesPerReplica", "spec.decode.nodesPerReplica"],
    );
}

#[test]
fn pod_settings_are_checked_one_by_one() {
    let check = |decode: Value, expect: &[&str]| {
        let expect: Vec<String> = expect.iter().map(|path| format!("spec.decode.{path}")).collect();
        assert_eq!(paths(&object(json!({"model": {"uri": "pvc://models"}, "decode": decode}))), expect);
    };
    check(json!({"resources": {"limits": {"gpus": 1}}}), &["resources.limits"]);
    check(json!({"gpu": {"count": 1}, "resources": {"limits": {"nvidia.com/gpu": 1}}}), &["gpu"]);
    check(json!({"gpu": {"count": 1, "class": "A"}, "nodeSelector": {"nvidia.com/gpu.product": "B"}}), &["gpu.class"]);
    check(json!({"gpu": {"count": 1, "class": "A", "resourceName": "amd.com/gpu"}}), &["gpu.class"]);
    check(json!({"resourceClaims": [{"name": "a"}]}), &["resourceClaims[0].resourceClaimName"]);
    check(json!({"nodeSelector": {"a b": "c"}}), &["nodeSelector"]);
    check(
        json!({"tolerations": [{}, {"operator": "Exists", "value": "a", "tolerationSeconds": 5}]}),
        &["tolerations[0].key", "tolerations[1].value", "tolerations[1].tolerationSeconds"],
    );
    check(
        json!({"env": [{"name": "A"}, {"name": "POD_IP", "value": ""}, {"name": "1", "value": ""}]}),
        &["env[2].name", "env[0].value", "env[1].name"],
    );
    check(
        json!({"volumes": [{"name": "baton-tmp", "emptyDir": {}}], "volumeMounts": [
            {"name": "baton-tmp", "mountPath": "/models/x"}, {"name": "other", "mountPath": "/x/../y"},
        ]}),
        &["volumes[0].name", "volumeMounts[0].mountPath", "volumeMounts[1].mountPath", "volumeMounts"],
    );
    check(
        json!({"podTemplate": {"metadata": {"labels": {"llm-d.ai/role": "x"}, "annotations": {"/": ""}}}}),
        &["podTemplate.metadata.labels", "podTemplate.metadata.annotations"],
    );
}

#[test]
fn what_the_schema_leaves_open_is_read_as_kubernetes_types() {
    let check = |decode: Value, expect: &[&str]| {
        let expect: Vec<String> = expect.iter().map(|path| format!("spec.decode.{path}")).collect();
        assert_eq!(paths(&object(json!({"model": {"uri": "pvc://models"}, "decode": decode}))), expect);
    };
    check(json!({"volumes": [{"name": "a", "emptydir": {}}]}), &["volumes[0].emptydir"]);
    check(json!({"volumes": [{"name": "a", "emptyDir": {"sizeLimit": {}}}]}), &["volumes[0].emptyDir.sizeLimit"]);
    check(json!({"volumes": [{"name": "a", "emptyDir": {}, "secret": {"secretName": "s"}}]}), &["volumes[0]"]);
    check(json!({"volumes": [{"name": "a", "emptyDir": null}]}), &["volumes[0].emptyDir"]);
    let template = |spec: Value| json!({"podTemplate": {"spec": spec}});
    check(template(json!({"hostNetwork": true, "nodeName": "n"})), &[]);
    check(template(json!({"hostNetwork": "yes"})), &["podTemplate.spec.hostNetwork"]);
    check(template(json!({"tolerationz": []})), &["podTemplate.spec.tolerationz"]);
    check(template(json!({"affinity": null})), &["podTemplate.spec.affinity"]);
    check(template(json!({"terminationGracePeriodSeconds": 5})), &["podTemplate.spec.terminationGracePeriodSeconds"]);
    check(template(json!({"volumes": [{"name": "baton-model"}]})), &["podTemplate.spec.volumes[0].name"]);
    check(template(json!({"containers": [{"image": "x"}]})), &["podTemplate.spec.containers[0].name"]);
    check(
        template(json!({"containers": [{"name": "log", "image": "x", "command": ["a"]}, {"name": "log"}]})),
        &["podTemplate.spec.containers[1]"],
    );
    check(
        template(json!({"containers": [
            {"name": "engine", "image": "x", "ports": [], "command": ["a"], "securityContext": {"privileged": true},
             "env": [{"name": "POD_IP"}], "volumeMounts": [{"name": "a", "mountPath": "/tmp/x"}]},
            {"name": "routing-proxy"},
        ]})),
        &[
            "podTemplate.spec.containers[0].image",
            "podTemplate.spec.containers[0].command",
            "podTemplate.spec.containers[0].ports",
            "podTemplate.spec.containers[0].env[0].name",
            "podTemplate.spec.containers[0].volumeMounts[0].mountPath",
            "podTemplate.spec.containers[1].name",
        ],
    );
    check(template(json!({"schedulerName": "x".repeat(20_000)})), &["podTemplate"]);
    let foreign = json!({"model": {"uri": "pvc://models"}, "engine": {"type": "VLLM", "image": "x"},
        "decode": template(json!({"containers": [{"name": "engine", "command": ["sh"]}]}))});
    assert_eq!(paths(&object(foreign)), [""; 0]);
}

#[test]
fn whole_numbers_may_be_written_with_a_point() {
    let model = json!({"uri": "pvc://models"});
    assert_eq!(
        accepted(json!({"model": model, "decode": {"replicas": 2.0}})).decode.replicas.fixed(),
        NonZeroU32::new(2)
    );
    assert_eq!(paths(&object(json!({"model": model, "decode": {"replicas": 2.5}}))), ["spec.decode.replicas"]);
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
        "VLLM",
        "SGLang",
        "Baton",
        "PersistentVolumeClaim",
        "Exists",
        "NoExecute",
        "pvc://a/b",
        "pvc://a/../b",
        "hf://a/b",
        "s3://abc/d",
        "oci://a/b:c",
        "http://a",
        "1Gi",
        "512Mi",
        "0Mi",
        "500m",
        "x/y",
        "main",
        "baton-x",
        "POD_IP",
        "/x",
        "/tmp/y",
        "nvidia.com/gpu",
        "",
    ];
    let lists = [
        json!([]),
        json!(["--threads=2"]),
        json!(["--role=decode"]),
        json!([{"name": "a", "value": "b"}]),
        json!([{"name": "a", "value": "b"}, {"name": "a", "value": "c"}]),
        json!([{"name": "POD_IP", "value": "b"}]),
        json!([{"name": "v", "emptyDir": {}}]),
        json!([{"name": "v", "mountPath": "/x"}]),
        json!([{"name": "w", "mountPath": "/models"}]),
        json!([{"key": "a", "operator": "Exists"}]),
        json!([{"operator": "Equal"}]),
        json!([{"topologyKey": "zone", "maxSkew": 2}]),
        json!([{"name": "c", "resourceClaimName": "d"}]),
        json!([{"name": "c"}]),
    ];
    let maps = [
        json!({"provider": "External"}),
        json!({"count": 1}),
        json!({"count": 1, "class": "A"}),
        json!({"limits": {"nvidia.com/gpu": 1, "cpu": "2"}}),
        json!({"limits": {"x": 1}}),
        json!({"pool": "gpu"}),
        json!({"nvidia.com/gpu.product": "A"}),
        json!({"a b": "c"}),
        json!({"type": "PersistentVolumeClaim", "claimName": "c"}),
        json!({"sizeLimit": "1Gi"}),
        json!({"name": "s"}),
        json!({"replicas": 2}),
        json!({"colocation": {"topologyKey": "zone"}}),
        json!({"metadata": {"labels": {"baton.dev/model": "x"}}}),
        json!({"metadata": {"labels": {"team": "x"}}, "spec": {"schedulerName": "s"}}),
        json!({"maxUnavailable": 0}),
        json!({"networkPolicy": "Disabled"}),
        json!({"monitor": "None"}),
    ];
    prop_oneof![
        6 => (-2i64..600).prop_map(Value::from),
        8 => proptest::sample::select(words.to_vec()).prop_map(Value::from),
        6 => proptest::sample::select(lists.to_vec()),
        8 => proptest::sample::select(maps.to_vec()),
        1 => (0u64..20).prop_map(|n| Value::from(n * 32)),
        1 => Just(Value::Null),
        1 => Just(json!({})),
        1 => Just(json!([1])),
        1 => any::<i64>().prop_map(Value::from),
        1 => "\\PC{0,8}".prop_map(Value::from),
    ]
}

/// Values for a field, most of them of a kind that fits it, so that the rules are reached.
fn change() -> impl Strategy<Value = (&'static str, Value)> {
    let fitting: Vec<(&'static str, Value)> = FITTING
        .iter()
        .flat_map(|(path, values)| {
            let values: Vec<Value> = serde_json::from_str(values).expect("the table is JSON");
            values.into_iter().map(|value| (*path, value))
        })
        .collect();
    prop_oneof![
        3 => proptest::sample::select(fitting),
        1 => (proptest::sample::select(FITTING.map(|(path, _)| path).to_vec()), value()),
    ]
}

/// Fields, each with values that have its type.
const FITTING: [(&str, &str); 45] = [
    ("/metadata/name", r#"["a", "a-very-long-name-of-a-model-that-goes-on", "a.b"]"#),
    ("/spec/model/uri", r#"["pvc://a/b", "hf://a/b", "s3://abc/d", "oci://a/b:c", "pvc://a/../b", "x"]"#),
    ("/spec/model/servedName", r#"["x/y", "/x"]"#),
    ("/spec/model/revision", r#"["main", "a..b", "v1.0/x"]"#),
    ("/spec/model/endpoint", r#"["http://a.b:9000", "minio:9000", "https://x/y/"]"#),
    ("/spec/model/region", r#"["eu-central-1", "EU"]"#),
    ("/spec/model/credentialsSecretRef", r#"[{"name": "s"}, {"name": "S"}, {}]"#),
    (
        "/spec/model/cache",
        r#"[{}, {"type": "PersistentVolumeClaim", "claimName": "c"}, {"type": "PersistentVolumeClaim"}, {"sizeLimit": "1Gi"}, {"claimName": "c"}]"#,
    ),
    ("/spec/engine/type", r#"["Baton", "VLLM", "SGLang", "TRT"]"#),
    ("/spec/engine/image", r#"["a/b:c", "a b"]"#),
    ("/spec/engine/args", r#"[["--threads=2"], ["--role=decode"], ["--port", "1"], []]"#),
    ("/spec/engine/dtype", r#"["BF16", "FP8"]"#),
    ("/spec/engine/maxModelLength", r#"[64, 31]"#),
    ("/spec/disaggregation/policy", r#"["Always", "Conditional", "Never"]"#),
    ("/spec/disaggregation/minUncachedPromptTokens", r#"[1, 0, 256]"#),
    ("/spec/prefill/replicas", r#"[0, 1, 2, 1001]"#),
    ("/spec/prefill/autoscaling", r#"[{"provider": "External"}, {"provider": "KEDA"}, {}]"#),
    ("/spec/prefill/nodesPerReplica", r#"[1, 2, 65]"#),
    ("/spec/prefill/kvCacheMemory", r#"["512Mi", "0Mi", "1Gi"]"#),
    ("/spec/prefill/maxBatchTokens", r#"[64, 512, 1024]"#),
    ("/spec/prefill/maxSequences", r#"[8, 64, 480, 481]"#),
    ("/spec/prefill/prefillChunkTokens", r#"[32, 256, 512, 33, 1024]"#),
    (
        "/spec/prefill/resources",
        r#"[{"limits": {"nvidia.com/gpu": 1, "cpu": "2"}}, {"requests": {"cpus": 1}}, {"limits": {"cpu": "x"}}]"#,
    ),
    (
        "/spec/prefill/gpu",
        r#"[{"count": 1}, {"count": 1, "class": "A"}, {"count": 17}, {"count": 1, "class": "A", "resourceName": "amd.com/gpu"}]"#,
    ),
    ("/spec/prefill/nodeSelector", r#"[{"pool": "gpu"}, {"nvidia.com/gpu.product": "A"}, {"a b": "c"}, {"a": "b c"}]"#),
    (
        "/spec/prefill/podTemplate",
        r#"[{}, {"metadata": {"labels": {"baton.dev/model": "x"}}}, {"metadata": {"annotations": {"team": "x y"}}, "spec": {"schedulerName": "s"}}]"#,
    ),
    ("/spec/decode/replicas", r#"[0, 1, 2]"#),
    ("/spec/decode/nodesPerReplica", r#"[1, 3]"#),
    ("/spec/decode/maxSequences", r#"[64, 9]"#),
    (
        "/spec/decode/resourceClaims",
        r#"[[{"name": "c", "resourceClaimName": "d"}], [{"name": "c"}], [{"name": "c", "resourceClaimName": "d", "resourceClaimTemplateName": "e"}]]"#,
    ),
    (
        "/spec/decode/tolerations",
        r#"[[{"key": "a", "operator": "Exists"}], [{"operator": "Equal"}], [{"key": "a", "operator": "Exists", "value": "b"}], [{"key": "a", "tolerationSeconds": 5}], [{"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}]]"#,
    ),
    (
        "/spec/decode/topologySpread",
        r#"[[{"topologyKey": "zone"}], [{"topologyKey": "zone"}, {"topologyKey": "zone"}], [{"topologyKey": "zone", "maxSkew": 0}]]"#,
    ),
    (
        "/spec/decode/env",
        r#"[[{"name": "a", "value": "b"}], [{"name": "a"}], [{"name": "POD_IP", "value": "b"}], [{"name": "a", "value": "b"}, {"name": "a", "value": "c"}], [{"name": "a-b", "value": ""}]]"#,
    ),
    ("/spec/decode/volumes", r#"[[{"name": "v", "emptyDir": {}}], [{"name": "baton-v", "emptyDir": {}}], []]"#),
    (
        "/spec/decode/volumeMounts",
        r#"[[{"name": "v", "mountPath": "/x"}], [{"name": "w", "mountPath": "/y"}], [{"name": "v", "mountPath": "/tmp/y"}], [{"name": "v", "mountPath": "x"}]]"#,
    ),
    ("/spec/decode/priorityClassName", r#"["high", "High"]"#),
    ("/spec/decode/disruption", r#"[{"maxUnavailable": 0}, {"maxUnavailable": -1}, {}]"#),
    ("/spec/decode/drainTimeoutSeconds", r#"[1, 0, 3600]"#),
    ("/spec/routing/mode", r#"["Sidecar", "Standalone"]"#),
    ("/spec/routing/discovery", r#"["DNS", "EndpointSlices", "Dns"]"#),
    ("/spec/routing/standalone", r#"[{}, {"replicas": 2}, {"replicas": 0}]"#),
    ("/spec/placement", r#"[{}, {"colocation": {"topologyKey": "zone"}}, {"colocation": {}}]"#),
    ("/spec/security", r#"[{"networkPolicy": "Disabled"}, {"networkPolicy": "Open"}]"#),
    ("/spec/decode", r#"[{}]"#),
    ("/spec/unknown", r#"[1]"#),
];

fn mutated() -> impl Strategy<Value = Value> {
    proptest::collection::vec(change(), 0..5).prop_map(|changes| {
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
fn cel_accepts(model: &DisaggregatedModel, old: Option<&DisaggregatedModel>) -> bool {
    let definition = serde_json::to_value(definition::definition()).expect("a definition serialises");
    let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let object = serde_json::to_value(model).expect("an object serialises");
    let old = old.map(|old| serde_json::to_value(old).expect("an object serialises"));
    kube_cel::Validator::new().validate(schema, &object, old.as_ref()).is_ok()
}

fn typed(spec: Value) -> DisaggregatedModel {
    serde_json::from_value(object(spec)).expect("well typed")
}

#[test]
fn the_api_servers_rules_refuse_each_of_these_too() {
    let model = json!({"uri": "pvc://models"});
    assert!(cel_accepts(&typed(json!({"model": model})), None));
    for spec in [
        json!({"model": {"uri": "hf://Qwen"}}),
        json!({"model": {"uri": "pvc://models", "servedName": "/x"}}),
        json!({"model": {"uri": "pvc://models", "revision": "x"}}),
        json!({"model": {"uri": "hf://a/b", "cache": {"claimName": "x"}}}),
        json!({"model": model, "disaggregation": {"policy": "Conditional"}}),
        json!({"model": model, "disaggregation": {"policy": "Never"}, "prefill": {"replicas": 1}}),
        json!({"model": model, "engine": {"type": "VLLM"}}),
        json!({"model": model, "engine": {"args": ["--role"]}}),
        json!({"model": model, "decode": {"replicas": 0}}),
        json!({"model": model, "decode": {"maxSequences": 481}}),
        json!({"model": model, "decode": {"nodesPerReplica": 2}}),
        json!({"model": model, "decode": {"env": [{"name": "A"}]}}),
        json!({"model": model, "decode": {"nodeSelector": {"a b": ""}}}),
        json!({"model": model, "decode": {"volumeMounts": [{"name": "a", "mountPath": "/a"}]}}),
        json!({"model": model, "decode": {"podTemplate": {"metadata": {"labels": {"baton.dev/x": "y"}}}}}),
        json!({"model": model, "prefill": {"prefillChunkTokens": 1024}}),
        json!({"model": model, "prefill": {"kvCacheMemory": "much"}}),
    ] {
        assert!(!cel_accepts(&typed(spec.clone()), None), "{spec}");
    }
    let mut long = object(json!({"model": model}));
    long["metadata"]["name"] = json!("a".repeat(31));
    assert!(!cel_accepts(&serde_json::from_value(long).expect("well typed"), None), "a name of 31 characters");
}

#[test]
fn the_kind_of_source_and_of_engine_stay_what_they_were() {
    let of = |uri: &str, engine: Value| typed(json!({"model": {"uri": uri}, "engine": engine}));
    let baton = || json!({});
    let vllm = || json!({"type": "VLLM", "image": "x"});
    let was = of("pvc://a/b", baton());
    assert!(cel_accepts(&of("pvc://c/d", baton()), Some(&was)), "another path");
    assert!(!cel_accepts(&of("hf://a/b", baton()), Some(&was)), "another kind of source");
    assert!(!cel_accepts(&of("pvc://a/b", vllm()), Some(&was)), "another engine");
    let wrong = of("nonsense", baton());
    assert!(cel_accepts(&of("hf://a/b", baton()), Some(&wrong)), "what was wrong itself can be corrected");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_offline_rules_and_the_api_servers_agree(object in mutated()) {
        // Objects that the schema refuses never come before a rule.
        if structural::check(&object).is_empty()
            && let Ok(model) = serde_json::from_value::<DisaggregatedModel>(object)
        {
            let broken = rules::broken(&model);
            prop_assert_eq!(broken.is_empty(), cel_accepts(&model, None), "{:?}", broken);
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
