//! Checkpoints of the audit log: the bytes that are signed, whether a signature is the control
//! authority's, and what a checkpoint that was kept says of the log as it is told now. It reads no clock
//! and keeps nothing.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use thiserror::Error;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::v1::{Checkpoint, LogAlarm, LogState};

/// What every signed checkpoint begins with. A certificate and a CRL begin with 0x30.
const DOMAIN: &[u8] = b"ray-mtls audit checkpoint v1\0";
/// Bytes of a hash.
const HASH_LEN: usize = 32;
/// Longest signature in DER, and longest certificate of an issuer.
const SIGNATURE_LEN_MAX: usize = 80;
const ISSUER_LEN_MAX: usize = 8 * 1024;

/// A checkpoint that is not the control authority's.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum CheckpointFault {
    /// A part is missing or too long.
    #[error("a part of the checkpoint is missing or has a wrong length")]
    Form,
    /// The certificate in it.
    #[error("the checkpoint's issuer is not one that the control root signed")]
    Issuer,
    /// The signature.
    #[error("the checkpoint's signature is not its issuer's")]
    Signature,
}

/// The bytes that are signed.
#[must_use]
pub fn signed_bytes(checkpoint: &Checkpoint) -> Vec<u8> {
    let Checkpoint { epoch, index, hash, at_ms, .. } = checkpoint;
    [DOMAIN, &epoch.to_be_bytes(), &index.to_be_bytes(), &at_ms.to_be_bytes(), hash].concat()
}

/// Whether a checkpoint has a form that may be kept or looked at.
#[must_use]
pub fn has_form(checkpoint: &Checkpoint) -> bool {
    checkpoint.hash.len() == HASH_LEN
        && checkpoint.index > 0
        && (1..=SIGNATURE_LEN_MAX).contains(&checkpoint.signature.len())
        && (1..=ISSUER_LEN_MAX).contains(&checkpoint.issuer_der.len())
}

/// Whether a control issuer under one of these roots signed it.
///
/// # Errors
/// What is wrong with it.
pub fn check<'a>(
    checkpoint: &Checkpoint,
    control_roots_der: impl IntoIterator<Item = &'a [u8]>,
) -> Result<(), CheckpointFault> {
    if !has_form(checkpoint) {
        return Err(CheckpointFault::Form);
    }
    let (_, issuer) =
        X509Certificate::from_der(&checkpoint.issuer_der).map_err(|_| CheckpointFault::Issuer)?;
    let signed_it = |root_der: &[u8]| {
        X509Certificate::from_der(root_der)
            .is_ok_and(|(_, root)| issuer.verify_signature(Some(root.public_key())).is_ok())
    };
    // The root certifies issuers alone.
    if !issuer.is_ca() || !control_roots_der.into_iter().any(signed_it) {
        return Err(CheckpointFault::Issuer);
    }
    let key = &issuer.public_key().subject_public_key.data;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
        .verify(&signed_bytes(checkpoint), &checkpoint.signature)
        .map_err(|_| CheckpointFault::Signature)
}

/// What a checkpoint that was kept says of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The log holds the record it names.
    Whole,
    /// It does not.
    Alarm(LogAlarm),
    /// What it names was lost in a restore that an operator accepted.
    Accepted,
}

/// Compares a kept checkpoint with what the CA tells of the log.
#[must_use]
pub fn judge(kept: &Checkpoint, told: &LogState) -> Verdict {
    if told.kept_up_to != 0 && kept.index > told.kept_up_to {
        return if told.restore_accepted {
            Verdict::Accepted
        } else {
            Verdict::Alarm(LogAlarm::Restored)
        };
    }
    if told.hash_at == kept.hash {
        return Verdict::Whole;
    }
    if !told.hash_at.is_empty() {
        return Verdict::Alarm(LogAlarm::OtherRecord);
    }
    let ends_before = told.newest.as_ref().is_none_or(|newest| newest.index < kept.index);
    Verdict::Alarm(if ends_before { LogAlarm::RolledBack } else { LogAlarm::RecordMissing })
}

/// An alarm in words, for people.
#[must_use]
pub fn in_words(alarm: LogAlarm) -> Option<&'static str> {
    Some(match alarm {
        LogAlarm::Unspecified => return None,
        LogAlarm::OtherRecord => {
            "the CA's audit log has another record at the index of a signed checkpoint: its store was \
             edited, or two CAs went on from one state"
        }
        LogAlarm::RolledBack => {
            "the CA's audit log ends before a signed checkpoint: an older state was put back"
        }
        LogAlarm::RecordMissing => {
            "the CA's audit log has lost the record of a signed checkpoint that no pruning may touch"
        }
        LogAlarm::BadSignature => {
            "the newest checkpoint of the CA's audit log is not signed by the control authority"
        }
        LogAlarm::Restored => {
            "the CA was restored from a backup, and records of its audit log are lost; an operator has \
             not accepted it yet"
        }
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SigningKey};

    use super::*;

    fn ca(key: &KeyPair, above: Option<&Issuer<'_, &KeyPair>>, is_ca: bool) -> Vec<u8> {
        let mut params = CertificateParams::default();
        if is_ca {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        let signed = match above {
            Some(above) => params.signed_by(key, above),
            None => params.self_signed(key),
        };
        signed.unwrap().der().to_vec()
    }

    fn checkpoint(index: u64) -> Checkpoint {
        Checkpoint { epoch: 7, index, hash: vec![9; 32], at_ms: 5, ..Checkpoint::default() }
    }

    #[test]
    fn only_what_an_issuer_under_the_root_signed_passes() {
        let (root_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let root = ca(&root_key, None, true);
        let mut root_params = CertificateParams::default();
        root_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let above = Issuer::new(root_params, &root_key);
        let signed = |issuer_der: Vec<u8>, key: &KeyPair| {
            let mut one = Checkpoint { issuer_der, ..checkpoint(3) };
            one.signature = key.sign(&signed_bytes(&one)).unwrap();
            one
        };
        let good = signed(ca(&key, Some(&above), true), &key);
        let check = |one: &Checkpoint| check(one, [root.as_slice()]);
        check(&good).unwrap();
        let leaf = signed(ca(&key, Some(&above), false), &key);
        assert_eq!(check(&leaf), Err(CheckpointFault::Issuer), "no CA's certificate");
        let other = signed(ca(&key, None, true), &key);
        assert_eq!(check(&other), Err(CheckpointFault::Issuer), "of another root");
        for changed in [
            Checkpoint { epoch: 8, ..good.clone() },
            Checkpoint { index: 4, ..good.clone() },
            Checkpoint { at_ms: 6, ..good.clone() },
            Checkpoint { hash: vec![8; 32], ..good.clone() },
        ] {
            assert_eq!(check(&changed), Err(CheckpointFault::Signature));
        }
        let cut = Checkpoint { hash: vec![9; 31], ..good };
        assert_eq!(check(&cut), Err(CheckpointFault::Form));
    }

    #[test]
    fn an_edit_a_rollback_a_hole_and_a_restore_are_told_apart() {
        let kept = checkpoint(10);
        let told = |newest: u64, hash: u8, len: usize| LogState {
            newest: Some(checkpoint(newest)),
            hash_at: vec![hash; len],
            ..LogState::default()
        };
        let restored = |kept_up_to, accepted| LogState {
            kept_up_to,
            restore_accepted: accepted,
            ..told(12, 8, 32)
        };
        for (what, told, verdict) in [
            ("the same", told(12, 9, 32), Verdict::Whole),
            ("another", told(12, 8, 32), Verdict::Alarm(LogAlarm::OtherRecord)),
            ("shorter", told(9, 0, 0), Verdict::Alarm(LogAlarm::RolledBack)),
            ("a hole", told(12, 0, 0), Verdict::Alarm(LogAlarm::RecordMissing)),
            ("nothing", LogState::default(), Verdict::Alarm(LogAlarm::RolledBack)),
            ("restored", restored(9, false), Verdict::Alarm(LogAlarm::Restored)),
            ("accepted", restored(9, true), Verdict::Accepted),
            ("before the backup", restored(10, true), Verdict::Alarm(LogAlarm::OtherRecord)),
        ] {
            assert_eq!(judge(&kept, &told), verdict, "{what}");
        }
    }
}
