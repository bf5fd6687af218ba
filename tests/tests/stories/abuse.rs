//! Those who ask too often, guess, or lie about where they come from; and the honest ones beside
//! them, who go on. What floods the real program is in `tests/abuse.rs`.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use ca_server::{limits::Limits, proxy_protocol::TrustedProxies};
use node_agent::{client::EnrollmentClient, keys::PrivateKey};
use raymtls_proto::{
    reason::{self, Reason},
    v1,
};
use raymtls_tests::{
    Deployment, TRUST_DOMAIN, ask, limits, node_leaf,
    wire::{Stranger, balancer, local_header, proxy_header},
    word,
};
use tokio::task::JoinSet;

const DAY: Duration = Duration::from_secs(86_400);
const WRONG_TOKENS: usize = 10_000;
/// Connections and calls on each at once, of the one who guesses.
const CONNECTIONS: usize = 4;
const STREAMS: usize = 16;

fn stranger(deployment: &Deployment) -> Stranger {
    let control = deployment.ca.authority(&ca_server::store::Authority::Control).unwrap();
    Stranger::new(control.root_der.clone().into(), &format!("ca.{TRUST_DOMAIN}"))
}

fn no_proxies() -> TrustedProxies {
    TrustedProxies::default()
}

fn metric(deployment: &Deployment, name: &str) -> u64 {
    let text = deployment.ca.metrics.text();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or("x 0").to_owned();
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_wrong_tokens_from_one_address_shut_out_that_address_alone() {
    let deployment = Deployment::start_within(Limits::default(), no_proxies()).await;
    deployment.cluster("c1", DAY).await;
    let token = deployment.token("c1", v1::Role::Worker, 3).await;
    let wrong = format!("{}.{}", token.split_once('.').unwrap().0, "A".repeat(43));
    let stranger = stranger(&deployment);
    let key = PrivateKey::generate().unwrap();

    // Somebody at 127.0.0.1 guesses.
    let guess = ask(&wrong, "c1", "w1", &["10.0.0.1"], &key);
    let began = std::time::Instant::now();
    let mut guessing = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let client = stranger.grpc(1, deployment.enrollment).await;
        for _ in 0..STREAMS {
            let (mut client, guess) = (client.clone(), guess.clone());
            guessing.spawn(async move {
                let mut limited = 0;
                for _ in 0..WRONG_TOKENS / CONNECTIONS / STREAMS {
                    let status = client.enroll(guess.clone()).await.unwrap_err();
                    match Reason::of(&status) {
                        Some(Reason::RateLimited) => {
                            assert_eq!(status.code(), tonic::Code::ResourceExhausted);
                            assert!(
                                reason::retry_after(&status).unwrap() >= Duration::from_secs(1)
                            );
                            limited += 1;
                        }
                        reason => assert_eq!(reason, Some(Reason::TokenUnknown), "{status}"),
                    }
                }
                limited
            });
        }
    }
    // While that goes on, somebody at 127.0.0.2 has a good one.
    let mut honest = stranger.grpc(2, deployment.enrollment).await;
    let asked = std::time::Instant::now();
    honest.enroll(ask(&token, "c1", "w2", &["10.0.0.2"], &key)).await.unwrap();
    let waited = asked.elapsed();

    let limited: usize = guessing.join_all().await.into_iter().sum();
    let tried = WRONG_TOKENS / CONNECTIONS / STREAMS * CONNECTIONS * STREAMS;
    let wrong = metric(&deployment, "raymtls_ca_wrong_tokens_total");
    println!(
        "{tried} wrong tokens in {:?}: {wrong} looked at, {limited} rate-limited; \
         an enrolment from another address meanwhile took {waited:?}",
        began.elapsed()
    );
    assert_eq!(usize::try_from(wrong).unwrap() + limited, tried);
    let in_flight = (CONNECTIONS * STREAMS) as u64;
    assert!((30..=30 + in_flight).contains(&wrong), "{wrong} were looked at");
    assert!(waited < Duration::from_secs(10), "{waited:?}");

    // The address itself gets in again once its wrong tokens have grown back.
    let mut shut_out = stranger.grpc(1, deployment.enrollment).await;
    let other = PrivateKey::generate().unwrap();
    let good = ask(&token, "c1", "w3", &["10.0.0.3"], &other);
    let status = shut_out.enroll(good.clone()).await.unwrap_err();
    assert_eq!(Reason::of(&status), Some(Reason::RateLimited));
    deployment.clock.advance(reason::retry_after(&status).unwrap());
    shut_out.enroll(good).await.unwrap();
    assert_eq!(deployment.tokens("c1").await[0].used, 2);
    drop((honest, shut_out));
    deployment.finish().await;
}

#[tokio::test]
async fn a_crowd_with_good_tokens_is_let_in_at_the_rate_of_all_and_told_when() {
    let limits = Limits { enrolments_burst: 3, enrolments_per_minute: 60, ..Limits::highest() };
    let deployment = Deployment::start_within(limits, no_proxies()).await;
    deployment.cluster("c1", DAY).await;
    let token = deployment.token("c1", v1::Role::Worker, 5).await;
    let wrong = ask("nonsense", "c1", "w0", &["10.0.0.9"], &PrivateKey::generate().unwrap());
    let mut client = deployment.enrollment_client();
    for number in 1..=5 {
        // What has no token spends nothing that others need.
        for _ in 0..5 {
            assert_eq!(word(client.enroll(wrong.clone()).await), "TOKEN_UNKNOWN");
        }
        let key = PrivateKey::generate().unwrap();
        let request =
            ask(&token, "c1", &format!("w{number}"), &[&format!("10.0.0.{number}")], &key);
        let answer = client.enroll(request.clone()).await;
        if number <= 3 {
            answer.unwrap();
            continue;
        }
        let refused = answer.unwrap_err();
        assert_eq!(refused.word(), "RATE_LIMITED");
        assert_eq!(refused.retry_after(), Some(Duration::from_secs(1)));
        deployment.clock.advance(Duration::from_secs(1));
        client.enroll(request).await.unwrap();
    }
    deployment.finish().await;
}

#[tokio::test]
async fn a_node_that_asks_for_certificate_after_certificate_disturbs_no_other() {
    let limits = Limits {
        certificates_per_node_burst: 4,
        certificates_per_node_per_minute: 6,
        ..Limits::highest()
    };
    let deployment = Deployment::start_within(limits, no_proxies()).await;
    deployment.cluster("c1", DAY).await;
    let zealot = deployment.worker("c1", "zealot", "10.0.0.1").await;
    let other = deployment.worker("c1", "other", "10.0.0.2").await;
    let key = PrivateKey::generate().unwrap();
    for _ in 0..4 {
        zealot.client.issue_leaf(node_leaf(&key)).await.unwrap();
    }
    let refused = zealot.client.issue_leaf(node_leaf(&key)).await.unwrap_err();
    assert_eq!(
        (refused.word(), refused.retry_after()),
        ("RATE_LIMITED", Some(Duration::from_secs(10)))
    );
    let next = PrivateKey::generate().unwrap().csr_der().unwrap();
    assert_eq!(word(zealot.client.renew_identity(next.clone()).await), "RATE_LIMITED");
    other.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();

    deployment.clock.advance(Duration::from_secs(10));
    zealot.client.renew_identity(next).await.unwrap();
    assert_eq!(word(zealot.client.issue_leaf(node_leaf(&key)).await), "RATE_LIMITED");
    drop((zealot, other));
    deployment.finish().await;
}

#[tokio::test]
async fn behind_a_balancer_the_client_s_address_counts_and_nobody_else_may_name_one() {
    let two_guesses = Limits { wrong_tokens_per_address_burst: 2, ..Limits::default() };
    let trusted = TrustedProxies::parse(&["127.0.0.2/31".to_owned()]).unwrap();
    let deployment = Deployment::start_within(two_guesses, trusted).await;
    deployment.cluster("c1", DAY).await;
    let token = deployment
        .token_with(v1::CreateTokenRequest {
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            uses: 4,
            any_address: true,
            ..v1::CreateTokenRequest::default()
        })
        .await;
    let through = async |last, header| {
        let balancer = balancer(last, header, deployment.enrollment).await;
        let target = deployment.target(balancer);
        EnrollmentClient::new(&target, limits(), Arc::new(deployment.clock.clone())).unwrap()
    };
    let request = |name: &str, key: &PrivateKey| ask(&token, "c1", name, &[], key);
    let [one, two, three] = [(); 3].map(|()| PrivateKey::generate().unwrap());

    // What the node did not say, the balancer does.
    let mut client = through(2, proxy_header(Ipv4Addr::new(10, 7, 0, 9))).await;
    let answer = client.enroll(request("w1", &one)).await.unwrap();
    assert_eq!(answer.addresses, ["10.7.0.9"]);
    assert_eq!(deployment.node("c1", &answer.node_name).await.addresses[0].address, "10.7.0.9");

    // A health check has the balancer's own address, by which no node can be known.
    let mut check = through(3, local_header()).await;
    assert_eq!(word(check.enroll(request("w2", &two)).await), "ADDRESS_NOT_ALLOWED");

    // Whoever guesses behind the balancer shuts out itself and not the balancer.
    let wrong = ask("nonsense", "c1", "w3", &[], &three);
    let mut guesser = through(2, proxy_header(Ipv4Addr::new(10, 7, 0, 66))).await;
    for expected in ["TOKEN_UNKNOWN", "TOKEN_UNKNOWN", "RATE_LIMITED"] {
        assert_eq!(word(guesser.enroll(wrong.clone()).await), expected);
    }
    let mut beside = through(2, proxy_header(Ipv4Addr::new(10, 7, 0, 10))).await;
    assert_eq!(beside.enroll(request("w3", &three)).await.unwrap().addresses, ["10.7.0.10"]);

    // Nobody else may say whose connection it is, and a balancer must.
    let refused: [(&str, u8, Vec<u8>); 4] = [
        ("a header from elsewhere", 1, proxy_header(Ipv4Addr::new(10, 7, 0, 9))),
        ("a balancer without a header", 2, vec![]),
        ("a balancer with version 1", 2, b"PROXY TCP4 10.7.0.9 10.0.0.1 1 2\r\n".to_vec()),
        ("a header cut short", 2, proxy_header(Ipv4Addr::new(10, 7, 0, 9))[..20].to_vec()),
    ];
    for (what, last, header) in refused {
        let mut client = through(last, header).await;
        assert_eq!(word(client.enroll(request("w4", &two)).await), "CA_AWAY", "{what}");
    }
    assert_eq!(deployment.tokens("c1").await[0].used, 2);
    assert!(deployment.ca.metrics.text().contains("why=\"proxy_header\""));
    drop((client, check, guesser, beside));
    deployment.finish().await;
}
