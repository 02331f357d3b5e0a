//! The routing proxy's container: beside an engine, or by itself as the front door.

use super::config_map::ROUTING_FILE;
use super::engine::{self, Flags};
use super::pod::{ADMIN_PORT, Built, HTTP_PORT, LEAVE_SECONDS, hardened, mount, secret_volume};
use super::scope::Scope;
use super::{names, resources};
use crate::plan::WorkloadRole;
use crate::validated::EngineKind;
use baton_wire::names::{files, paths, ports};
use k8s_openapi::api::core::v1::{
    ConfigMapVolumeSource, Container, ContainerPort, HTTPGetAction, Lifecycle, LifecycleHandler, Probe, SleepAction,
    Volume,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::time::Duration;

/// The container's name, as routers of the field call it too.
pub(super) const NAME: &str = "routing-proxy";

const SIGNING_KEY: &str = "baton-signing-key";
const SIGNING_KEY_PATH: &str = "/etc/baton/signing-key";
const ROUTING: &str = "baton-routing";
const ROUTING_PATH: &str = "/etc/baton/routing";

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
    for role in scope.worker_roles() {
        args.set(
            "--discover-dns",
            // The bare name, which the first suffix of a pod's search list completes. One with dots in it would be tried with
            // each suffix in vain, every second, by every proxy.
            format!("{}:{}", names::peers(&scope.workload(role)), ports::PROXY),
        );
    }
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
    let container = Container {
        name: NAME.to_owned(),
        image: Some(scope.site.proxy_image.clone()),
        args: Some(args.0),
        ports: Some(vec![port(HTTP_PORT, ports::PROXY), port(ADMIN_PORT, ports::ADMIN)]),
        startup_probe: Some(probe(paths::HEALTH, 1, STARTUP_SECONDS_MAX)),
        liveness_probe: Some(probe(paths::HEALTH, 10, 3)),
        readiness_probe: Some(probe(paths::READY, 2, 2)),
        resources: Some(resources::of_proxy()),
        volume_mounts: Some(vec![mount(SIGNING_KEY, SIGNING_KEY_PATH, true), mount(ROUTING, ROUTING_PATH, true)]),
        ..Container::default()
    };
    let routing = Volume {
        name: ROUTING.to_owned(),
        config_map: Some(ConfigMapVolumeSource { name: scope.model.name.clone(), ..ConfigMapVolumeSource::default() }),
        ..Volume::default()
    };
    let key = secret_volume(SIGNING_KEY, names::signing_key(&scope.model.name));
    Built { container: hardened(container), volumes: vec![key, routing] }
}
