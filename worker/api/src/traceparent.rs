//! `traceparent`, by which a call belongs to a trace (W3C Trace Context, <https://www.w3.org/TR/trace-context/>): from text that nobody has
//! checked to what it says, and back. Knows nothing of headers, and draws no ids.

/// Characters of a `traceparent` as we write it: `00-<32 of the trace>-<16 of the span>-<2 of flags>`.
pub const TRACEPARENT_LENGTH: usize = 55;

/// The flags that are defined: sampled, and trace id drawn at random. The standard wants all others to be sent on as 0.
const FLAGS_KNOWN: u8 = 0b11;

/// Which trace a call belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traceparent {
    /// 32 hexadecimal digits, as they came.
    trace_id: [u8; 32],
    span_id: u64,
    flags: u8,
}

impl Traceparent {
    /// What a header's value says; nothing where it is wrong. A later version of the standard may have more after what is known of it,
    /// which is left out.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (known, rest) = text.split_at_checked(TRACEPARENT_LENGTH)?;
        let (version, trace_id, span_id, flags) = (&known[..2], &known[3..35], &known[36..52], &known[53..]);
        let may_end_here = match version {
            b"00" => rest.is_empty(),
            b"ff" => false,
            _ => rest.first().is_none_or(|next| *next == b'-'),
        };
        let is_whole = [2, 35, 52].iter().all(|dash| known[*dash] == b'-') && may_end_here;
        // Read for its form alone: the digits are what goes on.
        let halves = (number(&trace_id[..16])?, number(&trace_id[16..])?);
        let (span_id, flags, _version) = (number(span_id)?, number(flags)? as u8, number(version)?);
        if !is_whole || halves == (0, 0) || span_id == 0 {
            return None;
        }
        Some(Traceparent { trace_id: trace_id.try_into().ok()?, span_id, flags: flags & FLAGS_KNOWN })
    }

    /// The trace's id: 32 lower-case hexadecimal digits.
    pub fn trace_id(&self) -> &str {
        std::str::from_utf8(&self.trace_id).expect("parsed as hexadecimal digits")
    }

    /// The caller's span.
    pub fn span_id(&self) -> u64 {
        self.span_id
    }

    /// The header's value for a call of the same trace from a span of this id; 0, which would mean that there is none, counts as 1.
    pub fn from_span(&self, span_id: u64) -> [u8; TRACEPARENT_LENGTH] {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        text[3..35].copy_from_slice(&self.trace_id);
        write(span_id.max(1), &mut text[36..52]);
        write(u64::from(self.flags), &mut text[53..]);
        text
    }
}

/// Lower-case hexadecimal digits, at most 16; the standard allows no others.
fn number(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0, |number, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some((number << 4) | u64::from(digit))
    })
}

fn write(mut number: u64, digits: &mut [u8]) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 0xf) as usize];
        number >>= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn text(trace: &Traceparent, span_id: u64) -> String {
        String::from_utf8(trace.from_span(span_id).to_vec()).expect("hexadecimal digits and dashes")
    }

    #[test]
    fn a_right_one_is_read_and_goes_on_from_another_span() {
        let check = |given: &str, expect_flags: &str| {
            let trace = Traceparent::parse(given.as_bytes()).unwrap_or_else(|| panic!("{given} is right"));
            assert_eq!((trace.trace_id(), trace.span_id()), (ID, 0x00f0_67aa_0ba9_02b7));
            assert_eq!(text(&trace, 0xab), format!("00-{ID}-00000000000000ab-{expect_flags}"));
            assert_eq!(text(&trace, 0), format!("00-{ID}-0000000000000001-{expect_flags}"));
        };
        check(&format!("00-{ID}-00f067aa0ba902b7-01"), "01");
        check(&format!("00-{ID}-00f067aa0ba902b7-00"), "00");
        check(&format!("00-{ID}-00f067aa0ba902b7-03"), "03");
        check(&format!("00-{ID}-00f067aa0ba902b7-ff"), "03");
        check(&format!("cc-{ID}-00f067aa0ba902b7-01"), "01");
        check(&format!("cc-{ID}-00f067aa0ba902b7-01-what-the-future-brings"), "01");
    }

    #[test]
    fn a_wrong_one_says_nothing() {
        let right = format!("00-{ID}-00f067aa0ba902b7-01");
        assert!(Traceparent::parse(right.as_bytes()).is_some());
        for wrong in [
            String::new(),
            right[..54].to_owned(),
            format!("{right}-"),
            format!("{right}0"),
            format!(" {right}"),
            right.to_uppercase(),
            right.replace("00-4", "ff-4"),
            right.replace("00-4", "0x-4"),
            right.replace('-', "_"),
            right.replace("4bf92", "4bf9g"),
            right.replace("2b7-", "2bg-"),
            right.replace("-01", "-0x"),
            right.replace(ID, &"0".repeat(32)),
            right.replace("00f067aa0ba902b7", &"0".repeat(16)),
            format!("cc-{ID}-00f067aa0ba902b7-01x"),
            format!("cc-{ID}-00f067aa0ba902b7-0"),
        ] {
            assert_eq!(Traceparent::parse(wrong.as_bytes()), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            id in "[0-9a-f]{31}[1-9a-f]",
            span_id in 1_u64..,
            flags in 0_u8..=FLAGS_KNOWN,
            caller in 1_u64..,
        ) {
            let given = format!("00-{id}-{caller:016x}-{flags:02x}");
            let trace = Traceparent::parse(given.as_bytes()).expect("a right one");
            prop_assert_eq!(text(&trace, caller), given);
            let passed = Traceparent::parse(&trace.from_span(span_id)).expect("a right one");
            prop_assert_eq!(passed, Traceparent { span_id, ..trace });
        }

        #[test]
        fn no_text_makes_it_fail(given in "[0-9a-fg_ -]{0,70}", bytes in prop::collection::vec(any::<u8>(), 50..60)) {
            for given in [given.as_bytes(), &bytes] {
                if let Some(trace) = Traceparent::parse(given) {
                    prop_assert_eq!(trace.trace_id().as_bytes(), &given[3..35]);
                }
            }
        }
    }
}
