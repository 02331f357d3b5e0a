//! One figure in every round, told as its median and range.

use std::fmt;

#[derive(Clone, Debug)]
pub(crate) struct Series(Vec<f64>);

impl Series {
    /// None of nothing.
    pub(crate) fn new(mut figures: Vec<f64>) -> Option<Self> {
        figures.sort_by(f64::total_cmp);
        (!figures.is_empty()).then_some(Series(figures))
    }

    pub(crate) fn rounds(&self) -> usize {
        self.0.len()
    }

    /// The middle one, or half-way between the two in the middle.
    pub(crate) fn median(&self) -> f64 {
        let (low, high) = (self.0[(self.0.len() - 1) / 2], self.0[self.0.len() / 2]);
        f64::midpoint(low, high)
    }
}

/// `12.3 (11.9-13.0)`, with as many places as asked for.
impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places = f.precision().unwrap_or(1);
        let (first, last) = (self.0[0], self.0[self.0.len() - 1]);
        let text = format!("{:.places$} ({first:.places$}-{last:.places$})", self.median());
        // What stands in a column is as wide as the column.
        match f.width() {
            Some(width) => write!(f, "{text:>width$}"),
            None => f.write_str(&text),
        }
    }
}
