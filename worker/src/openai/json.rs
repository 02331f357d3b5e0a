//! JSON in which no object has a field twice. RFC 8259 leaves open which of the two would count, and whichever it is, the other
//! one is accepted and ignored.

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Parses a text as one value.
///
/// # Errors
/// What the parser found instead of JSON, and where; or where a field stands for the second time.
pub(super) fn parse(text: &str) -> Result<Value, serde_json::Error> {
    // Its bound on nesting (128 levels) is what keeps a hostile body off our stack.
    let mut parser = serde_json::Deserializer::from_str(text);
    let value = Unique.deserialize(&mut parser)?;
    parser.end()?;
    Ok(value)
}

/// Builds a value and refuses the second field of a name, at any depth.
#[derive(Clone, Copy)]
struct Unique;

impl<'de> DeserializeSeed<'de> for Unique {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, parser: D) -> Result<Value, D::Error> {
        parser.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(element) = elements.next_element_seed(self)? {
            list.push(element);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            if map.insert(name, fields.next_value_seed(self)?).is_some() {
                return Err(A::Error::custom("a field is given twice"));
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_field_may_stand_once_at_any_depth() {
        for twice in [r#"{"a":1,"a":1}"#, r#"[{"b":{"a":null,"c":[],"a":2}}]"#, r#"{"a":1,"\u0061":2}"#] {
            let error = parse(twice).expect_err(twice).to_string();
            assert!(error.starts_with("a field is given twice at line 1 column"), "{error}");
        }
        assert!(parse(r#"{"a":{"a":{"a":1}},"b":[{"a":1},{"a":1}]}"#).is_ok());
    }

    #[test]
    fn nesting_has_a_bound() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(parse(&nested(127)).is_ok());
        assert!(parse(&nested(1_000_000)).is_err());
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((".{0,3}", inner), 0..4).prop_map(|fields| Value::Object(Map::from_iter(fields))),
            ]
        })
    }

    proptest! {
        #[test]
        fn all_other_json_is_what_serde_json_makes_of_it(value in value()) {
            let text = value.to_string();
            let expected: Value = serde_json::from_str(&text).expect("serde_json reads what it writes");
            prop_assert_eq!(parse(&text).expect("no field stands twice"), expected);
        }

        #[test]
        fn what_is_no_json_for_serde_json_is_none_here(text in r#"[\[\]{}":,0-9a-z\\ .-]{0,40}"#) {
            if serde_json::from_str::<Value>(&text).is_err() {
                prop_assert!(parse(&text).is_err());
            }
        }
    }
}
