//! Reading the audit log, its checkpoints, and pruning it; it is written by the decisions themselves,
//! but for a key that leaves.

use raymtls_proto::v1::{AuditKind, AuditRecord, Checkpoint};

use super::event;
use crate::{
    refusal::Refusal,
    store::{
        AuditAsk, AuditPage, AuditState, Authority, PAGE_ROWS_MAX, PrunePlan, StoreError, layout,
        records::AuditHead,
        view::{View, audit_hash, decode, empty_audit_head},
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
/// Records removed in one decision.
const PRUNED_AT_ONCE: usize = 2_000;

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
    let mut walk = Walk::new(ask, newest_index, first_index(view)?);
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

/// Index of the oldest record.
///
/// # Errors
/// The record of the pruning does not decode.
pub fn first_index(view: &View<'_>) -> Result<u64, StoreError> {
    let pruned: Option<Checkpoint> = view.get(layout::PRUNED)?;
    Ok(pruned.map_or(1, |pruned| pruned.index))
}

/// The end of the log that whoever reads it in order begins behind: nothing, or what was pruned.
///
/// # Errors
/// The record of the pruning does not decode, or the oldest record is not the one it names.
pub fn beginning(view: &View<'_>) -> Result<AuditHead, StoreError> {
    let Some(pruned) = view.get::<Checkpoint>(layout::PRUNED)? else {
        return Ok(empty_audit_head());
    };
    let value = view.get_raw(&layout::audit(pruned.index))?;
    let value = value.ok_or_else(|| missing(pruned.index))?;
    let record: AuditRecord = decode(&layout::audit(pruned.index), &value)?;
    if audit_hash(&value)[..] != pruned.hash {
        let key = format!("audit record {}", pruned.index);
        let why = "it is not the one the log was pruned up to".to_owned();
        return Err(StoreError::Damaged { key, why });
    }
    Ok(AuditHead { index: pruned.index - 1, hash: record.previous_hash })
}

/// Where the log begins and ends.
///
/// # Errors
/// A record does not decode.
pub fn state(view: &View<'_>) -> Result<AuditState, StoreError> {
    let head = view.get(layout::AUDIT_HEAD)?.unwrap_or_else(empty_audit_head);
    Ok(AuditState {
        newest_index: head.index,
        newest_hash: head.hash,
        first_index: first_index(view)?,
        checkpoint: view.get(layout::CHECKPOINT)?,
    })
}

/// The hash of a record.
///
/// # Errors
/// The medium cannot be read.
pub fn hash_at(view: &View<'_>, index: u64) -> Result<Option<Vec<u8>>, StoreError> {
    Ok(view.get_raw(&layout::audit(index))?.map(|value| audit_hash(&value).to_vec()))
}

/// Puts a checkpoint in place, if it is newer than the last and the log has what it names.
///
/// # Errors
/// The log has another record there.
pub fn put_checkpoint(view: &mut View<'_>, checkpoint: &Checkpoint) -> Result<(), StoreError> {
    check_named(view, checkpoint)?;
    let last: Option<Checkpoint> = view.get(layout::CHECKPOINT)?;
    let newer = |last: &Checkpoint| {
        checkpoint.index > last.index
            || (checkpoint.epoch != last.epoch && checkpoint.index == last.index)
    };
    if last.as_ref().is_none_or(newer) {
        view.put(layout::CHECKPOINT.to_vec(), checkpoint);
    }
    Ok(())
}

/// Which records go if all before a moment do, but for the newest of them: an agent that saw the log at
/// that moment or since holds a checkpoint of what stays.
///
/// # Errors
/// A record does not decode, or is missing.
pub fn plan_prune(view: &View<'_>, before_ms: i64) -> Result<PrunePlan, StoreError> {
    let state = state(view)?;
    // The log is in order of time, but for a clock that was put back: then less goes.
    let (mut low, mut high) = (state.first_index, state.newest_index);
    while low < high {
        let middle = high - (high - low) / 2;
        let value = view.get_raw(&layout::audit(middle))?.ok_or_else(|| missing(middle))?;
        let record: AuditRecord = decode(&layout::audit(middle), &value)?;
        if record.at_ms < before_ms { low = middle } else { high = middle - 1 }
    }
    let hash = hash_at(view, low)?.ok_or_else(|| missing(low))?;
    Ok(PrunePlan { first_index: state.first_index, keep_from: low, hash })
}

/// Removes records before the one the checkpoint names, some at once. Returns whether more are left.
///
/// # Errors
/// The log has another record there.
pub fn prune(
    view: &mut View<'_>,
    actor: &str,
    checkpoint: &Checkpoint,
) -> Result<bool, StoreError> {
    check_named(view, checkpoint)?;
    let first = first_index(view)?;
    if checkpoint.index > first {
        view.audit(AuditRecord {
            detail: format!("records {first} to {}", checkpoint.index - 1),
            ..event(actor, AuditKind::LogPruned, "", "")
        });
        view.put(layout::PRUNED.to_vec(), checkpoint);
    }
    // What a crash left of an earlier pruning goes too.
    let rows = view.scan_raw(layout::AUDIT, None, PRUNED_AT_ONCE)?;
    let (end, count) = (layout::audit(checkpoint.index), rows.len());
    let old: Vec<_> = rows.into_iter().map(|(key, _)| key).filter(|key| *key < end).collect();
    let more = old.len() == count;
    old.into_iter().for_each(|key| view.delete(key));
    Ok(more)
}

fn check_named(view: &View<'_>, checkpoint: &Checkpoint) -> Result<(), StoreError> {
    match hash_at(view, checkpoint.index)? {
        Some(hash) if hash == checkpoint.hash => Ok(()),
        Some(_) | None => Err(missing(checkpoint.index)),
    }
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
    first_index: u64,
    newest_index: u64,
    newest_first: bool,
    /// Oldest on: the last index passed. Newest back: the same, or one more than the newest.
    at: u64,
}

impl Walk {
    fn new(ask: &AuditAsk, newest_index: u64, first_index: u64) -> Self {
        let beginning = if ask.newest_first { newest_index + 1 } else { first_index - 1 };
        let at = if ask.cursor == 0 { beginning } else { ask.cursor.min(newest_index + 1) };
        // A cursor from before a pruning: what was behind it is gone.
        let at = at.max(first_index - 1);
        Self { first_index, newest_index, newest_first: ask.newest_first, at }
    }

    fn goes_on(&self) -> bool {
        if self.newest_first { self.at > self.first_index } else { self.at < self.newest_index }
    }

    /// First and last index of what is read next.
    fn chunk(&self) -> (u64, u64) {
        if self.newest_first {
            (self.at.saturating_sub(CHUNK).max(self.first_index), self.at - 1)
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
        self.at = if self.newest_first { self.first_index } else { self.newest_index };
    }

    fn page(&self, records: Vec<Vec<u8>>) -> AuditPage {
        let Self { newest_index, first_index, .. } = *self;
        // A cursor of zero is the beginning: an empty log has none to go on from, which is the same.
        AuditPage { records, next: self.at, more: self.goes_on(), newest_index, first_index }
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
