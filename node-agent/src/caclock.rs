//! The clock the agent lives by. What the CA's certificates say is said by the CA's clock, and so the
//! agent goes by that one as soon as it has heard it: a host's clock that is wrong or jumps neither
//! hastens nor misses a renewal. Until then, and where the two agree, it is the host's clock. It sets
//! no clock and trusts no time that did not come over verified TLS.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use raymtls_proto::{clock::Clock, span::Span};
use time::OffsetDateTime;

/// A difference up to this is none: the CA's time comes in whole seconds.
const AGREES: time::Duration = time::Duration::seconds(5);
/// A difference over this is reported.
pub const SKEW_REPORTED: time::Duration = time::Duration::seconds(60);

/// The CA's clock as it must stand now, or the host's.
#[derive(Clone, Debug)]
pub struct CaClock {
    host: Arc<dyn Clock>,
    heard: Arc<Mutex<Option<Heard>>>,
}

/// What the CA's clock said when so much time had passed.
#[derive(Clone, Copy, Debug)]
struct Heard {
    at: OffsetDateTime,
    elapsed: Duration,
}

impl CaClock {
    /// Nothing heard yet.
    #[must_use]
    pub fn new(host: Arc<dyn Clock>) -> Self {
        Self { host, heard: Arc::default() }
    }

    /// What an answer that was `round_trip` under way says of the CA's clock. It was written about
    /// half of that ago.
    pub fn hear(&self, server_time: OffsetDateTime, round_trip: Duration) {
        let at = server_time
            .saturating_add(time::Duration::try_from(round_trip / 2).unwrap_or_default());
        *self.lock() = Some(Heard { at, elapsed: self.host.elapsed() });
    }

    /// The CA's clock as it must stand now; `None` before the first answer.
    #[must_use]
    pub fn ca_now(&self) -> Option<OffsetDateTime> {
        let heard = (*self.lock())?;
        let since = self.host.elapsed().saturating_sub(heard.elapsed);
        Some(heard.at.saturating_add(time::Duration::try_from(since).unwrap_or_default()))
    }

    /// How far the host's clock is ahead of the CA's (behind: negative); `None` before the first
    /// answer.
    #[must_use]
    pub fn skew(&self) -> Option<time::Duration> {
        Some(self.host.now() - self.ca_now()?)
    }

    /// The host's own clock.
    #[must_use]
    pub fn host_now(&self) -> OffsetDateTime {
        self.host.now()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Heard>> {
        self.heard.lock().expect("no code panics while it holds this")
    }
}

impl Clock for CaClock {
    fn now(&self) -> OffsetDateTime {
        match (self.ca_now(), self.skew()) {
            (Some(ca_now), Some(skew)) if skew.abs() > AGREES => ca_now,
            (Some(_) | None, _) => self.host.now(),
        }
    }

    fn elapsed(&self) -> Duration {
        self.host.elapsed()
    }
}

/// How far a clock is off, as a person says it: "34m behind the CA".
#[must_use]
pub fn skew_text(skew_seconds: i64) -> String {
    let size = Span::seconds(skew_seconds.saturating_abs());
    let side = if skew_seconds < 0 { "behind" } else { "ahead of" };
    format!("{size} {side} the CA")
}

#[cfg(test)]
mod tests {
    use raymtls_proto::clock::SettableClock;
    use time::macros::datetime;

    use super::*;

    const T0: OffsetDateTime = datetime!(2026-11-24 08:00 UTC);
    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn the_ca_s_clock_counts_and_a_jump_of_the_host_s_moves_nothing() {
        for (name, host_at) in [
            ("right", T0),
            ("an hour ahead", T0 + HOUR),
            ("an hour behind", T0 - HOUR),
            ("1970", OffsetDateTime::UNIX_EPOCH),
            ("before 1970", OffsetDateTime::UNIX_EPOCH - HOUR),
            ("2040", datetime!(2040-01-01 00:00 UTC)),
            ("the last year", datetime!(9999-12-31 23:59:59 UTC)),
        ] {
            let host = SettableClock::new(host_at);
            let clock = CaClock::new(Arc::new(host.clone()));
            assert_eq!(clock.now(), host_at, "{name}: nothing heard yet");
            assert_eq!(clock.skew(), None, "{name}");
            clock.hear(T0, Duration::from_secs(2));
            let heard = T0 + Duration::from_secs(1);
            assert!((clock.now() - heard).abs() <= AGREES, "{name}: {}", clock.now());
            assert_eq!(clock.skew(), Some(host_at - heard), "{name}");
            host.set(T0 - 3 * HOUR);
            assert_eq!(clock.now(), heard, "{name}: it jumped");
            assert_eq!(
                clock.skew(),
                Some(time::Duration::hours(-3) - time::Duration::SECOND),
                "{name}"
            );
            host.advance(HOUR);
            assert_eq!(clock.now(), heard + HOUR, "{name}: an hour passed");
        }
    }

    #[test]
    fn a_skew_is_told_with_its_size_and_side() {
        assert_eq!(skew_text(-2_040), "34m behind the CA");
        assert_eq!(skew_text(61), "1m 1s ahead of the CA");
        assert!(skew_text(i64::MIN).ends_with("behind the CA"));
    }
}
