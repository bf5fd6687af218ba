//! How often the log hears of refusals: a few lines a minute for one caller and reason, and a bounded
//! number for a reason whoever calls, so that nobody fills the disk or buries what matters. What is
//! left out is counted and said with the next line; metrics count every refusal. Memory is fixed.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::{Rate, sketch::Sketch};

/// Lines for one caller and reason: so many a minute, and as many at once.
const LINES_OF_CALLER: u32 = 6;
/// The same for a reason, whoever calls.
const LINES_OF_REASON: u32 = 300;

/// Which lines are written.
#[derive(Debug)]
pub struct Quiet {
    by_caller: Sketch<(&'static str, String, String)>,
    by_reason: Sketch<(&'static str, String)>,
    left_out: AtomicU64,
}

impl Default for Quiet {
    fn default() -> Self {
        let rate = |lines| Rate::new(lines, lines);
        Self {
            by_caller: Sketch::of_many(rate(LINES_OF_CALLER)),
            by_reason: Sketch::of_many(rate(LINES_OF_REASON)),
            left_out: AtomicU64::new(0),
        }
    }
}

impl Quiet {
    /// Whether a line is to be written: if so, how many were left out since the last one that was.
    pub fn tell(
        &self,
        elapsed: Duration,
        kind: &'static str,
        who: &str,
        reason: &str,
    ) -> Option<u64> {
        let caller = (kind, who.to_owned(), reason.to_owned());
        let too_many = self.by_caller.take(elapsed, &caller).is_some()
            || self.by_reason.take(elapsed, &(kind, reason.to_owned())).is_some();
        if too_many {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.left_out.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refusals_is_a_few_lines_and_a_count() {
        let quiet = Quiet::default();
        let at = Duration::from_secs;
        let told = |who: &str| {
            (0..1_000).filter(|_| quiet.tell(at(0), "call", who, "X").is_some()).count()
        };
        assert_eq!(told("node:c1/w1"), 6);
        // Another caller is heard, and the line says what was left out.
        assert_eq!(quiet.tell(at(0), "call", "node:c1/w2", "X"), Some(994));
        assert_eq!(quiet.tell(at(0), "call", "node:c1/w1", "Y"), Some(0));
        assert_eq!(quiet.tell(at(10), "call", "node:c1/w1", "X"), Some(0));

        // Callers by the thousand are bounded too, and hide no other reason.
        let lines =
            (0..10_000).filter(|n| quiet.tell(at(10), "call", &format!("{n}"), "Z").is_some());
        assert!(lines.count() <= 300);
        assert!(quiet.tell(at(10), "call", "node:c1/w3", "Y").is_some());
    }
}
