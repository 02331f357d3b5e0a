//! The shapes of `/v1/completions`.

use super::{Answer, FinishReason, Piece, TokenLogprob, Usage, finite, json};
use serde::{Serialize, Serializer};

#[derive(Serialize)]
struct Object<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<Choice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: Option<FinishReason>,
}

/// In columns, one row a token.
#[derive(Serialize)]
struct Logprobs<'a> {
    tokens: Vec<&'a str>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<TopLogprobs<'a>>,
    text_offset: Vec<usize>,
}

/// An object, likeliest first. Two tokens can have the same text (halves of characters); the likelier one stands then.
struct TopLogprobs<'a>(Vec<(&'a str, f32)>);

impl Serialize for TopLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

pub(super) fn text_chunk(answer: &Answer, piece: &Piece) -> String {
    json(&object(answer, vec![choice(piece, None)], answer.no_usage()))
}

pub(super) fn finish_chunk(answer: &Answer, choice: u32, reason: FinishReason) -> String {
    let last = Choice { index: choice, text: "", logprobs: None, finish_reason: Some(reason) };
    json(&object(answer, vec![last], answer.no_usage()))
}

pub(super) fn usage_chunk(answer: &Answer, usage: Usage) -> String {
    json(&object(answer, Vec::new(), Some(Some(usage))))
}

pub(super) fn whole(answer: &Answer, choices: &[(Piece, FinishReason)], usage: Usage) -> String {
    let choices = choices.iter().map(|(piece, reason)| choice(piece, Some(*reason))).collect();
    json(&object(answer, choices, Some(Some(usage))))
}

fn object<'a>(answer: &'a Answer, choices: Vec<Choice<'a>>, usage: Option<Option<Usage>>) -> Object<'a> {
    let head = &answer.head;
    Object {
        id: &head.id,
        object: "text_completion",
        created: head.created,
        model: &head.model,
        system_fingerprint: &head.system_fingerprint,
        choices,
        usage,
    }
}

fn choice(piece: &Piece, finish_reason: Option<FinishReason>) -> Choice<'_> {
    let logprobs = piece.logprobs.as_deref().map(logprobs);
    Choice { index: piece.choice, text: &piece.text, logprobs, finish_reason }
}

fn logprobs(tokens: &[TokenLogprob]) -> Logprobs<'_> {
    Logprobs {
        tokens: tokens.iter().map(|token| token.token.text.as_str()).collect(),
        token_logprobs: tokens.iter().map(|token| finite(token.logprob)).collect(),
        top_logprobs: tokens.iter().map(top_logprobs).collect(),
        text_offset: tokens.iter().map(|token| token.text_offset).collect(),
    }
}

fn top_logprobs(token: &TokenLogprob) -> TopLogprobs<'_> {
    let mut top = TopLogprobs(Vec::with_capacity(token.top.len()));
    for (text, logprob) in &token.top {
        if top.0.iter().all(|(known, _)| *known != text.text) {
            top.0.push((&text.text, finite(*logprob)));
        }
    }
    top
}
