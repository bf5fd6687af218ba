//! Proof by handshake: what this node's processes serve now, and whether it is new. What answers is judged as
//! `served` judges it: only a leaf of this node under the cluster's root counts.

use std::{collections::BTreeSet, net::SocketAddr, path::Path, time::Duration};

use raymtls_proto::{
    bundle,
    clock::{Clock, SystemClock},
    leaf::LeafFacts,
    v1::CertificateChain,
};
use tokio::time::{Instant, sleep};

use super::{command::Site, plan::Serves};
use crate::{
    rayenv::RayEnv,
    served::{
        self, Look, Memory, Served,
        horizon::{self, State, Trust, Worth},
        kind::{Class, Kind, printable},
        probe::{Answer, Limits},
    },
    statedir::read_if_there,
};

/// How long processes may take to serve the new leaf.
const SERVED_TIME_MAX: Duration = Duration::from_secs(90);
/// How long a new gcs_server may take to.
pub(super) const GCS_TIME_MAX: Duration = Duration::from_secs(45);
/// Between two looks.
const LOOK_PAUSE: Duration = Duration::from_secs(2);
const ASK_PAUSE: Duration = Duration::from_millis(200);
/// Bounds of asking other hosts.
const FAR: Limits = Limits {
    socket: Duration::from_secs(3),
    total: Duration::from_secs(60),
    at_once: 32,
    read_len_max: 64 * 1024,
};

/// Who is late is asked this often again.
const ASKED_AGAIN: u32 = 2;

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Proof {
    pub(super) processes: usize,
    pub(super) serials: Vec<String>,
}

/// A look at this host with the newest files.
pub(super) fn look_at(site: &Site) -> Result<Look, String> {
    let uids = vec![site.uid];
    served::command::from_folder(&site.tls_dir, &site.state_dir, uids, site.clock.clone())
        .map_err(|failure| failure.to_string())
}

pub(super) async fn look(site: &Site, memory: &mut Memory) -> Result<Served, String> {
    served::look(&look_at(site)?, memory, SystemClock.now())
        .await
        .map_err(|error| error.to_string())
}

/// The serials that the node's processes serve.
pub(super) fn serials(served: &Served) -> BTreeSet<String> {
    let node = served.processes.iter().filter(|process| process.class == Class::Node);
    let sockets = node.flat_map(|process| &process.sockets);
    sockets
        .filter_map(|socket| match &socket.serves {
            served::Serves::Leaf { serial, .. } => Some(serial.clone()),
            served::Serves::Foreign { .. }
            | served::Serves::Plain { .. }
            | served::Serves::None { .. }
            | served::Serves::NotAsked { .. } => None,
        })
        .collect()
}

/// Waits until every process of the node that has to serve a leaf serves one it did not serve before.
pub(super) async fn wait_for_new(site: &Site, old: &BTreeSet<String>) -> Result<Proof, String> {
    let (end, mut memory) = (Instant::now() + SERVED_TIME_MAX, Memory::default());
    loop {
        let judged = look(site, &mut memory).await.and_then(|served| is_new(&served, old));
        match judged {
            Ok(proof) => return Ok(proof),
            Err(why) if Instant::now() >= end => return Err(why),
            Err(_) => sleep(LOOK_PAUSE).await,
        }
    }
}

/// Judges a look. Pure.
fn is_new(served: &Served, old: &BTreeSet<String>) -> Result<Proof, String> {
    let node = || served.processes.iter().filter(|process| process.class == Class::Node);
    if !node().any(|process| process.kind == Kind::Raylet) {
        return Err("no raylet listens yet".to_owned());
    }
    let who = |process: &served::ProcessServed| {
        let pid = process.pid.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
        format!("{} {pid}", process.kind.word())
    };
    if let Some(process) = node().find(|process| process.state == Some(State::Unknown)) {
        return Err(format!("{} shows no leaf of this node", who(process)));
    }
    for process in node() {
        let single = Served { processes: vec![process.clone()], ..served.clone() };
        if let Some(serial) = serials(&single).intersection(old).next() {
            return Err(format!("{} serves {serial}, as before", who(process)));
        }
    }
    let processes = node().filter(|process| process.horizon.is_some()).count();
    Ok(Proof { processes, serials: serials(served).into_iter().collect() })
}

/// The serial of the leaf in a key folder.
pub(super) fn serial_of(env: &RayEnv) -> Result<String, String> {
    let files = env.files.as_ref();
    let path: &Path = &files.ok_or("in mode tunnel Ray serves no leaf")?.server_cert;
    let damaged = |why: String| format!("{}: {why}", path.display());
    let pem = read_if_there(path).map_err(|e| damaged(e.to_string()))?.unwrap_or_default();
    let all = bundle::certificates_from_pem(&pem).map_err(|e| damaged(e.to_string()))?;
    let leaf = all.first().ok_or_else(|| damaged("it holds no leaf".to_owned()))?;
    let facts = LeafFacts::parse(leaf).map_err(|e| damaged(e.to_string()))?;
    Ok(facts.serial.to_string())
}

/// Waits until this leaf is served at an address, and tells how long it took.
pub(super) async fn wait_for_serial(
    look: &Look,
    address: SocketAddr,
    serial: &str,
) -> Result<Duration, String> {
    let begun = Instant::now();
    loop {
        let seen = match look.prober.ask(&[address]).await {
            Answer::Tls(hello) => {
                match horizon::judge(&hello.chain, &look.trust, SystemClock.now()) {
                    Worth::Counts(leaf) if leaf.serial.to_string() == serial => {
                        return Ok(begun.elapsed());
                    }
                    Worth::Counts(leaf) => format!("it serves {}", leaf.serial),
                    Worth::Foreign { why, .. } => format!("it serves a foreign certificate: {why}"),
                }
            }
            other @ (Answer::Plain
            | Answer::NoCertificate(_)
            | Answer::Refused(_)
            | Answer::Timeout
            | Answer::NotAsked) => unanswered(&other),
        };
        if begun.elapsed() >= GCS_TIME_MAX {
            return Err(format!("{address}: {seen}, after {} s", GCS_TIME_MAX.as_secs()));
        }
        sleep(ASK_PAUSE).await;
    }
}

/// What others of the cluster serve, in order. An ended leaf counts as one: that is what is asked for.
pub(super) async fn ask_others(look: &Look, addresses: Vec<Option<SocketAddr>>) -> Vec<Serves> {
    let dialled: Vec<SocketAddr> = addresses.iter().flatten().copied().collect();
    let prober = look.prober.clone().within(FAR);
    let all = dialled.iter().map(|address| vec![*address]).collect();
    let mut answers = prober.ask_all(all).await;
    for _ in 0..ASKED_AGAIN {
        // A host under load may be late once; what does not answer three times is not known.
        let silent = |answer: &Answer| matches!(answer, Answer::Timeout);
        let late: Vec<usize> = (0..answers.len()).filter(|at| silent(&answers[*at])).collect();
        if late.is_empty() {
            break;
        }
        let again = late.iter().map(|at| vec![dialled[*at]]).collect();
        for (at, answer) in late.into_iter().zip(prober.ask_all(again).await) {
            answers[at] = answer;
        }
    }
    let mut answers = answers.into_iter();
    let unknown = |why: &str| Serves::Unknown { why: why.to_owned() };
    let judged = addresses.into_iter().map(|address| match address.and_then(|_| answers.next()) {
        None => unknown("Ray names no address of it"),
        Some(Answer::Tls(hello)) => of_cluster(&hello.chain, &look.trust),
        Some(other) => unknown(&unanswered(&other)),
    });
    judged.collect()
}

/// Any node's or driver's leaf under the cluster's root counts here.
fn of_cluster(chain: &CertificateChain, trust: &Trust) -> Serves {
    let uris = LeafFacts::parse(&chain.leaf_der).map(|facts| facts.uris).unwrap_or_default();
    let trust = Trust { uris, ..trust.clone() };
    match horizon::judge(chain, &trust, SystemClock.now()) {
        Worth::Counts(leaf) => Serves::Leaf { not_after: leaf.not_after },
        Worth::Foreign { why, .. } => {
            Serves::Unknown { why: format!("it serves a foreign certificate: {why}") }
        }
    }
}

fn unanswered(answer: &Answer) -> String {
    match answer {
        Answer::Tls(_) => "it shook hands".to_owned(),
        Answer::Plain => "it speaks no TLS".to_owned(),
        Answer::NoCertificate(why) | Answer::Refused(why) => printable(why),
        Answer::Timeout => "no answer in time".to_owned(),
        Answer::NotAsked => "no time was left to ask".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;
    use crate::{
        moment::Moment,
        served::{ProcessServed, SocketServed},
    };

    fn process(kind: Kind, serial: Option<&str>) -> ProcessServed {
        let at = Moment::from(datetime!(2026-11-24 08:00 UTC));
        let serves = |serial: &str| served::Serves::Leaf {
            serial: serial.to_owned(),
            issued: at,
            not_after: at,
            trusts: vec![],
            refused_us: None,
            revoked: false,
        };
        let socket = |serves| SocketServed { address: "10.0.0.1:1".to_owned(), port: None, serves };
        ProcessServed {
            pid: Some(7),
            uid: 1,
            kind,
            class: kind.class(),
            name: String::new(),
            session: None,
            job: None,
            state: Some(if serial.is_some() { State::Fresh } else { State::Unknown }),
            horizon: serial.map(|_| at),
            sockets: vec![socket(
                serial.map_or_else(|| served::Serves::None { why: "no answer".to_owned() }, serves),
            )],
        }
    }

    #[test]
    fn one_process_with_an_old_leaf_is_no_proof() {
        let old = BTreeSet::from(["01".to_owned()]);
        for (name, processes, good) in [
            ("nothing", vec![], false),
            ("no raylet", vec![process(Kind::Worker, Some("02"))], false),
            ("new", vec![process(Kind::Raylet, Some("02"))], true),
            ("an old raylet", vec![process(Kind::Raylet, Some("01"))], false),
            (
                "an old agent",
                vec![process(Kind::Raylet, Some("02")), process(Kind::DashboardAgent, Some("01"))],
                false,
            ),
            (
                "an agent without",
                vec![process(Kind::Raylet, Some("02")), process(Kind::DashboardAgent, None)],
                false,
            ),
            (
                "a driver with an old one is its owner's",
                vec![process(Kind::Raylet, Some("02")), process(Kind::Driver, Some("01"))],
                true,
            ),
        ] {
            let served = Served {
                as_of: datetime!(2026-11-24 08:00 UTC).into(),
                state: None,
                horizon: None,
                drivers_state: None,
                drivers_horizon: None,
                processes,
                blind: vec![],
            };
            assert_eq!(is_new(&served, &old).is_ok(), good, "{name}: {:?}", is_new(&served, &old));
        }
    }
}
