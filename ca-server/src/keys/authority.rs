//! Who signs for whom: a root that is kept wrapped and unwrapped only for the act that needs it, and
//! issuers that the running server holds ready. The newest issuer signs, the others still verify.

use std::sync::Arc;

use raymtls_proto::{digest::sha256, identity::ClusterId};
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use thiserror::Error;
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    kek::{Kek, KekError},
    profile::{Contents, ISSUER_LIFE_MIN, Profile, ROOT_LIFE},
    random,
    signer::{SignError, Signer},
};
use crate::store::{
    Authority,
    records::{CaKey, ClusterRecord, ControlRecord},
    unix_ms,
};

/// Why an authority cannot be made or loaded.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// Its keys cannot be unwrapped.
    #[error(transparent)]
    Kek(#[from] KekError),
    /// Its certificates cannot be signed or read.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The record is not whole.
    #[error("the record of authority {0:?} has no {1}")]
    Incomplete(String, &'static str),
    /// A certificate of the record was signed by a root that is not the record's.
    #[error(
        "the {1} of authority {0:?} is not signed by that authority's root: the store was changed \
         behind the CA; restore a backup"
    )]
    NotItsOwn(String, &'static str),
}

impl From<rcgen::Error> for AuthorityError {
    fn from(error: rcgen::Error) -> Self {
        Self::Sign(error.into())
    }
}

/// A root and its first issuer, wrapped.
#[derive(Debug)]
pub struct NewAuthority {
    /// The root.
    pub root: CaKey,
    /// The issuer.
    pub issuer: CaKey,
}

/// An authority ready to sign.
#[derive(Debug)]
pub struct LiveAuthority {
    /// The root's certificate.
    pub root_der: Vec<u8>,
    /// Issuers, newest first; never empty.
    issuers: Vec<Arc<Signer>>,
    crls_der: Vec<Vec<u8>>,
}

impl LiveAuthority {
    /// Unwraps the issuers of the control authority.
    ///
    /// # Errors
    /// See [`AuthorityError`].
    pub fn control(kek: &Kek, record: &ControlRecord) -> Result<Self, AuthorityError> {
        Self::load(kek, &Authority::Control, record.root.as_ref(), &record.issuers)
    }

    /// Unwraps the issuers of the cluster that was asked for, whatever the record calls itself.
    ///
    /// # Errors
    /// See [`AuthorityError`].
    pub fn cluster(
        kek: &Kek,
        cluster: &ClusterId,
        record: &ClusterRecord,
    ) -> Result<Self, AuthorityError> {
        let authority = Authority::Cluster(cluster.clone());
        Self::load(kek, &authority, record.root.as_ref(), &record.issuers)
    }

    fn load(
        kek: &Kek,
        authority: &Authority,
        root: Option<&CaKey>,
        issuers: &[CaKey],
    ) -> Result<Self, AuthorityError> {
        let root = root.ok_or_else(|| AuthorityError::Incomplete(authority.to_string(), "root"))?;
        if issuers.is_empty() {
            return Err(AuthorityError::Incomplete(authority.to_string(), "issuer"));
        }
        check_signature(authority, Place::Root, root, root)?;
        let issuers = issuers
            .iter()
            .map(|issuer| {
                check_signature(authority, Place::Issuer, issuer, root)?;
                unwrap_signer(kek, authority, Place::Issuer, issuer, root).map(Arc::new)
            })
            .collect::<Result<_, AuthorityError>>()?;
        Ok(Self { root_der: root.certificate_der.clone(), issuers, crls_der: Vec::new() })
    }

    /// With the CRLs in place.
    #[must_use]
    pub fn with_crls(self, crls_der: Vec<Vec<u8>>) -> Self {
        Self { crls_der, ..self }
    }

    /// The CRLs in place: the root's and one of each issuer.
    #[must_use]
    pub fn crls_der(&self) -> &[Vec<u8>] {
        &self.crls_der
    }

    /// The issuer that signs.
    #[must_use]
    pub fn active(&self) -> &Arc<Signer> {
        &self.issuers[0]
    }

    /// All issuers, newest first.
    #[must_use]
    pub fn issuers(&self) -> &[Arc<Signer>] {
        &self.issuers
    }

    /// The issuer's certificate that goes with a leaf, by the key id in the leaf's record.
    #[must_use]
    pub fn issuer_der(&self, key_id: &[u8]) -> Option<Vec<u8>> {
        let issuer = self.issuers.iter().find(|issuer| issuer.key_id() == key_id)?;
        Some(issuer.certificate_der().to_vec())
    }
}

/// Makes a root and its first issuer.
///
/// # Errors
/// See [`AuthorityError`].
pub fn create(
    kek: &Kek,
    authority: &Authority,
    now: OffsetDateTime,
    leaf_life: Duration,
) -> Result<NewAuthority, AuthorityError> {
    let key = KeyPair::generate()?;
    let contents = ca_contents(Profile::Root, authority, &key, now, ROOT_LIFE);
    let certificate = contents.params().self_signed(&key)?;
    let signer = Signer::new(certificate.der().to_vec(), key)?;
    contents
        .check(certificate.der(), &spki_of(&signer), signer.facts())
        .map_err(SignError::from)?;
    let root = wrap_signer(kek, authority, Place::Root, &signer, &signer);
    let issuer = issuer_below(kek, authority, &signer, now, leaf_life)?;
    Ok(NewAuthority { root, issuer })
}

/// Makes the next issuer under the same root.
///
/// # Errors
/// See [`AuthorityError`].
pub fn create_issuer(
    kek: &Kek,
    authority: &Authority,
    root: &CaKey,
    now: OffsetDateTime,
    leaf_life: Duration,
) -> Result<CaKey, AuthorityError> {
    issuer_below(kek, authority, &unwrap_root(kek, authority, root)?, now, leaf_life)
}

/// Whether the certificates of an authority are signed as they must be; no key is asked.
///
/// # Errors
/// `NotItsOwn`.
pub fn check_signatures(
    authority: &Authority,
    root: &CaKey,
    issuers: &[CaKey],
) -> Result<(), AuthorityError> {
    check_signature(authority, Place::Root, root, root)?;
    issuers.iter().try_for_each(|issuer| check_signature(authority, Place::Issuer, issuer, root))
}

/// Life of an issuer: so long that it signs for one leaf life before the next is due.
#[must_use]
pub fn issuer_life(leaf_life: Duration) -> Duration {
    ISSUER_LIFE_MIN.max(leaf_life * 3)
}

/// Whether the authority needs its next issuer: the newest has less than two leaf lives left.
#[must_use]
pub fn issuer_is_due(
    newest_not_after: OffsetDateTime,
    leaf_life: Duration,
    now: OffsetDateTime,
) -> bool {
    newest_not_after - now < leaf_life * 2
}

/// Unwraps the root of an authority.
///
/// # Errors
/// See [`AuthorityError`].
pub fn unwrap_root(
    kek: &Kek,
    authority: &Authority,
    root: &CaKey,
) -> Result<Signer, AuthorityError> {
    unwrap_signer(kek, authority, Place::Root, root, root)
}

/// Unwraps an issuer of an authority.
///
/// # Errors
/// See [`AuthorityError`].
pub fn unwrap_issuer(
    kek: &Kek,
    authority: &Authority,
    root: &CaKey,
    issuer: &CaKey,
) -> Result<Signer, AuthorityError> {
    unwrap_signer(kek, authority, Place::Issuer, issuer, root)
}

/// The name is built from what is asked for, as it was at wrapping: what lies beside the ciphertext
/// moves with it.
fn unwrap_signer(
    kek: &Kek,
    authority: &Authority,
    place: Place,
    wrapped: &CaKey,
    root: &CaKey,
) -> Result<Signer, AuthorityError> {
    let name = key_name(authority, place, &wrapped.certificate_der, &root.certificate_der);
    let pkcs8 = kek.unwrap(&name, &wrapped.wrapped_key)?;
    let key = KeyPair::try_from(pkcs8.as_slice())?;
    Ok(Signer::new(wrapped.certificate_der.clone(), key)?)
}

/// Name that a cluster's Ray token is wrapped under.
#[must_use]
pub fn ray_token_name(cluster: &ClusterId) -> String {
    format!("cluster/{cluster}/ray-token")
}

fn issuer_below(
    kek: &Kek,
    authority: &Authority,
    root: &Signer,
    now: OffsetDateTime,
    leaf_life: Duration,
) -> Result<CaKey, AuthorityError> {
    let key = KeyPair::generate()?;
    let contents = ca_contents(Profile::Issuer, authority, &key, now, issuer_life(leaf_life));
    let signed = root.sign(&contents, &key.subject_public_key_info(), now)?;
    let signer = Signer::new(signed.certificate_der, key)?;
    Ok(wrap_signer(kek, authority, Place::Issuer, &signer, root))
}

fn ca_contents(
    profile: Profile,
    authority: &Authority,
    key: &impl PublicKeyData,
    now: OffsetDateTime,
    life: Duration,
) -> Contents {
    let key_id = CertificateParams::default().key_identifier(key);
    let place = if profile == Profile::Root { Place::Root } else { Place::Issuer };
    let place = place.word();
    let name = format!("{} {place} {}", display_name(authority), &hex::encode(key_id)[..8]);
    Contents::authority(profile, random::serial(now), now, life, name)
}

fn display_name(authority: &Authority) -> &str {
    match authority {
        // A cluster's name has no blank in it.
        Authority::Control => "Ray mTLS control",
        Authority::Cluster(cluster) => cluster.as_str(),
    }
}

/// Where in an authority a key belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Root,
    Issuer,
}

impl Place {
    fn word(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Issuer => "issuer",
        }
    }
}

/// Name a key is wrapped under: one authority, one place in it, one certificate, under one root. So
/// whoever can write the store and does not have the KEK can neither move a key nor put a root of
/// their own above it.
fn key_name(
    authority: &Authority,
    place: Place,
    certificate_der: &[u8],
    root_der: &[u8],
) -> String {
    let hash = |der| hex::encode(sha256(der));
    let (certificate, root) = (hash(certificate_der), hash(root_der));
    format!("{authority}/{}/{certificate}/under/{root}", place.word())
}

fn check_signature(
    authority: &Authority,
    place: Place,
    key: &CaKey,
    root: &CaKey,
) -> Result<(), AuthorityError> {
    let foreign = || AuthorityError::NotItsOwn(authority.to_string(), place.word());
    let (_, certificate) =
        X509Certificate::from_der(&key.certificate_der).map_err(|_| foreign())?;
    let (_, root) = X509Certificate::from_der(&root.certificate_der).map_err(|_| foreign())?;
    certificate.verify_signature(Some(root.public_key())).map_err(|_| foreign())
}

fn wrap_signer(
    kek: &Kek,
    authority: &Authority,
    place: Place,
    signer: &Signer,
    root: &Signer,
) -> CaKey {
    let key_name = key_name(authority, place, signer.certificate_der(), root.certificate_der());
    CaKey {
        certificate_der: signer.certificate_der().to_vec(),
        wrapped_key: kek.wrap(&key_name, signer.issuer().key().pkcs8()),
        not_after_ms: unix_ms(signer.not_after()),
        key_id: signer.key_id().to_vec(),
    }
}

fn spki_of(signer: &Signer) -> Vec<u8> {
    signer.issuer().key().subject_public_key_info()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + Duration::days(20_000)
    }

    fn cluster(kek: &Kek, name: &str) -> ClusterRecord {
        let authority = Authority::Cluster(name.parse().unwrap());
        let keys = create(kek, &authority, now(), Duration::days(1)).unwrap();
        ClusterRecord {
            cluster: name.to_owned(),
            root: Some(keys.root),
            issuers: vec![keys.issuer],
            ..ClusterRecord::default()
        }
    }

    #[test]
    fn a_key_in_another_s_place_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let kek = Kek::create(&folder.path().join("kek")).unwrap();
        let (a, b) = (cluster(&kek, "a"), cluster(&kek, "b"));
        let load = |record: &ClusterRecord| {
            LiveAuthority::cluster(&kek, &"b".parse().unwrap(), record).map(|_| ())
        };
        load(&b).unwrap();

        let as_b = |change: &dyn Fn(&mut ClusterRecord)| {
            let mut record = b.clone();
            change(&mut record);
            record
        };
        let mixed = |certificate: &CaKey, key: &CaKey| CaKey {
            certificate_der: certificate.certificate_der.clone(),
            ..key.clone()
        };
        let (a_root, b_root) = (a.root.clone().unwrap(), b.root.clone().unwrap());
        let table = [
            ("all of a", as_b(&|record| *record = a.clone())),
            (
                "all of a under b's name",
                as_b(&|record| {
                    record.root.clone_from(&a.root);
                    record.issuers.clone_from(&a.issuers);
                }),
            ),
            ("a's root", as_b(&|record| record.root.clone_from(&a.root))),
            ("a's issuer", as_b(&|record| record.issuers.clone_from(&a.issuers))),
            ("a's issuer behind b's", as_b(&|record| record.issuers.extend(a.issuers.clone()))),
            ("b's root as its issuer", as_b(&|record| record.issuers = vec![b_root.clone()])),
            ("b's issuer as its root", as_b(&|record| record.root = Some(b.issuers[0].clone()))),
            (
                "a's key with b's certificate",
                as_b(&|record| {
                    record.issuers = vec![mixed(&b.issuers[0], &a.issuers[0])];
                }),
            ),
        ];
        for (what, record) in table {
            let error = load(&record).unwrap_err().to_string();
            assert!(error.contains("cluster/b"), "{what}: {error}");
        }
        let authority = Authority::Cluster("b".parse().unwrap());
        unwrap_root(&kek, &authority, &b_root).unwrap();
        for wrong in [&a_root, &b.issuers[0], &mixed(&b_root, &a_root)] {
            assert!(unwrap_root(&kek, &authority, wrong).is_err());
        }
    }

    /// Whoever can write the store, without the KEK, puts a root of their own above our issuer's key.
    #[test]
    fn a_root_of_somebody_else_above_our_issuer_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let kek = Kek::create(&folder.path().join("kek")).unwrap();
        let ours = cluster(&kek, "a");
        let authority = Authority::Cluster("a".parse().unwrap());
        let key = KeyPair::generate().unwrap();
        let contents = ca_contents(Profile::Root, &authority, &key, now(), ROOT_LIFE);
        let root_der = contents.params().self_signed(&key).unwrap().der().to_vec();
        let thief = Signer::new(root_der.clone(), key).unwrap();
        let issuer = unwrap_signer(
            &kek,
            &authority,
            Place::Issuer,
            &ours.issuers[0],
            ours.root.as_ref().unwrap(),
        );
        let issuer_key = issuer.unwrap();
        let issuer_key = issuer_key.issuer().key();
        let life = issuer_life(Duration::days(1));
        let contents = ca_contents(Profile::Issuer, &authority, issuer_key, now(), life);
        let spki_der = issuer_key.subject_public_key_info();
        let issuer_der = thief.sign(&contents, &spki_der, now()).unwrap().certificate_der;
        let forged = ClusterRecord {
            root: Some(CaKey { certificate_der: root_der, ..ours.root.clone().unwrap() }),
            issuers: vec![CaKey { certificate_der: issuer_der, ..ours.issuers[0].clone() }],
            ..ours
        };
        let loaded = LiveAuthority::cluster(&kek, &"a".parse().unwrap(), &forged);
        assert!(matches!(loaded, Err(AuthorityError::Kek(_))), "{loaded:?}");
    }

    #[test]
    fn the_control_root_is_no_issuer() {
        let folder = tempfile::tempdir().unwrap();
        let kek = Kek::create(&folder.path().join("kek")).unwrap();
        let keys = create(&kek, &Authority::Control, now(), Duration::days(1)).unwrap();
        let record = |issuer: &CaKey| ControlRecord {
            root: Some(keys.root.clone()),
            issuers: vec![issuer.clone()],
            ..ControlRecord::default()
        };
        LiveAuthority::control(&kek, &record(&keys.issuer)).unwrap();
        let error = LiveAuthority::control(&kek, &record(&keys.root)).unwrap_err();
        assert!(error.to_string().contains("control/issuer"), "{error}");
    }

    #[test]
    fn an_issuer_is_due_with_less_than_two_leaf_lives_left() {
        let now = OffsetDateTime::UNIX_EPOCH + Duration::days(20_000);
        let life = Duration::days(30);
        assert!(!issuer_is_due(now + Duration::days(60), life, now));
        assert!(issuer_is_due(now + Duration::days(60) - Duration::SECOND, life, now));
    }

    #[test]
    fn an_issuer_signs_for_a_while_before_the_next_is_due() {
        let now = OffsetDateTime::UNIX_EPOCH + Duration::days(20_000);
        for days in [1, 20, 30, 80] {
            let life = Duration::days(days);
            assert!(!issuer_is_due(now + issuer_life(life), life, now), "{days} d");
        }
    }
}
