//! The part of ZMTP 3.0 that reading events takes (<https://rfc.zeromq.org/spec/23/>): a client's side of one connection over
//! TCP, without encryption, as a SUB or a DEALER socket.
//!
//! Ours and not the crate `zeromq`: that takes a frame as long as its sender claims, whatever that costs in memory, and brings
//! six crates that nothing else here needs. libzmq on the other side (4.3, under vLLM) speaks 3.1 and stoops to 3.0; PING and
//! PONG are of 3.1, and libzmq answers them all the same.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Most bytes of one message, its frames' headers aside: a batch of events with its topic and number.
const MESSAGE_BYTES_MAX: usize = super::vllm::BATCH_BYTES_MAX + 4096;

/// Most frames of one message: vLLM's have three.
const FRAMES_MAX: usize = 8;

/// Most bytes of a command: a greeting's properties, or a ping with its context of at most 16 bytes.
const COMMAND_BYTES_MAX: usize = 4096;

/// For the TCP connection and both sides' greetings: a peer in the same cluster that takes longer is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Silence after which the other side is asked for a sign of life. Once one has come, as much silence again after the next
/// question means that the connection is dead; without this an engine whose machine vanished would be followed for ever.
const PING_AFTER: Duration = Duration::from_secs(15);

const GREETING_LEN: usize = 64;
const FLAG_MORE: u8 = 1;
const FLAG_LONG: u8 = 2;
const FLAG_COMMAND: u8 = 4;

/// Why a connection can't be used, or no further.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ZmqError {
    /// The socket failed.
    #[error("the connection failed")]
    Io(#[from] std::io::Error),
    /// The other side closed it.
    #[error("the other side closed the connection")]
    Closed,
    /// It took too long.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The other side is no ZeroMQ, an old one, or wants credentials.
    #[error("the other side does not speak ZMTP 3 without credentials")]
    Greeting,
    /// The other side refused us.
    #[error("the other side refused the connection: {0}")]
    Refused(String),
    /// A frame that ZMTP does not allow.
    #[error("a frame does not follow ZMTP")]
    Frame,
    /// A message beyond our bounds.
    #[error("a message has more than {FRAMES_MAX} frames or {MESSAGE_BYTES_MAX} bytes")]
    TooLarge,
}

/// What kind of socket we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketType {
    /// Receives what a PUB sends.
    Sub,
    /// Asks a ROUTER.
    Dealer,
}

impl SocketType {
    const fn as_str(self) -> &'static str {
        match self {
            SocketType::Sub => "SUB",
            SocketType::Dealer => "DEALER",
        }
    }
}

/// A connection after its greetings.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    input: BytesMut,
    /// What is to be sent before anything else is read. Kept here, so that a reader that is dropped half-way leaves no half
    /// frame behind.
    output: BytesMut,
    /// The frames of a message that is not complete.
    frames: Vec<Bytes>,
    has_answered_ping: bool,
    is_ping_open: bool,
}

/// One frame as it was received.
struct Frame {
    is_command: bool,
    has_more: bool,
    body: Bytes,
}

impl Connection {
    /// Connects to `address` (`host:port`) and exchanges greetings.
    ///
    /// # Errors
    /// When that can't be done in five seconds.
    pub(crate) async fn connect(address: &str, socket_type: SocketType) -> Result<Self, ZmqError> {
        let connected = timeout(CONNECT_TIMEOUT, Self::connect_unhurried(address, socket_type)).await;
        connected.map_err(|_| ZmqError::Timeout(CONNECT_TIMEOUT))?
    }

    async fn connect_unhurried(address: &str, socket_type: SocketType) -> Result<Self, ZmqError> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let mut connection = Connection {
            stream,
            input: BytesMut::new(),
            output: BytesMut::from(&greeting()[..]),
            frames: Vec::new(),
            has_answered_ping: false,
            is_ping_open: false,
        };
        connection.flush().await?;
        while connection.input.len() < GREETING_LEN {
            connection.read().await?;
        }
        if !is_greeting(&connection.input.split_to(GREETING_LEN)) {
            return Err(ZmqError::Greeting);
        }
        connection.put_frame(FLAG_COMMAND, &ready(socket_type));
        connection.flush().await?;
        let answer = connection.frame().await?;
        match command(&answer.body).filter(|_| answer.is_command) {
            Some((b"READY", _)) => Ok(connection),
            Some((b"ERROR", reason)) => {
                let reason = reason.get(1..).unwrap_or_default();
                Err(ZmqError::Refused(String::from_utf8_lossy(reason).chars().filter(|c| !c.is_control()).collect()))
            }
            _ => Err(ZmqError::Greeting),
        }
    }

    /// As a SUB: asks for all messages whose first frame begins with `topic`.
    ///
    /// # Errors
    /// When the connection fails.
    pub(crate) async fn subscribe(&mut self, topic: &str) -> Result<(), ZmqError> {
        // In ZMTP 3.0 a subscription is a message that begins with 1.
        self.put_frame(0, &[&[1], topic.as_bytes()].concat());
        self.flush().await
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the connection fails.
    pub(crate) async fn send(&mut self, frames: &[&[u8]]) -> Result<(), ZmqError> {
        for (index, frame) in frames.iter().enumerate() {
            let flags = if index + 1 < frames.len() { FLAG_MORE } else { 0 };
            self.put_frame(flags, frame);
        }
        self.flush().await
    }

    /// The next message, however long it takes to come, but not from a connection that is dead. It can be dropped and called again.
    ///
    /// # Errors
    /// When the connection fails or the other side does not keep to the protocol.
    pub(crate) async fn receive(&mut self) -> Result<Vec<Bytes>, ZmqError> {
        loop {
            match timeout(PING_AFTER, self.message()).await {
                Ok(message) => return message,
                Err(_) if self.is_ping_open && self.has_answered_ping => {
                    return Err(ZmqError::Timeout(PING_AFTER));
                }
                Err(_) if self.is_ping_open => {}
                Err(_) => {
                    self.is_ping_open = true;
                    // The name, and a time to live of none: the other side is not to count on ours.
                    self.put_frame(FLAG_COMMAND, b"\x04PING\0\0");
                }
            }
        }
    }

    async fn message(&mut self) -> Result<Vec<Bytes>, ZmqError> {
        loop {
            let frame = self.frame().await?;
            // Whatever comes is a sign of life.
            if frame.is_command {
                match command(&frame.body) {
                    Some((b"PING", rest)) if rest.len() >= 2 => {
                        let pong = [b"\x04PONG", &rest[2..]].concat();
                        self.put_frame(FLAG_COMMAND, &pong);
                    }
                    Some((b"PONG", _)) => {
                        self.has_answered_ping = true;
                        self.is_ping_open = false;
                    }
                    Some(_) => {}
                    None => return Err(ZmqError::Frame),
                }
                continue;
            }
            self.is_ping_open = self.is_ping_open && !self.has_answered_ping;
            self.frames.push(frame.body);
            if !frame.has_more {
                return Ok(std::mem::take(&mut self.frames));
            }
            if self.frames.len() >= FRAMES_MAX {
                return Err(ZmqError::TooLarge);
            }
        }
    }

    /// The next frame. What has arrived of it stays when this is dropped.
    async fn frame(&mut self) -> Result<Frame, ZmqError> {
        loop {
            self.flush().await?;
            let held: usize = self.frames.iter().map(Bytes::len).sum();
            if let Some(frame) = parse(&mut self.input, MESSAGE_BYTES_MAX - held.min(MESSAGE_BYTES_MAX))? {
                return Ok(frame);
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<(), ZmqError> {
        match self.stream.read_buf(&mut self.input).await? {
            0 => Err(ZmqError::Closed),
            _ => Ok(()),
        }
    }

    async fn flush(&mut self) -> Result<(), ZmqError> {
        while self.output.has_remaining() {
            self.stream.write_buf(&mut self.output).await?;
        }
        Ok(())
    }

    fn put_frame(&mut self, flags: u8, body: &[u8]) {
        match u8::try_from(body.len()) {
            Ok(len) => self.output.put_slice(&[flags, len]),
            Err(_) => {
                self.output.put_u8(flags | FLAG_LONG);
                self.output.put_u64(body.len() as u64);
            }
        }
        self.output.put_slice(body);
    }
}

/// Takes a whole frame off the input; `None` where more has to arrive.
fn parse(input: &mut BytesMut, bytes_max: usize) -> Result<Option<Frame>, ZmqError> {
    let Some(&flags) = input.first() else { return Ok(None) };
    if flags & !(FLAG_MORE | FLAG_LONG | FLAG_COMMAND) != 0
        || flags & (FLAG_MORE | FLAG_COMMAND) == (FLAG_MORE | FLAG_COMMAND)
    {
        return Err(ZmqError::Frame);
    }
    let is_command = flags & FLAG_COMMAND != 0;
    let mut rest = &input[1..];
    let len = match flags & FLAG_LONG {
        0 => rest.try_get_u8().map(u64::from),
        _ => rest.try_get_u64(),
    };
    let Ok(len) = len else { return Ok(None) };
    let bytes_max = if is_command { bytes_max.min(COMMAND_BYTES_MAX) } else { bytes_max };
    let len = usize::try_from(len).ok().filter(|&len| len <= bytes_max).ok_or(ZmqError::TooLarge)?;
    let head = input.len() - rest.len();
    if rest.len() < len {
        // No more than the bound, and only after it was checked.
        input.reserve(head + len - input.len());
        return Ok(None);
    }
    input.advance(head);
    Ok(Some(Frame { is_command, has_more: flags & FLAG_MORE != 0, body: input.split_to(len).freeze() }))
}

/// Name and content of a command.
fn command(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&len, rest) = body.split_first()?;
    rest.split_at_checked(usize::from(len))
}

fn greeting() -> [u8; GREETING_LEN] {
    let mut greeting = [0; GREETING_LEN];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

fn is_greeting(bytes: &[u8]) -> bool {
    bytes[0] == 0xff && bytes[9] & 1 == 1 && bytes[10] >= 3 && bytes[12..32].starts_with(b"NULL\0")
}

fn ready(socket_type: SocketType) -> Vec<u8> {
    let name = socket_type.as_str().as_bytes();
    [b"\x05READY\x0bSocket-Type", &(name.len() as u32).to_be_bytes()[..], name].concat()
}

#[cfg(test)]
pub(super) mod tests;
