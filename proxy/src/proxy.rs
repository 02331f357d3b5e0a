//! What all requests of one proxy share: limits, key, table of workers, metrics. Holds them together and decides nothing.

use crate::admission::{self, Admission, Permit};
use crate::api_keys::{ApiKeys, Tenant};
use crate::choose::Router;
use crate::config::{Limits, PrefillerHeader, Resilience, Selection};
use crate::connector::Connector;
use crate::decisions::Decisions;
use crate::drain::{Drain, Room, Work};
use crate::eligible::Own;
use crate::estimate::Policy;
use crate::followed::Followed;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::pipeline::continuation;
use crate::request_state;
use crate::workers::{Table, Workers};
use ed25519_dalek::SigningKey;
use http::HeaderMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

/// Prefill workers that one request is tried on: a second one serves when the first has just died.
const PREFILL_ATTEMPTS_MAX: u32 = 2;

/// Decode workers that one held KV is tried on. One more than for prefill, because a try costs nothing that is not there already.
const DECODE_ATTEMPTS_MAX: u32 = 3;

/// What a client is told to wait when no worker could serve: by then each worker has been asked for its status anew.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Bytes of bodies that waiting requests will send, as far as they announce them. They are not read meanwhile; this is what would be
/// read at once if all were let in.
const QUEUED_BYTES_MAX: usize = 1 << 30;

/// Proxies that follow this pod's engine at once: one for each pod of a model, of which a thousand is more than anybody runs. A line waits
/// in the engine and not here, so each costs a connection and a buffer.
const KV_EVENT_STREAMS_MAX: usize = 1024;

/// The shared state of one proxy.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) revision: String,
    pub(crate) connector: Connector,
    policy: watch::Receiver<Policy>,
    pub(crate) resilience: Resilience,
    pub(crate) prefiller_header: Option<PrefillerHeader>,
    pub(crate) trust_routing_hints: bool,
    pub(crate) limits: Limits,
    pub(crate) key: SigningKey,
    pub(crate) workers: Arc<Workers>,
    pub(crate) metrics: Metrics,
    pub(crate) decisions: Decisions,
    pub(crate) drain: Drain,
    /// KV that prefill engines hold for requests of this proxy.
    pub(crate) ledger: Ledger,
    /// Held from looking at the loads to reserving, so that two requests at once don't both see the same worker idle.
    pub(crate) router: Mutex<Router>,
    /// What workers tell of their prefix caches.
    pub(crate) followed: Followed,
    /// Room for other pods' proxies that follow this pod's engine.
    pub(crate) kv_event_slots: Arc<Semaphore>,
    pub(crate) admission: Admission,
    keys: Option<watch::Receiver<Arc<ApiKeys>>>,
    /// Whose every request is where there are no keys.
    everybody: Arc<Tenant>,
    pub(crate) leg_slots: Arc<Semaphore>,
    /// Room for requests that are kept while they are streamed.
    pub(crate) kept: continuation::Room,
}

/// What a proxy was told, as far as requests depend on it.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) revision: String,
    pub(crate) connector: Connector,
    pub(crate) resilience: Resilience,
    pub(crate) selection: Selection,
    pub(crate) prefiller_header: Option<PrefillerHeader>,
    pub(crate) trust_routing_hints: bool,
    pub(crate) limits: Limits,
}

impl Proxy {
    pub(crate) fn new(
        settings: Settings,
        policy: watch::Receiver<Policy>,
        keys: Option<watch::Receiver<Arc<ApiKeys>>>,
        key: SigningKey,
        workers: Arc<Workers>,
    ) -> Self {
        let Settings { revision, connector, resilience, selection, prefiller_header, trust_routing_hints, limits } =
            settings;
        Proxy {
            revision,
            connector,
            policy,
            resilience,
            prefiller_header,
            trust_routing_hints,
            limits,
            key,
            workers,
            ledger: Ledger::default(),
            router: Mutex::new(Router::new(selection, Instant::now())),
            metrics: Metrics::new(),
            decisions: Decisions::default(),
            drain: Drain::default(),
            followed: Followed::default(),
            kv_event_slots: Arc::new(Semaphore::new(KV_EVENT_STREAMS_MAX)),
            admission: Admission::new(admission::Limits {
                in_flight_max: limits.in_flight_max,
                queued_max: limits.queued_max,
                queued_bytes_max: QUEUED_BYTES_MAX,
            }),
            keys,
            everybody: Arc::new(Tenant::everybody()),
            kept: continuation::Room::default(),
            leg_slots: Arc::new(Semaphore::new(limits.in_flight_max)),
        }
    }

    /// Which prompts go to a prefill worker, as of now.
    pub(crate) fn policy(&self) -> Policy {
        *self.policy.borrow()
    }

    /// What the state machine of a request goes by.
    pub(crate) fn request_policy(&self) -> request_state::Policy {
        request_state::Policy {
            prefill_attempts_max: PREFILL_ATTEMPTS_MAX,
            decode_attempts_max: DECODE_ATTEMPTS_MAX,
            fallback: self.resilience.fallback,
            enforce_disagg: self.resilience.enforce_disaggregation,
            retry_after: RETRY_AFTER,
        }
    }

    /// What workers of this table are compared with.
    pub(crate) fn own<'a>(&'a self, table: &Table) -> Own<'a> {
        Own { revision: &self.revision, epoch: table.own_epoch(), connector: self.connector }
    }

    /// Whose request it is; `None` where its key is missing or wrong.
    pub(crate) fn tenant(&self, headers: &HeaderMap) -> Option<Arc<Tenant>> {
        match &self.keys {
            None => Some(Arc::clone(&self.everybody)),
            Some(keys) => keys.borrow().authenticate(headers),
        }
    }

    /// Whether clients need a key.
    pub(crate) fn has_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Counts a client's request that was let in.
    pub(crate) fn client_work(&self, permit: Permit) -> Work {
        self.drain.work(Room::Client { _permit: permit }, self.metrics.in_flight.clone())
    }

    /// Room for one more leg of another pod's proxy, if there is any.
    pub(crate) fn admit_leg(&self) -> Option<Work> {
        let permit = Arc::clone(&self.leg_slots).try_acquire_owned().ok()?;
        Some(self.drain.work(Room::Leg { _permit: permit }, self.metrics.legs_in_flight.clone()))
    }
}

#[cfg(test)]
pub(crate) mod fixtures {
    //! A proxy for the tests of those who are handed one.
    use super::*;
    use crate::config::{Fallback, Mode};

    pub(crate) fn proxy(connector: Connector, workers: Arc<Workers>) -> Arc<Proxy> {
        let second = Duration::from_secs(1);
        let settings = Settings {
            revision: "r1".into(),
            connector,
            resilience: Resilience {
                fallback: Fallback::Always,
                enforce_disaggregation: false,
                lease: Duration::from_secs(30),
            },
            selection: Selection { prefill: Mode::KvAware, decode: Mode::KvAware },
            prefiller_header: None,
            trust_routing_hints: false,
            limits: Limits {
                body_bytes_max: 1,
                in_flight_max: 1,
                queued_max: 0,
                request_timeout: second,
                first_token_timeout: second,
                idle_timeout: second,
            },
        };
        let (_, policy) = watch::channel(Policy::Always);
        Arc::new(Proxy::new(settings, policy, None, SigningKey::from_bytes(&[1; 32]), workers))
    }
}
