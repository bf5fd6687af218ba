//! Every kind of certificate, judged by OpenSSL and webpki, revoked ones too.

use std::{path::Path, time::Duration};

use ca_server::store::Authority;
use node_agent::keys::PrivateKey;
use raymtls_proto::{
    bundle::{certificates_to_pem, crls_to_pem},
    durable::{self, Access},
    leaf::LeafFacts,
    v1,
};
use raymtls_tests::{Deployment, ask, node_leaf};

const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test]
async fn strict_parsers_accept_every_kind_and_refuse_the_revoked() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let head = v1::CreateTokenRequest {
        cluster: "c1".to_owned(),
        role: v1::Role::Head.into(),
        address_ranges: vec!["10.0.0.0/8".to_owned(), "fd00::/8".to_owned()],
        dns_names: vec!["head.example".to_owned()],
        ..v1::CreateTokenRequest::default()
    };
    let token = deployment.token_with(head).await;
    let key = PrivateKey::generate().unwrap();
    let request = v1::EnrollRequest {
        role: v1::Role::Head.into(),
        ..ask(&token, "c1", "head", &["10.0.0.1", "fd00::1"], &key)
    };
    let head = deployment.enroll(request, key).await.unwrap();
    let leaf = head.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    let facts = LeafFacts::parse(&leaf.leaf.unwrap().leaf_der).unwrap();
    assert_eq!(facts.dns_names, ["head.example", "localhost"], "what its token allows");

    let token = deployment.token("c1", v1::Role::Driver, 1).await;
    let key = PrivateKey::generate().unwrap();
    let request = v1::EnrollRequest {
        role: v1::Role::Driver.into(),
        ..ask(&token, "c1", "laptop", &["10.0.0.9"], &key)
    };
    let driver = deployment.enroll(request, key).await.unwrap();
    let driver_leaf = v1::IssueLeafRequest {
        purpose: v1::LeafPurpose::Driver.into(),
        ..node_leaf(&PrivateKey::generate().unwrap())
    };
    driver.client.issue_leaf(driver_leaf).await.unwrap();

    let worker = deployment.worker("c1", "w1", "10.0.0.2").await;
    worker.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    deployment.revoke("c1", "w1").await;
    if let Some(folder) = std::env::var_os("RAYMTLS_SAMPLE_DIR") {
        sample(&deployment, Path::new(&folder)).await;
    }
    deployment.finish().await;
}

/// One of every kind of certificate and CRL, in PEM, for linters: `NAME.pem`, its issuers up to the
/// root in `NAME.chain`, a CRL in `NAME.crl`.
async fn sample(deployment: &Deployment, folder: &Path) {
    let write = |name: String, pem: String| {
        durable::replace(&folder.join(name), pem.as_bytes(), Access::PUBLIC).unwrap();
    };
    for (name, authority) in
        [("control", Authority::Control), ("cluster", Authority::Cluster("c1".parse().unwrap()))]
    {
        let live = deployment.ca.authority(&authority).unwrap();
        let issuer = live.active().certificate_der().to_vec();
        write(format!("{name}-root.pem"), certificates_to_pem(&[&live.root_der]));
        write(format!("{name}-issuer.pem"), certificates_to_pem(&[&issuer]));
        write(format!("{name}-issuer.chain"), certificates_to_pem(&[&live.root_der]));
        write(format!("{name}.chain"), certificates_to_pem(&[&issuer, &live.root_der]));
        for (index, crl) in live.crls_der().iter().enumerate() {
            write(format!("{name}-{index}.crl"), crls_to_pem(std::slice::from_ref(crl)));
        }
    }
    for record in deployment.certificates("c1").await {
        // The newest of a kind.
        let (kind, chain) = match record.kind() {
            v1::CertificateKind::AgentIdentity => ("identity", "control"),
            v1::CertificateKind::RayNode if record.node == "head" => ("node", "cluster"),
            v1::CertificateKind::RayDriver => ("driver", "cluster"),
            v1::CertificateKind::RayNode
            | v1::CertificateKind::AdminIdentity
            | v1::CertificateKind::Unspecified => continue,
        };
        write(format!("{kind}.pem"), certificates_to_pem(&[&record.certificate_der]));
        let chain = std::fs::read_to_string(folder.join(format!("{chain}.chain"))).unwrap();
        write(format!("{kind}.chain"), chain);
    }
    let server = deployment.server_certificate().await;
    write("server.pem".to_owned(), certificates_to_pem(&[&server]));
    let chain = std::fs::read_to_string(folder.join("control.chain")).unwrap();
    write("server.chain".to_owned(), chain);
}

#[tokio::test]
async fn an_ephemeral_cluster_s_leaves_end_with_it_and_nothing_comes_after() {
    let deployment = Deployment::start().await;
    let request = v1::CreateClusterRequest {
        cluster: "batch".to_owned(),
        life: Some(v1::create_cluster_request::Life::MaxLifeSeconds(3_600)),
    };
    let cluster =
        ca_server::admin::clusters::create(&deployment.ca, &deployment.operator, request).await;
    let ends = cluster.unwrap().settings.unwrap().ends_unix;
    deployment.clock.advance(Duration::from_secs(1_800));
    let worker = deployment.worker("batch", "w1", "10.0.0.1").await;
    let key = PrivateKey::generate().unwrap();
    let leaf = worker.client.issue_leaf(node_leaf(&key)).await.unwrap().leaf.unwrap();
    let facts = LeafFacts::parse(&leaf.leaf_der).unwrap();
    assert_eq!(facts.not_after.unix_timestamp(), ends);

    deployment.clock.advance(Duration::from_secs(1_800));
    let late = worker.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await;
    assert_eq!(raymtls_tests::word(late), "CLUSTER_ENDED");
    deployment.finish().await;
}
