//! `baton mock-engine` as a router meets it: one end of a handover is played here by hand, and the ledgers are read.

use anyhow::{Context as _, Result};
use baton_wire::names::{headers, paths, sse};
use baton_wire::signing::{self, TransferClaims};
use baton_wire::status::Status;
use baton_wire::{Epoch, Path, TransferId};
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use system_tests::engines::Mock;
use system_tests::http::{Answer, get, post, send};
use system_tests::kube::say;

/// A prefill leg as a router sends it; gives the handle.
fn prefilled(mock: &Mock) -> Result<Value> {
    let answer = post(&mock.address, "/v1/completions", &prefill_body())?;
    assert_eq!(answer.status, 200);
    Ok(answer.json()?["kv_transfer_params"].clone())
}

const PROMPT: &str = "a prompt of forty characters, or about so";

fn prefill_body() -> Value {
    json!({
        "prompt": PROMPT, "max_tokens": 1, "stream": false,
        "kv_transfer_params": {"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": null, "remote_port": null},
    })
}

fn decode_body(handle: &Value) -> Value {
    json!({"prompt": PROMPT, "max_tokens": 4, "kv_transfer_params": handle})
}

fn decode(mock: &Mock, handle: &Value) -> Result<Answer> {
    post(&mock.address, "/v1/completions", &decode_body(handle))
}

/// Sends a request and waits until it is being served. Dropping the connection hangs up.
fn begin(mock: &Mock, leg: &str, path: &str, body: &Value) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(&mock.address)?;
    let body = body.to_string();
    let head = format!("POST {path} HTTP/1.1\r\nhost: m\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes())?;
    mock.counts(&format!("/running/{leg}"), 1)?;
    Ok(stream)
}

fn vllm_pair(prefill: &[&str], decode: &[&str]) -> Result<(Mock, Mock)> {
    Ok((Mock::start("vllm", "prefill", prefill)?, Mock::start("vllm", "decode", decode)?))
}

#[test]
fn a_pull_frees_what_prefill_held() -> Result<()> {
    let (prefill, decode_mock) = vllm_pair(&[], &[])?;
    let handle = prefilled(&prefill)?;
    assert_eq!(prefill.ledger()?["holds"]["now"], 1);
    let mut fields: Vec<&str> = handle.as_object().context("an object")?.keys().map(String::as_str).collect();
    fields.sort_unstable();
    let contract = [
        "do_remote_decode",
        "do_remote_prefill",
        "mock_digest",
        "mock_opaque",
        "remote_block_ids",
        "remote_engine_id",
        "remote_host",
        "remote_num_tokens",
        "remote_port",
        "remote_request_id",
        "tp_size",
    ];
    assert_eq!(fields, contract);
    let answer = decode(&decode_mock, &handle)?.json()?;
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    let prompt_tokens = answer["usage"]["prompt_tokens"].as_u64().context("usage")?;
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], prompt_tokens - 1, "wrong on purpose");
    let holds = prefill.ledger()?["holds"].clone();
    assert_eq!((&holds["now"], &holds["consumed"], &holds["expired"]), (&json!(0), &json!(1), &json!(0)));
    for mock in [&prefill, &decode_mock] {
        assert_eq!(mock.broken()?, json!({}));
    }
    say(&format!("handle of {} bytes, side channel {}", handle.to_string().len(), prefill.side));
    Ok(())
}

#[test]
fn an_admitted_decode_leg_that_is_given_up_frees_what_prefill_held() -> Result<()> {
    let (prefill, decode_mock) = vllm_pair(&["--lease", "600"], &["--fail", "hang,leg=decode"])?;
    let handle = prefilled(&prefill)?;
    drop(begin(&decode_mock, "decode", "/v1/completions", &decode_body(&handle))?);
    prefill.counts("/holds/released", 1)?;
    assert_eq!(prefill.ledger()?["holds"]["now"], 0);
    decode_mock.counts("/aborts/decode", 1)
}

#[test]
fn a_prefill_leg_that_is_given_up_holds_nothing() -> Result<()> {
    let prefill = Mock::start("vllm", "prefill", &["--prefill-delay", "60000"])?;
    drop(begin(&prefill, "prefill", "/v1/completions", &prefill_body())?);
    prefill.counts("/aborts/prefill", 1)?;
    assert_eq!(prefill.ledger()?["holds"]["total"], 0);
    Ok(())
}

#[test]
fn what_nobody_comes_for_is_stranded_when_its_lease_ends() -> Result<()> {
    let (prefill, decode_mock) = vllm_pair(&["--lease", "0.2"], &[])?;
    let handle = prefilled(&prefill)?;
    prefill.counts("/holds/expired", 1)?;
    assert_eq!(decode(&decode_mock, &handle)?.status, 500);
    assert_eq!(decode_mock.broken()?, json!({"handle-freed": 1}));
    assert_eq!(prefill.ledger()?["pulls"]["freed"], 1);
    Ok(())
}

#[test]
fn a_decode_leg_that_waits_to_be_scheduled_extends_the_lease() -> Result<()> {
    let (prefill, decode_mock) = vllm_pair(&["--lease", "1"], &["--fail", "slow-head=2500"])?;
    let handle = prefilled(&prefill)?;
    assert_eq!(decode(&decode_mock, &handle)?.status, 200);
    assert_eq!(prefill.ledger()?["holds"]["expired"], 0);
    assert!(prefill.ledger()?["holds"]["renewed"].as_u64() > Some(2));
    Ok(())
}

#[test]
fn a_refusal_before_admission_keeps_the_hold_and_one_after_it_frees_it() -> Result<()> {
    let specs = ["--fail", "status=503,count=1", "--fail", "status=500,at=admitted,count=1"];
    let (prefill, decode_mock) = vllm_pair(&[], &specs)?;
    let handle = prefilled(&prefill)?;
    assert_eq!(decode(&decode_mock, &handle)?.status, 503);
    assert_eq!(prefill.ledger()?["holds"]["now"], 1);
    assert_eq!(decode(&decode_mock, &handle)?.status, 500);
    prefill.counts("/holds/released", 1)
}

#[test]
fn kv_that_is_gone_is_computed_again_where_the_policy_says_so() -> Result<()> {
    let (prefill, decode_mock) = vllm_pair(&[], &["--kv-load-failure", "recompute"])?;
    let handle = prefilled(&prefill)?;
    assert_eq!(decode(&decode_mock, &handle)?.status, 200);
    assert_eq!(decode(&decode_mock, &handle)?.status, 200);
    assert_eq!(decode_mock.ledger()?["pulls"]["recomputed"], 1);
    assert_eq!(decode_mock.broken()?, json!({"handle-freed": 1}));
    Ok(())
}

/// Merges fields into a body, and takes those out that are null.
fn with(mut body: Value, fields: Value) -> Value {
    if let (Value::Object(body), Value::Object(fields)) = (&mut body, fields) {
        for (name, value) in fields {
            if value.is_null() {
                body.remove(&name)
            } else {
                body.insert(name, value)
            };
        }
    }
    body
}

#[test]
fn each_rule_of_a_prefill_leg_is_noticed() -> Result<()> {
    let mock = Mock::start("vllm", "prefill", &[])?;
    let check = |fields: Value, status: u16, expect: Value| -> Result<()> {
        post(&mock.address, "/mock/reset", &json!({}))?;
        let answer = post(&mock.address, "/v1/completions", &with(prefill_body(), fields.clone()))?;
        assert_eq!((answer.status, mock.broken()?), (status, expect), "{fields}");
        Ok(())
    };
    check(json!({}), 200, json!({}))?;
    check(json!({"stream": true}), 200, json!({"prefill-streams": 1}))?;
    check(json!({"stream_options": {"include_usage": true}}), 400, json!({"prefill-stream-options": 1}))?;
    check(json!({"max_tokens": 64}), 200, json!({"prefill-uncapped": 1}))?;
    check(json!({"max_tokens": null}), 200, json!({"prefill-uncapped": 1}))?;
    check(json!({"n": 2}), 200, json!({"prefill-choices": 1}))?;
    check(json!({"kv_transfer_params": {"do_remote_decode": "yes"}}), 200, json!({"handover-unreadable": 1}))?;
    let handle = json!({"do_remote_prefill": true, "do_remote_decode": true});
    let flags = json!({"handover-flags": 1, "wrong-role": 1, "handle-altered": 1, "handle-incomplete": 1});
    check(json!({"kv_transfer_params": handle}), 200, flags)?;
    post(&mock.address, "/mock/reset", &json!({}))?;
    // vLLM refuses what the rule forbids, whether or not it is a prefill leg.
    let answer = post(&mock.address, "/v1/completions", &with(prefill_body(), json!({"min_tokens": 2})))?;
    assert_eq!((answer.status, mock.broken()?), (400, json!({"prefill-min-tokens": 1})));
    let twice = prefill_body().to_string().replacen('{', "{\"stream\":true,", 1);
    assert_eq!(send("POST", &mock.address, "/v1/completions", &[], twice)?.status, 400);
    assert_eq!(mock.broken()?["duplicate-key"], 1);
    Ok(())
}

#[test]
fn each_rule_of_a_decode_leg_is_noticed() -> Result<()> {
    let (prefill, mock) = vllm_pair(&[], &["--kv-load-failure", "recompute"])?;
    let check = |change: &dyn Fn(&mut Value), expect: Value| -> Result<()> {
        post(&mock.address, "/mock/reset", &json!({}))?;
        let mut handle = prefilled(&prefill)?;
        change(&mut handle);
        assert_eq!(decode(&mock, &handle)?.status, 200);
        assert_eq!(mock.broken()?, expect, "{handle}");
        Ok(())
    };
    check(&|_| {}, json!({}))?;
    check(&|handle| handle["mock_opaque"]["big"] = json!(1.844_674_407_370_955_2e19), json!({"handle-altered": 1}))?;
    check(&|handle| handle["more"] = json!(1), json!({"handle-altered": 1}))?;
    check(
        &|handle| handle["remote_request_id"] = json!("cmpl-prefill-999"),
        json!({"handle-altered": 1, "handle-unknown": 1}),
    )?;
    for field in ["remote_block_ids", "remote_engine_id", "remote_host", "remote_port"] {
        let incomplete = json!({"handle-altered": 1, "handle-incomplete": 1});
        check(&|handle| handle[field] = Value::Null, incomplete)?;
    }
    let same_values = |handle: &Value| -> Result<()> {
        let spaced = decode_body(handle).to_string().replace(",\"remote", ", \"remote");
        assert_eq!(send("POST", &mock.address, "/v1/completions", &[], spaced)?.status, 200);
        Ok(())
    };
    post(&mock.address, "/mock/reset", &json!({}))?;
    same_values(&prefilled(&prefill)?)?;
    assert_eq!((mock.broken()?, mock.ledger()?["reserialised_handles"].clone()), (json!({}), json!(1)));
    let given = [("x-request-id", "a"), ("x-request-id", "b"), ("x-prefiller-host-port", "p:1")];
    send("POST", &mock.address, "/v1/completions", &given, decode_body(&prefilled(&prefill)?).to_string())?;
    assert_eq!(mock.broken()?, json!({"request-id-twice": 1, "steering-header": 1}));
    Ok(())
}

#[test]
fn a_request_id_that_changes_between_the_legs_is_noticed() -> Result<()> {
    let (prefill, mock) = vllm_pair(&[], &[])?;
    let leg = |to: &Mock, id: &str, body: &Value| -> Result<Value> {
        send("POST", &to.address, "/v1/completions", &[("x-request-id", id)], body.to_string())?.json()
    };
    for (second, expect) in [("one", json!({})), ("two", json!({"request-ids-differ": 1}))] {
        let first = leg(&prefill, "one", &prefill_body())?;
        assert_eq!(first["id"], "cmpl-one");
        leg(&mock, second, &decode_body(&first["kv_transfer_params"]))?;
        assert_eq!(mock.broken()?, expect);
    }
    Ok(())
}

#[test]
fn a_stream_has_the_tokens_of_the_answer_that_is_not_streamed() -> Result<()> {
    for awkward in [&[][..], &["--awkward-text"]] {
        let mock = Mock::start("vllm", "both", awkward)?;
        let body = json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 40});
        let whole = post(&mock.address, "/v1/chat/completions", &body)?.json()?;
        let options = json!({"stream": true, "stream_options": {"include_usage": true}});
        let text = post(&mock.address, "/v1/chat/completions", &with(body, options))?.text()?;
        assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
        let events: Vec<Value> = text
            .lines()
            .filter_map(|line| line.strip_prefix("data: ").filter(|data| *data != "[DONE]"))
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?;
        let streamed: String =
            events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(Some(streamed.as_str()), whole["choices"][0]["message"]["content"].as_str());
        assert_eq!(events.last().map(|event| &event["usage"]), Some(&whole["usage"]));
        mock.counts("/answered/plain", 2)?;
    }
    Ok(())
}

#[test]
fn tokens_of_a_stream_leave_one_by_one() -> Result<()> {
    let mock = Mock::start("vllm", "both", &[])?;
    let mut answer = post(&mock.address, "/v1/completions", &json!({"prompt": "a", "max_tokens": 32, "stream": true}))?;
    let mut chunks = 0;
    while let Some(chunk) = answer.chunk()? {
        assert_eq!(chunk.windows(2).filter(|pair| pair == b"\n\n").count(), 1);
        chunks += 1;
    }
    assert_eq!(chunks, 33, "32 tokens and the end");
    Ok(())
}

#[test]
fn every_failure_is_seen_by_the_client() -> Result<()> {
    let mock = Mock::start("vllm", "both", &[])?;
    let body = json!({"prompt": "a", "max_tokens": 8, "stream": true});
    // With a name of its own, so that every answer has the same id.
    let ask = || send("POST", &mock.address, "/v1/completions", &[("x-request-id", "one")], body.to_string());
    let whole = ask()?.text()?;
    let fail = |spec: &str| -> Result<Result<String>> {
        send("DELETE", &mock.address, "/mock/fail", &[], "")?;
        let said = send("POST", &mock.address, "/mock/fail", &[], spec)?;
        assert_eq!(said.status, 200, "{spec}");
        Ok(ask().and_then(Answer::text))
    };
    assert!(fail("status=429")??.contains("injected failure"));
    assert!(fail("break-stream-after=3")?.is_err());
    assert!(fail("reset-after=300")?.is_err());
    assert_eq!(fail("slow-head=30")??, whole);
    assert_eq!(fail("stall=30,at=head")??, whole);
    assert_eq!(fail("stall=30,at=mid")??, whole);
    assert!(fail("bad-json")??.contains("[{\n\n"));
    mock.counts("/failed/plain", 7)?;
    assert_eq!(send("POST", &mock.address, "/mock/fail", &[], "status=200")?.status, 400);
    send("DELETE", &mock.address, "/mock/fail", &[], "")?;
    send("POST", &mock.address, "/mock/fail", &[], "refuse,count=1")?;
    assert!(ask().is_err());
    assert_eq!(ask()?.status, 200);
    let prefill = Mock::start("vllm", "prefill", &["--fail", "no-handle"])?;
    assert_eq!(prefilled(&prefill)?, Value::Null);
    assert_eq!(prefill.ledger()?["holds"]["total"], 0);
    Ok(())
}

fn sglang_pair(flags: &[&str]) -> Result<(Mock, Mock)> {
    Ok((Mock::start("sglang", "prefill", flags)?, Mock::start("sglang", "decode", flags)?))
}

fn bootstrapped(prefill: &Mock, mut body: Value, rooms: &[u64]) -> Result<Value> {
    let (host, port) = prefill.side.rsplit_once(':').context("an address")?;
    let port: u16 = port.parse()?;
    let fields = match rooms {
        [room] => json!({"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": room}),
        rooms => json!({"bootstrap_host": vec![host; rooms.len()], "bootstrap_port": vec![port; rooms.len()],
            "bootstrap_room": rooms}),
    };
    body = with(body, fields);
    Ok(body)
}

/// Sends both legs at once; gives their answers.
fn both(prefill: &Mock, decode: &Mock, path: &str, legs: [&Value; 2]) -> Result<[Answer; 2]> {
    let [first, second] = std::thread::scope(|scope| {
        let first = scope.spawn(|| post(&prefill.address, path, legs[0]));
        let second = post(&decode.address, path, legs[1]);
        [first.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the leg panicked"))), second]
    });
    Ok([first?, second?])
}

#[test]
fn legs_of_one_room_meet_and_a_batch_has_a_room_each() -> Result<()> {
    let (prefill, decode) = sglang_pair(&[])?;
    let body = bootstrapped(&prefill, json!({"text": "hello there", "return_logprob": true}), &[11])?;
    let [first, second] = both(&prefill, &decode, "/generate", [&body, &body])?;
    let (first, second) = (first.json()?, second.json()?);
    assert!(first["meta_info"]["input_token_logprobs"].is_array());
    assert_eq!(first["meta_info"]["completion_tokens"], 1);
    assert_eq!(second["meta_info"]["completion_tokens"], 16);
    let body = bootstrapped(&prefill, json!({"text": ["hello", "there"]}), &[12, 13])?;
    let [_, second] = both(&prefill, &decode, "/generate", [&body, &body])?;
    assert_eq!(second.json()?.as_array().map(Vec::len), Some(2));
    let rooms = prefill.ledger()?["rooms"].clone();
    assert_eq!((&rooms["total"], &rooms["done"], &rooms["reused"]), (&json!(3), &json!(3), &json!(0)), "{rooms}");
    prefill.counts("/rooms/now", 0)?;
    for mock in [&prefill, &decode] {
        assert_eq!(mock.broken()?, json!({}));
    }
    Ok(())
}

#[test]
fn a_leg_whose_other_never_comes_waits_until_its_timeout() -> Result<()> {
    let (prefill, decode) = sglang_pair(&["--bootstrap-timeout", "0.3"])?;
    let body = bootstrapped(&prefill, json!({"text": "hello"}), &[21])?;
    assert_eq!(post(&prefill.address, "/generate", &body)?.status, 500);
    assert_eq!(post(&decode.address, "/generate", &body)?.status, 500);
    prefill.counts("/rooms/prefill_left", 1)?;
    prefill.counts("/rooms/decode_left", 1)?;
    prefill.counts("/rooms/now", 0)
}

#[test]
fn a_leg_that_is_given_up_leaves_the_other_waiting() -> Result<()> {
    let (prefill, decode) = sglang_pair(&[])?;
    let body = bootstrapped(&prefill, json!({"text": "hello"}), &[31])?;
    let decoding = begin(&decode, "decode", "/generate", &body)?;
    prefill.counts("/rooms/now", 1)?;
    // Prefill comes, finds decode there, and would end at once: it is slowed for as long as it takes to leave.
    send("POST", &prefill.address, "/mock/fail", &[], "hang,count=1")?;
    drop(begin(&prefill, "prefill", "/generate", &body)?);
    prefill.counts("/aborts/prefill", 1)?;
    assert_eq!(decode.ledger()?["running"]["decode"], 1, "it waits on");
    drop(decoding);
    decode.counts("/aborts/decode", 1)?;
    prefill.counts("/rooms/now", 0)?;
    prefill.counts("/rooms/decode_left", 1)?;
    assert_eq!(prefill.ledger()?["rooms"]["done"], 0);
    Ok(())
}

#[test]
fn each_rule_of_a_room_is_noticed() -> Result<()> {
    let (prefill, decode) = sglang_pair(&["--bootstrap-timeout", "30"])?;
    let plain = json!({"text": "hello"});
    let right = bootstrapped(&prefill, plain.clone(), &[41])?;
    for mock in [&prefill, &decode] {
        assert_eq!(post(&mock.address, "/generate", &plain)?.status, 400);
        let shape = with(right.clone(), json!({"bootstrap_room": [41]}));
        assert_eq!(post(&mock.address, "/generate", &shape)?.status, 400);
        let range = with(right.clone(), json!({"bootstrap_room": 1_u64 << 63}));
        assert_eq!(post(&mock.address, "/generate", &range)?.status, 400);
        let expect = json!({"bootstrap-missing": 1, "bootstrap-shape": 1, "room-out-of-range": 1});
        assert_eq!(mock.broken()?, expect);
        post(&mock.address, "/mock/reset", &json!({}))?;
    }
    let port = with(right.clone(), json!({"bootstrap_port": 1, "text": "other"}));
    let [first, second] = both(&prefill, &decode, "/generate", [&port, &right])?;
    assert_eq!((first.status, second.status), (200, 200));
    assert_eq!(prefill.broken()?, json!({"bootstrap-port": 1, "legs-differ": 1}));
    let _waits = begin(&prefill, "prefill", "/generate", &right)?;
    assert_eq!(post(&prefill.address, "/generate", &right)?.status, 500);
    assert_eq!(prefill.broken()?["duplicate-room"], 1);
    assert_eq!(prefill.ledger()?["rooms"]["reused"], 1);
    Ok(())
}

#[test]
fn each_rule_of_a_rank_is_noticed() -> Result<()> {
    let (prefill, decode) = sglang_pair(&["--dp", "4", "--bootstrap-timeout", "1"])?;
    // Room 42 is on rank 2.
    let right = bootstrapped(&prefill, json!({"text": "hello"}), &[42])?;
    let legs = |own: Value, sought: Value| {
        let first = with(right.clone(), json!({"data_parallel_rank": own}));
        let second = with(right.clone(), json!({"data_parallel_rank": 1, "disagg_prefill_dp_rank": sought}));
        both(&prefill, &decode, "/generate", [&first, &second])
    };
    for own in [json!(2), Value::Null] {
        let [first, second] = legs(own, json!(2))?;
        assert_eq!((first.status, second.status), (200, 200));
    }
    assert_eq!((prefill.broken()?, decode.broken()?), (json!({}), json!({})));
    let ranks = [prefill.ledger()?["ranks"].clone(), decode.ledger()?["ranks"].clone()];
    assert_eq!((&ranks[0]["prefill"], &ranks[0]["unnamed"]), (&json!([0, 0, 2, 0]), &json!(1)));
    assert_eq!((&ranks[1]["decode"], &ranks[1]["running"]), (&json!([0, 2, 0, 0]), &json!([0, 0, 0, 0])));
    let [first, second] = legs(json!(2), json!(3))?;
    assert_eq!((first.status, second.status), (500, 500));
    assert_eq!(prefill.broken()?, json!({"prefill-rank-differs": 1}));
    assert_eq!(legs(json!(3), json!(3))?[0].status, 400);
    assert_eq!(prefill.broken()?, json!({"prefill-rank-differs": 1, "room-off-rank": 1}));
    assert_eq!(legs(json!(4), json!(2))?[0].status, 400);
    assert_eq!(prefill.broken()?["rank-out-of-range"], 1);

    let vllm = Mock::start("vllm", "both", &["--dp", "2"])?;
    let ask = |rank: &str| {
        send("POST", &vllm.address, "/v1/completions", &[("x-data-parallel-rank", rank)], r#"{"prompt":"a"}"#)
    };
    assert_eq!((ask("1")?.status, ask("2")?.status), (200, 400));
    assert_eq!(vllm.broken()?, json!({"rank-out-of-range": 1}));
    let metrics = get(&vllm.address, "/metrics")?.text()?;
    for rank in ["0", "1"] {
        assert!(metrics.contains(&format!("vllm:num_requests_running{{engine=\"{rank}\"")), "{metrics}");
    }
    Ok(())
}

#[test]
fn a_stale_connection_is_closed_without_an_answer_and_a_new_one_serves() -> Result<()> {
    let mock = Mock::start("vllm", "both", &[])?;
    let mut kept = TcpStream::connect(&mock.address)?;
    let mut ask = || -> std::io::Result<usize> {
        kept.write_all(b"GET /health HTTP/1.1\r\nhost: m\r\n\r\n")?;
        kept.read(&mut [0; 1024])
    };
    assert!(ask()? > 0);
    post(&mock.address, "/mock/stale", &json!({}))?;
    assert_eq!(ask().unwrap_or(0), 0, "it was answered");
    assert_eq!(get(&mock.address, "/health")?.status, 200);
    mock.counts("/stale_closed", 1)
}

#[test]
fn routers_find_what_they_ask_an_engine_for() -> Result<()> {
    let mock = Mock::start("sglang", "decode", &["--model", "m"])?;
    for path in [
        "/health",
        "/health_generate",
        "/v1/models",
        "/get_server_info",
        "/server_info",
        "/get_model_info",
        "/model_info",
        "/metrics",
        "/version",
    ] {
        assert_eq!(get(&mock.address, path)?.status, 200, "{path}");
    }
    assert_eq!(get(&mock.address, "/get_server_info")?.json()?["disaggregation_mode"], "decode");
    assert_eq!(get(&mock.address, "/v1/models")?.json()?["data"][0]["id"], "m");
    let metrics = get(&mock.address, "/metrics")?.text()?;
    for name in [
        "vllm:num_requests_running{",
        "vllm:num_requests_waiting{",
        "vllm:kv_cache_usage_perc{",
        "sglang:num_running_reqs{",
    ] {
        assert!(metrics.contains(name), "{metrics}");
    }
    for (path, field) in [("/tokenize", "tokens"), ("/v1/embeddings", "data"), ("/v1/score", "data")] {
        let answer = post(&mock.address, path, &json!({"prompt": "hello", "input": "hello"}))?.json()?;
        assert!(answer[field].is_array(), "{path}: {answer}");
    }
    assert_eq!(get(&mock.address, "/nothing")?.status, 404);
    assert_eq!(mock.ledger()?["unknown_paths"], 1);
    Ok(())
}

#[test]
fn a_body_of_four_megabytes_arrives_as_it_was() -> Result<()> {
    let mock = Mock::start("vllm", "both", &["--keep", "1"])?;
    let body = json!({"prompt": "x".repeat(4 << 20), "max_tokens": 1}).to_string();
    assert_eq!(send("POST", &mock.address, "/v1/completions", &[("x-a", "b")], &body)?.status, 200);
    let last = mock.ledger()?["last"][0].clone();
    assert_eq!(last["body_blake3"], signing::body_blake3(body.as_bytes()));
    assert!(last["headers"].as_array().context("headers")?.contains(&json!(["x-a", "b"])));
    Ok(())
}

fn leg(mock: &Mock, attempt: u32, token: &str, body: Value) -> Value {
    let id = TransferId([7; 16]);
    json!({
        "request_id": "r", "endpoint": "completions", "body": body, "prompts": [[1, 2, 3]], "seed": 9,
        "transfers": [{"id": id, "attempt": attempt, "source": mock.side, "token": token}],
        "planned": Path::RemotePrefill,
    })
}

fn both_of_ours(prefill: &Mock, decode: &Mock, leg: &Value, headers: &[(&str, &str)]) -> Result<Answer> {
    let body = leg.to_string();
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| send("POST", &prefill.address, paths::PREFILL_LEG, &[], &body));
        let second = send("POST", &decode.address, paths::DECODE_LEG, headers, &body);
        (first.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the leg panicked"))), second)
    });
    assert_eq!(first?.json()?["prompt_tokens"], 3);
    second
}

#[test]
fn legs_of_one_transfer_meet_and_the_decode_leg_tells_its_path() -> Result<()> {
    let prefill = Mock::start("baton", "prefill", &[])?;
    let decode = Mock::start("baton", "decode", &["--bootstrap-timeout", "3"])?;
    let request = json!({"prompt": "hello", "max_tokens": 4, "stream": true});
    let rendered =
        post(&prefill.address, paths::RENDER, &json!({"endpoint": "completions", "body": request}))?.json()?;
    assert_eq!(rendered["prompts"][0]["token_ids"].as_array().map(Vec::len), Some(2), "{rendered}");
    let status: Status = serde_json::from_value(get(&decode.address, paths::STATUS)?.json()?)?;
    assert_eq!(status.kv_address.as_deref(), Some(decode.side.as_str()));
    let first = leg(&prefill, 1, "", request);
    let answer = both_of_ours(&prefill, &decode, &first, &[(headers::TOKEN_IDS, "1")])?;
    assert_eq!(answer.header(headers::PATH), Some("remote-prefill"));
    let met = answer.text()?;
    assert_eq!(met.matches(sse::TOKEN_IDS_PREFIX).count(), 4, "{met}");
    prefill.counts("/rooms/done", 1)?;
    // Nobody prefills the second attempt: the decode worker does, and its tokens are the same.
    let alone = with(first, json!({"transfers": leg(&prefill, 2, "", json!({}))["transfers"]})).to_string();
    let answer = send("POST", &decode.address, paths::DECODE_LEG, &[(headers::TOKEN_IDS, "1")], alone)?;
    assert_eq!(answer.header(headers::PATH), Some("fallback; reason=timeout"));
    let data = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with(sse::TOKEN_IDS_PREFIX)).map(str::to_owned).collect()
    };
    assert_eq!(data(&answer.text()?), data(&met));
    for mock in [&prefill, &decode] {
        assert_eq!(mock.broken()?, json!({}));
    }
    Ok(())
}

#[test]
fn a_transfer_without_a_token_for_this_worker_is_noticed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("signing.pub");
    let key = SigningKey::from_bytes(&[42; 32]);
    std::fs::write(&file, signing::key_text(&key.verifying_key().to_bytes()))?;
    let prefill = Mock::start("baton", "prefill", &[])?;
    let decode = Mock::start("baton", "decode", &["--public-key", &file.to_string_lossy()])?;
    let status: Status = serde_json::from_value(get(&decode.address, paths::STATUS)?.json()?)?;
    let claims = TransferClaims {
        transfer: TransferId([7; 16]),
        attempt: 1,
        consumer: status.epoch,
        fingerprint: status.fingerprint.context("a fingerprint")?,
        byte_budget: 1,
        expires_unix_ms: u64::MAX,
    };
    let request = json!({"prompt": "hello", "max_tokens": 1});
    let right = leg(&prefill, 1, &signing::sign(&key, &claims), request.clone());
    assert_eq!(both_of_ours(&prefill, &decode, &right, &[])?.header(headers::PATH), Some("remote-prefill"));
    assert_eq!(decode.broken()?, json!({}));
    let other = TransferClaims { consumer: Epoch([0; 16]), ..claims };
    let wrong = leg(&prefill, 1, &signing::sign(&key, &other), request).to_string();
    let answer = send("POST", &decode.address, paths::DECODE_LEG, &[], wrong)?;
    assert_eq!(answer.header(headers::PATH), Some("fallback; reason=unauthorized"));
    assert_eq!(decode.broken()?, json!({"foreign-token": 1}));
    Ok(())
}

#[test]
fn each_rule_of_our_legs_is_noticed() -> Result<()> {
    let mock = Mock::start("baton", "prefill", &[])?;
    let right = leg(&mock, 1, "", json!({"prompt": "hello"}));
    assert_eq!(post(&mock.address, paths::PREFILL_LEG, &json!({"prompts": []}))?.status, 400);
    let missing = with(right, json!({"transfers": []}));
    assert_eq!(post(&mock.address, paths::PREFILL_LEG, &missing)?.status, 400);
    assert_eq!(post(&mock.address, paths::DECODE_LEG, &missing)?.status, 200);
    assert_eq!(mock.broken()?, json!({"leg-unreadable": 1, "transfer-missing": 1, "wrong-role": 1}));
    Ok(())
}
