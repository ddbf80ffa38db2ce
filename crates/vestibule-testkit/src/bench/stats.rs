//! Order statistics of a few samples.
use rand::{SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

/// How often [`ratio_range`] draws.
const DRAWS: usize = 2_000;

/// The middle value; the mean of the two in the middle where their number is even. `NaN` of none.
pub fn median(samples: &[f64]) -> f64 {
    let sorted = sorted(samples);
    let half = sorted.len() / 2;
    match (sorted.len() % 2, sorted.get(half)) {
        (1, Some(middle)) => *middle,
        (_, Some(upper)) => f64::midpoint(sorted[half - 1], *upper),
        (_, None) => f64::NAN,
    }
}

/// `NaN` of none.
pub fn mean(samples: &[f64]) -> f64 {
    samples.iter().sum::<f64>() / samples.len() as f64
}

/// The smallest sample that at least `percent` of a hundred samples do not exceed (nearest rank). `NaN` of none.
pub fn percentile(samples: &[f64], percent: usize) -> f64 {
    let sorted = sorted(samples);
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// What chance makes of the ratio of two medians: where it lies in 90 of 100 draws of as many samples, with replacement, from those
/// that there are (the percentile bootstrap; Efron and Tibshirani, *An Introduction to the Bootstrap*, 13.3). The same samples give
/// the same. `NaN` of none.
pub fn ratio_range(above: &[f64], below: &[f64]) -> (f64, f64) {
    let mut random = StdRng::seed_from_u64(0);
    let mut drawn = |samples: &[f64]| {
        let draw = (0..samples.len()).filter_map(|_| samples.choose(&mut random).copied());
        median(&draw.collect::<Vec<_>>())
    };
    let ratios: Vec<_> = (0..DRAWS).map(|_| drawn(above) / drawn(below)).collect();
    (percentile(&ratios, 5), percentile(&ratios, 95))
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_ranks() {
        assert!((median(&[9.0, 1.0, 5.0]) - 5.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 9.0]) - 3.0).abs() < f64::EPSILON);
        assert!((mean(&[9.0, 1.0, 5.0]) - 5.0).abs() < f64::EPSILON && mean(&[]).is_nan());
        assert!(median(&[]).is_nan() && percentile(&[], 95).is_nan());
        let twenty: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        assert!((percentile(&twenty, 95) - 19.0).abs() < f64::EPSILON);
        assert!((percentile(&twenty, 100) - 20.0).abs() < f64::EPSILON);
        assert!((percentile(&[7.0], 5) - 7.0).abs() < f64::EPSILON);
    }

    #[test]
    fn chance_has_a_range() {
        let same = [2.0; 10];
        assert_eq!(ratio_range(&same, &same), (1.0, 1.0));
        let spread: Vec<f64> = (10..20).map(f64::from).collect();
        let (low, high) = ratio_range(&spread, &spread);
        assert!(
            0.7 < low && low < 0.95 && 1.05 < high && high < 1.4,
            "{low} {high}"
        );
        assert_eq!(ratio_range(&spread, &spread), (low, high));
        assert!(ratio_range(&[], &spread).0.is_nan());
    }
}
