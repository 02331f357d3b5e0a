//! What holds for every manifest's objects, and snapshots of some manifests' objects as a cluster gets them.

mod checks;
mod fixtures;
mod properties;
mod snapshots;

use super::*;
use crate::child::Kind;
use crate::validated::{ModelSource, Replicas};
use baton_crds::DiscoveryMode;
use checks::workloads;
use fixtures::{lacking, made, plan_of, site, standalone, tiny, with_roles};
use serde_json::{Value, json};
use std::num::NonZeroU32;

/// The container of a role's pod, by name.
fn container<'a>(objects: &'a Objects<Planned>, role: &str, name: &str) -> &'a Value {
    let (_, template) =
        workloads(objects).into_iter().find(|(child, _)| child.name.contains(role)).expect("a workload");
    let lists = ["initContainers", "containers"].map(|list| template["spec"][list].as_array());
    let mut containers = lists.into_iter().flatten().flatten();
    containers.find(|container| container["name"] == name).expect("a container of that name")
}

/// The value of a flag among a container's arguments.
fn flag<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
    let args = container["args"].as_array()?;
    let at = args.iter().position(|arg| arg == name)?;
    args.get(at + 1)?.as_str()
}

fn body<'a>(objects: &'a Objects<Planned>, kind: Kind, name: &str) -> &'a Value {
    let found = objects.children().iter().find(|child| child.kind == kind && child.name == name);
    &found.unwrap_or_else(|| panic!("no {} {name}", kind.as_str())).body
}

#[test]
fn every_size_of_the_manifest_reaches_the_workers_flags() {
    let mut model = tiny();
    model.served_name = "org/tiny".to_owned();
    model.dtype = Some(baton_crds::Dtype::F32);
    model.max_model_length = NonZeroU32::new(999);
    model.engine.args = vec!["--extra".to_owned()];
    let objects = made(&model);
    let engine = container(&objects, "prefill", "engine");
    let revision = crate::revision(&model, &site().worker_image);
    for (name, value) in [
        ("--role", "prefill"),
        ("--model", "/models/volume/tiny"),
        ("--served-model-name", "org/tiny"),
        ("--revision", &revision),
        ("--host", "127.0.0.1"),
        ("--port", "8200"),
        ("--kv-host", "0.0.0.0"),
        ("--kv-port", "5600"),
        ("--advertise-address", "$(POD_IP)"),
        ("--kv-cache-bytes", "134217728"),
        ("--max-batch-tokens", "512"),
        ("--max-num-seqs", "64"),
        ("--prefill-chunk-tokens", "64"),
        ("--dtype", "f32"),
        ("--max-model-length", "999"),
        ("--proxy-public-key-file", "/etc/baton/signing-public/signing.pub"),
        ("--drain-timeout-seconds", "120"),
        ("--log-format", "json"),
    ] {
        assert_eq!(flag(engine, name), Some(value), "{name}");
    }
    assert_eq!(engine["args"].as_array().and_then(|args| args.last()), Some(&json!("--extra")), "the user's come last");
}

#[test]
fn the_proxy_finds_both_roles_of_its_own_revision() {
    let model = tiny();
    let objects = made(&model);
    let revision = crate::revision(&model, &site().worker_image);
    let proxy = container(&objects, "decode", "routing-proxy");
    assert_eq!(proxy["restartPolicy"], "Always", "a native sidecar");
    let args: Vec<&str> = proxy["args"].as_array().expect("arguments").iter().filter_map(Value::as_str).collect();
    for role in ["prefill", "decode"] {
        assert!(args.contains(&format!("tiny-{role}-{revision}-peers:8000").as_str()), "{args:?}");
    }
    assert_eq!(flag(proxy, "--engine"), Some("http://127.0.0.1:8200"));
    assert_eq!(flag(proxy, "--connector"), Some("baton"));
}

#[test]
fn a_proxy_that_watches_endpoint_slices_has_a_token_and_nothing_else_changes() {
    for model in [tiny(), standalone(tiny()), fixtures::vllm_over_nodes()] {
        let (by_name, by_slices) =
            (made(&model), made(&Validated { discovery: DiscoveryMode::EndpointSlices, ..model.clone() }));
        let revision = crate::revision(&model, &site().worker_image);
        assert_eq!(by_name.children().len(), by_slices.children().len(), "no object more, and none with rights");
        for (name, slices) in by_name.children().iter().zip(by_slices.children()) {
            let mut expect = name.clone();
            for path in ["/spec/template/spec", "/spec/leaderWorkerTemplate/leaderTemplate/spec"] {
                let Some(spec) = expect.body.pointer_mut(path) else { continue };
                with_token(spec, &model.name, &revision);
            }
            assert_eq!(&expect, slices, "{}", name.name);
        }
    }
}

/// What EndpointSlices add to a pod: flags, a mount and a volume, all of the proxy's.
fn with_token(spec: &mut Value, model: &str, revision: &str) {
    let push = |list: &mut Value, at: usize, entry: Value| list.as_array_mut().expect("a list").insert(at, entry);
    let volumes = spec["volumes"].as_array().expect("volumes");
    let routing = volumes.iter().position(|one| one["name"] == "baton-routing").expect("the proxy's");
    let sources = json!([
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
    ]);
    let volume = json!({"name": "baton-service-account", "projected": {"defaultMode": 0o440, "sources": sources}});
    push(&mut spec["volumes"], routing + 1, volume);
    let lists = spec.as_object_mut().expect("a pod").iter_mut();
    let containers = lists.filter(|(name, _)| ["containers", "initContainers"].contains(&name.as_str()));
    let mut proxies =
        containers.filter_map(|(_, list)| list.as_array_mut()?.iter_mut().find(|one| one["name"] == "routing-proxy"));
    let proxy = proxies.next().expect("a proxy");
    let mount = json!({"name": "baton-service-account", "mountPath": "/etc/baton/service-account", "readOnly": true});
    push(&mut proxy["volumeMounts"], 2, mount);
    let args = proxy["args"].as_array_mut().expect("arguments");
    let after = args.iter().position(|arg| arg == "--connector").expect("each proxy has one");
    let service = |role: &str| format!("{model}-{role}-{revision}-peers:http");
    let flags = ["--discover-endpoint-slices", &service("prefill"), "--discover-endpoint-slices", &service("decode")];
    let folder = ["--service-account-folder", "/etc/baton/service-account"];
    args.splice(after..after, flags.into_iter().chain(folder).map(|flag| json!(flag)));
}

#[test]
fn a_front_door_has_no_engine_and_no_label_of_a_model_server() {
    let model = standalone(tiny());
    let objects = made(&model);
    assert_eq!(flag(container(&objects, "proxy", "routing-proxy"), "--engine"), None);
    let (child, template) =
        workloads(&objects).into_iter().find(|(child, _)| child.name.contains("proxy")).expect("one");
    assert_eq!(child.body["spec"]["replicas"], 2);
    let labels = template["metadata"]["labels"].as_object().expect("labels");
    assert!(
        labels.keys().all(|key| !key.starts_with("llm-d.ai/") && !key.starts_with("disaggregatedset")),
        "{labels:?}"
    );
    assert_eq!(body(&objects, Kind::Service, "tiny")["spec"]["selector"]["baton.dev/workload-role"], "proxy");
    container(&objects, "decode", "routing-proxy");
}

#[test]
fn clients_stay_where_the_plan_says_while_a_new_revision_comes_up() {
    let model = standalone(tiny());
    let plan = Plan { serving: "0ld0ld00".to_owned(), entrance: WorkloadRole::Decode, ..plan_of(&model) };
    let objects = desired(&model, &site(), &fixtures::owner(), &plan, &fixtures::credentials());
    assert_eq!(
        body(&objects, Kind::Service, "tiny")["spec"]["selector"],
        json!({"baton.dev/model": "tiny", "baton.dev/workload-role": "decode", "baton.dev/revision": "0ld0ld00"})
    );
}

#[test]
fn without_disaggregation_decode_workers_serve_both_phases() {
    let model = Validated { disaggregation: crate::Disaggregation::Never, ..tiny() };
    let objects = made(&model);
    assert_eq!(workloads(&objects).len(), 1);
    assert_eq!(flag(container(&objects, "decode", "engine"), "--role"), Some("prefill-decode"));
    let (_, template) = workloads(&objects)[0];
    assert_eq!(template["metadata"]["labels"]["llm-d.ai/role"], "prefill-decode");
    assert_eq!(template["metadata"]["labels"]["baton.dev/workload-role"], "decode");
    assert_eq!(body(&objects, Kind::ConfigMap, "tiny")["data"]["routing.json"], r#"{"disaggregation":"never"}"#);
}

#[test]
fn replicas_that_somebody_else_owns_are_not_applied() {
    let model = with_roles(tiny(), |role| role.replicas = Replicas::External);
    for (child, _) in workloads(&made(&model)) {
        assert_eq!(child.body["spec"].get("replicas"), None, "{}", child.name);
    }
}

#[test]
fn a_replica_that_spans_nodes_is_a_group_whose_leader_alone_is_dialled() {
    let model = fixtures::vllm_over_nodes();
    assert_eq!(needs(&model), [OptionalKind::LeaderWorkerSet].into());
    let objects = made(&model);
    let set = objects.children().iter().find(|child| child.kind == Kind::LeaderWorkerSet).expect("a set");
    assert_eq!(set.body["spec"]["leaderWorkerTemplate"]["size"], 2);
    let follower = &set.body["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"];
    assert_eq!(follower["containers"][0].get("readinessProbe"), None);
    assert_eq!(follower.get("initContainers"), None);
    let leader = &set.body["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"];
    assert_eq!(leader["initContainers"][0]["name"], "routing-proxy");
    let peers = body(&objects, Kind::Service, &format!("{}-peers", set.name));
    assert_eq!(peers["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"], "0");

    let without = lacking(&model, OptionalKind::LeaderWorkerSet);
    assert!(!without.children().iter().any(|child| child.kind == Kind::LeaderWorkerSet));
    assert!(without.contains(Kind::ServiceAccount, "big-prefill"), "the rest stands");
}

#[test]
fn the_proxy_is_told_the_engines_protocol_and_what_a_foreign_engine_serves() {
    let check = |model: &Validated, role: &str, expect: [Option<&str>; 3]| {
        let objects = made(model);
        let proxy = container(&objects, role, "routing-proxy");
        let flags = ["--connector", "--role", "--bootstrap-port"].map(|name| flag(proxy, name));
        assert_eq!(flags, expect, "{} {role}", model.name);
    };
    check(&tiny(), "prefill", [Some("baton"), None, None]);
    let vllm = fixtures::vllm_over_nodes();
    check(&vllm, "prefill", [Some("vllm-nixl"), Some("prefill"), None]);
    check(&vllm, "decode", [Some("vllm-nixl"), Some("decode"), None]);
    let sglang = standalone(fixtures::sglang());
    check(&sglang, "prefill", [Some("sglang"), Some("prefill"), Some("8998")]);
    check(&sglang, "decode", [Some("sglang"), Some("decode"), Some("8998")]);
    check(&sglang, "proxy", [Some("sglang"), None, None]);
    let alone = Validated { disaggregation: crate::Disaggregation::Never, ..vllm };
    check(&alone, "decode", [Some("vllm-nixl"), Some("prefill-decode"), None]);
}

#[test]
fn a_foreign_engine_stands_behind_the_proxy_and_answers_its_own_probes() {
    let model = standalone(fixtures::sglang());
    let objects = made(&model);
    assert_eq!(roles(&model), WorkloadRole::ALL);
    let engine = container(&objects, "prefill", "engine");
    assert_eq!(
        engine["ports"],
        json!([
            {"containerPort": 8200, "name": "engine", "protocol": "TCP"},
            {"containerPort": 8998, "name": "bootstrap", "protocol": "TCP"},
        ])
    );
    assert_eq!(engine["readinessProbe"]["httpGet"], json!({"path": "/health", "port": 8200}));
    let monitor = body(&objects, Kind::PodMonitor, "sgl");
    assert_eq!(monitor["spec"]["podMetricsEndpoints"][0]["port"], "admin");
}

#[test]
fn a_foreign_engine_is_told_where_other_pods_find_it() {
    let variables = |model: &Validated| {
        let objects = made(model);
        let env = container(&objects, "prefill", "engine")["env"].as_array().expect("variables").clone();
        let position = |name: &str| env.iter().position(|one| one["name"] == name);
        let value = |name: &str| position(name).map(|at| env[at]["value"].clone());
        // A variable can refer to earlier ones alone.
        for name in ["VLLM_NIXL_SIDE_CHANNEL_HOST", "SGLANG_HOST_IP"] {
            assert!(position(name).is_none_or(|at| Some(at) > position("POD_IP")), "{env:?}");
        }
        ["VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT", "SGLANG_HOST_IP", "BATON_BOOTSTRAP_PORT"]
            .map(|name| value(name).and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default())
    };
    assert_eq!(variables(&fixtures::vllm_over_nodes()), ["$(POD_IP)", "5600", "", ""]);
    assert_eq!(variables(&fixtures::sglang()), ["", "", "$(POD_IP)", "8998"]);
    let users = with_roles(fixtures::vllm_over_nodes(), |role| {
        let value = Some("6000".to_owned());
        role.pod.env = vec![k8s_openapi::api::core::v1::EnvVar {
            name: "VLLM_NIXL_SIDE_CHANNEL_PORT".to_owned(),
            value,
            value_from: None,
        }];
    });
    assert_eq!(variables(&users)[1], "6000");
}

#[test]
fn pods_of_a_foreign_engine_dial_each_other_at_every_port_and_nobody_else_its_engine() {
    for mut model in [fixtures::vllm_over_nodes(), standalone(fixtures::sglang())] {
        model.name = "big".to_owned();
        let objects = made(&model);
        let own = json!({"from": [{"podSelector": {"matchLabels": {"baton.dev/model": "big"}}}]});
        let tcp = |port: u16| json!({"port": port, "protocol": "TCP"});
        let ingress = |name: &str| body(&objects, Kind::NetworkPolicy, name)["spec"]["ingress"].clone();
        assert_eq!(ingress("big-prefill"), json!([{"ports": [tcp(9090)]}, own]));
        assert_eq!(ingress("big-decode"), json!([{"ports": [tcp(8000), tcp(9090)]}, own]));
        if model.routing != Routing::Sidecar {
            assert_eq!(ingress("big-proxy"), json!([{"ports": [tcp(8000), tcp(9090)]}]));
        }
    }
}

#[test]
fn the_kv_port_and_prefills_requests_are_for_the_models_own_pods() {
    let objects = made(&tiny());
    let own = json!([{"podSelector": {"matchLabels": {"baton.dev/model": "tiny"}}}]);
    let tcp = |port: u16| json!({"port": port, "protocol": "TCP"});
    assert_eq!(
        body(&objects, Kind::NetworkPolicy, "tiny-prefill")["spec"]["ingress"],
        json!([{"ports": [tcp(9090)]}, {"from": own, "ports": [tcp(8000), tcp(5600)]}])
    );
    assert_eq!(
        body(&objects, Kind::NetworkPolicy, "tiny-decode")["spec"]["ingress"],
        json!([{"ports": [tcp(8000), tcp(9090)]}, {"from": own, "ports": [tcp(5600)]}])
    );
    let open = made(&Validated { network_policy: false, ..tiny() });
    assert!(!open.children().iter().any(|child| child.kind == Kind::NetworkPolicy));
}

#[test]
fn a_pod_outlives_its_drain_by_ten_seconds() {
    let model = with_roles(tiny(), |role| role.drain_timeout = std::time::Duration::from_secs(7));
    let objects = made(&standalone(model));
    for (child, template) in workloads(&objects) {
        assert_eq!(template["spec"]["terminationGracePeriodSeconds"], 17, "{}", child.name);
    }
    assert_eq!(container(&objects, "decode", "engine")["lifecycle"]["preStop"], json!({"sleep": {"seconds": 5}}));
    assert_eq!(flag(container(&objects, "proxy", "routing-proxy"), "--drain-timeout-seconds"), Some("7"));
}

#[test]
fn a_download_keeps_credentials_in_the_environment_and_goes_before_the_proxy() {
    let model = fixtures::downloaded();
    let objects = made(&model);
    let (_, template) = workloads(&objects)[0];
    let names: Vec<&Value> =
        template["spec"]["initContainers"].as_array().expect("two").iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["model-download", "routing-proxy"]);
    let download = container(&objects, "prefill", "model-download");
    assert_eq!(download["args"][0], "fetch");
    assert_eq!(flag(download, "--uri"), Some("hf://org/Tiny-Model"));
    assert_eq!(download["env"][0]["valueFrom"]["secretKeyRef"], json!({"key": "HF_TOKEN", "name": "hub"}));
    let to = flag(download, "--to").expect("a directory");
    assert!(to.starts_with("/models/cache/Tiny-Model-"), "{to}");
    assert_eq!(flag(container(&objects, "prefill", "engine"), "--model"), Some(to));
}

#[test]
fn downloads_share_a_directory_where_they_are_the_same_files_alone() {
    let directory = |change: fn(&mut crate::validated::Download)| {
        let mut model = fixtures::downloaded();
        if let ModelSource::Download(download) = &mut model.source {
            change(download);
        }
        flag(container(&made(&model), "decode", "engine"), "--model").expect("a directory").to_owned()
    };
    let first = directory(|_| ());
    assert_eq!(directory(|download| download.credentials_secret = None), first);
    assert_ne!(directory(|download| download.revision = Some("v2".to_owned())), first);
    assert_ne!(directory(|download| download.uri = "hf://other/Tiny-Model".to_owned()), first);
    assert!(directory(|download| download.uri = "s3://bucket/..".to_owned()).starts_with("/models/cache/-"));
}

#[test]
fn a_limit_of_the_users_is_not_contradicted_by_a_request_of_ours() {
    let quantity = |text: &str| k8s_openapi::apimachinery::pkg::api::resource::Quantity(text.to_owned());
    let resources = |change: &dyn Fn(&mut RoleSettings)| {
        container(&made(&with_roles(tiny(), change)), "decode", "engine")["resources"].clone()
    };
    assert_eq!(resources(&|_| ()), json!({"requests": {"cpu": "1", "memory": "1152Mi"}}));
    assert_eq!(
        resources(&|role| role.pod.limits = [("memory".to_owned(), quantity("100Mi"))].into()),
        json!({"limits": {"memory": "100Mi"}, "requests": {"cpu": "1"}})
    );
    assert_eq!(
        resources(&|role| role.pod.requests =
            [("cpu".to_owned(), quantity("8")), ("memory".to_owned(), quantity("2Gi"))].into()),
        json!({"requests": {"cpu": "8", "memory": "2Gi"}})
    );
}

#[test]
fn a_users_variable_takes_the_place_of_ours() {
    let model = with_roles(fixtures::vllm_over_nodes(), |role| {
        role.pod.env = vec![k8s_openapi::api::core::v1::EnvVar {
            name: "HOME".to_owned(),
            value: Some("/scratch".to_owned()),
            value_from: None,
        }];
    });
    let objects = made(&model);
    let env = container(&objects, "decode", "engine")["env"].as_array().expect("variables");
    let homes: Vec<&Value> = env.iter().filter(|one| one["name"] == "HOME").collect();
    assert_eq!(homes, [&json!({"name": "HOME", "value": "/scratch"})]);
    assert!(env.contains(&json!({"name": "BATON_PORT", "value": "8200"})));
}

#[test]
fn the_overlay_comes_last() {
    let overlay = json!({
        "metadata": {"annotations": {"team": "a"}},
        "spec": {
            "securityContext": {"fsGroup": null, "supplementalGroups": [2000]},
            "containers": [{"name": "engine", "resources": {"requests": {"cpu": "3"}}}, {"name": "log", "image": "log:1"}],
            "topologySpreadConstraints": [{"topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway", "maxSkew": 4}],
        },
    });
    let model = with_roles(tiny(), |role| role.pod.template = Some(crate::validated::PodTemplate(overlay.clone())));
    let objects = made(&model);
    let (_, template) = workloads(&objects)[0];
    assert_eq!(template["metadata"]["annotations"], json!({"team": "a"}));
    let security = &template["spec"]["securityContext"];
    assert_eq!((security.get("fsGroup"), &security["supplementalGroups"]), (None, &json!([2000])));
    assert_eq!(security["runAsNonRoot"], true);
    let engine = container(&objects, "prefill", "engine");
    assert_eq!(engine["resources"]["requests"], json!({"cpu": "3", "memory": "1152Mi"}));
    assert_eq!(template["spec"]["containers"][1], json!({"name": "log", "image": "log:1"}));
    assert_eq!(template["spec"]["topologySpreadConstraints"][0]["maxSkew"], 4);
    assert_eq!(template["spec"]["topologySpreadConstraints"].as_array().map(Vec::len), Some(1));
}

#[test]
fn dollars_in_names_are_not_taken_for_variables() {
    let model =
        Validated { source: ModelSource::Claim { claim: "c".to_owned(), path: "a$(HOME)".to_owned() }, ..tiny() };
    assert_eq!(flag(container(&made(&model), "decode", "engine"), "--model"), Some("/models/volume/a$$(HOME)"));
}

#[test]
fn a_monitor_is_made_where_the_cluster_knows_the_kind() {
    use crate::validated::Monitor;
    for (monitor, known, expect) in [
        (Monitor::Auto, true, true),
        (Monitor::Auto, false, false),
        (Monitor::Required, true, true),
        (Monitor::Required, false, false),
        (Monitor::None, true, false),
    ] {
        let model = Validated { monitor, ..tiny() };
        let objects = if known { made(&model) } else { lacking(&model, OptionalKind::PodMonitor) };
        assert_eq!(objects.contains(Kind::PodMonitor, "tiny"), expect, "{monitor:?} {known}");
        assert_eq!(needs(&model).contains(&OptionalKind::PodMonitor), monitor == Monitor::Required);
    }
}

#[test]
fn workloads_for_a_repository_have_the_names_and_sizes_that_they_are_given() {
    let site = site();
    let mut standing = Standing {
        name: "modelservice-decode".to_owned(),
        role: WorkloadRole::Decode,
        replicas: 0,
        group_size: None,
        routing_proxy: true,
    };
    let deployment = standing_workload(&tiny(), &site, &standing);
    assert_eq!((deployment.kind, deployment.name.as_str()), (Kind::Deployment, "modelservice-decode"));
    assert_eq!(deployment.body["spec"]["replicas"], 0);
    let metadata = deployment.body["metadata"].as_object().expect("metadata");
    assert!(!metadata.contains_key("ownerReferences") && !metadata.contains_key("namespace"), "{metadata:?}");
    assert!(deployment.body.to_string().contains("-peers:8000\""), "names without a namespace");

    standing.group_size = Some(1);
    standing.routing_proxy = false;
    let set = standing_workload(&tiny(), &site, &standing);
    assert_eq!(set.kind, Kind::LeaderWorkerSet);
    let leader = &set.body["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"];
    assert_eq!(leader.get("initContainers"), None);
    assert_eq!(leader["containers"][0]["ports"][0]["name"], "http");
    assert!(leader["containers"][0]["args"].to_string().contains("\"--host\",\"0.0.0.0\""));

    let around = standing_objects(&tiny(), &site, true);
    assert!(around.contains(Kind::Service, "tiny") && around.contains(Kind::ServiceAccount, "tiny-decode"));
    assert!(around.children().iter().all(|child| child.kind != Kind::Secret));
}
