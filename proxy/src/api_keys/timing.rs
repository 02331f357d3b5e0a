//! Whether the time that a lookup takes tells anything of the keys in the file: two kinds of requests in random order, and Welch's t-test on
//! their times (Reparaz, Balasch, Verbauwhede, "Dude, is my code constant time?", <https://eprint.iacr.org/2016/1123>).
//!
//! Not a part of `make test`, where no time counts; `make bench-api-keys` runs it on optimised code, which is what is in question. Each
//! measurement is made of a lookup with an early end as well, and fails where that one is not caught.

use super::*;
use crate::entropy;
use std::hint::black_box;
use std::io::Write as _;
use std::time::Instant;

/// Keys in the file: a difference of one comparison counts as often.
const KEYS: usize = 200;

/// Samples of one round. The early end shows after some hundred.
const SAMPLES: usize = 40_000;

/// Beyond this t the two kinds differ: for times that don't, it is exceeded once in 150,000 rounds.
const T_MAX: f64 = 4.5;

/// What leaks, leaks each time; what an interrupt or a neighbour did, does not come again with the same sign.
const ROUNDS: usize = 3;

/// Of all samples this share is used, the fastest: the rest met an interrupt or another process.
const USED: f64 = 0.9;

/// Mean and variance of the mean.
fn mean(times: &[f64]) -> (f64, f64) {
    let count = times.len() as f64;
    let mean = times.iter().sum::<f64>() / count;
    let variance = times.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / (count - 1.0);
    (mean, variance / count)
}

/// Welch's t of the two kinds' times: positive where the first takes longer.
fn t(times: &mut [(bool, f64)]) -> f64 {
    times.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    let used = &times[..(times.len() as f64 * USED) as usize];
    let of = |kind: bool| mean(&used.iter().filter(|(is, _)| *is == kind).map(|(_, time)| *time).collect::<Vec<_>>());
    let ((first, first_variance), (second, second_variance)) = (of(false), of(true));
    (first - second) / (first_variance + second_variance).sqrt().max(f64::MIN_POSITIVE)
}

/// One round: t of lookups of the one and the other.
fn round<T: Copy, R>(kinds: [T; 2], lookup: &impl Fn(&T) -> R) -> f64 {
    let mut times: Vec<(bool, f64)> = (0..SAMPLES)
        .map(|_| {
            let kind = entropy::quick() & 1 == 1;
            // Both kinds from the same place, or the caches would tell them apart.
            let asked = black_box(kinds[usize::from(kind)]);
            let since = Instant::now();
            black_box(lookup(black_box(&asked)));
            (kind, since.elapsed().as_nanos() as f64)
        })
        .collect();
    t(&mut times)
}

/// The t that is seen in every round; 0 where rounds disagree on who is slower.
fn lasting<T: Copy, R>(kinds: [T; 2], lookup: impl Fn(&T) -> R) -> f64 {
    round(kinds, &lookup);
    let rounds: Vec<f64> = (0..ROUNDS).map(|_| round(kinds, &lookup)).collect();
    let agree = rounds.iter().all(|t| t.signum() == rounds[0].signum());
    let least = rounds.iter().map(|t| t.abs()).fold(f64::INFINITY, f64::min);
    if agree { least } else { 0.0 }
}

/// Fails where ours tells the kinds apart, or where the one with an early end does not.
fn check<T: Copy, R, S>(what: &str, kinds: [T; 2], ours: impl Fn(&T) -> R, early: impl Fn(&T) -> S) {
    let (ours, early) = (lasting(kinds, ours), lasting(kinds, early));
    let line = format!("goal t {what}: {ours:.1} <= {T_MAX} (with an early end {early:.1})\n");
    std::io::stderr().write_all(line.as_bytes()).expect("stderr is open");
    assert!(early > T_MAX, "{what}: an early end is not noticed, so this measures nothing: {early}");
    assert!(ours <= T_MAX, "{what}: the time of a lookup tells: {ours}");
}

#[test]
fn welchs_t_is_large_for_times_that_differ_and_small_for_times_that_do_not() {
    let times = |shift: f64| -> Vec<(bool, f64)> {
        let noise = |index: usize| (index * 7919 % 101) as f64;
        (0..10_000).map(|index| (index % 2 == 1, noise(index / 2) + if index % 2 == 1 { shift } else { 0.0 })).collect()
    };
    assert!(t(&mut times(0.0)).abs() < 1.0);
    assert!(t(&mut times(5.0)) < -T_MAX);
    assert!(t(&mut times(-5.0)) > T_MAX);
}

#[test]
#[ignore = "it measures time: make bench-api-keys"]
fn the_time_of_a_lookup_tells_nothing_of_the_keys() {
    let stored = Digest::of(b"stored");
    let bytes = |digest: &Digest| -> [u8; 32] { std::array::from_fn(|i| digest.0[i / 8].to_le_bytes()[i % 8]) };
    let differing_in = |byte: usize| {
        let mut bytes = bytes(&stored);
        bytes[byte] ^= 1;
        Digest::from_bytes(bytes)
    };

    // As if somebody had learnt all of a digest but its last byte.
    let digests = vec![stored; KEYS];
    let as_bytes: Vec<[u8; 32]> = digests.iter().map(bytes).collect();
    let early = |asked: &Digest| {
        let asked = bytes(asked);
        let equal = |digest: &[u8; 32]| digest.iter().zip(&asked).all(|(a, b)| a == b);
        as_bytes.iter().position(equal)
    };
    let ours = |asked: &Digest| place(digests.iter(), asked);
    check("wrong in the first or in the last byte", [differing_in(0), differing_in(31)], ours, early);

    let digests: Vec<Digest> = (0..KEYS).map(|number| Digest::of(&number.to_le_bytes())).collect();
    let ours = |asked: &Digest| place(digests.iter(), asked);
    let early = |asked: &Digest| digests.iter().position(|digest| digest == asked);
    check("the first key or the last", [digests[0], digests[KEYS - 1]], ours, early);
    check("a good key or none", [digests[KEYS / 2], stored], ours, early);

    // The whole way of a key, against a comparison of the keys themselves.
    let key = *b"0123456789abcdef0123456789abcdef";
    let (mut first, mut last) = (key, key);
    first[0] ^= 1;
    last[31] ^= 1;
    let tenant = Arc::new(Tenant::everybody());
    let keys = ApiKeys(vec![Key { digest: Digest::of(&key), tenant }; KEYS]);
    let plain = vec![key; KEYS];
    let early = |asked: &[u8; 32]| plain.iter().position(|key| key.iter().zip(asked).all(|(a, b)| a == b));
    let ours = |asked: &[u8; 32]| keys.tenant(asked);
    check("a key wrong in its first or in its last character", [first, last], ours, early);
}
