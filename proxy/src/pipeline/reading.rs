//! What is done to an answer's bytes on their way to the client, by whose engine it is.

use crate::api::Api;
use crate::json::usage;
use crate::json::usage_stream::UsagePatch;
use crate::sse::Filter;
use baton_wire::leg::Resume;
use bytes::Bytes;

/// What is done to an answer's bytes.
#[derive(Debug)]
pub(crate) enum Reading {
    /// Our worker's token ids are taken out of its events, and counted.
    Ours(Filter),
    /// Usage is read, and says of cached tokens what the prefill engine said, where there was one.
    Engine { api: Api, cached_tokens: Option<u64>, patch: Box<UsagePatch> },
}

impl Reading {
    /// For the answer of our own worker.
    pub(crate) fn ours() -> Self {
        Reading::Ours(Filter::default())
    }

    /// For the answer of another engine.
    pub(crate) fn engine(api: Api, cached_tokens: Option<u64>) -> Self {
        Reading::Engine { api, cached_tokens, patch: Box::new(UsagePatch::new(api, cached_tokens)) }
    }

    /// The next piece of a stream: what of it goes out now.
    pub(crate) fn push(&mut self, piece: Bytes) -> Bytes {
        match self {
            Reading::Ours(filter) => filter.push(&piece),
            Reading::Engine { patch, .. } => patch.push(piece),
        }
    }

    /// The stream has ended as it should: what was still held back.
    pub(crate) fn finish(&mut self) -> Bytes {
        match self {
            Reading::Ours(filter) => filter.finish(),
            Reading::Engine { patch, .. } => patch.finish(),
        }
    }

    /// The stream broke: half an event is dropped. What must stand before an event of our own.
    pub(crate) fn cut(&mut self) -> &'static [u8] {
        match self {
            Reading::Ours(filter) => filter.cut(),
            Reading::Engine { patch, .. } => patch.cut(),
        }
    }

    /// Whether the client has the end of the answer already, however the stream ends.
    pub(crate) fn is_done(&self) -> bool {
        match self {
            Reading::Ours(filter) => filter.is_done(),
            Reading::Engine { .. } => false,
        }
    }

    /// The stream broke and is to go on from another worker: half an event is dropped. What the client has of `num_choices`
    /// choices; nothing, and nothing done, where that is not known in full, as with engines that are not ours.
    pub(crate) fn resume(&mut self, num_choices: usize) -> Option<Resume> {
        match self {
            Reading::Ours(filter) => filter.resume(num_choices),
            Reading::Engine { .. } => None,
        }
    }

    /// Tokens generated so far, as far as the stream told.
    pub(crate) fn tokens(&self) -> Option<u64> {
        match self {
            Reading::Ours(filter) => Some(filter.tokens()),
            Reading::Engine { patch, .. } => patch.seen().completion_tokens,
        }
    }

    /// An answer that is not streamed, and how many tokens it says it has.
    pub(crate) fn whole(&self, answer: Bytes) -> (Bytes, Option<u64>) {
        match self {
            Reading::Ours(_) => (answer, None),
            Reading::Engine { api, cached_tokens, .. } => {
                let (answer, usage) = usage::patch(*api, &answer, *cached_tokens);
                (answer, usage.completion_tokens)
            }
        }
    }

    /// Which interface's form an error in the midst of a stream has.
    pub(crate) fn api(&self) -> Api {
        match self {
            Reading::Ours(_) => Api::Chat,
            Reading::Engine { api, .. } => *api,
        }
    }
}
