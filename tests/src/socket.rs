//! The operator's socket of a deployment, as `ca-admin` uses it.

use hyper_util::rt::TokioIo;
use raymtls_proto::v1::admin_service_client::AdminServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::{ADMIN_SOCKET, Deployment};

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
