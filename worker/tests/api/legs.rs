//! Prefill here, decode there: two workers in this process, and a proxy's part played by the test.

use crate::server::{Answer, Server, streamed_choices, until};
use baton_wire::leg::Transfer;
use baton_wire::signing::{self, TransferClaims};
use baton_wire::{Path, PathReason, TransferId};
use ed25519_dalek::SigningKey;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};

const TOKEN_IDS: &str = "x-baton-token-ids";

fn key() -> SigningKey {
    SigningKey::from_bytes(&[9; 32])
}

/// What the proxies' public key file holds.
pub(crate) fn public_key() -> String {
    signing::key_text(&key().verifying_key().to_bytes())
}

/// A prefill and a decode worker of one model.
struct Pair {
    prefill: Server,
    decode: Server,
    _key_file: tempfile::NamedTempFile,
}

impl Pair {
    async fn ready() -> Self {
        Self::ready_with("", "").await
    }

    async fn ready_with(prefill: &str, decode: &str) -> Self {
        let key_file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(key_file.path(), public_key()).expect("the key is written");
        let key = format!("--role prefill --proxy-public-key-file {}", key_file.path().display());
        Pair {
            prefill: Server::ready_with(&format!("{key} --prefill-chunk-tokens 32 {prefill}")).await,
            decode: Server::ready_with(&format!("--role decode {decode}")).await,
            _key_file: key_file,
        }
    }

    /// The two legs of a client's request, as the proxy would send them.
    async fn legs(&self, endpoint: &str, body: &Value) -> Legs {
        let rendered = self.decode.post("/internal/render", &json!({"endpoint": endpoint, "body": body})).await;
        assert_eq!(rendered.status, StatusCode::OK, "{}", rendered.text);
        let rendered = rendered.json();
        let (prefill, decode) = (self.prefill.status().await, self.decode.status().await);
        let prompts: Vec<_> =
            rendered["prompts"].as_array().expect("a list").iter().map(|prompt| prompt["token_ids"].clone()).collect();
        let transfers: Vec<Transfer> = (0..prompts.len())
            .map(|_| {
                let id = TransferId(rand());
                let claims = TransferClaims {
                    transfer: id,
                    attempt: 1,
                    consumer: serde_json::from_value(decode["epoch"].clone()).expect("an epoch"),
                    fingerprint: serde_json::from_value(prefill["fingerprint"].clone()).expect("a fingerprint"),
                    byte_budget: 1 << 30,
                    expires_unix_ms: u64::MAX,
                };
                let source = prefill["kv_address"].as_str().expect("it hands out KV").to_owned();
                Transfer { id, attempt: 1, source, token: signing::sign(&key(), &claims) }
            })
            .collect();
        Legs {
            leg: json!({
                "request_id": "r-1", "endpoint": endpoint, "body": body, "prompts": prompts,
                "seed": rendered["seed"].as_u64().unwrap_or(5), "transfers": transfers, "planned": Path::RemotePrefill,
            }),
        }
    }
}

struct Legs {
    leg: Value,
}

impl Legs {
    /// Both at once; the prefill leg's answer, then the decode leg's.
    async fn send(&self, pair: &Pair) -> (Answer, Answer) {
        tokio::join!(pair.prefill.post("/internal/prefill", &self.leg), self.decode(pair))
    }

    async fn decode(&self, pair: &Pair) -> Answer {
        pair.decode.send(self.decode_request()).await
    }

    fn decode_request(&self) -> Request<Full<bytes::Bytes>> {
        let request = Request::post("/internal/decode").header(TOKEN_IDS, "1");
        request.body(Full::from(self.leg.to_string())).expect("a request")
    }
}

fn rand() -> [u8; 16] {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("random numbers");
    bytes
}

fn prompt(words: usize) -> String {
    (0..words).map(|word| format!("number {word} and ")).collect()
}

fn body(rest: Value) -> Value {
    let mut body = json!({"model": "tiny", "prompt": prompt(40), "max_tokens": 16, "seed": 11, "ignore_eos": true});
    body.as_object_mut().expect("an object").extend(rest.as_object().expect("an object").clone());
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_there_and_decode_here_is_the_aggregated_answer() {
    let pair = Pair::ready().await;
    for rest in [
        json!({}),
        json!({"n": 3, "logprobs": 2}),
        json!({"prompt": [prompt(3), prompt(60)], "n": 2}),
        json!({"max_tokens": 1}),
        json!({"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5}),
    ] {
        let body = body(rest);
        // Another salt, so that the decode worker has nothing of this prompt in its cache when the legs come.
        let mut salted = body.clone();
        salted["cache_salt"] = json!("aggregated");
        let aggregated = pair.decode.post("/v1/completions", &salted).await.json();
        let legs = pair.legs("completions", &body).await;
        let (prefill, decode) = legs.send(&pair).await;
        assert_eq!(decode.header("x-baton-path"), "remote-prefill", "{}", decode.text);
        assert_eq!(decode.header("x-baton-prefill-worker"), "127.0.0.1");
        assert_eq!(decode.header("x-request-id"), "r-1");
        assert_eq!(decode.json()["choices"], aggregated["choices"], "{body}");
        assert_eq!(decode.json()["usage"]["completion_tokens"], aggregated["usage"]["completion_tokens"]);

        let done = prefill.json();
        assert_eq!(done["prompt_tokens"], aggregated["usage"]["prompt_tokens"], "{}", prefill.text);
        assert!(done["kv_bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    }
    pair.prefill.is_idle().await;
    pair.decode.is_idle().await;
    let (sent, received) = (pair.prefill.status().await, pair.decode.status().await);
    assert_eq!(sent["totals"]["kv_bytes_sent"], received["totals"]["kv_bytes_received"]);
    assert_eq!(received["totals"]["transfers_failed"], 0);
    assert!(received["totals"]["last_exposed_transfer_ms"].as_f64().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_prefill_workers_cache_had_is_what_the_client_is_told() {
    let pair = Pair::ready().await;
    for turn in 0..2 {
        let legs = pair.legs("completions", &body(json!({"cache_salt": "c"}))).await;
        let (prefill, decode) = legs.send(&pair).await;
        let cached = decode.json()["usage"]["prompt_tokens_details"]["cached_tokens"].take();
        assert_eq!(cached, prefill.json()["cached_tokens"]);
        assert_eq!(cached.as_u64().is_some_and(|tokens| tokens > 0), turn == 1, "turn {turn}: {cached}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streams_usage_has_what_the_prefill_worker_found_whatever_the_decode_worker_has() {
    let pair = Pair::ready().await;
    let body = body(json!({"prompt": [prompt(40), "of foxes and hens ".repeat(20)], "n": 2, "cache_salt": "u"}));
    // The decode worker has it all; that is not what a remote prefill saves.
    assert_eq!(pair.decode.post("/v1/completions", &body).await.status, StatusCode::OK);
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    for turn in 0..2 {
        let (prefill, decode) = pair.legs("completions", &streamed).await.send(&pair).await;
        assert_eq!(decode.header("x-baton-path"), "remote-prefill", "{}", decode.text);
        let usage = decode.events().pop().expect("events")["usage"].take();
        let cached = usage["prompt_tokens_details"]["cached_tokens"].clone();
        assert_eq!(cached, prefill.json()["cached_tokens"], "turn {turn}: {usage}");
        assert_eq!(cached.as_u64().is_some_and(|tokens| tokens > 0), turn == 1, "turn {turn}: {usage}");
        // The marks say the same, prompt by prompt.
        let marked = |choice: usize| {
            let mark = format!(": baton-ids {choice};cached=");
            let mut marks = decode.text.lines().filter_map(|line| line.strip_prefix(&mark)?.split(' ').next());
            marks.next().and_then(|tokens| tokens.parse::<u64>().ok()).expect("each choice has one")
        };
        assert_eq!(cached, marked(0) + marked(2));
        assert_eq!((marked(0), marked(2)), (marked(1), marked(3)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_share_no_prefix() {
    let pair = Pair::ready().await;
    let body = body(json!({"cache_salt": "same"}));
    let render = async |tenant: Value| {
        let request = json!({"endpoint": "completions", "body": body, "tenant_salt": tenant});
        pair.decode.post("/internal/render", &request).await.json()["prompts"][0].take()
    };
    let mut legs = pair.legs("completions", &body).await;
    legs.leg["tenant_salt"] = json!(1);
    let (prefill, decode) = legs.send(&pair).await;
    assert_eq!((prefill.status, decode.status), (StatusCode::OK, StatusCode::OK), "{} {}", prefill.text, decode.text);
    pair.decode.is_idle().await;
    until("the tenant finds it", async || render(json!(1)).await["cached_tokens"] != 0).await;
    let mut seen = Vec::new();
    for tenant in [json!(null), json!(1), json!(2)] {
        let prompt = render(tenant).await;
        seen.push((prompt["block_hashes"][0].clone(), prompt["cached_tokens"].clone()));
    }
    let of_others = [&seen[0], &seen[2]];
    assert!(of_others.iter().all(|(hash, cached)| *hash != seen[1].0 && *cached == 0), "{seen:?}");
    // The prefill worker keeps them apart as well.
    for (tenant, is_known) in [(1, true), (2, false)] {
        let mut legs = pair.legs("completions", &body).await;
        legs.leg["tenant_salt"] = json!(tenant);
        let (prefill, _) = legs.send(&pair).await;
        assert_eq!(prefill.json()["cached_tokens"] != 0, is_known, "tenant {tenant}: {}", prefill.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rendering_tells_what_the_decode_workers_cache_has() {
    let pair = Pair::ready().await;
    let body = body(json!({"prompt": [prompt(40), prompt(2)], "cache_salt": "d"}));
    let render = json!({"endpoint": "completions", "body": body});
    let cached = async |worker: &Server| {
        let rendered = worker.post("/internal/render", &render).await.json();
        let prompts = rendered["prompts"].as_array().expect("a list").clone();
        let tokens = |prompt: &Value| {
            let full = prompt["token_ids"].as_array().expect("a list").len() / 32 * 32;
            (prompt["cached_tokens"].as_u64().expect("a number") as usize, full)
        };
        prompts.iter().map(tokens).collect::<Vec<_>>()
    };
    assert!(cached(&pair.decode).await.iter().all(|(cached, _)| *cached == 0));
    pair.legs("completions", &body).await.send(&pair).await;
    pair.decode.is_idle().await;
    // An idle engine answers within its time, though not on every try of a busy machine.
    until("all full blocks are known", async || cached(&pair.decode).await.iter().all(|(cached, full)| cached == full))
        .await;
    assert!(cached(&pair.decode).await[0].1 > 0);
    assert!(cached(&pair.prefill).await.iter().all(|(cached, _)| *cached == 0), "it generates nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_names_its_tokens_for_the_proxy() {
    let pair = Pair::ready().await;
    let body = body(json!({"stream": true, "n": 2}));
    let (_, decode) = pair.legs("completions", &body).await.send(&pair).await;
    let events = decode.events();
    let texts = streamed_choices(&events, 2);
    for (choice, (text, _)) in texts.iter().enumerate() {
        let mark = format!(": baton-ids {choice}");
        let marks = decode.text.lines().filter_map(|line| line.strip_prefix(&mark)?.split_once(' '));
        let ids: Vec<_> = marks.flat_map(|(_, ids)| ids.split(',')).filter(|id| !id.is_empty()).collect();
        assert_eq!(ids.len(), 16, "every token is named once");
        let echo = json!({"model": "tiny", "max_tokens": 1, "echo": true,
                          "prompt": ids.iter().map(|id| id.parse::<u32>().expect("an id")).collect::<Vec<_>>()});
        let echoed = pair.decode.post("/v1/completions", &echo).await.json()["choices"][0]["text"].take();
        assert!(echoed.as_str().is_some_and(|echoed| echoed.starts_with(text.trim_start())), "{echoed} / {text}");
    }
    let asked_nobody = pair.decode.post("/v1/completions", &body).await;
    assert!(!asked_nobody.text.contains("baton-ids"), "only legs name tokens");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_fingerprint_is_refused_and_the_prompt_computed_here() {
    let pair = Pair::ready_with("", "--dtype f32").await;
    let body = body(json!({}));
    let expected = pair.decode.post("/v1/completions", &body).await.json()["choices"].take();
    let legs = pair.legs("completions", &body).await;
    // As a proxy does: once the answer is there, the other leg is dropped.
    let decode = tokio::select! {
        decode = legs.decode(&pair) => decode,
        prefill = pair.prefill.post("/internal/prefill", &legs.leg) => panic!("nobody fetched it: {prefill:?}"),
    };
    assert_eq!(decode.header("x-baton-path"), "fallback; reason=fingerprint-mismatch");
    assert_eq!(decode.header("x-baton-prefill-worker"), "");
    assert_eq!(decode.json()["choices"], expected);
    pair.prefill.is_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_worker_that_is_gone_costs_nothing_but_time() {
    let pair = Pair::ready().await;
    let body = body(json!({}));
    let legs = pair.legs("completions", &body).await;
    let Pair { prefill, decode, _key_file } = pair;
    prefill.drain.cancel();
    prefill.end().await.expect("it had nothing to do");
    let answer = decode.send(legs.decode_request()).await;
    assert_eq!(answer.header("x-baton-path"), "fallback; reason=prefill-unreachable");
    let mut salted = body;
    salted["cache_salt"] = json!("aggregated");
    assert_eq!(answer.json()["choices"], decode.post("/v1/completions", &salted).await.json()["choices"]);
    decode.is_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planned_local_prefill_keeps_its_reason() {
    let pair = Pair::ready().await;
    let mut legs = pair.legs("completions", &body(json!({}))).await;
    legs.leg["transfers"] = json!([]);
    legs.leg["planned"] = json!(Path::LocalPrefill(PathReason::ShortPrompt));
    let answer = legs.decode(&pair).await;
    assert_eq!((answer.status, answer.header("x-baton-path")), (StatusCode::OK, "local-prefill; reason=short-prompt"));

    legs.leg["planned"] = json!(Path::RemotePrefill);
    let answer = legs.decode(&pair).await;
    assert_eq!(
        (answer.status, &answer.json()["error"]["code"]),
        (StatusCode::BAD_REQUEST, &json!("malformed_request"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn legs_that_are_dropped_free_both_sides() {
    let pair = Pair::ready().await;
    // Nobody subscribes: the prefill leg holds its blocks until the proxy hangs up.
    let legs = pair.legs("completions", &body(json!({}))).await;
    let request = Request::post("/internal/prefill").body(Full::from(legs.leg.to_string())).expect("a request");
    let hanging = async { pair.prefill.open(request).await };
    tokio::select! {
        _ = hanging => panic!("there is no answer before the KV is fetched"),
        () = until("blocks are held", async || pair.prefill.status().await["load"]["kv_blocks_used"] != 0) => {}
    }
    pair.prefill.is_idle().await;

    // The decode leg waits for KV of an export that was never opened, until the proxy hangs up. It takes no blocks for it.
    let hanging = async { pair.decode.open(pair.legs("completions", &body(json!({}))).await.decode_request()).await };
    tokio::select! {
        _ = hanging => panic!("there is no answer before the KV is there"),
        () = until("it has subscribed", async || pair.prefill.metric("kv_subscriptions_parked").await == 1) => {}
    }
    assert_eq!(pair.decode.status().await["load"]["kv_blocks_used"], 0);
    until("it is given up", async || pair.prefill.metric("kv_subscriptions_parked").await == 0).await;
    pair.decode.is_idle().await;

    // The decode leg streams when the proxy hangs up.
    let legs = pair.legs("completions", &body(json!({"stream": true, "max_tokens": 1500}))).await;
    let (prefill, mut decode) =
        tokio::join!(pair.prefill.post("/internal/prefill", &legs.leg), pair.decode.open(legs.decode_request()));
    assert_eq!(prefill.status, StatusCode::OK, "{}", prefill.text);
    assert!(decode.frame().await.expect("a first event").is_ok());
    drop(decode);
    pair.decode.is_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_that_was_exported_before_the_drain_is_fetched_during_it() {
    let pair = Pair::ready().await;
    let legs = pair.legs("completions", &body(json!({}))).await;
    let (prefill, decode) = tokio::join!(pair.prefill.post("/internal/prefill", &legs.leg), async {
        let tokens = legs.leg["prompts"][0].as_array().map(Vec::len);
        until("the prompt is computed", async || {
            pair.prefill.status().await["totals"]["prefill_tokens"].as_u64().map(|tokens| tokens as usize) == tokens
        })
        .await;
        pair.prefill.drain.cancel();
        until("it is draining", async || pair.prefill.status().await["state"] == "draining").await;
        let refused = pair.prefill.post("/internal/prefill", &legs.leg).await;
        assert_eq!((refused.status, refused.header("retry-after")), (StatusCode::SERVICE_UNAVAILABLE, "1"));
        assert_ne!(pair.prefill.status().await["load"]["kv_blocks_used"], 0, "the export is kept");
        legs.decode(&pair).await
    });
    assert_eq!(decode.header("x-baton-path"), "remote-prefill", "{}", decode.text);
    assert_eq!(prefill.status, StatusCode::OK, "{}", prefill.text);
    pair.prefill.end().await.expect("a drained worker ends well");
}
