//! `exec`: becomes a program that finds Ray's files in its environment. It runs as its caller, and
//! reads no key itself; it looks whether the caller can.

use std::{ffi::OsString, fs::File, os::unix::process::CommandExt, path::Path, process::Command};

use crate::{
    api::{Answer, Ask},
    failure::Failure,
    rayenv::{RayEnv, is_owned},
    socket,
    statedir::read_if_there,
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

/// Becomes the program. Returns only if that failed.
#[must_use]
pub fn become_program(env: &RayEnv, program: &[OsString]) -> Failure {
    if let Err(failure) = readable(env) {
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
    command.envs(env.variables());
    let error = command.exec();
    Failure::Failed(format!("cannot start {}: {error}", name.display()))
}

/// Ray reads a file it cannot open as an empty one and says nothing: find out before it starts.
fn readable(env: &RayEnv) -> Result<(), Failure> {
    let files = [&env.server_cert, &env.server_key, &env.ca_cert].into_iter().chain(&env.token);
    for path in files {
        if let Err(error) = File::open(path) {
            let uid = rustix::process::geteuid().as_raw();
            return Err(Failure::Failed(format!(
                "uid {uid} cannot read {}: {error}; nothing was started: run `node-agent run` \
                 with --ray-group, and the program as a member of that group",
                path.display()
            )));
        }
    }
    Ok(())
}
