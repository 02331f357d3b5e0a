//! KV messages between two workers: a fixed 64-byte header, then a payload whose length is bounded before it is read.
//!
//! Two kinds of payload. **FRAME**: raw KV bytes of a run of blocks of one layer, so that they can be copied between pool and
//! socket without being looked at. **Everything else**: a small JSON object ([`control`]). JSON because these messages are a
//! handful for each handover, off the bulk path, and change over time: a field that one side does not know yet is skipped, one
//! that the other side does not send yet is absent, and no version of either carries code. Bytes that are wrong end in a typed
//! error, never in a panic, and no length is believed before it was compared with what the two sides agreed on.
//!
//! ```text
//! consumer (decode)                                producer (prefill)
//!   HELLO control ──────────────────────────────────────>     version, fingerprint, epoch, session
//!   <────────────────────────────────────────────── HELLO
//!   HELLO bulk (second connection, same session) ───────>
//!   <────────────────────────────────────────────── HELLO
//!   SUBSCRIBE token, prompt ────────────────────────────>     before or after the export is open
//!   LEASE_RENEW ... ────────────────────────────────────>     until the end
//!   <──────────────────────────────────────────── STARTED     the first layer is computed
//!   CREDIT bytes, prefix ───────────────────────────────>     once there are blocks for it
//!   <──────────────────────────────────── bulk: FRAME ...     as layers of chunks are done
//!   CREDIT ... ─────────────────────────────────────────>
//!   <───────────────────────────── COMMIT digest, tokens      after the last frame
//!   COMMIT_ACK (or CANCEL at any time) ─────────────────>     producer frees
//! ```
//!
//! **No worker waits for a worker that waits for it.** A producer that has STARTED holds all the blocks that the prompt needs, so it
//! will end whatever the others do; and a consumer takes blocks for a transfer only after STARTED. So a consumer's blocks
//! never wait for a prefill that waits for room, though exports may wait for room at their consumers.

pub mod checksum;
pub mod control;
pub mod error_code;
pub mod header;

pub use checksum::BlockChecksums;
pub use control::{
    Body, BodyError, Commit, Credit, ErrorReport, FirstToken, Hello, Logprob, Protocol, Stream, Subscribe,
};
pub use error_code::ErrorCode;
pub use header::{Codec, HEADER_BYTES, Header, HeaderError, Kind, Negotiated};

/// Bytes of a FRAME's payload at most. A frame is the unit at which a transfer can be cancelled and at which several share a
/// connection; at 1 GB/s one of 4 MiB takes 4 ms, and larger ones would only save headers of 64 bytes.
pub const FRAME_BYTES_MAX: u32 = 4 << 20;

/// Bytes of a HELLO's payload at most: it is under 400 bytes, and is read before anything is known of the peer.
pub const HELLO_BYTES_MAX: u32 = 4 << 10;

/// Bytes of any other control payload at most. The largest is a COMMIT with 128 choices of 20 alternatives each: about 100 KiB.
pub const CONTROL_BYTES_MAX: u32 = 1 << 20;

/// The protocol that this crate speaks. A major number is a different language; minor ones add what the other side may ignore.
pub const PROTOCOL: Protocol = Protocol { major: 1, minor: 0 };

/// Optional abilities that this build has, one bit each. None is optional in 1.0; codecs, head ranges and further bulk
/// connections will be. What both sides have is in force, so neither ever has to know the other's version.
pub const FEATURES: u64 = 0;
