//! What a recycle will do, or why it will not. Pure: facts in, a plan out, no file, network or clock.
//!
//! A driver is hurt in one of two ways (Ray 2.60). One that runs on the node ends with its raylet. And one
//! whose leaf has ended hangs: a raylet that starts anew must shake hands with the driver's port for the
//! objects it owns, and cannot. Where gcs_server comes back, whoever's leaf has ended cannot reach it again: a
//! raylet ends 60 s later.

use std::time::Duration;

use raymtls_proto::identity::Role;
use serde::Serialize;
use time::OffsetDateTime;

use super::rays::{Actor, Driver};
use crate::{keyfolder::FOLDERS_MAX, moment::Moment};

/// What a start of Ray and the proofs after it take, beside the drain.
const START_TIME: Duration = Duration::from_secs(60);
/// What a new gcs_server takes until everybody is back.
const GCS_TIME: Duration = Duration::from_secs(60);
/// Actors that are named.
const ACTORS_NAMED: usize = 5;

/// What is recycled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Scope {
    /// All of Ray on a worker.
    Node,
    /// All of Ray on the head.
    Head,
    /// gcs_server alone.
    GcsServer,
}

impl Scope {
    /// What a node of this role is asked for.
    pub(super) fn of(role: Role, whole_head: bool) -> Result<Self, &'static str> {
        match role {
            Role::Worker if whole_head => Err("--whole-head is for a head, and this is a worker"),
            Role::Worker => Ok(Self::Node),
            Role::Head if whole_head => Ok(Self::Head),
            Role::Head => Ok(Self::GcsServer),
            Role::Driver => {
                Err("this machine is a driver: it has no Ray to recycle; start the driver again")
            }
        }
    }

    /// For a person.
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Node => "all of Ray on this worker",
            Self::Head => "all of Ray on this head",
            Self::GcsServer => "gcs_server alone",
        }
    }
}

/// What the daemon says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AgentFacts {
    pub(super) standing: String,
    pub(super) ca_answers: bool,
    pub(super) files_mode: bool,
    pub(super) is_ready: bool,
    pub(super) key_folders: usize,
}

/// What a process serves, by handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Serves {
    /// A leaf of the cluster.
    Leaf { not_after: OffsetDateTime },
    /// It could not be asked, or showed something else.
    Unknown { why: String },
}

/// A driver of the cluster and what it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DriverFacts {
    pub(super) driver: Driver,
    pub(super) serves: Serves,
}

/// Another node's raylet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeFacts {
    pub(super) name: String,
    pub(super) serves: Serves,
}

/// What Ray's control store knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ClusterFacts {
    pub(super) drivers: Vec<DriverFacts>,
    pub(super) nodes: Vec<NodeFacts>,
    /// Of this node, never started again where they end.
    pub(super) mortal_actors: Vec<Actor>,
}

/// The gcs_server of this head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GcsFacts {
    pub(super) pid: i32,
    pub(super) storage: Option<String>,
    pub(super) blocked_by: Option<String>,
    /// Its program file was replaced since it started.
    pub(super) is_replaced: bool,
}

/// Everything that decides.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) now: OffsetDateTime,
    pub(super) scope: Scope,
    pub(super) drain: Duration,
    pub(super) node_id: String,
    pub(super) agent: AgentFacts,
    /// How Ray is started, or why that is not known.
    pub(super) start: Result<String, String>,
    pub(super) gcs: Option<Result<GcsFacts, String>>,
    pub(super) cluster: Result<ClusterFacts, String>,
    pub(super) left_alone: Vec<String>,
}

/// A driver or node that would be hurt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Harm {
    /// Its job, where it is a driver.
    pub(super) job: Option<String>,
    /// Who, for a person.
    pub(super) who: String,
    /// What would happen to it.
    pub(super) why: String,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Step {
    Prepare,
    Drain,
    Stop,
    Start,
    Replace,
    ProveServed,
    ProveTask,
}

/// What will be done, what it costs, and why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Plan {
    pub(super) scope: Scope,
    /// What --force does not help against.
    pub(super) refusals: Vec<String>,
    /// What --force accepts.
    pub(super) harms: Vec<Harm>,
    pub(super) warnings: Vec<String>,
    pub(super) steps: Vec<Step>,
}

/// Decides.
pub(super) fn plan(facts: &Facts) -> Plan {
    Plan {
        scope: facts.scope,
        refusals: refusals(facts),
        harms: harms(facts),
        warnings: warnings(facts),
        steps: steps(facts),
    }
}

fn steps(facts: &Facts) -> Vec<Step> {
    let can_drain = facts.cluster.is_ok() && !facts.drain.is_zero();
    match facts.scope {
        Scope::Node if can_drain => {
            vec![
                Step::Prepare,
                Step::Drain,
                Step::Stop,
                Step::Start,
                Step::ProveServed,
                Step::ProveTask,
            ]
        }
        // A head is not drained: GCS goes with it.
        Scope::Node | Scope::Head => {
            vec![Step::Prepare, Step::Stop, Step::Start, Step::ProveServed, Step::ProveTask]
        }
        Scope::GcsServer => vec![Step::Prepare, Step::Replace, Step::ProveServed, Step::ProveTask],
    }
}

fn refusals(facts: &Facts) -> Vec<String> {
    let agent = &facts.agent;
    let mut all = Vec::new();
    if agent.standing != "enrolled" {
        all.push(format!(
            "the CA does not serve this node ({}): a new leaf cannot be had",
            agent.standing
        ));
    }
    if !agent.files_mode {
        all.push(
            "Ray speaks no TLS of its own in this cluster's mode: nothing to recycle".to_owned(),
        );
    }
    if !agent.ca_answers {
        all.push(
            "the CA does not answer: a new leaf cannot be had; see `node-agent status`".to_owned(),
        );
    }
    if !agent.is_ready {
        all.push(
            "what starts now would not find all its files; see `node-agent status`".to_owned(),
        );
    }
    if agent.key_folders >= FOLDERS_MAX {
        all.push(format!(
            "there are {FOLDERS_MAX} key folders already: end processes that serve older ones"
        ));
    }
    match facts.scope {
        Scope::Node => all.extend(facts.start.as_ref().err().cloned()),
        Scope::Head => {
            all.extend(facts.start.as_ref().err().cloned());
            all.extend(gcs_refusals(facts).into_iter().filter(|_| !has_storage(facts)));
        }
        Scope::GcsServer => all.extend(gcs_refusals(facts)),
    }
    all
}

fn has_storage(facts: &Facts) -> bool {
    matches!(&facts.gcs, Some(Ok(gcs)) if gcs.storage.is_some())
}

fn gcs_refusals(facts: &Facts) -> Vec<String> {
    let gcs = match &facts.gcs {
        Some(Ok(gcs)) => gcs,
        Some(Err(why)) => return vec![why.clone()],
        None => return vec!["no gcs_server was looked for".to_owned()],
    };
    let mut all = Vec::new();
    if gcs.storage.is_none() {
        all.push(format!(
            "gcs_server {} keeps its state in memory: the cluster would be lost with it; start the head with \
             RAY_gcs_storage=rocksdb and RAY_gcs_storage_path, or with Redis",
            gcs.pid
        ));
    }
    if let Some(parent) = &gcs.blocked_by {
        all.push(format!(
            "gcs_server {} is watched by {parent}, which ends the whole head with it: start the head without --block",
            gcs.pid
        ));
    }
    if gcs.is_replaced {
        all.push(format!(
            "the program of gcs_server {} was replaced since it started: recycle the whole head",
            gcs.pid
        ));
    }
    all
}

fn harms(facts: &Facts) -> Vec<Harm> {
    let cluster = match &facts.cluster {
        Ok(cluster) => cluster,
        Err(why) => {
            return vec![Harm {
                job: None,
                who: "whoever uses this cluster".to_owned(),
                why: format!("which drivers would be hurt is not known: {why}"),
            }];
        }
    };
    let drivers = cluster.drivers.iter().filter_map(|driver| {
        let why = driver_harm(driver, facts)?;
        Some(Harm { job: Some(driver.driver.job.clone()), who: driver.driver.name(), why })
    });
    let nodes = cluster.nodes.iter().filter(|_| facts.scope != Scope::Node).filter_map(|node| {
        let Serves::Leaf { not_after } = node.serves else { return None };
        let why = (not_after <= over(facts)).then(|| {
            let ends = ends(not_after, facts.now);
            format!("its raylet's leaf {ends}: it cannot reach a new gcs_server, and ends 60 s later; recycle it first")
        })?;
        Some(Harm { job: None, who: format!("node {}", node.name), why })
    });
    drivers.chain(nodes).collect()
}

fn driver_harm(facts_of: &DriverFacts, facts: &Facts) -> Option<String> {
    let is_here = facts_of.driver.node == facts.node_id;
    match facts.scope {
        Scope::Node | Scope::Head if is_here => {
            return Some("it runs on this node, and ends with its raylet".to_owned());
        }
        Scope::Node | Scope::Head | Scope::GcsServer => {}
    }
    match &facts_of.serves {
        Serves::Leaf { not_after } if *not_after <= over(facts) => {
            let ends = ends(*not_after, facts.now);
            Some(match facts.scope {
                Scope::Node => format!(
                    "its leaf {ends}: it hangs as soon as this node, started anew, needs an object of it; \
                     start the driver again first"
                ),
                Scope::Head | Scope::GcsServer => format!(
                    "its leaf {ends}: it cannot reach a new gcs_server, and ends; start the driver again first"
                ),
            })
        }
        Serves::Leaf { .. } => None,
        Serves::Unknown { why } => {
            Some(format!("until when its leaf is good could not be seen ({why})"))
        }
    }
}

/// By then everybody must still be able to shake hands.
fn over(facts: &Facts) -> OffsetDateTime {
    facts.now
        + match facts.scope {
            Scope::Node => facts.drain + START_TIME,
            Scope::Head => START_TIME + GCS_TIME,
            Scope::GcsServer => GCS_TIME,
        }
}

fn ends(not_after: OffsetDateTime, now: OffsetDateTime) -> String {
    let at = Moment::from(not_after);
    let word = if not_after <= now { "ended" } else { "ends" };
    format!("{word} at {at} ({})", at.relative(now))
}

fn warnings(facts: &Facts) -> Vec<String> {
    let mut all = Vec::new();
    if let Ok(cluster) = &facts.cluster {
        match facts.scope {
            Scope::Node | Scope::Head => all.extend(actors(&cluster.mortal_actors)),
            Scope::GcsServer => {}
        }
        for node in &cluster.nodes {
            match &node.serves {
                Serves::Unknown { why } if facts.scope != Scope::Node => {
                    all.push(format!(
                        "node {} could not be asked what it serves: {why}",
                        node.name
                    ));
                }
                Serves::Unknown { .. } | Serves::Leaf { .. } => {}
            }
        }
    }
    match facts.scope {
        Scope::Head => all.push(
            "the head cannot be drained; tasks that run on it are tried again where they may be".to_owned(),
        ),
        Scope::GcsServer => all.push(
            "the head's raylet, agents, dashboard and Ray Client server go on with the leaves they have: \
             --whole-head, in a maintenance window, renews those"
                .to_owned(),
        ),
        Scope::Node => {}
    }
    all.extend(facts.left_alone.iter().cloned());
    all
}

fn actors(mortal: &[Actor]) -> Option<String> {
    let names: Vec<String> = mortal.iter().take(ACTORS_NAMED).map(Actor::shown).collect();
    let more = mortal.len().saturating_sub(ACTORS_NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!names.is_empty()).then(|| {
        format!("actors on this node without max_restarts are lost: {}{more}", names.join(", "))
    })
}

impl Step {
    /// For a person.
    pub(super) fn text(self, scope: Scope, drain: Duration) -> String {
        match (self, scope) {
            (Self::Prepare, _) => {
                "get a new key folder, and a child that may do what is to be done".to_owned()
            }
            (Self::Drain, _) => {
                format!("drain: no new work, {} for what runs", humantime::format_duration(drain))
            }
            (Self::Stop, _) => "stop this node's Ray".to_owned(),
            (Self::Start, _) => "start Ray with the new leaf".to_owned(),
            (Self::Replace, _) => {
                "end gcs_server, and start it in its place with the new leaf".to_owned()
            }
            (Self::ProveServed, Scope::GcsServer) => "see the new leaf on the GCS port".to_owned(),
            (Self::ProveServed, Scope::Node | Scope::Head) => {
                "see the new leaf on every port of this node".to_owned()
            }
            (Self::ProveTask, Scope::GcsServer) => "run a task on every node".to_owned(),
            (Self::ProveTask, Scope::Node | Scope::Head) => "run a task on this node".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-24 08:00 UTC);

    fn driver(node: &str, serves: Serves) -> DriverFacts {
        let driver = Driver {
            job: "01000000".to_owned(),
            node: node.to_owned(),
            pid: 7,
            ..Driver::default()
        };
        DriverFacts { driver, serves }
    }

    fn leaf(seconds: i64) -> Serves {
        Serves::Leaf { not_after: NOW + time::Duration::seconds(seconds) }
    }

    fn facts(scope: Scope) -> Facts {
        let agent = AgentFacts {
            standing: "enrolled".to_owned(),
            ca_answers: true,
            files_mode: true,
            is_ready: true,
            key_folders: 2,
        };
        let gcs = GcsFacts {
            pid: 5,
            storage: Some("rocksdb".to_owned()),
            blocked_by: None,
            is_replaced: false,
        };
        Facts {
            now: NOW,
            scope,
            drain: Duration::from_secs(30),
            node_id: "n1".to_owned(),
            agent,
            start: Ok("ray start".to_owned()),
            gcs: Some(Ok(gcs)),
            cluster: Ok(ClusterFacts::default()),
            left_alone: Vec::new(),
        }
    }

    fn with_driver(scope: Scope, driver: DriverFacts) -> Facts {
        let cluster = ClusterFacts { drivers: vec![driver], ..ClusterFacts::default() };
        Facts { cluster: Ok(cluster), ..facts(scope) }
    }

    #[test]
    fn a_driver_that_would_be_hurt_is_named() {
        use Scope::{GcsServer, Head, Node};
        let unknown = || Serves::Unknown { why: "no answer in time".to_owned() };
        for (name, scope, driver, hurt) in [
            ("elsewhere, good for long", Node, driver("n2", leaf(9_000)), None),
            ("here, good for long", Node, driver("n1", leaf(9_000)), Some("ends with its raylet")),
            ("elsewhere, leaf ended", Node, driver("n2", leaf(-1)), Some("its leaf ended at")),
            ("elsewhere, at not_after", Node, driver("n2", leaf(0)), Some("its leaf ended at")),
            (
                "elsewhere, ends within drain and start",
                Node,
                driver("n2", leaf(90)),
                Some("its leaf ends at"),
            ),
            ("elsewhere, ends after them", Node, driver("n2", leaf(91)), None),
            ("elsewhere, not seen", Node, driver("n2", unknown()), Some("could not be seen")),
            ("on the head, gcs_server alone", GcsServer, driver("n1", leaf(9_000)), None),
            (
                "leaf ended, gcs_server alone",
                GcsServer,
                driver("n1", leaf(-1)),
                Some("cannot reach a new gcs"),
            ),
            (
                "ends within gcs_server's start",
                GcsServer,
                driver("n2", leaf(60)),
                Some("cannot reach"),
            ),
            ("ends after it", GcsServer, driver("n2", leaf(61)), None),
            (
                "on the head, all of it",
                Head,
                driver("n1", leaf(9_000)),
                Some("ends with its raylet"),
            ),
        ] {
            let plan = plan(&with_driver(scope, driver));
            assert!(plan.refusals.is_empty(), "{name}: {plan:?}");
            match hurt {
                None => assert_eq!(plan.harms, [], "{name}"),
                Some(why) => {
                    let harm = &plan.harms[..];
                    assert!(harm.len() == 1 && harm[0].why.contains(why), "{name}: {harm:?}");
                    assert!(
                        harm[0].who.contains('7') && harm[0].job.as_deref() == Some("01000000")
                    );
                }
            }
        }
    }

    #[test]
    fn a_node_whose_leaf_ended_would_lose_a_new_gcs_server() {
        for (scope, seconds, hurt) in [
            (Scope::GcsServer, 60, 1),
            (Scope::GcsServer, 61, 0),
            (Scope::Head, 120, 1),
            (Scope::Node, -1, 0),
        ] {
            let node = NodeFacts { name: "10.0.0.2".to_owned(), serves: leaf(seconds) };
            let cluster = ClusterFacts { nodes: vec![node], ..ClusterFacts::default() };
            let plan = plan(&Facts { cluster: Ok(cluster), ..facts(scope) });
            assert_eq!(plan.harms.len(), hurt, "{scope:?} {seconds}");
        }
    }

    #[test]
    fn what_force_does_not_help_against() {
        let agent = |change: fn(&mut AgentFacts)| {
            let mut facts = facts(Scope::Node);
            change(&mut facts.agent);
            facts
        };
        let gcs = |change: fn(&mut GcsFacts)| {
            let mut facts = facts(Scope::GcsServer);
            if let Some(Ok(gcs)) = facts.gcs.as_mut() {
                change(gcs);
            }
            facts
        };
        let in_memory = |gcs: &mut GcsFacts| gcs.storage = None;
        for (name, facts, text) in [
            ("nothing in the way", facts(Scope::Node), None),
            ("refused by the CA", agent(|a| a.standing = "refused".to_owned()), Some("(refused)")),
            ("CA away", agent(|a| a.ca_answers = false), Some("the CA does not answer")),
            ("tunnel mode", agent(|a| a.files_mode = false), Some("no TLS of its own")),
            ("no room", agent(|a| a.key_folders = FOLDERS_MAX), Some("key folders already")),
            ("not ready", agent(|a| a.is_ready = false), Some("all its files")),
            (
                "no word how to start",
                Facts { start: Err("say how".to_owned()), ..facts(Scope::Node) },
                Some("say how"),
            ),
            (
                "no start is needed for gcs_server",
                Facts { start: Err("say how".to_owned()), ..facts(Scope::GcsServer) },
                None,
            ),
            ("state in memory", gcs(in_memory), Some("keeps its state in memory")),
            (
                "all of a head in memory",
                Facts { scope: Scope::Head, ..gcs(in_memory) },
                Some("keeps its state in memory"),
            ),
            (
                "watched",
                gcs(|g| g.blocked_by = Some("ray start --block".to_owned())),
                Some("--block"),
            ),
            (
                "watched, all of it",
                Facts {
                    scope: Scope::Head,
                    ..gcs(|g| g.blocked_by = Some("ray start --block".to_owned()))
                },
                None,
            ),
            ("program replaced", gcs(|g| g.is_replaced = true), Some("was replaced")),
            (
                "none found",
                Facts { gcs: Some(Err("no gcs_server".to_owned())), ..facts(Scope::GcsServer) },
                Some("no gcs_server"),
            ),
        ] {
            let refusals = plan(&facts).refusals;
            match text {
                None => assert_eq!(refusals, Vec::<String>::new(), "{name}"),
                Some(text) => {
                    assert!(
                        refusals.len() == 1 && refusals[0].contains(text),
                        "{name}: {refusals:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_silent_control_store_is_a_harm_and_no_drain() {
        let silent = Facts { cluster: Err("no answer".to_owned()), ..facts(Scope::Node) };
        let made = plan(&silent);
        assert!(made.harms[0].why.contains("not known: no answer"));
        assert!(!made.steps.contains(&Step::Drain));
        assert!(plan(&facts(Scope::Node)).steps.contains(&Step::Drain));
        assert!(!plan(&facts(Scope::Head)).steps.contains(&Step::Drain));
    }

    #[test]
    fn what_is_recycled_follows_from_the_role() {
        assert_eq!(Scope::of(Role::Worker, false), Ok(Scope::Node));
        assert_eq!(Scope::of(Role::Head, false), Ok(Scope::GcsServer));
        assert_eq!(Scope::of(Role::Head, true), Ok(Scope::Head));
        assert!(Scope::of(Role::Worker, true).is_err() && Scope::of(Role::Driver, false).is_err());
    }
}
