//! The program itself: exit statuses and last words.

use baton_wire::signing::KeyTexts;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

fn program(key: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton-proxy"));
    command.args([
        "--revision",
        "r1",
        "--listen",
        "127.0.0.1:0",
        "--admin-listen",
        "127.0.0.1:0",
        "--log-format",
        "json",
    ]);
    command.arg("--signing-key-file").arg(key).stderr(Stdio::piped());
    command
}

#[test]
fn the_last_line_is_plain_and_says_what_to_do() {
    let dir = tempfile::tempdir().expect("a directory");
    let wrong = dir.path().join("wrong");
    std::fs::write(&wrong, "no key").expect("written");
    let engine = ["--engine", "http://127.0.0.1:8200"];
    for (key, flags, status, says) in [
        (Path::new("/no/key"), &engine[..], 1, &["--signing-key-file /no/key", "signing.key", "No such file"][..]),
        (&wrong, &engine, 1, &["holds no key", "baton keygen", "64 hexadecimal digits"]),
        (&wrong, &[], 2, &["--discover-dns"]),
        (&wrong, &["--connector", "vllm-nixl", "--engine", "http://127.0.0.1:8200"], 2, &["--role prefill, decode"]),
        (&wrong, &["--discover-dns", "peers.ns.svc"], 2, &["--discover-dns is HOST:PORT"]),
    ] {
        let output = program(key).args(flags).output().expect("the program runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.starts_with("baton-proxy: ") && says.iter().all(|says| last.contains(says)), "{last}");
    }
}

#[test]
fn a_key_that_a_group_may_read_is_as_good_as_another() {
    let dir = tempfile::tempdir().expect("a directory");
    let key = dir.path().join("signing.key");
    std::fs::write(&key, KeyTexts::from_secret(&[3; 32]).signing).expect("written");
    // As Secrets are mounted for a pod's group.
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o440)).expect("ours");
    let names = ["--discover-dns", "127.0.0.1:1", "--discover-dns", "[::1]:1"];
    let mut child = program(&key).args(names).spawn().expect("the program starts");
    let log = BufReader::new(child.stderr.take().expect("it is piped"));
    let listens = log.lines().any(|line| line.expect("a line").contains("listening"));
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    assert!(listens);
}
