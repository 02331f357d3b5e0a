//! The decode leg's first half: each prompt's KV from the prefill worker, or else computed here.
//!
//! Blocks are reserved by the engine, filled by the transfer and only then given to the engine again: until the commit nothing
//! computes on them. Every failure of a handover ends in the same way, by computing the prompt here; the path tells why.

use super::Generation;
use crate::error::ApiError;
use crate::transfer::commit::sampled_token;
use crate::transfer::consumer::{Fetch, FetchError, Fetched};
use baton_engine::engine::Event;
use baton_wire::leg::Transfer;
use baton_wire::{Path, PathReason, PromptHash};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

impl Generation {
    /// Fetches every prompt's KV; `transfers` has one handover for each. Returns once all are settled: committed, or given up with
    /// their prompts queued to be computed here. Tokens that come meanwhile are kept for [`Generation::next`].
    ///
    /// # Errors
    /// When the engine fails; a failed handover is no error.
    pub async fn import(&mut self, transfers: &[Transfer]) -> Result<(), ApiError> {
        let consumer = self.serving.consumer.clone();
        let mut fetches = FuturesUnordered::new();
        let mut failures = vec![None; transfers.len()];
        let mut num_open = transfers.len();
        while num_open > 0 {
            tokio::select! {
                event = self.event() => match event? {
                    (prompt, Event::ImportReady { blocks, cached_blocks, .. }) => {
                        let tokens = &self.prompts[prompt].tokens;
                        let fetch = Fetch {
                            transfer: transfers[prompt].clone(),
                            prompt_tokens: tokens.len(),
                            prompt_hash: PromptHash::of(tokens),
                            blocks,
                            cached_blocks,
                        };
                        let consumer = &consumer;
                        fetches.push(async move { (prompt, consumer.fetch(fetch).await) });
                    }
                    (_, Event::Failed { .. }) => return Err(ApiError::ForwardFailed),
                    other => self.early.push_back(other),
                },
                Some((prompt, outcome)) = fetches.next() => {
                    failures[prompt] = self.settle(prompt, outcome).await?;
                    num_open -= 1;
                }
            }
        }
        // The first failure among several prompts names the path of the whole request.
        self.path = failures.into_iter().flatten().next().map_or(Path::RemotePrefill, Path::Fallback);
        Ok(())
    }

    /// Commits what was fetched, or gives it up and says why.
    async fn settle(
        &mut self,
        prompt: usize,
        outcome: Result<Fetched, FetchError>,
    ) -> Result<Option<PathReason>, ApiError> {
        let submitted = &self.prompts[prompt].submitted;
        let reason = match outcome {
            Ok(fetched) => {
                let first: Vec<_> = fetched.commit.choices.iter().map(sampled_token).collect();
                let vocab_size = self.serving.facts.vocab_size;
                let known = first.iter().all(|token| token.id < vocab_size);
                if known && submitted.commit_import(first, fetched.commit.cached_tokens).await? {
                    self.serving.metrics.imported(fetched.total, fetched.exposed);
                    return Ok(None);
                }
                PathReason::Protocol
            }
            Err(error) => {
                tracing::warn!(prompt, "KV could not be fetched, the prompt is computed here: {error}");
                error.path_reason()
            }
        };
        submitted.fail_import().await?;
        Ok(Some(reason))
    }
}
