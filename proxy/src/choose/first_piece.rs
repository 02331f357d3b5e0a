//! What the first piece of a decode engine's stream tells the estimates: how long it took from sending the leg, and what that was for.
//!
//! The piece and not the headers, because an engine may send those as soon as it has read the request: before it has taken KV over or
//! computed anything.

use super::lock;
use crate::estimate::{Prefill, Wait};
use crate::proxy::Proxy;
use crate::pulse::Watch;
use crate::select::WorkerKey;
use std::sync::Arc;
use tokio::time::Instant;

/// What a stream's first piece waits for.
#[derive(Debug)]
pub(crate) enum For {
    /// KV that this prefill worker has computed.
    Transfer(WorkerKey),
    /// The prompt, which this decode worker computes itself, beside its other streams. Boxed, for every stream has room for this.
    Local(WorkerKey, Box<Watch>),
}

/// A decode leg whose first piece has not come.
#[derive(Debug)]
pub(crate) struct FirstPiece {
    pub(super) proxy: Arc<Proxy>,
    /// When the leg was sent.
    pub(super) since: Instant,
    pub(super) prompt_tokens: u64,
    pub(super) what: For,
}

impl FirstPiece {
    /// It has come.
    pub(crate) fn came(self, now: Instant) {
        let FirstPiece { proxy, since, prompt_tokens, what } = self;
        let elapsed_ms = now.saturating_duration_since(since).as_secs_f64() * 1e3;
        match what {
            For::Transfer(prefill) => {
                let mut router = lock(&proxy);
                let now_ms = router.now_ms();
                router.estimates.record_transfer(prefill, prompt_tokens, elapsed_ms, now_ms);
            }
            For::Local(decode, watch) => local(&proxy, decode, prompt_tokens, elapsed_ms, *watch, now),
        }
    }
}

/// A decode worker has computed a prompt itself and sent its first token, and its other streams have stood still for so long.
pub(super) fn local(
    proxy: &Proxy,
    decode: WorkerKey,
    computed_tokens: u64,
    elapsed_ms: f64,
    watch: Watch,
    now: Instant,
) {
    let standstill = watch.end(now);
    let mut router = lock(proxy);
    let now_ms = router.now_ms();
    let leg = Prefill { computed_tokens, wait: Wait::Behind(0), elapsed_ms };
    router.estimates.record_local_prefill(decode, leg, now_ms);
    if let Some(standstill) = standstill {
        router.estimates.record_interference(decode, elapsed_ms, standstill.as_secs_f64() * 1e3, now_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connector::Connector;
    use crate::estimate::Known;
    use crate::proxy::fixtures::proxy;
    use crate::pulse::Pulse;
    use crate::workers::Workers;
    use std::time::Duration;

    const WORKER: WorkerKey = WorkerKey(7);

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn known(proxy: &Proxy) -> Known {
        let router = lock(proxy);
        let now_ms = router.now_ms();
        router.estimates.known(WORKER, now_ms)
    }

    #[test]
    fn prompts_that_a_decode_worker_computes_tell_for_how_long_its_streams_stand_still() {
        let proxy = proxy(Connector::VllmNixl, Arc::new(Workers::new(None, &[])));
        let pulse = Arc::new(Pulse::default());
        let stream = pulse.sample(None).expect("nobody else");
        let mut now = Instant::now();
        for round in 0..16 {
            for _ in 0..20 {
                now += ms(10);
                stream.piece(now);
            }
            // The prompt takes 100 ms, for 60 of which the stream waits beyond its pace.
            let what = For::Local(WORKER, Box::new(pulse.watch(None, now)));
            let first = FirstPiece { proxy: Arc::clone(&proxy), since: now, prompt_tokens: 500 + 50 * round, what };
            stream.piece(now + ms(70));
            for later in [80, 90, 100] {
                stream.piece(now + ms(later));
            }
            now += ms(100);
            first.came(now);
        }
        let known = known(&proxy);
        let standstill = known.standstill.expect("it has been measured");
        assert!((standstill - 0.6).abs() < 1e-6, "{standstill}");
        assert!(known.local_prefill.is_some() && known.transfer.is_none());
    }

    #[test]
    fn without_a_stream_beside_it_a_prompt_tells_its_own_time_alone() {
        let proxy = proxy(Connector::VllmNixl, Arc::new(Workers::new(None, &[])));
        let (pulse, now) = (Arc::new(Pulse::default()), Instant::now());
        for round in 0..16 {
            let what = For::Local(WORKER, Box::new(pulse.watch(None, now)));
            let first = FirstPiece { proxy: Arc::clone(&proxy), since: now, prompt_tokens: 500 + 50 * round, what };
            first.came(now + ms(100));
        }
        let known = known(&proxy);
        assert!(known.local_prefill.is_some() && known.standstill.is_none(), "{known:?}");
    }

    #[test]
    fn a_handover_lasts_until_the_first_piece() {
        let proxy = proxy(Connector::VllmNixl, Arc::new(Workers::new(None, &[])));
        let now = Instant::now();
        for _ in 0..16 {
            let what = For::Transfer(WORKER);
            FirstPiece { proxy: Arc::clone(&proxy), since: now, prompt_tokens: 1000, what }.came(now + ms(20));
        }
        let known = known(&proxy);
        let took = known.transfer.expect("it has been measured").at(1000);
        assert!((took - 20.0).abs() < 1e-6 && known.local_prefill.is_none(), "{known:?}");
    }
}
