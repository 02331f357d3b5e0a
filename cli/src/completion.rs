//! One streamed completion, measured as the client that a person is would measure it.

use crate::client::{Client, ClientError};
use baton_wire::ErrorDetail;
use baton_wire::names::headers;
use serde::Deserialize;
use std::time::{Duration, Instant};

/// Why a completion did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompletionError {
    /// There was no stream, or it broke.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The server ended it with an error event.
    #[error("the stream ended with an error: {message}")]
    Failed { message: String },
    /// An event is no JSON of a completion.
    #[error("an event of the stream cannot be read")]
    Unreadable(#[source] serde_json::Error),
    /// It ended without saying that it had.
    #[error("the stream broke off after {pieces} pieces of text")]
    BrokeOff { pieces: usize },
}

/// What was measured and told.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Measured {
    /// From the request's start to the first token; nothing where no token had text.
    pub(crate) first: Option<Duration>,
    /// Between one piece and the next.
    pub(crate) gaps: Vec<Duration>,
    /// The path header, as it came.
    pub(crate) path: Option<String>,
    /// Address of the worker that computed the prompt, where the server names one.
    pub(crate) prefill_worker: Option<String>,
    /// Address of the worker that generated.
    pub(crate) decode_worker: Option<String>,
    pub(crate) usage: Usage,
    pub(crate) finish_reason: Option<String>,
}

/// Tokens, as the server counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    #[serde(default)]
    prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
struct PromptTokensDetails {
    #[serde(default)]
    cached_tokens: u64,
}

impl Usage {
    /// Prompt tokens found in a prefix cache.
    pub(crate) fn cached_tokens(&self) -> u64 {
        self.prompt_tokens_details.map_or(0, |details| details.cached_tokens)
    }
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<ErrorDetail>,
}

#[derive(Deserialize)]
struct Choice {
    /// Of a completion.
    text: Option<String>,
    /// Of a chat completion.
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

/// Sends the request and passes each piece of text on as it comes.
///
/// # Errors
/// See [`CompletionError`].
pub(crate) async fn stream(
    client: &Client,
    url: &str,
    body: &serde_json::Value,
    mut piece: impl FnMut(&str),
) -> Result<Measured, CompletionError> {
    let start = Instant::now();
    let mut events = client.stream(url, body).await?;
    let header = |name| events.header(name).map(str::to_owned);
    let mut measured = Measured {
        first: None,
        gaps: Vec::new(),
        path: header(headers::PATH),
        prefill_worker: header(headers::PREFILL_WORKER),
        decode_worker: header(headers::DECODE_WORKER),
        usage: Usage::default(),
        finish_reason: None,
    };
    let mut last: Option<Instant> = None;
    let mut pieces = 0;
    while let Some(data) = events.next().await? {
        if data == "[DONE]" {
            return Ok(measured);
        }
        let event: Event = serde_json::from_str(&data).map_err(CompletionError::Unreadable)?;
        if let Some(error) = event.error {
            return Err(CompletionError::Failed { message: error.message });
        }
        measured.usage = event.usage.unwrap_or(measured.usage);
        for choice in event.choices {
            measured.finish_reason = choice.finish_reason.or(measured.finish_reason);
            let Some(text) = choice.text.or(choice.delta.and_then(|delta| delta.content)) else { continue };
            if text.is_empty() {
                continue;
            }
            let now = Instant::now();
            match last {
                None => measured.first = Some(now - start),
                Some(last) => measured.gaps.push(now - last),
            }
            last = Some(now);
            pieces += 1;
            piece(&text);
        }
    }
    Err(CompletionError::BrokeOff { pieces })
}
