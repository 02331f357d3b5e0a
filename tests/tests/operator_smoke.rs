//! The operator's first life on a real API server: `examples/tiny.yaml` becomes running roles, is repaired, scaled and deleted.
//!
//! What happens when things break is in the other `operator_*` suites.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use system_tests::kube::{ControlPlane, Tier, say};
use system_tests::operator::model::Model;
use system_tests::operator::{Admin, Installation, PATIENCE, Type, manifest, wait};
use system_tests::repo;

/// Within this a change of somebody else's is repaired.
const REPAIR: Duration = Duration::from_secs(5);
/// Long enough for what the operator does in its sleep: two looks for optional kinds, some renewals of its lease.
const STEADY: Duration = Duration::from_secs(12);

#[test]
fn tiny_becomes_roles_that_are_kept_scaled_and_deleted() -> Result<()> {
    let Some(plane) = ControlPlane::shared(Tier::Behaviour { nodes: 1, lws: false }) else { return Ok(()) };
    plane.install_crds(&std::fs::read_to_string(repo::root().join("crds/disaggregatedmodels.baton.dev.yaml"))?)?;
    let admin = Admin::new(plane)?;
    let installation = Installation::new(plane, &admin, "smoke")?;
    let namespace = installation.namespace.name();
    manifest::claim(&admin, namespace)?;
    let mut operator = installation.started()?;
    let tiny: Value = serde_yaml::from_str(&std::fs::read_to_string(repo::root().join("examples/tiny.yaml"))?)?;
    let model = Model::new(&admin, namespace, "tiny");

    let begin = Instant::now();
    model.apply(&tiny)?;
    model.wait_settled()?;
    let created = begin.elapsed();
    model.wait_condition(PATIENCE, "Ready", "True", "AllRolesReady")?;

    let (children, versions) = (model.generations()?, model.versions()?);
    let status = model.object()?["metadata"]["resourceVersion"].clone();
    let writes = operator.metrics()?.sum("baton_operator_writes_total");
    model.apply(&tiny)?;
    // Nothing to wait for: that nothing happens is what is looked at.
    std::thread::park_timeout(STEADY);
    ensure!(model.generations()? == children && model.versions()? == versions, "written in steady state");
    ensure!(model.object()?["metadata"]["resourceVersion"] == status, "the status was written in steady state");
    ensure!(operator.metrics()?.sum("baton_operator_writes_total") == writes, "writes in steady state");

    let service = || admin.need(Type::SERVICE, namespace, "tiny");
    admin.merge(Type::SERVICE, namespace, "tiny", "", &json!({"spec": {"selector": {"baton.dev/model": "wrong"}}}))?;
    let begin = Instant::now();
    wait(REPAIR, "the client Service selects the model again", || {
        Ok((service()?["spec"]["selector"]["baton.dev/model"] == "tiny").then_some(()))
    })?;
    let repaired = begin.elapsed();
    admin.delete(Type::CONFIG_MAP, namespace, "tiny")?;
    wait(REPAIR, "the ConfigMap is there again", || admin.get(Type::CONFIG_MAP, namespace, "tiny"))?;

    model.patch(&json!({"prefill": {"replicas": 2}}))?;
    model.wait_settled()?;
    wait(PATIENCE, "two prefill replicas are told of", || {
        let summary = model.object()?["status"]["summary"]["prefill"].clone();
        ensure!(summary == "2/2", "{summary}");
        Ok(Some(()))
    })?;
    ensure!(model.pods()?.len() == 3, "{:?}", model.pods()?);

    model.delete()?;
    model.wait_gone()?;
    operator.signal("TERM")?;
    let status = wait(PATIENCE, "the operator ends", || operator.ended())?;
    ensure!(status.success(), "{status}: {}", operator.log());
    let lease = admin.need(Type::LEASE, namespace, "baton-operator")?;
    let holder = lease["spec"]["holderIdentity"].as_str().context("a holder, if an empty one")?;
    ensure!(holder.is_empty(), "the lease is still {holder}'s");
    say(&format!("settled after {created:?}, repaired after {repaired:?}"));
    Ok(())
}
