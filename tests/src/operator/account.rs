//! The operator's ServiceAccount and its rights: those that are shipped, or fewer.

use super::{Admin, NAME, Type};
use anyhow::Result;
use baton_operator::rbac;
use serde_json::json;
use std::collections::BTreeSet;

/// One right: a verb on a resource of a group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// API group; empty for the core group.
    pub group: String,
    /// Plural, with its subresource after a slash.
    pub resource: String,
    /// In the API server's words.
    pub verb: String,
}

impl std::fmt::Display for Right {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        if self.group.is_empty() { Ok(()) } else { write!(f, ".{}", self.group) }
    }
}

/// Where rights are valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// In the operator's namespace alone: Roles, and no ClusterRole.
    Namespace,
    /// A model's rights everywhere, the Lease's in the operator's namespace.
    Cluster,
}

/// What an account may do.
#[derive(Clone, Debug)]
pub struct Rights {
    models: BTreeSet<Right>,
    own: BTreeSet<Right>,
}

fn rights(rules: &[rbac::Rule]) -> BTreeSet<Right> {
    let each = |rule: &rbac::Rule| -> Vec<Right> {
        let right = |verb: &&str| Right {
            group: rule.group.to_owned(),
            resource: rule.resource.to_owned(),
            verb: (*verb).to_owned(),
        };
        rule.verbs.iter().map(right).collect()
    };
    rules.iter().flat_map(each).collect()
}

impl Rights {
    /// What the chart and the kustomization give.
    pub fn shipped() -> Self {
        Rights { models: rights(rbac::MODELS), own: rights(rbac::OWN) }
    }

    /// All but one.
    #[must_use]
    pub fn without(mut self, right: &Right) -> Self {
        self.models.remove(right);
        self.own.remove(right);
        self
    }

    /// Each of them.
    pub fn all(&self) -> BTreeSet<Right> {
        self.models.union(&self.own).cloned().collect()
    }

    /// Makes the operator's account in a namespace and gives it these rights.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn grant(&self, admin: &Admin, namespace: &str, scope: Scope) -> Result<()> {
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": NAME}});
        admin.apply(Type::SERVICE_ACCOUNT, namespace, &account)?;
        let everywhere = format!("{NAME}-{namespace}");
        match scope {
            Scope::Namespace => self.grant_models(admin, namespace, namespace)?,
            Scope::Cluster => bind(admin, namespace, namespace, "ClusterRole", &everywhere, &self.models)?,
        }
        bind(admin, namespace, namespace, "Role", NAME, &self.own)
    }

    /// Gives these rights on the models of one namespace to the operator of another, or of the same.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn grant_models(&self, admin: &Admin, namespace: &str, operator: &str) -> Result<()> {
        bind(admin, namespace, operator, "Role", &format!("{NAME}-models"), &self.models)
    }
}

/// Gives an operator's account rights in a namespace, or everywhere.
fn bind(
    admin: &Admin,
    namespace: &str,
    operator: &str,
    kind: &str,
    name: &str,
    rights: &BTreeSet<Right>,
) -> Result<()> {
    const VERSION: &str = "rbac.authorization.k8s.io/v1";
    let rules: Vec<_> = rights
        .iter()
        .map(|right| json!({"apiGroups": [right.group], "resources": [right.resource], "verbs": [right.verb]}))
        .collect();
    let role = json!({"apiVersion": VERSION, "kind": kind, "metadata": {"name": name}, "rules": rules});
    let binding = json!({
        "apiVersion": VERSION,
        "kind": format!("{kind}Binding"),
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": operator}],
    });
    let (roles, bindings) = match kind {
        "Role" => (Type::ROLE, Type::ROLE_BINDING),
        _ => (Type::CLUSTER_ROLE, Type::CLUSTER_ROLE_BINDING),
    };
    admin.apply(roles, namespace, &role)?;
    admin.apply(bindings, namespace, &binding)?;
    Ok(())
}
