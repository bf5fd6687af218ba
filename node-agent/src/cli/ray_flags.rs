//! `ray-flags`: what `ray start` must be told so that it keeps to the cluster's port plan.

use std::{
    net::{IpAddr, UdpSocket},
    path::PathBuf,
};

use clap::Args;
use raymtls_proto::{identity::Role, ports};

use super::{Output, print, print_json, unexpected};
use crate::{
    api::{Answer, Ask},
    config::{SOCKET, STATE_DIR},
    failure::Failure,
    socket,
    statedir::StateDir,
};

#[derive(Debug, Args)]
pub(super) struct RayFlagsArgs {
    /// Say --head too; refused where this node's role is another
    #[arg(long)]
    head: bool,
    /// The agent's socket
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// The agent's own folder, read where no agent answers
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
    /// A line for a shell, or a list
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// What the flags follow from.
struct Known {
    role: Role,
    addresses: Vec<IpAddr>,
    flags: Vec<String>,
}

pub(super) async fn run(args: RayFlagsArgs) -> Result<(), Failure> {
    let known = known(&args).await?;
    let flags = flags(&known, args.head, is_here)?;
    match args.output {
        Output::Table => print(&format!("{}\n", flags.join(" "))),
        Output::Json => print_json(&flags),
    }
}

async fn known(args: &RayFlagsArgs) -> Result<Known, Failure> {
    match socket::ask(&args.socket, Ask::Status).await {
        Ok(Answer::Status(status)) => {
            let settings = status.settings.ok_or_else(no_plan)?;
            let other = |_| Failure::Failed("the agent is of another release".to_owned());
            Ok(Known {
                role: status.role.parse().map_err(other)?,
                addresses: status.addresses.iter().filter_map(|a| a.parse().ok()).collect(),
                flags: settings.ray_start_flags,
            })
        }
        Ok(answer) => Err(unexpected(answer)),
        Err(silent) => remembered(args).map_err(|why| {
            let folder = args.state_dir.display();
            Failure::Failed(format!("{silent}; and the memory in {folder} does not help: {why}"))
        }),
    }
}

fn remembered(args: &RayFlagsArgs) -> Result<Known, String> {
    let state = StateDir::open(&args.state_dir).map_err(|e| e.to_string())?;
    let node = state.node().map_err(|e| e.to_string())?.ok_or("this host is not enrolled")?;
    let memory = state.memory();
    let settings = memory.settings().ok_or_else(|| no_plan().to_string())?;
    Ok(Known {
        role: node.role,
        addresses: node.addresses,
        flags: ports::ray_start_flags(node.role.to_proto(), settings),
    })
}

fn no_plan() -> Failure {
    Failure::Failed(
        "the CA has not told the cluster's port plan yet: see `node-agent status`".into(),
    )
}

/// Pure but for `is_here`, which says whether this host has an address.
fn flags(
    known: &Known,
    head: bool,
    is_here: impl Fn(IpAddr) -> bool,
) -> Result<Vec<String>, Failure> {
    if known.role == Role::Driver {
        return Err(Failure::Failed(
            "this node is a driver: it starts no Ray, it connects".to_owned(),
        ));
    }
    if head && known.role != Role::Head {
        let role = known.role;
        return Err(Failure::Failed(format!(
            "this node is enrolled as {role}: --head goes with a token of role head"
        )));
    }
    let mut flags = if head { vec!["--head".to_owned()] } else { Vec::new() };
    // Peers dial what Ray says of itself, and check it against the leaf. Of two addresses Ray's own
    // choice may be the better one; one that is translated on the way is none of this host's.
    let here: Vec<IpAddr> = known.addresses.iter().copied().filter(|a| is_here(*a)).collect();
    if let [address] = here.as_slice() {
        flags.push(format!("--node-ip-address={address}"));
    }
    flags.extend(known.flags.iter().cloned());
    Ok(flags)
}

/// Only an address of this host can be listened on.
fn is_here(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(role: Role, addresses: &[&str]) -> Known {
        Known {
            role,
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            flags: vec!["--node-manager-port=6701".to_owned()],
        }
    }

    #[test]
    fn the_address_is_told_where_there_is_one_to_tell() {
        let here = |a: IpAddr| a.to_string() != "192.0.2.1";
        let port = "--node-manager-port=6701";
        for (name, addresses, expected) in [
            ("one", &["10.0.0.1"] as &[_], vec!["--node-ip-address=10.0.0.1", port]),
            (
                "one is translated",
                &["10.0.0.1", "192.0.2.1"],
                vec!["--node-ip-address=10.0.0.1", port],
            ),
            ("two", &["10.0.0.1", "10.0.0.2"], vec![port]),
            ("none of this host", &["192.0.2.1"], vec![port]),
        ] {
            let told = flags(&known(Role::Worker, addresses), false, here).unwrap();
            assert_eq!(told, expected, "{name}");
        }
    }

    #[test]
    fn a_head_is_one_by_its_role_alone() {
        let all = |role, head| flags(&known(role, &[]), head, |_| true);
        assert_eq!(all(Role::Head, true).unwrap()[0], "--head");
        assert_eq!(all(Role::Head, false).unwrap().len(), 1);
        assert!(all(Role::Worker, true).unwrap_err().to_string().contains("enrolled as worker"));
        assert!(all(Role::Driver, false).is_err());
    }

    #[test]
    fn an_address_of_this_host_is_known() {
        assert!(is_here("127.0.0.1".parse().unwrap()));
        assert!(!is_here("192.0.2.1".parse().unwrap()));
    }
}
