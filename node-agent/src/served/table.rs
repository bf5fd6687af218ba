//! What Ray serves, for a person: one line a socket.

use std::fmt::Write;

use time::OffsetDateTime;

use super::{ProcessServed, Served, Serves, horizon::State};
use crate::moment::Moment;

/// The table. `now` is the reader's clock.
#[must_use]
pub fn table(served: &Served, now: OffsetDateTime) -> String {
    let mut out = String::new();
    let mut line =
        |text: String| writeln!(out, "{}", text.trim_end()).expect("writing to a String");
    line(summary("running horizon", served.horizon, served.state, now));
    line(summary("drivers", served.drivers_horizon, served.drivers_state, now));
    for sentence in &served.blind {
        line(format!("{:<18} {sentence}", "not seen"));
    }
    line(format!(
        "{:<18} {:<8} {:<15} {:<20} {:<22} SERVES",
        "KIND", "PID", "STATE", "PORT", "ADDRESS"
    ));
    for process in &served.processes {
        for socket in &process.sockets {
            line(format!(
                "{:<18} {:<8} {:<15} {:<20} {:<22} {}",
                process.kind.word(),
                process.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
                process.state.map_or("-", State::word),
                socket.port.as_deref().unwrap_or("-"),
                socket.address,
                serves(&socket.serves, process, now),
            ));
        }
    }
    out
}

fn summary(
    name: &str,
    horizon: Option<Moment>,
    state: Option<State>,
    now: OffsetDateTime,
) -> String {
    let horizon = horizon.map_or_else(
        || "no leaf is served".to_owned(),
        |at| format!("{at} ({})", at.relative(now)),
    );
    let state = state.map(|state| format!(", {}", state.word())).unwrap_or_default();
    format!("{name:<18} {horizon}{state}")
}

fn serves(serves: &Serves, process: &ProcessServed, now: OffsetDateTime) -> String {
    match serves {
        Serves::Leaf { serial, not_after, refused_us, .. } => {
            let refused = refused_us.as_deref().map(|why| format!("; {why}")).unwrap_or_default();
            format!("leaf {serial} ends {not_after} ({}){refused}", not_after.relative(now))
        }
        Serves::Foreign { why, serial, .. } => {
            let serial = serial.as_deref().unwrap_or("without a readable serial number");
            format!("FOREIGN {serial}: {why}")
        }
        Serves::Plain { .. } => "plain HTTP".to_owned(),
        Serves::None { why } => format!("no certificate of {}: {why}", process.name),
        Serves::NotAsked { why } => format!("not asked: {why}"),
    }
}
