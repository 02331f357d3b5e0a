//! The rights that the operator needs, each with its reason: the one source of every Role that is shipped.
//!
//! `make generate` writes the chart's and kustomize's rules from these tables, and tests hold the operator to them: a call
//! that they do not allow fails one, and so does a rule that nothing needs. So a new call to the API server begins here.

use k8s_openapi::api::rbac::v1::PolicyRule;

/// What may be done with one kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// API group; empty for the core group.
    pub group: &'static str,
    /// Resource's name in URLs, with the subresource after a slash.
    pub resource: &'static str,
    /// What may be done, in the API server's words.
    pub verbs: &'static [&'static str],
    /// Why it cannot be done without, as a sentence.
    pub reason: &'static str,
}

impl Rule {
    /// As Kubernetes writes it.
    pub fn policy_rule(&self) -> PolicyRule {
        PolicyRule {
            api_groups: Some(vec![self.group.to_owned()]),
            resources: Some(vec![self.resource.to_owned()]),
            verbs: self.verbs.iter().map(|&verb| verb.to_owned()).collect(),
            ..PolicyRule::default()
        }
    }
}

/// Everything that one server-side apply, prune and watch of an owned object asks for. An apply that creates is checked for
/// `create` besides `patch`; nothing is ever sent as an update.
const OWNED: &[&str] = &["get", "list", "watch", "create", "patch", "delete"];

/// What the operator does in each namespace whose models it runs.
pub const MODELS: &[Rule] = &[
    Rule {
        group: "baton.dev",
        resource: "disaggregatedmodels",
        verbs: &["get", "list", "watch"],
        reason: "The models themselves: their spec is read and never written.",
    },
    Rule {
        group: "baton.dev",
        resource: "disaggregatedmodels/status",
        verbs: &["patch"],
        reason: "What became of a model is written to its status, and nowhere else in it.",
    },
    Rule {
        group: "baton.dev",
        resource: "disaggregatedmodels/finalizers",
        verbs: &["update"],
        reason: "Owner references that block the owner's deletion are refused without it where OwnerReferencesPermissionEnforcement is on.",
    },
    Rule {
        group: "apps",
        resource: "deployments",
        verbs: OWNED,
        reason: "A role whose replica is one pod, and the standalone front door.",
    },
    Rule {
        group: "leaderworkerset.x-k8s.io",
        resource: "leaderworkersets",
        verbs: OWNED,
        reason: "A role whose replica spans nodes.",
    },
    Rule {
        group: "",
        resource: "services",
        verbs: OWNED,
        reason: "Where clients enter, and where the proxies of a revision find each other.",
    },
    Rule {
        group: "",
        resource: "configmaps",
        verbs: &["get", "list", "watch", "create", "patch"],
        reason: "What a model's pods are told, in one place to read. It goes with its model, by the cluster's garbage collection.",
    },
    Rule {
        group: "",
        resource: "serviceaccounts",
        verbs: OWNED,
        reason: "An identity of its own for each role, with no rights at all.",
    },
    Rule {
        group: "policy",
        resource: "poddisruptionbudgets",
        verbs: OWNED,
        reason: "How many of a role's pods a node drain may take at once.",
    },
    Rule {
        group: "networking.k8s.io",
        resource: "networkpolicies",
        verbs: OWNED,
        reason: "Who may dial a model's pods.",
    },
    Rule {
        group: "monitoring.coreos.com",
        resource: "podmonitors",
        verbs: OWNED,
        reason: "Scraping, where Prometheus Operator is installed.",
    },
    Rule {
        group: "",
        resource: "secrets",
        verbs: &["get", "create", "patch", "delete"],
        reason: "Signing keys and certificates that it makes, and the credentials that a model names, each by its name; there is no right to list or watch Secrets.",
    },
    Rule {
        group: "",
        resource: "pods",
        verbs: &["list", "watch"],
        reason: "Why a pod is not ready, and a failing container's last words. Pods are never written, and logs never read.",
    },
    Rule {
        group: "",
        resource: "persistentvolumeclaims",
        verbs: &["get"],
        reason: "Whether the claim that a model names exists.",
    },
    Rule {
        group: "events.k8s.io",
        resource: "events",
        verbs: &["create", "patch"],
        reason: "A transition of a model is told as an event; the same one told again raises the count of the first.",
    },
];

/// What the operator does in its own namespace.
pub const OWN: &[Rule] = &[Rule {
    group: "coordination.k8s.io",
    resource: "leases",
    verbs: &["get", "create", "update"],
    reason: "The Lease by which one of the operator's replicas leads.",
}];

/// What a person who may edit a namespace may do with its models.
pub const EDIT: &[Rule] = &[Rule {
    group: "baton.dev",
    resource: "disaggregatedmodels",
    verbs: &["create", "delete", "deletecollection", "patch", "update"],
    reason: "Whoever edits a namespace's workloads edits its models; reading comes with the role below.",
}];

/// What a person who may look at a namespace may do with its models.
pub const VIEW: &[Rule] = &[
    Rule {
        group: "baton.dev",
        resource: "disaggregatedmodels",
        verbs: &["get", "list", "watch"],
        reason: "A model holds no secret: credentials are named in it, never written into it.",
    },
    Rule {
        group: "baton.dev",
        resource: "disaggregatedmodels/status",
        verbs: &["get"],
        reason: "The status can be asked for alone.",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> impl Iterator<Item = &'static Rule> {
        [MODELS, OWN, EDIT, VIEW].into_iter().flatten()
    }

    #[test]
    fn nothing_is_asked_for_by_a_wildcard() {
        for rule in all() {
            assert!(!rule.group.contains('*') && !rule.resource.contains('*'), "{rule:?}");
            assert!(rule.verbs.iter().all(|verb| !verb.contains('*')), "{rule:?}");
        }
    }

    #[test]
    fn the_operator_cannot_list_secrets_write_pods_or_give_itself_rights() {
        for rule in [MODELS, OWN].into_iter().flatten() {
            match rule.resource {
                "secrets" => assert!(!rule.verbs.iter().any(|verb| ["list", "watch", "update"].contains(verb))),
                "pods" => assert!(rule.verbs.iter().all(|verb| ["get", "list", "watch"].contains(verb))),
                _ => assert!(!["pods/log", "pods/exec"].contains(&rule.resource)),
            }
            assert_ne!(rule.group, "rbac.authorization.k8s.io");
            assert!(!rule.verbs.iter().any(|verb| ["escalate", "bind", "impersonate"].contains(verb)), "{rule:?}");
        }
    }

    #[test]
    fn each_resource_has_one_rule_with_a_reason() {
        for rules in [MODELS, OWN, EDIT, VIEW] {
            for (number, rule) in rules.iter().enumerate() {
                assert!(rule.reason.ends_with('.'), "{rule:?}");
                let again =
                    rules[..number].iter().any(|other| (other.group, other.resource) == (rule.group, rule.resource));
                assert!(!again, "{rule:?} stands twice");
            }
        }
    }
}
