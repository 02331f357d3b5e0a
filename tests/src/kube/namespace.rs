//! A namespace of one test.

use super::{ControlPlane, block_on};
use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Namespace as Object, ServiceAccount};
use kube::api::{Api, DeleteParams, ObjectMeta, PostParams};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Longest wait for the ServiceAccount that pods of a new namespace need: the controller makes it within a second.
const SERVICE_ACCOUNT: Duration = Duration::from_secs(20);

/// A namespace with a name that nobody else has; deleting it is asked for when this is dropped, and not waited for.
pub struct Namespace {
    name: String,
    kubeconfig: PathBuf,
}

impl Namespace {
    pub(super) fn create(plane: &ControlPlane, prefix: &str, enforces: Option<&str>) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{prefix}-{:x}-{number}", std::process::id());
        let labels: BTreeMap<String, String> = enforces
            .map(|level| ("pod-security.kubernetes.io/enforce".to_owned(), level.to_owned()))
            .into_iter()
            .collect();
        let object = Object {
            metadata: ObjectMeta { name: Some(name.clone()), labels: Some(labels), ..ObjectMeta::default() },
            ..Object::default()
        };
        let (wanted, has_controllers) = (name.clone(), plane.has_controllers());
        plane.run(async |client| {
            Api::all(client.clone()).create(&PostParams::default(), &object).await.context("create a namespace")?;
            let accounts: Api<ServiceAccount> = Api::namespaced(client, &wanted);
            if !has_controllers {
                // Nobody else makes it here, and the API server refuses pods without it.
                let metadata = ObjectMeta { name: Some("default".to_owned()), ..ObjectMeta::default() };
                let account = ServiceAccount { metadata, ..ServiceAccount::default() };
                accounts.create(&PostParams::default(), &account).await.context("create its service account")?;
            }
            super::eventually(SERVICE_ACCOUNT, "the namespace's service account", async || {
                Ok(accounts.get_opt("default").await?)
            })
            .await
        })?;
        Ok(Namespace { name, kubeconfig: plane.kubeconfig().to_owned() })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Best effort: the whole cluster may be gone by now, and goes in any case.
        let _ = block_on(async || {
            let client = super::client_of(&self.kubeconfig).await?;
            let api: Api<Object> = Api::all(client);
            let params = DeleteParams::default();
            tokio::time::timeout(Duration::from_secs(5), api.delete(&self.name, &params)).await??;
            anyhow::Ok(())
        });
    }
}
