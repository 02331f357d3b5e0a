//! Lines out of the pieces in which an HTTP body arrives. Bounded: a line that never ends is an error and not memory.

use baton_wire::kv_events::LINE_BYTES_MAX;

/// A line that is longer than [`LINE_BYTES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a line is longer than {LINE_BYTES_MAX} bytes")]
pub(crate) struct LineTooLong;

/// What has arrived of the current line.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    begun: Vec<u8>,
}

impl Lines {
    /// Takes a piece of the body and calls `each` with every line that it completes, without the line's end. Empty lines are
    /// passed over.
    ///
    /// # Errors
    /// When a line is too long, or with what `each` returns; the rest of the piece is then lost, and with it the stream.
    pub(crate) fn push<E: From<LineTooLong>>(
        &mut self,
        mut piece: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(end) = piece.iter().position(|&byte| byte == b'\n') {
            let (line, rest) = (&piece[..end], &piece[end + 1..]);
            piece = rest;
            self.check(line)?;
            if self.begun.is_empty() {
                if !line.is_empty() {
                    each(line)?;
                }
            } else {
                self.begun.extend_from_slice(line);
                let whole = std::mem::take(&mut self.begun);
                each(&whole)?;
            }
        }
        self.check(piece)?;
        self.begun.extend_from_slice(piece);
        Ok(())
    }

    fn check(&self, more: &[u8]) -> Result<(), LineTooLong> {
        if self.begun.len() + more.len() > LINE_BYTES_MAX { Err(LineTooLong) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(pieces: &[&[u8]]) -> Result<Vec<Vec<u8>>, LineTooLong> {
        let (mut lines, mut found) = (Lines::default(), Vec::new());
        for piece in pieces {
            lines.push(piece, |line| {
                found.push(line.to_vec());
                Ok(())
            })?;
        }
        Ok(found)
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_bound() {
        let full = vec![b'x'; LINE_BYTES_MAX];
        assert_eq!(lines(&[&full, b"\n"]), Ok(vec![full.clone()]));
        assert_eq!(lines(&[&full, b"x"]), Err(LineTooLong));
        assert_eq!(lines(&[b"x", &full]), Err(LineTooLong));
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_the_body_is_cut(body in "[ab\n]{0,40}", cuts in prop::collection::vec(0usize..40, 0..6)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(body.len())).chain([0, body.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &body.as_bytes()[cut[0]..cut[1]]).collect();
            let mut expected: Vec<&str> = body.split('\n').collect();
            expected.pop();
            let expected: Vec<Vec<u8>> =
                expected.into_iter().filter(|line| !line.is_empty()).map(|line| line.as_bytes().to_vec()).collect();
            prop_assert_eq!(lines(&pieces).expect("short lines"), expected);
        }
    }
}
