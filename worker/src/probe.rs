//! The question of a pod's probes, asked from inside the pod: the worker's HTTP port is bound to loopback there, which a kubelet
//! can't reach.
//!
//! A probe is a process every few seconds, so it starts no runtime and no thread, and its waits are those of one socket.

use crate::args::{ProbeArgs, ProbeKind};
use baton_wire::names::paths;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Bytes of the answer that are read: a head of some lines and a body of one word.
const ANSWER_BYTES_MAX: u64 = 4 << 10;

/// Characters of the worker's own word that are shown.
const WORD_CHARACTERS_MAX: usize = 100;

/// Why the worker is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Nobody answers.
    #[error("nobody answers at {address}: {source}")]
    Silent {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// It says no.
    #[error("{address}{path} answers {status}: {word}")]
    No {
        /// Where.
        address: SocketAddr,
        /// What was asked.
        path: &'static str,
        /// HTTP status.
        status: u16,
        /// What it says besides.
        word: String,
    },
    /// Whoever listens there is no worker.
    #[error("what {address} answers is not HTTP: is another program listening there?")]
    NotHttp {
        /// Where.
        address: SocketAddr,
    },
}

/// Asks once.
///
/// # Errors
/// Why the worker is not what it should be.
pub fn probe(args: &ProbeArgs) -> Result<String, ProbeError> {
    let address = SocketAddr::new(args.host, args.port);
    let path = match args.what {
        ProbeKind::Live => paths::HEALTH,
        ProbeKind::Ready => paths::READY,
    };
    let deadline = Instant::now() + Duration::from_secs(args.timeout_seconds);
    let answer = ask(address, path, deadline).map_err(|source| ProbeError::Silent { address, source })?;
    let (status, word) = parse(&answer).ok_or(ProbeError::NotHttp { address })?;
    if status == 200 { Ok(word) } else { Err(ProbeError::No { address, path, status, word }) }
}

fn ask(address: SocketAddr, path: &str, deadline: Instant) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, left(deadline)?)?;
    stream.set_write_timeout(Some(left(deadline)?))?;
    // In one piece: write! would send each part of the format by itself.
    let question = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(question.as_bytes())?;
    let mut answer = Vec::new();
    let mut piece = [0; 1024];
    while (answer.len() as u64) < ANSWER_BYTES_MAX {
        // Set anew for each piece, so that a dribble does not outlive the deadline.
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut piece)? {
            0 => break,
            read => answer.extend_from_slice(&piece[..read]),
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// The time that is left. A socket's timeout must not be zero, which would mean none.
fn left(deadline: Instant) -> std::io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(std::io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

/// The status and the first line of the body.
fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    let word = body.lines().next().unwrap_or_default().chars().take(WORD_CHARACTERS_MAX);
    Some((status, word.filter(|character| !character.is_control()).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// What a probe makes of a server that answers so, or takes the question and says nothing.
    fn asked(answer: Option<&'static str>) -> Result<String, ProbeError> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a probe");
            let mut question = [0; 256];
            let read = stream.read(&mut question).expect("a question");
            match answer {
                Some(answer) => stream.write_all(answer.as_bytes()).expect("it reads"),
                // Until the probe has hung up.
                None => drop(stream.read(&mut question)),
            }
            String::from_utf8_lossy(&question[..read]).into_owned()
        });
        let args = ProbeArgs { what: ProbeKind::Ready, host: address.ip(), port: address.port(), timeout_seconds: 1 };
        let outcome = probe(&args);
        let question = server.join().expect("it was asked");
        assert!(question.starts_with("GET /ready HTTP/1.1\r\n"), "{question}");
        outcome
    }

    #[test]
    fn the_worker_is_taken_at_its_word() {
        let ready = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nready\n";
        assert_eq!(asked(Some(ready)).expect("it is ready"), "ready");
        let loading = "HTTP/1.1 503 Service Unavailable\r\n\r\nloading\n";
        let error = asked(Some(loading)).expect_err("it is not").to_string();
        assert!(error.ends_with("/ready answers 503: loading"), "{error}");
        assert!(matches!(asked(Some("SSH-2.0-x\r\n\r\n")), Err(ProbeError::NotHttp { .. })));
        assert!(matches!(asked(Some("")), Err(ProbeError::NotHttp { .. })));
    }

    #[test]
    fn who_does_not_answer_in_time_is_not_waited_for() {
        let error = asked(None).expect_err("it says nothing").to_string();
        assert!(error.starts_with("nobody answers at 127.0.0.1:"), "{error}");
    }

    #[test]
    fn a_port_without_a_listener_is_named() {
        let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
        let args = ProbeArgs { what: ProbeKind::Live, host: address.ip(), port: address.port(), timeout_seconds: 1 };
        let error = probe(&args).expect_err("nobody listens").to_string();
        assert!(error.contains(&address.to_string()) && error.contains("refused"), "{error}");
    }
}
