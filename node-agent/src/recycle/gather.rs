//! Everything a plan is made of, asked and read once. What cannot be known says why; nothing is changed.

use std::{path::Path, time::Duration};

use raymtls_proto::clock::{Clock, SystemClock};

use super::{
    command::Site,
    find::{Found, Gcs},
    node::Start,
    plan::{AgentFacts, ClusterFacts, DriverFacts, Facts, GcsFacts, NodeFacts, Scope},
    prove,
    rays::{Asker, Survey},
};
use crate::status::Status;

/// What the kernel writes behind the path of a program whose file was replaced.
const DELETED: &str = " (deleted)";

/// Facts, and the survey they were made of.
pub(super) struct Gathered {
    pub(super) facts: Facts,
    pub(super) survey: Survey,
}

pub(super) async fn gather(
    site: &Site,
    status: &Status,
    found: &Found,
    scope: Scope,
    start: &Result<Start, String>,
    drain: Duration,
) -> Gathered {
    let survey = survey(site, found).await;
    let (cluster, survey) = match survey {
        Ok(survey) => (cluster(site, found, scope, &survey).await, survey),
        Err(why) => {
            (Err(why), Survey { nodes: Vec::new(), drivers: Vec::new(), actors: Vec::new() })
        }
    };
    let facts = Facts {
        now: SystemClock.now(),
        scope,
        drain,
        node_id: found.node_id.clone(),
        agent: agent(status),
        start: start.as_ref().map(Start::shown).map_err(Clone::clone),
        gcs: (scope != Scope::Node).then(|| gcs(found)),
        cluster,
        left_alone: found.left_alone.clone(),
    };
    Gathered { facts, survey }
}

async fn survey(site: &Site, found: &Found) -> Result<Survey, String> {
    let asker = Asker { found, uid: site.uid, files: site.current_files()? };
    asker.survey().await.map_err(|error| error.to_string())
}

/// What drivers serve, and other nodes where they matter.
async fn cluster(
    site: &Site,
    found: &Found,
    scope: Scope,
    survey: &Survey,
) -> Result<ClusterFacts, String> {
    let look = prove::look_at(site)?;
    let others =
        survey.nodes.iter().filter(|node| scope != Scope::Node && node.id != found.node_id);
    let others: Vec<_> = others.collect();
    let drivers = survey.drivers.iter().map(super::rays::Driver::address);
    let addresses = drivers.chain(others.iter().map(|node| node.address())).collect();
    let mut serves = prove::ask_others(&look, addresses).await.into_iter();
    // Zipped in the order asked: drivers first.
    let drivers: Vec<DriverFacts> = survey
        .drivers
        .iter()
        .zip(serves.by_ref())
        .map(|(driver, serves)| DriverFacts { driver: driver.clone(), serves })
        .collect();
    let nodes = others.into_iter().zip(serves);
    let name = |ip: &str| crate::served::kind::printable(ip);
    let nodes = nodes.map(|(node, serves)| NodeFacts { name: name(&node.ip), serves }).collect();
    let here =
        survey.actors.iter().filter(|actor| actor.node == found.node_id && actor.restarts == 0);
    Ok(ClusterFacts { drivers, nodes, mortal_actors: here.cloned().collect() })
}

fn agent(status: &Status) -> AgentFacts {
    AgentFacts {
        standing: status.standing.clone(),
        ca_answers: status.ca.reachable == Some(true),
        files_mode: status.settings.as_ref().is_none_or(|settings| settings.mode == "files"),
        is_ready: status.is_ready(),
        key_folders: status.key_folders.len(),
    }
}

fn gcs(found: &Found) -> Result<GcsFacts, String> {
    let Gcs { daemon, blocked_by, .. } = found.gcs.as_ref().map_err(ToString::to_string)?;
    Ok(GcsFacts {
        pid: daemon.pid,
        storage: storage(daemon),
        blocked_by: blocked_by.clone(),
        is_replaced: daemon.program.to_string_lossy().ends_with(DELETED)
            || !is_file(&daemon.program, daemon.pid),
    })
}

/// In its own view of the files.
fn is_file(program: &Path, pid: i32) -> bool {
    let below = program.strip_prefix("/").unwrap_or(program);
    Path::new(&format!("/proc/{pid}/root")).join(below).is_file()
}

/// Where the control store keeps its state, if it outlives the process (Ray 2.60).
fn storage(gcs: &super::find::Daemon) -> Option<String> {
    if let Some(redis) = gcs.flag("--redis_address=") {
        return Some(format!("redis {redis}"));
    }
    let is_disk = gcs.variable("RAY_gcs_storage").is_some_and(|kind| kind == "rocksdb");
    let folder = gcs.variable("RAY_gcs_storage_path").filter(|folder| !folder.is_empty())?;
    is_disk.then(|| format!("rocksdb {}", folder.display()))
}
