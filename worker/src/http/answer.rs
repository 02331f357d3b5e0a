//! A generation as an HTTP answer: one JSON object at the end, or events as the text comes.
//!
//! Either way nothing leaves before the first token: until then a failure is a proper status, and the path header tells what really
//! happened. Dropping the answer's body at any point drops the generation, which frees what it holds.

use super::sse;
use crate::error::ApiError;
use crate::generate::{Generation, Output};
use crate::lifecycle::InFlight;
use crate::metrics::{Outcome, Served};
use crate::openai::answer::{Answer, FinishReason, Piece};
use axum::body::Body;
use axum::response::Response;
use baton_wire::Path;
use baton_wire::names::headers;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderValue, header};
use std::convert::Infallible;

/// A generation on its way to a client.
#[derive(Debug)]
pub(super) struct Delivery {
    pub(super) generation: Generation,
    pub(super) answer: Answer,
    /// Whether each event carries its token ids.
    pub(super) token_ids: bool,
    /// Choices of all prompts.
    pub(super) num_choices: usize,
    pub(super) request_id: String,
    /// The worker that computes the prompt's KV, should the path be remote.
    pub(super) prefill_worker: Option<String>,
    pub(super) served: Served,
    /// Held until the last byte has left: draining waits for it.
    pub(super) _in_flight: InFlight,
}

impl Delivery {
    /// The whole answer at once.
    pub(super) async fn whole(mut self) -> Result<Response, ApiError> {
        let outcome = self.collect().await;
        self.served.end(if outcome.is_ok() { Outcome::Completed } else { Outcome::Failed });
        Ok(self.response("application/json", Body::from(outcome?)))
    }

    /// The answer as events; returns with the first one.
    pub(super) async fn stream(self) -> Result<Response, ApiError> {
        let mut events = Events { begun: vec![false; self.num_choices], over: false, delivery: self };
        let first = events.next().await.expect("a generation has a choice, and a choice an end")?;
        let head = events.delivery.response("text/event-stream", Body::empty());
        let rest = stream::unfold(events, |mut events| async {
            let event = events.next().await?;
            Some((event.unwrap_or_else(|error| error_event(&error)), events))
        });
        let body = stream::once(async { first }).chain(rest).map(Ok::<_, Infallible>);
        Ok(head.map(|_| Body::from_stream(body)))
    }

    async fn collect(&mut self) -> Result<String, ApiError> {
        let empty = |choice| (Piece { choice, ..Piece::default() }, FinishReason::Stop);
        let mut choices: Vec<_> = (0..self.num_choices as u32).map(empty).collect();
        while let Some(output) = self.generation.next().await? {
            match output {
                Output::Text { piece, ids: _ } => {
                    let whole = &mut choices[piece.choice as usize].0;
                    whole.text.push_str(&piece.text);
                    if let Some(logprobs) = piece.logprobs {
                        whole.logprobs.get_or_insert_default().extend(logprobs);
                    }
                }
                Output::Finish { choice, reason, ids: _ } => choices[choice as usize].1 = reason,
            }
        }
        Ok(self.answer.whole(&choices, self.generation.usage()))
    }

    fn response(&self, content_type: &'static str, body: Body) -> Response {
        let mut response = Response::new(body);
        let map = response.headers_mut();
        map.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        map.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        let mut insert = |name: &'static str, value: &str| {
            // Request ids and addresses come from outside; one that is no header value is left out.
            if let Ok(value) = HeaderValue::from_str(value) {
                map.insert(name, value);
            }
        };
        let path = self.generation.path();
        insert(headers::PATH, &path.to_string());
        insert(headers::REQUEST_ID, &self.request_id);
        match (path, &self.prefill_worker) {
            (Path::RemotePrefill, Some(worker)) => insert(headers::PREFILL_WORKER, worker),
            (Path::RemotePrefill, None) | (Path::LocalPrefill(_) | Path::Fallback(_), _) => {}
        }
        response
    }
}

/// The events of one answer.
struct Events {
    delivery: Delivery,
    /// Which choices have had their first event.
    begun: Vec<bool>,
    over: bool,
}

impl Events {
    /// The next event's bytes; `None` after the last one. Nothing follows an error.
    async fn next(&mut self) -> Option<Result<Bytes, ApiError>> {
        if self.over {
            return None;
        }
        let outcome = self.delivery.generation.next().await;
        self.over = !matches!(outcome, Ok(Some(_)));
        match outcome {
            Ok(Some(output)) => Some(Ok(self.event(&output))),
            Ok(None) => {
                self.delivery.served.end(Outcome::Completed);
                Some(Ok(self.end()))
            }
            Err(error) => {
                self.delivery.served.end(Outcome::Failed);
                Some(Err(error))
            }
        }
    }

    fn event(&mut self, output: &Output) -> Bytes {
        let Delivery { answer, token_ids, .. } = &self.delivery;
        let (choice, ids, json) = match output {
            Output::Text { piece, ids } => (piece.choice, ids, answer.text_chunk(piece)),
            Output::Finish { choice, reason, ids } => (*choice, ids, answer.finish_chunk(*choice, *reason)),
        };
        let mut out = String::new();
        if !std::mem::replace(&mut self.begun[choice as usize], true)
            && let Some(first) = answer.first_chunk(choice)
        {
            sse::event(&mut out, None, &first);
        }
        sse::event(&mut out, token_ids.then_some((choice, ids.as_slice())), &json);
        Bytes::from(out)
    }

    fn end(&self) -> Bytes {
        let mut out = String::new();
        if let Some(usage) = self.delivery.answer.usage_chunk(self.delivery.generation.usage()) {
            sse::event(&mut out, None, &usage);
        }
        out.push_str(sse::DONE);
        Bytes::from(out)
    }
}

fn error_event(error: &ApiError) -> Bytes {
    tracing::warn!("request failed after its first token: {error}");
    let mut out = String::new();
    sse::event(&mut out, None, &error.json());
    Bytes::from(out)
}
