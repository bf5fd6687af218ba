//! A CA that has turned against its nodes and answers with paths where names, addresses and
//! certificates belong. The agent makes no path of anything it was sent: what it writes lies in its two
//! folders under the names it always has, and the error says what was wrong.

use std::collections::BTreeMap;

use raymtls_proto::durable;

use super::*;

/// Two folders down, so that `../../x` still falls into what is looked at.
fn deep() -> Place {
    let mut place = Place::new(system_clock());
    place.inner = PathBuf::from("a/b");
    durable::make_parents(&place.path("")).unwrap();
    place
}

/// Everything below a folder: each path, and what a file holds.
fn everything(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let kind = std::fs::symlink_metadata(&path).unwrap().file_type();
        if kind.is_dir() {
            found.extend(everything(&path));
        }
        let content = if kind.is_file() { std::fs::read(&path).unwrap() } else { Vec::new() };
        found.insert(path, content);
    }
    found
}

/// Names alone, from the place's own folder on.
fn names(place: &Place) -> Vec<PathBuf> {
    let root = place.folder.path();
    let all = everything(root).into_keys();
    all.map(|path| path.strip_prefix(root).unwrap().to_owned()).collect()
}

const PEM_OF_A_PATH: &[u8] =
    b"-----BEGIN CERTIFICATE-----\n../../../../etc/cron.d/x\n-----END CERTIFICATE-----\n";

#[tokio::test]
async fn an_enrolment_answered_with_paths_writes_nothing_and_can_be_run_again() {
    let ca = TestCa::start(Face::Ca).await;
    let place = deep();
    ca.write_join(&place.path("join"));
    // What every attempt leaves: the folders, the lock and the key that waits for its answer.
    ca.with(|k| k.bend_enrolment = Some(|a| a.node_name = String::new()));
    enroll::enroll(&place.options(), place.clock.clone()).await.unwrap_err();
    let before = everything(place.folder.path());
    type Bend = fn(&mut v1::EnrollResponse);
    let table: [(&str, Bend, &str); 16] = [
        ("up", |a| a.node_name = "../../x".into(), "name"),
        ("absolute", |a| a.node_name = "/etc/cron.d/x".into(), "name"),
        ("below", |a| a.node_name = "k1/tls".into(), "name"),
        ("dots", |a| a.node_name = "..".into(), "name"),
        ("a dot", |a| a.node_name = ".".into(), "name"),
        ("a NUL", |a| a.node_name = "n1\0/x".into(), "name"),
        ("escaped", |a| a.node_name = "%2e%2e%2fx".into(), "name"),
        ("a line", |a| a.node_name = "n1\n../x".into(), "name"),
        ("long", |a| a.node_name = "../".repeat(5_000), "name"),
        ("an address", |a| a.addresses.push("../../x".into()), "address"),
        ("a zone", |a| a.addresses.push("fe80::1%../../x".into()), "address"),
        ("a DNS name", |a| a.dns_names.push("../../x".into()), "name"),
        ("an identity of PEM", |a| set(&mut a.identity, |c| &mut c.leaf_der), "certificate"),
        ("an issuer of PEM", |a| set(&mut a.identity, |c| &mut c.issuers_der[0]), "control root"),
        // Both are names; the certificate speaks for another node.
        ("a file of ours", |a| a.node_name = "tls".into(), "names"),
        ("a folder of ours", |a| a.node_name = "k1".into(), "names"),
    ];
    for (what, bend, says) in table {
        ca.with(|k| k.bend_enrolment = Some(bend));
        let refused = enroll::enroll(&place.options(), place.clock.clone()).await;
        let error = refused.expect_err(what).to_string();
        assert!(error.contains(says), "{what}: {error}");
        assert!(!error.contains(['\n', '\0']) && error.len() < 1_000, "{what}: {error:?}");
        assert_eq!(everything(place.folder.path()), before, "{what}");
    }
    // The same key and token do once the CA answers properly.
    ca.with(|k| k.bend_enrolment = None);
    enroll::enroll(&place.options(), place.clock.clone()).await.unwrap();
}

fn set(
    chain: &mut Option<v1::CertificateChain>,
    part: fn(&mut v1::CertificateChain) -> &mut Vec<u8>,
) {
    *part(chain.as_mut().unwrap()) = PEM_OF_A_PATH.to_vec();
}

#[tokio::test]
async fn leaves_and_news_with_paths_in_them_reach_no_file_but_the_agent_s_own() {
    let ca = TestCa::start(Face::Ca).await;
    let place = deep();
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    agent.until("served", |s| s.ca.reachable == Some(true)).await;
    let own = names(&place);
    let leaf = || std::fs::read(place.path("tls/k1/tls.crt")).unwrap();

    type Bend = fn(&mut v1::IssueLeafResponse);
    let table: [(&str, Bend); 5] = [
        ("a leaf of PEM", |a| set(&mut a.leaf, |c| &mut c.leaf_der)),
        ("an issuer of PEM", |a| set(&mut a.leaf, |c| &mut c.issuers_der[0])),
        ("a root of PEM", |a| {
            a.bundle.as_mut().unwrap().roots_der.push(PEM_OF_A_PATH.to_vec());
        }),
        ("a CRL of PEM", |a| a.bundle.as_mut().unwrap().crls_der.push(PEM_OF_A_PATH.to_vec())),
        ("a path for a root", |a| a.bundle.as_mut().unwrap().roots_der = vec![b"../../x".into()]),
    ];
    for (what, bend) in table {
        let before = leaf();
        ca.with(|k| k.bend_leaf = Some(bend));
        let answer = agent.handle.ask(Ask::Renew).await;
        let said = format!("{answer:?}");
        assert!(said.contains("CA") || said.contains("certificate"), "{what}: {said}");
        assert!(!said.contains("etc/cron.d"), "{what}: {said}");
        assert_eq!((leaf(), names(&place)), (before, own.clone()), "{what}");
    }
    ca.with(|k| k.bend_leaf = None);

    // A number that spells a path is a number: it names no file.
    ca.with(|k| k.raw_serial = Some(*b"../../../../../x"));
    let _ = agent.handle.ask(Ask::Renew).await;
    ca.with(|k| k.raw_serial = None);
    assert_eq!(names(&place), own);

    type Turn = fn(&mut v1::SyncResponse);
    let table: [(&str, Turn); 4] = [
        ("Ray's token with a line", |a| {
            a.ray_token = Some(v1::RayToken { token: b"x\n../../x".into() });
        }),
        ("a CRL of the control root", |a| {
            a.control_crl = Some(v1::ControlCrl { crls_der: vec![PEM_OF_A_PATH.to_vec()] });
        }),
        ("roots", |a| a.bundle.as_mut().unwrap().roots_der = vec![PEM_OF_A_PATH.to_vec()]),
        ("no roots", |a| a.bundle = Some(v1::TrustBundle::default())),
    ];
    for (what, turn) in table {
        let before = everything(&place.path("tls"));
        ca.with(|k| {
            k.bend_sync = Some(turn);
            k.version += 1;
        });
        let status = agent.until(what, |s| !s.problems.is_empty()).await;
        assert!(!status.problems.join(" ").contains("etc/cron.d"), "{:?}", status.problems);
        assert_eq!(everything(&place.path("tls")), before, "{what}");
        assert_eq!(names(&place), own, "{what}");
        ca.with(|k| k.bend_sync = None);
        agent.until("no complaint", |s| s.problems.is_empty()).await;
    }

    // The reason of an order is text for the log.
    let reason = "../../x\n/etc/x".to_owned();
    let act = Some(v1::directive::Act::NewKeyFolder(v1::NewKeyFolder { reason }));
    ca.with(|k| {
        k.directives = vec![v1::Directive { act }];
        k.version += 1;
    });
    agent.until("another key folder", |s| s.key_folders.iter().any(|f| f.name == "k2")).await;
    let k2 = |path: &PathBuf| path.starts_with("a/b/tls/k2");
    assert_eq!(names(&place).into_iter().filter(|p| !k2(p)).collect::<Vec<_>>(), own);
    agent.stop().await;
}
