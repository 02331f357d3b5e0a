//! One process that is measured: its memory, its CPU time and, of the operator, its metrics.

use crate::figures::Metrics;
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use system_tests::http;
use system_tests::kube::ControlPlane;
use system_tests::operator::{NAME, PATIENCE, PROXY_IMAGE, WORKER_IMAGE, cpu_time, wait};

/// What a process has taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// CPU time since its start.
    pub(crate) cpu: Duration,
    /// Memory in RAM now, in MiB.
    pub(crate) resident: f64,
    /// The most that it ever had in RAM, in MiB.
    pub(crate) peak: f64,
}

/// A process; ended when this is dropped if it was started here.
pub(crate) struct Process {
    pid: u32,
    own: Option<Own>,
}

struct Own {
    child: Child,
    admin: String,
    log: PathBuf,
}

impl Process {
    /// One that somebody else has started.
    pub(crate) fn of(pid: u32) -> Self {
        Process { pid, own: None }
    }

    /// Starts the operator as its image does, and waits until it is ready.
    pub(crate) fn operator(plane: &ControlPlane, program: &str, kubeconfig: &Path, namespace: &str) -> Result<Self> {
        // Free a moment ago: nothing else here takes ports by itself.
        let admin = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let log = plane.own_folder()?.join("operator.log");
        let file = File::create(&log)?;
        let child = Command::new(program)
            .args(["--worker-image", WORKER_IMAGE, "--proxy-image", PROXY_IMAGE, "--log-format", "json"])
            .args(["--admin-listen", &admin, "--lease-name", NAME])
            .env("KUBECONFIG", kubeconfig)
            .env("POD_NAME", format!("{NAME}-0"))
            .env("POD_NAMESPACE", namespace)
            .env("BATON_TEST_CLUSTER", plane.own_folder()?)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {program}"))?;
        let mut process = Process { pid: child.id(), own: Some(Own { child, admin, log }) };
        wait(PATIENCE, "the operator is ready", || {
            let own = process.own_mut()?;
            if let Some(status) = own.child.try_wait()? {
                bail!("it has ended with {status}: {}", std::fs::read_to_string(&own.log)?);
            }
            Ok(http::get(&own.admin, "/readyz").is_ok_and(|answer| answer.status == 200).then_some(()))
        })?;
        Ok(process)
    }

    fn own_mut(&mut self) -> Result<&mut Own> {
        self.own.as_mut().context("not started here")
    }

    pub(crate) fn metrics(&self) -> Result<Metrics> {
        let own = self.own.as_ref().context("not started here")?;
        let answer = http::get(&own.admin, "/metrics").and_then(http::Answer::text);
        answer.map(|text| Metrics::parse(&text)).with_context(|| {
            let log = std::fs::read_to_string(&own.log).unwrap_or_default();
            log[log.ceil_char_boundary(log.len().saturating_sub(4000))..].to_owned()
        })
    }

    /// Asks it to end and waits for that.
    pub(crate) fn end(&mut self) -> Result<()> {
        let own = self.own_mut()?;
        system_tests::cluster::signal(&own.child, "TERM")?;
        let status = wait(PATIENCE, "it ends", || Ok(own.child.try_wait()?))?;
        ensure!(status.success(), "{status}: {}", std::fs::read_to_string(&own.log)?);
        self.own = None;
        Ok(())
    }

    pub(crate) fn usage(&self) -> Result<Usage> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let mib = |name: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).context("a process has memory")?;
            let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().context("memory in kB")?;
            Ok(kib / 1024.0)
        };
        Ok(Usage { cpu: cpu_time(self.pid)?, resident: mib("VmRSS:")?, peak: mib("VmHWM:")? })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(own) = &mut self.own {
            // Already ended is fine.
            let _ = own.child.kill();
            let _ = own.child.wait();
        }
    }
}
