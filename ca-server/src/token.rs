//! Judging a bootstrap token. Pure: a record, a use of it or none, what is asked, and now.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use raymtls_proto::identity::Role;

use crate::{
    refusal::Refusal,
    store::{
        EnrollAsk,
        records::{TokenRecord, UseRecord},
    },
};

/// How long the same key gets the same answer.
pub const REPLAY_FOR_MS: i64 = 24 * 60 * 60 * 1_000;

/// What a token allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Spend a use.
    Spend,
    /// This key spent one already: repeat the answer.
    Repeat,
}

/// Judges the secret alone. Whoever does not know it learns nothing else of the token.
///
/// # Errors
/// `TokenUnknown`.
pub fn check_secret(
    token: Option<TokenRecord>,
    secret_hash: &[u8; 32],
) -> Result<TokenRecord, Refusal> {
    // The comparison runs for an unknown id too, against a hash nothing has.
    let expected = token.as_ref().map_or(&[0; 32][..], |token| &token.secret_hash);
    let equal = verify_slices_are_equal(expected, secret_hash).is_ok();
    token.filter(|_| equal).ok_or(Refusal::TokenUnknown)
}

/// Judges what is asked with a token whose secret is known.
///
/// # Errors
/// The first of: revoked, other cluster, other role, expired, spent.
pub fn judge(
    token: &TokenRecord,
    spent: Option<&UseRecord>,
    ask: &EnrollAsk,
    now_ms: i64,
) -> Result<Verdict, Refusal> {
    if token.revoked_ms != 0 {
        return Err(Refusal::TokenRevoked);
    }
    if token.cluster != ask.cluster.as_str() {
        return Err(Refusal::TokenClusterMismatch(ask.cluster.to_string()));
    }
    if Role::from_proto(token.role) != Some(ask.role) {
        return Err(Refusal::TokenRoleMismatch {
            allowed: Role::from_proto(token.role).map_or("none", Role::as_str).to_owned(),
            asked: ask.role.to_string(),
        });
    }
    if spent.is_some_and(|spent| now_ms < spent.used_ms + REPLAY_FOR_MS) {
        return Ok(Verdict::Repeat);
    }
    if now_ms >= token.expires_ms {
        return Err(Refusal::TokenExpired);
    }
    if token.used >= token.uses || spent.is_some() {
        return Err(Refusal::TokenSpent(token.uses));
    }
    Ok(Verdict::Spend)
}

#[cfg(test)]
mod tests {
    use raymtls_proto::v1;

    use super::*;

    fn token() -> TokenRecord {
        TokenRecord {
            id: "0000000000000000".to_owned(),
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            secret_hash: vec![7; 32],
            created_ms: 0,
            expires_ms: 1_000,
            uses: 2,
            ..TokenRecord::default()
        }
    }

    fn ask() -> EnrollAsk {
        EnrollAsk {
            token: "0000000000000000".parse().unwrap(),
            secret_hash: [7; 32],
            cluster: "c1".parse().unwrap(),
            role: Role::Worker,
            name: "n1".parse().unwrap(),
            key_hash: [1; 32],
            source: None,
            addresses: vec![],
            dns_names: vec![],
            shared_address: false,
            once: false,
            vouched: None,
        }
    }

    #[test]
    fn an_unknown_id_and_a_wrong_secret_are_one_word() {
        assert_eq!(check_secret(None, &[7; 32]), Err(Refusal::TokenUnknown));
        assert_eq!(check_secret(Some(token()), &[8; 32]), Err(Refusal::TokenUnknown));
        assert_eq!(check_secret(None, &[0; 32]), Err(Refusal::TokenUnknown));
        assert!(check_secret(Some(token()), &[7; 32]).is_ok());
    }

    #[test]
    fn a_token_is_judged_by_its_first_fault() {
        let spent = TokenRecord { used: 2, ..token() };
        let revoked = TokenRecord { revoked_ms: 1, ..token() };
        let other_cluster = EnrollAsk { cluster: "c2".parse().unwrap(), ..ask() };
        let other_role = EnrollAsk { role: Role::Head, ..ask() };
        let table = [
            ("last moment", judge(&token(), None, &ask(), 999), Ok(Verdict::Spend)),
            ("at expiry", judge(&token(), None, &ask(), 1_000), Err(Refusal::TokenExpired)),
            ("spent", judge(&spent, None, &ask(), 0), Err(Refusal::TokenSpent(2))),
            ("revoked", judge(&revoked, None, &ask(), 0), Err(Refusal::TokenRevoked)),
            (
                "other cluster",
                judge(&token(), None, &other_cluster, 0),
                Err(Refusal::TokenClusterMismatch("c2".to_owned())),
            ),
            (
                "other role",
                judge(&token(), None, &other_role, 0),
                Err(Refusal::TokenRoleMismatch {
                    allowed: "worker".to_owned(),
                    asked: "head".to_owned(),
                }),
            ),
        ];
        for (name, verdict, expected) in table {
            assert_eq!(verdict, expected, "{name}");
        }
    }

    #[test]
    fn the_same_key_repeats_for_a_day_even_past_expiry() {
        let spent = TokenRecord { used: 2, ..token() };
        let used = UseRecord { used_ms: 500, ..UseRecord::default() };
        let at = |ms| judge(&spent, Some(&used), &ask(), ms);
        assert_eq!(at(2_000), Ok(Verdict::Repeat));
        assert_eq!(at(500 + REPLAY_FOR_MS - 1), Ok(Verdict::Repeat));
        assert_eq!(at(500 + REPLAY_FOR_MS), Err(Refusal::TokenExpired));
    }
}
