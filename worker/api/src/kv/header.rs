//! The 64-byte header that starts every message: its layout, and the total function that reads it.
//!
//! ```text
//!  0 magic u32 | 4 version u8 | 5 kind u8 | 6 flags u16 | 8 transfer [16]
//! 24 attempt u32 | 28 seq u32 | 32 layer u32 | 36 first_block u32 | 40 block_count u32 | 44 len u32
//! 48 head_start u16 | 50 head_count u16 | 52 codec u8 | 53 zero [3] | 56 payload CRC-32C u32 | 60 header CRC-32C u32
//! ```
//! All numbers are little-endian. There is no address of anybody's memory in it: `first_block` counts in the prompt, and each
//! side alone knows where its blocks are.

use super::{CONTROL_BYTES_MAX, FEATURES, FRAME_BYTES_MAX, HELLO_BYTES_MAX, PROTOCOL};
use crate::TransferId;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 64;

/// `BTKV` as bytes: tells a stray client of another protocol apart at its first four bytes.
const MAGIC: u32 = u32::from_le_bytes(*b"BTKV");

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// First on each connection, both ways.
    Hello = 1,
    /// Consumer asks for a transfer.
    Subscribe = 2,
    /// KV bytes of a run of blocks of one layer.
    Frame = 3,
    /// All frames have been sent; what they must add up to.
    Commit = 4,
    /// Everything is here and verified: the producer may free.
    CommitAck = 5,
    /// Consumer no longer wants the transfer.
    Cancel = 6,
    /// Consumer has room for more bytes.
    Credit = 7,
    /// Consumer still wants the transfer.
    LeaseRenew = 8,
    /// A transfer, or with the zero id the session, has failed.
    Error = 9,
    /// The sender lives.
    Ping = 10,
    /// Answer to PING.
    Pong = 11,
    /// Producer has begun to compute a transfer that was asked for without credit.
    Started = 12,
}

impl Kind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Kind; 12] = [
        Kind::Hello,
        Kind::Subscribe,
        Kind::Frame,
        Kind::Commit,
        Kind::CommitAck,
        Kind::Cancel,
        Kind::Credit,
        Kind::LeaseRenew,
        Kind::Error,
        Kind::Ping,
        Kind::Pong,
        Kind::Started,
    ];

    /// The kind as protocol descriptions and logs spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Hello => "HELLO",
            Kind::Subscribe => "SUBSCRIBE",
            Kind::Frame => "FRAME",
            Kind::Commit => "COMMIT",
            Kind::CommitAck => "COMMIT_ACK",
            Kind::Cancel => "CANCEL",
            Kind::Credit => "CREDIT",
            Kind::LeaseRenew => "LEASE_RENEW",
            Kind::Error => "ERROR",
            Kind::Ping => "PING",
            Kind::Pong => "PONG",
            Kind::Started => "STARTED",
        }
    }

    fn from_number(number: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// Bytes of payload that a message of this kind may have.
    const fn payload_bytes_max(self, negotiated: &Negotiated) -> u32 {
        match self {
            Kind::Hello => HELLO_BYTES_MAX,
            Kind::Frame => negotiated.frame_bytes_max,
            Kind::Subscribe | Kind::Commit | Kind::Credit | Kind::Error => CONTROL_BYTES_MAX,
            Kind::CommitAck | Kind::Cancel | Kind::LeaseRenew | Kind::Ping | Kind::Pong | Kind::Started => 0,
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a frame's KV bytes are coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Codec {
    /// As they lie in the pool.
    #[default]
    None = 0,
}

/// What two sides agreed on in their HELLOs; the measure for everything that is read afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Abilities that both have.
    pub features: u64,
    /// Bytes of a FRAME's payload at most: the smaller of both sides' limits.
    pub frame_bytes_max: u32,
}

impl Negotiated {
    /// Before HELLO: no features, and no frame is acceptable.
    pub const NOTHING: Negotiated = Negotiated { features: 0, frame_bytes_max: 0 };

    /// What this build and a peer with these abilities and this frame limit have in common.
    pub fn with_peer(features: u64, frame_bytes_max: u32) -> Negotiated {
        Negotiated { features: FEATURES & features, frame_bytes_max: FRAME_BYTES_MAX.min(frame_bytes_max) }
    }

    /// Header flags that may be set. Each flag comes with the feature that defines it; 1.0 defines none.
    const fn flags(&self) -> u16 {
        0
    }
}

/// What a header says. Fields that a kind does not use are zero, and a message where they are not is refused: so they can be
/// given a meaning later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the message is.
    pub kind: Kind,
    /// Bits defined by negotiated features.
    pub flags: u16,
    /// Which transfer; zero for the session itself.
    pub transfer: TransferId,
    /// Which attempt at it.
    pub attempt: u32,
    /// FRAME: counts from 0 in a transfer, without gaps.
    pub seq: u32,
    /// FRAME: layer of the model.
    pub layer: u32,
    /// FRAME: index in the prompt of the first block.
    pub first_block: u32,
    /// FRAME: blocks, one after the other in the prompt; each has an equal part of the payload.
    pub block_count: u32,
    /// Bytes of payload.
    pub len: u32,
    /// FRAME: first KV head.
    pub head_start: u16,
    /// FRAME: KV heads.
    pub head_count: u16,
    /// FRAME: how the payload is coded.
    pub codec: Codec,
    /// CRC-32C of the payload.
    pub payload_crc: u32,
}

/// 64 bytes that are no header we accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not this protocol at all.
    #[error("message starts with {0:#010x}, which is no KV message")]
    Magic(u32),
    /// Bits changed on the way.
    #[error("header checksum is {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// In the header.
        found: u32,
        /// Of the header.
        computed: u32,
    },
    /// Another language.
    #[error("protocol version {0}, this side speaks {major}", major = PROTOCOL.major)]
    Version(u8),
    /// A kind that this version does not have.
    #[error("unknown message kind {0}")]
    Kind(u8),
    /// A codec that was not agreed on.
    #[error("unknown codec {0}")]
    Codec(u8),
    /// A flag whose feature was not agreed on.
    #[error("flags {0:#06x} were not negotiated")]
    Flags(u16),
    /// A field is set that this kind does not use.
    #[error("{kind} has a field set that it does not use")]
    Reserved {
        /// Of the message.
        kind: Kind,
    },
    /// Longer than was agreed on.
    #[error("{kind} of {len} bytes, at most {max} are accepted")]
    TooLong {
        /// Of the message.
        kind: Kind,
        /// Bytes of payload that it claims.
        len: u32,
        /// Accepted at most.
        max: u32,
    },
    /// A frame of no blocks, no heads, past the last block index, or whose bytes are no whole number for each block.
    #[error("frame of {block_count} blocks from {first_block} in {len} bytes")]
    FrameShape {
        /// Index of the first block.
        first_block: u32,
        /// Blocks.
        block_count: u32,
        /// Bytes.
        len: u32,
    },
}

impl Header {
    /// A header of `kind` for a transfer, everything else zero.
    pub const fn bare(kind: Kind, transfer: TransferId, attempt: u32) -> Header {
        Header {
            kind,
            flags: 0,
            transfer,
            attempt,
            seq: 0,
            layer: 0,
            first_block: 0,
            block_count: 0,
            len: 0,
            head_start: 0,
            head_count: 0,
            codec: Codec::None,
            payload_crc: 0,
        }
    }

    /// The header's bytes, its own checksum included.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4] = PROTOCOL.major;
        bytes[5] = self.kind as u8;
        bytes[6..8].copy_from_slice(&self.flags.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.transfer.0);
        let words = [self.attempt, self.seq, self.layer, self.first_block, self.block_count, self.len];
        for (place, word) in bytes[24..48].chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes[48..50].copy_from_slice(&self.head_start.to_le_bytes());
        bytes[50..52].copy_from_slice(&self.head_count.to_le_bytes());
        bytes[52] = self.codec as u8;
        bytes[56..60].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header. Total: any 64 bytes give a header whose `len` is within what was negotiated, or an error.
    ///
    /// # Errors
    /// See [`HeaderError`]; the checksum is compared before any field is believed.
    pub fn decode(bytes: &[u8; HEADER_BYTES], negotiated: &Negotiated) -> Result<Header, HeaderError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if u32_at(0) != MAGIC {
            return Err(HeaderError::Magic(u32_at(0)));
        }
        let computed = crc32c::crc32c(&bytes[..60]);
        if u32_at(60) != computed {
            return Err(HeaderError::Checksum { found: u32_at(60), computed });
        }
        if bytes[4] != PROTOCOL.major {
            return Err(HeaderError::Version(bytes[4]));
        }
        let kind = Kind::from_number(bytes[5]).ok_or(HeaderError::Kind(bytes[5]))?;
        let mut transfer = TransferId([0; 16]);
        transfer.0.copy_from_slice(&bytes[8..24]);
        let header = Header {
            kind,
            flags: u16_at(6),
            transfer,
            attempt: u32_at(24),
            seq: u32_at(28),
            layer: u32_at(32),
            first_block: u32_at(36),
            block_count: u32_at(40),
            len: u32_at(44),
            head_start: u16_at(48),
            head_count: u16_at(50),
            codec: if bytes[52] == Codec::None as u8 {
                Codec::None
            } else {
                return Err(HeaderError::Codec(bytes[52]));
            },
            payload_crc: u32_at(56),
        };
        if bytes[53..56] != [0; 3] {
            return Err(HeaderError::Reserved { kind });
        }
        header.check(negotiated)
    }

    fn check(self, negotiated: &Negotiated) -> Result<Header, HeaderError> {
        let Header { kind, first_block, block_count, len, .. } = self;
        if self.flags & !negotiated.flags() != 0 {
            return Err(HeaderError::Flags(self.flags));
        }
        let max = kind.payload_bytes_max(negotiated);
        if len > max {
            return Err(HeaderError::TooLong { kind, len, max });
        }
        if kind == Kind::Frame {
            let whole = block_count > 0 && len > 0 && len % block_count == 0;
            let heads = self.head_count > 0 && self.head_start.checked_add(self.head_count).is_some();
            if !whole || !heads || first_block.checked_add(block_count).is_none() {
                return Err(HeaderError::FrameShape { first_block, block_count, len });
            }
        } else {
            let payload_crc = if len == 0 { 0 } else { self.payload_crc };
            if self != (Header { len, payload_crc, ..Header::bare(kind, self.transfer, self.attempt) }) {
                return Err(HeaderError::Reserved { kind });
            }
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AGREED: Negotiated = Negotiated { features: 0, frame_bytes_max: FRAME_BYTES_MAX };

    fn frames() -> impl Strategy<Value = Header> {
        let ids = (any::<[u8; 16]>(), any::<u32>(), any::<u32>(), any::<u32>());
        let shape = (0..u32::MAX / 2, 1..64u32, 1..=FRAME_BYTES_MAX / 64, 0..1000u16, 1..1000u16, any::<u32>());
        (ids, shape).prop_map(
            |((transfer, attempt, seq, layer), (first_block, block_count, each, start, heads, crc))| Header {
                seq,
                layer,
                first_block,
                block_count,
                len: each * block_count,
                head_start: start,
                head_count: heads,
                payload_crc: crc,
                ..Header::bare(Kind::Frame, TransferId(transfer), attempt)
            },
        )
    }

    /// Repairs the checksum, so that what is tested is the check behind it.
    fn sealed(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    proptest! {
        #[test]
        fn a_frame_header_survives_its_bytes(header in frames()) {
            prop_assert_eq!(Header::decode(&header.encode(), &AGREED), Ok(header));
        }

        #[test]
        fn any_flipped_bit_is_noticed(header in frames(), bit in 0..HEADER_BYTES * 8) {
            let mut bytes = header.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&bytes, &AGREED).is_err());
        }

        #[test]
        fn any_sealed_bytes_are_a_header_within_bounds_or_an_error(tail in any::<[u8; 59]>(), kind in 0..14u8) {
            let mut bytes = [0u8; HEADER_BYTES];
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            bytes[4] = PROTOCOL.major;
            bytes[5..].copy_from_slice(&tail);
            bytes[5] = kind;
            if let Ok(header) = Header::decode(&sealed(bytes), &AGREED) {
                prop_assert!(header.len <= header.kind.payload_bytes_max(&AGREED));
            }
        }
    }

    #[test]
    fn a_million_random_headers_end_in_an_error_or_within_bounds() {
        // SplitMix64 (Steele, Lea and Flood, 2014): fast enough for a million headers in a debug build.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        for round in 0..1_000_000u32 {
            let mut bytes = [0u8; HEADER_BYTES];
            bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&next().to_le_bytes()));
            if round % 2 == 0 {
                // Half of them get past magic, version, kind and checksum, where the interesting checks begin.
                bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
                bytes[4] = PROTOCOL.major;
                bytes[5] %= 13;
                bytes[6..8].fill(0);
                bytes[52..56].fill(0);
                bytes = sealed(bytes);
            }
            if let Ok(header) = Header::decode(&bytes, &AGREED) {
                assert!(header.len <= FRAME_BYTES_MAX);
            }
        }
    }

    #[test]
    fn each_rule_has_its_own_error() {
        let frame =
            Header { block_count: 2, len: 64, head_count: 1, ..Header::bare(Kind::Frame, TransferId([1; 16]), 1) };
        let check = |header: Header, expect: HeaderError| {
            assert_eq!(Header::decode(&header.encode(), &AGREED), Err(expect));
        };
        check(Header { flags: 4, ..frame }, HeaderError::Flags(4));
        check(Header { len: 63, ..frame }, HeaderError::FrameShape { first_block: 0, block_count: 2, len: 63 });
        check(Header { block_count: 0, ..frame }, HeaderError::FrameShape { first_block: 0, block_count: 0, len: 64 });
        check(Header { head_count: 0, ..frame }, HeaderError::FrameShape { first_block: 0, block_count: 2, len: 64 });
        let last = u32::MAX - 1;
        check(
            Header { first_block: last, ..frame },
            HeaderError::FrameShape { first_block: last, block_count: 2, len: 64 },
        );
        let (kind, len) = (Kind::Frame, FRAME_BYTES_MAX + 2);
        check(Header { len, ..frame }, HeaderError::TooLong { kind, len, max: FRAME_BYTES_MAX });
        let cancel = Header::bare(Kind::Cancel, TransferId([1; 16]), 1);
        check(Header { len: 1, ..cancel }, HeaderError::TooLong { kind: Kind::Cancel, len: 1, max: 0 });
        check(Header { layer: 1, ..cancel }, HeaderError::Reserved { kind: Kind::Cancel });
        let hello = Header::bare(Kind::Hello, TransferId([0; 16]), 0);
        let (kind, len) = (Kind::Hello, HELLO_BYTES_MAX + 1);
        check(Header { len, ..hello }, HeaderError::TooLong { kind, len, max: HELLO_BYTES_MAX });

        let patched = |at: usize, byte: u8| {
            let mut bytes = frame.encode();
            bytes[at] = byte;
            Header::decode(&sealed(bytes), &AGREED)
        };
        assert_eq!(patched(4, 9), Err(HeaderError::Version(9)));
        assert_eq!(patched(5, 99), Err(HeaderError::Kind(99)));
        assert_eq!(patched(52, 7), Err(HeaderError::Codec(7)));
        assert_eq!(patched(54, 1), Err(HeaderError::Reserved { kind: Kind::Frame }));
        assert!(matches!(patched(0, 0), Err(HeaderError::Magic(_))));
    }

    #[test]
    fn no_frame_is_acceptable_before_hello() {
        let frame =
            Header { block_count: 1, len: 1, head_count: 1, ..Header::bare(Kind::Frame, TransferId([1; 16]), 1) };
        let refused = Header::decode(&frame.encode(), &Negotiated::NOTHING);
        assert_eq!(refused, Err(HeaderError::TooLong { kind: Kind::Frame, len: 1, max: 0 }));
    }

    #[test]
    fn both_sides_limits_bound_what_is_negotiated() {
        assert_eq!(Negotiated::with_peer(u64::MAX, 1000), Negotiated { features: FEATURES, frame_bytes_max: 1000 });
        assert_eq!(Negotiated::with_peer(0, u32::MAX).frame_bytes_max, FRAME_BYTES_MAX);
    }
}
