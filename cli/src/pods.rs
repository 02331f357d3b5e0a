//! Which processes a manifest means on one machine: for each replica a "pod" with a loopback address of its own, so that
//! every port is what it is in a cluster. Pure: the same manifest gives the same flags.

use baton_crds::Dtype;
use baton_operator::validated::Routing;
use baton_operator::{Disaggregation, RoleSettings, Validated};
use baton_wire::Role;
use baton_wire::names::ports;
use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

/// Pods on one machine: a /24 has 254 addresses, one of which marks the network as taken.
pub(crate) const PODS_MAX: usize = 250;

/// 127.0.X.0/24.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Subnet(pub(crate) u8);

impl Subnet {
    /// The address of a pod, counted from 0.
    pub(crate) fn host(self, pod: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, 0, self.0, pod.saturating_add(1))
    }

    /// The address that is bound for as long as the network is in use.
    pub(crate) fn mark(self) -> Ipv4Addr {
        Ipv4Addr::new(127, 0, self.0, 254)
    }
}

/// Files that the processes are given.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    pub(crate) signing_key: PathBuf,
    pub(crate) public_key: PathBuf,
    pub(crate) endpoints: PathBuf,
}

/// What a pod is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PodKind {
    /// A worker and its proxy.
    Worker(Role),
    /// A proxy for clients, without an engine.
    FrontDoor,
}

impl PodKind {
    /// The kind as names of pods spell it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            PodKind::Worker(role) => role.as_str(),
            PodKind::FrontDoor => "proxy",
        }
    }
}

/// Which program a process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Worker,
    Proxy,
}

impl Program {
    /// Its file, beside `baton`'s own.
    pub(crate) fn file_name(self) -> &'static str {
        match self {
            Program::Worker => "baton-worker",
            Program::Proxy => "baton-proxy",
        }
    }
}

/// One process of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodProcess {
    pub(crate) program: Program,
    pub(crate) args: Vec<OsString>,
}

/// One replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    /// `<model>-<role>-<number>`.
    pub(crate) name: String,
    pub(crate) kind: PodKind,
    pub(crate) address: Ipv4Addr,
    /// In the order in which they start.
    pub(crate) processes: Vec<PodProcess>,
}

impl Pod {
    /// The name without the model's.
    pub(crate) fn short_name<'a>(&'a self, model: &str) -> &'a str {
        self.name.strip_prefix(model).map_or(self.name.as_str(), |rest| rest.trim_start_matches('-'))
    }

    /// Base URL of its proxy.
    pub(crate) fn proxy_url(&self) -> String {
        format!("http://{}:{}", self.address, ports::PROXY)
    }

    /// Base URL of its worker.
    pub(crate) fn engine_url(&self) -> String {
        format!("http://{}:{}", self.address, ports::ENGINE)
    }

    /// Base URL of its proxy's admin port.
    pub(crate) fn admin_url(&self) -> String {
        format!("http://{}:{}", self.address, ports::ADMIN)
    }
}

/// A manifest that one machine can't hold.
#[derive(Debug, thiserror::Error)]
#[error("{wanted} pods are more than the {PODS_MAX} that one machine has addresses for")]
pub(crate) struct TooManyPods {
    wanted: usize,
}

/// Workers of a role. Where a cluster's autoscaler would say, there is one.
fn replicas(role: &RoleSettings) -> u32 {
    role.replicas.fixed().map_or(1, NonZeroU32::get)
}

fn front_doors(model: &Validated) -> u32 {
    match model.routing {
        Routing::Sidecar => 0,
        Routing::Standalone { replicas } => replicas.get(),
    }
}

/// How many pods a manifest means.
///
/// # Errors
/// When one machine can't hold them.
pub(crate) fn count(model: &Validated) -> Result<usize, TooManyPods> {
    let replicas = |role: &RoleSettings| replicas(role) as usize;
    let front_doors = front_doors(model) as usize;
    let wanted = model.disaggregation.prefill().map_or(0, replicas) + replicas(&model.decode) + front_doors;
    if wanted > PODS_MAX { Err(TooManyPods { wanted }) } else { Ok(wanted) }
}

/// The pods of a manifest: prefill, then decode, then the front door if there is one.
///
/// # Errors
/// When one machine can't hold them.
pub(crate) fn plan_pods(
    model: &Validated,
    revision: &str,
    subnet: Subnet,
    model_dir: &Path,
    files: &Files,
) -> Result<Vec<Pod>, TooManyPods> {
    let wanted = count(model)?;
    let mut pods: Vec<Pod> = Vec::with_capacity(wanted);
    let mut add =
        |kind: PodKind, number: u32, processes: &dyn Fn(Ipv4Addr) -> Vec<PodProcess>| -> Result<(), TooManyPods> {
            let address = subnet.host(u8::try_from(pods.len()).map_err(|_| TooManyPods { wanted })?);
            let name = format!("{}-{}-{number}", model.name, kind.as_str());
            pods.push(Pod { name, kind, address, processes: processes(address) });
            Ok(())
        };
    let roles = match &model.disaggregation {
        Disaggregation::Always { prefill } | Disaggregation::Conditional { prefill, .. } => {
            vec![(Role::Prefill, prefill), (Role::Decode, &model.decode)]
        }
        Disaggregation::Never => vec![(Role::PrefillDecode, &model.decode)],
    };
    for (role, settings) in roles {
        for number in 0..replicas(settings) {
            add(PodKind::Worker(role), number, &|address| {
                let worker = worker_args(model, revision, role, settings, address, model_dir, files);
                let engine = format!("http://{address}:{}", ports::ENGINE);
                let proxy = proxy_args(model, revision, address, Some(engine), files);
                vec![
                    PodProcess { program: Program::Worker, args: worker },
                    PodProcess { program: Program::Proxy, args: proxy },
                ]
            })?;
        }
    }
    for number in 0..front_doors(model) {
        add(PodKind::FrontDoor, number, &|address| {
            vec![PodProcess { program: Program::Proxy, args: proxy_args(model, revision, address, None, files) }]
        })?;
    }
    Ok(pods)
}

/// The pod whose proxy clients are told: the front door, or the first that decodes.
pub(crate) fn entrance(pods: &[Pod]) -> Option<&Pod> {
    let decodes = |pod: &&Pod| match pod.kind {
        PodKind::Worker(role) => role.decodes(),
        PodKind::FrontDoor => false,
    };
    pods.iter().find(|pod| pod.kind == PodKind::FrontDoor).or_else(|| pods.iter().find(decodes))
}

/// What the endpoints file lists: the proxies that have an engine.
pub(crate) fn endpoints(pods: &[Pod]) -> Vec<String> {
    let with_engine = pods.iter().filter(|pod| pod.kind != PodKind::FrontDoor);
    with_engine.map(|pod| format!("{}:{}", pod.address, ports::PROXY)).collect()
}

fn worker_args(
    model: &Validated,
    revision: &str,
    role: Role,
    settings: &RoleSettings,
    address: Ipv4Addr,
    model_dir: &Path,
    files: &Files,
) -> Vec<OsString> {
    let mut args = Flags::default();
    args.set("--role", role.as_str());
    args.set("--model", model_dir);
    args.set("--served-model-name", &model.served_name);
    args.set("--revision", revision);
    args.set("--host", address.to_string());
    args.set("--port", ports::ENGINE.to_string());
    args.set("--kv-port", ports::KV.to_string());
    if let Some(dtype) = model.dtype {
        args.set(
            "--dtype",
            match dtype {
                Dtype::BF16 => "bf16",
                Dtype::F16 => "f16",
                Dtype::F32 => "f32",
            },
        );
    }
    if let Some(length) = model.max_model_length {
        args.set("--max-model-length", length.to_string());
    }
    args.set("--kv-cache-bytes", settings.kv_cache_bytes.to_string());
    args.set("--max-batch-tokens", settings.max_batch_tokens.to_string());
    args.set("--max-num-seqs", settings.max_sequences.to_string());
    args.set("--prefill-chunk-tokens", settings.prefill_chunk_tokens.to_string());
    args.set("--proxy-public-key-file", &files.public_key);
    args.set("--drain-timeout-seconds", settings.drain_timeout.as_secs().to_string());
    args.0
}

fn proxy_args(
    model: &Validated,
    revision: &str,
    address: Ipv4Addr,
    engine: Option<String>,
    files: &Files,
) -> Vec<OsString> {
    let mut args = Flags::default();
    args.set("--listen", format!("{address}:{}", ports::PROXY));
    args.set("--admin-listen", format!("{address}:{}", ports::ADMIN));
    if let Some(engine) = engine {
        args.set("--engine", engine);
    }
    args.set("--endpoints-file", &files.endpoints);
    args.set("--signing-key-file", &files.signing_key);
    args.set("--revision", revision);
    match &model.disaggregation {
        Disaggregation::Always { .. } => args.set("--disaggregation", "always"),
        Disaggregation::Conditional { min_uncached_prompt_tokens, .. } => {
            args.set("--disaggregation", "conditional");
            args.set("--min-uncached-prompt-tokens", min_uncached_prompt_tokens.to_string());
        }
        Disaggregation::Never => args.set("--disaggregation", "never"),
    }
    args.0
}

#[derive(Default)]
struct Flags(Vec<OsString>);

impl Flags {
    fn set(&mut self, flag: &str, value: impl Into<OsString>) {
        self.0.extend([flag.into(), value.into()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_operator::manifest;

    fn plan(spec: &str) -> Result<Vec<Pod>, TooManyPods> {
        let text = format!(
            "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {{name: m}}\nspec: {{model: {{uri: pvc://models}}{spec}}}\n"
        );
        let model = manifest::read_one(&text).expect("a right manifest").validated;
        let files = Files { signing_key: "s".into(), public_key: "p".into(), endpoints: "e".into() };
        plan_pods(&model, "r1", Subnet(101), Path::new("/models"), &files)
    }

    fn names(pods: &[Pod]) -> Vec<String> {
        pods.iter().map(|pod| format!("{} {}", pod.name, pod.address)).collect()
    }

    fn flag<'a>(pod: &'a Pod, program: Program, name: &str) -> Option<&'a str> {
        let process = pod.processes.iter().find(|process| process.program == program)?;
        let at = process.args.iter().position(|arg| arg == name)?;
        process.args.get(at + 1)?.to_str()
    }

    #[test]
    fn each_replica_is_a_pod_with_an_address_of_its_own() {
        let pods = plan(", prefill: {replicas: 2}").expect("few pods");
        assert_eq!(names(&pods), ["m-prefill-0 127.0.101.1", "m-prefill-1 127.0.101.2", "m-decode-0 127.0.101.3"]);
        assert_eq!(entrance(&pods).map(Pod::proxy_url).as_deref(), Some("http://127.0.101.3:8000"));
        assert_eq!(endpoints(&pods), ["127.0.101.1:8000", "127.0.101.2:8000", "127.0.101.3:8000"]);
        assert_eq!(flag(&pods[0], Program::Worker, "--role"), Some("prefill"));
        assert_eq!(flag(&pods[2], Program::Worker, "--host"), Some("127.0.101.3"));
        assert_eq!(flag(&pods[2], Program::Proxy, "--engine"), Some("http://127.0.101.3:8200"));
        assert_eq!(flag(&pods[2], Program::Proxy, "--disaggregation"), Some("always"));
    }

    #[test]
    fn a_front_door_has_no_engine_and_is_where_clients_enter() {
        let pods = plan(", routing: {mode: Standalone}").expect("few pods");
        let door = entrance(&pods).expect("an entrance");
        assert_eq!((door.name.as_str(), door.processes.len()), ("m-proxy-0", 1));
        assert_eq!(flag(door, Program::Proxy, "--engine"), None);
        assert!(!endpoints(&pods).contains(&format!("{}:8000", door.address)));
    }

    #[test]
    fn without_disaggregation_decode_workers_serve_both_phases() {
        let pods =
            plan(", disaggregation: {policy: Never}, prefill: {replicas: 0}, decode: {replicas: 2}").expect("few pods");
        assert_eq!(names(&pods), ["m-prefill-decode-0 127.0.101.1", "m-prefill-decode-1 127.0.101.2"]);
        assert_eq!(flag(&pods[0], Program::Proxy, "--disaggregation"), Some("never"));
    }

    #[test]
    fn every_field_of_the_manifest_reaches_a_flag() {
        let pods = plan(
            ", engine: {dtype: F32, maxModelLength: 999}, disaggregation: {policy: Conditional, minUncachedPromptTokens: 77}, \
             decode: {kvCacheMemory: 3Mi, maxBatchTokens: 160, maxSequences: 17, prefillChunkTokens: 96, drainTimeoutSeconds: 9}",
        )
        .expect("few pods");
        let decode = &pods[1];
        for (name, value) in [
            ("--model", "/models"),
            ("--served-model-name", "m"),
            ("--revision", "r1"),
            ("--dtype", "f32"),
            ("--max-model-length", "999"),
            ("--kv-cache-bytes", "3145728"),
            ("--max-batch-tokens", "160"),
            ("--max-num-seqs", "17"),
            ("--prefill-chunk-tokens", "96"),
            ("--drain-timeout-seconds", "9"),
        ] {
            assert_eq!(flag(decode, Program::Worker, name), Some(value), "{name}");
        }
        assert_eq!(flag(decode, Program::Proxy, "--min-uncached-prompt-tokens"), Some("77"));
    }

    #[test]
    fn the_same_manifest_gives_the_same_pods_and_too_large_a_one_none() {
        assert_eq!(plan("").expect("few pods"), plan("").expect("few pods"));
        assert!(plan(", decode: {replicas: 249}").is_ok());
        assert!(plan(", decode: {replicas: 250}").is_err());
    }
}
