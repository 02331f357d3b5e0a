//! What the legs of our own workers tell the estimates. Both legs are sent together, so their parts are told apart by what the prefill
//! worker says of its computing; what is left until the first token is the handover.

use super::{first_piece, lock};
use crate::estimate::{Prefill, Wait};
use crate::proxy::Proxy;
use crate::pulse::Watch;
use crate::select::WorkerKey;
use crate::workers::Worker;
use baton_wire::leg::PrefillDone;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Both legs of one request, from their dispatch on. What the prefill worker says and the first token come in either order.
#[derive(Debug)]
pub(crate) struct Timing {
    proxy: Arc<Proxy>,
    prefill: WorkerKey,
    since: Instant,
    /// Prompt tokens that were ahead at the prefill worker.
    ahead: u64,
    told: Mutex<Told>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Told {
    done: Option<PrefillDone>,
    first_token: Option<Duration>,
}

impl Timing {
    /// The legs are dispatched now.
    pub(crate) fn begin(proxy: &Arc<Proxy>, prefill: &Worker, ahead: u64) -> Arc<Self> {
        let (proxy, prefill) = (Arc::clone(proxy), WorkerKey(u64::from(prefill.number)));
        Arc::new(Timing { proxy, prefill, since: Instant::now(), ahead, told: Mutex::default() })
    }

    /// The prefill worker has said what it did.
    pub(crate) fn prefilled(&self, done: PrefillDone) {
        let computed_tokens = computed(done);
        if computed_tokens > 0 && done.compute_ms > 0.0 {
            // What it says begins when it was the leg's turn.
            let leg = Prefill { computed_tokens, wait: Wait::Behind(0), elapsed_ms: done.compute_ms };
            let mut router = lock(&self.proxy);
            let now_ms = router.now_ms();
            router.estimates.record_prefill(self.prefill, leg, now_ms);
        }
        self.tell(|told| told.done = Some(done));
    }

    /// The decode worker has sent the first token, from the KV that was handed over.
    pub(crate) fn first_token(&self) {
        let took = self.since.elapsed();
        self.tell(|told| told.first_token = Some(took));
    }

    fn tell(&self, what: impl FnOnce(&mut Told)) {
        let told = {
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            what(&mut told);
            *told
        };
        if let Told { done: Some(done), first_token: Some(first_token) } = told
            && let Some(handover_ms) = handover_ms(done, first_token, self.ahead)
        {
            let mut router = lock(&self.proxy);
            let now_ms = router.now_ms();
            router.estimates.record_transfer(self.prefill, done.prompt_tokens, handover_ms, now_ms);
        }
    }
}

fn computed(done: PrefillDone) -> u64 {
    done.prompt_tokens.saturating_sub(done.cached_tokens)
}

/// What was neither computing nor waiting for those ahead, who are taken to have been computed at the same speed. Nothing where the
/// prefill worker says nothing of its computing.
fn handover_ms(done: PrefillDone, first_token: Duration, ahead: u64) -> Option<f64> {
    let computed = computed(done);
    if computed == 0 || done.compute_ms <= 0.0 {
        return None;
    }
    let waited_ms = done.compute_ms / computed as f64 * ahead as f64;
    Some((first_token.as_secs_f64() * 1e3 - done.compute_ms - waited_ms).max(0.0))
}

/// A decode worker has computed a prompt itself since then, and sent its first token, with which our workers' headers come.
pub(crate) fn computed_locally(proxy: &Proxy, decode: &Worker, uncached_tokens: u64, since: Instant, watch: Watch) {
    let (key, now) = (WorkerKey(u64::from(decode.number)), Instant::now());
    first_piece::local(proxy, key, uncached_tokens, (now - since).as_secs_f64() * 1e3, watch, now);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handover_is_what_is_left_of_the_time_to_the_first_token() {
        let check = |cached_tokens, compute_ms, first_token_ms, ahead, expect: Option<f64>| {
            let done = PrefillDone { prompt_tokens: 100, cached_tokens, kv_bytes: 1, compute_ms };
            assert_eq!(handover_ms(done, Duration::from_millis(first_token_ms), ahead), expect);
        };
        check(0, 50.0, 60, 0, Some(10.0));
        check(50, 50.0, 160, 100, Some(10.0));
        check(0, 50.0, 40, 0, Some(0.0));
        check(100, 1.0, 60, 0, None);
        check(0, 0.0, 60, 0, None);
    }
}
