//! W3C trace context (<https://www.w3.org/TR/trace-context/>): what a client's headers say of its trace, checked once, and what each leg is
//! told of it. Pure; span ids come in.
//!
//! What is wrong is dropped and no new trace is begun in its place, nor for a client that has none: this proxy exports no spans, so a
//! trace of its own would have a root that nobody ever sees. Each leg has a span id of its own, by which an engine's spans of the one leg
//! are told from those of the other.

use baton_wire::Traceparent;
use baton_wire::names::headers;
use http::{HeaderMap, HeaderName, HeaderValue};
use std::sync::Arc;

/// The header with the trace's id, the caller's span and the flags.
pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static(headers::TRACEPARENT);

/// The header with what the tracing systems on the way add for themselves.
pub(crate) const TRACESTATE: HeaderName = HeaderName::from_static(headers::TRACESTATE);

/// Characters of a tracestate that are passed on. The standard asks for at least 512; beyond them whole members are dropped.
const STATE_CHARACTERS_MAX: usize = 512;

/// Members that a tracestate may have.
const STATE_MEMBERS_MAX: usize = 32;

/// Characters of a member beyond which it is the first to be dropped, where members have to be.
const STATE_MEMBER_CHARACTERS: usize = 128;

/// A request's trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trace {
    parent: Traceparent,
    state: Option<HeaderValue>,
}

impl Trace {
    /// The trace of a request; nothing where it has none, or one that is wrong. Shared, because the request's account, its legs and a stream
    /// that goes on elsewhere each have it.
    pub(crate) fn of(given: &HeaderMap) -> Option<Arc<Self>> {
        let parent = given.get(&TRACEPARENT)?;
        if given.get_all(&TRACEPARENT).iter().nth(1).is_some() {
            return None;
        }
        Some(Arc::new(Trace { parent: Traceparent::parse(parent.as_bytes())?, state: state(given) }))
    }

    /// Its id, as tracing systems show it.
    pub(crate) fn id(&self) -> &str {
        self.parent.trace_id()
    }

    /// Puts the trace on a leg, as from a span of this id.
    pub(crate) fn put(&self, span_id: u64, leg: &mut HeaderMap) {
        let parent = HeaderValue::from_bytes(&self.parent.from_span(span_id));
        leg.insert(TRACEPARENT, parent.expect("hexadecimal digits and dashes are a header's value"));
        if let Some(state) = &self.state {
            leg.insert(TRACESTATE, state.clone());
        }
    }
}

/// Puts the trace of another proxy's leg on the same leg to the engine: it is one call, so it keeps its span.
pub(crate) fn relay(given: &HeaderMap, leg: &mut HeaderMap) {
    if let Some(trace) = Trace::of(given) {
        trace.put(trace.parent.span_id(), leg);
    }
}

/// All tracestate headers as one, or nothing where any of them is wrong: the trace itself goes on without.
fn state(given: &HeaderMap) -> Option<HeaderValue> {
    let mut values = given.get_all(&TRACESTATE).iter();
    let first = values.next()?;
    let mut members: Vec<&str> = Vec::new();
    for value in std::iter::once(first).chain(values) {
        let text = value.to_str().ok()?;
        members
            .extend(text.split(',').map(|member| member.trim_matches([' ', '\t'])).filter(|member| !member.is_empty()));
    }
    let right = |member: &&str| {
        let Some((key, value)) = member.split_once('=') else { return false };
        let key_is_right = (1..=256).contains(&key.len())
            && key.bytes().all(|c| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' | b'*' | b'/' | b'@'));
        let value_is_right =
            (1..=256).contains(&value.len()) && value.bytes().all(|c| matches!(c, 0x20..=0x7e) && c != b'=');
        key_is_right && value_is_right
    };
    if members.is_empty() || members.len() > STATE_MEMBERS_MAX || !members.iter().all(right) {
        return None;
    }
    // The standard's order: the long ones first, then from the end, which is the oldest.
    while members.iter().map(|member| member.len() + 1).sum::<usize>() > STATE_CHARACTERS_MAX + 1 {
        let long = members.iter().rposition(|member| member.len() > STATE_MEMBER_CHARACTERS);
        members.remove(long.unwrap_or(members.len() - 1));
    }
    HeaderValue::from_str(&members.join(",")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const PASSED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00000000000000ab-01";

    fn given(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_static(name), HeaderValue::from_str(value).expect("a header value"));
        }
        headers
    }

    fn text(value: &HeaderValue) -> String {
        value.to_str().expect("text").to_owned()
    }

    fn on_a_leg(lines: &[(&'static str, &str)]) -> Option<(String, Option<String>)> {
        let mut leg = HeaderMap::new();
        Trace::of(&given(lines))?.put(0xab, &mut leg);
        Some((text(&leg[TRACEPARENT]), leg.get(TRACESTATE).map(text)))
    }

    #[test]
    fn a_right_trace_goes_on_with_a_span_of_ours() {
        let check = |lines: &[(&'static str, &str)], expect: Option<&str>| {
            assert_eq!(on_a_leg(lines), Some((PASSED.to_owned(), expect.map(str::to_owned))));
        };
        check(&[("traceparent", PARENT)], None);
        check(&[("traceparent", PARENT), ("tracestate", "a=1")], Some("a=1"));
        assert_eq!(Trace::of(&given(&[("traceparent", PARENT)])).expect("right").id(), &PARENT[3..35]);
    }

    #[test]
    fn a_wrong_trace_is_dropped_and_none_is_begun() {
        for wrong in [&[("traceparent", "00-?"), ("tracestate", "a=1")][..], &[("tracestate", "a=1")], &[]] {
            assert_eq!(on_a_leg(wrong), None, "{wrong:?}");
        }
        assert_eq!(on_a_leg(&[("traceparent", PARENT), ("traceparent", PARENT)]), None, "two of them");
    }

    #[test]
    fn a_leg_that_is_relayed_keeps_its_span() {
        let check = |lines: &[(&'static str, &str)], expect: &[(&'static str, &str)]| {
            let mut leg = HeaderMap::new();
            relay(&given(lines), &mut leg);
            assert_eq!(leg, given(expect), "{lines:?}");
        };
        check(&[("traceparent", PARENT), ("tracestate", "a=1")], &[("traceparent", PARENT), ("tracestate", "a=1")]);
        check(&[("traceparent", "00-?"), ("tracestate", "a=1")], &[]);
        check(&[], &[]);
    }

    #[test]
    fn the_state_goes_on_in_order_and_a_wrong_one_goes_alone() {
        let check = |states: &[&str], expect: Option<&str>| {
            let lines: Vec<_> = std::iter::once(("traceparent", PARENT))
                .chain(states.iter().map(|state| ("tracestate", *state)))
                .collect();
            assert_eq!(on_a_leg(&lines).expect("the trace is right").1.as_deref(), expect, "{states:?}");
        };
        check(&["a=1"], Some("a=1"));
        check(&["a=1,b@c=2 3"], Some("a=1,b@c=2 3"));
        check(&["a=1 , ,b=2", "c=3"], Some("a=1,b=2,c=3"));
        check(&["A=1"], None);
        check(&["a"], None);
        check(&["a=1", "="], None);
        check(&[""], None);
        let many: Vec<String> = (0..33).map(|number| format!("k{number}=1")).collect();
        check(&[&many.join(",")], None);
    }

    #[test]
    fn of_a_long_state_the_longest_members_are_dropped_first_and_then_the_last() {
        let member = |key: &str, length: usize| format!("{key}={}", "1".repeat(length - key.len() - 1));
        let check = |members: &[String], expect: &[&String]| {
            let (_, state) = on_a_leg(&[("traceparent", PARENT), ("tracestate", &members.join(","))]).expect("right");
            let expect: Vec<&str> = expect.iter().map(|member| member.as_str()).collect();
            assert_eq!(state, Some(expect.join(",")), "{members:?}");
        };
        // 512 characters with their commas, and 513.
        let fits = [member("a", 255), member("b", 127), member("c", 128)];
        check(&fits, &[&fits[0], &fits[1], &fits[2]]);
        let over = [member("a", 255), member("b", 128), member("c", 128)];
        check(&over, &[&over[1], &over[2]]);
        let short = [member("a", 128), member("b", 128), member("c", 128), member("d", 120), member("e", 6)];
        check(&short, &[&short[0], &short[1], &short[2], &short[3]]);
    }

    proptest! {
        #[test]
        fn no_state_makes_it_fail_and_what_goes_on_is_right_and_bounded(text in "[a-c0-9=,@ ]{0,900}", span: u64) {
            let lines = [("traceparent", PARENT), ("tracestate", text.trim())];
            let trace = Trace::of(&given(&lines)).expect("the trace is right");
            let mut leg = HeaderMap::new();
            trace.put(span, &mut leg);
            prop_assert!(leg.get(TRACESTATE).is_none_or(|state| state.len() <= STATE_CHARACTERS_MAX));
            let passed = Trace::of(&leg).expect("what goes on is right");
            prop_assert_eq!(&passed.state, &trace.state);
            prop_assert_eq!(passed.id(), trace.id());
        }
    }
}
