//! A generation as an HTTP answer: one JSON object at the end, or events as the text comes.
//!
//! Either way nothing leaves before the first token: until then a failure is a proper status, and the path header tells what really
//! happened. Dropping the answer's body at any point drops the generation, which frees what it holds.
//!
//! The events of one choice are a function of its tokens alone. So a stream that was begun elsewhere is made from its beginning, and as
//! many events of each choice as the client has are left out.

use super::sse::{self, Mark};
use crate::error::ApiError;
use crate::generate::{Generation, Output};
use crate::lifecycle::InFlight;
use crate::metrics::{Outcome, Served};
use crate::openai::answer::{Answer, FinishReason, Piece};
use axum::body::Body;
use axum::response::Response;
use baton_wire::Path;
use baton_wire::leg::Resume;
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

    /// The answer as events; returns with the first one. Those that a client has, to which the stream is `resumed`, are left out.
    pub(super) async fn stream(self, resumed: Option<&Resume>) -> Result<Response, ApiError> {
        let mut events = Events {
            begun: vec![false; self.num_choices],
            had: resumed.map_or_else(|| vec![Had::default(); self.num_choices], had),
            usage_sent: resumed.is_some_and(|resumed| resumed.usage_sent),
            over: false,
            delivery: self,
        };
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
    /// What the client still has of each choice before the next event is new to it.
    had: Vec<Had>,
    usage_sent: bool,
    over: bool,
}

/// What a client has of a choice.
#[derive(Clone, Copy, Debug, Default)]
struct Had {
    events: u32,
    /// Tokens that they cover.
    ids: usize,
}

fn had(resumed: &Resume) -> Vec<Had> {
    resumed.choices.iter().map(|choice| Had { events: choice.events, ids: choice.token_ids.len() }).collect()
}

impl Had {
    /// Whether an event that covers so many ids is one of these, which are one less then.
    fn take(&mut self, ids: usize) -> Result<bool, ApiError> {
        if self.events == 0 {
            return Ok(false);
        }
        self.events -= 1;
        self.ids = self.ids.checked_sub(ids).ok_or(ApiError::ResumeContradiction)?;
        if self.events == 0 && self.ids > 0 { Err(ApiError::ResumeContradiction) } else { Ok(true) }
    }
}

impl Events {
    /// The next event's bytes; `None` after the last one. Nothing follows an error.
    async fn next(&mut self) -> Option<Result<Bytes, ApiError>> {
        while !self.over {
            let outcome = match self.delivery.generation.next().await {
                Ok(Some(output)) => self.event(&output),
                Ok(None) => {
                    self.over = true;
                    self.delivery.served.end(Outcome::Completed);
                    Ok(self.end())
                }
                Err(error) => Err(error),
            };
            match outcome {
                // The client has it.
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => return Some(Ok(bytes)),
                Err(error) => {
                    self.over = true;
                    self.delivery.served.end(Outcome::Failed);
                    return Some(Err(error));
                }
            }
        }
        None
    }

    fn event(&mut self, output: &Output) -> Result<Bytes, ApiError> {
        let Delivery { answer, token_ids, generation, .. } = &self.delivery;
        let (choice, ids, json) = match output {
            Output::Text { piece, ids } => (piece.choice, ids, answer.text_chunk(piece)),
            Output::Finish { choice, reason, ids } => (*choice, ids, answer.finish_chunk(*choice, *reason)),
        };
        let had = &mut self.had[choice as usize];
        let mut out = String::new();
        let mut cached = None;
        let mut event = |ids: &[u32], cached: Option<usize>, json: &str| {
            if !had.take(ids.len())? {
                sse::event(&mut out, token_ids.then_some(Mark::Choice { choice, cached, ids }), json);
            }
            Ok::<_, ApiError>(())
        };
        if !std::mem::replace(&mut self.begun[choice as usize], true) {
            cached = Some(generation.cached_tokens(choice));
            if let Some(first) = answer.first_chunk(choice) {
                event(&[], cached.take(), &first)?;
            }
        }
        event(ids, cached, &json)?;
        match output {
            Output::Finish { .. } if had.events > 0 => Err(ApiError::ResumeContradiction),
            Output::Finish { .. } | Output::Text { .. } => Ok(Bytes::from(out)),
        }
    }

    fn end(&self) -> Bytes {
        let mut out = String::new();
        let Delivery { answer, token_ids, generation, .. } = &self.delivery;
        if !self.usage_sent
            && let Some(usage) = answer.usage_chunk(generation.usage())
        {
            sse::event(&mut out, token_ids.then_some(Mark::Usage), &usage);
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
