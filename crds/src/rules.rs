//! The rules that a schema's types and ranges can't say: each one as CEL for the API server, and with the words that both
//! the API server and the offline check answer with.
//!
//! The offline check is `baton-operator`'s `validate`; a test there runs the CEL below beside it on random manifests.

/// Longest `metadata.name`. Children are named `<name>-<role>-<hash8>`, at most 47 characters (`prefill-decode` is the
/// longest role, with two hyphens 24), which leaves 16 of a label's 63 for what Kubernetes and LeaderWorkerSet append.
pub const NAME_CHARS_MAX: usize = 30;
/// Form of `metadata.name`: a Service is named after it, so it has no dots and starts with a letter.
pub const NAME_PATTERN: &str = "^[a-z]([-a-z0-9]*[a-z0-9])?$";
/// Form of `spec.model.uri`.
pub const URI_PATTERN: &str = "^pvc://[a-z0-9]([-a-z0-9]*[a-z0-9])?(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$";
/// Form of `spec.model.servedName`: what `model` may be in a request, slashes as model hubs write them.
pub const SERVED_NAME_PATTERN: &str = "^[A-Za-z0-9]([A-Za-z0-9._/:-]*[A-Za-z0-9])?$";
/// Form of an amount of memory. Seven digits keep the largest (9999999Ti) inside 64 bits.
pub const MEMORY_PATTERN: &str = "^[1-9][0-9]{0,6}(Ki|Mi|Gi|Ti|k|M|G|T)$";

/// Tokens of a prompt for which each step must have room beside one token of each running sequence: one KV block.
pub const PROMPT_TOKENS_MIN: i32 = 32;

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
    cel: "self.matches('^pvc://[a-z0-9]([-a-z0-9]*[a-z0-9])?(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$')",
    message: "not a model source that is supported",
    allowed: "pvc://CLAIM or pvc://CLAIM/PATH, where no part of the path starts with a dot",
    at: "",
};

/// On `spec.model.servedName`.
pub const SERVED_NAME: Rule = Rule {
    cel: "self.matches('^[A-Za-z0-9]([A-Za-z0-9._/:-]*[A-Za-z0-9])?$')",
    message: "not a name that clients can ask for",
    allowed: "letters, digits and . _ / : - between them",
    at: "",
};

/// On a role's `kvCacheMemory`.
pub const MEMORY: Rule = Rule {
    cel: "self.matches('^[1-9][0-9]{0,6}(Ki|Mi|Gi|Ti|k|M|G|T)$')",
    message: "not an amount of memory",
    allowed: "a whole number of at most 7 digits with Ki, Mi, Gi, Ti, k, M, G or T, such as 256Mi",
    at: "",
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

/// On `spec.disaggregation`.
pub const THRESHOLD_WITH_CONDITIONAL: Rule = Rule {
    cel: "has(self.minUncachedPromptTokens) == (self.policy == 'Conditional')",
    message: "the threshold and the policy Conditional need each other",
    allowed: "set with policy Conditional, absent with Always and Never",
    at: ".minUncachedPromptTokens",
};

/// On `spec`.
pub const PREFILL_REPLICAS_FOLLOW_POLICY: Rule = Rule {
    cel: "self.disaggregation.policy == 'Never' ? self.prefill.replicas == 0 : self.prefill.replicas >= 1",
    message: "prefill replicas do not fit spec.disaggregation.policy",
    allowed: "at least 1 with policy Always or Conditional, 0 with Never (decode workers then serve both phases)",
    at: ".prefill.replicas",
};

/// On `spec.decode`.
pub const DECODE_REPLICAS: Rule =
    Rule { cel: "self.replicas >= 1", message: "somebody has to generate", allowed: "at least 1", at: ".replicas" };
