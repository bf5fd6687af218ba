//! Every field that a caller fills has a bound: at the bound the call is served, one past it the
//! call is refused in words that name it, and nothing is on record. No bound is a matter of taste to
//! these tests: they are what the CA must hold in memory and on disk for whoever is let in.

use std::{net::Ipv4Addr, time::Duration};

use ca_server::admin::{certificates, clusters, nodes, tokens};
use ca_server::{enroll::enroll, policy::NAMES_MAX, store::StoreError};
use node_agent::keys::PrivateKey;
use raymtls_proto::v1::{self, create_cluster_request::Life, enroll_request::Credential};
use raymtls_tests::{Deployment, ask, held::one_worker, node_leaf};

use crate::newer_peers::{call, raw_client};

const DAY: Duration = Duration::from_secs(86_400);

fn texts(count: usize, text: impl Fn(usize) -> String) -> Vec<String> {
    (0..count).map(text).collect()
}

fn addresses(count: usize) -> Vec<String> {
    texts(count, |n| format!("10.0.{}.{}", n / 200, n % 200 + 1))
}

fn dns_names(count: usize) -> Vec<String> {
    texts(count, |n| format!("n{n}.example"))
}

/// 253 characters in labels of 49, or one more.
fn long_dns(extra: usize) -> String {
    let label = "a".repeat(49);
    let name = [label.as_str(); 5].join(".");
    format!("{name}.{}", "b".repeat(253 - name.len() - 1 + extra))
}

fn refused<T: std::fmt::Debug>(answer: Result<T, StoreError>, what: &str, word: &str, says: &str) {
    let refusal = answer.map(drop).expect_err(what).refusal();
    assert_eq!(refusal.reason().as_str(), word, "{what}: {refusal}");
    assert!(refusal.to_string().contains(says), "{what}: {refusal}");
    assert!(refusal.to_string().len() < 600, "{what}: a text from outside grew the refusal");
}

#[tokio::test]
async fn an_enrolment_is_bounded_in_each_field() {
    let ca = Deployment::start().await;
    ca.cluster("c1", DAY).await;
    let long = long_dns(0);
    let token = ca
        .token_with(v1::CreateTokenRequest {
            any_address: true,
            address_ranges: Vec::new(),
            dns_names: [dns_names(NAMES_MAX - 1), vec![long.clone()]].concat(),
            ..one_worker("c1")
        })
        .await;
    let key = PrivateKey::generate().unwrap();
    let good = || ask(&token, "c1", "w1", &["10.0.0.1"], &key);
    let token_text = |text: String| Some(Credential::BootstrapToken(text));
    let rows: Vec<(&str, v1::EnrollRequest, &str, &str)> = vec![
        (
            "a token with a character more",
            v1::EnrollRequest { credential: token_text(format!("{token}A")), ..good() },
            "TOKEN_UNKNOWN",
            "token create",
        ),
        (
            "a token of 60,000 characters",
            v1::EnrollRequest { credential: token_text("a".repeat(60_000)), ..good() },
            "TOKEN_UNKNOWN",
            "token create",
        ),
        (
            "a cluster of 64",
            v1::EnrollRequest { cluster: "c".repeat(64), ..good() },
            "REQUEST_INVALID",
            "1 to 63 characters",
        ),
        (
            "a cluster of 60,000",
            v1::EnrollRequest { cluster: "c".repeat(60_000), ..good() },
            "REQUEST_INVALID",
            "1 to 63 characters",
        ),
        ("no role", v1::EnrollRequest { role: 0, ..good() }, "REQUEST_INVALID", "head, worker"),
        (
            "a role of the future",
            v1::EnrollRequest { role: 77, ..good() },
            "REQUEST_INVALID",
            "role",
        ),
        (
            "a name of 64",
            v1::EnrollRequest { node_name: "n".repeat(64), ..good() },
            "NAME_NOT_ALLOWED",
            "1 to 63 characters",
        ),
        (
            "addresses",
            v1::EnrollRequest { addresses: addresses(NAMES_MAX + 1), ..good() },
            "ADDRESS_NOT_ALLOWED",
            "more than 16 addresses",
        ),
        (
            "an address of 60,000",
            v1::EnrollRequest { addresses: vec!["1".repeat(60_000)], ..good() },
            "ADDRESS_NOT_ALLOWED",
            "is not an IP address",
        ),
        (
            "DNS names",
            v1::EnrollRequest { dns_names: dns_names(NAMES_MAX + 1), ..good() },
            "NAME_NOT_ALLOWED",
            "more than 16 DNS names",
        ),
        (
            "a DNS name of 254",
            v1::EnrollRequest { dns_names: vec![long_dns(1)], ..good() },
            "NAME_NOT_ALLOWED",
            "1 to 253 characters",
        ),
    ];
    let before = ca.held().await;
    for (what, request, word, says) in rows {
        refused(enroll(&ca.ca, request, Ipv4Addr::LOCALHOST.into()).await, what, word, says);
    }
    assert_eq!(ca.held().await, before);

    // Everything at its bound at once, through the listener.
    let name = "n".repeat(63);
    let most = v1::EnrollRequest {
        node_name: name.clone(),
        addresses: addresses(NAMES_MAX),
        dns_names: [dns_names(NAMES_MAX - 1), vec![long]].concat(),
        ..good()
    };
    let member = ca.enroll(most, key).await.unwrap();
    assert_eq!(member.name, name);

    // The leaf too; and one past its bounds is refused.
    let leaf_key = PrivateKey::generate().unwrap();
    let before = ca.held().await;
    let all = v1::IssueLeafRequest {
        addresses: addresses(NAMES_MAX),
        dns_names: dns_names(NAMES_MAX - 1),
        ..node_leaf(&leaf_key)
    };
    for (what, request, word) in [
        (
            "addresses",
            v1::IssueLeafRequest { addresses: addresses(NAMES_MAX + 1), ..all.clone() },
            "ADDRESS_NOT_ALLOWED",
        ),
        (
            "DNS names",
            v1::IssueLeafRequest { dns_names: dns_names(NAMES_MAX + 1), ..all.clone() },
            "NAME_NOT_ALLOWED",
        ),
        ("no purpose", v1::IssueLeafRequest { purpose: 0, ..all.clone() }, "REQUEST_INVALID"),
        ("a new purpose", v1::IssueLeafRequest { purpose: 77, ..all.clone() }, "REQUEST_INVALID"),
    ] {
        let error = member.client.issue_leaf(request).await.expect_err(what);
        assert_eq!(error.word(), word, "{what}: {error}");
    }
    assert_eq!(ca.held().await, before);
    member.client.issue_leaf(all).await.unwrap();
    ca.finish().await;
}

#[tokio::test]
async fn a_report_is_bounded_in_each_field() {
    let ca = Deployment::start().await;
    ca.cluster("c1", DAY).await;
    let member = ca.worker("c1", "w1", "10.0.0.1").await;
    let folder = |name: &str, serial: usize| v1::KeyFolder {
        name: name.to_owned(),
        serial: vec![1; serial],
        ..v1::KeyFolder::default()
    };
    let report = |agent_version: String, key_folders: Vec<v1::KeyFolder>| v1::SyncRequest {
        report: Some(v1::Report { agent_version, key_folders, ..v1::Report::default() }),
        ..v1::SyncRequest::default()
    };
    let longest = "9".repeat(64);
    let most = report(longest.clone(), vec![folder(&"k".repeat(64), 20); 64]);
    member.client.sync(most.clone()).await.unwrap();
    let rows = [
        ("a folder more", report(longest.clone(), vec![folder("k1", 16); 65]), "64 key folders"),
        ("a longer version", report("9".repeat(65), vec![]), "64 characters"),
        ("a line break", report("1.0\nroot: all is well".to_owned(), vec![]), "visible"),
        ("an escape", report("1.0\x1b[2J".to_owned(), vec![]), "visible"),
        ("a longer folder", report(longest.clone(), vec![folder(&"k".repeat(65), 16)]), "64"),
        ("a longer serial", report(longest.clone(), vec![folder("k1", 21)]), "20 bytes"),
    ];
    for (what, request, says) in rows {
        let error = member.client.sync(request).await.expect_err(what);
        assert_eq!(error.word(), "REQUEST_INVALID", "{what}: {error}");
        assert!(error.to_string().contains(says), "{what}: {error}");
        // What was reported before still stands.
        let kept = ca.node("c1", "w1").await.report;
        assert_eq!(kept.as_ref(), most.report.as_ref(), "{what}");
    }
    // A wait past the bound is cut to it; 64 KiB is the most a message may have.
    let big = report("9".repeat(64 * 1_024), vec![]);
    assert!(member.client.sync(big).await.is_err());
    member.client.sync(most).await.unwrap();
    ca.finish().await;
}

#[tokio::test]
async fn an_operator_s_request_is_bounded_in_each_field() {
    let ca = Deployment::start().await;
    ca.cluster("c1", DAY).await;
    ca.worker("c1", "w1", "10.0.0.1").await;
    let (running, operator) = (&ca.ca, &ca.operator);
    let create =
        |cluster: &str, life| v1::CreateClusterRequest { cluster: cluster.to_owned(), life };
    let day = Some(Life::MaxJobSeconds(86_400));
    clusters::create(running, operator, create(&"c".repeat(63), day)).await.unwrap();
    let before = ca.held().await;

    for (what, request, word, says) in [
        ("a cluster of 64", create(&"c".repeat(64), day), "REQUEST_INVALID", "1 to 63"),
        ("no life", create("c2", None), "SETTING_INVALID", "max-job"),
        (
            "a negative life",
            create("c2", Some(Life::MaxJobSeconds(-1))),
            "SETTING_INVALID",
            "negative",
        ),
        // 40 days and a second: the sum is shown.
        (
            "a longer job",
            create("c2", Some(Life::MaxJobSeconds(40 * 86_400 + 1))),
            "SETTING_INVALID",
            "2 x max-job",
        ),
        ("a shorter job", create("c2", Some(Life::MaxJobSeconds(119))), "SETTING_INVALID", "2m"),
        (
            "the longest there is",
            create("c2", Some(Life::MaxJobSeconds(i64::MAX))),
            "SETTING_INVALID",
            "2 x max-job",
        ),
        (
            "a longer life",
            create("c2", Some(Life::MaxLifeSeconds(80 * 86_400 + 1))),
            "SETTING_INVALID",
            "max-life",
        ),
    ] {
        refused(clusters::create(running, operator, request).await, what, word, says);
    }
    let set = |changes: Vec<String>| v1::SetClusterRequest {
        cluster: "c1".to_owned(),
        changes,
        dry_run: false,
    };
    for (what, changes, says) in [
        ("no change", vec![], "1 to 64 changes"),
        ("changes", texts(65, |_| "ray-token=on".to_owned()), "1 to 64 changes"),
        ("a range more", vec![format!("admin-ranges={}", addresses(65).join(","))], "at most 64"),
        ("a longer value", vec![format!("mode={}", "x".repeat(60_000))], "files or tunnel"),
        ("a longer key", vec![format!("{}=1", "x".repeat(60_000))], "is no setting"),
        ("a job that cannot hold", vec!["max-job=50d".to_owned()], "= 100"),
        ("a number without a unit", vec!["max-job=20".to_owned()], "20d"),
        ("a unit that is none", vec!["lease=24x".to_owned()], "20d"),
        (
            "one bad among good",
            vec!["lease=2d".to_owned(), "mode=fast".to_owned()],
            "files or tunnel",
        ),
    ] {
        refused(
            clusters::set(running, operator, set(changes)).await,
            what,
            "SETTING_INVALID",
            says,
        );
    }
    clusters::set(running, operator, set(texts(64, |_| "ray-token=on".to_owned()))).await.unwrap();
    ca.set("c1", &format!("admin-ranges={}", addresses(64).join(","))).await;
    let before_tokens = v1::CreateTokenRequest { uses: 100_000, ..one_worker("c1") };
    let most = v1::CreateTokenRequest {
        ttl_seconds: 30 * 86_400,
        node_names: texts(NAMES_MAX, |n| format!("w{n}*")),
        address_ranges: addresses(NAMES_MAX),
        dns_names: dns_names(NAMES_MAX),
        ..before_tokens
    };
    let held = ca.held().await;
    assert_eq!((held.certificates, held.nodes), (before.certificates, before.nodes));
    let made = |change: &dyn Fn(&mut v1::CreateTokenRequest)| {
        let mut request = most.clone();
        change(&mut request);
        request
    };
    for (what, request) in [
        ("names", made(&|t| t.node_names.push("more".into()))),
        ("ranges", made(&|t| t.address_ranges.push("10.9.0.0/16".into()))),
        ("DNS names", made(&|t| t.dns_names.push("more.example".into()))),
        ("uses", made(&|t| t.uses += 1)),
        ("life", made(&|t| t.ttl_seconds += 1)),
        ("a longer name", made(&|t| t.node_names = vec!["n".repeat(64)])),
        ("a longer DNS name", made(&|t| t.dns_names = vec![long_dns(1)])),
        ("a role of the future", made(&|t| t.role = 77)),
    ] {
        let answer = tokens::create(running, operator, request).await;
        let refusal = answer.map(drop).expect_err(what).refusal();
        assert!(refusal.to_string().len() < 600, "{what}: {refusal}");
    }
    assert_eq!(ca.held().await, held);
    tokens::create(running, operator, most).await.unwrap();

    let revoke = |reason: String| v1::RevokeNodeRequest {
        cluster: "c1".to_owned(),
        name: "w1".to_owned(),
        reason,
        keep_token: false,
        all_traffic: false,
    };
    let held = ca.held().await;
    let long = "x".repeat(REASON_LEN_MAX + 1);
    for reason in [String::new(), " ".to_owned(), "two\nlines".to_owned(), long] {
        let answer = nodes::revoke(running, operator, revoke(reason)).await;
        refused(answer, "a reason", "REQUEST_INVALID", "a reason is one line of 1 to");
    }
    let list = |page: String| v1::ListCertificatesRequest {
        cluster: "c1".to_owned(),
        node: String::new(),
        page,
    };
    let answer = certificates::list(running, operator, list("a".repeat(60_000))).await;
    refused(answer, "a cursor", "REQUEST_INVALID", "cursor");
    let serial = |serial| v1::GetCertificateRequest { cluster: "c1".to_owned(), serial };
    let answer = certificates::show(running, operator, serial(vec![1; 60_000])).await;
    refused(answer, "a serial", "REQUEST_INVALID", "");
    assert_eq!(ca.held().await, held);
    nodes::revoke(running, operator, revoke("x".repeat(REASON_LEN_MAX))).await.unwrap();
    ca.finish().await;
}

#[tokio::test]
async fn what_is_asked_of_tokens_nodes_and_lists_is_bounded_in_each_field() {
    let ca = Deployment::start().await;
    ca.cluster("c1", DAY).await;
    ca.worker("c1", "w1", "10.0.0.1").await;
    let (running, operator) = (&ca.ca, &ca.operator);
    let held = ca.held().await;
    let c1 = || "c1".to_owned();
    // At each bound: of the right form, and nobody's.
    let (no_name, no_page) = ("n".repeat(63), "ab".repeat(512));
    let show = |cluster, name| nodes::show(running, operator, v1::GetNodeRequest { cluster, name });
    let forget =
        |cluster, name| nodes::forget(running, operator, v1::ForgetNodeRequest { cluster, name });
    let revoke = |cluster, id| {
        let request = v1::RevokeTokenRequest { cluster, id };
        tokens::revoke(running, operator, request)
    };
    refused(show(c1(), no_name.clone()).await, "a node of 63", "NOT_FOUND", "node");
    refused(forget(c1(), no_name).await, "a node of 63", "NOT_FOUND", "node");
    refused(revoke(c1(), "f".repeat(16)).await, "an id of 16", "NOT_FOUND", "token");
    for name in ["n".repeat(64), "n".repeat(60_000), "../../x".to_owned(), String::new()] {
        refused(show(c1(), name.clone()).await, "a node", "REQUEST_INVALID", "1 to 63");
        refused(forget(c1(), name).await, "a node", "REQUEST_INVALID", "1 to 63");
    }
    for id in ["f".repeat(17), "f".repeat(60_000), "../../x".to_owned(), String::new()] {
        refused(revoke(c1(), id).await, "an id", "REQUEST_INVALID", "16");
    }
    for cluster in ["c".repeat(64), "c".repeat(60_000), String::new()] {
        let (what, word) = ("a cluster", "REQUEST_INVALID");
        refused(show(cluster.clone(), "w1".to_owned()).await, what, word, "1 to 63");
        refused(forget(cluster.clone(), "w1".to_owned()).await, what, word, "1 to 63");
        refused(revoke(cluster.clone(), "f".repeat(16)).await, what, word, "1 to 63");
        let request = v1::ListNodesRequest { cluster: cluster.clone(), page: String::new() };
        refused(nodes::list(running, operator, request).await, what, word, "1 to 63");
        let request = v1::ListTokensRequest { cluster: cluster.clone(), page: String::new() };
        refused(tokens::list(running, operator, request).await, what, word, "1 to 63");
        refused(clusters::show(running, operator, &cluster).await, what, word, "1 to 63");
    }
    for (page, good) in [(no_page.clone(), true), (format!("{no_page}ab"), false)] {
        let nodes = v1::ListNodesRequest { cluster: c1(), page: page.clone() };
        let tokens = v1::ListTokensRequest { cluster: c1(), page: page.clone() };
        let certificates = v1::ListCertificatesRequest { cluster: c1(), node: String::new(), page };
        let answers = [
            nodes::list(running, operator, nodes).await.map(drop),
            tokens::list(running, operator, tokens).await.map(drop),
            certificates::list(running, operator, certificates).await.map(drop),
        ];
        for answer in answers {
            match answer {
                Ok(()) => assert!(good, "a cursor of 1,026 characters was served"),
                refusal => {
                    assert!(!good, "{refusal:?}");
                    refused(refusal, "a cursor", "REQUEST_INVALID", "cursor");
                }
            }
        }
    }
    let node = v1::ListCertificatesRequest {
        cluster: c1(),
        node: "n".repeat(60_000),
        page: String::new(),
    };
    let answer = certificates::list(running, operator, node).await;
    refused(answer, "a node's certificates", "REQUEST_INVALID", "1 to 63");
    assert_eq!(ca.held().await, held);

    for key in ["scraper-ranges", "driver-ranges"] {
        let set = |count| v1::SetClusterRequest {
            cluster: c1(),
            changes: vec![format!("{key}={}", addresses(count).join(","))],
            dry_run: false,
        };
        let answer = clusters::set(running, operator, set(65)).await;
        refused(answer, key, "SETTING_INVALID", "at most 64");
        clusters::set(running, operator, set(64)).await.unwrap();
    }
    ca.finish().await;
}

/// Leave has no field at all, so its bound is that of every message.
#[tokio::test]
async fn a_leave_that_is_too_long_is_none() {
    let ca = Deployment::start().await;
    ca.cluster("c1", DAY).await;
    let member = ca.worker("c1", "w1", "10.0.0.1").await;
    let path = "/raymtls.v1.NodeService/Leave";
    // Field 1000, so many bytes of it.
    let message = |len: usize| {
        let mut bytes = vec![0xc2, 0x3e];
        prost::encode_length_delimiter(len, &mut bytes).unwrap();
        bytes.resize(bytes.len() + len, 0);
        bytes
    };
    let mut client = raw_client(&ca, Some(&member.identity)).await;
    let left = call::<v1::LeaveResponse>(&mut client, path, message(64 * 1_024)).await;
    assert_eq!(left.unwrap_err().code(), tonic::Code::OutOfRange);
    let status = ca.node("c1", "w1").await.state();
    assert_eq!(status, v1::NodeState::Live);
    call::<v1::LeaveResponse>(&mut client, path, message(32 * 1_024)).await.unwrap();
    assert_eq!(ca.node("c1", "w1").await.state(), v1::NodeState::Left);
    ca.finish().await;
}

const REASON_LEN_MAX: usize = 500;
