//! The first `enforce` of a cluster on this host is a trial: if a CA that answered just before is not
//! reached after it, the table only counts until somebody looks. Once the CA was reached through a table
//! that drops, no later load opens the door again, until the port plan changes. Pure.

use std::time::Duration;

use super::Verdict;

/// A CA that answered so short a time before the load would answer after it, too.
pub const ANSWERED_RECENTLY: Duration = Duration::from_secs(120);

/// Where the trial of a cluster's first `enforce` stands. Moments are time that passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trial {
    /// Nothing that drops was loaded yet.
    #[default]
    NotBegun,
    /// A table that drops is loaded, and the CA was not reached through it yet.
    Running {
        /// Until when it must be reached; absent where it was away before, which proves nothing.
        until: Option<Duration>,
    },
    /// The CA was not reached: the table only counts.
    Failed {
        /// When it is tried again; absent before the CA was heard.
        again_at: Option<Duration>,
    },
    /// The CA was reached: the door stays closed for as long as the port plan is the same.
    Passed,
}

impl Trial {
    /// What a packet that no rule lets through meets where `enforce` is wanted.
    #[must_use]
    pub fn verdict(self) -> Verdict {
        match self {
            Self::NotBegun | Self::Running { .. } | Self::Passed => Verdict::Drop,
            Self::Failed { .. } => Verdict::Count,
        }
    }

    /// A table that drops was loaded.
    #[must_use]
    pub fn loaded(self, now: Duration, last_contact: Option<Duration>, time: Duration) -> Self {
        match self {
            Self::NotBegun => {
                let recent = |at: &Duration| now.saturating_sub(*at) <= ANSWERED_RECENTLY;
                Self::Running { until: last_contact.filter(recent).map(|_| now + time) }
            }
            Self::Running { .. } | Self::Failed { .. } | Self::Passed => self,
        }
    }

    /// The CA answered. While the trial runs this is a new connection: the old one was closed at the
    /// load. `wait` is drawn by the caller.
    #[must_use]
    pub fn heard(self, now: Duration, wait: Duration) -> Self {
        match self {
            Self::Running { .. } | Self::Passed => Self::Passed,
            Self::Failed { again_at: None } => Self::Failed { again_at: Some(now + wait) },
            Self::NotBegun | Self::Failed { again_at: Some(_) } => self,
        }
    }

    /// Time went on.
    #[must_use]
    pub fn at(self, now: Duration) -> Self {
        match self {
            Self::Running { until: Some(until) } if now >= until => Self::Failed { again_at: None },
            Self::Failed { again_at: Some(at) } if now >= at => Self::NotBegun,
            Self::NotBegun | Self::Running { .. } | Self::Failed { .. } | Self::Passed => self,
        }
    }

    /// Another port plan closes other ports: that the CA was reached through the last one proves nothing.
    #[must_use]
    pub fn plan_changed(self) -> Self {
        Self::NotBegun
    }

    /// The operator changed the settings: what failed may be tried anew.
    #[must_use]
    pub fn settings_changed(self) -> Self {
        match self {
            Self::Failed { .. } => Self::NotBegun,
            Self::NotBegun | Self::Running { .. } | Self::Passed => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    const TIME: Duration = s(30);

    #[test]
    fn only_a_ca_that_answered_just_before_proves_something_by_its_silence() {
        for (name, last_contact, until) in [
            ("at the same moment", Some(s(1_000)), Some(s(1_030))),
            ("two minutes before", Some(s(880)), Some(s(1_030))),
            ("longer ago", Some(s(879)), None),
            ("never", None, None),
        ] {
            let trial = Trial::NotBegun.loaded(s(1_000), last_contact, TIME);
            assert_eq!(trial, Trial::Running { until }, "{name}");
            assert_eq!(trial.verdict(), Verdict::Drop, "{name}");
        }
    }

    #[test]
    fn silence_opens_the_door_once_and_a_contact_closes_it_for_good() {
        let running = Trial::NotBegun.loaded(s(0), Some(s(0)), TIME);
        assert_eq!(running.at(s(29)), running);
        let failed = running.at(s(30));
        assert_eq!(failed, Trial::Failed { again_at: None });
        assert_eq!(failed.verdict(), Verdict::Count);
        assert_eq!(failed.at(s(9_999)), failed, "nobody heard the CA: nothing is tried");
        let heard = failed.heard(s(100), s(60));
        assert_eq!(heard.heard(s(150), s(60)), heard, "each contact would put it off");
        assert_eq!(heard.at(s(159)), heard);
        assert_eq!(heard.at(s(160)), Trial::NotBegun);
        let passed = running.heard(s(10), s(60));
        for later in [passed.at(s(9_999)), passed.loaded(s(9_999), None, TIME)] {
            assert_eq!(later, Trial::Passed);
        }
        assert_eq!(passed.settings_changed(), Trial::Passed);
    }

    #[test]
    fn a_ca_away_from_the_start_may_stay_away() {
        let running = Trial::NotBegun.loaded(s(0), None, TIME);
        assert_eq!(running.at(s(1_000_000)), running);
        assert_eq!(running.heard(s(1_000_001), s(60)), Trial::Passed);
    }

    #[test]
    fn new_settings_try_again_at_once() {
        let failed = Trial::Failed { again_at: Some(s(1_000)) };
        assert_eq!(failed.settings_changed(), Trial::NotBegun);
        let running = Trial::Running { until: Some(s(5)) };
        assert_eq!(running.settings_changed(), running);
    }
}
