//! Renewal: the next identity, for a new key. Idempotent on the current serial and the new key, so
//! that any number of lost replies ends in the same certificate.

use raymtls_proto::v1;
use tracing::info;

use crate::{
    ca::Ca,
    failpoint::{self, Point},
    identify::{admit, judged},
    keys::{csr::Csr, profile::Contents, random},
    limits::NodeCall,
    sign_failed,
    store::{Authority, Caller, RenewPlan, StoreError},
};

/// Answers one `RenewIdentity`.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn renew(
    ca: &Ca,
    caller: Caller,
    request: v1::RenewIdentityRequest,
) -> Result<v1::RenewIdentityResponse, StoreError> {
    let now = ca.clock.now();
    admit(ca, &caller, NodeCall::Certificate).await?;
    let csr = Csr::verify(request.csr_der)?;
    let plan = ca.store.plan_renew(now, caller.clone(), csr.key_hash()).await;
    let record = match judged(ca, &caller, now, plan)? {
        RenewPlan::Replay(record) => *record,
        RenewPlan::Issue => {
            let contents = Contents::agent_identity(
                random::serial(now),
                now,
                &ca.trust_domain,
                &caller.cluster,
                &caller.node,
            );
            let control = ca.authority(&Authority::Control)?;
            let signed =
                control.active().sign(&contents, csr.spki_der(), now).map_err(sign_failed)?;
            failpoint::hit(Point::AfterSign);
            let record = ca.store.renew(now, caller.clone(), signed).await?;
            ca.metrics.issued("agent_identity");
            info!(cluster = %caller.cluster, node = %caller.node, "identity renewed");
            record
        }
    };
    failpoint::hit(Point::BeforeReply);
    Ok(v1::RenewIdentityResponse {
        identity: Some(ca.identity_chain(record)?),
        server_time_unix: now.unix_timestamp(),
    })
}
