//! `ca-admin cluster`: create, set, list, show.

use aws_lc_rs::digest;
use clap::{Args, Subcommand};
use raymtls_proto::{identity::ClusterId, leaf::LeafFacts, v1};
use serde::Serialize;
use time::OffsetDateTime;

use super::{
    client::Client,
    consent::Consent,
    duration::{self, Seconds},
    failure::Failure,
    moment::Moment,
    output::{Screen, Table, View},
    running::FleetView,
    settings::SettingsView,
};

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Makes a cluster: its own root, its first issuer, its settings.
    #[command(after_help = "\
Leaves live twice as long as the longest job and are renewed at a third of that, because a Ray
process serves the leaf it read at its start until it ends.

Examples:
  ca-admin cluster create c1 --max-job 20d        jobs run up to 20 days: leaves live 40 days
  ca-admin cluster create ci-7 --max-life 48h     the cluster is over 48 hours from now")]
    Create(Create),

    /// Changes settings: says what would change, asks, changes it.
    #[command(after_help = "\
Keys: max-job, isolation (off|audit|enforce), mode (files|tunnel), leaf-life and tunnel-grace (mode
tunnel), admin-ranges, scraper-ranges, driver-ranges, lease, ray-token (on|off), ray-client (on|off), port.NAME, collective-ports
(MIN-MAX|none). Ranges are separated by commas.

Examples:
  ca-admin cluster set c1 max-job=30d --dry-run
  ca-admin cluster set c1 mode=tunnel isolation=enforce      stop Ray on all its nodes first
  ca-admin cluster set c1 ray-client=on driver-ranges=10.9.0.0/16 --yes")]
    Set(Set),

    /// Lists the clusters you may see.
    #[command(after_help = "\
Examples:
  ca-admin cluster list
  ca-admin -o json cluster list")]
    List,

    /// Shows one cluster: settings, issuers, nodes, and the sum behind the life of its leaves.
    #[command(after_help = "\
Examples:
  ca-admin cluster show c1
  ca-admin -o json cluster show c1")]
    Show {
        /// Name of the cluster.
        cluster: ClusterId,
    },
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// Name: a-z, 0-9 and '-', at most 63 characters.
    cluster: ClusterId,

    #[command(flatten)]
    life: Life,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Life {
    /// The longest a job runs (2m to 40d); leaves live twice as long.
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    max_job: Option<Seconds>,

    /// The cluster, and every leaf in it, is over this long from now.
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    max_life: Option<Seconds>,
}

#[derive(Debug, Args)]
pub(super) struct Set {
    /// Name of the cluster.
    cluster: ClusterId,

    /// What to change.
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = change)]
    changes: Vec<String>,

    /// Say what would change, and change nothing.
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    consent: Consent,
}

/// Does one verb.
pub(super) async fn run(verb: Verb, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    match verb {
        Verb::Create(args) => create(args, client, screen).await,
        Verb::Set(args) => set(args, client, screen).await,
        Verb::List => list(client, screen).await,
        Verb::Show { cluster } => show(&cluster, client, screen).await,
    }
}

async fn create(args: Create, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let request =
        v1::CreateClusterRequest { cluster: args.cluster.to_string(), life: args.life.to_proto() };
    let cluster = client.connect().await?.create_cluster(request).await?.into_inner();
    screen.show(&ClusterView::new(&cluster))?;
    screen.say(&format!(
        "next: ca-admin token create --cluster {} --role head --out head.join",
        args.cluster
    ))?;
    Ok(())
}

async fn set(args: Set, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let request = v1::SetClusterRequest {
        cluster: args.cluster.to_string(),
        changes: args.changes,
        dry_run: true,
    };
    let planned = admin.set_cluster(request.clone()).await?.into_inner();
    let plan = SetView::new(&args.cluster, true, &planned);
    if args.dry_run || !plan.changes_anything() {
        return Ok(screen.show(&plan)?);
    }
    args.consent.ask(&plan.lines(screen.now()), screen).await?;
    let done = admin.set_cluster(v1::SetClusterRequest { dry_run: false, ..request }).await?;
    Ok(screen.show(&SetView::new(&args.cluster, false, done.get_ref()))?)
}

async fn list(client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let answer = client.connect().await?.list_clusters(v1::ListClustersRequest {}).await?;
    let clusters = answer.get_ref().clusters.iter().map(ClusterView::new).collect();
    Ok(screen.show(&ClusterList { clusters })?)
}

async fn show(cluster: &ClusterId, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let request = v1::GetClusterRequest { cluster: cluster.to_string() };
    let answer = client.connect().await?.get_cluster(request).await?;
    Ok(screen.show(&ClusterView::new(answer.get_ref()))?)
}

/// The CA reads keys and values; only the form is looked at here.
fn change(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() => Ok(text.to_owned()),
        Some(_) | None => Err("write KEY=VALUE, such as max-job=20d".to_owned()),
    }
}

impl Life {
    fn to_proto(&self) -> Option<v1::create_cluster_request::Life> {
        use v1::create_cluster_request::Life as Proto;
        let job = self.max_job.map(|job| Proto::MaxJobSeconds(job.as_i64()));
        job.or_else(|| self.max_life.map(|life| Proto::MaxLifeSeconds(life.as_i64())))
    }
}

#[derive(Debug, Serialize)]
struct ClusterView {
    cluster: String,
    created: Moment,
    version: VersionView,
    nodes: NodeCounts,
    settings: SettingsView,
    root: AuthorityView,
    issuers: Vec<AuthorityView>,
    /// What the nodes' agents say of Ray's processes.
    running: Option<FleetView>,
    notes: Vec<String>,
}

/// A point in the cluster's history; the epoch as text, because it may pass 2^53.
#[derive(Debug, Serialize)]
struct VersionView {
    epoch: String,
    counter: u64,
}

#[derive(Debug, Serialize)]
struct NodeCounts {
    live: u32,
    absent: u32,
    left: u32,
    revoked: u32,
}

/// A root or an issuer.
#[derive(Debug, Serialize)]
struct AuthorityView {
    serial: Option<String>,
    sha256: String,
    not_after: Moment,
    active: bool,
}

impl ClusterView {
    fn new(cluster: &v1::Cluster) -> Self {
        let version = cluster.version.unwrap_or_default();
        Self {
            cluster: cluster.cluster.clone(),
            created: Moment::from_unix(cluster.created_unix),
            version: VersionView {
                epoch: format!("{:016x}", version.epoch),
                counter: version.counter,
            },
            nodes: NodeCounts {
                live: cluster.nodes_live,
                absent: cluster.nodes_absent,
                left: cluster.nodes_left,
                revoked: cluster.nodes_revoked,
            },
            settings: SettingsView::new(cluster.settings.as_ref()),
            root: AuthorityView::new(&cluster.root_der, true),
            issuers: cluster
                .issuers
                .iter()
                .map(|issuer| AuthorityView::new(&issuer.certificate_der, issuer.active))
                .collect(),
            running: cluster.horizon.as_ref().map(FleetView::new),
            notes: cluster.notes.clone(),
        }
    }
}

impl AuthorityView {
    fn new(certificate_der: &[u8], active: bool) -> Self {
        let facts = LeafFacts::parse(certificate_der).ok();
        let fingerprint = digest::digest(&digest::SHA256, certificate_der);
        Self {
            serial: facts.as_ref().map(|facts| facts.serial.to_string()),
            sha256: hex::encode(fingerprint),
            not_after: facts
                .map_or_else(|| Moment::from_unix(0), |facts| Moment::at(facts.not_after)),
            active,
        }
    }

    fn line(&self, now: OffsetDateTime) -> String {
        let serial = self.serial.as_deref().unwrap_or("unreadable certificate");
        let active = if self.active { "" } else { ", signs no more" };
        format!("{serial}, until {}{active}", self.not_after.human(now))
    }
}

impl View for ClusterView {
    fn text(&self, now: OffsetDateTime) -> String {
        let mut table = Table::of_facts();
        table.fact("cluster", &self.cluster);
        table.fact("created", self.created.human(now));
        table.fact("nodes", self.nodes.line());
        table.fact("version", format!("{} of epoch {}", self.version.counter, self.version.epoch));
        table.fact("root", self.root.line(now));
        table.fact("root sha256", &self.root.sha256);
        let issuers: Vec<_> = self.issuers.iter().map(|issuer| issuer.line(now)).collect();
        table.facts("issuers", &issuers);
        if let Some(running) = &self.running {
            table.facts("say: horizon", &running.lines(now));
        }
        for (key, value) in self.settings.lines(now) {
            table.fact(&key, value);
        }
        table.facts("notes", &self.notes);
        table.to_string()
    }
}

impl NodeCounts {
    fn line(&self) -> String {
        let Self { live, absent, left, revoked } = self;
        format!("{live} live, {absent} absent, {left} left, {revoked} revoked")
    }
}

#[derive(Debug, Serialize)]
struct ClusterList {
    clusters: Vec<ClusterView>,
}

impl View for ClusterList {
    fn text(&self, now: OffsetDateTime) -> String {
        if self.clusters.is_empty() {
            return "no clusters\n".to_owned();
        }
        let mut table =
            Table::with_head(&["CLUSTER", "MODE", "ISOLATION", "LEAF-LIFE", "NODES", "CREATED"]);
        for view in &self.clusters {
            table.row([
                view.cluster.clone(),
                view.settings.mode().to_owned(),
                view.settings.isolation().to_owned(),
                view.settings.leaf_life(),
                view.nodes.line(),
                view.created.human(now),
            ]);
        }
        table.to_string()
    }
}

#[derive(Debug, Serialize)]
struct SetView {
    cluster: String,
    dry_run: bool,
    before: SettingsView,
    after: SettingsView,
    notes: Vec<String>,
}

impl SetView {
    fn new(cluster: &ClusterId, dry_run: bool, answer: &v1::SetClusterResponse) -> Self {
        Self {
            cluster: cluster.to_string(),
            dry_run,
            before: SettingsView::new(answer.before.as_ref()),
            after: SettingsView::new(answer.after.as_ref()),
            notes: answer.notes.clone(),
        }
    }

    fn changes_anything(&self) -> bool {
        self.before != self.after
    }

    fn lines(&self, now: OffsetDateTime) -> Vec<String> {
        let changes = self.before.differences(&self.after, now);
        let head = match (changes.is_empty(), self.dry_run) {
            (true, _) => format!("cluster {}: nothing changes", self.cluster),
            (false, true) => format!("cluster {} would change:", self.cluster),
            (false, false) => format!("cluster {} is changed:", self.cluster),
        };
        let notes = self.notes.iter().map(|note| format!("  note: {note}"));
        std::iter::once(head).chain(changes).chain(notes).collect()
    }
}

impl View for SetView {
    fn text(&self, now: OffsetDateTime) -> String {
        let lines = self.lines(now);
        lines.iter().map(|line| super::output::printable(line) + "\n").collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> OffsetDateTime {
        raymtls_proto::clock::from_unix(1_764_000_000).unwrap()
    }

    fn cluster() -> v1::Cluster {
        v1::Cluster {
            cluster: "c1".to_owned(),
            settings: Some(v1::Settings {
                leaf_life_seconds: 40 * 86_400,
                mode: v1::Mode::Files.into(),
                isolation: v1::Isolation::Off.into(),
                ..Default::default()
            }),
            created_unix: 1_764_000_000 - 60,
            version: Some(v1::SyncVersion { epoch: u64::MAX, counter: 3 }),
            nodes_live: 2,
            notes: vec!["leaf life 40d = 2 x max-job 20d".to_owned()],
            ..Default::default()
        }
    }

    #[test]
    fn the_derived_sum_is_shown() {
        let text = ClusterView::new(&cluster()).text(now());
        assert!(text.contains("leaf life 40d = 2 x max-job 20d"), "{text}");
        assert!(text.contains("2 live, 0 absent, 0 left, 0 revoked"), "{text}");
    }

    #[test]
    fn json_has_times_in_rfc_3339_and_keeps_large_numbers_whole() {
        let json = serde_json::to_value(ClusterView::new(&cluster())).unwrap();
        assert_eq!(json["created"], "2025-11-24T15:59:00Z");
        assert_eq!(json["version"]["epoch"], "ffffffffffffffff");
        assert_eq!(json["settings"]["leaf_life_seconds"], 40 * 86_400);
        assert_eq!(json["settings"]["mode"], "files");
    }

    #[test]
    fn an_empty_list_says_so() {
        assert_eq!(ClusterList { clusters: vec![] }.text(now()), "no clusters\n");
    }

    #[test]
    fn a_change_needs_a_key_and_may_have_no_value() {
        assert!(change("admin-ranges=").is_ok() && change("max-job=20d").is_ok());
        assert!(change("=20d").is_err() && change("max-job").is_err());
    }

    #[test]
    fn a_plan_that_changes_nothing_says_so() {
        let cluster: ClusterId = "c1".parse().unwrap();
        let view = SetView::new(&cluster, true, &v1::SetClusterResponse::default());
        assert!(!view.changes_anything());
        assert_eq!(view.text(now()), "cluster c1: nothing changes\n");
    }
}
