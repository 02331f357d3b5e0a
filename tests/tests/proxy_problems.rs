//! What users of other routers have reported, each as a test of ours: the problem in the test's name, where it was reported in its
//! comment. The reports were read in 2026; what they name may be mended since. Which report has which test stands in docs/proxy.md. The
//! file is long because it is a list: no test needs another.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use system_tests::engines::{Door, Mock};
use system_tests::http::{self, Answer};
use system_tests::kube::say;

const PROMPT: &str = "there was a small fox who lived at the edge of a wood, and every morning it went to the river to drink, and \
    every evening it came home by another way, because it wanted to know all of them before the winter came.";

fn body() -> Value {
    json!({"model": "mock", "prompt": PROMPT, "max_tokens": 6})
}

fn path(answer: &Answer) -> &str {
    answer.header("x-baton-path").unwrap_or_default()
}

fn pair(contract: &str, prefill: &[&str], decode: &[&str]) -> Result<(Mock, Mock)> {
    Ok((Mock::start(contract, "prefill", prefill)?, Mock::start(contract, "decode", decode)?))
}

/// A client that sends a request and waits for nothing.
fn ask(door: &Door, body: &Value) -> Result<TcpStream> {
    let body = body.to_string();
    let mut stream = TcpStream::connect(&door.address)?;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: m\r\ncontent-type: application/json\r\ncontent-length:";
    stream.write_all(format!("{head} {}\r\n\r\n{body}", body.len()).as_bytes())?;
    Ok(stream)
}

/// vllm#41269, dynamo#7489, dynamo#13855: nobody tells the prefill engine when decode was never sent, or was refused.
#[test]
fn kv_is_not_stranded_when_the_client_leaves_or_decode_refuses() -> Result<()> {
    let (prefill, decode) =
        pair("vllm", &["--prefill-delay", "200", "--lease", "60"], &["--fail", "status=503,leg=decode,count=2"])?;
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &["--fallback", "never"])?;
    // Refused by the only decode engine: 503, and what was held is given back to it once it serves again.
    assert_eq!(door.complete(&body())?.status, 503);
    prefill.counts("/holds/now", 0)?;
    // Gone in the middle of the prefill.
    let client = ask(&door, &body())?;
    prefill.counts("/running/prefill", 1)?;
    drop(client);
    prefill.counts("/running/prefill", 0)?;
    prefill.counts("/holds/now", 0)?;
    assert_eq!(prefill.count("/holds/expired")?, 0);
    Ok(())
}

/// dynamo#14507, dynamo#13703: cancelled prompts were computed to their ends, in front of everybody else's.
#[test]
fn a_cancelled_prefill_does_not_run_on() -> Result<()> {
    let (prefill, decode) = pair("vllm", &["--prefill-delay", "30000"], &[])?;
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    let clients: Vec<TcpStream> = (0..10).map(|_| ask(&door, &body())).collect::<Result<_>>()?;
    prefill.counts("/running/prefill", 10)?;
    let left = Instant::now();
    drop(clients);
    prefill.counts("/running/prefill", 0)?;
    assert!(left.elapsed() < Duration::from_secs(5), "{:?}", left.elapsed());
    prefill.counts("/aborts/prefill", 10)
}

/// aibrix#2289, sglang#9726: the prefill leg had failed, and decode waited for it for minutes.
#[test]
fn a_prefill_that_fails_ends_the_decode_leg_that_waits_for_it() -> Result<()> {
    let (prefill, decode) = pair("sglang", &["--fail", "status=500,leg=prefill"], &[])?;
    let door = Door::start("sglang", &[&prefill], &[&decode], &[])?;
    let asked = Instant::now();
    assert_eq!(door.complete(&body())?.status, 503);
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    decode.counts("/running/decode", 0)
}

/// sglang#29482: decode could not be reached, and the prefill leg hung for half an hour.
#[test]
fn a_decode_that_cannot_be_reached_ends_the_prefill_leg() -> Result<()> {
    let (prefill, mut decode) = pair("sglang", &[], &[])?;
    let door = Door::start("sglang", &[&prefill], &[&decode], &[])?;
    decode.kill();
    let asked = Instant::now();
    assert_eq!(door.complete(&body())?.status, 503);
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    prefill.counts("/running/prefill", 0)?;
    prefill.counts("/rooms/now", 0)
}

/// Sixteen clients that send so many requests in all; gives how many were answered 200.
fn at_once(door: &Door, requests: usize, body: impl Fn(usize) -> Value + Sync) -> usize {
    let (next, good) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= requests {
                        return;
                    }
                    // Read to its end: an answer that is only begun is no answer.
                    let whole = door.complete(&body(number)).and_then(|answer| Ok((answer.status, answer.text()?)));
                    good.fetch_add(usize::from(whole.is_ok_and(|(status, _)| status == 200)), Ordering::Relaxed);
                }
            });
        }
    });
    good.into_inner()
}

/// sglang#10110, sglang#23342: under load some prompts never came to their room, and who waited there hung for minutes.
#[test]
fn a_leg_that_waits_in_vain_ends_with_the_other_and_the_next_attempt_has_a_fresh_room() -> Result<()> {
    const LOST: u64 = 8;
    let (prefill, decode) =
        pair("sglang", &["--fail", &format!("hang,leg=prefill,count={LOST}")], &["--bootstrap-timeout", "1"])?;
    let door = Door::start("sglang", &[&prefill], &[&decode], &[])?;
    let asked = Instant::now();
    assert_eq!(at_once(&door, 64, |_| body()), 64, "{}", door.log());
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    assert_eq!(prefill.count("/failed/prefill")?, LOST);
    // The engine whose prompt was lost heard that nobody waits for it, and nobody was sent to a room a second time.
    prefill.counts("/running/prefill", 0)?;
    assert!(prefill.count("/aborts/prefill")? >= LOST);
    assert_eq!((prefill.count("/rooms/duplicate")?, prefill.count("/rooms/reused")?), (0, 0));
    prefill.counts("/rooms/now", 0)?;
    assert_eq!(prefill.broken()?, json!({}));
    Ok(())
}

/// sglang#10110: the engines' own patience is five minutes, and their clients had none left.
#[test]
fn a_request_that_both_engines_sit_on_ends_at_its_deadline() -> Result<()> {
    let (prefill, decode) = pair("sglang", &["--fail", "hang,leg=prefill"], &[])?;
    let door = Door::start("sglang", &[&prefill], &[&decode], &["--request-timeout-seconds", "1"])?;
    for stream in [false, true] {
        let (mut body, asked) = (body(), Instant::now());
        body["stream"] = json!(stream);
        assert_eq!(door.complete(&body)?.status, 504, "{stream}");
        let took = asked.elapsed();
        assert!((Duration::from_millis(900)..Duration::from_secs(8)).contains(&took), "{stream}: {took:?}");
    }
    prefill.counts("/running/prefill", 0)?;
    decode.counts("/running/decode", 0)?;
    prefill.counts("/rooms/now", 0)
}

/// Every value under these names, however deep.
fn values<'a>(value: &'a Value, names: &[&str], found: &mut Vec<&'a Value>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                if names.contains(&name.as_str()) {
                    found.push(member);
                }
                values(member, names, found);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| values(item, names, found)),
        _ => {}
    }
}

/// The requests of all interfaces, each with this limit of tokens under each name that the interface has for it.
fn of_every_interface(limit: u64) -> Vec<(&'static str, Value)> {
    let messages = json!([{"role": "user", "content": PROMPT}]);
    let ids: Vec<u32> = (0..300).collect();
    vec![
        ("/v1/chat/completions", json!({"model": "mock", "messages": messages, "max_tokens": limit})),
        (
            "/v1/chat/completions",
            json!({"model": "mock", "messages": messages, "max_completion_tokens": limit, "max_tokens": limit, "min_tokens": 2}),
        ),
        ("/v1/completions", json!({"model": "mock", "prompt": PROMPT, "max_tokens": limit, "min_tokens": 2})),
        ("/v1/responses", json!({"model": "mock", "input": PROMPT, "max_output_tokens": limit})),
        ("/v1/messages", json!({"model": "mock", "messages": messages, "max_tokens": limit})),
        (
            "/inference/v1/generate",
            json!({"token_ids": ids, "sampling_params": {"max_tokens": limit, "min_tokens": 2}}),
        ),
    ]
}

/// vllm-router#193, vllm#47136, llm-d-router#1012: clients were told, and billed, that all of their prompt had been cached.
#[test]
fn cached_tokens_are_not_the_prompt_tokens_in_any_interface() -> Result<()> {
    let (prefill, decode) = pair("vllm", &["--cached-tokens", "32"], &[])?;
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    let names = ["cached_tokens", "cache_read_input_tokens"];
    for (at, mut body) in of_every_interface(5) {
        for stream in [false, true] {
            body["stream"] = json!(stream);
            if stream && at.ends_with("completions") {
                body["stream_options"] = json!({"include_usage": true});
            }
            let answer = http::post(&door.address, at, &body)?;
            assert_eq!((answer.status, path(&answer)), (200, "remote-prefill"), "{at}");
            let text = answer.text()?;
            let documents: Vec<Value> = match stream {
                false => vec![serde_json::from_str(&text)?],
                true => {
                    text.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok()).collect()
                }
            };
            let mut found = Vec::new();
            documents.iter().for_each(|document| values(document, &names, &mut found));
            let is_told = !(stream && at.starts_with("/inference"));
            assert!(!is_told || !found.is_empty(), "{at} {stream}: {text}");
            assert!(found.iter().all(|cached| **cached == json!(32)), "{at} {stream}: {text}");
        }
    }
    Ok(())
}

/// The bodies of the last legs of this kind, oldest first.
fn bodies(mock: &Mock, leg: &str) -> Result<Vec<Value>> {
    let ledger = mock.ledger()?;
    let last = ledger["last"].as_array().context("a list")?;
    let of_leg = last.iter().filter(|head| head["leg"] == leg);
    of_leg.map(|head| Ok(serde_json::from_str(head["body"].as_str().context("a body")?)?)).collect()
}

/// llm-d-routing-sidecar#67: with one name of the limit forgotten, the prefill engine decoded the whole answer.
#[test]
fn every_limit_is_one_token_for_prefill_and_the_clients_own_for_decode() -> Result<()> {
    let (prefill, decode) = pair("vllm", &[], &[])?;
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    let names = ["max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"];
    let asked = of_every_interface(9);
    for (at, body) in &asked {
        assert_eq!(http::post(&door.address, at, body)?.status, 200, "{at}");
    }
    for (mock, leg) in [(&prefill, "prefill"), (&decode, "decode")] {
        let got = bodies(mock, leg)?;
        assert_eq!(got.len(), asked.len());
        for ((at, sent), got) in asked.iter().zip(&got) {
            let (mut wanted, mut found) = (Vec::new(), Vec::new());
            values(sent, &names, &mut wanted);
            values(got, &names, &mut found);
            match leg {
                "decode" => assert_eq!(found, wanted, "{at}"),
                _ => {
                    assert!(found.len() >= wanted.len(), "{at}: {got}");
                    assert!(found.iter().all(|limit| **limit == json!(1)), "{at}: {got}");
                }
            }
        }
    }
    assert_eq!(prefill.count("/completion_tokens")?, asked.len() as u64, "one token for each request");
    Ok(())
}

/// Requests by rank of this leg.
fn by_rank(mock: &Mock, leg: &str) -> Result<Vec<u64>> {
    let ledger = mock.ledger()?;
    let ranks = ledger["ranks"][leg].as_array().context("a list")?;
    Ok(ranks.iter().filter_map(Value::as_u64).collect())
}

/// dynamo#7984, dynamo#9936, sglang#29725, sglang#22901, vllm-router#223: nearly all prompts went to rank 0, or decode looked for its KV
/// at another rank than the one that had it.
#[test]
fn a_thousand_requests_use_all_ranks_and_no_rank_is_lost_between_the_legs() -> Result<()> {
    for contract in ["vllm", "sglang"] {
        let (prefill, decode) = pair(contract, &["--dp", "4"], &["--dp", "4"])?;
        let port = prefill.side.rsplit_once(':').context("host and port")?.1;
        // One is told how many ranks there are, the other finds out.
        let door = match contract {
            "vllm" => Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?,
            _ => {
                let prefill = format!("http://{},dp=4,bootstrap={port}", prefill.address);
                let decode = format!("http://{},dp=4", decode.address);
                let door = Door::launch(&["--connector", contract, "--prefill", &prefill, "--decode", &decode])?;
                system_tests::cluster::wait("it serves", || Ok(door.complete(&body())?.status == 200))?;
                http::post(
                    &prefill["http://".len()..prefill.find(',').context("options")?],
                    "/mock/reset",
                    &json!({}),
                )?;
                http::post(&decode["http://".len()..decode.find(',').context("options")?], "/mock/reset", &json!({}))?;
                door
            }
        };
        let good = at_once(&door, 1000, |number| json!({"prompt": format!("{number} {PROMPT}"), "max_tokens": 2}));
        assert_eq!(good, 1000, "{}", door.log());
        for (mock, leg) in [(&prefill, "prefill"), (&decode, "decode")] {
            let ranks = by_rank(mock, leg)?;
            say(&format!("{contract}: {leg} legs by rank: {ranks:?}"));
            assert_eq!((ranks.len(), ranks.iter().sum::<u64>()), (4, 1000));
            // On a machine so slow that loads are read again meanwhile, each reading sends what follows to the ranks that were idle then.
            assert!(ranks.iter().all(|count| (100..=400).contains(count)), "{contract} {leg}: {ranks:?}");
            assert_eq!(mock.count("/ranks/unnamed")?, 0);
            assert_eq!(mock.broken()?, json!({}), "{contract}");
        }
    }
    Ok(())
}

/// dynamo#9936: a rank that was asked for was served by another one.
#[test]
fn a_rank_that_is_asked_for_serves_and_one_that_is_not_there_is_refused() -> Result<()> {
    for contract in ["vllm", "sglang"] {
        let name = if contract == "vllm" { "vllm-nixl" } else { contract };
        let (prefill, decode) = pair(contract, &["--dp", "4"], &["--dp", "4"])?;
        let door = Door::start(name, &[&prefill], &[&decode], &["--trust-routing-hints"])?;
        let ask = |decode_rank: &str, prefill_rank: &str| {
            let given = [("x-data-parallel-rank", decode_rank), ("x-prefill-dp-rank", prefill_rank)];
            http::send("POST", &door.address, "/v1/completions", &given, body().to_string())
        };
        for _ in 0..20 {
            assert_eq!(ask("3", "1")?.status, 200, "{}", door.log());
        }
        assert_eq!(by_rank(&prefill, "prefill")?, [0, 20, 0, 0], "{contract}");
        assert_eq!(by_rank(&decode, "decode")?, [0, 0, 0, 20], "{contract}");
        assert_eq!((ask("4", "0")?.status, ask("0", "4")?.status), (403, 403));
        assert_eq!((prefill.broken()?, decode.broken()?), (json!({}), json!({})));
    }
    Ok(())
}

/// sglang#9926: after an hour without requests, the first ones met connections that the engines had closed, and failed.
#[test]
fn connections_that_engines_closed_while_idle_cost_no_request_and_no_second_prefill() -> Result<()> {
    for contract in ["vllm", "sglang"] {
        let name = if contract == "vllm" { "vllm-nixl" } else { contract };
        // Long enough for many connections at once.
        let (prefill, decode) = pair(contract, &["--prefill-delay", "20"], &["--token-delay", "5"])?;
        let door = Door::start(name, &[&prefill], &[&decode], &[])?;
        assert_eq!(at_once(&door, 64, |_| body()), 64);
        let before = [prefill.count("/requests/prefill")?, decode.count("/requests/decode")?];
        for mock in [&prefill, &decode] {
            http::post(&mock.address, "/mock/stale", &json!({}))?;
        }
        assert_eq!(at_once(&door, 200, |_| body()), 200, "{}", door.log());
        let after = [prefill.count("/requests/prefill")?, decode.count("/requests/decode")?];
        assert_eq!([after[0] - before[0], after[1] - before[1]], [200, 200], "no leg came twice");
        // It was about something.
        let stale = [prefill.count("/stale_closed")?, decode.count("/stale_closed")?];
        assert!(stale.iter().all(|closed| *closed >= 4), "{stale:?}");
        assert!(door.metric("baton_proxy_resends_total", "")? >= 8.0);
        assert_eq!(door.metric("baton_proxy_retries_total", "")?, 0.0, "no attempt was used up");
    }
    Ok(())
}

/// vllm#58063: a prefill engine that had been replaced was waited for as if it were the one before.
#[test]
fn a_prefill_engine_that_is_started_anew_at_its_address_is_used_again() -> Result<()> {
    let (mut prefill, decode) = pair("vllm", &[], &[])?;
    let address = prefill.address.clone();
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    assert_eq!(path(&door.complete(&body())?), "remote-prefill");
    prefill.kill();
    // Served all the same meanwhile.
    assert_eq!(door.complete(&body())?.status, 200);
    let again = Mock::start("vllm", "prefill", &["--listen", &address])?;
    system_tests::cluster::wait("the new one prefills", || {
        let answer = door.complete(&body())?;
        Ok((answer.status, path(&answer)) == (200, "remote-prefill"))
    })?;
    for _ in 0..20 {
        assert_eq!(path(&door.complete(&body())?), "remote-prefill", "{}", door.log());
    }
    assert_eq!(decode.broken()?, json!({}));
    again.counts("/holds/now", 0)
}

/// The folder of a model whose proxies find each other by a file.
struct Model(tempfile::TempDir);

impl Model {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("key"), baton_wire::signing::key_text(&[9; 32]))?;
        std::fs::write(folder.path().join("endpoints"), json!({"endpoints": []}).to_string())?;
        Ok(Model(folder))
    }

    /// The proxy beside an engine.
    fn sidecar(&self, engine: &Mock, role: &str) -> Result<Door> {
        let (engine, folder) = (format!("http://{}", engine.address), self.0.path());
        let (key, endpoints) =
            (folder.join("key").display().to_string(), folder.join("endpoints").display().to_string());
        let flags = ["--connector", "vllm-nixl", "--revision", "r1", "--role", role, "--engine", &engine];
        Door::launch(&[&flags[..], &["--signing-key-file", &key, "--endpoints-file", &endpoints]].concat())
    }

    /// These are its pods from now on.
    fn pods(&self, doors: &[&Door]) -> Result<()> {
        let addresses: Vec<&str> = doors.iter().map(|door| door.address.as_str()).collect();
        let next = self.0.path().join("next");
        std::fs::write(&next, json!({"endpoints": addresses}).to_string())?;
        Ok(std::fs::rename(next, self.0.path().join("endpoints"))?)
    }
}

/// aibrix#1351, sglang#10608, vllm-router#223: with workers that are discovered nobody was chosen, a pod's successor was not found, or
/// ranks were forgotten.
#[test]
fn a_prefill_pod_that_is_replaced_at_another_address_is_found_with_all_its_ranks() -> Result<()> {
    let model = Model::new()?;
    let (first, decode) = pair("vllm", &["--dp", "2"], &["--dp", "2"])?;
    let (first_door, door) = (model.sidecar(&first, "prefill")?, model.sidecar(&decode, "decode")?);
    model.pods(&[&first_door, &door])?;
    let served_by = |prefill: &Door| {
        system_tests::cluster::wait("a prompt is computed there", || {
            let answer = door.complete(&body())?;
            Ok(answer.status == 200 && answer.header("x-baton-prefill-worker") == Some(&prefill.address))
        })
        .with_context(|| door.log())
    };
    served_by(&first_door)?;
    drop((first, first_door));
    let second = Mock::start("vllm", "prefill", &["--dp", "2"])?;
    let second_door = model.sidecar(&second, "prefill")?;
    model.pods(&[&second_door, &door])?;
    served_by(&second_door)?;
    for mock in [&second, &decode] {
        http::post(&mock.address, "/mock/reset", &json!({}))?;
    }
    assert_eq!(at_once(&door, 100, |number| json!({"prompt": format!("{number} {PROMPT}"), "max_tokens": 2})), 100);
    for (mock, leg) in [(&second, "prefill"), (&decode, "decode")] {
        let ranks = by_rank(mock, leg)?;
        assert_eq!((ranks.len(), ranks.iter().sum::<u64>(), mock.count("/ranks/unnamed")?), (2, 100, 0), "{leg}");
        assert!(ranks.iter().all(|count| *count >= 25), "{leg}: {ranks:?}");
        assert_eq!(mock.broken()?, json!({}));
    }
    Ok(())
}

/// production-stack#777: with discovery, streams came to their clients in one piece at their end.
#[test]
fn a_stream_is_passed_on_as_it_comes() -> Result<()> {
    for contract in ["vllm", "sglang"] {
        let name = if contract == "vllm" { "vllm-nixl" } else { contract };
        let (prefill, decode) = pair(contract, &[], &["--token-delay", "300"])?;
        let door = Door::start(name, &[&prefill], &[&decode], &[])?;
        let mut body = body();
        body["stream"] = json!(true);
        let mut answer = door.complete(&body)?;
        let (mut came, mut last) = (Vec::new(), String::new());
        while let Some(piece) = answer.chunk()? {
            came.push(Instant::now());
            last = String::from_utf8(piece)?;
        }
        assert!(last.contains("[DONE]"), "{last}");
        // Six tokens, of which five are waited for.
        assert!(came.len() >= 6, "{} pieces", came.len());
        let (first, last) = (came[0], came[came.len() - 1]);
        assert!(last - first >= Duration::from_millis(1200), "{contract}: all of it within {:?}", last - first);
    }
    Ok(())
}

/// sglang#40125, sglang#10110: rooms that were used twice, by requests at once or by their clients' own choice.
#[test]
fn many_at_once_each_meet_in_a_room_of_their_own() -> Result<()> {
    let (prefill, decode) = pair("sglang", &[], &[])?;
    let door = Door::start("sglang", &[&prefill], &[&decode], &[])?;
    let good = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                for _ in 0..10 {
                    let mut body = body();
                    // A room of the client's own choosing is nobody's.
                    body["bootstrap_room"] = json!(7);
                    let served = door.complete(&body).is_ok_and(|answer| answer.status == 200);
                    good.fetch_add(usize::from(served), Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(good.into_inner(), 160, "{}", door.log());
    assert_eq!((prefill.count("/rooms/duplicate")?, prefill.count("/rooms/reused")?), (0, 0));
    assert_eq!(prefill.broken()?, json!({}));
    Ok(())
}

/// llm-d-router#1461, llm-d#1189: requests were decoded alone, and nothing said so.
#[test]
fn a_degradation_is_said_in_the_answer_and_counted() -> Result<()> {
    let (mut prefill, decode) = pair("vllm", &[], &[])?;
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    assert_eq!(path(&door.complete(&body())?), "remote-prefill");
    prefill.kill();
    let answer = door.complete(&body())?;
    assert_eq!((answer.status, path(&answer).starts_with("fallback; reason=")), (200, true), "{}", path(&answer));
    assert!(door.metric("baton_proxy_fallbacks_total", "")? >= 1.0);
    Ok(())
}

/// sglang#14532, sglang#27547: one prefix drew every request to one worker, whose load counted only once decode had begun.
#[test]
fn a_prefix_that_everybody_shares_does_not_draw_everybody_to_one_worker() -> Result<()> {
    let slow = ["--prefill-tokens-per-second", "4000"];
    let prefill = [Mock::start("vllm", "prefill", &slow)?, Mock::start("vllm", "prefill", &slow)?];
    let decode = Mock::start("vllm", "decode", &[])?;
    let door = Door::start("vllm-nixl", &[&prefill[0], &prefill[1]], &[&decode], &[])?;
    let shared = PROMPT.repeat(20);
    std::thread::scope(|scope| {
        for client in 0..24 {
            let (door, shared) = (&door, &shared);
            scope.spawn(move || door.complete(&json!({"prompt": format!("{shared}{client}"), "max_tokens": 1})));
        }
    });
    let each = [prefill[0].count("/requests/prefill")?, prefill[1].count("/requests/prefill")?];
    assert!(each.iter().all(|count| *count >= 6), "{each:?}");
    Ok(())
}

/// llm-d-router#2438: with legs one after the other a protocol whose prefill waits for decode never ended.
#[test]
fn legs_that_wait_for_each_other_are_sent_together() -> Result<()> {
    let (prefill, decode) = pair("sglang", &["--bootstrap-timeout", "5"], &["--bootstrap-timeout", "5"])?;
    let door = Door::start("sglang", &[&prefill], &[&decode], &[])?;
    let asked = Instant::now();
    assert_eq!(path(&door.complete(&body())?), "remote-prefill");
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    Ok(())
}

/// llm-d-router#1206: what the prefill engine had said was lost, and a 503 became a 500.
#[test]
fn what_an_engine_says_of_an_error_reaches_the_client() -> Result<()> {
    let (prefill, decode) = pair("vllm", &["--fail", "status=422,leg=prefill"], &[])?;
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    let answer = door.complete(&body())?;
    assert_eq!(answer.status, 422);
    assert!(answer.json()?["error"].is_object());
    let (prefill, decode) = pair("vllm", &[], &["--fail", "status=503,leg=plain"])?;
    let door = Door::start("vllm-nixl", &[&prefill], &[&decode], &["--disaggregation", "never"])?;
    assert_eq!(door.complete(&body())?.status, 503);
    Ok(())
}

/// vllm-router#46, sglang#10608: a wrong configuration was found out by the first request, or never.
#[test]
fn a_wrong_configuration_is_refused_at_start() {
    for flags in [
        &["--connector", "vllm-nixl"][..],
        &["--connector", "nixl", "--decode", "http://127.0.0.1:1"],
        &["--connector", "vllm-nixl", "--decode", "127.0.0.1:1"],
        &["--connector", "vllm-nixl", "--engine", "http://127.0.0.1:1"],
        &["--connector", "vllm-nixl", "--decode", "http://127.0.0.1:1,dp=0"],
        &["--connector", "vllm-nixl", "--prefill", "http://127.0.0.1:1,ranks=2"],
        &["--connector", "vllm-nixl", "--decode", "http://127.0.0.1:1", "--allow-prefiller", "10.0.0.0/8:1"],
    ] {
        assert!(Door::launch(flags).is_err(), "{flags:?}");
    }
}

/// Nobody may be made to dial through us: 50 ways of naming an address that is not allowed.
#[test]
fn fifty_ways_to_name_another_target_reach_nobody() -> Result<()> {
    let (prefill, decode) = pair("vllm", &[], &[])?;
    let catcher = TcpListener::bind("127.0.0.1:0")?;
    let port = catcher.local_addr()?.port();
    let caught = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&caught);
    // Ends with the process.
    std::thread::spawn(move || {
        for _ in catcher.incoming() {
            counting.fetch_add(1, Ordering::SeqCst);
        }
    });
    let allowed = prefill.address.clone();
    let engine = format!("http://{}", decode.address);
    let flags = [
        "--connector",
        "vllm-nixl",
        "--role",
        "decode",
        "--engine",
        &engine,
        "--prefiller-header",
        "--allow-prefiller",
    ];
    let door = Door::launch(&[&flags[..], &[&allowed]].concat())?;
    system_tests::cluster::wait("the engine is known", || Ok(door.complete(&body())?.status == 200))?;
    let named = |value: &str| {
        let given = [("x-prefiller-host-port", value)];
        http::send("POST", &door.address, "/v1/completions", &given, body().to_string())
    };
    assert_eq!(path(&named(&allowed)?), "remote-prefill", "{}", door.log());
    let (host, open) = allowed.split_once(':').context("host and port")?;
    let forms = [
        "127.0.0.1:P",
        "127.0.0.1:P,OK",
        "localhost:P",
        "LOCALHOST:P",
        "localhost.:P",
        "127.1:P",
        "127.0.1:P",
        "2130706433:P",
        "0x7f000001:P",
        "0x7f.0.0.1:P",
        "0177.0.0.1:P",
        "017700000001:P",
        "127.000.000.001:P",
        "127.0.0.1.:P",
        "0:P",
        "0.0.0.0:P",
        "[::1]:P",
        "[::]:P",
        "[0:0:0:0:0:0:0:1]:P",
        "[::ffff:127.0.0.1]:P",
        "[::ffff:7f00:1]:P",
        "[::127.0.0.1]:P",
        "[64:ff9b::7f00:1]:P",
        "[fe80::1%lo]:P",
        "[::1%25lo]:P",
        "[127.0.0.1]:P",
        "::1:P",
        "user@127.0.0.1:P",
        "OK@127.0.0.1:P",
        "127.0.0.1:P@OK",
        "127.0.0.1:P#OK",
        "127.0.0.1:P?OK",
        "127.0.0.1:P/OK",
        "127.0.0.1:P;OK",
        "127.0.0.1:P OK",
        "http://127.0.0.1:P",
        "https://127.0.0.1:P",
        "//127.0.0.1:P",
        "http:127.0.0.1:P",
        "file:///etc/passwd",
        "gopher://127.0.0.1:P",
        "unix:/tmp/socket",
        "169.254.169.254:80",
        "169.254.169.254",
        "2852039166:80",
        "0xa9fea9fe:80",
        "[::ffff:169.254.169.254]:80",
        "[fd00:ec2::254]:80",
        "metadata.google.internal:80",
        "127.0.0.1.nip.io:P",
        "HOST:80",
        "HOST:P",
        "HOST",
        ":P",
        "P",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:+P",
        "127.0.0.1:-1",
        "127.0.0.1: P",
        "127.0.0.1%00:P",
        "%31%32%37.0.0.1:P",
        "127.0.0.1:P%0d%0aHost:%20x",
    ];
    assert!(forms.len() >= 50);
    let before = prefill.count("/requests/prefill")?;
    for form in forms {
        let value = form.replace("OK", &allowed).replace("HOST", host).replace('P', &port.to_string());
        let status = named(&value)?.status;
        assert_eq!(status, 403, "{value}");
    }
    // A door that goes by no header answers as if there were none.
    let plain = Door::start("vllm-nixl", &[&prefill], &[&decode], &[])?;
    let given = [("x-prefiller-host-port", format!("127.0.0.1:{port}"))];
    let given: Vec<(&str, &str)> = given.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let answer = http::send("POST", &plain.address, "/v1/completions", &given, body().to_string())?;
    assert_eq!((answer.status, path(&answer)), (200, "remote-prefill"));
    assert_eq!(caught.load(Ordering::SeqCst), 0, "somebody was dialled");
    assert_eq!(prefill.count("/requests/prefill")?, before + 1, "only the plain door's; the open port is {open}");
    Ok(())
}
