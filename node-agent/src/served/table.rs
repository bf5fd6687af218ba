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
    let (node, drivers) = (served.state, served.drivers_state);
    line(format!("{:<18} {}", "running horizon", horizon(served.horizon, node, now)));
    line(format!("{:<18} {}", "drivers", horizon(served.drivers_horizon, drivers, now)));
    for sentence in &served.blind {
        line(format!("{:<18} {sentence}", "not seen"));
    }
    out + &processes(served, now)
}

/// One line a socket, under a head.
#[must_use]
pub fn processes(served: &Served, now: OffsetDateTime) -> String {
    let mut out = String::new();
    let mut line =
        |text: String| writeln!(out, "{}", text.trim_end()).expect("writing to a String");
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

/// A horizon and a state, for a person.
#[must_use]
pub fn horizon(horizon: Option<Moment>, state: Option<State>, now: OffsetDateTime) -> String {
    let horizon = horizon.map_or_else(
        || "no leaf is served".to_owned(),
        |at| format!("{at} ({})", at.relative(now)),
    );
    let state = state.map(|state| format!(", {}", state.word())).unwrap_or_default();
    format!("{horizon}{state}")
}

fn serves(serves: &Serves, process: &ProcessServed, now: OffsetDateTime) -> String {
    match serves {
        Serves::Leaf { serial, not_after, refused_us, revoked, .. } => {
            let marks = [
                revoked.then(|| "KEY REVOKED".to_owned()),
                refused_us.clone(),
                process.job.as_ref().map(ToString::to_string),
            ];
            let marks: String =
                marks.into_iter().flatten().map(|mark| format!("; {mark}")).collect();
            format!("leaf {serial} ends {not_after} ({}){marks}", not_after.relative(now))
        }
        Serves::Foreign { why, serial, .. } => {
            let serial = serial.as_deref().unwrap_or("without a readable serial number");
            format!("FOREIGN {serial}: {why}")
        }
        Serves::Plain { .. } => "plain, no TLS".to_owned(),
        Serves::None { why } => format!("no certificate of {}: {why}", process.name),
        Serves::NotAsked { why } => format!("not asked: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::{
        super::{
            SocketServed,
            kind::{Class, Kind},
        },
        *,
    };

    #[test]
    fn one_line_a_socket_and_the_horizons_first() {
        let now = datetime!(2026-11-24 08:00 UTC);
        let ends = Moment::from(datetime!(2026-11-24 11:20 UTC));
        let leaf = Serves::Leaf {
            serial: "0190".to_owned(),
            issued: now.into(),
            not_after: ends,
            trusts: vec![],
            refused_us: None,
            revoked: false,
        };
        let foreign = Serves::Foreign {
            why: "it names no node".to_owned(),
            serial: None,
            not_after: None,
            trusts: vec![],
            refused_us: None,
        };
        let socket = |port: Option<&str>, serves| SocketServed {
            address: "10.0.0.1:6701".to_owned(),
            port: port.map(str::to_owned),
            serves,
        };
        let raylet = ProcessServed {
            pid: Some(30),
            uid: 1000,
            kind: Kind::Raylet,
            class: Class::Node,
            name: "raylet".to_owned(),
            session: None,
            job: None,
            state: Some(State::RecycleDue),
            horizon: Some(ends),
            sockets: vec![
                socket(Some("node_manager"), leaf),
                socket(None, foreign),
                socket(None, Serves::Plain { seen: true }),
            ],
        };
        let served = Served {
            as_of: now.into(),
            state: Some(State::RecycleDue),
            horizon: Some(ends),
            drivers_state: None,
            drivers_horizon: None,
            processes: vec![raylet],
            blind: vec!["2 processes".to_owned()],
        };
        let text = table(&served, now);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..3],
            [
                "running horizon    2026-11-24T11:20:00Z (in 3h 20m), recycle-due",
                "drivers            no leaf is served",
                "not seen           2 processes",
            ]
        );
        assert!(lines[3].starts_with("KIND"));
        for (line, start, end) in [
            (
                lines[4],
                "raylet             30       recycle-due     node_manager ",
                "leaf 0190 ends 2026-11-24T11:20:00Z (in 3h 20m)",
            ),
            (lines[5], "raylet", "FOREIGN without a readable serial number: it names no node"),
            (lines[6], "raylet", "plain, no TLS"),
        ] {
            assert!(line.starts_with(start) && line.ends_with(end), "{line}");
        }
    }
}
