//! Where chance and the time of day enter: identifiers, seeds, nonces, draws. Decisions get them as arguments.

use baton_wire::TransferId;
use std::cell::RefCell;
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
    let mut key = [0; 32];
    getrandom::fill(&mut key).expect("the kernel's random source does not fail once it is seeded");
    key
}

/// The time of day, in milliseconds since the Unix epoch.
pub(crate) fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Random bytes that are drawn from the kernel at once: a call costs it more than the bytes, and each request takes some.
const DRAWN: usize = 1024;

/// Random bytes, each given once.
struct Drawn {
    bytes: [u8; DRAWN],
    left: usize,
}

fn bytes<const N: usize>() -> [u8; N] {
    thread_local! {
        static POOL: RefCell<Drawn> = const { RefCell::new(Drawn { bytes: [0; DRAWN], left: 0 }) };
    }
    POOL.with_borrow_mut(|Drawn { bytes, left }| {
        if *left < N {
            getrandom::fill(bytes).expect("the kernel's random source does not fail once it is seeded");
            *left = DRAWN;
        }
        *left -= N;
        // What has been given is not kept: it names transfers.
        std::array::from_fn(|index| std::mem::take(&mut bytes[*left + index]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_bytes_are_given_twice() {
        let drawn: HashSet<[u8; 16]> = (0..10 * DRAWN).map(|_| bytes()).collect();
        assert_eq!(drawn.len(), 10 * DRAWN);
        assert!(!drawn.contains(&[0; 16]));
    }
}
