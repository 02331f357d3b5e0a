//! The account of one client's request: what is counted and the one line that is logged, whenever and however it ends.
//!
//! It is settled when it is dropped, so that no way out of a request, a client that hangs up included, goes uncounted. It
//! never holds a prompt or a token.

use crate::address::Address;
use crate::metrics::{Class, Cut};
use crate::proxy::Proxy;
use crate::trace::Trace;
use baton_wire::Path;
use http::StatusCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// What is known of a request so far.
#[derive(Debug)]
pub(crate) struct Account {
    proxy: Arc<Proxy>,
    request_id: String,
    endpoint: &'static str,
    arrived: Instant,
    /// The client's trace, which its legs belong to.
    pub(crate) trace: Option<Arc<Trace>>,
    /// The path that it took; as planned until the decode worker says what really happened.
    pub(crate) path: Option<Path>,
    pub(crate) prefill_worker: Option<Address>,
    pub(crate) decode_worker: Option<Address>,
    pub(crate) prompt_tokens: Option<u64>,
    pub(crate) generated_tokens: Option<u64>,
    /// How often another decode worker went on with the answer.
    continuations: u32,
    ttft: Option<Duration>,
    status: Option<StatusCode>,
    cut: Option<Cut>,
    ended: bool,
}

impl Account {
    pub(crate) fn open(
        proxy: Arc<Proxy>,
        request_id: String,
        endpoint: &'static str,
        arrived: Instant,
        trace: Option<Arc<Trace>>,
    ) -> Self {
        Account {
            proxy,
            request_id,
            endpoint,
            arrived,
            trace,
            path: None,
            prefill_worker: None,
            decode_worker: None,
            prompt_tokens: None,
            generated_tokens: None,
            continuations: 0,
            ttft: None,
            status: None,
            cut: None,
            ended: false,
        }
    }

    /// How long ago the request arrived.
    pub(crate) fn age(&self) -> Duration {
        self.arrived.elapsed()
    }

    /// A piece of a stream has come: of an engine that sends its headers before it has computed anything, the first one has the first
    /// token.
    pub(crate) fn piece(&mut self) {
        if self.ttft.is_none() {
            self.first_token();
        }
    }

    /// The first token is there. With our own workers it comes together with the headers; of an answer that is not streamed no client
    /// sees it before the last one.
    pub(crate) fn first_token(&mut self) {
        let ttft = self.arrived.elapsed();
        self.ttft = Some(ttft);
        self.proxy.metrics.first_token(self.path, ttft);
    }

    /// The decode worker was lost, and this one goes on with the answer.
    pub(crate) fn continued(&mut self, decode_worker: Address) {
        self.decode_worker = Some(decode_worker);
        self.continuations += 1;
    }

    /// The client is sent this status.
    pub(crate) fn answer(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    /// The answer broke off.
    pub(crate) fn cut(&mut self, cut: Cut) {
        self.cut = Some(cut);
    }

    /// All of the answer has been handed to the connection.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let took = self.arrived.elapsed();
        if !self.ended && self.cut.is_none() {
            self.cut = Some(Cut::ClientGone);
        }
        let class = match self.status {
            None => Class::ClientGone,
            Some(status) if status.is_server_error() => Class::ServerError,
            Some(status) if status.is_client_error() => Class::ClientError,
            Some(_) => Class::Success,
        };
        let metrics = &self.proxy.metrics;
        metrics.request(self.endpoint, self.path, class, took);
        metrics.generated_tokens.inc_by(self.generated_tokens.unwrap_or(0));
        if let Some(cut) = self.cut {
            metrics.cut(cut);
        }
        if let Some(Path::Fallback(reason)) = self.path {
            metrics.fallback(reason);
        }
        tracing::info!(
            request_id = self.request_id,
            trace_id = self.trace.as_deref().map(Trace::id),
            path = self.path.map(tracing::field::display),
            prefill_worker = self.prefill_worker.as_ref().map(tracing::field::display),
            decode_worker = self.decode_worker.as_ref().map(tracing::field::display),
            status = self.status.map(|status| status.as_u16()),
            cut = self.cut.map(Cut::as_str),
            ttft_ms = self.ttft.map(|ttft| ttft.as_secs_f64() * 1e3),
            total_ms = took.as_secs_f64() * 1e3,
            prompt_tokens = self.prompt_tokens,
            generated_tokens = self.generated_tokens,
            continuations = (self.continuations > 0).then_some(self.continuations),
            "request"
        );
    }
}
