//! Who calls: the first thing every call on the node listener asks.

use raymtls_proto::reason::Reason;
use time::OffsetDateTime;
use tracing::warn;

use crate::{
    ca::Ca,
    refusal::Refusal,
    store::{Caller, Identified, StoreError, records::NodeRecord},
};

/// Judges the identity of a connection, once for each call: a connection outlives a revocation.
///
/// # Errors
/// Unknown, retired, revoked, left.
pub async fn identify(
    ca: &Ca,
    caller: &Caller,
    now: OffsetDateTime,
) -> Result<NodeRecord, StoreError> {
    match ca.store.identify(now, caller.clone()).await? {
        Identified::Node(node) => {
            ca.contacts.note(caller, now);
            Ok(*node)
        }
        Identified::Reused => {
            warn!(
                cluster = %caller.cluster, node = %caller.node, serial = %caller.serial,
                source = ?caller.source, reason = Reason::IdentityReused.as_str(),
                "a retired identity was used again: restored from a copy, or stolen"
            );
            Err(Refusal::IdentityReused.into())
        }
    }
}
