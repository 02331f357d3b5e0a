//! The program itself: exit statuses and signals.

use crate::server::{model, until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton-worker"));
    command.args(["--host", "127.0.0.1", "--port", "0", "--log-format", "json"]).stderr(Stdio::piped());
    command
}

/// A worker that is ready, and its address.
fn ready() -> (Child, String) {
    let mut child = program()
        .args(["--role", "prefill-decode", "--served-model-name", "tiny", "--kv-cache-bytes", "33554432", "--model"])
        .arg(model())
        .spawn()
        .expect("the program starts");
    let log = BufReader::new(child.stderr.take().expect("it is piped"));
    let mut lines =
        log.lines().map(|line| serde_json::from_str::<Value>(&line.expect("a line")).expect("a log line is JSON"));
    let mut message = |message: &str| {
        lines.find(|line| line["fields"]["message"] == message).unwrap_or_else(|| panic!("it never said {message:?}"))
    };
    let address = message("listening")["fields"]["http"].as_str().expect("an address").to_owned();
    message("ready");
    // Whoever logs into a pipe that nobody reads would wait.
    std::thread::spawn(move || lines.for_each(drop));
    (child, address)
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args(["-s", name, &child.id().to_string()]).status().expect("kill runs");
    assert!(sent.success());
}

/// A stream that takes long.
fn endless(address: &str) -> TcpStream {
    let body =
        json!({"model": "tiny", "prompt": "Once", "max_tokens": 2000, "ignore_eos": true, "stream": true}).to_string();
    let mut stream = TcpStream::connect(address).expect("it listens");
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: worker\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).expect("it reads");
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).expect("it answers");
    assert!(line.contains("200 OK"), "{line}");
    stream
}

#[test]
fn wrong_usage_exits_64_and_a_model_that_cannot_be_served_1() {
    for (flags, status, says) in [
        (&["--role", "both", "--model", "x"][..], 64, "prefill-decode"),
        (&["--role", "decode"][..], 64, "--model"),
        (&["--role", "decode", "--model", "/nowhere"][..], 1, "--model /nowhere is not a directory"),
    ] {
        let output = program().args(flags).output().expect("the program runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert!(said.contains(says), "{said}");
    }
}

#[test]
fn the_last_line_is_plain_and_says_what_to_do_whatever_the_logs_form() {
    let worker = env!("CARGO_BIN_EXE_baton-worker");
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("config.json"), "{}").expect("written");
    let dir = dir.path().to_str().expect("a path");
    let key = [
        "--role",
        "prefill",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--proxy-public-key-file",
        "/no/key",
        "--model",
        dir,
    ];
    for (args, status, says) in [
        (&["--role", "decode", "--model", "/nowhere"][..], 1, &["--model /nowhere", "config.json, tokenizer.json"][..]),
        (&["--role", "decode", "--host", "127.0.0.1", "--port", "0", "--model", dir], 1, &["tokenizer.json"]),
        (&key, 1, &["--proxy-public-key-file /no/key", "signing.pub"]),
        (&["fetch", "--uri", "hf://a/b", "--to", "/proc/none"], 1, &["/proc/none"]),
        (&["fetch", "--uri", "pvc://a/b", "--to", "x"], 64, &["--uri", "hf://ORGANISATION/MODEL"]),
        (&["probe", "live", "--host", "127.0.0.1", "--port", "1"], 1, &["127.0.0.1:1", "refused"]),
    ] {
        let mut command = Command::new(worker);
        command.args(args);
        if args[0] != "probe" {
            command.args(["--log-format", "json"]);
        }
        let output = command.output().expect("the program runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.starts_with("baton-worker: ") && says.iter().all(|says| last.contains(says)), "{last}");
    }
}

#[test]
fn a_probe_is_answered_by_the_worker_of_its_pod() {
    let (mut child, address) = ready();
    let port = address.rsplit(':').next().expect("a port");
    let probe = |what: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_baton-worker"));
        let output = command.args(["probe", what, "--port", port]).output().expect("the program runs");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert_eq!(probe("live"), (Some(0), "ok\n".to_owned()));
    assert_eq!(probe("ready"), (Some(0), "ready\n".to_owned()));
    signal(&child, "TERM");
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert_eq!(probe("live").0, Some(1), "nobody is there any more");
}

#[test]
fn a_download_that_is_told_to_stop_says_so_and_leaves_what_it_has() {
    let (dir, server) =
        (tempfile::tempdir().expect("a directory"), std::net::TcpListener::bind("127.0.0.1:0").expect("a port"));
    let endpoint = format!("http://{}", server.local_addr().expect("bound"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_baton-worker"))
        .args(["fetch", "--uri", "hf://a/b", "--endpoint", &endpoint, "--to"])
        .arg(dir.path())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts");
    // It asks, and waits for an answer that does not come.
    let _asked = server.accept().expect("it asks");
    signal(&child, "TERM");
    assert_eq!(child.wait().expect("it ends").code(), Some(143));
}

#[tokio::test]
async fn a_signal_drains_and_a_second_one_ends_at_once() {
    let (mut child, _address) = ready();
    signal(&child, "TERM");
    assert_eq!(child.wait().expect("it ends").code(), Some(0), "nothing runs: drained");

    let (mut child, address) = ready();
    let _running = endless(&address);
    signal(&child, "INT");
    until("it refuses new work", async || {
        let mut stream = TcpStream::connect(&address).expect("it still listens");
        stream.write_all(b"GET /ready HTTP/1.1\r\nhost: worker\r\nconnection: close\r\n\r\n").expect("it reads");
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).expect("it answers");
        line.contains("503")
    })
    .await;
    signal(&child, "INT");
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
}
