use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn touch(path: &Path) {
    durable::make_parents(path.parent().unwrap()).unwrap();
    durable::create(path, b"x", Access::PRIVATE).unwrap();
}

#[test]
fn the_sweep_takes_our_own_names_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let tls = TlsDir::prepare(&folder.path().join("tls"), None).unwrap();
    let at = |name: &str| tls.path().join(name);
    let kept = [
        ".kube/config",
        ".keys/k",
        ".k.new/k",
        ".k1x.new/k",
        ".k1.bak/k",
        ".notes.tmp",
        "k1/.notes.tmp",
        "elsewhere/k",
    ];
    let swept = [".k2.new/tls.key", ".k0.old/tls.key", ".ray.env.tmp", "k1/.tls.crt.tmp"];
    for name in kept.iter().chain(&swept) {
        touch(&at(name));
    }
    symlink(at("elsewhere"), at(".k3.new")).unwrap();
    tls.sweep().unwrap();
    for name in kept {
        assert!(at(name).exists(), "{name}");
    }
    for name in swept {
        assert!(!at(name).exists(), "{name}");
    }
}

#[test]
fn a_folder_of_somebody_else_is_refused_and_left_as_it_is() {
    let table: [(&str, &[&str], bool); 8] = [
        ("empty", &[], true),
        ("a home", &[".kube/config", ".profile"], false),
        ("a temporary of another program", &[".session.tmp"], false),
        ("a folder that happens to be called k1", &["k1/notes", "README"], false),
        ("our files, no key folder yet", &["ray_token", ".k1.new/tls.key"], true),
        ("ours", &["k1/tls.key", "ray.env"], true),
        ("ours with a stray file", &["k1/tls.key", "ray.env~"], true),
        ("a file system of its own", &["lost+found/x"], true),
    ];
    for (name, entries, good) in table {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tls");
        durable::make_parents(&path).unwrap();
        entries.iter().for_each(|entry| touch(&path.join(entry)));
        let prepared = TlsDir::prepare(&path, None);
        assert_eq!(prepared.is_ok(), good, "{name}");
        assert!(entries.iter().all(|entry| path.join(entry).exists()), "{name}");
        if let Err(error) = prepared {
            assert!(error.to_string().contains("a folder of its own"), "{name}: {error}");
        }
    }
}

#[test]
fn a_folder_that_others_can_replace_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tls");
    for (mode, good) in [(0o755, true), (0o1777, true), (0o777, false), (0o775, false)] {
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(TlsDir::prepare(&path, None).is_ok(), good, "{mode:o}");
    }
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let link = folder.path().join("link");
    symlink(&path, &link).unwrap();
    for link in [link.clone(), link.join("")] {
        let error = TlsDir::prepare(&link, None).unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");
    }
}

#[test]
fn the_key_for_once_is_the_same_for_the_same_purpose_only() {
    let folder = tempfile::tempdir().unwrap();
    let tls = TlsDir::prepare(&folder.path().join("tls"), None).unwrap();
    let key = |purpose: &str| tls.once_key(purpose).unwrap().spki_der();
    let first = key("token 1 node d1");
    assert_eq!(key("token 1 node d1"), first);
    assert_ne!(key("token 2 node d1"), first);
    let path = tls.path().join(ONCE_KEY);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    tls.drop_once_key().unwrap();
    assert!(!path.exists());
}
