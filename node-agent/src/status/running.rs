//! What Ray serves, in the status: the horizons and what is to be done, and a line for each socket. A
//! node is never called well by the date of a file: where nothing was seen, that is said.

use time::OffsetDateTime;

use super::{FirstFailure, State, Status, first_failure::named};
use crate::{
    failure::Failure,
    served::{ProcessServed, Served, Serves, SocketServed, kind::Class, table},
};

/// So many processes are named in one line.
const NAMED_MAX: usize = 8;

/// What `status --check` says of it.
pub(super) fn check(served: Option<&Served>, now: OffsetDateTime) -> Result<(), Failure> {
    let Some(served) = served.map(|served| served.at(now)) else { return Ok(()) };
    if served.state != Some(State::RecycleOverdue) {
        return Ok(());
    }
    let late = list(served.processes.iter().filter(|process| is_late(process, Class::Node)));
    Err(Failure::Failed(format!("recycle-overdue: start Ray on this node again; {late}")))
}

/// Lines of the status: name and text.
pub(super) fn lines(status: &Status, now: OffsetDateTime) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    // Of a revoked node everything fails already.
    if let Some(first) = status.first_failure.as_ref().filter(|_| !status.is_revoked()) {
        lines.push(("fails first", first.line(now)));
    }
    match &status.served {
        Some(served) => seen(&served.at(now), now, &mut lines),
        None if status.served_problem.is_none() => {
            lines.push(("running horizon", "not known: Ray was not looked at".to_owned()));
        }
        None => {}
    }
    if let Some(problem) = &status.served_problem {
        lines.push(("RAY NOT SEEN", problem.clone()));
    }
    lines
}

fn seen(served: &Served, now: OffsetDateTime, lines: &mut Vec<(&'static str, String)>) {
    let looked = format!("; looked at {}", served.as_of.relative(now));
    let node = table::horizon(served.horizon, served.state, now);
    lines.push(("running horizon", node + &looked));
    lines.push(("drivers", table::horizon(served.drivers_horizon, served.drivers_state, now)));
    let late = |class| served.processes.iter().filter(move |process| is_late(process, class));
    if late(Class::Node).next().is_some() {
        let text = format!("start Ray on this node again: {}", list(late(Class::Node)));
        lines.push(("RECYCLE OVERDUE", text));
    }
    if late(Class::Driver).next().is_some() {
        let what = "a third of its leaf's life or less is left; its owner must start it again";
        lines.push(("DRIVER ALARM", format!("{}: {what}", list(late(Class::Driver)))));
    }
    let revoked: Vec<&ProcessServed> = served.with_revoked_key().collect();
    if !revoked.is_empty() {
        let what =
            "start Ray on this node again, drivers by their owners; Ray takes it until it ends";
        lines.push(("KEY REVOKED", format!("{}: {what}", list(revoked.into_iter()))));
    }
    let refusing: Vec<String> = served.refusing().take(NAMED_MAX + 1).collect();
    if !refusing.is_empty() {
        let what = "`node-agent doctor --explain ADDRESS` says why";
        lines.push(("REFUSED BY RAY", format!("{}: {what}", joined(refusing))));
    }
    let plain: Vec<String> = served.plain_ports().take(NAMED_MAX + 1).collect();
    if !plain.is_empty() {
        lines.push((
            "plain ports",
            format!("{}: no TLS, open to whoever reaches them", joined(plain)),
        ));
    }
    lines.extend(served.blind.iter().map(|sentence| ("not seen", sentence.clone())));
}

fn is_late(process: &ProcessServed, class: Class) -> bool {
    process.class == class && process.state == Some(State::RecycleOverdue)
}

fn list<'a>(processes: impl Iterator<Item = &'a ProcessServed>) -> String {
    joined(processes.take(NAMED_MAX + 1).map(named).collect())
}

fn joined(mut words: Vec<String>) -> String {
    if words.len() > NAMED_MAX {
        words.truncate(NAMED_MAX);
        words.push("and more".to_owned());
    }
    words.join(", ")
}

/// One line a socket.
pub(super) fn processes(served: &Served, now: OffsetDateTime) -> String {
    if served.processes.is_empty() {
        return String::new();
    }
    format!("\n{}", table::processes(&served.at(now), now))
}

impl FirstFailure {
    fn line(&self, now: OffsetDateTime) -> String {
        format!("{} ({}): {}", self.at, self.at.relative(now), self.what)
    }
}

impl Served {
    /// Processes that serve a leaf whose key the CA has revoked.
    pub(crate) fn with_revoked_key(&self) -> impl Iterator<Item = &ProcessServed> {
        let is_revoked =
            |socket: &SocketServed| matches!(socket.serves, Serves::Leaf { revoked: true, .. });
        self.processes.iter().filter(move |process| process.sockets.iter().any(is_revoked))
    }

    /// Sockets of Ray that do not take this node's leaf, by process and address.
    pub(crate) fn refusing(&self) -> impl Iterator<Item = String> {
        self.processes.iter().flat_map(|process| {
            let refused = process.sockets.iter().filter(|socket| socket.refuses());
            refused.map(|socket| format!("{} at {}", named(process), socket.address))
        })
    }

    /// Sockets without TLS, by port of the plan and process.
    pub(crate) fn plain_ports(&self) -> impl Iterator<Item = String> {
        self.processes.iter().flat_map(|process| {
            let plain = process.sockets.iter().filter(|s| matches!(s.serves, Serves::Plain { .. }));
            plain.map(|socket| {
                let port = socket.port.as_deref().unwrap_or_else(|| process.kind.word());
                format!("{port} {}", socket.address)
            })
        })
    }
}
