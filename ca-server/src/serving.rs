//! Since when the CA has been serving, as far as leases are concerned: time that a clock jumped over, or
//! in which the host slept, is nobody's silence, so after it the count begins anew.

use std::{sync::Mutex, time::Duration};

use raymtls_proto::clock::Clock;
use time::OffsetDateTime;

/// A step of the wall clock ahead of the time that passed that is no jump.
const DRIFT_MAX: Duration = Duration::from_secs(120);
/// Asked each minute: after a longer pause the host slept, or the process was stopped.
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// When serving began, by the wall clock as it goes now.
#[derive(Debug)]
pub struct Serving(Mutex<Seen>);

#[derive(Clone, Copy, Debug)]
struct Seen {
    since: OffsetDateTime,
    wall: OffsetDateTime,
    elapsed: Duration,
}

impl Serving {
    /// From now on.
    #[must_use]
    pub fn from_now(clock: &dyn Clock) -> Self {
        let (wall, elapsed) = (clock.now(), clock.elapsed());
        Self(Mutex::new(Seen { since: wall, wall, elapsed }))
    }

    /// Since when; asked each minute, so that a jump is seen as one.
    pub fn since(&self, clock: &dyn Clock) -> OffsetDateTime {
        let mut seen = self.0.lock().expect("no code panics while it holds the moments");
        let (wall, elapsed) = (clock.now(), clock.elapsed());
        let passed = elapsed.saturating_sub(seen.elapsed);
        if passed > PAUSE_MAX || wall > seen.wall + passed + DRIFT_MAX {
            seen.since = wall;
        }
        (seen.wall, seen.elapsed) = (wall, elapsed);
        seen.since
    }
}

#[cfg(test)]
mod tests {
    use raymtls_proto::clock::SettableClock;

    use super::*;

    #[test]
    fn a_clock_that_jumps_ahead_makes_nobody_silent() {
        let start = OffsetDateTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let clock = SettableClock::new(start);
        let serving = Serving::from_now(&clock);
        for _ in 0..100 {
            clock.advance(Duration::from_secs(60));
            assert_eq!(serving.since(&clock), start);
        }
        let day = Duration::from_secs(86_400);
        clock.advance(day);
        let woke = clock.now();
        assert_eq!(serving.since(&clock), woke, "the host slept for a day");
        clock.set(clock.now() + day);
        let jumped = clock.now();
        assert_eq!(serving.since(&clock), jumped);
        clock.advance(Duration::from_secs(60));
        assert_eq!(serving.since(&clock), jumped);
        clock.set(clock.now() - 2 * day);
        assert_eq!(serving.since(&clock), jumped, "a step back makes nobody silent either");
    }
}
