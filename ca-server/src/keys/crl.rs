//! Revocation lists: the root's, whose key is unwrapped for it once in a long while, and one of each
//! live issuer, signed anew daily and at each revocation. Both are needed by whoever checks a whole
//! chain (`openssl verify -crl_check_all`). Ray itself reads neither.

use rcgen::{
    CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber,
};
use time::{Duration, OffsetDateTime};

use super::{
    authority::{AuthorityError, LiveAuthority},
    profile::BACKDATE,
    signer::Signer,
};
use crate::store::{
    Revocations,
    records::{CrlSet, RevocationRecord},
    unix_ms,
};

/// How long an issuer's CRL is good for.
const ISSUER_CRL_LIFE: Duration = Duration::days(7);
/// How long one is used before the next is signed.
const ISSUER_CRL_EVERY: Duration = Duration::days(1);
/// How long a root's CRL is good for.
const ROOT_CRL_LIFE: Duration = Duration::days(365);
/// A root's CRL is signed anew this long before its end.
const ROOT_CRL_BEFORE: Duration = Duration::days(60);

/// Whether the CRLs in place must be replaced: none, a revocation more, an issuer more, or age.
#[must_use]
pub fn is_due(
    in_place: Option<&CrlSet>,
    revocations: u64,
    authority: &LiveAuthority,
    now: OffsetDateTime,
) -> bool {
    let Some(set) = in_place else { return true };
    let issuers: Vec<&[u8]> = authority.issuers().iter().map(|issuer| issuer.key_id()).collect();
    set.covers != revocations
        || set.issuers != issuers
        || unix_ms(now + ISSUER_CRL_LIFE - ISSUER_CRL_EVERY) >= set.next_update_ms
        || root_is_due(Some(set), now)
}

/// Whether the root's CRL, too, must be signed anew.
#[must_use]
pub fn root_is_due(in_place: Option<&CrlSet>, now: OffsetDateTime) -> bool {
    in_place.is_none_or(|set| unix_ms(now + ROOT_CRL_BEFORE) >= set.root_next_update_ms)
}

/// Signs the next set. `root` is given where the root's CRL is due; else the one in place stays.
///
/// # Errors
/// The library fails, or neither a root nor its CRL is there.
pub fn sign(
    in_place: Option<&CrlSet>,
    authority: &LiveAuthority,
    root: Option<&Signer>,
    revocations: &Revocations,
    now: OffsetDateTime,
) -> Result<CrlSet, AuthorityError> {
    let number = in_place.map_or(0, |set| set.number) + 1;
    let (root_crl, root_next_update_ms) = match (root, in_place) {
        (Some(root), _) => {
            let until = now + ROOT_CRL_LIFE;
            (list(root, number, &[], now, until)?, unix_ms(until))
        }
        (None, Some(set)) if !set.crls_der.is_empty() => {
            (set.crls_der[0].clone(), set.root_next_update_ms)
        }
        (None, _) => return Err(AuthorityError::Incomplete(String::new(), "root CRL")),
    };
    let until = now + ISSUER_CRL_LIFE;
    let mut crls_der = vec![root_crl];
    for issuer in authority.issuers() {
        let own: Vec<&RevocationRecord> =
            revocations.entries.iter().filter(|r| r.issuer_key_id == issuer.key_id()).collect();
        crls_der.push(list(issuer, number, &own, now, until)?);
    }
    Ok(CrlSet {
        crls_der,
        number,
        covers: revocations.count,
        next_update_ms: unix_ms(until),
        issuers: authority.issuers().iter().map(|issuer| issuer.key_id().to_vec()).collect(),
        root_next_update_ms,
    })
}

fn list(
    signer: &Signer,
    number: u64,
    entries: &[&RevocationRecord],
    now: OffsetDateTime,
    until: OffsetDateTime,
) -> Result<Vec<u8>, AuthorityError> {
    let revoked = |entry: &&RevocationRecord| RevokedCertParams {
        serial_number: SerialNumber::from_slice(&entry.serial),
        revocation_time: OffsetDateTime::from_unix_timestamp(entry.revoked_ms / 1_000)
            .unwrap_or(now),
        // The operator's words are in the audit log; the codes of RFC 5280 5.3.1 say less.
        reason_code: Some(RevocationReason::CessationOfOperation),
        invalidity_date: None,
    };
    let params = CertificateRevocationListParams {
        // Backdated like certificates: whoever is a little behind must not find it not yet valid.
        this_update: now - BACKDATE,
        next_update: until,
        crl_number: SerialNumber::from(number),
        issuing_distribution_point: None,
        revoked_certs: entries.iter().map(revoked).collect(),
        key_identifier_method: KeyIdMethod::PreSpecified(signer.key_id().to_vec()),
    };
    Ok(params.signed_by(signer.issuer())?.der().to_vec())
}
