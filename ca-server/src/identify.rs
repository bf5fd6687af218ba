//! What follows from judging a caller, whichever verb of the store judged it.

use raymtls_proto::reason::Reason;
use time::OffsetDateTime;
use tracing::warn;

use crate::{
    ca::Ca,
    refusal::Refusal,
    store::{Caller, StoreError},
};

/// Notes the contact of a caller that passed, and tells the log of one that should not exist.
///
/// # Errors
/// The verb's own.
pub fn judged<T>(
    ca: &Ca,
    caller: &Caller,
    now: OffsetDateTime,
    verdict: Result<T, StoreError>,
) -> Result<T, StoreError> {
    match &verdict {
        Ok(_) => ca.contacts.note(caller, now),
        Err(StoreError::Refused(Refusal::IdentityReused)) => {
            warn!(
                cluster = %caller.cluster, node = %caller.node, serial = %caller.serial,
                source = ?caller.source, reason = Reason::IdentityReused.as_str(),
                "a retired identity was used again: restored from a copy, or stolen"
            );
        }
        Err(_) => {}
    }
    verdict
}
