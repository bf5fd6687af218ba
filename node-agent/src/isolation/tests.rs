//! The rendered tables as files to read, and what must hold of any policy. That nft takes them and
//! the kernel does what they say is shown on real hosts elsewhere.

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf};

use raymtls_proto::{
    ports::{self, Caller, Port},
    v1,
};

use super::*;

fn addresses(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn policy(role: v1::Role, verdict: Verdict) -> Policy {
    let settings = v1::Settings {
        port_plan: Some(v1::PortPlan {
            collective_min: 20_000,
            collective_max: 20_100,
            ..ports::default_plan()
        }),
        admin_ranges: vec!["192.0.2.0/28".to_owned(), "2001:db8:a::/64".to_owned()],
        scraper_ranges: vec!["192.0.2.64/32".to_owned()],
        driver_ranges: vec!["198.51.100.0/24".to_owned()],
        ray_client: true,
        ..v1::Settings::default()
    };
    Policy {
        cluster: "c1".parse().unwrap(),
        role,
        settings,
        members: addresses(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "2001:db8::1", "2001:db8::2"]),
        drivers: addresses(&["203.0.113.9"]),
        blocked: addresses(&["10.0.0.9", "2001:db8::9"]),
        blocked_entirely: addresses(&["10.0.0.8", "2001:db8::8"]),
        protected: Protected {
            ca: addresses(&["10.0.0.250"]),
            gateways: addresses(&["10.0.0.254"]),
            own: addresses(&["10.0.0.1"]),
        },
        verdict,
    }
}

#[track_caller]
fn assert_golden(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/isolation/golden").join(name);
    if std::env::var_os("UPDATE_SNAPSHOT").is_some() {
        #[allow(clippy::disallowed_methods, reason = "a file of the source tree, by hand")]
        std::fs::write(&path, text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, golden, "UPDATE_SNAPSHOT=1 rewrites {}", path.display());
}

#[test]
fn a_head_under_enforce_reads_as_written() {
    let text = render(&policy(v1::Role::Head, Verdict::Drop), Counters::default());
    assert_golden("head-enforce.nft", &text);
}

#[test]
fn a_worker_under_audit_drops_nothing() {
    let counted = Counters { blocked: 7, refused: 12 };
    let text = render(&policy(v1::Role::Worker, Verdict::Count), counted);
    assert!(!text.contains("drop"), "{text}");
    assert_golden("worker-audit.nft", &text);
}

#[test]
fn an_empty_cluster_renders_too() {
    let empty = Policy {
        members: BTreeSet::new(),
        drivers: BTreeSet::new(),
        blocked: BTreeSet::new(),
        blocked_entirely: BTreeSet::new(),
        settings: v1::Settings::default(),
        ..policy(v1::Role::Worker, Verdict::Drop)
    };
    let text = render(&empty, Counters::default());
    assert!(!text.contains("elements"), "{text}");
}

#[test]
fn a_block_hits_no_member_no_operator_and_nothing_the_host_needs() {
    let mut policy = policy(v1::Role::Worker, Verdict::Drop);
    let innocent = [
        ("a live member", "10.0.0.2"),
        ("the host itself", "10.0.0.1"),
        ("the CA", "10.0.0.250"),
        ("the gateway", "10.0.0.254"),
        ("an operator", "192.0.2.3"),
        ("an operator, over IPv6", "2001:db8:a::5"),
        ("loopback", "127.0.0.1"),
        ("loopback, over IPv6", "::1"),
        ("a member in IPv6 clothes", "::ffff:10.0.0.2"),
    ];
    policy.blocked.extend(innocent.map(|(_, address)| address.parse::<IpAddr>().unwrap()));
    assert_eq!(policy.blocked(), addresses(&["10.0.0.9", "2001:db8::9"]));
}

#[test]
fn only_the_host_itself_reaches_the_runtime_environment_agent() {
    let policy = policy(v1::Role::Worker, Verdict::Drop);
    let port = 6_703;
    assert!(policy.guarded_ports().iter().any(|range| range.contains(&port)));
    for caller in Caller::ALL {
        assert!(!policy.ports_of(caller).iter().any(|range| range.contains(&port)), "{caller:?}");
    }
}

#[test]
fn each_port_of_the_plan_is_guarded_where_it_listens() {
    for (role, plan) in [(v1::Role::Head, 13), (v1::Role::Worker, 8), (v1::Role::Driver, 0)] {
        assert_eq!(policy(role, Verdict::Drop).guarded_ports().len(), plan, "{role:?}");
    }
    let mut off = policy(v1::Role::Head, Verdict::Drop);
    off.settings.ray_client = false;
    let client = Port::RayClient.range(&ports::default_plan()).unwrap();
    assert!(off.guarded_ports().contains(&client), "started by hand, it is closed");
}

#[test]
fn clearing_names_one_cluster_alone() {
    let text = clear(&"c1".parse().unwrap());
    assert_eq!(text, "table inet raymtls_c1\ndelete table inet raymtls_c1\n");
}
