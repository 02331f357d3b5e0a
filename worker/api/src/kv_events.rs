//! `GET /kv-events`: which full blocks a worker's prefix cache can answer for, as a numbered stream that can be resumed.
//!
//! The answer is `application/x-ndjson`: one JSON object a line, and it never ends by itself. A consumer that has followed this
//! worker before asks `?after=SEQ&epoch=EPOCH`, with the number of the last event that it has applied and the epoch it was of.
//!
//! ```text
//! {"hello":{"epoch":"<hex>","block_tokens":32,"first":A,"next":B}}      always, and first
//! {"snapshot":{"blocks":["<hash>",...],"next":B,"more":true}}            where the events alone would not do
//! {"snapshot":{"blocks":["<hash>",...],"next":B,"more":false}}
//! {"seq":N,"stored":["<hash>",...]}                                      then events as they happen
//! {"seq":N,"removed":["<hash>",...]}
//! {"seq":N,"cleared":true}
//! {"next":N}                                                             each five seconds without an event
//! ```
//!
//! * Events have consecutive numbers from the start of an epoch on. The worker keeps the last of them in a ring; `first` is the
//!   oldest in the ring and `next` the number that the next event will have, so an empty ring has `first` equal to `next`.
//! * A snapshot is sent where `after` is absent, of another epoch, not yet given out, or older than the ring still holds
//!   (`after + 1 < first`). Its lines together stand for all blocks that are in the prefix cache at one moment; they all carry
//!   the same `next`, the number of the first event that happened later, and nothing comes between them. Without a snapshot,
//!   the first event is number `after + 1`.
//! * `stored` names blocks in the order of their chain, a block never before its predecessor of the same event. A block that is
//!   stored twice or removed without having been stored changes nothing.
//! * A consumer that sees a gap in the numbers, or anything else that does not fit, connects again without `after`.

use crate::{BlockHash, Epoch};
use serde::{Deserialize, Serialize};

/// Where a worker serves the stream.
pub const PATH: &str = "/kv-events";

/// The stream's media type.
pub const CONTENT_TYPE: &str = "application/x-ndjson";

/// Most hashes in one line of a snapshot: 36 KB of text, so that neither side holds a whole cache as one line.
pub const SNAPSHOT_BLOCKS_MAX: usize = 1024;

/// Longest line that a consumer takes: about 7,000 hashes, more than the blocks that any one step of an engine completes.
pub const LINE_BYTES_MAX: usize = 256 * 1024;

/// Time without an event after which `{"next":N}` is sent, so that a consumer can tell an idle worker from a dead connection.
pub const KEEP_ALIVE: std::time::Duration = std::time::Duration::from_secs(5);

/// Where a consumer goes on, as the query of its request. Both or neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// Number of the last event that the consumer has applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
    /// The epoch that the number is of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
}

impl std::fmt::Display for Query {
    /// The query string without its question mark; empty where nothing is asked for.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.after, self.epoch) {
            (Some(after), Some(epoch)) => write!(f, "after={after}&epoch={epoch}"),
            _ => Ok(()),
        }
    }
}

/// One line of the stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, try_from = "Fields")]
pub enum Line {
    /// The beginning of every answer.
    Hello {
        /// Who answers, and what it still has.
        hello: Hello,
    },
    /// A part of what is in the prefix cache.
    Snapshot {
        /// The part.
        snapshot: Snapshot,
    },
    /// Blocks that the prefix cache can answer for from now on.
    Stored {
        /// Number of the event.
        seq: u64,
        /// The blocks.
        stored: Vec<BlockHash>,
    },
    /// Blocks that it can no longer answer for.
    Removed {
        /// Number of the event.
        seq: u64,
        /// The blocks.
        removed: Vec<BlockHash>,
    },
    /// The prefix cache was emptied.
    Cleared {
        /// Number of the event.
        seq: u64,
        /// Always true.
        cleared: bool,
    },
    /// Nothing happened for a while.
    Next {
        /// The number that the next event will have.
        next: u64,
    },
}

/// Who answers, and what it still has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The life of the process that the numbers belong to.
    pub epoch: Epoch,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Number of the oldest event that is still in the ring.
    pub first: u64,
    /// Number that the next event will have.
    pub next: u64,
}

/// A part of what is in the prefix cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Hashes of blocks, at most [`SNAPSHOT_BLOCKS_MAX`].
    pub blocks: Vec<BlockHash>,
    /// Number of the first event that is not in the snapshot.
    pub next: u64,
    /// Whether another part follows.
    pub more: bool,
}

/// All fields that a line can have: read without trying one form after the other, which would read each line several times.
#[derive(Deserialize)]
struct Fields {
    hello: Option<Hello>,
    snapshot: Option<Snapshot>,
    seq: Option<u64>,
    stored: Option<Vec<BlockHash>>,
    removed: Option<Vec<BlockHash>>,
    cleared: Option<bool>,
    next: Option<u64>,
}

/// A JSON object that is no line of the stream.
#[derive(Debug, thiserror::Error)]
#[error("not a line of a KV event stream")]
struct NotALine;

impl TryFrom<Fields> for Line {
    type Error = NotALine;

    fn try_from(fields: Fields) -> Result<Self, NotALine> {
        match fields {
            #[rustfmt::skip]
            Fields { hello: Some(hello), snapshot: None, seq: None, stored: None, removed: None, cleared: None, next: None } =>
                Ok(Line::Hello { hello }),
            #[rustfmt::skip]
            Fields { hello: None, snapshot: Some(snapshot), seq: None, stored: None, removed: None, cleared: None, next: None } =>
                Ok(Line::Snapshot { snapshot }),
            #[rustfmt::skip]
            Fields { hello: None, snapshot: None, seq: Some(seq), stored: Some(stored), removed: None, cleared: None, next: None } =>
                Ok(Line::Stored { seq, stored }),
            #[rustfmt::skip]
            Fields { hello: None, snapshot: None, seq: Some(seq), stored: None, removed: Some(removed), cleared: None, next: None } =>
                Ok(Line::Removed { seq, removed }),
            #[rustfmt::skip]
            Fields { hello: None, snapshot: None, seq: Some(seq), stored: None, removed: None, cleared: Some(true), next: None } =>
                Ok(Line::Cleared { seq, cleared: true }),
            #[rustfmt::skip]
            Fields { hello: None, snapshot: None, seq: None, stored: None, removed: None, cleared: None, next: Some(next) } =>
                Ok(Line::Next { next }),
            _ => Err(NotALine),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: BlockHash = BlockHash([0x0a; 16]);
    const B: BlockHash = BlockHash([0xb0; 16]);
    const EPOCH: Epoch = Epoch([0xee; 16]);

    #[test]
    fn a_line_has_exactly_the_text_of_the_contract() {
        let (a, b, epoch) = (A.to_string(), B.to_string(), EPOCH.to_string());
        let check = |line: Line, text: String| {
            assert_eq!(serde_json::to_string(&line).expect("a line serialises"), text);
            assert_eq!(serde_json::from_str::<Line>(&text).expect("own text parses"), line, "{text}");
        };
        check(
            Line::Hello { hello: Hello { epoch: EPOCH, block_tokens: 32, first: 7, next: 9 } },
            format!(r#"{{"hello":{{"epoch":"{epoch}","block_tokens":32,"first":7,"next":9}}}}"#),
        );
        check(
            Line::Snapshot { snapshot: Snapshot { blocks: vec![A, B], next: 9, more: true } },
            format!(r#"{{"snapshot":{{"blocks":["{a}","{b}"],"next":9,"more":true}}}}"#),
        );
        check(
            Line::Snapshot { snapshot: Snapshot { blocks: vec![], next: 0, more: false } },
            r#"{"snapshot":{"blocks":[],"next":0,"more":false}}"#.to_owned(),
        );
        check(Line::Stored { seq: 3, stored: vec![A] }, format!(r#"{{"seq":3,"stored":["{a}"]}}"#));
        check(Line::Removed { seq: 4, removed: vec![B] }, format!(r#"{{"seq":4,"removed":["{b}"]}}"#));
        check(Line::Cleared { seq: 5, cleared: true }, r#"{"seq":5,"cleared":true}"#.to_owned());
        check(Line::Next { next: 6 }, r#"{"next":6}"#.to_owned());
    }

    #[test]
    fn anything_else_is_refused() {
        let no_line = [
            "{}",
            "[]",
            r#"{"seq":1}"#,
            r#"{"stored":[]}"#,
            r#"{"seq":1,"cleared":false}"#,
            r#"{"seq":1,"stored":[],"removed":[]}"#,
            r#"{"seq":1,"stored":[],"next":2}"#,
            r#"{"seq":-1,"stored":[]}"#,
            r#"{"seq":1,"stored":["0a"]}"#,
            r#"{"hello":{"epoch":"00","block_tokens":32,"first":0,"next":0}}"#,
        ];
        for text in no_line {
            assert!(serde_json::from_str::<Line>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_field_of_a_later_release_is_passed_over() {
        let line: Line = serde_json::from_str(r#"{"seq":1,"stored":[],"tier":"host"}"#).expect("a line");
        assert_eq!(line, Line::Stored { seq: 1, stored: vec![] });
    }

    #[test]
    fn a_query_is_whole_or_empty() {
        let check = |after, epoch, text: &str| assert_eq!(Query { after, epoch }.to_string(), text);
        check(None, None, "");
        check(Some(1), None, "");
        check(None, Some(EPOCH), "");
        check(Some(1), Some(EPOCH), &format!("after=1&epoch={EPOCH}"));
    }

    #[test]
    fn a_full_line_of_a_snapshot_is_far_below_the_longest_line() {
        let snapshot = Snapshot { blocks: vec![A; SNAPSHOT_BLOCKS_MAX], next: u64::MAX, more: false };
        let text = serde_json::to_string(&Line::Snapshot { snapshot }).expect("a line serialises");
        assert!(text.len() * 4 < LINE_BYTES_MAX, "{} bytes", text.len());
    }
}
