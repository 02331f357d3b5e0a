//! What a mock has seen since start or reset: counts, violations and the last requests. Pure; `/mock/ledger` shows it.

use super::leg::Leg;
use super::rule::Rule;
use baton_wire::signing::body_blake3;
use bytes::Bytes;
use http::{HeaderMap, Method};
use serde_json::{Value, json};
use std::collections::VecDeque;

/// Violations that are shown with their sentences; all are counted.
const VIOLATIONS_MAX: usize = 64;

/// Bytes of bodies that are kept at most; what comes when it is full is kept as its hash alone.
const BODY_BYTES_MAX: usize = 16 << 20;

/// Characters of a body that are shown: enough for every field of a test's request.
const BODY_CHARACTERS_MAX: usize = 4096;

#[derive(Debug)]
pub(crate) struct Ledger {
    keep: usize,
    pub(crate) requests: PerLeg,
    /// On paths that no engine has.
    pub(crate) unknown_paths: u64,
    /// Answered in full.
    pub(crate) answered: PerLeg,
    /// Refused as an engine does.
    pub(crate) refused: PerLeg,
    /// That met an injected failure.
    pub(crate) failed: PerLeg,
    /// That the other side gave up.
    pub(crate) aborts: PerLeg,
    /// Being served.
    pub(crate) running: PerLeg,
    pub(crate) pulls: Pulls,
    /// Handles whose bytes changed on the way though no value did.
    pub(crate) reserialised: u64,
    /// Prompt tokens computed here.
    pub(crate) prompt_tokens: u64,
    /// Tokens of answers.
    pub(crate) completion_tokens: u64,
    broken: [u64; Rule::ALL.len()],
    violations: VecDeque<(Rule, u64, String)>,
    heads: VecDeque<Head>,
    body_bytes: usize,
}

/// A count for each kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PerLeg([u64; Leg::ALL.len()]);

/// What decode legs asked of prefill engines: theirs where the engine decodes, others' where it prefills.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Pulls {
    pub(crate) ok: u64,
    pub(crate) unknown: u64,
    pub(crate) freed: u64,
    /// Nobody answered.
    pub(crate) unreachable: u64,
    /// Prompts that a decode engine computed because it could not have their KV.
    pub(crate) recomputed: u64,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) number: u64,
    pub(crate) leg: Leg,
    pub(crate) method: Method,
    pub(crate) target: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Body,
}

/// A body, or its hash where there are too many.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    Kept(Bytes),
    Hashed { bytes: usize, blake3: String },
}

impl PerLeg {
    pub(crate) fn add(&mut self, leg: Leg) {
        self.0[leg as usize] += 1;
    }

    pub(crate) fn take(&mut self, leg: Leg) {
        self.0[leg as usize] = self.0[leg as usize].saturating_sub(1);
    }

    pub(crate) fn of(&self, leg: Leg) -> u64 {
        self.0[leg as usize]
    }

    fn json(&self) -> Value {
        Leg::ALL.into_iter().map(|leg| (leg.as_str().to_owned(), Value::from(self.of(leg)))).collect()
    }
}

impl Ledger {
    pub(crate) fn new(keep: usize) -> Self {
        Ledger {
            keep,
            requests: PerLeg::default(),
            unknown_paths: 0,
            answered: PerLeg::default(),
            refused: PerLeg::default(),
            failed: PerLeg::default(),
            aborts: PerLeg::default(),
            running: PerLeg::default(),
            pulls: Pulls::default(),
            reserialised: 0,
            prompt_tokens: 0,
            completion_tokens: 0,
            broken: [0; Rule::ALL.len()],
            violations: VecDeque::new(),
            heads: VecDeque::new(),
            body_bytes: 0,
        }
    }

    /// Forgets all but what is being served.
    pub(crate) fn reset(&mut self) {
        *self = Ledger { running: self.running, ..Ledger::new(self.keep) };
    }

    /// A rule was broken by the request of this number; `found` says by what.
    pub(crate) fn violated(&mut self, rule: Rule, number: u64, found: String) {
        self.broken[rule as usize] += 1;
        if self.violations.len() == VIOLATIONS_MAX {
            self.violations.pop_front();
        }
        self.violations.push_back((rule, number, found));
    }

    /// Remembers a request, and forgets the oldest.
    pub(crate) fn remember(&mut self, mut head: Head) {
        if self.keep == 0 {
            return;
        }
        if self.heads.len() >= self.keep
            && let Some(Head { body: Body::Kept(bytes), .. }) = self.heads.pop_front()
        {
            self.body_bytes -= bytes.len();
        }
        if let Body::Kept(bytes) = &head.body {
            if self.body_bytes + bytes.len() > BODY_BYTES_MAX {
                head.body = Body::Hashed { bytes: bytes.len(), blake3: body_blake3(bytes) };
            } else {
                self.body_bytes += bytes.len();
            }
        }
        self.heads.push_back(head);
    }

    /// All of it. `others` is what is not counted here.
    pub(crate) fn json(&self, others: Value, with_bodies: bool) -> Value {
        let rules = Rule::ALL.into_iter().filter(|rule| self.broken[*rule as usize] > 0);
        let by_rule: serde_json::Map<String, Value> =
            rules.map(|rule| (rule.as_str().to_owned(), self.broken[rule as usize].into())).collect();
        let last = self.violations.iter().map(|(rule, number, found)| {
            json!({"rule": rule.as_str(), "request": number, "sentence": rule.sentence(), "found": found})
        });
        let mut ledger = json!({
            "requests": self.requests.json(),
            "unknown_paths": self.unknown_paths,
            "answered": self.answered.json(),
            "refused": self.refused.json(),
            "failed": self.failed.json(),
            "aborts": self.aborts.json(),
            "running": self.running.json(),
            "pulls": self.pulls,
            "reserialised_handles": self.reserialised,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "violations": {
                "total": self.broken.iter().sum::<u64>(),
                "by_rule": by_rule,
                "last": last.collect::<Vec<Value>>(),
            },
        });
        if let (Value::Object(ledger), Value::Object(others)) = (&mut ledger, others) {
            ledger.extend(others);
            ledger.insert("last".into(), self.heads.iter().map(|head| head.json(with_bodies)).collect());
        }
        ledger
    }
}

impl Head {
    fn json(&self, with_body: bool) -> Value {
        let headers =
            self.headers.iter().map(|(name, value)| json!([name.as_str(), String::from_utf8_lossy(value.as_bytes())]));
        let (bytes, blake3) = match &self.body {
            Body::Kept(body) => (body.len(), body_blake3(body)),
            Body::Hashed { bytes, blake3 } => (*bytes, blake3.clone()),
        };
        let mut head = json!({
            "request": self.number,
            "leg": self.leg.as_str(),
            "method": self.method.as_str(),
            "target": self.target,
            "headers": headers.collect::<Vec<Value>>(),
            "body_bytes": bytes,
            "body_blake3": blake3,
        });
        if let (true, Body::Kept(body)) = (with_body, &self.body) {
            let text: String = String::from_utf8_lossy(body).chars().take(BODY_CHARACTERS_MAX).collect();
            head["body"] = text.into();
        }
        head
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(number: u64, body: Vec<u8>) -> Head {
        Head {
            number,
            leg: Leg::Plain,
            method: Method::POST,
            target: "/v1/completions".into(),
            headers: HeaderMap::new(),
            body: Body::Kept(body.into()),
        }
    }

    #[test]
    fn the_last_requests_are_shown_with_the_hash_of_their_body() {
        let mut ledger = Ledger::new(2);
        (1..=3).for_each(|number| ledger.remember(head(number, b"abc".to_vec())));
        let shown = ledger.json(json!({"name": "m"}), true);
        assert_eq!(shown["name"], "m");
        let last = shown["last"].as_array().expect("a list");
        assert_eq!(last.iter().map(|head| head["request"].as_u64()).collect::<Vec<_>>(), [Some(2), Some(3)]);
        assert_eq!((&last[0]["body"], &last[0]["body_blake3"]), (&"abc".into(), &body_blake3(b"abc").into()));
        assert_eq!(ledger.json(json!({}), false)["last"][0]["body"], Value::Null);
    }

    #[test]
    fn bodies_that_are_too_many_are_kept_as_their_hash() {
        let mut ledger = Ledger::new(2);
        ledger.remember(head(1, vec![b'a'; BODY_BYTES_MAX]));
        ledger.remember(head(2, b"abc".to_vec()));
        let shown = ledger.json(json!({}), true);
        assert_eq!(shown["last"][1]["body"], Value::Null);
        assert_eq!(shown["last"][1]["body_blake3"], body_blake3(b"abc"));
        ledger.remember(head(3, b"def".to_vec()));
        assert_eq!(ledger.json(json!({}), true)["last"][1]["body"], "def", "the large one is gone");
    }

    #[test]
    fn violations_are_counted_by_rule_and_told_in_a_sentence() {
        let mut ledger = Ledger::new(0);
        for number in 0..100 {
            ledger.violated(Rule::DuplicateRoom, number, format!("room {number}"));
        }
        ledger.violated(Rule::WrongRole, 100, String::new());
        let shown = ledger.json(json!({}), false);
        assert_eq!(shown["violations"]["total"], 101);
        assert_eq!(shown["violations"]["by_rule"], json!({"wrong-role": 1, "duplicate-room": 100}));
        let last = shown["violations"]["last"].as_array().expect("a list");
        assert_eq!((last.len(), &last[VIOLATIONS_MAX - 1]["rule"]), (VIOLATIONS_MAX, &"wrong-role".into()));
        assert_eq!(last[0]["sentence"], Rule::DuplicateRoom.sentence());
    }

    #[test]
    fn a_reset_forgets_all_but_what_is_being_served() {
        let mut ledger = Ledger::new(2);
        ledger.requests.add(Leg::Decode);
        ledger.running.add(Leg::Decode);
        ledger.reset();
        assert_eq!((ledger.requests.of(Leg::Decode), ledger.running.of(Leg::Decode)), (0, 1));
    }
}
