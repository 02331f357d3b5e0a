//! The container in which an engine computes: Baton's own with its flags, or another's image with the user's.

use super::model_volume::ModelVolume;
use super::pod::{
    BOOTSTRAP_PORT, Built, ENGINE_PORT, HTTP_PORT, KV_PORT, LEAVE_SECONDS, Part, SCRATCH_PATH, hardened, mount,
    secret_volume,
};
use super::scope::Scope;
use super::{labels, names, resources};
use crate::RoleSettings;
use crate::plan::WorkloadRole;
use crate::validated::EngineKind;
use baton_crds::Dtype;
use baton_wire::names::{files, paths, ports};
use k8s_openapi::api::core::v1::{
    Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource, ExecAction, HTTPGetAction, Lifecycle,
    LifecycleHandler, ObjectFieldSelector, Probe, SleepAction, Volume,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeSet;

/// The container's name: what an overlay merges into.
pub(super) const NAME: &str = "engine";

/// Our worker in its image.
const WORKER: &str = "/usr/local/bin/baton-worker";

const PUBLIC_KEY: &str = "baton-signing-public";
const PUBLIC_KEY_PATH: &str = "/etc/baton/signing-public";

/// The environment variable that holds the pod's address.
const POD_IP: &str = "POD_IP";
/// What a pod tells its engine of itself: `baton_crds::rules::OUR_ENV`, which no manifest may set.
const POD_FIELDS: [(&str, &str); 3] =
    [(POD_IP, "status.podIP"), ("POD_NAME", "metadata.name"), ("POD_NAMESPACE", "metadata.namespace")];

/// Where a prefill engine of SGLang's is asked for its KV: SGLang's own default, which no variable changes. The manifest's
/// arguments may name it by `BATON_BOOTSTRAP_PORT`; the proxy is told the same number.
pub(super) const SGLANG_BOOTSTRAP: u16 = 8998;

/// Memory in which an engine's processes share tensors.
const SHARED_MEMORY: &str = "baton-shm";
const SHARED_MEMORY_PATH: &str = "/dev/shm";

/// How often readiness is asked for while a model loads. An engine that is not ready is no failure before
/// [`STARTUP_ASKS_MAX`] of them, an hour: loading hundreds of gigabytes over a network takes that long.
const STARTUP_PERIOD_SECONDS: i32 = 2;
const STARTUP_ASKS_MAX: i32 = 1800;
/// The worker's own probe gives up after 2 s and says why; the kubelet waits a little longer to hear it.
const PROBE_TIMEOUT_SECONDS: i32 = 3;

/// The engine of a role's pod.
pub(super) fn engine(
    scope: &Scope<'_>,
    role: WorkloadRole,
    settings: &RoleSettings,
    part: Part,
    model: &ModelVolume,
) -> Built {
    match scope.model.engine.kind {
        EngineKind::Baton => baton(scope, role, settings, part, model),
        EngineKind::Vllm | EngineKind::Sglang => foreign(scope, role, settings, part, model),
    }
}

/// Baton's worker: HTTP for the proxy of its own pod alone, KV for the other pods.
fn baton(scope: &Scope<'_>, role: WorkloadRole, settings: &RoleSettings, part: Part, model: &ModelVolume) -> Built {
    let mut args = Flags::default();
    args.set("--role", serving_word(scope, role));
    args.set("--model", literal(&model.dir));
    args.set("--served-model-name", literal(&scope.model.served_name));
    args.set("--revision", scope.revision);
    args.set("--host", host(scope));
    args.set("--port", ports::ENGINE.to_string());
    args.set("--kv-host", "0.0.0.0");
    args.set("--kv-port", ports::KV.to_string());
    args.set("--advertise-address", format!("$({POD_IP})"));
    args.set("--kv-cache-bytes", settings.kv_cache_bytes.to_string());
    args.set("--max-batch-tokens", settings.max_batch_tokens.to_string());
    args.set("--max-num-seqs", settings.max_sequences.to_string());
    args.set("--prefill-chunk-tokens", settings.prefill_chunk_tokens.to_string());
    if let Some(dtype) = scope.model.dtype {
        args.set("--dtype", word(dtype));
    }
    if let Some(length) = scope.model.max_model_length {
        args.set("--max-model-length", length.to_string());
    }
    args.set("--proxy-public-key-file", format!("{PUBLIC_KEY_PATH}/{}", files::SIGNING_PUBLIC));
    args.set("--drain-timeout-seconds", settings.drain_timeout.as_secs().to_string());
    args.set("--log-format", "json");
    args.0.extend(scope.model.engine.args.iter().cloned());

    let probe = |what: &str| Probe {
        exec: Some(ExecAction {
            command: Some([WORKER, "probe", what, "--port", &ports::ENGINE.to_string()].map(str::to_owned).to_vec()),
        }),
        ..Probe::default()
    };
    let container = Container {
        image: Some(scope.model.engine.image.clone().unwrap_or_else(|| scope.site.worker_image.clone())),
        args: Some(args.0),
        env: Some(environment(pod_fields(), settings)),
        volume_mounts: Some(vec![model.mount.clone(), mount(PUBLIC_KEY, PUBLIC_KEY_PATH, true)]),
        ..probed(container(scope, settings, part), part, probe("ready"), probe("live"))
    };
    let key = secret_volume(PUBLIC_KEY, names::signing_public(&scope.model.name));
    Built { container: with_users_mounts(hardened(container), settings), volumes: vec![key] }
}

/// Another engine: its image and the user's arguments, which take what the manifest says from the environment. Flags of our
/// own would tie us to versions: what `vllm serve` takes changed more than once.
fn foreign(scope: &Scope<'_>, role: WorkloadRole, settings: &RoleSettings, part: Part, model: &ModelVolume) -> Built {
    let set = |name: &str, value: String| EnvVar { name: name.to_owned(), value: Some(value), value_from: None };
    let mut ours = pod_fields();
    ours.extend([
        set("BATON_ROLE", serving_word(scope, role).to_owned()),
        set("BATON_REVISION", scope.revision.to_owned()),
        set("BATON_MODEL_DIR", literal(&model.dir)),
        set("BATON_SERVED_MODEL_NAME", literal(&scope.model.served_name)),
        set("BATON_PORT", ports::ENGINE.to_string()),
        set("BATON_KV_PORT", ports::KV.to_string()),
        set("BATON_KV_CACHE_BYTES", settings.kv_cache_bytes.to_string()),
        set("BATON_MAX_BATCH_TOKENS", settings.max_batch_tokens.to_string()),
        set("BATON_MAX_SEQUENCES", settings.max_sequences.to_string()),
        set("BATON_PREFILL_CHUNK_TOKENS", settings.prefill_chunk_tokens.to_string()),
        set("BATON_DRAIN_TIMEOUT_SECONDS", settings.drain_timeout.as_secs().to_string()),
    ]);
    ours.extend(scope.model.dtype.map(|dtype| set("BATON_DTYPE", word(dtype).to_owned())));
    ours.extend(scope.model.max_model_length.map(|length| set("BATON_MAX_MODEL_LENGTH", length.to_string())));
    match scope.model.engine.kind {
        EngineKind::Baton => {}
        // What a prefill engine tells others of itself. vLLM's own default is localhost, where another pod finds nothing.
        EngineKind::Vllm => ours.extend([
            set("VLLM_NIXL_SIDE_CHANNEL_HOST", format!("$({POD_IP})")),
            set("VLLM_NIXL_SIDE_CHANNEL_PORT", ports::KV.to_string()),
        ]),
        // SGLang would guess its address by the route to a public one.
        EngineKind::Sglang => ours.extend([
            set("SGLANG_HOST_IP", format!("$({POD_IP})")),
            set("BATON_BOOTSTRAP_PORT", SGLANG_BOOTSTRAP.to_string()),
        ]),
    }
    // Both write caches below their home and ask for the user's name; the root is read-only and has no such user.
    ours.extend([set("HOME", SCRATCH_PATH.to_owned()), set("USER", "baton".to_owned())]);

    let users_own = settings.pod.volume_mounts.iter().any(|mount| mount.mount_path == SHARED_MEMORY_PATH);
    let mut mounts = vec![model.mount.clone()];
    let mut volumes = Vec::new();
    if !users_own {
        // A container's own /dev/shm has 64 MiB, with which engines that split a model over GPUs fail.
        mounts.push(mount(SHARED_MEMORY, SHARED_MEMORY_PATH, false));
        let medium = EmptyDirVolumeSource { medium: Some("Memory".to_owned()), ..EmptyDirVolumeSource::default() };
        volumes.push(Volume { name: SHARED_MEMORY.to_owned(), empty_dir: Some(medium), ..Volume::default() });
    }
    let health = || Probe {
        http_get: Some(HTTPGetAction {
            path: Some(paths::HEALTH.to_owned()),
            port: IntOrString::Int(i32::from(ports::ENGINE)),
            ..HTTPGetAction::default()
        }),
        ..Probe::default()
    };
    let container = Container {
        image: scope.model.engine.image.clone(),
        args: super::pod::some(scope.model.engine.args.clone()),
        env: Some(environment(ours, settings)),
        volume_mounts: Some(mounts),
        ..probed(container(scope, settings, part), part, health(), health())
    };
    Built { container: with_users_mounts(hardened(container), settings), volumes }
}

/// What both kinds have in common.
fn container(scope: &Scope<'_>, settings: &RoleSettings, part: Part) -> Container {
    let http = if scope.connector.is_some() { ENGINE_PORT } else { HTTP_PORT };
    let port = |name: &str, port: u16| ContainerPort {
        name: Some(name.to_owned()),
        container_port: i32::from(port),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    let handover = match scope.model.engine.kind {
        EngineKind::Baton | EngineKind::Vllm => port(KV_PORT, ports::KV),
        EngineKind::Sglang => port(BOOTSTRAP_PORT, SGLANG_BOOTSTRAP),
    };
    let ports = match part {
        Part::Leader => Some(vec![port(http, ports::ENGINE), handover]),
        Part::Follower => None,
    };
    Container {
        name: NAME.to_owned(),
        ports,
        resources: Some(resources::of_engine(scope.model.engine.kind, settings)),
        lifecycle: Some(Lifecycle {
            pre_stop: Some(LifecycleHandler {
                sleep: Some(SleepAction { seconds: LEAVE_SECONDS }),
                ..LifecycleHandler::default()
            }),
            ..Lifecycle::default()
        }),
        ..Container::default()
    }
}

/// A follower answers nobody, so nobody asks it; that it ended, its group's controller sees.
fn probed(container: Container, part: Part, ready: Probe, live: Probe) -> Container {
    match part {
        Part::Leader => Container {
            startup_probe: Some(Probe {
                period_seconds: Some(STARTUP_PERIOD_SECONDS),
                failure_threshold: Some(STARTUP_ASKS_MAX),
                timeout_seconds: Some(PROBE_TIMEOUT_SECONDS),
                ..ready.clone()
            }),
            readiness_probe: Some(Probe {
                period_seconds: Some(5),
                failure_threshold: Some(2),
                timeout_seconds: Some(PROBE_TIMEOUT_SECONDS),
                ..ready
            }),
            // A minute: a long step on a busy machine is not a dead process.
            liveness_probe: Some(Probe {
                period_seconds: Some(10),
                failure_threshold: Some(6),
                timeout_seconds: Some(PROBE_TIMEOUT_SECONDS),
                ..live
            }),
            ..container
        },
        Part::Follower => container,
    }
}

/// Beside a proxy, loopback is enough.
fn host(scope: &Scope<'_>) -> &'static str {
    if scope.connector.is_some() { "127.0.0.1" } else { "0.0.0.0" }
}

/// What a role's workers serve, as our programs and other engines spell it.
pub(super) fn serving_word(scope: &Scope<'_>, role: WorkloadRole) -> &'static str {
    labels::serving_role(scope.model, role).map_or("", |serving| serving.as_str())
}

fn pod_fields() -> Vec<EnvVar> {
    let variable = |(name, field): (&str, &str)| EnvVar {
        name: name.to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { field_path: field.to_owned(), api_version: None }),
            ..EnvVarSource::default()
        }),
    };
    POD_FIELDS.into_iter().map(variable).collect()
}

/// Ours first, so that the user's may refer to them; a name that the user sets too is the user's.
fn environment(ours: Vec<EnvVar>, settings: &RoleSettings) -> Vec<EnvVar> {
    let users = &settings.pod.env;
    let theirs: BTreeSet<&str> = users.iter().map(|one| one.name.as_str()).collect();
    ours.into_iter().filter(|one| !theirs.contains(one.name.as_str())).chain(users.iter().cloned()).collect()
}

fn with_users_mounts(mut container: Container, settings: &RoleSettings) -> Container {
    container.volume_mounts.get_or_insert_default().extend(settings.pod.volume_mounts.iter().cloned());
    container
}

fn word(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bf16",
        Dtype::F16 => "f16",
        Dtype::F32 => "f32",
    }
}

/// A text as Kubernetes leaves it: `$(NAME)` in arguments and environment would be replaced by a variable's value.
pub(super) fn literal(text: &str) -> String {
    text.replace("$(", "$$(")
}

/// Flags with their values.
#[derive(Default)]
pub(super) struct Flags(pub(super) Vec<String>);

impl Flags {
    pub(super) fn set(&mut self, flag: &str, value: impl Into<String>) {
        self.0.extend([flag.to_owned(), value.into()]);
    }
}
