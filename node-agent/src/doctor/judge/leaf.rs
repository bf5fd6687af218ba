//! The leaf that Ray starts with next: key, chain, use, time, and the address that Ray advertises. Pure.

use std::{collections::BTreeSet, net::IpAddr};

use raymtls_proto::span::Span;

use super::super::{
    Finding, Level,
    facts::{Facts, Key},
    own::Public,
};
use crate::{moment::Moment, served::kind::Kind, statedir::issued_at, verify};

/// A leaf is renewed at a third of its life: with less than half of it left, renewals have failed.
const LATE_PART_LEFT: i32 = 2;

pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let leaf = match &facts.leaf {
        Ok(leaf) => leaf,
        Err(why) => return vec![missing(facts, why)],
    };
    vec![key(facts), chain(facts, leaf), usage(leaf), validity(facts, leaf), address(facts, leaf)]
}

fn missing(facts: &Facts, why: &str) -> Finding {
    // Key folders are closed to whoever is not of Ray's group.
    if facts.euid != 0 && facts.tls.is_ok() {
        return Finding::unknown(
            "leaf",
            format!("it cannot be read: {why}"),
            "run it as root, or as the user that runs Ray",
        );
    }
    Finding::new(
        "leaf",
        Level::Fail,
        why,
        "`node-agent enroll`; where the TLS folder lies elsewhere: --tls-dir",
    )
}

fn key(facts: &Facts) -> Finding {
    match &facts.key {
        Key::IsTheLeafs => Finding::ok("key", "it is the leaf's"),
        Key::IsAnother => Finding::new(
            "key",
            Level::Fail,
            "key and leaf do not belong together: somebody changed a key folder",
            "start Ray through `node-agent exec`, which gets a new key folder; find out who writes there",
        ),
        Key::Unread(why) => Finding::unknown(
            "key",
            why.as_str(),
            if facts.euid == 0 {
                "see whether the folder is whole: `node-agent status`"
            } else {
                "run it as root, or as the user that runs Ray"
            },
        ),
    }
}

fn chain(facts: &Facts, leaf: &Public) -> Finding {
    // Whether it is over is told apart.
    let last = leaf.facts.not_after - time::Duration::SECOND;
    let at = facts.now.min(last).max(leaf.facts.not_before);
    if let Err(why) = verify::chains(&leaf.chain, &leaf.roots, None, at)
        && leaf.facts.client_auth
    {
        return Finding::new(
            "chain",
            Level::Fail,
            format!("the leaf does not chain to ca.crt: {why}"),
            "`node-agent renew`; find out who writes into the TLS folder",
        );
    }
    Finding::ok("chain", "the leaf chains to ca.crt")
}

fn usage(leaf: &Public) -> Finding {
    let lacks = match (leaf.facts.server_auth, leaf.facts.client_auth) {
        (true, true) => return Finding::ok("usage", "serverAuth and clientAuth"),
        (true, false) => "clientAuth: `ray start` hangs",
        (false, true) => "serverAuth: Ray starts, and no task runs on this host",
        (false, false) => "serverAuth and clientAuth",
    };
    Finding::new(
        "usage",
        Level::Fail,
        format!("the leaf lacks {lacks}"),
        "it is none of this CA's: `node-agent renew`, or enrol again",
    )
}

fn validity(facts: &Facts, leaf: &Public) -> Finding {
    let (now, to) = (facts.now, leaf.facts.not_after);
    let ends = Moment::from(to);
    if now >= to {
        return Finding::new(
            "validity",
            Level::Fail,
            format!("the leaf ended {ends} ({}): what starts now cannot join", ends.relative(now)),
            "`node-agent status`: is the CA away, was this node revoked?",
        );
    }
    if now < leaf.facts.not_before {
        let from = Moment::from(leaf.facts.not_before);
        return Finding::new(
            "validity",
            Level::Fail,
            format!("the leaf holds {} only", from.relative(now)),
            "this host's clock is behind: `timedatectl status`",
        );
    }
    let life = to - issued_at(&leaf.facts);
    if to - now < life / LATE_PART_LEFT {
        return Finding::new(
            "validity",
            Level::Warn,
            format!(
                "the leaf ends {} and should have been renewed: it lives {}",
                ends.relative(now),
                Span::seconds(life.whole_seconds())
            ),
            "`node-agent renew` says why not; an ephemeral cluster's leaf is not renewed at all",
        );
    }
    Finding::ok("validity", format!("the leaf ends {ends} ({})", ends.relative(now)))
}

/// Peers dial what Ray says of itself, and check it against the leaf.
fn address(facts: &Facts, leaf: &Public) -> Finding {
    let has = |address: &IpAddr| leaf.facts.addresses.contains(address);
    let told: BTreeSet<IpAddr> = facts
        .processes
        .iter()
        .filter(|process| matches!(process.kind, Kind::Raylet | Kind::GcsServer))
        .filter_map(|process| process.advertises)
        .collect();
    let certified = leaf.facts.addresses.iter().filter(|address| !address.is_loopback());
    let certified: Vec<String> = certified.map(ToString::to_string).collect();
    let certified = certified.join(", ");
    if let Some(missing) = told.iter().find(|address| !has(address)) {
        return Finding::new(
            "address",
            Level::Fail,
            format!(
                "Ray here advertises {missing}, and the leaf is for {certified}: `ray start` says ok, and no task \
                 ever runs on this host"
            ),
            "start Ray with the flags of `node-agent ray-flags`, or enrol again with --address",
        );
    }
    if !told.is_empty() {
        let told: Vec<String> = told.iter().map(ToString::to_string).collect();
        return Finding::ok(
            "address",
            format!("Ray advertises {}, which the leaf has", told.join(", ")),
        );
    }
    if facts.host_addresses.iter().any(|address| !address.is_loopback() && has(address)) {
        return Finding::ok("address", format!("the leaf is for {certified}; Ray does not run"));
    }
    Finding::new(
        "address",
        Level::Warn,
        format!("the leaf is for {certified}, and this host has none of these addresses"),
        "right only where addresses are translated on the way; else enrol again with --address",
    )
}
