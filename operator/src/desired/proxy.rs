//! The routing proxy's container: beside an engine, or by itself as the front door.

use super::config_map::ROUTING_FILE;
use super::engine::{self, Flags};
use super::pod::{ADMIN_PORT, Built, HTTP_PORT, LEAVE_SECONDS, SECRET_MODE, hardened, mount, secret_volume};
use super::scope::Scope;
use super::{names, resources};
use crate::plan::WorkloadRole;
use crate::validated::EngineKind;
use baton_crds::DiscoveryMode;
use baton_wire::names::{files, paths, ports};
use k8s_openapi::api::core::v1::{
    ConfigMapProjection, ConfigMapVolumeSource, Container, ContainerPort, DownwardAPIProjection, DownwardAPIVolumeFile,
    HTTPGetAction, KeyToPath, Lifecycle, LifecycleHandler, ObjectFieldSelector, Probe, ProjectedVolumeSource,
    ServiceAccountTokenProjection, SleepAction, Volume, VolumeMount, VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::time::Duration;

/// The container's name, as routers of the field call it too.
pub(super) const NAME: &str = "routing-proxy";

const SIGNING_KEY: &str = "baton-signing-key";
const SIGNING_KEY_PATH: &str = "/etc/baton/signing-key";
const ROUTING: &str = "baton-routing";
const ROUTING_PATH: &str = "/etc/baton/routing";

const SERVICE_ACCOUNT: &str = "baton-service-account";
/// Not where Kubernetes would mount it: below this path a podTemplate mounts nothing, and no program of another image in the pod
/// looks there for a token.
const SERVICE_ACCOUNT_PATH: &str = "/etc/baton/service-account";
/// How long a token is valid, in seconds; the kubelet renews it when four fifths are over. What Kubernetes itself gives.
const TOKEN_SECONDS: i64 = 3600;

/// Seconds in which the proxy has to come up; it reads two files and binds two ports.
const STARTUP_SECONDS_MAX: i32 = 60;

/// The proxy beside an engine: a native sidecar, so that it starts before the engine and goes after it.
pub(super) fn sidecar(scope: &Scope<'_>, role: WorkloadRole, connector: &str, drain: Duration) -> Built {
    let mut engine = Flags::default();
    engine.set("--engine", format!("http://127.0.0.1:{}", ports::ENGINE));
    match scope.model.engine.kind {
        // It says itself what it serves.
        EngineKind::Baton => {}
        EngineKind::Vllm => engine.set("--role", engine::serving_word(scope, role)),
        EngineKind::Sglang => {
            engine.set("--role", engine::serving_word(scope, role));
            engine.set("--bootstrap-port", engine::SGLANG_BOOTSTRAP.to_string());
        }
    }
    let Built { container, volumes } = proxy(scope, engine, connector, drain);
    Built { container: Container { restart_policy: Some("Always".to_owned()), ..container }, volumes }
}

/// The proxy in front of all workers.
pub(super) fn front_door(scope: &Scope<'_>, connector: &str, drain: Duration) -> Built {
    let Built { container, volumes } = proxy(scope, Flags::default(), connector, drain);
    let lifecycle = Lifecycle {
        pre_stop: Some(LifecycleHandler {
            sleep: Some(SleepAction { seconds: LEAVE_SECONDS }),
            ..LifecycleHandler::default()
        }),
        ..Lifecycle::default()
    };
    Built { container: Container { lifecycle: Some(lifecycle), ..container }, volumes }
}

fn proxy(scope: &Scope<'_>, engine: Flags, connector: &str, drain: Duration) -> Built {
    let mut args = Flags::default();
    args.set("--listen", format!("0.0.0.0:{}", ports::PROXY));
    args.set("--admin-listen", format!("0.0.0.0:{}", ports::ADMIN));
    args.0.extend(engine.0);
    let (account_mount, account_volume) = discovery(scope, &mut args).unzip();
    args.set("--connector", connector);
    args.set("--signing-key-file", format!("{SIGNING_KEY_PATH}/{}", files::SIGNING_KEY));
    args.set("--revision", scope.revision);
    args.set("--routing-file", format!("{ROUTING_PATH}/{ROUTING_FILE}"));
    args.set("--drain-timeout-seconds", drain.as_secs().to_string());
    args.set("--log-format", "json");

    let port = |name: &str, port: u16| ContainerPort {
        name: Some(name.to_owned()),
        container_port: i32::from(port),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    let probe = |path: &str, period: i32, failures: i32| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(ADMIN_PORT.to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        failure_threshold: Some(failures),
        timeout_seconds: Some(3),
        ..Probe::default()
    };
    let mut mounts = vec![mount(SIGNING_KEY, SIGNING_KEY_PATH, true), mount(ROUTING, ROUTING_PATH, true)];
    mounts.extend(account_mount);
    let container = Container {
        name: NAME.to_owned(),
        image: Some(scope.site.proxy_image.clone()),
        args: Some(args.0),
        ports: Some(vec![port(HTTP_PORT, ports::PROXY), port(ADMIN_PORT, ports::ADMIN)]),
        startup_probe: Some(probe(paths::HEALTH, 1, STARTUP_SECONDS_MAX)),
        liveness_probe: Some(probe(paths::HEALTH, 10, 3)),
        readiness_probe: Some(probe(paths::READY, 2, 2)),
        resources: Some(resources::of_proxy()),
        volume_mounts: Some(mounts),
        ..Container::default()
    };
    let routing = Volume {
        name: ROUTING.to_owned(),
        config_map: Some(ConfigMapVolumeSource { name: scope.model.name.clone(), ..ConfigMapVolumeSource::default() }),
        ..Volume::default()
    };
    let key = secret_volume(SIGNING_KEY, names::signing_key(&scope.model.name));
    let mut volumes = vec![key, routing];
    volumes.extend(account_volume);
    Built { container: hardened(container), volumes }
}

/// How the proxies of a revision find each other: flags, and with EndpointSlices what it takes to ask the API server. Those stand
/// beside the names and not in their place: where the right to watch them is missing, a pod would serve on without its peers.
fn discovery(scope: &Scope<'_>, args: &mut Flags) -> Option<(VolumeMount, Volume)> {
    let peers = || scope.worker_roles().map(|role| names::peers(&scope.workload(role)));
    for name in peers() {
        // The bare name, which the first suffix of a pod's search list completes. One with dots in it would be tried with each
        // suffix in vain, every second, by every proxy.
        args.set("--discover-dns", format!("{name}:{}", ports::PROXY));
    }
    match scope.model.discovery {
        DiscoveryMode::Dns => None,
        DiscoveryMode::EndpointSlices => {
            for service in peers() {
                args.set("--discover-endpoint-slices", format!("{service}:{HTTP_PORT}"));
            }
            args.set("--service-account-folder", SERVICE_ACCOUNT_PATH);
            Some((mount(SERVICE_ACCOUNT, SERVICE_ACCOUNT_PATH, true), service_account_volume()))
        }
    }
}

/// A token of the pod's own ServiceAccount, with what it takes to use it: the three files that Kubernetes mounts by itself where
/// it is left to, and then in every container.
fn service_account_volume() -> Volume {
    let token = ServiceAccountTokenProjection {
        path: "token".to_owned(),
        expiration_seconds: Some(TOKEN_SECONDS),
        ..ServiceAccountTokenProjection::default()
    };
    let key = KeyToPath { key: "ca.crt".to_owned(), path: "ca.crt".to_owned(), ..KeyToPath::default() };
    let authorities = ConfigMapProjection {
        // In every namespace, by the cluster's own controller.
        name: "kube-root-ca.crt".to_owned(),
        items: Some(vec![key]),
        optional: None,
    };
    let namespace = DownwardAPIVolumeFile {
        path: "namespace".to_owned(),
        field_ref: Some(ObjectFieldSelector {
            api_version: Some("v1".to_owned()),
            field_path: "metadata.namespace".to_owned(),
        }),
        ..DownwardAPIVolumeFile::default()
    };
    let namespace = DownwardAPIProjection { items: Some(vec![namespace]) };
    let sources = vec![
        VolumeProjection { service_account_token: Some(token), ..VolumeProjection::default() },
        VolumeProjection { config_map: Some(authorities), ..VolumeProjection::default() },
        VolumeProjection { downward_api: Some(namespace), ..VolumeProjection::default() },
    ];
    let projected = ProjectedVolumeSource {
        default_mode: Some(SECRET_MODE),
        sources: Some(sources),
        ..ProjectedVolumeSource::default()
    };
    Volume { name: SERVICE_ACCOUNT.to_owned(), projected: Some(projected), ..Volume::default() }
}
