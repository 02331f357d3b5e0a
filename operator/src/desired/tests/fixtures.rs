//! Manifests after validation, and what goes with them.

use crate::child::{Objects, Planned};
use crate::credentials::{Certificate, Credentials};
use crate::desired::{desired, entrance};
use crate::plan::{Plan, WorkloadRole};
use crate::site::{OptionalKind, Owner, Site};
use crate::validated::{
    Cache, ClaimSource, Colocation, Disaggregation, Download, Engine, EngineKind, ModelSource, Monitor, PodSettings,
    Replicas, ResourceClaim, RoleSettings, Routing, TopologySpread, Validated,
};
use baton_crds::DiscoveryMode;
use k8s_openapi::api::core::v1::{
    EmptyDirVolumeSource, EnvVar, EnvVarSource, SecretKeySelector, Toleration, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

pub(super) fn number(value: u32) -> NonZeroU32 {
    NonZeroU32::new(value).expect("a number above 0")
}

/// examples/tiny.yaml.
pub(super) fn tiny() -> Validated {
    let role = RoleSettings {
        replicas: Replicas::Fixed(number(1)),
        nodes_per_replica: number(1),
        kv_cache_bytes: NonZeroU64::new(128 << 20).expect("a number above 0"),
        max_batch_tokens: number(512),
        max_sequences: number(64),
        prefill_chunk_tokens: number(256),
        drain_timeout: Duration::from_secs(120),
        max_unavailable: 1,
        pod: PodSettings::default(),
    };
    Validated {
        name: "tiny".to_owned(),
        served_name: "tiny".to_owned(),
        source: ModelSource::Claim { claim: "models".to_owned(), path: "tiny".to_owned() },
        engine: Engine { kind: EngineKind::Baton, image: None, args: Vec::new() },
        dtype: None,
        max_model_length: None,
        disaggregation: Disaggregation::Always {
            prefill: RoleSettings { prefill_chunk_tokens: number(64), ..role.clone() },
        },
        decode: role,
        routing: Routing::Sidecar,
        discovery: DiscoveryMode::Dns,
        colocation: None,
        network_policy: true,
        monitor: Monitor::Auto,
    }
}

/// The same change to both roles.
pub(super) fn with_roles(mut model: Validated, change: impl Fn(&mut RoleSettings)) -> Validated {
    change(&mut model.decode);
    match &mut model.disaggregation {
        Disaggregation::Always { prefill } | Disaggregation::Conditional { prefill, .. } => change(prefill),
        Disaggregation::Never => {}
    }
    model
}

/// With two front doors.
pub(super) fn standalone(model: Validated) -> Validated {
    Validated { routing: Routing::Standalone { replicas: number(2) }, ..model }
}

/// Downloaded into a cache that pods share, and each setting of a pod in use.
pub(super) fn downloaded() -> Validated {
    let quantity = |text: &str| Quantity(text.to_owned());
    let model = Validated {
        name: "hub".to_owned(),
        served_name: "org/Tiny-Model".to_owned(),
        source: ModelSource::Download(Download {
            uri: "hf://org/Tiny-Model".to_owned(),
            revision: Some("0123456789abcdef0123456789abcdef01234567".to_owned()),
            endpoint: Some("https://hub.example".to_owned()),
            region: None,
            credentials_secret: Some("hub".to_owned()),
            cache: Cache::Claim { claim: "cache".to_owned() },
        }),
        colocation: Some(Colocation { topology_key: "topology.kubernetes.io/rack".to_owned(), required: false }),
        ..tiny()
    };
    with_roles(model, |role| {
        role.replicas = Replicas::Fixed(number(3));
        role.pod = PodSettings {
            requests: [("cpu".to_owned(), quantity("4")), ("memory".to_owned(), quantity("16Gi"))].into(),
            limits: [("memory".to_owned(), quantity("16Gi")), ("nvidia.com/gpu".to_owned(), quantity("1"))].into(),
            resource_claims: vec![
                ResourceClaim { name: "nic".to_owned(), source: ClaimSource::Template("rdma".to_owned()) },
                ResourceClaim { name: "pool".to_owned(), source: ClaimSource::Claim("shared".to_owned()) },
            ],
            node_selector: [("nvidia.com/gpu.product".to_owned(), "H100".to_owned())].into(),
            tolerations: vec![Toleration {
                key: Some("nvidia.com/gpu".to_owned()),
                operator: Some("Exists".to_owned()),
                ..Toleration::default()
            }],
            topology_spread: vec![TopologySpread {
                topology_key: "topology.kubernetes.io/zone".to_owned(),
                max_skew: number(2),
                required: true,
            }],
            priority_class: Some("serving".to_owned()),
            runtime_class: Some("nvidia".to_owned()),
            env: vec![
                EnvVar { name: "BATON_LOG".to_owned(), value: Some("debug".to_owned()), value_from: None },
                EnvVar {
                    name: "TOKEN".to_owned(),
                    value: None,
                    value_from: Some(EnvVarSource {
                        secret_key_ref: Some(SecretKeySelector {
                            name: "users".to_owned(),
                            key: "token".to_owned(),
                            optional: None,
                        }),
                        ..EnvVarSource::default()
                    }),
                },
            ],
            volumes: vec![Volume {
                name: "scratch".to_owned(),
                empty_dir: Some(EmptyDirVolumeSource::default()),
                ..Volume::default()
            }],
            volume_mounts: vec![VolumeMount {
                name: "scratch".to_owned(),
                mount_path: "/scratch".to_owned(),
                ..VolumeMount::default()
            }],
            template: None,
        };
    })
}

/// vLLM, each replica over two nodes, the model in an image.
pub(super) fn vllm_over_nodes() -> Validated {
    let args = ["--model=$(BATON_MODEL_DIR)", "--port=$(BATON_PORT)", "--served-model-name=$(BATON_SERVED_MODEL_NAME)"];
    let model = Validated {
        name: "big".to_owned(),
        served_name: "big".to_owned(),
        source: ModelSource::Image {
            reference: "registry.example/models/big:1".to_owned(),
            pull_secret: Some("pull".to_owned()),
        },
        engine: Engine {
            kind: EngineKind::Vllm,
            image: Some("vllm/vllm-openai:latest".to_owned()),
            args: args.map(str::to_owned).to_vec(),
        },
        ..tiny()
    };
    with_roles(model, |role| {
        role.nodes_per_replica = number(2);
        role.pod.limits = [("nvidia.com/gpu".to_owned(), Quantity("8".to_owned()))].into();
    })
}

/// SGLang, one node a replica.
pub(super) fn sglang() -> Validated {
    let args = ["python3", "-m", "sglang.launch_server", "--disaggregation-mode=$(BATON_ROLE)"];
    Validated {
        name: "sgl".to_owned(),
        served_name: "sgl".to_owned(),
        engine: Engine {
            kind: EngineKind::Sglang,
            image: Some("lmsysorg/sglang:latest".to_owned()),
            args: args.map(str::to_owned).to_vec(),
        },
        ..tiny()
    }
}

/// A cluster that has every kind.
pub(super) fn site() -> Site {
    Site {
        worker_image: "baton/worker:1".to_owned(),
        proxy_image: "baton/proxy:1".to_owned(),
        kinds: OptionalKind::ALL.into(),
        operator_namespace: Some("baton-system".to_owned()),
    }
}

pub(super) fn owner() -> Owner {
    Owner { namespace: "team".to_owned(), uid: Some("00000000-0000-0000-0000-000000000001".to_owned()) }
}

/// Nothing is there yet, or everything is there already.
pub(super) fn plan_of(model: &Validated) -> Plan {
    let revision = crate::revision(model, &site().worker_image);
    Plan {
        target: revision.clone(),
        serving: revision,
        entrance: entrance(model),
        keep: Default::default(),
        seed_replicas: Default::default(),
    }
}

pub(super) fn credentials() -> Credentials {
    let certificate =
        |name: &str| Certificate { certificate_pem: format!("{name} cert"), key_pem: format!("{name} key") };
    Credentials {
        signing_key: "private".to_owned(),
        signing_public: "public".to_owned(),
        authority: certificate("ca"),
        roles: WorkloadRole::ALL.into_iter().map(|role| (role, certificate(role.as_str()))).collect(),
    }
}

/// A model's objects in a cluster that has every kind.
pub(super) fn made(model: &Validated) -> Objects<Planned> {
    desired(model, &site(), &owner(), &plan_of(model), &credentials())
}

/// The same in a revision that no change of ours moves, for snapshots.
pub(super) fn made_for_snapshot(model: &Validated, site: &Site) -> Objects<Planned> {
    let revision = "1a2b3c4d".to_owned();
    let plan = Plan { target: revision.clone(), serving: revision, ..plan_of(model) };
    desired(model, site, &owner(), &plan, &credentials())
}

/// The same where the cluster lacks a kind.
pub(super) fn lacking(model: &Validated, kind: OptionalKind) -> Objects<Planned> {
    let mut site = site();
    site.kinds.remove(&kind);
    desired(model, &site, &owner(), &plan_of(model), &credentials())
}
