//! The rules of `baton_crds::rules` over typed values, in the order of the manifest.
//!
//! Each is the CEL beside it said in Rust. Rules on transitions (`MODEL_SCHEME_STAYS`, `ENGINE_STAYS`) are the API server's
//! alone: a manifest by itself was nothing before.

use crate::Violation;
use crate::structural::quoted;
use baton_crds::rules::{self, Rule};
use baton_crds::{
    CacheType, DisaggregatedModel, DisaggregationPolicy, EngineType, ModelSpec, RoleSpec, RoutingMode, TaintEffect,
    TolerationOperator,
};
use regex::Regex;
use serde_json::Value;
use std::sync::LazyLock;

/// Every rule that a manifest breaks.
pub(super) fn broken(model: &DisaggregatedModel) -> Vec<Violation> {
    let spec = &model.spec;
    let mut broken = Broken(Vec::new());
    let name = model.metadata.name.as_deref().unwrap_or_default();
    let name_fits = name.len() <= rules::NAME_CHARS_MAX && PATTERNS.name.is_match(name);
    broken.keep_text(name_fits, rules::NAME, "metadata.name", name);
    model_source(&spec.model, &mut broken);
    let baton = spec.engine.type_ == EngineType::Baton;
    let engine = "spec.engine";
    broken.keep(baton || spec.engine.image.is_some(), rules::IMAGE_WITH_FOREIGN, engine);
    broken.keep(baton || spec.engine.dtype.is_none(), rules::DTYPE_WITH_BATON, engine);
    broken.keep(baton || spec.engine.max_model_length.is_none(), rules::LENGTH_WITH_BATON, engine);
    let ours = spec.engine.args.iter().any(|arg| PATTERNS.our_flags.is_match(arg));
    broken.keep(!baton || !ours, rules::ARGS_NOT_OURS, engine);

    let conditional = spec.disaggregation.policy == DisaggregationPolicy::Conditional;
    let threshold = spec.disaggregation.min_uncached_prompt_tokens.is_some();
    broken.keep(threshold == conditional, rules::THRESHOLD_WITH_CONDITIONAL, "spec.disaggregation");
    let never = spec.disaggregation.policy == DisaggregationPolicy::Never;
    let fits = spec.prefill.replicas.is_none_or(|replicas| never == (replicas == 0));
    broken.keep(fits, rules::PREFILL_REPLICAS_FOLLOW_POLICY, "spec");
    let scales = spec.prefill.autoscaling.is_some();
    broken.keep(!scales || !never, rules::PREFILL_AUTOSCALING_FOLLOWS_POLICY, "spec");
    broken.keep(spec.decode.replicas.is_none_or(|replicas| replicas >= 1), rules::DECODE_REPLICAS, "spec.decode");
    for (settings, nodes, sizes) in [
        (&spec.prefill, rules::PREFILL_NODES_NEED_FOREIGN, rules::PREFILL_SIZES_NEED_BATON),
        (&spec.decode, rules::DECODE_NODES_NEED_FOREIGN, rules::DECODE_SIZES_NEED_BATON),
    ] {
        broken.keep(settings.nodes_per_replica == 1 || !baton, nodes, "spec");
        broken.keep(baton || has_default_sizes(settings), sizes, "spec");
    }
    role("spec.prefill", &spec.prefill, &mut broken);
    role("spec.decode", &spec.decode, &mut broken);
    let standalone = spec.routing.mode == RoutingMode::Standalone;
    broken.keep(spec.routing.standalone.is_none() || standalone, rules::STANDALONE_WITH_MODE, "spec.routing");
    broken.0
}

fn model_source(spec: &ModelSpec, broken: &mut Broken) {
    let path = "spec.model";
    let uri = spec.uri.as_str();
    broken.keep_text(PATTERNS.uri.is_match(uri), rules::MODEL_URI, "spec.model.uri", uri);
    if let Some(revision) = spec.revision.as_deref() {
        broken.keep_text(PATTERNS.revision.is_match(revision), rules::REVISION, "spec.model.revision", revision);
    }
    if let Some(served) = spec.served_name.as_deref() {
        broken.keep_text(PATTERNS.served_name.is_match(served), rules::SERVED_NAME, "spec.model.servedName", served);
    }
    if let Some(endpoint) = spec.endpoint.as_deref() {
        broken.keep_text(PATTERNS.endpoint.is_match(endpoint), rules::ENDPOINT, "spec.model.endpoint", endpoint);
    }
    let (hf, s3) = (uri.starts_with("hf://"), uri.starts_with("s3://"));
    broken.keep(spec.revision.is_none() || hf, rules::REVISION_WITH_HF, path);
    let claim = uri.starts_with("pvc://");
    broken.keep(spec.credentials_secret_ref.is_none() || !claim, rules::CREDENTIALS_NOT_WITH_CLAIM, path);
    broken.keep(spec.endpoint.is_none() || hf || s3, rules::ENDPOINT_WITH_DOWNLOAD, path);
    broken.keep(spec.region.is_none() || s3, rules::REGION_WITH_S3, path);
    broken.keep(spec.cache.is_none() || hf || s3, rules::CACHE_WITH_DOWNLOAD, path);
    if let Some(cache) = &spec.cache {
        let path = "spec.model.cache";
        let on_claim = cache.type_ == CacheType::PersistentVolumeClaim;
        broken.keep(cache.claim_name.is_some() == on_claim, rules::CLAIM_NAME_WITH_CLAIM, path);
        broken.keep(cache.size_limit.is_none() || !on_claim, rules::SIZE_LIMIT_WITH_EMPTY_DIR, path);
    }
}

fn has_default_sizes(spec: &RoleSpec) -> bool {
    spec.kv_cache_memory == rules::DEFAULT_KV_CACHE_MEMORY
        && spec.max_batch_tokens == rules::DEFAULT_MAX_BATCH_TOKENS
        && spec.max_sequences == rules::DEFAULT_MAX_SEQUENCES
        && spec.prefill_chunk_tokens == rules::DEFAULT_PREFILL_CHUNK_TOKENS
}

fn role(path: &str, spec: &RoleSpec, broken: &mut Broken) {
    broken.keep(spec.replicas.is_none() || spec.autoscaling.is_none(), rules::REPLICAS_OR_AUTOSCALING, path);
    let memory = spec.kv_cache_memory.as_str();
    broken.keep_text(PATTERNS.memory.is_match(memory), rules::MEMORY, &format!("{path}.kvCacheMemory"), memory);
    broken.keep(spec.prefill_chunk_tokens <= spec.max_batch_tokens, rules::CHUNK_FITS_BATCH, path);
    let sequences = spec.max_sequences.saturating_add(rules::PROMPT_TOKENS_MIN);
    broken.keep(sequences <= spec.max_batch_tokens, rules::SEQUENCES_FIT_BATCH, path);
    pod(path, spec, broken);
}

fn pod(path: &str, spec: &RoleSpec, broken: &mut Broken) {
    if let Some(resources) = &spec.resources {
        for (field, amounts) in [("requests", &resources.requests), ("limits", &resources.limits)] {
            let known = amounts.keys().all(|name| PATTERNS.resource_name.is_match(name));
            broken.keep(known, rules::RESOURCE_NAMES, &format!("{path}.resources.{field}"));
        }
    }
    if let Some(gpu) = &spec.gpu {
        let twice = spec.resources.as_ref().is_some_and(|resources| {
            resources.limits.contains_key(&gpu.resource_name) || resources.requests.contains_key(&gpu.resource_name)
        });
        broken.keep(!twice, rules::GPU_NOT_TWICE, path);
        let twice = gpu.class.is_some() && spec.node_selector.contains_key(rules::GPU_CLASS_LABEL);
        broken.keep(!twice, rules::GPU_CLASS_NOT_TWICE, path);
        let nvidia = gpu.resource_name.starts_with("nvidia.com/");
        broken.keep(gpu.class.is_none() || nvidia, rules::GPU_CLASS_IS_NVIDIA, &format!("{path}.gpu"));
    }
    for (index, claim) in spec.resource_claims.iter().enumerate() {
        let one = claim.resource_claim_name.is_some() != claim.resource_claim_template_name.is_some();
        broken.keep(one, rules::CLAIM_HAS_ONE_SOURCE, &format!("{path}.resourceClaims[{index}]"));
    }
    let label_keys = spec.node_selector.keys().all(|key| PATTERNS.label_key.is_match(key));
    broken.keep(label_keys, rules::LABEL_KEYS, &format!("{path}.nodeSelector"));
    for (index, toleration) in spec.tolerations.iter().enumerate() {
        let path = format!("{path}.tolerations[{index}]");
        let exists = toleration.operator == TolerationOperator::Exists;
        broken.keep(toleration.key.is_some() || exists, rules::TOLERATION_HAS_KEY, &path);
        broken.keep(toleration.value.is_none() || !exists, rules::TOLERATION_VALUE_WITH_EQUAL, &path);
        let ends = toleration.effect == Some(TaintEffect::NoExecute);
        broken.keep(toleration.toleration_seconds.is_none() || ends, rules::TOLERATION_SECONDS_WITH_NO_EXECUTE, &path);
    }
    for (index, env) in spec.env.iter().enumerate() {
        let path = format!("{path}.env[{index}]");
        broken.keep(env.value.is_some() != env.secret_key_ref.is_some(), rules::ENV_HAS_ONE_SOURCE, &path);
        let name = env.name.as_str();
        broken.keep_text(!rules::OUR_ENV.contains(&name), rules::ENV_NOT_OURS, &format!("{path}.name"), name);
    }
    for (index, volume) in spec.volumes.iter().enumerate() {
        let name = volume.name.as_str();
        let path = format!("{path}.volumes[{index}].name");
        broken.keep_text(!name.starts_with(rules::OUR_VOLUMES_PREFIX), rules::VOLUME_NOT_OURS, &path, name);
    }
    for (index, mount) in spec.volume_mounts.iter().enumerate() {
        let at = mount.mount_path.as_str();
        let path = format!("{path}.volumeMounts[{index}].mountPath");
        broken.keep_text(is_users_mount(at), rules::MOUNT_PATH, &path, at);
    }
    let has_volume = |name: &str| spec.volumes.iter().any(|volume| volume.name == name);
    let all = spec.volume_mounts.iter().all(|mount| has_volume(&mount.name));
    broken.keep(all, rules::MOUNTS_HAVE_VOLUMES, path);
    if let Some(metadata) = spec.pod_template.as_ref().and_then(|template| template.metadata.as_ref()) {
        for (field, map) in [("labels", &metadata.labels), ("annotations", &metadata.annotations)] {
            let path = format!("{path}.podTemplate.metadata.{field}");
            broken.keep(map.keys().all(|key| PATTERNS.label_key.is_match(key)), rules::LABEL_KEYS, &path);
            broken.keep(!map.keys().any(|key| PATTERNS.our_labels.is_match(key)), rules::LABELS_NOT_OURS, &path);
        }
    }
}

/// Whether a path is one at which a user may mount a volume.
pub(super) fn is_users_mount(path: &str) -> bool {
    PATTERNS.mount_path.is_match(path) && !PATTERNS.our_mounts.is_match(path)
}

struct Broken(Vec<Violation>);

impl Broken {
    /// A rule that stands on `on`.
    fn keep(&mut self, kept: bool, rule: Rule, on: &str) {
        if !kept {
            self.0.push(Violation::new(format!("{on}{}", rule.at), rule.message, rule.allowed));
        }
    }

    /// A rule that stands on a text, which is told.
    fn keep_text(&mut self, kept: bool, rule: Rule, path: &str, found: &str) {
        if !kept {
            let found = quoted(&Value::from(found));
            self.0.push(Violation::new(path, format!("{found}: {}", rule.message), rule.allowed));
        }
    }
}

struct Patterns {
    name: Regex,
    uri: Regex,
    revision: Regex,
    served_name: Regex,
    endpoint: Regex,
    memory: Regex,
    our_flags: Regex,
    resource_name: Regex,
    label_key: Regex,
    our_labels: Regex,
    mount_path: Regex,
    our_mounts: Regex,
}

static PATTERNS: LazyLock<Patterns> = LazyLock::new(|| {
    let compile = |pattern| Regex::new(pattern).expect("the rules' patterns are regular expressions");
    Patterns {
        name: compile(rules::NAME_PATTERN),
        uri: compile(rules::URI_PATTERN),
        revision: compile(rules::REVISION_PATTERN),
        served_name: compile(rules::SERVED_NAME_PATTERN),
        endpoint: compile(rules::ENDPOINT_PATTERN),
        memory: compile(rules::MEMORY_PATTERN),
        our_flags: compile(rules::OUR_FLAGS_PATTERN),
        resource_name: compile(rules::RESOURCE_NAME_PATTERN),
        label_key: compile(rules::LABEL_KEY_PATTERN),
        our_labels: compile(rules::OUR_LABELS_PATTERN),
        mount_path: compile(rules::MOUNT_PATH_PATTERN),
        our_mounts: compile(rules::OUR_MOUNTS_PATTERN),
    }
});
