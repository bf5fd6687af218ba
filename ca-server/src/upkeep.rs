//! What the CA does by itself: the next issuer in time, CRLs in time and after each revocation, its
//! own TLS certificate. One pass looks at everything and is a function of the clock, so that tests
//! move time and not their patience.

use std::sync::Arc;

use time::Duration;
use tracing::{error, info};

use crate::{
    ca::{Ca, CaError},
    keys::{
        authority::{self, LiveAuthority},
        crl,
        profile::AGENT_IDENTITY_LIFE,
    },
    refusal::Refusal,
    store::{Authority, Revocations},
};

/// How often a pass is made.
pub const EVERY: std::time::Duration = std::time::Duration::from_secs(60);

/// One pass over all authorities. A fault in one does not keep the others waiting.
pub async fn pass(ca: &Ca) {
    for (authority, live) in ca.authorities() {
        if let Err(error) = tend(ca, &authority, &live).await {
            error!(authority = authority.cluster(), %error, "upkeep failed; tried again in a minute");
        }
    }
}

/// Tends one authority, one at a time: issuer first, since its CRL is wanted too. What the caller saw
/// of the authority may be old by the time it is its turn and is read again.
///
/// # Errors
/// The store, or a key that cannot be unwrapped.
pub async fn tend(
    ca: &Ca,
    authority: &Authority,
    _seen: &Arc<LiveAuthority>,
) -> Result<(), CaError> {
    let _turn = ca.upkeep.lock().await;
    if ca.has_ended(authority).await? {
        return Ok(());
    }
    let mut live = ca.authority(authority).map_err(into_store)?;
    if renew_issuer(ca, authority, &live).await? {
        live = ca.authority(authority).map_err(into_store)?;
    }
    renew_crls(ca, authority, &live).await
}

async fn renew_issuer(
    ca: &Ca,
    authority: &Authority,
    live: &LiveAuthority,
) -> Result<bool, CaError> {
    let now = ca.clock.now();
    let (root, leaf_life) = match authority {
        Authority::Control => {
            let record = ca.store.control().await?.ok_or(CaError::NotInitialized)?;
            (record.root, AGENT_IDENTITY_LIFE)
        }
        Authority::Cluster(cluster) => {
            let record = ca.store.cluster(cluster.clone()).await?;
            let life = Duration::seconds(record.settings().leaf_life_seconds);
            (record.root, life)
        }
    };
    if !authority::issuer_is_due(live.active().not_after(), leaf_life, now) {
        return Ok(false);
    }
    let root = root.ok_or(CaError::NotInitialized)?;
    let issuer = authority::create_issuer(&ca.kek, authority, &root, now, leaf_life)?;
    ca.store.add_issuer(now, authority.clone(), issuer).await?;
    ca.load_authority(authority).await?;
    info!(authority = authority.cluster(), "the next issuer signs from now on");
    Ok(true)
}

async fn renew_crls(ca: &Ca, authority: &Authority, live: &LiveAuthority) -> Result<(), CaError> {
    let now = ca.clock.now();
    let in_place = ca.store.crls(authority.clone()).await?;
    let revocations: Revocations = ca.store.revocations(now, authority.clone()).await?;
    if !crl::is_due(in_place.as_ref(), revocations.count, live, now) {
        return Ok(());
    }
    let root = if crl::root_is_due(in_place.as_ref(), now) {
        let record = match authority {
            Authority::Control => ca.store.control().await?.and_then(|record| record.root),
            Authority::Cluster(cluster) => ca.store.cluster(cluster.clone()).await?.root,
        };
        let record = record.ok_or(CaError::NotInitialized)?;
        Some(authority::unwrap_root(&ca.kek, authority, &record)?)
    } else {
        None
    };
    let set = crl::sign(in_place.as_ref(), live, root.as_ref(), &revocations, now)?;
    info!(authority = authority.cluster(), number = set.number, "CRLs signed");
    ca.store.put_crls(now, authority.clone(), set).await?;
    ca.load_authority(authority).await
}

fn into_store(refusal: Refusal) -> CaError {
    CaError::Store(refusal.into())
}
