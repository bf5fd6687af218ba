//! `recycle`: Ray on one node started again with a new leaf, by hand and safely. Ray reads its TLS files once,
//! so a leaf is renewed for good only when the process that serves it starts again.
//!
//! It runs in the foreground as root, beside the daemon, which keeps the few capabilities it has: the daemon
//! hands out the key folder, the command does the rest. `find` says which processes are this node's, `rays`
//! asks Ray, `plan` decides (pure), `node` and `gcs` do it step by step, `launch` starts a process as another
//! one was. Nothing is done to a process of another user, session or network.

pub(crate) mod command;
mod find;
mod gather;
mod gcs;
pub(crate) mod launch;
mod like;
mod node;
mod plan;
mod prove;
mod rays;
mod report;

use std::os::fd::RawFd;

/// Standard input, output and error.
const STANDARD: RawFd = 2;

/// Closes what this process was given besides its standard files, before it has opened any of its own: what
/// a root's shell holds open is not for the processes of Ray that are started here.
pub(crate) fn close_inherited() {
    let Ok(files) = std::fs::read_dir("/proc/self/fd") else { return };
    let numbers = files.filter_map(|file| file.ok()?.file_name().to_str()?.parse::<RawFd>().ok());
    let inherited: Vec<RawFd> = numbers.filter(|number| *number > STANDARD).collect();
    for number in inherited {
        // The folder that was read is among them, and closed already.
        let _ = nix::unistd::close(number);
    }
}
