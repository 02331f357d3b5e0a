//! What the operator writes into pods is what our programs take: each command line of every snapshot is tried on the program.

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize as _;
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::{Command, Output};
use system_tests::repo;

/// A container of one of our images.
#[derive(Debug)]
struct Container {
    program: &'static str,
    args: Vec<String>,
}

/// Every pod template below a value.
fn templates<'a>(value: &'a Value, found: &mut Vec<&'a Value>) {
    match value {
        Value::Object(fields) => {
            if fields.contains_key("containers") {
                found.push(value);
            }
            fields.values().for_each(|value| templates(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| templates(value, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn containers(snapshot: &str) -> Result<Vec<Container>> {
    let path = repo::root().join("operator/src/desired/snapshots").join(snapshot);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut all = Vec::new();
    for document in serde_yaml::Deserializer::from_str(&text) {
        let object = Value::deserialize(document)?;
        let mut pods = Vec::new();
        templates(&object, &mut pods);
        for list in pods.iter().flat_map(|pod| [&pod["initContainers"], &pod["containers"]]) {
            for container in list.as_array().into_iter().flatten() {
                let image = container["image"].as_str().unwrap_or_default();
                let program = match image.split([':', '@']).next() {
                    Some(name) if name.ends_with("/worker") => "baton-worker",
                    Some(name) if name.ends_with("/proxy") => "baton-proxy",
                    _ => continue,
                };
                ensure!(container["command"].is_null(), "the image's own entry point is what runs: {container}");
                let args = container["args"].as_array().into_iter().flatten();
                // What the kubelet puts in place of the variable.
                let args = args.filter_map(Value::as_str).map(|arg| arg.replace("$(POD_IP)", "127.0.0.1")).collect();
                all.push(Container { program, args });
            }
        }
    }
    Ok(all)
}

fn run(container: &Container, more: &[&str]) -> Result<Output> {
    let program = repo::binary(container.program);
    Ok(Command::new(program).args(&container.args).args(more).env("HF_HUB_OFFLINE", "1").output()?)
}

/// Checks a command line as far as a machine without the pod's volumes can: up to the first file that is not there.
fn check(container: &Container) -> Result<()> {
    let is_download = container.args.first().is_some_and(|first| first == "fetch");
    // A download would begin; its flags alone are read here.
    let output = run(container, if is_download { &["--help"] } else { &[] })?;
    let said = String::from_utf8_lossy(&output.stderr);
    let missing_file = said.contains("/etc/baton/") || said.contains("/models/");
    let ended = (output.status.code(), missing_file);
    let expected = if is_download { (Some(0), false) } else { (Some(1), true) };
    ensure!(ended == expected, "{container:?} ended with {:?}: {said}", output.status);
    Ok(())
}

#[test]
fn every_command_line_that_the_operator_writes_is_one_that_our_programs_take() -> Result<()> {
    let mut seen = BTreeSet::new();
    for snapshot in ["tiny.yaml", "standalone-download.yaml", "vllm-over-nodes.yaml", "sglang-standalone.yaml"] {
        for container in containers(snapshot)? {
            if seen.insert((container.program, container.args.clone())) {
                check(&container).with_context(|| snapshot.to_owned())?;
            }
        }
    }
    let count = |program: &str| seen.iter().filter(|(name, _)| *name == program).count();
    ensure!(count("baton-proxy") >= 2 && count("baton-worker") >= 3, "hardly any was there: {seen:#?}");
    Ok(())
}

#[test]
fn a_flag_that_is_none_is_told_apart_from_a_missing_file() -> Result<()> {
    for container in containers("tiny.yaml")? {
        let output = run(&container, &["--no-such-flag"])?;
        ensure!(matches!(output.status.code(), Some(2 | 64)), "{container:?}: {:?}", output.status);
    }
    Ok(())
}
