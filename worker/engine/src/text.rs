//! From token ids to text, piece by piece: pure, one stream for each choice.
//!
//! A token's text depends on its neighbours, a character may span tokens, and a stop string may begin in one token and end in another.
//! So text leaves in *pieces*: runs of whole tokens whose text is settled. Each [`Delta`] names the tokens it covers, and the deltas of
//! a stream, joined, are the decoding of the tokens they cover, which is what lets somebody else continue after any delta.
//!
//! Settling follows the prefix-offset method of vLLM (`detokenize_incrementally`, `vllm/transformers_utils/detokenizer_utils.py`) and
//! TGI (`decode_token`): a token is decoded behind the tokens of the piece before it, and held back while the text ends in U+FFFD, the
//! mark of an unfinished character. Unlike there, text held back for a stop string is held in whole tokens, and what is held back for a
//! character is bounded.

/// Decodes token ids, skipping special tokens. Implemented by the tokenizer.
pub trait TokenText {
    /// The text of `ids`; bytes that are no UTF-8 show as U+FFFD.
    fn decode(&self, ids: &[u32]) -> String;
}

/// Tokens of the prompt that the first generated token is decoded behind, as in vLLM: enough for a tokenizer that writes a word's
/// space only where a word precedes it.
const CONTEXT_TOKENS: usize = 5;

/// Tokens that may wait for the end of a character. UTF-8 has at most 4 bytes a character and a token with text at least one, so of
/// any more tokens the first is no part of an unfinished one: it is not UTF-8 at all.
const UNFINISHED_TOKENS_MAX: usize = 3;

/// Tokens that may be without a piece for any reason: each may end inside a character that the next one completes, or have no text
/// (special tokens). Runs of either are a few tokens long in practice. After this many the piece is cut as it is, so that a model gone
/// astray costs no more with each token.
const UNCUT_TOKENS_MAX: usize = 64;

/// What the decoder writes for bytes that are not (yet) a character.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// The text of one choice.
#[derive(Debug)]
pub struct TextStream {
    pieces: Pieces,
    stops: Vec<String>,
    include_stop: bool,
    /// Settled pieces that may be the beginning of a stop string.
    pending: Vec<Piece>,
    stopped: bool,
}

/// New text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// The text; may be empty.
    pub text: String,
    /// The tokens that it is the text of, those without text included. Where a stop string cut the text, the last one's text is not
    /// all in it.
    pub ids: Vec<u32>,
    /// Which stop string (index in the list given) ended the stream, once it has.
    pub stop: Option<usize>,
}

/// A run of tokens and its text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Piece {
    text: String,
    ids: Vec<u32>,
}

impl TextStream {
    /// A stream of what follows `prompt`. It ends with the first of `stops` that is complete (empty ones are never), whose text is left
    /// out unless `include_stop`.
    pub fn new(prompt: &[u32], stops: Vec<String>, include_stop: bool) -> Self {
        let context = &prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..];
        TextStream { pieces: Pieces::behind(context), stops, include_stop, pending: Vec::new(), stopped: false }
    }

    /// Adds tokens; returns the text that is settled now. Nothing after a stop string.
    pub fn push(&mut self, tokenizer: &dyn TokenText, ids: &[u32]) -> Delta {
        let mut delta = Delta::default();
        for &id in ids {
            if self.stopped {
                break;
            }
            if let Some(piece) = self.pieces.push(tokenizer, id) {
                self.pending.push(piece);
                self.settle(&mut delta);
            }
        }
        delta
    }

    /// Adds a token that ends the choice and whose text is not to be shown: end-of-sequence, or one of the client's stop tokens.
    pub fn push_stop_token(&mut self, id: u32) {
        if !self.stopped {
            self.pending.extend(self.pieces.finish());
            self.pending.push(Piece { text: String::new(), ids: vec![id] });
        }
    }

    /// Ends the stream; returns all that was held back, half a character as U+FFFD.
    pub fn finish(&mut self) -> Delta {
        let mut delta = Delta::default();
        if !self.stopped {
            self.pending.extend(self.pieces.finish());
            self.settle(&mut delta);
        }
        if !self.stopped {
            self.stopped = true;
            self.pending.drain(..).for_each(|piece| delta.add(piece));
        }
        delta
    }

    /// Whether a stop string has ended the stream, or [`TextStream::finish`].
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Moves pending pieces to `delta`: up to a stop string, or all that can't be the beginning of one.
    fn settle(&mut self, delta: &mut Delta) {
        let text: String = self.pending.iter().map(|piece| piece.text.as_str()).collect();
        if let Some(stop) = earliest_stop(&text, &self.stops) {
            self.stopped = true;
            let shown = if self.include_stop { stop.end } else { stop.start };
            delta.text.push_str(&text[..shown]);
            delta.stop = Some(stop.index);
            let mut end = 0;
            for piece in self.pending.drain(..) {
                // Tokens after the one that completed the stop string are not covered.
                if end < stop.end {
                    delta.ids.extend(piece.ids);
                }
                end += piece.text.len();
            }
            return;
        }
        let settled = text.len() - longest_stop_beginning(&text, &self.stops);
        let mut end = 0;
        let fits = |piece: &&Piece| {
            end += piece.text.len();
            end <= settled
        };
        let count = self.pending.iter().take_while(fits).count();
        self.pending.drain(..count).for_each(|piece| delta.add(piece));
    }
}

impl Delta {
    /// Nothing new.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.ids.is_empty() && self.stop.is_none()
    }

    fn add(&mut self, piece: Piece) {
        self.text.push_str(&piece.text);
        self.ids.extend(piece.ids);
    }
}

/// A stop string in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Stop {
    end: usize,
    start: usize,
    index: usize,
}

/// The stop string that is complete first; of several that end together, the one that began first. So the outcome depends on the text
/// alone, not on how it was cut into tokens.
fn earliest_stop(text: &str, stops: &[String]) -> Option<Stop> {
    let find = |(index, stop): (usize, &String)| {
        let start = text.find(stop.as_str()).filter(|_| !stop.is_empty())?;
        Some(Stop { end: start + stop.len(), start, index })
    };
    stops.iter().enumerate().filter_map(find).min()
}

/// Bytes at the end of `text` that may be the beginning of a stop string.
fn longest_stop_beginning(text: &str, stops: &[String]) -> usize {
    let longest = |stop: &String| {
        let beginnings = stop.char_indices().map(|(length, _)| length).rev();
        beginnings.filter(|&length| text.ends_with(&stop[..length])).max().unwrap_or(0)
    };
    stops.iter().map(longest).max().unwrap_or(0)
}

/// Tokens on their way to becoming pieces.
#[derive(Debug)]
struct Pieces {
    /// The tokens of the piece before (or of the prompt), then those without a piece yet.
    window: Vec<u32>,
    /// How many of `window` are the former.
    settled: usize,
    /// Text of the latter, unfinished character included.
    uncut: String,
}

impl Pieces {
    fn behind(context: &[u32]) -> Self {
        Pieces { window: context.to_vec(), settled: context.len(), uncut: String::new() }
    }

    /// Adds a token; returns the piece that it completes.
    fn push(&mut self, tokenizer: &dyn TokenText, id: u32) -> Option<Piece> {
        self.window.push(id);
        let settled = tokenizer.decode(&self.window[..self.settled]);
        let text = tokenizer.decode(&self.window);
        // There is no such rest where the settled text ended in half a character that is whole now, as a prompt given as ids may:
        // the character is the prompt's then.
        self.uncut = text.get(settled.len()..).unwrap_or_default().to_owned();

        let count = self.window.len() - self.settled;
        if !self.uncut.is_empty() && !self.uncut.ends_with(REPLACEMENT) {
            return Some(self.cut(count, self.uncut.len()));
        }
        if count > UNFINISHED_TOKENS_MAX {
            // All but the last U+FFFD is certain, whatever comes; it can go if it ends where a token ends.
            let certain = self.uncut.len().saturating_sub(REPLACEMENT.len_utf8());
            for count in (count - UNFINISHED_TOKENS_MAX..count).rev() {
                let text = tokenizer.decode(&self.window[..self.settled + count]);
                let begins = text.get(settled.len()..).filter(|text| !text.is_empty() && text.len() <= certain);
                if begins.is_some_and(|text| self.uncut.starts_with(text)) {
                    return Some(self.cut(count, text.len() - settled.len()));
                }
            }
        }
        (count > UNCUT_TOKENS_MAX).then(|| self.cut(count, self.uncut.len()))
    }

    /// What has no piece yet, as it is.
    fn finish(&mut self) -> Option<Piece> {
        let count = self.window.len() - self.settled;
        (count > 0).then(|| self.cut(count, self.uncut.len()))
    }

    /// Makes a piece of the first `count` tokens without one, and the first `length` bytes of their text.
    fn cut(&mut self, count: usize, length: usize) -> Piece {
        let ids: Vec<u32> = self.window[self.settled..self.settled + count].to_vec();
        let text: String = self.uncut.drain(..length).collect();
        if text.is_empty() {
            // Tokens without text are no context for others.
            self.window.drain(self.settled..self.settled + count);
        } else {
            self.window.drain(..self.settled);
            self.settled = count;
        }
        Piece { text, ids }
    }
}

#[cfg(test)]
mod tests;
