//! Reading the audit log; it is written by the decisions themselves, but for a key that leaves.

use raymtls_proto::v1::{AuditKind, AuditRecord};

use super::event;
use crate::{
    refusal::Refusal,
    store::{
        AuditAsk, AuditPage, Authority, PAGE_ROWS_MAX, StoreError, layout,
        view::{View, decode},
    },
};

/// Records looked at for one page.
const SCAN_MAX: u64 = 4_096;
/// Records read at once.
const CHUNK: u64 = 512;
/// Records of one page.
const ROWS_MAX: usize = 1_000;
/// A page is full once its records have this many bytes.
const PAGE_BYTES: usize = 1024 * 1024;

/// Up to `limit` records after an index.
///
/// # Errors
/// A record does not decode.
pub fn list(view: &View<'_>, after: u64, limit: usize) -> Result<Vec<AuditRecord>, StoreError> {
    let rows = view.scan::<AuditRecord>(
        layout::AUDIT,
        Some(&layout::audit(after)),
        limit.min(PAGE_ROWS_MAX),
    )?;
    Ok(rows.into_iter().map(|(_, record)| record).collect())
}

/// A page of those records up to `newest_index` that fit what is asked.
///
/// # Errors
/// A record does not decode, or is missing.
pub fn page(view: &View<'_>, ask: &AuditAsk, newest_index: u64) -> Result<AuditPage, StoreError> {
    let mut walk = Walk::new(ask, newest_index);
    let limit = ask.limit.clamp(1, ROWS_MAX);
    let (mut records, mut bytes) = (Vec::new(), 0);
    let mut looked = 0;
    while looked < SCAN_MAX && walk.goes_on() {
        let (first, last) = walk.chunk();
        let rows = read(view, first, last)?;
        let mut all_older = true;
        for (index, value) in walk.in_order(rows) {
            let record: AuditRecord = decode(&layout::audit(index), &value)?;
            walk.passed(index);
            looked += 1;
            all_older &= ask.since_ms.is_some_and(|since| record.at_ms < since);
            if fits(ask, &record) {
                bytes += value.len();
                records.push(value);
                if records.len() >= limit || bytes >= PAGE_BYTES {
                    return Ok(walk.page(records));
                }
            }
        }
        if ask.newest_first && all_older {
            // The log is in order of time, but for a clock that was put back: a whole chunk of older
            // ones is where it ends.
            walk.end();
        }
    }
    Ok(walk.page(records))
}

/// Puts on record that keys are about to leave.
///
/// # Errors
/// No such authority.
pub fn note_key_export(
    view: &mut View<'_>,
    actor: &str,
    authority: &Authority,
    detail: String,
) -> Result<(), StoreError> {
    match authority {
        Authority::Control => drop(super::cluster::control(view)?.ok_or(Refusal::Internal)?),
        Authority::Cluster(cluster) => drop(super::cluster::get(view, cluster)?),
    }
    view.audit(AuditRecord {
        detail,
        ..event(actor, AuditKind::KeysExported, authority.cluster(), "")
    });
    Ok(())
}

/// Where a walk through the log stands.
struct Walk {
    newest_index: u64,
    newest_first: bool,
    /// Oldest on: the last index passed. Newest back: the same, or one more than the newest.
    at: u64,
}

impl Walk {
    fn new(ask: &AuditAsk, newest_index: u64) -> Self {
        let beginning = if ask.newest_first { newest_index + 1 } else { 0 };
        let at = if ask.cursor == 0 { beginning } else { ask.cursor.min(newest_index + 1) };
        Self { newest_index, newest_first: ask.newest_first, at }
    }

    fn goes_on(&self) -> bool {
        if self.newest_first { self.at > 1 } else { self.at < self.newest_index }
    }

    /// First and last index of what is read next.
    fn chunk(&self) -> (u64, u64) {
        if self.newest_first {
            (self.at.saturating_sub(CHUNK).max(1), self.at - 1)
        } else {
            (self.at + 1, (self.at + CHUNK).min(self.newest_index))
        }
    }

    fn in_order(&self, mut rows: Vec<(u64, Vec<u8>)>) -> Vec<(u64, Vec<u8>)> {
        if self.newest_first {
            rows.reverse();
        }
        rows
    }

    fn passed(&mut self, index: u64) {
        self.at = index;
    }

    fn end(&mut self) {
        self.at = if self.newest_first { 1 } else { self.newest_index };
    }

    fn page(&self, records: Vec<Vec<u8>>) -> AuditPage {
        let newest_index = self.newest_index;
        // A cursor of zero is the beginning: an empty log has none to go on from, which is the same.
        AuditPage { records, next: self.at, more: self.goes_on(), newest_index }
    }
}

/// The records from one index to another, none left out.
fn read(view: &View<'_>, first: u64, last: u64) -> Result<Vec<(u64, Vec<u8>)>, StoreError> {
    let count = usize::try_from(last + 1 - first).unwrap_or(usize::MAX);
    let rows = view.scan_raw(layout::AUDIT, Some(&layout::audit(first - 1)), count)?;
    let indexed: Vec<_> = (first..=last).zip(rows).collect();
    for (index, (key, _)) in &indexed {
        if *key != layout::audit(*index) {
            return Err(missing(*index));
        }
    }
    if indexed.len() < count {
        return Err(missing(first + u64::try_from(indexed.len()).unwrap_or(0)));
    }
    Ok(indexed.into_iter().map(|(index, (_, value))| (index, value)).collect())
}

fn missing(index: u64) -> StoreError {
    let key = format!("audit record {index}");
    StoreError::Damaged { key, why: "it is missing".to_owned() }
}

fn fits(ask: &AuditAsk, record: &AuditRecord) -> bool {
    let is = |asked: &Option<String>, value: &String| asked.as_ref().is_none_or(|a| a == value);
    is(&ask.cluster, &record.cluster)
        && is(&ask.node, &record.node)
        && is(&ask.actor, &record.actor)
        && ask.serial.as_ref().is_none_or(|serial| *serial == record.serial)
        && ask.kind.is_none_or(|kind| i32::from(kind) == record.kind)
        && ask.since_ms.is_none_or(|since| record.at_ms >= since)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{
        memory::MemoryEngine,
        view::{Engine as _, Writes, empty_audit_head},
    };

    const RECORDS: u64 = 10_000;

    fn record(index: u64) -> AuditRecord {
        let of = |every: u64, name: &str| {
            if index.is_multiple_of(every) { name.to_owned() } else { "other".to_owned() }
        };
        AuditRecord {
            actor: of(3, "uid:0"),
            cluster: of(2, "c1"),
            node: of(4_999, "rare"),
            kind: i32::try_from(index % 5).unwrap() + 1,
            serial: vec![u8::try_from(index % 7).unwrap(); 16],
            ..AuditRecord::default()
        }
    }

    /// All pages put together, and how many there were.
    fn all(view: &View<'_>, ask: &AuditAsk, newest: u64) -> (Vec<u64>, usize) {
        let (mut found, mut pages) = (Vec::new(), 0);
        let mut ask = ask.clone();
        loop {
            let page = page(view, &ask, newest).unwrap();
            pages += 1;
            assert!(page.records.len() <= ask.limit.clamp(1, ROWS_MAX));
            let beginning = if ask.newest_first { newest + 1 } else { 0 };
            let from = if ask.cursor == 0 { beginning } else { ask.cursor };
            let cost = page.next.abs_diff(from);
            assert!(cost < SCAN_MAX + CHUNK || ask.since_ms.is_some(), "a page cost {cost}");
            for stored in page.records {
                found.push(decode::<AuditRecord>(b"", &stored).unwrap().index);
            }
            if !page.more {
                return (found, pages);
            }
            ask.cursor = page.next;
        }
    }

    #[test]
    fn pages_of_bounded_cost_come_to_exactly_what_is_asked_for() {
        let mut engine = MemoryEngine::new();
        let nothing = Writes::new();
        let mut view = View::new(&engine, &nothing, empty_audit_head(), 5_000, 0);
        (1..=RECORDS).for_each(|index| view.audit(record(index)));
        let writes = view.into_writes().0;
        engine.commit(&writes).unwrap();
        let view = View::new(&engine, &nothing, empty_audit_head(), 5_000, 0);
        let some = |text: &str| Some(text.to_owned());
        let asks = [
            (AuditAsk { limit: 1_000, ..AuditAsk::default() }, 1),
            (
                AuditAsk {
                    limit: 7,
                    cluster: some("c1"),
                    actor: some("uid:0"),
                    ..AuditAsk::default()
                },
                6,
            ),
            (AuditAsk { limit: 9, node: some("rare"), ..AuditAsk::default() }, 4_999),
            (AuditAsk { limit: 50, serial: Some(vec![0; 16]), ..AuditAsk::default() }, 7),
            (AuditAsk { limit: 0, node: some("nobody"), ..AuditAsk::default() }, RECORDS + 1),
        ];
        for (ask, every) in asks {
            let mut wanted: Vec<u64> = (1..=RECORDS).filter(|i| i.is_multiple_of(every)).collect();
            let (found, pages) = all(&view, &ask, RECORDS);
            assert_eq!(found, wanted, "{ask:?}");
            assert!(pages > 1, "{ask:?}");
            wanted.reverse();
            let back = AuditAsk { newest_first: true, ..ask };
            assert_eq!(all(&view, &back, RECORDS).0, wanted, "{back:?}");
        }
        let kind =
            AuditAsk { kind: Some(AuditKind::Initialized), limit: 1_000, ..AuditAsk::default() };
        assert_eq!(all(&view, &kind, RECORDS).0.len(), 2_000);
        // What is not durable yet is not told.
        assert_eq!(all(&view, &AuditAsk { limit: 1_000, ..AuditAsk::default() }, 10).0.len(), 10);
        let later = AuditAsk { since_ms: Some(5_001), newest_first: true, ..AuditAsk::default() };
        assert_eq!(all(&view, &later, RECORDS), (vec![], 1), "older ones are not looked through");
    }

    #[test]
    fn an_empty_log_and_one_with_a_hole_are_said_to_be_so() {
        let engine = MemoryEngine::new();
        let nothing = Writes::new();
        let mut view = View::new(&engine, &nothing, empty_audit_head(), 0, 0);
        for newest_first in [false, true] {
            let ask = AuditAsk { newest_first, ..AuditAsk::default() };
            let page = page(&view, &ask, 0).unwrap();
            assert!(page.records.is_empty() && !page.more, "{page:?}");
        }
        (1..=5).for_each(|index| view.audit(record(index)));
        view.delete(layout::audit(3));
        let ask = AuditAsk { limit: 9, ..AuditAsk::default() };
        let error = page(&view, &ask, 5).unwrap_err().to_string();
        assert!(error.contains("audit record 3") && error.contains("missing"), "{error}");
    }
}
