//! Lengths of time as a person reads them: `40d`, `6d 3h`, `90s`. Days are the largest unit, since
//! that is what settings are typed in.

use std::{fmt, time::Duration};

/// A length of time, shown by its two largest units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl Span {
    /// Of whole seconds; a negative number reads as none.
    #[must_use]
    pub fn seconds(seconds: i64) -> Self {
        Self(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.0.as_secs();
        let units = [("d", 86_400, u64::MAX), ("h", 3_600, 24), ("m", 60, 60), ("s", 1, 60)];
        let parts = units.map(|(unit, size, modulus)| (total / size % modulus, unit));
        let Some(first) = parts.iter().position(|(count, _)| *count > 0) else {
            return f.write_str("0s");
        };
        let shown = parts[first..].iter().take(2).filter(|(count, _)| *count > 0);
        let words: Vec<_> = shown.map(|(count, unit)| format!("{count}{unit}")).collect();
        f.write_str(&words.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_largest_units_are_shown() {
        for (seconds, text) in [
            (0, "0s"),
            (-5, "0s"),
            (59, "59s"),
            (90, "1m 30s"),
            (86_400 + 59, "1d"),
            (6 * 86_400 + 3 * 3_600 + 59, "6d 3h"),
            (40 * 86_400, "40d"),
        ] {
            assert_eq!(Span::seconds(seconds).to_string(), text, "{seconds}");
        }
    }
}
