//! A Ray leaf for a subset of what is bound to the caller's node.

use raymtls_proto::v1;
use time::{Duration, OffsetDateTime};
use tracing::info;

use crate::{
    ca::Ca,
    enroll,
    failpoint::{self, Point},
    identify::{admit, judged},
    keys::{csr::Csr, profile::Contents, random},
    limits::NodeCall,
    refusal::Refusal,
    sign_failed,
    store::{Authority, Caller, LeafAsk, LeafKind, LeafPlan, StoreError},
};

/// Answers one `IssueLeaf`.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn issue(
    ca: &Ca,
    caller: Caller,
    request: v1::IssueLeafRequest,
) -> Result<v1::IssueLeafResponse, StoreError> {
    let now = ca.clock.now();
    admit(ca, &caller, NodeCall::Certificate).await?;
    let csr = Csr::verify(request.csr_der)?;
    let kind = kind(request.purpose)?;
    let ask = LeafAsk {
        kind,
        addresses: enroll::addresses(&request.addresses)?,
        dns_names: enroll::dns_names(&request.dns_names)?,
        key_hash: csr.key_hash(),
    };
    let plan = ca.store.plan_leaf(now, caller.clone(), ask.clone()).await;
    let plan = judged(ca, &caller, now, plan)?;
    let authority = Authority::Cluster(caller.cluster.clone());
    let issuer = ca.authority(&authority)?;
    let contents = contents(ca, &caller, &ask, &plan, now);
    let signed = issuer.active().sign(&contents, csr.spki_der(), now).map_err(sign_failed)?;
    failpoint::hit(Point::AfterSign);
    let leaf = ca.chain(&authority, signed.certificate_der.clone(), &signed.issuer_key_id)?;
    let serial = signed.serial;
    ca.store.record_leaf(now, caller.clone(), ask, plan, signed).await?;
    ca.metrics.issued(match kind {
        LeafKind::Node => "ray_node",
        LeafKind::Driver => "ray_driver",
    });
    info!(cluster = %caller.cluster, node = %caller.node, %serial, "leaf issued");
    failpoint::hit(Point::BeforeReply);
    Ok(v1::IssueLeafResponse {
        leaf: Some(leaf),
        bundle: Some(ca.bundle(&caller.cluster)?),
        server_time_unix: now.unix_timestamp(),
    })
}

fn kind(purpose: i32) -> Result<LeafKind, Refusal> {
    match v1::LeafPurpose::try_from(purpose) {
        Ok(v1::LeafPurpose::Node) => Ok(LeafKind::Node),
        Ok(v1::LeafPurpose::Driver) => Ok(LeafKind::Driver),
        Ok(v1::LeafPurpose::Unspecified) | Err(_) => {
            Err(Refusal::RequestInvalid("a purpose is wanted: node or driver".to_owned()))
        }
    }
}

fn contents(
    ca: &Ca,
    caller: &Caller,
    ask: &LeafAsk,
    plan: &LeafPlan,
    now: OffsetDateTime,
) -> Contents {
    let subject = (&ca.trust_domain, &caller.cluster, &caller.node);
    let life = Duration::milliseconds(plan.life_ms);
    let serial = random::serial(now);
    let mut contents = match ask.kind {
        LeafKind::Node => {
            Contents::ray_node(serial, now, life, subject, &plan.addresses, &plan.dns_names)
        }
        LeafKind::Driver => Contents::ray_driver(serial, now, life, subject, &plan.addresses),
    };
    let ends = plan.ends_ms.and_then(|ends| raymtls_proto::clock::from_unix(ends / 1_000));
    if let Some(ends) = ends {
        contents.not_after = contents.not_after.min(ends);
    }
    contents
}
