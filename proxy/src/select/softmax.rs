//! A draw that prefers the cheaper without always taking the cheapest: softmax over costs. Pure.
//!
//! Costs are first brought to 0 (cheapest) to 1 (dearest), so that one temperature means the same for short prompts and long
//! ones; Dynamo does likewise. At temperature `t` the dearest is drawn `exp(-1/t)` times as often as the cheapest.

/// Index of the drawn one among `costs`; `None` where there is none. Where all cost the same, each is as likely.
pub(super) fn sample(costs: &[f64], temperature: f64, draw: u64) -> Option<usize> {
    let cheapest = costs.iter().copied().reduce(f64::min)?;
    let dearest = costs.iter().copied().reduce(f64::max)?;
    let range = dearest - cheapest;
    let weight = |cost: f64| if range > 0.0 { (-(cost - cheapest) / range / temperature).exp() } else { 1.0 };
    let sum: f64 = costs.iter().map(|cost| weight(*cost)).sum();
    let mut left = fraction(draw) * sum;
    for (index, cost) in costs.iter().enumerate() {
        left -= weight(*cost);
        if left < 0.0 {
            return Some(index);
        }
    }
    // Only rounding leads here; the last with any weight is then as good as the one before it.
    costs.iter().rposition(|cost| weight(*cost) > 0.0)
}

/// The draw as a number from 0 up to but without 1, from the 53 bits that such a number holds.
fn fraction(draw: u64) -> f64 {
    (draw >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How often each is drawn, over draws that lie evenly.
    fn shares<const N: usize>(costs: [f64; N], temperature: f64) -> [u32; N] {
        let mut shares = [0; N];
        for step in 0..1000u64 {
            let index = sample(&costs, temperature, step * (u64::MAX / 1000)).expect("there are some");
            shares[index] += 1;
        }
        shares
    }

    #[test]
    fn the_cheaper_is_drawn_more_often() {
        let [cheap, middle, dear] = shares([10.0, 20.0, 30.0], 0.5);
        // 1 : exp(-1) : exp(-2)
        assert!((663..668).contains(&cheap) && (243..247).contains(&middle) && (88..93).contains(&dear));
    }

    #[test]
    fn one_temperature_means_the_same_at_any_scale() {
        assert_eq!(shares([1.0, 2.0, 3.0], 0.5), shares([1e6, 2e6, 3e6], 0.5));
    }

    #[test]
    fn equal_costs_are_drawn_equally() {
        assert!(shares([7.0; 4], 0.2).iter().all(|share| (249..=251).contains(share)));
    }

    #[test]
    fn a_tiny_temperature_takes_the_cheapest() {
        assert_eq!(shares([3.0, 1.0, 2.0], 1e-6), [0, 1000, 0]);
        assert_eq!(sample(&[], 1.0, 0), None);
    }

    proptest! {
        #[test]
        fn what_is_drawn_is_there(
            costs in prop::collection::vec(0.0f64..1e12, 1..20), temperature in 1e-9f64..1e9, draw: u64,
        ) {
            prop_assert!(sample(&costs, temperature, draw).is_some_and(|index| index < costs.len()));
        }
    }
}
