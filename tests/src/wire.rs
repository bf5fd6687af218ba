//! Connections as an attacker or a balancer makes them: from a chosen loopback address, with bytes of
//! their own choosing before and inside TLS.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use hyper_util::rt::TokioIo;
use node_agent::statedir::Identity;
use raymtls_proto::v1::{
    enrollment_service_client::EnrollmentServiceClient, node_service_client::NodeServiceClient,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpSocket, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};

/// A TCP connection from 127.0.0.`last`.
pub async fn connect_from(last: u8, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into())?;
    socket.connect(to).await
}

/// How a client knows the CA that follows no rule of ours.
pub struct Stranger {
    tls: TlsConnector,
    server_name: ServerName<'static>,
}

impl Stranger {
    /// Without an identity.
    pub fn new(control_root: CertificateDer<'static>, server_name: &str) -> Self {
        Self::with(control_root, server_name, None)
    }

    /// With a node's.
    pub fn enrolled(
        control_root: CertificateDer<'static>,
        server_name: &str,
        identity: &Identity,
    ) -> Self {
        Self::with(control_root, server_name, Some(identity))
    }

    fn with(
        control_root: CertificateDer<'static>,
        server_name: &str,
        identity: Option<&Identity>,
    ) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(control_root).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match identity {
            None => config.with_no_client_auth(),
            Some(identity) => {
                config.with_client_auth_cert(identity.chain.certificates(), key(identity)).unwrap()
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        let server_name = ServerName::try_from(server_name.to_owned()).unwrap();
        Self { tls: TlsConnector::from(Arc::new(config)), server_name }
    }

    /// TLS over a connection.
    pub async fn tls(&self, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.tls.connect(self.server_name.clone(), tcp).await
    }

    /// gRPC from 127.0.0.`last`, on one connection.
    pub async fn grpc(&self, last: u8, to: SocketAddr) -> EnrollmentServiceClient<Channel> {
        EnrollmentServiceClient::new(self.channel(last, to, None).await.unwrap())
    }

    /// The node's calls on one connection whose windows are 0: it takes no answer.
    pub async fn deaf(
        &self,
        to: SocketAddr,
    ) -> Result<NodeServiceClient<Channel>, tonic::transport::Error> {
        self.channel(1, to, Some(0)).await.map(NodeServiceClient::new)
    }

    async fn channel(
        &self,
        last: u8,
        to: SocketAddr,
        window_len: Option<u32>,
    ) -> Result<Channel, tonic::transport::Error> {
        let stream = self.tls(connect_from(last, to).await.unwrap()).await.ok();
        let mut stream = Some(stream);
        let connector = tower::service_fn(move |_: http::Uri| {
            let stream = stream.take().flatten();
            async move { stream.map(TokioIo::new).ok_or_else(|| io::Error::other("no stream left")) }
        });
        let origin = format!("https://{}", self.server_name.to_str());
        let endpoint = Endpoint::from_static("http://ca").origin(origin.parse().unwrap());
        let endpoint = endpoint.initial_stream_window_size(window_len);
        endpoint.connect_with_connector(connector).await
    }

    /// The first bytes of a handshake: a whole `ClientHello` record.
    pub fn client_hello(&self) -> Vec<u8> {
        let config = Arc::clone(self.tls.config());
        let mut connection =
            rustls::ClientConnection::new(config, self.server_name.clone()).unwrap();
        let mut bytes = Vec::new();
        connection.write_tls(&mut bytes).unwrap();
        bytes
    }
}

/// A balancer on 127.0.0.`last` that writes `header` before what it passes on.
pub async fn balancer(last: u8, header: Vec<u8>, to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let header = header.clone();
            tokio::spawn(async move {
                let mut server = connect_from(last, to).await?;
                server.write_all(&header).await?;
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    address
}

/// A PROXY protocol header of version 2 for TCP over IPv4.
pub fn proxy_header(source: Ipv4Addr) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    header.extend(source.octets());
    header.extend([192, 0, 2, 1, 0x30, 0x39, 0x1d, 0x13]);
    header
}

/// A health check's header: LOCAL, no addresses.
pub fn local_header() -> Vec<u8> {
    b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec()
}

fn key(identity: &Identity) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_slice(identity.key.to_pem().as_bytes()).unwrap()
}
