//! A role's pod template: containers and volumes put together, and where the pod may run.

use super::overlay::overlay;
use super::scope::{Scope, json};
use super::{affinity, engine, labels, model_volume, names, proxy, settings};
use crate::RoleSettings;
use crate::plan::WorkloadRole;
use crate::validated::{ClaimSource, TopologySpread};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, EmptyDirVolumeSource, LocalObjectReference, PodResourceClaim, PodSecurityContext, PodSpec,
    PodTemplateSpec, SeccompProfile, SecretVolumeSource, SecurityContext, TopologySpreadConstraint, Volume,
    VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;
use std::time::Duration;

/// The port that clients and peers dial: the proxy's, or the engine's own in a pod that has no proxy.
pub(super) const HTTP_PORT: &str = "http";
/// The port of metrics and debug pages.
pub(super) const ADMIN_PORT: &str = "admin";
/// The engine's port beside a proxy.
pub(super) const ENGINE_PORT: &str = "engine";
/// The port at which KV is fetched, or asked for.
pub(super) const KV_PORT: &str = "kv";
/// The port at which SGLang's decode engines ask a prefill engine where its KV is.
pub(super) const BOOTSTRAP_PORT: &str = "bootstrap";

/// The user of our images. Also the group of a pod's volumes, so that it may write a cache and read the keys.
const USER: i64 = 65532;
/// Keys and tokens are for their owner and group alone.
pub(super) const SECRET_MODE: i32 = 0o440;

/// What a pod has beyond its drain timeout before it is killed: 5 s in which endpoints learn of its end ([`LEAVE_SECONDS`]),
/// and 5 s in which the proxy, which goes last, answers what the engine left.
const GRACE_BEYOND_DRAIN: Duration = Duration::from_secs(10);
/// How long a pod still takes work after its end is announced, until Services and peers have heard of it.
pub(super) const LEAVE_SECONDS: i64 = 5;

/// The scratch volume: every container's root is read-only.
const SCRATCH: &str = "baton-tmp";
/// Where it is.
pub(super) const SCRATCH_PATH: &str = "/tmp";

/// How roles are spread where the manifest does not say.
const SPREAD_KEY: &str = "kubernetes.io/hostname";

/// A pod's part in its replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The pod that others dial: the only one, or a group's leader.
    Leader,
    /// A pod that computes with its leader.
    Follower,
}

/// What a container needs of its pod: itself, and the volumes that it mounts.
pub(super) struct Built {
    pub(super) container: Container,
    pub(super) volumes: Vec<Volume>,
}

/// The pod template of a role, the user's overlay laid over it.
pub(super) fn template(scope: &Scope<'_>, role: WorkloadRole, part: Part) -> Value {
    let settings = settings(scope.model, role);
    let mut spec = match settings {
        Some(settings) => worker(scope, role, settings, part),
        None => front_door(scope),
    };
    spec.volumes.get_or_insert_default().push(scratch_volume());
    let template = PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels::of_pod(scope.model, role, scope.revision)),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec { service_account_name: Some(names::role(&scope.model.name, role)), ..common(spec) }),
    };
    let mut template = json(&template);
    if let Some(patch) = settings.and_then(|settings| settings.pod.template.as_ref()) {
        overlay(&mut template, &patch.0);
    }
    template
}

fn worker(scope: &Scope<'_>, role: WorkloadRole, settings: &RoleSettings, part: Part) -> PodSpec {
    let model = model_volume::of_source(scope);
    let sidecar = scope
        .connector
        .filter(|_| part == Part::Leader)
        .map(|connector| proxy::sidecar(scope, role, connector, settings.drain_timeout));
    let engine = engine::engine(scope, role, settings, part, &model);
    let pod = &settings.pod;
    let claims = pod.resource_claims.iter().map(|claim| {
        let (name, template) = match &claim.source {
            ClaimSource::Claim(name) => (Some(name.clone()), None),
            ClaimSource::Template(name) => (None, Some(name.clone())),
        };
        PodResourceClaim { name: claim.name.clone(), resource_claim_name: name, resource_claim_template_name: template }
    });
    let (download, sidecar) = (model.download, sidecar);
    let mut volumes = vec![model.volume];
    volumes.extend(engine.volumes);
    let mut init_containers = Vec::from_iter(download);
    if let Some(sidecar) = sidecar {
        // After the download, which has the admin port until it is done.
        init_containers.push(sidecar.container);
        volumes.extend(sidecar.volumes);
    }
    volumes.extend(pod.volumes.iter().cloned());
    PodSpec {
        init_containers: some(init_containers),
        containers: vec![engine.container],
        volumes: Some(volumes),
        image_pull_secrets: model.pull_secret.map(|name| vec![LocalObjectReference { name }]),
        termination_grace_period_seconds: Some(grace_seconds(settings.drain_timeout)),
        node_selector: Some(pod.node_selector.clone()).filter(|labels| !labels.is_empty()),
        tolerations: some(pod.tolerations.clone()),
        topology_spread_constraints: Some(spread(scope, role, &pod.topology_spread)),
        affinity: affinity::near_other_roles(scope),
        priority_class_name: pod.priority_class.clone(),
        runtime_class_name: pod.runtime_class.clone(),
        resource_claims: some(claims.collect()),
        ..PodSpec::default()
    }
}

/// Its requests last as long as those of the decode workers behind it.
fn front_door(scope: &Scope<'_>) -> PodSpec {
    let drain = scope.model.decode.drain_timeout;
    let proxy = proxy::front_door(scope, scope.connector.unwrap_or_default(), drain);
    PodSpec {
        containers: vec![proxy.container],
        volumes: Some(proxy.volumes),
        termination_grace_period_seconds: Some(grace_seconds(drain)),
        topology_spread_constraints: Some(spread(scope, WorkloadRole::Proxy, &[])),
        ..PodSpec::default()
    }
}

/// What every pod has: as little right as it can do with, as the Pod Security standard "restricted" asks.
fn common(spec: PodSpec) -> PodSpec {
    PodSpec {
        automount_service_account_token: Some(false),
        // A hundred Services in a namespace would be 700 environment variables that nobody reads.
        enable_service_links: Some(false),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            // Once is enough: a model of a million files would take minutes at each start.
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
            ..PodSecurityContext::default()
        }),
        ..spec
    }
}

/// What every container of ours has.
pub(super) fn hardened(container: Container) -> Container {
    let mut mounts = container.volume_mounts.unwrap_or_default();
    mounts.push(mount(SCRATCH, SCRATCH_PATH, false));
    Container {
        volume_mounts: Some(mounts),
        // The last lines on stderr name the cause and the cure, and the operator reads them without a right to logs.
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            read_only_root_filesystem: Some(true),
            ..SecurityContext::default()
        }),
        ..container
    }
}

/// A mount of a whole volume.
pub(super) fn mount(volume: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: volume.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

/// A volume of one of the model's Secrets.
pub(super) fn secret_volume(volume: &str, secret: String) -> Volume {
    Volume {
        name: volume.to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret),
            default_mode: Some(SECRET_MODE),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    }
}

fn scratch_volume() -> Volume {
    Volume { name: SCRATCH.to_owned(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() }
}

/// One constraint for each place that the manifest names; without any, pods prefer different nodes.
fn spread(scope: &Scope<'_>, role: WorkloadRole, wanted: &[TopologySpread]) -> Vec<TopologySpreadConstraint> {
    let constraint = |key: &str, max_skew: u32, required: bool| TopologySpreadConstraint {
        topology_key: key.to_owned(),
        max_skew: i32::try_from(max_skew).unwrap_or(i32::MAX),
        when_unsatisfiable: if required { "DoNotSchedule" } else { "ScheduleAnyway" }.to_owned(),
        label_selector: Some(super::scope::selector(labels::select_revision(&scope.model.name, role, scope.revision))),
        ..TopologySpreadConstraint::default()
    };
    if wanted.is_empty() {
        return vec![constraint(SPREAD_KEY, 1, false)];
    }
    wanted.iter().map(|one| constraint(&one.topology_key, one.max_skew.get(), one.required)).collect()
}

fn grace_seconds(drain: Duration) -> i64 {
    i64::try_from(drain.saturating_add(GRACE_BEYOND_DRAIN).as_secs()).unwrap_or(i64::MAX)
}

/// A list that is there only where it holds something.
pub(super) fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    Some(list).filter(|list| !list.is_empty())
}
