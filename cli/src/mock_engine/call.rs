//! One request to generate, as every contract sees it, and what comes of it.

use super::answer::{Answer, quoted};
use super::api::Api;
use super::ask::{Ask, AskError, Prompt, TOKENS_MAX};
use super::engine::{Engine, REQUEST_ID, pause};
use super::fail::{Failure, StallAt};
use http::HeaderMap;

/// One request to generate.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) number: u64,
    pub(crate) api: Api,
    pub(crate) ask: &'a Ask<'a>,
    pub(crate) prompt: Prompt,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) failure: Option<Failure>,
}

/// What comes of a request.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Tokens, with further headers.
    Answered(Box<Answer>, Vec<(&'static str, String)>),
    /// Another answer, which is JSON.
    Json(String),
}

/// An error in the words of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(status: u16, message: impl Into<String>) -> Self {
        Refusal { status, message: message.into() }
    }

    /// As vLLM and SGLang write it.
    pub(crate) fn json(&self) -> String {
        let (status, message) = (self.status, quoted(&self.message));
        let kind = if status < 500 { "BadRequestError" } else { "InternalServerError" };
        format!(
            "{{\"object\":\"error\",\"message\":\"{message}\",\"type\":\"{kind}\",\"param\":null,\"code\":{status},\
             \"error\":{{\"message\":\"{message}\",\"type\":\"{kind}\",\"param\":null,\"code\":{status}}}}}"
        )
    }
}

impl From<AskError> for Refusal {
    fn from(error: AskError) -> Self {
        Refusal::new(400, error.to_string())
    }
}

impl<'a> Call<'a> {
    /// # Errors
    /// When an engine would refuse the request whatever leg it is.
    pub(crate) fn new(
        number: u64,
        api: Api,
        ask: &'a Ask<'a>,
        headers: &'a HeaderMap,
        failure: Option<Failure>,
    ) -> Result<Self, Refusal> {
        let prompt = ask.prompt()?;
        if let Some(limit) = ask.limit(api) {
            if limit == 0 || limit > TOKENS_MAX {
                return Err(Refusal::new(400, format!("the token limit must be from 1 to {TOKENS_MAX}, got {limit}")));
            }
            if ask.at_least() > limit {
                let at_least = ask.at_least();
                return Err(Refusal::new(
                    400,
                    format!("min_tokens must be less than or equal to max_tokens={limit}, got {at_least}"),
                ));
            }
        }
        Ok(Call { number, api, ask, prompt, headers, failure })
    }

    /// The client's name for the request.
    pub(crate) fn request_id(&self) -> Option<&'a str> {
        self.headers.get(REQUEST_ID).and_then(|value| value.to_str().ok())
    }

    /// An answer of as many tokens as are asked for.
    pub(crate) fn answer(&self, engine: &Engine, cached_tokens: u64) -> Box<Answer> {
        let name = self.request_id().map_or_else(|| format!("{}-{}", engine.args.name, self.number), plain);
        let prefix = self.api.id_prefix();
        let tokens = self.ask.limit(self.api).and_then(|limit| u32::try_from(limit).ok());
        let choices = self.prompt.count * self.ask.choices();
        Box::new(Answer {
            api: self.api,
            id: if name.starts_with(prefix) { name } else { format!("{prefix}{name}") },
            model: plain(self.ask.model.as_deref().unwrap_or(&engine.args.model)),
            prompt_tokens: self.prompt.tokens,
            cached_tokens,
            tokens: tokens.unwrap_or(engine.args.tokens),
            choices: u32::try_from(choices).unwrap_or(u32::MAX),
            is_list: self.prompt.is_list || choices > 1,
            seed: self.prompt.seed,
            start: 0,
            streams: self.ask.streams(),
            includes_usage: self.ask.includes_usage(),
            handle: None,
            logprobs: self.ask.return_logprob == Some(true),
            with_ids: false,
            awkward: engine.args.awkward_text,
        })
    }

    /// What is met once the engine has the request, before it is scheduled.
    ///
    /// # Errors
    /// When that is an error.
    pub(crate) async fn admitted(&self) -> Result<(), Refusal> {
        match self.failure {
            Some(Failure::Hang) => std::future::pending().await,
            Some(Failure::SlowHead(lasts)) => pause(lasts).await,
            Some(Failure::Status { code, admitted: true }) => return Err(injected(code)),
            _ => {}
        }
        Ok(())
    }

    /// What is met before the answer's head.
    pub(crate) async fn before_head(&self) {
        if let Some(Failure::Stall { lasts, at: StallAt::Head }) = self.failure {
            pause(lasts).await;
        }
    }

    /// Generates: a stream takes its time as it is sent, any other answer before it.
    pub(crate) async fn generate(&self, engine: &Engine, answer: &Answer) {
        if !answer.streams {
            pause(engine.args.token_delay * answer.tokens.saturating_sub(1)).await;
        }
    }

    /// Both phases here.
    ///
    /// # Errors
    /// When the request meets an error.
    pub(crate) async fn aggregated(&self, engine: &Engine) -> Result<Outcome, Refusal> {
        self.admitted().await?;
        engine.compute(self.prompt.tokens).await;
        let answer = self.answer(engine, engine.cached_tokens(self.prompt.tokens));
        self.before_head().await;
        self.generate(engine, &answer).await;
        Ok(Outcome::Answered(answer, Vec::new()))
    }
}

/// What a decode leg says of cached tokens: wrong, as engines have it, since all that was handed over counts as cached. The
/// prefill leg's number is the right one.
pub(crate) fn wrongly_cached(prompt_tokens: u64) -> u64 {
    prompt_tokens.saturating_sub(1)
}

/// An error that was asked for.
pub(crate) fn injected(code: u16) -> Refusal {
    Refusal::new(code, "injected failure")
}

/// Quoting costs a little, and hardly any name needs it.
fn plain(text: &str) -> String {
    let is_plain = |c: u8| (b' '..0x7f).contains(&c) && c != b'"' && c != b'\\';
    if text.bytes().all(is_plain) { text.to_owned() } else { quoted(text) }
}
