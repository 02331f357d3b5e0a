//! A routing proxy before engines that are not ours: `baton mock-engine` in their place, and `baton-proxy` as the front door,
//! each a process that ends with the value that stands for it.

use crate::cluster::wait;
use crate::http::{self, get};
use crate::kube::free_ports;
use crate::repo;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::fs::File;
use std::process::{Child, Command, Stdio};

/// A running mock engine.
pub struct Mock {
    child: Child,
    /// `ip:port` of its HTTP server.
    pub address: String,
    /// `ip:port` of its side channel, or of its bootstrap server.
    pub side: String,
}

impl Mock {
    /// Starts one on a free port.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(contract: &str, role: &str, flags: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("stdout");
        let mut command = Command::new(repo::binary("baton"));
        command.args(["mock-engine", "--contract", contract, "--role", role, "--name", role]).args(flags);
        let mut child = command.stdin(Stdio::null()).stdout(File::create(&path)?).spawn()?;
        let said = |mark: &str| {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            text.lines().find_map(|line| Some(line.split_once(mark)?.1.to_owned()))
        };
        let started = wait("the mock serves", || {
            ensure!(child.try_wait()?.is_none(), "it has ended");
            Ok(said(" serves at http://").is_some())
        });
        let (address, side) = (said(" serves at http://"), said(" channel at ").or_else(|| said(" server at ")));
        let mock = Mock { child, address: address.unwrap_or_default(), side: side.unwrap_or_default() };
        started.map(|()| mock)
    }

    /// The mock's ledger, bodies included.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn ledger(&self) -> Result<Value> {
        get(&self.address, "/mock/ledger?bodies=1")?.json()
    }

    /// A number of the ledger.
    ///
    /// # Errors
    /// When it does not answer, or has no such number.
    pub fn count(&self, pointer: &str) -> Result<u64> {
        let ledger = self.ledger()?;
        ledger.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("{pointer} of {ledger:#}"))
    }

    /// Waits until a number of the ledger is this.
    ///
    /// # Errors
    /// When it does not become that.
    pub fn counts(&self, pointer: &str, expect: u64) -> Result<()> {
        let mut last = Value::Null;
        let waited = wait(&format!("{pointer} to be {expect}"), || {
            last = self.ledger()?;
            Ok(last.pointer(pointer).and_then(Value::as_u64) == Some(expect))
        });
        waited.with_context(|| format!("{last:#}"))
    }

    /// How often each rule was broken.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn broken(&self) -> Result<Value> {
        Ok(self.ledger()?["violations"]["by_rule"].clone())
    }

    /// Ends it at once, as a crash does.
    pub fn kill(&mut self) {
        // Already ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A running front door.
pub struct Door {
    child: Child,
    /// `ip:port` for clients.
    pub address: String,
    /// `ip:port` of its admin port.
    pub admin: String,
    folder: tempfile::TempDir,
}

impl Door {
    /// Starts one before these engines, and waits until it may serve.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(connector: &str, prefill: &[&Mock], decode: &[&Mock], flags: &[&str]) -> Result<Self> {
        let mut own: Vec<String> = vec!["--connector".into(), connector.into()];
        for mock in prefill {
            let port = mock.side.rsplit_once(':').map_or("", |(_, port)| port);
            let bootstrap = if connector == "sglang" { format!(",bootstrap={port}") } else { String::new() };
            own.extend(["--prefill".into(), format!("http://{}{bootstrap}", mock.address)]);
        }
        for mock in decode {
            own.extend(["--decode".into(), format!("http://{}", mock.address)]);
        }
        let all: Vec<&str> = own.iter().map(String::as_str).chain(flags.iter().copied()).collect();
        let door = Self::launch(&all)?;
        let eligible = prefill.len() + decode.len();
        wait("the front door knows its engines", || {
            let table = get(&door.admin, "/debug/workers")?.json()?;
            let said = |worker: &Value| !worker["status"].is_null();
            Ok(table["workers"].as_array().is_some_and(|all| all.iter().filter(|one| said(one)).count() >= eligible))
        })
        .with_context(|| door.log())?;
        Ok(door)
    }

    /// Starts one with these flags, and waits until it listens.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn launch(flags: &[&str]) -> Result<Self> {
        let [client, admin] = free_ports()?;
        let (address, admin) = (format!("127.0.0.1:{client}"), format!("127.0.0.1:{admin}"));
        let folder = tempfile::tempdir()?;
        let log = File::create(folder.path().join("log"))?;
        let mut command = Command::new(repo::binary("baton-proxy"));
        command.args(["--listen", &address, "--admin-listen", &admin]).args(flags);
        let child = command.stdin(Stdio::null()).stderr(log).env("BATON_LOG", "info,baton_proxy=debug").spawn()?;
        let mut door = Door { child, address, admin, folder };
        wait("the front door listens", || {
            ensure!(door.child.try_wait()?.is_none(), "it has ended: {}", door.log());
            Ok(get(&door.admin, "/health").is_ok_and(|answer| answer.status == 200))
        })?;
        Ok(door)
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Sends a completion request.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn complete(&self, body: &Value) -> Result<http::Answer> {
        http::post(&self.address, "/v1/completions", body)
    }

    /// Its ledger of held KV.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn holds(&self) -> Result<Value> {
        get(&self.admin, "/debug/holds")?.json()
    }

    /// A metric's value, summed over labels that contain a text.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metric(&self, name: &str, part: &str) -> Result<f64> {
        let text = get(&self.admin, "/metrics")?.text()?;
        let of = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            let is_it = series.split('{').next() == Some(name) && series.contains(part);
            is_it.then(|| value.parse::<f64>().ok()).flatten()
        };
        Ok(text.lines().filter_map(of).sum())
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Already ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
