//! The official `openai` Python package, unmodified, against the proxy.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use system_tests::cluster::{Cluster, PodSpec};
use system_tests::repo;

/// A virtual environment with the client, outside the checkout and keyed by the pinned version, so that only the first
/// run downloads. `None` where Python is missing.
fn client_environment() -> Result<Option<PathBuf>> {
    let requirements = repo::root().join("tests/openai/requirements.txt");
    let pinned = std::fs::read_to_string(&requirements)?;
    let version =
        pinned.lines().find_map(|line| line.strip_prefix("openai==")).context("requirements.txt pins openai")?;
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set")?;
    let folder = cache.join("baton").join(format!("openai-{version}"));
    let done = folder.join("complete");
    if done.exists() {
        return Ok(Some(folder));
    }
    if Command::new("python3").args(["-c", "import venv, ensurepip"]).output().map_or(true, |out| !out.status.success())
    {
        return Ok(None);
    }
    let run = |program: &Path, args: &[&str]| -> Result<()> {
        let out = Command::new(program).args(args).output().with_context(|| format!("run {}", program.display()))?;
        ensure!(out.status.success(), "{} {args:?}: {}", program.display(), String::from_utf8_lossy(&out.stderr));
        Ok(())
    };
    run(Path::new("python3"), &["-m", "venv", "--clear", &folder.to_string_lossy()])?;
    run(&folder.join("bin/pip"), &["install", "-q", "-r", &requirements.to_string_lossy()])?;
    std::fs::write(done, "")?;
    Ok(Some(folder))
}

#[test]
fn the_official_client_works_unmodified() -> Result<()> {
    let Some(environment) = client_environment()? else {
        // The harness has no third outcome; the line is what makes the skip visible.
        let mut out = std::io::stderr();
        return Ok(std::io::Write::write_all(
            &mut out,
            b"SKIPPED: python3 with venv is missing (apt-get install python3-venv)\n",
        )?);
    };
    let cluster = Cluster::start(&[PodSpec::new("prefill"), PodSpec::new("decode")])?;
    let out = Command::new(environment.join("bin/python"))
        .arg(repo::root().join("tests/openai/drive.py"))
        .args([&format!("http://{}", cluster.pods[1].proxy_address()), "tiny"])
        .output()?;
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{text}\n{}", cluster.logs());
    assert!(text.contains("all checks passed"), "{text}");
    Ok(())
}
