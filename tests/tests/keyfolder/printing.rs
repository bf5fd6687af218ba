//! Whatever holds a secret prints none of it: neither by itself nor as the text of a panic, which goes
//! to the log of whoever started the program. And what we hold of secrets is wiped when it goes.

use std::{fmt::Debug, panic::catch_unwind};

use ca_server::keys::kek::Kek;
use node_agent::keys::PrivateKey;
use raymtls_proto::{
    join::{Credential, JoinFile},
    token::{BootstrapToken, TokenId},
    v1,
};
use secrecy::{ExposeSecret, SecretBox};
use zeroize::ZeroizeOnDrop;

const SECRET: [u8; 32] = [0xab; 32];
const RAY_TOKEN: &str = "a-token-of-ray-that-nobody-prints";

/// Does not compile where one of them is not wiped.
const _: () = {
    const fn is_wiped<T: ZeroizeOnDrop>() {}
    is_wiped::<PrivateKey>();
    is_wiped::<BootstrapToken>();
    is_wiped::<SecretBox<[u8; 32]>>();
};

fn refuse<T>(value: T) -> Result<(), T> {
    Err(value)
}

/// How a value shows itself: alone, laid out, inside another, and as the text of a panic.
fn shown<T: Debug>(value: T) -> Vec<String> {
    let value = Some(value);
    let mut shown = vec![format!("{value:?}"), format!("{value:#?}"), format!("{value:02x?}")];
    let panicked = catch_unwind(std::panic::AssertUnwindSafe(|| refuse(value).unwrap()));
    let text = panicked.unwrap_err().downcast::<String>().expect("a panic with a text");
    assert!(text.contains("called `Result::unwrap()`"), "{text}");
    shown.push(*text);
    shown
}

#[test]
fn what_holds_a_secret_prints_none_of_it_and_no_panic_does() {
    let token = || BootstrapToken::new(TokenId::new([1; 8]), SECRET);
    let text = token().expose().expose_secret().to_owned();
    let half = text.split('.').nth(1).unwrap().to_owned();
    let key = PrivateKey::generate().unwrap();
    let key_text = key.to_pem().lines().nth(1).unwrap()[40..].to_owned();
    let folder = tempfile::tempdir().unwrap();
    let kek = Kek::create(&folder.path().join("kek")).unwrap();
    let kek_text = std::fs::read_to_string(folder.path().join("kek")).unwrap();
    let join = JoinFile {
        trust_domain: "ray.example".parse().unwrap(),
        cluster: "c1".parse().unwrap(),
        enrollment_endpoints: vec!["127.0.0.1:1".to_owned()],
        node_endpoints: vec!["127.0.0.1:2".to_owned()],
        control_roots: Vec::new(),
        credential: Credential::Token(token()),
    };
    let credential = v1::enroll_request::Credential::BootstrapToken(text.clone());
    let enrolment =
        v1::EnrollRequest { credential: Some(credential.clone()), ..v1::EnrollRequest::default() };
    let made =
        v1::CreateTokenResponse { bootstrap_token: text, ..v1::CreateTokenResponse::default() };
    let ray = || v1::RayToken { token: RAY_TOKEN.as_bytes().to_vec() };
    let news = v1::SyncResponse { ray_token: Some(ray()), ..v1::SyncResponse::default() };

    let bytes = |bytes: &[u8]| {
        let shown = format!("{bytes:?}");
        shown[1..shown.len() - 1].to_owned()
    };
    let secrets = [
        half,
        hex::encode(SECRET),
        bytes(&SECRET[..8]),
        key_text,
        kek_text.trim().to_owned(),
        bytes(&hex::decode(kek_text.trim()).unwrap()[..8]),
        RAY_TOKEN.to_owned(),
        bytes(&RAY_TOKEN.as_bytes()[..8]),
        "ab, ab, ab".to_owned(),
    ];
    let table = [
        ("a bootstrap token", shown(token())),
        ("a join file", shown(join)),
        ("its text", shown(token().expose())),
        ("a private key", shown(key)),
        ("a key-encryption key", shown(kek)),
        ("a credential", shown(credential)),
        ("an enrolment", shown(enrolment)),
        ("a token just made", shown(made)),
        ("Ray's token", shown(ray())),
        ("news", shown(news)),
    ];
    for (what, texts) in table {
        for text in texts {
            assert!(text.contains("..") || text.contains("REDACTED"), "{what}: {text}");
            for secret in &secrets {
                assert!(!text.contains(secret), "{what} shows a secret: {text}");
            }
        }
    }
}
