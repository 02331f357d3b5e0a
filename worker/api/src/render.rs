//! Rendering: a client's request to token ids, once, by a worker; both legs then carry those ids.

use crate::BlockHash;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Which OpenAI endpoint a body was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
}

/// A client's request to be checked and tokenised.
#[derive(Debug, Serialize, Deserialize)]
pub struct RenderRequest {
    /// Where the client sent it.
    pub endpoint: Endpoint,
    /// The client's JSON, as it came.
    pub body: Box<RawValue>,
    /// As in [`crate::leg::LegRequest`]: the hashes are salted as the legs' will be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_salt: Option<u64>,
}

/// The request's prompts as tokens. An invalid request is answered with 4xx and an OpenAI error body instead, so that
/// every client error leaves before any leg is dispatched.
#[derive(Debug, Serialize, Deserialize)]
pub struct RenderResponse {
    /// One for chat; one for each prompt of a completions request.
    pub prompts: Vec<RenderedPrompt>,
    /// Choices asked for (`n`), for each prompt.
    pub choices: u32,
    /// Whether the answer is to be streamed.
    pub stream: bool,
    /// The seed that the client gave.
    pub seed: Option<u64>,
}

/// One prompt as tokens.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RenderedPrompt {
    /// The model's token ids, special tokens included.
    pub token_ids: Vec<u32>,
    /// Chained, salted hash of each full block.
    pub block_hashes: Vec<BlockHash>,
    /// Tokens of leading full blocks that the prefix cache of the worker that rendered holds now. A hint for the choice of the path: 0
    /// also where that worker generates nothing, or is too busy to look.
    #[serde(default)]
    pub cached_tokens: u32,
}
