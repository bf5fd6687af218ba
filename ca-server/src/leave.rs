//! A node goes away by its own word.

use tracing::info;

use crate::{
    ca::Ca,
    identify::{admit, judged},
    limits::NodeCall,
    store::{Caller, StoreError},
};

/// Answers one `Leave`.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn leave(ca: &Ca, caller: Caller) -> Result<(), StoreError> {
    let now = ca.clock.now();
    admit(ca, &caller, NodeCall::Leave).await?;
    let node = ca.store.identify(now, caller.clone()).await;
    judged(ca, &caller, now, node)?;
    ca.store.leave(now, caller.clone()).await?;
    ca.contacts.gone(&caller);
    info!(cluster = %caller.cluster, node = %caller.node, "node left");
    Ok(())
}
