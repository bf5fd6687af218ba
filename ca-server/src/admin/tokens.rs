//! Bootstrap tokens: making, listing, revoking.

use raymtls_proto::{
    address::AddressRange,
    identity::{ClusterId, DnsName, NodeName, Role},
    v1,
};
use secrecy::ExposeSecret;
use tracing::info;

use super::{Operator, clusters, convert, revocation};
use crate::{
    ca::Ca,
    keys::random,
    policy::NAMES_MAX,
    refusal::Refusal,
    settings,
    store::{
        Authority, NODES_REVOKED_MAX, Reach, Revoking, StoreError,
        records::{NodeRecord, NodeStatus, TokenRecord},
        unix_ms,
    },
};

/// Longest life of a token.
const TTL_SECONDS_MAX: i64 = 30 * 86_400;
/// Life of a token where none is asked for.
const TTL_SECONDS_DEFAULT: i64 = 3_600;
/// Most uses of a token.
const USES_MAX: u32 = 100_000;

/// Makes a token. The reply is the only place its secret ever appears.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn create(
    ca: &Ca,
    operator: &Operator,
    request: v1::CreateTokenRequest,
) -> Result<v1::CreateTokenResponse, StoreError> {
    operator.require(v1::AdminRole::Operator, Some(&request.cluster))?;
    let now = ca.clock.now();
    let cluster = clusters::id(&request.cluster)?;
    let control = ca.authority(&Authority::Control)?;
    let token = random::token();
    let record = TokenRecord {
        id: token.id().to_string(),
        secret_hash: token.secret_hash().to_vec(),
        created_ms: unix_ms(now),
        created_by: operator.actor.clone(),
        cluster: cluster.to_string(),
        ..wanted(request, unix_ms(now))?
    };
    ca.store.create_token(now, record.clone()).await?;
    info!(%cluster, token = %token.id(), actor = operator.actor, "token created");
    Ok(v1::CreateTokenResponse {
        token: Some(convert::token(record, now)),
        bootstrap_token: token.expose().expose_secret().to_owned(),
        trust_domain: ca.trust_domain.to_string(),
        control_roots_der: vec![control.root_der.clone()],
        enrollment_endpoints: ca.endpoints.enrollment.clone(),
        node_endpoints: ca.endpoints.nodes.clone(),
    })
}

/// What a join file of the cluster holds besides a credential.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn join(
    ca: &Ca,
    operator: &Operator,
    cluster: &str,
) -> Result<v1::GetJoinResponse, StoreError> {
    operator.require(v1::AdminRole::Viewer, Some(cluster))?;
    let record = ca.store.cluster(clusters::id(cluster)?).await?;
    Ok(v1::GetJoinResponse {
        cluster: record.cluster,
        trust_domain: ca.trust_domain.to_string(),
        control_roots_der: vec![ca.authority(&Authority::Control)?.root_der.clone()],
        enrollment_endpoints: ca.endpoints.enrollment.clone(),
        node_endpoints: ca.endpoints.nodes.clone(),
    })
}

/// Tokens of a cluster.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn list(
    ca: &Ca,
    operator: &Operator,
    request: v1::ListTokensRequest,
) -> Result<v1::ListTokensResponse, StoreError> {
    operator.require(v1::AdminRole::Viewer, Some(&request.cluster))?;
    let now = ca.clock.now();
    let page = ca.store.tokens(clusters::id(&request.cluster)?, request.page).await?;
    Ok(v1::ListTokensResponse {
        tokens: page.rows.into_iter().map(|token| convert::token(token, now)).collect(),
        next_page: page.next,
    })
}

/// Revokes a token: no use is spent from here on.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn revoke(
    ca: &Ca,
    operator: &Operator,
    request: v1::RevokeTokenRequest,
) -> Result<v1::Token, StoreError> {
    operator.require(v1::AdminRole::Operator, Some(&request.cluster))?;
    let now = ca.clock.now();
    let cluster = clusters::id(&request.cluster)?;
    let id = request
        .id
        .parse()
        .map_err(|_| Refusal::RequestInvalid("a token's id is 16 hexadecimal digits".to_owned()))?;
    let token = ca.store.revoke_token(now, operator.actor.clone(), cluster, id).await?;
    info!(token = request.id, actor = operator.actor, "token revoked");
    Ok(convert::token(token, now))
}

/// Revokes a token with the nodes that enrolled with it, a part of them at a time: where one part fails,
/// the answer says what was revoked before it, and the same call goes on with the rest.
///
/// # Errors
/// A refusal, or the store's failure before any node was revoked.
pub async fn revoke_with_nodes(
    ca: &Ca,
    operator: &Operator,
    request: v1::RevokeTokenNodesRequest,
) -> Result<v1::RevokeTokenNodesResponse, StoreError> {
    let v1::RevokeTokenNodesRequest { cluster, id, reason } = request;
    let reason = revocation::reason(&reason)?;
    let now = ca.clock.now();
    // First of all: nobody enrols with it while its nodes are gone through.
    let asked = v1::RevokeTokenRequest { cluster: cluster.clone(), id: id.clone() };
    let token = Some(revoke(ca, operator, asked).await?);
    let cluster = clusters::id(&cluster)?;
    let mut nodes = Vec::new();
    let ended = revoke_nodes(ca, operator, &cluster, &id, &reason, &mut nodes).await;
    if nodes.is_empty() {
        return ended.map(|()| v1::RevokeTokenNodesResponse { token, ..Default::default() });
    }
    let stopped_by = ended.err().map(|error| error.to_string()).unwrap_or_default();
    let change = Some(revocation::newest_change(ca, &cluster, now).await?);
    let notes = revocation::sign_crls(ca, &[Authority::Control, Authority::Cluster(cluster)]).await;
    Ok(v1::RevokeTokenNodesResponse { token, nodes, change, notes, stopped_by })
}

/// Revokes every node that enrolled with a token, also those that enrolled again with another since,
/// and names them as it goes.
async fn revoke_nodes(
    ca: &Ca,
    operator: &Operator,
    cluster: &ClusterId,
    token_id: &str,
    reason: &str,
    revoked: &mut Vec<String>,
) -> Result<(), StoreError> {
    let mut page = String::new();
    loop {
        let nodes = ca.store.nodes(cluster.clone(), page).await?;
        let names: Vec<NodeName> = nodes
            .rows
            .iter()
            .filter(|node| is_of(node, token_id))
            .map(|node| node.name.parse().map_err(|_| Refusal::Internal))
            .collect::<Result<_, _>>()?;
        for names in names.chunks(NODES_REVOKED_MAX) {
            let (now, actor) = (ca.clock.now(), operator.actor.clone());
            let revoking = Revoking {
                reason: reason.to_owned(),
                keep_token: false,
                reach: Reach { all_traffic: false, ca: ca.endpoints.addresses() },
            };
            let part = ca.store.revoke_nodes(now, actor, cluster.clone(), names.to_vec(), revoking);
            for node in part.await? {
                info!(node = node.name, token = token_id, actor = operator.actor, "node revoked");
                revoked.push(node.name);
            }
        }
        if nodes.next.is_empty() {
            return Ok(());
        }
        page = nodes.next;
    }
}

fn is_of(node: &NodeRecord, token_id: &str) -> bool {
    let enrolled_with_it =
        node.token_id == token_id || node.earlier_token_ids.iter().any(|id| id == token_id);
    enrolled_with_it && node.node_status() != NodeStatus::Revoked
}

/// What a request wants of a token, checked.
fn wanted(request: v1::CreateTokenRequest, now_ms: i64) -> Result<TokenRecord, Refusal> {
    let invalid = |text: String| Refusal::RequestInvalid(text);
    let role = Role::from_proto(request.role)
        .ok_or_else(|| invalid("a role is wanted: head, worker or driver".to_owned()))?;
    let ttl = if request.ttl_seconds == 0 { TTL_SECONDS_DEFAULT } else { request.ttl_seconds };
    if !(1..=TTL_SECONDS_MAX).contains(&ttl) {
        return Err(invalid(format!("a token lives from 1 s to {TTL_SECONDS_MAX} s (30 days)")));
    }
    let uses = request.uses.max(1);
    if uses > USES_MAX {
        return Err(invalid(format!("a token has at most {USES_MAX} uses")));
    }
    let exact = |names: &[String]| matches!(names, [name] if !name.ends_with('*'));
    if request.replace && (uses > 1 || !exact(&request.node_names) || request.generate_names) {
        let text = "a replacing token has one use and one exact node name";
        return Err(invalid(text.to_owned()));
    }
    for list in [&request.node_names, &request.address_ranges, &request.dns_names] {
        if list.len() > NAMES_MAX {
            return Err(invalid(format!("at most {NAMES_MAX} names or ranges of a kind")));
        }
    }
    request.node_names.iter().try_for_each(|pattern| check_pattern(pattern))?;
    let address_ranges = request
        .address_ranges
        .iter()
        .map(|range| range.parse::<AddressRange>().map(|range| range.to_string()))
        .collect::<Result<_, _>>()
        .map_err(|e| Refusal::AddressNotAllowed(format!("{e}")))?;
    for name in &request.dns_names {
        name.parse::<DnsName>().map_err(|e| Refusal::NameNotAllowed(format!("{e}")))?;
    }
    Ok(TokenRecord {
        role: role.to_proto().into(),
        expires_ms: now_ms + ttl * 1_000,
        uses,
        // Several machines cannot share a name: the CA tells them apart by their keys.
        generate_names: request.generate_names || (uses > 1 && request.node_names.is_empty()),
        node_names: request.node_names,
        address_ranges,
        any_address: request.any_address,
        dns_names: request.dns_names,
        replace: request.replace,
        shared_address: request.shared_address,
        ..TokenRecord::default()
    })
}

/// A name, or a beginning of one with a `*` after it.
///
/// # Errors
/// `NameNotAllowed`.
pub fn check_pattern(pattern: &str) -> Result<(), Refusal> {
    let name = match pattern.strip_suffix('*') {
        Some("") => return Ok(()),
        // The beginning may end in a hyphen.
        Some(beginning) => format!("{beginning}0"),
        None => pattern.to_owned(),
    };
    name.parse::<NodeName>().map(drop).map_err(|_| {
        let text = format!("{:?} is no node name or pattern", settings::excerpt(pattern));
        Refusal::NameNotAllowed(text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::CreateTokenRequest {
        v1::CreateTokenRequest {
            role: v1::Role::Worker.into(),
            ..v1::CreateTokenRequest::default()
        }
    }

    #[test]
    fn a_token_has_bounds_and_safe_defaults() {
        let token = wanted(request(), 0).unwrap();
        assert_eq!((token.uses, token.expires_ms), (1, TTL_SECONDS_DEFAULT * 1_000));
        assert!(!token.any_address && !token.generate_names);
        assert!(wanted(v1::CreateTokenRequest { uses: 2, ..request() }, 0).unwrap().generate_names);
        let bad = [
            v1::CreateTokenRequest { role: 0, ..request() },
            v1::CreateTokenRequest { ttl_seconds: -1, ..request() },
            v1::CreateTokenRequest { ttl_seconds: TTL_SECONDS_MAX + 1, ..request() },
            v1::CreateTokenRequest { uses: USES_MAX + 1, ..request() },
            v1::CreateTokenRequest { replace: true, ..request() },
            v1::CreateTokenRequest {
                replace: true,
                node_names: vec!["w*".to_owned()],
                ..request()
            },
            v1::CreateTokenRequest { node_names: vec!["A".to_owned()], ..request() },
            v1::CreateTokenRequest { node_names: vec!["a*b".to_owned()], ..request() },
            v1::CreateTokenRequest { address_ranges: vec!["10.0.0.0/99".to_owned()], ..request() },
            v1::CreateTokenRequest { dns_names: vec!["*.ray".to_owned()], ..request() },
        ];
        for request in bad {
            assert!(wanted(request.clone(), 0).is_err(), "{request:?}");
        }
    }
}
