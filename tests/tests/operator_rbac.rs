//! The operator with exactly the rights that are shipped: they suffice for whole lives, each of them is used, and without any one
//! the operator says what it lacks and goes on with the rest. And its pods pass Pod Security's strictest level.

use anyhow::{Context as _, Result, ensure};
use baton_crds::DisaggregatedModel;
use baton_crds::labels::APP_PART_OF as PART_OF;
use baton_operator::child::Kind;
use baton_operator::credentials::{Certificate, Credentials};
use baton_operator::plan::Plan;
use baton_operator::site::{OptionalKind, Owner, Site};
use baton_operator::{desired, validate};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};
use system_tests::api_faults::{Exchange, FaultProxy, Verb};
use system_tests::kube::{Namespace, Tier, api_server_flags, say};
use system_tests::operator::account::Right;
use system_tests::operator::manifest::{foreign, tiny, with};
use system_tests::operator::model::{Model, condition};
use system_tests::operator::{
    Admin, Installation, Operator, PATIENCE, PROXY_IMAGE, Rights, Stage, Type, WORKER_IMAGE, kinds, manifest, wait,
};

/// How long the operator is looked at while it lacks a right.
const LACKING_FOR: Duration = Duration::from_secs(5);
/// Most reconciles in that time. Pauses between them double from 0.2 s; a hot loop makes dozens.
const TRIES_MAX: usize = 12;
/// Most requests that are refused in that time: a reconcile may need a right for several objects, of Secrets for five.
const REFUSALS_MAX: usize = 5 * TRIES_MAX;

/// A cluster with every kind that the operator makes, and with the admission by which `finalizers` is a right that one must have.
fn stage() -> Result<Option<Stage>> {
    static MONITORS: OnceLock<()> = OnceLock::new();
    api_server_flags(&["--enable-admission-plugins=OwnerReferencesPermissionEnforcement"]);
    let Some(stage) = Stage::shared(Tier::Behaviour { nodes: 1, lws: true })? else { return Ok(None) };
    let mut installed = Ok(());
    MONITORS.get_or_init(|| installed = stage.plane.install_crds(&kinds::pod_monitor()));
    installed.map(|()| Some(stage))
}

/// Where an operator runs the models of all namespaces there is no other: each would run the other's models, too.
static ALL_NAMESPACES: RwLock<()> = RwLock::new(());

/// The right that lets one set an owner reference that holds up the owner's deletion.
fn finalizers() -> Right {
    Right {
        group: "baton.dev".to_owned(),
        resource: "disaggregatedmodels/finalizers".to_owned(),
        verb: "update".to_owned(),
    }
}

/// The admission that is on here looks kinds up in a map that it makes anew every so often, and refuses what it does not find.
fn wait_for_admission(stage: Stage, namespace: &str) -> Result<()> {
    let uid = stage.admin.need(Type::NAMESPACE, "", namespace)?["metadata"]["uid"].clone();
    let owned = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {
            "name": "owned",
            "ownerReferences": [{
                "apiVersion": baton_crds::API_VERSION, "kind": baton_crds::KIND, "name": "none", "uid": uid,
                "controller": true, "blockOwnerDeletion": true,
            }],
        },
    });
    // A user with rights, and none on everything: those are not asked.
    let kubeconfig = stage.plane.kubeconfig_for_service_account(namespace, system_tests::operator::NAME)?;
    let user = Admin::with_kubeconfig(&kubeconfig)?;
    wait(PATIENCE, "admission knows DisaggregatedModels", || {
        user.try_create(Type::CONFIG_MAP, namespace, &owned).map(|_| Some(()))
    })
}

fn of_exchange(one: &Exchange) -> Vec<Right> {
    let right = |verb: Verb| Right {
        group: one.request.group.clone(),
        resource: one.request.resource_and_subresource(),
        verb: verb.as_str().to_owned(),
    };
    // An apply that makes an object is asked for both rights.
    let makes = one.request.verb == Verb::Patch && one.code == Some(201);
    [Some(right(one.request.verb)), makes.then(|| right(Verb::Create))].into_iter().flatten().collect()
}

/// Rights that were used from the start of a proxy's log on. Discovery is about no resource and needs none.
fn used(proxy: &FaultProxy) -> BTreeSet<Right> {
    let log = proxy.log();
    log.iter().filter(|one| !one.request.resource.is_empty()).flat_map(of_exchange).collect()
}

/// Models that have between them everything that there is to ask for, from their making to their end.
fn whole_lives(stage: Stage, namespace: &str) -> Result<()> {
    let admin = stage.admin;
    let strict = json!({"metadata": {"labels": {"pod-security.kubernetes.io/warn": "restricted"}}});
    admin.merge(Type::NAMESPACE, "", namespace, "", &strict)?;
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "stringData": {"HF_TOKEN": "a token"},
    });
    admin.apply(Type::SECRET, namespace, &secret)?;
    manifest::claim(admin, namespace)?;
    let model = |name: &'static str| Model::with_lws(admin, namespace, name);
    let (own, hub, wide) = (model("own"), model("hub"), model("wide"));

    own.apply(&with(
        tiny("own"),
        &json!({"spec": {"routing": {"mode": "Standalone"}, "observability": {"monitor": "PodMonitor"}}}),
    ))?;
    hub.apply(&with(
        tiny("hub"),
        &json!({"spec": {
            "model": {
                "uri": "hf://org/Tiny", "credentialsSecretRef": {"name": "hub"},
                "cache": {"type": "PersistentVolumeClaim", "claimName": manifest::CLAIM},
            },
            "prefill": {"replicas": null},
            "decode": {"replicas": null, "autoscaling": {"provider": "External"}},
        }}),
    ))?;
    wide.apply(&with(foreign("wide"), &json!({"spec": {"decode": {"nodesPerReplica": 2}}})))?;
    for model in [own, hub, wide] {
        model.wait_settled()?;
    }
    let monitor = Type::of_child(Kind::PodMonitor);
    admin.need(monitor, namespace, "own")?;

    // The same transition twice is one event with a count.
    for replicas in [2, 1, 2] {
        own.patch(&json!({"decode": {"replicas": replicas}}))?;
        own.wait_settled()?;
        own.wait_condition(PATIENCE, "Ready", "True", "AllRolesReady")?;
    }
    own.patch(&json!({"engine": {"image": "registry.example.com/worker:next"}}))?;
    wide.patch(&json!({"decode": {"nodesPerReplica": 1}}))?;
    hub.patch(&json!({"disaggregation": {"policy": "Never"}}))?;
    for model in [own, hub, wide] {
        model.wait_settled()?;
    }
    own.patch(&json!({
        "routing": {"mode": "Sidecar"}, "observability": {"monitor": "None"}, "security": {"networkPolicy": "Disabled"},
    }))?;
    own.wait_settled()?;
    wait(PATIENCE, "nothing scrapes it", || Ok(admin.get(monitor, namespace, "own")?.is_none().then_some(())))?;

    admin.delete(Type::CONFIG_MAP, namespace, "own")?;
    let stranger = json!({"metadata": {"labels": {PART_OF: "stranger"}}});
    admin.merge(Type::SECRET, namespace, "own-signing-public", "", &stranger)?;
    admin.merge(Type::SERVICE, namespace, "own", "", &json!({"spec": {"selector": {"baton.dev/model": "wrong"}}}))?;
    wait(PATIENCE, "what was changed is put right", || {
        admin.need(Type::CONFIG_MAP, namespace, "own")?;
        let secret = admin.need(Type::SECRET, namespace, "own-signing-public")?;
        ensure!(secret["metadata"]["labels"][PART_OF] == "baton", "{}", secret["metadata"]);
        let service = admin.need(Type::SERVICE, namespace, "own")?;
        Ok((service["spec"]["selector"]["baton.dev/model"] == "own").then_some(()))
    })?;
    own.wait_settled()?;

    ensure_no_pod_was_refused(admin, namespace)?;
    for model in [own, hub, wide] {
        model.delete()?;
    }
    [own, hub, wide].iter().try_for_each(Model::wait_gone)
}

fn ensure_no_pod_was_refused(admin: &Admin, namespace: &str) -> Result<()> {
    let events = admin.list(Type::EVENT, namespace, "")?;
    let refused: Vec<_> =
        events.iter().filter(|event| event["reason"] == "FailedCreate").map(|event| &event["note"]).collect();
    ensure!(refused.is_empty(), "pods were refused: {refused:?}");
    Ok(())
}

fn lists(rights: &BTreeSet<Right>) -> String {
    rights.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Lives under an installation, and what it asked for against what is shipped.
fn suffices(stage: Stage, installation: &Installation<'_>) -> Result<()> {
    let namespace = installation.namespace.name();
    wait_for_admission(stage, namespace)?;
    let begun = Instant::now();
    let mut operator = installation.started()?;
    whole_lives(stage, namespace)?;
    let log = installation.proxy.log();
    let refused: Vec<String> = log.iter().filter(|one| one.code == Some(403)).map(ToString::to_string).collect();
    ensure!(refused.is_empty(), "{refused:#?}");

    // Setting owner references asks for this one in no request of its own: `each_right_is_needed...` shows that it is.
    let used: BTreeSet<Right> = used(&installation.proxy).into_iter().chain([finalizers()]).collect();
    let shipped = Rights::shipped().all();
    let (idle, lacking) = (&shipped - &used, &used - &shipped);
    ensure!(idle.is_empty(), "given and never used: {}", lists(&idle));
    ensure!(lacking.is_empty(), "used and not given: {}", lists(&lacking));
    operator.signal("TERM")?;
    let ended = wait(PATIENCE, "the operator ends", || operator.ended())?;
    ensure!(ended.success(), "{ended}");
    say(&format!(
        "{namespace}: {} requests by {} rights in {:.1} s, none refused",
        log.len(),
        used.len(),
        begun.elapsed().as_secs_f64()
    ));
    Ok(())
}

#[test]
fn the_shipped_rights_are_what_whole_lives_ask_for_in_one_namespace_and_nothing_is_asked_of_the_cluster() -> Result<()>
{
    let Some(stage) = stage()? else { return Ok(()) };
    let _here = ALL_NAMESPACES.read().unwrap_or_else(PoisonError::into_inner);
    let installation = Installation::new(stage.plane, stage.admin, "narrow")?;
    suffices(stage, &installation)?;
    let elsewhere: Vec<String> = installation
        .proxy
        .log()
        .iter()
        .filter(|one| !one.request.resource.is_empty() && one.request.namespace != installation.namespace.name())
        .map(ToString::to_string)
        .collect();
    ensure!(elsewhere.is_empty(), "asked outside of the namespace: {elsewhere:#?}");
    Ok(())
}

#[test]
fn the_shipped_rights_are_what_whole_lives_ask_for_in_all_namespaces() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let _alone = ALL_NAMESPACES.write().unwrap_or_else(PoisonError::into_inner);
    let installation = Installation::for_all_namespaces(stage.plane, stage.admin, "wide")?;
    suffices(stage, &installation)
}

/// A small manifest whose model has an object of a resource, on no node; and a change after which it is not wanted any more.
fn about(resource: &str) -> (Value, Value) {
    let base = with(
        tiny("lacks"),
        &json!({"spec": {
            "model": {"uri": "oci://registry.example.com/models/tiny:1"},
            "disaggregation": {"policy": "Never"},
            "observability": {"monitor": "None"},
            "prefill": null,
            "decode": {"nodeSelector": {"example.com/none": "here"}},
        }}),
    );
    let (laid_over, change) = match resource {
        "leaderworkersets" => (
            json!({
                "engine": {"type": "VLLM", "image": "registry.example.com/vllm:1"}, "decode": {"nodesPerReplica": 2},
            }),
            json!({"decode": {"nodesPerReplica": 1}}),
        ),
        "persistentvolumeclaims" => (json!({"model": {"uri": "pvc://models/tiny"}}), json!({})),
        "podmonitors" => {
            (json!({"observability": {"monitor": "PodMonitor"}}), json!({"observability": {"monitor": "None"}}))
        }
        "networkpolicies" => (json!({}), json!({"security": {"networkPolicy": "Disabled"}})),
        "services" => (json!({}), json!({"engine": {"image": "registry.example.com/worker:next"}})),
        "events" => (json!({}), json!({})),
        // A front door has one object of each of the other kinds.
        _ => (json!({"routing": {"mode": "Standalone"}}), json!({"routing": {"mode": "Sidecar"}})),
    };
    (with(base, &json!({"spec": laid_over})), change)
}

/// What the API server says to whoever lacks a right.
fn refusal(right: &Right) -> String {
    if *right == finalizers() {
        "cannot set blockOwnerDeletion".to_owned()
    } else {
        format!("cannot {} resource \"{}\"", right.verb, right.resource)
    }
}

/// Whether the status can tell of the want of a right: not of one without which there is no status, nor of what is no part of a
/// reconcile.
fn status_tells(right: &Right) -> bool {
    right.verb != "watch" && !["disaggregatedmodels/status", "events"].contains(&right.resource.as_str())
}

/// Log lines with these words, the JSON of each undone.
fn logged(operator: &Operator, words: &[&str]) -> usize {
    let line = |line: &str| serde_json::from_str::<Value>(line).ok().map(|line| line["fields"].clone());
    let says = |fields: &Value| {
        let mut texts = fields.as_object().into_iter().flatten().filter_map(|(_, value)| value.as_str());
        let all: Vec<&str> = texts.by_ref().collect();
        words.iter().all(|word| all.iter().any(|text| text.contains(word)))
    };
    operator.log().lines().filter_map(line).filter(says).count()
}

/// The last requests about a namespace, for a failing test.
fn requests(proxy: &FaultProxy, namespace: &str) -> String {
    const SHOWN: usize = 24;
    let log = proxy.log();
    let own: Vec<_> = log.iter().filter(|one| one.request.namespace == namespace).collect();
    own[own.len().saturating_sub(SHOWN)..].iter().map(|one| format!("\n{one}")).collect()
}

/// Makes a model under an operator that lacks one right there, and looks at what it says and does.
fn lack(stage: Stage, namespace: &str, right: &Right, proxy: &FaultProxy, operator: &Operator) -> Result<()> {
    let model = Model::with_lws(stage.admin, namespace, "lacks");
    let (manifest, change) = about(&right.resource);
    model.apply(&manifest)?;
    if right.verb == "delete" {
        model.wait_condition(PATIENCE, "Accepted", "True", "Accepted")?;
        model.patch(&change)?;
    }
    if right.resource == "secrets" && right.verb == "patch" {
        // Made as a whole, a Secret is patched only where somebody has changed it; nothing watches that, so the model is touched.
        model.wait_condition(PATIENCE, "Accepted", "True", "Accepted")?;
        let stranger = json!({"metadata": {"labels": {PART_OF: "stranger"}}});
        stage.admin.merge(Type::SECRET, namespace, "lacks-signing-public", "", &stranger)?;
        let note = json!({"metadata": {"annotations": {"example.com/look": "again"}}});
        stage.admin.merge(Type::MODEL, namespace, "lacks", "", &note)?;
    }
    if right.resource == "events" && right.verb == "patch" {
        // The same transition a second time, which raises the count of the first event.
        for image in ["registry.example.com/worker:2", "registry.example.com/worker:3"] {
            model.wait_condition(PATIENCE, "Progressing", "True", "Creating")?;
            model.patch(&json!({"engine": {"image": image}}))?;
        }
    }
    let refusal = refusal(right);
    let is_refusal =
        |one: &&Exchange| one.request.namespace == namespace && one.code == Some(403) && one.message.contains(&refusal);
    wait(PATIENCE, &format!("a request is refused: {refusal}"), || {
        Ok(proxy.log().iter().any(|one| is_refusal(&one)).then_some(()))
    })?;
    wait(PATIENCE, &format!("the log tells of it: {refusal}"), || {
        let words = [refusal.as_str(), namespace];
        Ok((logged(operator, &words) > 0).then_some(()))
    })?;
    if status_tells(right) {
        wait(PATIENCE, &format!("the status tells of it: {refusal}"), || {
            let object = model.object()?;
            let tells = |kind: &str| {
                condition(&object, kind).is_some_and(|found| {
                    found.status != "True"
                        && ["ChildRefused", "ClusterUnreadable"].contains(&found.reason.as_str())
                        && found.message.contains(&refusal)
                })
            };
            ensure!(tells("Accepted") || tells("Ready"), "{}", object["status"]);
            Ok(Some(()))
        })?;
    }
    let mark = proxy.mark();
    // Nothing to wait for: that little happens is what is looked at.
    std::thread::park_timeout(LACKING_FOR);
    let log = proxy.since(mark);
    let own = || log.iter().filter(|one| one.request.namespace == namespace);
    let reconciles =
        own().filter(|one| one.request.verb == Verb::Get && one.request.resource == "disaggregatedmodels").count();
    let refused = own().filter(is_refusal).count();
    ensure!(reconciles <= TRIES_MAX && refused <= REFUSALS_MAX, "hot: {reconciles} reconciles, {refused} refusals");
    Ok(())
}

#[test]
fn without_any_one_right_the_operator_says_which_and_neither_ends_nor_runs_hot() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let _here = ALL_NAMESPACES.read().unwrap_or_else(PoisonError::into_inner);
    let shipped = Rights::shipped();
    // Without these nothing is known of any model, or nobody leads: each is looked at by itself below.
    let (alone, rights): (Vec<Right>, Vec<Right>) = shipped
        .all()
        .into_iter()
        .partition(|right| ["disaggregatedmodels", "leases"].contains(&right.resource.as_str()));
    ensure!(alone.len() == 6, "{alone:?}");
    let begun = Instant::now();

    // One operator for many namespaces, in each of which it lacks another right.
    let mut installation = Installation::with_rights(stage.plane, stage.admin, "lacking", &shipped)?;
    let home = installation.namespace.name().to_owned();
    wait_for_admission(stage, &home)?;
    let namespaces: Vec<Namespace> = in_parallel(&rights, |right| {
        let namespace = stage.plane.namespace("lacks")?;
        shipped.clone().without(right).grant_models(stage.admin, namespace.name(), &home)?;
        Ok(namespace)
    })?;
    let names: Vec<&str> = namespaces.iter().map(Namespace::name).collect();
    installation.runs_all_namespaces = true;
    installation.flags = vec!["--watch-namespaces".to_owned(), names.join(",")];
    // It is never ready: some of its watches never begin.
    let mut operator = installation.start()?;
    let pairs: Vec<(&Right, &str)> = rights.iter().zip(names.iter().copied()).collect();
    in_parallel(&pairs, |(right, namespace)| {
        lack(stage, namespace, right, &installation.proxy, &operator)
            .with_context(|| format!("without {right}, after{}", requests(&installation.proxy, namespace)))
    })?;
    ensure!(operator.ended()?.is_none(), "the operator has ended");
    ensure!(operator.asked("/livez") == Some(200), "the operator does not say that it lives");
    let metrics = operator.metrics()?;
    ensure!(metrics.sum("baton_operator_panics_total") == 0.0, "a reconcile panicked");
    for right in rights.iter().filter(|right| right.verb == "watch") {
        let restarts = metrics.sum_where("baton_operator_watch_restarts_total", &right.resource);
        ensure!(restarts > 0.0, "no metric tells that watching {} fails", right.resource);
    }
    say(&format!("{} rights dropped one by one in {:.1} s", rights.len(), begun.elapsed().as_secs_f64()));
    Ok(())
}

#[test]
fn without_a_right_on_models_or_leases_the_operator_says_which_and_does_not_run_hot() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let _here = ALL_NAMESPACES.read().unwrap_or_else(PoisonError::into_inner);
    let shipped = Rights::shipped();
    let rights: Vec<Right> = shipped
        .all()
        .into_iter()
        .filter(|right| ["disaggregatedmodels", "leases"].contains(&right.resource.as_str()))
        .collect();
    in_parallel(&rights, |right| {
        let rights = shipped.clone().without(right);
        let installation = Installation::with_rights(stage.plane, stage.admin, "blind", &rights)?;
        let namespace = installation.namespace.name();
        let mut operator = installation.start()?;
        Model::new(stage.admin, namespace, "lacks").apply(&about("").0)?;
        let refusal = refusal(right);
        let is_refusal = |one: &&Exchange| one.code == Some(403) && one.message.contains(&refusal);
        wait(PATIENCE, &format!("the log tells of it: {refusal}"), || {
            Ok((logged(&operator, &[refusal.as_str()]) > 0).then_some(()))
        })?;
        let mark = installation.proxy.mark();
        // Nothing to wait for: that little happens is what is looked at.
        std::thread::park_timeout(LACKING_FOR);
        let refused = installation.proxy.since(mark).iter().filter(is_refusal).count();
        ensure!(refused <= TRIES_MAX, "hot: {refused} refusals in {LACKING_FOR:?}");
        // Who can't renew a lease ends, for another may lead: that is how it is restarted. Nobody else ends.
        let ended = operator.ended()?;
        ensure!(ended.is_none() || right.resource == "leases", "the operator has ended with {ended:?}");
        say(&format!("without {right}: {refused} tries in {} s", LACKING_FOR.as_secs()));
        Ok(())
    })?;
    Ok(())
}

/// Does something for each of many, some at a time; what came of each, or all that failed in one error.
fn in_parallel<T: Sync, R: Send>(all: &[T], act: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    /// More would wait for each other and not for what they look at.
    const AT_ONCE: usize = 16;
    let next = AtomicUsize::new(0);
    let work = || -> Vec<(usize, Result<R>)> {
        let mine = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|number| *number < all.len());
        std::iter::from_fn(mine).map(|number| (number, act(&all[number]))).collect()
    };
    let mut results: Vec<(usize, Result<R>)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE.min(all.len())).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    results.sort_by_key(|(number, _)| *number);
    let failed: Vec<String> =
        results.iter().filter_map(|(_, result)| Some(format!("{:#}", result.as_ref().err()?))).collect();
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    results.into_iter().map(|(_, result)| result).collect()
}

/// Every choice of one from each list, laid over each other.
fn choices(lists: &[Vec<Value>]) -> Vec<Value> {
    let lay = |specs: Vec<Value>, list: &Vec<Value>| -> Vec<Value> {
        specs.iter().flat_map(|spec| list.iter().map(|more| with(spec.clone(), more))).collect()
    };
    lists.iter().fold(vec![json!({})], lay)
}

fn manifests() -> Vec<Value> {
    let credentials = json!({"name": "hub"});
    let both = |role: Value| json!({"prefill": role, "decode": role});
    let sources = vec![
        json!({"model": {"uri": "pvc://models/tiny"}}),
        json!({"model": {"uri": "oci://registry.example.com/models/tiny:1", "credentialsSecretRef": credentials}}),
        json!({"model": {"uri": "hf://org/Tiny", "credentialsSecretRef": credentials, "cache": {"sizeLimit": "8Gi"}}}),
        json!({"model": {
            "uri": "s3://models/tiny", "credentialsSecretRef": credentials,
            "cache": {"type": "PersistentVolumeClaim", "claimName": "models"},
        }}),
    ];
    let engines = vec![
        json!({}),
        with(
            both(json!({"nodesPerReplica": 2})),
            &json!({"engine": {"type": "VLLM", "image": "registry.example.com/vllm:1"}}),
        ),
        json!({"engine": {"type": "SGLang", "image": "registry.example.com/sglang:1"}}),
    ];
    let routes = vec![json!({}), json!({"routing": {"mode": "Standalone"}})];
    let policies = vec![json!({}), json!({"disaggregation": {"policy": "Never"}})];
    let pods = vec![
        json!({}),
        both(json!({"gpu": {"count": 1}, "resourceClaims": [{"name": "nic", "resourceClaimTemplateName": "rdma"}]})),
        both(json!({"priorityClassName": "strict-test", "runtimeClassName": "strict-test"})),
        both(json!({
            "env": [{"name": "TOKEN", "secretKeyRef": {"name": "users", "key": "token"}}],
            "volumes": [{"name": "scratch", "emptyDir": {}}],
            "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
        })),
        both(json!({"podTemplate": {
            "metadata": {"annotations": {"example.com/note": "kept"}},
            "spec": {"hostname": "worker", "dnsPolicy": "ClusterFirst", "priorityClassName": "strict-test"},
        }})),
    ];
    let specs = choices(&[sources, engines, routes, policies, pods]);
    let base = json!({"apiVersion": baton_crds::API_VERSION, "kind": baton_crds::KIND, "metadata": {"name": "strict"}});
    specs.into_iter().map(|spec| with(base.clone(), &json!({"spec": spec}))).collect()
}

/// The pods that a manifest means, each as it would be made.
fn pods_of(manifest: &Value) -> Result<Vec<Value>> {
    let model: DisaggregatedModel = serde_json::from_value(manifest.clone())?;
    let validated = validate(&model).map_err(|violations| anyhow::anyhow!("{violations:?}: {manifest}"))?;
    let site = Site {
        worker_image: WORKER_IMAGE.to_owned(),
        proxy_image: PROXY_IMAGE.to_owned(),
        kinds: OptionalKind::ALL.into(),
        operator_namespace: None,
    };
    let owner = Owner { namespace: "any".to_owned(), uid: None };
    let roles = desired::roles(&validated).into_iter().map(|role| (role, Certificate::default())).collect();
    let credentials = Credentials { roles, ..Credentials::default() };
    let objects = desired::desired(&validated, &site, &owner, &Plan::first(&validated, &site), &credentials);
    let mut pods = Vec::new();
    for child in objects.children() {
        let paths: &[&str] = match child.kind {
            Kind::Deployment => &["/spec/template"],
            Kind::LeaderWorkerSet => {
                &["/spec/leaderWorkerTemplate/leaderTemplate", "/spec/leaderWorkerTemplate/workerTemplate"]
            }
            _ => &[],
        };
        for path in paths {
            let Some(template) = child.body.pointer(path) else { continue };
            let pod = json!({
                "apiVersion": "v1", "kind": "Pod",
                // Accounts and claims are looked for when a pod is made; who it runs as is not what is asked here.
                "spec": with(template["spec"].clone(), &json!({"serviceAccountName": null})),
            });
            let metadata = with(template["metadata"].clone(), &json!({"generateName": "strict-"}));
            pods.push(with(pod, &json!({"metadata": metadata})));
        }
    }
    ensure!(!pods.is_empty(), "no pods: {manifest}");
    Ok(pods)
}

#[test]
fn pod_security_restricted_takes_every_pod_without_a_warning() -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let class = |version: &str, kind: &str, field: &str, value: Value| json!({"apiVersion": version, "kind": kind, "metadata": {"name": "strict-test"}, field: value});
    stage.admin.apply(Type::PRIORITY_CLASS, "", &class("scheduling.k8s.io/v1", "PriorityClass", "value", json!(7)))?;
    stage.admin.apply(Type::RUNTIME_CLASS, "", &class("node.k8s.io/v1", "RuntimeClass", "handler", json!("runc")))?;
    let namespace = stage.plane.restricted_namespace("strict")?;
    let strict = json!({"metadata": {"labels": {"pod-security.kubernetes.io/warn": "restricted"}}});
    stage.admin.merge(Type::NAMESPACE, "", namespace.name(), "", &strict)?;

    let manifests = manifests();
    let mut pods = BTreeSet::new();
    for manifest in &manifests {
        pods.extend(pods_of(manifest)?.iter().map(ToString::to_string));
    }
    let ask = |pod: &Value| stage.admin.try_create(Type::POD, namespace.name(), pod);
    for text in &pods {
        let warnings = ask(&serde_json::from_str(text)?).with_context(|| format!("refused: {text}"))?;
        ensure!(warnings.is_empty(), "{warnings:?} about {text}");
    }
    // And it would refuse one that asks for more.
    let first: Value = serde_json::from_str(pods.first().context("a pod")?)?;
    let host = with(first, &json!({"spec": {"hostNetwork": true}}));
    let refused = ask(&host).err().context("Pod Security is not on")?;
    ensure!(format!("{refused:#}").contains("violates PodSecurity"), "{refused:#}");
    say(&format!("{} manifests make {} different pods, and restricted takes all", manifests.len(), pods.len()));
    Ok(())
}
