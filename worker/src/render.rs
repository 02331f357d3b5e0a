//! A checked request to token ids: chat messages through the model's template, prompts as they stand.
//!
//! Takes a CPU for as long as the prompt is long; callers run it where blocking is allowed.

use crate::openai::prompt::Prompt;
use crate::openai::{Input, ModelFacts, Request, RequestError};
use baton_engine::chat_template::TemplateInput;
use baton_engine::text::TokenText;
use baton_engine::tokenizer::Tokenizer;
use baton_wire::render::Endpoint;
use std::time::SystemTime;

/// The prompts of `request` as token ids: each fits into the model with what the client asks for. Templates may show `now`.
///
/// # Errors
/// When the template or the tokenizer refuses, or a prompt is empty or too long.
pub fn render(
    request: &Request,
    tokenizer: &Tokenizer,
    model: &ModelFacts,
    now: SystemTime,
) -> Result<Vec<Vec<u32>>, RequestError> {
    let prompts = match &request.input {
        Input::Chat { messages, variables } => {
            let messages = serde_json::to_value(messages).expect("messages are strings, which always serialise");
            let input = TemplateInput {
                messages: &messages,
                tools: None,
                add_generation_prompt: true,
                variables: Some(variables),
                now,
            };
            let text =
                tokenizer.render(&input).map_err(|error| RequestError::Template { reason: error.to_string() })?;
            // The template writes the special tokens itself.
            vec![encode(tokenizer, &text, false)?]
        }
        Input::Completions { prompts, echo: _ } => {
            let tokens = |prompt: &Prompt| match prompt {
                Prompt::Text(text) => encode(tokenizer, text, true),
                Prompt::Tokens(tokens) => Ok(tokens.clone()),
            };
            prompts.iter().map(tokens).collect::<Result<_, _>>()?
        }
    };
    for prompt in &prompts {
        if prompt.is_empty() {
            let param = match request.endpoint() {
                Endpoint::Chat => "messages",
                Endpoint::Completions => "prompt",
            };
            return Err(RequestError::Empty { param: param.to_owned() });
        }
        request.completion_tokens_max(prompt.len(), model)?;
    }
    Ok(prompts)
}

/// The text that each completion starts with, where the client asks for its prompt back.
pub fn echo(request: &Request, tokenizer: &Tokenizer) -> Option<Vec<String>> {
    match &request.input {
        Input::Chat { .. } | Input::Completions { echo: false, .. } => None,
        Input::Completions { prompts, echo: true } => {
            let text = |prompt: &Prompt| match prompt {
                Prompt::Text(text) => text.clone(),
                Prompt::Tokens(tokens) => TokenText::decode(tokenizer, tokens),
            };
            Some(prompts.iter().map(text).collect())
        }
    }
}

fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, RequestError> {
    tokenizer.encode(text, add_special).map_err(|_| RequestError::Untokenisable)
}
