//! The shapes of `/v1/chat/completions`.

use super::{Answer, FinishReason, Piece, TokenLogprob, TokenText, Usage, finite, json};
use serde::Serialize;

#[derive(Serialize)]
struct Object<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: Option<FinishReason>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

#[derive(Serialize)]
struct WholeChoice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: FinishReason,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct Logprobs<'a> {
    content: Vec<ContentLogprob<'a>>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct ContentLogprob<'a> {
    #[serde(flatten)]
    chosen: TopLogprob<'a>,
    top_logprobs: Vec<TopLogprob<'a>>,
}

#[derive(Serialize)]
struct TopLogprob<'a> {
    token: &'a str,
    bytes: &'a [u8],
    logprob: f32,
}

const ASSISTANT: &str = "assistant";

pub(super) fn role_chunk(answer: &Answer, choice: u32) -> String {
    chunk(answer, choice, Delta { role: Some(ASSISTANT), content: Some("") }, None, None)
}

pub(super) fn text_chunk(answer: &Answer, piece: &Piece) -> String {
    let delta = Delta { role: None, content: Some(&piece.text) };
    chunk(answer, piece.choice, delta, piece.logprobs.as_deref(), None)
}

pub(super) fn finish_chunk(answer: &Answer, choice: u32, reason: FinishReason) -> String {
    chunk(answer, choice, Delta::default(), None, Some(reason))
}

pub(super) fn usage_chunk(answer: &Answer, usage: Usage) -> String {
    json(&object::<ChunkChoice<'_>>(answer, CHUNK, Vec::new(), Some(Some(usage))))
}

pub(super) fn whole(answer: &Answer, choices: &[(Piece, FinishReason)], usage: Usage) -> String {
    let choices = choices.iter().map(|(piece, finish_reason)| WholeChoice {
        index: piece.choice,
        message: Message { role: ASSISTANT, content: &piece.text, refusal: None },
        logprobs: piece.logprobs.as_deref().map(logprobs),
        finish_reason: *finish_reason,
    });
    json(&object(answer, "chat.completion", choices.collect(), Some(Some(usage))))
}

const CHUNK: &str = "chat.completion.chunk";

fn chunk(
    answer: &Answer,
    index: u32,
    delta: Delta<'_>,
    tokens: Option<&[TokenLogprob]>,
    finish_reason: Option<FinishReason>,
) -> String {
    let choice = ChunkChoice { index, delta, logprobs: tokens.map(logprobs), finish_reason };
    json(&object(answer, CHUNK, vec![choice], answer.no_usage()))
}

fn object<'a, C>(
    answer: &'a Answer,
    object: &'static str,
    choices: Vec<C>,
    usage: Option<Option<Usage>>,
) -> Object<'a, C> {
    let head = &answer.head;
    Object {
        id: &head.id,
        object,
        created: head.created,
        model: &head.model,
        system_fingerprint: &head.system_fingerprint,
        choices,
        usage,
    }
}

fn logprobs(tokens: &[TokenLogprob]) -> Logprobs<'_> {
    let content = tokens.iter().map(|token| ContentLogprob {
        chosen: top_logprob(&token.token, token.logprob),
        top_logprobs: token.top.iter().map(|(token, logprob)| top_logprob(token, *logprob)).collect(),
    });
    Logprobs { content: content.collect(), refusal: None }
}

fn top_logprob(token: &TokenText, logprob: f32) -> TopLogprob<'_> {
    TopLogprob { token: &token.text, bytes: &token.bytes, logprob: finite(logprob) }
}
