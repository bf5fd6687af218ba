//! An operator makes tokens; machines race for them, lose replies, and try what they may not.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use node_agent::{client::EnrollmentClient, keys::PrivateKey};
use raymtls_proto::v1;
use raymtls_tests::{Deployment, ask, limits, word};
use tokio::{sync::Barrier, task::JoinSet};

const CLIENTS: usize = 64;
const ROUNDS: usize = 100;
const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_of_n_uses_raced_by_64_clients_gives_exactly_n_nodes() {
    let deployment = Arc::new(Deployment::start().await);
    deployment.cluster("c1", DAY).await;

    for round in 0..ROUNDS {
        let uses = 1 + round % 5;
        let token = deployment.token("c1", v1::Role::Worker, uses.try_into().unwrap()).await;
        let start = Arc::new(Barrier::new(CLIENTS));
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            let (deployment, token, start) =
                (Arc::clone(&deployment), token.clone(), Arc::clone(&start));
            clients.spawn(async move {
                let key = PrivateKey::generate().unwrap();
                let address = format!("10.{}.0.{client}", round + 1);
                let name = format!("r{round}-{client}");
                let request = ask(&token, "c1", &name, &[&address], &key);
                start.wait().await;
                word(deployment.enroll(request, key).await)
            });
        }
        let words = clients.join_all().await;
        let won = words.iter().filter(|word| **word == "OK").count();
        let lost = words.iter().filter(|word| **word == "TOKEN_SPENT").count();
        assert_eq!((won, lost), (uses, CLIENTS - uses), "round {round}: {words:?}");
    }

    let deployment = Arc::into_inner(deployment).unwrap();
    let tokens = deployment.tokens("c1").await;
    assert!(tokens.iter().all(|token| token.used == token.uses), "a use is left or overdrawn");
    let nodes: usize = (0..ROUNDS).map(|round| 1 + round % 5).sum();
    let cluster = ca_server::admin::clusters::show(&deployment.ca, &deployment.operator, "c1");
    assert_eq!(cluster.await.unwrap().nodes_live as usize, nodes);
    deployment.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_key_that_races_itself_gets_one_certificate_which_is_counted_once() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let token = deployment.token("c1", v1::Role::Worker, 1).await;
    let key = PrivateKey::generate().unwrap();
    let request = ask(&token, "c1", "w1", &["10.0.0.1"], &key);
    // As the listener hands them on, so that they come at one moment.
    let (mut clients, start) = (JoinSet::new(), Arc::new(Barrier::new(CLIENTS)));
    for _ in 0..CLIENTS {
        let (ca, request) = (Arc::clone(&deployment.ca), request.clone());
        let (start, peer) = (Arc::clone(&start), Ipv4Addr::LOCALHOST.into());
        clients.spawn(async move {
            start.wait().await;
            ca_server::enroll::enroll(&ca, request, peer).await.unwrap().identity.unwrap()
        });
    }
    let answers = clients.join_all().await;
    assert!(answers.iter().all(|answer| answer.leaf_der == answers[0].leaf_der));
    let counted = "raymtls_ca_certificates_issued_total{kind=\"agent_identity\"} 1\n";
    let text = deployment.ca.metrics.text();
    assert!(text.contains(counted), "{text}");
    deployment.finish().await;
}

#[tokio::test]
async fn a_join_file_with_the_node_port_for_enrolment_is_said_to_be_so() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let token = deployment.token("c1", v1::Role::Worker, 1).await;
    let key = PrivateKey::generate().unwrap();
    let clock = Arc::new(deployment.clock.clone());
    let target = deployment.target(deployment.nodes);
    let mut client = EnrollmentClient::new(&target, limits(), clock).unwrap();
    let error = client.enroll(ask(&token, "c1", "w1", &["10.0.0.1"], &key)).await.unwrap_err();
    assert_eq!(error.word(), "CA_AWAY");
    assert!(error.to_string().contains("it is not the enrolment port"), "{error}");
    assert_eq!(deployment.tokens("c1").await[0].used, 0);
    // On its own port it is not spent.
    deployment.enroll(ask(&token, "c1", "w1", &["10.0.0.1"], &key), key).await.unwrap();
    deployment.finish().await;
}

#[tokio::test]
async fn a_lost_reply_costs_no_second_use_and_brings_the_same_certificate() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let token = deployment.token("c1", v1::Role::Worker, 1).await;
    let key = PrivateKey::generate().unwrap();
    let request = ask(&token, "c1", "w1", &["10.0.0.1"], &key);

    // The reply is lost: the connection goes away with it. The machine asks again, even after the
    // CA was restarted.
    let first = deployment.enrollment_client().enroll(request.clone()).await.unwrap();
    let again = deployment.enrollment_client().enroll(request.clone()).await.unwrap();
    let deployment = deployment.restart().await;
    let after_restart = deployment.enrollment_client().enroll(request).await.unwrap();
    for answer in [&again, &after_restart] {
        assert_eq!(answer.identity, first.identity, "another certificate for the same key");
    }
    assert_eq!(deployment.tokens("c1").await[0].used, 1);

    // Another key is another machine.
    let other = PrivateKey::generate().unwrap();
    let request = ask(&token, "c1", "w2", &["10.0.0.2"], &other);
    assert_eq!(word(deployment.enrollment_client().enroll(request).await), "TOKEN_SPENT");
    deployment.finish().await;
}

#[tokio::test]
async fn a_refused_enrolment_names_its_reason_and_spends_nothing() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    deployment.cluster("c2", DAY).await;
    let worker = deployment.worker("c1", "taken", "10.0.0.1").await;
    let token = deployment
        .token_with(v1::CreateTokenRequest {
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            uses: 1,
            node_names: vec!["w*".to_owned(), "taken".to_owned()],
            address_ranges: vec!["10.0.0.0/24".to_owned()],
            ..v1::CreateTokenRequest::default()
        })
        .await;
    let wrong_secret = format!("{}.{}", token.split('.').next().unwrap(), "A".repeat(43));
    let key = PrivateKey::generate().unwrap();
    let good = || ask(&token, "c1", "w1", &["10.0.0.9"], &key);
    let named = |name: &str| v1::EnrollRequest { node_name: name.to_owned(), ..good() };
    let at = |address: &str| v1::EnrollRequest { addresses: vec![address.to_owned()], ..good() };

    let refused = [
        ("wrong secret", ask(&wrong_secret, "c1", "w1", &["10.0.0.9"], &key), "TOKEN_UNKNOWN"),
        ("not a token", ask("nonsense", "c1", "w1", &["10.0.0.9"], &key), "TOKEN_UNKNOWN"),
        (
            "other cluster",
            v1::EnrollRequest { cluster: "c2".to_owned(), ..good() },
            "TOKEN_CLUSTER_MISMATCH",
        ),
        (
            "other role",
            v1::EnrollRequest { role: v1::Role::Head.into(), ..good() },
            "TOKEN_ROLE_MISMATCH",
        ),
        ("other name", named("head"), "TOKEN_NODE_MISMATCH"),
        ("name of no form", named("W_1"), "NAME_NOT_ALLOWED"),
        ("name of a live node", named("taken"), "NODE_NAME_TAKEN"),
        ("address of a live node", at("10.0.0.1"), "ADDRESS_TAKEN"),
        ("address outside", at("10.0.1.1"), "ADDRESS_NOT_ALLOWED"),
        ("loopback", at("127.0.0.1"), "ADDRESS_NOT_ALLOWED"),
        ("no address", v1::EnrollRequest { addresses: vec![], ..good() }, "ADDRESS_NOT_ALLOWED"),
        (
            "DNS name not in the token",
            v1::EnrollRequest { dns_names: vec!["head.example".to_owned()], ..good() },
            "NAME_NOT_ALLOWED",
        ),
        ("no CSR", v1::EnrollRequest { csr_der: vec![], ..good() }, "CSR_INVALID"),
        ("no credential", v1::EnrollRequest { credential: None, ..good() }, "REQUEST_INVALID"),
    ];
    for (what, request, expected) in refused {
        let result = deployment.enrollment_client().enroll(request).await;
        assert_eq!(word(result), expected, "{what}");
    }
    let open = deployment.tokens("c1").await;
    let open = open.iter().find(|t| token.starts_with(&t.id)).unwrap();
    assert_eq!(open.used, 0, "a refused enrolment spent a use");

    // Nothing is lost: the right request still goes through; then the use is spent.
    deployment.enrollment_client().enroll(good()).await.unwrap();
    let other = PrivateKey::generate().unwrap();
    let late = ask(&token, "c1", "w2", &["10.0.0.10"], &other);
    assert_eq!(word(deployment.enrollment_client().enroll(late).await), "TOKEN_SPENT");

    // Expired and revoked ones say so.
    let expiring = deployment.token("c1", v1::Role::Worker, 1).await;
    deployment.clock.advance(Duration::from_secs(3_600));
    let late = ask(&expiring, "c1", "w3", &["10.0.0.11"], &other);
    assert_eq!(word(deployment.enrollment_client().enroll(late).await), "TOKEN_EXPIRED");
    let revoked = deployment.token("c1", v1::Role::Worker, 1).await;
    let revoke = v1::RevokeTokenRequest {
        cluster: "c1".to_owned(),
        id: revoked.split('.').next().unwrap().to_owned(),
    };
    ca_server::admin::tokens::revoke(&deployment.ca, &deployment.operator, revoke).await.unwrap();
    let late = ask(&revoked, "c1", "w3", &["10.0.0.11"], &other);
    assert_eq!(word(deployment.enrollment_client().enroll(late).await), "TOKEN_REVOKED");
    drop(worker);
    deployment.finish().await;
}

#[tokio::test]
async fn several_machines_of_one_token_get_names_of_their_own() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let token = deployment.token("c1", v1::Role::Worker, 2).await;
    let mut names = Vec::new();
    for address in ["10.0.0.1", "10.0.0.2"] {
        let key = PrivateKey::generate().unwrap();
        let request = ask(&token, "c1", "gpu", &[address], &key);
        names.push(deployment.enroll(request, key).await.unwrap().name);
    }
    assert_ne!(names[0], names[1]);
    assert!(names.iter().all(|name| name.starts_with("gpu-")), "{names:?}");
    deployment.finish().await;
}
