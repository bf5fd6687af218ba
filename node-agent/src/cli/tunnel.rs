//! `tunnel status`, `tunnel handover` and `tunnel stop`: the data path of mode tunnel, by the agent.

use std::{fmt::Write, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use raymtls_proto::clock::{Clock, SystemClock};

use super::{AskArgs, Output, print, print_json, unexpected};
use crate::{
    api::{Answer, Ask},
    config::SOCKET,
    failure::Failure,
    socket,
};

#[derive(Debug, Subcommand)]
pub(super) enum TunnelCommand {
    /// Whether Ray may be started, flows, peers, refusals
    #[command(after_help = "Examples:
  node-agent tunnel status
  node-agent tunnel status -o json | jq .peers")]
    Status(AskArgs),
    /// Start a new ray-tunnel on the same sockets; the old one keeps its flows until they end
    #[command(after_help = "Example:
  node-agent tunnel handover --deadline 24h

After an upgrade of the program. If the new process does not take flows within 10 seconds, the old one
goes on. Flows that last beyond the deadline are cut.")]
    Handover(DeadlineArgs),
    /// End ray-tunnel: Ray's connections between nodes are refused until node-agent is restarted
    #[command(after_help = "Example:
  node-agent tunnel stop --deadline 0s

A stop or restart of node-agent alone leaves ray-tunnel running, and the next agent takes it over.")]
    Stop(DeadlineArgs),
}

#[derive(Debug, Args)]
pub(super) struct DeadlineArgs {
    /// How long flows of the old process may go on
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    deadline: Duration,
    /// The agent's socket
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
}

pub(super) async fn run(command: TunnelCommand) -> Result<(), Failure> {
    match command {
        TunnelCommand::Status(args) => status(args).await,
        TunnelCommand::Handover(args) => {
            let deadline_seconds = args.deadline.as_secs();
            tell(args.socket, Ask::TunnelHandover { deadline_seconds }).await
        }
        TunnelCommand::Stop(args) => {
            let deadline_seconds = args.deadline.as_secs();
            tell(args.socket, Ask::TunnelStop { deadline_seconds }).await
        }
    }
}

async fn tell(socket: PathBuf, ask: Ask) -> Result<(), Failure> {
    match socket::ask(&socket, ask).await.map_err(Failure::failed)? {
        Answer::Tunnel { message } => print(&format!("{message}\n")),
        other @ (Answer::Status(_)
        | Answer::ExecFolder(_)
        | Answer::Renewed(_)
        | Answer::Left { .. }
        | Answer::Error(_)) => Err(unexpected(other)),
    }
}

async fn status(args: AskArgs) -> Result<(), Failure> {
    let answer = socket::ask(&args.socket, Ask::Status).await.map_err(Failure::failed)?;
    let Answer::Status(status) = answer else { return Err(unexpected(answer)) };
    let Some(tunnel) = &status.tunnel else {
        return Err(Failure::Failed("the cluster's mode is not tunnel".to_owned()));
    };
    match args.output {
        Output::Json => print_json(tunnel),
        Output::Table => {
            let now = SystemClock.now();
            let mut text = tunnel.lines(now).join("\n") + "\n";
            for peer in &tunnel.peers {
                let _ = writeln!(
                    text,
                    "  {} at {}: {} flows, leaf ends {}",
                    peer.name,
                    peer.address,
                    peer.flows,
                    peer.not_after.relative(now)
                );
            }
            print(&text)
        }
    }
}
