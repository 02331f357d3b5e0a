//! The APIs that generate: their paths, and where each keeps its limits.

/// An API that generates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    /// OpenAI chat completions.
    Chat,
    /// OpenAI text completions.
    Completions,
    /// OpenAI responses.
    Responses,
    /// Anthropic messages.
    Messages,
    /// vLLM's token ids in, token ids out.
    TokenIn,
    /// SGLang's own.
    Generate,
}

impl Api {
    /// The API of a path.
    pub(crate) fn of(path: &str) -> Option<Self> {
        Some(match path {
            "/v1/chat/completions" => Api::Chat,
            "/v1/completions" => Api::Completions,
            "/v1/responses" => Api::Responses,
            "/v1/messages" => Api::Messages,
            "/inference/v1/generate" => Api::TokenIn,
            "/generate" => Api::Generate,
            _ => return None,
        })
    }

    /// What its ids begin with.
    pub(crate) const fn id_prefix(self) -> &'static str {
        match self {
            Api::Chat => "chatcmpl-",
            Api::Completions => "cmpl-",
            Api::Responses => "resp_",
            Api::Messages => "msg_",
            Api::TokenIn | Api::Generate => "generate-",
        }
    }
}
