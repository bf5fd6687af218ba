//! The running processes of Ray, from /proc: who runs them, what they were told, and the few variables
//! that decide TLS and token. Bounded reads; no secret is kept.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use super::facts::{Process, Unseen, Variables};
use crate::served::ProcessServed;

/// Most processes that are read.
const PROCESSES_MAX: usize = 512;
/// So much of an environment or a command line is read, in bytes.
const READ_LEN_MAX: u64 = 256 * 1024;
/// How the processes of Ray are told which address to advertise.
const ADDRESS_FLAGS: [&[u8]; 2] = [b"--node_ip_address=", b"--node-ip-address="];

/// Titles that Ray gives its Python processes.
const TITLES: [&str; 2] = ["ray::", "ray-dashboard-"];

/// Reads those that were found to listen.
pub(super) fn read(proc: &Path, found: &[ProcessServed]) -> Vec<Process> {
    let seen = found.iter().filter_map(|process| Some((process.pid?, process)));
    seen.take(PROCESSES_MAX).filter_map(|(pid, process)| one(proc, pid, process)).collect()
}

fn one(proc: &Path, pid: u32, served: &ProcessServed) -> Option<Process> {
    let folder = proc.join(pid.to_string());
    let status = bytes(&folder.join("status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let command = bytes(&folder.join("cmdline")).unwrap_or_default();
    Some(Process {
        pid,
        uid: numbers(&status, "Uid:").next().unwrap_or(served.uid),
        gids: numbers(&status, "Gid:").take(1).chain(numbers(&status, "Groups:")).collect(),
        kind: served.kind,
        advertises: advertised(&command),
        variables: match bytes(&folder.join("environ")) {
            Ok(environment) if is_overwritten(&served.name, &environment) => {
                Err(Unseen::Overwritten)
            }
            Ok(environment) => Ok(variables(&environment)),
            Err(error) => Err(Unseen::Closed(error.to_string())),
        },
    })
}

fn advertised(command: &[u8]) -> Option<std::net::IpAddr> {
    command.split(|byte| *byte == 0).find_map(|word| {
        let value = ADDRESS_FLAGS.iter().find_map(|flag| word.strip_prefix(*flag))?;
        std::str::from_utf8(value).ok()?.parse().ok()
    })
}

/// A process that gives itself a title writes it over its arguments, and on over what follows them: an
/// environment that begins with no variable has lost its first ones.
fn is_overwritten(name: &str, environment: &[u8]) -> bool {
    let first = environment.split(|byte| *byte == 0).next().unwrap_or_default();
    let is_cut = !environment.is_empty() && !first.contains(&b'=');
    is_cut || TITLES.iter().any(|title| name.starts_with(title))
}

fn variables(environment: &[u8]) -> Variables {
    let mut all = Variables::default();
    let text = |value: &[u8]| Some(String::from_utf8_lossy(value).into_owned());
    for variable in environment.split(|byte| *byte == 0) {
        let Some(at) = variable.iter().position(|byte| *byte == b'=') else { continue };
        let (name, value) = (&variable[..at], &variable[at + 1..]);
        match name {
            b"RAY_USE_TLS" => all.use_tls = text(value),
            b"RAY_TLS_SERVER_CERT" => all.cert = Some(OsStr::from_bytes(value).into()),
            b"RAY_AUTH_MODE" => all.auth_mode = text(value),
            b"RAY_AUTH_TOKEN_PATH" => all.token_path = Some(OsStr::from_bytes(value).into()),
            b"RAY_AUTH_TOKEN" => all.has_token = true,
            _ => {}
        }
    }
    all
}

/// The numbers of one line of `/proc/PID/status`.
fn numbers<'a>(status: &'a str, name: &'a str) -> impl Iterator<Item = u32> + 'a {
    let line = status.lines().find_map(move |line| line.strip_prefix(name)).unwrap_or_default();
    line.split_whitespace().filter_map(|number| number.parse().ok())
}

fn bytes(path: &Path) -> io::Result<zeroize::Zeroizing<Vec<u8>>> {
    let mut bytes = zeroize::Zeroizing::new(Vec::new());
    File::open(path)?.take(READ_LEN_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_decides_trust_is_read_and_the_token_is_not() {
        let read = variables(
            b"PATH=/bin\0RAY_USE_TLS=1\0RAY_TLS_SERVER_CERT=/t/k1/tls.crt\0RAY_AUTH_TOKEN=s3cret\0\
              RAY_AUTH_MODE=token\0RAY_AUTH_TOKEN_PATH=/t/ray_token\0",
        );
        assert_eq!(read.use_tls.as_deref(), Some("1"));
        assert_eq!(read.cert.as_deref(), Some(Path::new("/t/k1/tls.crt")));
        assert_eq!(read.auth_mode.as_deref(), Some("token"));
        assert!(read.has_token && !format!("{read:?}").contains("s3cret"));
        assert_eq!(variables(b"RAY_USE_TLS"), Variables::default());
    }

    #[test]
    fn an_environment_under_a_title_is_none() {
        for (name, environment, overwritten) in [
            ("raylet", &b"PATH=/bin\0RAY_USE_TLS=1\0"[..], false),
            ("raylet", b"", false),
            ("ray::DashboardAgent", b"PATH=/bin\0RAY_USE_TLS=1\0", true),
            ("python driver.py", b"\0\0\0RAY_USE_TLS=1\0", true),
            ("python driver.py", b"my title\0RAY_USE_TLS=1\0", true),
        ] {
            assert_eq!(is_overwritten(name, environment), overwritten, "{name}");
        }
    }

    #[test]
    fn the_address_a_process_advertises_is_told_by_its_command_line() {
        for (command, address) in [
            (&b"raylet\0--node_ip_address=10.0.0.1\0"[..], Some("10.0.0.1")),
            (b"gcs_server\0--node-ip-address=fd00::1\0", Some("fd00::1")),
            (b"raylet\0--node_ip_address=head\0", None),
            (b"raylet\0", None),
        ] {
            assert_eq!(advertised(command), address.map(|a| a.parse().unwrap()));
        }
    }

    #[test]
    fn users_and_groups_are_read() {
        let status = "Name:\traylet\nUid:\t1000\t0\t0\t0\nGid:\t7\t7\t7\t7\nGroups:\t7 990 \n";
        assert_eq!(numbers(status, "Uid:").next(), Some(1_000));
        assert_eq!(numbers(status, "Groups:").collect::<Vec<_>>(), [7, 990]);
        assert_eq!(numbers(status, "None:").next(), None);
    }
}
