//! A real Kubernetes control plane for tests: etcd, kube-apiserver and, when asked for, controllers and nodes.
//!
//! `scripts/test-cluster` builds its programs once; a control plane then starts in seconds, on free ports, in a folder of its own,
//! and leaves nothing behind, however the test ends (`tests/cluster/janitor`). Where `KUBEBUILDER_ASSETS` names a folder with
//! `etcd` and `kube-apiserver`, those are used; where `BATON_TEST_KUBECONFIG` names a kubeconfig of a throw-away cluster, that
//! cluster serves [`Tier::Api`]. Where the programs are missing, tests say what they lack and are skipped; with
//! `BATON_REQUIRE_CLUSTER=1` that is a failure.
//!
//! # What hollow nodes do
//! [`Tier::Behaviour`] has nodes that are the real kubelet over a runtime without containers (`tests/cluster/components/hollow.go`),
//! each with 192 CPUs, 2 TiB of memory and eight `nvidia.com/gpu`:
//! - Containers run as soon as they are started, and every probe succeeds. No process runs: nothing listens at a pod's address,
//!   there are no logs and no exec. Addresses are 198.18.0.0/15, each pod its own.
//! - Init containers end with code 0 at once; native sidecars (`restartPolicy: Always`) start, and go on.
//! - Volumes of Secrets, ConfigMaps, tokens and claims must exist, as on a real node; image volumes are "pulled".
//! - Words in an image's reference tell what becomes of its containers: `never-pulls` (ErrImagePull, ImagePullBackOff),
//!   `crashes` (ends with code 1 and [`LAST_WORDS`], then CrashLoopBackOff), `never-ready` (runs, is never ready).
//! - Pods are deleted without their grace period, for nothing is there to end. The nodes write no Events.

mod audit;
mod authority;
mod background;
mod lws;
mod namespace;
pub mod node;
mod process;
mod programs;
mod wait;

pub use audit::{Audit, Request};
pub use authority::{Authority, Identity};
pub use background::{Background, Forward};
pub use namespace::Namespace;
pub use process::Ran;
pub use wait::eventually;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Node as NodeObject, ServiceAccount};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use process::Processes;
use programs::Programs;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// What a container of an image named `crashes` says before it ends.
pub const LAST_WORDS: &str = "this image crashes, as its name says";

/// Longest wait for the API server: it takes 3 s alone on two cores, and tests of several binaries may start one each.
const API_SERVER: Duration = Duration::from_secs(90);

/// Longest wait for controllers and nodes after that.
const CONTROLLERS: Duration = Duration::from_secs(60);

/// Longest wait for a new kind to be served.
const NEW_KIND: Duration = Duration::from_secs(30);

/// How often ports are chosen anew when somebody else took one before its server did.
const TRIES: usize = 3;

/// Cluster addresses of Services; the first one is the API server's own.
pub(crate) const SERVICES: &str = "10.96.0.0/16";

/// How much of a cluster a test needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// etcd and the API server: objects are stored and checked, and nothing acts on them.
    Api,
    /// And controllers, scheduler, and nodes on which containers are pretended.
    Behaviour {
        /// Hollow nodes.
        nodes: usize,
        /// Whether the LeaderWorkerSet controller runs and its CRDs are there.
        lws: bool,
    },
    /// And controllers and scheduler, for a [`node::Node`] that really runs containers.
    Node,
}

impl Tier {
    fn includes(self, other: Tier) -> bool {
        match (self, other) {
            (_, Tier::Api) | (Tier::Node, Tier::Node) => true,
            (Tier::Behaviour { nodes, lws }, Tier::Behaviour { nodes: wanted, lws: wants }) => {
                nodes >= wanted && (lws || !wants)
            }
            (Tier::Api | Tier::Node, Tier::Behaviour { .. }) | (Tier::Api | Tier::Behaviour { .. }, Tier::Node) => {
                false
            }
        }
    }
}

/// What came of starting a control plane.
pub enum Started {
    /// It runs.
    Running(Box<ControlPlane>),
    /// It can't run here, and why.
    Lacking(String),
}

impl Started {
    /// The control plane; none when this machine lacks something, which is then said.
    ///
    /// # Panics
    /// When it is lacking and `BATON_REQUIRE_CLUSTER=1`.
    pub fn or_skip(self) -> Option<ControlPlane> {
        match self {
            Started::Running(plane) => Some(*plane),
            Started::Lacking(why) => {
                skip(&why);
                None
            }
        }
    }
}

/// Says a figure or a step of a test; shown for passing tests too, because what was measured is a result.
pub fn say(line: &str) {
    // Not `eprintln!`, which is shown for failing tests only.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes());
}

/// Says that the running test is skipped, and why.
///
/// # Panics
/// With `BATON_REQUIRE_CLUSTER=1`.
pub fn skip(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    assert!(std::env::var_os("BATON_REQUIRE_CLUSTER").is_none_or(|v| v != "1"), "{test} needs a test cluster: {why}");
    say(&format!("SKIPPED {test}: {why}"));
}

static API_SERVER_FLAGS: OnceLock<&[&str]> = OnceLock::new();

/// Gives the API servers of this test binary further flags, such as for admission that is off by default. Said before the first
/// of them starts; all tests of a binary say the same.
pub fn api_server_flags(flags: &'static [&'static str]) {
    assert_eq!(*API_SERVER_FLAGS.get_or_init(|| flags), flags, "other flags were given before");
}

/// A control plane; it ends, and all that it wrote goes, when this is dropped or the process ends.
pub struct ControlPlane {
    tier: Tier,
    kubeconfig: PathBuf,
    programs: Programs,
    own: Option<Own>,
    // Only where the cluster was given: what is written for it goes with it.
    scratch: Option<tempfile::TempDir>,
}

struct Own {
    processes: Processes,
    authority: Authority,
    url: String,
    api_arguments: Vec<String>,
    startup: Duration,
}

impl ControlPlane {
    /// Starts one.
    ///
    /// # Panics
    /// When the programs are there and it does not come up.
    pub fn start(tier: Tier) -> Started {
        if tier == Tier::Api
            && let Some(given) = std::env::var_os("BATON_TEST_KUBECONFIG")
        {
            let programs = match Programs::find(true, false) {
                Ok(programs) => programs,
                Err(why) => return Started::Lacking(why),
            };
            let scratch = tempfile::tempdir().expect("a folder for temporary files");
            let plane = ControlPlane { tier, kubeconfig: given.into(), programs, own: None, scratch: Some(scratch) };
            return Started::Running(Box::new(plane));
        }
        let programs = match Programs::find(tier == Tier::Api, tier == Tier::Node) {
            Ok(programs) => programs,
            Err(why) => return Started::Lacking(why),
        };
        let mut last = None;
        for _ in 0..TRIES {
            match Self::start_own(tier, &programs) {
                Ok(plane) => return Started::Running(Box::new(plane)),
                Err(error) => last = Some(error),
            }
        }
        panic!("the control plane does not come up: {:?}", last.expect("it was tried"));
    }

    /// The one of this test binary, started by the first test that asks. All of them ask for the same tier, or less than the
    /// first.
    ///
    /// # Panics
    /// When it was started with less.
    pub fn shared(tier: Tier) -> Option<&'static ControlPlane> {
        static SHARED: OnceLock<Result<ControlPlane, String>> = OnceLock::new();
        let shared = SHARED.get_or_init(|| match Self::start(tier) {
            Started::Running(plane) => Ok(*plane),
            Started::Lacking(why) => Err(why),
        });
        match shared {
            Ok(plane) => {
                assert!(plane.tier.includes(tier), "the shared control plane is {:?}, not {tier:?}", plane.tier);
                Some(plane)
            }
            Err(why) => {
                skip(why);
                None
            }
        }
    }

    fn start_own(tier: Tier, programs: &Programs) -> Result<Self> {
        let begun = Instant::now();
        let processes = Processes::new()?;
        let folder = processes.folder().to_owned();
        let authority = Authority::new(&folder)?;
        let [etcd_port, peer_port, api_port] = free_ports()?;
        let server =
            authority.server(&["127.0.0.1", "10.96.0.1", "localhost", "kubernetes.default.svc", "kubernetes"])?;
        authority.write("apiserver", &server)?;
        authority.write("kubelet-client", &authority.client("kubelet-client", Some("system:masters"))?)?;
        std::fs::write(folder.join("audit-policy.yaml"), audit::POLICY)?;

        let etcd = format!("http://127.0.0.1:{etcd_port}");
        let peer = format!("http://127.0.0.1:{peer_port}");
        processes.spawn(
            &programs.path("etcd"),
            "etcd",
            &[
                format!("--data-dir={}", folder.join("etcd").display()),
                format!("--listen-client-urls={etcd}"),
                format!("--advertise-client-urls={etcd}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster=default={peer}"),
                // The data is thrown away; some CRDs are larger than etcd's default of 1.5 MiB.
                "--unsafe-no-fsync".to_owned(),
                "--max-request-bytes=8388608".to_owned(),
            ],
        )?;
        let api_arguments = api_arguments(&folder, tier, &etcd, api_port);
        processes.spawn(&programs.path("kube-apiserver"), "kube-apiserver", &api_arguments)?;

        let url = format!("https://127.0.0.1:{api_port}");
        let own = Own { processes, authority, url, api_arguments, startup: Duration::ZERO };
        let kubeconfig = own.kubeconfig_with_certificate("admin", "test-admin", Some("system:masters"))?;
        let mut plane = ControlPlane { tier, kubeconfig, programs: programs.clone(), own: Some(own), scratch: None };
        let ready = plane.wait_for_api_server().and_then(|()| match tier {
            Tier::Api => Ok(()),
            Tier::Behaviour { nodes, lws } => {
                plane.start_controllers()?;
                plane.start_hollow_nodes(nodes)?;
                if lws { lws::start(&plane) } else { Ok(()) }?;
                plane.wait_for_nodes(nodes)
            }
            Tier::Node => plane.start_controllers(),
        });
        ready.with_context(|| plane.logs())?;
        if let Some(own) = &mut plane.own {
            own.startup = begun.elapsed();
        }
        Ok(plane)
    }

    fn own(&self) -> Result<&Own> {
        self.own.as_ref().context("the cluster is not ours (BATON_TEST_KUBECONFIG)")
    }

    fn has_controllers(&self) -> bool {
        self.own.is_none() || self.tier != Tier::Api
    }

    fn folder(&self) -> &Path {
        match (&self.own, &self.scratch) {
            (Some(own), _) => own.processes.folder(),
            (None, Some(scratch)) => scratch.path(),
            (None, None) => unreachable!("a cluster is ours or given"),
        }
    }

    /// How long it took from nothing to ready.
    pub fn startup(&self) -> Duration {
        self.own.as_ref().map_or(Duration::ZERO, |own| own.startup)
    }

    /// The processes that live, by name and number.
    pub fn processes(&self) -> Vec<(String, u32)> {
        self.own.as_ref().map_or_else(Vec::new, |own| own.processes.living())
    }

    /// The folder with everything that it writes.
    ///
    /// # Errors
    /// When the cluster is not ours.
    pub fn own_folder(&self) -> Result<&Path> {
        Ok(self.own()?.processes.folder())
    }

    /// Who signs this cluster's certificates.
    ///
    /// # Errors
    /// When the cluster is not ours.
    pub fn authority(&self) -> Result<&Authority> {
        Ok(&self.own()?.authority)
    }

    /// A kubeconfig that may do everything.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The configuration that [`ControlPlane::client`] is made from.
    ///
    /// # Errors
    /// When the kubeconfig can't be read.
    pub async fn config(&self) -> Result<kube::Config> {
        config_of(&self.kubeconfig).await
    }

    /// A client that may do everything. It lives as long as the runtime in which this is called.
    ///
    /// # Errors
    /// When the kubeconfig can't be read.
    pub async fn client(&self) -> Result<kube::Client> {
        client_of(&self.kubeconfig).await
    }

    /// A kubeconfig of a user, by client certificate.
    ///
    /// # Errors
    /// When the cluster is not ours.
    pub fn kubeconfig_for(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        self.own()?.kubeconfig_with_certificate(&file_name(user), user, group)
    }

    /// A kubeconfig of a ServiceAccount that exists, by a token of one hour.
    ///
    /// # Errors
    /// When there is no such account.
    pub fn kubeconfig_for_service_account(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        let token = self.run(async |client| {
            let accounts: Api<ServiceAccount> = Api::namespaced(client, namespace);
            let wanted = TokenRequest {
                spec: Some(TokenRequestSpec { expiration_seconds: Some(3600), ..TokenRequestSpec::default() }),
                ..TokenRequest::default()
            };
            let answer = accounts.create_token_request(name, &PostParams::default(), &wanted).await?;
            Ok(answer.status.context("an answer without a token")?.token)
        })?;
        let admin: serde_json::Value = serde_yaml::from_str(&std::fs::read_to_string(&self.kubeconfig)?)?;
        let cluster = admin.pointer("/clusters/0/cluster").context("a kubeconfig names a cluster")?;
        let path = self.folder().join(format!("{}.kubeconfig", file_name(&format!("{namespace}-{name}"))));
        std::fs::write(&path, kubeconfig_text(cluster, &json!({ "token": token }), namespace))?;
        Ok(path)
    }

    /// A new namespace; `prefix` starts its name.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn namespace(&self, prefix: &str) -> Result<Namespace> {
        Namespace::create(self, prefix, None)
    }

    /// A new namespace that takes only pods of Pod Security's `restricted` level.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn restricted_namespace(&self, prefix: &str) -> Result<Namespace> {
        Namespace::create(self, prefix, Some("restricted"))
    }

    /// The requests from now on.
    ///
    /// # Errors
    /// When the cluster is not ours.
    pub fn audit(&self) -> Result<Audit> {
        let log = self.own()?.processes.folder().join("audit.log");
        let from = std::fs::metadata(&log).map_or(0, |file| file.len());
        Ok(Audit { log, from })
    }

    /// Runs kubectl as the admin, to its end.
    ///
    /// # Errors
    /// When it can't be started; that it fails is in what it returns.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<Ran> {
        self.tool("kubectl", arguments, "")
    }

    /// Runs kubectl with a text as its standard input (`apply -f -`).
    ///
    /// # Errors
    /// When it can't be started; that it fails is in what it returns.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<Ran> {
        self.tool("kubectl", arguments, input)
    }

    /// Runs helm as the admin, to its end.
    ///
    /// # Errors
    /// When it can't be started; that it fails is in what it returns.
    pub fn helm(&self, arguments: &[&str]) -> Result<Ran> {
        self.tool("helm", arguments, "")
    }

    /// A program of the test cluster (`kubectl`, `helm`), as the admin and with its caches in the cluster's folder.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.path(program));
        let home = self.folder().join("home");
        command.env("KUBECONFIG", &self.kubeconfig).env("HOME", &home).current_dir(crate::repo::root());
        for (name, folder) in [("HELM_CACHE_HOME", "cache"), ("HELM_CONFIG_HOME", "config"), ("HELM_DATA_HOME", "data")]
        {
            command.env(name, home.join(folder));
        }
        command
    }

    fn tool(&self, program: &str, arguments: &[&str], input: &str) -> Result<Ran> {
        let mut command = self.command(program);
        command.args(arguments);
        process::run(command, input)
    }

    /// Adds the CRDs of a manifest, and waits until their kinds are served: established alone is not yet that.
    ///
    /// # Errors
    /// When one is refused, or is not served in time.
    pub fn install_crds(&self, manifest: &str) -> Result<()> {
        let mut crds = Vec::new();
        for document in serde_yaml::Deserializer::from_str(manifest) {
            use serde::Deserialize as _;
            let value = serde_json::Value::deserialize(document)?;
            if value["kind"] == "CustomResourceDefinition" {
                crds.push(serde_json::from_value::<CustomResourceDefinition>(value)?);
            }
        }
        ensure!(!crds.is_empty(), "no CustomResourceDefinition in the manifest");
        self.run(async |client| {
            let api: Api<CustomResourceDefinition> = Api::all(client.clone());
            let params = PatchParams::apply("tests").force();
            for crd in &crds {
                let name = crd.metadata.name.as_deref().context("a CRD without a name")?;
                api.patch(name, &params, &Patch::Apply(crd)).await.with_context(|| format!("install {name}"))?;
            }
            for crd in &crds {
                for version in crd.spec.versions.iter().filter(|version| version.served) {
                    let (group, plural) = (&crd.spec.group, &crd.spec.names.plural);
                    let what = format!("{plural}.{group}/{} is served", version.name);
                    let known = format!("{group}/{}", version.name);
                    eventually(NEW_KIND, &what, async || {
                        let list = client.list_api_group_resources(&known).await?;
                        let is_listed = list.resources.iter().any(|resource| resource.name == *plural);
                        // Discovery can be ahead of the handler, too.
                        let request = http::Request::get(format!("/apis/{known}/{plural}?limit=1")).body(Vec::new())?;
                        client.request::<serde_json::Value>(request).await?;
                        Ok(is_listed.then_some(()))
                    })
                    .await?;
                }
            }
            Ok(())
        })
    }

    /// Kills the API server and starts it again: its watches break, its objects stay.
    ///
    /// # Errors
    /// When the cluster is not ours or it does not come up again.
    pub fn restart_api_server(&self) -> Result<()> {
        self.stop_api_server()?;
        self.start_api_server()
    }

    /// Kills the API server.
    ///
    /// # Errors
    /// When the cluster is not ours.
    pub fn stop_api_server(&self) -> Result<()> {
        self.own()?.processes.kill("kube-apiserver")
    }

    /// Starts the API server that was stopped, where it was.
    ///
    /// # Errors
    /// When the cluster is not ours or it does not come up again.
    pub fn start_api_server(&self) -> Result<()> {
        let own = self.own()?;
        own.processes.spawn(&self.programs.path("kube-apiserver"), "kube-apiserver", &own.api_arguments)?;
        self.wait_for_api_server()
    }

    /// The ends of its processes' logs, for a failing test.
    pub fn logs(&self) -> String {
        self.own.as_ref().map_or_else(String::new, |own| own.processes.logs())
    }

    /// Runs something with an admin's client, outside of the caller's runtime if there is one.
    fn run<T: Send>(&self, act: impl AsyncFnOnce(kube::Client) -> Result<T> + Send) -> Result<T> {
        block_on(async || act(self.client().await?).await)
    }

    fn wait_for_api_server(&self) -> Result<()> {
        let own = self.own()?;
        self.run(async |client| {
            eventually(API_SERVER, "the API server is ready", async || {
                own.processes.check()?;
                let request = http::Request::get("/readyz").body(Vec::new())?;
                let said = client.request_text(request).await?;
                Ok((said == "ok").then_some(()))
            })
            .await
        })
    }

    fn start_controllers(&self) -> Result<()> {
        let own = self.own()?;
        let folder = own.processes.folder();
        let config = |name: &str| -> Result<String> {
            let user = format!("system:{name}");
            let path = own.kubeconfig_with_certificate(name, &user, Some("system:masters"))?;
            Ok(path.display().to_string())
        };
        let flags = |config: String| {
            vec![
                format!("--kubeconfig={config}"),
                "--leader-elect=false".to_owned(),
                // The default of 20 makes the first ServiceAccount wait for four seconds.
                "--kube-api-qps=300".to_owned(),
                "--kube-api-burst=600".to_owned(),
                // Nobody asks for health or metrics.
                "--secure-port=0".to_owned(),
            ]
        };
        let mut manager = flags(config("kube-controller-manager")?);
        manager.extend([
            format!("--service-account-private-key-file={}", folder.join("tokens.key").display()),
            format!("--root-ca-file={}", folder.join("ca.crt").display()),
            // A node that is gone is noticed by tests in seconds.
            "--node-monitor-grace-period=16s".to_owned(),
            "--concurrent-deployment-syncs=20".to_owned(),
            "--concurrent-replicaset-syncs=20".to_owned(),
            "--concurrent-gc-syncs=20".to_owned(),
            "--concurrent-namespace-syncs=20".to_owned(),
        ]);
        let path = |name| self.programs.path(name);
        own.processes.spawn(&path("kube-controller-manager"), "kube-controller-manager", &manager)?;
        own.processes.spawn(&path("kube-scheduler"), "kube-scheduler", &flags(config("kube-scheduler")?))
    }

    fn start_hollow_nodes(&self, nodes: usize) -> Result<()> {
        let own = self.own()?;
        let config = own.kubeconfig_with_certificate("hollow-nodes", "hollow-nodes", Some("system:masters"))?;
        for number in 0..nodes {
            let name = format!("hollow-{number}");
            let arguments = [
                format!("--kubeconfig={}", config.display()),
                format!("--folder={}", own.processes.folder().join(&name).display()),
                format!("--number={number}"),
            ];
            own.processes.spawn(&self.programs.path("hollow-node"), &name, &arguments)?;
        }
        Ok(())
    }

    fn wait_for_nodes(&self, wanted: usize) -> Result<()> {
        let own = self.own()?;
        self.run(async |client| {
            let nodes: Api<NodeObject> = Api::all(client.clone());
            let accounts: Api<ServiceAccount> = Api::namespaced(client, "default");
            eventually(CONTROLLERS, "the nodes are ready", async || {
                own.processes.check()?;
                let ready =
                    nodes.list(&kube::api::ListParams::default()).await?.items.iter().filter(|n| is_ready(n)).count();
                let has_account = accounts.get_opt("default").await?.is_some();
                Ok((ready >= wanted && has_account).then_some(()))
            })
            .await
        })
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = std::io::Write::write_all(&mut std::io::stderr(), self.logs().as_bytes());
        }
    }
}

impl Own {
    fn kubeconfig_with_certificate(&self, name: &str, user: &str, group: Option<&str>) -> Result<PathBuf> {
        let identity = self.authority.client(user, group)?;
        let (certificate, key) = self.authority.write(name, &identity)?;
        let cluster = json!({
            "server": self.url,
            "certificate-authority": self.processes.folder().join("ca.crt"),
        });
        let user = json!({ "client-certificate": certificate, "client-key": key });
        let path = self.processes.folder().join(format!("{name}.kubeconfig"));
        std::fs::write(&path, kubeconfig_text(&cluster, &user, "default"))?;
        Ok(path)
    }
}

fn api_arguments(folder: &Path, tier: Tier, etcd: &str, port: u16) -> Vec<String> {
    let file = |name: &str| folder.join(name).display().to_string();
    // A real node is in a network of its own and comes from outside.
    let bind = if tier == Tier::Node { "0.0.0.0" } else { "127.0.0.1" };
    let further = API_SERVER_FLAGS.get().copied().unwrap_or_default().iter().map(|&flag| flag.to_owned());
    let mut arguments = vec![
        format!("--etcd-servers={etcd}"),
        format!("--secure-port={port}"),
        format!("--bind-address={bind}"),
        "--advertise-address=127.0.0.1".to_owned(),
        "--endpoint-reconciler-type=none".to_owned(),
        format!("--cert-dir={}", file("")),
        format!("--tls-cert-file={}", file("apiserver.crt")),
        format!("--tls-private-key-file={}", file("apiserver.key")),
        format!("--client-ca-file={}", file("ca.crt")),
        format!("--kubelet-client-certificate={}", file("kubelet-client.crt")),
        format!("--kubelet-client-key={}", file("kubelet-client.key")),
        // A node's name is in no DNS that this host asks.
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        format!("--service-account-key-file={}", file("tokens.pub")),
        format!("--service-account-signing-key-file={}", file("tokens.key")),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-cluster-ip-range={SERVICES}"),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--allow-privileged=true".to_owned(),
        format!("--audit-policy-file={}", file("audit-policy.yaml")),
        format!("--audit-log-path={}", file("audit.log")),
        // Throttling belongs to a production server; here it would slow down many clients that start at once.
        "--max-requests-inflight=0".to_owned(),
        "--max-mutating-requests-inflight=0".to_owned(),
        "--enable-priority-and-fairness=false".to_owned(),
    ];
    arguments.extend(further);
    arguments
}

fn is_ready(node: &NodeObject) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn kubeconfig_text(cluster: &serde_json::Value, user: &serde_json::Value, namespace: &str) -> String {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{ "name": "test", "cluster": cluster }],
        "users": [{ "name": "test", "user": user }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test", "namespace": namespace } }],
    })
    .to_string()
}

fn file_name(user: &str) -> String {
    user.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
}

/// The configuration of a kubeconfig.
///
/// # Errors
/// When it can't be read.
pub async fn config_of(kubeconfig: &Path) -> Result<kube::Config> {
    let file = Kubeconfig::read_from(kubeconfig)?;
    Ok(kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?)
}

/// A client of a kubeconfig. It lives as long as the runtime in which this is called.
///
/// # Errors
/// When the kubeconfig can't be read.
pub async fn client_of(kubeconfig: &Path) -> Result<kube::Client> {
    // Somebody else's choice of the same is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(kube::Client::try_from(config_of(kubeconfig).await?)?)
}

/// Runs a future to its end on a thread of its own, so that it does not matter whether the caller is in a runtime.
pub(crate) fn block_on<T: Send>(act: impl AsyncFnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(act())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Ports on which nobody listens, below those that the system gives to outgoing connections.
pub(crate) fn free_ports<const N: usize>() -> Result<[u16; N]> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 12_000;
    const COUNT: u32 = 18_000;
    let mut ports = [0; N];
    for port in &mut ports {
        let start = std::process::id().wrapping_mul(97);
        *port = (0..1000)
            .map(|_| (FIRST + start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT) as u16)
            .find(|&port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok())
            .context("no free port in a thousand tries")?;
    }
    if N == 0 {
        bail!("no port asked for")
    }
    Ok(ports)
}
