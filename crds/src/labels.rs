//! Labels of what the operator makes for a model: keys, and the values that are words.
//!
//! Selectors use [`MODEL`], [`WORKLOAD_ROLE`] and [`REVISION`] and nothing else; the others are for people and for the field's
//! routers, which read them from pods. [`SERVING_ROLE`] may change on a living pod, so nothing of ours selects by it.

/// The application: [`APP_NAME_VALUE`] on everything.
pub const APP_NAME: &str = "app.kubernetes.io/name";
/// Value of [`APP_NAME`].
pub const APP_NAME_VALUE: &str = "baton";
/// The model that an object belongs to: its `metadata.name`.
pub const APP_INSTANCE: &str = "app.kubernetes.io/instance";
/// The part of a model that an object belongs to: a [`Component`].
pub const APP_COMPONENT: &str = "app.kubernetes.io/component";
/// Who writes an object: [`APP_MANAGED_BY_VALUE`] on everything.
pub const APP_MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Value of [`APP_MANAGED_BY`].
pub const APP_MANAGED_BY_VALUE: &str = "baton-operator";
/// What the application is part of: [`APP_PART_OF_VALUE`] on everything.
pub const APP_PART_OF: &str = "app.kubernetes.io/part-of";
/// Value of [`APP_PART_OF`].
pub const APP_PART_OF_VALUE: &str = "baton";

/// The model that an object belongs to: its `metadata.name`.
pub const MODEL: &str = "baton.dev/model";
/// What an object is there for: a [`WorkloadRole`]. Stays what it is for as long as the object lives.
pub const WORKLOAD_ROLE: &str = "baton.dev/workload-role";
/// The revision that an object was made from: 8 hexadecimal digits.
pub const REVISION: &str = "baton.dev/revision";

/// What a pod serves: `prefill`, `decode` or `prefill-decode`. The field's routers choose by it.
pub const SERVING_ROLE: &str = "llm-d.ai/role";
/// Marks pods that serve a model: [`INFERENCE_SERVING_VALUE`].
pub const INFERENCE_SERVING: &str = "llm-d.ai/inference-serving";
/// Value of [`INFERENCE_SERVING`].
pub const INFERENCE_SERVING_VALUE: &str = "true";
/// The model that a pod serves: `metadata.name`, because the name towards clients may hold what no label can.
pub const SERVED_MODEL: &str = "llm-d.ai/model";
/// What computes in a pod: see [`crate::EngineType::label`].
pub const ENGINE_TYPE: &str = "llm-d.ai/engine-type";

/// The set of roles that a pod belongs to: the model's `metadata.name`. With the next two it is what DisaggregatedSet gives its
/// pods, so that a router that pairs by them treats ours right.
pub const SET_NAME: &str = "disaggregatedset.x-k8s.io/name";
/// The role within that set: a [`WorkloadRole`].
pub const SET_ROLE: &str = "disaggregatedset.x-k8s.io/role";
/// The revision of that set: the same as [`REVISION`].
pub const SET_REVISION: &str = "disaggregatedset.x-k8s.io/revision";

/// Domains of which every label is the operator's: no overlay may set one.
pub const DOMAINS: [&str; 3] = ["baton.dev", "llm-d.ai", "disaggregatedset.x-k8s.io"];
/// Labels of other domains that are the operator's too.
pub const SHARED: [&str; 5] = [APP_NAME, APP_INSTANCE, APP_COMPONENT, APP_MANAGED_BY, APP_PART_OF];

/// Whether a label is the operator's to set.
pub fn is_ours(key: &str) -> bool {
    let domain = key.split_once('/').map(|(domain, _)| domain);
    domain.is_some_and(|domain| DOMAINS.contains(&domain)) || SHARED.contains(&key)
}

/// What a workload is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkloadRole {
    /// Reads prompts and builds the KV cache.
    Prefill,
    /// Generates; without disaggregation it reads prompts too.
    Decode,
    /// The front door of routing mode Standalone.
    Proxy,
}

impl WorkloadRole {
    /// All of them, in the order in which they are shown.
    pub const ALL: [WorkloadRole; 3] = [WorkloadRole::Prefill, WorkloadRole::Decode, WorkloadRole::Proxy];

    /// The value of [`WORKLOAD_ROLE`], and the word in names of objects.
    pub fn as_str(self) -> &'static str {
        match self {
            WorkloadRole::Prefill => "prefill",
            WorkloadRole::Decode => "decode",
            WorkloadRole::Proxy => "proxy",
        }
    }

    /// The role of that word.
    pub fn from_word(word: &str) -> Option<WorkloadRole> {
        WorkloadRole::ALL.into_iter().find(|role| role.as_str() == word)
    }
}

impl std::fmt::Display for WorkloadRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The part of a model that an object belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// One role's workload and what belongs to it.
    Role(WorkloadRole),
    /// The model as a whole: its client Service, keys and policies.
    Model,
}

impl Component {
    /// The value of [`APP_COMPONENT`].
    pub fn as_str(self) -> &'static str {
        match self {
            Component::Role(role) => role.as_str(),
            Component::Model => "model",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_of_our_labels_is_known_as_ours_and_a_users_is_not() {
        for key in [MODEL, WORKLOAD_ROLE, REVISION, SERVING_ROLE, ENGINE_TYPE, SET_REVISION, APP_NAME, APP_PART_OF] {
            assert!(is_ours(key), "{key}");
        }
        for key in ["app.kubernetes.io/version", "team", "example.com/baton.dev", "baton.dev", "x.baton.dev/model"] {
            assert!(!is_ours(key), "{key}");
        }
    }

    #[test]
    fn a_role_is_found_by_its_word() {
        for role in WorkloadRole::ALL {
            assert_eq!(WorkloadRole::from_word(role.as_str()), Some(role));
        }
        assert_eq!(WorkloadRole::from_word("prefill-decode"), None);
    }
}
