//! Checking an export with nothing but the file: each line must be the one its record makes, each
//! record must carry the hash of the one before it, and the last line must say where the file ends.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read as _},
    path::Path,
};

use prost::Message as _;
use raymtls_proto::{bundle, checkpoint, digest::sha256, v1::AuditRecord};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::export::{End, FORMAT, Head, VERSION, Vouched, record_line};
use crate::admin_cli::{
    failure::Failure,
    output::{Screen, View, json_line, printable},
};

/// Longest line, in bytes.
const LINE_LEN_MAX: u64 = 8 * 1024 * 1024;
/// Faults that are told one by one.
const FAULTS_TOLD: usize = 100;

/// The oldest version that is read: without checkpoints.
const VERSION_MIN: u32 = 1;
/// Longest file with a control root, in bytes.
const ROOT_LEN_MAX: u64 = 64 * 1024;

pub(super) fn run(path: &Path, root: Option<&Path>, screen: &mut Screen) -> Result<(), Failure> {
    let unread = |path: &Path, e: io::Error| Failure::Failed(format!("{}: {e}", path.display()));
    let roots = root.map(|root| roots(root).map_err(|e| unread(root, e))).transpose()?;
    let file = File::open(path).map_err(|e| unread(path, e))?;
    let mut report = check(BufReader::new(file), roots.as_deref()).map_err(|e| unread(path, e))?;
    if roots.is_some() && report.checkpoint == 0 && report.records > 0 && report.faults_total == 0 {
        report.fault(report.last, "no signed checkpoint vouches for any record of the file");
    }
    let faults = report.faults_total;
    screen.show(&report)?;
    if faults == 0 {
        return Ok(());
    }
    Err(Failure::Failed(format!("{}: the export does not hold: {faults} faults", path.display())))
}

/// The roots of a PEM file, which may be a join file.
fn roots(path: &Path) -> io::Result<Vec<Vec<u8>>> {
    let mut pem = Vec::new();
    File::open(path)?.take(ROOT_LEN_MAX).read_to_end(&mut pem)?;
    let roots = bundle::certificates_from_pem(&pem).map_err(io::Error::other)?;
    if roots.is_empty() {
        return Err(io::Error::other("no certificate in it: the control root in PEM is wanted"));
    }
    Ok(roots.into_iter().map(|der| der.to_vec()).collect())
}

/// What an export is worth.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// The newest record that a signed checkpoint vouches for; zero for none.
    checkpoint: u64,
    /// SHA-256 of the control root it was signed under.
    checkpoint_root_sha256: String,
    records: u64,
    first: u64,
    last: u64,
    last_sha256: String,
    faults: Vec<Fault>,
    faults_total: u64,
}

#[derive(Debug, Serialize)]
struct Fault {
    /// Record concerned.
    index: u64,
    what: String,
}

impl View for Report {
    fn text(&self, _now: OffsetDateTime) -> String {
        let mut text = String::new();
        for Fault { index, what } in &self.faults {
            text.push_str(&format!("record {index}: {}\n", printable(what)));
        }
        let left_out = self.faults_total - u64::try_from(self.faults.len()).unwrap_or(0);
        if left_out > 0 {
            text.push_str(&format!("and {left_out} more\n"));
        }
        let Self { records, first, last, last_sha256, .. } = self;
        let signed = if self.checkpoint == 0 {
            "no signed checkpoint in it\n".to_owned()
        } else {
            format!(
                "signed checkpoint of record {}, under control root {}\n",
                self.checkpoint, self.checkpoint_root_sha256
            )
        };
        text + &match (self.faults_total, records) {
            (0, 0) => format!("holds: no records from {first} on\n"),
            (0, _) => {
                format!(
                    "holds: {records} records, {first} to {last}, last hash {last_sha256}\n{signed}"
                )
            }
            (faults, _) => format!("{records} records read, {faults} faults\n"),
        }
    }
}

impl Report {
    fn fault(&mut self, index: u64, what: impl Into<String>) {
        self.faults_total += 1;
        if self.faults.len() < FAULTS_TOLD {
            self.faults.push(Fault { index, what: what.into() });
        }
    }
}

/// What of a record's line is taken as given.
#[derive(Debug, Deserialize)]
struct Given {
    stored: String,
}

struct Check<'a> {
    report: Report,
    /// The control roots that count; any where none are named.
    roots: Option<&'a [Vec<u8>]>,
    checkpoint_seen: bool,
    /// Index of the record that must come.
    next: u64,
    /// The hash it must carry, where it is known.
    previous: Option<Vec<u8>>,
    ended: bool,
}

fn check(mut lines: impl BufRead, roots: Option<&[Vec<u8>]>) -> io::Result<Report> {
    let Some(first) = next_line(&mut lines)? else {
        return Ok(no_export("the file is empty"));
    };
    let head = serde_json::from_slice::<Head>(&first).ok();
    let Some(head) = head.filter(|head| head.format == FORMAT) else {
        return Ok(no_export("the first line is not that of an exported audit log"));
    };
    if !(VERSION_MIN..=VERSION).contains(&head.version) {
        let text = format!("version {} of the export: this program reads {VERSION}", head.version);
        return Ok(no_export(&text));
    }
    let mut check = Check::new(&head, roots);
    if json_line(&head)?.as_bytes() != first {
        check.report.fault(head.first, "the first line was changed");
    }
    let mut number = 1_u64;
    while let Some(line) = next_line(&mut lines)? {
        number += 1;
        check.line(number, &line)?;
    }
    Ok(check.finish())
}

fn no_export(why: &str) -> Report {
    let mut report = Report::default();
    report.fault(0, why);
    report
}

/// The next line with what ends it; `None` at the end of the file.
fn next_line(lines: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    lines.by_ref().take(LINE_LEN_MAX).read_until(b'\n', &mut line)?;
    Ok((!line.is_empty()).then_some(line))
}

impl<'a> Check<'a> {
    fn new(head: &Head, roots: Option<&'a [Vec<u8>]>) -> Self {
        let report =
            Report { first: head.first, last: head.first.saturating_sub(1), ..Report::default() };
        // An export without records carries no hash.
        let previous = (!head.previous_sha256.is_empty())
            .then(|| hex::decode(&head.previous_sha256).unwrap_or_default());
        let next = head.first;
        Self { report, roots, checkpoint_seen: false, next, previous, ended: false }
    }

    fn line(&mut self, number: u64, line: &[u8]) -> io::Result<()> {
        if self.ended {
            self.report.fault(self.next, format!("line {number} stands behind the end"));
            return Ok(());
        }
        if let Ok(end) = serde_json::from_slice::<End>(line) {
            return self.end(&end, line);
        }
        if let Ok(vouched) = serde_json::from_slice::<Vouched>(line) {
            return self.vouched(&vouched, line);
        }
        let given = serde_json::from_slice::<Given>(line).ok();
        let stored = given.and_then(|given| hex::decode(given.stored).ok());
        let record = stored.as_ref().and_then(|stored| AuditRecord::decode(&stored[..]).ok());
        let (Some(stored), Some(record)) = (stored, record) else {
            self.report.fault(self.next, format!("line {number} was changed: it is no record"));
            (self.next, self.previous) = (self.next.saturating_add(1), None);
            return Ok(());
        };
        self.record(&record, &stored, line)
    }

    fn record(&mut self, record: &AuditRecord, stored: &[u8], line: &[u8]) -> io::Result<()> {
        let index = record.index;
        if self.checkpoint_seen {
            self.report.fault(index, "it stands behind the checkpoint of the last record");
        }
        if index > self.next {
            let gap = format!("missing, and every one up to {}", index - 1);
            self.report.fault(self.next, gap);
        } else if index < self.next {
            self.report.fault(self.next, format!("record {index} stands in its place"));
        }
        if record_line(record, stored)?.as_bytes() != line {
            self.report.fault(index, "changed: its line says something else than its stored bytes");
        }
        if self.previous.as_ref().is_some_and(|hash| *hash != record.previous_hash) {
            self.report.fault(index, "it was not written after the record that stands before it");
        }
        self.report.records += 1;
        self.report.last = index;
        self.report.last_sha256 = hex::encode(sha256(stored));
        self.next = index.saturating_add(1);
        self.previous = Some(sha256(stored).to_vec());
        Ok(())
    }

    /// A checkpoint stands behind the last record and names it.
    fn vouched(&mut self, vouched: &Vouched, line: &[u8]) -> io::Result<()> {
        let at = self.report.last;
        let read = vouched.read();
        // As it would be written: hexadecimal digits read in either case.
        let written = read.as_ref().map(|(one, root)| json_line(&Vouched::new(one, root)));
        let is_same = written.transpose()?.is_some_and(|written| written.as_bytes() == line);
        let again = std::mem::replace(&mut self.checkpoint_seen, true);
        let Some((checkpoint, root_der)) = read.filter(|_| is_same && !again) else {
            self.report.fault(at, "the line of the checkpoint was changed, or is not the only one");
            return Ok(());
        };
        if self.roots.is_some_and(|roots| !roots.contains(&root_der)) {
            self.report
                .fault(at, "the checkpoint was signed under another control root than yours");
        }
        if let Err(why) = checkpoint::check(&checkpoint, [root_der.as_slice()]) {
            self.report.fault(at, why.to_string());
        }
        if checkpoint.index != at || vouched.sha256 != self.report.last_sha256 {
            self.report
                .fault(at, "the checkpoint was signed for another record than the last one here");
        }
        self.report.checkpoint = checkpoint.index;
        self.report.checkpoint_root_sha256 = hex::encode(sha256(&root_der));
        Ok(())
    }

    fn end(&mut self, end: &End, line: &[u8]) -> io::Result<()> {
        self.ended = true;
        let seen = End {
            end_after_records: self.report.records,
            last: self.report.last,
            last_sha256: self.report.last_sha256.clone(),
        };
        if *end != seen {
            let text = format!(
                "the last line tells of {} records up to {}: the file is not the one it ended",
                end.end_after_records, end.last
            );
            self.report.fault(self.report.last, text);
        } else if json_line(end)?.as_bytes() != line {
            self.report.fault(self.report.last, "the last line was changed");
        }
        Ok(())
    }

    fn finish(mut self) -> Report {
        if !self.ended {
            let text = "the file is cut off here: its last line is missing";
            self.report.fault(self.next, text);
        }
        self.report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An export of `count` records behind `after`.
    fn export(after: u64, count: u64) -> Vec<String> {
        export_under(after, count, &mut |_| None)
    }

    /// The same with a checkpoint of the last record.
    fn vouched_export(count: u64) -> (Vec<String>, Vec<u8>) {
        use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SigningKey as _};
        let params = || {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params
        };
        let (root_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let root_der = params().self_signed(&root_key).unwrap().der().to_vec();
        let above = Issuer::new(params(), &root_key);
        let issuer_der = params().signed_by(&key, &above).unwrap().der().to_vec();
        let lines = export_under(0, count, &mut |hash| {
            let mut one = raymtls_proto::v1::Checkpoint {
                epoch: 7,
                index: count,
                hash,
                at_ms: 1,
                signature: Vec::new(),
                issuer_der: issuer_der.clone(),
            };
            one.signature = key.sign(&checkpoint::signed_bytes(&one)).unwrap();
            Some(json_line(&Vouched::new(&one, &root_der)).unwrap())
        });
        (lines, root_der)
    }

    fn export_under(
        after: u64,
        count: u64,
        vouched: &mut dyn FnMut(Vec<u8>) -> Option<String>,
    ) -> Vec<String> {
        let mut hash = vec![u8::try_from(after).unwrap(); 32];
        let head = Head {
            format: FORMAT.to_owned(),
            version: VERSION,
            first: after + 1,
            previous_sha256: hex::encode(&hash),
        };
        let mut lines = vec![json_line(&head).unwrap()];
        for index in after + 1..=after + count {
            let record = AuditRecord {
                index,
                previous_hash: hash,
                at_ms: 1_764_000_000_123,
                actor: "uid:0".to_owned(),
                kind: 12,
                cluster: "c1".to_owned(),
                node: "n\u{e9}\u{202e}".to_owned(),
                detail: "why \"so\"\n".to_owned(),
                ..AuditRecord::default()
            };
            let stored = record.encode_to_vec();
            lines.push(record_line(&record, &stored).unwrap());
            hash = sha256(&stored).to_vec();
        }
        lines.extend(vouched(hash.clone()));
        let end =
            End { end_after_records: count, last: after + count, last_sha256: hex::encode(hash) };
        lines.push(json_line(&end).unwrap());
        lines
    }

    fn faults(file: &[u8]) -> Vec<(u64, String)> {
        let report = check(file, None).unwrap();
        report.faults.into_iter().map(|fault| (fault.index, fault.what)).collect()
    }

    #[test]
    fn a_whole_export_holds_wherever_it_begins() {
        for after in [0, 41] {
            let file = export(after, 3).concat();
            let report = check(file.as_bytes(), None).unwrap();
            assert_eq!(report.faults_total, 0, "{:?}", report.faults);
            assert_eq!((report.records, report.first, report.last), (3, after + 1, after + 3));
            assert!(file.contains(&format!("\"last_sha256\":\"{}\"", report.last_sha256)));
        }
    }

    #[test]
    fn a_checkpoint_vouches_for_the_last_record_under_the_root_that_is_named() {
        let (lines, root_der) = vouched_export(3);
        let (other, _) = vouched_export(3);
        let report = |lines: &[String], root: &Vec<u8>| {
            check(lines.concat().as_bytes(), Some(std::slice::from_ref(root))).unwrap()
        };
        let good = report(&lines, &root_der);
        assert_eq!((good.faults_total, good.checkpoint), (0, 3), "{:?}", good.faults);
        let mut spliced = lines.clone();
        spliced[4].clone_from(&other[4]);
        let found = report(&spliced, &root_der).faults;
        assert!(found[0].what.contains("another control root"), "{found:?}");
        // A shorter log with the checkpoint of the longer one.
        let short = [&export(0, 2)[..3], &lines[4..5], &export(0, 2)[3..]].concat();
        let found = report(&short, &root_der).faults;
        assert!(found[0].what.contains("another record"), "{found:?}");
        let twice = [&lines[..5], &lines[4..]].concat();
        assert_eq!(report(&twice, &root_der).faults_total, 1);
    }

    #[test]
    fn every_changed_byte_of_an_export_is_found() {
        let file = vouched_export(3).0.concat().into_bytes();
        for at in 0..file.len() {
            for flip in [0x01, 0x20, 0x80, 0xff] {
                let mut changed = file.clone();
                changed[at] ^= flip;
                assert!(!faults(&changed).is_empty(), "byte {at} ^ {flip:02x} passed");
            }
        }
    }

    #[test]
    fn every_cut_of_an_export_is_found() {
        let file = export(0, 3).concat().into_bytes();
        for len in 0..file.len() {
            assert!(!faults(&file[..len]).is_empty(), "the first {len} bytes passed");
        }
        let lines = export(0, 3);
        let found = faults(lines[..3].concat().as_bytes());
        assert_eq!(found, [(3, "the file is cut off here: its last line is missing".to_owned())]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_index() {
        let lines = export(0, 5);
        let without = |gone: usize| {
            let mut lines = lines.clone();
            lines.remove(gone);
            lines.concat()
        };
        let changed = lines.concat().replacen("\"detail\":\"why", "\"detail\":\"who", 1);
        let swapped = [&lines[..2], &[lines[3].clone(), lines[2].clone()], &lines[4..]].concat();
        let behind = lines.concat() + &lines[2];
        for (what, file, index, says) in [
            ("a gap", without(3), 3, "missing, and every one up to 3"),
            ("a changed word", changed, 1, "its line says something else"),
            ("two swapped", swapped.concat(), 2, "missing"),
            ("no first line", without(0), 0, "first line"),
            ("no last line", without(6), 6, "cut off"),
            ("something behind the end", behind, 6, "line 8 stands behind the end"),
            ("another program's file", "{}\n".to_owned(), 0, "first line"),
        ] {
            let found = faults(file.as_bytes());
            assert!(found[0].0 == index && found[0].1.contains(says), "{what}: {found:?}");
        }
        // Whoever changes a record and its line breaks the chain behind it.
        let other = export(7, 2)[1].replace("\"index\":8", "\"index\":1");
        let spliced = [&lines[..1], &[other], &lines[2..]].concat().concat();
        assert!(!faults(spliced.as_bytes()).is_empty());
    }

    #[test]
    fn faults_are_counted_beyond_those_that_are_told() {
        let lines = export(0, 1);
        let file = lines[0].clone() + &"x\n".repeat(FAULTS_TOLD + 20);
        let report = check(file.as_bytes(), None).unwrap();
        assert_eq!(report.faults.len(), FAULTS_TOLD);
        assert_eq!(report.faults_total, u64::try_from(FAULTS_TOLD).unwrap() + 21);
        assert!(report.text(OffsetDateTime::UNIX_EPOCH).contains("and 21 more"));
    }
}
