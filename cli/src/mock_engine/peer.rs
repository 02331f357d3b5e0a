//! What one mock says to another on the side channel, in place of RDMA: one line for each call and each answer, numbered,
//! so that many share a connection.

use super::rooms::Room;
use super::tokens::Seed;
use std::fmt::{Display, Formatter};
use std::str::FromStr;

/// A call of a mock that decodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// Take this KV over.
    Pull { engine: String, handle: String, request_id: Option<String> },
    /// Let this KV go.
    Release { engine: String, handle: String },
    /// Hold this KV longer.
    Renew { engine: String, handle: String },
    /// Come into these rooms, and say when the KV is there: of this rank, where it is said.
    Join { seed: Seed, rooms: Vec<Room>, rank: Option<u32> },
    /// Leave the rooms that the call of this number came into.
    Leave,
}

/// The answer to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Ok,
    /// The KV is yours, and the prefill leg had another request id.
    OkOtherId,
    Unknown,
    Freed,
    Duplicate,
    /// Said by nobody: there is no answer.
    Unreachable,
}

impl Word {
    const SAID: [(Word, &'static str); 5] = [
        (Word::Ok, "ok"),
        (Word::OkOtherId, "ok-other-id"),
        (Word::Unknown, "unknown"),
        (Word::Freed, "freed"),
        (Word::Duplicate, "duplicate"),
    ];

    pub(crate) fn as_str(self) -> &'static str {
        Self::SAID.iter().find(|(word, _)| *word == self).map_or("unreachable", |(_, text)| text)
    }
}

/// A line that is no call and no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a line between mocks")]
pub(crate) struct NoLine;

impl Display for Call {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Call::Pull { engine, handle, request_id } => {
                write!(f, "pull {engine} {handle} {}", request_id.as_deref().unwrap_or_default())
            }
            Call::Release { engine, handle } => write!(f, "release {engine} {handle}"),
            Call::Renew { engine, handle } => write!(f, "renew {engine} {handle}"),
            Call::Join { seed, rooms, rank } => {
                write!(f, "join {:x} ", seed.0)?;
                rooms.iter().try_for_each(|room| write!(f, "{room:x},"))?;
                rank.map_or(Ok(()), |rank| write!(f, " {rank}"))
            }
            Call::Leave => f.write_str("leave"),
        }
    }
}

impl FromStr for Call {
    type Err = NoLine;

    fn from_str(text: &str) -> Result<Self, NoLine> {
        // Four parts, of which the last is a request id and may hold anything but a line's end.
        let mut parts = text.splitn(4, ' ');
        let word = parts.next().ok_or(NoLine)?;
        let mut part = || parts.next().ok_or(NoLine);
        Ok(match word {
            "pull" => {
                let (engine, handle, id) = (part()?.to_owned(), part()?.to_owned(), part()?);
                Call::Pull { engine, handle, request_id: (!id.is_empty()).then(|| id.to_owned()) }
            }
            "release" => Call::Release { engine: part()?.to_owned(), handle: part()?.to_owned() },
            "renew" => Call::Renew { engine: part()?.to_owned(), handle: part()?.to_owned() },
            "join" => {
                let seed = Seed(u64::from_str_radix(part()?, 16).map_err(|_| NoLine)?);
                let rooms = part()?.split_terminator(',').map(|room| Room::from_str_radix(room, 16));
                let rooms = rooms.collect::<Result<_, _>>().map_err(|_| NoLine)?;
                let rank = parts.next().map(|rank| rank.parse().map_err(|_| NoLine)).transpose()?;
                Call::Join { seed, rooms, rank }
            }
            "leave" => Call::Leave,
            _ => return Err(NoLine),
        })
    }
}

/// A numbered line's number and rest.
pub(crate) fn numbered(line: &str) -> Result<(u64, &str), NoLine> {
    let (number, rest) = line.split_once(' ').ok_or(NoLine)?;
    Ok((number.parse().map_err(|_| NoLine)?, rest))
}

/// A numbered answer.
pub(crate) fn answer(line: &str) -> Result<(u64, Word), NoLine> {
    let (number, rest) = numbered(line)?;
    let word = Word::SAID.iter().find(|(_, text)| *text == rest).ok_or(NoLine)?.0;
    Ok((number, word))
}

/// Whether a name stands in a line as one part.
pub(crate) fn is_part(name: &str) -> bool {
    !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_survives_its_line() {
        let (engine, handle) = ("e-1".to_owned(), "h-2".to_owned());
        for call in [
            Call::Pull { engine: engine.clone(), handle: handle.clone(), request_id: None },
            Call::Pull { engine: engine.clone(), handle: handle.clone(), request_id: Some("a b c d e".into()) },
            Call::Release { engine: engine.clone(), handle: handle.clone() },
            Call::Renew { engine, handle },
            Call::Join { seed: Seed(u64::MAX), rooms: vec![0, 1, Room::MAX], rank: Some(3) },
            Call::Join { seed: Seed(0), rooms: Vec::new(), rank: None },
            Call::Leave,
        ] {
            let line = format!("17 {call}");
            let (number, rest) = numbered(&line).expect("numbered");
            assert_eq!((number, rest.parse()), (17, Ok(call)));
        }
    }

    #[test]
    fn every_answer_survives_its_line_and_anything_else_is_none() {
        for (word, _) in Word::SAID {
            assert_eq!(answer(&format!("3 {}", word.as_str())), Ok((3, word)));
        }
        for line in ["", "3", "x ok", "3 yes"] {
            assert_eq!(answer(line), Err(NoLine), "{line}");
        }
        for line in ["pull", "pull a b", "join x 1,", "join 1 g,", "join 1 1, x", "run"] {
            assert_eq!(line.parse::<Call>(), Err(NoLine), "{line}");
        }
    }
}
