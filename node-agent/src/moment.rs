//! A moment as people and machines read it: RFC 3339 in files and JSON, "in 3h 20m" beside it.
//! Whole seconds. It asks no clock.

use std::fmt;

use raymtls_proto::span::Span;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// A point in time, in whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(OffsetDateTime);

impl Moment {
    /// The moment as the `time` crate has it.
    #[must_use]
    pub fn time(self) -> OffsetDateTime {
        self.0
    }

    /// Seconds since 1970.
    #[must_use]
    pub fn unix(self) -> i64 {
        self.0.unix_timestamp()
    }

    /// How far it is from `now`: "in 3h 20m", "5s ago".
    #[must_use]
    pub fn relative(self, now: OffsetDateTime) -> String {
        let seconds = self.unix() - now.unix_timestamp();
        let text = Span::seconds(seconds.saturating_abs());
        if seconds == 0 {
            return "now".to_owned();
        }
        if seconds > 0 { format!("in {text}") } else { format!("{text} ago") }
    }
}

impl From<OffsetDateTime> for Moment {
    fn from(time: OffsetDateTime) -> Self {
        Self(time.replace_nanosecond(0).unwrap_or(time))
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.format(&Rfc3339).map_err(|_| fmt::Error)?)
    }
}

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Moment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        OffsetDateTime::parse(&text, &Rfc3339).map(Self::from).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn it_reads_back_and_says_how_far_it_is() {
        let moment = Moment::from(datetime!(2026-11-24 08:00:00.5 UTC));
        let text = serde_json::to_string(&moment).unwrap();
        assert_eq!(text, "\"2026-11-24T08:00:00Z\"");
        assert_eq!(serde_json::from_str::<Moment>(&text).unwrap(), moment);
        assert_eq!(moment.relative(datetime!(2026-11-24 04:40:00 UTC)), "in 3h 20m");
        assert_eq!(moment.relative(datetime!(2026-11-24 08:00:05 UTC)), "5s ago");
    }
}
