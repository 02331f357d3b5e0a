//! HTTP/2 written by hand, frame by frame, so that what no library would send can be sent.

use super::WITHIN;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// A connection that has said what it speaks.
pub(crate) struct Connection(pub(crate) TcpStream);

/// A frame.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short payload").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header block of literals that are never indexed.
pub(crate) fn block(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let text = |text: &[u8]| {
        // A length takes 7 bits, and where they are not enough more bytes of 7 bits.
        let mut out = Vec::new();
        match text.len() {
            short @ 0..127 => out.push(short as u8),
            long => {
                out.push(127);
                let mut rest = long - 127;
                while rest >= 128 {
                    out.push((rest % 128) as u8 | 128);
                    rest /= 128;
                }
                out.push(rest as u8);
            }
        }
        [&out, text].concat()
    };
    fields.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

impl Connection {
    pub(crate) async fn open(address: &str) -> Self {
        let mut stream = TcpStream::connect(address).await.expect("a listening proxy");
        let hello = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &[])].concat();
        stream.write_all(&hello).await.expect("written");
        Connection(stream)
    }

    /// Writes; a proxy that has had enough may have closed meanwhile.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> bool {
        self.0.write_all(bytes).await.is_ok()
    }

    /// The next frame that is about requests; nothing at the end.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        tokio::time::timeout(WITHIN, async {
            loop {
                let mut head = [0; 9];
                self.0.read_exact(&mut head).await.ok()?;
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let mut payload = vec![0; length];
                self.0.read_exact(&mut payload).await.ok()?;
                let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
                let frame = Frame { kind: head[3], flags: head[4], stream, payload };
                match frame.kind {
                    SETTINGS if frame.flags & ACK == 0 => {
                        self.0.write_all(&self::frame(SETTINGS, ACK, 0, &[])).await.ok()?;
                    }
                    DATA | HEADERS | RST_STREAM | GOAWAY | PING => return Some(frame),
                    _ => {}
                }
            }
        })
        .await
        .expect("a frame or an end in time")
    }

    /// Reads until a stream has ended, in whatever way.
    pub(crate) async fn ends(&mut self, stream: u32) {
        while let Some(frame) = self.next().await {
            let is_over = match frame.kind {
                GOAWAY => true,
                RST_STREAM => frame.stream == stream,
                DATA | HEADERS => frame.stream == stream && frame.flags & END_STREAM != 0,
                _ => false,
            };
            if is_over {
                return;
            }
        }
    }
}
