//! A kubectl that runs beside the test: it follows a log, watches an object, forwards a port.

use super::{ControlPlane, block_on, eventually};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Longest wait for a forwarded port: kubectl asks the API server for a pod and listens.
const FORWARDED: Duration = Duration::from_secs(30);

/// It is killed when this is dropped, or with the cluster.
pub struct Background {
    child: Child,
    output: PathBuf,
    errors: PathBuf,
}

impl Background {
    /// Starts it as the admin.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn kubectl(plane: &ControlPlane, arguments: &[&str]) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = |what: &str| plane.folder().join(format!("background-{number}.{what}"));
        let (output, errors) = (file("out"), file("err"));
        let child = plane
            .command("kubectl")
            .args(arguments)
            .env("BATON_TEST_CLUSTER", plane.folder())
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .stderr(File::create(&errors)?)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start kubectl {arguments:?}"))?;
        Ok(Background { child, output, errors })
    }

    /// What it has said so far.
    ///
    /// # Errors
    /// When its file can't be read.
    pub fn said(&self) -> Result<String> {
        // What it is just writing may end in half a character.
        Ok(String::from_utf8_lossy(&std::fs::read(&self.output)?).into_owned())
    }

    /// Waits for its own end, and gives all that it said.
    ///
    /// # Errors
    /// When it fails, or goes on for longer than `patience`.
    pub fn ended(&mut self, patience: Duration) -> Result<String> {
        let child = &mut self.child;
        let status = block_on(async || eventually(patience, "kubectl ends", async || Ok(child.try_wait()?)).await)?;
        ensure!(status.success(), "{status}: {}", std::fs::read_to_string(&self.errors)?);
        self.said()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Already ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port of this machine that leads to a Service's pod, as `kubectl port-forward` gives it to people.
pub struct Forward {
    address: String,
    _process: Background,
}

impl Forward {
    /// Opens one to a port of a Service.
    ///
    /// # Errors
    /// When it does not open.
    pub fn to_service(plane: &ControlPlane, namespace: &str, service: &str, port: u16) -> Result<Self> {
        let (service, port) = (format!("service/{service}"), format!(":{port}"));
        let mut process = Background::kubectl(plane, &["port-forward", "-n", namespace, &service, &port])?;
        let address = block_on(async || {
            eventually(FORWARDED, "kubectl forwards the port", async || {
                ensure!(process.child.try_wait()?.is_none(), "{}", std::fs::read_to_string(&process.errors)?);
                let said = process.said()?;
                let line = said.lines().find_map(|line| line.strip_prefix("Forwarding from 127.0.0.1:"));
                let port = line.and_then(|line| line.split_once(" ->")).map(|(port, _)| port);
                Ok(port.map(|port| format!("127.0.0.1:{port}")))
            })
            .await
        })?;
        Ok(Forward { address, _process: process })
    }

    /// Where it is reached.
    pub fn address(&self) -> &str {
        &self.address
    }
}
