//! The `baton` program as it is called: exit codes, what it says of wrong manifests, and children that end with it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Output, Stdio};

fn baton(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_baton")).args(args).output().expect("the program runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn check(manifest: &str) -> (Option<i32>, String) {
    let mut file = tempfile::NamedTempFile::with_suffix(".yaml").expect("a file");
    file.write_all(manifest.as_bytes()).expect("written");
    let path = file.path().display().to_string();
    let output = baton(&["check", "-f", &path]);
    (output.status.code(), (text(&output.stdout) + &text(&output.stderr)).replace(&path, "FILE"))
}

#[test]
fn check_tells_every_mistake_and_exits_1() {
    let right = "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {name: a}\nspec: {model: {uri: pvc://m}}\n";
    assert_eq!(check(right), (Some(0), "FILE: a: valid\n".to_owned()));
    let wrong = right.replace("name: a", "name: A").replace("spec: {", "spec: {prefill: {replicas: 0},\n  ");
    let (code, told) = check(&format!("{right}---\n{wrong}"));
    assert_eq!(code, Some(1));
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines.len(), 3, "{told}");
    assert!(lines[1].starts_with("FILE:8: metadata.name: \"A\": "), "{told}");
    assert!(lines[2].starts_with("FILE:9: spec.prefill.replicas: "), "{told}");
}

#[test]
fn a_missing_file_and_a_missing_model_are_told_with_what_to_do() {
    let output = baton(&["check", "-f", "/nonexistent/x.yaml"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("/nonexistent/x.yaml: cannot be read"), "{}", text(&output.stderr));
    let output = baton(&["up", "--model", "/nonexistent/model"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no such directory"), "{}", text(&output.stderr));
}

#[test]
fn a_line_that_is_too_long_for_a_message_is_refused_whole() {
    let mut chat = Command::new(env!("CARGO_BIN_EXE_baton"))
        .args(["chat", "--url", "http://127.0.0.1:1", "--model", "m"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    // It reads no further than the longest message.
    let _ = chat.stdin.take().expect("piped").write_all(&vec![b'x'; (1 << 20) + 1]);
    let output = chat.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("a line is longer than 1024 KiB"), "{}", text(&output.stderr));
}

#[test]
fn an_address_that_is_no_plain_http_url_is_told_apart_from_silence() {
    for (url, told) in [
        ("https://127.0.0.1:1", "not an URL of the form http://HOST:PORT"),
        ("localhost:1", "not an URL of the form http://HOST:PORT"),
        ("http://127.0.0.1:1", "no answer"),
    ] {
        let output = baton(&["status", "--url", url]);
        assert_eq!(output.status.code(), Some(1), "{url}");
        assert!(text(&output.stdout).contains(told), "{url}: {}", text(&output.stdout));
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_tied_program_is_killed_with_its_parent() {
    // The shell is the parent: it starts `baton __exec`, which becomes a sleep, and is then killed.
    let script =
        format!("{} __exec --parent $$ -- /bin/sh -c 'echo $$; exec sleep 600' & wait", env!("CARGO_BIN_EXE_baton"));
    let mut shell = Command::new("/bin/sh").args(["-c", &script]).stdout(Stdio::piped()).spawn().expect("a shell");
    let mut output = BufReader::new(shell.stdout.take().expect("piped"));
    let mut child = String::new();
    output.read_line(&mut child).expect("the child says its number");
    assert!(child.trim().parse::<u32>().is_ok(), "{child:?}");
    shell.kill().expect("it runs");
    shell.wait().expect("it ends");
    // The child holds the pipe's other end: its end is the pipe's end.
    assert_eq!(output.read_line(&mut String::new()).expect("readable"), 0);
}

#[test]
#[cfg(target_os = "linux")]
fn an_orphan_is_never_started() {
    let output = baton(&["__exec", "--parent", "1", "--", "/bin/echo", "started"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stdout), "");
}
