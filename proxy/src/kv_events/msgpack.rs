//! MessagePack values one after the other out of a byte slice, without a tree of them: nothing is allocated that the slice does
//! not hold.

use rmp::Marker;
use rmp::decode::{self, NumValueReadError, ValueReadError};

/// Deepest nesting that is skipped or read: vLLM's events have five levels.
const DEPTH_MAX: u32 = 16;

/// Bytes that are not the MessagePack that is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MsgpackError {
    /// They end within a value.
    #[error("the message ends within a value")]
    Truncated,
    /// A value of another type or range.
    #[error("a value is of another type than expected")]
    Type,
    /// Deeper than any message that is meant well.
    #[error("values are nested deeper than {DEPTH_MAX} levels")]
    TooDeep,
}

impl From<ValueReadError> for MsgpackError {
    fn from(error: ValueReadError) -> Self {
        match error {
            ValueReadError::InvalidMarkerRead(_) | ValueReadError::InvalidDataRead(_) => MsgpackError::Truncated,
            ValueReadError::TypeMismatch(_) => MsgpackError::Type,
        }
    }
}

impl From<NumValueReadError> for MsgpackError {
    fn from(error: NumValueReadError) -> Self {
        match error {
            NumValueReadError::InvalidMarkerRead(_) | NumValueReadError::InvalidDataRead(_) => MsgpackError::Truncated,
            NumValueReadError::TypeMismatch(_) | NumValueReadError::OutOfRange => MsgpackError::Type,
        }
    }
}

/// A value, or the beginning of one: what an array or a map contains follows as values of their own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Nil,
    Bool(bool),
    /// Not negative.
    Unsigned(u64),
    /// Negative.
    Signed(i64),
    Float(f64),
    /// Valid UTF-8 or not.
    Text(&'a [u8]),
    Bytes(&'a [u8]),
    /// So many values follow.
    Array(u32),
    /// So many pairs of values follow.
    Map(u32),
    Extension(&'a [u8]),
}

/// What is left of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(message: &'a [u8]) -> Self {
        Reader { rest: message }
    }

    /// The next value.
    pub(super) fn next(&mut self) -> Result<Value<'a>, MsgpackError> {
        let marker = Marker::from_u8(*self.rest.first().ok_or(MsgpackError::Truncated)?);
        match marker {
            Marker::Null => decode::read_nil(&mut self.rest).map(|()| Value::Nil).map_err(Into::into),
            Marker::True | Marker::False => Ok(Value::Bool(decode::read_bool(&mut self.rest)?)),
            Marker::FixPos(_) | Marker::U8 | Marker::U16 | Marker::U32 | Marker::U64 => {
                Ok(Value::Unsigned(decode::read_int(&mut self.rest)?))
            }
            Marker::FixNeg(_) | Marker::I8 | Marker::I16 | Marker::I32 | Marker::I64 => {
                let number: i64 = decode::read_int(&mut self.rest)?;
                Ok(u64::try_from(number).map_or(Value::Signed(number), Value::Unsigned))
            }
            Marker::F32 => Ok(Value::Float(decode::read_f32(&mut self.rest)?.into())),
            Marker::F64 => Ok(Value::Float(decode::read_f64(&mut self.rest)?)),
            Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32 => {
                let len = decode::read_str_len(&mut self.rest)?;
                self.take(len).map(Value::Text)
            }
            Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => {
                let len = decode::read_bin_len(&mut self.rest)?;
                self.take(len).map(Value::Bytes)
            }
            Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => {
                Ok(Value::Array(decode::read_array_len(&mut self.rest)?))
            }
            Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => Ok(Value::Map(decode::read_map_len(&mut self.rest)?)),
            Marker::FixExt1
            | Marker::FixExt2
            | Marker::FixExt4
            | Marker::FixExt8
            | Marker::FixExt16
            | Marker::Ext8
            | Marker::Ext16
            | Marker::Ext32 => {
                let meta = decode::read_ext_meta(&mut self.rest)?;
                self.take(meta.size).map(Value::Extension)
            }
            Marker::Reserved => Err(MsgpackError::Type),
        }
    }

    /// Passes over one whole value.
    pub(super) fn skip(&mut self) -> Result<(), MsgpackError> {
        self.walk(&mut |_| {})
    }

    /// Calls `each` for every value within the next one, itself first, in the order of the message.
    pub(super) fn walk(&mut self, each: &mut impl FnMut(Value<'a>)) -> Result<(), MsgpackError> {
        self.walk_below(0, each)
    }

    fn walk_below(&mut self, depth: u32, each: &mut impl FnMut(Value<'a>)) -> Result<(), MsgpackError> {
        if depth > DEPTH_MAX {
            return Err(MsgpackError::TooDeep);
        }
        let value = self.next()?;
        each(value);
        let parts = match value {
            Value::Array(len) => u64::from(len),
            Value::Map(len) => 2 * u64::from(len),
            _ => 0,
        };
        (0..parts).try_for_each(|_| self.walk_below(depth + 1, each))
    }

    /// The next value as an array of which `each` reads one element at a time; false where it is nil.
    pub(super) fn each(
        &mut self,
        mut each: impl FnMut(&mut Self) -> Result<(), MsgpackError>,
    ) -> Result<bool, MsgpackError> {
        match self.next()? {
            Value::Nil => Ok(false),
            Value::Array(len) => (0..len).try_for_each(|_| each(self)).map(|()| true),
            _ => Err(MsgpackError::Type),
        }
    }

    /// A number that fits, or nothing where it is nil.
    pub(super) fn number<N: TryFrom<u64>>(&mut self) -> Result<Option<N>, MsgpackError> {
        match self.next()? {
            Value::Nil => Ok(None),
            Value::Unsigned(number) => N::try_from(number).map(Some).map_err(|_| MsgpackError::Type),
            _ => Err(MsgpackError::Type),
        }
    }

    /// A text, or nothing where it is nil.
    pub(super) fn text(&mut self) -> Result<Option<&'a [u8]>, MsgpackError> {
        match self.next()? {
            Value::Nil => Ok(None),
            Value::Text(text) => Ok(Some(text)),
            _ => Err(MsgpackError::Type),
        }
    }

    /// Whether nothing is left.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    fn take(&mut self, len: u32) -> Result<&'a [u8], MsgpackError> {
        let (taken, rest) = self.rest.split_at_checked(len as usize).ok_or(MsgpackError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_kind_of_value_is_read() {
        let check = |bytes: &[u8], expect: Result<Value<'_>, MsgpackError>| {
            assert_eq!(Reader::new(bytes).next(), expect, "{bytes:02x?}");
        };
        check(&[], Err(MsgpackError::Truncated));
        check(&[0xc0], Ok(Value::Nil));
        check(&[0xc3], Ok(Value::Bool(true)));
        check(&[0x07], Ok(Value::Unsigned(7)));
        check(&[0xd0, 0x07], Ok(Value::Unsigned(7)));
        check(&[0xff], Ok(Value::Signed(-1)));
        check(&[0xcf, 0xff, 0, 0, 0, 0, 0, 0, 1], Ok(Value::Unsigned(0xff00_0000_0000_0001)));
        check(&[0xcd, 0x01], Err(MsgpackError::Truncated));
        check(&[0xcb, 0x3f, 0xf8, 0, 0, 0, 0, 0, 0], Ok(Value::Float(1.5)));
        check(&[0xa2, b'h', b'i'], Ok(Value::Text(b"hi")));
        check(&[0xdb, 0xff, 0xff, 0xff, 0xff, b'x'], Err(MsgpackError::Truncated));
        check(&[0xc4, 1, 9], Ok(Value::Bytes(&[9])));
        check(&[0x92], Ok(Value::Array(2)));
        check(&[0x81], Ok(Value::Map(1)));
        check(&[0xd4, 5, 9], Ok(Value::Extension(&[9])));
        check(&[0xc1], Err(MsgpackError::Type));
    }

    #[test]
    fn what_nests_too_deep_is_refused() {
        let nested = |levels: usize| [vec![0x91; levels], vec![0xc0]].concat();
        assert_eq!(Reader::new(&nested(DEPTH_MAX as usize)).skip(), Ok(()));
        assert_eq!(Reader::new(&nested(DEPTH_MAX as usize + 1)).skip(), Err(MsgpackError::TooDeep));
        assert_eq!(Reader::new(&vec![0x91; 100_000]).skip(), Err(MsgpackError::TooDeep));
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_value_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::new(&bytes);
            while !reader.is_empty() && reader.skip().is_ok() {}
        }
    }
}
