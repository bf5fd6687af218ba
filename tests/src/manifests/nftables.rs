//! `scripts/isolation/nftables.sh` and node-agent put the same table in force: the script's text is
//! the agent's.

use std::{
    fs,
    net::IpAddr,
    path::Path,
    process::{Command, Output},
};

use node_agent::isolation::{Counters, Policy, Protected, Verdict, render};
use raymtls_proto::{ports, v1};

use super::second_plan;

// Each list sorted, without neighbours: the agent merges ranges, the script writes them as they are.
const MEMBERS: [&str; 4] = ["10.0.0.1", "10.0.0.4", "2001:db8::1", "2001:db8::4"];
const ADMINS: [&str; 3] = ["192.0.2.0/28", "198.51.100.7", "2001:db8:a::/64"];
const SCRAPERS: [&str; 1] = ["192.0.2.64"];
const DRIVERS: [&str; 2] = ["203.0.113.0/24", "2001:db8:d::5"];
const BLOCKED: [&str; 2] = ["10.0.0.9", "2001:db8::9"];
const CUT: [&str; 2] = ["10.0.0.8", "2001:db8::8"];
/// Named as blocked, and innocent: a member in another spelling, an admin, the CA, loopback.
const INNOCENT: [&str; 5] = ["10.0.0.4", "2001:DB8:0::4", "192.0.2.3", "10.0.0.250", "127.0.0.1"];

fn policy(role: v1::Role, plan: v1::PortPlan, verdict: Verdict) -> Policy {
    let addresses = |texts: &[&str]| -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    };
    // As the CA stores ranges: with their length.
    let ranges = |texts: &[&str]| -> Vec<String> {
        let length = |text: &str| if text.contains(':') { 128 } else { 32 };
        texts
            .iter()
            .map(|text| match text.contains('/') {
                true => (*text).to_owned(),
                false => format!("{text}/{}", length(text)),
            })
            .collect()
    };
    Policy {
        capture: None,
        cluster: "team-a".parse().unwrap(),
        role,
        settings: v1::Settings {
            port_plan: Some(plan),
            admin_ranges: ranges(&ADMINS),
            scraper_ranges: ranges(&SCRAPERS),
            driver_ranges: ranges(&DRIVERS),
            ..v1::Settings::default()
        },
        members: addresses(&MEMBERS).into_iter().collect(),
        drivers: addresses(&[]).into_iter().collect(),
        blocked: addresses(&[&BLOCKED[..], &INNOCENT[..]].concat()).into_iter().collect(),
        blocked_entirely: addresses(&[&CUT[..], &INNOCENT[..]].concat()).into_iter().collect(),
        protected: Protected {
            ca: addresses(&["10.0.0.250"]).into_iter().collect(),
            endpoints: ["10.0.0.250:7443", "10.0.0.250:7444"].map(|e| e.parse().unwrap()).into(),
            ..Protected::default()
        },
        never_guarded: [].into(),
        verdict,
    }
}

fn script(arguments: &[&str]) -> Output {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    Command::new(root.join("scripts/isolation/nftables.sh"))
        .args(arguments)
        .env_remove("SSH_CONNECTION")
        .output()
        .unwrap()
}

fn apply<'a>(role: &'a str, members: &'a str, more: &[&'a str]) -> Output {
    let fixed = ["apply", "--dry-run", "--cluster", "team-a", "--role", role, "--members", members];
    script(&[&fixed[..], more].concat())
}

#[test]
fn the_script_writes_the_table_that_node_agent_writes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let roles = [("head", v1::Role::Head), ("worker", v1::Role::Worker)];
    let plans = [("default", ports::default_plan()), ("second", second_plan())];
    for (word, role) in roles {
        for (file, plan) in plans {
            for verdict in [Verdict::Drop, Verdict::Count] {
                let file = root.join(format!("scripts/isolation/ports/{file}.tsv"));
                let (admins, scrapers, drivers) =
                    (ADMINS.join(","), SCRAPERS.join(","), DRIVERS.join(","));
                let blocked = [&BLOCKED[..], &INNOCENT[..]].concat().join(",");
                let cut = [&CUT[..], &INNOCENT[..]].concat().join(",");
                let mut more = vec!["--admin-ranges", &admins, "--scraper-ranges", &scrapers];
                more.extend(["--driver-ranges", &drivers, "--blocked", &blocked]);
                more.extend(["--blocked-all-traffic", &cut]);
                more.extend(["--ca", "10.0.0.250", "--ports", file.to_str().unwrap()]);
                if verdict == Verdict::Count {
                    more.push("--audit");
                }
                let output = apply(word, &MEMBERS.join(","), &more);
                let errors = String::from_utf8(output.stderr).unwrap();
                // The innocent among the blocked were asked for and are left out.
                assert_eq!(output.status.code(), Some(1), "{errors}");
                for innocent in INNOCENT {
                    assert!(errors.contains(&format!("not blocked: {innocent} is ")), "{errors}");
                }
                let text = String::from_utf8(output.stdout).unwrap();
                let wanted = render(&policy(role, plan, verdict), Counters::default());
                assert_eq!(text, wanted, "{word} {file:?}");
            }
        }
    }
}

#[test]
fn a_list_may_be_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("members");
    #[allow(clippy::disallowed_methods, reason = "a file of this test alone")]
    fs::write(&file, "# the head\n10.0.0.1\n\n 10.0.0.4 # a worker\n").unwrap();
    let from_file = apply("worker", file.to_str().unwrap(), &[]);
    assert!(from_file.status.success());
    assert_eq!(from_file.stdout, apply("worker", "10.0.0.1,10.0.0.4", &[]).stdout);
}

#[test]
fn what_would_lock_out_or_means_something_else_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let plan = |name: &str, text: &str| {
        let path = folder.path().join(name);
        #[allow(clippy::disallowed_methods, reason = "a file of this test alone")]
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let ssh = plan("ssh", "worker\tnode\tmember\t20\t30\n");
    let ca = plan("ca", "worker\tnode\tmember\t7000\t8000\n");
    let nfs = plan("nfs", "worker\tnode\tmember\t2049\t2049\n");
    let kubelet = plan("kubelet", "worker\tnode\tmember\t10256\t10258\n");
    let torn = plan("torn", "worker\tnode\teverybody\t20\t30\n");
    for (members, more, words) in [
        ("", &[][..], "--members is empty"),
        ("10.0.0.0/8", &[], "10.0.0.0/8 is a range"),
        ("10.0.0.1; drop", &[], "is no address"),
        ("/no/such/file", &[], "/no/such/file: no such file"),
        ("10.0.0.1", &["--admin-ranges", "0.0.0.0/0"], "0.0.0.0/0 is everybody"),
        ("10.0.0.1", &["--ports", &ssh], "covers 22, SSH"),
        ("10.0.0.1", &["--ports", &ca], "covers 7443, the CA"),
        ("10.0.0.1", &["--ports", &nfs], "covers 2049, NFS"),
        ("10.0.0.1", &["--ports", &kubelet], "covers 10256, Kubernetes"),
        ("10.0.0.1", &["--ports", &torn], "the line of worker is none of"),
        ("10.0.0.1", &["--cluster", "a b"], "cluster name a b"),
        ("10.0.0.1", &["--role", "driver"], "--role is head or worker, not 'driver'"),
        ("10.0.0.1", &["--blocked", "::ffff:10.0.0.4"], "'::ffff:10.0.0.4' is no address"),
        ("10.0.0.999", &[], "'10.0.0.999' is no address"),
        ("10.0.0.01", &[], "'10.0.0.01' is no address"),
        ("beef.dead", &[], "'beef.dead' is no address"),
        ("1::2::3", &[], "'1::2::3' is no address"),
        ("1:2:3", &[], "'1:2:3' is no address"),
        ("10.0.0.1", &["--admin-ranges", "10.0.0.0/33"], "'10.0.0.0/33' is no address"),
        ("10.0.0.1", &["--blocked"], "--blocked needs a value"),
        ("10.0.0.1", &["--frobnicate", "1"], "unknown option --frobnicate"),
    ] {
        let output = apply("worker", members, more);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(64) && errors.contains(words), "{words}: {errors}");
        assert!(output.stdout.is_empty(), "{words}");
    }
}
