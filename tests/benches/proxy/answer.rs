//! An HTTP/1.1 answer, read piece by piece as it comes: its status, where its body ends, and how many tokens are in it.

use anyhow::{Context, Result, bail};

/// Longest head that is read: a hundred times what any of them sends.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// What has come of an answer.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    raw: Vec<u8>,
    /// How much of `raw` has been understood.
    read: usize,
    head: Option<Head>,
    pub(crate) body: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    status: u16,
    body: Framing,
}

/// How the end of a body is told.
#[derive(Clone, Copy, Debug)]
enum Framing {
    Length(usize),
    Chunked,
}

impl Answer {
    /// For the next answer on the same connection; the memory is kept.
    pub(crate) fn clear(&mut self) {
        self.raw.clear();
        self.read = 0;
        self.head = None;
        self.body.clear();
    }

    /// Where the next bytes of the connection go; `advance` reads them.
    pub(crate) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.raw
    }

    pub(crate) fn status(&self) -> u16 {
        self.head.map_or(0, |head| head.status)
    }

    /// Reads what has come. True at the end of the answer.
    pub(crate) fn advance(&mut self) -> Result<bool> {
        if self.head.is_none() {
            let Some(end) = find(&self.raw, b"\r\n\r\n") else {
                if self.raw.len() > HEAD_BYTES_MAX {
                    bail!("a head without end");
                }
                return Ok(false);
            };
            self.head = Some(Head::parse(&self.raw[..end])?);
            self.read = end + 4;
        }
        let Some(head) = self.head else { return Ok(false) };
        match head.body {
            Framing::Length(length) => {
                self.body.extend_from_slice(&self.raw[self.read..]);
                self.read = self.raw.len();
                if self.body.len() > length {
                    bail!("{} bytes after an answer", self.body.len() - length);
                }
                Ok(self.body.len() == length)
            }
            Framing::Chunked => self.chunks(),
        }
    }

    /// Reads the chunks that are there whole.
    fn chunks(&mut self) -> Result<bool> {
        loop {
            let rest = &self.raw[self.read..];
            let Some(end) = find(rest, b"\r\n") else { return Ok(false) };
            let size = std::str::from_utf8(&rest[..end])?.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(size, 16).with_context(|| format!("{size:?} is no length of a chunk"))?;
            let whole = end + 2 + size + 2;
            if rest.len() < whole {
                return Ok(false);
            }
            self.body.extend_from_slice(&rest[end + 2..end + 2 + size]);
            self.read += whole;
            // Nobody here sends trailers: then the line after the last chunk is empty, and was counted as its end.
            if size == 0 {
                return Ok(true);
            }
        }
    }

    /// How many tokens the body says that it has.
    ///
    /// # Errors
    /// When the body doesn't end as it should.
    pub(crate) fn tokens(&self, streams: bool) -> Result<usize> {
        if streams {
            if !self.body.trim_ascii_end().ends_with(b"data: [DONE]") {
                bail!("a stream that does not end with [DONE]");
            }
            return Ok(self.body.split(|byte| *byte == b'\n').filter(|line| has_content(line)).count());
        }
        let name = b"\"completion_tokens\":";
        let start = find(&self.body, name).context("an answer without usage")? + name.len();
        let digits = self.body[start..].trim_ascii_start();
        let end = digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
        Ok(std::str::from_utf8(&digits[..end])?.parse()?)
    }
}

impl Head {
    fn parse(head: &[u8]) -> Result<Self> {
        let head = std::str::from_utf8(head).context("a head that is no text")?;
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).and_then(|line| line.get(..3));
        let status = status.and_then(|status| status.parse().ok()).context("no status line")?;
        let mut body = None;
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            if name.eq_ignore_ascii_case("content-length") {
                body = Some(Framing::Length(value.trim().parse().context("content-length")?));
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                body = Some(Framing::Chunked);
            }
        }
        Ok(Head { status, body: body.context("an answer whose end is not told")? })
    }
}

/// Whether a line of a stream has text of the answer in it: the first chunk of a chat names the role alone, and the last ones
/// may say why it ends and what was used.
fn has_content(line: &[u8]) -> bool {
    const NAME: &[u8] = b"\"content\":\"";
    line.starts_with(b"data: {")
        && find(line, NAME).is_some_and(|start| line.get(start + NAME.len()).is_some_and(|byte| *byte != b'"'))
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}
