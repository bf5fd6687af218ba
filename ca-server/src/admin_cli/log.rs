//! `ca-admin log`: show, follow, export, verify and prune the audit log. What a record says is read from the
//! bytes the CA stored; `line` makes it readable, `export` writes a file, `verify` reads one and asks
//! no CA.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use raymtls_proto::{
    identity::{ClusterId, NodeName},
    serial::Serial,
    v1::{self, AuditKind, admin_service_client::AdminServiceClient},
};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tonic::transport::Channel;

use self::line::{RecordView, kind_of, kind_words};
use super::{
    client::Client,
    duration,
    failure::Failure,
    output::{Screen, View},
};

mod export;
mod line;
mod prune;
mod verify;

/// Records of one answer of the CA.
const PAGE_ROWS: u32 = 1_000;
/// Most records shown at once.
const SHOWN_MAX: u32 = 100_000;
/// How long the CA is asked to wait, at one call, for what comes.
const WAIT_SECONDS: u32 = 20;

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Shows the newest records, oldest of them first.
    #[command(after_help = "\
A record is one line, whatever stands in it: what is not plain is quoted and escaped. With --follow and
-o json each record is one JSON document on a line of its own.

Examples:
  ca-admin log show --limit 20
  ca-admin log show --cluster c1 --node worker-7 --since 2d
  ca-admin log show --kind node-revoked --since 2026-01-31
  ca-admin log show --cluster c1 --follow")]
    Show(Show),

    /// Writes the log, or what came since the last export, to a new file that can be verified anywhere.
    #[command(after_help = "\
The file holds the bytes that the CA stored, so that every hash can be computed again. The next export
begins where this one ends: --after takes the index it names.

Examples:
  ca-admin log export --out audit-1.jsonl
  ca-admin log export --after 4711 --out audit-2.jsonl")]
    Export(export::Export),

    /// Checks an export: every record's hash, that none is missing, that the file is whole, and the
    /// signed checkpoint in it. Asks no CA.
    #[command(after_help = "\
Exits with 1 where anything is wrong, and names the index. With --root the file must hold a checkpoint
signed under that control root: whoever can write the CA's store, and does not have its keys, cannot make
one. The root stands in each join file, and `ca-server init` prints it.

Examples:
  ca-admin log verify audit-1.jsonl
  ca-admin log verify --root control-root.pem audit-1.jsonl")]
    Verify {
        /// What `log export` wrote.
        file: PathBuf,
        /// The control root, in PEM.
        #[arg(long, value_name = "FILE")]
        root: Option<PathBuf>,
    },

    /// Removes old records, up to a signed checkpoint.
    #[command(after_help = "\
Export them first. Records of the last 31 days always stay: every node that may still call holds a
checkpoint that is no older. What is left is verified from the checkpoint on, at which it begins; an
export that was made before ends where it begins.

Examples:
  ca-admin log prune --before 365d --dry-run
  ca-admin log prune --before 2026-01-31 --yes")]
    Prune(prune::Prune),
}

#[derive(Debug, Args)]
pub(super) struct Show {
    /// Only what concerns this cluster.
    #[arg(long)]
    cluster: Option<ClusterId>,

    /// Only what concerns the node of this name.
    #[arg(long, value_name = "NAME")]
    node: Option<NodeName>,

    /// Only what concerns this certificate.
    #[arg(long)]
    serial: Option<Serial>,

    /// Only what this one did: uid:0, node:C/N, token:ID, ca.
    #[arg(long)]
    actor: Option<String>,

    /// Only this kind, such as node-revoked.
    #[arg(long, value_parser = kind)]
    kind: Option<AuditKind>,

    /// Not older than this: a length of time back (2d, 90m), a date, or RFC 3339.
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Since>,

    /// Records at most.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=i64::from(SHOWN_MAX)))]
    limit: u32,

    /// Go on with each new record until interrupted.
    #[arg(long)]
    follow: bool,
}

impl Show {
    fn request(&self, now: OffsetDateTime) -> v1::ListAuditRequest {
        let text = |value: Option<String>| value.unwrap_or_default();
        v1::ListAuditRequest {
            cluster: text(self.cluster.as_ref().map(ToString::to_string)),
            node: text(self.node.as_ref().map(ToString::to_string)),
            serial: self.serial.map(|s| s.as_bytes().to_vec()).unwrap_or_default(),
            actor: text(self.actor.clone()),
            kind: self.kind.unwrap_or(AuditKind::Unspecified).into(),
            since_unix: self.since.map(|since| since.unix(now)).unwrap_or_default(),
            limit: PAGE_ROWS,
            ..v1::ListAuditRequest::default()
        }
    }
}

/// Does one verb.
pub(super) async fn run(verb: Verb, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    match verb {
        Verb::Show(args) => show(&args, client, screen).await,
        Verb::Export(args) => export::run(&args, client, screen).await,
        Verb::Verify { file, root } => verify::run(&file, root.as_deref(), screen),
        Verb::Prune(args) => prune::run(&args, client, screen).await,
    }
}

async fn show(args: &Show, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let request = args.request(screen.now());
    let (records, newest) = newest_records(&mut admin, request.clone(), args.limit).await?;
    if !args.follow {
        return Ok(screen.show(&RecordList { records })?);
    }
    for record in records {
        screen.entry(&record)?;
    }
    follow(admin, v1::ListAuditRequest { cursor: newest, ..request }, screen).await
}

/// The newest records that fit, oldest first, and the index of the newest there was.
async fn newest_records(
    admin: &mut AdminServiceClient<Channel>,
    request: v1::ListAuditRequest,
    limit: u32,
) -> Result<(Vec<RecordView>, u64), Failure> {
    let (mut records, mut newest) = (Vec::new(), None);
    let mut left = limit;
    let mut request = v1::ListAuditRequest { newest_first: true, ..request };
    loop {
        request.limit = left.min(PAGE_ROWS);
        let page = admin.list_audit(request.clone()).await?.into_inner();
        newest.get_or_insert(page.newest_index);
        left = left.saturating_sub(u32::try_from(page.records.len()).unwrap_or(u32::MAX));
        for stored in &page.records {
            records.push(RecordView::of_answer(stored)?);
        }
        if left == 0 || !page.more {
            records.reverse();
            return Ok((records, newest.unwrap_or_default()));
        }
        // The log is finite, and each page ends below the one before.
        if request.cursor != 0 && page.next >= request.cursor {
            return Err(does_not_end());
        }
        request.cursor = page.next;
    }
}

async fn follow(
    mut admin: AdminServiceClient<Channel>,
    request: v1::ListAuditRequest,
    screen: &mut Screen,
) -> Result<(), Failure> {
    let mut request = v1::ListAuditRequest { wait_seconds: WAIT_SECONDS, ..request };
    loop {
        let page = admin.list_audit(request.clone()).await?.into_inner();
        for stored in &page.records {
            screen.entry(&RecordView::of_answer(stored)?)?;
        }
        request.cursor = page.next;
    }
}

fn does_not_end() -> Failure {
    Failure::Failed("the CA's answer does not go on where its last one ended".to_owned())
}

#[derive(Debug, Serialize)]
struct RecordList {
    records: Vec<RecordView>,
}

impl View for RecordList {
    fn text(&self, now: OffsetDateTime) -> String {
        if self.records.is_empty() {
            return "no records\n".to_owned();
        }
        self.records.iter().map(|record| record.text(now)).collect()
    }
}

/// A moment as an operator types it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Since {
    Ago(i64),
    At(i64),
}

impl Since {
    fn unix(self, now: OffsetDateTime) -> i64 {
        match self {
            Self::Ago(seconds) => now.unix_timestamp() - seconds,
            Self::At(unix) => unix,
        }
    }
}

fn since(text: &str) -> Result<Since, String> {
    let midnight = format!("{text}T00:00:00Z");
    for moment in [text, midnight.as_str()] {
        if let Ok(at) = OffsetDateTime::parse(moment, &Rfc3339) {
            return Ok(Since::At(at.unix_timestamp()));
        }
    }
    duration::parse(text)
        .map(|length| Since::Ago(length.as_i64()))
        .map_err(|e| format!("{e}; or a date, or a moment such as 2026-01-31T12:00:00Z"))
}

fn kind(text: &str) -> Result<AuditKind, String> {
    kind_of(text).ok_or_else(|| format!("known kinds are {}", kind_words().join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_length_back_a_date_or_rfc_3339() {
        let now = raymtls_proto::clock::from_unix(1_764_000_000).unwrap();
        for (text, unix) in [
            ("2h", 1_764_000_000 - 7_200),
            ("2025-11-24", 1_763_942_400),
            ("2025-11-24T16:00:00Z", 1_764_000_000),
            ("2025-11-24T17:00:00+01:00", 1_764_000_000),
        ] {
            assert_eq!(since(text).unwrap().unix(now), unix, "{text}");
        }
        for text in ["", "yesterday", "2025-13-01", "12"] {
            assert!(since(text).unwrap_err().contains("a date"), "{text:?}");
        }
    }

    #[test]
    fn a_kind_nobody_writes_is_refused_with_those_there_are() {
        assert_eq!(kind("node-revoked"), Ok(AuditKind::NodeRevoked));
        let known = kind("node_revoked").unwrap_err();
        assert!(known.contains("leaf-issued") && !known.contains("unspecified"), "{known}");
    }
}
