//! Rules and key folder as they are in force: read together, judged together, swapped together. It
//! decides nothing about a flow.

use std::{collections::HashSet, net::IpAddr, path::Path, sync::Arc};

use raymtls_proto::clock::{Clock, TlsTime};
use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    server::{NoServerSessionStorage, VerifierBuilderError},
    sign::SingleCertAndKey,
};
use thiserror::Error;

use super::{
    credentials::{Credentials, CredentialsError},
    header::ALPN,
    rules::{AddressBook, Rules, RulesError},
    verifier::{ClientCheck, Judge, ServerCheck},
};

/// Why what was read is not in force.
#[derive(Debug, Error)]
pub(super) enum LoadError {
    /// The rules.
    #[error(transparent)]
    Rules(#[from] RulesError),
    /// The key folder.
    #[error("the key folder: {0}")]
    Credentials(#[from] CredentialsError),
    /// Roots or CRLs.
    #[error("the key folder: {0}")]
    Verifier(#[from] VerifierBuilderError),
    /// The library.
    #[error("the key folder: {0}")]
    Tls(#[from] rustls::Error),
}

/// What is in force.
#[derive(Debug)]
pub(crate) struct InForce {
    pub(crate) rules: Arc<Rules>,
    pub(crate) credentials: Credentials,
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
    book: AddressBook,
    blocked: HashSet<IpAddr>,
}

impl InForce {
    /// Reads both.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub(crate) fn load(path: &Path, clock: &Arc<dyn Clock>) -> Result<Self, LoadError> {
        let rules = Arc::new(Rules::read(path)?);
        let credentials = Credentials::load(&rules)?;
        Ok(Self {
            client: Arc::new(client_config(&credentials, &rules, clock)?),
            server: Arc::new(server_config(&credentials, &rules, clock)?),
            book: AddressBook::of(&rules.members),
            blocked: rules.blocked.iter().copied().collect(),
            rules,
            credentials,
        })
    }

    /// What is to be said of a peer at this address.
    pub(crate) fn judge(&self, address: IpAddr) -> Judge<'_> {
        Judge {
            book: &self.book,
            is_blocked: self.blocked.contains(&address),
            revoked: &self.credentials.revoked,
        }
    }

    /// Whether the address is this node's.
    pub(crate) fn is_own(&self, address: IpAddr) -> bool {
        self.rules.addresses.contains(&address)
    }

    /// The address to dial from.
    pub(crate) fn source_for(&self, address: IpAddr) -> Option<IpAddr> {
        self.rules.addresses.iter().copied().find(|own| own.is_ipv4() == address.is_ipv4())
    }
}

fn client_config(
    credentials: &Credentials,
    rules: &Arc<Rules>,
    clock: &Arc<dyn Clock>,
) -> Result<ClientConfig, LoadError> {
    let check = Arc::new(ServerCheck::new(credentials, rules.clone())?);
    let time = Arc::new(TlsTime(clock.clone()));
    let mut config = ClientConfig::builder_with_details(super::provider(), time)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(check)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(credentials.own.clone())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // A session that is taken up again repeats no check of the chain.
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

fn server_config(
    credentials: &Credentials,
    rules: &Arc<Rules>,
    clock: &Arc<dyn Clock>,
) -> Result<ServerConfig, LoadError> {
    let check = Arc::new(ClientCheck::new(credentials, rules.clone())?);
    let time = Arc::new(TlsTime(clock.clone()));
    let mut config = ServerConfig::builder_with_details(super::provider(), time)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(check)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(credentials.own.clone())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}
