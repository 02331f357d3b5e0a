//! One request to engines that are not ours, from its body to its answer: what the state machine asks for is done here, and what
//! happens is told to it (`request_state.rs` has all the `if`s). The protocols are `connector/{vllm_nixl,sglang}.rs` (pure).
//!
//! **Nobody leaves KV behind.** All that is under way for a request is in one [`Driver`]. A client that leaves drops the future that
//! drives it; the driver then goes on in a task of its own, told that the client has left, until nothing is held any more.

mod driver;
mod flight;
pub(crate) mod pass;
mod release;

use super::{Answer, AnswerBody, Events, WHOLE_ANSWER_BYTES_MAX};
use crate::account::Account;
use crate::address::Address;
use crate::api::{self, Api};
use crate::choose::{Asked, Prefix};
use crate::connector::Connector;
use crate::failure::Failure;
use crate::forward::Hints;
use crate::json::scan::Object;
use crate::prefix::approximate::{ApproximateIndex, Chunks};
use crate::proxy::Proxy;
use crate::trace::Trace;
use crate::upstream::{self, UpstreamError, by};
use baton_wire::PathReason;
use driver::{Driver, Step};
use http::{HeaderMap, header};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, OnceLock};
use tokio::time::Instant;

/// A client's request, read, scanned and within its limits.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) id: String,
    pub(crate) api: Api,
    /// The body, and where its members are.
    pub(crate) object: Object,
    pub(crate) says: Says,
    /// As both legs get them, request id included.
    pub(crate) headers: HeaderMap,
    /// What each leg's own headers say of the client's trace.
    pub(crate) trace: Option<Arc<Trace>>,
    pub(crate) hints: Hints,
    pub(crate) prefiller: Prefiller,
    pub(crate) tenant: Tenant,
    pub(crate) prefix: Prefix,
    pub(crate) deadline: Instant,
}

impl Ask {
    /// What the choice of workers depends on.
    pub(crate) fn asked(&self) -> Asked<'_> {
        Asked { id: &self.id, says: self.says, hints: &self.hints, prefix: &self.prefix }
    }
}

/// Who says which prefill worker a request has.
#[derive(Debug)]
pub(crate) enum Prefiller {
    /// This proxy.
    Chosen,
    /// A header, and it names none: the decode engine computes the prompt.
    None,
    /// A header.
    At(Address),
}

/// Whose request it is.
#[derive(Clone, Debug)]
pub(crate) struct Tenant {
    /// For the ledger and the log; empty where there are no keys.
    pub(crate) name: Arc<str>,
    /// Separates the prefix caches of tenants.
    pub(crate) salt: u64,
}

/// What a request's body says that its way depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Says {
    pub(crate) stream: bool,
    /// Whether its KV can be handed over at all.
    pub(crate) handover: Result<(), PathReason>,
    pub(crate) prompts: usize,
    pub(crate) prompt_logprobs: bool,
    /// Counted where the request has token ids, else estimated.
    pub(crate) prompt_tokens: u64,
    /// Hash of the adapter's name.
    pub(crate) lora: Option<u64>,
    /// Hash of the session with its tenant.
    pub(crate) session: Option<u64>,
}

impl Says {
    /// Reads what matters of a body.
    pub(crate) fn of(
        connector: Connector,
        hints: &api::Hints<'_>,
        adapter: Option<&str>,
        tenant: &Tenant,
        session: Option<&str>,
    ) -> Self {
        // A session of one tenant is not another tenant's of the same name.
        let session = session.or(hints.prompt_cache_key.as_deref());
        Says {
            stream: hints.stream,
            handover: crate::connector::can_hand_over(connector, hints),
            prompts: usize::try_from(hints.prompts).unwrap_or(usize::MAX),
            prompt_logprobs: hints.prompt_logprobs,
            prompt_tokens: hints.prompt_tokens.get(),
            lora: adapter.map(adapter_key),
            session: session.map(|session| hasher().hash_one((tenant.salt, session))),
        }
    }
}

fn hasher() -> &'static RandomState {
    static HASHER: OnceLock<RandomState> = OnceLock::new();
    HASHER.get_or_init(RandomState::new)
}

/// What an adapter is compared by.
pub(crate) fn adapter_key(name: &str) -> u64 {
    hasher().hash_one(name)
}

/// The chunks of all members that decide a prompt, in their order.
pub(crate) fn chunks(index: &ApproximateIndex, hints: &api::Hints<'_>, tenant: &Tenant) -> Chunks {
    match hints.prompt {
        [only, [], []] | [[], only, []] => index.chunks(tenant.salt, only),
        parts => index.chunks(tenant.salt, &parts.concat()),
    }
}

/// Serves one request.
///
/// # Errors
/// See [`Failure`]; the first byte of an answer has not been sent then.
pub(crate) async fn run(proxy: &Arc<Proxy>, ask: Ask, account: &mut Account) -> Result<Answer, Failure> {
    let mut attended = Attended(Some(Box::new(Driver::new(Arc::clone(proxy), ask)?)));
    let driver = attended.0.as_mut().expect("it is taken when this is dropped");
    account.prompt_tokens = Some(driver.prompt_tokens());
    driver.begin();
    proxy.metrics.overhead.observe(account.age().as_secs_f64());
    let answered = loop {
        match driver.step().await {
            Step::On => {}
            Step::Answer(answered) => break answered,
            Step::Fail(failure) => return Err(failure),
        }
    };
    let driver::Answered { path, prefill_worker, decode_worker, answer, reservation, first_piece, prefill, reading } =
        *answered;
    account.path = Some(path);
    account.prefill_worker = prefill_worker;
    account.decode_worker = Some(decode_worker.clone());
    let deadline = driver.deadline();
    let upstream::Answer { status, headers, body } = answer;
    let is_events = headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().to_ascii_lowercase().starts_with(b"text/event-stream"));
    let body = if is_events {
        AnswerBody::Events(Box::new(Events {
            source: body,
            decode_worker,
            prefill,
            reading,
            reservation,
            first_piece,
            deadline,
            continuation: None,
        }))
    } else {
        let lost = |source| match source {
            UpstreamError::Timeout { .. } => Failure::DeadlineExceeded,
            source => Failure::Lost { worker: decode_worker.clone(), source },
        };
        let whole = by(deadline, &decode_worker, body.collect(WHOLE_ANSWER_BYTES_MAX));
        let whole = whole.await.map_err(lost)?;
        account.first_token();
        let whole = driver.finished(prefill, reading, whole, account).await;
        AnswerBody::Whole(whole)
    };
    Ok(Answer { status, headers, body })
}

/// A driver that somebody waits for.
struct Attended(Option<Box<Driver>>);

impl Drop for Attended {
    fn drop(&mut self) {
        if let Some(driver) = self.0.take().filter(|driver| !driver.is_done()) {
            let proxy = driver.proxy();
            drop(proxy.drain.spawn(driver.leave()));
        }
    }
}
