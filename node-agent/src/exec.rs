//! `exec`: becomes a program that finds Ray's files in its environment. It runs as its caller, and
//! uses no key itself; it looks whether the caller can read the files and whether the leaf is valid.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::Path,
    process::Command,
};

use raymtls_proto::{
    bundle,
    clock::{Clock, SystemClock},
    leaf::LeafFacts,
};
use time::OffsetDateTime;

use crate::{
    api::{Answer, Ask},
    failure::Failure,
    moment::Moment,
    rayenv::{RayEnv, is_owned},
    socket,
    statedir::{IDENTITY, read_if_there},
};

/// Asks the agent for a key folder.
///
/// # Errors
/// No agent, or it has none.
pub async fn env_from_agent(path: &Path) -> Result<RayEnv, Failure> {
    let answer = socket::ask(path, Ask::ExecFolder).await.map_err(|error| {
        Failure::Failed(format!("{error}; without it: exec --env-file TLS_DIR/ray.env -- PROGRAM"))
    })?;
    let Answer::ExecFolder(folder) = answer else { return Err(crate::cli::unexpected(answer)) };
    if let Some(note) = folder.note {
        eprintln!("node-agent: {note}");
    }
    Ok(folder.env)
}

/// Reads a `ray.env` that `enroll --once` made.
///
/// # Errors
/// Not there, or not ours.
pub fn env_from_file(path: &Path) -> Result<RayEnv, Failure> {
    let bad = |why: String| Failure::Config(format!("{}: {why}", path.display()));
    let text = read_if_there(path)
        .map_err(Failure::config)?
        .ok_or_else(|| bad("there is no such file".to_owned()))?;
    let text = std::str::from_utf8(&text).map_err(|_| bad("not text".to_owned()))?;
    RayEnv::parse(text).map_err(|e| bad(e.to_string()))
}

/// Becomes the program. Returns only if that failed. `identity_near` says that this machine keeps an
/// identity.
#[must_use]
pub fn become_program(env: &RayEnv, program: &[OsString], identity_near: bool) -> Failure {
    if let Err(failure) = readable(env).and_then(|()| valid(env, SystemClock.now())) {
        return failure;
    }
    let Some((name, arguments)) = program.split_first() else {
        return Failure::Usage("a program to start is missing: exec -- PROGRAM...".to_owned());
    };
    let mut command = Command::new(name);
    command.args(arguments);
    for (inherited, _) in std::env::vars_os() {
        if inherited.to_str().is_some_and(is_owned) {
            command.env_remove(&inherited);
        }
    }
    for (name, value) in env.variables() {
        command.env(name, value.as_os_str());
    }
    if let Some(warning) = warning(identity_near, rustix::process::geteuid().is_root()) {
        eprintln!("node-agent: {warning}");
    }
    let error = command.exec();
    let path = std::env::var_os("PATH").unwrap_or_default();
    Failure::Failed(not_started(Path::new(name), &path, &error))
}

/// Whether this machine keeps an identity: a driver for once has none to lose, and an enrolled node
/// may read its `ray.env` the same way.
#[must_use]
pub fn has_identity(state_dir: &Path) -> bool {
    state_dir.join(IDENTITY).exists()
}

fn warning(identity_near: bool, is_root: bool) -> Option<&'static str> {
    (identity_near && is_root).then_some(
        "this runs as root: every Ray task could read the identity key; start it as Ray's own user, \
         for example with `sudo -u ray`",
    )
}

/// Why a program does not start. The system has one word for a program that is missing and for one
/// that needs a missing one.
fn not_started(name: &Path, path: &OsStr, error: &io::Error) -> String {
    let shown = name.display();
    if error.kind() != io::ErrorKind::NotFound {
        return format!("cannot start {shown}: {error}");
    }
    let is_bare = name.components().count() == 1 && !name.as_os_str().as_bytes().contains(&b'/');
    let is_there = if is_bare {
        std::env::split_paths(path).any(|folder| folder.join(name).is_file())
    } else {
        name.is_file()
    };
    if is_there {
        return format!(
            "cannot start {shown}: it is there, but not the program that its first line names"
        );
    }
    if !is_bare {
        return format!("cannot start {shown}: there is no such file");
    }
    let path: String = path.to_string_lossy().chars().take(PATH_SHOWN_MAX).collect();
    format!("`{shown}` is in no folder of PATH ({path}; sudo sets its own): give its full path")
}

/// So many characters of PATH are shown.
const PATH_SHOWN_MAX: usize = 500;

/// Ray reads a file it cannot open as an empty one and says nothing: find out before it starts.
fn readable(env: &RayEnv) -> Result<(), Failure> {
    let tls = env.files.iter().flat_map(|f| [&f.server_cert, &f.server_key, &f.ca_cert]);
    for path in tls.chain(&env.token) {
        if let Err(error) = File::open(path) {
            let uid = rustix::process::geteuid().as_raw();
            let at = match closed_folder(path) {
                Some(folder) => format!("the folder {} is closed to it", folder.display()),
                None => error.to_string(),
            };
            return Err(Failure::Failed(format!(
                "uid {uid} cannot read {}: {at}; nothing was started: run `node-agent run` with \
                 --ray-group, and the program as a member of that group",
                path.display()
            )));
        }
    }
    Ok(())
}

/// The uppermost folder on the way to a file that the caller may not enter.
fn closed_folder(path: &Path) -> Option<&Path> {
    let mut ways: Vec<&Path> = path.ancestors().collect();
    ways.reverse();
    ways.into_iter().find_map(|way| match std::fs::symlink_metadata(way) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => way.parent(),
        Ok(_) | Err(_) => None,
    })
}

/// Ray would start with a leaf that is over, and nobody would talk to it.
fn valid(env: &RayEnv, now: OffsetDateTime) -> Result<(), Failure> {
    // Behind a tunnel Ray serves no leaf; the agent looked at the tunnel's before it answered.
    let Some(files) = &env.files else { return Ok(()) };
    let path = files.server_cert.as_path();
    let bad =
        |why: String| Failure::Failed(format!("{}: {why}; nothing was started", path.display()));
    let pem = read_if_there(path).map_err(Failure::failed)?.unwrap_or_default();
    let certificates =
        bundle::certificates_from_pem(&pem).map_err(|e| bad(format!("unreadable leaf: {e}")))?;
    let leaf = certificates.first().ok_or_else(|| bad("it holds no leaf".to_owned()))?;
    let facts = LeafFacts::parse(leaf).map_err(|e| bad(e.to_string()))?;
    if now >= facts.not_after {
        let end = Moment::from(facts.not_after);
        return Err(bad(format!(
            "the leaf ended at {end}, {}: see `node-agent status` why it was not renewed, or run \
             `node-agent enroll` again where no agent runs",
            end.relative(now)
        )));
    }
    if now < facts.not_before {
        let begin = Moment::from(facts.not_before);
        return Err(bad(format!(
            "the leaf is valid from {begin} and now is {}: put the clock of this machine right",
            Moment::from(now)
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, time::Duration};

    use raymtls_proto::durable::{Access, create};

    use super::*;

    #[test]
    fn a_leaf_outside_its_time_starts_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.serial_number = Some(rcgen::SerialNumber::from_slice(&[1; 16]));
        let (begin, life) = (OffsetDateTime::UNIX_EPOCH, Duration::from_secs(100));
        (params.not_before, params.not_after) = (begin, begin + life);
        let certificate = params.self_signed(&key).unwrap();
        let pem = bundle::certificates_to_pem(&[certificate.der().clone()]);
        let env = RayEnv::of_folder(folder.path(), None);
        assert!(valid(&env, begin).is_err());
        create(&env.files.as_ref().unwrap().server_cert, pem.as_bytes(), Access::PUBLIC).unwrap();
        let second = Duration::from_secs(1);
        for (name, now, good) in [
            ("before not_before", begin - second, false),
            ("at not_before", begin, true),
            ("before not_after", begin + life - second, true),
            ("at not_after", begin + life, false),
        ] {
            let judged = valid(&env, now);
            assert_eq!(judged.is_ok(), good, "{name}: {judged:?}");
            if let Err(failure) = judged {
                assert!(failure.to_string().contains("nothing was started"), "{failure}");
            }
        }
    }

    #[test]
    fn root_is_warned_of_the_identity_key_only_where_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(warning(has_identity(folder.path()), true), None);
        create(&folder.path().join("identity.pem"), b"x", Access::PRIVATE).unwrap();
        assert!(warning(has_identity(folder.path()), true).is_some());
        assert_eq!(warning(has_identity(folder.path()), false), None);
    }

    #[test]
    fn a_program_that_is_not_found_is_told_where_it_was_looked_for() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("script");
        create(&script, b"#!/nowhere/python\n", Access::PUBLIC).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = folder.path().as_os_str();
        let start = |name: &Path| {
            let error = Command::new(name).env("PATH", path).exec();
            not_started(name, path, &error)
        };
        let shown = folder.path().display();
        for (name, said) in [
            (
                "ray",
                format!("`ray` is in no folder of PATH ({shown}; sudo sets its own): give its"),
            ),
            ("script", "not the program that its first line names".to_owned()),
            ("/nowhere/ray", "cannot start /nowhere/ray: there is no such file".to_owned()),
            ("./nowhere", "there is no such file".to_owned()),
            ("/", "cannot start /: Permission denied".to_owned()),
        ] {
            let text = start(Path::new(name));
            assert!(text.contains(&said), "{name}: {text}");
        }
        assert!(start(&script).contains("first line names"));
    }

    #[test]
    fn a_closed_folder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let closed = folder.path().join("closed");
        let key = closed.join("tls/k1/tls.key");
        raymtls_proto::durable::make_parents(key.parent().unwrap()).unwrap();
        create(&key, b"x", Access::PUBLIC).unwrap();
        assert_eq!(closed_folder(&key), None);
        std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o700)).unwrap();
        if !rustix::process::geteuid().is_root() {
            std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o000)).unwrap();
            assert_eq!(closed_folder(&key), Some(closed.as_path()));
            return;
        }
        // Root enters everything: look as somebody else, in a thread of its own.
        let seen = std::thread::spawn(move || {
            use rustix::{process::Uid, thread::set_thread_res_uid};
            let (root, nobody) = (Uid::ROOT, Uid::from_raw(65_534));
            set_thread_res_uid(root, nobody, root).unwrap();
            closed_folder(&key).map(Path::to_path_buf)
        });
        assert_eq!(seen.join().unwrap(), Some(closed));
    }
}
