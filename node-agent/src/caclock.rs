//! The clock the agent lives by. What the CA's certificates say is said by the CA's clock, and so the
//! agent goes by that one as soon as it has heard it: a host's clock that is wrong or jumps neither
//! hastens nor misses a renewal. Until then, and where the two agree, it is the host's clock. It sets
//! no clock and trusts no time that did not come over verified TLS.
//!
//! Decisions follow the CA's clock forwards and backwards. The judgement of the CA's own certificate
//! does not follow it backwards, or whoever holds a key of the CA could make its certificate last by
//! saying an old time: see [`FurthestClock`].

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

/// What was heard of the CA's clock.
#[derive(Clone, Copy, Debug)]
struct Heard {
    last: Reading,
    /// The one that, carried on, is the latest of all.
    furthest: Reading,
}

/// What the CA's clock said when so much time had passed.
#[derive(Clone, Copy, Debug)]
struct Reading {
    at: OffsetDateTime,
    elapsed: Duration,
}

impl Reading {
    fn carried_on(self, elapsed: Duration) -> OffsetDateTime {
        let since = elapsed.saturating_sub(self.elapsed);
        self.at.saturating_add(time::Duration::try_from(since).unwrap_or(time::Duration::MAX))
    }
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
        let last = Reading { at, elapsed: self.host.elapsed() };
        let mut heard = self.lock();
        let before = heard.map(|heard| heard.furthest);
        let furthest = before.filter(|f| f.carried_on(last.elapsed) > at).unwrap_or(last);
        *heard = Some(Heard { last, furthest });
    }

    /// The CA's clock as it must stand now; `None` before the first answer.
    #[must_use]
    pub fn ca_now(&self) -> Option<OffsetDateTime> {
        let heard = (*self.lock())?;
        Some(heard.last.carried_on(self.host.elapsed()))
    }

    /// The clocks the CA's certificate is judged by: it is good where one of them says so. Neither
    /// follows a CA that says an earlier time than it said before. The first says when a certificate
    /// is over whatever the host's clock shows; the second believes a CA again whose clock stood
    /// ahead and was put right.
    #[must_use]
    pub fn judges(&self) -> [Arc<dyn Clock>; 2] {
        [Arc::new(FurthestClock(self.clone())), Arc::clone(&self.host)]
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

/// The latest the CA ever said, carried on by time that passes; the host's clock before the first
/// answer. It never falls back while the agent runs, and a restart forgets it.
#[derive(Clone, Debug)]
struct FurthestClock(CaClock);

impl Clock for FurthestClock {
    fn now(&self) -> OffsetDateTime {
        let heard = *self.0.lock();
        heard.map_or_else(|| self.0.host.now(), |h| h.furthest.carried_on(self.elapsed()))
    }

    fn elapsed(&self) -> Duration {
        self.0.host.elapsed()
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
    fn a_ca_that_says_an_earlier_time_moves_no_judge_of_its_certificate() {
        let host = SettableClock::new(T0);
        let clock = CaClock::new(Arc::new(host.clone()));
        let [furthest, own] = clock.judges();
        assert_eq!(furthest.now(), T0, "nothing heard yet");
        clock.hear(T0 + HOUR, Duration::ZERO);
        host.advance(HOUR);
        clock.hear(T0, Duration::ZERO);
        assert_eq!(clock.now(), T0, "decisions follow it");
        assert_eq!((furthest.now(), own.now()), (T0 + 2 * HOUR, T0 + HOUR));
        // An hour of answers that say the same moment.
        for _ in 0..60 {
            host.advance(HOUR / 60);
            clock.hear(T0, Duration::ZERO);
        }
        assert_eq!((furthest.now(), own.now()), (T0 + 3 * HOUR, T0 + 2 * HOUR));
        clock.hear(datetime!(9999-12-31 23:59:59 UTC), Duration::MAX);
        host.advance(HOUR);
        assert!(furthest.now() > T0 + 3 * HOUR, "the end of the calendar is no panic");
    }

    #[test]
    fn a_skew_is_told_with_its_size_and_side() {
        assert_eq!(skew_text(-2_040), "34m behind the CA");
        assert_eq!(skew_text(61), "1m 1s ahead of the CA");
        assert!(skew_text(i64::MIN).ends_with("behind the CA"));
    }
}
