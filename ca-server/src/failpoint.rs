//! Points between signing and answering at which the crash tests kill the process. Only the feature
//! `fail-points` arms them; without it a point is an empty function.

/// The points, in the order a request passes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// The certificate is signed, nothing is on record.
    AfterSign,
    /// The group is decided, the engine has seen nothing of it.
    BeforeBatch,
    /// The engine has the batch, nothing is flushed.
    AfterBatch,
    /// The batch is with the system, perhaps not on the disk.
    AfterFlush,
    /// The batch is on the disk, nobody was told.
    AfterFdatasync,
    /// The answer is made, not sent.
    BeforeReply,
}

impl Point {
    /// All of them, in order.
    pub const ALL: [Self; 6] = [
        Self::AfterSign,
        Self::BeforeBatch,
        Self::AfterBatch,
        Self::AfterFlush,
        Self::AfterFdatasync,
        Self::BeforeReply,
    ];

    /// As it stands in the variable that arms it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AfterSign => "after-sign",
            Self::BeforeBatch => "before-batch",
            Self::AfterBatch => "after-batch",
            Self::AfterFlush => "after-flush",
            Self::AfterFdatasync => "after-fdatasync",
            Self::BeforeReply => "before-reply",
        }
    }
}

/// Passes a point.
#[cfg(not(feature = "fail-points"))]
#[inline]
pub fn hit(_point: Point) {}

#[cfg(feature = "fail-points")]
pub use armed::{VARIABLE, hit};

#[cfg(feature = "fail-points")]
mod armed {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };

    use super::Point;

    /// `NAME:N` kills the process the Nth time the point is passed.
    pub const VARIABLE: &str = "RAYMTLS_FAIL_POINT";

    static ARMED: LazyLock<Option<(Point, u64)>> = LazyLock::new(|| {
        let text = std::env::var(VARIABLE).ok()?;
        Some(parse(&text).expect("the fail point is NAME:N with a name from the list and N > 0"))
    });
    static PASSED: AtomicU64 = AtomicU64::new(0);

    /// Passes a point; the process is gone if it is the armed one and its turn has come.
    pub fn hit(point: Point) {
        let Some((armed, turn)) = *ARMED else { return };
        if armed == point && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == turn {
            // As at a power cut: nothing is unwound, flushed or said.
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
        }
    }

    fn parse(text: &str) -> Option<(Point, u64)> {
        let (name, turn) = text.split_once(':')?;
        let point = Point::ALL.into_iter().find(|point| point.name() == name)?;
        turn.parse().ok().filter(|turn| *turn > 0).map(|turn| (point, turn))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_point_is_named_with_its_turn() {
            assert_eq!(parse("after-flush:3"), Some((Point::AfterFlush, 3)));
            for wrong in ["after-flush", "after-flush:0", "nowhere:1", ":1", ""] {
                assert_eq!(parse(wrong), None, "{wrong}");
            }
        }
    }
}
