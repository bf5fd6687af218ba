//! How often a caller may call, by whether its identity is in force; and what follows from judging
//! it, whichever verb of the store did.

use raymtls_proto::reason::Reason;
use time::OffsetDateTime;
use tracing::warn;

use crate::{
    ca::Ca,
    limits::NodeCall,
    refusal::Refusal,
    store::{Caller, StoreError},
};

/// Lets a caller ask, before anything it asks for costs much. An identity in force spends of its
/// node's share; any other has a share of its own, so that whoever holds a node's old identity is
/// heard, put on record and refused, and takes nothing from the node.
///
/// # Errors
/// `RateLimited`, or the store's failure.
pub async fn admit(ca: &Ca, caller: &Caller, call: NodeCall) -> Result<(), StoreError> {
    let elapsed = ca.clock.elapsed();
    if ca.store.is_in_force(caller.clone()).await? {
        ca.limiter.node_call(elapsed, call, caller)?;
    } else {
        ca.limiter.stray(elapsed, caller)?;
    }
    Ok(())
}

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
            let reason = Reason::IdentityReused.as_str();
            if let Some(left_out) =
                ca.quiet.tell(ca.clock.elapsed(), "judged", &caller.actor(), reason)
            {
                warn!(
                    cluster = %caller.cluster, node = %caller.node, serial = %caller.serial,
                    source = ?caller.source, reason, left_out,
                    "a retired identity was used again: restored from a copy, or stolen"
                );
            }
        }
        Err(_) => {}
    }
    verdict
}
