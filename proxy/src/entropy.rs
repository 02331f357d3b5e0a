//! Where chance and the time of day enter: identifiers, seeds, nonces, draws. Decisions get them as arguments.

use baton_wire::TransferId;
use std::time::{SystemTime, UNIX_EPOCH};

/// 64 random bits.
pub(crate) fn draw() -> u64 {
    u64::from_le_bytes(bytes())
}

/// 64 bits that spread well and that somebody could foresee: for choices among equals, where asking the kernel each time would
/// cost more than the choice.
pub(crate) fn quick() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    thread_local! {
        static STATE: (RandomState, std::cell::Cell<u64>) = (RandomState::new(), std::cell::Cell::new(0));
    }
    STATE.with(|(hasher, count)| {
        count.set(count.get().wrapping_add(1));
        hasher.hash_one(count.get())
    })
}

/// The number of a room in which two SGLang engines meet: 63 random bits, so that no two of any proxies' rooms are the same.
pub(crate) fn room() -> u64 {
    draw() >> 1
}

/// 128 random bits: a transfer that nobody can guess.
pub(crate) fn transfer_id() -> TransferId {
    TransferId(bytes())
}

/// 128 random bits in hexadecimal.
pub(crate) fn hex() -> String {
    transfer_id().to_string()
}

/// A signing key of this process alone.
pub(crate) fn key() -> [u8; 32] {
    bytes()
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
