//! Rotary position embedding: cos and sin of a position, as a function of that position alone.
//!
//! Follows `modeling_rope_utils.py` of Hugging Face transformers 5: frequencies in f32, angle = position * frequency in
//! f32, because at long positions the rounding of the angle is larger than the tolerance that results are compared
//! with. Nothing depends on how long the sequence is, so a cached key stays right whatever comes after it.

use std::f64::consts::TAU;

use crate::config::{RopeParameters, RopeScaling};

/// Frequencies of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Radians a position for each pair of a head. `[head_dim / 2]`
    inverse_frequencies: Vec<f32>,
    /// Multiplies cos and sin (YaRN); 1 otherwise.
    attention_factor: f64,
}

impl Rope {
    /// Frequencies for heads of `head_dim` elements.
    pub fn new(parameters: &RopeParameters, head_dim: usize) -> Self {
        let plain: Vec<f32> = (0..head_dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f32 / head_dim as f32;
                1.0 / parameters.theta.powf(f64::from(exponent)) as f32
            })
            .collect();
        let (inverse_frequencies, attention_factor) = match parameters.scaling {
            RopeScaling::Default | RopeScaling::Dynamic => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor as f32).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = original_max_position_embeddings as f64;
                let scale = |frequency: f32| {
                    let frequency = f64::from(frequency);
                    let wavelength = TAU / frequency;
                    if wavelength > original / low_freq_factor {
                        frequency / factor
                    } else if wavelength < original / high_freq_factor {
                        frequency
                    } else {
                        let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                };
                (plain.iter().map(|&f| scale(f) as f32).collect(), 1.0)
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor,
            } => {
                let ramp = YarnRamp::new(
                    parameters.theta,
                    head_dim,
                    original_max_position_embeddings,
                    (beta_fast, beta_slow),
                    truncate,
                );
                let scale = |(pair, &frequency): (usize, &f32)| {
                    let interpolated = ramp.at(pair);
                    let frequency = f64::from(frequency);
                    (frequency / factor * interpolated + frequency * (1.0 - interpolated)) as f32
                };
                (plain.iter().enumerate().map(scale).collect(), attention_factor)
            }
        };
        Rope { inverse_frequencies, attention_factor }
    }

    /// Appends cos and sin of `position` for each pair of a head.
    pub fn extend(&self, position: u32, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        for &frequency in &self.inverse_frequencies {
            let (s, c) = f64::from(position as f32 * frequency).sin_cos();
            cos.push((c * self.attention_factor) as f32);
            sin.push((s * self.attention_factor) as f32);
        }
    }
}

/// How far each pair is interpolated: 0 for the fast ones, 1 for the slow ones, linear between.
struct YarnRamp {
    low: f64,
    high: f64,
}

impl YarnRamp {
    fn new(theta: f64, head_dim: usize, original: usize, (fast, slow): (f64, f64), truncate: bool) -> Self {
        let dim = head_dim as f64;
        let dimension_of = |rotations: f64| dim * (original as f64 / (rotations * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (dimension_of(fast), dimension_of(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // The reference widens an empty ramp by this to avoid dividing by nothing.
        YarnRamp { low, high: if low == high { high + 0.001 } else { high } }
    }

    fn at(&self, pair: usize) -> f64 {
        ((pair as f64 - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_zero_turns_nothing_and_position_one_turns_the_first_pair_by_a_radian() {
        let rope = Rope::new(&RopeParameters { theta: 10_000.0, scaling: RopeScaling::Default }, 8);
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        rope.extend(0, &mut cos, &mut sin);
        assert_eq!((cos.as_slice(), sin.as_slice()), ([1.0; 4].as_slice(), [0.0; 4].as_slice()));
        rope.extend(1, &mut cos, &mut sin);
        assert_eq!((cos[4], sin[4]), (1f64.cos() as f32, 1f64.sin() as f32));
    }

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let plain = Rope::new(&RopeParameters { theta: 500_000.0, scaling: RopeScaling::Default }, 64);
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let scaled = Rope::new(&RopeParameters { theta: 500_000.0, scaling }, 64);
        assert_eq!(scaled.inverse_frequencies[0], plain.inverse_frequencies[0]);
        assert_eq!(scaled.inverse_frequencies[31], plain.inverse_frequencies[31] / 8.0);
    }
}
