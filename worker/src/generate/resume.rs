//! The decode leg of a stream that was begun elsewhere: each choice brought to where the lost worker had it.
//!
//! The token ids that the client has are pushed through the very code that the engine's tokens go through, so that every choice is in
//! the state in which it was there: text held back for half a character or a stop string, ids without text, its count. They yield
//! the very events that they yielded there; which of them the client has is known to the answer (`http/answer.rs`), which leaves
//! those out. So this file knows nothing of events, and the answer nothing of tokens.

use super::Generation;
use crate::error::ApiError;
use baton_engine::request::Request;
use baton_engine::sampling::SampledToken;
use baton_wire::leg::ResumedChoice;

/// Tokens that are replayed before others get their turn: decoding one takes some ten microseconds, so this is a few milliseconds.
const TOKENS_AT_ONCE: usize = 256;

impl Generation {
    /// Replays what each choice, `resumed` having one for each, has generated; `requests` are told of it, so that the engine goes on
    /// behind it.
    ///
    /// # Errors
    /// When a choice has tokens behind its end.
    pub(super) async fn replay(&mut self, requests: &mut [Request], resumed: &[ResumedChoice]) -> Result<(), ApiError> {
        for (prompt, choices) in resumed.chunks(self.choices_per_prompt).enumerate() {
            let cached = choices.iter().find_map(|choice| choice.cached_tokens);
            self.prompts[prompt].cached_tokens = cached.map(|tokens| tokens as usize);
            for (choice, ResumedChoice { token_ids, .. }) in choices.iter().enumerate() {
                let index = prompt * self.choices_per_prompt + choice;
                for (generated, &id) in (1..).zip(token_ids) {
                    if !self.choices[index].open {
                        return Err(ApiError::ResumeContradiction);
                    }
                    // Its log-probability is not known here. It is only wanted in an event that covers the token, and the client has
                    // all of those.
                    let token = SampledToken { id, logprob: None, top_logprobs: Vec::new(), logits_hash: None };
                    let finish = requests[prompt].finish_after(id, generated);
                    self.advance(index, token, finish);
                    if generated % TOKENS_AT_ONCE == 0 {
                        tokio::task::yield_now().await;
                    }
                }
            }
            // A prompt without any token goes its ordinary way, computed once for all of its choices.
            if choices.iter().any(|choice| !choice.token_ids.is_empty()) {
                let first = prompt * self.choices_per_prompt;
                let open = self.choices[first..].iter().map(|choice| choice.open);
                let so_far = open.zip(choices).map(|(open, choice)| open.then(|| choice.token_ids.clone()));
                requests[prompt].resumed = so_far.collect();
            }
        }
        Ok(())
    }
}
