//! The operator's socket of a deployment, as `ca-admin` uses it.

use ca_server::store::{Authority, Store};
use hyper_util::rt::TokioIo;
use raymtls_proto::{serial::Serial, v1::admin_service_client::AdminServiceClient};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use x509_parser::prelude::{CertificateRevocationList, FromDer};

use crate::{ADMIN_SOCKET, Deployment};

impl Deployment {
    /// Serials of Ray leaves on a cluster's CRLs.
    pub async fn store_crl_serials(&self, cluster: &str) -> Vec<String> {
        let authority = Authority::Cluster(cluster.parse().unwrap());
        let set = self.store.crls(authority).await.unwrap().unwrap();
        let mut serials = Vec::new();
        for der in &set.crls_der {
            let (_, crl) = CertificateRevocationList::from_der(der).unwrap();
            let entries = crl.iter_revoked_certificates().map(|entry| entry.raw_serial());
            serials.extend(entries.map(|raw| Serial::from_slice(raw).unwrap().to_string()));
        }
        serials
    }
}

/// A connection to it.
pub async fn admin(deployment: &Deployment) -> AdminServiceClient<Channel> {
    let socket = deployment.folder.path().join(ADMIN_SOCKET);
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://ca-admin.invalid");
    AdminServiceClient::new(endpoint.connect_with_connector(connector).await.unwrap())
}
