//! Names of a model's objects.
//!
//! A model's name has at most 30 characters, a role's word 7 and a revision 8, so a workload's has at most 47: of the 63 that
//! a label may have, Kubernetes appends 11 for a ReplicaSet and LeaderWorkerSet an index.

use crate::plan::WorkloadRole;

/// The workload of a role and revision.
pub fn workload(model: &str, role: WorkloadRole, revision: &str) -> String {
    format!("{model}-{}-{revision}", role.as_str())
}

/// The headless Service by which the proxies of one revision find its workers.
pub fn peers(workload: &str) -> String {
    format!("{workload}-peers")
}

/// A role's ServiceAccount, PodDisruptionBudget and NetworkPolicy, which all revisions share.
pub fn role(model: &str, role: WorkloadRole) -> String {
    format!("{model}-{}", role.as_str())
}

/// The Secret with the proxies' signing key.
pub fn signing_key(model: &str) -> String {
    format!("{model}-signing-key")
}

/// The Secret with its public half.
pub fn signing_public(model: &str) -> String {
    format!("{model}-signing-public")
}

/// The Secret with the model's certificate authority.
pub fn authority(model: &str) -> String {
    format!("{model}-ca")
}

/// The Secret with a role's certificate.
pub fn certificate(model: &str, role: WorkloadRole) -> String {
    format!("{model}-{}-tls", role.as_str())
}

/// What clients dial: the model's Service, by the name that every namespace of the cluster resolves.
pub fn url(model: &str, namespace: &str) -> String {
    format!("http://{model}.{namespace}.svc:{}", baton_wire::names::ports::PROXY)
}
