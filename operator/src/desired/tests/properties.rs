//! The checks, on manifests drawn at random.

use super::checks::{self, Referred};
use super::fixtures::{lacking, made, number, owner, plan_of, site, tiny};
use crate::child::{Kind, Objects, Planned};
use crate::desired::{OptionalKind, desired};
use crate::plan::{Plan, WorkloadRole};
use crate::validated::{
    Cache, ClaimSource, Colocation, Disaggregation, Download, Engine, EngineKind, ModelSource, Monitor, PodSettings,
    PodTemplate, Replicas, ResourceClaim, RoleSettings, Routing, TopologySpread, Validated,
};
use baton_crds::DiscoveryMode;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{
    ConfigMap, EmptyDirVolumeSource, EnvVar, Secret, Service, ServiceAccount, Volume, VolumeMount,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

const NAME: &str = "[a-z]([-a-z0-9]{0,28}[a-z0-9])?";
const WORD: &str = "[a-z][-a-z0-9]{0,10}[a-z0-9]";
const KEY: &str = "[a-z]{1,10}\\.example/[a-z]{1,10}";

fn above_zero() -> impl Strategy<Value = NonZeroU32> {
    prop_oneof![1u32..2000, Just(u32::MAX)].prop_map(number)
}

fn amounts() -> impl Strategy<Value = std::collections::BTreeMap<String, Quantity>> {
    let names = prop_oneof![Just("cpu".to_owned()), Just("memory".to_owned()), Just("nvidia.com/gpu".to_owned())];
    btree_map(names, "[1-9][0-9]{0,3}(Mi|Gi)?".prop_map(Quantity), 0..3)
}

fn source() -> impl Strategy<Value = ModelSource> {
    let cache = prop_oneof![
        option::of("[1-9]Gi".prop_map(Quantity)).prop_map(|size_limit| Cache::EmptyDir { size_limit }),
        WORD.prop_map(|claim| Cache::Claim { claim }),
    ];
    let download = ("(hf|s3)://[A-Za-z0-9._/-]{1,40}", option::of("[a-z0-9./]{1,20}"), option::of(WORD), cache)
        .prop_map(|(uri, revision, credentials_secret, cache)| {
            ModelSource::Download(Download {
                region: uri.starts_with("s3").then(|| "eu".to_owned()),
                endpoint: revision.as_ref().map(|_| "http://mirror.example:9000".to_owned()),
                uri,
                revision,
                credentials_secret,
                cache,
            })
        });
    prop_oneof![
        (WORD, "([A-Za-z0-9_.$()-]{1,10}/?){0,3}").prop_map(|(claim, path)| ModelSource::Claim { claim, path }),
        ("[a-z.]{1,20}/[a-z]{1,10}:[0-9]", option::of(WORD))
            .prop_map(|(reference, pull_secret)| ModelSource::Image { reference, pull_secret }),
        download,
    ]
}

fn pod() -> impl Strategy<Value = PodSettings> {
    let claims = btree_set(WORD, 0..3).prop_map(|names| {
        let source = |name: &String| {
            if name.len() > 5 { ClaimSource::Claim(name.clone()) } else { ClaimSource::Template(name.clone()) }
        };
        names.iter().map(|name| ResourceClaim { name: name.clone(), source: source(name) }).collect::<Vec<_>>()
    });
    let spread = btree_set(KEY, 0..3).prop_map(|keys| {
        let one = |key: String| TopologySpread { required: key.len() > 15, topology_key: key, max_skew: number(2) };
        keys.into_iter().map(one).collect::<Vec<_>>()
    });
    let names = prop_oneof!["[A-Z_]{1,10}", Just("POD_IP".to_owned()), Just("HOME".to_owned())];
    let env = btree_map(names, ".{0,10}", 0..4).prop_map(|map| {
        map.into_iter().map(|(name, value)| EnvVar { name, value: Some(value), value_from: None }).collect::<Vec<_>>()
    });
    // As with validation, no volume is named like ours and no mount is where ours are.
    let paths = prop_oneof!["/(data|srv)/[a-z]{1,8}", Just("/dev/shm".to_owned())];
    let volumes = btree_map("[a-z]{3,8}", paths, 0..3).prop_map(|map| {
        let mut paths = std::collections::BTreeSet::new();
        map.into_iter().filter(|(_, path)| paths.insert(path.clone())).collect::<Vec<_>>()
    });
    (amounts(), amounts(), claims, spread, env, volumes, option::of(WORD), btree_map(KEY, WORD, 0..3)).prop_map(
        |(requests, limits, resource_claims, topology_spread, env, volumes, class, node_selector)| PodSettings {
            requests,
            limits,
            resource_claims,
            node_selector,
            tolerations: Vec::new(),
            topology_spread,
            priority_class: class.clone(),
            runtime_class: class,
            env,
            volume_mounts: volumes
                .iter()
                .map(|(name, path)| VolumeMount { name: name.clone(), mount_path: path.clone(), ..Default::default() })
                .collect(),
            volumes: volumes
                .into_iter()
                .map(|(name, _)| Volume {
                    name,
                    empty_dir: Some(EmptyDirVolumeSource::default()),
                    ..Default::default()
                })
                .collect(),
            template: None,
        },
    )
}

fn role() -> impl Strategy<Value = RoleSettings> {
    let replicas = prop_oneof![above_zero().prop_map(Replicas::Fixed), Just(Replicas::External)];
    let bytes = prop_oneof![1u64..1 << 40, Just(u64::MAX)].prop_map(|bytes| NonZeroU64::new(bytes).expect("above 0"));
    let drain = prop_oneof![0u64..4000, Just(u64::MAX)].prop_map(Duration::from_secs);
    let nodes = prop_oneof![Just(1u32), 1u32..64].prop_map(number);
    (replicas, bytes, drain, nodes, prop_oneof![0u32..1000, Just(u32::MAX)], above_zero(), pod()).prop_map(
        |(replicas, kv_cache_bytes, drain_timeout, nodes_per_replica, max_unavailable, tokens, pod)| RoleSettings {
            replicas,
            nodes_per_replica,
            kv_cache_bytes,
            max_batch_tokens: tokens,
            max_sequences: tokens,
            prefill_chunk_tokens: tokens,
            drain_timeout,
            max_unavailable,
            pod,
        },
    )
}

fn model() -> impl Strategy<Value = Validated> {
    let kind =
        prop_oneof![Just(EngineKind::Baton), Just(EngineKind::Baton), Just(EngineKind::Vllm), Just(EngineKind::Sglang)];
    let engine = (kind, vec(".{0,12}", 0..4)).prop_map(|(kind, args)| Engine {
        kind,
        image: match kind {
            EngineKind::Baton => None,
            EngineKind::Vllm | EngineKind::Sglang => Some("engine.example/image:1".to_owned()),
        },
        args,
    });
    let disaggregation = prop_oneof![
        role().prop_map(|prefill| Disaggregation::Always { prefill }),
        (role(), above_zero()).prop_map(|(prefill, min_uncached_prompt_tokens)| Disaggregation::Conditional {
            prefill,
            min_uncached_prompt_tokens
        }),
        Just(Disaggregation::Never),
    ];
    let routing =
        prop_oneof![Just(Routing::Sidecar), above_zero().prop_map(|replicas| Routing::Standalone { replicas })];
    let monitor = prop_oneof![Just(Monitor::Auto), Just(Monitor::Required), Just(Monitor::None)];
    let colocation = option::of((KEY, any::<bool>()))
        .prop_map(|colocation| colocation.map(|(topology_key, required)| Colocation { topology_key, required }));
    let discovery = prop_oneof![Just(DiscoveryMode::Dns), Just(DiscoveryMode::EndpointSlices)];
    (NAME, source(), engine, disaggregation, role(), routing, colocation, any::<bool>(), monitor, discovery).prop_map(
        |(name, source, engine, disaggregation, decode, routing, colocation, network_policy, monitor, discovery)| {
            Validated {
                served_name: format!("org/{name}"),
                name,
                source,
                engine,
                dtype: network_policy.then_some(baton_crds::Dtype::BF16),
                max_model_length: network_policy.then(|| number(32)),
                disaggregation,
                decode,
                routing,
                discovery,
                colocation,
                network_policy,
                monitor,
            }
        },
    )
}

fn referred(model: &Validated) -> Referred {
    let mut referred = Referred::default();
    match &model.source {
        ModelSource::Claim { claim, .. } => _ = referred.claims.insert(claim.clone()),
        ModelSource::Image { pull_secret, .. } => referred.secrets.extend(pull_secret.clone()),
        ModelSource::Download(download) => {
            referred.secrets.extend(download.credentials_secret.clone());
            match &download.cache {
                Cache::EmptyDir { .. } => {}
                Cache::Claim { claim } => _ = referred.claims.insert(claim.clone()),
            }
        }
    }
    referred
}

/// What a type reads and writes again unchanged has no field that the type lacks.
fn is_whole<T: DeserializeOwned + Serialize>(body: &Value) {
    let typed: T = serde_json::from_value(body.clone()).expect("a body reads as its kind");
    assert_eq!(&serde_json::to_value(typed).expect("and writes"), body);
}

fn are_whole(objects: &Objects<Planned>) {
    for child in objects.children() {
        match child.kind {
            Kind::ServiceAccount => is_whole::<ServiceAccount>(&child.body),
            Kind::Secret => is_whole::<Secret>(&child.body),
            Kind::ConfigMap => is_whole::<ConfigMap>(&child.body),
            Kind::NetworkPolicy => is_whole::<NetworkPolicy>(&child.body),
            Kind::PodDisruptionBudget => is_whole::<PodDisruptionBudget>(&child.body),
            Kind::Deployment => is_whole::<Deployment>(&child.body),
            Kind::Service => is_whole::<Service>(&child.body),
            Kind::LeaderWorkerSet | Kind::PodMonitor => {}
        }
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z]{0,5}".prop_map(Value::from),
    ];
    let field = prop_oneof!["spec|metadata|containers|volumes|env|ports|labels|name|mountPath", "[a-z]{1,5}"];
    leaf.prop_recursive(6, 40, 5, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            btree_map(field.clone(), inner, 0..5).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_manifest_says_its_objects_hold_together(model in model()) {
        let objects = made(&model);
        checks::all(&objects, &referred(&model));
        are_whole(&objects);
    }

    #[test]
    fn the_same_manifest_gives_the_same_bytes(model in model()) {
        let bytes = |objects: Objects<Planned>| {
            objects.children().iter().map(|child| child.body.to_string()).collect::<Vec<_>>()
        };
        prop_assert_eq!(bytes(made(&model)), bytes(made(&model.clone())));
    }

    #[test]
    fn a_cluster_that_lacks_a_kind_gets_all_of_the_others(model in model()) {
        for kind in [OptionalKind::LeaderWorkerSet, OptionalKind::PodMonitor] {
            let (kind_name, _, _) = kind.names();
            let all = made(&model);
            let rest: Vec<_> = all.children().iter().filter(|child| child.kind.as_str() != kind_name).cloned().collect();
            let lacking = lacking(&model, kind);
            prop_assert_eq!(lacking.children(), &rest[..]);
        }
    }

    #[test]
    fn no_overlay_and_no_plan_makes_it_fail(overlay in any_json(), target in ".{0,8}", serving in ".{0,8}") {
        let mut model = tiny();
        model.decode.pod.template = Some(PodTemplate(overlay));
        let plan = Plan { target, serving, entrance: WorkloadRole::Proxy, ..plan_of(&model) };
        let made = desired(&model, &site(), &owner(), &plan, &Default::default());
        prop_assert!(made.contains(Kind::Service, "tiny"));
    }
}
