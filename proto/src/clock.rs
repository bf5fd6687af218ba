//! The one source of wall time. It feeds rustls, the store, the decisions and the tests; a real
//! binary is given another time only from outside (`faketime`).

use std::{
    fmt::Debug,
    sync::{Arc, Mutex},
    time::Duration,
};

use rustls::{pki_types::UnixTime, time_provider::TimeProvider};
use time::OffsetDateTime;

/// Wall time. Not monotonic: it follows the machine's clock where that jumps.
pub trait Clock: Debug + Send + Sync {
    /// Now, in UTC.
    fn now(&self) -> OffsetDateTime;

    /// How long it is since some moment that stays the same: it goes on while the machine sleeps, and
    /// does not follow the wall clock where that jumps.
    fn elapsed(&self) -> Duration {
        let since_boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::try_from(since_boot).unwrap_or_default()
    }
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods, reason = "the place the clock is read")]
    fn now(&self) -> OffsetDateTime {
        OffsetDateTime::now_utc()
    }
}

/// A clock that a test moves.
#[derive(Clone, Debug)]
pub struct SettableClock(Arc<Mutex<Reading>>);

#[derive(Clone, Copy, Debug)]
struct Reading {
    wall: OffsetDateTime,
    elapsed: Duration,
}

impl SettableClock {
    /// A clock that stands at `now` until it is moved.
    #[must_use]
    pub fn new(now: OffsetDateTime) -> Self {
        Self(Arc::new(Mutex::new(Reading { wall: now, elapsed: Duration::ZERO })))
    }

    /// Lets time pass.
    pub fn advance(&self, by: Duration) {
        let mut reading = self.lock();
        reading.wall += by;
        reading.elapsed += by;
    }

    /// Puts the wall clock at `now`, backwards too; no time passes.
    pub fn set(&self, now: OffsetDateTime) {
        self.lock().wall = now;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Reading> {
        self.0.lock().expect("no code panics while it holds the clock")
    }
}

impl Clock for SettableClock {
    fn now(&self) -> OffsetDateTime {
        self.lock().wall
    }

    fn elapsed(&self) -> Duration {
        self.lock().elapsed
    }
}

/// Gives a [`Clock`] to rustls, so that certificates are judged by the same time as everything else.
#[derive(Clone, Debug)]
pub struct TlsTime(pub Arc<dyn Clock>);

impl TimeProvider for TlsTime {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from(self.0.now().unix_timestamp()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

/// The moment `seconds` after 1970, as it travels in messages. `None` where it lies outside the
/// years the `time` crate can hold (up to 9999).
#[must_use]
pub fn from_unix(seconds: i64) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(seconds).ok()
}
