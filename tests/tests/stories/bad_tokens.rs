//! Tokens that are guessed, and tokens at the edges of their time.

use std::{collections::BTreeSet, time::Duration};

use ca_server::{enroll::enroll, keys::random};
use node_agent::keys::PrivateKey;
use raymtls_proto::v1::{self, enroll_request::Credential};
use raymtls_tests::{Deployment, ask, held::one_worker, word};
use secrecy::ExposeSecret;

const DAY: Duration = Duration::from_secs(86_400);
const GUESSES: usize = 10_000;

#[tokio::test]
async fn ten_thousand_wrong_tokens_get_nothing_and_cost_nobody_else() {
    let ca = Deployment::start().await;
    ca.cluster("c1", DAY).await;
    let token = ca.token("c1", v1::Role::Worker, 1).await;
    let (id, secret) = token.split_once('.').unwrap();
    let key = PrivateKey::generate().unwrap();
    let good = ask(&token, "c1", "w1", &["10.0.0.1"], &key);
    let before = ca.held().await;
    for guess in 0..GUESSES {
        let drawn = random::token().expose();
        let (other_id, other_secret) = drawn.expose_secret().split_once('.').unwrap();
        let text = match guess % 4 {
            0 => drawn.expose_secret().to_owned(),
            // Who knows the id, which is no secret, is no nearer.
            1 => format!("{id}.{other_secret}"),
            2 => format!("{other_id}.{secret}"),
            _ => format!("{id}.{}", &secret[..guess % secret.len()]),
        };
        let request = v1::EnrollRequest {
            credential: Some(Credential::BootstrapToken(text)),
            ..good.clone()
        };
        let peer = "192.0.2.66".parse().unwrap();
        let refusal = enroll(&ca.ca, request, peer).await.map(drop).unwrap_err().refusal();
        // Once a limit is reached, that is the word.
        let word = refusal.reason().as_str();
        assert!(["TOKEN_UNKNOWN", "RATE_LIMITED"].contains(&word), "{refusal}");
        assert!(!refusal.to_string().contains(id), "{refusal}");
    }
    assert_eq!(ca.held().await, before, "a guess left something behind");
    // The one that was made is good, from another machine.
    ca.enroll(good, key).await.unwrap();
    ca.finish().await;
}

#[test]
fn tokens_are_drawn_evenly_and_never_twice() {
    const DRAWN: u32 = 4_000;
    let mut seen = BTreeSet::new();
    let mut ones = [0_u32; 256];
    for _ in 0..DRAWN {
        let bytes: [u8; 32] = random::bytes();
        for (bit, count) in ones.iter_mut().enumerate() {
            *count += u32::from(bytes[bit / 8] >> (bit % 8) & 1);
        }
        assert!(seen.insert(random::token().expose().expose_secret().to_owned()), "drawn twice");
    }
    // Each of 256 bits is set in half of the draws, within 6 standard deviations.
    for (bit, count) in ones.into_iter().enumerate() {
        assert!(count.abs_diff(DRAWN / 2) < 190, "bit {bit}: {count} of {DRAWN}");
    }
    // An id of 64 bits, a dot, a secret of 256.
    assert!(seen.iter().all(|text| text.len() == 16 + 1 + 43));
}

#[tokio::test]
async fn a_token_is_good_from_its_making_to_the_last_moment_by_the_server_s_clock() {
    let ca = Deployment::start().await;
    ca.cluster("c1", DAY).await;
    let minute = v1::CreateTokenRequest { ttl_seconds: 60, ..one_worker("c1") };
    // What is asked at each moment after the making of a token of a minute.
    let moments = [(0, "OK"), (59_999, "OK"), (60_000, "TOKEN_EXPIRED"), (60_001, "TOKEN_EXPIRED")];
    for (index, (after_ms, expected)) in moments.into_iter().enumerate() {
        let token = ca.token_with(minute.clone()).await;
        ca.clock.advance(Duration::from_millis(after_ms));
        let held = ca.held().await;
        let key = PrivateKey::generate().unwrap();
        let address = format!("10.0.0.{}", index + 1);
        let request = ask(&token, "c1", &format!("w{index}"), &[&address], &key);
        assert_eq!(word(ca.enrollment_client().enroll(request).await), expected, "{after_ms} ms");
        if expected != "OK" {
            assert_eq!(ca.held().await, held, "{after_ms} ms");
        }
    }
    ca.finish().await;
}
