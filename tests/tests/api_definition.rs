//! The definition of DisaggregatedModel on a real API server: it is taken, fills in what it documents, refuses what its rules refuse
//! in words that name field and cure, and says the same of every manifest as the offline check (`baton check -f`).

use anyhow::{Context as _, Result, bail, ensure};
use baton_crds::rules::{self, Rule};
use baton_operator::validate::validate_object;
use baton_operator::{Violation, manifest};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use system_tests::kube::{Namespace, Tier, say};
use system_tests::mutate::{self, Field, Mutator, set};
use system_tests::operator::manifest::with;
use system_tests::operator::{PATIENCE, Stage, Type, definition, wait};
use system_tests::repo;

/// Random manifests on which the API server and the offline check must agree.
const RANDOM_MANIFESTS: usize = 600;
/// Of them at least so many must be refused, and as many accepted: else the draw says nothing.
const OF_EACH_VERDICT: usize = 100;

struct Api {
    stage: Stage,
    namespace: Namespace,
}

impl Api {
    fn new(prefix: &str) -> Result<Option<Self>> {
        let Some(stage) = Stage::shared(Tier::Api)? else { return Ok(None) };
        Ok(Some(Api { stage, namespace: stage.plane.namespace(prefix)? }))
    }

    /// What the API server makes of a manifest, as kubectl asks it, without keeping it.
    fn ask(&self, object: &Value) -> Result<Result<Value, Refusal>> {
        let path = format!(
            "/apis/baton.dev/v1alpha1/namespaces/{}/disaggregatedmodels?dryRun=All&fieldValidation=Strict",
            self.namespace.name()
        );
        match self.stage.admin.raw("POST", &path, Some(object)) {
            Ok(made) => Ok(Ok(made)),
            Err(kube::Error::Api(status)) if matches!(status.code, 400 | 422) => {
                let causes = status.details.as_ref().map(|details| details.causes.clone()).unwrap_or_default();
                let causes = causes.into_iter().map(|cause| (cause.field, cause.message)).collect();
                Ok(Err(Refusal { message: status.message.clone(), causes }))
            }
            Err(error) => Err(error.into()),
        }
    }

    #[track_caller]
    fn taken(&self, object: &Value) -> Value {
        match self.ask(object).expect("the API server answers") {
            Ok(made) => made,
            Err(refusal) => panic!("{object}\n{}", refusal.message),
        }
    }
}

/// The API server's words against a manifest.
#[derive(Debug)]
struct Refusal {
    message: String,
    /// Fields and what is said of each.
    causes: Vec<(String, String)>,
}

/// A manifest with nothing in it that could be left out.
fn minimal() -> Value {
    json!({
        "apiVersion": baton_crds::API_VERSION,
        "kind": baton_crds::KIND,
        "metadata": {"name": "tiny"},
        "spec": {"model": {"uri": "pvc://models/tiny"}},
    })
}

fn model(spec: &Value) -> Value {
    with(minimal(), &json!({ "spec": spec }))
}

fn offline(object: &Value) -> Vec<Violation> {
    validate_object(object).err().unwrap_or_default()
}

fn fields() -> Vec<Field> {
    mutate::fields(&mutate::schema())
}

#[test]
fn the_definition_is_established_structural_and_small() -> Result<()> {
    let Some(api) = Api::new("established")? else { return Ok(()) };
    let text = definition()?;
    ensure!(text.len() < 100 * 1024, "{} bytes", text.len());
    let name = "disaggregatedmodels.baton.dev";
    let crd = wait(PATIENCE, "the definition is established", || {
        let crd = api.stage.admin.need(Type::DEFINITION, "", name)?;
        let conditions = crd["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let is = |kind: &str| conditions.iter().any(|one| one["type"] == kind && one["status"] == "True");
        ensure!(is("Established") && is("NamesAccepted"), "{conditions:?}");
        ensure!(!is("NonStructuralSchema"), "{conditions:?}");
        Ok(Some(crd))
    })?;
    ensure!(crd["status"]["acceptedNames"]["shortNames"] == json!(["dm"]), "{}", crd["status"]["acceptedNames"]);
    say(&format!("the definition has {} bytes", text.len()));
    Ok(())
}

#[test]
fn every_manifest_in_examples_is_taken_here_and_offline() -> Result<()> {
    let Some(api) = Api::new("examples")? else { return Ok(()) };
    let mut count = 0;
    for entry in std::fs::read_dir(repo::root().join("examples"))? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = std::fs::read_to_string(&path)?;
        manifest::read_one(&text).with_context(|| path.display().to_string())?;
        api.taken(&serde_yaml::from_str(&text)?);
        count += 1;
    }
    ensure!(count >= 2, "{count} examples");
    Ok(())
}

/// What must be around a field for its example to be right.
fn around(field: &str) -> Value {
    let foreign = json!({"engine": {"type": "VLLM", "image": "registry.example.com/vllm:v1"}});
    let from_hub = json!({"model": {"uri": "hf://org/repo"}});
    match field {
        "spec.model.region" => return json!({"model": {"uri": "s3://bucket/prefix"}}),
        "spec.model.cache.type" | "spec.model.cache.claimName" => {
            let cache = json!({"type": "PersistentVolumeClaim", "claimName": "cache"});
            return with(from_hub, &json!({"model": {"cache": cache}}));
        }
        "spec.engine.type" => return foreign,
        "spec.disaggregation.policy" => return json!({"disaggregation": {"minUncachedPromptTokens": 64}}),
        "spec.disaggregation.minUncachedPromptTokens" => return json!({"disaggregation": {"policy": "Conditional"}}),
        _ => {}
    }
    if ["revision", "credentialsSecretRef", "endpoint", "cache"]
        .iter()
        .any(|part| field.starts_with(&format!("spec.model.{part}")))
    {
        return from_hub;
    }
    if field.starts_with("spec.routing.standalone") {
        return json!({"routing": {"mode": "Standalone"}});
    }
    for role in ["prefill", "decode"] {
        let Some(rest) = field.strip_prefix(&format!("spec.{role}.")) else { continue };
        let of_role = match rest {
            "nodesPerReplica" => return foreign,
            "env[0].name" => json!({"env": [{"name": "A", "value": "a"}]}),
            "resourceClaims[0].name" => json!({"resourceClaims": [{"name": "a", "resourceClaimName": "b"}]}),
            "tolerations[0].value" => json!({"tolerations": [{"key": "a"}]}),
            "tolerations[0].effect" => json!({"tolerations": [{"key": "a"}]}),
            "tolerations[0].tolerationSeconds" => json!({"tolerations": [{"key": "a", "effect": "NoExecute"}]}),
            _ if rest.starts_with("volumeMounts") => json!({"volumes": [{"name": "scratch", "emptyDir": {}}]}),
            _ => json!({}),
        };
        return json!({ role: of_role });
    }
    json!({})
}

#[test]
fn every_example_in_a_fields_description_is_taken_here_and_offline() -> Result<()> {
    let Some(api) = Api::new("fields")? else { return Ok(()) };
    let schema = mutate::schema();
    let mut count = 0;
    for field in fields() {
        let Some(example) = field.example() else { continue };
        let name = field.name();
        let mut object = model(&around(&name));
        ensure!(set(&mut object, &schema, &field.path, example), "{name} has no place in {object}");
        if let Err(refusal) = api.ask(&object)? {
            bail!("the example of {name}: {}\n{object}", refusal.message);
        }
        let violations = offline(&object);
        ensure!(violations.is_empty(), "the example of {name}, offline: {violations:?}\n{object}");
        count += 1;
    }
    ensure!(count > 120, "only {count} examples");
    say(&format!("{count} examples of fields are taken"));
    Ok(())
}

/// A manifest in which every optional object and list has one entry.
fn with_everything() -> Value {
    let role = json!({
        "gpu": {"count": 1},
        "disruption": {},
        "tolerations": [{"key": "a"}],
        "topologySpread": [{"topologyKey": "zone"}],
    });
    model(&json!({
        "model": {"uri": "hf://org/repo", "cache": {}},
        "prefill": role,
        "decode": role,
        "routing": {"mode": "Standalone", "standalone": {}},
        "placement": {"colocation": {"topologyKey": "zone"}},
    }))
}

#[test]
fn defaults_are_filled_in_as_the_descriptions_say() -> Result<()> {
    let Some(api) = Api::new("defaults")? else { return Ok(()) };
    let made = [api.taken(&minimal()), api.taken(&with_everything())];
    let mut count = 0;
    for field in fields() {
        let Some(default) = field.schema.get("default") else { continue };
        let pointer: String = field.path.iter().map(|step| format!("/{}", step.replace("[]", "0"))).collect();
        let found: Vec<&Value> = made.iter().filter_map(|object| object.pointer(&pointer)).collect();
        ensure!(!found.is_empty(), "{} is in neither manifest", field.name());
        let description = field.schema["description"].as_str().unwrap_or_default();
        if !default.is_object() {
            ensure!(found.contains(&default), "{}: {found:?}, not {default}", field.name());
            let said = default.as_str().map_or_else(|| default.to_string(), str::to_owned);
            ensure!(description.contains(&format!("Default: `{said}`")), "{}: {description}", field.name());
        }
        count += 1;
    }
    ensure!(count > 25, "only {count} defaults");
    say(&format!("{count} defaults are filled in as documented"));
    Ok(())
}

/// Each rule with a spec that breaks it, and the field at fault.
fn broken_rules() -> Vec<(Rule, Value, &'static str)> {
    let decode = |role: Value| json!({ "decode": role });
    let hub = |more: Value| with(json!({"model": {"uri": "hf://org/repo"}}), &json!({ "model": more }));
    let foreign = |more: Value| with(json!({"engine": {"type": "VLLM", "image": "a/b:c"}}), &more);
    vec![
        (rules::MODEL_URI, json!({"model": {"uri": "pvc://a/../b"}}), "spec.model.uri"),
        (rules::REVISION, hub(json!({"revision": "a..b"})), "spec.model.revision"),
        (rules::SERVED_NAME, json!({"model": {"servedName": "/x"}}), "spec.model.servedName"),
        (rules::ENDPOINT, hub(json!({"endpoint": "minio:9000"})), "spec.model.endpoint"),
        (rules::REVISION_WITH_HF, json!({"model": {"revision": "main"}}), "spec.model.revision"),
        (
            rules::CREDENTIALS_NOT_WITH_CLAIM,
            json!({"model": {"credentialsSecretRef": {"name": "a"}}}),
            "spec.model.credentialsSecretRef",
        ),
        (rules::ENDPOINT_WITH_DOWNLOAD, json!({"model": {"endpoint": "https://a"}}), "spec.model.endpoint"),
        (rules::REGION_WITH_S3, hub(json!({"region": "eu-central-1"})), "spec.model.region"),
        (rules::CACHE_WITH_DOWNLOAD, json!({"model": {"cache": {}}}), "spec.model.cache"),
        (rules::CLAIM_NAME_WITH_CLAIM, hub(json!({"cache": {"claimName": "a"}})), "spec.model.cache.claimName"),
        (
            rules::SIZE_LIMIT_WITH_EMPTY_DIR,
            hub(json!({"cache": {"type": "PersistentVolumeClaim", "claimName": "a", "sizeLimit": "1Gi"}})),
            "spec.model.cache.sizeLimit",
        ),
        (rules::IMAGE_WITH_FOREIGN, json!({"engine": {"type": "SGLang"}}), "spec.engine.image"),
        (rules::DTYPE_WITH_BATON, foreign(json!({"engine": {"dtype": "F16"}})), "spec.engine.dtype"),
        (rules::LENGTH_WITH_BATON, foreign(json!({"engine": {"maxModelLength": 64}})), "spec.engine.maxModelLength"),
        (rules::ARGS_NOT_OURS, json!({"engine": {"args": ["--role=decode"]}}), "spec.engine.args"),
        (rules::MEMORY, decode(json!({"kvCacheMemory": "0Mi"})), "spec.decode.kvCacheMemory"),
        (
            rules::REPLICAS_OR_AUTOSCALING,
            decode(json!({"replicas": 1, "autoscaling": {"provider": "External"}})),
            "spec.decode.autoscaling",
        ),
        (rules::CHUNK_FITS_BATCH, decode(json!({"prefillChunkTokens": 1024})), "spec.decode.prefillChunkTokens"),
        (rules::SEQUENCES_FIT_BATCH, decode(json!({"maxSequences": 481})), "spec.decode.maxSequences"),
        (
            rules::GPU_NOT_TWICE,
            decode(json!({"gpu": {"count": 1}, "resources": {"requests": {"nvidia.com/gpu": 1}}})),
            "spec.decode.gpu",
        ),
        (
            rules::GPU_CLASS_NOT_TWICE,
            decode(json!({"gpu": {"count": 1, "class": "A"}, "nodeSelector": {"nvidia.com/gpu.product": "A"}})),
            "spec.decode.gpu.class",
        ),
        (
            rules::MOUNTS_HAVE_VOLUMES,
            decode(json!({"volumeMounts": [{"name": "a", "mountPath": "/a"}]})),
            "spec.decode.volumeMounts",
        ),
        (
            rules::GPU_CLASS_IS_NVIDIA,
            decode(json!({"gpu": {"count": 1, "class": "A", "resourceName": "amd.com/gpu"}})),
            "spec.decode.gpu.class",
        ),
        (
            rules::CLAIM_HAS_ONE_SOURCE,
            decode(json!({"resourceClaims": [{"name": "a"}]})),
            "spec.decode.resourceClaims[0].resourceClaimName",
        ),
        (rules::TOLERATION_HAS_KEY, decode(json!({"tolerations": [{}]})), "spec.decode.tolerations[0].key"),
        (
            rules::TOLERATION_VALUE_WITH_EQUAL,
            decode(json!({"tolerations": [{"operator": "Exists", "value": "a"}]})),
            "spec.decode.tolerations[0].value",
        ),
        (
            rules::TOLERATION_SECONDS_WITH_NO_EXECUTE,
            decode(json!({"tolerations": [{"key": "a", "tolerationSeconds": 5}]})),
            "spec.decode.tolerations[0].tolerationSeconds",
        ),
        (rules::ENV_HAS_ONE_SOURCE, decode(json!({"env": [{"name": "A"}]})), "spec.decode.env[0].value"),
        (rules::ENV_NOT_OURS, decode(json!({"env": [{"name": "POD_IP", "value": "a"}]})), "spec.decode.env[0].name"),
        (
            rules::VOLUME_NOT_OURS,
            decode(json!({"volumes": [{"name": "baton-a", "emptyDir": {}}]})),
            "spec.decode.volumes[0].name",
        ),
        (
            rules::MOUNT_PATH,
            decode(json!({"volumes": [{"name": "a"}], "volumeMounts": [{"name": "a", "mountPath": "/tmp/a"}]})),
            "spec.decode.volumeMounts[0].mountPath",
        ),
        (rules::LABEL_KEYS, decode(json!({"nodeSelector": {"a b": "c"}})), "spec.decode.nodeSelector"),
        (rules::RESOURCE_NAMES, decode(json!({"resources": {"limits": {"cpus": 1}}})), "spec.decode.resources.limits"),
        (
            rules::LABELS_NOT_OURS,
            decode(json!({"podTemplate": {"metadata": {"labels": {"llm-d.ai/role": "both"}}}})),
            "spec.decode.podTemplate.metadata.labels",
        ),
        (
            rules::THRESHOLD_WITH_CONDITIONAL,
            json!({"disaggregation": {"policy": "Conditional"}}),
            "spec.disaggregation.minUncachedPromptTokens",
        ),
        (rules::STANDALONE_WITH_MODE, json!({"routing": {"standalone": {}}}), "spec.routing.standalone"),
        (rules::PREFILL_REPLICAS_FOLLOW_POLICY, json!({"prefill": {"replicas": 0}}), "spec.prefill.replicas"),
        (
            rules::PREFILL_AUTOSCALING_FOLLOWS_POLICY,
            json!({"disaggregation": {"policy": "Never"}, "prefill": {"autoscaling": {"provider": "External"}}}),
            "spec.prefill.autoscaling",
        ),
        (rules::PREFILL_NODES_NEED_FOREIGN, json!({"prefill": {"nodesPerReplica": 2}}), "spec.prefill.nodesPerReplica"),
        (rules::DECODE_NODES_NEED_FOREIGN, decode(json!({"nodesPerReplica": 2})), "spec.decode.nodesPerReplica"),
        (rules::PREFILL_SIZES_NEED_BATON, foreign(json!({"prefill": {"maxSequences": 65}})), "spec.prefill"),
        (rules::DECODE_SIZES_NEED_BATON, foreign(json!({"decode": {"kvCacheMemory": "2Gi"}})), "spec.decode"),
        (rules::DECODE_REPLICAS, decode(json!({"replicas": 0})), "spec.decode.replicas"),
    ]
}

/// The messages of all rules in a schema.
fn messages(schema: &Value, found: &mut BTreeSet<String>) {
    let rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    found.extend(rules.filter_map(|rule| rule["message"].as_str()).map(str::to_owned));
    for below in schema["properties"].as_object().into_iter().flat_map(|map| map.values()) {
        messages(below, found);
    }
    for below in ["items", "additionalProperties"] {
        if schema[below].is_object() {
            messages(&schema[below], found);
        }
    }
}

#[test]
fn each_rule_names_the_field_and_what_is_allowed_here_and_offline() -> Result<()> {
    let Some(api) = Api::new("rules")? else { return Ok(()) };
    let mut wanted = BTreeSet::new();
    messages(&mutate::schema(), &mut wanted);
    // Those have tests of their own.
    for rule in [rules::NAME, rules::MODEL_SCHEME_STAYS, rules::ENGINE_STAYS] {
        ensure!(wanted.remove(&format!("{}: {}", rule.message, rule.allowed)), "{} is in no schema", rule.message);
    }
    let mut told = BTreeSet::new();
    for (rule, spec, path) in broken_rules() {
        let words = format!("{}: {}", rule.message, rule.allowed);
        let object = model(&spec);
        let Err(refusal) = api.ask(&object)? else { bail!("taken, against {words}: {object}") };
        let is_told = refusal.causes.iter().any(|(field, said)| field == path && said.contains(&words));
        ensure!(is_told, "{path}: {words}\nis not in {:?}", refusal.causes);
        let violations = offline(&object);
        let is_told = violations
            .iter()
            .any(|one| one.path == path && one.message.contains(rule.message) && one.allowed == rule.allowed);
        ensure!(is_told, "{path}: {words}\nis not offline in {violations:?}");
        told.insert(words);
    }
    let untold: Vec<_> = wanted.difference(&told).collect();
    ensure!(untold.is_empty(), "no manifest here breaks {untold:?}");
    say(&format!("{} rules are told alike by the API server and offline", told.len()));
    Ok(())
}

#[test]
fn a_name_that_services_and_pods_cannot_have_is_refused_by_rule() -> Result<()> {
    let Some(api) = Api::new("names")? else { return Ok(()) };
    let named = |name: &str| with(minimal(), &json!({"metadata": {"name": name}}));
    for name in ["a", "a-1", &"a".repeat(rules::NAME_CHARS_MAX)] {
        api.taken(&named(name));
        ensure!(offline(&named(name)).is_empty(), "{name}");
    }
    for name in [&"a".repeat(rules::NAME_CHARS_MAX + 1), &"a".repeat(253), "1a", "a.b", "example.com"] {
        let Err(refusal) = api.ask(&named(name))? else { bail!("{name} is taken") };
        let words = format!("{}: {}", rules::NAME.message, rules::NAME.allowed);
        ensure!(refusal.message.contains(&words), "{name}: {}", refusal.message);
        let violations = offline(&named(name));
        ensure!(violations.len() == 1 && violations[0].path == "metadata.name", "{name}: {violations:?}");
    }
    // These no object may have, so the API server says it in words of its own.
    for name in ["A", "a_b", "-a", "a-", "", "ä", &"a".repeat(254)] {
        ensure!(api.ask(&named(name))?.is_err(), "{name} is taken");
        ensure!(!offline(&named(name)).is_empty(), "{name} is taken offline");
    }
    Ok(())
}

#[test]
fn what_cannot_be_changed_stays_and_the_rest_changes() -> Result<()> {
    let Some(api) = Api::new("immutable")? else { return Ok(()) };
    let namespace = api.namespace.name();
    let admin = api.stage.admin;
    admin.create(Type::MODEL, namespace, &minimal())?;
    let change = |spec: Value| admin.merge(Type::MODEL, namespace, "tiny", "", &json!({ "spec": spec }));
    for (rule, spec, path) in [
        (rules::MODEL_SCHEME_STAYS, json!({"model": {"uri": "hf://org/repo"}}), "spec.model.uri"),
        (rules::ENGINE_STAYS, json!({"engine": {"type": "VLLM", "image": "a/b:c"}}), "spec.engine.type"),
    ] {
        let Err(kube::Error::Api(status)) = change(spec) else { bail!("{path} was changed") };
        let causes = status.details.as_ref().map(|details| details.causes.clone()).unwrap_or_default();
        let words = format!("{}: {}", rule.message, rule.allowed);
        ensure!(causes.iter().any(|one| one.field == path && one.message.contains(&words)), "{causes:?}");
    }
    change(json!({"model": {"uri": "pvc://other/path"}, "engine": {"image": "a/b:c"}}))?;
    let changed = admin.need(Type::MODEL, namespace, "tiny")?;
    ensure!(changed["spec"]["model"]["uri"] == "pvc://other/path" && changed["metadata"]["generation"] == 2);
    Ok(())
}

#[test]
fn unknown_fields_are_refused_by_name() -> Result<()> {
    let Some(api) = Api::new("unknown")? else { return Ok(()) };
    for (spec, path) in [
        (json!({"decod": {}}), "spec.decod"),
        (json!({"model": {"servedname": "a"}}), "spec.model.servedname"),
        (json!({"engine": {"maxModelLen": 64}}), "spec.engine.maxModelLen"),
        (json!({"prefill": {"replica": 2}}), "spec.prefill.replica"),
        (json!({"decode": {"gpu": {"count": 1, "kind": "A"}}}), "spec.decode.gpu.kind"),
        (json!({"decode": {"env": [{"name": "A", "valu": "b", "value": "c"}]}}), "spec.decode.env[0].valu"),
        (json!({"decode": {"podTemplate": {"specs": {}}}}), "spec.decode.podTemplate.specs"),
    ] {
        let Err(refusal) = api.ask(&model(&spec))? else { bail!("{path} is taken") };
        ensure!(refusal.message.contains(&format!("unknown field \"{path}\"")), "{path}: {}", refusal.message);
        let violations = offline(&model(&spec));
        ensure!(violations.iter().any(|one| one.path == path && one.message == "unknown field"), "{violations:?}");
    }
    // kubectl asks for it without being told to.
    let text = model(&json!({"decode": {"replica": 2}})).to_string();
    let ran = api.stage.plane.kubectl_with(&["apply", "-n", api.namespace.name(), "-f", "-"], &text)?;
    ensure!(!ran.success && ran.stderr.contains("unknown field \"spec.decode.replica\""), "{}", ran.stderr);
    Ok(())
}

/// Whether a path lies in what the schema leaves open and only the operator reads: a volume's source, a pod template's spec.
fn is_open(path: &str) -> bool {
    path.contains(".podTemplate") || path.contains(".volumes[") || path.contains(".volumeMounts[")
}

#[test]
fn the_api_server_and_the_offline_check_agree_on_random_manifests() -> Result<()> {
    let Some(api) = Api::new("random")? else { return Ok(()) };
    let mut mutator = Mutator::new(0xba70);
    let (mut accepted, mut refused, mut open) = (0, 0, 0);
    let mut disagreements = Vec::new();
    for number in 0..RANDOM_MANIFESTS {
        let mutant = mutator.mutant(&minimal());
        let violations = offline(&mutant.manifest);
        match (api.ask(&mutant.manifest)?, violations.as_slice()) {
            (Ok(_), []) => accepted += 1,
            (Ok(_), violations) if violations.iter().all(|one| is_open(&one.path)) => open += 1,
            (Err(_), [_, ..]) => refused += 1,
            (here, violations) => {
                let here = here.map_or_else(|refusal| refusal.message, |_| "taken".to_owned());
                disagreements.push(format!(
                    "{number}: {:?}\n  API server: {here:.600}\n  offline: {violations:?}",
                    mutant.changes
                ));
            }
        }
    }
    say(&format!(
        "of {RANDOM_MANIFESTS} random manifests both accepted {accepted} and refused {refused}; {open} break only what the \
         schema leaves to the operator"
    ));
    ensure!(disagreements.is_empty(), "{} disagreements:\n{}", disagreements.len(), disagreements.join("\n"));
    ensure!(accepted >= OF_EACH_VERDICT && refused >= OF_EACH_VERDICT, "the draw says too little");
    Ok(())
}

/// Everything at the largest that the schema allows, but for values that nobody's rule reads.
fn largest() -> Value {
    let long = |prefix: &str, number: usize, length: usize| {
        format!("{prefix}{number:02}{:a<length$}", "")[..length].to_owned()
    };
    let role = json!({
        "resources": {
            "requests": many(16, |n| (format!("example.com/{}", long("r", n, 63)), json!("1"))),
            "limits": many(16, |n| (format!("example.com/{}", long("r", n, 63)), json!("1"))),
        },
        "gpu": {"count": 16, "resourceName": format!("{}/gpu", long("g", 0, 253))},
        "nodeSelector": many(16, |n| (long("n", n, 63), json!(long("v", n, 63)))),
        "tolerations": vec![json!({"key": long("t", 0, 63), "value": long("v", 0, 63), "effect": "NoSchedule"}); 16],
        "topologySpread": (0..8).map(|n| json!({"topologyKey": long("z", n, 63)})).collect::<Vec<_>>(),
        "resourceClaims": (0..16).map(|n| json!({"name": long("c", n, 63), "resourceClaimName": "a"})).collect::<Vec<_>>(),
        "env": (0..64).map(|n| json!({"name": long("E", n, 256), "value": long("v", n, 2048)})).collect::<Vec<_>>(),
        "volumes": (0..16).map(|n| json!({"name": long("v", n, 63), "emptyDir": {}})).collect::<Vec<_>>(),
        "volumeMounts": (0..16)
            .map(|n| json!({"name": long("v", 15, 63), "mountPath": format!("/{}", long("m", n, 511))}))
            .collect::<Vec<_>>(),
        "podTemplate": {"metadata": {
            "labels": many(16, |n| (long("l", n, 63), json!(long("v", n, 63)))),
            "annotations": many(16, |n| (long("a", n, 63), json!("v"))),
        }},
    });
    model(&json!({
        "model": {"uri": format!("hf://org/{}", long("m", 0, 503)), "endpoint": format!("https://{}", long("e", 0, 504))},
        "engine": {"args": (0..64).map(|n| long("--role-", n, 1024)).collect::<Vec<_>>()},
        "prefill": role,
        "decode": role,
    }))
}

fn many(count: usize, entry: impl Fn(usize) -> (String, Value)) -> Value {
    (0..count).map(entry).collect::<serde_json::Map<_, _>>().into()
}

#[test]
fn the_largest_manifest_is_within_what_rules_may_cost() -> Result<()> {
    let Some(api) = Api::new("largest")? else { return Ok(()) };
    let largest = largest();
    ensure!(offline(&largest).is_empty(), "{:?}", offline(&largest));
    api.taken(&largest);
    say(&format!("a manifest of {} bytes is within the budget of rules", largest.to_string().len()));
    Ok(())
}

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn kubectl_explains_every_field() -> Result<()> {
    let Some(api) = Api::new("explain")? else { return Ok(()) };
    let plane = api.stage.plane;
    // The published schema follows the definition after a while.
    wait(PATIENCE, "kubectl explains", || {
        let ran = plane.kubectl(&["explain", "dm.spec.prefill"])?;
        ensure!(ran.success && ran.stdout.contains("kvCacheMemory"), "{}{}", ran.stdout, ran.stderr);
        Ok(Some(()))
    })?;
    let tree = plane.kubectl(&["explain", "dm.spec", "--recursive"])?.stdout;
    let fields: Vec<Field> = fields()
        .into_iter()
        .filter(|field| field.path.last().is_some_and(|name| !name.starts_with(['[', '{'])))
        .collect();
    for field in &fields {
        let name = field.path.last().map_or("", String::as_str);
        ensure!(
            tree.lines().any(|line| line.trim_start().starts_with(&format!("{name}\t"))),
            "{name} is not in\n{tree}"
        );
    }
    // kubectl has no brackets: an entry's fields follow the list's name.
    let plain = |path: &[String]| -> Vec<String> {
        path.iter().filter(|step| !step.starts_with(['[', '{'])).cloned().collect()
    };
    let parents: BTreeSet<Vec<String>> =
        fields.iter().map(|field| plain(&field.path[..field.path.len() - 1])).collect();
    let look = |parents: &[Vec<String>]| -> Result<usize> {
        let mut count = 0;
        for parent in parents {
            let path = format!("dm.{}", parent.join("."));
            let said = plane.kubectl(&["explain", &path])?;
            let text = words(&said.stdout);
            for field in fields.iter().filter(|field| plain(&field.path[..field.path.len() - 1]) == *parent) {
                let description = words(field.schema["description"].as_str().unwrap_or_default());
                ensure!(!description.is_empty(), "{} has no description", field.name());
                ensure!(text.contains(&description), "{path} does not say of {}: {description}\n{text}", field.name());
                count += 1;
            }
        }
        Ok(count)
    };
    let parents: Vec<_> = parents.into_iter().collect();
    // kubectl takes half a second, most of it waiting.
    let count = std::thread::scope(|scope| {
        let threads: Vec<_> =
            parents.chunks(parents.len().div_ceil(3)).map(|some| scope.spawn(move || look(some))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .sum::<Result<usize>>()
    })?;
    ensure!(count == fields.len(), "{count} of {} fields", fields.len());
    say(&format!("kubectl explains {count} fields of {} objects", parents.len()));
    Ok(())
}

#[test]
fn kubectl_get_dm_fits_eighty_characters() -> Result<()> {
    let Some(api) = Api::new("columns")? else { return Ok(()) };
    let (admin, namespace) = (api.stage.admin, api.namespace.name());
    for (name, reason, status) in
        [("qwen3-0-6b", "AllRolesReady", "True"), ("llama-3-1-70b-chat", "InsufficientCapacity", "False")]
    {
        admin.create(Type::MODEL, namespace, &with(minimal(), &json!({"metadata": {"name": name}})))?;
        let condition = json!({
            "type": "Ready", "status": status, "reason": reason, "message": "as a test says",
            "lastTransitionTime": "2026-01-30T08:15:00Z",
        });
        let status = json!({"conditions": [condition], "summary": {"prefill": "12/12", "decode": "100/100"}});
        admin.merge(Type::MODEL, namespace, name, "status", &json!({ "status": status }))?;
    }
    let ran = api.stage.plane.kubectl(&["get", "dm", "-n", namespace])?;
    ensure!(ran.success, "{}", ran.stderr);
    let lines: Vec<&str> = ran.stdout.lines().collect();
    ensure!(lines.len() == 3, "{}", ran.stdout);
    ensure!(words(lines[0]) == "NAME READY REASON PREFILL DECODE AGE", "{}", lines[0]);
    ensure!(lines.iter().all(|line| line.trim_end().len() <= 80), "{}", ran.stdout);
    ensure!(lines[2].contains("12/12") && lines[2].contains("AllRolesReady"), "{}", ran.stdout);
    Ok(())
}
