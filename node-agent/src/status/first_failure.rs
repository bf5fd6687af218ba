//! What fails first on this node, and when: the files of what starts next, or a leaf that a process
//! serves already. Pure.

use serde::{Deserialize, Serialize};

use super::Status;
use crate::{
    moment::Moment,
    served::{ProcessServed, kind::Class},
};

/// The first failure that somebody sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstFailure {
    /// When.
    pub at: Moment,
    /// Where, and what is seen.
    pub what: String,
}

impl FirstFailure {
    /// By the files, by what runs, and by the lease. Where the CA answers, files are `renewed` and the
    /// lease as well.
    #[must_use]
    pub fn of(status: &Status, renewed: bool) -> Option<Self> {
        let files = status.files_work_until.filter(|_| !renewed).map(|at| Self {
            at,
            what: "Ray cannot be started any more: its files are not renewed".to_owned(),
        });
        let processes = status.served.iter().flat_map(|served| &served.processes);
        let running = processes
            .filter_map(|process| Some((process.horizon?, process)))
            .min_by_key(|(at, _)| *at)
            .map(|(at, process)| Self { at, what: what(process) });
        let lease = status.lease_ends.filter(|_| !renewed).map(|at| Self {
            at,
            what: "other nodes take this one out of their tables: the CA has not heard it"
                .to_owned(),
        });
        Self::earlier(Self::earlier(running, files), lease)
    }

    /// The earlier of two; the first, of two at once.
    #[must_use]
    pub fn earlier(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        one.into_iter().chain(other).min_by_key(|failure| failure.at)
    }
}

fn what(process: &ProcessServed) -> String {
    let who = named(process);
    match process.class {
        Class::Node => format!("new connections to {who} fail: the leaf it serves ends"),
        Class::Driver => {
            format!("new connections to {who} fail, and tasks that use its objects hang")
        }
    }
}

/// A process, as a person finds it.
pub(crate) fn named(process: &ProcessServed) -> String {
    let kind = process.kind.word();
    let pid = process.pid.map_or_else(|| "of unknown pid".to_owned(), |pid| format!("pid {pid}"));
    match process.class {
        Class::Node => format!("{kind} ({pid})"),
        Class::Driver => {
            let job = process.job.as_ref().map(|job| format!(", {job}")).unwrap_or_default();
            format!("{kind} ({pid}, uid {}, {}{job})", process.uid, process.name)
        }
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;
    use crate::{
        agent::empty_status,
        served::{Served, kind::Kind},
    };

    fn process(kind: Kind, hour: u8) -> ProcessServed {
        ProcessServed {
            pid: Some(30),
            uid: 1000,
            kind,
            class: kind.class(),
            name: "python3 train.py".to_owned(),
            session: None,
            job: None,
            state: None,
            horizon: Some(Moment::from(
                datetime!(2026-11-24 00:00 UTC) + time::Duration::hours(hour.into()),
            )),
            sockets: Vec::new(),
        }
    }

    #[test]
    fn what_runs_and_the_files_fail_each_at_its_time() {
        let now = datetime!(2026-11-24 00:00 UTC);
        let at = |hour: i64| Moment::from(now + time::Duration::hours(hour));
        let status = |files: Option<i64>, processes: Vec<ProcessServed>| Status {
            files_work_until: files.map(at),
            served: Some(Served { processes, ..Served::none(now) }),
            ..empty_status(now)
        };
        let both = vec![process(Kind::Raylet, 5), process(Kind::Driver, 3)];
        for (name, status, renewed, when, what) in [
            (
                "a driver first",
                status(Some(4), both.clone()),
                false,
                3,
                "driver (pid 30, uid 1000, python3 train.py)",
            ),
            ("the files first", status(Some(2), both.clone()), false, 2, "Ray cannot be started"),
            ("the files are renewed", status(Some(2), both), true, 3, "hang"),
            (
                "a raylet",
                status(Some(9), vec![process(Kind::Raylet, 5)]),
                false,
                5,
                "raylet (pid 30) fail",
            ),
            ("nothing runs", status(Some(9), vec![]), false, 9, "Ray cannot be started"),
        ] {
            let first = FirstFailure::of(&status, renewed).unwrap();
            assert_eq!(first.at, at(when), "{name}");
            assert!(first.what.contains(what), "{name}: {}", first.what);
        }
        assert_eq!(FirstFailure::of(&status(Some(2), vec![]), true), None);
        let silent = Status { lease_ends: Some(at(1)), ..status(Some(2), vec![]) };
        assert_eq!(FirstFailure::of(&silent, false).unwrap().at, at(1));
    }
}
