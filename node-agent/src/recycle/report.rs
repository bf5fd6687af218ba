//! What a recycle says while it works, and at its end: lines on standard error, one JSON document on standard
//! output for a script.

use std::time::Duration;

use serde::{Serialize, Serializer};
use tokio::time::Instant;

use super::plan::{Plan, Scope, Step};

/// One step that was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Done {
    step: Step,
    seconds: Tenths,
    detail: String,
}

/// Seconds with one digit behind the point: more is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tenths(u64);

impl Serialize for Tenths {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let tenths = u32::try_from(self.0).unwrap_or(u32::MAX);
        serializer.serialize_f64(f64::from(tenths) / 10.0)
    }
}

/// The whole of it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) cluster: String,
    pub(super) node: String,
    pub(super) scope: Scope,
    /// `done`, `refused`, `dry-run` or `failed`.
    pub(super) outcome: &'static str,
    pub(super) plan: Plan,
    pub(super) done: Vec<Done>,
    /// Serials that the node's processes served before.
    pub(super) old_serials: Vec<String>,
    /// Serials seen after it.
    pub(super) new_serials: Vec<String>,
    /// Why it failed, and in which state the node is.
    pub(super) failure: Option<String>,
}

/// Tells each step as it goes.
pub(super) struct Progress {
    begun: Instant,
    pub(super) done: Vec<Done>,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), done: Vec::new() }
    }

    /// What is being done now.
    pub(super) fn say(&self, text: &str) {
        eprintln!("[{:>4}] {text}", seconds(self.begun.elapsed()));
    }

    /// A step that is done.
    pub(super) fn done(&mut self, step: Step, begun: Instant, detail: String) {
        let took = begun.elapsed();
        self.say(&format!("ok: {detail} ({})", seconds(took)));
        self.done.push(Done { step, seconds: Tenths(tenths(took)), detail });
    }
}

pub(super) fn seconds(time: Duration) -> String {
    let tenths = tenths(time);
    format!("{}.{} s", tenths / 10, tenths % 10)
}

fn tenths(time: Duration) -> u64 {
    u64::try_from(time.as_millis() / 100).unwrap_or(u64::MAX)
}
