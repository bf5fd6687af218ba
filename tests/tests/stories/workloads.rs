//! A pod enrols with the service-account token Kubernetes gave it. The issuer is played: its keys and its
//! tokens are made here, in the form Kubernetes documents; no cluster of Kubernetes runs.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ca_server::jwt::Rule;
use jsonwebtoken::{Algorithm, EncodingKey, Header, jwk::Jwk};
use node_agent::{enroll, keys::PrivateKey};
use raymtls_proto::{
    clock::Clock,
    durable::{self, Access},
    jwt,
    v1::{self, enroll_request::Credential},
};
use raymtls_tests::{Deployment, agents::options, ask, word};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tempfile::TempDir;

const DAY: Duration = Duration::from_secs(86_400);
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// Who signs tokens: keys, and the JWKS the CA reads.
struct Issuer {
    folder: TempDir,
}

struct Key {
    name: &'static str,
    key: EncodingKey,
    algorithm: Algorithm,
}

impl Key {
    fn new(name: &'static str) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let key = EncodingKey::from_ec_der(&key.serialize_der());
        Self { name, key, algorithm: Algorithm::ES256 }
    }

    fn public(&self) -> Jwk {
        let mut jwk = Jwk::from_encoding_key(&self.key, self.algorithm).unwrap();
        jwk.common.key_id = Some(self.name.to_owned());
        jwk
    }

    fn sign(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.name.to_owned()), ..Header::new(self.algorithm) };
        jsonwebtoken::encode(&header, claims, &self.key).unwrap()
    }
}

impl Issuer {
    fn with(keys: &[&Key]) -> Self {
        let issuer = Self { folder: tempfile::tempdir().unwrap() };
        issuer.publish(keys);
        issuer
    }

    fn jwks(&self) -> PathBuf {
        self.folder.path().join("jwks.json")
    }

    fn publish(&self, keys: &[&Key]) {
        let keys: Vec<Jwk> = keys.iter().map(|key| key.public()).collect();
        let text = json!({ "keys": keys }).to_string();
        durable::replace(&self.jwks(), text.as_bytes(), Access::PUBLIC).unwrap();
    }

    /// A CA with these clusters, whose workers may enrol with this issuer's tokens.
    async fn trusted_for(&self, clusters: &[&str]) -> Deployment {
        let rule = |cluster: &&str| Rule {
            issuer: ISSUER.to_owned(),
            audience: "ray-mtls".to_owned(),
            jwks_file: self.jwks(),
            namespace: "ray".to_owned(),
            service_account: "worker".to_owned(),
            cluster: (*cluster).to_owned(),
            role: "worker".to_owned(),
            addresses: vec!["10.0.0.0/8".to_owned()],
        };
        let rules = clusters.iter().map(rule).collect();
        let deployment = Deployment::start_trusting(rules).await;
        for cluster in clusters {
            deployment.cluster(cluster, DAY).await;
        }
        deployment
    }

    async fn trusted(&self) -> Deployment {
        self.trusted_for(&["c1"]).await
    }
}

/// An issuer of one key, and a CA that trusts it.
async fn trusting(key: &Key) -> (Issuer, Deployment) {
    let issuer = Issuer::with(&[key]);
    let deployment = issuer.trusted().await;
    (issuer, deployment)
}

/// Claims of a projected token as Kubernetes 1.30 writes them, good for an hour.
fn claims(deployment: &Deployment, pod: &str) -> Value {
    let now = deployment.clock.now().unix_timestamp();
    json!({
        "aud": ["ray-mtls"], "iss": ISSUER, "iat": now, "nbf": now, "exp": now + 3_600,
        "sub": "system:serviceaccount:ray:worker",
        "kubernetes.io": {
            "namespace": "ray",
            "pod": { "name": pod, "uid": "0d1ca1b3-0000-0000-0000-000000000000" },
            "serviceaccount": { "name": "worker", "uid": "0d1ca1b3-0000-0000-0000-000000000001" },
            "node": { "name": "host-7" },
        },
    })
}

/// The same with one part changed.
fn but(deployment: &Deployment, path: &str, value: Value) -> Value {
    let mut claims = claims(deployment, "w1");
    *claims.pointer_mut(path).unwrap() = value;
    claims
}

fn request(jwt: &str, name: &str, address: &str, key: &PrivateKey) -> v1::EnrollRequest {
    let credential = Some(Credential::Jwt(jwt.to_owned()));
    v1::EnrollRequest { credential, ..ask("", "c1", name, &[address], key) }
}

async fn asked(deployment: &Deployment, jwt: &str, name: &str, address: &str) -> &'static str {
    let key = PrivateKey::generate().unwrap();
    word(deployment.enrollment_client().enroll(request(jwt, name, address, &key)).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_enrols_under_its_own_name_once_and_its_token_is_on_record() {
    let key = Key::new("k1");
    let (_issuer, deployment) = trusting(&key).await;
    let jwt = key.sign(&claims(&deployment, "w1"));
    assert_eq!(asked(&deployment, &jwt, "w2", "10.0.0.1").await, "TOKEN_NODE_MISMATCH");
    assert_eq!(asked(&deployment, &jwt, "w1", "192.0.2.1").await, "ADDRESS_NOT_ALLOWED");

    let first = PrivateKey::generate().unwrap();
    let enrol = |key: &PrivateKey| {
        let request = request(&jwt, "w1", "10.0.0.1", key);
        let mut client = deployment.enrollment_client();
        async move { client.enroll(request).await }
    };
    let answer = enrol(&first).await.unwrap();
    assert_eq!(enrol(&first).await.unwrap().identity, answer.identity, "a lost answer, repeated");
    let thief = PrivateKey::generate().unwrap();
    assert_eq!(word(enrol(&thief).await), "TOKEN_SPENT");
    let tokens = deployment.tokens("c1").await;
    let [token] = tokens.as_slice() else { panic!("{tokens:?}") };
    assert_eq!(token.id, jwt::token_id(&jwt).to_string());
    assert_eq!((token.created_by.as_str(), token.used), ("jwt:ray/worker", 1));

    let deployment = deployment.restart().await;
    assert_eq!(asked(&deployment, &jwt, "w1", "10.0.0.1").await, "TOKEN_SPENT", "after a restart");
    deployment.clock.advance(Duration::from_secs(3_600));
    assert_eq!(asked(&deployment, &jwt, "w1", "10.0.0.1").await, "TOKEN_EXPIRED");
    deployment.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_token_of_a_pod_lifts_no_block() {
    let key = Key::new("k1");
    let (_issuer, deployment) = trusting(&key).await;
    deployment.set("c1", "trust-ranges=on").await;
    let jwt = key.sign(&claims(&deployment, "w1"));
    assert_eq!(asked(&deployment, &jwt, "w1", "10.0.0.1").await, "OK");
    let revoked = deployment.revoke("c1", "w1").await;
    assert_eq!(revoked.blocked_addresses, ["10.0.0.1"]);
    deployment.clock.advance(Duration::from_secs(60));
    let next = key.sign(&claims(&deployment, "w2"));
    assert_eq!(asked(&deployment, &next, "w2", "10.0.0.1").await, "ADDRESS_BLOCKED");
    assert_eq!(asked(&deployment, &next, "w2", "10.0.0.2").await, "OK");
    deployment.finish().await;
}

/// The other signature of the same key over the same bytes: (r, n - s) verifies wherever (r, s) does.
fn mirrored(jwt: &str) -> String {
    // Order of P-256 (FIPS 186-5, SP 800-186 3.2.1.3).
    let order = hex::decode("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551");
    let (signed, signature) = jwt.rsplit_once('.').unwrap();
    let mut signature = BASE64_URL_SAFE_NO_PAD.decode(signature).unwrap();
    let mut borrow = 0;
    for (byte, order) in signature[32..].iter_mut().zip(order.unwrap()).rev() {
        let difference = i32::from(order) - i32::from(*byte) - borrow;
        borrow = i32::from(difference < 0);
        *byte = u8::try_from(difference.rem_euclid(256)).unwrap();
    }
    format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_token_signed_the_other_way_round_is_no_second_use() {
    let key = Key::new("k1");
    let (_issuer, deployment) = trusting(&key).await;
    let jwt = key.sign(&claims(&deployment, "w1"));
    let other = mirrored(&jwt);
    assert_ne!(jwt, other);
    // Each verifies by itself: the name is asked for before the use.
    for jwt in [&jwt, &other] {
        assert_eq!(asked(&deployment, jwt, "w2", "10.0.0.1").await, "TOKEN_NODE_MISMATCH");
    }
    assert_eq!(asked(&deployment, &jwt, "w1", "10.0.0.1").await, "OK");
    assert_eq!(asked(&deployment, &other, "w1", "10.0.0.1").await, "TOKEN_SPENT");
    deployment.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_not_for_this_ca_or_this_account_is_one_word() {
    let (key, stranger) = (Key::new("k1"), Key::new("k1"));
    let (_issuer, deployment) = trusting(&key).await;
    let now = deployment.clock.now().unix_timestamp();
    let good = key.sign(&claims(&deployment, "w1"));
    let unsigned = {
        let claims = good.split('.').nth(1).unwrap();
        // {"alg":"none","kid":"k1"}
        format!("eyJhbGciOiJub25lIiwia2lkIjoiazEifQ.{claims}.")
    };
    let hmac = {
        // The public key as a secret: what a verifier takes that lets the token choose.
        let secret = serde_json::to_vec(&key.public()).unwrap();
        let header = Header { kid: Some("k1".to_owned()), ..Header::new(Algorithm::HS256) };
        jsonwebtoken::encode(
            &header,
            &claims(&deployment, "w1"),
            &EncodingKey::from_secret(&secret),
        )
        .unwrap()
    };
    let other_key = Key { name: "k9", ..Key::new("k9") };
    let changed = {
        let mut parts: Vec<&str> = good.split('.').collect();
        let other = key.sign(&claims(&deployment, "w9"));
        parts[1] = other.split('.').nth(1).unwrap();
        parts.join(".")
    };
    for (why, jwt) in [
        ("signed by somebody else", stranger.sign(&claims(&deployment, "w1"))),
        ("a key nobody published", other_key.sign(&claims(&deployment, "w1"))),
        ("no signature", unsigned),
        ("another algorithm", hmac),
        ("claims of another token", changed),
        ("another issuer", key.sign(&but(&deployment, "/iss", json!("https://elsewhere")))),
        ("another audience", key.sign(&but(&deployment, "/aud", json!(["vault"])))),
        ("no audience", key.sign(&but(&deployment, "/aud", json!([])))),
        (
            "another namespace",
            key.sign(&but(&deployment, "/kubernetes.io/namespace", json!("default"))),
        ),
        (
            "another account",
            key.sign(&but(&deployment, "/kubernetes.io/serviceaccount/name", json!("head"))),
        ),
        ("no pod", key.sign(&but(&deployment, "/kubernetes.io/pod", json!(null)))),
        ("not valid yet", key.sign(&but(&deployment, "/nbf", json!(now + 600)))),
        ("a life of a year", key.sign(&but(&deployment, "/exp", json!(now + 31_536_000)))),
        ("an expiry that is no time", key.sign(&but(&deployment, "/exp", json!(i64::MAX)))),
        ("cut short", good[..good.len() - 8].to_owned()),
        ("no JWT", "a.b.c".to_owned()),
        ("too long", format!("{good}{}", "A".repeat(jwt::JWT_LEN_MAX))),
    ] {
        assert_eq!(asked(&deployment, &jwt, "w1", "10.0.0.1").await, "TOKEN_UNKNOWN", "{why}");
    }
    assert!(deployment.tokens("c1").await.is_empty(), "a refused attempt leaves nothing");
    assert_eq!(asked(&deployment, &good, "w1", "10.0.0.1").await, "OK");
    deployment.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_bound_to_cluster_and_role_and_ends() {
    let key = Key::new("k1");
    let (_issuer, deployment) = trusting(&key).await;
    deployment.cluster("c2", DAY).await;
    let jwt = key.sign(&claims(&deployment, "w1"));
    let own = PrivateKey::generate().unwrap();
    let base = request(&jwt, "w1", "10.0.0.1", &own);
    let elsewhere = v1::EnrollRequest { cluster: "c2".to_owned(), ..base.clone() };
    let as_head = v1::EnrollRequest { role: v1::Role::Head.into(), ..base.clone() };
    let mut client = deployment.enrollment_client();
    assert_eq!(word(client.enroll(elsewhere).await), "TOKEN_CLUSTER_MISMATCH");
    assert_eq!(word(client.enroll(as_head).await), "TOKEN_ROLE_MISMATCH");
    assert_eq!(word(client.enroll(base).await), "OK");
    let expired =
        key.sign(&but(&deployment, "/exp", json!(deployment.clock.now().unix_timestamp() + 1)));
    deployment.clock.advance(Duration::from_secs(1));
    assert_eq!(asked(&deployment, &expired, "w1", "10.0.0.1").await, "TOKEN_EXPIRED");
    deployment.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_that_two_clusters_trust_joins_the_one_it_asks_for() {
    let key = Key::new("k1");
    let issuer = Issuer::with(&[&key]);
    let deployment = issuer.trusted_for(&["c1", "c2"]).await;
    let own = PrivateKey::generate().unwrap();
    let jwt = key.sign(&claims(&deployment, "w1"));
    let second =
        v1::EnrollRequest { cluster: "c2".to_owned(), ..request(&jwt, "w1", "10.0.0.1", &own) };
    assert_eq!(word(deployment.enrollment_client().enroll(second).await), "OK");
    // The use is spent, and belongs to that cluster.
    assert_eq!(asked(&deployment, &jwt, "w1", "10.0.0.1").await, "TOKEN_CLUSTER_MISMATCH");
    assert_eq!(deployment.tokens("c2").await.len(), 1);
    deployment.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_issuer_changes_its_keys_while_the_ca_serves() {
    let (old, new) = (Key::new("old"), Key::new("new"));
    let issuer = Issuer::with(&[&old]);
    let deployment = issuer.trusted().await;
    assert_eq!(
        asked(&deployment, &old.sign(&claims(&deployment, "w1")), "w1", "10.0.0.1").await,
        "OK"
    );
    issuer.publish(&[&old, &new]);
    deployment.clock.advance(Duration::from_secs(5));
    assert_eq!(
        asked(&deployment, &new.sign(&claims(&deployment, "w2")), "w2", "10.0.0.2").await,
        "OK"
    );
    issuer.publish(&[&new]);
    deployment.clock.advance(Duration::from_secs(60));
    let late = old.sign(&claims(&deployment, "w3"));
    assert_eq!(asked(&deployment, &late, "w3", "10.0.0.3").await, "TOKEN_UNKNOWN");
    durable::replace(&issuer.jwks(), b"{", Access::PUBLIC).unwrap();
    deployment.clock.advance(Duration::from_secs(60));
    let kept = new.sign(&claims(&deployment, "w4"));
    assert_eq!(asked(&deployment, &kept, "w4", "10.0.0.4").await, "OK", "a damaged file");
    deployment.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_enrols_from_a_join_file_without_a_secret() {
    let key = Key::new("k1");
    let (issuer, deployment) = trusting(&key).await;
    let token = issuer.folder.path().join("token");
    let join = deployment.folder.path().join("join");
    deployment.write_jwt_join("c1", &token, &join);
    let options = options(deployment.folder.path(), "w1", "10.0.0.1");
    let clock = std::sync::Arc::new(deployment.clock.clone());
    let missing = enroll::enroll(&options, clock.clone()).await.unwrap_err().to_string();
    assert!(missing.contains("token: No such file"), "{missing}");

    let jwt = key.sign(&claims(&deployment, "w1"));
    write(&token, &jwt);
    let enrolled = enroll::enroll(&options, clock.clone()).await.unwrap();
    assert_eq!((enrolled.node.as_str(), enrolled.join_file), ("w1", "kept: it holds no secret"));
    // A container that starts again has another token by then; the node is enrolled and needs none.
    write(
        &token,
        &key.sign(&but(&deployment, "/iat", json!(deployment.clock.now().unix_timestamp() + 1))),
    );
    let again = enroll::enroll(&options, clock).await.unwrap();
    assert!(again.already && join.exists());
    let text = std::fs::read_to_string(&join).unwrap();
    let secret = secrecy::SecretString::from(jwt);
    assert!(!text.contains(secret.expose_secret()), "the join file holds the JWT");
    deployment.finish().await;
}

fn write(path: &Path, text: &str) {
    durable::replace(path, format!("{text}\n").as_bytes(), Access::PRIVATE).unwrap();
}
