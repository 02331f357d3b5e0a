//! What routers ask an engine about itself, in the words of the engine whose contract is kept.

use super::answer::{put, quoted};
use super::args::{Contract, MockRole};
use super::ask::Ask;
use super::call::Refusal;
use super::engine::Engine;
use super::leg::Leg;
use serde_json::json;
use std::fmt::Write as _;

/// Prompt and completion that fit, as the engines' pages say.
const MODEL_LENGTH_MAX: u64 = 1 << 20;

/// Blocks of which the KV cache seems to consist.
const KV_BLOCKS: u64 = 100_000;

/// Dimensions of an embedding: enough to be told from a list of one.
const EMBEDDING_DIMENSIONS: u32 = 8;

/// An answer to a question.
#[derive(Debug)]
pub(crate) enum Told {
    Json(String),
    Text(String),
    Empty,
}

/// The answer to a GET, where the path is one that engines have.
pub(crate) fn get(engine: &Engine, path: &str) -> Option<Told> {
    let model = &engine.args.model;
    Some(match path {
        "/health" | "/health_generate" | "/ping" | "/ready" => Told::Empty,
        "/version" => Told::Json(json!({"version": "0.11.0"}).to_string()),
        "/v1/models" => Told::Json(
            json!({"object": "list", "data": [{
                "id": model, "object": "model", "created": super::answer::CREATED, "owned_by": engine.args.contract.as_str(),
                "root": model, "parent": null, "max_model_len": MODEL_LENGTH_MAX,
            }]})
            .to_string(),
        ),
        "/get_server_info" | "/server_info" => Told::Json(server_info(engine)),
        "/get_model_info" | "/model_info" => Told::Json(
            json!({
                "model_path": model, "tokenizer_path": model, "served_model_name": model, "is_generation": true,
                "preferred_sampling_params": null, "weight_version": "default", "model_type": "mock",
                "architectures": ["MockForCausalLM"],
            })
            .to_string(),
        ),
        "/metrics" => Told::Text(metrics(engine)),
        baton_wire::names::paths::STATUS if engine.args.contract == Contract::Baton => {
            Told::Json(super::ours::status(engine))
        }
        _ => return None,
    })
}

fn server_info(engine: &Engine) -> String {
    let mode = match engine.args.role {
        MockRole::Prefill => "prefill",
        MockRole::Decode => "decode",
        MockRole::Both => "null",
    };
    let model = &engine.args.model;
    json!({
        "model_path": model, "served_model_name": model, "tokenizer_path": model, "tp_size": 1, "dp_size": engine.args.dp,
        "host": engine.address.ip().to_string(), "port": engine.address.port(), "max_total_num_tokens": KV_BLOCKS * 16,
        "max_prefill_tokens": 16_384, "max_running_requests": 4096, "context_length": MODEL_LENGTH_MAX,
        "disaggregation_mode": mode, "disaggregation_bootstrap_port": engine.side.port(), "version": "0.5.4",
        "internal_states": [{"last_gen_throughput": 0.0}],
    })
    .to_string()
}

/// The load, under the names by which vLLM and SGLang tell it.
fn metrics(engine: &Engine) -> String {
    let waiting = engine.waiting();
    let used = (engine.holds().blocks() as f64 / KV_BLOCKS as f64).min(1.0);
    let model = quoted(&engine.args.model);
    let size = u64::from(engine.args.dp);
    let all: Vec<u64> = match size {
        1 => {
            let ledger = engine.ledger();
            vec![[Leg::Prefill, Leg::Decode, Leg::Plain].into_iter().map(|leg| ledger.running.of(leg)).sum()]
        }
        _ => engine.ranks().running().to_vec(),
    };
    let of_rank = |(rank, all): (u64, u64)| {
        // Who waits is not told apart by rank: each has its share of them.
        let waiting = waiting / size + u64::from(rank < waiting % size);
        let running = all.saturating_sub(waiting);
        let vllm = format!("{{engine=\"{rank}\",model_name=\"{model}\"}}");
        let dp_rank = if size > 1 { format!("dp_rank=\"{rank}\",") } else { String::new() };
        let sglang = format!("{{{dp_rank}engine_type=\"unified\",model_name=\"{model}\"}}");
        [
            ("vllm:num_requests_running", vllm.clone(), running as f64),
            ("vllm:num_requests_waiting", vllm.clone(), waiting as f64),
            ("vllm:kv_cache_usage_perc", vllm.clone(), used),
            ("vllm:gpu_cache_usage_perc", vllm, used),
            ("sglang:num_running_reqs", sglang.clone(), running as f64),
            ("sglang:num_queue_reqs", sglang.clone(), waiting as f64),
            ("sglang:token_usage", sglang.clone(), used),
            ("sglang:cache_hit_rate", sglang, 0.0),
        ]
    };
    let series = (0..).zip(all).flat_map(of_rank);
    let mut series: Vec<(&str, String, f64)> = series.collect();
    // Its value is the time at which it was so; the engine leaves the series of other times where they are.
    let adapters = |names: &str| {
        format!("{{max_lora=\"4\",running_lora_adapters=\"{}\",waiting_lora_adapters=\"\"}}", quoted(names))
    };
    if !engine.args.adapters.is_empty() {
        series.push(("vllm:lora_requests_info", adapters("one-that-was"), 1.0));
        series.push(("vllm:lora_requests_info", adapters(&engine.args.adapters.join(",")), 2.0));
    }
    // A metric's series stand together, under its type.
    series.sort_by_key(|(name, ..)| *name);
    let mut out = String::new();
    let mut last = "";
    for (name, labels, value) in series {
        if name != last {
            put!(out, "# TYPE {name} gauge\n");
            last = name;
        }
        put!(out, "{name}{labels} {value:?}\n");
    }
    out
}

/// The answer to a POST that generates nothing, where the path is one that engines have.
///
/// # Errors
/// When the body has no input.
pub(crate) fn post(engine: &Engine, path: &str, body: &[u8]) -> Option<Result<Told, Refusal>> {
    let answer = match path {
        "/v1/embeddings" | "/tokenize" | "/v1/tokenize" => None,
        "/score" | "/v1/score" | "/rerank" | "/v1/rerank" | "/v2/rerank" | "/classify" | "/v1/classify" => Some(
            json!({"object": "list", "model": engine.args.model, "data": [{"index": 0, "object": "score", "score": 0.5}],
                "results": [{"index": 0, "relevance_score": 0.5}],
                "usage": {"prompt_tokens": body.len() / 4, "total_tokens": body.len() / 4}}),
        ),
        _ => return None,
    };
    if let Some(answer) = answer {
        return Some(Ok(Told::Json(answer.to_string())));
    }
    Some(Ask::read(body).and_then(|ask| ask.prompt()).map_err(Refusal::from).map(|prompt| {
        let tokens = u32::try_from(prompt.tokens).unwrap_or(u32::MAX);
        Told::Json(if path == "/v1/embeddings" {
            let embedding = |choice: u32| -> Vec<f64> {
                (0..EMBEDDING_DIMENSIONS).map(|place| f64::from(prompt.seed.token(choice, place)) / 32_000.0).collect()
            };
            let count = u32::try_from(prompt.count).unwrap_or(u32::MAX);
            let data: Vec<_> = (0..count)
                .map(|choice| json!({"object": "embedding", "index": choice, "embedding": embedding(choice)}))
                .collect();
            json!({"object": "list", "model": engine.args.model, "data": data,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
            .to_string()
        } else {
            let ids: Vec<u32> = (0..tokens).map(|index| prompt.seed.token(0, index)).collect();
            json!({"count": tokens, "max_model_len": MODEL_LENGTH_MAX, "tokens": ids}).to_string()
        })
    }))
}
