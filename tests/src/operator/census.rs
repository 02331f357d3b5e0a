//! Every pod that a namespace has ever had: a pod that came and went between two looks is one that was started needlessly.

use crate::kube::{ControlPlane, client_of};
use anyhow::Result;
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::runtime::watcher::{self, Event, watcher};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A pod that was there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// How many other pods were seen before it.
    pub number: usize,
}

/// Pods by uid, from the start of the census on.
pub struct Census {
    seen: Arc<Mutex<BTreeMap<String, Seen>>>,
    // Its end ends the watch.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Census {
    /// Watches a namespace's pods from now on.
    ///
    /// # Errors
    /// When there is no client for the cluster.
    pub fn start(plane: &ControlPlane, namespace: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let client = runtime.block_on(client_of(plane.kubeconfig()))?;
        let pods: Api<Pod> = Api::namespaced(client, namespace);
        let seen = Arc::new(Mutex::new(BTreeMap::new()));
        let book = seen.clone();
        runtime.spawn(async move {
            let mut events = watcher(pods, watcher::Config::default()).boxed();
            while let Some(event) = events.next().await {
                let Ok(Event::Apply(pod) | Event::InitApply(pod)) = event else { continue };
                let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
                let number = book.len();
                let name = pod.metadata.name.unwrap_or_default();
                book.entry(pod.metadata.uid.unwrap_or_default()).or_insert(Seen { name, number });
            }
        });
        Ok(Census { seen, runtime: Some(runtime) })
    }

    /// How many pods were there so far.
    pub fn count(&self) -> usize {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Names of the pods that came after the first `count`.
    pub fn since(&self, count: usize) -> Vec<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.values().filter(|seen| seen.number >= count).map(|seen| seen.name.clone()).collect()
    }
}

impl Drop for Census {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
