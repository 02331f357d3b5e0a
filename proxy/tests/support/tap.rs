//! What really goes over the wire to a worker: a relay before it that keeps every byte, and a parser that allows for nothing.

use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A relay before a worker. Dropped, it closes all its connections.
pub(crate) struct Tap {
    pub(crate) address: String,
    connections: Arc<Mutex<Vec<Vec<u8>>>>,
    _relaying: JoinSet<()>,
}

/// A request as it came, byte for byte.
#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) line: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Tap {
    pub(crate) async fn before(worker: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let connections = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let kept = Arc::clone(&connections);
        let mut relaying = JoinSet::new();
        relaying.spawn(async move {
            let mut relays = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let number = {
                    let mut kept = kept.lock().expect("unpoisoned");
                    kept.push(Vec::new());
                    kept.len() - 1
                };
                relays.spawn(relay(stream, worker.clone(), number, Arc::clone(&kept)));
            }
        });
        Tap { address, connections, _relaying: relaying }
    }

    /// All requests so far. Fails where a byte is not part of a well-formed one.
    pub(crate) fn requests(&self) -> Vec<Raw> {
        self.connections.lock().expect("unpoisoned").iter().flat_map(|bytes| parse(bytes)).collect()
    }
}

async fn relay(stream: TcpStream, worker: String, number: usize, kept: Arc<Mutex<Vec<Vec<u8>>>>) {
    let Ok(worker) = TcpStream::connect(worker).await else { return };
    let ((mut from, mut back), (mut answers, mut to)) = (stream.into_split(), worker.into_split());
    let there = async {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            kept.lock().expect("unpoisoned")[number].extend_from_slice(&buffer[..length]);
            if to.write_all(&buffer[..length]).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = there => {}
        _ = tokio::io::copy(&mut answers, &mut back) => {}
    }
}

fn parse(mut bytes: &[u8]) -> Vec<Raw> {
    let mut requests = Vec::new();
    while !bytes.is_empty() {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a whole head");
        let head = std::str::from_utf8(&bytes[..end]).expect("text");
        bytes = &bytes[end + 4..];
        assert!(!head.replace("\r\n", "").contains(['\r', '\n', '\0']), "a stray control character: {head:?}");
        let mut lines = head.split("\r\n");
        let line = lines.next().expect("a request line").to_owned();
        let parts: Vec<&str> = line.split(' ').collect();
        assert!(matches!(parts[..], ["GET" | "POST", path, "HTTP/1.1"] if path.starts_with('/')), "{line:?}");
        let headers: Vec<(String, String)> = lines
            .map(|line| line.split_once(": ").unwrap_or_else(|| panic!("no header: {line:?}")))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let all = |name: &str| -> Vec<&str> {
            headers.iter().filter(|(given, _)| given == name).map(|(_, value)| value.as_str()).collect()
        };
        assert_eq!(all("host").len(), 1, "{head:?}");
        assert_eq!(all("transfer-encoding").len(), 0, "{head:?}");
        let length = match all("content-length")[..] {
            [] => 0,
            [length] => length.parse().expect("a number"),
            _ => panic!("two lengths: {head:?}"),
        };
        assert!(bytes.len() >= length, "a body that was cut: {head:?}");
        requests.push(Raw { line, headers, body: bytes[..length].to_vec() });
        bytes = &bytes[length..];
    }
    requests
}
