//! Figures as text, in a form that Markdown shows as a table.

use std::time::Duration;

use crate::{cell::Cell, floor::Floor};

/// Head of the table.
pub(crate) fn head() -> String {
    "| kind | callers | ops/s | p50 ms | p99 ms | server CPU µs/op | x floor | client CPU µs/op \
     | server MiB | load | failed |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
        .to_owned()
}

/// One row of it.
pub(crate) fn row(cell: &Cell, floor: &Floor) -> String {
    let replies = cell.latencies.len();
    let server = per_reply(cell.server_cpu, replies);
    let floor = floor.of(cell.kind);
    format!(
        "| {} | {} | {:.0} | {:.2} | {:.2} | {:.0} | {:.1} | {:.0} | {:.0} | {:.1} | {} |",
        cell.kind.name(),
        cell.concurrency,
        count(replies) / cell.wall.as_secs_f64(),
        ms(percentile(&cell.latencies, 50)),
        ms(percentile(&cell.latencies, 99)),
        us(server),
        server.as_secs_f64() / floor.as_secs_f64(),
        us(per_reply(cell.client_cpu, replies)),
        cell.memory_mib,
        cell.load,
        cell.failed
    )
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
