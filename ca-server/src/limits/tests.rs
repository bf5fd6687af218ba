use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn at_ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn v4(last: u32) -> IpAddr {
    IpAddr::from(std::net::Ipv4Addr::from(0x0a00_0000 + last))
}

fn token(number: u8) -> TokenId {
    format!("{number:016x}").parse().unwrap()
}

#[test]
fn a_burst_then_the_rate_and_a_refused_one_costs_nothing() {
    // 60 a minute: one a second, three at once.
    let sketch = Sketch::of_one(Rate::new(60, 3));
    let rows: [(&str, u64, Option<u64>); 9] = [
        ("first", 0, None),
        ("second", 0, None),
        ("third", 0, None),
        ("one too many", 0, Some(1_000)),
        ("still", 400, Some(600)),
        ("a moment too early", 999, Some(1)),
        ("when it said", 1_000, None),
        ("that was the one", 1_000, Some(1_000)),
        ("after a long pause", 60_000, None),
    ];
    for (what, ms, wait) in rows {
        let took = sketch.take(at_ms(ms), &());
        assert_eq!(took, wait.map(Duration::from_millis), "{what}");
    }
}

#[test]
fn an_ipv6_host_is_its_64_and_a_mapped_address_is_ipv4() {
    let key = |text: &str| AddressKey::of(text.parse().unwrap()).to_string();
    assert_eq!(key("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64");
    assert_eq!(key("2001:db8:1:2::1"), key("2001:db8:1:2:ffff::"));
    assert_ne!(key("2001:db8:1:2::1"), key("2001:db8:1:3::1"));
    assert_eq!(key("::ffff:10.0.0.1"), "10.0.0.1");
}

#[test]
fn wrong_tokens_count_against_their_address_alone_and_grow_back() {
    let limiter = Limiter::new(&Limits {
        wrong_tokens_per_address_per_minute: 60,
        wrong_tokens_per_address_burst: 2,
        ..Limits::default()
    });
    let (bad, good) = (v4(1), v4(2));
    for _ in 0..2 {
        limiter.wrong_token(at_ms(0), bad).unwrap();
    }
    let refusal = limiter.wrong_token(at_ms(0), bad).unwrap_err();
    let expected = Refusal::RateLimited {
        what: "wrong tokens from this address",
        retry_after: Duration::from_secs(1),
    };
    assert_eq!(refusal, expected);
    limiter.wrong_token(at_ms(0), good).unwrap();
    limiter.wrong_token(at_ms(1_000), bad).unwrap();
}

#[test]
fn whoever_has_no_token_spends_nothing_of_what_others_need() {
    let limiter = Limiter::new(&Limits { enrolments_burst: 1, ..Limits::default() });
    // A whole network tries wrong tokens until all of them are too many.
    for address in 0..2_000 {
        while limiter.wrong_token(at_ms(0), v4(address)).is_ok() {}
    }
    for address in 0..2_000 {
        limiter.attempt(at_ms(0), v4(address)).unwrap();
    }
    limiter.enrolment(at_ms(0), &token(1)).unwrap();
    assert!(limiter.enrolment(at_ms(0), &token(2)).is_err(), "the limit in all does not limit");
    // Bystanders are judged by themselves, all but for chance.
    let judged = (1..=10_000).filter(|n| limiter.wrong_token(at_ms(0), v4(1 << 20 | n)).is_err());
    let judged = judged.count();
    println!("2,000 addresses over their limit: {judged} of 10,000 others judged with them");
    assert!(judged < 30, "{judged} of 10,000");
}

#[test]
fn whoever_holds_one_token_leaves_as_much_to_the_others() {
    let limiter = Limiter::default();
    let enrolled = |holder| {
        (0..10_000).filter(|_| limiter.enrolment(at_ms(0), &token(holder)).is_ok()).count()
    };
    assert_eq!((enrolled(1), enrolled(2), enrolled(3)), (3_000, 3_000, 0));
}

#[test]
fn an_identity_that_is_not_in_force_spends_nothing_of_its_node_s() {
    let limiter = Limiter::default();
    let caller = Caller {
        cluster: "c1".parse().unwrap(),
        node: "w1".parse().unwrap(),
        serial: Serial::new(1, [7; 10]),
        source: None,
    };
    while limiter.stray(at_ms(0), &caller).is_ok() {}
    for (call, most) in [(NodeCall::Certificate, 120), (NodeCall::Sync, 30)] {
        let may = (0..1_000).filter(|_| limiter.node_call(at_ms(0), call, &caller).is_ok()).count();
        assert_eq!(may, most, "{call:?}");
    }
}

#[test]
fn a_thousand_nodes_behind_one_address_join_within_a_minute() {
    let limiter = Limiter::default();
    let joined = (0..1_000).filter(|_| limiter.attempt(at_ms(0), v4(1)).is_ok()).count();
    assert_eq!(joined, 1_000);
    let in_all = (0..3_000).filter(|_| limiter.enrolment(at_ms(0), &token(1)).is_ok()).count();
    assert_eq!(in_all, 3_000);
}

#[test]
fn limits_out_of_bounds_are_named() {
    Limits::default().check().unwrap();
    Limits::highest().check().unwrap();
    for (value, good) in [(0, false), (1, true), (1_000_000, true), (1_000_001, false)] {
        let limits = Limits { enrolments_burst: value, ..Limits::default() };
        let checked = limits.check();
        assert_eq!(checked.is_ok(), good, "{value}");
        if let Err(error) = checked {
            assert!(error.contains("limits.enrolments_burst"), "{error}");
        }
    }
}

proptest! {
    /// Whoever shares the cells: nobody ever gets more than a burst and what grew back since.
    #[test]
    fn no_key_gets_more_than_its_rate_whoever_else_asks(
        asks in prop::collection::vec((0_u32..400, 0_u64..200), 1..2_000),
        burst in 1_u32..8,
    ) {
        let rate = Rate::new(600, burst);
        let sketch = Sketch::of_many(rate);
        let mut given: HashMap<u32, Vec<u64>> = HashMap::new();
        let mut ms = 0;
        for (key, pause) in asks {
            ms += pause;
            if sketch.take(at_ms(ms), &key).is_none() {
                given.entry(key).or_default().push(ms);
            }
        }
        for moments in given.values() {
            for (first, from) in moments.iter().enumerate() {
                for (last, until) in moments.iter().enumerate().skip(first) {
                    let most = u64::from(burst) + (until - from) / 100;
                    prop_assert!(((last - first) as u64) < most, "{moments:?}");
                }
            }
        }
    }
}
