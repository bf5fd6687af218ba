//! Moments of messages as people and programs read them.

use serde::{Serialize, Serializer};
use time::{OffsetDateTime, format_description::well_known::Rfc3339, macros::format_description};

use super::duration;

/// A moment, or none: messages say zero for one that has not come. In JSON RFC 3339 or null.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(Option<OffsetDateTime>);

impl Moment {
    /// From whole seconds since 1970, zero for none.
    pub(super) fn from_unix(seconds: i64) -> Self {
        Self((seconds != 0).then(|| raymtls_proto::clock::from_unix(seconds)).flatten())
    }

    /// From a moment that is there.
    pub(super) fn at(moment: OffsetDateTime) -> Self {
        Self(Some(moment))
    }

    pub(super) fn is_none(self) -> bool {
        self.0.is_none()
    }

    pub(super) fn is_after(self, now: OffsetDateTime) -> bool {
        self.0.is_some_and(|moment| moment > now)
    }

    /// Date and time in UTC and how far away that is; `-` for none.
    pub(super) fn human(self, now: OffsetDateTime) -> String {
        let Some(moment) = self.0 else { return "-".to_owned() };
        let form = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]Z");
        let text = moment.format(form).expect("every moment has a year and a time of day");
        format!("{text} ({})", away(moment, now))
    }
}

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Whole seconds of the years 1 to 9999 always have an RFC 3339 form.
        let text = self.0.and_then(|moment| moment.format(&Rfc3339).ok());
        text.serialize(serializer)
    }
}

fn away(moment: OffsetDateTime, now: OffsetDateTime) -> String {
    let length = duration::human((moment - now).unsigned_abs());
    if moment > now { format!("in {length}") } else { format!("{length} ago") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_how_far_away_it_is() {
        let now = raymtls_proto::clock::from_unix(1_764_000_000).unwrap();
        for (seconds, text) in [
            (1_764_000_000 + 93_600, "2025-11-25 18:00:00Z (in 1d 2h)"),
            (1_764_000_000 - 59, "2025-11-24 15:59:01Z (59s ago)"),
            (0, "-"),
        ] {
            assert_eq!(Moment::from_unix(seconds).human(now), text);
        }
    }

    #[test]
    fn programs_read_rfc_3339_or_null() {
        let json = |seconds| serde_json::to_string(&Moment::from_unix(seconds)).unwrap();
        assert_eq!(json(1_764_000_000), "\"2025-11-24T16:00:00Z\"");
        assert_eq!(json(0), "null");
        assert_eq!(json(i64::MAX), "null");
    }
}
