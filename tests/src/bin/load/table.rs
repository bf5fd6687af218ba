//! Figures as text, in a form that Markdown shows as a table.

use std::time::Duration;

use serde::Serialize;

use crate::{cell::Cell, floor::Floor};

/// Head of the table.
pub(crate) fn head() -> String {
    "| kind | callers | ops/s | p50 ms | p99 ms | server CPU µs/op | x floor | fdatasyncs/op \
     | stored bytes/op | client CPU µs/op | server MiB | load | failed |\n\
     |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
        .to_owned()
}

/// One row of it.
pub(crate) fn row(cell: &Cell, floor: &Floor) -> String {
    let row = Row::new(cell, floor);
    let or_dash = |figure: Option<f64>, places| {
        figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.places$}"))
    };
    format!(
        "| {} | {} | {:.0} | {:.2} | {:.2} | {:.0} | {} | {} | {} | {:.0} | {:.0} | {:.1} | {} |",
        row.kind,
        row.callers,
        row.ops_per_second,
        row.p50_ms,
        row.p99_ms,
        row.server_cpu_us,
        or_dash(row.times_floor, 1),
        or_dash(row.fdatasyncs, 3),
        or_dash(row.stored_bytes, 0),
        row.client_cpu_us,
        row.server_mib,
        row.load,
        row.failed
    )
}

/// The figures of a row; those of an operation, unless they say otherwise.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    kind: &'static str,
    callers: usize,
    replies: usize,
    failed: usize,
    ops_per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    server_cpu_us: f64,
    client_cpu_us: f64,
    /// Absent where there is no floor.
    times_floor: Option<f64>,
    fdatasyncs: Option<f64>,
    stored_bytes: Option<f64>,
    /// Of the whole server after the row.
    server_mib: f64,
    load: f64,
}

impl Row {
    pub(crate) fn new(cell: &Cell, floor: &Floor) -> Self {
        let replies = cell.latencies.len();
        let server = per_reply(cell.server_cpu, replies);
        let floor = floor.of(cell.kind);
        let certifies = cell.kind.certifies();
        let share = |whole: u64| certifies.then(|| total(whole) / count(replies).max(1.0));
        Self {
            kind: cell.kind.name(),
            callers: cell.concurrency,
            replies,
            failed: cell.failed,
            ops_per_second: count(replies) / cell.wall.as_secs_f64(),
            p50_ms: ms(percentile(&cell.latencies, 50)),
            p99_ms: ms(percentile(&cell.latencies, 99)),
            server_cpu_us: us(server),
            client_cpu_us: us(per_reply(cell.client_cpu, replies)),
            times_floor: (!floor.is_zero()).then(|| server.as_secs_f64() / floor.as_secs_f64()),
            fdatasyncs: share(cell.fdatasyncs),
            stored_bytes: share(cell.stored_bytes),
            server_mib: cell.memory_mib,
            load: cell.load,
        }
    }
}

/// The middle value.
pub(crate) fn median(values: &mut [Duration]) -> Duration {
    values.sort_unstable();
    percentile(values, 50)
}

/// Nearest rank of sorted values; zero of none.
pub(crate) fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

pub(crate) fn ms(length: Duration) -> f64 {
    length.as_secs_f64() * 1_000.0
}

pub(crate) fn us(length: Duration) -> f64 {
    length.as_secs_f64() * 1_000_000.0
}

fn per_reply(total: Duration, replies: usize) -> Duration {
    total.div_f64(count(replies).max(1.0))
}

#[allow(clippy::cast_precision_loss, reason = "at most a few hundred thousand")]
fn count(replies: usize) -> f64 {
    replies as f64
}

#[allow(clippy::cast_precision_loss, reason = "bytes of a store far below 2^53")]
fn total(whole: u64) -> f64 {
    whole as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let times: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 50), Duration::from_millis(100));
        assert_eq!(percentile(&times, 99), Duration::from_millis(198));
        assert_eq!(percentile(&times[..1], 99), Duration::from_millis(1));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }
}
