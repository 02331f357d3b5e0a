//! The routing proxy before engines that are not ours, played by `baton mock-engine`, which checks every leg against its engine's
//! contract: what clients get when something of it fails or leaves, and that no KV is ever left behind.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use system_tests::cluster::wait;
use system_tests::engines::{Door, Mock};
use system_tests::http::{self, Answer};
use system_tests::kube::say;
use system_tests::mutate::Rng;

const PROMPT: &str = "a prompt of some length, so that there is KV to hand over, and more than sixty-four tokens of it: \
    once upon a time there was a small fox who lived at the edge of a wood, and every morning it went to the river to drink, \
    and every evening it came home by another way, because it wanted to know all of them before the winter came and closed them.";

fn body() -> Value {
    json!({"model": "mock", "prompt": PROMPT, "max_tokens": 8})
}

fn streamed() -> Value {
    json!({"model": "mock", "prompt": PROMPT, "max_tokens": 8, "stream": true, "stream_options": {"include_usage": true}})
}

/// What an engine alone answers, for comparison: every mock answers the same.
fn alone(body: &Value) -> Result<Value> {
    let mock = Mock::start("vllm", "both", &[])?;
    http::post(&mock.address, "/v1/completions", body)?.json()
}

fn text(answer: &Value) -> &Value {
    &answer["choices"][0]["text"]
}

fn path(answer: &Answer) -> String {
    answer.header("x-baton-path").unwrap_or_default().to_owned()
}

/// No rule of the contract was broken at any of these.
fn unbroken(mocks: &[&Mock]) -> Result<()> {
    for mock in mocks {
        let broken = mock.broken()?;
        ensure!(broken == json!({}), "{broken:#}");
    }
    Ok(())
}

/// All that these hold is gone, and none of it by the end of its lease.
fn nothing_stranded(mocks: &[&Mock]) -> Result<()> {
    for mock in mocks {
        mock.counts("/holds/now", 0)?;
        let holds = mock.ledger()?["holds"].clone();
        ensure!(holds["expired"] == 0, "stranded: {holds}");
    }
    Ok(())
}

#[test]
fn vllm_is_prefilled_and_decoded_by_its_contract() -> Result<()> {
    let (prefill, decode) = (Mock::start("vllm", "prefill", &[])?, Mock::start("vllm", "decode", &[])?);
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    let expect = alone(&body())?;
    let answer = door.complete(&body())?;
    assert_eq!((answer.status, path(&answer).as_str()), (200, "remote-prefill"), "{}", door.log());
    assert_eq!(answer.header("x-baton-prefill-worker"), Some(prefill.address.as_str()));
    let answer = answer.json()?;
    assert_eq!(text(&answer), text(&expect));
    let events = door.complete(&streamed())?.text()?;
    assert!(events.ends_with("data: [DONE]\n\n"), "{events}");
    unbroken(&[&prefill, &decode])?;
    nothing_stranded(&[&prefill])?;
    prefill.counts("/holds/consumed", 2)?;
    assert_eq!(prefill.count("/reserialised_handles")? + decode.count("/reserialised_handles")?, 0);
    assert_eq!(door.holds()?["held"], 0);
    Ok(())
}

#[test]
fn sglang_is_prefilled_and_decoded_by_its_contract() -> Result<()> {
    let (prefill, decode) = (Mock::start("sglang", "prefill", &[])?, Mock::start("sglang", "decode", &[])?);
    let door = Door::start("sglang", &[&prefill], &[&decode], &[])?;
    let expect = alone(&body())?;
    for many in [json!(PROMPT), json!([PROMPT, "another prompt"])] {
        let mut body = body();
        body["prompt"] = many;
        let answer = door.complete(&body)?;
        assert_eq!((answer.status, path(&answer).as_str()), (200, "remote-prefill"), "{}", door.log());
        let answer = answer.json()?;
        match body["prompt"].as_array() {
            None => assert_eq!(text(&answer), text(&expect)),
            Some(prompts) => assert_eq!(answer["choices"].as_array().map(Vec::len), Some(prompts.len())),
        }
    }
    let mut body = body();
    body["n"] = json!(3);
    let answer = door.complete(&body)?;
    assert_eq!((answer.status, answer.json()?["choices"].as_array().map(Vec::len)), (200, Some(3)));
    let events = door.complete(&streamed())?.text()?;
    assert!(events.ends_with("data: [DONE]\n\n"), "{events}");
    unbroken(&[&prefill, &decode])?;
    prefill.counts("/rooms/now", 0)?;
    assert_eq!(prefill.count("/rooms/duplicate")?, 0);
    Ok(())
}

#[test]
fn every_interface_is_capped_to_one_token_on_the_prefill_leg() -> Result<()> {
    let (prefill, decode) = (Mock::start("vllm", "prefill", &[])?, Mock::start("vllm", "decode", &[])?);
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    let messages = json!([{"role": "user", "content": PROMPT}]);
    let ids: Vec<u32> = (0..300).collect();
    for (at, body) in [
        (
            "/v1/chat/completions",
            json!({"model": "mock", "messages": messages, "max_completion_tokens": 5, "min_tokens": 3}),
        ),
        ("/v1/chat/completions", json!({"model": "mock", "messages": messages, "max_tokens": 5})),
        ("/v1/completions", json!({"model": "mock", "prompt": PROMPT, "max_tokens": 5, "min_tokens": 2})),
        ("/v1/responses", json!({"model": "mock", "input": PROMPT, "max_output_tokens": 5})),
        ("/v1/messages", json!({"model": "mock", "messages": messages, "max_tokens": 5})),
        ("/inference/v1/generate", json!({"token_ids": ids, "sampling_params": {"max_tokens": 5, "min_tokens": 2}})),
    ] {
        let answer = http::post(&door.address, at, &body)?;
        let (status, path) = (answer.status, path(&answer));
        let answer = answer.text()?;
        assert_eq!((status, path.as_str()), (200, "remote-prefill"), "{at}: {answer}");
    }
    unbroken(&[&prefill, &decode])?;
    nothing_stranded(&[&prefill])?;
    assert_eq!(prefill.count("/completion_tokens")?, 6, "one token for each request");
    Ok(())
}

#[test]
fn what_cannot_be_handed_over_is_computed_by_the_decode_engine_and_says_why() -> Result<()> {
    let (prefill, decode) = (Mock::start("vllm", "prefill", &[])?, Mock::start("vllm", "decode", &[])?);
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    for (key, value, reason) in [
        ("n", json!(2), "several-choices"),
        ("prompt", json!(["one", "two"]), "several-prompts"),
        ("prompt_logprobs", json!(1), "prompt-logprobs"),
    ] {
        let mut body = body();
        body[key] = value;
        let answer = door.complete(&body)?;
        assert_eq!((answer.status, path(&answer)), (200, format!("local-prefill; reason={reason}")));
    }
    assert_eq!(prefill.count("/requests/prefill")?, 0);
    Ok(())
}

#[test]
fn an_adapter_is_asked_for_where_it_is_in_use() -> Result<()> {
    let without = Mock::start("vllm", "prefill", &[])?;
    let with = Mock::start("vllm", "prefill", &["--adapter", "de", "--adapter", "sql"])?;
    let decode = Mock::start("vllm", "decode", &[])?;
    let door = Door::start("vllm-nixl", &[&without, &with], &[&decode], &[])?;
    let prefills = || Ok::<_, anyhow::Error>([without.count("/requests/prefill")?, with.count("/requests/prefill")?]);
    for _ in 0..10 {
        assert_eq!(door.complete(&json!({"model": "sql", "prompt": "select", "max_tokens": 2}))?.status, 200);
    }
    assert_eq!(prefills()?, [0, 10]);
    // The model itself, and an adapter that nobody has in use, are for all.
    for model in ["mock", "one-that-was"] {
        let before = prefills()?;
        for _ in 0..10 {
            assert_eq!(door.complete(&json!({"model": model, "prompt": "select", "max_tokens": 2}))?.status, 200);
        }
        let after = prefills()?;
        assert!((0..2).all(|index| after[index] > before[index]), "{model}: {before:?} {after:?}");
    }
    unbroken(&[&without, &with, &decode])
}

#[test]
fn a_decode_engine_that_fails_first_costs_no_second_prefill() -> Result<()> {
    let prefill = Mock::start("vllm", "prefill", &[])?;
    let bad = Mock::start("vllm", "decode", &["--fail", "status=503,leg=decode"])?;
    let good = Mock::start("vllm", "decode", &[])?;
    let door = Door::start("vllm-nixl", &[&prefill], &[&bad, &good], &["--decode-selection", "round-robin"])?;
    let expect = alone(&body())?;
    const REQUESTS: u64 = 40;
    for round in 0..REQUESTS {
        let answer = door.complete(&body())?;
        assert_eq!((answer.status, path(&answer).as_str()), (200, "remote-prefill"), "{round}: {}", door.log());
        assert_eq!(text(&answer.json()?), text(&expect));
    }
    assert!(bad.count("/failed/decode")? > 0, "the bad one was never tried");
    assert_eq!(prefill.count("/requests/prefill")?, REQUESTS, "one prefill for each request");
    nothing_stranded(&[&prefill])?;
    unbroken(&[&prefill, &good])
}

#[test]
fn one_of_two_decode_engines_that_is_dead_costs_no_second_prefill() -> Result<()> {
    let prefill = Mock::start("vllm", "prefill", &[])?;
    let (mut dead, good) = (Mock::start("vllm", "decode", &[])?, Mock::start("vllm", "decode", &[])?);
    let door = Door::start("vllm-nixl", &[&prefill], &[&dead, &good], &["--decode-selection", "random"])?;
    dead.kill();
    const REQUESTS: u64 = 30;
    for round in 0..REQUESTS {
        let answer = door.complete(&body())?;
        assert_eq!(answer.status, 200, "{round}: {}", door.log());
    }
    assert_eq!(prefill.count("/requests/prefill")?, REQUESTS);
    nothing_stranded(&[&prefill])
}

#[test]
fn a_prefill_engine_that_fails_is_replaced_by_another() -> Result<()> {
    for connector in ["vllm", "sglang"] {
        let bad = Mock::start(connector, "prefill", &["--fail", "status=500,leg=prefill"])?;
        let good = Mock::start(connector, "prefill", &[])?;
        let decode = Mock::start(connector, "decode", &[])?;
        let name = if connector == "vllm" { "vllm-nixl" } else { connector };
        let door = Door::start(name, &[&bad, &good], &[&decode], &["--prefill-selection", "round-robin"])?;
        for round in 0..20 {
            let answer = door.complete(&body())?;
            assert_eq!(
                (answer.status, path(&answer).as_str()),
                (200, "remote-prefill"),
                "{connector} {round}: {}",
                door.log()
            );
        }
        assert!(bad.count("/failed/prefill")? > 0);
    }
    Ok(())
}

#[test]
fn with_a_dead_prefill_pool_the_declared_fallback_decides() -> Result<()> {
    for connector in ["vllm", "sglang"] {
        let name = if connector == "vllm" { "vllm-nixl" } else { connector };
        let check = |flags: &[&str], status: u16, expect: &str| -> Result<()> {
            let mut prefill = Mock::start(connector, "prefill", &[])?;
            let decode = Mock::start(connector, "decode", &[])?;
            // SGLang's decode engines compute no prompts, so whole requests go to an engine of both phases.
            let both = Mock::start(connector, "both", &[])?;
            let url = format!("http://{}", both.address);
            let aggregated = if connector == "sglang" { vec!["--aggregated", &url] } else { Vec::new() };
            let door = Door::start(name, &[&prefill], &[&decode], &[flags, &aggregated].concat())?;
            prefill.kill();
            for round in 0..20 {
                let answer = door.complete(&body())?;
                let path = path(&answer);
                assert_eq!(answer.status, status, "{connector} {flags:?} {round}: {}", door.log());
                assert_eq!(answer.header("retry-after").is_some(), status == 503);
                assert!(path.starts_with(expect), "{path}");
                if status == 200 {
                    assert_eq!(text(&answer.json()?), text(&alone(&body())?));
                }
            }
            unbroken(&[&decode])
        };
        check(&["--fallback", "always"], 200, "fallback; reason=")?;
        check(&["--fallback", "short", "--fallback-prompt-tokens", "100000"], 200, "fallback; reason=")?;
        check(&["--fallback", "short", "--fallback-prompt-tokens", "1"], 503, "")?;
        check(&["--fallback", "never"], 503, "")?;
        check(&["--enforce-disaggregation"], 503, "")?;
    }
    Ok(())
}

#[test]
fn cached_tokens_are_what_the_prefill_engine_said_in_every_answer() -> Result<()> {
    let prefill = Mock::start("vllm", "prefill", &["--cached-tokens", "64"])?;
    let decode = Mock::start("vllm", "decode", &["--awkward-text"])?;
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    for _ in 0..25 {
        let usage = door.complete(&body())?.json()?["usage"].clone();
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 64, "{usage}");
        let events = door.complete(&streamed())?.text()?;
        let usages: Vec<Value> = events
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok())
            .filter(|event| event["usage"].is_object())
            .collect();
        ensure!(!usages.is_empty(), "no usage in {events}");
        for event in usages {
            assert_eq!(event["usage"]["prompt_tokens_details"]["cached_tokens"], 64, "{event}");
        }
    }
    Ok(())
}

#[test]
fn no_byte_of_body_or_header_is_changed_that_should_not_be() -> Result<()> {
    let (prefill, decode) = (Mock::start("vllm", "prefill", &[])?, Mock::start("vllm", "decode", &[])?);
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &["--disaggregation", "never"])?;
    let odd = r#" { "prompt" : "hello" ,"max_tokens":4, "zeta":[1.50,2e3],"alpha" : {"nested":null}, "un\u006bnown":"\u00e9é" } "#;
    let given = [
        ("content-type", "application/json"),
        ("authorization", "Bearer of-the-client"),
        ("x-request-id", "client-id-1"),
        ("x-custom", "kept as it is"),
        ("x-prefiller-host-port", "169.254.169.254:80"),
        ("x-baton-leg", "forged"),
    ];
    // With a forged leg header it is none of ours, and is refused.
    assert_eq!(http::send("POST", &door.address, "/v1/completions", &given, odd)?.status, 401);
    let answer = http::send("POST", &door.address, "/v1/completions", &given[..5], odd)?;
    assert_eq!((answer.status, answer.header("x-request-id")), (200, Some("client-id-1")));
    let last = decode.ledger()?["last"].as_array().and_then(|all| all.last().cloned()).context("a request")?;
    let text = last.to_string();
    assert_eq!(last["body"]["text"].as_str().or(last["body"].as_str()), Some(odd), "{last:#}");
    for kept in ["Bearer of-the-client", "client-id-1", "kept as it is"] {
        assert!(text.contains(kept), "{kept}: {last:#}");
    }
    assert!(!text.contains("169.254"), "{last:#}");
    unbroken(&[&decode])
}

#[test]
fn a_clients_own_handover_fields_never_reach_an_engine() -> Result<()> {
    let (prefill, decode) = (Mock::start("vllm", "prefill", &[])?, Mock::start("vllm", "decode", &[])?);
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    for policy in ["remote", "local"] {
        let mut body = body();
        body["kv_transfer_params"] = json!({"do_remote_prefill": true, "remote_host": "169.254.169.254", "remote_port": 80,
            "remote_engine_id": "x", "remote_block_ids": [[1]], "remote_request_id": "y"});
        if policy == "local" {
            body["n"] = json!(2);
        }
        assert_eq!(door.complete(&body)?.status, 200);
    }
    for mock in [&prefill, &decode] {
        assert!(!mock.ledger()?.to_string().contains("169.254"));
    }
    unbroken(&[&prefill, &decode])
}

const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// What a client says of its trace.
const TRACE: [(&str, &str); 2] =
    [("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ("tracestate", "vendor=a:1,other=2")];

/// The spans from which an engine was called on a path, each checked to be of [`TRACE`].
fn spans(mock: &Mock, target: &str) -> Result<Vec<String>> {
    traces(mock, target)?
        .into_iter()
        .map(|said| {
            ensure!(said.len() == 2 && said[1] == TRACE[1].1, "{said:?}");
            let span = said[0].strip_prefix(&format!("00-{TRACE_ID}-")).and_then(|rest| rest.strip_suffix("-01"));
            Ok(span.with_context(|| format!("{said:?}"))?.to_owned())
        })
        .collect()
}

/// What the calls of an engine on a path said of their trace, each header in the order of its name.
fn traces(mock: &Mock, target: &str) -> Result<Vec<Vec<String>>> {
    let ledger = mock.ledger()?;
    let calls = ledger["last"].as_array().context("the last requests")?.iter().filter(|call| call["target"] == target);
    let said = calls.map(|call| {
        let mut said: Vec<(&str, &str)> = call["headers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|header| Some((header[0].as_str()?, header[1].as_str()?)))
            .filter(|(name, _)| name.starts_with("trace"))
            .collect();
        said.sort_unstable();
        said.into_iter().map(|(_, value)| value.to_owned()).collect()
    });
    Ok(said.collect())
}

#[test]
fn each_leg_is_of_the_clients_trace_and_from_a_span_of_its_own() -> Result<()> {
    for (contract, connector) in [("vllm", "vllm-nixl"), ("sglang", "sglang")] {
        let (prefill, decode) = (Mock::start(contract, "prefill", &[])?, Mock::start(contract, "decode", &[])?);
        let door = Door::start(connector, &[&prefill], &[&decode], &[])?;
        let answer = http::send("POST", &door.address, "/v1/completions", &TRACE, body().to_string())?;
        assert_eq!((answer.status, path(&answer).as_str()), (200, "remote-prefill"), "{}", door.log());
        let mut all = [spans(&prefill, "/v1/completions")?, spans(&decode, "/v1/completions")?].concat();
        assert_eq!(all.len(), 2, "{contract}: {all:?}");
        let answer = http::send("POST", &door.address, "/v1/embeddings", &TRACE, r#"{"model":"mock","input":"a"}"#)?;
        assert_eq!(answer.status, 200, "{contract}: {}", door.log());
        all.extend(spans(&decode, "/v1/embeddings")?);
        all.push("00f067aa0ba902b7".to_owned());
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 4, "{contract}: {all:?}");
        let lines = || door.log().lines().filter(|line| line.contains(&format!("trace_id=\"{TRACE_ID}\""))).count();
        wait("the log has both requests with their trace", || Ok(lines() == 2)).with_context(|| door.log())?;
        unbroken(&[&prefill, &decode])?;
    }
    Ok(())
}

#[test]
fn a_wrong_trace_reaches_no_engine_and_none_is_begun() -> Result<()> {
    let (prefill, decode) = (Mock::start("vllm", "prefill", &[])?, Mock::start("vllm", "decode", &[])?);
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    let cases: [&[(&str, &str)]; 4] = [
        &[],
        &[("traceparent", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"), TRACE[1]],
        &[TRACE[0], TRACE[0], TRACE[1]],
        &[TRACE[1]],
    ];
    for given in cases {
        assert_eq!(http::send("POST", &door.address, "/v1/completions", given, body().to_string())?.status, 200);
    }
    for mock in [&prefill, &decode] {
        assert_eq!(traces(mock, "/v1/completions")?, vec![Vec::<String>::new(); cases.len()]);
    }
    Ok(())
}

#[test]
fn a_request_that_gives_kv_back_is_of_the_same_trace() -> Result<()> {
    let prefill = Mock::start("vllm", "prefill", &["--lease", "60"])?;
    let decode = Mock::start("vllm", "decode", &["--fail", "status=503,leg=decode,count=2"])?;
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &["--fallback", "never"])?;
    assert_eq!(http::send("POST", &door.address, "/v1/completions", &TRACE, body().to_string())?.status, 503);
    prefill.counts("/holds/now", 0)?;
    let mut all = spans(&decode, "/v1/completions")?;
    let calls = all.len();
    assert!(calls >= 2, "the leg that was refused and what gave its KV back: {all:?}");
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), calls, "each from a span of its own");
    Ok(())
}

#[test]
fn a_stream_that_breaks_ends_with_a_typed_error() -> Result<()> {
    for contract in ["vllm", "sglang"] {
        let name = if contract == "vllm" { "vllm-nixl" } else { contract };
        let prefill = Mock::start(contract, "prefill", &[])?;
        let decode = Mock::start(contract, "decode", &["--fail", "break-stream-after=3,leg=decode"])?;
        let door = Door::start(name, &[&prefill], &[&decode], &[])?;
        let events = door.complete(&streamed())?.text()?;
        let last = events.trim_end().lines().last().and_then(|line| line.strip_prefix("data: ")).context("an event")?;
        let error: Value = serde_json::from_str(last).with_context(|| events.clone())?;
        assert_eq!(error["error"]["code"], "decode_worker_lost", "{error}");
    }
    Ok(())
}

#[test]
fn errors_of_an_engine_pass_as_they_are() -> Result<()> {
    let prefill = Mock::start("vllm", "prefill", &["--fail", "status=404,leg=prefill,count=1"])?;
    let decode = Mock::start("vllm", "decode", &["--fail", "status=400,leg=decode,count=1"])?;
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    let first = door.complete(&body())?;
    assert_eq!(first.status, 404);
    assert!(first.text()?.contains("error"));
    assert_eq!(door.complete(&body())?.status, 400);
    assert_eq!(door.complete(&body())?.status, 200);
    nothing_stranded(&[&prefill])
}

#[test]
fn an_idle_connection_that_the_engine_closed_costs_no_request() -> Result<()> {
    let (prefill, mut decode) = (Mock::start("vllm", "prefill", &[])?, Mock::start("vllm", "decode", &[])?);
    let port = decode.address.clone();
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    assert_eq!(door.complete(&body())?.status, 200);
    decode.kill();
    let _again = Mock::start("vllm", "decode", &["--listen", &port])?;
    wait("the engine is known again", || Ok(door.complete(&body())?.status == 200))?;
    for _ in 0..10 {
        assert_eq!(door.complete(&body())?.status, 200);
    }
    Ok(())
}

/// One client that hangs up after so long, or reads to the end.
fn hang_up(address: &str, body: &str, after: Duration) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: m\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.set_read_timeout(Some(Duration::from_millis(1)))?;
    let until = Instant::now() + after;
    let mut piece = [0; 4096];
    while Instant::now() < until {
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    Ok(())
}

fn hang_ups(contract: &str, count: usize) -> Result<()> {
    const SEED: u64 = 20_261_121;
    let name = if contract == "vllm" { "vllm-nixl" } else { contract };
    let prefill = Mock::start(contract, "prefill", &["--prefill-delay", "6", "--lease", "60"])?;
    let slow = ["--token-delay", "2", "--fail", "slow-head=4,leg=decode,probability=0.5,seed=3"];
    let decode = [Mock::start(contract, "decode", &slow)?, Mock::start(contract, "decode", &slow)?];
    let door = Door::start(name, &[&prefill], &[&decode[0], &decode[1]], &[])?;
    let next = AtomicUsize::new(0);
    let bodies = [body().to_string(), streamed().to_string()];
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16_u64)
            .map(|thread| {
                let (door, next, bodies) = (&door, &next, &bodies);
                scope.spawn(move || -> Result<()> {
                    let mut rng = Rng::new(SEED + thread);
                    while next.fetch_add(1, Ordering::Relaxed) < count {
                        let after = Duration::from_micros(rng.below(40_000) as u64);
                        hang_up(&door.address, &bodies[rng.below(2)], after)?;
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no client panics"))
    })?;
    wait("the door holds nothing", || Ok(door.holds()?["held"] == 0))?;
    let holds = door.holds()?;
    say(&format!(
        "{contract}: {count} hang-ups; the door's ledger: {holds}; held at prefill: {}",
        prefill.ledger()?["holds"]
    ));
    assert_eq!(holds["leaked"], 0);
    assert_eq!(holds["expired"], 0);
    match contract {
        "vllm" => nothing_stranded(&[&prefill])?,
        _ => prefill.counts("/rooms/now", 0)?,
    }
    unbroken(&[&prefill, &decode[0], &decode[1]])?;
    wait("no leg runs any more", || {
        let running = |mock: &Mock| Ok::<_, anyhow::Error>(mock.ledger()?["running"].clone());
        let none = |value: &Value| value.as_object().is_some_and(|all| all.values().all(|one| *one == 0));
        Ok(none(&running(&prefill)?) && none(&running(&decode[0])?) && none(&running(&decode[1])?))
    })?;
    // And it serves on.
    assert_eq!(door.complete(&body())?.status, 200);
    Ok(())
}

#[test]
fn a_thousand_clients_that_hang_up_at_any_moment_strand_no_kv_of_vllm() -> Result<()> {
    hang_ups("vllm", 1000)
}

#[test]
fn a_thousand_clients_that_hang_up_at_any_moment_leave_no_room_of_sglang() -> Result<()> {
    hang_ups("sglang", 1000)
}
