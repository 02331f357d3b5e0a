//! Where the members of a JSON object lie in its bytes.
//!
//! One pass checks the whole text (RFC 8259, UTF-8 included) and notes only the members of the outermost object. What
//! lies deeper is checked and skipped; who needs a member of a member scans that member.

use crate::json::grammar::{DEPTH_CEILING, document};
pub(crate) use crate::json::grammar::{Fault, Member, ScanError};
use bytes::Bytes;
use std::borrow::Cow;
use std::ops::Range;

/// How deep arrays and objects may be nested, the outermost included. Tools whose parameters are schemas within schemas
/// need about 20; Python's reader gives up near 1000.
pub(crate) const DEPTH_MAX: usize = 64;

/// Room for the members of an ordinary request, so that noting them allocates once.
const MEMBERS_USUAL: usize = 16;

/// One JSON object: its bytes, known to be valid, and where its members lie in them.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    body: Bytes,
    members: Vec<Member>,
    /// Just behind the opening brace.
    inside: usize,
}

/// Scans one JSON object, nested at most `depth_max` deep (and at most 128).
///
/// # Errors
/// What is wrong with the text, and where.
pub(crate) fn scan(body: &Bytes, depth_max: usize) -> Result<Object, ScanError> {
    let mut members = Vec::with_capacity(MEMBERS_USUAL);
    let mut inside = 0;
    document(body, |scanner| {
        scanner.open(b'{', Fault::NotAnObject)?;
        inside = scanner.at;
        scanner.members(depth_max.min(DEPTH_CEILING), &mut members)
    })?;
    Ok(Object { body: body.clone(), members, inside })
}

/// Scans one JSON array: where its elements lie. Bounds as in [`scan`].
///
/// # Errors
/// What is wrong with the text, and where.
pub(crate) fn elements(body: &[u8], depth_max: usize) -> Result<Vec<Range<usize>>, ScanError> {
    let mut elements = Vec::new();
    document(body, |scanner| {
        scanner.open(b'[', Fault::NotAnArray)?;
        scanner.elements(depth_max.min(DEPTH_CEILING), &mut elements)
    })?;
    Ok(elements)
}

impl Object {
    /// The object's text, with the space around it.
    pub(crate) fn body(&self) -> &Bytes {
        &self.body
    }

    /// The members in their order, duplicates included.
    pub(crate) fn members(&self) -> &[Member] {
        &self.members
    }

    /// The place just behind the opening brace.
    pub(crate) fn inside(&self) -> usize {
        self.inside
    }

    /// The raw value of a member. Of several with the same key the last counts, as for Python's `json` and for
    /// serde_json, which the engines read it with.
    pub(crate) fn get(&self, key: &str) -> Option<&[u8]> {
        self.span(key).map(|span| &self.body[span])
    }

    /// As [`Object::get`], without a value that is `null`.
    pub(crate) fn given(&self, key: &str) -> Option<&[u8]> {
        self.get(key).filter(|value| *value != b"null")
    }

    /// Where in the body the value of a member lies.
    pub(crate) fn span(&self, key: &str) -> Option<Range<usize>> {
        self.last(key).map(|index| self.members[index].value.clone())
    }

    /// Which member counts for a key: the last.
    pub(crate) fn last(&self, key: &str) -> Option<usize> {
        self.members.iter().rposition(|member| self.is_named(member, key))
    }

    /// Whether a member has this key, however it is spelled.
    pub(crate) fn is_named(&self, member: &Member, key: &str) -> bool {
        let quoted = &self.body[member.key.clone()];
        if member.escaped {
            return unescaped(quoted).is_some_and(|spelled| spelled == key);
        }
        &quoted[1..quoted.len() - 1] == key.as_bytes()
    }

    /// A member that is a whole number, as JSON spells these without a fraction or an exponent.
    pub(crate) fn as_u64(&self, key: &str) -> Option<u64> {
        std::str::from_utf8(self.get(key)?).ok()?.parse().ok()
    }

    /// A member that is `true` or `false`.
    pub(crate) fn as_bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            b"true" => Some(true),
            b"false" => Some(false),
            _ => None,
        }
    }

    /// A member that is a string; copied only where it is written with escapes. None also for half of a surrogate pair,
    /// which is no text.
    pub(crate) fn as_str(&self, key: &str) -> Option<Cow<'_, str>> {
        let raw = self.get(key)?;
        let inner = raw.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
        if memchr::memchr(b'\\', inner).is_some() {
            return unescaped(raw).map(Cow::Owned);
        }
        std::str::from_utf8(inner).ok().map(Cow::Borrowed)
    }

    /// A member that is an object, scanned in its turn; its offsets count from its own opening brace.
    pub(crate) fn object(&self, key: &str) -> Option<Object> {
        self.object_at(self.last(key)?)
    }

    /// As [`Object::object`], by the member's place.
    pub(crate) fn object_at(&self, index: usize) -> Option<Object> {
        let span = self.members[index].value.clone();
        if self.body[span.start] != b'{' {
            return None;
        }
        // Its depth was checked with the whole; its number of members was not.
        scan(&self.body.slice(span), DEPTH_CEILING).ok()
    }
}

/// The text of a string with its quotes.
fn unescaped(quoted: &[u8]) -> Option<String> {
    serde_json::from_slice(quoted).ok()
}

#[cfg(test)]
pub(in crate::json) mod tests {
    use super::*;
    use crate::json::grammar::{ELEMENTS_MAX, MEMBERS_MAX};
    use proptest::prelude::*;
    use serde_json::value::RawValue;

    fn scanned(text: &str) -> Object {
        scan(&Bytes::copy_from_slice(text.as_bytes()), DEPTH_MAX).expect("valid")
    }

    fn fault(text: &[u8]) -> Option<(Fault, usize)> {
        scan(&Bytes::copy_from_slice(text), DEPTH_MAX).err().map(|error| (error.fault, error.offset))
    }

    #[test]
    fn members_are_found_where_they_lie() {
        let text = " { \"a\" : 1 , \"b\":\t[1, {\"a\": 2}],\"c\\u0064\" :\"x\\\"y\" ,\"\":{}} ";
        let object = scanned(text);
        let found: Vec<(&str, &str)> =
            object.members().iter().map(|member| (&text[member.key.clone()], &text[member.value.clone()])).collect();
        assert_eq!(
            found,
            [("\"a\"", "1"), ("\"b\"", "[1, {\"a\": 2}]"), ("\"c\\u0064\"", "\"x\\\"y\""), ("\"\"", "{}")]
        );
        assert_eq!(object.inside(), 2);
    }

    #[test]
    fn the_last_of_duplicates_counts() {
        let object = scanned(r#"{"n":1,"m":2,"n":3}"#);
        assert_eq!(object.get("n"), Some(b"3".as_slice()));
        assert_eq!(object.last("n"), Some(2));
        assert_eq!(object.get("x"), None);
    }

    #[test]
    fn a_key_written_with_escapes_is_the_same_key() {
        let object = scanned(r#"{"kv\u005ftransfer\u005Fparams":1,"\u00e9":2,"é":3,"a\/b":4,"\ud800":5}"#);
        assert_eq!(object.as_u64("kv_transfer_params"), Some(1));
        assert_eq!(object.as_u64("é"), Some(3));
        assert_eq!(object.as_u64("a/b"), Some(4));
        assert_eq!(object.get("\\ud800"), None);
    }

    #[test]
    fn values_are_read_as_what_they_are() {
        let object = scanned(
            r#"{"n":18446744073709551615,"m":-1,"f":1.0,"t":true,"z":null,"s":"plain é","e":"a\nb","h":"\ud800"}"#,
        );
        assert_eq!(object.as_u64("n"), Some(u64::MAX));
        assert_eq!((object.as_u64("m"), object.as_u64("f"), object.as_u64("s")), (None, None, None));
        assert_eq!((object.as_bool("t"), object.as_bool("z"), object.as_bool("x")), (Some(true), None, None));
        assert!(matches!(object.as_str("s"), Some(Cow::Borrowed("plain é"))));
        assert!(matches!(object.as_str("e"), Some(Cow::Owned(text)) if text == "a\nb"));
        assert_eq!((object.as_str("h"), object.as_str("n")), (None, None));
        assert_eq!((object.given("z"), object.given("t")), (None, Some(b"true".as_slice())));
        assert!(object.object("s").is_none());
        assert_eq!(scanned(r#"{"a":{"b":{"c":7}}}"#).object("a").and_then(|a| a.object("b")?.as_u64("c")), Some(7));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let check = |text: &[u8], expect: Fault, offset: usize| {
            assert_eq!(fault(text), Some((expect, offset)), "{}", String::from_utf8_lossy(text));
        };
        check(b"", Fault::Unfinished, 0);
        check(b"  ", Fault::Unfinished, 2);
        check(b"[]", Fault::NotAnObject, 0);
        check(b"\xef\xbb\xbf{}", Fault::NotAnObject, 0);
        check(b"{", Fault::Unfinished, 1);
        check(b"{\"a\":1", Fault::Unfinished, 6);
        check(b"{\"a\"", Fault::Unfinished, 4);
        check(b"{\"a", Fault::Unfinished, 3);
        check(b"{a:1}", Fault::NotAKey, 1);
        check(b"{'a':1}", Fault::NotAKey, 1);
        check(b"{\"a\":1,}", Fault::NotAKey, 7);
        check(b"{\"a\" 1}", Fault::NotAColon, 5);
        check(b"{\"a\":}", Fault::NotAValue, 5);
        check(b"{\"a\":[1,]}", Fault::NotAValue, 8);
        check(b"{\"a\":[1}", Fault::NotAComma, 7);
        check(b"{\"a\":1 \"b\":2}", Fault::NotAComma, 7);
        check(b"{\"a\":{\"b\":1]}", Fault::NotAComma, 11);
        check(b"{\"a\":tru}", Fault::NotAValue, 5);
        check(b"{\"a\":NaN}", Fault::NotAValue, 5);
        check(b"{\"a\":+1}", Fault::NotAValue, 5);
        check(b"{\"a\":01}", Fault::BadNumber, 6);
        check(b"{\"a\":-}", Fault::BadNumber, 6);
        check(b"{\"a\":-Infinity}", Fault::BadNumber, 6);
        check(b"{\"a\":1.}", Fault::BadNumber, 7);
        check(b"{\"a\":.5}", Fault::NotAValue, 5);
        check(b"{\"a\":1e}", Fault::BadNumber, 7);
        check(b"{\"a\":\"\t\"}", Fault::ControlCharacter, 6);
        check(b"{\"a\":\"\x1f\"}", Fault::ControlCharacter, 6);
        check(b"{\"a\":\"\\x\"}", Fault::BadEscape, 6);
        check(b"{\"a\":\"\\u12g4\"}", Fault::BadEscape, 6);
        check(b"{\"a\":\"\\u12", Fault::Unfinished, 6);
        check(b"{\"a\":\"\xff\"}", Fault::NotUtf8, 6);
        check(b"{\"a\":\"\xed\xa0\x80\"}", Fault::NotUtf8, 6);
        check(b"{} {}", Fault::Trailing, 3);
        check(b"{}\0", Fault::Trailing, 2);
        check(&[b"{\"a\":\"", vec![b'x'; 100].as_slice(), b"\n\"}"].concat(), Fault::ControlCharacter, 106);
        check(&[b"{\"a\":\"", vec![b'x'; 100].as_slice()].concat(), Fault::Unfinished, 106);
    }

    #[test]
    fn an_error_names_line_and_column_and_never_quotes_the_body() {
        let error = scan(&Bytes::from_static(b"{\"secret\": 1,\n  \"x\": oops}"), DEPTH_MAX).expect_err("invalid");
        assert_eq!(error.to_string(), "expected a value at byte 21 (line 2, column 8)");
    }

    #[test]
    fn nesting_is_bounded() {
        let faulted = |body: &Bytes, depth_max| scan(body, depth_max).err().map(|error| error.fault);
        for (open, close) in [("[", "]"), ("{\"b\":", "}")] {
            let nested =
                |depth: usize| Bytes::from(format!("{{\"a\":{}1{}}}", open.repeat(depth - 1), close.repeat(depth - 1)));
            assert_eq!(faulted(&nested(64), 64), None);
            assert_eq!(faulted(&nested(65), 64), Some(Fault::TooDeep));
            assert_eq!(faulted(&nested(128), usize::MAX), None);
            assert_eq!(faulted(&nested(129), usize::MAX), Some(Fault::TooDeep));
            assert_eq!(faulted(&nested(1_000_000), 64), Some(Fault::TooDeep));
        }
        assert_eq!(faulted(&Bytes::from_static(b"{\"a\":{}}"), 1), Some(Fault::TooDeep));
        assert_eq!(faulted(&Bytes::from_static(b"{\"a\":1}"), 1), None);
    }

    #[test]
    fn members_and_elements_are_bounded() {
        let object = |count: usize| Bytes::from(format!("{{{}}}", vec!["\"\":0"; count].join(",")));
        assert!(scan(&object(MEMBERS_MAX), DEPTH_MAX).is_ok());
        assert_eq!(scan(&object(MEMBERS_MAX + 1), DEPTH_MAX).err().map(|error| error.fault), Some(Fault::TooMany));
        let array = |count: usize| format!("[{}]", vec!["0"; count].join(","));
        assert_eq!(elements(array(ELEMENTS_MAX).as_bytes(), DEPTH_MAX).map(|all| all.len()), Ok(ELEMENTS_MAX));
        assert!(elements(array(ELEMENTS_MAX + 1).as_bytes(), DEPTH_MAX).is_err());
    }

    #[test]
    fn elements_are_found_where_they_lie() {
        let text = b" [ 1 ,\"a,b\", [2,3] , {\"c\":[]}]";
        let found: Vec<&[u8]> = elements(text, DEPTH_MAX).expect("valid").into_iter().map(|span| &text[span]).collect();
        assert_eq!(found, [b"1".as_slice(), b"\"a,b\"", b"[2,3]", b"{\"c\":[]}"]);
        assert_eq!(elements(b"[]", DEPTH_MAX), Ok(Vec::new()));
        assert_eq!(elements(b"{}", DEPTH_MAX).map_err(|error| error.fault), Err(Fault::NotAnArray));
    }

    /// Texts that are JSON, and texts that nearly are.
    fn texts() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop::sample::select(vec![
            "{",
            "}",
            "[",
            "]",
            ":",
            ",",
            "\"",
            "\"a\"",
            "\"\\u0061\"",
            "\\",
            "\\ud83d\\ude00",
            "1",
            "-0",
            "0.5e+3",
            "01",
            "true",
            "null",
            "fals",
            " ",
            "\n",
            "\t",
            "é",
            "\u{1}",
            "{\"a\":",
            "\"b\":[",
            "\"a long string beyond the short bound, in plain ASCII\"",
        ]);
        prop_oneof![
            prop::collection::vec(piece, 0..14).prop_map(|pieces| format!("{{{}}}", pieces.concat()).into_bytes()),
            values().prop_map(|value| value.to_string().into_bytes()),
            (values(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(value, at, byte)| {
                let mut text = value.to_string().into_bytes();
                let at = at.index(text.len());
                text[at] = byte;
                text
            }),
        ]
    }

    /// Objects to some depth.
    pub(in crate::json) fn values() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            // Numbers that serde_json reads back exactly; it may miss the last bit of others.
            any::<i32>().prop_map(|eighths| (f64::from(eighths) / 8.0).into()),
            ".{0,40}".prop_map(Into::into),
        ];
        let value = leaf.prop_recursive(4, 24, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Into::into),
                members(inner).prop_map(Into::into),
            ]
        });
        members(value).prop_map(Into::into)
    }

    fn members(
        value: impl Strategy<Value = serde_json::Value>,
    ) -> impl Strategy<Value = serde_json::Map<String, serde_json::Value>> {
        prop::collection::vec((prop_oneof!["[a-f]", "\\PC{0,5}"], value), 0..6)
            .prop_map(|all| all.into_iter().collect())
    }

    proptest! {
        #[test]
        fn what_is_taken_is_exactly_what_serde_takes(text in texts()) {
            // A raw value is checked by the grammar alone, as we do it: half a surrogate pair passes.
            let reference = serde_json::from_slice::<Box<RawValue>>(&text)
                .is_ok_and(|value| value.get().starts_with('{'));
            prop_assert_eq!(scan(&Bytes::from(text), DEPTH_MAX).is_ok(), reference);
        }

        #[test]
        fn every_member_reads_as_serde_reads_it(value in values()) {
            let pretty = serde_json::to_vec_pretty(&value).expect("serialises");
            for text in [value.to_string().into_bytes(), pretty] {
                let object = scan(&Bytes::from(text), DEPTH_MAX).expect("valid");
                let expect = value.as_object().expect("an object");
                prop_assert_eq!(object.members().len(), expect.len());
                for (key, value) in expect {
                    let raw = object.get(key).expect("there");
                    prop_assert_eq!(&serde_json::from_slice::<serde_json::Value>(raw).expect("valid"), value);
                    prop_assert!(object.as_str(key).as_deref() == value.as_str());
                    prop_assert_eq!(object.as_bool(key), value.as_bool());
                    prop_assert_eq!(object.as_u64(key), value.as_u64());
                }
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = scan(&Bytes::from(text), DEPTH_MAX);
        }
    }
}
