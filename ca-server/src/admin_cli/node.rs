//! `ca-admin node`: list, show, take back, forget. Revoking is in `revoke`.

use clap::{Args, Subcommand};
use raymtls_proto::{
    clock,
    identity::{ClusterId, NodeName, Role},
    serial::Serial,
    v1,
};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    applied,
    client::{self, Client},
    consent::Consent,
    failure::Failure,
    moment::Moment,
    output::{Screen, Table, View, or_dash, printable, yes_no},
    revoke,
    running::{self, RunningView},
};
use crate::refusal::Refusal;

/// Longest reason, in bytes; it stands in the audit log.
const REASON_LEN_MAX: usize = 200;

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Lists a cluster's nodes, the first whose running leaf ends on top.
    #[command(after_help = "\
Examples:
  ca-admin node list --cluster c1
  ca-admin -o json node list --cluster c1")]
    List {
        /// Name of the cluster.
        #[arg(long)]
        cluster: ClusterId,
    },

    /// Shows one node: what is bound to it, and what its agent last said.
    #[command(after_help = "\
Examples:
  ca-admin node show --cluster c1 worker-7
  ca-admin -o json node show --cluster c1 worker-7")]
    Show(Which),

    /// Revokes a node: no renewal, no leaf, no enrolment under its name or from its addresses; its
    /// peers cut it off.
    #[command(after_help = "\
Under isolation `enforce` the agents of its peers drop its packets and close its connections; a line
comes as each of them says so. Ray itself checks no CRL: the answer says until when, and where, the leaf
still works. Exit code 1: the revocation stands, but some peer did not acknowledge it in time.

Examples:
  ca-admin node revoke --cluster c1 worker-7 --reason 'stolen disk'
  ca-admin node revoke --cluster c1 worker-7 --reason drill --keep-token --wait 0 --yes
  ca-admin node revoke --cluster c1 head --reason 'stolen disk' --confirm-head head --all-traffic --yes
  ca-admin node revoke --cluster c1 worker-7 --reason 'stolen disk' --drain --ray-address head.ray:6379")]
    Revoke(revoke::Revoke),

    /// Takes a revoked node back: it may enrol again, and its addresses are cut off no more.
    #[command(after_help = "\
Its certificates stay revoked, and tokens made before stay barred from its addresses: make a new one.

Examples:
  ca-admin node reinstate --cluster c1 worker-7
  ca-admin node reinstate --cluster c1 worker-7 --yes")]
    Reinstate {
        #[command(flatten)]
        which: Which,

        #[command(flatten)]
        consent: Consent,
    },

    /// Forgets a node, so that its name and addresses are free.
    #[command(after_help = "\
Refused while a leaf of a revoked node lives.

Examples:
  ca-admin node forget --cluster c1 worker-7
  ca-admin node forget --cluster c1 worker-7 --yes")]
    Forget {
        #[command(flatten)]
        which: Which,

        #[command(flatten)]
        consent: Consent,
    },
}

#[derive(Debug, Args)]
pub(super) struct Which {
    /// Name of the cluster.
    #[arg(long)]
    pub(super) cluster: ClusterId,

    /// Name of the node.
    pub(super) name: NodeName,
}

/// Does one verb.
pub(super) async fn run(verb: Verb, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    match verb {
        Verb::List { cluster } => list(&cluster, client, screen).await,
        Verb::Show(which) => show(&which, client, screen).await,
        Verb::Revoke(args) => revoke::run(args, client, screen).await,
        Verb::Reinstate { which, consent } => reinstate(&which, consent, client, screen).await,
        Verb::Forget { which, consent } => forget(&which, consent, client, screen).await,
    }
}

async fn list(cluster: &ClusterId, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let nodes = client::all_pages(async |page| {
        let request = v1::ListNodesRequest { cluster: cluster.to_string(), page };
        let answer = admin.list_nodes(request).await?.into_inner();
        Ok((answer.nodes, answer.next_page))
    })
    .await?;
    Ok(screen.show(&NodeList::new(&nodes))?)
}

async fn show(which: &Which, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let node = client.connect().await?.get_node(which.to_get()).await?.into_inner();
    Ok(screen.show(&NodeView::new(&node))?)
}

async fn reinstate(
    which: &Which,
    consent: Consent,
    client: &Client,
    screen: &mut Screen,
) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let node = admin.get_node(which.to_get()).await?.into_inner();
    let plan = NodeView::new(&node).reinstatement_plan(screen.now());
    consent.ask(&plan, screen).await?;
    let request = v1::ReinstateNodeRequest {
        cluster: which.cluster.to_string(),
        name: which.name.to_string(),
    };
    let answer = admin.reinstate_node(request).await?.into_inner();
    Ok(screen.show(&ReinstatedView::new(&answer))?)
}

async fn forget(
    which: &Which,
    consent: Consent,
    client: &Client,
    screen: &mut Screen,
) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let node = admin.get_node(which.to_get()).await?.into_inner();
    must_be_forgettable(&node, screen.now())?;
    let plan = NodeView::new(&node).forgetting_plan(screen.now());
    consent.ask(&plan, screen).await?;
    let request =
        v1::ForgetNodeRequest { cluster: which.cluster.to_string(), name: which.name.to_string() };
    admin.forget_node(request).await?;
    let view = ForgottenView {
        cluster: which.cluster.to_string(),
        name: which.name.to_string(),
        forgotten: true,
    };
    Ok(screen.show(&view)?)
}

/// Asked before anything is said of what will be done. The CA has the last word.
fn must_be_forgettable(node: &v1::Node, now: OffsetDateTime) -> Result<(), Failure> {
    if node.state() != v1::NodeState::Revoked || node.leaf_not_after_unix <= now.unix_timestamp() {
        return Ok(());
    }
    let until = clock::from_unix(node.leaf_not_after_unix).and_then(|at| at.format(&Rfc3339).ok());
    let refusal = Refusal::LeafStillLives {
        node: node.name.clone(),
        until: until.unwrap_or_else(|| "a far day".to_owned()),
    };
    Err(Failure::Refused { reason: refusal.reason(), message: refusal.to_string() })
}

impl Which {
    pub(super) fn to_get(&self) -> v1::GetNodeRequest {
        v1::GetNodeRequest { cluster: self.cluster.to_string(), name: self.name.to_string() }
    }
}

pub(super) fn reason(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.is_empty() || text.len() > REASON_LEN_MAX || text.chars().any(char::is_control) {
        return Err(format!("write a line of 1 to {REASON_LEN_MAX} bytes"));
    }
    Ok(text.to_owned())
}

#[derive(Debug, Serialize)]
pub(super) struct NodeView {
    pub(super) cluster: String,
    pub(super) name: String,
    pub(super) role: &'static str,
    /// The machine keeps no identity: it is heard of once.
    once: bool,
    pub(super) state: &'static str,
    addresses: Vec<AddressView>,
    dns_names: Vec<String>,
    shared_address: bool,
    pub(super) token: String,
    enrolled: Moment,
    last_contact: Moment,
    /// When it stops being a member unless it is heard of.
    lease_until: Moment,
    identity_serial: String,
    identity_not_after: Moment,
    pub(super) leaf_not_after: Moment,
    revoked: Moment,
    revoked_reason: String,
    /// What the node's agent says of itself; nobody has checked it.
    claims: Option<ClaimsView>,
}

#[derive(Debug, Serialize)]
struct AddressView {
    address: String,
    proved: bool,
}

#[derive(Debug, Serialize)]
struct ClaimsView {
    agent_version: String,
    node_time: Moment,
    received_counter: u64,
    applied_counter: u64,
    isolation: Option<IsolationView>,
    running: Option<RunningView>,
    key_folders: Vec<KeyFolderView>,
}

/// What the node's table does, as its agent says.
#[derive(Debug, Serialize)]
struct IsolationView {
    in_force: &'static str,
    problem: String,
    blocked_packets: u64,
    refused_packets: u64,
    sockets_closed: u32,
    flows_cut: u32,
    loaded: Moment,
}

#[derive(Debug, Serialize)]
struct KeyFolderView {
    name: String,
    serial: String,
    not_after: Moment,
    current: bool,
}

impl NodeView {
    pub(super) fn new(node: &v1::Node) -> Self {
        Self {
            cluster: node.cluster.clone(),
            name: node.name.clone(),
            role: Role::from_proto(node.role).map_or("unknown", Role::as_str),
            once: node.once,
            state: state(node.state),
            addresses: node
                .addresses
                .iter()
                .map(|a| AddressView { address: a.address.clone(), proved: a.proved })
                .collect(),
            dns_names: node.dns_names.clone(),
            shared_address: node.shared_address,
            token: node.token_id.clone(),
            enrolled: Moment::from_unix(node.enrolled_unix),
            last_contact: Moment::from_unix(node.last_contact_unix),
            lease_until: Moment::from_unix(node.lease_until_unix),
            identity_serial: serial(&node.identity_serial),
            identity_not_after: Moment::from_unix(node.identity_not_after_unix),
            leaf_not_after: Moment::from_unix(node.leaf_not_after_unix),
            revoked: Moment::from_unix(node.revoked_unix),
            revoked_reason: node.revoked_reason.clone(),
            claims: node.report.as_ref().map(ClaimsView::new),
        }
    }

    pub(super) fn address_list(&self) -> String {
        let words = self.addresses.iter().map(|a| a.address.as_str()).collect::<Vec<_>>();
        or_dash(&words.join(","))
    }

    fn role_words(&self) -> String {
        if self.once { format!("{} (once)", self.role) } else { self.role.to_owned() }
    }

    fn identity_until(&self, now: OffsetDateTime) -> String {
        if self.once { "not kept".to_owned() } else { self.identity_not_after.human(now) }
    }

    fn last_contact_words(&self, now: OffsetDateTime) -> String {
        if self.last_contact.is_none() {
            return "not since the CA started".to_owned();
        }
        self.last_contact.human(now)
    }

    /// Of a node that is silent; the others' lease begins anew with each call.
    fn lease_words(&self, now: OffsetDateTime) -> String {
        if self.lease_until.is_none() || self.state != "absent" {
            "-".to_owned()
        } else if self.lease_until.is_after(now) {
            format!("until {}", self.lease_until.human(now))
        } else {
            format!("over since {}", self.lease_until.human(now))
        }
    }

    fn running(&self) -> Option<&RunningView> {
        self.claims.as_ref()?.running.as_ref()
    }

    /// When the first leaf ends that its processes serve; of a node that is gone, none.
    fn horizon(&self) -> Moment {
        let runs = matches!(self.state, "live" | "absent");
        let horizon = self.running().filter(|_| runs).map(|running| running.horizon);
        horizon.unwrap_or_else(|| Moment::from_unix(0))
    }

    fn horizon_words(&self, now: OffsetDateTime) -> String {
        self.running().map_or_else(|| "not known".to_owned(), |running| running.short(now))
    }

    /// What it is, in a line's beginning.
    pub(super) fn introduction(&self) -> String {
        format!(
            "{} {} of cluster {} ({}, addresses {})",
            self.role,
            self.name,
            self.cluster,
            self.state,
            self.address_list()
        )
    }

    fn reinstatement_plan(&self, now: OffsetDateTime) -> Vec<String> {
        let mut plan = vec![
            format!("{} will be taken back:", self.introduction()),
            "  its peers cut its addresses off no more; it may enrol again, with a new token"
                .to_owned(),
            "  its certificates stay revoked".to_owned(),
        ];
        if self.leaf_not_after.is_after(now) {
            plan.push(format!(
                "  whoever has its old leaf key speaks Ray until {}, from where the network lets it",
                self.leaf_not_after.human(now)
            ));
        }
        plan
    }

    fn forgetting_plan(&self, now: OffsetDateTime) -> Vec<String> {
        vec![
            format!("{} will be forgotten:", self.introduction()),
            "  its identity is worth nothing any more; its name and addresses are free".to_owned(),
            format!("  last contact: {}", self.last_contact_words(now)),
        ]
    }
}

impl IsolationView {
    fn new(report: &v1::IsolationReport) -> Self {
        Self {
            in_force: applied::in_force(report.in_force),
            problem: report.problem.clone(),
            blocked_packets: report.blocked_packets,
            refused_packets: report.refused_packets,
            sockets_closed: report.sockets_closed,
            flows_cut: report.flows_cut,
            loaded: Moment::from_unix(report.loaded_unix),
        }
    }

    /// In one word, marked where something is wrong.
    fn word(&self) -> String {
        let mark = if self.problem.is_empty() { "" } else { " (problem)" };
        format!("{}{mark}", self.in_force)
    }

    fn lines(&self, now: OffsetDateTime) -> Vec<String> {
        let mut lines = vec![
            format!("{}, table loaded {}", self.in_force, self.loaded.human(now)),
            format!(
                "{} packets blocked, {} refused, {} sockets closed last",
                self.blocked_packets, self.refused_packets, self.sockets_closed
            ),
        ];
        if !self.problem.is_empty() {
            lines.push(format!("problem: {}", self.problem));
        }
        lines
    }
}

impl ClaimsView {
    fn lag(&self) -> u64 {
        self.received_counter.saturating_sub(self.applied_counter)
    }

    /// What it has in force, and how many versions its table lags behind.
    fn isolation_words(&self) -> String {
        let word = self.isolation.as_ref().map_or_else(|| "-".to_owned(), IsolationView::word);
        match self.lag() {
            0 => word,
            lag => format!("{word} (lags {lag})"),
        }
    }

    fn new(report: &v1::Report) -> Self {
        Self {
            agent_version: report.agent_version.clone(),
            node_time: Moment::from_unix(report.node_time_unix),
            received_counter: report.received.unwrap_or_default().counter,
            applied_counter: report.applied.unwrap_or_default().counter,
            isolation: report.isolation.as_ref().map(IsolationView::new),
            running: report.running.as_ref().map(RunningView::new),
            key_folders: report
                .key_folders
                .iter()
                .map(|folder| KeyFolderView {
                    name: folder.name.clone(),
                    serial: serial(&folder.serial),
                    not_after: Moment::from_unix(folder.not_after_unix),
                    current: folder.current,
                })
                .collect(),
        }
    }

    fn add_to(&self, table: &mut Table, now: OffsetDateTime) {
        table.fact("says: agent", &self.agent_version);
        table.fact("says: its time", self.node_time.human(now));
        let (received, applied) = (self.received_counter, self.applied_counter);
        table.fact("says: version", format!("{received} received, {applied} applied"));
        if let Some(isolation) = &self.isolation {
            table.facts("says: isolation", &isolation.lines(now));
        }
        if let Some(running) = &self.running {
            table.facts("says: Ray serves", &running.lines(now));
        }
        let folders = self.key_folders.iter().map(|folder| {
            let current = if folder.current { ", current" } else { "" };
            format!(
                "{} {} until {}{current}",
                folder.name,
                folder.serial,
                folder.not_after.human(now)
            )
        });
        table.facts("says: key folders", &folders.collect::<Vec<_>>());
    }
}

impl View for NodeView {
    fn text(&self, now: OffsetDateTime) -> String {
        let mut table = Table::of_facts();
        table.fact("node", &self.name);
        table.fact("cluster", &self.cluster);
        table.fact("role", self.role_words());
        table.fact("state", self.state);
        if !self.revoked.is_none() {
            table.fact("revoked", format!("{}: {}", self.revoked.human(now), self.revoked_reason));
        }
        let addresses = self
            .addresses
            .iter()
            .map(|a| format!("{} ({})", a.address, if a.proved { "proved" } else { "claimed" }));
        table.facts("addresses", &addresses.collect::<Vec<_>>());
        table.fact("shared address", yes_no(self.shared_address));
        table.fact("dns names", self.dns_names.join(","));
        table.fact("token", &self.token);
        table.fact("enrolled", self.enrolled.human(now));
        table.fact("last contact", self.last_contact_words(now));
        table.fact("lease", self.lease_words(now));
        table.fact("identity", &self.identity_serial);
        table.fact("identity until", self.identity_until(now));
        table.fact("last leaf until", self.leaf_not_after.human(now));
        if let Some(claims) = &self.claims {
            claims.add_to(&mut table, now);
        }
        table.to_string()
    }
}

#[derive(Debug, Serialize)]
struct NodeList {
    nodes: Vec<NodeView>,
}

impl NodeList {
    /// The node that must be looked after first comes first.
    fn new(nodes: &[v1::Node]) -> Self {
        let mut nodes: Vec<_> = nodes.iter().map(NodeView::new).collect();
        nodes.sort_by(|one, other| running::earlier(one.horizon(), other.horizon()));
        Self { nodes }
    }
}

impl View for NodeList {
    fn text(&self, now: OffsetDateTime) -> String {
        if self.nodes.is_empty() {
            return "no nodes\n".to_owned();
        }
        let mut table = Table::with_head(&[
            "NODE",
            "ROLE",
            "STATE",
            "ADDRESSES",
            "LAST-CONTACT",
            "IDENTITY-UNTIL",
            "LEAF-UNTIL",
            "HORIZON",
            "ISOLATION",
            "LEASE",
        ]);
        for view in &self.nodes {
            table.row([
                view.name.clone(),
                view.role_words(),
                view.state.to_owned(),
                view.address_list(),
                view.last_contact_words(now),
                view.identity_until(now),
                view.leaf_not_after.human(now),
                view.horizon_words(now),
                view.claims.as_ref().map_or_else(|| "-".to_owned(), ClaimsView::isolation_words),
                view.lease_words(now),
            ]);
        }
        table.to_string()
    }
}

#[derive(Debug, Serialize)]
struct ReinstatedView {
    node: NodeView,
    notes: Vec<String>,
}

impl ReinstatedView {
    fn new(answer: &v1::ReinstateNodeResponse) -> Self {
        Self {
            node: NodeView::new(&answer.node.clone().unwrap_or_default()),
            notes: answer.notes.clone(),
        }
    }
}

impl View for ReinstatedView {
    fn text(&self, _now: OffsetDateTime) -> String {
        let (name, cluster) = (&self.node.name, &self.node.cluster);
        let mut text = printable(&format!("node {name} of cluster {cluster} is taken back"));
        text.push('\n');
        for note in &self.notes {
            text.push_str(&format!("  note: {}\n", printable(note)));
        }
        text
    }
}

#[derive(Debug, Serialize)]
struct ForgottenView {
    cluster: String,
    name: String,
    forgotten: bool,
}

impl View for ForgottenView {
    fn text(&self, _now: OffsetDateTime) -> String {
        format!("node {} of cluster {} is forgotten\n", self.name, self.cluster)
    }
}

fn state(state: i32) -> &'static str {
    match v1::NodeState::try_from(state) {
        Ok(v1::NodeState::Live) => "live",
        Ok(v1::NodeState::Absent) => "absent",
        Ok(v1::NodeState::Left) => "left",
        Ok(v1::NodeState::Revoked) => "revoked",
        Ok(v1::NodeState::Unspecified) | Err(_) => "unknown",
    }
}

/// Hexadecimal digits, as `cert show` takes them; what is no serial number stays empty.
fn serial(bytes: &[u8]) -> String {
    Serial::from_slice(bytes).map(|serial| serial.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> OffsetDateTime {
        clock::from_unix(1_764_000_000).unwrap()
    }

    fn node() -> v1::Node {
        v1::Node {
            cluster: "c1".to_owned(),
            name: "worker-7".to_owned(),
            role: v1::Role::Worker.into(),
            state: v1::NodeState::Live.into(),
            addresses: vec![v1::NodeAddress { address: "10.77.0.7".to_owned(), proved: true }],
            token_id: "0123456789abcdef".to_owned(),
            identity_serial: Serial::new(1_764_000_000_000, [7; 10]).as_bytes().to_vec(),
            leaf_not_after_unix: 1_764_000_000 + 86_400,
            report: Some(v1::Report {
                agent_version: "0.1.0\x1b[31m".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn claims_are_marked_and_harmless() {
        let text = NodeView::new(&node()).text(now());
        assert!(text.contains("says: agent"), "{text}");
        assert!(!text.contains('\x1b'), "{text:?}");
    }

    #[test]
    fn json_has_hexadecimal_serials_and_null_for_what_has_not_been() {
        let json = serde_json::to_value(NodeView::new(&node())).unwrap();
        assert_eq!(json["identity_serial"], "019ab697e80007070707070707070707");
        assert_eq!(json["revoked"], serde_json::Value::Null);
        assert_eq!(json["addresses"][0]["proved"], true);
        assert_eq!(json["leaf_not_after"], "2025-11-25T16:00:00Z");
    }

    #[test]
    fn a_silent_node_is_not_shown_as_seen_in_1970() {
        let list = NodeList { nodes: vec![NodeView::new(&node())] };
        let text = list.text(now());
        assert!(text.contains("not since the CA started") && !text.contains("1970"), "{text}");
    }

    #[test]
    fn isolation_and_the_lease_of_a_silent_node_are_shown() {
        let report = |in_force: v1::Isolation, problem: &str| v1::Report {
            received: Some(v1::SyncVersion { epoch: 1, counter: 9 }),
            applied: Some(v1::SyncVersion { epoch: 1, counter: 7 }),
            isolation: Some(v1::IsolationReport {
                in_force: in_force.into(),
                problem: problem.to_owned(),
                refused_packets: 4,
                ..Default::default()
            }),
            ..Default::default()
        };
        let enforced =
            v1::Node { report: Some(report(v1::Isolation::Enforce, "nft: no such")), ..node() };
        let silent = |seconds: i64| v1::Node {
            state: v1::NodeState::Absent.into(),
            lease_until_unix: 1_764_000_000 + seconds,
            ..node()
        };
        let nodes = [enforced.clone(), silent(3_600), silent(-60)];
        let list = NodeList { nodes: nodes.iter().map(NodeView::new).collect() }.text(now());
        let lines: Vec<_> = list.lines().collect();
        assert!(lines[1].contains("enforce (problem) (lags 2)"), "{list}");
        assert!(lines[2].ends_with("until 2025-11-24 17:00:00Z (in 1h)"), "{list}");
        assert!(lines[3].ends_with("over since 2025-11-24 15:59:00Z (1m ago)"), "{list}");
        let shown = NodeView::new(&enforced).text(now());
        for part in ["enforce, table loaded -", "0 packets blocked, 4 refused", "problem: nft"] {
            assert!(shown.contains(part), "{part} in {shown}");
        }
    }

    #[test]
    fn a_driver_that_keeps_no_identity_is_marked() {
        let driver = v1::Node {
            role: v1::Role::Driver.into(),
            once: true,
            identity_not_after_unix: 1_764_000_000 + 30 * 86_400,
            ..node()
        };
        let list = NodeList { nodes: vec![NodeView::new(&driver), NodeView::new(&node())] };
        let text = list.text(now());
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].contains("driver (once)") && lines[1].contains("not kept"), "{text}");
        assert!(!lines[1].contains("in 30d") && !lines[2].contains("not kept"), "{text}");
    }

    #[test]
    fn the_node_whose_running_leaf_ends_first_comes_first() {
        let running = |name: &str, seconds: i64, state: v1::NodeState| {
            let running = v1::Running {
                horizon_unix: 1_764_000_000 + seconds,
                recycle_state: v1::RecycleState::Due.into(),
                plain_ports: 3,
                ..v1::Running::default()
            };
            let report = v1::Report { running: Some(running), ..Default::default() };
            let (name, report) = (name.to_owned(), Some(report));
            v1::Node { name, state: state.into(), report, ..node() }
        };
        let nodes = [
            v1::Node { name: "silent".to_owned(), report: None, ..node() },
            running("gone", 10, v1::NodeState::Left),
            running("later", 7_200, v1::NodeState::Live),
            running("sooner", 3_600, v1::NodeState::Absent),
        ];
        let list = NodeList::new(&nodes);
        let names: Vec<_> = list.nodes.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["sooner", "later", "silent", "gone"]);
        let text = list.text(now());
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].contains("(in 1h), recycle-due"), "{text}");
        assert!(lines[3].contains("not known"), "{text}");
        let shown = NodeView::new(&nodes[3]).text(now());
        for part in
            ["says: Ray serves", "node 2025-11-24 17:00:00Z (in 1h), recycle-due", "3 ports"]
        {
            assert!(shown.contains(part), "{part} in {shown}");
        }
    }

    #[test]
    fn only_a_revoked_node_whose_leaf_lives_cannot_be_forgotten() {
        let revoked = v1::Node { state: v1::NodeState::Revoked.into(), ..node() };
        let refused = must_be_forgettable(&revoked, now()).unwrap_err().to_string();
        assert!(refused.starts_with("refused: LEAF_STILL_LIVES: node \"worker-7\""), "{refused}");
        let expired = v1::Node { leaf_not_after_unix: 1_764_000_000, ..revoked };
        assert!(must_be_forgettable(&expired, now()).is_ok());
        assert!(must_be_forgettable(&node(), now()).is_ok());
    }

    #[test]
    fn a_reason_is_one_line_of_bounded_length() {
        assert_eq!(reason(" stolen disk "), Ok("stolen disk".to_owned()));
        for bad in ["", "  ", "two\nlines", &"x".repeat(REASON_LEN_MAX + 1)] {
            assert!(reason(bad).is_err(), "{bad:?}");
        }
    }
}
