//! The list of the model's pods, from every source that was given. Yields addresses only; who is behind them, and whether they
//! are ready, is asked of them.

mod dns;
mod endpoint_slices;
mod file;

use crate::address::Address;
use crate::config::{ApiServer, ServicePort};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Addresses in one source. Each is asked for its status twice a second, and a model of a thousand pods wants another tier.
const ENDPOINTS_MAX: usize = 1000;

/// Where addresses come from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// A file that lists them.
    File(PathBuf),
    /// A name that stands for them.
    Dns(Address),
    /// A Service's EndpointSlices, at the API server.
    EndpointSlices(ServicePort, ApiServer),
}

/// Keeps the list as the sources have it, all together. Ends with its caller, or at once where there is no source.
pub(crate) async fn watch(sources: Vec<Source>, peers: watch::Sender<BTreeSet<Address>>) {
    let lists = Arc::new(Lists { by_source: Mutex::new(vec![BTreeSet::new(); sources.len()]), union: peers });
    let mut following = JoinSet::new();
    for (index, source) in sources.into_iter().enumerate() {
        let list = List { lists: Arc::clone(&lists), index };
        match source {
            Source::File(path) => following.spawn(file::follow(path, list)),
            Source::Dns(name) => following.spawn(dns::follow(name, list, dns::System)),
            Source::EndpointSlices(service, api) => following.spawn(endpoint_slices::follow(service, api, list)),
        };
    }
    while following.join_next().await.is_some() {}
}

/// What each source said last, and all of it together.
#[derive(Debug)]
struct Lists {
    by_source: Mutex<Vec<BTreeSet<Address>>>,
    union: watch::Sender<BTreeSet<Address>>,
}

/// One source's part.
#[derive(Debug)]
struct List {
    lists: Arc<Lists>,
    index: usize,
}

impl List {
    fn set(&self, listed: BTreeSet<Address>) {
        let mut by_source = self.lists.by_source.lock().unwrap_or_else(PoisonError::into_inner);
        by_source[self.index] = listed;
        let all: BTreeSet<Address> = by_source.iter().flatten().cloned().collect();
        // Still under the lock, so that no older picture is published after a newer one.
        let changed = self.lists.union.send_if_modified(|now| std::mem::replace(now, all) != *now);
        if changed {
            tracing::info!(endpoints = self.lists.union.borrow().len(), "endpoints changed");
        }
    }
}

#[cfg(test)]
mod fixtures {
    //! The only source of a test.
    use super::*;

    pub(super) fn list() -> (List, watch::Receiver<BTreeSet<Address>>) {
        let (union, peers) = watch::channel(BTreeSet::new());
        let lists = Arc::new(Lists { by_source: Mutex::new(vec![BTreeSet::new()]), union });
        (List { lists, index: 0 }, peers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(text: &str) -> BTreeSet<Address> {
        text.split_whitespace().map(|address| address.parse().expect("an address")).collect()
    }

    #[test]
    fn the_peers_are_all_that_any_source_lists() {
        let (first, peers) = fixtures::list();
        first.lists.by_source.lock().expect("unpoisoned").push(BTreeSet::new());
        let second = List { lists: Arc::clone(&first.lists), index: 1 };
        first.set(addresses("10.0.0.1:8000 10.0.0.2:8000"));
        second.set(addresses("10.0.0.2:8000 10.0.0.3:8000"));
        assert_eq!(*peers.borrow(), addresses("10.0.0.1:8000 10.0.0.2:8000 10.0.0.3:8000"));
        first.set(BTreeSet::new());
        assert_eq!(*peers.borrow(), addresses("10.0.0.2:8000 10.0.0.3:8000"), "what the other lists stays");
    }
}
