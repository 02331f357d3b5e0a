//! Payloads of the control messages: what each says, and the two functions that write and read them.

use super::header::{Codec, Header, HeaderError, Kind};
use super::{CONTROL_BYTES_MAX, ErrorCode, FEATURES, FRAME_BYTES_MAX, HEADER_BYTES, PROTOCOL};
use crate::{Epoch, Fingerprint, KvDigest, PromptHash, SessionId, TransferId};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};

/// A control message's payload.
pub trait Body: Serialize + DeserializeOwned {
    /// The kind of message that carries it.
    const KIND: Kind;
}

/// Version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protocol {
    /// Sides with different ones cannot talk.
    pub major: u8,
    /// For logs alone: what is in force is negotiated by features.
    pub minor: u8,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// Everything but frames. Separate, so that a 4 MiB frame never delays a CANCEL.
    Control,
    /// Frames.
    Bulk,
}

/// HELLO: first on each connection, both ways. The answer repeats stream and session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the protocol.
    pub protocol: Protocol,
    /// Abilities, one bit each; those that both sides have are in force.
    pub features: u64,
    /// What must be equal on both sides.
    pub fingerprint: Fingerprint,
    /// This life of the sending process.
    pub epoch: Epoch,
    /// Minted by the side that dials; ties its connections together.
    pub session: SessionId,
    /// What this connection is for.
    pub stream: Stream,
    /// Bytes of a FRAME's payload that the sender takes or makes at most.
    pub frame_bytes_max: u32,
}

impl Hello {
    /// This build's HELLO.
    pub const fn new(fingerprint: Fingerprint, epoch: Epoch, session: SessionId, stream: Stream) -> Hello {
        Hello {
            protocol: PROTOCOL,
            features: FEATURES,
            fingerprint,
            epoch,
            session,
            stream,
            frame_bytes_max: FRAME_BYTES_MAX,
        }
    }
}

impl Body for Hello {
    const KIND: Kind = Kind::Hello;
}

/// SUBSCRIBE: the consumer asks for a transfer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscribe {
    /// Signed [`crate::signing::TransferClaims`].
    pub token: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Hash of the prompt.
    pub prompt_hash: PromptHash,
    /// Leading blocks that the consumer has already: none of them is sent.
    pub have_prefix_blocks: u32,
    /// First KV head wanted.
    pub head_start: u16,
    /// KV heads wanted.
    pub head_count: u16,
    /// How frames may be coded.
    pub codec: Codec,
    /// Payload bytes that may be under way before the first CREDIT. With none the consumer has no blocks yet: the KV is kept for
    /// it, it is told when computing has begun (STARTED), and frames leave from its first CREDIT on.
    pub credit_bytes: u64,
}

impl Body for Subscribe {
    const KIND: Kind = Kind::Subscribe;
}

/// COMMIT: all frames have been sent; what they must add up to, and what the prefill found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Commit {
    /// Prompt tokens whose KV is complete.
    pub tokens: u32,
    /// Frames sent.
    pub frames: u32,
    /// Over the checksums of all blocks sent.
    pub digest: KvDigest,
    /// Hash of the prompt that was computed.
    pub prompt_hash: PromptHash,
    /// Prompt tokens that the producer found in its prefix cache.
    pub cached_tokens: u32,
    /// The first token of each choice, in the choices' order.
    pub choices: Vec<FirstToken>,
    /// Microseconds from the last computed layer to the sending of this message, by the producer's clock alone.
    pub since_compute_end_us: u64,
}

impl Body for Commit {
    const KIND: Kind = Kind::Commit;
}

/// The first token of one choice: the consumer continues from it without a forward pass of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FirstToken {
    /// The token.
    pub id: u32,
    /// Natural log of its probability, where asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<Logprob>,
    /// The likeliest tokens with theirs, likeliest first, where asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top_logprobs: Vec<(u32, Logprob)>,
    /// Hash of the raw logits, where asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logits_hash: Option<u64>,
}

/// A log-probability. On the wire it is its bit pattern: JSON has no minus infinity, and a handed-over request must answer with
/// the very digits that an aggregated one does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logprob(pub f32);

impl Serialize for Logprob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0.to_bits())
    }
}

impl<'de> Deserialize<'de> for Logprob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u32::deserialize(deserializer).map(|bits| Logprob(f32::from_bits(bits)))
    }
}

/// CREDIT: the consumer has taken this many payload bytes in, so as many more may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// Payload bytes.
    pub bytes: u64,
    /// In the first CREDIT of a subscription without credit: leading blocks that the consumer has already, as in [`Subscribe`]. Zero
    /// in every other.
    #[serde(default)]
    pub have_prefix_blocks: u32,
}

impl Body for Credit {
    const KIND: Kind = Kind::Credit;
}

/// ERROR: the transfer, or with the zero id the session, has failed. A code and no text: nothing of a request can leak, and
/// the receiver decides by `match`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReport {
    /// Why.
    pub code: ErrorCode,
}

impl Body for ErrorReport {
    const KIND: Kind = Kind::Error;
}

/// A payload that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Another kind of message than the one expected.
    #[error("expected {expected}, found {found}")]
    Kind {
        /// Expected.
        expected: Kind,
        /// Found.
        found: Kind,
    },
    /// Bits changed on the way.
    #[error("{kind} payload checksum is {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// Of the message.
        kind: Kind,
        /// In the header.
        found: u32,
        /// Of the payload.
        computed: u32,
    },
    /// No such JSON object. The text is not repeated: it may hold a token.
    #[error("{kind} payload is malformed at line {line} column {column}")]
    Malformed {
        /// Of the message.
        kind: Kind,
        /// Line of the JSON.
        line: usize,
        /// Column of the JSON.
        column: usize,
    },
    /// Longer than the other side would take.
    #[error("{kind} payload of {len} bytes, at most {max} are accepted")]
    TooLong {
        /// Of the message.
        kind: Kind,
        /// Bytes.
        len: usize,
        /// Accepted at most.
        max: u32,
    },
}

/// A whole control message: header and payload.
///
/// # Errors
/// [`BodyError::TooLong`].
pub fn encode<B: Body>(transfer: TransferId, attempt: u32, body: &B) -> Result<Vec<u8>, BodyError> {
    let json =
        serde_json::to_vec(body).expect("bodies are strings, integers and lists of them, which always serialise");
    let too_long = |max| BodyError::TooLong { kind: B::KIND, len: json.len(), max };
    let len = u32::try_from(json.len()).map_err(|_| too_long(CONTROL_BYTES_MAX))?;
    let header = Header { len, payload_crc: crc32c::crc32c(&json), ..Header::bare(B::KIND, transfer, attempt) };
    let header = header.encode();
    // The reader's own check decides, so that nothing leaves which the other side must refuse.
    if let Err(HeaderError::TooLong { max, .. }) = Header::decode(&header, &super::Negotiated::NOTHING) {
        return Err(too_long(max));
    }
    Ok([&header[..], &json].concat())
}

/// A whole control message that has no payload: COMMIT_ACK, CANCEL, LEASE_RENEW, PING, PONG.
pub fn encode_bare(kind: Kind, transfer: TransferId, attempt: u32) -> [u8; HEADER_BYTES] {
    Header::bare(kind, transfer, attempt).encode()
}

/// Reads a control message's payload.
///
/// # Errors
/// See [`BodyError`]; the checksum is compared before the payload is parsed.
pub fn decode<B: Body>(header: &Header, payload: &[u8]) -> Result<B, BodyError> {
    if header.kind != B::KIND {
        return Err(BodyError::Kind { expected: B::KIND, found: header.kind });
    }
    let computed = crc32c::crc32c(payload);
    if header.payload_crc != computed {
        return Err(BodyError::Checksum { kind: B::KIND, found: header.payload_crc, computed });
    }
    serde_json::from_slice(payload).map_err(|error| BodyError::Malformed {
        kind: B::KIND,
        line: error.line(),
        column: error.column(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::Negotiated;
    use proptest::prelude::*;

    const ID: TransferId = TransferId([5; 16]);

    fn through_the_wire<B: Body>(body: &B) -> B {
        let bytes = encode(ID, 3, body).expect("short enough");
        let (head, payload) = bytes.split_first_chunk::<HEADER_BYTES>().expect("a header comes first");
        let header = Header::decode(head, &Negotiated::NOTHING).expect("own header is accepted");
        assert_eq!((header.transfer, header.attempt, header.len as usize), (ID, 3, payload.len()));
        decode(&header, payload).expect("own payload parses")
    }

    fn logprobs() -> impl Strategy<Value = Logprob> {
        any::<u32>().prop_map(|bits| Logprob(f32::from_bits(bits))).prop_filter("NaN equals nothing", |l| !l.0.is_nan())
    }

    fn first_tokens() -> impl Strategy<Value = FirstToken> {
        let top = prop::collection::vec((any::<u32>(), logprobs()), 0..4);
        (any::<u32>(), prop::option::of(logprobs()), top, any::<Option<u64>>())
            .prop_map(|(id, logprob, top_logprobs, logits_hash)| FirstToken { id, logprob, top_logprobs, logits_hash })
    }

    proptest! {
        #[test]
        fn a_commit_survives_the_wire_bit_for_bit(
            numbers in any::<(u32, u32, u32, u64)>(), hashes in any::<([u8; 32], [u8; 32])>(), choices in prop::collection::vec(first_tokens(), 0..4),
        ) {
            let (tokens, frames, cached_tokens, since_compute_end_us) = numbers;
            let (digest, prompt_hash) = (KvDigest(hashes.0), PromptHash(hashes.1));
            let commit = Commit { tokens, frames, digest, prompt_hash, cached_tokens, choices, since_compute_end_us };
            prop_assert_eq!(through_the_wire(&commit), commit);
        }

        #[test]
        fn a_subscribe_survives_the_wire(token in "[ -~]{0,300}", numbers in any::<(u32, u32, u16, u16, u64)>(), hash in any::<[u8; 32]>()) {
            let (prompt_tokens, have_prefix_blocks, head_start, head_count, credit_bytes) = numbers;
            let prompt_hash = PromptHash(hash);
            let codec = Codec::None;
            let body = Subscribe { token, prompt_tokens, prompt_hash, have_prefix_blocks, head_start, head_count, codec, credit_bytes };
            prop_assert_eq!(through_the_wire(&body), body);
        }

        #[test]
        fn arbitrary_payloads_are_parsed_or_refused(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let crc = crc32c::crc32c(&payload);
            for kind in Kind::ALL {
                let header = Header { len: payload.len() as u32, payload_crc: crc, ..Header::bare(kind, ID, 1) };
                let _ = decode::<Hello>(&header, &payload);
                let _ = decode::<Subscribe>(&header, &payload);
                let _ = decode::<Commit>(&header, &payload);
                let _ = decode::<ErrorReport>(&header, &payload);
                prop_assert!(kind == Kind::Credit || decode::<Credit>(&header, &payload).is_err());
            }
        }
    }

    #[test]
    fn a_hello_survives_the_wire_and_its_limit() {
        let hello = Hello::new(Fingerprint([1; 32]), Epoch([2; 16]), SessionId([3; 16]), Stream::Bulk);
        assert_eq!(through_the_wire(&hello), hello);
    }

    #[test]
    fn a_field_of_a_newer_version_is_skipped() {
        let payload = br#"{"bytes": 7, "window": "new"}"#;
        let header = Header {
            len: payload.len() as u32,
            payload_crc: crc32c::crc32c(payload),
            ..Header::bare(Kind::Credit, ID, 1)
        };
        assert_eq!(decode::<Credit>(&header, payload).expect("parses"), Credit { bytes: 7, have_prefix_blocks: 0 });
    }

    #[test]
    fn a_changed_payload_is_noticed_and_not_repeated_in_the_error() {
        let bytes = encode(ID, 1, &Credit { bytes: 7, have_prefix_blocks: 0 }).expect("short enough");
        let (head, payload) = bytes.split_first_chunk::<HEADER_BYTES>().expect("a header comes first");
        let header = Header::decode(head, &Negotiated::NOTHING).expect("own header is accepted");
        let mut payload = payload.to_vec();
        payload[2] ^= 1;
        assert!(matches!(decode::<Credit>(&header, &payload), Err(BodyError::Checksum { .. })));
        assert!(matches!(decode::<ErrorReport>(&header, &payload), Err(BodyError::Kind { .. })));
    }

    #[test]
    fn what_the_other_side_would_refuse_is_not_written() {
        let choice =
            FirstToken { id: 1, logprob: None, top_logprobs: vec![(1, Logprob(0.0)); 200_000], logits_hash: None };
        let commit = Commit {
            tokens: 1,
            frames: 1,
            digest: KvDigest([0; 32]),
            prompt_hash: PromptHash([0; 32]),
            cached_tokens: 0,
            choices: vec![choice],
            since_compute_end_us: 0,
        };
        assert!(matches!(encode(ID, 1, &commit), Err(BodyError::TooLong { max: CONTROL_BYTES_MAX, .. })));
    }
}
