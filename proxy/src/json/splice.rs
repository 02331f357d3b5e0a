//! Changes to the members of a JSON object that leave every other byte as it is.
//!
//! The result is put together once, from pieces of the body and of the changes; nothing is copied before that. What is sent on need
//! not be put together at all: long pieces of the body stay where they are.

use crate::json::scan::Object;
use crate::payload::Payload;
use bytes::Bytes;
use std::ops::Range;

/// Bytes between two changes from which on they are not copied: sending a piece more costs about as much as copying so many.
const SHARED_BYTES_MIN: usize = 4 << 10;

/// What is to become of a member. A member that is named in a change is there at most once afterwards: its duplicates
/// go, so that every reader sees the same one.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change<'a> {
    /// It has this value, which is JSON; it is appended where it was missing.
    Set(&'a [u8]),
    /// It has this value, which is JSON, where it was there at all.
    Replace(&'a [u8]),
    /// It is gone.
    Remove,
    /// The object that it holds is changed in its turn. Where it was missing or `null`, it becomes an object if there
    /// is something to set in it; a value of another kind stays, for the engine to refuse. An object with more members
    /// than are noted becomes `[]`, which is refused too: passed on unread it could carry what a change removes.
    Within(Changes<'a>),
}

/// Changes by key. A key is plain: nothing in it needs an escape.
pub(crate) type Changes<'a> = &'a [(&'a str, Change<'a>)];

/// The object's text with the changes. Without anything to change it is the same [`Bytes`].
pub(crate) fn splice(object: &Object, changes: Changes<'_>) -> Bytes {
    let mut edits = Vec::with_capacity(2 * changes.len());
    collect(object, 0, changes, &mut edits);
    if edits.is_empty() {
        return object.body().clone();
    }
    join(object.body(), &edits)
}

/// The same, in pieces.
pub(crate) fn splice_pieces(object: &Object, changes: Changes<'_>) -> Payload {
    let mut edits = Vec::with_capacity(2 * changes.len());
    collect(object, 0, changes, &mut edits);
    let body = object.body();
    if edits.is_empty() {
        return body.clone().into();
    }
    if body.len() < SHARED_BYTES_MIN {
        return join(body, &edits).into();
    }
    let (mut payload, mut copied, mut from) = (Payload::default(), Vec::new(), 0);
    let end = Edit::new(body.len()..body.len(), b"");
    for edit in edits.iter().chain([&end]) {
        let kept = from..edit.at.start;
        if kept.len() < SHARED_BYTES_MIN {
            copied.extend_from_slice(&body[kept]);
        } else {
            payload.push(std::mem::take(&mut copied).into());
            payload.push(body.slice(kept));
        }
        edit.with.iter().for_each(|piece| copied.extend_from_slice(piece));
        from = edit.at.end;
    }
    payload.push(copied.into());
    payload
}

/// A place in the body that is replaced, and with what.
#[derive(Debug)]
struct Edit<'a> {
    at: Range<usize>,
    with: [&'a [u8]; 4],
}

impl<'a> Edit<'a> {
    fn new(at: Range<usize>, with: &'a [u8]) -> Self {
        Edit { at, with: [with, b"", b"", b""] }
    }
}

/// The edits in the order of their places. `base` is where the object's text begins in the body that is edited.
fn collect<'a>(object: &Object, base: usize, changes: Changes<'a>, edits: &mut Vec<Edit<'a>>) {
    let members = object.members();
    let shifted = |range: Range<usize>| base + range.start..base + range.end;
    // Where the last member that stays has ended.
    let mut kept_end = None;
    // The first of the removed members that came before any that stays: they go together with the comma behind them.
    let mut leading = None;
    for (index, member) in members.iter().enumerate() {
        let change = changes.iter().find(|(key, _)| object.is_named(member, key)).map(|(key, change)| (*key, *change));
        let stays = match change {
            None => true,
            Some((_, Change::Remove)) => false,
            Some((key, _)) => object.last(key) == Some(index),
        };
        if !stays {
            match kept_end {
                Some(end) => edits.push(Edit::new(shifted(end..member.value.end), b"")),
                None => leading = leading.or(Some(member.key.start)),
            }
            // The next removal of this run begins where this one ends.
            kept_end = kept_end.map(|_| member.value.end);
            continue;
        }
        if let Some(start) = leading.take() {
            edits.push(Edit::new(shifted(start..member.key.start), b""));
        }
        match change {
            Some((_, Change::Set(value) | Change::Replace(value))) => {
                edits.push(Edit::new(shifted(member.value.clone()), value));
            }
            Some((_, Change::Within(changes))) => within(object, index, base, changes, edits),
            Some((_, Change::Remove)) | None => (),
        }
        kept_end = Some(member.value.end);
    }
    let last_end = members.last().map_or(object.inside(), |member| member.value.end);
    if let Some(start) = leading {
        edits.push(Edit::new(shifted(start..last_end), b""));
    }
    let missing = changes.iter().filter(|(key, _)| object.last(key).is_none());
    append(base + last_end, kept_end.is_some(), missing, edits);
}

/// The changes inside of a member's value.
fn within<'a>(object: &Object, index: usize, base: usize, changes: Changes<'a>, edits: &mut Vec<Edit<'a>>) {
    let span = object.members()[index].value.clone();
    let at = base + span.start..base + span.end;
    match &object.body()[span.clone()] {
        [b'{', ..] => match object.object_at(index) {
            Some(inner) => collect(&inner, at.start, changes, edits),
            None => edits.push(Edit::new(at, b"[]")),
        },
        b"null" if changes.iter().any(sets) => {
            let end = at.end;
            edits.push(Edit::new(at, b"{"));
            append(end, false, changes.iter(), edits);
            edits.push(Edit::new(end..end, b"}"));
        }
        _ => (),
    }
}

/// New members at one place.
fn append<'a>(
    at: usize,
    mut comma: bool,
    changes: impl Iterator<Item = &'a (&'a str, Change<'a>)>,
    edits: &mut Vec<Edit<'a>>,
) {
    for (key, change) in changes.filter(|change| sets(change)) {
        debug_assert!(!key.contains(['"', '\\']), "keys are plain");
        let before: &[u8] = if comma { b",\"" } else { b"\"" };
        comma = true;
        match change {
            Change::Set(value) => edits.push(Edit { at: at..at, with: [before, key.as_bytes(), b"\":", value] }),
            Change::Within(changes) => {
                edits.push(Edit { at: at..at, with: [before, key.as_bytes(), b"\":", b"{"] });
                append(at, false, changes.iter(), edits);
                edits.push(Edit::new(at..at, b"}"));
            }
            Change::Replace(_) | Change::Remove => (),
        }
    }
}

/// Whether a change makes a member where there was none.
fn sets((_, change): &(&str, Change<'_>)) -> bool {
    match change {
        Change::Set(_) => true,
        Change::Replace(_) | Change::Remove => false,
        Change::Within(changes) => changes.iter().any(sets),
    }
}

fn join(body: &Bytes, edits: &[Edit<'_>]) -> Bytes {
    let out = edits.iter().map(|edit| edit.at.len()).sum::<usize>();
    let added = edits.iter().flat_map(|edit| edit.with).map(<[u8]>::len).sum::<usize>();
    let mut joined = Vec::with_capacity(body.len() - out + added);
    let mut from = 0;
    for edit in edits {
        joined.extend_from_slice(&body[from..edit.at.start]);
        for piece in edit.with {
            joined.extend_from_slice(piece);
        }
        from = edit.at.end;
    }
    joined.extend_from_slice(&body[from..]);
    joined.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::scan::tests::values;
    use crate::json::scan::{DEPTH_MAX, scan};
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    fn object(text: &str) -> Object {
        scan(&Bytes::copy_from_slice(text.as_bytes()), DEPTH_MAX).expect("valid")
    }

    fn check(text: &str, changes: Changes<'_>, expect: &str) {
        assert_eq!(String::from_utf8_lossy(&splice(&object(text), changes)), expect, "{text}");
    }

    const ONE: Change<'static> = Change::Set(b"1");

    #[test]
    fn a_set_value_stands_where_the_old_one_stood() {
        check(r#"{ "a" : 5 , "b":2.50e1 }"#, &[("a", ONE)], r#"{ "a" : 1 , "b":2.50e1 }"#);
        check(r#"{"b":0,"a":{"x":[1]}}"#, &[("a", ONE)], r#"{"b":0,"a":1}"#);
        check(r#"{"\u0061":5}"#, &[("a", ONE)], r#"{"\u0061":1}"#);
    }

    #[test]
    fn a_new_member_is_appended() {
        check("{}", &[("a", ONE)], r#"{"a":1}"#);
        check(" { } ", &[("a", ONE)], r#" {"a":1 } "#);
        check(r#"{"b":2 }"#, &[("a", ONE), ("c", Change::Set(b"[]"))], r#"{"b":2,"a":1,"c":[] }"#);
        check("{\n  \"b\": 2\n}", &[("a", ONE)], "{\n  \"b\": 2,\"a\":1\n}");
    }

    #[test]
    fn a_replaced_value_is_not_appended() {
        check(r#"{"b":2}"#, &[("a", Change::Replace(b"1"))], r#"{"b":2}"#);
        check(r#"{"a":null}"#, &[("a", Change::Replace(b"1"))], r#"{"a":1}"#);
    }

    #[test]
    fn a_removal_takes_exactly_one_comma() {
        let gone = |text: &str, keys: &[&str], expect: &str| {
            let changes: Vec<(&str, Change<'_>)> = keys.iter().map(|key| (*key, Change::Remove)).collect();
            check(text, &changes, expect);
        };
        gone(r#"{"a":1}"#, &["a"], "{}");
        gone(r#"{ "a":1 }"#, &["a"], "{  }");
        gone(r#"{"a":1,"b":2,"c":3}"#, &["a"], r#"{"b":2,"c":3}"#);
        gone(r#"{"a":1,"b":2,"c":3}"#, &["b"], r#"{"a":1,"c":3}"#);
        gone(r#"{"a":1,"b":2,"c":3}"#, &["c"], r#"{"a":1,"b":2}"#);
        gone(r#"{"a":1,"b":2,"c":3}"#, &["a", "b"], r#"{"c":3}"#);
        gone(r#"{"a":1,"b":2,"c":3}"#, &["b", "c"], r#"{"a":1}"#);
        gone(r#"{"a":1,"b":2,"c":3}"#, &["a", "c"], r#"{"b":2}"#);
        gone(r#"{"a":1,"b":2,"c":3}"#, &["a", "b", "c"], "{}");
        gone(r#"{"a":1,"a":2,"b":3,"a":4}"#, &["a"], r#"{"b":3}"#);
        gone(r#"{"a":1}"#, &["x"], r#"{"a":1}"#);
    }

    #[test]
    fn of_duplicates_the_last_is_set_and_the_others_go() {
        check(r#"{"a":1,"b":2,"a":3,"c":4}"#, &[("a", Change::Set(b"9"))], r#"{"b":2,"a":9,"c":4}"#);
        check(r#"{"b":2,"a":1,"\u0061":3}"#, &[("a", Change::Set(b"9"))], r#"{"b":2,"\u0061":9}"#);
    }

    #[test]
    fn removal_and_addition_meet_at_the_end() {
        check(r#"{"a":1}"#, &[("a", Change::Remove), ("b", ONE)], r#"{"b":1}"#);
        check(r#"{"c":0,"a":1 }"#, &[("a", Change::Remove), ("b", ONE)], r#"{"c":0,"b":1 }"#);
    }

    #[test]
    fn changes_reach_into_a_members_object() {
        let cap: Changes<'_> = &[("p", Change::Within(&[("n", ONE), ("m", Change::Remove)]))];
        check(r#"{"p": { "m":7, "x":1.0 }, "q":0}"#, cap, r#"{"p": { "x":1.0,"n":1 }, "q":0}"#);
        check(r#"{"q":0,"p":{"n":5}}"#, cap, r#"{"q":0,"p":{"n":1}}"#);
        check(r#"{"q":0}"#, cap, r#"{"q":0,"p":{"n":1}}"#);
        check(r#"{"p":null}"#, cap, r#"{"p":{"n":1}}"#);
        check(r#"{"p":[1]}"#, cap, r#"{"p":[1]}"#);
        check(r#"{"p":{"n":5},"p":{"n":6}}"#, cap, r#"{"p":{"n":1}}"#);
        let gone: Changes<'_> = &[("p", Change::Within(&[("q", Change::Within(&[("m", Change::Remove)]))]))];
        check(r#"{"p":{"q":{"m":1,"k":2}}}"#, gone, r#"{"p":{"q":{"k":2}}}"#);
        check(r#"{"p":null}"#, gone, r#"{"p":null}"#);
        check("{}", gone, "{}");
        let made: Changes<'_> = &[("p", Change::Within(&[("q", Change::Within(&[("m", ONE)])), ("k", ONE)]))];
        check("{}", made, r#"{"p":{"q":{"m":1},"k":1}}"#);
        check(r#"{"p":{"q":null}}"#, made, r#"{"p":{"q":{"m":1},"k":1}}"#);
    }

    #[test]
    fn an_object_that_is_too_long_to_read_is_not_passed_on() {
        let long = format!(r#"{{"p":{{{}"m":1}},"q":0}}"#, r#""":0,"#.repeat(1024));
        check(&long, &[("p", Change::Within(&[("m", Change::Remove)]))], r#"{"p":[],"q":0}"#);
    }

    #[test]
    fn without_a_change_the_bytes_are_the_same_ones() {
        let object = object(r#"{"a":1}"#);
        let same = splice(&object, &[("x", Change::Remove), ("y", Change::Replace(b"1"))]);
        assert_eq!(same.as_ptr(), object.body().as_ptr());
    }

    /// A change and what it means for a parsed object.
    #[derive(Clone, Debug)]
    enum Asked {
        Set(String, Value),
        Replace(String, Value),
        Remove(String),
        Within(String, String, Value),
    }

    fn asked() -> impl Strategy<Value = Vec<Asked>> {
        let one = prop_oneof![
            ("[a-f]", values()).prop_map(|(key, value)| Asked::Set(key, value)),
            ("[a-f]", values()).prop_map(|(key, value)| Asked::Replace(key, value)),
            "[a-f]".prop_map(Asked::Remove),
            ("[a-f]", "[a-c]", values()).prop_map(|(key, inner, value)| Asked::Within(key, inner, value)),
        ];
        prop::collection::vec(one, 0..5).prop_map(|all| {
            let mut seen = std::collections::BTreeSet::new();
            all.into_iter().filter(|asked| seen.insert(asked.key().to_owned())).collect()
        })
    }

    impl Asked {
        fn key(&self) -> &str {
            match self {
                Asked::Set(key, _) | Asked::Replace(key, _) | Asked::Remove(key) | Asked::Within(key, ..) => key,
            }
        }

        fn apply(&self, object: &mut Map<String, Value>) {
            match self {
                Asked::Set(key, value) => {
                    object.insert(key.clone(), value.clone());
                }
                Asked::Replace(key, value) => {
                    if let Some(old) = object.get_mut(key) {
                        *old = value.clone();
                    }
                }
                Asked::Remove(key) => {
                    object.shift_remove(key);
                }
                Asked::Within(key, inner, value) => match object.get_mut(key) {
                    None | Some(Value::Null) => {
                        object.insert(key.clone(), json!({ inner: value }));
                    }
                    Some(Value::Object(nested)) => {
                        nested.insert(inner.clone(), value.clone());
                    }
                    Some(_) => (),
                },
            }
        }
    }

    fn spliced(object: &Object, asked: &[Asked]) -> Bytes {
        with_changes(asked, |changes| splice(object, changes))
    }

    fn with_changes<T>(asked: &[Asked], then: impl FnOnce(Changes<'_>) -> T) -> T {
        let texts: Vec<String> = asked
            .iter()
            .map(|asked| match asked {
                Asked::Set(_, value) | Asked::Replace(_, value) | Asked::Within(.., value) => value.to_string(),
                Asked::Remove(_) => String::new(),
            })
            .collect();
        let inner: Vec<[(&str, Change<'_>); 1]> = asked
            .iter()
            .zip(&texts)
            .map(|(asked, text)| match asked {
                Asked::Within(_, inner, _) => [(inner.as_str(), Change::Set(text.as_bytes()))],
                _ => [("", Change::Remove)],
            })
            .collect();
        let changes: Vec<(&str, Change<'_>)> = asked
            .iter()
            .zip(texts.iter().zip(&inner))
            .map(|(asked, (text, inner))| {
                let change = match asked {
                    Asked::Set(..) => Change::Set(text.as_bytes()),
                    Asked::Replace(..) => Change::Replace(text.as_bytes()),
                    Asked::Remove(_) => Change::Remove,
                    Asked::Within(..) => Change::Within(inner),
                };
                (asked.key(), change)
            })
            .collect();
        then(&changes)
    }

    /// The text of an object with space strewn in and each member twice, the first of the two with another value.
    fn doubled(value: &Value) -> String {
        let members: Vec<String> = value
            .as_object()
            .expect("an object")
            .iter()
            .flat_map(|(key, value)| {
                let key = Value::from(key.as_str());
                [format!(" {key} :[0]"), format!("{key}:\t{value}\n")]
            })
            .collect();
        format!("\r\n{{{} }}", members.join(","))
    }

    proptest! {
        #[test]
        fn a_splice_reads_as_an_edited_tree_would(value in values(), asked in asked(), pretty in any::<bool>()) {
            let text = if pretty { serde_json::to_string_pretty(&value).expect("serialises") } else { value.to_string() };
            let out = spliced(&object(&text), &asked);
            let mut expect = value.as_object().expect("an object").clone();
            asked.iter().for_each(|asked| asked.apply(&mut expect));
            let read: Value = serde_json::from_slice(&out).expect("still valid");
            prop_assert_eq!(&read, &Value::Object(expect));
            prop_assert!(scan(&out, DEPTH_MAX).is_ok());
        }

        #[test]
        fn members_that_no_change_names_keep_their_bytes_and_order(value in values(), asked in asked()) {
            let text = doubled(&value);
            let before = object(&text);
            let out = spliced(&before, &asked);
            let after = scan(&out, DEPTH_MAX).expect("still valid");
            let untouched = |object: &Object| -> Vec<Bytes> {
                let body = object.body();
                object
                    .members()
                    .iter()
                    .filter(|member| !asked.iter().any(|asked| object.is_named(member, asked.key())))
                    .map(|member| body.slice(member.key.start..member.value.end))
                    .collect()
            };
            prop_assert_eq!(untouched(&before), untouched(&after));
            for asked in &asked {
                let count = after.members().iter().filter(|member| after.is_named(member, asked.key())).count();
                prop_assert!(count <= 1, "{:?} is there {} times", asked, count);
            }
            let mut expect = value.as_object().expect("an object").clone();
            asked.iter().for_each(|asked| asked.apply(&mut expect));
            prop_assert_eq!(serde_json::from_slice::<Value>(&out).expect("still valid"), Value::Object(expect));
        }

        #[test]
        fn long_pieces_stay_where_they_are_and_nothing_else_differs(
            value in values(),
            asked in asked(),
            lengths in prop::collection::vec(0..3 * SHARED_BYTES_MIN, 0..4),
        ) {
            let mut long = value.as_object().expect("an object").clone();
            for (index, length) in lengths.iter().enumerate() {
                long.insert(format!("long{index}"), Value::String("x".repeat(*length)));
            }
            let before = object(&Value::Object(long).to_string());
            let pieces = with_changes(&asked, |changes| splice_pieces(&before, changes));
            prop_assert_eq!(pieces.to_bytes(), spliced(&before, &asked));
            let body = before.body().as_ptr_range();
            let copied: usize = pieces.pieces().filter(|piece| !body.contains(&piece.as_ptr())).map(Bytes::len).sum();
            // Between two changes, and what is put in.
            let added = 2 * asked.len() * SHARED_BYTES_MIN;
            prop_assert!(copied <= 2 * SHARED_BYTES_MIN + added, "{} bytes copied", copied);
        }
    }
}
