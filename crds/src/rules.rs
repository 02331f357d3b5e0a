//! The rules that a schema's types and ranges can't say: each one as CEL for the API server, and with the words that both
//! the API server and the offline check answer with. Beside them the patterns of the schema, with their words.
//!
//! The offline check is `baton-operator`'s `validate`; a test there runs the CEL below beside it on random manifests.

/// Longest `metadata.name`. Children are named `<name>-<role>-<hash8>`: with the longest role, `prefill`, and two hyphens at
/// most 30 + 1 + 7 + 1 + 8 = 47 characters. That leaves 16 of the 63 that a label holds for what Kubernetes and LeaderWorkerSet
/// append (a StatefulSet's revision label takes 11, a group's and a pod's index the rest).
pub const NAME_CHARS_MAX: usize = 30;
/// Form of `metadata.name`: a Service is named after it, so it has no dots and starts with a letter.
pub const NAME_PATTERN: &str = "^[a-z]([-a-z0-9]*[a-z0-9])?$";
/// Form of `spec.model.uri`. No part of a path starts with a dot, so none leads out of where it belongs.
pub const URI_PATTERN: &str = "^(pvc://[a-z0-9]([-a-z0-9]*[a-z0-9])?(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*|hf://[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*|oci://[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]+)?(/[a-z0-9]([a-z0-9._-]*[a-z0-9])?)*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?(@sha256:[a-f0-9]{64})?|s3://[a-z0-9][a-z0-9.-]+[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9_.=+-]*)+)$";
/// Form of `spec.model.servedName`: what `model` may be in a request, slashes as model hubs write them.
pub const SERVED_NAME_PATTERN: &str = "^[A-Za-z0-9]([A-Za-z0-9._/:-]*[A-Za-z0-9])?$";
/// Form of `spec.model.revision`: what git takes as a branch, a tag or a commit, without its stranger letters.
pub const REVISION_PATTERN: &str = "^[A-Za-z0-9]([A-Za-z0-9_-]|[./][A-Za-z0-9_-])*$";
/// Form of `spec.model.endpoint`.
pub const ENDPOINT_PATTERN: &str =
    "^https?://[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?(/[A-Za-z0-9_~.-]+)*/?$";
/// Form of an amount of memory. Seven digits keep the largest (9999999Ti) inside 64 bits.
pub const MEMORY_PATTERN: &str = "^[1-9][0-9]{0,6}(Ki|Mi|Gi|Ti|k|M|G|T)$";
/// Form of a label's key, as the API server checks it in the pods.
pub const LABEL_KEY_PATTERN: &str = "^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";
/// Names of resources: those of every node, and extended ones, which have a domain.
pub const RESOURCE_NAME_PATTERN: &str = "^(cpu|memory|ephemeral-storage|hugepages-[1-9][0-9]*[KMG]i|[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)$";
/// Labels and annotations that are the operator's: those of [`crate::labels::DOMAINS`], and [`crate::labels::SHARED`].
pub const OUR_LABELS_PATTERN: &str = "^(baton[.]dev/.*|llm-d[.]ai/.*|disaggregatedset[.]x-k8s[.]io/.*|app[.]kubernetes[.]io/(name|instance|component|managed-by|part-of))$";
/// Flags that the operator gives Baton's engine, from fields of the manifest.
pub const OUR_FLAGS_PATTERN: &str = "^--(role|model|served-model-name|revision|host|port|kv-host|kv-port|advertise-address|kv-cache-bytes|max-batch-tokens|max-num-seqs|prefill-chunk-tokens|dtype|max-model-length|proxy-public-key-file|drain-timeout-seconds|log-format)(=.*)?$";
/// Where a container may mount a volume: an absolute path of plain names.
pub const MOUNT_PATH_PATTERN: &str = "^(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+$";
/// Where the operator mounts its own.
pub const OUR_MOUNTS_PATTERN: &str = "^/(models|tmp|etc/baton)(/.*)?$";
/// Names of the operator's volumes.
pub const OUR_VOLUMES_PREFIX: &str = "baton-";
/// Variables that the operator gives the engine container.
pub const OUR_ENV: [&str; 3] = ["POD_IP", "POD_NAME", "POD_NAMESPACE"];

// Patterns of the schema itself, where the API server answers with the pattern, and the offline check with the words below.

/// A DNS subdomain: the name of most objects.
pub const SUBDOMAIN_PATTERN: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
/// A DNS label.
pub const LABEL_PATTERN: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
/// A label's value.
pub const LABEL_VALUE_PATTERN: &str = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$";
/// A key of a Secret.
pub const SECRET_KEY_PATTERN: &str = "^[-A-Za-z0-9_.]+$";
/// The name of a variable.
pub const ENV_NAME_PATTERN: &str = "^[A-Za-z_][A-Za-z0-9_]*$";
/// A reference to an image.
pub const IMAGE_PATTERN: &str = "^[A-Za-z0-9]([A-Za-z0-9._:/@-]*[A-Za-z0-9])?$";
/// An amount of a resource that is not negative, as Kubernetes' `resource.Quantity`.
pub const AMOUNT_PATTERN: &str = "^[0-9]{1,15}([.][0-9]{1,9})?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$";
/// Longest amount in characters: 15 digits, a point, 9 digits and a unit.
pub const AMOUNT_CHARS_MAX: u32 = 27;
/// An extended resource: a domain and a name.
pub const EXTENDED_RESOURCE_PATTERN: &str =
    "^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";

/// The schema's patterns in words.
pub const PATTERN_WORDS: [(&str, &str); 9] = [
    (SUBDOMAIN_PATTERN, "the name of an object: lower-case letters, digits, hyphens and dots between them"),
    (LABEL_PATTERN, "lower-case letters and digits, hyphens between them"),
    (LABEL_VALUE_PATTERN, "the value of a label: letters and digits, with - _ . between them"),
    (LABEL_KEY_PATTERN, "the key of a label, such as topology.kubernetes.io/zone"),
    (SECRET_KEY_PATTERN, "letters, digits and - _ ."),
    (ENV_NAME_PATTERN, "letters, digits and underscores, not starting with a digit"),
    (IMAGE_PATTERN, "the reference of an image, such as registry.example.com/name:tag"),
    (AMOUNT_PATTERN, "an amount that is not negative, such as 2, 500m or 16Gi"),
    (EXTENDED_RESOURCE_PATTERN, "the name of an extended resource, such as nvidia.com/gpu"),
];

/// Tokens of a prompt for which each step must have room beside one token of each running sequence: one KV block.
pub const PROMPT_TOKENS_MIN: i32 = 32;
/// Default of a role's `kvCacheMemory`.
pub const DEFAULT_KV_CACHE_MEMORY: &str = "1Gi";
/// Default of a role's `maxBatchTokens`.
pub const DEFAULT_MAX_BATCH_TOKENS: i32 = 512;
/// Default of a role's `maxSequences`.
pub const DEFAULT_MAX_SEQUENCES: i32 = 64;
/// Default of a role's `prefillChunkTokens`.
pub const DEFAULT_PREFILL_CHUNK_TOKENS: i32 = 256;
/// Resource under which nodes offer NVIDIA's GPUs.
pub const GPU_RESOURCE_NAME: &str = "nvidia.com/gpu";
/// Label with which GPU feature discovery says which NVIDIA GPU a node has.
pub const GPU_CLASS_LABEL: &str = "nvidia.com/gpu.product";

/// One rule, in CEL and in words.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// CEL over `self`, the object that the rule stands on; true when the rule is kept.
    pub cel: &'static str,
    /// What is wrong, as it is told to the user.
    pub message: &'static str,
    /// What would be right.
    pub allowed: &'static str,
    /// The field at fault, from where the rule stands on, as `.field.field`; empty for that place itself.
    pub at: &'static str,
}

impl From<Rule> for kube::core::Rule {
    fn from(rule: Rule) -> Self {
        let made = kube::core::Rule::new(rule.cel).message(format!("{}: {}", rule.message, rule.allowed).as_str());
        if rule.at.is_empty() { made } else { made.field_path(rule.at) }
    }
}

/// On the whole object.
pub const NAME: Rule = Rule {
    cel: "size(self.metadata.name) <= 30 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    message: "metadata.name is not one that Services and pods can be named after",
    allowed: "at most 30 characters, lower-case letters, digits and hyphens, starting with a letter and not ending with a hyphen",
    // The API server takes no field path into metadata, so the message names the field.
    at: "",
};

/// On `spec.model.uri`.
pub const MODEL_URI: Rule = Rule {
    cel: "self.matches('^(pvc://[a-z0-9]([-a-z0-9]*[a-z0-9])?(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*|hf://[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*|oci://[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]+)?(/[a-z0-9]([a-z0-9._-]*[a-z0-9])?)*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?(@sha256:[a-f0-9]{64})?|s3://[a-z0-9][a-z0-9.-]+[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9_.=+-]*)+)$')",
    message: "not a model source that is supported",
    allowed: "pvc://CLAIM[/PATH], hf://ORG/REPO, oci://IMAGE[:TAG|@DIGEST] or s3://BUCKET/PREFIX, where no part of a path starts with a dot",
    at: "",
};

/// On `spec.model.uri`, between an object and what it was, unless that was wrong itself: what an older definition let in can be
/// corrected. Offline there is nothing to compare with.
pub const MODEL_SCHEME_STAYS: Rule = Rule {
    cel: "!oldSelf.matches('^(pvc|hf|oci|s3)://') || self.split(':')[0] == oldSelf.split(':')[0]",
    message: "the kind of model source cannot be changed",
    allowed: "the scheme that the model was created with; for another one make a new DisaggregatedModel",
    at: "",
};

/// On `spec.model.revision`.
pub const REVISION: Rule = Rule {
    cel: "self.matches('^[A-Za-z0-9]([A-Za-z0-9_-]|[./][A-Za-z0-9_-])*$')",
    message: "not a revision",
    allowed: "a branch, tag or commit of letters, digits and . _ / - between them",
    at: "",
};

/// On `spec.model.servedName`.
pub const SERVED_NAME: Rule = Rule {
    cel: "self.matches('^[A-Za-z0-9]([A-Za-z0-9._/:-]*[A-Za-z0-9])?$')",
    message: "not a name that clients can ask for",
    allowed: "letters, digits and . _ / : - between them",
    at: "",
};

/// On `spec.model.endpoint`.
pub const ENDPOINT: Rule = Rule {
    cel: "self.matches('^https?://[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?(/[A-Za-z0-9_~.-]+)*/?$')",
    message: "not the address of a service",
    allowed: "http://HOST[:PORT][/PATH] or https://HOST[:PORT][/PATH]",
    at: "",
};

/// On `spec.model`.
pub const REVISION_WITH_HF: Rule = Rule {
    cel: "!has(self.revision) || self.uri.startsWith('hf://')",
    message: "only a repository has revisions",
    allowed: "with hf:// only; an image is pinned by its digest",
    at: ".revision",
};

/// On `spec.model`.
pub const CREDENTIALS_NOT_WITH_CLAIM: Rule = Rule {
    cel: "!has(self.credentialsSecretRef) || !self.uri.startsWith('pvc://')",
    message: "a volume is mounted without credentials",
    allowed: "with hf://, s3:// and oci:// only",
    at: ".credentialsSecretRef",
};

/// On `spec.model`.
pub const ENDPOINT_WITH_DOWNLOAD: Rule = Rule {
    cel: "!has(self.endpoint) || self.uri.startsWith('hf://') || self.uri.startsWith('s3://')",
    message: "nothing is downloaded from a service",
    allowed: "with hf:// and s3:// only",
    at: ".endpoint",
};

/// On `spec.model`.
pub const REGION_WITH_S3: Rule = Rule {
    cel: "!has(self.region) || self.uri.startsWith('s3://')",
    message: "only a bucket has a region",
    allowed: "with s3:// only",
    at: ".region",
};

/// On `spec.model`.
pub const CACHE_WITH_DOWNLOAD: Rule = Rule {
    cel: "!has(self.cache) || self.uri.startsWith('hf://') || self.uri.startsWith('s3://')",
    message: "nothing is downloaded that could be kept",
    allowed: "with hf:// and s3:// only",
    at: ".cache",
};

/// On `spec.model.cache`.
pub const CLAIM_NAME_WITH_CLAIM: Rule = Rule {
    cel: "has(self.claimName) == (self.type == 'PersistentVolumeClaim')",
    message: "the claim and the type PersistentVolumeClaim need each other",
    allowed: "set with type PersistentVolumeClaim, absent with EmptyDir",
    at: ".claimName",
};

/// On `spec.model.cache`.
pub const SIZE_LIMIT_WITH_EMPTY_DIR: Rule = Rule {
    cel: "!has(self.sizeLimit) || self.type == 'EmptyDir'",
    message: "a claim has its size already",
    allowed: "with type EmptyDir only",
    at: ".sizeLimit",
};

/// On `spec.engine.type`, between an object and what it was, unless that was wrong itself: what an older definition let in can be
/// corrected. Offline there is nothing to compare with.
pub const ENGINE_STAYS: Rule = Rule {
    cel: "!(oldSelf in ['Baton', 'VLLM', 'SGLang']) || self == oldSelf",
    message: "the engine cannot be changed",
    allowed: "the type that the model was created with; for another one make a new DisaggregatedModel",
    at: "",
};

/// On `spec.engine`.
pub const IMAGE_WITH_FOREIGN: Rule = Rule {
    cel: "self.type == 'Baton' || has(self.image)",
    message: "no image is known of this engine",
    allowed: "required with type VLLM and SGLang",
    at: ".image",
};

/// On `spec.engine`.
pub const DTYPE_WITH_BATON: Rule = Rule {
    cel: "!has(self.dtype) || self.type == 'Baton'",
    message: "this engine is told by its own arguments",
    allowed: "with type Baton only; otherwise in spec.engine.args",
    at: ".dtype",
};

/// On `spec.engine`.
pub const LENGTH_WITH_BATON: Rule = Rule {
    cel: "!has(self.maxModelLength) || self.type == 'Baton'",
    message: "this engine is told by its own arguments",
    allowed: "with type Baton only; otherwise in spec.engine.args",
    at: ".maxModelLength",
};

/// On `spec.engine`.
pub const ARGS_NOT_OURS: Rule = Rule {
    cel: "self.type != 'Baton' || !has(self.args) || self.args.all(arg, !arg.matches('^--(role|model|served-model-name|revision|host|port|kv-host|kv-port|advertise-address|kv-cache-bytes|max-batch-tokens|max-num-seqs|prefill-chunk-tokens|dtype|max-model-length|proxy-public-key-file|drain-timeout-seconds|log-format)(=.*)?$'))",
    message: "an argument that the operator gives already",
    allowed: "none that a field of this manifest stands for",
    at: ".args",
};

/// On a role's `kvCacheMemory`.
pub const MEMORY: Rule = Rule {
    cel: "self.matches('^[1-9][0-9]{0,6}(Ki|Mi|Gi|Ti|k|M|G|T)$')",
    message: "not an amount of memory",
    allowed: "a whole number of at most 7 digits with Ki, Mi, Gi, Ti, k, M, G or T, such as 256Mi",
    at: "",
};

/// On `spec.prefill` and `spec.decode`.
pub const REPLICAS_OR_AUTOSCALING: Rule = Rule {
    cel: "!has(self.replicas) || !has(self.autoscaling)",
    message: "two would write the number of replicas",
    allowed: "replicas or autoscaling, not both",
    at: ".autoscaling",
};

/// On `spec.prefill` and `spec.decode`.
pub const CHUNK_FITS_BATCH: Rule = Rule {
    cel: "self.prefillChunkTokens <= self.maxBatchTokens",
    message: "a chunk is computed within one step",
    allowed: "at most maxBatchTokens",
    at: ".prefillChunkTokens",
};

/// On `spec.prefill` and `spec.decode`.
pub const SEQUENCES_FIT_BATCH: Rule = Rule {
    cel: "self.maxSequences + 32 <= self.maxBatchTokens",
    message: "a step holds one token of each running sequence and one KV block of a prompt",
    allowed: "at most maxBatchTokens - 32",
    at: ".maxSequences",
};

/// On `spec.prefill` and `spec.decode`.
pub const GPU_NOT_TWICE: Rule = Rule {
    cel: "!has(self.gpu) || !has(self.resources) || !((has(self.resources.limits) && self.gpu.resourceName in self.resources.limits) || (has(self.resources.requests) && self.gpu.resourceName in self.resources.requests))",
    message: "resources has the same resource",
    allowed: "GPUs in gpu or in resources, not in both",
    at: ".gpu",
};

/// On `spec.prefill` and `spec.decode`.
pub const GPU_CLASS_NOT_TWICE: Rule = Rule {
    cel: "!has(self.gpu) || !has(self.gpu.class) || !has(self.nodeSelector) || !('nvidia.com/gpu.product' in self.nodeSelector)",
    message: "nodeSelector has the same label, nvidia.com/gpu.product",
    allowed: "the GPU's model in gpu.class or in nodeSelector, not in both",
    at: ".gpu.class",
};

/// On `spec.prefill` and `spec.decode`.
pub const MOUNTS_HAVE_VOLUMES: Rule = Rule {
    cel: "!has(self.volumeMounts) || self.volumeMounts.all(mount, has(self.volumes) && self.volumes.exists(volume, volume.name == mount.name))",
    message: "a mount names a volume that is not there",
    allowed: "names of the same role's volumes",
    at: ".volumeMounts",
};

/// On a role's `gpu`.
pub const GPU_CLASS_IS_NVIDIA: Rule = Rule {
    cel: "!has(self.class) || self.resourceName.startsWith('nvidia.com/')",
    message: "the label behind a class is that of NVIDIA's GPUs",
    allowed: "with resources of nvidia.com/ only; otherwise in nodeSelector",
    at: ".class",
};

/// On an entry of a role's `resourceClaims`.
pub const CLAIM_HAS_ONE_SOURCE: Rule = Rule {
    cel: "has(self.resourceClaimName) != has(self.resourceClaimTemplateName)",
    message: "a claim comes from one place",
    allowed: "either resourceClaimName or resourceClaimTemplateName",
    at: ".resourceClaimName",
};

/// On an entry of a role's `tolerations`.
pub const TOLERATION_HAS_KEY: Rule = Rule {
    cel: "has(self.key) || self.operator == 'Exists'",
    message: "without a key there is nothing to be equal to",
    allowed: "a key, or operator Exists",
    at: ".key",
};

/// On an entry of a role's `tolerations`.
pub const TOLERATION_VALUE_WITH_EQUAL: Rule = Rule {
    cel: "!has(self.value) || self.operator == 'Equal'",
    message: "operator Exists takes no value",
    allowed: "with operator Equal only",
    at: ".value",
};

/// On an entry of a role's `tolerations`.
pub const TOLERATION_SECONDS_WITH_NO_EXECUTE: Rule = Rule {
    cel: "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
    message: "only NoExecute ends a pod that runs",
    allowed: "with effect NoExecute only",
    at: ".tolerationSeconds",
};

/// On an entry of a role's `env`.
pub const ENV_HAS_ONE_SOURCE: Rule = Rule {
    cel: "has(self.value) != has(self.secretKeyRef)",
    message: "a variable's value comes from one place",
    allowed: "either value or secretKeyRef",
    at: ".value",
};

/// On the name of an entry of a role's `env`.
pub const ENV_NOT_OURS: Rule = Rule {
    cel: "!(self in ['POD_IP', 'POD_NAME', 'POD_NAMESPACE'])",
    message: "a variable that the operator sets",
    allowed: "any name but POD_IP, POD_NAME and POD_NAMESPACE",
    at: "",
};

/// On the name of an entry of a role's `volumes`.
pub const VOLUME_NOT_OURS: Rule = Rule {
    cel: "!self.startsWith('baton-')",
    message: "the operator's volumes are named so",
    allowed: "a name that does not start with baton-",
    at: "",
};

/// On the path of an entry of a role's `volumeMounts`.
pub const MOUNT_PATH: Rule = Rule {
    cel: "self.matches('^(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+$') && !self.matches('^/(models|tmp|etc/baton)(/.*)?$')",
    message: "not a path for volumes of yours",
    allowed: "an absolute path, no part of which starts with a dot, outside /models, /etc/baton and /tmp",
    at: "",
};

/// On maps whose keys are those of labels.
pub const LABEL_KEYS: Rule = Rule {
    cel: "self.all(key, key.matches('^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$'))",
    message: "a key that no label can have",
    allowed: "keys such as team or example.com/team",
    at: "",
};

/// On a container's requests and limits.
pub const RESOURCE_NAMES: Rule = Rule {
    cel: "self.all(key, key.matches('^(cpu|memory|ephemeral-storage|hugepages-[1-9][0-9]*[KMG]i|[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)$'))",
    message: "a name that no resource has",
    allowed: "cpu, memory, ephemeral-storage, hugepages-2Mi and the like, or an extended resource such as nvidia.com/gpu",
    at: "",
};

/// On the labels and annotations of a role's `podTemplate`.
pub const LABELS_NOT_OURS: Rule = Rule {
    cel: "self.all(key, !key.matches('^(baton[.]dev/.*|llm-d[.]ai/.*|disaggregatedset[.]x-k8s[.]io/.*|app[.]kubernetes[.]io/(name|instance|component|managed-by|part-of))$'))",
    message: "a key that is the operator's to set",
    allowed: "none of baton.dev/, llm-d.ai/, disaggregatedset.x-k8s.io/, nor app.kubernetes.io/name, instance, component, managed-by and part-of",
    at: "",
};

/// On `spec.disaggregation`.
pub const THRESHOLD_WITH_CONDITIONAL: Rule = Rule {
    cel: "has(self.minUncachedPromptTokens) == (self.policy == 'Conditional')",
    message: "the threshold and the policy Conditional need each other",
    allowed: "set with policy Conditional, absent with Always and Never",
    at: ".minUncachedPromptTokens",
};

/// On `spec.routing`.
pub const STANDALONE_WITH_MODE: Rule = Rule {
    cel: "!has(self.standalone) || self.mode == 'Standalone'",
    message: "there is no proxy in front",
    allowed: "with mode Standalone only",
    at: ".standalone",
};

/// On `spec`.
pub const PREFILL_REPLICAS_FOLLOW_POLICY: Rule = Rule {
    cel: "!has(self.prefill.replicas) || (self.disaggregation.policy == 'Never') == (self.prefill.replicas == 0)",
    message: "prefill replicas do not fit spec.disaggregation.policy",
    allowed: "absent or at least 1 with policy Always or Conditional, absent or 0 with Never (decode workers then serve both phases)",
    at: ".prefill.replicas",
};

/// On `spec`.
pub const PREFILL_AUTOSCALING_FOLLOWS_POLICY: Rule = Rule {
    cel: "!has(self.prefill.autoscaling) || self.disaggregation.policy != 'Never'",
    message: "with policy Never there is no prefill role to scale",
    allowed: "with policy Always or Conditional only",
    at: ".prefill.autoscaling",
};

const NODES_MESSAGE: &str =
    "Baton's own engine cannot compute across pods yet, so a replica of several nodes would never start";
const NODES_ALLOWED: &str = "1, or engine type VLLM or SGLang";
const SIZES_MESSAGE: &str = "this engine is told by its own arguments";
const SIZES_ALLOWED: &str = "kvCacheMemory, maxBatchTokens, maxSequences and prefillChunkTokens with engine type Baton only; otherwise in spec.engine.args";

/// On `spec`.
pub const PREFILL_NODES_NEED_FOREIGN: Rule = Rule {
    cel: "self.prefill.nodesPerReplica == 1 || self.engine.type != 'Baton'",
    message: NODES_MESSAGE,
    allowed: NODES_ALLOWED,
    at: ".prefill.nodesPerReplica",
};

/// On `spec`.
pub const DECODE_NODES_NEED_FOREIGN: Rule = Rule {
    cel: "self.decode.nodesPerReplica == 1 || self.engine.type != 'Baton'",
    message: NODES_MESSAGE,
    allowed: NODES_ALLOWED,
    at: ".decode.nodesPerReplica",
};

/// On `spec`. Compares with the defaults, because the API server has filled them in before it runs rules.
pub const PREFILL_SIZES_NEED_BATON: Rule = Rule {
    cel: "self.engine.type == 'Baton' || (self.prefill.kvCacheMemory == '1Gi' && self.prefill.maxBatchTokens == 512 && self.prefill.maxSequences == 64 && self.prefill.prefillChunkTokens == 256)",
    message: SIZES_MESSAGE,
    allowed: SIZES_ALLOWED,
    at: ".prefill",
};

/// On `spec`. Compares with the defaults, because the API server has filled them in before it runs rules.
pub const DECODE_SIZES_NEED_BATON: Rule = Rule {
    cel: "self.engine.type == 'Baton' || (self.decode.kvCacheMemory == '1Gi' && self.decode.maxBatchTokens == 512 && self.decode.maxSequences == 64 && self.decode.prefillChunkTokens == 256)",
    message: SIZES_MESSAGE,
    allowed: SIZES_ALLOWED,
    at: ".decode",
};

/// On `spec.decode`.
pub const DECODE_REPLICAS: Rule = Rule {
    cel: "!has(self.replicas) || self.replicas >= 1",
    message: "somebody has to generate",
    allowed: "at least 1",
    at: ".replicas",
};
