//! `isolation show` and `isolation clear`: the tables of this host, with the agent or without it.

use std::{fmt::Write, path::PathBuf};

use clap::{Args, Subcommand};
use raymtls_proto::identity::ClusterId;

use super::{Output, consent, print, print_json};
use crate::{
    api::{Answer, Ask},
    config::{SOCKET, STATE_DIR},
    failure::Failure,
    isolation::{
        clear, shown,
        shown::Shown,
        table::{Kernel, TableError},
        table_name,
    },
    socket,
    statedir::StateDir,
};

/// So many addresses of a set are shown to a person.
const SHOWN_MAX: usize = 20;

#[derive(Debug, Subcommand)]
pub(super) enum IsolationCommand {
    /// What guards Ray's ports of this host now, read from the kernel; as root
    #[command(after_help = "Examples:
  node-agent isolation show
  node-agent isolation show -o json | jq '.[].mode'")]
    Show(ShowArgs),
    /// Remove a cluster's table: Ray's ports of this host are open to all again; as root
    #[command(after_help = "Examples:
  node-agent isolation clear
  node-agent isolation clear --cluster c1 --yes

A running agent of that cluster loads its table again within 10 seconds: for good, say
`ca-admin cluster set CLUSTER isolation=off`, or stop the agent first. Without a table nothing is done.")]
    Clear(ClearArgs),
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// Output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Debug, Args)]
pub(super) struct ClearArgs {
    /// Whose table [default: that of the cluster this host is enrolled in]
    #[arg(long)]
    cluster: Option<ClusterId>,
    /// The agent's own folder, which names the cluster
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
    /// The agent's socket
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(super) async fn run(command: IsolationCommand) -> Result<(), Failure> {
    match command {
        IsolationCommand::Show(args) => show(args).await,
        IsolationCommand::Clear(args) => remove(args).await,
    }
}

async fn show(args: ShowArgs) -> Result<(), Failure> {
    let tables = shown::tables(&Kernel::default()).await.map_err(failure)?;
    match args.output {
        Output::Json => print_json(&tables),
        Output::Table if tables.is_empty() => {
            print("no table of a Ray cluster on this host: isolation is off here\n")
        }
        Output::Table => print(&tables.iter().map(text).collect::<String>()),
    }
}

fn text(table: &Shown) -> String {
    let mode = match table.mode {
        "audit" => "audit: counts, refuses nothing",
        "enforce" => "enforce: refuses",
        other => other,
    };
    let mut out = String::new();
    for (name, text) in [
        ("cluster", table.cluster.clone()),
        ("mode", mode.to_owned()),
        ("members", list(&table.members)),
        ("blocked", list(&table.blocked)),
        ("ports", table.guarded_ports.join(", ")),
        (
            "packets",
            format!("{} blocked, {} refused", table.blocked_packets, table.refused_packets),
        ),
    ] {
        writeln!(out, "{name:<10} {text}").expect("writing to a String");
    }
    out
}

fn list(all: &[String]) -> String {
    match all.split_at_checked(SHOWN_MAX) {
        Some((first, rest)) if !rest.is_empty() => {
            format!("{}: {} and {} more (-o json)", all.len(), first.join(", "), rest.len())
        }
        Some(_) | None if all.is_empty() => "none".to_owned(),
        Some(_) | None => format!("{}: {}", all.len(), all.join(", ")),
    }
}

async fn remove(args: ClearArgs) -> Result<(), Failure> {
    let cluster = match args.cluster {
        Some(cluster) => cluster,
        None => enrolled_in(&args.state_dir)?,
    };
    let name = table_name(&cluster);
    if Kernel::default().look(&cluster).await.map_err(failure)?.is_none() {
        return print(&format!("there is no table {name}: nothing to remove\n"));
    }
    let warning = format!(
        "Ray's ports of this host open to everybody, and nodes revoked in {cluster} reach it again.{}",
        reload_warning(&args.socket, &cluster).await
    );
    if args.yes {
        eprintln!("{warning}");
    } else {
        consent(&warning, "the table stays").await?;
    }
    Kernel::default().load(&clear(&cluster)).await.map_err(failure)?;
    print(&format!("removed the table {name}\n"))
}

/// Somebody who opens the door in need is not stopped, but is told who closes it again.
async fn reload_warning(socket: &std::path::Path, cluster: &ClusterId) -> &'static str {
    let Ok(Answer::Status(status)) = socket::ask(socket, Ask::Status).await else { return "" };
    let is_on = status.settings.is_some_and(|settings| settings.isolation != "off");
    if status.cluster != cluster.to_string() || !is_on {
        return "";
    }
    " The running agent loads the table again within 10 seconds: set isolation=off with ca-admin, or stop \
     the agent first."
}

fn enrolled_in(state_dir: &std::path::Path) -> Result<ClusterId, Failure> {
    let which =
        |why: String| Failure::Usage(format!("which cluster's table? give --cluster: {why}"));
    let state = StateDir::open(state_dir).map_err(|e| which(e.to_string()))?;
    let node = state.node().map_err(|e| which(e.to_string()))?;
    node.map(|node| node.cluster).ok_or_else(|| which("this host is not enrolled".to_owned()))
}

/// Whoever called is the one who lacks the right, not the agent.
fn failure(error: TableError) -> Failure {
    match error {
        TableError::NotPermitted(program) => Failure::Failed(format!(
            "{program} may not look at the firewall: run it as root (the capability NET_ADMIN)"
        )),
        TableError::Missing(_)
        | TableError::Io { .. }
        | TableError::Failed { .. }
        | TableError::TooSlow(..)
        | TableError::Form(_) => Failure::failed(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_is_cut_and_counted() {
        let all = |n: usize| (0..n).map(|i| i.to_string()).collect::<Vec<_>>();
        assert_eq!(list(&[]), "none");
        assert_eq!(list(&all(2)), "2: 0, 1");
        assert!(list(&all(SHOWN_MAX)).ends_with(", 19"));
        assert!(list(&all(SHOWN_MAX + 1)).ends_with(", 19 and 1 more (-o json)"));
    }
}
