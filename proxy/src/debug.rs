//! The debug pages: what the proxy believes of each worker and what it decided last. Shows, never changes.

use crate::eligible::{Ineligible, Phase, eligible};
use crate::entropy;
use crate::followed;
use crate::proxy::Proxy;
use crate::workers::{Link, OnRank, Worker};
use baton_wire::status::Status;
use bytes::Bytes;

/// A worker in the table.
#[derive(Debug, serde::Serialize)]
struct Row<'a> {
    address: &'a str,
    link: Link,
    /// Why it gets no prefill legs; null where it may.
    not_for_prefill: Option<Ineligible>,
    /// Why it gets no decode legs; null where it may.
    not_for_decode: Option<Ineligible>,
    reserved_prompt_tokens: u64,
    reserved_requests: u64,
    /// Both by data-parallel rank; empty where none was ever chosen.
    reserved_by_rank: Vec<OnRank>,
    status: Option<&'a Status>,
}

/// The table of workers with why each one may or may not serve, as JSON.
pub(crate) fn workers(proxy: &Proxy) -> Bytes {
    let table = proxy.workers.table();
    let own = proxy.own(&table);
    let row = |worker: &'_ Worker| {
        serde_json::json!(Row {
            address: worker.address().as_str(),
            link: worker.link,
            not_for_prefill: eligible(own, worker, Phase::Prefill).err(),
            not_for_decode: eligible(own, worker, Phase::Decode).err(),
            reserved_prompt_tokens: worker.reserved.prompt_tokens(),
            reserved_requests: worker.reserved.requests(),
            reserved_by_rank: worker.reserved.ranks(),
            status: worker.status(),
        })
    };
    let rows: Vec<serde_json::Value> = table.workers.iter().map(|worker| row(worker)).collect();
    let now = entropy::now_unix_ms();
    serde_json::json!({ "revision": proxy.revision, "unix_ms": now, "workers": rows }).to_string().into()
}

/// The last decisions with their inputs, oldest first, as JSON.
pub(crate) fn decisions(proxy: &Proxy) -> Bytes {
    serde_json::json!({ "unix_ms": entropy::now_unix_ms(), "decisions": proxy.decisions.all() }).to_string().into()
}

/// KV that prefill engines hold, and how holds have ended, as JSON.
pub(crate) fn holds(proxy: &Proxy) -> Bytes {
    serde_json::json!(proxy.ledger.snapshot(tokio::time::Instant::now())).to_string().into()
}

/// What is known of each worker's prefix cache, by counts, as JSON.
pub(crate) fn prefix(proxy: &Proxy) -> Bytes {
    let table = proxy.workers.table();
    let row = |known: followed::Known| {
        let worker = table.workers.iter().find(|worker| worker.number == known.holder.worker);
        serde_json::json!({
            "worker": worker.map(|worker| worker.address().as_str()),
            "dp_rank": known.holder.dp_rank,
            "state": known.stream.as_str(),
            "block_tokens": known.block_tokens,
            "blocks": known.blocks,
        })
    };
    let rows: Vec<serde_json::Value> = proxy.followed.known(tokio::time::Instant::now()).into_iter().map(row).collect();
    let (resyncs, refused_blocks) = proxy.followed.troubles();
    serde_json::json!({ "workers": rows, "resyncs": resyncs, "refused_blocks": refused_blocks }).to_string().into()
}
