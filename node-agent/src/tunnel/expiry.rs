//! How long a leaf counts. At its end, while the CA can be reached; while it cannot, for the
//! cluster's grace longer, or an outage of the CA would stop the cluster. It asks no clock.

use super::rules::Rules;

/// The agent writes the rules each minute; older than this, in seconds, it counts as dead, and with
/// it the way to the CA.
const WRITTEN_AGE_MAX: i64 = 300;

/// Since when the CA is away, and what that allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Away {
    since_unix: Option<i64>,
    grace_seconds: i64,
}

/// What a leaf is worth now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Its time is not over.
    Valid,
    /// Its time is over, and the CA was not there to renew it.
    Graced,
    /// Its time is over.
    Over,
}

impl Away {
    /// As the rules have it now.
    pub(crate) fn of(rules: &Rules, now_unix: i64) -> Self {
        let is_old = now_unix.saturating_sub(rules.written_unix) > WRITTEN_AGE_MAX;
        let dead_since = is_old.then_some(rules.written_unix);
        let since_unix = match (rules.ca_away_since_unix, dead_since) {
            (Some(told), Some(dead)) => Some(told.min(dead)),
            (told, dead) => told.or(dead),
        };
        Self { since_unix, grace_seconds: rules.grace_seconds.try_into().unwrap_or(i64::MAX) }
    }

    /// Since when the CA is away.
    pub(crate) fn since_unix(self) -> Option<i64> {
        self.since_unix
    }

    /// What a leaf that ends at `not_after_unix` is worth now. Grace is for what could not be
    /// renewed: a leaf that had ended before the CA went away was not renewed for another reason.
    pub(crate) fn standing(self, not_after_unix: i64, now_unix: i64) -> Standing {
        if now_unix <= not_after_unix {
            return Standing::Valid;
        }
        let graced = self.since_unix.is_some_and(|since| not_after_unix >= since)
            && now_unix <= not_after_unix.saturating_add(self.grace_seconds);
        if graced { Standing::Graced } else { Standing::Over }
    }

    /// When flows with the holder of a leaf are cut, if nothing changes.
    pub(crate) fn cut_unix(self, not_after_unix: i64) -> i64 {
        match self.since_unix {
            Some(since) if not_after_unix >= since => {
                not_after_unix.saturating_add(self.grace_seconds)
            }
            Some(_) | None => not_after_unix,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: i64 = 1_000_000;

    #[test]
    fn a_leaf_at_its_end_and_in_its_grace() {
        let here = Away { since_unix: None, grace_seconds: 100 };
        let away = Away { since_unix: Some(END - 50), grace_seconds: 100 };
        let away_later = Away { since_unix: Some(END + 1), grace_seconds: 100 };
        let no_grace = Away { since_unix: Some(END - 50), grace_seconds: 0 };
        for (name, away, now, standing) in [
            ("at not_after", here, END, Standing::Valid),
            ("a second later", here, END + 1, Standing::Over),
            ("the CA away", away, END + 1, Standing::Graced),
            ("at the end of the grace", away, END + 100, Standing::Graced),
            ("after the grace", away, END + 101, Standing::Over),
            ("ended before the CA went away", away_later, END + 2, Standing::Over),
            ("no grace set", no_grace, END + 1, Standing::Over),
        ] {
            assert_eq!(away.standing(END, now), standing, "{name}");
        }
        assert_eq!(here.cut_unix(END), END);
        assert_eq!(away.cut_unix(END), END + 100);
        assert_eq!(away_later.cut_unix(END), END);
    }

    #[test]
    fn rules_that_nobody_writes_any_more_count_as_a_ca_that_is_away() {
        let mut rules = super::super::rules::tests::sample();
        let written = rules.written_unix;
        assert_eq!(Away::of(&rules, written + 300).since_unix(), None);
        assert_eq!(Away::of(&rules, written + 301).since_unix(), Some(written));
        rules.ca_away_since_unix = Some(written - 10);
        assert_eq!(Away::of(&rules, written).since_unix(), Some(written - 10));
        assert_eq!(Away::of(&rules, written + 301).since_unix(), Some(written - 10));
    }
}
