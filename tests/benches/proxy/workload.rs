//! What is sent: the workloads, in the two stages that differ in how fast the engines are.

use serde_json::json;
use std::fmt;
use std::time::Duration;

/// A pair of engines is as fast as this.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Stage {
    /// No time between two tokens: what a proxy costs is seen at its plainest.
    Fast,
    /// 5 ms between two tokens, as a model of a good size takes: what users see.
    Paced,
}

impl Stage {
    pub(crate) const ALL: [Stage; 2] = [Stage::Fast, Stage::Paced];

    pub(crate) const fn token_delay_ms(self) -> u64 {
        match self {
            Stage::Fast => 0,
            Stage::Paced => 5,
        }
    }

    pub(crate) const fn workloads(self) -> &'static [Workload] {
        match self {
            Stage::Fast => &[JSON, JSON_32K, SSE, LATENCY],
            Stage::Paced => &[PACED, TTFT],
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms a token", self.token_delay_ms())
    }
}

/// Requests that are all alike, so many at a time.
#[derive(Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Workload {
    /// Its place in what is printed.
    order: u8,
    pub(crate) title: &'static str,
    /// Requests at a time, each on a connection of its own that is kept.
    pub(crate) connections: usize,
    pub(crate) streams: bool,
    /// Tokens that are asked for, and must come.
    pub(crate) tokens: usize,
    prompt_bytes: usize,
    /// How long a turn lasts, in milliseconds: long enough for thousands of requests on a machine that does nothing else, and
    /// so short that all rounds together take ten minutes.
    turn_ms: u64,
    is_measured_direct: bool,
}

/// A short chat: with all around it, 0.5 KB.
pub(crate) const JSON: Workload = Workload {
    order: 0,
    title: "JSON, 0.5 KB, 16 at a time",
    connections: 16,
    streams: false,
    tokens: 16,
    prompt_bytes: 420,
    turn_ms: 2500,
    is_measured_direct: false,
};

/// A document to be read: the body is what a proxy must not chew.
pub(crate) const JSON_32K: Workload =
    Workload { order: 1, title: "JSON, 32 KB prompt, 16 at a time", prompt_bytes: 32 << 10, ..JSON };

pub(crate) const SSE: Workload =
    Workload { order: 2, title: "SSE, 64 tokens, 16 at a time", streams: true, tokens: 64, ..JSON };

/// Nobody waits for anybody: what one request is held up by.
pub(crate) const LATENCY: Workload = Workload {
    order: 3,
    title: "JSON, 0.5 KB, 1 at a time",
    connections: 1,
    turn_ms: 2000,
    is_measured_direct: true,
    ..JSON
};

pub(crate) const PACED: Workload =
    Workload { order: 4, title: "SSE, 64 tokens, 5 ms a token, 64 at a time", connections: 64, ..SSE };

pub(crate) const TTFT: Workload =
    Workload { order: 5, title: "SSE, 64 tokens, 5 ms a token, 16 at a time", is_measured_direct: true, ..SSE };

impl Workload {
    pub(crate) const ALL: [&'static Workload; 6] = [&JSON, &JSON_32K, &SSE, &LATENCY, &PACED, &TTFT];

    pub(crate) const fn turn(&self) -> Duration {
        Duration::from_millis(self.turn_ms)
    }

    /// Whether the engine alone is measured too, so that what a proxy adds is known.
    pub(crate) const fn is_measured_direct(&self) -> bool {
        self.is_measured_direct
    }

    /// The request, head and body.
    pub(crate) fn request(&self) -> Vec<u8> {
        // Lines and quotes, as prompts have them: a reader of JSON can't take them as they stand.
        let sentence = "The quick brown fox said \"no\" to the lazy dog, and went on.\n";
        let prompt: String = sentence.chars().cycle().take(self.prompt_bytes).collect();
        let body = json!({
            "model": "mock",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.tokens,
            "stream": self.streams,
        });
        let body = body.to_string();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: proxy\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        [head, body].concat().into_bytes()
    }
}
