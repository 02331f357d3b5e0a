//! How long so many tokens take, from the last times that it was measured. Pure.
//!
//! The last [`KEPT_MAX`] samples are kept, and a line is laid through them: a fixed part plus a part for each token. A rate
//! alone would do for one length; but a worker that was measured on short prompts, where the fixed part is most of the time,
//! would look many times slower on a long one than it is, and short prompts are what is computed locally.
//!
//! For the same reason samples of about one length (an octave: from a power of two up to the next) take at most half of the
//! room, so that a flood of short prompts leaves the few long ones in; and a line is believed up to four times the length of
//! its second longest sample, past which nothing is known. Shorter than its samples it is always believed: where that is
//! wrong it is too low, which brings just the prompts that correct it.
//!
//! The line is the Theil-Sen estimator: its slope is the median of the slopes between two samples, its fixed part the median of
//! what is left of each sample. Medians instead of moving averages, because what goes wrong here goes wrong by factors of a
//! hundred: a process that was paused, a first request that compiles kernels, a cache that was colder than it was said to be.
//! Such samples move an average for as long as it remembers them, and a limit on each sample's pull needs to know what is
//! usual before anything is. A median of sixteen doesn't see four of them at all, whether they come first or last, and a
//! lasting change is near after nine samples and reached after twelve.

use std::collections::VecDeque;

/// Samples that are kept: enough that a quarter of them may be wrong, and few enough that a change shows within seconds of
/// traffic. Their 120 pairs are sorted once a sample, which takes some microseconds.
const KEPT_MAX: usize = 16;

/// Samples of one octave of length that are kept: half, so that two lengths always have room.
const OCTAVE_KEPT_MAX: usize = KEPT_MAX / 2;

/// Up to how many times the length of the second longest sample the line is believed. The second, because one may be wrong.
const REACH_FACTOR: f64 = 4.0;

/// The time between two samples that are kept, once there are enough: under load sixteen would otherwise be those of some
/// milliseconds, and laying a line through them would cost each request as much as the rest of its decision.
const THINNED_MS: u64 = 50;

/// Samples below which nothing is known: with eight, two may be wrong.
pub(crate) const WARM_MIN: usize = 8;

/// How old a sample may be to count: pools are scaled and pods replaced within minutes, so what is older describes another
/// pool.
pub(crate) const STALE_MS: u64 = 5 * 60 * 1000;

/// How far apart two samples' lengths must lie for the slope between them to say anything.
const SPREAD_MIN: f64 = 1.25;

/// The part of all pairs that must lie so far apart for a line with a fixed part. With fewer, nearly all samples are of about
/// one length, the few others would decide the slope alone, and the line goes through the origin.
const FAR_PAIRS_ONE_IN: usize = 4;

/// The longest time that is believed, one hour: past any deadline, so it is the clock that is wrong.
const TIME_MS_MAX: f64 = 3_600_000.0;

/// A time that grows with tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub(crate) struct Line {
    /// For no token at all, in milliseconds.
    pub(crate) fixed_ms: f64,
    /// For each token.
    pub(crate) ms_per_token: f64,
    /// The most tokens for which it is believed.
    pub(crate) reach_tokens: u64,
}

impl Line {
    /// The time for so many tokens, in milliseconds.
    pub(crate) fn at(self, tokens: u64) -> f64 {
        self.fixed_ms + self.ms_per_token * tokens as f64
    }

    /// The line, where it is believed for so many tokens.
    pub(crate) fn reaching(self, tokens: u64) -> Option<Line> {
        (tokens <= self.reach_tokens).then_some(self)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Sample {
    tokens: u64,
    ms: f64,
    at_ms: u64,
}

impl Sample {
    fn octave(&self) -> u32 {
        self.tokens.ilog2()
    }
}

/// The last samples of one measure.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Recent {
    samples: VecDeque<Sample>,
    line: Line,
}

impl Recent {
    /// Takes in that `tokens` took `ms`. No tokens, or a time that is none, is not taken in, nor a sample right after another
    /// once there are enough.
    pub(super) fn record(&mut self, tokens: u64, ms: f64, now_ms: u64) {
        if tokens == 0 || !(0.0..=TIME_MS_MAX).contains(&ms) {
            return;
        }
        let new = Sample { tokens, ms, at_ms: now_ms };
        self.samples.retain(|sample| is_fresh(sample, now_ms));
        let alike = || self.samples.iter().enumerate().filter(|(_, sample)| sample.octave() == new.octave());
        let is_octave_full = alike().count() == OCTAVE_KEPT_MAX;
        if is_octave_full || self.samples.len() == KEPT_MAX {
            if alike().next_back().is_some_and(|(_, last)| now_ms < last.at_ms.saturating_add(THINNED_MS)) {
                return;
            }
            let oldest_alike = alike().next().map(|(index, _)| index).filter(|_| is_octave_full);
            self.samples.remove(oldest_alike.unwrap_or(0));
        }
        self.samples.push_back(new);
        self.line = line_through(&self.samples);
    }

    /// The line, once and while there are enough samples.
    pub(super) fn line(&self, now_ms: u64) -> Option<Line> {
        (self.fresh(now_ms) >= WARM_MIN).then_some(self.line)
    }

    /// Samples that count now.
    pub(super) fn fresh(&self, now_ms: u64) -> usize {
        self.samples.iter().filter(|sample| is_fresh(sample, now_ms)).count()
    }
}

fn is_fresh(sample: &Sample, now_ms: u64) -> bool {
    now_ms.saturating_sub(sample.at_ms) < STALE_MS
}

fn line_through(samples: &VecDeque<Sample>) -> Line {
    let reach_tokens = reach(samples);
    let mut slopes = Vec::with_capacity(KEPT_MAX * (KEPT_MAX - 1) / 2);
    for (index, a) in samples.iter().enumerate() {
        for b in samples.range(index + 1..) {
            let (from, to) = (a.tokens as f64, b.tokens as f64);
            if from.max(to) >= from.min(to) * SPREAD_MIN {
                slopes.push((b.ms - a.ms) / (to - from));
            }
        }
    }
    let pairs = samples.len() * samples.len().saturating_sub(1) / 2;
    if slopes.len() * FAR_PAIRS_ONE_IN >= pairs {
        let ms_per_token = median(slopes);
        let fixed_ms = median(samples.iter().map(|sample| sample.ms - ms_per_token * sample.tokens as f64).collect());
        // Neither can be negative; where noise says so, the line through the origin is the better guess.
        if ms_per_token > 0.0 && fixed_ms >= 0.0 {
            return Line { fixed_ms, ms_per_token, reach_tokens };
        }
    }
    let rates = samples.iter().map(|sample| sample.ms / sample.tokens as f64);
    Line { fixed_ms: 0.0, ms_per_token: median(rates.collect()), reach_tokens }
}

fn reach(samples: &VecDeque<Sample>) -> u64 {
    let mut lengths: Vec<u64> = samples.iter().map(|sample| sample.tokens).collect();
    lengths.sort_unstable();
    let second_longest = lengths.iter().rev().nth(1).copied().unwrap_or(0);
    (second_longest as f64 * REACH_FACTOR) as u64
}

/// The middle one, or the lower of the two in the middle; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    let middle = values.len().saturating_sub(1) / 2;
    if values.is_empty() { 0.0 } else { *values.select_nth_unstable_by(middle, f64::total_cmp).1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(samples: &[(u64, f64)]) -> Recent {
        let mut recent = Recent::default();
        for (tokens, ms) in samples {
            recent.record(*tokens, *ms, 0);
        }
        recent
    }

    fn is_near(found: f64, expect: f64) -> bool {
        (found - expect).abs() <= 1e-6 * expect.abs().max(1.0)
    }

    #[test]
    fn the_line_has_a_fixed_part_and_a_part_for_each_token() {
        let samples: Vec<_> = (1..=8u64).map(|n| (n * 100, 12.0 + 0.05 * (n * 100) as f64)).collect();
        let line = of(&samples).line(0).expect("it is warm");
        assert!(is_near(line.fixed_ms, 12.0) && is_near(line.ms_per_token, 0.05), "{line:?}");
        assert!(is_near(line.at(10_000), 512.0));
    }

    #[test]
    fn samples_of_one_length_give_a_line_through_the_origin() {
        let samples: Vec<_> = (0..16u64).map(|n| (1000 + n, 100.0 + n as f64)).collect();
        let line = of(&samples).line(0).expect("it is warm");
        assert_eq!(line.fixed_ms, 0.0);
        assert!((0.1..0.12).contains(&line.ms_per_token));
    }

    #[test]
    fn a_scalar_is_a_line_at_one_token() {
        let line = of(&[(1, 5.0), (1, 7.0), (1, 6.0), (1, 900.0), (1, 6.0), (1, 5.5), (1, 6.5), (1, 6.0)]).line(0);
        assert_eq!(line.map(|line| line.at(1)), Some(6.0));
    }

    #[test]
    fn times_that_shrink_with_length_are_noise() {
        let samples: Vec<_> = (1..=8u64).map(|n| (n * 100, 50.0 - n as f64)).collect();
        let line = of(&samples).line(0).expect("it is warm");
        assert!(line.fixed_ms == 0.0 && line.ms_per_token > 0.0);
    }

    #[test]
    fn nothing_is_known_before_there_are_enough_samples_or_when_they_are_old() {
        let mut recent = Recent::default();
        for n in 1..WARM_MIN as u64 {
            recent.record(n * 100, 5.0, 0);
            assert_eq!(recent.line(0), None);
        }
        recent.record(1000, 5.0, 1);
        assert!(recent.line(STALE_MS - 1).is_some());
        assert_eq!((recent.line(STALE_MS), recent.fresh(STALE_MS)), (None, 1));
    }

    #[test]
    fn a_burst_of_samples_does_not_push_out_the_others() {
        let mut recent = of(&[(100, 10.0); OCTAVE_KEPT_MAX]);
        let before = recent.clone();
        recent.record(100, 99.0, THINNED_MS - 1);
        assert_eq!(recent, before);
        recent.record(100, 99.0, THINNED_MS);
        assert_ne!(recent, before);
    }

    #[test]
    fn a_flood_of_short_prompts_leaves_the_long_ones_in() {
        let mut recent = of(&[(3000, 165.0), (3200, 175.0)]);
        for n in 0..1000u64 {
            recent.record(50 + n % 10, 15.0 + (50 + n % 10) as f64 * 0.05, n * THINNED_MS);
        }
        let line = recent.line(1000 * THINNED_MS).expect("it is warm");
        assert!(is_near(line.at(3000), 165.0), "{line:?}");
        assert_eq!(recent.samples.len(), OCTAVE_KEPT_MAX + 2);
    }

    #[test]
    fn many_lengths_share_the_room_by_age() {
        let mut recent = Recent::default();
        for n in 0..100u64 {
            recent.record(1 << (n % 5 + 4), 1.0, n * THINNED_MS);
        }
        let ages: Vec<u64> = recent.samples.iter().map(|sample| sample.at_ms / THINNED_MS).collect();
        assert_eq!(ages, (84..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_line_is_believed_up_to_four_times_what_was_measured_twice() {
        let line =
            of(&[(50, 5.0), (60, 6.0), (70, 7.0), (80, 8.0), (90, 9.0), (100, 10.0), (110, 11.0), (9000, 900.0)]);
        let line = line.line(0).expect("it is warm");
        assert!(line.reaching(440).is_some() && line.reaching(441).is_none());
        assert!(line.reaching(0).is_some());
    }

    #[test]
    fn old_samples_leave_with_the_next_one() {
        let mut recent = of(&[(100, 1e6); 8]);
        for n in 1..=8u64 {
            recent.record(n * 100, n as f64, STALE_MS);
        }
        let line = recent.line(STALE_MS).expect("it is warm");
        assert!(is_near(line.ms_per_token, 0.01), "{line:?}");
    }

    #[test]
    fn what_is_no_measurement_is_not_taken_in() {
        for ms in [f64::NAN, f64::INFINITY, -1.0, TIME_MS_MAX * 2.0] {
            assert_eq!(of(&[(100, ms)]), Recent::default());
        }
        assert_eq!(of(&[(0, 1.0)]), Recent::default());
    }

    #[test]
    fn a_lasting_change_is_near_after_nine_samples_and_reached_after_twelve() {
        let lengths = |n: u64| 100 + n % 16 * 200;
        let mut recent = Recent::default();
        for n in 0..16 {
            recent.record(lengths(n), lengths(n) as f64 * 0.1, 0);
        }
        let mut at_2000 = |range: std::ops::Range<u64>| {
            for n in range {
                recent.record(lengths(n), lengths(n) as f64, (n + 1) * THINNED_MS);
            }
            recent.line(0).expect("it is warm").at(2000)
        };
        assert!((1000.0..3000.0).contains(&at_2000(0..9)));
        assert!((1900.0..2100.0).contains(&at_2000(9..12)));
    }

    proptest! {
        #[test]
        fn a_quarter_of_wild_samples_is_not_seen(
            fixed in 0.0f64..50.0, slope in 0.001f64..1.0, wild in prop::collection::vec((0usize..16, 0.0f64..TIME_MS_MAX), 0..5),
        ) {
            // Lengths at least a quarter apart, so that every pair counts.
            let mut samples: Vec<(u64, f64)> =
                (0..16).map(|n| (20.0 * 1.4f64.powi(n)) as u64).map(|tokens| (tokens, fixed + slope * tokens as f64)).collect();
            for (index, ms) in wild {
                samples[index].1 = ms;
            }
            let line = of(&samples).line(0).expect("it is warm");
            prop_assert!(is_near(line.ms_per_token, slope), "{line:?}");
            prop_assert!((line.fixed_ms - fixed).abs() < 1e-3, "{line:?}");
        }

        #[test]
        fn noise_moves_the_line_by_no_more_than_itself(
            noise in prop::collection::vec((50u64..5000, 0.9f64..1.1), 16),
        ) {
            let samples: Vec<_> =
                noise.iter().map(|(tokens, noise)| (*tokens, (10.0 + 0.1 * *tokens as f64) * noise)).collect();
            let line = of(&samples).line(0).expect("it is warm");
            let expect = 10.0 + 0.1 * 2500.0;
            prop_assert!((line.at(2500) - expect).abs() < expect * 0.2, "{line:?}");
        }

        #[test]
        fn no_samples_break_the_line(
            samples in prop::collection::vec((any::<u64>(), prop_oneof![any::<f64>(), 0.0f64..TIME_MS_MAX]), 0..40),
            tokens: u64,
        ) {
            let recent = of(&samples);
            prop_assert!(recent.samples.len() <= KEPT_MAX);
            if let Some(line) = recent.line(0) {
                prop_assert!(line.fixed_ms >= 0.0 && line.ms_per_token >= 0.0);
                prop_assert!(line.at(tokens).is_finite());
            }
        }
    }
}
