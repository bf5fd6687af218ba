//! Every word has a stand-in that earns it: real TLS servers, real sockets, and a clock that is set.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use raymtls_proto::{
    clock::{SettableClock, TlsTime},
    leaf::LeafFacts,
    serial::Serial,
    v1::CertificateChain,
};
use rcgen::{
    CertificateParams, CertifiedIssuer, DistinguishedName,
    ExtendedKeyUsagePurpose::{self, ClientAuth, ServerAuth},
    IsCa, KeyPair, KeyUsagePurpose, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::Instant,
};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    Bounds, Explained, Ours, Own, Word,
    dial::{NoConnection, Seen, Target},
    explain, judge,
};
use crate::{
    keys::PrivateKey,
    served::{
        probe::{Answer, Hello},
        tests::judging::{NOW, authority},
    },
};

const HOUR: Duration = Duration::from_secs(3_600);
const BOTH: &[ExtendedKeyUsagePurpose] = &[ServerAuth, ClientAuth];
const BOUNDS: Bounds =
    Bounds { connect: Duration::from_millis(300), talk: Duration::from_millis(600) };
/// SETTINGS without any, as a server of HTTP/2 begins.
const SETTINGS: &[u8] = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00";

struct Ca(Vec<u8>, CertifiedIssuer<'static, KeyPair>);

/// A leaf that is wrong in what a row says.
#[derive(Clone, Copy)]
struct Leaf {
    begins: time::Duration,
    ends: time::Duration,
    usages: &'static [ExtendedKeyUsagePurpose],
    address: &'static str,
}

const GOOD: Leaf = Leaf {
    begins: time::Duration::hours(-1),
    ends: time::Duration::hours(1),
    usages: BOTH,
    address: "127.0.0.1",
};
const OVER: Leaf = Leaf { ends: time::Duration::minutes(-1), ..GOOD };
const NEVER: Leaf = Leaf { ends: time::Duration::hours(-2), ..GOOD };
const TOO_EARLY: Leaf = Leaf { begins: time::Duration::minutes(1), ..GOOD };

impl Ca {
    fn new(name: &str) -> Self {
        let (root_der, issuer) = authority(name);
        Self(root_der, issuer)
    }

    fn own(&self, leaf: Leaf) -> Own {
        let key = PrivateKey::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let serial = Serial::new(1, rand::random());
        params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
        params.not_before = NOW + leaf.begins;
        params.not_after = NOW + leaf.ends;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = leaf.usages.to_vec();
        let uri = "spiffe://ray.example/cluster/c1/node/n1";
        let address: IpAddr = leaf.address.parse().unwrap();
        params.subject_alt_names =
            vec![SanType::URI(uri.try_into().unwrap()), SanType::IpAddress(address)];
        let spki = SubjectPublicKeyInfo::from_der(&key.spki_der()).unwrap();
        let leaf_der = params.signed_by(&spki, &self.1).unwrap().der().to_vec();
        let chain = CertificateChain { leaf_der, issuers_der: vec![self.1.der().to_vec()] };
        let facts = LeafFacts::parse(&chain.leaf_der).unwrap();
        Own { facts, chain, key, roots: vec![self.0.clone().into()] }
    }

    /// A process of Ray as far as a caller sees it, whose clock is off by this.
    async fn serve(&self, leaf: Leaf, trusted: &Self, ahead: time::Duration) -> SocketAddr {
        let acceptor = self.acceptor(leaf, trusted, ahead);
        listen(move |tcp| {
            let acceptor = acceptor.clone();
            async move {
                let Ok(mut tls) = acceptor.accept(tcp).await else { return };
                let _ = tls.write_all(SETTINGS).await;
                let _ = tls.read_to_end(&mut Vec::new()).await;
            }
        })
        .await
    }

    fn acceptor(&self, leaf: Leaf, trusted: &Self, ahead: time::Duration) -> TlsAcceptor {
        let own = self.own(leaf);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(trusted.0.clone().into()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
        let clock = TlsTime(Arc::new(SettableClock::new(NOW + ahead)));
        let mut config = ServerConfig::builder_with_details(provider, Arc::new(clock))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(own.chain.certificates(), own.key.to_der())
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }
}

async fn listen<F>(answer: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            tokio::spawn(answer(tcp));
        }
    });
    addr
}

/// A server that says this once it is greeted.
async fn says(bytes: &'static [u8]) -> SocketAddr {
    listen(move |mut tcp| async move {
        let _ = tcp.read(&mut [0; 600]).await;
        let _ = tcp.write_all(bytes).await;
    })
    .await
}

async fn ask(target: &str, own: Result<Own, String>) -> Explained {
    let clock = Arc::new(SettableClock::new(NOW));
    explain(target, &own, clock, BOUNDS).await.unwrap()
}

fn words(said: &Explained) -> Vec<Word> {
    said.reasons.iter().map(|reason| reason.word).collect()
}

#[tokio::test]
async fn each_fault_of_a_leaf_has_its_own_word() {
    let (ca, other) = (Ca::new("c1"), Ca::new("c2"));
    let no_client = Leaf { usages: &[ServerAuth], ..GOOD };
    let none = time::Duration::ZERO;
    use Word::*;
    let addr = ca.serve(GOOD, &ca, none).await;
    let said = ask(&addr.to_string(), Ok(ca.own(GOOD))).await;
    assert_eq!(words(&said), [Good], "{said:#?}");
    assert!(said.is_good() && !said.text().contains("Timed out"), "{}", said.text());
    let only_client = Leaf { usages: &[ClientAuth], ..GOOD };
    let elsewhere = Leaf { address: "10.9.9.9", ..GOOD };
    let all_at_once = Leaf { address: "10.9.9.9", ..OVER };
    let ahead = time::Duration::hours(2);
    let rows = [
        (
            "theirs is over",
            ca.serve(OVER, &ca, none).await,
            GOOD,
            vec![TheirLeafExpired],
            "ended 2026-11-24T07:59:00Z (1m ago)",
        ),
        (
            "theirs ends before it begins",
            ca.serve(NEVER, &ca, none).await,
            GOOD,
            vec![TheirLeafExpired, Untrusted],
            "ended",
        ),
        (
            "theirs is too early",
            ca.serve(TOO_EARLY, &ca, none).await,
            GOOD,
            vec![TheirLeafNotYetValid],
            "in 1m",
        ),
        (
            "another cluster's, which takes ours",
            other.serve(GOOD, &ca, none).await,
            GOOD,
            vec![Untrusted],
            "signed by \"CN=c2 root\", and this node trusts \"CN=c1 root\"",
        ),
        (
            "another cluster's",
            other.serve(GOOD, &other, none).await,
            GOOD,
            vec![Untrusted, OurLeafUntrusted],
            "CN=c2 root",
        ),
        (
            "a client's alone",
            ca.serve(only_client, &ca, none).await,
            GOOD,
            vec![WrongPurpose],
            "serverAuth",
        ),
        (
            "for another address",
            ca.serve(elsewhere, &ca, none).await,
            GOOD,
            vec![WrongName],
            "10.9.9.9, and not for 127.0.0.1",
        ),
        (
            "over, of another cluster, for another address",
            other.serve(all_at_once, &ca, none).await,
            GOOD,
            vec![TheirLeafExpired, Untrusted, WrongName],
            "ended",
        ),
        (
            "ours is over",
            ca.serve(GOOD, &ca, none).await,
            OVER,
            vec![OurLeafExpired],
            "this node's leaf ended",
        ),
        (
            "ours is too early",
            ca.serve(GOOD, &ca, none).await,
            TOO_EARLY,
            vec![OurLeafNotYetValid],
            "holds in 1m only",
        ),
        (
            "ours is a server's alone",
            ca.serve(GOOD, &ca, none).await,
            no_client,
            vec![OurLeafWrongPurpose],
            "clientAuth",
        ),
        (
            "it trusts another root",
            ca.serve(GOOD, &other, none).await,
            GOOD,
            vec![OurLeafUntrusted],
            "it trusts \"CN=c2 root\" alone, and ours was signed by \"CN=c1 root\"",
        ),
        (
            "its clock is ahead",
            ca.serve(GOOD, &ca, ahead).await,
            GOOD,
            vec![RefusesOurLeaf],
            "CertificateExpired",
        ),
    ];
    for (name, addr, ours, expected, part) in rows {
        let said = ask(&addr.to_string(), Ok(ca.own(ours))).await;
        assert_eq!(words(&said), expected, "{name}: {said:#?}");
        assert!(said.reasons[0].what.contains(part), "{name}: {}", said.reasons[0].what);
        assert!(said.text().contains("Timed out while waiting for GCS"), "{name}");
        assert!(said.reasons.iter().all(|reason| !reason.next.is_empty()), "{name}");
    }
}

#[tokio::test]
async fn what_shows_no_leaf_has_its_own_word_too() {
    let ca = Ca::new("c1");
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let silent = listen(|tcp| async move {
        tokio::time::sleep(HOUR).await;
        drop(tcp);
    });
    let (full, _held) = full().await;
    use Word::*;
    for (name, target, word) in [
        ("plain HTTP", says(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.to_string(), PlainHttp),
        ("gRPC in the clear", says(SETTINGS).await.to_string(), PlainGrpc),
        ("another protocol", says(b"SSH-2.0-OpenSSH_9.2\r\n").await.to_string(), NoTls),
        ("TLS that cannot", says(b"\x15\x03\x03\x00\x02\x02\x46").await.to_string(), OtherTls),
        ("it closes", says(b"").await.to_string(), OtherTls),
        ("it is silent", silent.await.to_string(), Silent),
        ("nobody", gone.to_string(), NothingListens),
        ("packets are dropped", full.to_string(), Filtered),
        ("no such name", "no-such-host.invalid:6379".to_owned(), UnknownName),
    ] {
        let said = ask(&target, Ok(ca.own(GOOD))).await;
        assert_eq!(words(&said), [word], "{name}: {said:#?}");
    }
}

/// A server that proves itself, waits for the caller's leaf and hangs up, as gRPC mostly does.
async fn hangs_up(ca: &Ca, trusted: &Ca) -> SocketAddr {
    let acceptor = ca.acceptor(GOOD, trusted, time::Duration::ZERO);
    listen(move |tcp| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut tls) = acceptor.accept(tcp).await else { return };
            let _ = tls.read(&mut [0; 64]).await;
        }
    })
    .await
}

#[tokio::test]
async fn who_hangs_up_on_our_leaf_has_refused_it() {
    let (ca, other) = (Ca::new("c1"), Ca::new("c2"));
    let addr = hangs_up(&ca, &ca).await;
    let said = ask(&addr.to_string(), Ok(ca.own(GOOD))).await;
    assert_eq!(words(&said), [Word::RefusesOurLeaf], "{said:#?}");
    assert!(said.reasons[0].what.starts_with("it hangs up"), "{said:#?}");
    // It named its CAs before: whom it trusts is known though no alert came.
    let (theirs, own) = (ca.own(GOOD), other.own(GOOD));
    let issuer = X509Certificate::from_der(&theirs.chain.issuers_der[0]).unwrap().1;
    let name = issuer.issuer().as_raw().to_vec();
    let (chain, trusts_der) = (theirs.chain.clone(), vec![name]);
    let hello = Hello { chain, trusts_der, refused_us: None, hung_up: true };
    let (addr, answer) = (addr, Answer::Tls(hello));
    let seen = Seen::Talked { addr, answer, clear: None, bare: None };
    let ours = Ours {
        leaf: Some(&own.facts),
        chain: Some(&own.chain),
        roots: &theirs.roots,
        missing: None,
    };
    let target = Target::parse(&addr.to_string()).unwrap();
    let said = judge::judge(&target, &seen, &ours, NOW);
    assert_eq!(words(&said), [Word::OurLeafUntrusted], "{said:#?}");
}

/// A listener whose queue is full: the kernel drops what else knocks, as a packet filter does.
async fn full() -> (SocketAddr, Vec<std::net::TcpStream>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let addr = listener.local_addr().unwrap();
    let mut held = Vec::new();
    for _ in 0..4 {
        let wait = Duration::from_millis(100);
        let call = move || std::net::TcpStream::connect_timeout(&addr, wait);
        held.extend(tokio::task::spawn_blocking(call).await.unwrap());
    }
    // It listens as long as the test runs.
    std::mem::forget(listener);
    (addr, held)
}

#[tokio::test]
async fn without_a_leaf_the_other_sides_is_shown_and_nothing_is_claimed_of_ours() {
    let ca = Ca::new("c1");
    let addr = ca.serve(OVER, &ca, time::Duration::ZERO).await;
    let said = ask(&addr.to_string(), Err("permission denied".to_owned())).await;
    assert_eq!(words(&said), [Word::TheirLeafExpired, Word::NoLeafHere], "{said:#?}");
    assert_eq!(said.trusts, ["\"CN=c1 root\""]);
}

#[test]
fn a_way_that_is_closed_here_is_told_from_one_that_is_not_there() {
    let target = Target::parse("10.0.0.1:6379").unwrap();
    let addr = "10.0.0.1:6379".parse().unwrap();
    let ours = Ours { leaf: None, chain: None, roots: &[], missing: None };
    for (why, word) in [
        (NoConnection::Forbidden, Word::Filtered),
        (NoConnection::Other("No route to host".to_owned()), Word::Unreachable),
        (NoConnection::Refused, Word::NothingListens),
    ] {
        let said = judge::judge(&target, &Seen::NoConnection(addr, why), &ours, NOW);
        assert_eq!(words(&said), [word]);
    }
}

#[test]
fn a_target_is_an_address_or_a_name_with_a_port() {
    for good in ["10.0.0.1:6379", "[fd00::1]:6379", "head.ray:1"] {
        assert!(Target::parse(good).is_ok(), "{good}");
    }
    let long = format!("{}:1", "x".repeat(300));
    for bad in ["10.0.0.1", ":6379", "h:0", "h:65536", "http://h:1", "a b:1", long.as_str()] {
        assert!(Target::parse(bad).is_err(), "{bad}");
    }
}

#[tokio::test]
async fn a_server_that_floods_or_stalls_costs_its_bound() {
    let ca = Ca::new("c1");
    let flood =
        listen(|mut tcp| async move { while tcp.write_all(&[0x16; 4_096]).await.is_ok() {} });
    let began = Instant::now();
    let said = ask(&flood.await.to_string(), Ok(ca.own(GOOD))).await;
    assert!(!said.is_good());
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}
