//! W3C trace context (<https://www.w3.org/TR/trace-context/>): what a client says of its trace, checked, and what each leg is
//! told of it. Pure; span ids come in.
//!
//! What is wrong is dropped and no new trace is begun in its place: this proxy exports no spans, so a trace of its own would
//! have a root that nobody ever sees.

use http::{HeaderMap, HeaderName, HeaderValue};

/// The header with the trace's id, the caller's span and the flags.
pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The header with what the tracing systems on the way add for themselves.
pub(crate) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Characters of a tracestate that are passed on. The standard asks for at least 512; beyond them whole members are dropped.
const STATE_CHARACTERS_MAX: usize = 512;

/// Members that a tracestate may have.
const STATE_MEMBERS_MAX: usize = 32;

/// The flags that are defined: sampled, and trace id drawn at random. Others must not be passed on.
const FLAGS_KNOWN: u8 = 0b11;

/// A client's trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trace {
    /// 32 hexadecimal digits, as they came.
    id: [u8; 32],
    flags: u8,
    state: Option<HeaderValue>,
}

impl Trace {
    /// The trace of a request; nothing where it has none, or one that is wrong.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let parent = headers.get(&TRACEPARENT)?;
        if headers.get_all(&TRACEPARENT).iter().nth(1).is_some() {
            return None;
        }
        let (id, flags) = parse(parent.as_bytes())?;
        Some(Trace { id, flags, state: state(headers) })
    }

    /// Puts the trace on a leg, as from a span of this id. The span id must be another for each leg, or a tracing system would
    /// take the two for one call.
    pub(crate) fn put(&self, span_id: u64, headers: &mut HeaderMap) {
        // An id of zeros means that there is none.
        let span_id = span_id.max(1);
        let id = std::str::from_utf8(&self.id).expect("parsed as hexadecimal digits");
        let parent = format!("00-{id}-{span_id:016x}-{:02x}", self.flags);
        headers.insert(TRACEPARENT, HeaderValue::from_str(&parent).expect("hexadecimal digits and dashes"));
        if let Some(state) = &self.state {
            headers.insert(TRACESTATE, state.clone());
        }
    }
}

/// `version-traceid-parentid-flags`; later versions may have more after it, which is not passed on.
fn parse(text: &[u8]) -> Option<([u8; 32], u8)> {
    let (known, rest) = text.split_at_checked(55)?;
    let is_hex = |digits: &[u8]| digits.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
    let (version, id, parent, flags) = (&known[..2], &known[3..35], &known[36..52], &known[53..55]);
    let is_whole = [2, 35, 52].iter().all(|dash| known[*dash] == b'-')
        && [version, id, parent, flags].iter().all(|field| is_hex(field));
    let may_end_here = match version {
        b"00" => rest.is_empty(),
        b"ff" => false,
        _ => rest.first().is_none_or(|next| *next == b'-'),
    };
    let is_zero = |digits: &[u8]| digits.iter().all(|c| *c == b'0');
    if !is_whole || !may_end_here || is_zero(id) || is_zero(parent) {
        return None;
    }
    let flags = u8::from_str_radix(std::str::from_utf8(flags).ok()?, 16).ok()?;
    Some((id.try_into().ok()?, flags & FLAGS_KNOWN))
}

/// All tracestate headers as one, or nothing where any of them is wrong: the trace itself goes on without.
fn state(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut values = headers.get_all(&TRACESTATE).iter();
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
    while members.iter().map(|member| member.len() + 1).sum::<usize>() > STATE_CHARACTERS_MAX + 1 {
        members.pop();
    }
    HeaderValue::from_str(&members.join(",")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn given(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_static(name), HeaderValue::from_str(value).expect("a header value"));
        }
        headers
    }

    fn on_a_leg(lines: &[(&'static str, &str)]) -> Option<(String, Option<String>)> {
        let mut leg = HeaderMap::new();
        Trace::of(&given(lines))?.put(0xab, &mut leg);
        let text = |value: &HeaderValue| value.to_str().expect("text").to_owned();
        Some((text(&leg[TRACEPARENT]), leg.get(TRACESTATE).map(text)))
    }

    #[test]
    fn a_right_trace_goes_on_with_a_span_of_ours() {
        let check = |parent: &str, expect_flags: &str| {
            let leg = on_a_leg(&[("traceparent", parent)]).unwrap_or_else(|| panic!("{parent} is right"));
            assert_eq!(leg, (format!("00-{ID}-00000000000000ab-{expect_flags}"), None));
        };
        check(&format!("00-{ID}-00f067aa0ba902b7-01"), "01");
        check(&format!("00-{ID}-00f067aa0ba902b7-00"), "00");
        check(&format!("00-{ID}-00f067aa0ba902b7-ff"), "03");
        check(&format!("cc-{ID}-00f067aa0ba902b7-01"), "01");
        check(&format!("cc-{ID}-00f067aa0ba902b7-01-what-the-future-brings"), "01");
    }

    #[test]
    fn a_wrong_trace_is_dropped_and_none_is_begun() {
        let right = format!("00-{ID}-00f067aa0ba902b7-01");
        for wrong in [
            String::new(),
            right[..54].to_owned(),
            format!("{right}-"),
            format!("{right}0"),
            right.to_uppercase(),
            right.replace("00-4", "ff-4"),
            right.replace('-', "_"),
            right.replace(ID, &"0".repeat(32)),
            right.replace("00f067aa0ba902b7", &"0".repeat(16)),
            format!("cc-{ID}-00f067aa0ba902b7-01x"),
            format!("0x-{ID}-00f067aa0ba902b7-01"),
        ] {
            assert_eq!(on_a_leg(&[("traceparent", &wrong), ("tracestate", "a=1")]), None, "{wrong}");
        }
        assert_eq!(on_a_leg(&[("traceparent", &right), ("traceparent", &right)]), None, "two of them");
        assert_eq!(on_a_leg(&[("tracestate", "a=1")]), None, "a state alone");
    }

    #[test]
    fn the_state_goes_on_in_order_and_a_wrong_one_goes_alone() {
        let parent = format!("00-{ID}-00f067aa0ba902b7-01");
        let check = |states: &[&str], expect: Option<&str>| {
            let lines: Vec<_> = std::iter::once(("traceparent", parent.as_str()))
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
        let many: Vec<String> = (0..33).map(|number| format!("k{number}=1")).collect();
        check(&[&many.join(",")], None);
        let long = format!("a={}", "1".repeat(250));
        let both = format!("{long},b={}", "2".repeat(250));
        check(&[&format!("{both},c=3456789")], Some(&both));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_fail_or_pass_on_what_is_no_header(text in "[0-9a-f_ -]{0,70}", span: u64) {
            let Ok(value) = HeaderValue::from_str(&text) else { return Ok(()) };
            let headers = HeaderMap::from_iter([(TRACEPARENT, value)]);
            if let Some(trace) = Trace::of(&headers) {
                let mut leg = HeaderMap::new();
                trace.put(span, &mut leg);
                let passed = Trace::of(&leg);
                prop_assert_eq!(passed, Some(trace));
            }
        }
    }
}
