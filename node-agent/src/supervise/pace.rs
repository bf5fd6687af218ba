//! When a process that ended by itself is started again. Pure.

use std::time::Duration;

/// Before the first start after a crash: new connections wait in the listening sockets meanwhile.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Before any start.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A process that ran for so long did not crash because of how it was started.
const RAN_WELL: Duration = Duration::from_secs(60);

/// Ends in a row of processes that did not run well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pace {
    in_a_row: u32,
}

impl Pace {
    /// After a process ended that ran for this long: how long to wait.
    pub(crate) fn ended(&mut self, ran_for: Duration) -> Duration {
        if ran_for >= RAN_WELL {
            self.in_a_row = 0;
        }
        let pause = PAUSE_MIN.saturating_mul(1 << self.in_a_row.min(16)).min(PAUSE_MAX);
        self.in_a_row = self.in_a_row.saturating_add(1);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_crash_is_healed_within_a_second_and_a_loop_is_slowed_down() {
        let mut pace = Pace::default();
        let second = Duration::from_secs(1);
        let pauses: Vec<_> = (0..12).map(|_| pace.ended(second).as_millis()).collect();
        assert_eq!(pauses[..5], [100, 200, 400, 800, 1_600]);
        assert_eq!(pauses[10..], [30_000, 30_000]);
        assert!(pace.ended(RAN_WELL) < second, "a good run is forgiven");
        for _ in 0..100 {
            assert!(pace.ended(Duration::ZERO) <= PAUSE_MAX);
        }
    }
}
