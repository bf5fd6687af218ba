//! Records as messages.

use raymtls_proto::v1;
use time::OffsetDateTime;

use crate::{
    contacts::LastContact,
    store::{
        records::{CertificateRecord, NodeRecord, NodeStatus, TokenRecord},
        unix_ms,
    },
};

/// A token without its secret's hash.
#[must_use]
pub fn token(token: TokenRecord, now: OffsetDateTime) -> v1::Token {
    let state = if token.revoked_ms != 0 {
        v1::TokenState::Revoked
    } else if token.used >= token.uses {
        v1::TokenState::Spent
    } else if unix_ms(now) >= token.expires_ms {
        v1::TokenState::Expired
    } else {
        v1::TokenState::Open
    };
    v1::Token {
        id: token.id,
        cluster: token.cluster,
        role: token.role,
        created_unix: token.created_ms / 1_000,
        expires_unix: token.expires_ms / 1_000,
        uses: token.uses,
        used: token.used,
        state: state.into(),
        node_names: token.node_names,
        generate_names: token.generate_names,
        address_ranges: token.address_ranges,
        any_address: token.any_address,
        dns_names: token.dns_names,
        replace: token.replace,
        created_by: token.created_by,
        shared_address: token.shared_address,
    }
}

/// A node's state at a moment.
#[must_use]
pub fn node_state(
    node: &NodeRecord,
    last: &LastContact,
    started: OffsetDateTime,
    now: OffsetDateTime,
) -> v1::NodeState {
    match node.node_status() {
        NodeStatus::Revoked => v1::NodeState::Revoked,
        NodeStatus::Left => v1::NodeState::Left,
        NodeStatus::Unspecified => v1::NodeState::Unspecified,
        NodeStatus::Live => {
            let heard = last.at.map_or(0, unix_ms).max(unix_ms(started));
            if node.is_absent(unix_ms(now), heard) {
                v1::NodeState::Absent
            } else {
                v1::NodeState::Live
            }
        }
    }
}

/// A node with what the running server knows of it, in a cluster with this lease.
#[must_use]
pub fn node(
    node: NodeRecord,
    last: LastContact,
    started: OffsetDateTime,
    now: OffsetDateTime,
    lease_seconds: i64,
) -> v1::Node {
    let state = node_state(&node, &last, started, now);
    let heard_ms = node.contact_ms.max(last.at.map_or(0, unix_ms)).max(unix_ms(started));
    let lease_until_unix = match node.node_status() {
        NodeStatus::Live if node.lapsed_ms != 0 => node.lapsed_ms / 1_000,
        NodeStatus::Live if !node.once => (heard_ms / 1_000).saturating_add(lease_seconds),
        NodeStatus::Live | NodeStatus::Left | NodeStatus::Revoked | NodeStatus::Unspecified => 0,
    };
    let contact = last.at.map_or(node.contact_ms / 1_000, OffsetDateTime::unix_timestamp);
    let leaf_not_after_unix = node.leaf_not_after_ms() / 1_000;
    let identity = node.current().clone();
    let address = |bound: crate::store::records::AddressRecord| v1::NodeAddress {
        address: bound.address,
        proved: bound.proved,
    };
    v1::Node {
        cluster: node.cluster,
        name: node.name,
        role: node.role,
        state: state.into(),
        addresses: node.addresses.into_iter().map(address).collect(),
        dns_names: node.dns_names,
        shared_address: node.shared_address,
        token_id: node.token_id,
        enrolled_unix: node.enrolled_ms / 1_000,
        last_contact_unix: contact,
        identity_serial: identity.serial,
        identity_not_after_unix: identity.not_after_ms / 1_000,
        revoked_unix: node.revoked_ms / 1_000,
        revoked_reason: node.revoked_reason,
        report: last.report,
        leaf_not_after_unix,
        once: node.once,
        earlier_token_ids: node.earlier_token_ids,
        lease_until_unix,
        log_checkpoint: last.log.0,
        log_alarm: last.log.1.into(),
    }
}

/// A certificate.
#[must_use]
pub fn certificate(record: CertificateRecord) -> v1::Certificate {
    v1::Certificate {
        serial: record.serial,
        kind: record.kind,
        cluster: record.cluster,
        node: record.node,
        certificate_der: record.certificate_der,
        issued_unix: record.issued_ms / 1_000,
        not_after_unix: record.not_after_ms / 1_000,
        revoked_unix: record.revoked_ms / 1_000,
        revoked_reason: record.revoked_reason,
    }
}
