//! One client's connection, which is kept: a request goes out, its answer is read to the end. As little as that takes, because
//! the engines run on the same core.

use crate::answer::Answer;
use anyhow::{Result, ensure};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Nothing takes longer that is not stuck.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct Connection {
    address: SocketAddr,
    stream: Option<TcpStream>,
    answer: Answer,
}

/// When what came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// From the request to the first byte of the answer's body.
    pub(crate) first: Duration,
    /// From the request to the end of the answer.
    pub(crate) whole: Duration,
}

impl Connection {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Connection { address, stream: None, answer: Answer::default() }
    }

    /// Sends a request and reads its answer, which must be good and have so many tokens.
    ///
    /// # Errors
    /// When it isn't; the next request gets another connection then.
    pub(crate) async fn ask(&mut self, request: &[u8], streams: bool, tokens: usize) -> Result<Timing> {
        let asked = self.exchange(request).await;
        let timing = asked.inspect_err(|_| self.stream = None)?;
        let body = || String::from_utf8_lossy(&self.answer.body[..self.answer.body.len().min(300)]).into_owned();
        ensure!(self.answer.status() == 200, "status {}: {}", self.answer.status(), body());
        let found = self.answer.tokens(streams)?;
        ensure!(found == tokens, "{found} tokens instead of {tokens}: {}", body());
        Ok(timing)
    }

    /// Asks for something small that has no body: what the answer's body is.
    pub(crate) async fn get(&mut self, path: &str) -> Result<Vec<u8>> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: engine\r\n\r\n");
        self.exchange(request.as_bytes()).await.inspect_err(|_| self.stream = None)?;
        ensure!(self.answer.status() == 200, "status {}", self.answer.status());
        Ok(self.answer.body.clone())
    }

    async fn exchange(&mut self, request: &[u8]) -> Result<Timing> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => {
                let stream = TcpStream::connect(self.address).await?;
                stream.set_nodelay(true)?;
                none.insert(stream)
            }
        };
        self.answer.clear();
        let (start, mut first) = (Instant::now(), None);
        stream.write_all(request).await?;
        loop {
            let read = tokio::time::timeout(PATIENCE, stream.read_buf(self.answer.buffer())).await??;
            ensure!(read > 0, "the connection was closed");
            let is_over = self.answer.advance()?;
            if first.is_none() && !self.answer.body.is_empty() {
                first = Some(start.elapsed());
            }
            if is_over {
                let whole = start.elapsed();
                return Ok(Timing { first: first.unwrap_or(whole), whole });
            }
        }
    }
}
