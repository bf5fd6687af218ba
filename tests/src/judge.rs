//! Judges certificates with parsers that are not ours: `openssl verify -x509_strict`, and webpki for
//! each purpose a certificate is made for and each it must not serve.

use std::{collections::BTreeMap, process::Command};

use ca_server::store::{Authority, Store, records::CertificateRecord};
use raymtls_proto::{
    bundle::{certificates_to_pem, crls_to_pem},
    durable::{self, Access},
    identity::ClusterId,
    v1::CertificateKind,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use time::OffsetDateTime;
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

/// Certificates given to one run of openssl.
const BATCH: usize = 200;

/// Judges every certificate on record that has not expired, against its profile. Returns how many.
pub async fn every_certificate(store: &dyn Store, now: OffsetDateTime) -> usize {
    let mut judged = 0;
    for cluster in store.clusters().await.unwrap() {
        let id: ClusterId = cluster.cluster.parse().unwrap();
        let mut by_authority: BTreeMap<Authority, Vec<CertificateRecord>> = BTreeMap::new();
        let mut page = String::new();
        loop {
            let rows = store.certificates(id.clone(), None, page).await.unwrap();
            for record in rows.rows {
                let authority = match record.kind() {
                    CertificateKind::AgentIdentity | CertificateKind::AdminIdentity => {
                        Authority::Control
                    }
                    CertificateKind::RayNode
                    | CertificateKind::RayDriver
                    | CertificateKind::Unspecified => Authority::Cluster(id.clone()),
                };
                by_authority.entry(authority).or_default().push(record);
            }
            page = rows.next;
            if page.is_empty() {
                break;
            }
        }
        for (authority, records) in by_authority {
            judged += judge(store, now, &authority, &records).await;
        }
    }
    assert!(judged > 0, "a story that issued nothing has nothing to judge");
    judged
}

async fn judge(
    store: &dyn Store,
    now: OffsetDateTime,
    authority: &Authority,
    records: &[CertificateRecord],
) -> usize {
    let (root, issuers) = match authority {
        Authority::Control => {
            let control = store.control().await.unwrap().unwrap();
            (control.root.unwrap(), control.issuers)
        }
        Authority::Cluster(cluster) => {
            let cluster = store.cluster(cluster.clone()).await.unwrap();
            (cluster.root.unwrap(), cluster.issuers)
        }
    };
    let issuers: Vec<_> =
        issuers.into_iter().map(|issuer| CertificateDer::from(issuer.certificate_der)).collect();
    let now_unix = now.unix_timestamp();
    let valid: Vec<_> =
        records.iter().filter(|record| record.not_after_ms > now_unix * 1_000).collect();
    for record in &valid {
        webpki_check(record, &root.certificate_der, &issuers, now_unix);
    }
    let crls = store.crls(authority.clone()).await.unwrap().unwrap();
    for chunk in valid.chunks(BATCH) {
        openssl_check(chunk, &root.certificate_der, &issuers, &crls.crls_der, now_unix);
    }
    valid.len()
}

/// What a certificate may be used for is what its profile says, and nothing else.
fn webpki_check(
    record: &CertificateRecord,
    root_der: &[u8],
    issuers: &[CertificateDer<'_>],
    now_unix: i64,
) {
    let root = CertificateDer::from(root_der);
    let anchors = [anchor_from_trusted_cert(&root).unwrap()];
    let leaf = CertificateDer::from(record.certificate_der.as_slice());
    let leaf = EndEntityCert::try_from(&leaf).unwrap();
    let now =
        UnixTime::since_unix_epoch(std::time::Duration::from_secs(now_unix.try_into().unwrap()));
    let good_for = |usage| {
        let algorithms =
            rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        leaf.verify_for_usage(algorithms.all, &anchors, issuers, now, usage, None, None).is_ok()
    };
    let (client, server) = (good_for(KeyUsage::client_auth()), good_for(KeyUsage::server_auth()));
    let serial = hex::encode(&record.serial);
    match record.kind() {
        CertificateKind::AgentIdentity | CertificateKind::AdminIdentity => {
            assert!(client && !server, "identity {serial}: client {client}, server {server}");
        }
        CertificateKind::RayNode => {
            assert!(client && server, "node leaf {serial}: client {client}, server {server}");
            let loopback = ServerName::try_from("127.0.0.1").unwrap();
            leaf.verify_is_valid_for_subject_name(&loopback).unwrap();
        }
        CertificateKind::RayDriver => {
            assert!(client && server, "driver leaf {serial}: client {client}, server {server}");
            let loopback = ServerName::try_from("127.0.0.1").unwrap();
            assert!(leaf.verify_is_valid_for_subject_name(&loopback).is_err());
        }
        CertificateKind::Unspecified => panic!("certificate {serial} of no kind on record"),
    }
}

/// `openssl verify` accepts what is not revoked and refuses what is.
fn openssl_check(
    records: &[&CertificateRecord],
    root_der: &[u8],
    issuers: &[CertificateDer<'_>],
    crls_der: &[Vec<u8>],
    now_unix: i64,
) {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        durable::replace(&path, content.as_bytes(), Access::PUBLIC).unwrap();
        path
    };
    let root = file("root.pem", &certificates_to_pem(&[root_der]));
    let issuers = file("issuers.pem", &certificates_to_pem(issuers));
    let crls = file("crls.pem", &crls_to_pem(crls_der));
    for revoked in [false, true] {
        let leaves: Vec<_> = records
            .iter()
            .filter(|record| (record.revoked_ms != 0) == revoked)
            .map(|record| {
                let name = format!("{}.pem", hex::encode(&record.serial));
                file(&name, &certificates_to_pem(&[&record.certificate_der]))
            })
            .collect();
        if leaves.is_empty() {
            continue;
        }
        let mut command = Command::new("openssl");
        command.args(["verify", "-x509_strict", "-crl_check_all"]);
        command.arg("-attime").arg(now_unix.to_string());
        for (option, path) in [("-CAfile", &root), ("-untrusted", &issuers), ("-CRLfile", &crls)] {
            command.arg(option).arg(path);
        }
        let output = command.args(&leaves).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let complained = String::from_utf8_lossy(&output.stderr);
        let ok = said.lines().filter(|line| line.ends_with(": OK")).count();
        let refused = complained.matches("certificate revoked").count();
        if revoked {
            assert_eq!((ok, refused), (0, leaves.len()), "{said}{complained}");
        } else {
            assert_eq!(ok, leaves.len(), "{said}{complained}");
        }
    }
}
