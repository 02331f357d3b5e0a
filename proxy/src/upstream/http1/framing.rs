//! Where the body of an answer ends (RFC 9112, sections 6 and 7), and its bytes without what frames them. Pure.

use bytes::{Buf as _, Bytes, BytesMut};

/// Bytes of chunk extensions and trailers in one answer, all of which are skipped. No engine sends any; the bound keeps one that
/// does from sending nothing else.
const SKIPPED_BYTES_MAX: usize = 16 << 10;

/// Hexadecimal digits of a chunk's size: 15 can't overflow, and a chunk of that size doesn't exist.
const SIZE_DIGITS_MAX: u8 = 15;

/// How the end of a body is known.
#[derive(Debug)]
pub(super) enum Framing {
    /// So many bytes are missing.
    Length(u64),
    Chunked(Chunked),
    /// It ends with the connection.
    UntilClose,
}

/// What is wrong with the chunks of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadChunk {
    /// No hexadecimal digits, or too many.
    #[error("a chunk without a valid size")]
    Size,
    /// A line or a chunk that does not end in CR LF.
    #[error("a chunk that does not end where its size says")]
    End,
    /// More than is skipped.
    #[error("more than {SKIPPED_BYTES_MAX} bytes of chunk extensions and trailers")]
    TooLong,
}

impl Framing {
    /// Takes what there is of the body: all pieces that lie in the buffer as one, so that what arrived together goes on together.
    /// Nothing of the body is left behind in the buffer; what follows its end is.
    pub(super) fn take(&mut self, buffer: &mut BytesMut) -> Result<Bytes, BadChunk> {
        match self {
            Framing::Length(missing) => {
                let here = usize::try_from(*missing).unwrap_or(usize::MAX).min(buffer.len());
                *missing -= here as u64;
                Ok(buffer.split_to(here).freeze())
            }
            Framing::Chunked(chunked) => chunked.take(buffer),
            Framing::UntilClose => Ok(buffer.split().freeze()),
        }
    }

    pub(super) fn is_done(&self) -> bool {
        match self {
            Framing::Length(missing) => *missing == 0,
            Framing::Chunked(chunked) => matches!(chunked.at, At::Done),
            Framing::UntilClose => false,
        }
    }
}

/// A body in chunks, read up to somewhere.
#[derive(Debug)]
pub(super) struct Chunked {
    at: At,
    skipped: usize,
}

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug)]
enum At {
    Size {
        size: u64,
        digits: u8,
    },
    /// Behind the size, up to the CR.
    Extension {
        size: u64,
    },
    /// The LF behind the size.
    SizeFeed {
        size: u64,
    },
    Data {
        missing: u64,
    },
    DataReturn,
    DataFeed,
    /// The first byte of a line behind the last chunk.
    TrailerStart,
    Trailer,
    TrailerFeed,
    LastFeed,
    Done,
}

impl Default for Chunked {
    fn default() -> Self {
        Chunked { at: At::Size { size: 0, digits: 0 }, skipped: 0 }
    }
}

impl Chunked {
    fn take(&mut self, buffer: &mut BytesMut) -> Result<Bytes, BadChunk> {
        // What has been read; and where the data lies, that of later chunks moved up to that of the first.
        let (mut read, mut start, mut end) = (0, None, 0);
        while read < buffer.len() && !matches!(self.at, At::Done) {
            let At::Data { missing } = self.at else {
                self.at = self.step(buffer[read])?;
                read += 1;
                continue;
            };
            let here = usize::try_from(missing).unwrap_or(usize::MAX).min(buffer.len() - read);
            match start {
                None => (start, end) = (Some(read), read + here),
                Some(_) => {
                    buffer.copy_within(read..read + here, end);
                    end += here;
                }
            }
            read += here;
            let missing = missing - here as u64;
            self.at = if missing == 0 { At::DataReturn } else { At::Data { missing } };
        }
        let Some(start) = start else {
            buffer.advance(read);
            return Ok(Bytes::new());
        };
        buffer.advance(start);
        let data = buffer.split_to(end - start).freeze();
        buffer.advance(read - end);
        Ok(data)
    }

    /// One byte that is not data.
    fn step(&mut self, byte: u8) -> Result<At, BadChunk> {
        Ok(match (self.at, byte) {
            (At::Size { size, digits }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') if digits < SIZE_DIGITS_MAX => {
                let digit = (byte as char).to_digit(16).expect("a hexadecimal digit");
                At::Size { size: size << 4 | u64::from(digit), digits: digits + 1 }
            }
            (At::Size { digits: 0, .. }, _) => return Err(BadChunk::Size),
            (At::Size { size, .. } | At::Extension { size }, b'\r') => At::SizeFeed { size },
            (At::Size { size, .. }, b';' | b' ' | b'\t') => At::Extension { size },
            (At::Size { .. }, _) => return Err(BadChunk::Size),
            // A bare LF is where readers disagree about the end of a line.
            (At::Extension { .. } | At::Trailer, b'\n') => return Err(BadChunk::End),
            (At::Extension { size }, _) => self.skip(At::Extension { size })?,
            (At::SizeFeed { size: 0 }, b'\n') => At::TrailerStart,
            (At::SizeFeed { size }, b'\n') => At::Data { missing: size },
            (At::DataReturn, b'\r') => At::DataFeed,
            (At::DataFeed, b'\n') => At::Size { size: 0, digits: 0 },
            (At::TrailerStart, b'\r') => At::LastFeed,
            (At::TrailerStart, b'\n') => return Err(BadChunk::End),
            (At::Trailer, b'\r') => At::TrailerFeed,
            (At::TrailerStart | At::Trailer, _) => self.skip(At::Trailer)?,
            (At::TrailerFeed, b'\n') => At::TrailerStart,
            (At::LastFeed, b'\n') => At::Done,
            (At::SizeFeed { .. } | At::DataReturn | At::DataFeed | At::TrailerFeed | At::LastFeed, _) => {
                return Err(BadChunk::End);
            }
            (At::Data { .. } | At::Done, _) => {
                unreachable!("data is taken by length, and nothing is read behind the end")
            }
        })
    }

    fn skip(&mut self, at: At) -> Result<At, BadChunk> {
        self.skipped += 1;
        if self.skipped > SKIPPED_BYTES_MAX { Err(BadChunk::TooLong) } else { Ok(at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What `text` carries if it arrives in these pieces, and what is left of it behind the body's end.
    fn taken(framing: &mut Framing, text: &[u8], pieces: &[usize]) -> Result<(Vec<Vec<u8>>, Vec<u8>), BadChunk> {
        let (mut frames, mut buffer, mut rest) = (Vec::new(), BytesMut::new(), text);
        for piece in pieces.iter().copied().chain([usize::MAX]) {
            let (now, later) = rest.split_at(piece.min(rest.len()));
            rest = later;
            buffer.extend_from_slice(now);
            let frame = framing.take(&mut buffer)?;
            if !frame.is_empty() {
                frames.push(frame.to_vec());
            }
            assert!(framing.is_done() || buffer.is_empty(), "nothing of a body stays behind");
        }
        Ok((frames, buffer.to_vec()))
    }

    fn chunked() -> Framing {
        Framing::Chunked(Chunked::default())
    }

    #[test]
    fn what_arrives_together_is_one_piece() {
        let text = b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: 1\r\n\r\nmore";
        let mut framing = chunked();
        let (frames, rest) = taken(&mut framing, text, &[]).expect("right");
        assert_eq!((frames, rest.as_slice(), framing.is_done()), (vec![b"abcde".to_vec()], &b"more"[..], true));
    }

    #[test]
    fn wrong_chunks_are_refused() {
        for (text, error) in [
            ("\r\n", BadChunk::Size),
            ("g\r\n", BadChunk::Size),
            ("-1\r\n", BadChunk::Size),
            ("0x1\r\n", BadChunk::Size),
            ("1g\r\n", BadChunk::Size),
            ("0000000000000001\r\n", BadChunk::Size),
            (";x\r\n", BadChunk::Size),
            ("1\n", BadChunk::Size),
            ("1;x\n", BadChunk::End),
            ("1\r\r", BadChunk::End),
            ("1\r\nab", BadChunk::End),
            ("1\r\na\n", BadChunk::End),
            ("1\r\na\r\r", BadChunk::End),
            ("0\r\n\n", BadChunk::End),
            ("0\r\nt: 1\n", BadChunk::End),
            ("0\r\nt: 1\r\r", BadChunk::End),
            ("0\r\n\r\r", BadChunk::End),
        ] {
            assert_eq!(taken(&mut chunked(), text.as_bytes(), &[]).map(|_| ()), Err(error), "{text:?}");
        }
    }

    #[test]
    fn extensions_and_trailers_are_skipped_up_to_a_bound() {
        for (before, after) in [("1;", "\r\na\r\n0\r\n\r\n"), ("0\r\n", "\r\n\r\n")] {
            let text = |skipped| [before, &"x".repeat(skipped), after].concat();
            let mut framing = chunked();
            assert!(taken(&mut framing, text(SKIPPED_BYTES_MAX).as_bytes(), &[]).is_ok() && framing.is_done());
            let longer = text(SKIPPED_BYTES_MAX + 2);
            assert_eq!(taken(&mut chunked(), longer.as_bytes(), &[]).map(|_| ()), Err(BadChunk::TooLong));
        }
    }

    #[test]
    fn a_body_without_a_frame_ends_with_its_connection() {
        let mut framing = Framing::UntilClose;
        let (frames, rest) = taken(&mut framing, b"abc", &[1]).expect("never wrong");
        assert_eq!((frames, rest.len(), framing.is_done()), (vec![b"a".to_vec(), b"bc".to_vec()], 0, false));
    }

    proptest! {
        #[test]
        fn a_body_is_the_same_however_it_is_cut(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..12),
            pieces in prop::collection::vec(1..30_usize, 0..40),
            upper in any::<bool>(),
            behind in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let whole = chunks.concat();
            let mut text = Vec::new();
            for chunk in &chunks {
                let size = if upper { format!("{:X}", chunk.len()) } else { format!("{:x}", chunk.len()) };
                text.extend_from_slice(&[size.as_bytes(), b"\r\n", chunk, b"\r\n"].concat());
            }
            text.extend_from_slice(b"0\r\n\r\n");
            for (mut framing, text) in [(chunked(), &text), (Framing::Length(whole.len() as u64), &whole)] {
                let all = [text.as_slice(), &behind].concat();
                let (frames, rest) = taken(&mut framing, &all, &pieces).expect("right");
                prop_assert!(framing.is_done());
                prop_assert_eq!(frames.concat(), whole.clone());
                prop_assert_eq!(&rest, &behind);
            }
        }

        #[test]
        fn no_text_is_read_beyond_its_end_or_makes_it_panic(
            text in prop::collection::vec(prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'0'), Just(b'2'), Just(b';'), Just(b'x')], 0..60),
            pieces in prop::collection::vec(1..9_usize, 0..20),
        ) {
            let (mut whole, mut cut) = (chunked(), chunked());
            let (at_once, in_pieces) = (taken(&mut whole, &text, &[]), taken(&mut cut, &text, &pieces));
            prop_assert_eq!(whole.is_done(), cut.is_done());
            match (at_once, in_pieces) {
                (Ok((left, left_rest)), Ok((right, right_rest))) => {
                    prop_assert_eq!((left.concat(), left_rest), (right.concat(), right_rest));
                }
                (left, right) => prop_assert_eq!(left.err(), right.err()),
            }
        }
    }
}
