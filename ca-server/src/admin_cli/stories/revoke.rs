//! Revoking, as an operator sees it: what is asked before, a line for each peer, what it ends with, and
//! the exit code.

use std::{process::ExitCode, sync::atomic::Ordering};

use raymtls_proto::v1;

use super::Stage;

fn applied(node: &str, milliseconds: u32, in_force: v1::Isolation) -> v1::Applied {
    v1::Applied {
        node: node.to_owned(),
        applied: true,
        milliseconds,
        isolation: Some(v1::IsolationReport {
            in_force: in_force.into(),
            sockets_closed: 3,
            ..Default::default()
        }),
        expected: true,
    }
}

fn not_yet(node: &str, expected: bool) -> v1::Applied {
    v1::Applied { node: node.to_owned(), expected, ..Default::default() }
}

fn stage(applied: &[v1::Applied]) -> Stage {
    let stage = Stage::open();
    *stage.ca.applied.lock().unwrap() = applied.to_vec();
    stage
}

const REVOKE: &str = "node revoke --cluster c1 n1 --reason drill --yes";

#[tokio::test]
async fn each_peer_is_a_line_and_the_slowest_ends_it() {
    let stage = stage(&[
        not_yet("w1", true),
        applied("w2", 12, v1::Isolation::Enforce),
        applied("w1", 231, v1::Isolation::Enforce),
    ]);
    let ended = stage.run(REVOKE).await;
    assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
    for part in [
        "node n1 of cluster c1 is revoked\n",
        "address to cut off: 10.0.0.7\n",
        "address left alone: 10.0.0.8: also live node w2's\n",
        "  w2: 12 ms, isolation enforce, 3 sockets closed at its last cut\n  w1: 231 ms, isolation enf",
        "applied by 2 of 2 peers, the slowest (w1) after 231 ms\n",
    ] {
        assert!(ended.out.contains(part), "{part} in {}", ended.out);
    }
    assert!(!ended.out.contains("leaf works until"), "{}", ended.out);
}

#[tokio::test]
async fn a_peer_that_stays_silent_is_named_and_the_exit_code_is_1() {
    let stage = stage(&[
        not_yet("w1", true),
        not_yet("w3", false),
        applied("w2", 12, v1::Isolation::Enforce),
    ]);
    let ended = stage.run(REVOKE).await;
    assert_eq!(ended.code, ExitCode::from(1), "{ended:?}");
    assert!(ended.out.contains("applied by 1 of 2 peers"), "{}", ended.out);
    assert!(ended.out.contains("missing after 10 s: w1\n"), "{}", ended.out);
    let works = "leaf works until 2025-11-25 16:00:00Z (in 1d) at 2 of 3 peers: no acknowledgement \
                 (w1), silent for long (w3)";
    assert!(ended.out.contains(works), "{}", ended.out);
    let said = "the revocation stands, but 1 of its peers did not acknowledge it within 10 s: w1";
    assert!(ended.err.contains(said), "{}", ended.err);
    assert_eq!(stage.ca.changes(), ["revoke node: drill"]);
}

#[tokio::test]
async fn where_nothing_is_enforced_the_leaf_works_on_and_that_is_said() {
    let stage = stage(&[
        applied("w1", 5, v1::Isolation::Off),
        applied("w2", 6, v1::Isolation::Audit),
        applied("w3", 7, v1::Isolation::Enforce),
    ]);
    let ended = stage.run(REVOKE).await;
    assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
    let works = "at 2 of 3 peers: isolation off (w1), isolation audit (w2)";
    assert!(ended.out.contains(works), "{}", ended.out);
}

#[tokio::test]
async fn a_peer_that_leaves_blocks_out_has_not_cut_the_node_off() {
    let mut spares = applied("w1", 5, v1::Isolation::Enforce);
    spares.isolation.as_mut().unwrap().spared_blocks = 1;
    let stage = stage(&[spares, applied("w2", 6, v1::Isolation::Enforce)]);
    let ended = stage.run(REVOKE).await;
    assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
    assert!(ended.out.contains("last cut, 1 blocks left out by its own list\n"), "{}", ended.out);
    let works = "at 1 of 2 peers: left out by its own list (w1)";
    assert!(ended.out.contains(works), "{}", ended.out);
}

#[tokio::test]
async fn what_was_revoked_is_shown_also_where_the_watch_fails() {
    let token = "token revoke --cluster c1 0123456789abcdef --with-nodes --reason drill --yes";
    for (applied, said) in [
        (vec![], "RATE_LIMITED"),
        (vec![applied("w2", 12, v1::Isolation::Enforce)], "the server stops"),
    ] {
        let stage = stage(&applied);
        stage.ca.breaks_off.store(true, Ordering::SeqCst);
        for line in [REVOKE, token] {
            let ended = stage.run(&format!("-o json {line}")).await;
            assert_eq!(ended.code, ExitCode::from(1), "{ended:?}");
            assert!(ended.err.contains("the revocation stands, but its peers"), "{ended:?}");
            let json: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
            let problem = json["watch_problem"].as_str().unwrap();
            assert!(problem.contains(said), "{problem}");
            assert_eq!(json["peers"].as_array().unwrap().len(), applied.len(), "{json}");
            let shown =
                if line == REVOKE { &json["blocked_addresses"][0] } else { &json["nodes"][0] };
            assert!(shown == "10.0.0.7" || shown == "n1", "{json}");
        }
        let ended = stage.run(REVOKE).await;
        assert!(ended.out.contains("its peers could not be watched to the end"), "{ended:?}");
    }
}

#[tokio::test]
async fn nobody_is_waited_for_when_that_is_not_wanted() {
    let stage = stage(&[not_yet("w1", true)]);
    let ended = stage.run(&format!("{REVOKE} --wait 0")).await;
    assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
    assert!(ended.out.contains("its peers were not waited for"), "{}", ended.out);
}

#[tokio::test]
async fn json_is_one_object_that_holds_all_of_it() {
    let stage = stage(&[not_yet("w1", true), applied("w2", 12, v1::Isolation::Off)]);
    let ended = stage.run(&format!("-o json {REVOKE} --drain")).await;
    assert_eq!(ended.code, ExitCode::from(1), "{ended:?}");
    let json: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
    assert_eq!(json["node"]["name"], "n1");
    assert_eq!(json["blocked_addresses"][0], "10.0.0.7");
    assert_eq!(json["missing"][0], "w1");
    assert_eq!(json["slowest_milliseconds"], 12);
    assert_eq!(json["peers"][1]["in_force"], "off");
    assert_eq!(json["not_cut"][0]["why"], "isolation off");
    assert_eq!(json["drain"]["done"], false);
    let run = json["drain"]["run_on_head"][1].as_str().unwrap();
    assert!(run.contains("ray drain-node --node-id ID"), "{run}");
}

#[tokio::test]
async fn a_head_wants_its_name_typed_again() {
    let stage = stage(&[]);
    let line = "node revoke --cluster c1 h1 --reason drill --yes";
    for (more, said) in [
        ("", "--confirm-head h1"),
        (" --confirm-head h2", "--confirm-head h2 names no head"),
        (" --confirm-head h1 --confirm-head n1", "--confirm-head n1 names no head"),
    ] {
        let ended = stage.run(&format!("{line}{more}")).await;
        assert_eq!(ended.code, ExitCode::from(64), "{more}: {ended:?}");
        assert!(ended.err.contains(said) && ended.out.is_empty(), "{more}: {ended:?}");
    }
    let ended = stage.run("node revoke --cluster c1 n1 --reason x --yes --confirm-head n1").await;
    assert_eq!(ended.code, ExitCode::from(64), "no head: {ended:?}");
    assert!(stage.ca.changes().is_empty(), "{:?}", stage.ca.changes());
    let ended = stage.run(&format!("{line} --confirm-head h1")).await;
    assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
    assert!(ended.err.contains("it is a head: without it cluster c1 does not work"), "{ended:?}");
    assert_eq!(stage.ca.changes(), ["revoke node: drill"]);
}

#[tokio::test]
async fn a_token_s_nodes_are_listed_first_and_its_heads_confirmed_by_name() {
    let stage = stage(&[applied("w9", 8, v1::Isolation::Enforce)]);
    let line = "token revoke --cluster heads 0123456789abcdef --with-nodes --reason leaked --yes";
    let ended = stage.run(line).await;
    assert_eq!(ended.code, ExitCode::from(64), "{ended:?}");
    for part in ["2 that enrolled with it will be revoked", "worker n1 of", "head h2 of"] {
        assert!(ended.err.contains(part), "{part} in {}", ended.err);
    }
    assert!(!ended.err.contains("n3") && ended.err.contains("--confirm-head h2"), "{ended:?}");
    assert!(stage.ca.changes().is_empty());
    let ended = stage.run(&format!("{line} --confirm-head h2")).await;
    assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
    assert!(ended.out.contains("revoked with it: n1\n  revoked with it: h2"), "{}", ended.out);
    assert!(ended.out.contains("applied by 1 of 1 peers"), "{}", ended.out);
    assert_eq!(stage.ca.changes(), ["revoke token with nodes"]);
}

#[tokio::test]
async fn where_not_all_of_a_token_s_nodes_were_revoked_that_is_the_end_of_it() {
    let stage = stage(&[applied("w9", 8, v1::Isolation::Enforce)]);
    *stage.ca.stopped_by.lock().unwrap() = "the disk is full".to_owned();
    let line = "token revoke --cluster c1 0123456789abcdef --with-nodes --reason leaked --yes";
    let ended = stage.run(line).await;
    assert_eq!(ended.code, ExitCode::from(1), "{ended:?}");
    assert!(ended.out.contains("revoked with it: n1\n  revoked with it: h2"), "{}", ended.out);
    let said =
        "2 of its nodes are revoked, but not all: the disk is full; the same command goes on";
    assert!(ended.err.contains(said), "{}", ended.err);
}

#[tokio::test]
async fn a_key_is_revoked_and_a_node_taken_back() {
    let stage = stage(&[]);
    let serial = "019ab697e80007070707070707070707";
    let line = format!("cert revoke --cluster c1 {serial} --reason drill --yes");
    let ended = stage.run(&line).await;
    assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
    assert!(ended.err.contains("no address is blocked"), "{ended:?}");
    assert!(ended.out.contains(&format!("on the CRL: {serial}")), "{ended:?}");
    let ended = stage.run("node reinstate --cluster c1 r1 --yes").await;
    assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
    assert!(ended.out.contains("node r1 of cluster c1 is taken back"), "{ended:?}");
    assert_eq!(stage.ca.changes(), ["revoke certificate", "reinstate node"]);
}
