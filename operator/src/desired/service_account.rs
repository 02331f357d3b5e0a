//! What a role's pods run as.

use super::names;
use super::scope::{Scope, child};
use crate::child::{Child, Kind};
use crate::plan::WorkloadRole;
use k8s_openapi::api::core::v1::ServiceAccount;

/// A role's ServiceAccount. The operator gives it no right, and pods no token but for the one that the routing proxy needs where
/// it watches EndpointSlices: a name of its own lets an administrator grant a role's pods that, or what a cloud's storage asks for.
pub(super) fn of_role(scope: &Scope<'_>, role: WorkloadRole) -> Child {
    let metadata = scope.of_role(names::role(&scope.model.name, role), role);
    let account = ServiceAccount {
        metadata: metadata.clone(),
        automount_service_account_token: Some(false),
        ..Default::default()
    };
    child(Kind::ServiceAccount, &metadata, &account)
}
