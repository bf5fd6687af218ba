//! The rendered tables as files to read, and what must hold of any policy. That nft takes them and
//! the kernel does what they say is shown on real hosts elsewhere.

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf};

use proptest::prelude::*;
use raymtls_proto::{
    identity::Role,
    ports::{self, Caller, Port},
    v1,
};

use super::*;
use crate::statedir::Memory;

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
            endpoints: ["10.0.0.250:7444", "[2001:db8::fa]:7444"]
                .map(|e| e.parse().unwrap())
                .into(),
            gateways: addresses(&["10.0.0.254"]),
            own: addresses(&["10.0.0.1"]),
        },
        never_guarded: BTreeSet::from([7_447]),
        verdict,
        capture: None,
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
    let counted = Counters { blocked: 7, refused: 12, ..Counters::default() };
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
        protected: Protected::default(),
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

/// A legal plan, a mistake or a lie of the CA: who closes SSH or the agent's own ports is not undone.
#[test]
fn no_plan_closes_ssh_or_the_agent_s_own_ports() {
    let mut policy = policy(v1::Role::Worker, Verdict::Drop);
    assert!(policy.left_open().is_empty());
    let plan = policy.settings.port_plan.as_mut().unwrap();
    (plan.collective_min, plan.collective_max) = (20, 10_000);
    assert_eq!(policy.left_open(), [22, 7_447]);
    for ranges in [policy.guarded_ports(), policy.cluster_ports(), policy.ports_of(Caller::Member)]
    {
        let holds = |port: u16| ranges.iter().any(|range| range.contains(&port));
        assert!(!holds(22) && !holds(7_447), "{ranges:?}");
        assert!([20, 21, 23, 7_446, 7_448, 10_000].iter().all(|port| holds(*port)), "{ranges:?}");
    }
    let plan = policy.settings.port_plan.as_mut().unwrap();
    (plan.collective_min, plan.collective_max) = (22, 22);
    assert!(!policy.guarded_ports().iter().any(|range| range.contains(&22)));
}

/// A set of ranges is shown to packets later than the rules that look at it, named or not.
#[test]
fn no_rule_looks_at_a_set_of_ranges() {
    for verdict in [Verdict::Drop, Verdict::Count] {
        let text = render(&policy(v1::Role::Head, verdict), Counters::default());
        assert!(!text.contains("interval") && !text.contains("auto-merge"), "{text}");
        for anonymous in text.match_indices('{').map(|(at, _)| &text[at..]) {
            let set = anonymous[1..].split('}').next().unwrap();
            let is_set = set.contains(", ") && !set.contains('\n');
            assert!(!is_set || !set.contains(['-', '/']), "{set}");
        }
    }
}

#[test]
fn rules_are_counted_and_a_mark_is_no_rule() {
    let policy = policy(v1::Role::Worker, Verdict::Drop);
    let (plain, mark) = (render(&policy, Counters::default()), Mark(0xab));
    let marked = render_marked(&policy, Counters::default(), mark);
    assert!(marked.contains("\tcounter load_00000000000000ab {"), "{marked}");
    // Either end of the cluster's 13 ports; this host's 8; of those 6 for members, 1 for scrapers, by
    // the two sets of members and the one range of scrapers.
    let (raw, arriving, published, turned) = (6 + 6 + 2 * 13, 5, 2, 3);
    let rules = raw + arriving + published + turned + 8 + (2 + 1 + 2) + 6 + 1;
    assert_eq!((rules_in(&plain), rules_in(&marked)), (rules, rules));
}

#[test]
fn clearing_names_one_cluster_alone() {
    let text = clear(&"c1".parse().unwrap());
    assert_eq!(text, "table inet raymtls_c1\ndelete table inet raymtls_c1\n");
}

/// Each way in which a block could hit the innocent, from what the CA says to the set that drops.
#[test]
fn a_block_that_would_hit_the_innocent_is_left_out() {
    let member = |name: &str, role: v1::Role, addresses: &[&str]| v1::Member {
        name: name.to_owned(),
        role: role.into(),
        state: v1::MemberState::Member.into(),
        addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
    };
    let members = vec![
        member("head", v1::Role::Head, &["10.0.0.1", "2001:db8::1"]),
        member("n2", v1::Role::Worker, &["::ffff:10.0.0.2", "198.51.100.7"]),
        member("d1", v1::Role::Driver, &["203.0.113.9"]),
    ];
    for (name, address, is_blocked) in [
        ("a stranger", "10.0.0.9", true),
        ("a stranger over IPv6", "2001:db8::9", true),
        ("a stranger in IPv6 clothes", "::ffff:10.0.0.9", true),
        ("the head's address, certified by a bad node", "10.0.0.1", false),
        ("the head's address over IPv6", "2001:db8::1", false),
        ("the head's address in IPv6 clothes", "::ffff:10.0.0.1", false),
        ("an address that a new node has now", "10.0.0.2", false),
        ("a NAT address that a member shares", "198.51.100.7", false),
        ("an enrolled driver", "203.0.113.9", false),
        ("this host", "10.0.0.40", false),
        ("this host in IPv6 clothes", "::ffff:10.0.0.40", false),
        ("the gateway", "10.0.0.254", false),
        ("the gateway over IPv6", "2001:db8::fe", false),
        ("the CA", "10.0.0.250", false),
        ("the CA, found by its mapped address", "10.0.0.251", false),
        ("an operator", "192.0.2.3", false),
        ("an operator in IPv6 clothes", "::ffff:192.0.2.3", false),
        ("loopback", "127.0.0.7", false),
        ("loopback over IPv6", "::1", false),
        ("loopback in IPv6 clothes", "::ffff:127.0.0.1", false),
        ("no address", "0.0.0.0", false),
        ("a group", "224.0.0.1", false),
    ] {
        for all_traffic in [false, true] {
            let block = v1::Block {
                address: address.to_owned(),
                node: "bad".to_owned(),
                until_unix: 0,
                all_traffic,
            };
            let mut memory = Memory::default();
            memory.merge(&v1::SyncResponse {
                members: Some(v1::Members {
                    snapshot: true,
                    members: members.clone(),
                    more: false,
                }),
                blocks: Some(v1::Blocks { blocks: vec![block] }),
                ..v1::SyncResponse::default()
            });
            let settings = policy(v1::Role::Worker, Verdict::Drop).settings;
            let cluster = "c1".parse().unwrap();
            let mut policy = Policy::of(&cluster, Role::Worker, settings, Verdict::Drop);
            policy.people(&memory);
            policy.protected = Protected {
                ca: addresses(&["10.0.0.250", "::ffff:10.0.0.251"]),
                gateways: addresses(&["10.0.0.254", "2001:db8::fe"]),
                own: addresses(&["10.0.0.40"]),
                endpoints: BTreeSet::new(),
            };
            let (some, all) = (policy.blocked(), policy.blocked_entirely());
            let (hit, other) = if all_traffic { (all, some) } else { (some, all) };
            assert_eq!(hit.len(), usize::from(is_blocked), "{name}, all traffic {all_traffic}");
            assert_eq!(policy.spared(), usize::from(!is_blocked), "{name}");
            assert!(other.is_empty(), "{name}");
        }
    }
}

/// The addresses of a set in a rendered table.
fn set_of(text: &str, name: &str) -> BTreeSet<IpAddr> {
    let set = text.split(&format!("\tset {name} {{\n")).nth(1).unwrap();
    let set = set.split("\t}\n").next().unwrap();
    let Some(elements) = set.split("elements = { ").nth(1) else { return BTreeSet::new() };
    elements.split(" }").next().unwrap().split(", ").map(|a| a.parse().unwrap()).collect()
}

proptest! {
    /// From few addresses, so that lists meet: in every spelling, in every list.
    #[test]
    fn no_set_that_drops_ever_holds_the_innocent(
        members in addresses_of_few(),
        drivers in addresses_of_few(),
        blocked in addresses_of_few(),
        entirely in addresses_of_few(),
        needed in addresses_of_few(),
        audit in any::<bool>(),
    ) {
        let verdict = if audit { Verdict::Count } else { Verdict::Drop };
        let third = |n: usize| needed.iter().skip(n).step_by(3).copied().collect();
        let policy = Policy {
            members,
            drivers,
            blocked,
            blocked_entirely: entirely,
            protected: Protected {
                ca: third(0),
                gateways: third(1),
                own: third(2),
                ..Protected::default()
            },
            ..policy(v1::Role::Worker, verdict)
        };
        let text = render(&policy, Counters::default());
        let dropped: BTreeSet<IpAddr> = ["blocked4", "blocked6", "cut4", "cut6"]
            .iter()
            .flat_map(|name| set_of(&text, name))
            .collect();
        let innocent = policy.members.iter().chain(&policy.drivers).chain(&needed);
        for address in innocent {
            prop_assert!(!dropped.contains(&address.to_canonical()), "{address}");
        }
        // And whoever is not innocent is there.
        let innocent: BTreeSet<IpAddr> = policy
            .members.iter().chain(&policy.drivers).chain(&needed)
            .map(IpAddr::to_canonical)
            .collect();
        for address in policy.blocked.iter().chain(&policy.blocked_entirely) {
            let address = address.to_canonical();
            prop_assert!(innocent.contains(&address) || dropped.contains(&address), "{address}");
        }
    }
}

fn addresses_of_few() -> impl Strategy<Value = BTreeSet<IpAddr>> {
    let one = (0_u8..12, 0_u8..3).prop_map(|(last, kind)| {
        let v4 = std::net::Ipv4Addr::new(10, 9, 0, last);
        match kind {
            0 => IpAddr::V4(v4),
            1 => IpAddr::V6(v4.to_ipv6_mapped()),
            _ => format!("2001:db8:9::{last:x}").parse().unwrap(),
        }
    });
    proptest::collection::btree_set(one, 0..10)
}

fn captured(verdict: Verdict) -> Policy {
    let mut policy = policy(v1::Role::Worker, verdict);
    policy.never_guarded.extend([15_001, 15_008, 15_009]);
    policy.capture = Some(Capture {
        users: BTreeSet::from([0, 1_000]),
        tunnel_uid: 991,
        captured_port: 15_001,
        inbound_port: 15_008,
        proof_port: 15_009,
    });
    policy
}

#[test]
fn a_worker_s_table_in_mode_tunnel() {
    let text = render(&captured(Verdict::Drop), Counters::default());
    assert_golden("worker-tunnel.nft", &text);
}

#[test]
fn in_mode_tunnel_members_reach_the_tunnel_and_no_port_of_ray() {
    for verdict in [Verdict::Count, Verdict::Drop] {
        let mut policy = captured(verdict);
        policy.role = v1::Role::Head;
        assert!(policy.ports_of(Caller::Member).is_empty());
        assert!(policy.ports_of(Caller::Driver).is_empty(), "a driver outside speaks to no tunnel");
        assert!(!policy.ports_of(Caller::Admin).is_empty());
        let text = render(&policy, Counters::default());
        // Whether the rest counts or drops: there is no plaintext to fall back to.
        assert!(text.contains("redirect to :15001") && text.contains("reject with tcp reset"));
        assert!(text.contains("tcp dport 15008 counter name refused drop"));
        let blocked: Vec<_> = policy.cut_ports();
        assert!(blocked.contains(&(15_008..=15_008)), "a blocked host's tunnel is cut off too");
    }
    let files = render(&policy(v1::Role::Worker, Verdict::Drop), Counters::default());
    assert!(!files.contains("redirect") && !files.contains("skuid"), "{files}");
}
