//! Where chance and the time of day enter: identifiers, seeds, nonces, draws. Decisions get them as arguments.

use baton_wire::TransferId;
use std::time::{SystemTime, UNIX_EPOCH};

/// 64 random bits.
pub(crate) fn draw() -> u64 {
    u64::from_le_bytes(bytes())
}

/// 128 random bits: a transfer that nobody can guess.
pub(crate) fn transfer_id() -> TransferId {
    TransferId(bytes())
}

/// 128 random bits in hexadecimal.
pub(crate) fn hex() -> String {
    transfer_id().to_string()
}

/// The time of day, in milliseconds since the Unix epoch.
pub(crate) fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel's random source does not fail once it is seeded");
    bytes
}
