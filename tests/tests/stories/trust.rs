//! Two keys, separate roots: what each certificate is worth at each door. A refusal is judged by
//! reading a byte: in TLS 1.3 the client's handshake ends before the server has judged it.

use std::{sync::Arc, time::Duration};

use ca_server::store::Authority;
use node_agent::{client::EnrollmentClient, keys::PrivateKey, statedir::Identity};
use raymtls_proto::{
    clock::{Clock, SettableClock, TlsTime},
    v1::CertificateChain,
};
use raymtls_tests::{Deployment, Member, ask, limits, node_leaf, word};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
    version::TLS13,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use x509_parser::prelude::{FromDer, X509Certificate};

const DAY: Duration = Duration::from_secs(86_400);
const SOON: Duration = Duration::from_secs(10);

struct Leaf {
    chain: CertificateChain,
    key: PrivateKey,
    root: CertificateDer<'static>,
}

async fn leaf(member: &Member) -> Leaf {
    let key = PrivateKey::generate().unwrap();
    let answer = member.client.issue_leaf(node_leaf(&key)).await.unwrap();
    let root = answer.bundle.unwrap().roots_der.remove(0).into();
    Leaf { chain: answer.leaf.unwrap(), key, root }
}

fn key_der(key: &PrivateKey) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_slice(key.to_pem().as_bytes()).unwrap()
}

fn roots(root: &CertificateDer<'static>) -> Arc<RootCertStore> {
    let mut store = RootCertStore::empty();
    store.add(root.clone()).unwrap();
    Arc::new(store)
}

/// A port as Ray serves it: the node's leaf, a client certificate wanted. It plays Ray's part where
/// no Ray is needed; the same doors are tried on a real cluster in the quickstart.
async fn ray_port(own: &Leaf, clock: &SettableClock) -> std::net::SocketAddr {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(&own.root), provider.clone());
    let time = Arc::new(TlsTime(Arc::new(clock.clone())));
    let config = ServerConfig::builder_with_details(provider, time)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(own.chain.certificates(), key_der(&own.key))
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let _ = stream.write_all(b"!").await;
                let _ = stream.shutdown().await;
            }
        }
    });
    address
}

/// Dials with a certificate and reads a byte.
async fn is_let_in(
    address: std::net::SocketAddr,
    server_root: &CertificateDer<'static>,
    chain: &CertificateChain,
    key: &PrivateKey,
    clock: &SettableClock,
) -> bool {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let time = Arc::new(TlsTime(Arc::new(clock.clone())));
    let config = ClientConfig::builder_with_details(provider, time)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots(server_root))
        .with_client_auth_cert(chain.certificates(), key_der(key))
        .unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let Ok(mut stream) = connector.connect(name, stream).await else { return false };
    let mut byte = [0];
    timeout(SOON, stream.read_exact(&mut byte)).await.unwrap().is_ok()
}

#[tokio::test]
async fn a_leaf_speaks_ray_in_its_own_cluster_and_an_identity_speaks_to_the_ca() {
    let deployment = Deployment::start().await;
    deployment.cluster("a", DAY).await;
    deployment.cluster("b", DAY).await;
    let member = deployment.worker("a", "w1", "10.0.0.1").await;
    let peer = deployment.worker("a", "w2", "10.0.0.2").await;
    let stranger = deployment.worker("b", "w1", "10.0.0.1").await;
    let (own, peer, foreign) = (leaf(&member).await, leaf(&peer).await, leaf(&stranger).await);
    let clock = &deployment.clock;
    let door = ray_port(&own, clock).await;
    let knock = async |chain: &CertificateChain, key: &PrivateKey| {
        is_let_in(door, &own.root, chain, key, clock).await
    };

    assert!(knock(&peer.chain, &peer.key).await, "a leaf of the same cluster is let in");
    assert!(!knock(&foreign.chain, &foreign.key).await, "cluster b's leaf at cluster a");
    let identity = &member.identity;
    assert!(!knock(&identity.chain, &identity.key).await, "an identity at a Ray port");

    // The other way round: a Ray leaf at the node listener.
    let disguised = Identity::new(peer.key, peer.chain).unwrap();
    let key = PrivateKey::generate().unwrap();
    let call = deployment.node_client(&disguised).issue_leaf(node_leaf(&key)).await;
    assert_ne!(word(call), "OK", "a Ray leaf was let in at the node listener");
    assert_eq!(word(member.client.issue_leaf(node_leaf(&key)).await), "OK");
    deployment.finish().await;
}

/// A server that is not the CA and counts what it is told after the handshake.
async fn impostor(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    clock: &SettableClock,
) -> (std::net::SocketAddr, JoinHandle<usize>) {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let time = Arc::new(TlsTime(Arc::new(clock.clone()) as Arc<dyn Clock>));
    let mut config = ServerConfig::builder_with_details(provider, time)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let told = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let Ok(mut stream) = acceptor.accept(stream).await else { return 0 };
        let mut heard = Vec::new();
        let _ = timeout(SOON, stream.read_to_end(&mut heard)).await;
        heard.len()
    });
    (address, told)
}

/// A server with the CA's name below an authority that has the name of ours and another key.
fn namesake(
    who: &'static str,
    model_der: &[u8],
) -> (&'static str, Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let (_, model) = X509Certificate::from_der(model_der).unwrap();
    let name = model.subject().iter_common_name().next().unwrap().as_str().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let authority = params.self_signed(&key).unwrap();
    let server_key = KeyPair::generate().unwrap();
    let mut server = CertificateParams::new(vec!["ca.ray.example".to_owned()]).unwrap();
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let server = server.signed_by(&server_key, &Issuer::new(params, key)).unwrap();
    let chain = vec![server.der().clone(), authority.der().clone()];
    (who, chain, PrivateKeyDer::try_from(server_key.serialize_der()).unwrap())
}

#[tokio::test]
async fn a_false_ca_hears_nothing_of_the_token() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let token = deployment.token("c1", raymtls_proto::v1::Role::Worker, 1).await;
    let leaf = leaf(&member).await;
    let other = rcgen::generate_simple_self_signed(vec!["ca.ray.example".to_owned()]).unwrap();
    let other_key = PrivateKeyDer::try_from(other.signing_key.serialize_der()).unwrap();
    let control = deployment.ca.authority(&Authority::Control).unwrap();

    let impostors = [
        (
            "a node with its own identity",
            member.identity.chain.certificates(),
            key_der(&member.identity.key),
        ),
        ("a node with its Ray leaf", leaf.chain.certificates(), key_der(&leaf.key)),
        ("a server of another root", vec![other.cert.der().clone()], other_key),
        namesake("a root of the same name", &control.root_der),
        namesake("an issuer of the same name", control.active().certificate_der()),
    ];
    for (who, chain, key) in impostors {
        let (address, told) = impostor(chain, key, &deployment.clock).await;
        let target = deployment.target(address);
        let clock = Arc::new(deployment.clock.clone());
        let mut client = EnrollmentClient::new(&target, limits(), clock).unwrap();
        let key = PrivateKey::generate().unwrap();
        let result = client.enroll(ask(&token, "c1", "w2", &["10.0.0.2"], &key)).await;
        assert_eq!(word(result), "CA_UNTRUSTED", "{who}");
        drop(client);
        assert_eq!(told.await.unwrap(), 0, "{who} heard something");
    }

    // The real one hears it.
    let key = PrivateKey::generate().unwrap();
    let request = ask(&token, "c1", "w2", &["10.0.0.2"], &key);
    deployment.enrollment_client().enroll(request).await.unwrap();
    deployment.finish().await;
}
