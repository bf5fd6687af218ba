//! Names and addresses in the shapes attackers and typists give them, in each call that takes one.
//! There is one form of each; everything else is refused in words, and nothing is spent or issued.

use std::time::Duration;

use node_agent::keys::PrivateKey;
use raymtls_proto::{leaf::LeafFacts, v1};
use raymtls_tests::{Deployment, ask, held::one_worker, node_leaf, word};

const DAY: Duration = Duration::from_secs(86_400);

/// No name in any place.
const NEVER: [&str; 22] = [
    "",
    ".",
    "-a",
    "a-",
    "a b",
    "a_b",
    "A",
    "Head.example",
    "head.example.",
    ".head",
    "head..example",
    "*",
    "*.example",
    "head\0",
    "head\0.evil.example",
    "head\nx",
    "head\r\nSet: 1",
    "head\u{1b}[31m",
    "he\u{430}d",
    "head\u{202e}",
    "../../etc/passwd",
    "a/b",
];
/// No DNS names either, though they look like some.
const NO_DNS: [&str; 6] =
    ["1.2.3.4", "::1", "::ffff:10.0.0.1", "[::1]", "head:8265", "https://head.example"];
/// No address a node can be known by.
const NO_ADDRESS: [&str; 22] = [
    "",
    "localhost",
    "head.example",
    "10.0.0",
    "10.0.0.1.2",
    "010.0.0.1",
    "10.0.0.1/32",
    "10.0.0.1:80",
    " 10.0.0.1",
    "10.0.0.1\n",
    "10.0.0.256",
    "0x0a000001",
    "167772161",
    "127.0.0.1",
    "::1",
    "::ffff:127.0.0.1",
    "0.0.0.0",
    "255.255.255.255",
    "169.254.0.1",
    "fe80::1%eth0",
    "ff02::1",
    "\u{ff11}0.0.0.1",
];

#[tokio::test]
async fn a_name_of_another_form_is_refused_in_every_place() {
    let ca = Deployment::start().await;
    ca.cluster("c1", DAY).await;
    // A token that allows everything it can, so that the form alone is judged.
    let token = ca
        .token_with(v1::CreateTokenRequest {
            any_address: true,
            address_ranges: Vec::new(),
            dns_names: vec!["head.example".to_owned(), "xn--hed-bka.example".to_owned()],
            ..one_worker("c1")
        })
        .await;
    let member = ca.worker("c1", "in", "10.0.0.200").await;
    let key = PrivateKey::generate().unwrap();
    let good = || ask(&token, "c1", "w1", &["10.0.0.1"], &key);
    let before = ca.held().await;
    let mut client = ca.enrollment_client();
    let texts = |text: &str| vec![text.to_owned()];

    for name in NEVER {
        let as_name = v1::EnrollRequest { node_name: name.to_owned(), ..good() };
        let as_cluster = v1::EnrollRequest { cluster: name.to_owned(), ..good() };
        for (request, expected) in [(as_name, "NAME_NOT_ALLOWED"), (as_cluster, "REQUEST_INVALID")]
        {
            let error = client.enroll(request).await.expect_err(name);
            assert_eq!(error.word(), expected, "{name:?}: {error}");
            let text = error.to_string();
            assert!(text.contains("a-z, 0-9 and '-'"), "{name:?}: {error}");
            // What is shown of it is escaped: a refusal is one line in a log.
            assert!(!text.chars().any(char::is_control), "{name:?}: {text:?}");
        }
    }
    for name in NEVER.into_iter().chain(NO_DNS) {
        let enroll = v1::EnrollRequest { dns_names: texts(name), ..good() };
        assert_eq!(word(client.enroll(enroll).await), "NAME_NOT_ALLOWED", "{name:?}");
        let leaf = v1::IssueLeafRequest { dns_names: texts(name), ..node_leaf(&key) };
        assert_eq!(word(member.client.issue_leaf(leaf).await), "NAME_NOT_ALLOWED", "{name:?}");
    }
    for address in NO_ADDRESS {
        let enroll = v1::EnrollRequest { addresses: texts(address), ..good() };
        let error = client.enroll(enroll).await.expect_err(address);
        assert_eq!(error.word(), "ADDRESS_NOT_ALLOWED", "{address:?}: {error}");
        assert!(!error.to_string().chars().any(char::is_control), "{address:?}: {error:?}");
        let leaf = v1::IssueLeafRequest { addresses: texts(address), ..node_leaf(&key) };
        let answer = member.client.issue_leaf(leaf).await;
        assert_eq!(word(answer), "ADDRESS_NOT_ALLOWED", "{address:?}");
    }
    assert_eq!(ca.held().await, before, "a refused name left something behind");

    // Punycode is a name like any other, where the token names it; an address has one form.
    let request = v1::EnrollRequest {
        dns_names: texts("xn--hed-bka.example"),
        addresses: vec!["::ffff:10.0.0.1".to_owned(), "FD00:0::1".to_owned()],
        ..good()
    };
    let answer = client.enroll(request).await.unwrap();
    assert_eq!(answer.addresses, ["10.0.0.1", "fd00::1"]);
    assert_eq!(answer.dns_names, ["xn--hed-bka.example"]);
    ca.finish().await;
}

#[tokio::test]
async fn an_identity_gets_nothing_of_another_node() {
    let ca = Deployment::start().await;
    ca.cluster("c1", DAY).await;
    let head = v1::CreateTokenRequest {
        role: v1::Role::Head.into(),
        dns_names: vec!["head.example".to_owned()],
        ..one_worker("c1")
    };
    let token = ca.token_with(head).await;
    let key = PrivateKey::generate().unwrap();
    let request = v1::EnrollRequest {
        role: v1::Role::Head.into(),
        ..ask(&token, "c1", "head", &["10.0.0.1"], &key)
    };
    ca.enroll(request, key).await.unwrap();
    let worker = ca.worker("c1", "w1", "10.0.0.2").await;
    let before = ca.held().await;
    let key = PrivateKey::generate().unwrap();
    // No call names a node, so there are only its name and address to ask for.
    for (what, request, expected) in [
        (
            "the head's address",
            v1::IssueLeafRequest { addresses: vec!["10.0.0.1".into()], ..node_leaf(&key) },
            "ADDRESS_NOT_ALLOWED",
        ),
        (
            "the head's address beside its own",
            v1::IssueLeafRequest {
                addresses: vec!["10.0.0.2".into(), "10.0.0.1".into()],
                ..node_leaf(&key)
            },
            "ADDRESS_NOT_ALLOWED",
        ),
        (
            "the head's DNS name",
            v1::IssueLeafRequest { dns_names: vec!["head.example".into()], ..node_leaf(&key) },
            "NAME_NOT_ALLOWED",
        ),
    ] {
        let error = worker.client.issue_leaf(request).await.expect_err(what);
        assert_eq!(error.word(), expected, "{what}: {error}");
        assert!(error.to_string().contains("enrol again"), "{what}: {error}");
    }
    assert_eq!(ca.held().await, before);
    let leaf = worker.client.issue_leaf(node_leaf(&key)).await.unwrap().leaf.unwrap();
    let next = PrivateKey::generate().unwrap();
    let identity = worker.client.renew_identity(next.csr_der().unwrap()).await.unwrap();
    let uris = |der: &[u8]| LeafFacts::parse(der).unwrap().uris;
    assert_eq!(uris(&leaf.leaf_der), ["spiffe://ray.example/cluster/c1/node/w1"]);
    let identity = identity.identity.unwrap();
    assert_eq!(uris(&identity.leaf_der), ["spiffe://ray.example/cluster/c1/agent/w1"]);
    ca.finish().await;
}
