//! The line on which a field of a YAML manifest stands.
//!
//! The parser tells lines only in its errors, so this asks for one: it reads the document again, walks down to the field
//! and refuses it there. Flow style, anchors and comments are thus the parser's matter, not ours.

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// The line (from 1) of the field at `path` in document number `document` (from 0), or of the deepest field above it that
/// is there.
pub(crate) fn line(text: &str, document: usize, path: &str) -> Option<usize> {
    let steps = steps(path);
    (0..=steps.len()).rev().find_map(|depth| {
        let document = serde_yaml::Deserializer::from_str(text).nth(document)?;
        let error = Walk { steps: &steps[..depth] }.deserialize(document).err()?;
        error.location().map(|location| location.line())
    })
}

/// `spec.items[2].name` as `spec`, `items`, `2`, `name`.
fn steps(path: &str) -> Vec<&str> {
    path.split(['.', '[', ']']).filter(|step| !step.is_empty()).collect()
}

/// Walks the steps, then refuses what it finds.
struct Walk<'a> {
    steps: &'a [&'a str],
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field on the way")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((wanted, rest)) = self.steps.split_first() else { return Err(A::Error::custom("here")) };
        // The last step is refused at its key, which is where a person looks for it.
        let seed = || Key { wanted, refuse: rest.is_empty() };
        while let Some(found) = map.next_key_seed(seed())? {
            if found {
                map.next_value_seed(Walk { steps: rest })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Some((wanted, rest)) = self.steps.split_first() else { return Err(A::Error::custom("here")) };
        let mut index = 0usize;
        loop {
            let more = if wanted.parse() == Ok(index) {
                list.next_element_seed(Walk { steps: rest })?.is_some()
            } else {
                list.next_element::<IgnoredAny>()?.is_some()
            };
            if !more {
                return Ok(());
            }
            index += 1;
        }
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
        self.leaf()
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        self.leaf()
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.leaf()
    }

    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<(), E> {
        self.leaf()
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.leaf()
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.leaf()
    }
}

impl Walk<'_> {
    /// A value without fields: refused where the walk ends, passed where it would have gone on.
    fn leaf<E: serde::de::Error>(self) -> Result<(), E> {
        if self.steps.is_empty() { Err(E::custom("here")) } else { Ok(()) }
    }
}

/// A key of a map: whether it is the wanted one; refused if that is as far as the walk goes.
struct Key<'a> {
    wanted: &'a str,
    refuse: bool,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field's name")
    }

    fn visit_str<E: serde::de::Error>(self, found: &str) -> Result<bool, E> {
        match (found == self.wanted, self.refuse) {
            (true, true) => Err(E::custom("here")),
            (is_wanted, _) => Ok(is_wanted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# comment\nspec:\n  model:\n    uri: x\n  list:\n    - a: 1\n      b: 2\n    - {a: 3,\n       b: 4}\n---\nspec: {prefill:\n  {replicas: 1}}\n";

    #[track_caller]
    fn check(document: usize, path: &str, expect: usize) {
        assert_eq!(line(TEXT, document, path), Some(expect), "{path}");
    }

    #[test]
    fn a_field_is_found_in_block_and_in_flow_style() {
        check(0, "spec", 2);
        check(0, "spec.model.uri", 4);
        check(0, "spec.list[0].b", 7);
        check(0, "spec.list[1].b", 9);
        check(1, "spec.prefill.replicas", 12);
    }

    #[test]
    fn a_missing_field_is_looked_for_where_it_belongs() {
        check(0, "spec.model.servedName", 3);
        check(0, "spec.model.uri.deeper", 4);
    }

    #[test]
    fn a_document_that_is_not_there_has_no_line() {
        assert_eq!(line("a: 1", 5, "a"), None);
    }
}
