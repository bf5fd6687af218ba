//! The two TLS doors of the CA, tried with what must not pass: plaintext, older TLS, other protocols,
//! and identities that other authorities signed. A refusal is judged by reading: in TLS 1.3 the
//! client's handshake ends before the server has judged it.

use std::{
    net::SocketAddr,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use ca_server::store::Authority;
use node_agent::{keys::PrivateKey, statedir::Identity};
use raymtls_proto::{clock::TlsTime, v1};
use raymtls_tests::{Deployment, ask, node_leaf, word};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    version::TLS13,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use x509_parser::prelude::{FromDer, X509Certificate};

const DAY: Duration = Duration::from_secs(86_400);
const SOON: Duration = Duration::from_secs(10);
/// First byte of a TLS alert record (RFC 8446 5.1).
const TLS_ALERT: u8 = 21;

#[tokio::test]
async fn plaintext_gets_no_answer_but_an_alert() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let before = deployment.held().await;
    let said: [(&str, &[u8]); 5] = [
        ("HTTP/1.1", b"GET / HTTP/1.1\r\nHost: ca\r\n\r\n"),
        (
            "an upgrade to h2c",
            b"GET / HTTP/1.1\r\nHost: ca\r\nConnection: Upgrade, HTTP2-Settings\r\n\
              Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        ),
        ("h2c", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
        ("SSL 2", &[0x80, 0x2e, 1, 0, 2, 0, 0x15, 0, 0, 0, 0x10]),
        ("bytes", &[0; 512]),
    ];
    for door in [deployment.enrollment, deployment.nodes] {
        for (what, bytes) in said {
            let mut stream = TcpStream::connect(door).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            let mut heard = Vec::new();
            // Reset or closed: both are an end.
            let _ = timeout(SOON, stream.read_to_end(&mut heard)).await.expect(what);
            assert!(heard.first().is_none_or(|b| *b == TLS_ALERT), "{what}: {heard:?}");
            assert!(heard.len() <= 7, "{what}: more than an alert: {heard:?}");
        }
    }
    assert_eq!(deployment.held().await, before);
    still_serves(&deployment).await;
    deployment.finish().await;
}

#[tokio::test]
async fn nothing_older_than_tls_1_3_is_spoken() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    for door in [deployment.enrollment, deployment.nodes] {
        for version in ["-tls1", "-tls1_1", "-tls1_2"] {
            let said = s_client(door, &[version, "-cipher", "ALL:@SECLEVEL=0"]).await;
            // protocol_version or handshake_failure (RFC 8446 6.2), sent by the server.
            let alert = ["SSL alert number 70", "SSL alert number 40"];
            assert!(alert.iter().any(|alert| said.contains(alert)), "{version}: {said}");
            assert!(!said.contains("BEGIN CERTIFICATE"), "{version}: a certificate was shown");
        }
    }
    // The same program is answered in TLS 1.3: the refusals above are not its own.
    let said = s_client(deployment.enrollment, &["-tls1_3", "-alpn", "h2"]).await;
    assert!(said.contains("TLSv1.3") && said.contains("BEGIN CERTIFICATE"), "{said}");
    // And no ticket comes: a resumed session would skip the client's verification.
    assert!(!said.contains("New Session Ticket arrived"), "{said}");
    still_serves(&deployment).await;
    deployment.finish().await;
}

#[tokio::test]
async fn only_http_2_by_name_is_spoken() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    for (door, identity) in
        [(deployment.enrollment, None), (deployment.nodes, Some(&member.identity))]
    {
        assert!(speaks(&deployment, door, identity, &[b"h2"]).await, "the real one");
        assert!(!speaks(&deployment, door, identity, &[b"http/1.1"]).await, "another protocol");
        assert!(!speaks(&deployment, door, identity, &[]).await, "no protocol named");
    }
    deployment.finish().await;
}

#[tokio::test]
async fn an_identity_of_another_authority_is_let_in_nowhere() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let other = Deployment::start().await;
    other.cluster("c1", DAY).await;
    let stranger = other.worker("c1", "w1", "10.0.0.1").await;
    let control = deployment.ca.authority(&Authority::Control).unwrap();
    let uri = "spiffe://ray.example/cluster/c1/agent/w1";
    let before = deployment.held().await;

    let impostors = [
        ("another deployment of the same name", stranger.identity),
        ("a root of the same name", forged(&control.root_der, uri)),
        ("an issuer of the same name", forged(control.active().certificate_der(), uri)),
        ("itself", self_signed(uri)),
    ];
    for (who, identity) in impostors {
        let client = deployment.node_client(&identity);
        let key = PrivateKey::generate().unwrap();
        assert_ne!(word(client.issue_leaf(node_leaf(&key)).await), "OK", "{who}");
        assert!(!speaks(&deployment, deployment.nodes, Some(&identity), &[b"h2"]).await, "{who}");
    }
    assert_eq!(deployment.held().await, before);
    assert!(speaks(&deployment, deployment.nodes, Some(&member.identity), &[b"h2"]).await);
    deployment.finish().await;
    other.finish().await;
}

async fn still_serves(deployment: &Deployment) {
    let token = deployment.token("c1", v1::Role::Worker, 1).await;
    let key = PrivateKey::generate().unwrap();
    deployment.enroll(ask(&token, "c1", "good", &["10.0.0.9"], &key), key).await.unwrap();
}

/// What `openssl s_client` says of a door.
async fn s_client(door: SocketAddr, options: &[&str]) -> String {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-showcerts", "-connect", &door.to_string()]);
    command.args(options).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).into_owned()
}

/// Whether the server speaks HTTP/2 after the handshake: its first frame is SETTINGS.
async fn speaks(
    deployment: &Deployment,
    door: SocketAddr,
    identity: Option<&Identity>,
    protocols: &[&[u8]],
) -> bool {
    let mut roots = RootCertStore::empty();
    for root in deployment.target(door).control_roots {
        roots.add(root).unwrap();
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let time = Arc::new(TlsTime(Arc::new(deployment.clock.clone())));
    let config = ClientConfig::builder_with_details(provider, time)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => config.with_no_client_auth(),
        Some(identity) => {
            let key = PrivateKeyDer::from_pem_slice(identity.key.to_pem().as_bytes()).unwrap();
            config.with_client_auth_cert(identity.chain.certificates(), key).unwrap()
        }
    };
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let stream = TcpStream::connect(door).await.unwrap();
    let name = ServerName::try_from("ca.ray.example").unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let Ok(mut stream) = connector.connect(name, stream).await else { return false };
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    if stream.write_all(preface).await.is_err() {
        return false;
    }
    let mut frame = [0; 9];
    let read = timeout(SOON, stream.read_exact(&mut frame)).await.expect("neither word nor end");
    read.is_ok() && frame[3] == 4
}

/// An identity below an authority that has the name of the given one and a key of its own.
fn forged(model_der: &[u8], uri: &str) -> Identity {
    let (_, model) = X509Certificate::from_der(model_der).unwrap();
    let name = model.subject().iter_common_name().next().unwrap().as_str().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().unwrap();
    let authority = params.self_signed(&key).unwrap();
    let parsed = X509Certificate::from_der(authority.der()).unwrap().1;
    assert_eq!(parsed.subject().as_raw(), model.subject().as_raw(), "not the same name");
    let own = PrivateKey::generate().unwrap();
    let spki = SubjectPublicKeyInfo::from_der(&own.spki_der()).unwrap();
    let leaf = identity_params(uri).signed_by(&spki, &Issuer::new(params, key)).unwrap();
    chain(own, leaf.der(), vec![authority.der().to_vec()])
}

fn self_signed(uri: &str) -> Identity {
    let own = PrivateKey::generate().unwrap();
    let key = KeyPair::from_pem(&own.to_pem()).unwrap();
    let leaf = identity_params(uri).self_signed(&key).unwrap();
    chain(own, leaf.der(), Vec::new())
}

fn identity_params(uri: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.serial_number = Some(SerialNumber::from_slice(&[1; 16]));
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.is_ca = IsCa::ExplicitNoCa;
    params
}

fn chain(key: PrivateKey, leaf: &CertificateDer<'static>, issuers_der: Vec<Vec<u8>>) -> Identity {
    let chain = v1::CertificateChain { leaf_der: leaf.to_vec(), issuers_der };
    Identity::new(key, chain).unwrap()
}
