//! Requests through real processes: prefill in one, decode in another, and what happens when one of them fails.

use anyhow::Result;
use serde_json::json;
use system_tests::cluster::{Cluster, PodSpec, path_of, signal, wait};
use system_tests::{http, repo};

const PROMPT: &str =
    "Once upon a time, a small fox lived near a quiet river. One day the fox wanted to cross the old bridge, but";

fn completion(max_tokens: u32) -> serde_json::Value {
    json!({"model": "tiny", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0.8, "seed": 7})
}

fn one_and_one() -> Result<Cluster> {
    Cluster::start(&[PodSpec::new("prefill"), PodSpec::new("decode")])
}

#[test]
fn a_handed_over_prompt_gives_the_same_text_as_an_aggregated_one() -> Result<()> {
    let apart = one_and_one()?;
    let together = Cluster::start(&[PodSpec::new("prefill-decode").proxy_flag("--disaggregation", "never")])?;
    for stream in [false, true] {
        let mut body = completion(48);
        body["stream"] = json!(stream);
        let apart = http::post(&apart.pods[1].proxy_address(), "/v1/completions", &body)?;
        assert_eq!((apart.status, path_of(&apart).as_str()), (200, "remote-prefill"));
        let together = http::post(&together.pods[0].proxy_address(), "/v1/completions", &body)?;
        assert_eq!(together.status, 200);
        assert!(path_of(&together).starts_with("local-prefill"), "{}", path_of(&together));
        assert_eq!(text(apart, stream)?, text(together, stream)?);
    }
    Ok(())
}

/// The generated text, from JSON or from SSE events.
fn text(answer: http::Answer, stream: bool) -> Result<String> {
    if !stream {
        let body = answer.json()?;
        return Ok(body["choices"][0]["text"].as_str().expect("a completion has text").to_owned());
    }
    let events = answer.text()?;
    assert!(events.trim_end().ends_with("data: [DONE]"), "{events}");
    assert!(!events.contains("baton-ids"), "internal lines reached the client: {events}");
    let mut text = String::new();
    for data in events.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]") {
        let event: serde_json::Value = serde_json::from_str(data)?;
        text += event["choices"][0]["text"].as_str().unwrap_or_default();
    }
    Ok(text)
}

#[test]
fn kv_moves_and_both_sides_let_go_of_it() -> Result<()> {
    let cluster = one_and_one()?;
    let answer = http::post(&cluster.pods[1].proxy_address(), "/v1/completions", &completion(8))?;
    assert_eq!(path_of(&answer), "remote-prefill");
    let usage = answer.json()?["usage"].clone();
    let (prefill, decode) = (cluster.pods[0].status()?, cluster.pods[1].status()?);
    assert_eq!(prefill["totals"]["prefill_tokens"], usage["prompt_tokens"]);
    assert_eq!(decode["totals"]["prefill_tokens"], 0, "the decode worker computed no prompt token");
    assert!(decode["totals"]["kv_bytes_received"].as_u64() > Some(0));
    assert_eq!(decode["totals"]["transfers_completed"], 1);
    wait("no block is held", || {
        let held = |status: serde_json::Value| status["load"]["kv_blocks_used"].as_u64();
        Ok(held(cluster.pods[0].status()?) == Some(0) && held(cluster.pods[1].status()?) == Some(0))
    })
}

#[test]
fn the_logs_of_proxy_and_prefill_worker_name_the_clients_trace() -> Result<()> {
    let cluster = one_and_one()?;
    let trace_id = "4bf92f3577b34da6a3ce929d0e0e4736";
    let given = [("traceparent", format!("00-{trace_id}-00f067aa0ba902b7-01"))];
    let given = given.each_ref().map(|(name, value)| (*name, value.as_str()));
    let address = cluster.pods[1].proxy_address();
    let answer = http::send("POST", &address, "/v1/completions", &given, completion(8).to_string())?;
    assert_eq!(path_of(&answer), "remote-prefill");
    answer.text()?;
    wait("the request's line of either pod", || {
        let logs = cluster.logs();
        let named: Vec<&str> = logs.lines().filter(|line| line.contains(&format!("trace_id=\"{trace_id}\""))).collect();
        let of = |program: &str, what: &str| named.iter().any(|line| line.contains(program) && line.contains(what));
        Ok(of("baton_proxy::account", ": request ") && of("baton_worker::http::legs", ": prefilled "))
    })
}

#[test]
fn a_dead_prefill_worker_means_a_fallback_that_says_so() -> Result<()> {
    let mut cluster = one_and_one()?;
    let expected = text(http::post(&cluster.pods[1].proxy_address(), "/v1/completions", &completion(16))?, false)?;
    cluster.pods[0].worker.kill()?;
    cluster.pods[0].worker.wait()?;
    // At once: the decode side's proxy still believes in the prefill worker. Later: it knows better. Both must serve.
    let at_once = http::post(&cluster.pods[1].proxy_address(), "/v1/completions", &completion(16))?;
    assert_eq!(at_once.status, 200);
    assert_ne!(path_of(&at_once), "remote-prefill");
    assert_eq!(text(at_once, false)?, expected);
    wait("the proxy plans without the dead worker", || {
        let answer = http::post(&cluster.pods[1].proxy_address(), "/v1/completions", &completion(16))?;
        assert_eq!(answer.status, 200);
        Ok(path_of(&answer) == "local-prefill; reason=no-prefill-worker")
    })?;
    cluster.restart_worker(0)?;
    wait("the restarted worker is used", || {
        let answer = http::post(&cluster.pods[1].proxy_address(), "/v1/completions", &completion(16))?;
        Ok(path_of(&answer) == "remote-prefill")
    })
}

#[test]
fn a_prefill_worker_killed_in_the_middle_of_a_prompt_loses_nothing() -> Result<()> {
    // A long prompt in small chunks, so that the kill falls between them.
    let prefill = PodSpec::new("prefill").worker_flag("--prefill-chunk-tokens", "32");
    let mut cluster = Cluster::start(&[prefill, PodSpec::new("decode")])?;
    let mut body = completion(8);
    body["prompt"] = json!(PROMPT.repeat(40));
    let address = cluster.pods[1].proxy_address();
    let request = std::thread::spawn(move || http::post(&address, "/v1/completions", &body));
    wait("the prompt is being computed", || {
        Ok(cluster.pods[0].status()?["load"]["running"].as_u64() > Some(0) || request.is_finished())
    })?;
    cluster.pods[0].worker.kill()?;
    cluster.pods[0].worker.wait()?;
    let answer = request.join().expect("the request's thread ends")?;
    assert_eq!(answer.status, 200);
    assert!(path_of(&answer) == "remote-prefill" || path_of(&answer).starts_with("fallback"), "{}", path_of(&answer));
    assert_eq!(answer.json()?["usage"]["completion_tokens"], 8);
    Ok(())
}

#[test]
fn a_decode_worker_that_dies_mid_stream_ends_in_a_typed_error() -> Result<()> {
    let mut cluster = one_and_one()?;
    let mut body = completion(1500);
    body["stream"] = json!(true);
    body["ignore_eos"] = json!(true);
    let mut answer = http::post(&cluster.pods[1].proxy_address(), "/v1/completions", &body)?;
    assert_eq!(answer.status, 200);
    answer.chunk()?.expect("a first token");
    cluster.pods[1].worker.kill()?;
    cluster.pods[1].worker.wait()?;
    let rest = answer.text()?;
    let last = rest.lines().rev().find_map(|line| line.strip_prefix("data: ")).expect("a last event");
    let error: serde_json::Value = serde_json::from_str(last)?;
    assert_eq!(error["error"]["code"], "decode_worker_lost", "{rest}");
    let refused = http::post(&cluster.pods[1].proxy_address(), "/v1/completions", &completion(4))?;
    assert!([502, 503].contains(&refused.status), "{}: nobody is left to serve it", refused.status);
    assert!(refused.header("retry-after").is_some());
    assert_eq!(refused.json()?["error"]["type"], "server_error");
    cluster.restart_worker(1)?;
    wait("the restarted worker serves", || {
        Ok(http::post(&cluster.pods[1].proxy_address(), "/v1/completions", &completion(4))?.status == 200)
    })
}

#[test]
fn workers_of_different_models_never_hand_over() -> Result<()> {
    // Same shapes, other weights: only the fingerprint tells them apart.
    let other = repo::copy_of_demo_model()?;
    let weights = other.path().join("model.safetensors");
    let mut bytes = std::fs::read(&weights)?;
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes)?;
    let cluster = Cluster::start(&[PodSpec::new("prefill").model(other.path()), PodSpec::new("decode")])?;
    let answer = http::post(&cluster.pods[1].proxy_address(), "/v1/completions", &completion(4))?;
    assert_eq!((answer.status, path_of(&answer).as_str()), (200, "local-prefill; reason=fingerprint-mismatch"));
    Ok(())
}

#[test]
fn a_draining_worker_finishes_and_takes_nothing_new() -> Result<()> {
    let mut cluster = one_and_one()?;
    let mut body = completion(300);
    body["stream"] = json!(true);
    body["ignore_eos"] = json!(true);
    let mut answer = http::post(&cluster.pods[1].proxy_address(), "/v1/completions", &body)?;
    answer.chunk()?.expect("a first token");
    signal(&cluster.pods[1].worker, "TERM")?;
    wait("the worker drains", || Ok(cluster.pods[1].status()?["state"] == "draining"))?;
    assert_eq!(http::post(&cluster.pods[1].engine_address(), "/v1/completions", &completion(4))?.status, 503);
    assert!(answer.text()?.trim_end().ends_with("data: [DONE]"), "the running stream ends as it should");
    let ended = cluster.pods[1].worker.wait()?;
    assert!(ended.success(), "a drained worker exits 0, not {ended}");
    Ok(())
}
