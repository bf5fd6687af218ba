//! Removing old records of the audit log: says first which, and what they can be verified by afterwards.

use clap::Args;
use raymtls_proto::v1;
use serde::Serialize;
use time::OffsetDateTime;

use super::{Since, since};
use crate::admin_cli::{
    client::Client,
    consent::Consent,
    failure::Failure,
    output::{Screen, View},
};

#[derive(Debug, Args)]
pub(in crate::admin_cli) struct Prune {
    /// Records older than this go: a length of time back (365d), a date, or RFC 3339; 31 days at least.
    #[arg(long, value_name = "TIME", value_parser = since)]
    before: Since,

    /// Say what would go, remove nothing.
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    consent: Consent,
}

pub(super) async fn run(args: &Prune, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let before_unix = args.before.unix(screen.now());
    let asked = v1::PruneAuditRequest { before_unix, dry_run: true };
    let planned = admin.prune_audit(asked).await?.into_inner();
    if args.dry_run || planned.removed == 0 {
        return Ok(screen.show(&Pruned::new(&planned, true))?);
    }
    let plan = format!(
        "{} records of the audit log, up to {}, will be removed for good: they are left in exports and \
         backups alone",
        planned.removed,
        planned.first_index - 1
    );
    args.consent.ask(&[plan], screen).await?;
    let asked = v1::PruneAuditRequest { before_unix, dry_run: false };
    let done = admin.prune_audit(asked).await?.into_inner();
    Ok(screen.show(&Pruned::new(&done, false))?)
}

#[derive(Debug, Serialize)]
struct Pruned {
    dry_run: bool,
    removed: u64,
    first: u64,
    first_sha256: String,
}

impl Pruned {
    fn new(answer: &v1::PruneAuditResponse, dry_run: bool) -> Self {
        let hash = answer.checkpoint.as_ref().map(|checkpoint| hex::encode(&checkpoint.hash));
        Self {
            dry_run,
            removed: answer.removed,
            first: answer.first_index,
            first_sha256: hash.unwrap_or_default(),
        }
    }
}

impl View for Pruned {
    fn text(&self, _now: OffsetDateTime) -> String {
        let Self { removed, first, first_sha256, .. } = self;
        let would = if self.dry_run { "would be " } else { "" };
        format!(
            "{removed} records {would}removed; the log begins at record {first}, hash {first_sha256}, \
             with a signed checkpoint of it\n"
        )
    }
}
