//! Gives held KV back: sends a request for one token with its handle to a decode engine, any that answers. That makes the decode
//! engine take the KV or refuse it, and either makes the prefill engine free it. Runs in a task that no client's leaving ends.

use super::Ask;
use super::driver::Held;
use super::flight;
use crate::eligible::{Phase, eligible};
use crate::entropy;
use crate::proxy::Proxy;
use crate::request_state::LegFailure;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long one decode engine may take: its queue, one fetch and one token.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);

/// The pause after all decode engines have refused once; doubled each time.
const PAUSE_MIN: Duration = Duration::from_millis(50);

/// Tries every decode engine until one has taken the request, or the lease is over.
pub(super) async fn release(proxy: Arc<Proxy>, ask: Arc<Ask>, held: Held) {
    let Held { hold, handle, deadline, worker: holder } = held;
    let mut pause = PAUSE_MIN;
    while Instant::now() < deadline {
        let table = proxy.workers.table();
        let own = proxy.own(&table);
        let mut workers: Vec<_> =
            table.workers.iter().filter(|worker| eligible(own, worker, Phase::Decode).is_ok()).collect();
        let first = if workers.is_empty() { 0 } else { (entropy::draw() % workers.len() as u64) as usize };
        workers.rotate_left(first);
        for worker in workers {
            let within = ATTEMPT_TIMEOUT.min(deadline.saturating_duration_since(Instant::now()));
            match flight::release(&proxy, &ask, worker, &handle, within).await {
                Ok(()) => return hold.released(),
                // An engine that refuses the request itself may have told the prefill engine, or not: others would say the same.
                Err(failed) if failed.class == LegFailure::ClientError => {
                    tokio::time::sleep_until(deadline).await;
                    return hold.expired();
                }
                Err(_) => {}
            }
        }
        tokio::time::sleep(pause.min(deadline.saturating_duration_since(Instant::now()))).await;
        pause *= 2;
    }
    tracing::warn!(request_id = ask.id, worker = %holder.address(), "no decode worker took a release: the KV waits out its lease");
    hold.expired();
}
