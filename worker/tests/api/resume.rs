//! A stream whose decode worker is lost goes on, on another worker, with the very next byte: cut after any event, and cut again.
//!
//! The test plays the proxy: it takes the marks out, counts them, and tells the next worker what the client has. With one choice the
//! client's bytes must be those of the uncut stream; with several each choice's must be, since which choice's event comes first is
//! a matter of steps.

use crate::server::{Server, until};
use baton_wire::leg::{Resume, ResumedChoice};
use baton_wire::names::sse::{CACHED, TOKEN_IDS_PREFIX, USAGE};
use baton_wire::{Path, PathReason};
use http::{Request, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};

/// One event as the proxy sees it.
#[derive(Clone, Debug, PartialEq)]
struct Event {
    /// What follows the mark's prefix.
    mark: Option<String>,
    /// What the client gets.
    bytes: String,
}

impl Event {
    /// Which choice it is of.
    fn choice(&self) -> Option<usize> {
        self.mark.as_deref()?.split([' ', ';']).next()?.parse().ok()
    }
}

fn events(text: &str) -> Vec<Event> {
    let event = |text: &str| match text.strip_prefix(TOKEN_IDS_PREFIX).and_then(|marked| marked.split_once('\n')) {
        Some((mark, bytes)) => Event { mark: Some(mark.to_owned()), bytes: bytes.to_owned() },
        None => Event { mark: None, bytes: text.to_owned() },
    };
    text.split_inclusive("\n\n").map(event).collect()
}

/// What a client has, and what the proxy knows of it.
#[derive(Clone, Debug)]
struct Client {
    has: Vec<Event>,
    resume: Resume,
}

impl Client {
    fn of(choices: usize) -> Self {
        Client {
            has: Vec::new(),
            resume: Resume { choices: vec![ResumedChoice::default(); choices], usage_sent: false },
        }
    }

    fn take(&mut self, events: &[Event]) {
        for event in events {
            self.has.push(event.clone());
            let Some((what, ids)) = event.mark.as_deref().and_then(|mark| mark.split_once(' ')) else { continue };
            if what == USAGE {
                self.resume.usage_sent = true;
                continue;
            }
            let (choice, cached) = what.split_once(CACHED).unwrap_or((what, ""));
            let choice = &mut self.resume.choices[choice.parse::<usize>().expect("a choice")];
            choice.events += 1;
            choice
                .token_ids
                .extend(ids.split(',').filter(|id| !id.is_empty()).map(|id| id.parse::<u32>().expect("an id")));
            choice.cached_tokens = choice.cached_tokens.or(cached.parse().ok());
        }
    }

    /// All bytes of one choice, and of what is of none.
    fn choice(&self, choice: Option<usize>) -> String {
        self.has.iter().filter(|event| event.choice() == choice).map(|event| event.bytes.as_str()).collect()
    }
}

async fn decode(worker: &Server, leg: &Value) -> crate::server::Answer {
    let request = Request::post("/internal/decode").header("x-baton-token-ids", "1");
    worker.send(request.body(Full::from(leg.to_string())).expect("a request")).await
}

async fn stream(worker: &Server, leg: &Value) -> Vec<Event> {
    let answer = decode(worker, leg).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let events = events(&answer.text);
    assert_eq!(events.last().map(|event| event.bytes.as_str()), Some("data: [DONE]\n\n"));
    assert!(events.iter().all(|event| event.mark.is_some() != event.bytes.contains("[DONE]")), "each event has a mark");
    events
}

async fn leg(worker: &Server, endpoint: &str, body: &Value) -> Value {
    let rendered = worker.post("/internal/render", &json!({"endpoint": endpoint, "body": body})).await;
    assert_eq!(rendered.status, StatusCode::OK, "{}", rendered.text);
    let rendered = rendered.json();
    let prompts: Vec<_> =
        rendered["prompts"].as_array().expect("a list").iter().map(|prompt| prompt["token_ids"].clone()).collect();
    json!({
        "request_id": "r-1", "endpoint": endpoint, "body": body, "prompts": prompts, "transfers": [], "created": 1_700_000_000u64,
        "seed": rendered["seed"].as_u64().unwrap_or(5), "planned": Path::LocalPrefill(PathReason::NoPrefillWorker),
    })
}

fn resumed(leg: &Value, client: &Client, tenant_salt: Option<u64>) -> Value {
    let mut leg = leg.clone();
    leg["resume"] = json!(client.resume);
    leg["planned"] = json!(Path::Fallback(PathReason::DecodeWorkerLost));
    leg["tenant_salt"] = json!(tenant_salt);
    leg
}

/// Cuts the stream of a request after each of its events, and what follows once more. Returns the uncut stream.
async fn check(pair: &[Server; 2], endpoint: &str, body: &Value) -> Client {
    let [lost, other] = pair;
    let mut leg = leg(lost, endpoint, body).await;
    let prompts = leg["prompts"].as_array().expect("a list").len();
    let choices = prompts * body["n"].as_u64().unwrap_or(1) as usize;
    // One prompt may meet any prefix cache, since the marks say what the first worker's had. Of a prompt whose first token never came
    // only the second worker's is told: several are kept cold.
    let is_cold = prompts > 1;
    leg["tenant_salt"] = json!(is_cold.then_some(0));
    let mut uncut = Client::of(choices);
    let whole = stream(lost, &leg).await;
    uncut.take(&whole);
    for cut in 1..whole.len() {
        let salt = |round: u64| is_cold.then_some(2 * cut as u64 + round);
        let mut client = Client::of(choices);
        client.take(&whole[..cut]);
        let rest = stream(other, &resumed(&leg, &client, salt(1))).await;
        // Somewhere, and at the ends too.
        client.take(&rest[..(cut * 7) % rest.len()]);
        let rest = stream(lost, &resumed(&leg, &client, salt(2))).await;
        client.take(&rest);
        for choice in (0..choices).map(Some).chain([None]) {
            assert_eq!(client.choice(choice), uncut.choice(choice), "choice {choice:?} cut after {cut} events: {body}");
        }
        if choices == 1 {
            let bytes = |client: &Client| client.has.iter().map(|event| event.bytes.as_str()).collect::<String>();
            assert_eq!(bytes(&client), bytes(&uncut), "cut after {cut} events: {body}");
        }
        assert_eq!(client.resume, uncut.resume, "what the proxy counts is the same too");
    }
    uncut
}

async fn pair() -> [Server; 2] {
    let (lost, other) = tokio::join!(Server::ready(), Server::ready_with("--role decode --prefill-chunk-tokens 32"));
    [lost, other]
}

const TOKENS: u64 = 14;

fn completions(rest: Value) -> Value {
    let prompt: String = (0..20).map(|word| format!("number {word} and ")).collect();
    let mut body = json!({"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "stream": true, "ignore_eos": true});
    body.as_object_mut().expect("an object").extend(rest.as_object().expect("an object").clone());
    body
}

/// The text that a choice got.
fn text(client: &Client, choice: usize) -> String {
    let data = client.choice(Some(choice));
    let events = data.lines().filter_map(|line| line.strip_prefix("data: "));
    let piece = |event: &str| {
        let event: Value = serde_json::from_str(event).expect("events are JSON");
        let choice = &event["choices"][0];
        choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default().to_owned()
    };
    events.map(piece).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_elsewhere_byte_for_byte() {
    let pair = pair().await;
    for rest in [
        json!({"seed": 1}),
        json!({"seed": 2, "temperature": 1.7, "top_k": 40, "stream_options": {"include_usage": true}}),
        json!({"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7}),
        json!({"seed": 3, "logprobs": 2}),
        json!({"seed": 4, "echo": true, "stop": ["zzz", "e"]}),
        json!({"seed": 5, "max_tokens": 1}),
    ] {
        check(&pair, "completions", &completions(rest)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_usage_is_what_the_first_worker_would_have_said() {
    let pair = pair().await;
    let body = completions(json!({"seed": 9, "stream_options": {"include_usage": true}}));
    check(&pair, "completions", &body).await;
    // Warm now on both sides.
    let uncut = check(&pair, "completions", &body).await;
    assert!(uncut.resume.choices[0].cached_tokens.is_some_and(|tokens| tokens > 0), "{:?}", uncut.resume);
    assert!(uncut.resume.usage_sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_choices_and_prompts_go_on_each_where_it_was() {
    let pair = pair().await;
    let check = async |rest: Value| check(&pair, "completions", &completions(rest)).await;
    check(json!({"seed": 6, "n": 2, "logprobs": 1, "stream_options": {"include_usage": true}})).await;
    let uncut = check(json!({"seed": 7, "n": 3, "temperature": 1.5})).await;
    // One of them ends early, by a token and by a text of its own.
    let stop = uncut.resume.choices[1].token_ids[4];
    check(json!({"seed": 7, "n": 3, "temperature": 1.5, "stop_token_ids": [stop]})).await;
    let stop: String = text(&uncut, 0).chars().skip(6).take(3).collect();
    check(json!({"seed": 7, "n": 3, "temperature": 1.5, "stop": [stop]})).await;
    let prompts = json!(["once upon a time", completions(json!({}))["prompt"]]);
    check(json!({"prompt": prompts, "n": 2, "seed": 8, "max_tokens": 6, "stream_options": {"include_usage": true}}))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn text_that_is_held_back_is_neither_lost_nor_repeated() {
    let pair = pair().await;
    let check = async |rest: Value| check(&pair, "completions", &completions(rest)).await;
    // Tokens that are parts of characters, in any order: most of what comes is held back for a while.
    let parts =
        leg(&pair[0], "completions", &completions(json!({"prompt": "€😀é→日本語ß"}))).await["prompts"][0].take();
    let biases: serde_json::Map<String, Value> =
        parts.as_array().expect("ids").iter().map(|id| (id.to_string(), json!(30))).collect();
    for seed in [10, 11, 12] {
        let rest = json!({"seed": seed, "temperature": 1.5, "logit_bias": biases, "max_tokens": 20});
        check(rest.clone()).await;
        let mut chosen = rest;
        chosen["stop"] = json!(["€é", "ß\u{fffd}", "\u{fffd}\u{fffd}\u{fffd}€"]);
        check(chosen).await;
    }

    // Stop strings that are found, found and shown, and all but found.
    let uncut = check(json!({"seed": 13, "temperature": 1.5})).await;
    let characters: Vec<char> = text(&uncut, 0).chars().collect();
    for from in [2, characters.len() / 2] {
        let stop: String = characters[from..characters.len().min(from + 4)].iter().collect();
        let almost = format!("{stop}\u{1}");
        let shown = json!({"seed": 13, "temperature": 1.5, "stop": [stop], "include_stop_str_in_output": true});
        check(shown).await;
        check(json!({"seed": 13, "temperature": 1.5, "stop": [stop]})).await;
        check(json!({"seed": 13, "temperature": 1.5, "stop": [almost], "logprobs": 0})).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_says_its_role_once() {
    let pair = pair().await;
    for rest in [
        json!({"seed": 14}),
        json!({"seed": 15, "n": 2, "logprobs": true, "top_logprobs": 2, "stream_options": {"include_usage": true}}),
        json!({"seed": 16, "temperature": 0, "stop": ["a"]}),
    ] {
        let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "tell me of foxes"}],
                              "max_tokens": TOKENS, "stream": true});
        body.as_object_mut().expect("an object").extend(rest.as_object().expect("an object").clone());
        let uncut = check(&pair, "chat", &body).await;
        assert_eq!(uncut.choice(Some(0)).matches("assistant").count(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_stream_names_its_path_and_frees_its_blocks() {
    let [worker, _] = pair().await;
    let leg = leg(&worker, "completions", &completions(json!({"seed": 1, "max_tokens": 1000, "n": 2}))).await;
    let mut client = Client::of(2);
    // Not the whole of it: the beginning is enough.
    let short = stream(&worker, &{
        let mut short = leg.clone();
        short["body"]["max_tokens"] = json!(6);
        short
    })
    .await;
    client.take(&short[..7]);
    let request = Request::post("/internal/decode").header("x-baton-token-ids", "1");
    let request = request.body(Full::from(resumed(&leg, &client, None).to_string())).expect("a request");
    let answer = worker.open(request).await;
    assert_eq!(answer.headers()["x-baton-path"], "fallback; reason=decode-worker-lost");
    drop(answer);
    worker.is_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_be_of_no_stream_is_refused() {
    let [worker, _] = pair().await;
    let leg = leg(&worker, "completions", &completions(json!({"seed": 1}))).await;
    let mut client = Client::of(1);
    let whole = stream(&worker, &leg).await;
    client.take(&whole[..5]);
    let right = resumed(&leg, &client, None);
    assert_eq!(decode(&worker, &right).await.status, StatusCode::OK);
    let ids = right["resume"]["choices"][0]["token_ids"].as_array().expect("ids").clone();
    let mut all = Client::of(1);
    all.take(&whole);
    let behind_the_end = [all.resume.choices[0].token_ids.as_slice(), &[1]].concat();
    let of_choice = |name: &str, value: Value| {
        let mut leg = right.clone();
        leg["resume"]["choices"][0][name] = value;
        leg
    };
    let of_body = |name: &str, value: Value| {
        let mut leg = right.clone();
        leg["body"][name] = value;
        leg
    };
    for wrong in [
        of_choice("token_ids", json!(ids[1..])),
        of_choice("token_ids", json!([&ids[..], &ids[..]].concat())),
        of_choice("token_ids", json!([4_000_000_000u32])),
        of_choice("token_ids", json!(behind_the_end)),
        of_choice("events", json!(0)),
        of_choice("events", json!(1000)),
        of_body("stream", json!(false)),
        of_body("n", json!(2)),
    ] {
        let answer = decode(&worker, &wrong).await;
        let refused = answer.status == StatusCode::BAD_REQUEST && answer.json()["error"]["code"] == "malformed_request";
        assert!(refused, "{wrong}: {answer:?}");
    }
    until("nothing of them is left", async || worker.status().await["load"]["kv_blocks_used"] == 0).await;
}
