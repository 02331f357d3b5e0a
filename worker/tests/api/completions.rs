//! What the two completion endpoints answer to a right request.

use crate::server::{Server, streamed_choices};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A chat request with some text of its own, so that tests don't share prefixes; `rest` is added.
fn chat(rest: Value) -> Value {
    let mut body = json!({"model": "tiny", "max_tokens": 24, "seed": 7, "messages": [
        {"role": "user", "content": "Tell me a short story about a fox and a river."}]});
    body.as_object_mut().expect("an object").extend(rest.as_object().expect("an object").clone());
    body
}

fn completion(rest: Value) -> Value {
    let mut body = json!({"model": "tiny", "max_tokens": 24, "seed": 7, "prompt": "Once upon a time there was"});
    body.as_object_mut().expect("an object").extend(rest.as_object().expect("an object").clone());
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_answer_is_the_whole_answer_in_pieces() {
    let server = Server::ready().await;
    for (path, body) in [(CHAT, chat(json!({"n": 2}))), (COMPLETIONS, completion(json!({"n": 2})))] {
        let whole = server.post(path, &body).await.json();
        let mut streaming = body.clone();
        streaming["stream"] = json!(true);
        let events = server.post(path, &streaming).await.events();
        let streamed = streamed_choices(&events, 2);
        for (index, (text, reason)) in streamed.iter().enumerate() {
            let choice = &whole["choices"][index];
            assert_eq!(choice["index"], index);
            assert_eq!(
                choice["message"]["content"].as_str().or(choice["text"].as_str()),
                Some(text.as_str()),
                "{path}"
            );
            assert_eq!(choice["finish_reason"], *reason);
            assert!(!text.is_empty());
        }
        assert_ne!(streamed[0].0, streamed[1].0, "each choice draws for itself");
        assert!(events.len() > 4, "text comes in pieces");
        assert!(events.iter().all(|event| event["id"] == events[0]["id"] && event.get("usage").is_none()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_stream_begins_with_the_role_and_ends_with_reason_and_usage() {
    let server = Server::ready().await;
    let body =
        chat(json!({"stream": true, "stream_options": {"include_usage": true}, "max_tokens": 3, "ignore_eos": true}));
    let answer = server.post(CHAT, &body).await;
    assert_eq!(answer.header("x-baton-path"), "local-prefill; reason=aggregated");
    let events = answer.events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events[0]["usage"], Value::Null);
    let [.., finish, usage] = events.as_slice() else { panic!("too few events") };
    assert_eq!(finish["choices"][0]["finish_reason"], "length");
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_tells_what_the_prefix_cache_had() {
    let server = Server::ready().await;
    let prompt = "The quick brown fox jumps over the lazy dog. ".repeat(12);
    let body = completion(json!({"prompt": prompt, "max_tokens": 2, "ignore_eos": true}));
    let usage = async || server.post(COMPLETIONS, &body).await.json()["usage"].take();
    let (first, second) = (usage().await, usage().await);
    assert_eq!(first["prompt_tokens_details"]["cached_tokens"], 0);
    let cached = second["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
    assert!(cached >= 32 && cached.is_multiple_of(32), "{second}");
    assert_eq!(second["total_tokens"].as_u64(), second["prompt_tokens"].as_u64().map(|prompt| prompt + 2));

    let mut salted = body.clone();
    salted["cache_salt"] = json!("another tenant");
    let usage = server.post(COMPLETIONS, &salted).await.json()["usage"].take();
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0, "another salt shares nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_text_before_it_or_with_it() {
    let server = Server::ready().await;
    let body = completion(json!({"temperature": 0, "max_tokens": 40, "ignore_eos": true}));
    let whole = server.post(COMPLETIONS, &body).await.json();
    let text = whole["choices"][0]["text"].as_str().expect("text");
    // A piece from the middle of the text, which no token boundary need respect.
    let from = text.char_indices().nth(text.chars().count() / 2).expect("some text").0;
    let stop: String = text[from..].chars().take(4).collect();
    let before = &text[..text.find(&stop).expect("it is a part of the text")];
    for (include, stream) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut body = body.clone();
        body["stop"] = json!(["never to be seen", stop]);
        body["include_stop_str_in_output"] = json!(include);
        body["stream"] = json!(stream);
        let answer = server.post(COMPLETIONS, &body).await;
        let (found, reason) = if stream {
            streamed_choices(&answer.events(), 1).remove(0)
        } else {
            let choice = answer.json()["choices"][0].take();
            (
                choice["text"].as_str().expect("text").to_owned(),
                choice["finish_reason"].as_str().expect("why").to_owned(),
            )
        };
        let expected = if include { format!("{before}{stop}") } else { before.to_owned() };
        assert_eq!((found, reason.as_str()), (expected, "stop"), "include {include}, stream {stream}");
    }
    server.is_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_token_ends_the_choice_and_its_text_is_left_out() {
    let server = Server::ready().await;
    let body = completion(json!({"max_tokens": 5, "logit_bias": {"1": 100}}));
    let choice = server.post(COMPLETIONS, &body).await.json();
    assert_eq!(choice["choices"][0]["text"], "", "token 1 ends the text");
    assert_eq!(choice["choices"][0]["finish_reason"], "stop");
    assert_eq!(choice["usage"]["completion_tokens"], 1);

    let body = completion(json!({"max_tokens": 5, "logit_bias": {"400": 100}, "stop_token_ids": [400]}));
    let choice = server.post(COMPLETIONS, &body).await.json();
    assert_eq!((&choice["choices"][0]["text"], &choice["choices"][0]["finish_reason"]), (&json!(""), &json!("stop")));
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_cover_the_text_token_by_token() {
    let server = Server::ready().await;
    let rest = json!({"temperature": 0, "logprobs": true, "top_logprobs": 3, "max_tokens": 8, "ignore_eos": true});
    for stream in [false, true] {
        let mut body = chat(rest.clone());
        body["stream"] = json!(stream);
        let answer = server.post(CHAT, &body).await;
        let (text, tokens) = if stream {
            let events = answer.events();
            let lists = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
            (streamed_choices(&events, 1).remove(0).0, lists.flatten().cloned().collect::<Vec<_>>())
        } else {
            let choice = answer.json()["choices"][0].take();
            let text = choice["message"]["content"].as_str().expect("text").to_owned();
            (text, choice["logprobs"]["content"].as_array().expect("a list").clone())
        };
        assert_eq!(tokens.len(), 8, "stream {stream}");
        let bytes = tokens.iter().flat_map(|token| token["bytes"].as_array().expect("bytes"));
        let bytes: Vec<u8> = bytes.map(|byte| byte.as_u64().expect("a byte") as u8).collect();
        assert!(String::from_utf8_lossy(&bytes).contains(text.trim()), "{text:?} of {bytes:?}");
        for token in &tokens {
            let top = token["top_logprobs"].as_array().expect("a list");
            assert_eq!(top.len(), 3);
            assert_eq!(top[0]["token"], token["token"], "greedy takes the likeliest");
            assert!(token["logprob"].as_f64().is_some_and(|logprob| (-50.0..=0.0).contains(&logprob)));
        }
    }

    let body = completion(json!({"temperature": 0, "logprobs": 2, "max_tokens": 4, "ignore_eos": true}));
    let logprobs = server.post(COMPLETIONS, &body).await.json()["choices"][0]["logprobs"].take();
    for column in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[column].as_array().map(Vec::len), Some(4), "{column}");
    }
    assert_eq!(logprobs["text_offset"][0], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_prompts_are_answered_in_order_and_token_ids_are_prompts_too() {
    let server = Server::ready().await;
    let body = completion(json!({"prompt": ["Once upon a time", "The little dog"], "n": 2, "echo": true}));
    let answer = server.post(COMPLETIONS, &body).await.json();
    let texts: Vec<_> =
        answer["choices"].as_array().expect("a list").iter().map(|c| c["text"].as_str().expect("text")).collect();
    assert_eq!(texts.len(), 4);
    assert!(texts[..2].iter().all(|text| text.starts_with("Once upon a time")), "{texts:?}");
    assert!(texts[2..].iter().all(|text| text.starts_with("The little dog")), "{texts:?}");

    let render = json!({"endpoint": "completions", "body": {"model": "tiny", "prompt": "Once upon a time"}});
    let ids = server.post("/internal/render", &render).await.json()["prompts"][0]["token_ids"].take();
    let by_text = server.post(COMPLETIONS, &completion(json!({"prompt": "Once upon a time"}))).await.json();
    let by_ids = server.post(COMPLETIONS, &completion(json!({"prompt": ids}))).await.json();
    assert_eq!(by_text["choices"], by_ids["choices"]);
    assert_eq!(by_text["system_fingerprint"], by_ids["system_fingerprint"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_seeds_repeat_and_absent_ones_do_not() {
    let server = Server::ready().await;
    let text = async |body: Value| server.post(COMPLETIONS, &body).await.json()["choices"][0]["text"].take();
    let hot = json!({"temperature": 1.5, "ignore_eos": true});
    assert_eq!(text(completion(hot.clone())).await, text(completion(hot)).await);
    let unseeded = completion(json!({"temperature": 1.5, "seed": null, "ignore_eos": true}));
    assert_ne!(text(unseeded.clone()).await, text(unseeded).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_by_the_served_name() {
    let server = Server::ready().await;
    let list = server.get("/v1/models").await.json();
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("tiny")));
    assert_eq!(server.get("/v1/models/tiny").await.json(), list["data"][0]);
    assert_eq!(server.get("/v1/models/gpt/x").await.json()["error"]["code"], "model_not_found");
}
