//! Looks at this host, with all the I/O that the doctor does: bounded reads, one look at what Ray
//! serves, one handshake with each endpoint of the CA. It changes nothing and judges nothing.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use raymtls_proto::{clock::Clock, ports, v1};
use rustix::{fs::StatVfsMountFlags, process::geteuid};

use super::{
    facts::{Agent, Facts, Key, Process, Room},
    files::Folder,
    own::Public,
    processes,
};
use crate::{
    api::{Answer, Ask},
    client::{self, CallLimits, Target},
    config::{Config, is_ours_alone},
    ephemeral, isolation,
    keys::PrivateKey,
    served::{
        self, Look, Memory, Served, horizon,
        probe::{Limits, Prober},
        proc::{Bounds, Search},
    },
    socket,
    statedir::{NodeFile, StateDir, read_if_there},
    status::Status,
};

/// Most files of the hooks' folder that are looked at.
const HOOKS_MAX: usize = 64;
/// The longest wait for one endpoint of the CA.
const KNOCK_TIME: Duration = Duration::from_secs(5);

/// Where what is no setting lies.
pub(super) struct Places {
    pub(super) config_file: PathBuf,
    pub(super) proc: PathBuf,
}

pub(super) async fn gather(config: &Config, places: &Places, clock: Arc<dyn Clock>) -> Facts {
    let state = state(&config.state_dir);
    let settings = match &state {
        Ok((state, _)) => state
            .memory()
            .settings()
            .cloned()
            .ok_or_else(|| "the CA has not told the cluster's settings yet".to_owned()),
        Err(why) => Err(why.clone()),
    };
    let leaf = Public::load(&config.tls_dir);
    let (key, read) = key(&config.tls_dir, leaf.as_ref());
    let plan = settings.as_ref().ok().and_then(|settings| settings.port_plan);
    let plan = plan.unwrap_or_else(ports::default_plan);
    let (served, not_asked) =
        look(config, places, plan, leaf.as_ref().ok(), read.as_ref(), &clock).await;
    Facts {
        now: clock.now(),
        euid: geteuid().as_raw(),
        tls_dir: config.tls_dir.clone(),
        enrolled_gid: state.as_ref().ok().map(|(_, node)| node.ray_gid),
        agent: agent(config).await,
        key,
        host_addresses: isolation::host::own_addresses().unwrap_or_default().into_iter().collect(),
        processes: served.as_ref().map(|s| read_processes(places, s)).unwrap_or_default(),
        served,
        not_asked,
        state: Folder::read(&config.state_dir).map_err(|e| e.to_string()),
        tls: Folder::read(&config.tls_dir).map_err(|e| e.to_string()),
        exposed: exposed(config, places),
        rooms: rooms(config),
        ca: knock(state.as_ref(), &clock).await,
        reserved: reserved(state.as_ref(), settings.as_ref()),
        settings,
        leaf,
    }
}

/// The state folder, where it can be read.
fn state(path: &Path) -> Result<(StateDir, NodeFile), String> {
    let state = StateDir::open(path).map_err(|e| e.to_string())?;
    let node = state.node().map_err(|e| e.to_string())?;
    node.map(|node| (state, node)).ok_or_else(|| "this host is not enrolled".to_owned())
}

fn key(tls_dir: &Path, leaf: Result<&Public, &String>) -> (Key, Option<PrivateKey>) {
    match (PrivateKey::load(&tls_dir.join("current/tls.key")), leaf) {
        (Ok(key), Ok(leaf)) if key.spki_der() == leaf.facts.spki_der => {
            (Key::IsTheLeafs, Some(key))
        }
        (Ok(_), Ok(_)) => (Key::IsAnother, None),
        (Ok(_), Err(why)) => (Key::Unread(why.clone()), None),
        (Err(error), _) => (Key::Unread(error.to_string()), None),
    }
}

/// Without a leaf the sockets are found and not asked: a process of Ray complains of a caller without.
async fn look(
    config: &Config,
    places: &Places,
    plan: v1::PortPlan,
    leaf: Option<&Public>,
    key: Option<&PrivateKey>,
    clock: &Arc<dyn Clock>,
) -> (Result<Served, String>, Option<String>) {
    let search = Search {
        proc: places.proc.clone(),
        uids: config.ray_uid.into_iter().collect(),
        plan,
        bounds: Bounds::default(),
    };
    let (prober, not_asked) = match (leaf, key) {
        (Some(leaf), Some(key)) => {
            (Prober::new(&leaf.chain, key, clock.clone(), Limits::default()), None)
        }
        _ => {
            let limits = Limits { at_once: 0, total: Duration::ZERO, ..Limits::default() };
            let why = "leaf or key of this node cannot be read".to_owned();
            (Prober::without_leaf(clock.clone(), limits), Some(why))
        }
    };
    let trust = horizon::Trust {
        roots: leaf.map(|leaf| leaf.roots.clone()).unwrap_or_default(),
        uris: leaf.map(|leaf| leaf.facts.uris.clone()).unwrap_or_default(),
        revoked: leaf.map(|leaf| horizon::revoked(&leaf.crls_der)).unwrap_or_default(),
    };
    let prober = match prober {
        Ok(prober) => prober,
        Err(error) => return (Err(error.to_string()), not_asked),
    };
    let look = Look { search, prober, trust };
    let served = served::look(&look, &mut Memory::default(), clock.now()).await;
    (served.map_err(|e| e.to_string()), not_asked)
}

fn read_processes(places: &Places, served: &Served) -> Vec<Process> {
    processes::read(&places.proc, &served.processes)
}

async fn agent(config: &Config) -> Agent {
    let Some(path) = &config.socket else { return Agent::Silent("it has no socket".to_owned()) };
    let why = match socket::ask(path, Ask::Status).await {
        Ok(Answer::Status(status)) => return Agent::Answers(status),
        Ok(_) => "it answers another question: is it of this release?".to_owned(),
        Err(error) => error.to_string(),
    };
    let places = config.status_file.iter().cloned().chain([config.state_dir.join("status.json")]);
    let written = places
        .filter_map(|path| serde_json::from_slice::<Status>(&read_if_there(&path).ok()??).ok());
    match written.into_iter().next() {
        Some(status) => Agent::Wrote(Box::new(status), why),
        None => Agent::Silent(why),
    }
}

/// Whoever writes the configuration or a hook commands the agent.
fn exposed(config: &Config, places: &Places) -> Vec<String> {
    let mut paths = vec![places.config_file.clone()];
    if let Some(folder) = &config.hooks_dir {
        let hooks = std::fs::read_dir(folder).into_iter().flatten().flatten();
        paths.extend(hooks.take(HOOKS_MAX).map(|hook| hook.path()));
        paths.push(folder.clone());
    }
    let fault = |path: &PathBuf| match is_ours_alone(path) {
        Ok(true) => None,
        Ok(false) => Some(format!("{} may be written by others", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => Some(format!("{}: {error}", path.display())),
    };
    paths.iter().filter_map(fault).collect()
}

fn rooms(config: &Config) -> Vec<(PathBuf, Result<Room, String>)> {
    let room = |path: &PathBuf| {
        let seen = rustix::fs::statvfs(path).map_err(|e| e.to_string());
        let room = seen.map(|seen| Room {
            bytes: seen.f_bavail.saturating_mul(seen.f_frsize),
            files: seen.f_favail,
            counts_files: seen.f_files > 0,
            read_only: seen.f_flag.contains(StatVfsMountFlags::RDONLY),
        });
        (path.clone(), room)
    };
    [&config.state_dir, &config.tls_dir].into_iter().map(room).collect()
}

async fn knock(
    state: Result<&(StateDir, NodeFile), &String>,
    clock: &Arc<dyn Clock>,
) -> Result<Vec<(String, Result<(), String>)>, String> {
    let (state, node) = state.map_err(Clone::clone)?;
    let target = Target {
        endpoints: node.node_endpoints.clone(),
        trust_domain: node.trust_domain.clone(),
        control_roots: node.control_roots.clone(),
        control_crls: state.memory().control_crls().to_vec(),
        source: None,
    };
    let limits = CallLimits { connect: KNOCK_TIME, ..CallLimits::default() };
    let identity = state.identity().ok().flatten();
    let heard = client::knock(&target, identity.as_ref(), limits, clock.clone());
    let heard = heard.await.map_err(|e| e.to_string())?;
    Ok(heard.into_iter().map(|(at, answer)| (at, answer.map_err(|e| e.to_string()))).collect())
}

fn reserved(
    state: Result<&(StateDir, NodeFile), &String>,
    settings: Result<&v1::Settings, &String>,
) -> Result<Option<String>, String> {
    let (_, node) = state.map_err(Clone::clone)?;
    Ok(ephemeral::problem(settings.map_err(Clone::clone)?, node.role))
}
