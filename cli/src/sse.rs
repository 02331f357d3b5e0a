//! Server-sent events out of bytes, as they arrive. Pure; knows the format's lines, not what the data means.

/// Longest event. A token's event is some hundred bytes; 20 top logprobs make it a few thousand.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// An event longer than a megabyte: the other side speaks something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of the stream is longer than {EVENT_BYTES_MAX} bytes")]
pub(crate) struct EventTooLong;

/// Collects bytes until events are whole.
#[derive(Debug, Default)]
pub(crate) struct EventReader {
    line: Vec<u8>,
    data: String,
}

impl EventReader {
    /// Takes the next bytes and gives the data of each event that they complete.
    ///
    /// # Errors
    /// When an event has no end.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, EventTooLong> {
        let mut events = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            } else {
                let line = String::from_utf8_lossy(&self.line).into_owned();
                self.line.clear();
                self.take_line(line.trim_end_matches('\r'), &mut events);
            }
            if self.line.len() + self.data.len() > EVENT_BYTES_MAX {
                return Err(EventTooLong);
            }
        }
        Ok(events)
    }

    fn take_line(&mut self, line: &str, events: &mut Vec<String>) {
        if line.is_empty() {
            if !self.data.is_empty() {
                events.push(std::mem::take(&mut self.data));
            }
        } else if let Some(data) = line.strip_prefix("data:") {
            if !self.data.is_empty() {
                self.data.push('\n');
            }
            self.data.push_str(data.strip_prefix(' ').unwrap_or(data));
        }
        // Comments and other fields carry nothing for us.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: &str = ": comment\ndata: {\"a\":\"ä\"}\n\nevent: x\r\ndata: one\r\ndata: two\r\n\r\ndata: [DONE]\n\n";

    proptest! {
        #[test]
        fn events_are_the_same_however_the_bytes_are_cut(cuts in proptest::collection::vec(0..STREAM.len(), 0..12)) {
            let mut cuts = cuts;
            cuts.extend([0, STREAM.len()]);
            cuts.sort_unstable();
            let mut reader = EventReader::default();
            let mut events = Vec::new();
            for pair in cuts.windows(2) {
                events.extend(reader.push(&STREAM.as_bytes()[pair[0]..pair[1]]).expect("short events"));
            }
            prop_assert_eq!(events, ["{\"a\":\"ä\"}", "one\ntwo", "[DONE]"]);
        }
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let mut reader = EventReader::default();
        assert_eq!(reader.push(&vec![b'x'; EVENT_BYTES_MAX + 1]), Err(EventTooLong));
    }
}
