//! Asks each worker for its status, again and again, and writes the answers into the table. Peers must sign theirs over a
//! nonce of ours: an address in a file says nothing of who answers there.

use crate::address::Address;
use crate::entropy;
use crate::upstream::{Request, Upstream, UpstreamError, by};
use crate::workers::probe::Probe;
use crate::workers::{Link, Report, Workers};
use baton_wire::names::{headers, paths};
use baton_wire::signing::{self, LegClaims};
use ed25519_dalek::SigningKey;
use http::{HeaderValue, StatusCode};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// How old a worker's report may get. Loads change with every request; two questions a second cost a worker nothing and are
/// what our own reservations have to bridge.
const INTERVAL: Duration = Duration::from_millis(500);

/// How long a worker that does not answer is left alone at most: what a restarted worker waits before it gets work.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// How long one answer may take. It is one small message from a server that does nothing else for it.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// Answers in a row that may fail to come in time before a worker counts as unreachable: a host whose cores are all busy is
/// late now and then. A refused connection counts at once.
const LATE_MAX: u32 = 3;

/// How long the signature of a question holds, by which a proxy that asks clients for keys knows us: two nodes' clocks may differ.
const ASKED_TTL_MS: u64 = 30_000;

/// Bytes of a status: one is under 2 KiB.
pub(crate) const STATUS_BYTES_MAX: usize = 64 << 10;

/// Keeps asking this pod's engine, the engines that flags name, and every peer, as the list of peers changes. Ends with its caller.
/// Engines that are not ours are asked by their probes, of which there is one for each of them.
pub(crate) async fn run(
    workers: Arc<Workers>,
    key: SigningKey,
    mut probes: BTreeMap<Address, Probe>,
    mut peers: watch::Receiver<BTreeSet<Address>>,
) {
    let ask_with = |link: Link, upstream: &Arc<Upstream>, asker: Asker| {
        AbortOnDropHandle::new(tokio::spawn(keep_asking(Arc::clone(&workers), link, Arc::clone(upstream), asker)))
    };
    let ask = |link: Link, upstream: &Arc<Upstream>| ask_with(link, upstream, Asker::Ours(Box::new(key.clone())));
    let _fixed: Vec<_> = (workers.table().workers.iter())
        .filter(|worker| worker.link != Link::Peer)
        .map(|worker| match probes.remove(worker.address()) {
            Some(probe) => ask_with(worker.link, &worker.upstream, Asker::Foreign(Box::new(probe))),
            None => ask(worker.link, &worker.upstream),
        })
        .collect();
    let mut asked: BTreeMap<Address, AbortOnDropHandle<()>> = BTreeMap::new();
    loop {
        let listed = peers.borrow_and_update().clone();
        workers.set_peers(&listed);
        asked.retain(|address, _| listed.contains(address));
        for worker in workers.table().workers.iter().filter(|worker| worker.link == Link::Peer) {
            asked.entry(worker.address().clone()).or_insert_with(|| ask(Link::Peer, &worker.upstream));
        }
        if peers.changed().await.is_err() {
            // The list can't change any more; those on it are still asked.
            std::future::pending::<()>().await;
        }
    }
}

/// How a worker is asked.
enum Asker {
    /// It has a status: our own worker, or a proxy of ours, which signs it.
    Ours(Box<SigningKey>),
    /// It has none.
    Foreign(Box<Probe>),
}

async fn keep_asking(workers: Arc<Workers>, link: Link, upstream: Arc<Upstream>, mut asker: Asker) {
    let mut pause = INTERVAL;
    let mut late = 0;
    loop {
        let asked = match &mut asker {
            Asker::Ours(key) => ask(link, &upstream, key).await,
            Asker::Foreign(probe) => probe.ask(&upstream).await,
        };
        let report = match asked {
            Ok(report) => {
                late = 0;
                Some(report)
            }
            Err(UpstreamError::Timeout { .. }) if late + 1 < LATE_MAX => {
                late += 1;
                None
            }
            Err(_) => Some(Report::Unreachable),
        };
        if let Some(report) = report {
            pause = match report {
                Report::Said(_) => INTERVAL,
                Report::NotAsked | Report::Unreachable | Report::Unsigned | Report::Garbled => {
                    (pause * 2).min(BACKOFF_MAX)
                }
            };
            note_change(&workers, link, upstream.address(), &report);
            workers.report(link, upstream.address(), report);
        }
        tokio::time::sleep(pause).await;
    }
}

/// One line for each change of what is known of a worker, none for a load that merely moved.
fn note_change(workers: &Workers, link: Link, address: &Address, report: &Report) {
    let table = workers.table();
    let Some(before) = table.workers.iter().find(|worker| worker.link == link && worker.address() == address) else {
        return;
    };
    match (&before.report, report) {
        (Report::Said(before), Report::Said(now))
            if (before.state, before.epoch, before.role) == (now.state, now.epoch, now.role) => {}
        (_, Report::Said(now)) => {
            tracing::info!(worker = %address, role = %now.role, state = ?now.state, epoch = %now.epoch, "worker");
        }
        (Report::Unreachable, Report::Unreachable)
        | (Report::Unsigned, Report::Unsigned)
        | (Report::Garbled, Report::Garbled) => {}
        (_, Report::NotAsked | Report::Unreachable) => tracing::warn!(worker = %address, "worker does not answer"),
        (_, Report::Unsigned) => tracing::warn!(worker = %address, "worker's status is not signed by our key"),
        (_, Report::Garbled) => tracing::warn!(worker = %address, "worker's status can't be read"),
    }
}

async fn ask(link: Link, upstream: &Upstream, key: &SigningKey) -> Result<Report, UpstreamError> {
    let nonce = entropy::hex();
    let mut request = Request::get(paths::STATUS);
    if link == Link::Peer {
        let nonce = HeaderValue::from_str(&nonce).expect("hexadecimal is a header value");
        request.headers.insert(headers::STATUS_NONCE, nonce);
        let claims = LegClaims {
            path: paths::STATUS.to_owned(),
            body_blake3: signing::body_blake3(&[]),
            expires_unix_ms: entropy::now_unix_ms() + ASKED_TTL_MS,
        };
        let token = HeaderValue::from_str(&signing::sign(key, &claims)).expect("base64url is a header value");
        request.headers.insert(headers::LEG, token);
    }
    let work = async {
        let answer = upstream.send(&request).await?;
        let signature = answer.headers.get(headers::STATUS_SIGNATURE).cloned();
        let (status, body) = (answer.status, answer.body.collect(STATUS_BYTES_MAX).await?);
        match status {
            StatusCode::OK => {}
            // The peer's proxy is there, and its engine late.
            StatusCode::GATEWAY_TIMEOUT => return Err(UpstreamError::Timeout { address: upstream.address().clone() }),
            _ => return Ok(Report::Unreachable),
        }
        if link == Link::Peer {
            let signature = signature.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default();
            if signing::verify_status(&key.verifying_key(), &nonce, &body, signature).is_err() {
                return Ok(Report::Unsigned);
            }
        }
        Ok(serde_json::from_slice(&body).map_or(Report::Garbled, |status| Report::Said(Arc::new(status))))
    };
    by(Instant::now() + STATUS_TIMEOUT, upstream.address(), work).await
}
