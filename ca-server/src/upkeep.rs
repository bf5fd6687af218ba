//! What the CA does by itself: the next issuer in time, CRLs in time and after each revocation, its
//! own TLS certificate. One pass looks at everything and is a function of the clock, so that tests
//! move time and not their patience.

use raymtls_proto::identity::ClusterId;
use time::Duration;
use tracing::{error, info};

use crate::{
    ca::{Ca, CaError},
    keys::{
        authority::{self, LiveAuthority},
        crl,
        profile::AGENT_IDENTITY_LIFE,
    },
    refusal::Refusal,
    store::{Authority, Revocations},
};

/// How often a pass is made.
pub const EVERY: std::time::Duration = std::time::Duration::from_secs(60);

/// One pass over all authorities and the members of each cluster. A fault in one does not keep the
/// others waiting.
pub async fn pass(ca: &Ca) {
    for (authority, _) in ca.authorities() {
        if let Authority::Cluster(cluster) = &authority
            && !ca.is_restored()
        {
            tend_members(ca, cluster).await;
        }
        if let Err(error) = tend(ca, &authority).await {
            error!(%authority, %error, "upkeep failed; tried again in a minute");
        }
    }
}

/// Ends the membership of nodes that were silent for longer than the lease.
async fn tend_members(ca: &Ca, cluster: &ClusterId) {
    let (now, since) = (ca.clock.now(), ca.serving.since(&*ca.clock));
    match ca.store.lapse_members(now, cluster.clone(), since).await {
        Ok(0) => {}
        Ok(lapsed) => info!(%cluster, lapsed, "silent nodes are no members any more"),
        Err(error) => error!(%cluster, %error, "leases not looked at; tried again in a minute"),
    }
}

/// Tends one authority, one at a time: issuer first, since its CRL is wanted too. What it stands at is
/// read when it is its turn.
///
/// # Errors
/// The store, or a key that cannot be unwrapped.
pub async fn tend(ca: &Ca, authority: &Authority) -> Result<(), CaError> {
    let _turn = ca.upkeep.lock().await;
    if ca.has_ended(authority).await? {
        return Ok(());
    }
    let mut live = ca.authority(authority).map_err(into_store)?;
    if renew_issuer(ca, authority, &live).await? {
        live = ca.authority(authority).map_err(into_store)?;
    }
    if ca.is_restored() {
        // The nodes may hold newer ones, with revocations that are not on record here.
        return Ok(());
    }
    renew_crls(ca, authority, &live).await
}

async fn renew_issuer(
    ca: &Ca,
    authority: &Authority,
    live: &LiveAuthority,
) -> Result<bool, CaError> {
    let now = ca.clock.now();
    let (root, leaf_life) = match authority {
        Authority::Control => {
            let record = ca.store.control().await?.ok_or(CaError::NotInitialized)?;
            (record.root, AGENT_IDENTITY_LIFE)
        }
        Authority::Cluster(cluster) => {
            let record = ca.store.cluster(cluster.clone()).await?;
            let life = Duration::seconds(record.settings().leaf_life_seconds);
            (record.root, life)
        }
    };
    if !authority::issuer_is_due(live.active().not_after(), leaf_life, now) {
        return Ok(false);
    }
    let root = root.ok_or(CaError::NotInitialized)?;
    let issuer = authority::create_issuer(&ca.kek, authority, &root, now, leaf_life)?;
    ca.store.add_issuer(now, authority.clone(), issuer).await?;
    ca.load_authority(authority).await?;
    info!(%authority, "the next issuer signs from now on");
    Ok(true)
}

async fn renew_crls(ca: &Ca, authority: &Authority, live: &LiveAuthority) -> Result<(), CaError> {
    let now = ca.clock.now();
    let in_place = ca.store.crls(authority.clone()).await?;
    let revocations: Revocations = ca.store.revocations(now, authority.clone()).await?;
    if !crl::is_due(in_place.as_ref(), revocations.count, live, now) {
        return Ok(());
    }
    let root = if crl::root_is_due(in_place.as_ref(), now) {
        let record = match authority {
            Authority::Control => ca.store.control().await?.and_then(|record| record.root),
            Authority::Cluster(cluster) => ca.store.cluster(cluster.clone()).await?.root,
        };
        let record = record.ok_or(CaError::NotInitialized)?;
        Some(authority::unwrap_root(&ca.kek, authority, &record)?)
    } else {
        None
    };
    let set = crl::sign(in_place.as_ref(), live, root.as_ref(), &revocations, now)?;
    info!(%authority, number = set.number, "CRLs signed");
    ca.store.put_crls(now, authority.clone(), set).await?;
    ca.load_authority(authority).await
}

fn into_store(refusal: Refusal) -> CaError {
    CaError::Store(refusal.into())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use raymtls_proto::{
        clock::{Clock, SettableClock},
        v1::{self, create_cluster_request::Life, enroll_request::Credential},
    };
    use time::OffsetDateTime;

    use super::*;
    use crate::{
        admin::{Operator, clusters, tokens},
        ca::Endpoints,
        enroll::enroll,
        keys::kek::Kek,
        store::{Revoking, Store, kv::KvStore, memory::MemoryEngine, records::ControlRecord},
    };

    const DAY: std::time::Duration = std::time::Duration::from_secs(86_400);

    /// A CA in memory that nobody tended yet.
    pub(crate) async fn new_ca() -> (Arc<Ca>, SettableClock) {
        let clock = SettableClock::new(OffsetDateTime::UNIX_EPOCH + Duration::days(20_000));
        let folder = tempfile::tempdir().unwrap();
        let kek = Kek::create(&folder.path().join("kek")).unwrap();
        let now = clock.now();
        let keys = authority::create(&kek, &Authority::Control, now, AGENT_IDENTITY_LIFE).unwrap();
        let control = ControlRecord {
            trust_domain: "ray.example".to_owned(),
            root: Some(keys.root),
            issuers: vec![keys.issuer],
            revocations: 0,
        };
        let store = KvStore::create(Box::new(MemoryEngine::new()), now, 1).unwrap();
        store.initialize(now, control).await.unwrap();
        let clock_of_ca = Arc::new(clock.clone());
        let ca = Ca::load(Arc::new(store), clock_of_ca, kek, Endpoints::default()).await.unwrap();
        (Arc::new(ca), clock)
    }

    fn operator() -> Operator {
        Operator::on_socket(Some(0), 0, false)
    }

    async fn create(ca: &Ca, life: Life) -> Authority {
        let request = v1::CreateClusterRequest { cluster: "c1".to_owned(), life: Some(life) };
        clusters::create(ca, &operator(), request).await.unwrap();
        Authority::Cluster("c1".parse().unwrap())
    }

    async fn worker(ca: &Ca, number: u8) -> String {
        let request = v1::CreateTokenRequest {
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            uses: 1,
            any_address: true,
            ..v1::CreateTokenRequest::default()
        };
        let token = tokens::create(ca, &operator(), request).await.unwrap().bootstrap_token;
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let csr = params.serialize_request(&key).unwrap();
        let address = format!("10.0.0.{number}");
        let request = v1::EnrollRequest {
            credential: Some(Credential::BootstrapToken(token)),
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            node_name: format!("w{number}"),
            addresses: vec![address.clone()],
            csr_der: csr.der().to_vec(),
            ..v1::EnrollRequest::default()
        };
        enroll(ca, request, address.parse().unwrap()).await.unwrap().node_name
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn passes_at_once_make_one_issuer_and_cover_every_revocation() {
        const AT_ONCE: u8 = 8;
        let (ca, clock) = new_ca().await;
        let cluster = create(&ca, Life::MaxJobSeconds(864_000)).await;
        pass(&ca).await;
        let issuers = |authority| ca.authority(authority).unwrap().issuers().len();
        assert_eq!((issuers(&cluster), issuers(&Authority::Control)), (1, 1));

        // Less than two leaf lives are left of each issuer.
        clock.advance(DAY * 51);
        let mut names = Vec::new();
        for number in 1..=AT_ONCE {
            names.push(worker(&ca, number).await);
        }
        let passes: Vec<_> = names
            .into_iter()
            .map(|name| {
                let ca = Arc::clone(&ca);
                tokio::spawn(async move {
                    let (cluster, name) = ("c1".parse().unwrap(), name.parse().unwrap());
                    let (actor, revoking) = ("uid:0".to_owned(), Revoking::default());
                    let now = ca.clock.now();
                    ca.store.revoke_node(now, actor, cluster, name, revoking).await.unwrap();
                    pass(&ca).await;
                })
            })
            .collect();
        for pass in passes {
            pass.await.unwrap();
        }
        assert_eq!((issuers(&cluster), issuers(&Authority::Control)), (2, 2));
        let record = ca.store.control().await.unwrap().unwrap();
        assert_eq!(record.issuers.len(), 2, "an issuer was made that nobody uses");
        let set = ca.store.crls(Authority::Control).await.unwrap().unwrap();
        assert_eq!(set.covers, u64::from(AT_ONCE));
        assert_eq!(ca.authority(&Authority::Control).unwrap().crls_der(), set.crls_der);
        let revoked: usize = set.crls_der.iter().map(|crl| entries(crl)).sum();
        assert_eq!(revoked, usize::from(AT_ONCE), "a CRL says less than its set");
    }

    fn entries(crl_der: &[u8]) -> usize {
        use x509_parser::prelude::{CertificateRevocationList, FromDer};
        let (_, crl) = CertificateRevocationList::from_der(crl_der).unwrap();
        crl.iter_revoked_certificates().count()
    }

    #[tokio::test]
    async fn nothing_is_signed_for_a_cluster_whose_life_is_over() {
        let (ca, clock) = new_ca().await;
        let cluster = create(&ca, Life::MaxLifeSeconds(2 * 86_400)).await;
        let state = async || {
            let number = ca.store.crls(cluster.clone()).await.unwrap().unwrap().number;
            (number, ca.authority(&cluster).unwrap().issuers().len())
        };
        clock.advance(DAY + DAY / 2);
        pass(&ca).await;
        assert_eq!(state().await, (2, 1), "while it lives its CRLs are renewed");
        for days in [1, 30, 300] {
            clock.advance(DAY * days);
            pass(&ca).await;
            assert_eq!(state().await, (2, 1), "{days} d later");
        }
    }
}
