//! The running authority: everything a request needs, in one place. Each request is a function in a
//! file of its own ([`crate::enroll`], [`crate::renew`], ...), straight from what came in to what
//! goes out.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use raymtls_proto::{
    checkpoint,
    clock::Clock,
    identity::{ClusterId, TrustDomain},
    v1::{self, LogAlarm},
};
use thiserror::Error;
use time::OffsetDateTime;
use tokio::sync::{Mutex, watch};
use tracing::error;

use crate::{
    checkpoints,
    contacts::Contacts,
    jwt::Workloads,
    keys::{
        authority::{AuthorityError, LiveAuthority},
        kek::Kek,
    },
    limits::{Limiter, Limits, quiet::Quiet},
    metrics::Metrics,
    proxy_protocol::TrustedProxies,
    refusal::Refusal,
    restoring::Restoring,
    serving::Serving,
    store::{
        Authority, Store, StoreError,
        records::{CertificateRecord, Checkpoint, ClusterRecord, RestoresRecord},
    },
    sync::Told,
};

/// Where agents find the server: goes into join files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// `host:port` of the enrolment listener.
    pub enrollment: Vec<String>,
    /// `host:port` of the node listener.
    pub nodes: Vec<String>,
}

impl Endpoints {
    /// Those given as addresses: no block may cover them.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let all = self.enrollment.iter().chain(&self.nodes);
        all.filter_map(|endpoint| endpoint.parse::<SocketAddr>().ok())
            .map(|address| address.ip().to_canonical())
            .collect()
    }

    /// The ports of all of them, whatever their hosts: no plan may cover one.
    #[must_use]
    pub fn ports(&self) -> Vec<u16> {
        let all = self.enrollment.iter().chain(&self.nodes);
        all.filter_map(|endpoint| endpoint.rsplit_once(':')?.1.parse().ok()).collect()
    }
}

/// The running authority.
#[derive(Debug)]
pub struct Ca {
    /// What is remembered.
    pub store: Arc<dyn Store>,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
    /// What keys are wrapped with.
    pub kek: Kek,
    /// The deployment.
    pub trust_domain: TrustDomain,
    /// Where agents find us.
    pub endpoints: Endpoints,
    /// Who called lately, and who waits.
    pub contacts: Contacts,
    /// Since when silence of nodes counts.
    pub serving: Serving,
    /// What agents are told, read once for all of them.
    pub told: Told,
    /// What is counted.
    pub metrics: Metrics,
    /// How much may be asked.
    pub limits: Limits,
    /// What has been asked lately.
    pub limiter: Limiter,
    /// Which refusals the log hears of.
    pub quiet: Quiet,
    /// Whose word on where a connection comes from is taken.
    pub trusted_proxies: TrustedProxies,
    /// Whose JWTs enrol what.
    pub workloads: Workloads,
    /// When this server began to serve.
    pub started: OffsetDateTime,
    /// The newest checkpoint of the audit log.
    pub(crate) checkpoint: ArcSwapOption<Checkpoint>,
    /// The restores the store went through.
    pub(crate) restores: ArcSwap<RestoresRecord>,
    /// What the nodes say to a restored CA.
    pub restoring: Restoring,
    /// What the store's own checkpoint said of its log when it was opened.
    log_fault: Option<LogAlarm>,
    authorities: ArcSwap<BTreeMap<Authority, Arc<LiveAuthority>>>,
    /// Held by whoever makes issuers or CRLs: two at once would sign two sets with one number.
    pub(crate) upkeep: Mutex<()>,
    stopping: watch::Sender<bool>,
}

/// Why the authority cannot run.
#[derive(Debug, Error)]
pub enum CaError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The keys.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// Nothing there yet.
    #[error("the store holds no control authority: run `ca-server init` first")]
    NotInitialized,
    /// The record is not ours.
    #[error("the store's trust domain is not valid: {0}")]
    TrustDomain(#[from] raymtls_proto::identity::NameError),
}

impl Ca {
    /// Loads the authority from its store.
    ///
    /// # Errors
    /// See [`CaError`].
    pub async fn load(
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
        kek: Kek,
        endpoints: Endpoints,
    ) -> Result<Self, CaError> {
        let control = store.control().await?.ok_or(CaError::NotInitialized)?;
        let mut ca = Self {
            trust_domain: control.trust_domain.parse()?,
            started: clock.now(),
            metrics: Metrics::new(Arc::clone(&store)),
            store,
            serving: Serving::from_now(&*clock),
            clock,
            kek,
            endpoints,
            contacts: Contacts::default(),
            told: Told::default(),
            limits: Limits::default(),
            limiter: Limiter::default(),
            quiet: Quiet::default(),
            trusted_proxies: TrustedProxies::default(),
            workloads: Workloads::default(),
            checkpoint: ArcSwapOption::default(),
            restores: ArcSwap::default(),
            restoring: Restoring::default(),
            log_fault: None,
            authorities: ArcSwap::default(),
            upkeep: Mutex::default(),
            stopping: watch::Sender::new(false),
        };
        ca.load_authority(&Authority::Control).await?;
        ca.load_log().await?;
        for cluster in ca.store.clusters().await? {
            ca.load_authority(&Authority::Cluster(cluster.cluster.parse()?)).await?;
        }
        Ok(ca)
    }

    /// Compares the audit log with its own checkpoint: whoever edited it without the CA's keys could
    /// not sign another.
    async fn load_log(&mut self) -> Result<(), CaError> {
        self.restores.store(Arc::new(self.store.restores().await?));
        let state = self.store.audit_state().await?;
        self.log_fault = checkpoints::judge_store(self, &state).await?;
        if let Some(why) = self.log_fault.and_then(checkpoint::in_words) {
            error!("AUDIT LOG ALARM: {why}; no checkpoint is signed; restore a backup");
        }
        self.checkpoint.store(state.checkpoint.map(Arc::new));
        Ok(())
    }

    /// Whether the CA waits for an operator to accept that it was restored.
    #[must_use]
    pub fn is_restored(&self) -> bool {
        self.restores.load().pending().is_some()
    }

    /// Refuses everything but Sync until a restore is accepted.
    ///
    /// # Errors
    /// `CaRestored`.
    pub fn require_accepted(&self) -> Result<(), Refusal> {
        if self.is_restored() { Err(Refusal::CaRestored) } else { Ok(()) }
    }

    /// What is wrong with the audit log by the store's own checkpoint.
    #[must_use]
    pub fn log_fault(&self) -> Option<LogAlarm> {
        self.log_fault
    }

    /// The same with other limits than the default ones.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limiter = Limiter::new(&limits);
        self.limits = limits;
        self
    }

    /// The same behind balancers that speak the PROXY protocol.
    #[must_use]
    pub fn behind(mut self, trusted_proxies: TrustedProxies) -> Self {
        self.trusted_proxies = trusted_proxies;
        self
    }

    /// The same for workloads whose JWTs these rules trust.
    #[must_use]
    pub fn trusting(mut self, workloads: Workloads) -> Self {
        self.workloads = workloads;
        self
    }

    /// From here on no call waits any more.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Whether the server is stopping.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Returns once the server is stopping.
    pub async fn stopped(&self) {
        // The sender lives as long as `self`.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }

    /// Takes an authority's issuers and CRLs from the store again.
    ///
    /// # Errors
    /// See [`CaError`].
    pub async fn load_authority(&self, authority: &Authority) -> Result<(), CaError> {
        // CRLs first: a set read early is replaced by whoever puts a newer one; the other way round
        // the newer could be lost here.
        let crls = self.store.crls(authority.clone()).await?;
        let crls_der = crls.map(|set| set.crls_der).unwrap_or_default();
        let live = match authority {
            Authority::Control => {
                let record = self.store.control().await?.ok_or(CaError::NotInitialized)?;
                LiveAuthority::control(&self.kek, &record)?
            }
            Authority::Cluster(cluster) => {
                let record = self.store.cluster(cluster.clone()).await?;
                LiveAuthority::cluster(&self.kek, cluster, &record)?
            }
        };
        self.put_authority(authority.clone(), live.with_crls(crls_der));
        Ok(())
    }

    fn put_authority(&self, authority: Authority, live: LiveAuthority) {
        let live = Arc::new(live);
        self.authorities.rcu(|authorities| {
            let mut next = BTreeMap::clone(authorities);
            next.insert(authority.clone(), Arc::clone(&live));
            next
        });
    }

    /// An authority ready to sign.
    ///
    /// # Errors
    /// `NotFound` for a cluster that is not there.
    pub fn authority(&self, authority: &Authority) -> Result<Arc<LiveAuthority>, Refusal> {
        self.authorities.load().get(authority).cloned().ok_or_else(|| Refusal::NotFound {
            what: "cluster",
            name: authority.cluster().to_owned(),
        })
    }

    /// All authorities that are ready to sign.
    #[must_use]
    pub fn authorities(&self) -> Vec<(Authority, Arc<LiveAuthority>)> {
        self.authorities.load().iter().map(|(a, l)| (a.clone(), Arc::clone(l))).collect()
    }

    /// Whether the authority is a cluster's whose life is over: nothing is signed for it any more.
    ///
    /// # Errors
    /// The store.
    pub async fn has_ended(&self, authority: &Authority) -> Result<bool, StoreError> {
        let Authority::Cluster(cluster) = authority else { return Ok(false) };
        let ends_unix = self.store.cluster(cluster.clone()).await?.settings().ends_unix;
        Ok(ends_unix != 0 && self.clock.now().unix_timestamp() >= ends_unix)
    }

    /// A recorded certificate with its issuer, as TLS sends them.
    ///
    /// # Errors
    /// `Internal` where the issuer is gone, which only happens to expired certificates.
    pub fn chain(
        &self,
        authority: &Authority,
        certificate_der: Vec<u8>,
        issuer_key_id: &[u8],
    ) -> Result<v1::CertificateChain, Refusal> {
        let issuer = self.authority(authority)?.issuer_der(issuer_key_id);
        let issuer = issuer.ok_or_else(|| {
            error!(%authority, "no issuer for a certificate on record");
            Refusal::Internal
        })?;
        Ok(v1::CertificateChain { leaf_der: certificate_der, issuers_der: vec![issuer] })
    }

    /// The same for an identity on record.
    ///
    /// # Errors
    /// As [`Ca::chain`].
    pub fn identity_chain(
        &self,
        record: CertificateRecord,
    ) -> Result<v1::CertificateChain, Refusal> {
        self.chain(&Authority::Control, record.certificate_der, &record.issuer_key_id)
    }

    /// What a cluster's Ray processes must trust.
    ///
    /// # Errors
    /// `NotFound` for a cluster that is not there.
    pub fn bundle(&self, cluster: &ClusterId) -> Result<v1::TrustBundle, Refusal> {
        let live = self.authority(&Authority::Cluster(cluster.clone()))?;
        Ok(v1::TrustBundle {
            roots_der: vec![live.root_der.clone()],
            crls_der: live.crls_der().to_vec(),
        })
    }

    /// A cluster's Ray token, unwrapped.
    ///
    /// # Errors
    /// `Internal` where it does not unwrap.
    pub fn ray_token(
        &self,
        id: &ClusterId,
        cluster: &ClusterRecord,
    ) -> Result<v1::RayToken, Refusal> {
        let name = crate::keys::authority::ray_token_name(id);
        let token = self.kek.unwrap(&name, &cluster.wrapped_ray_token).map_err(|e| {
            error!(cluster = %id, error = %e, "the Ray token does not unwrap");
            Refusal::Internal
        })?;
        Ok(v1::RayToken { token: token.to_vec() })
    }
}
