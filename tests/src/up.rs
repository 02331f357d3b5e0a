//! `baton up` as a person starts it, in a runtime folder of its own: tests then meet neither each other nor a person's run.

use crate::cluster::wait;
use crate::repo;
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

/// A `baton up`; it and all its processes end when this is dropped.
pub struct Up {
    /// The process of `baton` itself.
    pub child: Child,
    folder: tempfile::TempDir,
}

/// A process that a `baton up` has started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Its number.
    pub pid: u32,
    /// Its whole command line.
    pub command: String,
}

impl Up {
    /// Starts `baton up` with these arguments, in the checkout's root.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(args: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let out = |name: &str| File::create(folder.path().join(name));
        let child = baton(&folder)
            .arg("up")
            .args(args)
            .stdin(Stdio::null())
            .stdout(out("stdout")?)
            .stderr(out("stderr")?)
            .spawn()
            .context("start baton up")?;
        Ok(Up { child, folder })
    }

    /// Another command of the same user.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = baton(&self.folder);
        command.args(args);
        command
    }

    /// Waits until it serves, and gives `address:port` of where clients enter.
    ///
    /// # Errors
    /// When it ends before, or takes too long.
    pub fn address(&mut self) -> Result<String> {
        let told =
            |up: &Up| up.stdout().lines().find_map(|line| Some(line.split_once(" serves at http://")?.1.to_owned()));
        wait("baton up serves", || {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended with {status}: {}", self.stderr());
            }
            Ok(told(self).is_some())
        })?;
        told(self).context("it has just been there")
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        wait("baton up ends", || Ok(self.child.try_wait()?.is_some()))?;
        Ok(self.child.wait()?)
    }

    /// Its results so far.
    pub fn stdout(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("stdout")).unwrap_or_default()
    }

    /// Its progress and errors so far.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default()
    }

    /// Processes that it has started and that live. They are known by the files that they were given, which lie in its folder.
    pub fn processes(&self) -> Vec<Started> {
        let ours = self.folder.path().to_string_lossy().into_owned();
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let commands = entries.filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let bytes = std::fs::read(entry.path().join("cmdline")).ok()?;
            Some(Started { pid, command: String::from_utf8_lossy(&bytes).replace('\0', " ") })
        });
        commands.filter(|started| started.command.contains(&ours)).collect()
    }

    /// The worker of a role.
    ///
    /// # Errors
    /// When none lives.
    pub fn worker(&self, role: &str) -> Result<Started> {
        let role = format!("--role {role} ");
        // While it starts it is still `baton`, about to become the worker.
        let is_worker = |started: &Started| started.command.contains(&role) && !started.command.contains("__exec");
        self.processes().into_iter().find(is_worker).with_context(|| format!("no worker with {role}lives"))
    }

    /// Folders with keys and logs that lie there, of this run and others in its runtime folder.
    pub fn run_folders(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.folder.path().join("baton")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let said = format!("== baton up\n{}\n{}\n", self.stdout(), self.stderr());
            let _ = std::io::Write::write_all(&mut std::io::stderr(), said.as_bytes());
        }
        // Its processes are tied to it; already ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn baton(folder: &tempfile::TempDir) -> Command {
    let mut command = Command::new(repo::binary("baton"));
    command.current_dir(repo::root()).env("XDG_RUNTIME_DIR", folder.path());
    command
}
