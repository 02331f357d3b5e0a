//! `baton-worker fetch`: a model from a hub or a bucket into a directory, whole and verified, or not at all.
//!
//! ```text
//!  config -> store (lock, what is there) -> remote (hub | s3): listing -> select (pure) -> download, some at once -> marker
//!                                              └────────── web: one GET, its redirects, what its failure means
//! ```
//!
//! What a file is called is checked before it names anything on the volume. A file gets its name once it is verified, and the
//! directory its marker once all of them have theirs; whoever finds the marker has nothing left to do. `http` tells `progress`.

mod config;
mod download;
mod error;
mod http;
mod hub;
mod pace;
mod part;
mod progress;
mod remote;
mod s3;
mod select;
mod store;
mod web;

pub use config::{Config, ConfigError};
pub use error::FetchError;
pub use pace::Pace;

use baton_wire::progress::Phase;
use download::Download;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use progress::Tracker;
use remote::{Entry, Listing, Remote};
use select::Selection;
use std::time::Duration;
use store::{Kept, Marker, Store};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;
use web::Web;

/// Files that are downloaded at once: a hub bounds what one connection gets, and few machines take more than some of them give.
const FILES_AT_ONCE: usize = 4;

/// How often the log says how far it is.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Bytes of a checkpoint's index: a line for each tensor, of which the largest published models have some ten thousands.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Downloads the model, or finds that it is there.
///
/// # Errors
/// See [`FetchError`]; what is there then is where the next attempt goes on.
pub async fn run(config: Config) -> Result<(), FetchError> {
    let tracker = Tracker::new(&config.uri);
    let _admin = match config.admin_listen {
        None => None,
        Some(address) => {
            let listener = TcpListener::bind(address).await.map_err(|source| FetchError::Listen { address, source })?;
            Some(AbortOnDropHandle::new(tokio::spawn(http::serve(listener, tracker.clone()))))
        }
    };
    let _log = AbortOnDropHandle::new(tokio::spawn(log(tracker.clone())));
    let outcome = fetch(&config, &tracker).await;
    match &outcome {
        Ok(()) => tracker.is_in(Phase::Complete),
        Err(error) => tracker.has_failed(error),
    }
    outcome
}

async fn fetch(config: &Config, tracker: &Tracker) -> Result<(), FetchError> {
    let store = Store::new(&config.to);
    if store.is_complete(&config.uri, config.revision())? {
        return Ok(());
    }
    let _lock = store.lock(tracker, &config.pace).await?;
    // Whoever held the lock may have done all the work.
    if store.is_complete(&config.uri, config.revision())? {
        return Ok(());
    }
    tracker.is_in(Phase::Listing);
    let web = Web::new()?;
    let remote = Remote::new(&config.source)?;
    let Listing { revision, entries } = remote.list(&web, tracker, &config.pace).await?;
    store.begin(&config.uri, &revision)?;

    let Selection { mut files, index } = select::select(&config.uri, &entries)?;
    tracker.is_in(Phase::Downloading);
    let download = Download {
        uri: &config.uri,
        web: &web,
        remote: &remote,
        store: &store,
        tracker,
        pace: &config.pace,
        revision: &revision,
    };
    if let Some(index) = &index {
        // It names the shards, so it comes first.
        store.check_room(std::slice::from_ref(index))?;
        download.file(index).await?;
        let text = store.read(&index.name, INDEX_BYTES_MAX)?;
        files.extend(select::shards(&config.uri, &index.name, &entries, &text)?);
    }
    tracker.expects(files.iter().chain(&index));
    store.check_room(&files)?;
    let downloads: Vec<_> = files.iter().map(|entry| download.file(entry)).collect();
    stream::iter(downloads).buffer_unordered(FILES_AT_ONCE).try_for_each(|()| std::future::ready(Ok(()))).await?;

    let kept = |entry: &Entry| Kept { name: entry.name.clone(), size: entry.size };
    store.complete(&Marker {
        uri: config.uri.clone(),
        requested: config.revision().map(str::to_owned),
        revision: revision.clone(),
        files: files.iter().chain(&index).map(kept).collect(),
    })?;
    tracing::info!(revision, files = files.len(), "complete");
    Ok(())
}

async fn log(tracker: Tracker) {
    let mut ticks = tokio::time::interval(LOG_INTERVAL);
    // The first is at once, when there is nothing to tell.
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let now = tracker.now();
        tracing::info!(
            phase = now.phase.as_str(),
            bytes_done = now.bytes_done,
            bytes_total = now.bytes_total,
            bytes_per_second = now.bytes_per_second,
            "downloading"
        );
    }
}
