//! The body of a request in pieces: a long prompt is sent from where it was read, and not copied for each leg.

use bytes::Bytes;

/// Bytes that follow one another. No piece is empty.
#[derive(Clone, Debug, Default)]
pub(crate) struct Payload {
    /// Most bodies have one piece, which needs no list.
    first: Bytes,
    rest: Vec<Bytes>,
}

impl Payload {
    pub(crate) fn len(&self) -> usize {
        self.pieces().map(Bytes::len).sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    pub(crate) fn pieces(&self) -> impl Iterator<Item = &Bytes> {
        std::iter::once(&self.first).filter(|piece| !piece.is_empty()).chain(&self.rest)
    }

    /// Adds a piece at the end.
    pub(crate) fn push(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        if self.first.is_empty() {
            self.first = piece;
        } else {
            self.rest.push(piece);
        }
    }
}

impl From<Bytes> for Payload {
    fn from(first: Bytes) -> Self {
        Payload { first, rest: Vec::new() }
    }
}

#[cfg(test)]
impl Payload {
    /// All of it as one piece.
    pub(crate) fn to_bytes(&self) -> Bytes {
        if self.rest.is_empty() {
            return self.first.clone();
        }
        self.pieces().map(AsRef::as_ref).collect::<Vec<&[u8]>>().concat().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_stay_in_order_and_none_is_empty() {
        let mut payload = Payload::default();
        assert!(payload.is_empty() && payload.pieces().next().is_none());
        for piece in ["", "a", "", "bc", "d"] {
            payload.push(Bytes::from_static(piece.as_bytes()));
        }
        assert_eq!((payload.len(), payload.pieces().count(), payload.to_bytes()), (4, 3, Bytes::from_static(b"abcd")));
        assert_eq!(Payload::from(Bytes::from_static(b"x")).len(), 1);
    }
}
