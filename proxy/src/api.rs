//! The HTTP interfaces that engines offer, by their paths.

pub(crate) mod hints;
mod token_ids;

pub(crate) use hints::{Hints, count};
pub(crate) use token_ids::token_ids;

/// An interface whose requests have a prefill and a decode phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    Generate,
    /// SGLang's own interface.
    SglangGenerate,
}

impl Api {
    /// All of them.
    pub(crate) const ALL: [Api; 6] =
        [Api::Chat, Api::Completions, Api::Responses, Api::Messages, Api::Generate, Api::SglangGenerate];

    /// Where it is served, by us and by the engines.
    pub(crate) const fn path(self) -> &'static str {
        match self {
            Api::Chat => "/v1/chat/completions",
            Api::Completions => "/v1/completions",
            Api::Responses => "/v1/responses",
            Api::Messages => "/v1/messages",
            Api::Generate => "/inference/v1/generate",
            Api::SglangGenerate => "/generate",
        }
    }

    /// The interface that is served at a path.
    pub(crate) fn of_path(path: &str) -> Option<Api> {
        Api::ALL.into_iter().find(|api| api.path() == path)
    }

    /// Its name as a metric's label.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Api::Chat => "chat",
            Api::Completions => "completions",
            Api::Responses => "responses",
            Api::Messages => "messages",
            Api::Generate => "generate",
            Api::SglangGenerate => "sglang-generate",
        }
    }
}

/// An interface without a decode phase: a request goes to one worker as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PassThrough {
    /// OpenAI embeddings.
    Embeddings,
    /// Text to token ids.
    Tokenize,
    /// Token ids to text.
    Detokenize,
    /// Scores of text pairs.
    Score,
    /// The same under OpenAI's prefix.
    V1Score,
    /// Documents in the order of their relevance.
    Rerank,
    /// The same under OpenAI's prefix.
    V1Rerank,
    /// Class probabilities.
    Classify,
    /// Hidden states.
    Pooling,
}

impl PassThrough {
    /// All of them.
    pub(crate) const ALL: [PassThrough; 9] = [
        PassThrough::Embeddings,
        PassThrough::Tokenize,
        PassThrough::Detokenize,
        PassThrough::Score,
        PassThrough::V1Score,
        PassThrough::Rerank,
        PassThrough::V1Rerank,
        PassThrough::Classify,
        PassThrough::Pooling,
    ];

    /// Where it is served, by us and by the engines.
    pub(crate) const fn path(self) -> &'static str {
        match self {
            PassThrough::Embeddings => "/v1/embeddings",
            PassThrough::Tokenize => "/tokenize",
            PassThrough::Detokenize => "/detokenize",
            PassThrough::Score => "/score",
            PassThrough::V1Score => "/v1/score",
            PassThrough::Rerank => "/rerank",
            PassThrough::V1Rerank => "/v1/rerank",
            PassThrough::Classify => "/classify",
            PassThrough::Pooling => "/pooling",
        }
    }

    /// The interface that is served at a path.
    pub(crate) fn of_path(path: &str) -> Option<PassThrough> {
        PassThrough::ALL.into_iter().find(|api| api.path() == path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_leads_to_its_interface_and_back() {
        for api in Api::ALL {
            assert_eq!(Api::of_path(api.path()), Some(api));
            assert_eq!(PassThrough::of_path(api.path()), None);
        }
        for api in PassThrough::ALL {
            assert_eq!(PassThrough::of_path(api.path()), Some(api));
        }
        assert_eq!(Api::of_path("/v1/chat/completions/"), None);
    }
}
