//! How far this host's clock is from the CA's: measured at every answer, told once when it is too far,
//! and again only when it got much worse or some time has passed.

use std::time::Duration;

use raymtls_proto::clock::{self, Clock};
use time::OffsetDateTime;

use super::{Agent, view::seconds};
use crate::{
    caclock::{SKEW_REPORTED, skew_text},
    moment::Moment,
    state,
};

/// The log says the same again after this long.
const SAID_AGAIN_AFTER: Duration = Duration::from_secs(3_600);

/// What was said of it.
#[derive(Debug, Default)]
pub(super) struct Skew {
    said: Option<(i64, Duration)>,
    /// The last time the CA said, where it was not believed.
    not_believed: Option<OffsetDateTime>,
    /// Round trip of the last call that did not wait at the CA.
    round_trip: Duration,
}

impl Agent {
    /// What the CA's clock says, in an answer that came `took` after its call.
    pub(super) fn hear_time(&mut self, server_time_unix: i64, took: Duration) {
        self.skew.round_trip = took;
        self.heard(server_time_unix, took, Duration::ZERO);
    }

    /// The same of a call that waited at the CA: the time was written at the end of the wait, and the
    /// answer came so long ago, while this agent did something else.
    pub(super) fn hear_time_after_wait(
        &mut self,
        server_time_unix: i64,
        took: Duration,
        ago: Duration,
    ) {
        self.heard(server_time_unix, took.min(self.skew.round_trip), ago);
    }

    fn heard(&mut self, server_time_unix: i64, round_trip: Duration, ago: Duration) {
        // A CA that says no time is one of an earlier release; 1970 itself is no time either.
        let time = clock::from_unix(server_time_unix).filter(|t| *t > OffsetDateTime::UNIX_EPOCH);
        let Some(time) = time else { return };
        if time > self.identity.facts.not_after {
            // A CA at that time would not have let this identity in.
            if self.skew.not_believed.replace(time).is_none() {
                tracing::warn!("{}", not_believed(time));
            }
            return;
        }
        self.skew.not_believed = None;
        self.clock.hear(state::after(time, ago), round_trip);
        self.say_skew();
    }

    /// Seconds this host's clock is ahead of the CA's (behind: negative), where that is too many.
    pub(super) fn skew_reported(&self) -> Option<i64> {
        let skew = self.clock.skew().filter(|skew| skew.abs() > SKEW_REPORTED)?;
        Some(seconds(skew))
    }

    /// What the status says of a time that was not believed.
    pub(super) fn time_not_believed(&self) -> Option<String> {
        self.skew.not_believed.map(not_believed)
    }

    fn say_skew(&mut self) {
        let (now, skew) = (self.clock.elapsed(), self.skew_reported());
        match (skew, self.skew.said) {
            (None, None) => {}
            (None, Some(_)) => {
                tracing::info!("this host's clock agrees with the CA's again");
                self.skew.said = None;
            }
            (Some(skew), said) => {
                let stale = said.is_none_or(|(before, at)| {
                    let worse = (skew - before).abs() > SKEW_REPORTED.whole_seconds();
                    worse || now.saturating_sub(at) >= SAID_AGAIN_AFTER
                });
                if stale {
                    tracing::warn!(skew_seconds = skew, "{}", problem(skew));
                    self.skew.said = Some((skew, now));
                }
            }
        }
    }
}

/// What the status says of it.
pub(super) fn problem(skew_seconds: i64) -> String {
    format!(
        "this host's clock is {}: set it right, Ray judges the other nodes' certificates by it",
        skew_text(skew_seconds)
    )
}

fn not_believed(time: OffsetDateTime) -> String {
    format!(
        "the CA says it is {}, which is after this node's identity ends: not believed; put the CA's \
         clock right",
        Moment::from(time)
    )
}
