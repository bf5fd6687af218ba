//! What is kept of a look: bounded, since a task can open sockets without end; judged anew by the
//! reader's clock, since it may be read long after; and summed up for the CA and for metrics. Pure.

use std::collections::BTreeMap;

use raymtls_proto::v1;
use time::OffsetDateTime;

use super::{
    ProcessServed, Served, Serves,
    horizon::{self, State},
    kind::Class,
};

/// Most processes that are kept, those that matter most first.
const PROCESSES_MAX: usize = 256;
/// Most sockets that are kept.
const SOCKETS_MAX: usize = 512;
/// Most names of CAs of one socket.
const TRUSTS_MAX: usize = 4;
/// Longest sentence of a peer, in characters.
const WHY_LEN_MAX: usize = 300;

impl Served {
    /// As much as a status holds. Horizons and states are those of all.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        let mut sockets = 0;
        let fits = |process: &&ProcessServed| {
            sockets += process.sockets.len();
            sockets <= SOCKETS_MAX
        };
        let kept = self.processes.iter().take(PROCESSES_MAX).take_while(fits).count();
        let left_out = self.processes.len() - kept;
        if left_out > 0 {
            self.processes.truncate(kept);
            self.blind.push(format!("{left_out} processes beyond what a status holds"));
        }
        for process in &mut self.processes {
            process.sockets.iter_mut().for_each(|socket| socket.serves.cut());
        }
        self
    }

    /// The same, judged by this clock: what was fresh when it was looked at may be late by now.
    #[must_use]
    pub fn at(&self, now: OffsetDateTime) -> Self {
        let mut served = self.clone();
        for process in &mut served.processes {
            process.state = process.state_at(now);
        }
        let worst = |class: Class| {
            let of_class = served.processes.iter().filter(move |process| process.class == class);
            of_class.filter_map(|process| process.state).max()
        };
        let (node, drivers) = (worst(Class::Node), worst(Class::Driver));
        served.state = served.state.max(node);
        served.drivers_state = served.drivers_state.max(drivers);
        served
    }

    /// Whether nothing that matters to the CA differs.
    #[must_use]
    pub fn is_alike(&self, other: &Self) -> bool {
        let unmoved = |served: &Self| v1::Running {
            looked_unix: 0,
            processes: 0,
            plain_ports: 0,
            ..served.report()
        };
        unmoved(self) == unmoved(other)
    }

    /// How many processes of a class are in each state.
    #[must_use]
    pub fn counts(&self, class: Class) -> BTreeMap<State, usize> {
        let mut counts = BTreeMap::new();
        for state in [State::Fresh, State::Unknown, State::RecycleDue, State::RecycleOverdue] {
            let of_class = self.processes.iter().filter(|process| process.class == class);
            counts.insert(state, of_class.filter(|process| process.state == Some(state)).count());
        }
        counts
    }

    /// For the CA.
    #[must_use]
    pub fn report(&self) -> v1::Running {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let state = |state: Option<State>| i32::from(to_proto(state));
        let unknown = |class| self.counts(class).get(&State::Unknown).copied().unwrap_or_default();
        v1::Running {
            horizon_unix: self.horizon.map_or(0, |at| at.unix()),
            driver_horizon_unix: self.drivers_horizon.map_or(0, |at| at.unix()),
            recycle_state: state(self.state),
            driver_state: state(self.drivers_state),
            processes: count(self.processes.len()),
            unknown: count(unknown(Class::Node) + unknown(Class::Driver)),
            plain_ports: count(self.plain_ports().count()),
            looked_unix: self.as_of.unix(),
        }
    }

    #[cfg(test)]
    pub(crate) fn none(now: OffsetDateTime) -> Self {
        Self {
            as_of: now.into(),
            state: None,
            horizon: None,
            drivers_state: None,
            drivers_horizon: None,
            processes: Vec::new(),
            blind: Vec::new(),
        }
    }
}

fn to_proto(state: Option<State>) -> v1::RecycleState {
    match state {
        None => v1::RecycleState::Unspecified,
        Some(State::Fresh) => v1::RecycleState::Fresh,
        Some(State::Unknown) => v1::RecycleState::Unknown,
        Some(State::RecycleDue) => v1::RecycleState::Due,
        Some(State::RecycleOverdue) => v1::RecycleState::Overdue,
    }
}

impl ProcessServed {
    /// It gets worse with time, never better.
    fn state_at(&self, now: OffsetDateTime) -> Option<State> {
        let leaves = self.sockets.iter().filter_map(|socket| match &socket.serves {
            Serves::Leaf { issued, not_after, .. } => Some((issued.time(), not_after.time())),
            Serves::Foreign { .. }
            | Serves::Plain { .. }
            | Serves::None { .. }
            | Serves::NotAsked { .. } => None,
        });
        let states =
            leaves.map(|(issued, ends)| horizon::state_between(issued, ends, self.class, now));
        states.max().max(self.state)
    }
}

impl Serves {
    fn cut(&mut self) {
        match self {
            Self::Leaf { trusts, refused_us, .. } => {
                trusts.truncate(TRUSTS_MAX);
                refused_us.iter_mut().for_each(cut);
            }
            Self::Foreign { why, trusts, refused_us, .. } => {
                trusts.truncate(TRUSTS_MAX);
                refused_us.iter_mut().for_each(cut);
                cut(why);
            }
            Self::None { why } | Self::NotAsked { why } => cut(why),
            Self::Plain { .. } => {}
        }
    }
}

fn cut(text: &mut String) {
    if let Some((at, _)) = text.char_indices().nth(WHY_LEN_MAX) {
        text.truncate(at);
    }
}

#[cfg(test)]
mod tests {
    use time::{Duration, macros::datetime};

    use super::{
        super::{SocketServed, kind::Kind},
        *,
    };

    const NOW: OffsetDateTime = datetime!(2026-11-24 00:00 UTC);

    fn process(kind: Kind, sockets: usize) -> ProcessServed {
        let socket = SocketServed {
            address: "10.0.0.1:6701".to_owned(),
            port: None,
            serves: Serves::Leaf {
                serial: "01".to_owned(),
                issued: NOW.into(),
                not_after: (NOW + Duration::hours(6)).into(),
                trusts: vec!["CN=root".to_owned(); 32],
                refused_us: None,
                revoked: false,
            },
        };
        ProcessServed {
            pid: Some(1),
            uid: 0,
            kind,
            class: kind.class(),
            name: kind.word().to_owned(),
            session: None,
            job: None,
            state: Some(State::Fresh),
            horizon: Some((NOW + Duration::hours(6)).into()),
            sockets: vec![socket; sockets],
        }
    }

    fn served(processes: Vec<ProcessServed>) -> Served {
        let (state, drivers_state) = (Some(State::Fresh), Some(State::Fresh));
        Served { state, drivers_state, processes, ..Served::none(NOW) }
    }

    #[test]
    fn what_was_fresh_is_judged_by_the_reader_s_clock() {
        let looked = served(vec![process(Kind::Raylet, 1), process(Kind::Driver, 1)]);
        for (hours, node, driver) in [
            (2, State::Fresh, State::Fresh),
            (3, State::RecycleDue, State::Fresh),
            (4, State::RecycleOverdue, State::RecycleOverdue),
            (99, State::RecycleOverdue, State::RecycleOverdue),
        ] {
            let later = looked.at(NOW + Duration::hours(hours));
            assert_eq!((later.state, later.drivers_state), (Some(node), Some(driver)), "{hours}");
            assert_eq!(later.processes[0].state, Some(node), "{hours}");
        }
        let unknown = Served { state: Some(State::Unknown), ..looked };
        assert_eq!(unknown.at(NOW).state, Some(State::Unknown), "what is not kept counts");
    }

    #[test]
    fn what_is_kept_is_bounded_and_says_so() {
        let many = served(vec![process(Kind::Worker, 16); 4_096]).bounded();
        assert_eq!(many.processes.len(), SOCKETS_MAX / 16);
        assert_eq!(many.blind, [format!("{} processes beyond what a status holds", 4_096 - 32)]);
        let small = served(vec![process(Kind::Worker, 1); 4_096]).bounded();
        assert_eq!(small.processes.len(), PROCESSES_MAX);
        let Serves::Leaf { trusts, .. } = &small.processes[0].sockets[0].serves else { panic!() };
        assert_eq!(trusts.len(), TRUSTS_MAX);
        let few = served(vec![process(Kind::Raylet, 2)]);
        assert!(few.bounded().blind.is_empty());
    }

    #[test]
    fn a_report_counts_what_it_was_made_from() {
        let mut late = process(Kind::Worker, 1);
        late.state = Some(State::Unknown);
        late.sockets[0].serves = Serves::Plain { seen: true };
        let looked = Served {
            state: Some(State::Unknown),
            horizon: Some((NOW + Duration::hours(6)).into()),
            ..served(vec![process(Kind::Raylet, 1), late])
        };
        let report = looked.report();
        assert_eq!((report.processes, report.unknown, report.plain_ports), (2, 1, 1));
        assert_eq!(report.recycle_state(), v1::RecycleState::Unknown);
        assert_eq!(report.horizon_unix, (NOW + Duration::hours(6)).unix_timestamp());
        let again = Served { as_of: (NOW + Duration::minutes(1)).into(), ..looked.clone() };
        assert!(looked.is_alike(&again));
        assert!(!looked.is_alike(&served(vec![])));
    }
}
