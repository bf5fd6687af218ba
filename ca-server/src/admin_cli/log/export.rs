//! Writing the audit log to a file: a first line that says what it is, a line for each record with the
//! bytes that were stored, one with the newest signed checkpoint of them, and a last line that says where
//! it ends, so that a cut is seen. Each line is JSON and follows from what it stands for: a line with one byte changed is another line.

use std::{io::Write as _, path::PathBuf, time::Duration};

use clap::Args;
use raymtls_proto::{
    digest::sha256,
    durable::{Access, Growing},
    v1::{self, AuditRecord, admin_service_client::AdminServiceClient},
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tonic::transport::Channel;

use super::{
    PAGE_ROWS, does_not_end,
    line::{RecordView, decoded},
};
use crate::admin_cli::{
    client::Client,
    failure::Failure,
    output::{Screen, View, json_line},
};

/// What the first line calls the file.
pub(super) const FORMAT: &str = "ray-mtls audit log";
/// Version of the lines.
pub(super) const VERSION: u32 = 2;
/// Times the CA is asked for a checkpoint that covers the last record, a second apart.
const CHECKPOINT_TRIES: u32 = 5;

#[derive(Debug, Args)]
pub(in crate::admin_cli) struct Export {
    /// File to write; it must not be there.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,

    /// Begin behind this record.
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    after: u64,
}

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    pub(super) format: String,
    pub(super) version: u32,
    /// Index of the first record.
    pub(super) first: u64,
    /// The hash that the first record carries; empty where the file has none.
    pub(super) previous_sha256: String,
}

/// A line between the first and the last.
#[derive(Debug, Serialize)]
struct Stored {
    #[serde(flatten)]
    says: RecordView,
    /// The record's bytes, in hexadecimal digits.
    stored: String,
}

/// The last line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct End {
    /// How many records the file has.
    pub(super) end_after_records: u64,
    /// Index of the last of them.
    pub(super) last: u64,
    /// Its hash; empty where the file has none.
    pub(super) last_sha256: String,
}

/// The line before the last: a signed checkpoint of one of the records. Binary parts are in hexadecimal
/// digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Vouched {
    /// Index of the record it names.
    pub(super) checkpoint_of: u64,
    pub(super) sha256: String,
    pub(super) at_ms: i64,
    pub(super) epoch: String,
    pub(super) signature: String,
    /// The control issuer's certificate.
    pub(super) issuer_der: String,
    /// The control root's, which signed that; whether it is the right one, the file cannot say.
    pub(super) root_der: String,
    /// SHA-256 of both: a signature does not cover every byte of its own encoding.
    pub(super) certificates_sha256: String,
}

impl Vouched {
    pub(super) fn new(checkpoint: &v1::Checkpoint, root_der: &[u8]) -> Self {
        Self {
            checkpoint_of: checkpoint.index,
            sha256: hex::encode(&checkpoint.hash),
            at_ms: checkpoint.at_ms,
            epoch: format!("{:016x}", checkpoint.epoch),
            signature: hex::encode(&checkpoint.signature),
            issuer_der: hex::encode(&checkpoint.issuer_der),
            root_der: hex::encode(root_der),
            certificates_sha256: hex::encode(sha256(
                &[checkpoint.issuer_der.as_slice(), root_der].concat(),
            )),
        }
    }

    /// The checkpoint and the root; `None` where a part does not read.
    pub(super) fn read(&self) -> Option<(v1::Checkpoint, Vec<u8>)> {
        let checkpoint = v1::Checkpoint {
            epoch: u64::from_str_radix(&self.epoch, 16).ok()?,
            index: self.checkpoint_of,
            hash: hex::decode(&self.sha256).ok()?,
            at_ms: self.at_ms,
            signature: hex::decode(&self.signature).ok()?,
            issuer_der: hex::decode(&self.issuer_der).ok()?,
        };
        Some((checkpoint, hex::decode(&self.root_der).ok()?))
    }
}

/// The line of a record.
pub(super) fn record_line(record: &AuditRecord, stored: &[u8]) -> std::io::Result<String> {
    let says = RecordView::new(record, stored);
    json_line(&Stored { says, stored: hex::encode(stored) })
}

pub(super) async fn run(
    args: &Export,
    client: &Client,
    screen: &mut Screen,
) -> Result<(), Failure> {
    let mut export = Exporting {
        admin: client.connect().await?,
        file: Growing::begin(&args.out, Access::PRIVATE).map_err(unwritten)?,
        end: End { end_after_records: 0, last: args.after, last_sha256: String::new() },
        first: args.after + 1,
    };
    let page = export.page().await?;
    // What is written while we read is for the next export, but for what a checkpoint covers.
    let newest = page.newest_index;
    if newest < args.after {
        let text = format!("--after {}: the log ends at {newest}", args.after);
        return Err(Failure::Usage(text));
    }
    export.up_to(newest, Some(page)).await?;
    if export.end.end_after_records == 0 {
        write(&mut export.file, &json_line(&head(args.after + 1, String::new()))?)?;
    } else if let Some(vouched) = export.vouched().await? {
        write(&mut export.file, &json_line(&vouched)?)?;
    }
    let Exporting { mut file, end, first, .. } = export;
    write(&mut file, &json_line(&end)?)?;
    file.finish().map_err(unwritten)?;
    let out = args.out.display().to_string();
    let pruned = (first > args.after + 1).then_some(args.after + 1);
    Ok(screen.show(&Exported { out, first, pruned, end })?)
}

/// An export in the making.
struct Exporting {
    admin: AdminServiceClient<Channel>,
    file: Growing,
    end: End,
    first: u64,
}

impl Exporting {
    async fn page(&mut self) -> Result<v1::ListAuditResponse, Failure> {
        let request = v1::ListAuditRequest {
            cursor: self.end.last,
            limit: PAGE_ROWS,
            ..v1::ListAuditRequest::default()
        };
        Ok(self.admin.list_audit(request).await?.into_inner())
    }

    /// Writes the records up to an index, which is there.
    async fn up_to(
        &mut self,
        last: u64,
        mut page: Option<v1::ListAuditResponse>,
    ) -> Result<(), Failure> {
        while self.end.last < last {
            let page = match page.take() {
                Some(page) => page,
                None => self.page().await?,
            };
            if page.records.is_empty() {
                return Err(does_not_end());
            }
            for stored in &page.records {
                let record = decoded(stored)?;
                if record.index > last {
                    return Ok(());
                }
                self.record(&record, stored)?;
            }
        }
        Ok(())
    }

    fn record(&mut self, record: &AuditRecord, stored: &[u8]) -> Result<(), Failure> {
        if self.end.end_after_records == 0 {
            self.first = record.index;
            let head = head(record.index, hex::encode(&record.previous_hash));
            write(&mut self.file, &json_line(&head)?)?;
        }
        write(&mut self.file, &record_line(record, stored)?)?;
        self.end.last = record.index;
        self.end.last_sha256 = hex::encode(sha256(stored));
        self.end.end_after_records += 1;
        Ok(())
    }

    /// The checkpoint of the last record. The CA signs one each second there is something new: it is
    /// waited for, and what it covers beyond what there was at first is written too.
    async fn vouched(&mut self) -> Result<Option<Vouched>, Failure> {
        for _ in 0..CHECKPOINT_TRIES {
            let page = self.page().await?;
            // A CA of an earlier release signs none.
            let Some(checkpoint) = page.checkpoint.clone() else { break };
            if checkpoint.index >= self.end.last {
                let vouched = Vouched::new(&checkpoint, &page.control_root_der);
                self.up_to(checkpoint.index, Some(page)).await?;
                return Ok(Some(vouched));
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Ok(None)
    }
}

fn head(first: u64, previous_sha256: String) -> Head {
    Head { format: FORMAT.to_owned(), version: VERSION, first, previous_sha256 }
}

fn write(file: &mut Growing, line: &str) -> Result<(), Failure> {
    file.write_all(line.as_bytes()).map_err(unwritten)
}

fn unwritten(error: std::io::Error) -> Failure {
    let next = if error.kind() == std::io::ErrorKind::AlreadyExists {
        "; an export never replaces a file: name another with --out"
    } else {
        ""
    };
    Failure::Failed(format!("the export was not written: {error}{next}"))
}

#[derive(Debug, Serialize)]
struct Exported {
    out: String,
    first: u64,
    /// Records from here to the first were pruned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pruned: Option<u64>,
    #[serde(flatten)]
    end: End,
}

impl View for Exported {
    fn text(&self, _now: OffsetDateTime) -> String {
        let End { end_after_records, last, last_sha256 } = &self.end;
        if *end_after_records == 0 {
            return format!("{}: no records since {last}\n", self.out);
        }
        let pruned = self.pruned.map_or_else(String::new, |from| {
            format!("records {from} to {} were pruned\n", self.first - 1)
        });
        format!(
            "{pruned}{}: records {} to {last}, last hash {last_sha256}\nnote the last hash elsewhere, check \
             with `ca-admin log verify`, go on with --after {last}\n",
            self.out, self.first
        )
    }
}
