//! Certificate requests of every bad kind, most of them made with the `openssl` command as a stranger
//! would make them. Each is refused at each of the three calls that certify a key, in words that say
//! what is wrong; nothing is spent, written or issued; the same machine then gets in with a good one.

use std::{path::Path, process::Command, time::Duration};

use ca_server::{keys::csr::CSR_DER_LEN_MAX, store::Authority};
use node_agent::{client::CallError, keys::PrivateKey};
use raymtls_proto::v1;
use raymtls_tests::{Deployment, Member, ask, node_leaf, word};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair};
use tempfile::TempDir;
use x509_parser::prelude::{FromDer, X509Certificate};

const DAY: Duration = Duration::from_secs(86_400);

/// A name, the request, the word of the refusal and a part of its text.
type Row = (String, Vec<u8>, &'static str, &'static str);

const CSR: &str = "CSR_INVALID";
const KEY: &str = "KEY_NOT_ALLOWED";

#[tokio::test]
async fn no_bad_certificate_request_issues_or_spends_anything() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let token = deployment.token("c1", v1::Role::Worker, 1).await;
    let control = deployment.ca.authority(&Authority::Control).unwrap();

    let mut rows = openssl_rows();
    rows.extend(name_rows());
    rows.extend(malformed_rows());
    rows.push((
        "the CA's own public key".to_owned(),
        with_key_of(control.active().certificate_der()),
        CSR,
        "signature does not verify",
    ));
    let before = deployment.held().await;
    for (what, csr_der, reason, says) in &rows {
        for (call, answer) in every_call(&deployment, &member, &token, csr_der).await {
            let Err(error) = answer else { panic!("{call} took {what}") };
            assert_eq!(error.word(), *reason, "{call}, {what}: {error}");
            assert!(error.to_string().contains(says), "{call}, {what}: {error}");
        }
    }
    assert_eq!(deployment.held().await, before, "a refused request left something behind");
    assert!(rows.len() > 40, "{}", rows.len());

    // Too long for a message at all: turned away before it is read.
    let names: Vec<String> = (0..10_000).map(|n| format!("host-{n}.example")).collect();
    let many = rcgen_csr(|p| *p = CertificateParams::new(names.clone()).unwrap());
    assert!(many.len() > 64 * 1_024);
    for (call, answer) in every_call(&deployment, &member, &token, &many).await {
        assert_ne!(word(answer), "OK", "{call}");
    }
    assert_eq!(deployment.held().await, before);

    // A good one, with the token that was refused all along.
    let key = PrivateKey::generate().unwrap();
    deployment.enroll(ask(&token, "c1", "w2", &["10.0.0.2"], &key), key).await.unwrap();
    member.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    deployment.finish().await;
}

#[tokio::test]
async fn a_key_is_certified_for_one_node_and_one_purpose_only() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    deployment.cluster("c2", DAY).await;
    let first = deployment.worker("c1", "w1", "10.0.0.1").await;
    let second = deployment.worker("c1", "w2", "10.0.0.2").await;
    let leaf_key = PrivateKey::generate().unwrap();
    first.client.issue_leaf(node_leaf(&leaf_key)).await.unwrap();
    let tokens = [
        deployment.token("c1", v1::Role::Worker, 1).await,
        deployment.token("c2", v1::Role::Worker, 1).await,
    ];
    let before = deployment.held().await;

    let stolen = node_leaf(&leaf_key);
    let mut answers = vec![
        ("another node's leaf key as a leaf key", second.client.issue_leaf(stolen).await.map(drop)),
        (
            "another node's leaf key as an identity",
            second.client.renew_identity(leaf_key.csr_der().unwrap()).await.map(drop),
        ),
        (
            "another node's identity key as an identity",
            second.client.renew_identity(first.identity.key.csr_der().unwrap()).await.map(drop),
        ),
    ];
    for (token, cluster) in tokens.iter().zip(["c1", "c2"]) {
        let key = &first.identity.key;
        let other = ask(token, cluster, "w3", &["10.0.0.3"], key);
        let answer = deployment.enrollment_client().enroll(other).await;
        answers.push(("another node's identity key at enrolment", answer.map(drop)));
    }
    for (what, answer) in answers {
        let error = answer.expect_err(what);
        assert_eq!(error.word(), CSR, "{what}: {error}");
        assert!(error.to_string().contains("make a new one"), "{what}: {error}");
    }
    assert_eq!(deployment.held().await, before);
    second.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    deployment.finish().await;
}

/// The request at each call that certifies a key.
async fn every_call(
    deployment: &Deployment,
    member: &Member,
    token: &str,
    csr_der: &[u8],
) -> [(&'static str, Result<(), CallError>); 3] {
    let key = PrivateKey::generate().unwrap();
    let enroll = v1::EnrollRequest {
        csr_der: csr_der.to_vec(),
        ..ask(token, "c1", "w2", &["10.0.0.2"], &key)
    };
    let leaf = v1::IssueLeafRequest { csr_der: csr_der.to_vec(), ..node_leaf(&key) };
    [
        ("Enroll", deployment.enrollment_client().enroll(enroll).await.map(drop)),
        ("IssueLeaf", member.client.issue_leaf(leaf).await.map(drop)),
        ("RenewIdentity", member.client.renew_identity(csr_der.to_vec()).await.map(drop)),
    ]
}

/// What the `openssl` command makes: keys of other kinds, signatures of other kinds, subjects and
/// requested extensions.
fn openssl_rows() -> Vec<Row> {
    let folder = tempfile::tempdir().unwrap();
    let keys = [
        ("RSA with 1024 bits", "genrsa -traditional 1024"),
        ("RSA with 2048 bits", "genrsa 2048"),
        ("P-192", "ecparam -name prime192v1 -genkey -noout"),
        ("P-384", "ecparam -name secp384r1 -genkey -noout"),
        ("secp256k1", "ecparam -name secp256k1 -genkey -noout"),
        ("brainpool", "ecparam -name brainpoolP256r1 -genkey -noout"),
        ("explicit parameters", "ecparam -name prime256v1 -genkey -noout -param_enc explicit"),
        (
            "a compressed point",
            "ecparam -name prime256v1 -genkey -noout & ec -in KEY -conv_form compressed",
        ),
        ("Ed25519", "genpkey -algorithm ED25519"),
    ];
    let mut rows: Vec<Row> = keys
        .into_iter()
        .map(|(what, make)| {
            // P-384 with SHA-256 among them.
            (what.to_owned(), openssl_csr(&folder, make, &["-sha256"]), KEY, "P-256")
        })
        .collect();
    let p256 = "ecparam -name prime256v1 -genkey -noout";
    let mut add = |what: &str, options: &[&str], says| {
        rows.push((what.to_owned(), openssl_csr(&folder, p256, options), CSR, says));
    };
    add("signed with SHA-1", &["-sha1"], "another algorithm");
    add("signed with SHA-384", &["-sha384"], "another algorithm");
    add("a subject", &["-subj", "/CN=head"], "subject must be empty");
    for (extension, oid) in [
        ("basicConstraints=critical,CA:TRUE", "2.5.29.19"),
        ("basicConstraints=critical,CA:TRUE,pathlen:3", "2.5.29.19"),
        ("basicConstraints=CA:FALSE", "2.5.29.19"),
        ("keyUsage=critical,keyCertSign,cRLSign", "2.5.29.15"),
        ("extendedKeyUsage=serverAuth,clientAuth", "2.5.29.37"),
        ("extendedKeyUsage=1.2.3.4", "2.5.29.37"),
        ("nameConstraints=critical,permitted;DNS:example", "2.5.29.30"),
        ("subjectAltName=DNS:evil.example", "2.5.29.17"),
        ("subjectAltName=DNS:*.example", "2.5.29.17"),
        ("subjectAltName=IP:10.9.9.9", "2.5.29.17"),
        ("subjectAltName=URI:spiffe://ray.example/cluster/c1/node/head", "2.5.29.17"),
        ("subjectAltName=email:root@ray.example", "2.5.29.17"),
        ("subjectAltName=otherName:1.2.3.4;UTF8:head", "2.5.29.17"),
        ("1.2.3.4.5=DER:0500", "1.2.3.4.5"),
    ] {
        add(extension, &["-addext", extension], oid);
    }
    rows
}

/// The names themselves, as bytes no tool writes. All fall with the extension that holds them.
fn name_rows() -> Vec<Row> {
    let names: [(&str, &[u8]); 12] = [
        ("NUL", b"head\0.evil.example"),
        ("line break", b"head\r\nx: y"),
        ("escape", b"head\x1b[31m"),
        ("UTF-8 look-alike", "he\u{430}d.example".as_bytes()),
        ("right-to-left mark", "head\u{202e}.example".as_bytes()),
        ("punycode", b"xn--hed-6cd.example"),
        ("trailing dot", b"head.example."),
        ("underscore", b"head_1"),
        ("upper case", b"HEAD.EXAMPLE"),
        ("IPv4 as DNS", b"1.2.3.4"),
        ("IPv4-mapped IPv6 as DNS", b"::ffff:10.0.0.1"),
        ("no character", b""),
    ];
    let row = |what: &str, extensions: Vec<CustomExtension>, oid| {
        (what.to_owned(), rcgen_csr(|p| p.custom_extensions = extensions), CSR, oid)
    };
    let mut rows: Vec<Row> = names
        .into_iter()
        .map(|(what, name)| row(what, vec![alternative_name(0x82, name)], "2.5.29.17"))
        .collect();
    let mapped = [&[0; 10][..], &[0xff, 0xff, 10, 0, 0, 1]].concat();
    rows.push(row("IPv4-mapped IPv6", vec![alternative_name(0x87, &mapped)], "2.5.29.17"));
    rows.push(row("an address of 5 bytes", vec![alternative_name(0x87, &[1; 5])], "2.5.29.17"));
    let twice = vec![alternative_name(0x82, b"a"), alternative_name(0x82, b"b")];
    // One that x509-parser reads or does not: either way it is refused.
    rows.push(row("an extension twice", twice, "certificate request refused"));
    rows
}

/// Bytes that are no request in DER, or not one request alone.
fn malformed_rows() -> Vec<Row> {
    let good = rcgen_csr(|_| {});
    let body = good[header_len(&good)..].to_vec();
    let outer = |length: &[u8], rest: &[u8]| [&[0x30], length, &body, rest].concat();
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let nested = (0..2_000).fold(Vec::new(), |inner: Vec<u8>, _| {
        let length = u16::try_from(inner.len()).unwrap().to_be_bytes();
        [&[0x30, 0x82, length[0], length[1]][..], &inner].concat()
    });
    let version = |bytes: &[u8]| {
        // The version is the first field of the second SEQUENCE.
        let at = good.windows(3).position(|w| w == [2, 1, 0]).unwrap();
        let mut changed = good.clone();
        changed.splice(at..at + 3, bytes.iter().copied());
        changed
    };
    let rows: Vec<(&str, Vec<u8>, &str)> = vec![
        ("no byte", vec![], "not a PKCS#10 request in DER"),
        ("garbage", b"-----BEGIN CERTIFICATE REQUEST-----".to_vec(), "not a PKCS#10"),
        ("cut short", good[..good.len() - 1].to_vec(), "not a PKCS#10"),
        ("a byte behind it", [&good[..], &[0]].concat(), "bytes after the request"),
        ("two requests", [&good[..], &good].concat(), "bytes after the request"),
        ("longer than it may be", vec![0x30; CSR_DER_LEN_MAX + 1], "longer than 8192 bytes"),
        ("indefinite length", outer(&[0x80], &[0, 0]), "certificate request refused"),
        (
            "a length in too many bytes",
            {
                let len = u8::try_from(good.len() - header_len(&good)).unwrap();
                [&[0x30, 0x82, 0, len][..], &good[header_len(&good)..]].concat()
            },
            "certificate request refused",
        ),
        ("nested deeply", nested[..CSR_DER_LEN_MAX.min(nested.len())].to_vec(), "not a PKCS#10"),
        ("a negative version", version(&[2, 1, 0xff]), "certificate request refused"),
        ("version 2", version(&[2, 1, 1]), "certificate request refused"),
        ("a version in too many bytes", version(&[2, 2, 0, 0]), "certificate request refused"),
        ("a signature that does not verify", damaged, "certificate request refused"),
        ("somebody else's public key", swapped(&good, &spki()), "signature does not verify"),
    ];
    rows.into_iter().map(|(what, der, says)| (what.to_owned(), der, CSR, says)).collect()
}

fn header_len(der: &[u8]) -> usize {
    if der[1] & 0x80 == 0 { 2 } else { 2 + usize::from(der[1] & 0x7f) }
}

fn rcgen_csr(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    let mut params = CertificateParams::default();
    change(&mut params);
    params.distinguished_name = DistinguishedName::new();
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

/// A subjectAltName of one name whose type is given by its tag (RFC 5280 4.2.1.6).
fn alternative_name(tag: u8, name: &[u8]) -> CustomExtension {
    let len = u8::try_from(name.len()).unwrap();
    let content = [&[0x30, len + 2, tag, len], name].concat();
    CustomExtension::from_oid_content(&[2, 5, 29, 17], content)
}

fn spki() -> Vec<u8> {
    PrivateKey::generate().unwrap().spki_der()
}

/// The request with another public key in it: whoever sent it does not hold the private one.
fn swapped(csr_der: &[u8], spki_der: &[u8]) -> Vec<u8> {
    let start = &spki_der[..27];
    let at = csr_der.windows(start.len()).position(|window| window == start).unwrap();
    let mut changed = csr_der.to_vec();
    changed[at..at + spki_der.len()].copy_from_slice(spki_der);
    changed
}

fn with_key_of(certificate_der: &[u8]) -> Vec<u8> {
    let (_, certificate) = X509Certificate::from_der(certificate_der).unwrap();
    swapped(&rcgen_csr(|_| {}), certificate.public_key().raw)
}

/// A request made by `openssl req` for a key made by others of its commands.
fn openssl_csr(folder: &TempDir, make_key: &str, options: &[&str]) -> Vec<u8> {
    let (key, csr) = (folder.path().join("key.pem"), folder.path().join("csr.der"));
    let config = folder.path().join("req.cnf");
    raymtls_proto::durable::replace(
        &config,
        b"[req]\ndistinguished_name = dn\n[dn]\n",
        raymtls_proto::durable::Access::PUBLIC,
    )
    .unwrap();
    let path = key.to_str().unwrap();
    for command in make_key.split(" & ") {
        let words = command.split(' ').map(|word| if word == "KEY" { path } else { word });
        let mut words: Vec<&str> = words.collect();
        // `genrsa` wants its options before the number of bits.
        words.splice(1..1, ["-out", path]);
        openssl(Command::new("openssl").args(&words));
    }
    let mut req = Command::new("openssl");
    req.args(["req", "-new", "-batch", "-outform", "DER", "-key"]).arg(&key);
    req.arg("-config").arg(&config).arg("-out").arg(&csr);
    if !options.contains(&"-subj") {
        req.args(["-subj", "/"]);
    }
    openssl(req.args(options));
    read(&csr)
}

fn openssl(command: &mut Command) {
    let output = command.output().expect("the openssl command is installed");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}
