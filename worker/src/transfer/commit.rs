//! What a prefill found besides the KV, between the engine's types and the wire's.

use baton_engine::sampling::SampledToken;
pub use baton_wire::kv::FirstToken;
use baton_wire::kv::Logprob;

/// What a prefill found besides the KV.
#[derive(Clone, Debug, PartialEq)]
pub struct Commit {
    /// Prompt tokens that the prefill worker found in its prefix cache.
    pub cached_tokens: usize,
    /// The first token of each choice, in the choices' order.
    pub choices: Vec<FirstToken>,
}

/// An engine's token as it goes over the wire.
pub fn first_token(token: &SampledToken) -> FirstToken {
    FirstToken {
        id: token.id,
        logprob: token.logprob.map(Logprob),
        top_logprobs: token.top_logprobs.iter().map(|&(id, logprob)| (id, Logprob(logprob))).collect(),
        logits_hash: token.logits_hash,
    }
}

/// A token from the wire as the engine has it.
pub fn sampled_token(token: &FirstToken) -> SampledToken {
    SampledToken {
        id: token.id,
        logprob: token.logprob.map(|logprob| logprob.0),
        top_logprobs: token.top_logprobs.iter().map(|&(id, logprob)| (id, logprob.0)).collect(),
        logits_hash: token.logits_hash,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_the_way_to_the_wire_and_back() {
        let token = SampledToken {
            id: 7,
            logprob: Some(-0.1),
            top_logprobs: vec![(7, -0.1), (9, f32::NEG_INFINITY)],
            logits_hash: Some(u64::MAX),
        };
        assert_eq!(sampled_token(&first_token(&token)), token);
    }
}
