//! Rounding f32 to what a narrower type holds, to nearest even. Knows nothing else.

use crate::config::Dtype;
use half::f16;

/// Rounds `values` to what `dtype` can hold.
pub(super) fn round(values: &mut [f32], dtype: Dtype) {
    match dtype {
        Dtype::F32 => {}
        Dtype::Bf16 => values.iter_mut().for_each(|x| *x = f32::from_bits(u32::from(bf16_bits(*x)) << 16)),
        Dtype::F16 => values.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
    }
}

/// The bf16 nearest to `x`. Written without branches, unlike `half`'s, so that loops over it vectorise.
pub(super) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // A NaN whose payload lies in the lower half would round to infinity; set the quiet bit instead.
    let nan = (bits >> 16) | 0x40;
    (if x.is_nan() { nan } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_half_does() {
        let specials = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1.0e-40, f32::NAN];
        let sweep = (0..=u32::MAX).step_by(65_521).map(f32::from_bits);
        for x in sweep.chain(specials).chain([f32::from_bits(0x7f80_0001)]) {
            assert_eq!(bf16_bits(x), half::bf16::from_f32(x).to_bits(), "{x:e}");
        }
    }
}
