//! Reading the audit log; it is written by the decisions themselves.

use crate::store::{PAGE_ROWS_MAX, StoreError, layout, records::AuditRecord, view::View};

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
