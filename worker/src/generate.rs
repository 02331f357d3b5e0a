//! One request's life on a worker that generates: submitted, its KV fetched or computed, its tokens turned into text.
//!
//! Between the engine's events and the API's pieces of text. What ends here: a choice (stop token, stop string, length), a
//! prompt (its last choice), the request (its last prompt). Dropping a [`Generation`] at any point frees all that it holds.

mod import;
mod resume;

use crate::engine_thread::{EVENTS_BESIDE_TOKENS, Events, PromptEvent, Submitted};
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::openai::Request;
use crate::openai::answer::{FinishReason, Piece, TokenLogprob, TokenText, Usage};
use crate::render;
use crate::serving::Serving;
use baton_engine::engine::Event;
use baton_engine::request::{self as engine, RequestId, RequestKind};
use baton_engine::sampling::SampledToken;
use baton_engine::text::{Delta, TextStream};
use baton_engine::tokenizer::Tokenizer;
use baton_wire::Path;
use baton_wire::leg::ResumedChoice;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;

/// A request whose prompts are tokens, ready to be submitted.
#[derive(Debug)]
pub struct Rendered {
    /// What the client asked for.
    pub request: Request,
    /// Its prompts.
    pub prompts: Vec<Vec<u32>>,
    /// The client's seed, or one that was drawn.
    pub seed: u64,
}

impl Rendered {
    /// One prompt as the engine takes it.
    ///
    /// # Errors
    /// When prompt and completion don't fit into the model.
    pub fn engine_request(
        &self,
        index: usize,
        kind: RequestKind,
        serving: &Serving,
    ) -> Result<engine::Request, ApiError> {
        let Rendered { request, prompts, seed } = self;
        let prompt = &prompts[index];
        let mut stop_tokens = request.stop.tokens.clone();
        if !request.stop.ignore_eos {
            stop_tokens.extend(&serving.eos);
        }
        Ok(engine::Request {
            id: RequestId(0),
            max_tokens: request.completion_tokens_max(prompt.len(), &serving.facts)?,
            prompt: prompt.clone(),
            sampling: request.sampling.clone(),
            choices: request.choices,
            seed: prompt_seed(*seed, index),
            stop_tokens,
            salt: request.salt,
            kind,
            resumed: Vec::new(),
        })
    }
}

/// Each prompt of a request draws from a stream of its own: equal prompts would otherwise get equal completions. Steps by the
/// golden ratio in 64 bits, as SplitMix64 does; the first prompt has the seed as it is.
fn prompt_seed(seed: u64, index: usize) -> u64 {
    seed.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// What a generation yields.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// A choice has more text.
    Text {
        /// The text.
        piece: Piece,
        /// The tokens that it is the text of, those without any included.
        ids: Vec<u32>,
    },
    /// A choice is over.
    Finish {
        /// Which.
        choice: u32,
        /// Why.
        reason: FinishReason,
        /// Last tokens, which have no text.
        ids: Vec<u32>,
    },
}

/// A request being generated.
#[derive(Debug)]
pub struct Generation {
    serving: Arc<Serving>,
    events: mpsc::Receiver<PromptEvent>,
    /// Tokens that came while other prompts' KV was still fetched.
    early: VecDeque<PromptEvent>,
    ready: VecDeque<Output>,
    prompts: Vec<PromptState>,
    /// Of all prompts, in order; `choices_per_prompt` each.
    choices: Vec<Choice>,
    choices_per_prompt: usize,
    num_open: usize,
    completion_tokens: u64,
    path: Path,
    admitted: Instant,
    has_first_token: bool,
}

#[derive(Debug)]
struct PromptState {
    entry: Entry,
    tokens: Vec<u32>,
    /// Of the tokens, those that a prefix cache had; known from the first token on.
    cached_tokens: Option<usize>,
}

/// A prompt's place in the engine.
#[derive(Debug)]
enum Entry {
    /// None yet: its prefill elsewhere has not begun. Keeps what it takes to enter; boxed, as it is large and soon gone. Also one whose
    /// choices all ended elsewhere, for good.
    Waiting(Option<Box<(engine::Request, Events)>>),
    /// Submitted.
    In(Submitted),
}

#[derive(Debug)]
struct Choice {
    text: TextStream,
    /// Text that precedes the first token's: the prompt, where it is to be echoed.
    lead: Option<String>,
    logprobs_wanted: bool,
    /// Of the tokens that no piece covers yet; `None` for tokens that are reported without.
    logprobs: VecDeque<Option<TokenLogprob>>,
    /// Tokens covered by pieces that had nothing to show.
    ids: Vec<u32>,
    /// Characters so far, for `text_offset`.
    chars: usize,
    last_token: Option<Instant>,
    open: bool,
}

impl Generation {
    /// Submits every prompt to be computed here; with `imports`, [`Generation::import`] submits them. With `resumed` the choices go on
    /// from there: what [`Generation::next`] yields starts at their beginning all the same.
    ///
    /// # Errors
    /// When the engine refuses one, or is gone. What was submitted before it is released. When `resumed` contradicts the request.
    pub async fn submit(
        serving: Arc<Serving>,
        rendered: &Rendered,
        imports: bool,
        resumed: Option<&[ResumedChoice]>,
        path: Path,
    ) -> Result<Self, ApiError> {
        let admitted = Instant::now();
        let request = |index| rendered.engine_request(index, RequestKind::Generate, &serving);
        let mut requests = (0..rendered.prompts.len()).map(request).collect::<Result<Vec<_>, _>>()?;
        let room = |request: &engine::Request| request.max_tokens * request.choices as usize + EVENTS_BESIDE_TOKENS;
        let (sender, events) = mpsc::channel(requests.iter().map(room).sum());
        let choices_per_prompt = rendered.request.choices as usize;
        let mut generation = Generation {
            choices: choices(rendered, &serving.tokenizer),
            num_open: rendered.prompts.len() * choices_per_prompt,
            serving,
            events,
            early: VecDeque::new(),
            ready: VecDeque::new(),
            prompts: Vec::new(),
            choices_per_prompt,
            completion_tokens: 0,
            path,
            admitted,
            has_first_token: false,
        };
        for request in &requests {
            let tokens = request.prompt.clone();
            generation.prompts.push(PromptState { entry: Entry::Waiting(None), tokens, cached_tokens: None });
        }
        if let Some(resumed) = resumed {
            generation.replay(&mut requests, resumed).await?;
        }
        for (prompt, request) in requests.into_iter().enumerate() {
            if !generation.is_open(prompt) {
                continue;
            }
            let events = Events { sender: sender.clone(), prompt };
            generation.prompts[prompt].entry = Entry::Waiting(Some(Box::new((request, events))));
            if !imports {
                generation.enter(prompt, RequestKind::Generate).await?;
            }
        }
        Ok(generation)
    }

    /// Submits a prompt that has not been.
    async fn enter(&mut self, prompt: usize, kind: RequestKind) -> Result<(), ApiError> {
        if let Entry::Waiting(waiting) = &mut self.prompts[prompt].entry {
            let (request, events) = *waiting.take().expect("a prompt is submitted once");
            let request = engine::Request { kind, ..request };
            self.prompts[prompt].entry = Entry::In(self.serving.engine.submit(request, events, None).await?);
        }
        Ok(())
    }

    /// The path that the request really took.
    pub fn path(&self) -> Path {
        self.path
    }

    /// Tokens used so far.
    pub fn usage(&self) -> Usage {
        let sum = |of: fn(&PromptState) -> usize| self.prompts.iter().map(of).sum::<usize>() as u64;
        let cached = sum(|prompt| prompt.cached_tokens.unwrap_or(0));
        Usage::new(sum(|prompt| prompt.tokens.len()), cached, self.completion_tokens)
    }

    /// Prompt tokens of a choice, which has had a token, that a prefix cache had.
    pub fn cached_tokens(&self, choice: u32) -> usize {
        self.prompts[choice as usize / self.choices_per_prompt].cached_tokens.unwrap_or(0)
    }

    /// Whether a choice of this prompt goes on.
    fn is_open(&self, prompt: usize) -> bool {
        let first = prompt * self.choices_per_prompt;
        self.choices[first..first + self.choices_per_prompt].iter().any(|choice| choice.open)
    }

    /// The next piece of text or end of a choice; `None` after the last one.
    ///
    /// # Errors
    /// When the request can't be finished; nothing follows then.
    pub async fn next(&mut self) -> Result<Option<Output>, ApiError> {
        loop {
            if let Some(output) = self.ready.pop_front() {
                return Ok(Some(output));
            }
            if self.num_open == 0 {
                return Ok(None);
            }
            let (prompt, event) = match self.early.pop_front() {
                Some(event) => event,
                None => self.event().await?,
            };
            match event {
                Event::Token { choice, token, finish, cached_tokens, .. } => {
                    let known = &mut self.prompts[prompt].cached_tokens;
                    *known = known.or(cached_tokens);
                    self.token(prompt, choice, token, finish).await?;
                }
                Event::Failed { .. } => return Err(ApiError::ForwardFailed),
                // Of an import that got room just when its handover had failed: it is computed here by now.
                Event::ImportReady { .. } => {}
                Event::Computed { .. } | Event::PrefillDone { .. } => unreachable!("they are told to prefills only"),
            }
        }
    }

    async fn event(&mut self) -> Result<PromptEvent, ApiError> {
        tokio::select! {
            event = self.events.recv() => event.ok_or(ApiError::EngineStopped),
            () = self.serving.cut_off.cancelled() => Err(ApiError::CutOff),
        }
    }

    async fn token(
        &mut self,
        prompt: usize,
        choice_of_prompt: u32,
        token: SampledToken,
        finish: Option<engine::FinishReason>,
    ) -> Result<(), ApiError> {
        let index = prompt * self.choices_per_prompt + choice_of_prompt as usize;
        if !self.choices[index].open {
            // Computed before the engine heard that a stop string had ended the choice.
            return Ok(());
        }
        self.observe(index);
        let is_over = self.advance(index, token, finish);
        if is_over && finish.is_none() {
            match &self.prompts[prompt].entry {
                Entry::In(submitted) => submitted.stop_choice(choice_of_prompt).await?,
                Entry::Waiting(_) => unreachable!("tokens come from the engine"),
            }
        }
        Ok(())
    }

    /// Adds a token to a choice, of which `finish` says whether it is the last one for the engine; returns whether it is.
    fn advance(&mut self, index: usize, token: SampledToken, finish: Option<engine::FinishReason>) -> bool {
        self.completion_tokens += 1;
        let choice = &mut self.choices[index];
        let delta = choice.push(&self.serving.tokenizer, token, finish);
        let stopped = choice.text.is_stopped();
        let reason = match (delta.stop, finish) {
            (Some(_), _) | (None, Some(engine::FinishReason::Stop)) => Some(FinishReason::Stop),
            (None, Some(engine::FinishReason::Length)) => Some(FinishReason::Length),
            (None, None) => None,
        };
        debug_assert_eq!(stopped, reason.is_some(), "a text ends with its choice");
        self.ready.extend(choice.output(index as u32, delta));
        if let Some(reason) = reason {
            choice.open = false;
            self.num_open -= 1;
            self.ready.push_back(Output::Finish { choice: index as u32, reason, ids: std::mem::take(&mut choice.ids) });
        }
        stopped
    }

    fn observe(&mut self, index: usize) {
        let metrics: &Metrics = &self.serving.metrics;
        let now = Instant::now();
        if !self.has_first_token {
            self.has_first_token = true;
            metrics.first_token(self.path, now - self.admitted);
        }
        if let Some(last) = self.choices[index].last_token.replace(now) {
            metrics.next_token(now - last);
        }
    }
}

fn choices(rendered: &Rendered, tokenizer: &Tokenizer) -> Vec<Choice> {
    let request = &rendered.request;
    let echo = render::echo(request, tokenizer);
    let choice = |prompt: usize| Choice {
        text: TextStream::new(
            &rendered.prompts[prompt],
            request.stop.strings.clone(),
            request.stop.include_stop_string,
        ),
        lead: echo.as_ref().map(|echo| echo[prompt].clone()),
        logprobs_wanted: request.sampling.logprobs.is_some(),
        logprobs: VecDeque::new(),
        ids: Vec::new(),
        chars: 0,
        last_token: None,
        open: true,
    };
    (0..rendered.prompts.len()).flat_map(|prompt| (0..request.choices).map(move |_| prompt)).map(choice).collect()
}

impl Choice {
    /// Adds a token, which `finish` may say is the last one; returns the text that is settled by it.
    fn push(&mut self, tokenizer: &Tokenizer, token: SampledToken, finish: Option<engine::FinishReason>) -> Delta {
        let mut delta = match finish {
            Some(engine::FinishReason::Stop) => {
                self.logprobs.push_back(None);
                self.text.push_stop_token(token.id);
                Delta::default()
            }
            Some(engine::FinishReason::Length) | None => {
                self.logprobs.push_back(self.logprobs_wanted.then(|| logprob(tokenizer, &token, self.chars)));
                self.chars += self.logprobs.back().and_then(Option::as_ref).map_or(0, |l| l.token.text.chars().count());
                self.text.push(tokenizer, &[token.id])
            }
        };
        if finish.is_some() && delta.stop.is_none() {
            let rest = self.text.finish();
            delta.text.push_str(&rest.text);
            delta.ids.extend(rest.ids);
            delta.stop = rest.stop;
        }
        delta
    }

    /// What a client is shown of `delta`: nothing where it has neither text nor log-probabilities; its ids then wait for the next one.
    fn output(&mut self, choice: u32, delta: Delta) -> Option<Output> {
        self.ids.extend(&delta.ids);
        let covered = delta.ids.len().min(self.logprobs.len());
        let logprobs: Vec<_> = self.logprobs.drain(..covered).flatten().collect();
        let text = self.lead.take().unwrap_or_default() + &delta.text;
        if text.is_empty() && logprobs.is_empty() {
            return None;
        }
        let logprobs = self.logprobs_wanted.then_some(logprobs);
        Some(Output::Text { piece: Piece { choice, text, logprobs }, ids: std::mem::take(&mut self.ids) })
    }
}

fn logprob(tokenizer: &Tokenizer, token: &SampledToken, text_offset: usize) -> TokenLogprob {
    let text = |id: u32| {
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        TokenText { text: String::from_utf8_lossy(&bytes).into_owned(), bytes }
    };
    TokenLogprob {
        token: text(token.id),
        logprob: token.logprob.unwrap_or(f32::NEG_INFINITY),
        top: token.top_logprobs.iter().map(|&(id, logprob)| (text(id), logprob)).collect(),
        text_offset,
    }
}
