//! `ca-admin backup`: everything the CA remembers, into one file that only its key-encryption key opens;
//! and `ca-admin restore`, for the operator of a CA that came out of one.

use std::{io::Write as _, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use raymtls_proto::{
    durable::{Access, Growing},
    identity::Role,
    v1,
};
use serde::Serialize;
use time::OffsetDateTime;

use super::{
    client::Client,
    consent::Consent,
    failure::Failure,
    moment::Moment,
    output::{Screen, Table, View},
};

/// Records between two words of progress.
const PROGRESS_EVERY: u64 = 50_000;
/// Longest wait for the next piece.
const PIECE_TIME_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
#[command(after_help = "\
The CA serves on meanwhile; the file holds the store as it stands when the command ends. It is encrypted
under the key-encryption key, which is not in it: keep a copy of that apart. It is mode 0600, and replaces
nothing. The audit log has a record of it.

Examples:
  ca-admin backup --out /backup/ca-2026-01-31
  ca-server restore --from /backup/ca-2026-01-31 --dir /var/lib/ray-mtls/ca")]
pub(super) struct Backup {
    /// File to write; it must not be there.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(super) async fn run(
    args: &Backup,
    client: &Client,
    screen: &mut Screen,
) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let mut file = Growing::begin(&args.out, Access::PRIVATE).map_err(unwritten)?;
    let mut pieces = admin.backup(v1::BackupRequest {}).await?.into_inner();
    let (mut bytes, mut told) = (0, 0);
    let cut =
        || Failure::Failed("the CA broke off: the backup is not whole, nothing is kept".into());
    loop {
        let piece = tokio::time::timeout(PIECE_TIME_MAX, pieces.message()).await;
        let piece = piece.map_err(|_| cut())??.ok_or_else(cut)?;
        file.write_all(&piece.data).map_err(unwritten)?;
        bytes += u64::try_from(piece.data.len()).unwrap_or(0);
        if piece.end {
            file.finish().map_err(unwritten)?;
            let out = args.out.display().to_string();
            return Ok(screen.show(&Made { out, records: piece.records, bytes })?);
        }
        if piece.records >= told + PROGRESS_EVERY {
            told = piece.records;
            screen.say(&format!("{told} records, {bytes} bytes"))?;
        }
    }
}

fn unwritten(error: std::io::Error) -> Failure {
    Failure::Failed(format!("the backup was not written: {error}"))
}

#[derive(Debug, Serialize)]
struct Made {
    out: String,
    records: u64,
    bytes: u64,
}

impl View for Made {
    fn text(&self, _now: OffsetDateTime) -> String {
        format!(
            "{}: {} records, {} bytes\nit opens with the key-encryption key alone: keep that apart from \
             it\n",
            self.out, self.records, self.bytes
        )
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// What a restored CA has heard from its nodes, and what accepting it would take over.
    #[command(after_help = "Example:\n  ca-admin restore show")]
    Show,
    /// Takes over what was heard, and serves again.
    #[command(after_help = "\
Until then only Sync is answered. Wait until the nodes have called (an agent calls each minute): one that
has not, and whose identity is newer than the backup, must enrol again.

Examples:
  ca-admin restore accept --dry-run
  ca-admin restore accept --yes")]
    Accept {
        /// Say what would be taken over, change nothing.
        #[arg(long)]
        dry_run: bool,

        #[command(flatten)]
        consent: Consent,
    },
}

pub(super) async fn run_restore(
    verb: Verb,
    client: &Client,
    screen: &mut Screen,
) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let (dry_run, consent) = match verb {
        Verb::Show => {
            let answer = admin.get_restore(v1::GetRestoreRequest {}).await?.into_inner();
            return Ok(screen.show(&RestoreView::new(&answer, false))?);
        }
        Verb::Accept { dry_run, consent } => (dry_run, consent),
    };
    let asked = v1::AcceptRestoreRequest { dry_run: true };
    let planned = RestoreView::new(&admin.accept_restore(asked).await?.into_inner(), false);
    if dry_run {
        return Ok(screen.show(&planned)?);
    }
    let plan: Vec<String> = planned.text(screen.now()).lines().map(ToOwned::to_owned).collect();
    consent.ask(&plan, screen).await?;
    let asked = v1::AcceptRestoreRequest { dry_run: false };
    let done = admin.accept_restore(asked).await?.into_inner();
    Ok(screen.show(&RestoreView::new(&done, true))?)
}

#[derive(Debug, Serialize)]
struct RestoreView {
    pending: bool,
    /// This is what was taken over, not what would be.
    accepted: bool,
    restored: Moment,
    backup: Moment,
    last_record: u64,
    nodes_known: u64,
    nodes_heard: u64,
    nodes: Vec<NodeView>,
    revocations: Vec<RevocationView>,
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct NodeView {
    cluster: String,
    name: String,
    /// By its own word; a driver by its leaf.
    role: &'static str,
    addresses: Vec<String>,
    identity_serial: String,
    unknown: bool,
    left_out: String,
}

#[derive(Debug, Serialize)]
struct RevocationView {
    cluster: String,
    serial: String,
    revoked: Moment,
    node: String,
}

impl RestoreView {
    fn new(answer: &v1::Restore, accepted: bool) -> Self {
        let nodes = answer.nodes.iter().map(|node| NodeView {
            cluster: node.cluster.clone(),
            name: node.name.clone(),
            role: Role::from_proto(node.role).map_or("unknown", Role::as_str),
            addresses: node.addresses.clone(),
            identity_serial: hex::encode(&node.identity_serial),
            unknown: node.unknown,
            left_out: node.left_out.clone(),
        });
        let revocations = answer.revocations.iter().map(|taken| RevocationView {
            cluster: taken.cluster.clone(),
            serial: hex::encode(&taken.serial),
            revoked: Moment::from_unix(taken.revoked_unix),
            node: taken.node.clone(),
        });
        Self {
            pending: answer.pending,
            accepted,
            restored: Moment::from_unix(answer.restored_unix),
            backup: Moment::from_unix(answer.backup_unix),
            last_record: answer.last_index,
            nodes_known: answer.nodes_known,
            nodes_heard: answer.nodes_heard,
            nodes: nodes.collect(),
            revocations: revocations.collect(),
            notes: answer.notes.clone(),
        }
    }
}

impl View for RestoreView {
    fn text(&self, now: OffsetDateTime) -> String {
        if !self.pending && !self.accepted {
            return if self.restored.is_none() {
                "this CA was never restored\n".to_owned()
            } else {
                format!("restored {}, and accepted\n", self.restored.human(now))
            };
        }
        let mut facts = Table::of_facts();
        facts.fact("restored", self.restored.human(now));
        facts.fact("from a backup of", self.backup.human(now));
        facts.fact("its audit log ends with", format!("record {}", self.last_record));
        facts.fact(
            "nodes",
            format!("{} live in the backup; {} called since", self.nodes_known, self.nodes_heard),
        );
        let mut text = facts.to_string();
        if !self.nodes.is_empty() {
            let mut table =
                Table::with_head(&["NODE", "CLUSTER", "ROLE", "ADDRESSES", "IN-BACKUP", "ADOPTED"]);
            for node in &self.nodes {
                table.row([
                    node.name.clone(),
                    node.cluster.clone(),
                    node.role.to_owned(),
                    node.addresses.join(","),
                    if node.unknown { "no" } else { "older identity" }.to_owned(),
                    if node.left_out.is_empty() {
                        "yes".to_owned()
                    } else {
                        format!("no: {}", node.left_out)
                    },
                ]);
            }
            text.push_str(&table.to_string());
        }
        if !self.revocations.is_empty() {
            let mut table = Table::with_head(&["REVOKED-SERIAL", "OF", "NODE", "WHEN"]);
            for taken in &self.revocations {
                let of = if taken.cluster.is_empty() { "identities" } else { &taken.cluster };
                table.row([
                    taken.serial.clone(),
                    of.to_owned(),
                    taken.node.clone(),
                    taken.revoked.human(now),
                ]);
            }
            text.push_str(&table.to_string());
        }
        for note in &self.notes {
            text.push_str(&format!("note: {}\n", super::output::printable(note)));
        }
        text
    }
}
