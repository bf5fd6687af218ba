//! A signer that puts something else into a certificate than it was asked for is caught before
//! anybody sees the certificate, whichever request it was for: the caller hears of a fault of the
//! CA's own, the log hears which, and nothing is on record. Plays whole requests on a CA without
//! listeners.

use std::{
    io::Write,
    sync::{Arc, Mutex},
};

use raymtls_proto::{
    clock::{Clock, SettableClock},
    leaf::LeafFacts,
    reason::Reason,
    v1::{self, create_cluster_request::Life, enroll_request::Credential},
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose,
    SanType, SerialNumber,
};
use tempfile::TempDir;
use time::{Duration, OffsetDateTime};

use crate::{
    admin::{Operator, clusters, tokens},
    ca::{Ca, Endpoints},
    enroll::enroll,
    init,
    issue::issue,
    keys::{
        kek::Kek,
        signer::lie::{self, Lie},
    },
    renew::renew,
    store::{Caller, Store, StoreError, kv::KvStore, sled::SledEngine},
    tls,
};

const LIES: [(&str, Lie); 10] = [
    ("DNS names", |mut params, key, issuer| {
        params.subject_alt_names.push(SanType::DnsName("evil.example".try_into()?));
        params.signed_by(key, issuer)
    }),
    ("addresses", |mut params, key, issuer| {
        params.subject_alt_names.push(SanType::IpAddress([10, 9, 9, 9].into()));
        params.signed_by(key, issuer)
    }),
    ("URIs", |mut params, key, issuer| {
        let uri = "spiffe://ray.example/cluster/c1/agent/head".try_into()?;
        params.subject_alt_names.retain(|name| !matches!(name, SanType::URI(_)));
        params.subject_alt_names.insert(0, SanType::URI(uri));
        params.signed_by(key, issuer)
    }),
    ("CA flag", |mut params, key, issuer| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.signed_by(key, issuer)
    }),
    ("public key", |params, _, issuer| params.signed_by(&KeyPair::generate()?, issuer)),
    ("notAfter", |mut params, key, issuer| {
        params.not_after += Duration::SECOND;
        params.signed_by(key, issuer)
    }),
    ("serial", |mut params, key, issuer| {
        params.serial_number = Some(SerialNumber::from_slice(&[7; 16]));
        params.signed_by(key, issuer)
    }),
    ("Auth", |mut params, key, issuer| {
        params.extended_key_usages.clear();
        params.signed_by(key, issuer)
    }),
    ("key usage", |mut params, key, issuer| {
        params.key_usages.push(KeyUsagePurpose::KeyCertSign);
        params.signed_by(key, issuer)
    }),
    ("subject", |mut params, key, issuer| {
        params.distinguished_name.push(DnType::CommonName, "head");
        params.signed_by(key, issuer)
    }),
];

#[tokio::test]
async fn what_was_signed_wrongly_leaves_by_no_call_and_is_not_on_record() {
    let bench = Bench::new().await;
    let identity = bench.enroll("w1", "10.0.0.1").await.unwrap();
    let caller = caller(&identity);
    let before = bench.held().await;
    for (differs, told) in LIES {
        lie::tell(Some(told));
        let answers = [
            ("Enroll", bench.enroll("w2", "10.0.0.2").await.map(drop)),
            ("IssueLeaf", issue(&bench.ca, caller.clone(), leaf_request()).await.map(drop)),
            ("RenewIdentity", renew(&bench.ca, caller.clone(), renewal()).await.map(drop)),
        ];
        // The server's own certificate goes the same way.
        let own = tls::configs(&bench.ca).map(drop).unwrap_err().to_string();
        lie::tell(None);
        for (call, answer) in answers {
            let refusal = answer.expect_err(&format!("{call} let {differs} through")).refusal();
            assert_eq!(refusal.reason(), Reason::Internal, "{call}: {differs}");
            let text = refusal.to_string();
            assert!(!text.contains(differs), "the caller was told of our fault: {text}");
        }
        let log = bench.log.take();
        let events = log.matches("signing failed").count();
        assert_eq!(events, 3, "{differs}: one event a call is wanted: {log}");
        assert!(log.contains("ERROR") && log.contains(differs), "{differs}: {log}");
        assert!(own.contains(differs), "{own}");
        assert_eq!(bench.held().await, before, "{differs}: something is on record");
    }

    // Nothing was lost by it: the truth is served, with the token that was asked with all along.
    bench.enroll("w2", "10.0.0.2").await.unwrap();
    issue(&bench.ca, caller.clone(), leaf_request()).await.unwrap();
    renew(&bench.ca, caller, renewal()).await.unwrap();
}

/// A CA with one cluster and a token of two uses.
struct Bench {
    ca: Arc<Ca>,
    token: String,
    log: Log,
    _subscriber: tracing::subscriber::DefaultGuard,
    _folder: TempDir,
}

impl Bench {
    async fn new() -> Self {
        let clock = SettableClock::new(OffsetDateTime::UNIX_EPOCH + Duration::days(20_000));
        let folder = tempfile::tempdir().unwrap();
        let (dir, kek) = (folder.path().join("ca"), folder.path().join("kek"));
        init::init(&dir, &kek, &"ray.example".parse().unwrap(), &clock).await.unwrap();
        let engine = SledEngine::open(&init::store_dir(&dir)).unwrap();
        let store: Arc<dyn Store> = Arc::new(KvStore::open(Box::new(engine), clock.now()).unwrap());
        let kek = Kek::read(&kek).unwrap();
        let ca = Ca::load(store, Arc::new(clock), kek, Endpoints::default()).await.unwrap();
        let operator = Operator::on_socket(Some(0), 0, false);
        let cluster = v1::CreateClusterRequest {
            cluster: "c1".to_owned(),
            life: Some(Life::MaxJobSeconds(86_400)),
        };
        clusters::create(&ca, &operator, cluster).await.unwrap();
        let token = v1::CreateTokenRequest {
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            uses: 2,
            node_names: vec!["w*".to_owned()],
            any_address: true,
            ..v1::CreateTokenRequest::default()
        };
        let token = tokens::create(&ca, &operator, token).await.unwrap().bootstrap_token;
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let subscriber = tracing::subscriber::set_default(subscriber);
        Self { ca: Arc::new(ca), token, log, _subscriber: subscriber, _folder: folder }
    }

    async fn enroll(&self, name: &str, address: &str) -> Result<v1::EnrollResponse, StoreError> {
        let request = v1::EnrollRequest {
            credential: Some(Credential::BootstrapToken(self.token.clone())),
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            node_name: name.to_owned(),
            csr_der: csr(),
            ..v1::EnrollRequest::default()
        };
        enroll(&self.ca, request, address.parse().unwrap()).await
    }

    /// Certificates, nodes, uses of the token and audit records.
    async fn held(&self) -> (usize, usize, u32, usize) {
        let (store, c1) = (&self.ca.store, || "c1".parse().unwrap());
        let certificates = store.certificates(c1(), None, String::new()).await.unwrap().rows;
        let nodes = store.nodes(c1(), String::new()).await.unwrap().rows;
        let tokens = store.tokens(c1(), String::new()).await.unwrap().rows;
        let audit = store.audit(0, 1_000).await.unwrap();
        (certificates.len(), nodes.len(), tokens[0].used, audit.len())
    }
}

fn caller(answer: &v1::EnrollResponse) -> Caller {
    let leaf_der = &answer.identity.as_ref().unwrap().leaf_der;
    Caller {
        cluster: "c1".parse().unwrap(),
        node: answer.node_name.parse().unwrap(),
        serial: LeafFacts::parse(leaf_der).unwrap().serial,
        source: None,
    }
}

fn csr() -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

fn leaf_request() -> v1::IssueLeafRequest {
    v1::IssueLeafRequest {
        csr_der: csr(),
        purpose: v1::LeafPurpose::Node.into(),
        ..v1::IssueLeafRequest::default()
    }
}

fn renewal() -> v1::RenewIdentityRequest {
    v1::RenewIdentityRequest { csr_der: csr() }
}

/// What was logged since it was looked at last.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
