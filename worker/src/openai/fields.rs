//! A JSON object whose fields are taken out one by one, by type: what is left over at the end was not read, and is refused.
//!
//! So a field can't be accepted and ignored. Errors name the field and the JSON type that was found, never the value:
//! it may be a prompt. A `null` counts as absent, as in the OpenAI API.

use super::error::RequestError;
use super::limits::{ECHO_CHARS_MAX, Range};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// An object's fields that have not been read yet.
pub(super) struct Fields {
    /// Path of the object itself: empty at the top.
    at: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Parses a request's body.
    pub(super) fn parse(json: &str) -> Result<Self, RequestError> {
        let value = super::json::parse(json).map_err(|error| RequestError::MalformedJson {
            reason: reason_without_position(&error),
            line: error.line(),
            column: error.column(),
        })?;
        Self::of("the request body".to_owned(), value).map(|fields| Fields { at: String::new(), ..fields })
    }

    /// An object inside another one.
    pub(super) fn of(at: String, value: Value) -> Result<Self, RequestError> {
        match value {
            Value::Object(map) => Ok(Fields { at, map }),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                Err(RequestError::WrongType { param: at, expected: "an object", found: kind(&value) })
            }
        }
    }

    /// The full path of one field.
    pub(super) fn path(&self, name: &str) -> String {
        let name: String = name.chars().take(ECHO_CHARS_MAX).collect();
        if self.at.is_empty() { name } else { format!("{}.{name}", self.at) }
    }

    /// Takes any value.
    pub(super) fn value(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// Takes a boolean.
    pub(super) fn boolean(&mut self, name: &str) -> Result<Option<bool>, RequestError> {
        self.typed(name, "a boolean", |value| match value {
            Value::Bool(value) => Ok(value),
            other => Err(other),
        })
    }

    /// Takes a string.
    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, RequestError> {
        self.typed(name, "a string", |value| match value {
            Value::String(value) => Ok(value),
            other => Err(other),
        })
    }

    /// Takes an array.
    pub(super) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, RequestError> {
        self.typed(name, "an array", |value| match value {
            Value::Array(value) => Ok(value),
            other => Err(other),
        })
    }

    /// Takes an object.
    pub(super) fn object(&mut self, name: &str) -> Result<Option<Fields>, RequestError> {
        let path = self.path(name);
        self.value(name).map(|value| Fields::of(path, value)).transpose()
    }

    /// Takes a number in `range`.
    pub(super) fn number(&mut self, name: &str, range: Range) -> Result<Option<f32>, RequestError> {
        let path = self.path(name);
        self.value(name).map(|value| number(&path, &value, range)).transpose()
    }

    /// Takes an integer in `range`.
    pub(super) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, RequestError> {
        let path = self.path(name);
        self.value(name).map(|value| integer(&path, &value, range)).transpose()
    }

    /// The fields that nobody took, with their values.
    pub(super) fn rest(self) -> impl Iterator<Item = (String, Value)> {
        let at = self.at;
        self.map.into_iter().filter(|(_, value)| !value.is_null()).map(move |(name, value)| {
            let name: String = name.chars().take(ECHO_CHARS_MAX).collect();
            (if at.is_empty() { name } else { format!("{at}.{name}") }, value)
        })
    }

    /// All fields that nobody took, as they are.
    pub(super) fn into_map(self) -> Map<String, Value> {
        self.map
    }

    /// Refuses what nobody took.
    pub(super) fn finish(self) -> Result<(), RequestError> {
        self.rest().next().map_or(Ok(()), |(param, _)| Err(RequestError::UnknownField { param }))
    }

    fn typed<T>(
        &mut self,
        name: &str,
        expected: &'static str,
        read: impl FnOnce(Value) -> Result<T, Value>,
    ) -> Result<Option<T>, RequestError> {
        match self.value(name).map(read) {
            None => Ok(None),
            Some(Ok(value)) => Ok(Some(value)),
            Some(Err(other)) => Err(RequestError::WrongType { param: self.path(name), expected, found: kind(&other) }),
        }
    }
}

/// Reads a number in `range`.
pub(super) fn number(path: &str, value: &Value, range: Range) -> Result<f32, RequestError> {
    let found = value.as_f64().ok_or_else(|| RequestError::WrongType {
        param: path.to_owned(),
        expected: "a number",
        found: kind(value),
    })?;
    if !range.contains(found) {
        return Err(RequestError::OutOfRange {
            param: path.to_owned(),
            allowed: range.to_string(),
            found: found.to_string(),
        });
    }
    Ok(found as f32)
}

/// Reads an integer in `range`.
pub(super) fn integer(path: &str, value: &Value, range: RangeInclusive<i64>) -> Result<i64, RequestError> {
    let Value::Number(found) = value else {
        return Err(RequestError::WrongType { param: path.to_owned(), expected: "an integer", found: kind(value) });
    };
    found.as_i64().filter(|value| range.contains(value)).ok_or_else(|| RequestError::OutOfRange {
        param: path.to_owned(),
        allowed: match *range.end() {
            i64::MAX => format!("an integer of at least {}", range.start()),
            end => format!("an integer of at least {} and at most {end}", range.start()),
        },
        found: found.to_string(),
    })
}

/// Reads a token id of a model with `vocab_size` tokens.
pub(super) fn token(path: &str, value: &Value, vocab_size: u32) -> Result<u32, RequestError> {
    let max = vocab_size.saturating_sub(1);
    let found = value.as_u64().ok_or_else(|| RequestError::WrongType {
        param: path.to_owned(),
        expected: "a token id (an integer of at least 0)",
        found: kind(value),
    })?;
    u32::try_from(found).ok().filter(|id| *id <= max).ok_or_else(|| RequestError::NoSuchToken {
        param: path.to_owned(),
        token: found,
        max,
    })
}

/// What a JSON value is, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The parser's words without its own "at line 1 column 2", which our message says already.
fn reason_without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(reason, _)| reason.to_owned())
}
