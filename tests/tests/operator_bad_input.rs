//! What only the cluster can know: a manifest that is right by itself and can't be followed here and now.
//!
//! Each case makes one thing wrong in a namespace of its own and looks at four things. The cause becomes a condition with a
//! documented reason within two seconds of being visible in the API, in words that name the thing at fault. Nothing runs hot while
//! it lasts, and one event tells of it. Nobody but the cause's own object need be touched to heal it. And afterwards the status
//! tells the truth of a healthy model.

use anyhow::{Context as _, Result, bail, ensure};
use baton_crds::Reason;
use baton_operator::child::Kind;
use serde_json::{Value, json};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use system_tests::api_faults::Verb;
use system_tests::kube::{LAST_WORDS, Namespace, Tier, say};
use system_tests::operator::manifest::{tiny, with};
use system_tests::operator::model::{Model, condition};
use system_tests::operator::{Installation, PATIENCE, Stage, Type, kinds, wait};

/// From a cause being visible in the API to its condition.
const TOLD_WITHIN: Duration = Duration::from_secs(2);
/// How long each cause is left standing: two rounds of the quickest thing that is looked at again and again.
const BROKEN_FOR: Duration = Duration::from_secs(6);
/// Most reconciles in that time. A hot loop makes dozens; kubelets and controllers that try again make a few.
const RECONCILES_MAX: usize = 12;
/// Most writes of a status in that time: what kubelets and controllers say may change as they try again.
const STATUS_WRITES_MAX: usize = 8;

fn stage() -> Result<Option<Stage>> {
    Stage::shared(Tier::Behaviour { nodes: 1, lws: false })
}

/// One case, running.
struct Place<'a> {
    stage: Stage,
    namespace: &'a str,
    model: Model<'a>,
}

/// How many pods or workloads show something.
type Sightings = Box<dyn Fn(&Place<'_>) -> Result<usize> + Send + Sync>;
type Step = Box<dyn Fn(&Place<'_>) -> Result<()> + Send + Sync>;

/// A condition that tells of a cause.
struct Told {
    condition: &'static str,
    reason: Reason,
    words: Vec<String>,
}

/// One thing that is wrong, and what puts it right.
struct Case {
    /// Of the model, too.
    name: &'static str,
    /// Laid over a manifest that is right.
    spec: Value,
    before: Step,
    /// In how many pods or workloads the cause can be seen in the API; none where it can be seen from the first.
    sightings: Option<Sightings>,
    told: Vec<Told>,
    cure: Step,
    /// Beyond that the model is as healthy as any.
    healed: Step,
}

impl Case {
    fn new(name: &'static str, spec: Value) -> Self {
        Case {
            name,
            spec,
            before: Box::new(|_| Ok(())),
            sightings: None,
            told: Vec::new(),
            cure: Box::new(|_| Ok(())),
            healed: Box::new(healthy),
        }
    }

    fn before(self, step: impl Fn(&Place<'_>) -> Result<()> + Send + Sync + 'static) -> Self {
        Case { before: Box::new(step), ..self }
    }

    fn seen_in(self, count: impl Fn(&Place<'_>) -> Result<usize> + Send + Sync + 'static) -> Self {
        Case { sightings: Some(Box::new(count)), ..self }
    }

    /// Whether the cause can be seen of every role that is to tell of it.
    fn is_visible(&self, place: &Place<'_>) -> Result<bool> {
        let roles = self.told.iter().filter(|told| ["PrefillReady", "DecodeReady"].contains(&told.condition)).count();
        self.sightings.as_ref().map_or(Ok(true), |count| Ok(count(place)? >= roles))
    }

    fn told(mut self, condition: &'static str, reason: Reason, words: &[&str]) -> Self {
        self.told.push(Told { condition, reason, words: words.iter().map(|&word| word.to_owned()).collect() });
        self
    }

    fn cure(self, step: impl Fn(&Place<'_>) -> Result<()> + Send + Sync + 'static) -> Self {
        Case { cure: Box::new(step), ..self }
    }

    fn healed(self, step: impl Fn(&Place<'_>) -> Result<()> + Send + Sync + 'static) -> Self {
        Case { healed: Box::new(step), ..self }
    }
}

/// A model whose weights are in an image, so that it needs nothing beside it.
fn right(name: &str) -> Value {
    with(
        tiny(name),
        &json!({"spec": {
            "model": {"uri": "oci://registry.example.com/models/tiny:1"},
            // Another case installs the kind while this one runs.
            "observability": {"monitor": "None"},
        }}),
    )
}

/// Runs cases at the same time, each in a namespace of its own, under one operator.
fn run(cases: &[Case]) -> Result<()> {
    let Some(stage) = stage()? else { return Ok(()) };
    let mut installation = Installation::for_all_namespaces(stage.plane, stage.admin, "cause")?;
    let namespaces: Vec<Namespace> =
        cases.iter().map(|case| stage.plane.restricted_namespace(case.name)).collect::<Result<_>>()?;
    let names: Vec<&str> = namespaces.iter().map(Namespace::name).collect();
    installation.flags = vec!["--watch-namespaces".to_owned(), names.join(",")];
    let mut operator = installation.started()?;

    // One model at a time is on its way from its cause to its condition: what is measured is not how many others there are.
    let turn = Mutex::new(());
    let failed: Vec<String> = std::thread::scope(|scope| {
        let (installation, turn) = (&installation, &turn);
        let running: Vec<_> = cases
            .iter()
            .zip(&names)
            .map(|(case, namespace)| {
                let place = Place { stage, namespace, model: Model::new(stage.admin, namespace, case.name) };
                scope.spawn(move || {
                    live(case, &place, installation, turn).map_err(|error| format!("{}: {error:#}", case.name))
                })
            })
            .collect();
        running
            .into_iter()
            .filter_map(|case| case.join().unwrap_or_else(|_| Err("panicked".to_owned())).err())
            .collect()
    });
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    ensure!(operator.ended()?.is_none(), "the operator has ended");
    let metrics = operator.metrics()?;
    ensure!(metrics.sum("baton_operator_panics_total") == 0.0, "a reconcile panicked");
    Ok(())
}

fn live(case: &Case, place: &Place<'_>, installation: &Installation<'_>, turn: &Mutex<()>) -> Result<()> {
    (case.before)(place)?;
    let late = {
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        place.model.apply(&with(right(case.name), &json!({"spec": case.spec})))?;
        until_told(case, place)?
    };

    let mark = installation.proxy.mark();
    // Nothing to wait for: that little happens is what is looked at.
    std::thread::park_timeout(BROKEN_FOR);
    let log: Vec<_> = installation.proxy.since(mark);
    let own = || log.iter().filter(|one| one.request.namespace == place.namespace);
    let reconciles =
        own().filter(|one| one.request.verb == Verb::Get && one.request.resource == "disaggregatedmodels").count();
    let writes = || own().filter(|one| one.request.is_write() && !one.request.is_event());
    let of_status = writes().filter(|one| one.request.subresource == "status").count();
    ensure!(reconciles <= RECONCILES_MAX, "{reconciles} reconciles in {BROKEN_FOR:?}");
    ensure!(of_status <= STATUS_WRITES_MAX, "{of_status} writes of the status in {BROKEN_FOR:?}");
    // What is refused may be tried again; nothing that was taken is written again.
    let others: Vec<String> = writes()
        .filter(|one| one.request.subresource != "status" && one.code.is_some_and(|code| code < 300))
        .map(ToString::to_string)
        .collect();
    ensure!(others.is_empty(), "written while nothing changed: {others:#?}");
    told(case, &place.model.object()?).context("after a while")?;
    events(case, place)?;

    let begun = Instant::now();
    (case.cure)(place)?;
    (case.healed)(place)?;
    say(&format!(
        "{:<16} told {:>4} ms after the cause, {reconciles} reconciles and {of_status} status writes in {} s, healed in {:.1} s",
        case.name,
        late.as_millis(),
        BROKEN_FOR.as_secs(),
        begun.elapsed().as_secs_f64(),
    ));
    Ok(())
}

/// Waits until the status tells of the cause; how long after the cause could be seen that was.
fn until_told(case: &Case, place: &Place<'_>) -> Result<Duration> {
    let mut visible = None;
    let told_at = wait(PATIENCE, "the status tells of the cause", || {
        if visible.is_none() && case.is_visible(place)? {
            visible = Some(Instant::now());
        }
        told(case, &place.model.object()?)?;
        Ok(Some(Instant::now()))
    })?;
    let visible = match visible {
        Some(visible) => visible,
        // Told before we looked.
        None => told_at,
    };
    let late = told_at.saturating_duration_since(visible);
    ensure!(late <= TOLD_WITHIN, "told {late:?} after the cause was visible");
    Ok(late)
}

/// Whether the status tells of the cause, and is a true one.
fn told(case: &Case, object: &Value) -> Result<()> {
    let (status, generation) = (&object["status"], &object["metadata"]["generation"]);
    ensure!(status["observedGeneration"] == *generation, "the status is of an older generation");
    for told in &case.told {
        let found = condition(object, told.condition).with_context(|| format!("no condition {}", told.condition))?;
        ensure!(found.status != "True" && found.reason == told.reason.as_str(), "{}: {found:?}", told.condition);
        for word in &told.words {
            ensure!(found.message.contains(word), "{} does not say {word:?}: {}", told.condition, found.message);
        }
    }
    for found in status["conditions"].as_array().context("conditions")? {
        let reason = found["reason"].as_str().unwrap_or_default();
        ensure!(Reason::ALL.iter().any(|listed| listed.as_str() == reason), "{reason} is not a documented reason");
        ensure!(found["observedGeneration"] == *generation, "{found} is of an older generation");
        ensure!(found["message"].as_str().is_some_and(|message| !message.is_empty()), "{found} says nothing");
    }
    let ready = condition(object, "Ready").context("no condition Ready")?;
    ensure!(ready.status == "False", "Ready: {ready:?}");
    // kstatus: Stalled is there, and True, exactly while nothing more happens until a person acts.
    let stalls = case.told.iter().map(|told| told.reason).find(|reason| reason.stalls());
    let stalled = condition(object, "Stalled");
    match (stalls, &stalled) {
        (None, None) => {}
        (Some(reason), Some(found)) if found.status == "True" && found.reason == reason.as_str() => {
            let progressing = condition(object, "Progressing").context("no condition Progressing")?;
            ensure!(progressing.status == "False", "Progressing while Stalled: {progressing:?}");
        }
        _ => bail!("Stalled is {stalled:?}, with {stalls:?}"),
    }
    Ok(())
}

/// One event for each condition that told of a cause, at most; one at least for a cause that a person must see to.
fn events(case: &Case, place: &Place<'_>) -> Result<()> {
    let object = place.model.object()?;
    let all = place.stage.admin.list(Type::EVENT, place.namespace, "")?;
    for told in &case.told {
        let reason = told.reason.as_str();
        let of_reason = all
            .iter()
            .filter(|event| event["regarding"]["kind"] == baton_crds::KIND && event["regarding"]["name"] == case.name)
            .filter(|event| event["reason"] == reason);
        let times: u64 = of_reason.map(|event| event["series"]["count"].as_u64().unwrap_or(1)).sum();
        let conditions = object["status"]["conditions"].as_array().context("conditions")?;
        let telling = conditions.iter().filter(|one| one["reason"] == reason).count() as u64;
        ensure!(times <= telling, "{times} events of {reason} by {telling} conditions: {all:#?}");
        let needs_a_person = !matches!(told.reason, Reason::PodsNotReady | Reason::EngineStarting);
        ensure!(!needs_a_person || times > 0, "no event of {reason}");
    }
    Ok(())
}

/// The model serves, and each field of its status says so.
fn healthy(place: &Place<'_>) -> Result<()> {
    wait(PATIENCE, "the model is healthy", || {
        let object = place.model.object()?;
        let status = &object["status"];
        ensure!(status["observedGeneration"] == object["metadata"]["generation"], "of an older generation");
        for kind in ["Accepted", "ModelAvailable", "PrefillReady", "DecodeReady", "RoutingReady", "Ready"] {
            let found = condition(&object, kind).with_context(|| format!("no condition {kind}"))?;
            ensure!(found.status == "True", "{kind}: {found:?}");
        }
        ensure!(condition(&object, "Stalled").is_none(), "still Stalled");
        let progressing = condition(&object, "Progressing").context("no condition Progressing")?;
        ensure!(progressing.status == "False" && progressing.reason == "Settled", "{progressing:?}");
        for role in status["roles"].as_array().context("roles")? {
            for count in ["desiredReplicas", "replicas", "updatedReplicas", "readyReplicas", "availableReplicas"] {
                ensure!(role[count] == 1, "{count} of {role}");
            }
        }
        ensure!(status["roles"].as_array().is_some_and(|roles| roles.len() == 2), "{}", status["roles"]);
        ensure!(status["summary"] == json!({"prefill": "1/1", "decode": "1/1"}), "{}", status["summary"]);
        let url = format!("http://{}.{}.svc:8000", place.model.name, place.namespace);
        ensure!(status["url"] == url.as_str(), "{}", status["url"]);
        ensure!(status["updateRevision"].is_null(), "{}", status["updateRevision"]);
        // Words of pods that are gone are gone with them; a pod that works now may keep those of its first tries.
        Ok(Some(()))
    })
}

fn secret(name: &str, key: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name},
        "stringData": {key: "a value"},
    })
}

fn pods(place: &Place<'_>) -> Result<Vec<Value>> {
    let selector = format!("{}={}", baton_crds::labels::MODEL, place.model.name);
    place.stage.admin.list(Type::POD, place.namespace, &selector)
}

/// A pod's container waits for one of these reasons, or has ended with an error.
fn container_fails(reasons: &'static [&'static str]) -> impl Fn(&Place<'_>) -> Result<usize> + Send + Sync {
    move |place| {
        let fails = |container: &Value| {
            let waits =
                container["state"]["waiting"]["reason"].as_str().is_some_and(|reason| reasons.contains(&reason));
            let ended = ["state", "lastState"]
                .iter()
                .any(|state| container[*state]["terminated"]["exitCode"].as_u64().is_some_and(|code| code != 0));
            waits || ended
        };
        let of_pod = |pod: &Value| {
            let lists = ["initContainerStatuses", "containerStatuses"];
            lists.iter().any(|list| pod["status"][*list].as_array().into_iter().flatten().any(fails))
        };
        Ok(pods(place)?.iter().filter(|pod| of_pod(pod)).count())
    }
}

/// The scheduler says of a pod why no node takes it.
fn unscheduled(words: &'static str) -> impl Fn(&Place<'_>) -> Result<usize> + Send + Sync {
    move |place| {
        let says = |condition: &Value| {
            condition["type"] == "PodScheduled"
                && condition["status"] == "False"
                && condition["message"].as_str().is_some_and(|message| message.contains(words))
        };
        let of_pod = |pod: &Value| pod["status"]["conditions"].as_array().into_iter().flatten().any(says);
        Ok(pods(place)?.iter().filter(|pod| of_pod(pod)).count())
    }
}

/// A Deployment says in the API server's words why it can't make pods.
fn pods_refused(words: &'static str) -> impl Fn(&Place<'_>) -> Result<usize> + Send + Sync {
    move |place| {
        let says = |condition: &Value| {
            condition["type"] == "ReplicaFailure"
                && condition["message"].as_str().is_some_and(|message| message.contains(words))
        };
        let of = |deployment: &Value| deployment["status"]["conditions"].as_array().into_iter().flatten().any(says);
        let selector = format!("{}={}", baton_crds::labels::MODEL, place.model.name);
        Ok(place.stage.admin.list(Type::DEPLOYMENT, place.namespace, &selector)?.iter().filter(|one| of(one)).count())
    }
}

/// Limits what a namespace may hold, and waits until that is in force.
fn quota(hard: Value) -> impl Fn(&Place<'_>) -> Result<()> + Send + Sync {
    move |place| {
        let object = json!({
            "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "limits"}, "spec": {"hard": hard},
        });
        place.stage.admin.apply(Type::QUOTA, place.namespace, &object)?;
        wait(PATIENCE, "the quota is in force", || {
            let quota = place.stage.admin.need(Type::QUOTA, place.namespace, "limits")?;
            Ok((quota["status"]["hard"] == hard).then_some(()))
        })
    }
}

/// A claim of 1 Gi, bound where there is a volume for it.
fn claim(place: &Place<'_>, name: &str) -> Result<()> {
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadOnlyMany"], "storageClassName": "none",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    });
    place.stage.admin.apply(Type::CLAIM, place.namespace, &claim)?;
    Ok(())
}

fn volume(place: &Place<'_>, claim: &str) -> Result<()> {
    let volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": format!("{claim}-{}", place.namespace)},
        "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadOnlyMany"], "storageClassName": "none",
            "persistentVolumeReclaimPolicy": "Retain", "hostPath": {"path": "/var/empty"},
            "claimRef": {"namespace": place.namespace, "name": claim},
        },
    });
    place.stage.admin.apply(Type::VOLUME, "", &volume)?;
    Ok(())
}

fn apply(resource: Type, object: Value) -> impl Fn(&Place<'_>) -> Result<()> + Send + Sync {
    move |place| {
        let namespace = if resource.is_namespaced { place.namespace } else { "" };
        place.stage.admin.apply(resource, namespace, &object)?;
        Ok(())
    }
}

fn patch(spec: Value) -> impl Fn(&Place<'_>) -> Result<()> + Send + Sync {
    move |place| place.model.patch(&spec).map(|_| ())
}

#[test]
fn a_secret_or_a_claim_that_is_missing_is_told_by_name_and_healed_by_making_it() -> Result<()> {
    let hub = |secret: &str| json!({"model": {"uri": "hf://org/Tiny", "credentialsSecretRef": {"name": secret}}});
    run(&[
        Case::new("no-secret", hub("hub"))
            .told("ModelAvailable", Reason::CredentialsMissing, &["Secret hub", "create it"])
            .told("PrefillReady", Reason::ConfigurationMissing, &["Secret hub"])
            .told("DecodeReady", Reason::ConfigurationMissing, &["Secret hub"])
            .cure(apply(Type::SECRET, secret("hub", "HF_TOKEN"))),
        Case::new("no-key", hub("hub"))
            .before(apply(Type::SECRET, secret("hub", "TOKEN")))
            .seen_in(container_fails(&["CreateContainerConfigError"]))
            .told("DecodeReady", Reason::ConfigurationMissing, &["HF_TOKEN", "hub"])
            .told("PrefillReady", Reason::ConfigurationMissing, &["HF_TOKEN", "hub"])
            .cure(apply(Type::SECRET, secret("hub", "HF_TOKEN"))),
        Case::new(
            "no-env-secret",
            json!({"decode": {"env": [{"name": "TOKEN", "secretKeyRef": {"name": "users", "key": "token"}}]}}),
        )
        .seen_in(container_fails(&["CreateContainerConfigError"]))
        .told("DecodeReady", Reason::ConfigurationMissing, &["users"])
        .cure(apply(Type::SECRET, secret("users", "token"))),
        Case::new("no-claim", json!({"model": {"uri": "pvc://absent/tiny"}}))
            .told("ModelAvailable", Reason::VolumeMissing, &["PersistentVolumeClaim absent", "create it"])
            .told("PrefillReady", Reason::VolumeMissing, &["PersistentVolumeClaim absent"])
            .told("DecodeReady", Reason::VolumeMissing, &["PersistentVolumeClaim absent"])
            .cure(|place| {
                volume(place, "absent")?;
                claim(place, "absent")
            }),
        Case::new("unbound-claim", json!({"model": {"uri": "pvc://unbound/tiny"}}))
            .before(|place| claim(place, "unbound"))
            .seen_in(unscheduled("unbound immediate PersistentVolumeClaims"))
            .told("ModelAvailable", Reason::VolumeMissing, &["unbound"])
            .told("DecodeReady", Reason::VolumeMissing, &["claim unbound"])
            .cure(|place| volume(place, "unbound")),
    ])
}

#[test]
fn what_a_namespace_does_not_allow_is_told_in_the_api_servers_words_and_healed_by_allowing_it() -> Result<()> {
    let host_path = json!({"decode": {"volumes": [{"name": "host", "hostPath": {"path": "/var/empty"}}]}});
    run(&[
        Case::new("no-pods-left", json!({}))
            .before(quota(json!({"pods": "0"})))
            .seen_in(pods_refused("exceeded quota"))
            .told("PrefillReady", Reason::QuotaExceeded, &["exceeded quota: limits"])
            .told("DecodeReady", Reason::QuotaExceeded, &["exceeded quota: limits"])
            .cure(quota(json!({"pods": "8"}))),
        Case::new("too-large", json!({"decode": {"resources": {"limits": {"memory": "64Gi"}}}}))
            .before(apply(
                Type::LIMIT_RANGE,
                json!({
                    "apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"},
                    "spec": {"limits": [{"type": "Container", "max": {"memory": "32Gi"}, "default": {"memory": "1Gi"}}]},
                }),
            ))
            .seen_in(pods_refused("maximum memory usage"))
            .told("DecodeReady", Reason::PodsRefused, &["maximum memory usage", "32Gi"])
            .cure(|place| place.stage.admin.delete(Type::LIMIT_RANGE, place.namespace, "small")),
        Case::new("no-priority", json!({"decode": {"priorityClassName": "absent-priority"}}))
            .seen_in(pods_refused("absent-priority"))
            .told("DecodeReady", Reason::PodsRefused, &["absent-priority"])
            .cure(apply(
                Type::PRIORITY_CLASS,
                json!({
                    "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "absent-priority"},
                    "value": 7,
                }),
            )),
        Case::new("no-runtime", json!({"decode": {"runtimeClassName": "absent-runtime"}}))
            .seen_in(pods_refused("absent-runtime"))
            .told("DecodeReady", Reason::PodsRefused, &["absent-runtime"])
            .cure(apply(
                Type::RUNTIME_CLASS,
                json!({
                    "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "absent-runtime"},
                    "handler": "runc",
                }),
            )),
        Case::new("pod-security", host_path)
            .seen_in(pods_refused("violates PodSecurity"))
            .told("DecodeReady", Reason::PodsRefused, &["violates PodSecurity", "hostPath"])
            .cure(|place| {
                let labels = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}});
                place.stage.admin.merge(Type::NAMESPACE, "", place.namespace, "", &labels)?;
                Ok(())
            }),
    ])
}

#[test]
fn pods_that_find_no_node_or_do_not_run_are_told_with_their_last_words_and_healed_by_the_correction() -> Result<()> {
    let image = |word: &str| json!({"engine": {"image": format!("registry.example.com/worker-{word}:1")}});
    let correction = || patch(json!({"engine": {"image": "registry.example.com/worker:2"}}));
    run(&[
        Case::new("no-gpus", json!({"decode": {"gpu": {"count": 16}}}))
            .seen_in(unscheduled("Insufficient nvidia.com/gpu"))
            .told("DecodeReady", Reason::InsufficientCapacity, &["Insufficient nvidia.com/gpu"])
            .cure(patch(json!({"decode": {"gpu": {"count": 1}}}))),
        Case::new("no-node", json!({"decode": {"nodeSelector": {"example.com/rack": "far"}}}))
            .seen_in(unscheduled("node affinity/selector"))
            .told("DecodeReady", Reason::InsufficientCapacity, &["node affinity/selector"])
            .cure(|place| {
                let nodes = place.stage.admin.list(Type::NODE, "", "")?;
                let node = nodes[0]["metadata"]["name"].as_str().context("a node")?;
                let labels = json!({"metadata": {"labels": {"example.com/rack": "far"}}});
                place.stage.admin.merge(Type::NODE, "", node, "", &labels)?;
                Ok(())
            }),
        Case::new("no-image", image("never-pulls"))
            .seen_in(container_fails(&["ErrImagePull", "ImagePullBackOff"]))
            .told("PrefillReady", Reason::ImagePullFailed, &["registry.example.com/worker-never-pulls:1"])
            .told("DecodeReady", Reason::ImagePullFailed, &["registry.example.com/worker-never-pulls:1", "not found"])
            .cure(correction()),
        Case::new("crash-loop", image("crashes"))
            .seen_in(container_fails(&["CrashLoopBackOff"]))
            .told("PrefillReady", Reason::EngineCrashLooping, &["container engine", "exit code 1", LAST_WORDS])
            .told("DecodeReady", Reason::EngineCrashLooping, &["container engine", "exit code 1", LAST_WORDS])
            .cure(move |place| {
                let last = place.model.object()?["status"]["lastErrors"].clone();
                let errors = last.as_array().context("lastErrors")?;
                // Pods that fail alike are told once for each role.
                ensure!(errors.len() == 2, "{last}");
                for error in errors {
                    ensure!(error["container"] == "engine" && error["reason"] == "EngineCrashLooping", "{error}");
                    ensure!(error["message"].as_str().is_some_and(|said| said.contains(LAST_WORDS)), "{error}");
                }
                correction()(place)
            })
            .healed(|place| {
                healthy(place)?;
                wait(PATIENCE, "the last words went with their pods", || {
                    let last = place.model.object()?["status"]["lastErrors"].clone();
                    ensure!(last.as_array().is_none_or(Vec::is_empty), "{last}");
                    Ok(Some(()))
                })
            }),
        Case::new("never-ready", image("never-ready"))
            .seen_in(|place| {
                let runs =
                    |container: &Value| container["name"] == "engine" && container["state"]["running"].is_object();
                let of_pod =
                    |pod: &Value| pod["status"]["containerStatuses"].as_array().into_iter().flatten().any(runs);
                Ok(pods(place)?.iter().filter(|pod| of_pod(pod)).count())
            })
            .told("PrefillReady", Reason::PodsNotReady, &["the engine runs and does not take work"])
            .told("DecodeReady", Reason::PodsNotReady, &["the engine runs and does not take work"])
            .cure(correction()),
    ])
}

#[test]
fn a_kind_that_is_absent_a_name_that_is_taken_and_a_quota_on_objects_are_told_until_they_are_put_right() -> Result<()> {
    let wide = json!({
        "engine": {"type": "VLLM", "image": "registry.example.com/vllm:1"},
        "prefill": {"nodesPerReplica": 2}, "decode": {"nodesPerReplica": 2},
    });
    run(&[
        Case::new("no-lws", wide)
            .told("Accepted", Reason::CrdNotInstalled, &["LeaderWorkerSet", "nodesPerReplica", "install it"])
            .told("PrefillReady", Reason::CrdNotInstalled, &["LeaderWorkerSet"])
            .told("DecodeReady", Reason::CrdNotInstalled, &["LeaderWorkerSet"])
            .cure(|place| place.stage.plane.install_crds(&kinds::leader_worker_set(place.stage.plane)?))
            // Nobody makes pods of it here, so that they are asked for is all that there is to see.
            .healed(|place| {
                place.model.wait_condition(PATIENCE, "Accepted", "True", "Accepted")?;
                let decode = place.model.condition("DecodeReady")?.context("no condition DecodeReady")?;
                ensure!(decode.reason == "WaitingForPods", "{decode:?}");
                let routing = place.model.condition("RoutingReady")?.context("no condition RoutingReady")?;
                ensure!(routing.reason == "WaitingForPair", "{routing:?}");
                ensure!(place.model.condition("Stalled")?.is_none(), "Stalled still stands");
                let model = Model::with_lws(place.stage.admin, place.namespace, place.model.name);
                let sets = model.children()?.into_keys().filter(|(kind, _)| *kind == Kind::LeaderWorkerSet).count();
                ensure!(sets == 2, "{sets} LeaderWorkerSets");
                Ok(())
            }),
        Case::new("no-monitor", json!({"observability": {"monitor": "PodMonitor"}}))
            .told("Accepted", Reason::CrdNotInstalled, &["PodMonitor", "spec.observability.monitor", "install it"])
            .cure(|place| place.stage.plane.install_crds(&kinds::pod_monitor()))
            .healed(|place| {
                healthy(place)?;
                place.stage.admin.need(Type::of_child(Kind::PodMonitor), place.namespace, "no-monitor")?;
                Ok(())
            }),
        Case::new("no-budgets-left", json!({}))
            .before(quota(json!({"count/poddisruptionbudgets.policy": "0"})))
            .told(
                "Accepted",
                Reason::QuotaExceeded,
                &["PodDisruptionBudget no-budgets-left-", "exceeded quota: limits"],
            )
            .cure(quota(json!({"count/poddisruptionbudgets.policy": "8"}))),
        Case::new("name-taken", json!({}))
            .before(apply(
                Type::SERVICE,
                json!({
                    "apiVersion": "v1", "kind": "Service", "metadata": {"name": "name-taken"},
                    "spec": {"selector": {"app": "theirs"}, "ports": [{"port": 80}]},
                }),
            ))
            .told("Accepted", Reason::NameTaken, &["Service name-taken", "belongs to nobody", "left alone"])
            .cure(|place| {
                let theirs = place.stage.admin.need(Type::SERVICE, place.namespace, "name-taken")?;
                ensure!(theirs["spec"]["selector"] == json!({"app": "theirs"}), "taken over: {theirs}");
                place.stage.admin.delete(Type::SERVICE, place.namespace, "name-taken")
            }),
    ])
}
