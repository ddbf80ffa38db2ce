//! Order statistics of a few samples.

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

/// The smallest sample that at least `percent` of a hundred samples do not exceed (nearest rank). `NaN` of none.
pub fn percentile(samples: &[f64], percent: usize) -> f64 {
    let sorted = sorted(samples);
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
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
        assert!(median(&[]).is_nan() && percentile(&[], 95).is_nan());
        let twenty: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        assert!((percentile(&twenty, 95) - 19.0).abs() < f64::EPSILON);
        assert!((percentile(&twenty, 100) - 20.0).abs() < f64::EPSILON);
        assert!((percentile(&[7.0], 5) - 7.0).abs() < f64::EPSILON);
    }
}
