//! What every revocation has: a reason, CRLs that say so, the change its peers apply, and words on
//! what the network does and Ray does not.

use raymtls_proto::{clock, identity::ClusterId, v1, visible::is_visible};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tracing::warn;

use crate::{
    ca::Ca,
    refusal::Refusal,
    store::{Authority, StoreError, records::NodeRecord, unix_ms},
    upkeep,
};

/// Longest reason, in bytes.
const REASON_LEN_MAX: usize = 500;

/// An operator's reason, checked: it goes into logs, to agents and onto terminals.
///
/// # Errors
/// `RequestInvalid`.
pub fn reason(text: &str) -> Result<String, Refusal> {
    let text = text.trim();
    if text.is_empty() || text.len() > REASON_LEN_MAX || !text.chars().all(is_visible) {
        let text = format!("a reason is one line of 1 to {REASON_LEN_MAX} bytes, all visible");
        return Err(Refusal::RequestInvalid(text));
    }
    Ok(text.to_owned())
}

/// A change that was asked for at `asked`, as agents will apply it.
#[must_use]
pub fn change(ca: &Ca, counter: u64, asked: OffsetDateTime) -> v1::Change {
    v1::Change {
        version: Some(v1::SyncVersion { epoch: ca.store.epoch(), counter }),
        asked_unix_ms: unix_ms(asked),
    }
}

/// The same of what was committed a moment ago.
///
/// # Errors
/// The store.
pub async fn newest_change(
    ca: &Ca,
    cluster: &ClusterId,
    asked: OffsetDateTime,
) -> Result<v1::Change, StoreError> {
    Ok(change(ca, ca.store.cluster(cluster.clone()).await?.version, asked))
}

/// Signs the CRLs. What could not be signed is a note: the revocation stands, and the next pass signs
/// them.
pub async fn sign_crls(ca: &Ca, authorities: &[Authority]) -> Vec<String> {
    let mut notes = Vec::new();
    for authority in authorities {
        if let Err(error) = upkeep::tend(ca, authority).await {
            warn!(%authority, %error, "CRLs not signed yet");
            let text = "the CRLs could not be signed yet: tried again within a minute";
            notes.push(text.to_owned());
        }
    }
    notes.dedup();
    notes
}

/// Until when Ray accepts a revoked node's leaf, and what keeps it out until then.
#[must_use]
pub fn notes(
    node: &NodeRecord,
    isolation: v1::Isolation,
    blocked: &[String],
    now_ms: i64,
) -> Vec<String> {
    let until_ms = node.leaf_not_after_ms();
    if until_ms <= now_ms {
        return Vec::new();
    }
    let until = moment(until_ms);
    let accepts = format!("Ray checks no CRL: its processes accept the node's leaf until {until}");
    let next = match isolation {
        v1::Isolation::Enforce if blocked.is_empty() => {
            "no address of it is blocked; as it is no member any more, agents refuse it from every \
             address that is not another member's"
                .to_owned()
        }
        v1::Isolation::Enforce => format!(
            "the agents of its peers cut off {} until then: `ca-admin node revoke` shows which have",
            blocked.join(" and ")
        ),
        v1::Isolation::Off | v1::Isolation::Audit | v1::Isolation::Unspecified => format!(
            "isolation is {}, so no agent cuts it off: `ca-admin cluster set {} isolation=enforce`, or \
             on every other host of the cluster run `scripts/isolation/nftables.sh apply` as before, \
             with the node taken out of --members and with --blocked {}",
            if isolation == v1::Isolation::Audit { "audit" } else { "off" },
            node.cluster,
            addresses(node)
        ),
    };
    vec![accepts, next]
}

/// A moment in words.
#[must_use]
pub fn moment(ms: i64) -> String {
    let text = clock::from_unix(ms / 1_000).and_then(|at| at.format(&Rfc3339).ok());
    text.unwrap_or_else(|| "its end".to_owned())
}

fn addresses(node: &NodeRecord) -> String {
    node.addresses.iter().map(|a| a.address.as_str()).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::records::{AddressRecord, LeafKeyRecord};

    #[test]
    fn a_reason_is_one_visible_line_within_its_bound() {
        assert_eq!(reason(" gestohlen: Möbel "), Ok("gestohlen: Möbel".to_owned()));
        for bad in [" ", "two\nlines", "\u{1b}[2J", "turned \u{202e}round", "nul \0"] {
            assert!(reason(bad).is_err(), "{bad:?}");
        }
        assert!(reason(&"x".repeat(REASON_LEN_MAX)).is_ok());
        assert!(reason(&"x".repeat(REASON_LEN_MAX + 1)).is_err());
        assert!(reason(&"ö".repeat(REASON_LEN_MAX / 2 + 1)).is_err(), "bytes count");
    }

    #[test]
    fn what_keeps_a_revoked_node_out_until_its_leaf_ends_is_named_last() {
        let address = |address: &str| AddressRecord {
            address: address.to_owned(),
            proved: true,
            ..AddressRecord::default()
        };
        let node = NodeRecord {
            addresses: vec![address("10.77.0.7"), address("fd00::7")],
            leaf_keys: vec![LeafKeyRecord { not_after_ms: 60_000, ..Default::default() }],
            ..NodeRecord::default()
        };
        let blocked = ["10.77.0.7".to_owned(), "fd00::7".to_owned()];
        let said = |isolation, blocked: &[String]| notes(&node, isolation, blocked, 0).join("\n");
        for isolation in [v1::Isolation::Off, v1::Isolation::Audit] {
            let text = said(isolation, &blocked);
            assert!(text.contains("until 1970-01-01T00:01:00Z"), "{text}");
            assert!(text.contains("scripts/isolation/nftables.sh apply"), "{text}");
            assert!(text.ends_with("--blocked 10.77.0.7,fd00::7"), "{text}");
        }
        let text = said(v1::Isolation::Enforce, &blocked);
        assert!(text.contains("until 1970-01-01T00:01:00Z"), "{text}");
        assert!(text.contains("cut off 10.77.0.7 and fd00::7"), "{text}");
        assert!(!text.contains("nftables.sh"), "{text}");
        assert!(said(v1::Isolation::Enforce, &[]).contains("no address of it is blocked"));
        assert!(notes(&node, v1::Isolation::Off, &blocked, 60_000).is_empty());
    }
}
