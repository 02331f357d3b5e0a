//! `baton up` and the commands beside it, as a person uses them: what is printed, which exit code, and what is left behind.

use anyhow::{Context as _, Result};
use serde_json::json;
use std::io::Write as _;
use std::path::Path;
use std::process::{Output, Stdio};
use system_tests::cluster::{path_of, signal, signal_process, wait};
use system_tests::up::Up;
use system_tests::{http, repo};

const TINY: &[&str] = &["-f", "examples/tiny.yaml"];

fn completion(max_tokens: u32) -> serde_json::Value {
    json!({"model": "tiny", "prompt": "Once upon a time, a small fox", "max_tokens": max_tokens, "ignore_eos": true})
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The value on a line of the summary.
fn told(summary: &str, name: &str) -> String {
    let line = summary.lines().find_map(|line| line.trim_start().strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name:?} in {summary}")).trim().to_owned()
}

/// The number before a unit.
fn number(value: &str, unit: &str) -> f64 {
    let number = value.split_once(unit).map(|(number, _)| number.trim());
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no number of {unit} in {value:?}"))
}

fn nothing_is_left(up: &Up) {
    assert_eq!(up.processes(), [], "processes are left");
    assert_eq!(up.run_folders(), [] as [&Path; 0], "run folders are left");
}

#[test]
fn a_prompt_is_answered_with_what_it_took_and_nothing_is_left() -> Result<()> {
    let mut up = Up::start(
        &[TINY, &["--prompt", "Once upon a time, a small fox", "--max-tokens", "24", "--seed", "3"]].concat(),
    )?;
    assert!(up.ended()?.success(), "{}", up.stderr());
    let stdout = up.stdout();
    assert!(stdout.starts_with("Once upon a time, a small fox"), "{stdout}");
    assert!(number(&told(&stdout, "time to first token"), "ms") > 0.0);
    assert!(number(&told(&stdout, "first token after start"), "s") > 0.0);
    assert!(number(&told(&stdout, "inter-token latency"), "ms mean") > 0.0);
    let tokens = told(&stdout, "tokens");
    assert!(tokens.contains(" prompt (0 cached), 24 generated, finished by length"), "{tokens}");
    assert_eq!(told(&stdout, "path"), "remote-prefill");
    assert!(told(&stdout, "prefilled by").starts_with("tiny-prefill-0 (127.0."), "{stdout}");
    assert!(told(&stdout, "decoded by").starts_with("tiny-decode-0 (127.0."), "{stdout}");
    let moved = told(&stdout, "KV moved");
    assert!(number(&moved, "KiB") > 0.0 && moved.contains("exposed transfer time"), "{moved}");
    nothing_is_left(&up);
    Ok(())
}

#[test]
fn a_wrong_manifest_starts_nothing_and_names_field_and_allowed_values() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("wrong.yaml");
    let right = std::fs::read_to_string(repo::root().join("examples/tiny.yaml"))?;
    std::fs::write(&file, right.replace("policy: Always", "policy: Sometimes").replace("replicas: 1", "replicaz: 1"))?;
    let file = file.to_string_lossy();
    let mut up = Up::start(&["-f", &file])?;
    assert_eq!(up.ended()?.code(), Some(1));
    let check = up.command(&["check", "-f", &file]).output()?;
    assert_eq!(check.status.code(), Some(1));
    for said in [up.stderr(), text(&check.stdout)] {
        assert!(said.contains("spec.disaggregation.policy: ") && said.contains("Always, Conditional, Never"), "{said}");
        assert!(said.contains("spec.prefill.replicaz: ") && said.contains("spec.decode.replicaz: "), "{said}");
    }
    nothing_is_left(&up);
    Ok(())
}

#[test]
fn a_broken_model_ends_in_the_workers_own_words_with_logs_and_without_key() -> Result<()> {
    let folder = repo::copy_of_demo_model()?;
    let weights = folder.path().join("model.safetensors");
    std::fs::File::options().write(true).open(&weights)?.set_len(100_000)?;
    let mut up = Up::start(&["--model", &folder.path().to_string_lossy(), "--prompt", "Once"])?;
    assert_eq!(up.ended()?.code(), Some(1));
    let said = up.stderr();
    assert!(said.contains("/worker exited with 1") && said.contains("model.safetensors"), "{said}");
    let kept = up.run_folders().pop().context("the logs are kept")?;
    assert!(said.contains(&format!("the logs are in {}", kept.display())), "{said}");
    let files: Vec<String> =
        std::fs::read_dir(kept)?.map(|entry| Ok(text(entry?.file_name().as_encoded_bytes()))).collect::<Result<_>>()?;
    assert!(
        files.iter().any(|name| name.ends_with("worker.log")) && !files.contains(&"signing.key".to_owned()),
        "{files:?}"
    );
    assert_eq!(up.processes(), []);
    Ok(())
}

#[test]
fn a_killed_worker_is_started_again_and_serves() -> Result<()> {
    let mut up = Up::start(TINY)?;
    let address = up.address()?;
    assert_eq!(path_of(&http::post(&address, "/v1/completions", &completion(4))?), "remote-prefill");
    for role in ["decode", "prefill"] {
        let before = up.worker(role)?;
        signal_process(before.pid, "KILL")?;
        wait("another worker takes its place", || Ok(up.worker(role).is_ok_and(|now| now.pid != before.pid)))?;
        wait("requests take the planned path again", || {
            let answer = http::post(&address, "/v1/completions", &completion(4))?;
            Ok(answer.status == 200 && path_of(&answer) == "remote-prefill")
        })?;
        let said = up.stderr();
        assert!(said.contains(&format!("tiny-{role}-0/worker killed by signal 9, starts again")), "{said}");
    }
    Ok(())
}

#[test]
fn sigterm_lets_a_running_stream_finish_and_exits_0() -> Result<()> {
    let mut up = Up::start(TINY)?;
    let address = up.address()?;
    let mut body = completion(400);
    body["stream"] = json!(true);
    let mut answer = http::post(&address, "/v1/completions", &body)?;
    answer.chunk()?.context("a first token")?;
    signal(&up.child, "TERM")?;
    wait("it drains", || Ok(up.stderr().contains("draining")))?;
    let rest = answer.text()?;
    assert!(rest.trim_end().ends_with("data: [DONE]"), "{rest}");
    assert!(up.ended()?.success(), "{}", up.stderr());
    nothing_is_left(&up);
    Ok(())
}

#[test]
fn status_and_chat_find_what_runs_and_a_killed_up_takes_everything_with_it() -> Result<()> {
    let mut up = Up::start(TINY)?;
    up.address()?;

    let status = up.command(&["status"]).output()?;
    let table = text(&status.stdout);
    assert!(status.status.success(), "{table}{}", text(&status.stderr));
    for row in ["tiny-prefill-0  ", "tiny-decode-0  "] {
        let row = table.lines().find(|line| line.starts_with(row)).with_context(|| format!("no {row}in {table}"))?;
        assert!(row.contains("  ready  "), "{row}");
    }

    let (code, answer) =
        chat(&up, "Tell me a story about a fox.\n\n/reset\nAnd one about a goat.\n/quit\nnever sent\n")?;
    assert_eq!(code, Some(0), "{answer}");
    assert_eq!(answer.lines().filter(|line| !line.trim().is_empty()).count(), 2, "one answer a message: {answer}");

    up.child.kill()?;
    up.ended()?;
    wait("no process outlives it", || Ok(up.processes().is_empty()))?;
    let (code, answer) = chat(&up, "Is anybody there?\n")?;
    assert_eq!(
        (code, answer.as_str()),
        (Some(1), "error: no `baton up` of yours runs on this machine; name a server with --url\n")
    );
    Ok(())
}

/// Exit code and all that was printed.
fn chat(up: &Up, input: &str) -> Result<(Option<i32>, String)> {
    let mut chat = up.command(&["chat", "--max-tokens", "8", "--temperature", "0"]);
    let mut chat = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let written = chat.stdin.take().context("piped")?.write_all(input.as_bytes());
    let Output { status, stdout, stderr } = chat.wait_with_output()?;
    // Who ends at once reads nothing.
    if status.success() {
        written?;
    }
    Ok((status.code(), text(&stdout) + &text(&stderr).replace("forgotten\n", "")))
}
