//! Enrolment: who may have which name and addresses, and the commit that spends a token's use.

use raymtls_proto::{
    address::NodeAddress,
    identity::{NodeName, Role},
    v1,
};

use super::{address, check_key_use, check_not_ended, cluster, event, member, put_certificate};
use crate::{
    policy,
    refusal::Refusal,
    store::{
        Binding, EnrollAsk, EnrollPlan, Enrolled, Signed, StoreError, layout,
        records::{
            AddressRecord, AuditKind, AuditRecord, BlockRecord, CertificateRecord, IdentityRecord,
            LeafKeyRecord, NodeRecord, NodeStatus, TokenRecord, UseRecord,
        },
        view::View,
    },
    token::{self, Verdict},
};

/// Judges an enrolment. Changes nothing.
///
/// # Errors
/// The refusals of `token` and `policy`; name or address held by another live node; address blocked;
/// cluster over; node revoked.
pub fn plan(view: &View<'_>, ask: &EnrollAsk) -> Result<EnrollPlan, StoreError> {
    let token = token::check_secret(recorded(view, ask)?, &ask.secret_hash)?;
    let spent: Option<UseRecord> =
        view.get(&layout::token_use(ask.token.as_str(), &ask.key_hash))?;
    match token::judge(&token, spent.as_ref(), ask, view.now_ms())? {
        Verdict::Repeat => replay(view, ask, &token, spent.unwrap_or_default()),
        Verdict::Spend => {
            check_not_ended(view, &cluster::get(view, &ask.cluster)?)?;
            let binding = policy::binding(&token, ask)?;
            let kind = v1::CertificateKind::AgentIdentity;
            check_key_use(view, &ask.key_hash, kind, &token.cluster, binding.name.as_str())?;
            check_name(view, &token, ask, &binding.name)?;
            for &address in &binding.addresses {
                check_address(view, &token, ask, &binding.name, address)?;
            }
            Ok(EnrollPlan::Issue(binding))
        }
    }
}

/// The token's record; of one that somebody else vouches for, the one it comes with.
fn recorded(view: &View<'_>, ask: &EnrollAsk) -> Result<Option<TokenRecord>, StoreError> {
    let record = view.get(&layout::token(ask.token.as_str()))?;
    Ok(record.or_else(|| ask.vouched.as_deref().cloned()))
}

/// Spends the use, binds the node and records the identity.
///
/// # Errors
/// As [`plan`]; the binding is not the one that was signed.
pub fn enroll(
    view: &mut View<'_>,
    ask: &EnrollAsk,
    binding: &Binding,
    identity: &Signed,
) -> Result<Enrolled, StoreError> {
    match plan(view, ask)? {
        EnrollPlan::Replay(enrolled) => return Ok(*enrolled),
        EnrollPlan::Issue(planned) if planned != *binding => {
            return Err(Refusal::RaceLost("what is bound to the node").into());
        }
        EnrollPlan::Issue(_) => {}
    }
    spend(view, ask, &binding.name, identity)?;
    let cluster = ask.cluster.as_str();
    let before: Option<NodeRecord> = view.get(&layout::node(cluster, binding.name.as_str()))?;
    if let Some(before) = &before {
        address::release_all(view, before)?;
    }
    let mut node = node_record(view, ask, binding, identity, before);
    address::take_all(view, &mut node, &format!("token:{}", ask.token))?;
    member::tell(view, &mut node)?;
    view.put(layout::node(cluster, binding.name.as_str()), &node);
    let identity = put_certificate(
        view,
        v1::CertificateKind::AgentIdentity,
        &ask.cluster,
        binding.name.as_str(),
        identity,
    )?;
    view.audit(AuditRecord {
        serial: identity.serial.clone(),
        token_id: ask.token.to_string(),
        detail: format!("role {}, addresses {}", ask.role, joined(&binding.addresses)),
        ..event(&format!("token:{}", ask.token), AuditKind::Enrolled, cluster, &node.name)
    });
    let settings = cluster::get(view, &ask.cluster)?.settings().clone();
    Ok(Enrolled { settings, node, identity })
}

/// The same key spent this token before: the same answer, unless something came after it.
fn replay(
    view: &View<'_>,
    ask: &EnrollAsk,
    token: &TokenRecord,
    spent: UseRecord,
) -> Result<EnrollPlan, StoreError> {
    let superseded = || StoreError::from(Refusal::TokenSpent(token.uses));
    let node: NodeRecord =
        view.get(&layout::node(ask.cluster.as_str(), &spent.node))?.ok_or_else(superseded)?;
    match node.node_status() {
        NodeStatus::Live => {}
        NodeStatus::Revoked => return Err(revoked(&node).into()),
        NodeStatus::Left | NodeStatus::Unspecified => return Err(superseded()),
    }
    if node.current().serial != spent.serial || node.pending.is_some() {
        return Err(superseded());
    }
    let identity: CertificateRecord =
        view.get(&layout::certificate(&spent.serial))?.ok_or(Refusal::Internal)?;
    let settings = cluster::get(view, &ask.cluster)?.settings().clone();
    Ok(EnrollPlan::Replay(Box::new(Enrolled { settings, node, identity })))
}

fn check_name(
    view: &View<'_>,
    token: &TokenRecord,
    ask: &EnrollAsk,
    name: &NodeName,
) -> Result<(), StoreError> {
    let Some(node) = view.get::<NodeRecord>(&layout::node(ask.cluster.as_str(), name.as_str()))?
    else {
        return Ok(());
    };
    let may_replace = token.replace && token.node_names == [name.as_str()];
    let same_key = node.current().key_hash == ask.key_hash;
    match node.node_status() {
        NodeStatus::Revoked => Err(revoked(&node).into()),
        NodeStatus::Left | NodeStatus::Unspecified => Ok(()),
        NodeStatus::Live if node.is_absent(view.now_ms(), view.started_ms()) => Ok(()),
        NodeStatus::Live if may_replace || same_key => Ok(()),
        // A laptop comes again and again, each time for one leaf.
        NodeStatus::Live if node.once && ask.role == Role::Driver => Ok(()),
        NodeStatus::Live => Err(Refusal::NodeNameTaken(name.to_string()).into()),
    }
}

fn check_address(
    view: &View<'_>,
    token: &TokenRecord,
    ask: &EnrollAsk,
    name: &NodeName,
    address: NodeAddress,
) -> Result<(), StoreError> {
    let cluster = ask.cluster.as_str();
    let text = address.to_string();
    let block: Option<BlockRecord> = view.get(&layout::block(cluster, &text))?;
    let block = block.filter(|block| !block.spared);
    // A token of the same millisecond counts as older: the operator revoked after making it. A workload's
    // token is nobody's decision about the address, however new it is.
    let is_older = |block: &BlockRecord| token.created_ms <= block.revoked_ms;
    if let Some(block) = block.filter(|block| ask.vouched.is_some() || is_older(block)) {
        return Err(Refusal::AddressBlocked { address: text, node: block.node }.into());
    }
    // A driver may come from a gateway's address, or from a node's: but from there it must come.
    if ask.role == Role::Driver && ask.source == Some(address) {
        return Ok(());
    }
    match address::live_holder(view, cluster, &text)? {
        Some(holder) if holder != name.as_str() => {
            // Whoever is there beats whoever only says to be.
            if ask.source == Some(address) && !has_proved(view, cluster, &holder, &text)? {
                return Ok(());
            }
            Err(Refusal::AddressTaken { address: text, holder }.into())
        }
        Some(_) | None => Ok(()),
    }
}

/// Whether a call of the node ever came from the address.
fn has_proved(
    view: &View<'_>,
    cluster: &str,
    node: &str,
    address: &str,
) -> Result<bool, StoreError> {
    let node: Option<NodeRecord> = view.get(&layout::node(cluster, node))?;
    let proved = |bound: &AddressRecord| bound.address == address && bound.proved;
    Ok(node.is_some_and(|node| node.addresses.iter().any(proved)))
}

fn spend(
    view: &mut View<'_>,
    ask: &EnrollAsk,
    name: &NodeName,
    identity: &Signed,
) -> Result<(), StoreError> {
    let key = layout::token(ask.token.as_str());
    if let (Some(vouched), None) = (&ask.vouched, view.get_raw(&key)?) {
        super::token::create(view, vouched)?;
    }
    let mut token: TokenRecord = view.get(&key)?.ok_or(Refusal::TokenUnknown)?;
    token.used += 1;
    view.put(key, &token);
    let spent = UseRecord {
        node: name.to_string(),
        serial: identity.serial.as_bytes().to_vec(),
        used_ms: view.now_ms(),
    };
    view.put(layout::token_use(ask.token.as_str(), &ask.key_hash), &spent);
    Ok(())
}

fn node_record(
    view: &View<'_>,
    ask: &EnrollAsk,
    binding: &Binding,
    identity: &Signed,
    before: Option<NodeRecord>,
) -> NodeRecord {
    let address = |address: &NodeAddress| AddressRecord {
        address: address.to_string(),
        proved: ask.source == Some(*address),
        ..AddressRecord::default()
    };
    let member_version = before.as_ref().map_or(0, |before| before.member_version);
    let (leaf_keys, earlier_token_ids) = before.map_or_else(Default::default, earlier);
    NodeRecord {
        cluster: ask.cluster.to_string(),
        name: binding.name.to_string(),
        role: ask.role.to_proto().into(),
        status: NodeStatus::Live.into(),
        addresses: binding.addresses.iter().map(address).collect(),
        dns_names: binding.dns_names.iter().map(ToString::to_string).collect(),
        shared_address: ask.shared_address,
        once: ask.once,
        token_id: ask.token.to_string(),
        // The name's new life begins with its first identity, not with the commit a moment later.
        enrolled_ms: identity.issued_ms,
        contact_ms: view.now_ms(),
        identity: Some(IdentityRecord {
            serial: identity.serial.as_bytes().to_vec(),
            key_hash: identity.key_hash.to_vec(),
            not_after_ms: identity.not_after_ms,
        }),
        pending: None,
        leaf_keys,
        revoked_ms: 0,
        revoked_reason: String::new(),
        reused_ms: 0,
        earlier_token_ids,
        identities: 1,
        identities_since_ms: identity.issued_ms,
        member_version,
        lapsed_ms: 0,
    }
}

/// What a name keeps of its earlier life: leaves that are still out there, and tokens that whoever
/// had it then may still hold.
fn earlier(before: NodeRecord) -> (Vec<LeafKeyRecord>, Vec<String>) {
    const EARLIER_TOKENS_MAX: usize = 16;
    const EARLIER_LEAF_KEYS_MAX: usize = 256;
    let mut leaf_keys = before.leaf_keys;
    leaf_keys.sort_by_key(|key| std::cmp::Reverse(key.not_after_ms));
    leaf_keys.truncate(EARLIER_LEAF_KEYS_MAX);
    let mut token_ids = vec![before.token_id];
    for id in before.earlier_token_ids {
        if !token_ids.contains(&id) && token_ids.len() < EARLIER_TOKENS_MAX {
            token_ids.push(id);
        }
    }
    (leaf_keys, token_ids)
}

pub(super) fn revoked(node: &NodeRecord) -> Refusal {
    Refusal::Revoked { node: node.name.clone(), reason: node.revoked_reason.clone() }
}

fn joined(addresses: &[NodeAddress]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_its_earlier_lives_a_name_keeps_the_leaf_keys_that_end_last() {
        let key = |ends_ms| LeafKeyRecord { not_after_ms: ends_ms, ..LeafKeyRecord::default() };
        let before = NodeRecord { leaf_keys: (0..300).map(key).collect(), ..NodeRecord::default() };
        let (kept, _) = earlier(before);
        assert_eq!(kept.len(), 256);
        assert_eq!(kept.iter().map(|key| key.not_after_ms).min(), Some(44));
    }
}
