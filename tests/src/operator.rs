//! The operator as a process under test: its installation in a namespace, behind a proxy that breaks requests, its life and its
//! death.

pub mod account;
pub mod admin;
pub mod census;
pub mod kinds;
pub mod manifest;
pub mod model;
pub mod subject;

pub use account::Rights;
pub use admin::{Admin, Type};

use crate::api_faults::FaultProxy;
use crate::kube::{ControlPlane, Namespace, Tier, config_of, free_ports};
use crate::{http, repo};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Longest wait for what takes a second alone: on two cores with other tests beside it, ten times as long and more.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The operator's name wherever it has one: ServiceAccount, Lease, pod.
pub const NAME: &str = "baton-operator";

/// Images that hollow nodes "run" for the operator's own kinds of pods.
pub const WORKER_IMAGE: &str = "baton/worker:test";
/// See [`WORKER_IMAGE`].
pub const PROXY_IMAGE: &str = "baton/proxy:test";

/// Asks `look` until it gives something; for threads that are in no runtime.
///
/// # Errors
/// When `look` has given nothing within `patience`, with its last error.
pub fn wait<T>(patience: Duration, what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    /// Often enough that no figure depends on it, rarely enough that looking costs little.
    const PERIOD: Duration = Duration::from_millis(40);
    let deadline = Instant::now() + patience;
    loop {
        let last = match look() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => "it was not so".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        ensure!(Instant::now() < deadline, "waited {patience:?} in vain for: {what} ({last})");
        std::thread::park_timeout(PERIOD);
    }
}

/// The cluster of one test binary, with the definition of DisaggregatedModel, and its administrator.
#[derive(Clone, Copy)]
pub struct Stage {
    /// The cluster.
    pub plane: &'static ControlPlane,
    /// Who may do everything.
    pub admin: &'static Admin,
}

impl Stage {
    /// The one of this test binary; none when this machine lacks something for it, which is then said. All tests of a binary
    /// ask for the same.
    ///
    /// # Errors
    /// When the definition is refused.
    pub fn shared(tier: Tier) -> Result<Option<Self>> {
        static ADMIN: OnceLock<Result<Admin>> = OnceLock::new();
        let Some(plane) = ControlPlane::shared(tier) else { return Ok(None) };
        let admin = ADMIN.get_or_init(|| {
            plane.install_crds(&definition()?)?;
            Admin::new(plane)
        });
        match admin {
            Ok(admin) => Ok(Some(Stage { plane, admin })),
            Err(error) => bail!("{error:#}"),
        }
    }

    /// Waits until the cluster's garbage collector follows models: it looks for new definitions every 30 s only, and until then what a
    /// deleted model leaves stays. That is the cluster's time, not the operator's.
    ///
    /// # Errors
    /// When the API server refuses something, or the collector has not learnt of them within [`PATIENCE`].
    pub fn wait_collected(self) -> Result<()> {
        static KNOWN: Mutex<bool> = Mutex::new(false);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if *known {
            return Ok(());
        }
        // No operator is in this namespace, so the model is only an owner.
        let namespace = self.plane.namespace("collector")?;
        let model = self.admin.create(Type::MODEL, namespace.name(), &manifest::tiny("owner"))?;
        let owned = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "owned", "ownerReferences": [{
                "apiVersion": model["apiVersion"], "kind": model["kind"], "name": "owner", "uid": model["metadata"]["uid"],
            }]},
        });
        self.admin.create(Type::CONFIG_MAP, namespace.name(), &owned)?;
        self.admin.delete(Type::MODEL, namespace.name(), "owner")?;
        wait(PATIENCE, "the garbage collector follows models", || {
            Ok(self.admin.get(Type::CONFIG_MAP, namespace.name(), "owned")?.is_none().then_some(()))
        })?;
        *known = true;
        Ok(())
    }

    /// An installation of the operator with a namespace of its own, in which the claim of the manifests' models is bound.
    ///
    /// # Errors
    /// When the API server refuses something of it.
    pub fn install(self, prefix: &str) -> Result<Installation<'static>> {
        let installation = Installation::new(self.plane, self.admin, prefix)?;
        manifest::claim(self.admin, installation.namespace.name())?;
        Ok(installation)
    }
}

/// The definition of DisaggregatedModel as it is shipped.
///
/// # Errors
/// When the file can't be read.
pub fn definition() -> Result<String> {
    Ok(std::fs::read_to_string(repo::root().join("crds/disaggregatedmodels.baton.dev.yaml"))?)
}

/// One installation of the operator, in a namespace of its own whose models it runs, behind a proxy of its own.
pub struct Installation<'a> {
    /// The cluster.
    pub plane: &'a ControlPlane,
    /// Where the operator and its models live. Pod Security `restricted` is enforced there.
    pub namespace: Namespace,
    /// What its requests pass.
    pub proxy: FaultProxy,
    kubeconfig: PathBuf,
    folder: tempfile::TempDir,
    started: AtomicU32,
    /// Further flags.
    pub flags: Vec<String>,
    /// Whether it runs the models of all namespaces instead of its own.
    pub runs_all_namespaces: bool,
}

impl<'a> Installation<'a> {
    /// Installs it with the rights that are shipped, for the models of one new namespace.
    ///
    /// # Errors
    /// When the API server refuses something of it.
    pub fn new(plane: &'a ControlPlane, admin: &Admin, prefix: &str) -> Result<Self> {
        Self::with_rights(plane, admin, prefix, &Rights::shipped())
    }

    /// The same with other rights.
    ///
    /// # Errors
    /// When the API server refuses something of it.
    pub fn with_rights(plane: &'a ControlPlane, admin: &Admin, prefix: &str, rights: &Rights) -> Result<Self> {
        let namespace = plane.restricted_namespace(prefix)?;
        rights.grant(admin, namespace.name(), account::Scope::Namespace)?;
        Self::of_account(plane, namespace)
    }

    /// Installs it for the models of all namespaces.
    ///
    /// # Errors
    /// When the API server refuses something of it.
    pub fn for_all_namespaces(plane: &'a ControlPlane, admin: &Admin, prefix: &str) -> Result<Self> {
        let namespace = plane.restricted_namespace(prefix)?;
        Rights::shipped().grant(admin, namespace.name(), account::Scope::Cluster)?;
        let mut installation = Self::of_account(plane, namespace)?;
        installation.runs_all_namespaces = true;
        Ok(installation)
    }

    fn of_account(plane: &'a ControlPlane, namespace: Namespace) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let upstream = runtime.block_on(config_of(plane.kubeconfig()))?;
        let proxy = FaultProxy::start(&upstream)?;
        let folder = tempfile::tempdir()?;
        let direct = plane.kubeconfig_for_service_account(namespace.name(), NAME)?;
        let kubeconfig = folder.path().join("kubeconfig");
        std::fs::write(&kubeconfig, through(&direct, &proxy.url())?)?;
        Ok(Installation {
            plane,
            namespace,
            proxy,
            kubeconfig,
            folder,
            started: AtomicU32::new(0),
            flags: Vec::new(),
            runs_all_namespaces: false,
        })
    }

    /// A second process of the same installation, with a proxy of its own so that its requests are told apart.
    ///
    /// # Errors
    /// When the proxy can't be started.
    pub fn second_replica(&self) -> Result<Replica> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let proxy = FaultProxy::start(&runtime.block_on(config_of(self.plane.kubeconfig()))?)?;
        let kubeconfig = self.folder.path().join("second.kubeconfig");
        std::fs::write(&kubeconfig, through(&self.kubeconfig, &proxy.url())?)?;
        Ok(Replica { operator: self.start_as(&format!("{NAME}-1"), &kubeconfig)?, proxy })
    }

    /// Starts the operator and does not wait for anything. Each process of one pod name follows the one before it, as a
    /// container follows its predecessor.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(&self) -> Result<Operator> {
        self.start_as(&format!("{NAME}-0"), &self.kubeconfig)
    }

    /// Starts the operator and waits until it is ready.
    ///
    /// # Errors
    /// When it ends, or is not ready in time.
    pub fn started(&self) -> Result<Operator> {
        let mut operator = self.start()?;
        operator.wait_ready()?;
        Ok(operator)
    }

    fn start_as(&self, pod: &str, kubeconfig: &std::path::Path) -> Result<Operator> {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let log = self.folder.path().join(format!("operator-{number}.log"));
        let file = File::create(&log)?;
        let [port] = free_ports()?;
        let admin = format!("127.0.0.1:{port}");
        let mut command = Command::new(repo::binary("baton-operator"));
        command
            .args(["--worker-image", WORKER_IMAGE, "--proxy-image", PROXY_IMAGE, "--log-format", "json"])
            .args(["--admin-listen", &admin, "--lease-name", NAME])
            .args(&self.flags)
            .env("KUBECONFIG", kubeconfig)
            .env("POD_NAME", pod)
            .env("POD_NAMESPACE", self.namespace.name())
            .env("BATON_LOG", "info")
            // The cluster's janitor ends it with the cluster if this process does not come to it.
            .env("BATON_TEST_CLUSTER", self.plane.own_folder()?)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        if !self.runs_all_namespaces {
            command.args(["--watch-namespaces", self.namespace.name()]);
        }
        let child = command.spawn().context("start baton-operator")?;
        Ok(Operator { child, admin, log, has_ended: false })
    }

    /// Every log of its processes, for a failing test.
    pub fn logs(&self) -> String {
        let count = self.started.load(Ordering::Relaxed);
        let read = |number: u32| {
            let text = std::fs::read_to_string(self.folder.path().join(format!("operator-{number}.log")));
            format!("== operator {number} of {}\n{}", self.namespace.name(), tail(&text.unwrap_or_default()))
        };
        (0..count).map(read).collect()
    }
}

impl Drop for Installation<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let requests: String = self.proxy.log().iter().rev().take(60).rev().map(|one| format!("{one}\n")).collect();
            let said = format!("{}== last requests of {}\n{requests}", self.logs(), self.namespace.name());
            let _ = std::io::Write::write_all(&mut std::io::stderr(), said.as_bytes());
        }
    }
}

/// The end of a log: what a failing test shows of each process.
fn tail(text: &str) -> &str {
    const SHOWN: usize = 6000;
    &text[text.ceil_char_boundary(text.len().saturating_sub(SHOWN))..]
}

/// A replica besides the first one.
pub struct Replica {
    /// Its process.
    pub operator: Operator,
    /// What its requests pass.
    pub proxy: FaultProxy,
}

/// The same credentials for a server on plain HTTP.
fn through(kubeconfig: &std::path::Path, url: &str) -> Result<String> {
    let mut config: Value = serde_yaml::from_str(&std::fs::read_to_string(kubeconfig)?)?;
    *config.pointer_mut("/clusters/0/cluster").context("a kubeconfig names a cluster")? = json!({ "server": url });
    Ok(config.to_string())
}

/// A process of the operator; killed when this is dropped.
pub struct Operator {
    child: Child,
    admin: String,
    log: PathBuf,
    has_ended: bool,
}

impl Operator {
    /// Waits until it says that it is ready.
    ///
    /// # Errors
    /// When it ends, or takes too long.
    pub fn wait_ready(&mut self) -> Result<()> {
        wait(PATIENCE, "the operator is ready", || {
            if let Some(status) = self.ended()? {
                bail!("the operator has ended with {status}: {}", tail(&self.log()));
            }
            Ok(http::get(&self.admin, "/readyz").is_ok_and(|answer| answer.status == 200).then_some(()))
        })
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When the system can't tell.
    pub fn ended(&mut self) -> Result<Option<std::process::ExitStatus>> {
        let status = self.child.try_wait()?;
        self.has_ended |= status.is_some();
        Ok(status)
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as a crash does, and waits for its end.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.has_ended = true;
        Ok(())
    }

    /// Sends a signal: `STOP`, `CONT`, `TERM`.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn signal(&self, name: &str) -> Result<()> {
        crate::cluster::signal(&self.child, name)
    }

    /// All that it has written.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The code with which it answers on its admin port; none when it does not.
    pub fn asked(&self, path: &str) -> Option<u16> {
        http::get(&self.admin, path).ok().map(|answer| answer.status)
    }

    /// Its metrics.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics(http::get(&self.admin, "/metrics")?.text()?))
    }

    /// Memory that it has in RAM now.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn resident_bytes(&self) -> Result<u64> {
        resident_bytes(self.pid())
    }

    /// CPU time that it has taken.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.pid())
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        if !self.has_ended {
            // Already ended is fine.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Memory that a process has in RAM now.
///
/// # Errors
/// When there is no such process.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a process has VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().context("VmRSS in kB")?;
    Ok(kib * 1024)
}

/// CPU time that a process has taken.
///
/// # Errors
/// When there is no such process.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    /// Linux counts these in hundredths of a second on every machine (USER_HZ).
    const TICK: Duration = Duration::from_millis(10);
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in brackets, which may hold anything.
    let (_, rest) = stat.rsplit_once(')').context("a process has a name")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks: u32 = fields[11].parse::<u32>()? + fields[12].parse::<u32>()?;
    Ok(TICK * ticks)
}

/// Metrics in Prometheus' text form.
#[derive(Clone, Debug)]
pub struct Metrics(String);

impl Metrics {
    /// Every sample of a metric, by its labels as written.
    pub fn samples(&self, name: &str) -> BTreeMap<String, f64> {
        let sample = |line: &str| -> Option<(String, f64)> {
            let rest = line.strip_prefix(name)?;
            let (labels, value) = rest.rsplit_once(' ')?;
            (labels.is_empty() || labels.starts_with('{')).then_some((labels.to_owned(), value.parse().ok()?))
        };
        self.0.lines().filter_map(sample).collect()
    }

    /// The sum of a metric's samples; 0 where there is none.
    pub fn sum(&self, name: &str) -> f64 {
        self.samples(name).values().sum()
    }

    /// The sum of a metric's samples whose labels hold `part`.
    pub fn sum_where(&self, name: &str, part: &str) -> f64 {
        self.samples(name).iter().filter(|(labels, _)| labels.contains(part)).map(|(_, value)| value).sum()
    }
}
