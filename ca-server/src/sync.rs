//! Sync: one unary long poll. The node says what it holds; the answer is what changed since what it
//! has, at once if something did, else when something does or the wait is over.

use std::time::Duration;

use raymtls_proto::{identity::ClusterId, v1};
use time::OffsetDateTime;
use tokio::sync::watch;
use tracing::debug;

use crate::{
    ca::Ca,
    checkpoints,
    contacts::is_at_least,
    directives::{self, Wanted},
    identify::{admit, judged},
    limits::NodeCall,
    read_once::ReadOnce,
    refusal::Refusal,
    store::{
        Authority, Caller, MemberPage, StoreError, Watched,
        records::{ClusterRecord, MemberRecord},
    },
};

/// Longest wait.
pub const WAIT_MAX: Duration = Duration::from_secs(60);
/// Key folders in one report, at most.
const KEY_FOLDERS_MAX: usize = 64;
/// Characters of a text in a report, at most: it is kept for each node and shown to operators.
const REPORT_TEXT_LEN_MAX: usize = 64;
/// Characters of what keeps a node from isolating itself, at most.
const PROBLEM_LEN_MAX: usize = 500;
/// Processes and ports of Ray on one node, at most.
const RUNNING_MAX: u32 = 65_536;
/// How long a change of the members waits for others; and longer, for each call that waits.
const MEMBERS_TOGETHER: Duration = Duration::from_secs(1);
const EACH_WAITING: Duration = Duration::from_micros(250);
/// Members told in one answer.
const MEMBERS_PAGE: usize = 5_000;
/// Bytes of a serial in a report, at most (RFC 5280 4.1.2.2).
const SERIAL_LEN_MAX: usize = 20;

/// What all agents of a cluster are told, read once.
#[derive(Debug, Default)]
pub struct Told {
    pages: ReadOnce<(ClusterId, u64, u64), MemberPage>,
    blocks: ReadOnce<(ClusterId, u64), v1::Blocks>,
    crls: ReadOnce<(Authority, String, u64), Vec<Vec<u8>>>,
}

/// Answers one `Sync`.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn sync(
    ca: &Ca,
    caller: Caller,
    mut request: v1::SyncRequest,
) -> Result<v1::SyncResponse, StoreError> {
    let now = ca.clock.now();
    admit(ca, &caller, NodeCall::Sync).await?;
    let node = ca.store.identify(now, caller.clone()).await;
    let node = judged(ca, &caller, now, node)?;
    let current = directives::current_leaf(request.report.as_ref());
    let kept = request.checkpoint.take();
    let mut changes = ca.store.watch(&caller.cluster);
    if let Some(mut report) = request.report.take() {
        check_report(&report)?;
        // What nobody can know yet, nobody has applied.
        let newest = changes.borrow().as_ref().map_or(0, |cluster| cluster.version);
        let possible = |v: &v1::SyncVersion| v.epoch == ca.store.epoch() && v.counter <= newest;
        report.received = report.received.filter(possible);
        report.applied = report.applied.filter(possible);
        debug!(cluster = %caller.cluster, node = %caller.node, "report kept");
        ca.contacts.report(&caller, node.known_role(), report, now);
    }
    let mut heads = ca.contacts.applied_changes_of_heads(caller.cluster.as_str());
    let deadline = tokio::time::Instant::now() + wait(request.wait_seconds);
    let mut newest = ca.contacts.begin_wait(&caller);
    let _counted = Counted::new(ca);
    let (mut together, mut wanted) = (Together::new(&request), Wanted::default());
    loop {
        let cluster = changes.borrow_and_update().clone().ok_or(Refusal::StoreUnavailable)?;
        heads.mark_unchanged();
        // After the marks: a revocation before them is seen here, a later one wakes this call.
        let stands = ca.store.still_stands(caller.clone()).await;
        if let Err(StoreError::Refused(Refusal::Revoked { .. } | Refusal::NodeLeft(_))) = &stands {
            ca.contacts.gone(&caller);
        }
        stands?;
        let have = known(ca, &cluster, request.have);
        let mut answer = changed_since(ca, &caller.cluster, &cluster, &request, have).await?;
        wanted.keep_up(ca, &caller, &cluster, current).await;
        answer.directives = wanted.directives();
        let awaited = is_reached(request.heads_applied, answer.heads_applied);
        let news = presses(&answer) || (answer.members.is_some() && together.is_over());
        if news || wanted.is_news(have) || awaited || tokio::time::Instant::now() >= deadline {
            ca.metrics.synced();
            answer.log = Some(checkpoints::compare(ca, &caller, kept.as_ref()).await?);
            return Ok(answer);
        }
        let members = answer.members.is_some();
        let over = async { together.wait(ca).await };
        tokio::select! {
            changed = next(&mut changes, members.then(|| cluster.pressing_version())) => {
                changed.map_err(|_| Refusal::StoreUnavailable)?;
            }
            () = over, if members => {}
            _ = heads.changed(), if request.heads_applied.is_some() => {}
            () = tokio::time::sleep_until(deadline) => {}
            () = ca.stopped() => {
                ca.metrics.synced();
                let server_time_unix = ca.clock.now().unix_timestamp();
                let log = Some(checkpoints::compare(ca, &caller, kept.as_ref()).await?);
                return Ok(v1::SyncResponse { server_time_unix, log, ..answer });
            }
            () = newest.superseded() => return Err(Refusal::Superseded.into()),
        }
    }
}

/// How long a call waits that asks for so many seconds.
fn wait(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into()).min(WAIT_MAX)
}

/// Waits for a change; where members are to be told anyway, for one of anything else since `told`.
async fn next(
    changes: &mut watch::Receiver<Watched>,
    told: Option<u64>,
) -> Result<(), watch::error::RecvError> {
    let Some(told) = told else { return changes.changed().await };
    let presses = |cluster: &Watched| {
        cluster.as_ref().is_none_or(|cluster| cluster.pressing_version() != told)
    };
    changes.wait_for(presses).await.map(drop)
}

/// A change of the members alone is seldom alone: it is told with those that come soon after it.
enum Together {
    /// None is known of.
    NotBegun,
    /// One is; the others are waited for until then.
    Until(tokio::time::Instant),
    /// The caller does not wait, or wants all of them, or the next page.
    AtOnce,
}

impl Together {
    fn new(request: &v1::SyncRequest) -> Self {
        let waits = request.have.is_some() && request.wait_seconds > 0 && !request.continues;
        if waits { Self::NotBegun } else { Self::AtOnce }
    }

    fn is_over(&self) -> bool {
        match self {
            Self::NotBegun => false,
            Self::Until(until) => tokio::time::Instant::now() >= *until,
            Self::AtOnce => true,
        }
    }

    /// Longer where it costs more to tell it.
    async fn wait(&mut self, ca: &Ca) {
        if let Self::NotBegun = self {
            let waiting = u32::try_from(ca.metrics.waiting().get()).unwrap_or_default();
            let long = MEMBERS_TOGETHER + EACH_WAITING * waiting;
            *self = Self::Until(tokio::time::Instant::now() + long);
        }
        if let Self::Until(until) = self {
            tokio::time::sleep_until(*until).await;
        }
    }
}

/// Whether the heads have applied what the caller waits for.
fn is_reached(awaited: Option<v1::SyncVersion>, heads: Option<v1::SyncVersion>) -> bool {
    awaited.zip(heads).is_some_and(|(awaited, heads)| is_at_least(heads, awaited))
}

/// Judges a report by its size: it is kept for each node and shown to operators.
///
/// # Errors
/// `RequestInvalid`, naming the bound.
pub fn check_report(report: &v1::Report) -> Result<(), Refusal> {
    let invalid = |text: String| Err(Refusal::RequestInvalid(text));
    if report.key_folders.len() > KEY_FOLDERS_MAX {
        return invalid(format!("a report names at most {KEY_FOLDERS_MAX} key folders"));
    }
    let names = report.key_folders.iter().map(|folder| &folder.name);
    let fits = |text: &String| {
        text.len() <= REPORT_TEXT_LEN_MAX && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic())
    };
    if !names.chain([&report.agent_version]).all(fits) {
        return invalid(format!(
            "a text in a report has at most {REPORT_TEXT_LEN_MAX} characters, all visible"
        ));
    }
    if report.isolation.as_ref().is_some_and(|isolation| !is_problem(&isolation.problem)) {
        return invalid(format!(
            "a problem in a report has at most {PROBLEM_LEN_MAX} characters, all visible"
        ));
    }
    if report.running.as_ref().is_some_and(|running| !is_possible(running)) {
        return invalid(format!(
            "a report of what runs has moments until 9999 and at most {RUNNING_MAX} of each thing"
        ));
    }
    if report.key_folders.iter().any(|folder| folder.serial.len() > SERIAL_LEN_MAX) {
        return invalid(format!("a serial in a report has at most {SERIAL_LEN_MAX} bytes"));
    }
    Ok(())
}

fn is_possible(running: &v1::Running) -> bool {
    let moments = [running.horizon_unix, running.driver_horizon_unix, running.looked_unix];
    let counts = [running.processes, running.unknown, running.plain_ports];
    moments.iter().all(|at| *at >= 0 && raymtls_proto::clock::from_unix(*at).is_some())
        && counts.iter().all(|count| *count <= RUNNING_MAX)
}

fn is_problem(text: &str) -> bool {
    text.len() <= PROBLEM_LEN_MAX && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic())
}

/// The parts that are newer than `have`; all of them for another epoch, a version of the future, or
/// none.
async fn changed_since(
    ca: &Ca,
    id: &ClusterId,
    cluster: &ClusterRecord,
    request: &v1::SyncRequest,
    have: u64,
) -> Result<v1::SyncResponse, StoreError> {
    let epoch = ca.store.epoch();
    let now = ca.clock.now();
    let mut answer = v1::SyncResponse {
        version: Some(v1::SyncVersion { epoch, counter: cluster.version }),
        server_time_unix: now.unix_timestamp(),
        ..v1::SyncResponse::default()
    };
    if request.heads_applied.is_some() {
        answer.heads_applied = ca.contacts.heads_applied(id.as_str(), epoch, now);
    }
    if cluster.settings_version > have {
        answer.settings = Some(cluster.settings().clone());
    }
    if cluster.bundle_version > have {
        let crls_der = crls_on_record(ca, Authority::Cluster(id.clone()), cluster).await?;
        answer.bundle = Some(v1::TrustBundle { crls_der, ..ca.bundle(id)? });
    }
    if cluster.ray_token_version > have {
        answer.ray_token = Some(ca.ray_token(id, cluster)?);
    }
    if cluster.control_crl_version > have {
        let crls_der = crls_on_record(ca, Authority::Control, cluster).await?;
        answer.control_crl = Some(v1::ControlCrl { crls_der });
    }
    if cluster.blocks_version > have {
        let key = (id.clone(), cluster.blocks_version);
        let blocks = ca.told.blocks.get(key, blocks(ca, id, now)).await?;
        answer.blocks = Some((*blocks).clone());
    }
    let whole = have == 0 || (have < cluster.members_from && !request.continues);
    if whole || cluster.members_version > have {
        let after = if whole { 0 } else { have };
        let key = (id.clone(), cluster.members_version, after);
        let page =
            ca.told.pages.get(key, ca.store.members(id.clone(), after, MEMBERS_PAGE)).await?;
        if page.more {
            answer.version = Some(v1::SyncVersion { epoch, counter: page.up_to });
        }
        answer.members = members(&page, whole);
    }
    Ok(answer)
}

/// The counter an agent knows the cluster as of; zero for another epoch or a version of the future.
fn known(ca: &Ca, cluster: &ClusterRecord, have: Option<v1::SyncVersion>) -> u64 {
    let epoch = ca.store.epoch();
    have.filter(|have| have.epoch == epoch && have.counter <= cluster.version)
        .map_or(0, |have| have.counter)
}

/// `None` where nothing is to be told.
fn members(page: &MemberPage, whole: bool) -> Option<v1::Members> {
    let told = |entry: &&MemberRecord| !whole || entry.state() == v1::MemberState::Member;
    let members: Vec<_> = page
        .entries
        .iter()
        .filter(told)
        .map(|entry| v1::Member {
            name: entry.name.clone(),
            role: entry.role,
            state: entry.state,
            addresses: entry.addresses.clone(),
        })
        .collect();
    let news = whole || page.more || !members.is_empty();
    news.then_some(v1::Members { snapshot: whole, members, more: page.more })
}

async fn blocks(ca: &Ca, id: &ClusterId, now: OffsetDateTime) -> Result<v1::Blocks, StoreError> {
    let blocks = ca.store.blocks(now, id.clone()).await?;
    let blocks = blocks.into_iter().map(|(address, block)| v1::Block {
        address,
        node: block.node,
        until_unix: block.until_ms / 1_000,
        all_traffic: block.all_traffic,
    });
    Ok(v1::Blocks { blocks: blocks.collect() })
}

/// From the store, not from memory: the version that goes with them was read there before, so they
/// are at least as new, and nobody is told of a version whose CRLs it did not get.
async fn crls_on_record(
    ca: &Ca,
    authority: Authority,
    cluster: &ClusterRecord,
) -> Result<Vec<Vec<u8>>, StoreError> {
    let version = match authority {
        Authority::Control => cluster.control_crl_version,
        Authority::Cluster(_) => cluster.bundle_version,
    };
    let key = (authority.clone(), cluster.cluster.clone(), version);
    let read =
        async { Ok(ca.store.crls(authority).await?.map(|set| set.crls_der).unwrap_or_default()) };
    ca.told.crls.get(key, read).await.map(|crls| (*crls).clone())
}

/// Whether it holds anything that is told at once: all but members who changed.
fn presses(answer: &v1::SyncResponse) -> bool {
    answer.settings.is_some()
        || answer.bundle.is_some()
        || answer.ray_token.is_some()
        || answer.control_crl.is_some()
        || answer.blocks.is_some()
        || answer.members.as_ref().is_some_and(|members| members.snapshot)
}

/// Counts a waiting call for as long as it waits, however it ends.
struct Counted<'a>(&'a Ca);

impl<'a> Counted<'a> {
    fn new(ca: &'a Ca) -> Self {
        ca.metrics.waiting().inc();
        Self(ca)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.metrics.waiting().dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_cut_to_its_bound() {
        for (asked, waits) in [(0, 0), (1, 1), (60, 60), (61, 60), (u32::MAX, 60)] {
            assert_eq!(wait(asked), Duration::from_secs(waits), "{asked}");
        }
    }
}
