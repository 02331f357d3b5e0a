//! Failures to inject: what a spec says, and which request meets which failure. Draws are a function of the spec's seed.

use super::leg::Leg;
use std::str::FromStr;
use std::time::Duration;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Failure {
    /// Answered with this status. Before admission the engine knows nothing of the request; after it, KV has been taken.
    Status { code: u16, admitted: bool },
    /// The connection is closed as soon as it is accepted.
    Refuse,
    /// The connection is reset after so many bytes of the answer, head included.
    ResetAfter(u64),
    /// Silence: before the head, with the KV already taken, or in the middle of the answer.
    Stall { lasts: Duration, at: StallAt },
    /// The answer breaks off after so many tokens.
    BreakStreamAfter(u32),
    /// Admitted, and never answered.
    Hang,
    /// An answer whose JSON is cut.
    BadJson,
    /// A prefill leg is answered without a handle, and holds nothing.
    NoHandle,
    /// Admitted, and scheduled late: the KV is not taken meanwhile.
    SlowHead(Duration),
}

/// Where an answer stalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StallAt {
    /// Before its head.
    Head,
    /// After half of its tokens.
    Mid,
}

/// A failure and the requests that meet it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Spec {
    pub(crate) failure: Failure,
    /// Of this kind only.
    leg: Option<Leg>,
    /// So many of them at most.
    count: Option<u64>,
    /// So many that would are let pass before.
    skip: u64,
    /// Each with this probability.
    probability: Option<f64>,
    seed: u64,
    text: String,
}

/// A text that is no spec.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SpecError {
    /// A word that says nothing.
    #[error(
        "unknown word {0:?}: a failure is one of status, refuse, reset-after, stall, break-stream-after, hang, bad-json, \
         no-handle, slow-head, and leg, count, skip, probability, seed, at say for which requests and where"
    )]
    Unknown(String),
    /// A word without the value that it needs, or with one that it can't have.
    #[error("{word}: expected {expected}")]
    Value { word: &'static str, expected: &'static str },
    /// A word that says something about another failure.
    #[error("{word} does not go with {failure}")]
    Misplaced { word: &'static str, failure: &'static str },
    /// The same thing is said twice.
    #[error("{0} is said twice")]
    Twice(String),
    /// No failure, or several.
    #[error("expected one failure in a spec, found {0}")]
    Failures(usize),
}

impl FromStr for Spec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let mut failures = Vec::new();
        let (mut leg, mut count, mut skip, mut probability, mut seed, mut at) = (None, None, None, None, None, None);
        let mut said: Vec<&str> = Vec::new();
        for part in text.split(',').map(str::trim) {
            let (word, value) = part.split_once('=').map_or((part, None), |(word, value)| (word, Some(value)));
            if said.contains(&word) {
                return Err(SpecError::Twice(word.to_owned()));
            }
            said.push(word);
            match word {
                "status" => failures.push(Failure::Status { code: status(value)?, admitted: false }),
                "refuse" => failures.push(none("refuse", value, Failure::Refuse)?),
                "reset-after" => failures.push(Failure::ResetAfter(number("reset-after", value)?)),
                "stall" => failures.push(Failure::Stall { lasts: ms("stall", value)?, at: StallAt::Head }),
                "break-stream-after" => {
                    let tokens = number("break-stream-after", value)?;
                    failures.push(Failure::BreakStreamAfter(u32::try_from(tokens).unwrap_or(u32::MAX)));
                }
                "hang" => failures.push(none("hang", value, Failure::Hang)?),
                "bad-json" => failures.push(none("bad-json", value, Failure::BadJson)?),
                "no-handle" => failures.push(none("no-handle", value, Failure::NoHandle)?),
                "slow-head" => failures.push(Failure::SlowHead(ms("slow-head", value)?)),
                "leg" => leg = Some(parse_leg(value)?),
                "count" => count = Some(number("count", value)?),
                "skip" => skip = Some(number("skip", value)?),
                "seed" => seed = Some(number("seed", value)?),
                "probability" => probability = Some(parse_probability(value)?),
                "at" => at = Some(value.unwrap_or_default()),
                _ => return Err(SpecError::Unknown(word.to_owned())),
            }
        }
        let [failure] = failures[..] else { return Err(SpecError::Failures(failures.len())) };
        let failure = placed(failure, at)?;
        if failure == Failure::Refuse && leg.is_some() {
            // The connection is closed before anything is known of the request.
            return Err(SpecError::Misplaced { word: "leg", failure: "refuse" });
        }
        Ok(Spec {
            failure,
            leg,
            count,
            skip: skip.unwrap_or(0),
            probability,
            seed: seed.unwrap_or(0),
            text: text.to_owned(),
        })
    }
}

fn placed(failure: Failure, at: Option<&str>) -> Result<Failure, SpecError> {
    match (failure, at) {
        (failure, None) => Ok(failure),
        (Failure::Status { code, .. }, Some("front")) => Ok(Failure::Status { code, admitted: false }),
        (Failure::Status { code, .. }, Some("admitted")) => Ok(Failure::Status { code, admitted: true }),
        (Failure::Status { .. }, Some(_)) => Err(SpecError::Value { word: "at", expected: "front or admitted" }),
        (Failure::Stall { lasts, .. }, Some("head")) => Ok(Failure::Stall { lasts, at: StallAt::Head }),
        (Failure::Stall { lasts, .. }, Some("mid")) => Ok(Failure::Stall { lasts, at: StallAt::Mid }),
        (Failure::Stall { .. }, Some(_)) => Err(SpecError::Value { word: "at", expected: "head or mid" }),
        (other, Some(_)) => Err(SpecError::Misplaced { word: "at", failure: other.word() }),
    }
}

impl Failure {
    const fn word(self) -> &'static str {
        match self {
            Failure::Status { .. } => "status",
            Failure::Refuse => "refuse",
            Failure::ResetAfter(_) => "reset-after",
            Failure::Stall { .. } => "stall",
            Failure::BreakStreamAfter(_) => "break-stream-after",
            Failure::Hang => "hang",
            Failure::BadJson => "bad-json",
            Failure::NoHandle => "no-handle",
            Failure::SlowHead(_) => "slow-head",
        }
    }
}

fn status(value: Option<&str>) -> Result<u16, SpecError> {
    let code = value.and_then(|value| value.parse().ok()).filter(|code| (400..=599).contains(code));
    code.ok_or(SpecError::Value { word: "status", expected: "a status from 400 to 599" })
}

fn none(word: &'static str, value: Option<&str>, failure: Failure) -> Result<Failure, SpecError> {
    if value.is_none() { Ok(failure) } else { Err(SpecError::Value { word, expected: "no value" }) }
}

fn number(word: &'static str, value: Option<&str>) -> Result<u64, SpecError> {
    value.and_then(|value| value.parse().ok()).ok_or(SpecError::Value { word, expected: "a whole number" })
}

/// An hour: whatever is tested has given up by then.
const MS_MAX: u64 = 3_600_000;

fn ms(word: &'static str, value: Option<&str>) -> Result<Duration, SpecError> {
    let ms = value.and_then(|value| value.parse().ok()).filter(|ms| *ms <= MS_MAX);
    ms.map(Duration::from_millis).ok_or(SpecError::Value { word, expected: "milliseconds, of an hour at most" })
}

fn parse_probability(value: Option<&str>) -> Result<f64, SpecError> {
    let probability = value.and_then(|value| value.parse().ok()).filter(|p| (0.0..=1.0).contains(p));
    probability.ok_or(SpecError::Value { word: "probability", expected: "a number from 0 to 1" })
}

fn parse_leg(value: Option<&str>) -> Result<Leg, SpecError> {
    let leg = Leg::ALL.into_iter().find(|leg| Some(leg.as_str()) == value);
    leg.ok_or(SpecError::Value { word: "leg", expected: "prefill, decode, plain, render or probe" })
}

/// The specs in force.
#[derive(Debug, Default)]
pub(crate) struct Fails {
    armed: Vec<Armed>,
}

#[derive(Debug)]
struct Armed {
    spec: Spec,
    /// Requests that would have met it.
    seen: u64,
    /// Those that did.
    hits: u64,
    draws: u64,
}

impl Fails {
    pub(crate) fn new(specs: &[Spec]) -> Self {
        let mut fails = Fails::default();
        specs.iter().cloned().for_each(|spec| fails.add(spec));
        fails
    }

    pub(crate) fn add(&mut self, spec: Spec) {
        let draws = spec.seed;
        self.armed.push(Armed { spec, seen: 0, hits: 0, draws });
    }

    pub(crate) fn clear(&mut self) {
        self.armed.clear();
    }

    /// What a request of this kind meets. Probes meet only what names them, so that an engine that fails still looks alive.
    pub(crate) fn meet(&mut self, leg: Leg) -> Option<Failure> {
        let is_met = |spec: &Spec| match spec.leg {
            Some(named) => named == leg,
            None => leg != Leg::Probe && spec.failure != Failure::Refuse,
        };
        self.armed.iter_mut().filter(|armed| is_met(&armed.spec)).find_map(Armed::draw)
    }

    /// Whether a connection is closed as it comes.
    pub(crate) fn refuses(&mut self) -> bool {
        let refusing = self.armed.iter_mut().filter(|armed| armed.spec.failure == Failure::Refuse);
        refusing.into_iter().find_map(Armed::draw).is_some()
    }

    /// Each spec as it was written, and how many requests met it.
    pub(crate) fn told(&self) -> impl Iterator<Item = (&str, u64)> {
        self.armed.iter().map(|armed| (armed.spec.text.as_str(), armed.hits))
    }
}

impl Armed {
    fn draw(&mut self) -> Option<Failure> {
        if self.spec.count.is_some_and(|count| self.hits >= count) {
            return None;
        }
        self.seen += 1;
        if self.seen <= self.spec.skip {
            return None;
        }
        if let Some(probability) = self.spec.probability {
            self.draws = self.draws.wrapping_add(1);
            // The upper 53 bits, which an f64 holds exactly.
            let draw = (super::tokens::mixed(self.draws) >> 11) as f64 / (1u64 << 53) as f64;
            if draw >= probability {
                return None;
            }
        }
        self.hits += 1;
        Some(self.spec.failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn each_failure_is_said_in_one_word() {
        let check = |text: &str, expect: Failure| assert_eq!(spec(text).failure, expect, "{text}");
        check("status=503", Failure::Status { code: 503, admitted: false });
        check("status=503,at=front", Failure::Status { code: 503, admitted: false });
        check("at=admitted,status=500", Failure::Status { code: 500, admitted: true });
        check("refuse", Failure::Refuse);
        check("reset-after=100", Failure::ResetAfter(100));
        check("stall=20", Failure::Stall { lasts: Duration::from_millis(20), at: StallAt::Head });
        check("stall=20,at=mid", Failure::Stall { lasts: Duration::from_millis(20), at: StallAt::Mid });
        check("break-stream-after=3", Failure::BreakStreamAfter(3));
        check("hang", Failure::Hang);
        check("bad-json", Failure::BadJson);
        check("no-handle", Failure::NoHandle);
        check("slow-head=5", Failure::SlowHead(Duration::from_millis(5)));
    }

    #[test]
    fn what_is_wrong_in_a_spec_is_named() {
        let check = |text: &str, expect: &str| {
            let error = text.parse::<Spec>().expect_err(text).to_string();
            assert!(error.contains(expect), "{text}: {error}");
        };
        check("", "unknown word");
        check("leg=decode", "found 0");
        check("hang,refuse", "found 2");
        check("status=200", "from 400 to 599");
        check("status", "from 400 to 599");
        check("status=503,count=x", "count: expected a whole number");
        check("status=503,probability=2", "from 0 to 1");
        check("status=503,leg=both", "prefill, decode");
        check("status=503,at=mid", "front or admitted");
        check("stall=1,at=end", "head or mid");
        check("hang=1", "no value");
        check("hang,at=mid", "at does not go with hang");
        check("refuse,leg=decode", "leg does not go with refuse");
        check("hang,leg=decode,leg=prefill", "leg is said twice");
        check("slow-head=99999999999", "of an hour");
    }

    #[test]
    fn a_count_ends_and_a_skip_delays_a_failure() {
        let mut fails = Fails::new(&[spec("status=503,leg=decode,count=2,skip=1")]);
        let met: Vec<bool> = (0..5).map(|_| fails.meet(Leg::Decode).is_some()).collect();
        assert_eq!(met, [false, true, true, false, false]);
        assert_eq!(fails.meet(Leg::Prefill), None);
        assert_eq!(fails.told().collect::<Vec<_>>(), [("status=503,leg=decode,count=2,skip=1", 2)]);
    }

    #[test]
    fn the_first_spec_that_applies_is_met() {
        let mut fails = Fails::new(&[spec("hang,count=1"), spec("bad-json")]);
        let met: Vec<_> = (0..3).map(|_| fails.meet(Leg::Plain)).collect();
        assert_eq!(met, [Some(Failure::Hang), Some(Failure::BadJson), Some(Failure::BadJson)]);
        assert_eq!(fails.meet(Leg::Probe), None, "a probe meets only what names it");
        assert!(!fails.refuses());
    }

    #[test]
    fn draws_are_a_function_of_the_seed_and_about_as_likely_as_said() {
        let drawn = |seed: u64| {
            let mut fails = Fails::new(&[spec(&format!("status=500,probability=0.1,seed={seed}"))]);
            (0..10_000).map(|_| fails.meet(Leg::Prefill).is_some()).collect::<Vec<bool>>()
        };
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
        let hits = drawn(1).into_iter().filter(|hit| *hit).count();
        assert!((900..1100).contains(&hits), "{hits}");
    }

    #[test]
    fn a_refusal_is_met_by_connections_alone() {
        let mut fails = Fails::new(&[spec("refuse,count=1")]);
        assert_eq!(fails.meet(Leg::Decode), None);
        assert!(fails.refuses() && !fails.refuses());
    }
}
