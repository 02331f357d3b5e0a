//! What users of other routers have reported, each as a test of ours: the problem in the test's name, where it was reported in its
//! comment. The reports were read in 2026; what they name may be mended since.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use system_tests::engines::{Door, Mock};
use system_tests::http::{self, Answer};

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

/// sglang#10110, sglang#40125: time-outs under load, and rooms that were used twice.
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
