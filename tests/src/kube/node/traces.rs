//! What a node leaves on its machine while it runs, and must not leave when it is gone.

use super::{cgroup_root, link_name};
use crate::kube::ControlPlane;
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Where to look for one node's traces. It outlives the node.
pub struct Traces {
    folder: PathBuf,
    cgroup: String,
    link: String,
}

impl Traces {
    /// The traces of a control plane's node.
    ///
    /// # Errors
    /// When the cluster is not ours.
    pub fn of(plane: &ControlPlane) -> Result<Self> {
        Ok(Traces { folder: plane.own_folder()?.to_owned(), cgroup: cgroup_root(), link: link_name() })
    }

    /// All that is there now, each with the kind that it is of: `folder`, `mount`, `link`, `route`, `cgroup`, `process`.
    ///
    /// Namespaces live by what is here: a network or mount namespace ends with its last process, unless a mount of this
    /// machine holds it.
    ///
    /// # Errors
    /// When the system can't tell.
    pub fn look(&self) -> Result<Vec<(&'static str, String)>> {
        let mut found = Vec::new();
        if self.folder.exists() {
            found.push(("folder", self.folder.display().to_string()));
        }
        let folder = self.folder.to_string_lossy();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        found.extend(mounts.lines().filter(|line| line.contains(&*folder)).map(|line| ("mount", line.to_owned())));
        if Path::new("/sys/class/net").join(&self.link).exists() {
            found.push(("link", self.link.clone()));
        }
        let routes = std::fs::read_to_string("/proc/net/route")?;
        let ours = routes.lines().filter(|line| line.split_whitespace().next() == Some(&self.link));
        found.extend(ours.map(|line| ("route", line.to_owned())));
        found.extend(self.cgroups()?.into_iter().map(|group| ("cgroup", group.display().to_string())));
        found.extend(self.processes()?.into_iter().map(|process| ("process", process)));
        Ok(found)
    }

    /// One, or with version 1 one in each controller.
    fn cgroups(&self) -> Result<Vec<PathBuf>> {
        let root = Path::new("/sys/fs/cgroup");
        let name = self.cgroup.trim_start_matches('/');
        let mut candidates = vec![root.join(name)];
        for entry in std::fs::read_dir(root)? {
            candidates.push(entry?.path().join(name));
        }
        Ok(candidates.into_iter().filter(|group| group.exists()).collect())
    }

    /// Those that were started for the node know its folder by their environment, and containers are in its groups.
    fn processes(&self) -> Result<Vec<String>> {
        let mark = format!("BATON_TEST_CLUSTER={}", self.folder.display());
        let group = format!(":{}/", self.cgroup);
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")? {
            let process = entry?.path();
            // One that ends while it is looked at is gone, which is what is asked for.
            let environment = std::fs::read(process.join("environ")).unwrap_or_default();
            let groups = std::fs::read_to_string(process.join("cgroup")).unwrap_or_default();
            if environment.split(|&byte| byte == 0).any(|one| one == mark.as_bytes()) || groups.contains(&group) {
                let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
                found.push(format!("{} {}", process.display(), name.trim()));
            }
        }
        Ok(found)
    }
}
