//! A worker's life: loading, failing to, draining, and what a client that hangs up leaves behind.

use crate::server::{Server, model, until};
use baton_worker::worker::RunError;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::json;
use std::path::Path;

/// A request that runs until the model's length is all but reached.
fn endless() -> Request<Full<bytes::Bytes>> {
    stream_of(2000)
}

/// A request that generates so many tokens.
fn stream_of(tokens: usize) -> Request<Full<bytes::Bytes>> {
    let body = json!({"model": "tiny", "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": true, "stream": true});
    Request::post("/v1/completions").body(Full::from(body.to_string())).expect("a request")
}

/// A stream of so many tokens with all that can be said about each: some kilobytes a token.
fn verbose_stream_of(tokens: usize) -> Request<Full<bytes::Bytes>> {
    let body = json!({"model": "tiny", "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": true, "stream": true,
                      "logprobs": 20});
    Request::post("/v1/completions").body(Full::from(body.to_string())).expect("a request")
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_who_and_where_a_worker_is() {
    let server = Server::ready_with("--role decode --revision r7").await;
    let status = server.status().await;
    assert_eq!(
        (&status["role"], &status["revision"], &status["model"]),
        (&json!("decode"), &json!("r7"), &json!("tiny"))
    );
    assert_eq!((&status["state"], &status["progress"]), (&json!("ready"), &json!(null)));
    assert_eq!((&status["max_model_length"], &status["block_tokens"]), (&json!(2048), &json!(32)));
    assert_eq!(status["kv_address"], json!(null), "a decode worker hands out nothing");
    for (field, digits) in [("epoch", 32), ("fingerprint", 64)] {
        assert_eq!(status[field].as_str().map(str::len), Some(digits), "{field}");
    }
    assert!(status["load"]["kv_blocks_total"].as_u64().is_some_and(|blocks| blocks >= 64));
    assert_eq!(server.get("/health").await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_model_loads_health_is_good_and_work_is_refused() {
    // A tokenizer that is a pipe keeps the worker loading for as long as the test wants.
    let dir = tempfile::tempdir().expect("a directory");
    let pipe = dir.path().join("tokenizer.json");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo runs").success());
    let server = Server::start(dir.path(), "--role decode").await;
    until("it tells what it loads", async || server.status().await["progress"]["stage"] == "tokenizer").await;
    assert_eq!(server.get("/health").await.status, StatusCode::OK);
    let ready = server.get("/ready").await;
    assert_eq!((ready.status, ready.text.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "loading\n"));
    let refused = server.post("/v1/completions", &json!({"model": "tiny", "prompt": "a"})).await;
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!("model_loading"))
    );
    let status = server.status().await;
    assert_eq!((&status["state"], &status["fingerprint"]), (&json!("loading"), &json!(null)));

    server.drain.cancel();
    server.end().await.expect("there is nothing to drain");
    // Lets the reading thread, which this test's runtime waits for, come to its end.
    drop(std::fs::OpenOptions::new().write(true).open(&pipe).expect("the pipe is read"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_model_ends_the_worker_with_its_cause() {
    let dir = tempfile::tempdir().expect("a directory");
    let copy = |file: &str| std::fs::copy(model().join(file), dir.path().join(file)).expect("copied");
    for file in
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    {
        copy(file);
    }
    let weights = std::fs::OpenOptions::new().write(true).open(dir.path().join("model.safetensors")).expect("opens");
    weights.set_len(1 << 20).expect("is cut");
    let error = ended_with(dir.path(), "--role decode").await;
    assert!(error.contains("model.safetensors") && error.contains("truncated"), "{error}");

    copy("model.safetensors");
    std::fs::write(dir.path().join("tokenizer.json"), "{").expect("written");
    let error = ended_with(dir.path(), "--role decode").await;
    assert!(error.contains("tokenizer.json"), "{error}");

    let error = ended_with(&model(), "--role decode --max-model-length 4096").await;
    assert!(error.contains("4096") && error.contains("2048"), "{error}");
}

/// The whole chain of causes with which a worker ends.
async fn ended_with(model: &Path, flags: &str) -> String {
    let error: RunError = Server::start(model, flags).await.end().await.expect_err("it can't be served");
    format!("{:#}", anyhow::Error::from(error))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_frees_its_blocks() {
    let server = Server::ready().await;
    let mut response = server.open(endless()).await;
    assert!(response.frame().await.expect("a first event").is_ok());
    assert_ne!(server.status().await["load"]["kv_blocks_used"], 0);
    drop(response);
    server.is_idle().await;
    until("it is counted as cancelled", async || {
        let text = server.get("/metrics").await.text;
        text.contains(r#"baton_worker_requests_total{kind="generate",outcome="cancelled",role="prefill-decode"} 1"#)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_holds_no_block_and_gets_everything_later() {
    let server = Server::ready().await;
    let response = server.open(verbose_stream_of(400)).await;
    // The engine ends what it was asked for and goes on to others; what nobody has read yet is tokens, not KV.
    until("all tokens are generated", async || server.status().await["totals"]["decode_tokens"] == 400).await;
    server.is_idle().await;
    let body = response.into_body().collect().await.expect("the stream is whole").to_bytes();
    let text = String::from_utf8(body.to_vec()).expect("events are UTF-8");
    assert!(text.ends_with("data: [DONE]\n\n"));
    let events = text.lines().filter_map(|line| line.strip_prefix("data: {")).count();
    assert!(events > 100, "{events} events");
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_refuses_new_work_and_finishes_what_runs() {
    let server = Server::ready().await;
    let mut response = server.open(stream_of(600)).await;
    assert!(response.frame().await.expect("a first event").is_ok());
    server.drain.cancel();
    until("it is draining", async || server.status().await["state"] == "draining").await;
    assert_eq!(server.get("/ready").await.status, StatusCode::SERVICE_UNAVAILABLE);
    let refused = server.post("/v1/completions", &json!({"model": "tiny", "prompt": "a"})).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!((refused.json()["error"]["code"].take(), refused.header("retry-after")), (json!("draining"), "1"));

    let rest = response.into_body().collect().await.expect("the stream is whole").to_bytes();
    assert!(rest.ends_with(b"data: [DONE]\n\n"), "what ran has finished");
    server.end().await.expect("a drained worker ends well");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_takes_too_long_cuts_off_with_an_error() {
    let server = Server::ready_with("--role prefill-decode --drain-timeout-seconds 0").await;
    let mut response = server.open(endless()).await;
    assert!(response.frame().await.expect("a first event").is_ok());
    server.drain.cancel();
    let rest = response.into_body().collect().await.expect("the stream ends properly").to_bytes();
    let rest = String::from_utf8_lossy(&rest);
    let last = rest.trim_end().lines().last().and_then(|line| line.strip_prefix("data: ")).expect("an event");
    let error: serde_json::Value = serde_json::from_str(last).expect("JSON");
    assert_eq!(error["error"]["code"], "cut_off", "{last}");
    server.end().await.expect("the worker ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_what_was_served() {
    let server = Server::ready().await;
    let body = json!({"model": "tiny", "prompt": "Once upon a time", "max_tokens": 5, "ignore_eos": true});
    assert_eq!(server.post("/v1/completions", &body).await.status, StatusCode::OK);
    until("everything is counted", async || {
        let text = server.get("/metrics").await.text;
        [
            r#"baton_worker_requests_total{kind="generate",outcome="completed",role="prefill-decode"} 1"#,
            r#"baton_worker_paths_total{path="local-prefill",reason="aggregated",role="prefill-decode"} 1"#,
            r#"baton_worker_time_to_first_token_seconds_count{role="prefill-decode"} 1"#,
            r#"baton_worker_inter_token_latency_seconds_count{role="prefill-decode"} 4"#,
            r#"baton_worker_queue_seconds_count{role="prefill-decode"} 1"#,
            r#"baton_worker_generation_tokens_total{role="prefill-decode"} 5"#,
        ]
        .iter()
        .all(|line| text.contains(line))
    })
    .await;
}
