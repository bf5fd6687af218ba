//! What a refused call must leave as it was: certificates, uses of tokens, audit records, nodes.

use std::{collections::BTreeMap, sync::Arc};

use ca_server::store::{Store, records::AuditRecord};
use raymtls_proto::{clock::TlsTime, v1};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{Deployment, TRUST_DOMAIN};

/// Everything an issuing call could have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// On record, of all clusters.
    pub certificates: usize,
    /// Spent uses by token.
    pub uses: BTreeMap<String, u32>,
    /// Audit records.
    pub audit: u64,
    /// Nodes on record, of all clusters.
    pub nodes: usize,
}

impl Deployment {
    /// What the CA holds now.
    pub async fn held(&self) -> Held {
        let mut held = Held {
            certificates: 0,
            uses: BTreeMap::new(),
            audit: self.audit_index().await,
            nodes: 0,
        };
        for cluster in self.store.clusters().await.unwrap() {
            let name = cluster.cluster;
            held.certificates += self.certificates(&name).await.len();
            held.uses.extend(self.tokens(&name).await.into_iter().map(|t| (t.id, t.used)));
            let nodes = self.store.nodes(name.parse().unwrap(), String::new()).await.unwrap();
            held.nodes += nodes.rows.len();
        }
        held
    }

    /// Every certificate of a cluster, by time of issue.
    pub async fn certificates(
        &self,
        cluster: &str,
    ) -> Vec<ca_server::store::records::CertificateRecord> {
        let (mut all, mut page) = (Vec::new(), String::new());
        loop {
            let rows = self.store.certificates(cluster.parse().unwrap(), None, page).await.unwrap();
            all.extend(rows.rows);
            page = rows.next;
            if page.is_empty() {
                return all;
            }
        }
    }

    /// The whole audit log.
    pub async fn audit_log(&self) -> Vec<AuditRecord> {
        let mut log: Vec<AuditRecord> = Vec::new();
        loop {
            let after = log.last().map_or(0, |record| record.index);
            let page = self.store.audit(after, 1_000).await.unwrap();
            if page.is_empty() {
                return log;
            }
            log.extend(page);
        }
    }

    /// What the enrolment listener shows in its handshake.
    pub async fn server_certificate(&self) -> Vec<u8> {
        let mut roots = rustls::RootCertStore::empty();
        for root in self.target(self.enrollment).control_roots {
            roots.add(root).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let time = Arc::new(TlsTime(Arc::new(self.clock.clone())));
        let mut config = rustls::ClientConfig::builder_with_details(provider, time)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let stream = TcpStream::connect(self.enrollment).await.unwrap();
        let name = format!("ca.{TRUST_DOMAIN}").try_into().unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
    }

    async fn audit_index(&self) -> u64 {
        self.audit_log().await.last().map_or(0, |record| record.index)
    }
}

/// A token for one worker at one address.
pub fn one_worker(cluster: &str) -> v1::CreateTokenRequest {
    v1::CreateTokenRequest {
        cluster: cluster.to_owned(),
        role: v1::Role::Worker.into(),
        uses: 1,
        address_ranges: vec!["10.0.0.0/8".to_owned()],
        ..v1::CreateTokenRequest::default()
    }
}
