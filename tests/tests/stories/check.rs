//! A data folder that was damaged or changed behind the CA: `check` says so, and leaves it as it was.
//! And a key that is written to a file. Wants `ca-server` and openssl.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use ca_server::{
    check::{CheckError, Options, Report, check, read_through},
    init,
    keys::kek::Kek,
    store::{
        memory::MemoryEngine,
        sled::SledEngine,
        unix_ms,
        view::{Engine as _, Reader as _, Writes},
    },
};
use node_agent::keys::PrivateKey;
use raymtls_proto::{clock::Clock as _, v1};
use raymtls_tests::{Deployment, ask, node_leaf, programs::binary};

const DAY: Duration = Duration::from_secs(86_400);
/// Flipped bytes; the long version has more.
const FLIPS: usize = 200;
const FLIPS_LONG: usize = 1_000;

/// A data folder with a bit of everything, and nobody who serves from it.
struct LivedIn {
    folder: tempfile::TempDir,
    now_ms: i64,
}

impl LivedIn {
    async fn new() -> Self {
        let mut deployment = Deployment::start().await;
        live(&deployment).await;
        deployment.stop().await;
        let now_ms = unix_ms(deployment.clock.now());
        let Deployment { folder, ca, store, .. } = deployment;
        drop((ca, store));
        Self { folder, now_ms }
    }

    fn dir(&self) -> PathBuf {
        self.folder.path().join("ca")
    }

    fn options(&self, dir: &Path) -> Options {
        let kek_file = Some(self.folder.path().join("kek"));
        Options { dir: dir.to_owned(), scratch: None, kek_file, now_ms: self.now_ms }
    }

    fn check(&self, dir: &Path) -> Report {
        check(&self.options(dir), &mut |_| ()).unwrap()
    }

    /// All it holds.
    fn pairs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let engine = SledEngine::open(&init::store_dir(&self.dir())).unwrap();
        (0..b'~').flat_map(|first| engine.scan(&[first], None, 100_000).unwrap()).collect()
    }
}

async fn live(deployment: &Deployment) {
    for cluster in ["c1", "c2"] {
        deployment.cluster(cluster, DAY).await;
        let token = deployment.token(cluster, v1::Role::Worker, 5).await;
        for n in 1..=3 {
            let key = PrivateKey::generate().unwrap();
            let address = format!("10.0.0.{n}");
            let request = ask(&token, cluster, "many", &[&address], &key);
            let member = deployment.enroll(request, key).await.unwrap();
            let leaf = PrivateKey::generate().unwrap();
            member.client.issue_leaf(node_leaf(&leaf)).await.unwrap();
            member.client.issue_leaf(node_leaf(&leaf)).await.unwrap();
            let next = PrivateKey::generate().unwrap();
            member.client.renew_identity(next.csr_der().unwrap()).await.unwrap();
        }
    }
    deployment.worker("c1", "stolen", "10.1.0.1").await;
    let key = PrivateKey::generate().unwrap();
    let token = deployment.token("c1", v1::Role::Worker, 1).await;
    let request = ask(&token, "c1", "seen", &[], &key);
    let source = "10.1.0.2".parse().unwrap();
    ca_server::enroll::enroll(&deployment.ca, request, source).await.unwrap();
    for name in ["stolen", "seen"] {
        deployment.revoke("c1", name).await;
    }
    let gone = deployment.worker("c2", "gone", "10.1.0.3").await;
    gone.client.leave().await.unwrap();
}

#[tokio::test]
async fn a_whole_store_holds_is_left_untouched_and_one_in_use_is_refused() {
    let mut deployment = Deployment::start().await;
    live(&deployment).await;
    let now_ms = unix_ms(deployment.clock.now());
    let dir = deployment.folder.path().join("ca");
    let options = Options { dir: dir.clone(), scratch: None, kek_file: None, now_ms };
    let refused = check(&options, &mut |_| ()).unwrap_err();
    assert!(matches!(refused, CheckError::InUse(_)), "{refused}");
    assert!(refused.to_string().contains("stop it first"), "{refused}");
    let output = ca_server(&["check", "--dir", dir.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("stop it first"), "{}", said(&output));
    let log = deployment.audit_log().await;
    deployment.stop().await;
    let Deployment { folder, ca, store, .. } = deployment;
    drop((ca, store));

    let files = |dir: &Path| -> BTreeMap<PathBuf, Vec<u8>> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        entries
            .filter(|path| path.is_file())
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .collect()
    };
    let before = files(&init::store_dir(&dir));
    let kek_file = Some(folder.path().join("kek"));
    let report = check(&Options { kek_file, ..options.clone() }, &mut |_| ()).unwrap();
    assert_eq!(report.findings_total, 0, "{:#?}", report.findings);
    assert_eq!(report.audit_last, log.len() as u64);
    assert_eq!(files(&init::store_dir(&dir)), before, "the check changed what it checked");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "a copy was left behind");

    let output = ca_server(&["check", "--dir", dir.to_str().unwrap(), "-o", "json"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["audit_last_sha256"], report.audit_last_sha256);
    let nowhere = Options { dir: folder.path().to_owned(), ..options };
    assert!(matches!(check(&nowhere, &mut |_| ()), Err(CheckError::NoCa(_))));
}

#[tokio::test]
async fn a_record_removed_moved_or_changed_or_missing_from_an_index_is_named() {
    let lived_in = LivedIn::new().await;
    let pairs = lived_in.pairs();
    let kek = Kek::read(&lived_in.folder.path().join("kek")).unwrap();
    let judged = |change: &Writes| {
        let mut engine = MemoryEngine::new();
        let all = pairs.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect();
        engine.commit(&all).unwrap();
        engine.commit(change).unwrap();
        read_through(&engine, lived_in.now_ms, Some(&kek))
    };
    let judged_later = |change: &Writes, now_ms: i64| {
        let mut engine = MemoryEngine::new();
        let all = pairs.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect();
        engine.commit(&all).unwrap();
        engine.commit(change).unwrap();
        read_through(&engine, now_ms, None).findings_total
    };
    let whole = judged(&Writes::new());
    assert_eq!(whole.findings_total, 0, "{:#?}", whole.findings);

    let kind = |key: &[u8]| char::from(key[0]);
    let mut unnoticed = BTreeMap::new();
    for key in pairs.keys() {
        let report = judged(&Writes::from([(key.clone(), None)]));
        assert_ne!(report.state_sha256, whole.state_sha256);
        if report.findings_total == 0 {
            *unnoticed.entry(kind(key)).or_insert(0) += 1;
        }
    }
    // Nothing points at a block, at CRLs (the CA signs them anew), at what was told of who is out, or at
    // the one node that has left (it might have been forgotten) and where it counted. The newest
    // checkpoint is one of those that agents and exports hold too; a store of an earlier release has none.
    let most = |kind: char| match kind {
        'b' => pairs.keys().filter(|key| key[0] == b'b').count(),
        'l' | 'm' => 3,
        'n' | 'p' | '!' => 1,
        _ => 0,
    };
    assert!(unnoticed.iter().all(|(kind, count)| *count <= most(*kind)), "{unnoticed:?}");

    // Two records of a kind, each under the other's key.
    let keys: Vec<_> = pairs.keys().collect();
    let mut moved = 0;
    for two in keys.windows(2) {
        let (one, other) = (two[0], two[1]);
        if kind(one) != kind(other) || pairs[one] == pairs[other] || "bhlmqu".contains(kind(one)) {
            continue;
        }
        let (a, b) = (pairs[one].clone(), pairs[other].clone());
        let report = judged(&Writes::from([(one.clone(), Some(b)), (other.clone(), Some(a))]));
        assert!(report.findings_total > 0, "moved {one:?} {other:?}");
        moved += 1;
    }
    assert!(moved > 30, "{moved}");

    let holder = pairs.keys().find(|key| kind(key) == 'h').unwrap();
    let report = judged(&Writes::from([(holder.clone(), None)]));
    assert!(report.findings[0].at.starts_with("node "), "{:?}", report.findings);
    assert!(report.findings[0].what.contains("holder"), "{:?}", report.findings);
    // Of a node that is silent for long nothing is wrong: who took its address may be gone since.
    let (without, hour) = (Writes::from([(holder.clone(), None)]), 3_600_000);
    assert_eq!(judged_later(&without, lived_in.now_ms + hour), 0);
    let stranger = Writes::from([(b"z/what".to_vec(), Some(vec![1]))]);
    assert!(judged(&stranger).findings[0].what.contains("no record of a CA"));

    // More than is told is counted.
    let certificates = pairs.keys().filter(|key| "sxyq".contains(kind(key)));
    let report = judged(&certificates.map(|key| (key.clone(), None)).collect());
    assert!(report.findings_total >= report.findings.len() as u64);
    assert!(report.findings.len() <= 100);
}

#[tokio::test]
async fn a_flipped_byte_of_the_store_s_file_is_found_or_harms_nothing() {
    flip(FLIPS).await;
}

#[tokio::test]
#[ignore = "the same for longer"]
async fn a_flipped_byte_of_the_store_s_file_is_found_or_harms_nothing_at_length() {
    flip(FLIPS_LONG).await;
}

async fn flip(flips: usize) {
    let lived_in = LivedIn::new().await;
    let whole = lived_in.check(&lived_in.dir());
    assert_eq!(whole.findings_total, 0, "{:#?}", whole.findings);
    let from = init::store_dir(&lived_in.dir());
    let db = fs::read(from.join("db")).unwrap();
    // Behind the last byte that is not zero the file holds nothing yet.
    let used = db.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let other = lived_in.folder.path().join("flipped");
    let to = init::store_dir(&other);
    copy(&from, &to);
    let file = fs::OpenOptions::new().write(true).open(to.join("db")).unwrap();
    let mut drawn = 0x9e37_79b9_7f4a_7c15_u64;
    let (mut found, mut harmless, mut silent) = (0, 0, Vec::new());
    for _ in 0..flips {
        drawn =
            drawn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = usize::try_from((drawn >> 24) % used as u64).unwrap();
        let changed = db[at] ^ (1 << (drawn >> 20 & 7));
        file.write_all_at(&[changed], at as u64).unwrap();
        let report = lived_in.check(&other);
        file.write_all_at(&db[at..=at], at as u64).unwrap();
        if report.findings_total > 0 {
            found += 1;
        } else if report.state_sha256 == whole.state_sha256 {
            harmless += 1;
        } else {
            silent.push((at, report.records, report.audit_last));
        }
    }
    println!("{flips} flips in {used} bytes: {found} found, {harmless} harmless");
    assert!(
        silent.is_empty(),
        "{} of {flips} changed the state and passed: {silent:?}",
        silent.len()
    );
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[tokio::test]
async fn a_key_is_exported_once_on_record_and_openssl_reads_it() {
    let lived_in = LivedIn::new().await;
    let folder = lived_in.folder.path();
    let (dir, kek) = (lived_in.dir(), folder.join("kek"));
    let export = |authority: &str, key: &str, out: &str| {
        let out = folder.join(out);
        ca_server(&[
            "export-key",
            "--dir",
            dir.to_str().unwrap(),
            "--kek-file",
            kek.to_str().unwrap(),
            "--authority",
            authority,
            "--key",
            key,
            "--out",
            out.to_str().unwrap(),
        ])
    };
    for (authority, key, out) in [
        ("control", "root", "control.pem"),
        ("control", "issuer", "control-issuer.pem"),
        ("cluster/c1", "root", "c1.pem"),
        ("cluster/c1", "issuer", "c1-issuer.pem"),
    ] {
        let output = export(authority, key, out);
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        assert!(!said(&output).contains("PRIVATE"), "a key was shown");
        let path = folder.join(out);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let public = |arguments: &[&str]| {
            let output = Command::new("openssl").args(arguments).arg("-in").arg(&path).output();
            let output = output.unwrap();
            assert!(output.status.success(), "{}", said(&output));
            String::from_utf8(output.stdout).unwrap()
        };
        let of_key = public(&["pkey", "-pubout"]);
        assert!(of_key.contains("PUBLIC KEY"));
        assert_eq!(of_key, public(&["x509", "-noout", "-pubkey"]), "{authority} {key}");
    }
    let again = export("control", "root", "control.pem");
    assert_eq!(again.status.code(), Some(64), "{}", said(&again));
    assert_eq!(export("cluster/none", "root", "none.pem").status.code(), Some(1));
    assert!(!folder.join("none.pem").exists());
    let on_record = lived_in.check(&dir).audit_last;
    assert_eq!(export("control", "root", "no/folder.pem").status.code(), Some(1));
    let report = lived_in.check(&dir);
    assert_eq!(report.audit_last, on_record, "an export that cannot be written is on record");
    assert_eq!(report.findings_total, 0, "{:#?}", report.findings);
    let log =
        String::from_utf8_lossy(&fs::read(init::store_dir(&dir).join("db")).unwrap()).into_owned();
    assert!(log.contains("of cluster/c1"), "no record of it");
}

fn ca_server(arguments: &[&str]) -> Output {
    Command::new(binary("ca-server")).args(arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&text).into_owned()
}
