//! A small cluster of real processes: for each pod a worker and its routing proxy, on a loopback address of its own.
//!
//! `baton up` does the same for people and has its own test; here every process can be chosen, killed and restarted by hand.

use crate::{http, repo};
use anyhow::{Context, Result, ensure};
use baton_wire::names::{headers, paths, ports};
use baton_wire::signing;
use ed25519_dalek::SigningKey;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for any state of the cluster: loading the demo model takes about a second, on a busy machine ten.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a pod is started with.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// `prefill`, `decode` or `prefill-decode`.
    pub role: &'static str,
    /// Model directory.
    pub model: PathBuf,
    /// Further flags of the worker.
    pub worker_flags: Vec<String>,
    /// Further flags of the proxy.
    pub proxy_flags: Vec<String>,
}

impl PodSpec {
    /// A pod of `role` with the demo model.
    pub fn new(role: &'static str) -> Self {
        PodSpec { role, model: repo::demo_model(), worker_flags: Vec::new(), proxy_flags: Vec::new() }
    }

    /// The same with another model directory.
    #[must_use]
    pub fn model(mut self, model: &Path) -> Self {
        self.model = model.to_owned();
        self
    }

    /// The same with a further flag of the worker.
    #[must_use]
    pub fn worker_flag(mut self, name: &str, value: &str) -> Self {
        self.worker_flags.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// The same with a further flag of the proxy.
    #[must_use]
    pub fn proxy_flag(mut self, name: &str, value: &str) -> Self {
        self.proxy_flags.extend([name.to_owned(), value.to_owned()]);
        self
    }
}

/// A worker and its proxy.
pub struct Pod {
    /// Its loopback address.
    pub address: IpAddr,
    /// What it was started with.
    pub spec: PodSpec,
    /// The worker's process.
    pub worker: Child,
    /// The proxy's process.
    pub proxy: Child,
}

impl Pod {
    /// `address:port` of its proxy.
    pub fn proxy_address(&self) -> String {
        format!("{}:{}", self.address, ports::PROXY)
    }

    /// `address:port` of its engine.
    pub fn engine_address(&self) -> String {
        format!("{}:{}", self.address, ports::ENGINE)
    }

    /// The worker's status.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<serde_json::Value> {
        http::get(&self.engine_address(), paths::STATUS)?.json()
    }
}

/// Pods of one model; all processes end when this is dropped.
pub struct Cluster {
    /// In the order of the specs.
    pub pods: Vec<Pod>,
    folder: tempfile::TempDir,
}

impl Cluster {
    /// Starts the pods and waits until all are ready and know each other.
    ///
    /// # Errors
    /// When a process can't be started or does not become ready.
    pub fn start(specs: &[PodSpec]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let key = SigningKey::from_bytes(&[42; 32]);
        std::fs::write(folder.path().join("signing.key"), signing::key_text(&key.to_bytes()))?;
        std::fs::write(folder.path().join("public.key"), signing::key_text(&key.verifying_key().to_bytes()))?;
        let addresses = free_addresses(specs.len())?;
        let endpoints: Vec<String> = addresses.iter().map(|address| format!("{address}:{}", ports::PROXY)).collect();
        let list = serde_json::json!({ "endpoints": endpoints }).to_string();
        std::fs::write(folder.path().join("endpoints.json"), list)?;
        let mut cluster = Cluster { pods: Vec::new(), folder };
        for (spec, address) in specs.iter().zip(addresses) {
            let worker = cluster.worker(spec, address)?;
            let proxy = cluster.proxy(spec, address)?;
            cluster.pods.push(Pod { address, spec: spec.clone(), worker, proxy });
        }
        cluster.wait_ready()?;
        Ok(cluster)
    }

    /// Starts a worker again in the place of one that ended.
    ///
    /// # Errors
    /// When the process can't be started.
    pub fn restart_worker(&mut self, pod: usize) -> Result<()> {
        let (spec, address) = (self.pods[pod].spec.clone(), self.pods[pod].address);
        self.pods[pod].worker = self.worker(&spec, address)?;
        Ok(())
    }

    /// Waits until every pod that decodes sees every running pod as ready.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn wait_ready(&self) -> Result<()> {
        for pod in &self.pods {
            let what = format!("{} {} ready", pod.spec.role, pod.address);
            wait(
                &what,
                || Ok(http::get(&pod.engine_address(), paths::READY).is_ok_and(|answer| answer.status == 200)),
            )?;
        }
        for pod in self.pods.iter().filter(|pod| pod.spec.role != "prefill") {
            let admin = format!("{}:{}", pod.address, ports::ADMIN);
            wait(&format!("{} knows its peers", pod.address), || {
                let Ok(table) = http::get(&admin, "/debug/workers").and_then(http::Answer::json) else {
                    return Ok(false);
                };
                // By address: a pod's own engine is in the table a second time.
                let rows = table["workers"].as_array().context("the table is a list")?;
                let is_ready = |pod: &Pod| {
                    rows.iter().any(|row| row["address"] == pod.proxy_address() && row["status"]["state"] == "ready")
                };
                Ok(self.pods.iter().all(is_ready))
            })?;
        }
        Ok(())
    }

    /// Everything that the pods' processes have logged, for a failing test.
    pub fn logs(&self) -> String {
        let mut all = String::new();
        let Ok(entries) = std::fs::read_dir(self.folder.path()) else { return all };
        for path in
            entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "log"))
        {
            all += &format!("== {}\n{}\n", path.display(), std::fs::read_to_string(&path).unwrap_or_default());
        }
        all
    }

    fn worker(&self, spec: &PodSpec, address: IpAddr) -> Result<Child> {
        let mut command = Command::new(repo::binary("baton-worker"));
        command
            .args(["--role", spec.role, "--revision", "r1", "--served-model-name", "tiny"])
            .args(["--host", &address.to_string()])
            .arg("--model")
            .arg(&spec.model)
            .arg("--proxy-public-key-file")
            .arg(self.folder.path().join("public.key"))
            .args(["--kv-cache-bytes", "67108864"])
            .args(&spec.worker_flags);
        self.spawn(command, &format!("worker-{address}"))
    }

    fn proxy(&self, spec: &PodSpec, address: IpAddr) -> Result<Child> {
        let mut command = Command::new(repo::binary("baton-proxy"));
        command
            .args(["--listen", &format!("{address}:{}", ports::PROXY)])
            .args(["--admin-listen", &format!("{address}:{}", ports::ADMIN)])
            .args(["--engine", &format!("http://{address}:{}", ports::ENGINE)])
            .args(["--revision", "r1"])
            .arg("--endpoints-file")
            .arg(self.folder.path().join("endpoints.json"))
            .arg("--signing-key-file")
            .arg(self.folder.path().join("signing.key"))
            .args(&spec.proxy_flags);
        self.spawn(command, &format!("proxy-{address}"))
    }

    fn spawn(&self, mut command: Command, name: &str) -> Result<Child> {
        let log = File::options().create(true).append(true).open(self.folder.path().join(format!("{name}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        command.spawn().with_context(|| format!("start {command:?}"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = self.logs();
            let _ = std::io::Write::write_all(&mut std::io::stderr(), logs.as_bytes());
        }
        for child in self.pods.iter_mut().flat_map(|pod| [&mut pod.proxy, &mut pod.worker]) {
            // Already ended is fine: some tests end processes themselves.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends a signal to one of our own children.
///
/// # Errors
/// When there is no such process.
pub fn signal(child: &Child, name: &str) -> Result<()> {
    signal_process(child.id(), name)
}

/// Sends a signal to a process that a child of ours has started.
///
/// # Errors
/// When there is no such process.
pub fn signal_process(pid: u32, name: &str) -> Result<()> {
    let status = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status()?;
    ensure!(status.success(), "kill -{name} {pid}");
    Ok(())
}

/// Polls `condition` until it holds.
///
/// # Errors
/// When it does not within a minute, or when it fails itself.
pub fn wait(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition().with_context(|| format!("waiting for: {what}"))? {
        ensure!(Instant::now() < deadline, "waited {PATIENCE:?} in vain for: {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    Ok(())
}

/// The `x-baton-path` header of an answer.
pub fn path_of(answer: &http::Answer) -> String {
    answer.header(headers::PATH).unwrap_or("(none)").to_owned()
}

/// Loopback addresses on which nobody listens yet; tests of several binaries run side by side.
fn free_addresses(count: usize) -> Result<Vec<IpAddr>> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let process = std::process::id();
    for _ in 0..64 {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let number = process.wrapping_mul(31).wrapping_add(step);
        let (second, third) = (128 + (number >> 8) % 100, number % 250);
        let host =
            |index: usize| IpAddr::V4(Ipv4Addr::from(0x7f00_0000 | second << 16 | third << 8 | (index as u32 + 1)));
        let free = (0..count).all(|index| {
            [ports::PROXY, ports::ENGINE, ports::KV, ports::ADMIN]
                .iter()
                .all(|&port| TcpListener::bind((host(index), port)).is_ok())
        });
        if free {
            return Ok((0..count).map(host).collect());
        }
    }
    anyhow::bail!("no free loopback addresses in 64 tries")
}
