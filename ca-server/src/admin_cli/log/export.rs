//! Writing the audit log to a file: a first line that says what it is, a line for each record with the
//! bytes that were stored, and a last line that says where it ends, so that a cut is seen. Each line is
//! JSON and follows from what it stands for: a line with one byte changed is another line.

use std::{io::Write as _, path::PathBuf};

use clap::Args;
use raymtls_proto::{
    durable::{Access, Growing},
    v1::{self, AuditRecord},
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

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
pub(super) const VERSION: u32 = 1;

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
    let mut admin = client.connect().await?;
    let mut file = Growing::begin(&args.out, Access::PRIVATE).map_err(unwritten)?;
    let mut end = End { end_after_records: 0, last: args.after, last_sha256: String::new() };
    let mut newest = None;
    loop {
        let request = v1::ListAuditRequest {
            cursor: end.last,
            limit: PAGE_ROWS,
            ..v1::ListAuditRequest::default()
        };
        let page = admin.list_audit(request).await?.into_inner();
        // What is written while we read is for the next export.
        let newest = *newest.get_or_insert(page.newest_index);
        if newest < args.after {
            let text = format!("--after {}: the log ends at {newest}", args.after);
            return Err(Failure::Usage(text));
        }
        for stored in &page.records {
            let record = decoded(stored)?;
            if record.index > newest {
                break;
            }
            if end.end_after_records == 0 {
                let head = head(record.index, hex::encode(&record.previous_hash));
                write(&mut file, &json_line(&head)?)?;
            }
            write(&mut file, &record_line(&record, stored)?)?;
            end.last = record.index;
            end.last_sha256 = hex::encode(raymtls_proto::digest::sha256(stored));
            end.end_after_records += 1;
        }
        if end.last >= newest {
            break;
        }
        if page.records.is_empty() {
            return Err(does_not_end());
        }
    }
    if end.end_after_records == 0 {
        write(&mut file, &json_line(&head(args.after + 1, String::new()))?)?;
    }
    write(&mut file, &json_line(&end)?)?;
    file.finish().map_err(unwritten)?;
    let out = args.out.display().to_string();
    Ok(screen.show(&Exported { out, first: args.after + 1, end })?)
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
    #[serde(flatten)]
    end: End,
}

impl View for Exported {
    fn text(&self, _now: OffsetDateTime) -> String {
        let End { end_after_records, last, last_sha256 } = &self.end;
        if *end_after_records == 0 {
            return format!("{}: no records since {last}\n", self.out);
        }
        format!(
            "{}: records {} to {last}, last hash {last_sha256}\nnote the last hash elsewhere, check \
             with `ca-admin log verify`, go on with --after {last}\n",
            self.out, self.first
        )
    }
}
