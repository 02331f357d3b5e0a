//! A plain blocking HTTP/1.1 client: small enough that a test shows exactly which bytes went out and came back.

use anyhow::{Context, Result, bail, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Longest wait for one read: longer than any deadline inside Baton that a test provokes.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// An answer whose body is still to be read.
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Header names (lower case) and values.
    pub headers: Vec<(String, String)>,
    body: Body,
}

enum Body {
    Chunked(BufReader<TcpStream>),
    Sized(BufReader<TcpStream>, u64),
}

impl Answer {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The next piece of the body as it came, `None` at its end.
    ///
    /// # Errors
    /// When the connection breaks before the body's end.
    pub fn chunk(&mut self) -> Result<Option<Vec<u8>>> {
        match &mut self.body {
            Body::Sized(_, 0) => Ok(None),
            Body::Sized(reader, left) => {
                let mut bytes = vec![0; usize::try_from(*left)?];
                reader.read_exact(&mut bytes).context("body ended early")?;
                *left = 0;
                Ok(Some(bytes))
            }
            Body::Chunked(reader) => {
                let mut line = String::new();
                ensure!(reader.read_line(&mut line)? > 0, "connection closed before the last chunk");
                let size = usize::from_str_radix(line.trim(), 16).with_context(|| format!("chunk size {line:?}"))?;
                let mut bytes = vec![0; size + 2];
                reader.read_exact(&mut bytes).context("chunk ended early")?;
                bytes.truncate(size);
                Ok((size > 0).then_some(bytes))
            }
        }
    }

    /// The rest of the body as text.
    ///
    /// # Errors
    /// When the connection breaks or the body is no UTF-8.
    pub fn text(mut self) -> Result<String> {
        let mut all = Vec::new();
        while let Some(bytes) = self.chunk()? {
            all.extend(bytes);
        }
        Ok(String::from_utf8(all)?)
    }

    /// The rest of the body as JSON.
    ///
    /// # Errors
    /// When the connection breaks or the body is no JSON.
    pub fn json(self) -> Result<serde_json::Value> {
        let text = self.text()?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text:?}"))
    }
}

/// Sends one request on a connection of its own. `address` is `ip:port`. A body is JSON unless `headers` say otherwise.
///
/// # Errors
/// When nobody answers, or not in HTTP/1.1.
pub fn send(
    method: &str,
    address: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: impl AsRef<[u8]>,
) -> Result<Answer> {
    let body = body.as_ref();
    let mut stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
    if !body.is_empty() {
        head += &format!("content-length: {}\r\n", body.len());
        if headers.iter().all(|(name, _)| *name != "content-type") {
            head += "content-type: application/json\r\n";
        }
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    stream.write_all(body)?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let Some(status) = line.split(' ').nth(1).and_then(|code| code.parse().ok()) else {
        bail!("no HTTP answer from {address}: {line:?}");
    };
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let find = |wanted: &str| headers.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.clone());
    let body = if find("transfer-encoding").is_some_and(|value| value.contains("chunked")) {
        Body::Chunked(reader)
    } else {
        let length = find("content-length").map_or(Ok(0), |value| value.parse()).context("content-length")?;
        Body::Sized(reader, length)
    };
    Ok(Answer { status, headers, body })
}

/// Posts JSON.
///
/// # Errors
/// As [`send`].
pub fn post(address: &str, path: &str, body: &serde_json::Value) -> Result<Answer> {
    send("POST", address, path, &[], body.to_string())
}

/// Gets a path.
///
/// # Errors
/// As [`send`].
pub fn get(address: &str, path: &str) -> Result<Answer> {
    send("GET", address, path, &[], "")
}
