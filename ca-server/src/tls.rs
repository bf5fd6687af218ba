//! TLS under the gRPC listeners: TLS 1.3 only, no tickets (a resumed session would skip the client
//! verifier), one provider, one clock; and what is known of whoever is through its handshake. The
//! connections themselves are `accept`'s.

use std::{
    net::IpAddr,
    sync::{Arc, OnceLock},
};

use arc_swap::ArcSwap;
use raymtls_proto::{
    address::NodeAddress,
    clock::{Clock, TlsTime},
    identity::Subject,
    leaf::LeafFacts,
};
use rcgen::{KeyPair, PublicKeyData};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use thiserror::Error;

use crate::{
    ca::Ca,
    keys::{profile::Contents, random, signer::SignError},
    refusal::Refusal,
    store::{Authority, Caller},
};

/// A listener's TLS configuration, swapped as a whole.
pub type SharedConfig = Arc<ArcSwap<ServerConfig>>;

/// Why there is no TLS configuration.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The server's certificate could not be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The library.
    #[error("TLS: {0}")]
    Rustls(#[from] rustls::Error),
    /// The library's client verifier.
    #[error("TLS client verifier: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// Key generation.
    #[error("key generation: {0}")]
    Key(#[from] rcgen::Error),
    /// There is no control authority.
    #[error(transparent)]
    Authority(#[from] Refusal),
}

/// Both TLS listeners' configurations, made anew from the control authority.
#[derive(Debug)]
pub struct Configs {
    /// Server-authenticated.
    pub enrollment: Arc<ServerConfig>,
    /// Mutual.
    pub nodes: Arc<ServerConfig>,
    /// When the server's certificate ends, in seconds since 1970.
    pub ends_unix: i64,
}

/// Makes a server key and certificate and the configurations with it. The key never leaves memory.
///
/// # Errors
/// See [`TlsError`].
pub fn configs(ca: &Ca) -> Result<Configs, TlsError> {
    let now = ca.clock.now();
    let control = ca.authority(&Authority::Control)?;
    let key = KeyPair::generate()?;
    let contents = Contents::ca_server(random::serial(now), now, &ca.trust_domain);
    let signed = control.active().sign(&contents, &key.subject_public_key_info(), now)?;
    let chain = vec![signed.certificate_der.into(), control.active().certificate_der().clone()];
    let mut roots = RootCertStore::empty();
    // An identity is signed by one of our own issuers: trusting them as they are saves the signature
    // between issuer and root in each handshake.
    for issuer in control.issuers() {
        roots.add(issuer.certificate_der().clone())?;
    }
    roots.add(CertificateDer::from(control.root_der.clone()))?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
    let pkcs8 = || PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let enrollment =
        builder(&ca.clock)?.with_no_client_auth().with_single_cert(chain.clone(), pkcs8())?;
    let nodes =
        builder(&ca.clock)?.with_client_cert_verifier(verifier).with_single_cert(chain, pkcs8())?;
    Ok(Configs {
        enrollment: finish(enrollment),
        nodes: finish(nodes),
        ends_unix: signed.not_after_ms / 1_000,
    })
}

fn builder(
    clock: &Arc<dyn Clock>,
) -> Result<rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    ServerConfig::builder_with_details(provider, Arc::new(TlsTime(Arc::clone(clock))))
        .with_protocol_versions(&[&TLS13])
}

fn finish(mut config: ServerConfig) -> Arc<ServerConfig> {
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

/// What is known of the other side of a connection, once the handshake is through.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Address the connection comes from: its own, or what a trusted balancer says.
    pub address: IpAddr,
    /// Its certificate, which chains to the control authority; `None` on the enrolment listener.
    pub(crate) identity: Option<Arc<Identity>>,
}

impl Peer {
    /// Canonical source address, if a node can be known by it.
    #[must_use]
    pub fn source(&self) -> Option<NodeAddress> {
        NodeAddress::new(self.address).ok()
    }

    /// The certificate the connection presented.
    #[must_use]
    pub fn identity_der(&self) -> Option<Vec<u8>> {
        self.identity.as_ref().map(|identity| identity.certificate.to_vec())
    }

    /// The agent whose identity the connection presented.
    ///
    /// # Errors
    /// `IdentityUnknown` for any other certificate of the control authority.
    pub fn caller(&self, ca: &Ca) -> Result<Caller, Refusal> {
        let identity = self.identity.as_ref().ok_or(Refusal::IdentityUnknown)?;
        identity.caller.get_or_init(|| self.read(&identity.certificate, ca)).clone()
    }

    fn read(&self, certificate: &[u8], ca: &Ca) -> Result<Caller, Refusal> {
        let facts = LeafFacts::parse(certificate).map_err(|_| Refusal::IdentityUnknown)?;
        let [uri] = facts.uris.as_slice() else { return Err(Refusal::IdentityUnknown) };
        match Subject::parse(uri, &ca.trust_domain) {
            Ok(Subject::Agent(cluster, node)) => {
                Ok(Caller { cluster, node, serial: facts.serial, source: self.source() })
            }
            Ok(Subject::Admin(_) | Subject::RayNode(..) | Subject::RayDriver(..)) | Err(_) => {
                Err(Refusal::IdentityUnknown)
            }
        }
    }
}

/// The certificate of a connection's other side, and the agent in it: read at the first call.
#[derive(Debug)]
pub(crate) struct Identity {
    /// The certificate.
    pub(crate) certificate: CertificateDer<'static>,
    caller: OnceLock<Result<Caller, Refusal>>,
}

impl Identity {
    pub(crate) fn new(certificate: CertificateDer<'static>) -> Self {
        Self { certificate, caller: OnceLock::new() }
    }
}
