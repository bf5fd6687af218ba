//! Making, revoking and listing tokens. Spending one is `enroll`.

use raymtls_proto::{identity::ClusterId, token::TokenId};

use super::{cluster, page};
use crate::{
    refusal::Refusal,
    store::{
        Page, StoreError, layout,
        records::{AuditKind, AuditRecord, TokenRecord},
        view::View,
    },
    token::check_secret,
};

/// Puts a token on record.
///
/// # Errors
/// No such cluster, or it has ended.
pub fn create(view: &mut View<'_>, token: &TokenRecord) -> Result<(), StoreError> {
    let cluster = view
        .get(&layout::cluster(&token.cluster))?
        .ok_or_else(|| Refusal::NotFound { what: "cluster", name: token.cluster.clone() })?;
    super::check_not_ended(view, &cluster)?;
    let key = layout::token(&token.id);
    if view.get_raw(&key)?.is_some() {
        return Err(Refusal::AlreadyExists { what: "token", name: token.id.clone() }.into());
    }
    view.put(key, token);
    view.put_raw(layout::cluster_token(&token.cluster, &token.id), Vec::new());
    view.audit(event(&token.created_by, AuditKind::TokenCreated, token));
    Ok(())
}

/// Whether there is a token of this id and secret.
///
/// # Errors
/// `TokenUnknown`.
pub fn check(view: &View<'_>, id: &TokenId, secret_hash: &[u8; 32]) -> Result<(), StoreError> {
    check_secret(view.get(&layout::token(id.as_str()))?, secret_hash)?;
    Ok(())
}

/// Revokes a token; revoking it again changes nothing.
///
/// # Errors
/// No such token.
pub fn revoke(
    view: &mut View<'_>,
    actor: &str,
    cluster: &ClusterId,
    id: &TokenId,
) -> Result<TokenRecord, StoreError> {
    let key = layout::token(id.as_str());
    let mut token: TokenRecord = view
        .get(&key)?
        .filter(|token: &TokenRecord| token.cluster == cluster.as_str())
        .ok_or_else(|| Refusal::NotFound { what: "token", name: id.to_string() })?;
    if token.revoked_ms == 0 {
        token.revoked_ms = view.now_ms();
        view.put(key, &token);
        view.audit(event(actor, AuditKind::TokenRevoked, &token));
    }
    Ok(token)
}

/// Tokens of a cluster.
///
/// # Errors
/// No such cluster, or a cursor that is not one of ours.
pub fn list(
    view: &View<'_>,
    cluster: &ClusterId,
    cursor: &str,
) -> Result<Page<TokenRecord>, StoreError> {
    cluster::get(view, cluster)?;
    let prefix = layout::cluster_tokens(cluster.as_str());
    let (keys, next) = page(view, &prefix, cursor)?;
    let id = |key: &[u8]| String::from_utf8_lossy(&key[prefix.len()..]).into_owned();
    let rows = keys
        .iter()
        .filter_map(|(key, _)| view.get(&layout::token(&id(key))).transpose())
        .collect::<Result<_, _>>()?;
    Ok(Page { rows, next })
}

fn event(actor: &str, kind: AuditKind, token: &TokenRecord) -> AuditRecord {
    AuditRecord { token_id: token.id.clone(), ..super::event(actor, kind, &token.cluster, "") }
}
