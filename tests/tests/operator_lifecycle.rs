//! A model's whole life on the real API: made, scaled, changed, switched to LeaderWorkerSets and back, deleted and made again;
//! what strangers change put right, what is theirs left alone, and nothing written while nothing changes.

use anyhow::{Context as _, Result, ensure};
use baton_operator::child::Kind;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use system_tests::kube::{Tier, say};
use system_tests::operator::census::Census;
use system_tests::operator::manifest::{foreign, tiny, with};
use system_tests::operator::model::{Model, Named, name_of};
use system_tests::operator::{Installation, PATIENCE, Stage, Type, manifest, wait};

/// How soon a change of an owned field is put right.
const REPAIR: Duration = Duration::from_secs(5);

fn stage() -> Result<Option<Stage>> {
    Stage::shared(Tier::Behaviour { nodes: 1, lws: true })
}

#[test]
fn a_model_is_made_scaled_changed_deleted_and_made_again() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let installation = stage.install("life")?;
    let census = Census::start(stage.plane, installation.namespace.name())?;
    let _operator = installation.started()?;
    let model = Model::with_lws(stage.admin, installation.namespace.name(), "tiny");

    model.apply(&tiny("tiny"))?;
    model.wait_settled()?;
    model.wait_condition(PATIENCE, "Ready", "True", "AllRolesReady")?;
    assert_eq!(census.count(), 2, "{:?}", census.since(0));
    let object = model.object()?;
    assert_eq!(object["status"]["url"], format!("http://tiny.{}.svc:8000", installation.namespace.name()).as_str());

    // Scaling starts and ends pods, and leaves those alone that stay.
    let before = model.pods()?;
    let workloads = uids(&model, Kind::Deployment)?;
    model.patch(&json!({"prefill": {"replicas": 2}, "decode": {"replicas": 3}}))?;
    model.wait_settled()?;
    let after = model.pods()?;
    assert!(before.iter().all(|(name, uid)| after.get(name) == Some(uid)), "{before:?} {after:?}");
    assert_eq!((after.len(), census.count()), (5, 5));
    assert_eq!(uids(&model, Kind::Deployment)?, workloads);
    model.patch(&json!({"prefill": {"replicas": 1}, "decode": {"replicas": 1}}))?;
    model.wait_settled()?;
    wait(PATIENCE, "two pods are left", || Ok((model.pods()?.len() == 2).then_some(())))?;
    assert_eq!(census.count(), 5, "{:?}", census.since(5));

    // A new image is a new revision: new workloads, and no pod of the old one.
    let before = model.pods()?;
    model.patch(&json!({"engine": {"image": "registry.example.com/worker:next"}}))?;
    model.wait_settled()?;
    wait(PATIENCE, "two new pods", || {
        let after = model.pods()?;
        Ok((after.len() == 2 && after.keys().all(|name| !before.contains_key(name))).then_some(()))
    })?;
    assert_eq!(census.count(), 7, "{:?}", census.since(5));
    let client = stage.admin.need(Type::SERVICE, installation.namespace.name(), "tiny")?;
    assert_eq!(client["spec"]["selector"]["baton.dev/revision"], model.expected()?.revision.as_str());

    model.delete()?;
    model.wait_gone()?;
    wait(PATIENCE, "no pod is left", || Ok(model.pods()?.is_empty().then_some(())))?;
    model.apply(&tiny("tiny"))?;
    model.wait_settled()?;
    assert_eq!(census.count(), 9, "{:?}", census.since(7));
    ensure_quiet(&installation, &model)
}

#[test]
fn a_role_is_switched_to_leader_worker_sets_and_back() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let installation = stage.install("switch")?;
    let census = Census::start(stage.plane, installation.namespace.name())?;
    let _operator = installation.started()?;
    let model = Model::with_lws(stage.admin, installation.namespace.name(), "wide");
    let kinds = || -> Result<BTreeSet<Kind>> { Ok(model.children()?.into_keys().map(|(kind, _)| kind).collect()) };

    model.apply(&foreign("wide"))?;
    model.wait_settled()?;
    assert!(!kinds()?.contains(&Kind::LeaderWorkerSet));
    assert_eq!(census.count(), 2, "{:?}", census.since(0));

    model.patch(&json!({"prefill": {"nodesPerReplica": 2}, "decode": {"nodesPerReplica": 2, "replicas": 2}}))?;
    model.wait_settled()?;
    assert!(kinds()?.contains(&Kind::LeaderWorkerSet) && !kinds()?.contains(&Kind::Deployment));
    // One group of two, and two of them.
    assert_eq!(census.count(), 8, "{:?}", census.since(2));

    model.patch(&json!({"prefill": {"nodesPerReplica": 1}, "decode": {"nodesPerReplica": 1, "replicas": 1}}))?;
    model.wait_settled()?;
    assert!(!kinds()?.contains(&Kind::LeaderWorkerSet));
    wait(PATIENCE, "two pods are left", || Ok((model.pods()?.len() == 2).then_some(())))?;
    assert_eq!(census.count(), 10, "{:?}", census.since(8));
    ensure_quiet(&installation, &model)
}

#[test]
fn a_front_door_comes_and_goes_without_a_restart_of_any_worker() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let installation = stage.install("door")?;
    let _operator = installation.started()?;
    let model = Model::with_lws(stage.admin, installation.namespace.name(), "tiny");
    model.apply(&tiny("tiny"))?;
    model.wait_settled()?;
    let workers = model.pods()?;
    let entrance = || -> Result<Value> {
        let service = stage.admin.need(Type::SERVICE, installation.namespace.name(), "tiny")?;
        Ok(service["spec"]["selector"]["baton.dev/workload-role"].clone())
    };
    assert_eq!(entrance()?, "decode");
    model.patch(&json!({"routing": {"mode": "Standalone", "standalone": {"replicas": 2}}}))?;
    model.wait_settled()?;
    wait(PATIENCE, "clients reach the front door", || Ok((entrance()? == "proxy").then_some(())))?;
    let with_door = model.pods()?;
    assert!(workers.iter().all(|(name, uid)| with_door.get(name) == Some(uid)), "{workers:?} {with_door:?}");
    assert_eq!(with_door.len(), 4);
    model.patch(&json!({"routing": {"mode": "Sidecar", "standalone": null}}))?;
    model.wait_settled()?;
    assert_eq!(entrance()?, "decode");
    wait(PATIENCE, "the same two pods are left", || Ok((model.pods()? == workers).then_some(())))
}

/// What a stranger changes of each kind, and what it then is.
fn drift(kind: Kind) -> Value {
    match kind {
        Kind::ServiceAccount => json!({"metadata": {"labels": {"app.kubernetes.io/part-of": "stranger"}}}),
        Kind::Secret => json!({"data": {"signing.pub": "c3RyYW5nZXI="}}),
        Kind::ConfigMap => json!({"data": {"routing.json": "{}"}}),
        Kind::NetworkPolicy => json!({"spec": {"ingress": [{}]}}),
        Kind::PodDisruptionBudget => json!({"spec": {"maxUnavailable": 7}}),
        Kind::Deployment | Kind::LeaderWorkerSet => json!({"spec": {"replicas": 3}}),
        Kind::Service => json!({"spec": {"selector": {"baton.dev/workload-role": "stranger"}}}),
        Kind::PodMonitor => json!({"spec": {"selector": {"matchLabels": {"stranger": "yes"}}}}),
    }
}

/// An object without what the API server and the object's own controller write.
fn owned(mut object: Value) -> Value {
    object["metadata"] = json!({"labels": object["metadata"]["labels"], "name": object["metadata"]["name"]});
    if let Some(fields) = object.as_object_mut() {
        // The last two are left out of a list's items, so a list and a get would differ.
        for field in ["status", "kind", "apiVersion"] {
            fields.remove(field);
        }
    }
    object
}

/// The owned objects of two models, one of Deployments and one of LeaderWorkerSets: of each kind at least one.
fn one_of_each_kind(model: &Model<'_>, wide: &Model<'_>) -> Result<Vec<(Named, Value)>> {
    let mut seen = BTreeSet::new();
    let mut all: Vec<(Named, Value)> = wide.children()?.into_iter().chain(model.children()?).collect();
    // Of Secrets the one that `drift` is about.
    all.retain(|((kind, name), _)| *kind != Kind::Secret || name.ends_with("-signing-public"));
    all.retain(|((kind, _), _)| seen.insert(*kind));
    Ok(all)
}

#[test]
fn what_strangers_change_or_delete_is_put_right_within_five_seconds() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let installation = stage.install("drift")?;
    let namespace = installation.namespace.name();
    let _operator = installation.started()?;
    let (model, wide) =
        (Model::with_lws(stage.admin, namespace, "tiny"), Model::with_lws(stage.admin, namespace, "wide"));
    model.apply(&tiny("tiny"))?;
    wide.apply(&with(foreign("wide"), &json!({"spec": {"decode": {"nodesPerReplica": 2}}})))?;
    model.wait_settled()?;
    wide.wait_settled()?;

    let objects = one_of_each_kind(&model, &wide)?;
    assert_eq!(objects.len(), Kind::ALL.len() - 1, "every kind but PodMonitor, whose definition is not there");
    let mut took = Vec::new();
    for ((kind, name), object) in &objects {
        let (resource, wanted) = (Type::of_child(*kind), owned(object.clone()));
        let is_right = || -> Result<Option<()>> {
            let found = stage.admin.need(resource, namespace, name)?;
            Ok((owned(found) == wanted).then_some(()))
        };
        // No watch tells of Secrets, so a change to one is seen when the model is looked at for another reason.
        let look = |resource: Type, name: &str| match kind {
            Kind::Secret => {
                let model = if name.starts_with("wide") { "wide" } else { "tiny" };
                let note = json!({"metadata": {"annotations": {"example.com/look": format!("{:?}", Instant::now())}}});
                stage.admin.merge(Type::MODEL, namespace, model, "", &note).map(|_| ())
            }
            _ => Ok::<(), kube::Error>(()).map(|()| _ = resource),
        };
        stage.admin.merge(resource, namespace, name, "", &drift(*kind))?;
        let begun = Instant::now();
        look(resource, name)?;
        wait(REPAIR, &format!("{} {name} is put right", kind.as_str()), is_right)?;
        let repaired = begun.elapsed();

        let uid = stage.admin.need(resource, namespace, name)?["metadata"]["uid"].clone();
        stage.admin.delete(resource, namespace, name)?;
        let begun = Instant::now();
        look(resource, name)?;
        wait(REPAIR, &format!("{} {name} is made anew", kind.as_str()), || {
            Ok(stage.admin.get(resource, namespace, name)?.filter(|found| found["metadata"]["uid"] != uid).map(|_| ()))
        })?;
        took.push(format!(
            "{} {:.2} s and {:.2} s",
            kind.as_str(),
            repaired.as_secs_f64(),
            begun.elapsed().as_secs_f64()
        ));
        // The next kind begins from a whole model.
        model.wait_settled()?;
        wide.wait_settled()?;
    }
    say(&format!("put right and made anew after: {}", took.join(", ")));
    Ok(())
}

#[test]
fn what_strangers_add_is_left_alone() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let installation = stage.install("foreign")?;
    let namespace = installation.namespace.name();
    let _operator = installation.started()?;
    let model = Model::with_lws(stage.admin, namespace, "tiny");
    model.apply(&tiny("tiny"))?;
    model.wait_settled()?;
    let note =
        json!({"metadata": {"annotations": {"example.com/note": "mine"}, "labels": {"example.com/mine": "yes"}}});
    let children = model.children()?;
    for (kind, name) in children.keys() {
        stage.admin.merge(Type::of_child(*kind), namespace, name, "", &note)?;
    }
    for (kind, name) in children.keys().filter(|(kind, _)| *kind == Kind::Deployment) {
        // What `kubectl rollout restart` writes.
        let restart =
            json!({"spec": {"template": {"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": "now"}}}}});
        stage.admin.merge(Type::of_child(*kind), namespace, name, "", &restart)?;
    }
    // Each object is written again, because its drift is put right.
    for (kind, name) in children.keys().filter(|(kind, _)| *kind != Kind::Secret) {
        stage.admin.merge(Type::of_child(*kind), namespace, name, "", &drift(*kind))?;
    }
    model.wait_settled()?;
    for (named, before) in &children {
        let (kind, name) = named;
        let mut before = owned(before.clone());
        before["metadata"]["labels"]["example.com/mine"] = json!("yes");
        if *kind == Kind::Deployment {
            before["spec"]["template"]["metadata"]["annotations"] = json!({"kubectl.kubernetes.io/restartedAt": "now"});
        }
        wait(REPAIR, &format!("{named:?} is right, with the stranger's part"), || {
            let found = stage.admin.need(Type::of_child(*kind), namespace, name)?;
            ensure!(found["metadata"]["annotations"]["example.com/note"] == "mine", "its note is gone");
            ensure!(owned(found.clone()) == before, "{found} is not {before}");
            Ok(Some(()))
        })?;
    }
    Ok(())
}

#[test]
fn a_second_apply_and_a_restart_change_nothing() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let installation = stage.install("again")?;
    let namespace = installation.namespace.name();
    let mut operator = installation.started()?;
    let (model, wide) =
        (Model::with_lws(stage.admin, namespace, "tiny"), Model::with_lws(stage.admin, namespace, "wide"));
    model.apply(&tiny("tiny"))?;
    wide.apply(&with(foreign("wide"), &json!({"spec": {"decode": {"nodesPerReplica": 2}}})))?;
    model.wait_settled()?;
    wide.wait_settled()?;
    ensure_quiet(&installation, &model)?;
    let versions = (model.versions()?, wide.versions()?, version(&model)?, version(&wide)?);

    model.apply(&tiny("tiny"))?;
    assert_eq!(version(&model)?, versions.2, "applying the same manifest is no change");
    let mark = installation.proxy.mark();
    operator.kill()?;
    let _operator = installation.started()?;
    // Each model is read and found as it should be.
    wait(PATIENCE, "both models were looked at", || {
        let looked = installation.proxy.since(mark);
        let at = |name: &str| {
            looked.iter().any(|one| one.request.resource == "disaggregatedmodels" && one.request.name == name)
        };
        Ok((at("tiny") && at("wide")).then_some(()))
    })?;
    ensure_quiet(&installation, &model)?;
    let writes = installation.proxy.writes_since(mark);
    assert!(writes.is_empty(), "{writes:#?}");
    assert_eq!((model.versions()?, wide.versions()?, version(&model)?, version(&wide)?), versions);
    Ok(())
}

#[test]
fn nothing_is_written_while_nothing_changes() -> Result<()> {
    /// Longer than every period of the operator but the half-hourly look: the Lease is renewed ten times, kinds are looked for twice.
    const WINDOW: Duration = Duration::from_secs(20);
    let Some(stage) = stage()? else { return Ok(()) };
    let installation = stage.install("steady")?;
    let namespace = installation.namespace.name();
    let _operator = installation.started()?;
    let names: Vec<String> = (0..5).map(|number| format!("m{number}")).collect();
    let models: Vec<Model<'_>> = names.iter().map(|name| Model::with_lws(stage.admin, namespace, name)).collect();
    for model in &models {
        model.apply(&tiny(model.name))?;
    }
    for model in &models {
        model.wait_settled()?;
        ensure_quiet(&installation, model)?;
    }
    let mark = installation.proxy.mark();
    let begun = Instant::now();
    while begun.elapsed() < WINDOW {
        std::thread::park_timeout(Duration::from_secs(1));
    }
    let writes = installation.proxy.writes_since(mark);
    assert!(writes.is_empty(), "{writes:#?}");
    say(&format!("requests of {} models in {WINDOW:?}: {:?}", models.len(), installation.proxy.totals_since(mark)));
    Ok(())
}

#[test]
fn of_two_operators_one_writes_and_a_frozen_leader_that_wakes_never_does() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let installation = stage.install("leader")?;
    let namespace = installation.namespace.name();
    let mut first = installation.started()?;
    let mut second = installation.second_replica()?;
    second.operator.wait_ready()?;
    let holder = || -> Result<Value> {
        Ok(stage.admin.need(Type::LEASE, namespace, "baton-operator")?["spec"]["holderIdentity"].clone())
    };
    wait(PATIENCE, "the first leads", || Ok((holder()? == "baton-operator-0").then_some(())))?;
    let start = second.proxy.mark();

    // Frozen in the middle of its work, between two writes.
    let model = Model::with_lws(stage.admin, namespace, "tiny");
    let mark = installation.proxy.mark();
    model.apply(&tiny("tiny"))?;
    wait(PATIENCE, "the first has begun", || Ok((installation.proxy.writes_since(mark).len() >= 3).then_some(())))?;
    first.signal("STOP")?;
    assert!(second.proxy.writes_since(start).is_empty(), "the standby wrote");
    let frozen = Instant::now();
    model.wait_settled()?;
    say(&format!("taken over and done {:.1} s after the leader froze", frozen.elapsed().as_secs_f64()));
    assert_eq!(holder()?, "baton-operator-1");

    // It wakes, with the rest of its work before it and more that calls for it.
    let woken = installation.proxy.mark();
    first.signal("CONT")?;
    model.patch(&json!({"decode": {"replicas": 2}}))?;
    model.wait_settled()?;
    wait(PATIENCE, "the woken one ends, as it has lost its lease", || first.ended())?;
    let writes = installation.proxy.writes_since(woken);
    assert!(writes.is_empty(), "the woken leader wrote: {writes:#?}");
    assert_eq!(holder()?, "baton-operator-1");

    // Started again, it stands by; told to stop, the leader lets the lease go at once.
    let mark = installation.proxy.mark();
    let _first = installation.started()?;
    model.patch(&json!({"decode": {"replicas": 1}}))?;
    model.wait_settled()?;
    assert!(installation.proxy.writes_since(mark).is_empty());
    let told = Instant::now();
    second.operator.signal("TERM")?;
    wait(PATIENCE, "the first leads again", || Ok((holder()? == "baton-operator-0").then_some(())))?;
    assert!(told.elapsed() < Duration::from_secs(10), "released, not expired: {:?}", told.elapsed());
    let status = wait(PATIENCE, "the second has ended", || second.operator.ended())?;
    assert!(status.success(), "{status}");
    model.patch(&json!({"decode": {"replicas": 2}}))?;
    model.wait_settled()
}

#[test]
fn an_object_of_the_users_is_never_taken_over_or_deleted() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let installation = stage.install("taken")?;
    let namespace = installation.namespace.name();
    let _operator = installation.started()?;
    // What the names will be is known from a model that was there before.
    let model = Model::with_lws(stage.admin, namespace, "tiny");
    model.apply(&tiny("tiny"))?;
    model.wait_settled()?;
    let children = model.children()?;
    model.delete()?;
    model.wait_gone()?;

    let mut theirs = Vec::new();
    let mut seen = BTreeSet::new();
    for ((kind, name), object) in children.iter().filter(|((kind, _), _)| seen.insert(*kind)) {
        let mut object = object.clone();
        object["metadata"] = json!({"name": name});
        if *kind == Kind::Service {
            object["spec"] = json!({"ports": [{"port": 80}]});
        }
        if let Some(fields) = object.as_object_mut() {
            // The last two are left out of a list's items, so a list and a get would differ.
            for field in ["status", "kind", "apiVersion"] {
                fields.remove(field);
            }
        }
        let made = stage.admin.create(Type::of_child(*kind), namespace, &object)?;
        theirs.push((*kind, name.clone(), made["metadata"]["uid"].clone()));
    }
    model.apply(&tiny("tiny"))?;
    let said = model.wait_condition(PATIENCE, "Accepted", "False", "NameTaken")?;
    let at_fault =
        theirs.iter().any(|(kind, name, _)| said.message.contains(kind.as_str()) && said.message.contains(name));
    assert!(at_fault, "{said:?} names none of {theirs:?}");
    model.wait_condition(PATIENCE, "Stalled", "True", "NameTaken")?;
    model.delete()?;
    wait(PATIENCE, "the model's own objects are gone", || Ok(model.children()?.is_empty().then_some(())))?;
    for (kind, name, uid) in &theirs {
        let found = stage.admin.need(Type::of_child(*kind), namespace, name)?;
        assert_eq!(&found["metadata"]["uid"], uid, "{} {name}", kind.as_str());
        let fields = found["metadata"]["managedFields"].as_array().context("an object has managed fields")?;
        assert!(
            fields.iter().all(|field| field["manager"] != "baton-operator"),
            "{} {name} was written",
            kind.as_str()
        );
    }

    // Out of the way, they stop nothing.
    model.apply(&tiny("tiny"))?;
    model.wait_condition(PATIENCE, "Accepted", "False", "NameTaken")?;
    for (kind, name, _) in &theirs {
        stage.admin.delete(Type::of_child(*kind), namespace, name)?;
    }
    model.wait_settled()
}

#[test]
fn somebody_elses_count_of_replicas_is_never_touched() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let installation = stage.install("scaler")?;
    let namespace = installation.namespace.name();
    let _operator = installation.started()?;
    let model = Model::with_lws(stage.admin, namespace, "tiny");
    model.apply(&with(tiny("tiny"), &json!({"spec": {"decode": {"replicas": 3}}})))?;
    model.wait_settled()?;
    let decode = || -> Result<Value> {
        let all = stage.admin.list(Type::DEPLOYMENT, namespace, "baton.dev/workload-role=decode")?;
        let revision = model.expected()?.revision;
        let current = all.into_iter().find(|one| one["metadata"]["labels"]["baton.dev/revision"] == revision.as_str());
        current.context("a Deployment of decode workers")
    };
    // Handed over, the count stays what it was.
    model.patch(&json!({"decode": {"replicas": null, "autoscaling": {"provider": "External"}}}))?;
    wait(PATIENCE, "the count is nobody's", || {
        let status = model.object()?;
        Ok((status["status"]["observedGeneration"] == status["metadata"]["generation"]).then_some(()))
    })?;
    assert_eq!(decode()?["spec"]["replicas"], 3);
    // What a scaler says stands, also while everything else is put right.
    let name = name_of(&decode()?);
    stage.admin.merge(Type::DEPLOYMENT, namespace, &name, "scale", &json!({"spec": {"replicas": 2}}))?;
    stage.admin.merge(
        Type::DEPLOYMENT,
        namespace,
        &name,
        "",
        &json!({"metadata": {"labels": {"app.kubernetes.io/part-of": "x"}}}),
    )?;
    wait(REPAIR, "the label is put right", || {
        Ok((decode()?["metadata"]["labels"]["app.kubernetes.io/part-of"] == "baton").then_some(()))
    })?;
    assert_eq!(decode()?["spec"]["replicas"], 2);
    // A new revision begins with as many.
    model.patch(&json!({"engine": {"image": "registry.example.com/worker:next"}}))?;
    model.wait_settled()?;
    assert_eq!(decode()?["spec"]["replicas"], 2);
    Ok(())
}

fn uids(model: &Model<'_>, kind: Kind) -> Result<BTreeSet<String>> {
    let children = model.children()?;
    Ok(children
        .iter()
        .filter(|((found, _), _)| *found == kind)
        .map(|(_, object)| object["metadata"]["uid"].to_string())
        .collect())
}

fn version(model: &Model<'_>) -> Result<Value> {
    Ok(model.object()?["metadata"]["resourceVersion"].clone())
}

/// Waits until the operator has written nothing for a while: what a rollout's last event calls for comes within its window.
fn ensure_quiet(installation: &Installation<'_>, model: &Model<'_>) -> Result<()> {
    const QUIET: Duration = Duration::from_millis(1500);
    let mut mark = installation.proxy.mark();
    let mut since = Instant::now();
    wait(PATIENCE, "the operator writes nothing", || {
        if !installation.proxy.writes_since(mark).is_empty() {
            (mark, since) = (installation.proxy.mark(), Instant::now());
        }
        Ok((since.elapsed() >= QUIET).then_some(()))
    })?;
    model.check_settled()?;
    let _ = manifest::CLAIM;
    Ok(())
}
