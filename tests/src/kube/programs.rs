//! Where the programs of a test cluster are.

use crate::repo;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folders of the programs that can be used here.
#[derive(Clone, Debug)]
pub(super) struct Programs {
    built: Option<PathBuf>,
    assets: Option<PathBuf>,
}

impl Programs {
    /// What `scripts/test-cluster` has built, and what `KUBEBUILDER_ASSETS` names.
    ///
    /// The error says what is missing and how to get it.
    pub(super) fn find(needs_only_api: bool, needs_node: bool) -> Result<Self, String> {
        let assets = std::env::var_os("KUBEBUILDER_ASSETS")
            .map(PathBuf::from)
            .filter(|folder| folder.join("etcd").exists() && folder.join("kube-apiserver").exists());
        let mut script = Command::new(repo::root().join("scripts/test-cluster"));
        script.arg("--installed");
        if needs_node {
            script.arg("--node");
        }
        let said = script.output().map_err(|error| format!("scripts/test-cluster can't be started: {error}"))?;
        let built = said.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&said.stdout).trim()));
        if built.is_none() && !(needs_only_api && assets.is_some()) {
            return Err(String::from_utf8_lossy(&said.stderr).trim().to_owned());
        }
        Ok(Programs { built, assets })
    }

    /// A program's file.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        let given = self.assets.as_ref().map(|folder| folder.join(name)).filter(|path| path.exists());
        given.unwrap_or_else(|| self.built.as_deref().unwrap_or(Path::new("")).join(name))
    }
}
