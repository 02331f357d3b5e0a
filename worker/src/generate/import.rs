//! The decode leg's first half: each prompt's KV from the prefill worker, or else computed here.
//!
//! A prompt enters this engine when its prefill has begun, so that it takes no blocks for KV that may be long in coming, and the
//! prefill worker keeps its KV until there is room here. Blocks are then reserved by the engine, filled by the transfer and only
//! then given to the engine again: until the commit nothing computes on them. Every failure of a handover ends in the same way, by
//! computing the prompt here; the path tells why.

use super::{Entry, Generation};
use crate::error::ApiError;
use crate::transfer::commit::sampled_token;
use crate::transfer::consumer::{Destination, Fetch, FetchError, Fetched};
use baton_engine::engine::Event;
use baton_engine::request::RequestKind;
use baton_wire::leg::Transfer;
use baton_wire::{Path, PathReason, PromptHash};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

impl Generation {
    /// Fetches every prompt's KV; `transfers` has one handover for each. Returns once all are settled: committed, or given up with
    /// their prompts queued to be computed here. Tokens that come meanwhile are kept for [`Generation::next`].
    ///
    /// # Errors
    /// When the engine fails; a failed handover is no error.
    pub async fn import(&mut self, transfers: &[Transfer]) -> Result<(), ApiError> {
        let consumer = self.serving.consumer.clone();
        // Each prompt asks once.
        let (asks, mut asked) = mpsc::channel(transfers.len());
        let fetches = transfers.iter().zip(&self.prompts).enumerate().map(|(prompt, (transfer, state))| {
            let fetch = Fetch {
                transfer: transfer.clone(),
                prompt_tokens: state.tokens.len(),
                prompt_hash: PromptHash::of(&state.tokens),
            };
            let asks = asks.clone();
            let destination = async move {
                let (answer, destination) = oneshot::channel();
                asks.send((prompt, answer)).await.expect(ANSWERED);
                destination.await.expect(ANSWERED)
            };
            let fetched = consumer.fetch(fetch, destination);
            async move { (prompt, fetched.await) }
        });
        let mut fetches: FuturesUnordered<_> = fetches.collect();
        let mut answers: Vec<Option<oneshot::Sender<Destination>>> = transfers.iter().map(|_| None).collect();
        let mut failures = vec![None; transfers.len()];
        let mut num_open = transfers.len();
        while num_open > 0 {
            tokio::select! {
                Some((prompt, answer)) = asked.recv() => {
                    answers[prompt] = Some(answer);
                    self.enter(prompt, RequestKind::Import).await?;
                }
                event = self.event() => match event? {
                    (prompt, Event::ImportReady { blocks, cached_blocks, .. }) => {
                        let answer = answers[prompt].take().expect("an import is ready once, and was asked for");
                        // A fetch that has failed meanwhile is about to be settled.
                        let _ = answer.send(Destination { blocks, cached_blocks });
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
        let reason = match outcome {
            Ok(fetched) => {
                let Entry::In(submitted) = &self.prompts[prompt].entry else {
                    unreachable!("KV is fetched into the blocks of a submitted prompt")
                };
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
        match &self.prompts[prompt].entry {
            Entry::In(submitted) => submitted.fail_import().await?,
            Entry::Waiting(_) => self.enter(prompt, RequestKind::Generate).await?,
        }
        Ok(Some(reason))
    }
}

const ANSWERED: &str = "the loop that drives the fetches answers them";
