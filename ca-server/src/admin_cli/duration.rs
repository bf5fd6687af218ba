//! Lengths of time as an operator types and reads them: `20d`, `48h`, `1h 30m`.

use std::time::Duration;

use raymtls_proto::span::Span;

/// Longest length that is taken, in seconds: ten years. The CA has its own, closer bounds.
const SECONDS_MAX: u64 = 10 * 365 * 86_400;

/// Whole seconds, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seconds(u64);

impl Seconds {
    /// As it travels in messages.
    pub(super) fn as_i64(self) -> i64 {
        i64::try_from(self.0).expect("bounded by SECONDS_MAX")
    }
}

/// Reads a length of time with its unit.
///
/// # Errors
/// No unit, no number, parts of a second, nothing at all, or more than ten years.
pub(super) fn parse(text: &str) -> Result<Seconds, String> {
    let example = "write a number and a unit, such as 20d, 48h, 90m";
    let length = humantime::parse_duration(text).map_err(|e| format!("{e}; {example}"))?;
    if length.subsec_nanos() != 0 {
        return Err(format!("parts of a second are not taken; {example}"));
    }
    if !(1..=SECONDS_MAX).contains(&length.as_secs()) {
        return Err(format!("must be from 1s to 3650d; {example}"));
    }
    Ok(Seconds(length.as_secs()))
}

/// A length as [`parse`] reads it again.
pub(super) fn human(length: Duration) -> String {
    Span(length).to_string()
}

/// The same for seconds of a message; a negative length reads as none.
pub(super) fn human_seconds(seconds: i64) -> String {
    Span::seconds(seconds).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_operators_type_is_read() {
        for (text, seconds) in [
            ("1s", 1),
            ("90m", 5_400),
            ("1h", 3_600),
            ("48h", 172_800),
            ("20d", 1_728_000),
            ("1h 30m", 5_400),
        ] {
            assert_eq!(parse(text), Ok(Seconds(seconds)), "{text}");
        }
    }

    #[test]
    fn what_could_be_misread_is_refused_with_an_example() {
        for text in ["", "20", "d", "-1d", "0s", "500ms", "4000d", "20 parsecs"] {
            assert!(parse(text).unwrap_err().contains("20d"), "{text:?}");
        }
    }

    #[test]
    fn lengths_read_back_as_they_were_typed() {
        for text in ["1s", "59s", "1m", "90s", "1h", "1h 1m", "40d", "6d 3h", "1d 0h"] {
            let length = Duration::from_secs(parse(text).unwrap().0);
            assert_eq!(parse(&human(length)), parse(text), "{text}");
        }
        assert_eq!(human(Duration::from_secs(6 * 86_400 + 3 * 3_600 + 59)), "6d 3h");
        assert_eq!(human(Duration::from_secs(86_400 + 59)), "1d");
        assert_eq!(human_seconds(-5), "0s");
    }
}
