//! The grammar of JSON (RFC 8259): reads forward through a text, checks all of it, and notes what lies outermost.

use std::ops::Range;

/// The deepest bound that can be asked for: what is open is kept as one bit a level.
pub(super) const DEPTH_CEILING: usize = u128::BITS as usize;

/// Members of one object that are noted at most. The longest API has about 80 fields; the bound keeps a body of `"":0,`
/// from costing ten times its size.
pub(super) const MEMBERS_MAX: usize = 1024;

/// Elements of one array that are noted at most: a batch of prompts, or a batch's answers.
pub(super) const ELEMENTS_MAX: usize = 4096;

/// Words of 8 bytes in which a string's end is looked for one by one. For the many short strings that is faster than
/// calling a vectorised search, which takes over for the long ones.
const NEAR_WORDS: usize = 8;

/// One `"key": value`.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    /// With its quotes.
    pub(crate) key: Range<usize>,
    /// Without the space around it.
    pub(crate) value: Range<usize>,
    /// Whether the key is written with a backslash somewhere.
    pub(super) escaped: bool,
}

/// Why a text is no JSON object that we take. It says where and never what stands there: bodies hold prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{fault} at byte {offset} (line {line}, column {column})")]
pub(crate) struct ScanError {
    /// What is wrong.
    pub(crate) fault: Fault,
    /// Counted from 0.
    pub(crate) offset: usize,
    /// Counted from 1.
    pub(crate) line: usize,
    /// In bytes, counted from 1.
    pub(crate) column: usize,
}

/// What is wrong with a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    /// A byte that belongs to no UTF-8 sequence.
    #[error("the text is not UTF-8")]
    NotUtf8,
    /// The text ends too soon.
    #[error("the JSON ends early")]
    Unfinished,
    /// An object was wanted.
    #[error("expected an object")]
    NotAnObject,
    /// An array was wanted.
    #[error("expected an array")]
    NotAnArray,
    /// No value begins like this.
    #[error("expected a value")]
    NotAValue,
    /// Behind `{` or a comma of an object.
    #[error("expected a key in double quotes")]
    NotAKey,
    /// Behind a key.
    #[error("expected a colon")]
    NotAColon,
    /// Behind a value.
    #[error("expected a comma or the closing bracket")]
    NotAComma,
    /// A line feed, a tab or the like must be escaped in a string.
    #[error("a control character stands in a string")]
    ControlCharacter,
    /// A backslash and something that it can't escape.
    #[error("invalid escape sequence")]
    BadEscape,
    /// `01`, `1.`, `+1`, `NaN` and the like.
    #[error("invalid number")]
    BadNumber,
    /// More arrays and objects within each other than are allowed.
    #[error("nested too deeply")]
    TooDeep,
    /// More members or elements than are noted.
    #[error("too many members")]
    TooMany,
    /// Something behind the end of the value.
    #[error("expected nothing more")]
    Trailing,
}

/// A whole text with one value that `read` takes.
pub(super) fn document<'a>(
    text: &'a [u8],
    read: impl FnOnce(&mut Scanner<'a>) -> Result<(), Fault>,
) -> Result<(), ScanError> {
    if let Err(error) = std::str::from_utf8(text) {
        return Err(located(text, error.valid_up_to(), Fault::NotUtf8));
    }
    let mut scanner = Scanner { text, at: 0 };
    scanner.space();
    read(&mut scanner)
        .and_then(|()| {
            scanner.space();
            if scanner.at == text.len() { Ok(()) } else { Err(Fault::Trailing) }
        })
        .map_err(|fault| located(text, scanner.at, fault))
}

fn located(text: &[u8], offset: usize, fault: Fault) -> ScanError {
    let before = &text[..offset.min(text.len())];
    let line_start = memchr::memrchr(b'\n', before).map_or(0, |at| at + 1);
    let line = memchr::memchr_iter(b'\n', before).count() + 1;
    ScanError { fault, offset: before.len(), line, column: before.len() - line_start + 1 }
}

/// Reads forward through a text that is known to be UTF-8. When something is wrong, `at` is where.
pub(super) struct Scanner<'a> {
    text: &'a [u8],
    pub(super) at: usize,
}

impl Scanner<'_> {
    fn peek(&self) -> Result<u8, Fault> {
        self.text.get(self.at).copied().ok_or(Fault::Unfinished)
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.text.get(self.at) {
            self.at += 1;
        }
    }

    pub(super) fn open(&mut self, bracket: u8, otherwise: Fault) -> Result<(), Fault> {
        if self.peek()? != bracket {
            return Err(otherwise);
        }
        self.at += 1;
        Ok(())
    }

    /// The outermost object, from behind its opening brace.
    pub(super) fn members(&mut self, depth_max: usize, members: &mut Vec<Member>) -> Result<(), Fault> {
        if depth_max == 0 {
            return Err(Fault::TooDeep);
        }
        self.space();
        if self.peek()? == b'}' {
            self.at += 1;
            return Ok(());
        }
        loop {
            if members.len() == MEMBERS_MAX {
                return Err(Fault::TooMany);
            }
            let start = self.at;
            let (end, escaped) = self.key()?;
            let value = self.at;
            self.value(depth_max)?;
            members.push(Member { key: start..end, value: value..self.at, escaped });
            if self.comma_or(b'}')? {
                return Ok(());
            }
        }
    }

    /// The outermost array, from behind its opening bracket.
    pub(super) fn elements(&mut self, depth_max: usize, elements: &mut Vec<Range<usize>>) -> Result<(), Fault> {
        if depth_max == 0 {
            return Err(Fault::TooDeep);
        }
        self.space();
        if self.peek()? == b']' {
            self.at += 1;
            return Ok(());
        }
        loop {
            if elements.len() == ELEMENTS_MAX {
                return Err(Fault::TooMany);
            }
            let start = self.at;
            self.value(depth_max)?;
            elements.push(start..self.at);
            if self.comma_or(b']')? {
                return Ok(());
            }
        }
    }

    /// Behind a value: a comma and the space around it (false), or the closing bracket (true).
    fn comma_or(&mut self, close: u8) -> Result<bool, Fault> {
        self.space();
        match self.peek()? {
            b',' => {
                self.at += 1;
                self.space();
                Ok(false)
            }
            byte if byte == close => {
                self.at += 1;
                Ok(true)
            }
            _ => Err(Fault::NotAComma),
        }
    }

    /// A key with its colon and the space around it; where the key itself ends, and whether it holds a backslash.
    fn key(&mut self) -> Result<(usize, bool), Fault> {
        if self.peek()? != b'"' {
            return Err(Fault::NotAKey);
        }
        let escaped = self.string()?;
        let end = self.at;
        self.space();
        if self.peek()? != b':' {
            return Err(Fault::NotAColon);
        }
        self.at += 1;
        self.space();
        Ok((end, escaped))
    }

    /// Any value, inside of the outermost object or array.
    fn value(&mut self, depth_max: usize) -> Result<(), Fault> {
        // What is open here, innermost in the lowest bit: an object is 1, an array 0.
        let mut open: u128 = 0;
        let mut depth = 1;
        loop {
            let byte = self.peek()?;
            match byte {
                b'"' => {
                    self.string()?;
                }
                b'{' | b'[' => {
                    if depth == depth_max {
                        return Err(Fault::TooDeep);
                    }
                    self.at += 1;
                    self.space();
                    let object = byte == b'{';
                    if self.peek()? == if object { b'}' } else { b']' } {
                        self.at += 1;
                    } else {
                        depth += 1;
                        open = open << 1 | u128::from(object);
                        if object {
                            self.key()?;
                        }
                        continue;
                    }
                }
                b'-' | b'0'..=b'9' => self.number()?,
                b't' => self.literal(b"true")?,
                b'f' => self.literal(b"false")?,
                b'n' => self.literal(b"null")?,
                _ => return Err(Fault::NotAValue),
            }
            // A value has ended, and with it perhaps what it lies in.
            while depth > 1 {
                let object = open & 1 == 1;
                if self.comma_or(if object { b'}' } else { b']' })? {
                    depth -= 1;
                    open >>= 1;
                } else {
                    if object {
                        self.key()?;
                    }
                    break;
                }
            }
            if depth == 1 {
                return Ok(());
            }
        }
    }

    fn literal(&mut self, word: &[u8]) -> Result<(), Fault> {
        if !self.text[self.at..].starts_with(word) {
            return Err(Fault::NotAValue);
        }
        self.at += word.len();
        Ok(())
    }

    fn number(&mut self) -> Result<(), Fault> {
        if self.peek()? == b'-' {
            self.at += 1;
        }
        match self.text.get(self.at) {
            Some(b'0') => self.at += 1,
            _ => self.digits()?,
        }
        if self.text.get(self.at) == Some(&b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.text.get(self.at) {
            self.at += 1;
            if let Some(b'+' | b'-') = self.text.get(self.at) {
                self.at += 1;
            }
            self.digits()?;
        }
        // `01` and `1x`: what follows a number is a comma, a bracket or space.
        match self.text.get(self.at) {
            Some(byte) if byte.is_ascii_alphanumeric() => Err(Fault::BadNumber),
            _ => Ok(()),
        }
    }

    fn digits(&mut self) -> Result<(), Fault> {
        let start = self.at;
        while self.text.get(self.at).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
        }
        if self.at == start { Err(Fault::BadNumber) } else { Ok(()) }
    }

    /// A string from its opening quote to behind its closing one; whether it holds a backslash.
    fn string(&mut self) -> Result<bool, Fault> {
        self.at += 1;
        let mut escaped = false;
        loop {
            self.at += plain(&self.text[self.at..]);
            match self.peek()? {
                b'"' => {
                    self.at += 1;
                    return Ok(escaped);
                }
                b'\\' => {
                    escaped = true;
                    self.escape()?;
                }
                _ => return Err(Fault::ControlCharacter),
            }
        }
    }

    /// One escape sequence, from its backslash. Half a surrogate pair is allowed: the grammar has it, and what it means
    /// is the engine's to say.
    #[inline]
    fn escape(&mut self) -> Result<(), Fault> {
        match self.text.get(self.at + 1).ok_or(Fault::Unfinished)? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {
                self.at += 2;
                Ok(())
            }
            b'u' => match self.text.get(self.at + 2..self.at + 6) {
                Some(digits) if digits.iter().all(u8::is_ascii_hexdigit) => {
                    self.at += 6;
                    Ok(())
                }
                Some(_) => Err(Fault::BadEscape),
                None => Err(Fault::Unfinished),
            },
            _ => Err(Fault::BadEscape),
        }
    }
}

/// How many bytes of a string come before its next quote, backslash or control character, or before the end of the text.
#[inline]
fn plain(text: &[u8]) -> usize {
    let mut at = 0;
    // Prompts have a line end or a quote every few words: most runs end here.
    while let Some(word) = text[at..].first_chunk() {
        if let Some(found) = first_special(*word) {
            return at + found;
        }
        at += 8;
        if at == 8 * NEAR_WORDS {
            return at + plain_far(&text[at..]);
        }
    }
    let tail = &text[at..];
    at + tail.iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20)).unwrap_or(tail.len())
}

/// The same for a run that is long.
#[inline(never)]
fn plain_far(text: &[u8]) -> usize {
    let plain = &text[..memchr::memchr2(b'"', b'\\', text).unwrap_or(text.len())];
    // Without a way out of the loop, which lets the compiler look at many bytes at once.
    let has_control = plain.iter().fold(false, |found, byte| found | (*byte < 0x20));
    let control = has_control.then(|| plain.iter().position(|byte| *byte < 0x20)).flatten();
    control.unwrap_or(plain.len())
}

/// The first byte of a word that ends a plain run of a string: a quote, a backslash or a control character.
///
/// Each term has the high bit of a byte set where the byte matches. It may also have one set above its first match, by
/// a borrow, which is why only the lowest one is looked at.
#[inline]
fn first_special(word: [u8; 8]) -> Option<usize> {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGH: u64 = ONES << 7;
    let word = u64::from_le_bytes(word);
    let zero = |word: u64| word.wrapping_sub(ONES) & !word;
    let control = word.wrapping_sub(ONES * 0x20) & !word;
    let quote = zero(word ^ (ONES * u64::from(b'"')));
    let backslash = zero(word ^ (ONES * u64::from(b'\\')));
    let found = (control | quote | backslash) & HIGH;
    (found != 0).then_some(found.trailing_zeros() as usize / 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_first_special_byte_of_a_word_is_found(
            word in prop::array::uniform8(prop_oneof![any::<u8>(), prop::sample::select(b"\"\\\x1f\x20\x21#[]\x80\xff\xa2\xdc\0".to_vec())]),
        ) {
            let expect = word.iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20));
            prop_assert_eq!(first_special(word), expect);
        }
    }
}
