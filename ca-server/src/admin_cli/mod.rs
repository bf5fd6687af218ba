//! The operator's command line, `ca-admin`: one gRPC call or a few over the CA's unix socket, and
//! what came back as a table or as JSON. It knows nothing of the rest of this crate: no store, no
//! key, no decision. What it says is what the CA answered.
//!
//! In reading order: [`CommandLine`] is what was typed, one file a noun (`cluster`, `token`,
//! `node`, `cert`, `log`, `backup`) does it, `client` is the connection, `consent` asks before the fleet is changed,
//! `output` and `moment` make the answer readable, `failure` makes the exit code.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, Subcommand, error::ErrorKind};
use raymtls_proto::clock::{Clock, SystemClock};

use self::{
    client::Client,
    failure::Failure,
    output::{Format, Screen},
};

mod applied;
mod backup;
mod cert;
mod client;
mod cluster;
mod consent;
mod drain;
mod duration;
mod failure;
mod log;
mod moment;
mod node;
mod output;
mod revoke;
mod running;
mod settings;
#[cfg(test)]
mod stories;
mod token;
mod token_revoke;

/// What was typed.
#[derive(Debug, Parser)]
#[command(
    name = "ca-admin",
    version,
    about = "Runs a Ray mTLS certificate authority: clusters, tokens, nodes, certificates, audit log",
    disable_help_subcommand = true,
    after_help = "\
Examples:
  ca-admin cluster create c1 --max-job 20d
  ca-admin token create --cluster c1 --role head --dns head.ray --out head.join
  ca-admin node list --cluster c1
  ca-admin node revoke --cluster c1 worker-7 --reason 'stolen disk'
  ca-admin -o json cert list --cluster c1

Exit codes: 0 done, 1 failed, 2 refused by the CA, 64 wrong usage, 78 wrong configuration."
)]
pub struct CommandLine {
    /// Unix socket of the CA (the `admin_socket` of its configuration).
    #[arg(
        long,
        global = true,
        display_order = 900,
        value_name = "PATH",
        default_value = "/run/ray-mtls/ca-admin.sock"
    )]
    socket: PathBuf,

    /// How the answer is printed.
    #[arg(short = 'o', long, global = true, display_order = 901, value_enum, default_value_t = Format::Table)]
    output: Format,

    #[command(subcommand)]
    noun: Noun,
}

#[derive(Debug, Subcommand)]
enum Noun {
    /// Ray clusters and their settings.
    #[command(subcommand)]
    Cluster(cluster::Verb),
    /// Bootstrap tokens: what a machine enrols with.
    #[command(subcommand)]
    Token(token::Verb),
    /// Enrolled machines.
    #[command(subcommand)]
    Node(node::Verb),
    /// Certificates the CA has issued.
    #[command(subcommand)]
    Cert(cert::Verb),
    /// The audit log.
    #[command(subcommand)]
    Log(log::Verb),
    /// Everything the CA remembers, in one encrypted file.
    Backup(backup::Backup),
    /// A CA that was restored from a backup.
    #[command(subcommand)]
    Restore(backup::Verb),
}

/// Does what was typed; says what came of it on stdout, what went wrong on stderr.
pub async fn run(command_line: CommandLine) -> ExitCode {
    let mut screen = Screen::of_process(command_line.output, SystemClock.now());
    report(act(command_line, &mut screen).await, &mut screen)
}

fn report(outcome: Result<(), Failure>, screen: &mut Screen) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Nobody reads stderr where this fails; the exit code still speaks.
            let _ = screen.complain(&failure);
            failure.exit_code()
        }
    }
}

/// Prints clap's answer (help, version, or what was wrong) and gives its exit code.
#[must_use]
pub fn explain(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    let _ = io::stdout().flush();
    exit_code_of(error)
}

fn exit_code_of(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return ExitCode::SUCCESS;
    }
    ExitCode::from(failure::EX_USAGE)
}

async fn act(command_line: CommandLine, screen: &mut Screen) -> Result<(), Failure> {
    let CommandLine { socket, output: _, noun } = command_line;
    let client = Client::new(socket);
    match noun {
        Noun::Cluster(verb) => cluster::run(verb, &client, screen).await,
        Noun::Token(verb) => token::run(verb, &client, screen).await,
        Noun::Node(verb) => node::run(verb, &client, screen).await,
        Noun::Cert(verb) => cert::run(verb, &client, screen).await,
        Noun::Log(verb) => log::run(verb, &client, screen).await,
        Noun::Backup(args) => backup::run(&args, &client, screen).await,
        Noun::Restore(verb) => backup::run_restore(verb, &client, screen).await,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &[&str]) -> Result<CommandLine, clap::Error> {
        CommandLine::try_parse_from(std::iter::once(&"ca-admin").chain(words))
    }

    #[test]
    fn the_command_line_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        fn look(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let leaf = command.get_subcommands().next().is_none();
            assert!(!leaf || help.contains("ca-admin "), "{} has no example", command.get_name());
            command.get_subcommands().for_each(look);
        }
        look(&CommandLine::command());
    }

    #[test]
    fn the_lines_of_the_manual_parse() {
        for line in [
            "cluster create c1 --max-job 20d",
            "cluster create c1 --max-life 48h",
            "cluster set c1 max-job=30d port.gcs=6380 --dry-run",
            "cluster set c1 ray-client=on --yes",
            "cluster list -o json",
            "-o json cluster show c1",
            "--socket /tmp/s cluster list",
            "token create --cluster c1 --role head --dns head.ray --out j",
            "token create --cluster c1 --role worker --ttl 2h --uses 2 --generate-names \
             --addresses 10.0.0.0/8,fd00::/8 --out j",
            "token create --cluster c1 --role driver --any-address --node laptop-* --out j",
            "token create --cluster c1 --role head --node head --replace --out j",
            "token list --cluster c1",
            "token revoke --cluster c1 0123456789abcdef --yes",
            "node list --cluster c1",
            "node show --cluster c1 n1",
            "node revoke --cluster c1 n1 --reason stolen --keep-token --yes",
            "node revoke --cluster c1 h --reason x --all-traffic --confirm-head h --wait 0 --yes",
            "node revoke --cluster c1 n1 --reason x --drain --ray-address head.ray:6379",
            "node reinstate --cluster c1 n1 --yes",
            "token revoke --cluster c1 0123456789abcdef --with-nodes --reason x --confirm-head h",
            "cert revoke --cluster c1 019ab2c3d4e5f60718293a4b5c6d7e8f --reason x --yes",
            "node forget --cluster c1 n1",
            "log show",
            "log show --cluster c1 --node n1 --actor uid:0 --kind node-revoked --since 2d --limit 5",
            "log show --serial 019ab2c3d4e5f60718293a4b5c6d7e8f --since 2026-01-31 --follow -o json",
            "log export --after 7 --out f",
            "log verify f",
            "log verify --root r f",
            "backup --out f",
            "restore show",
            "restore accept --dry-run",
            "log prune --before 365d --dry-run",
            "cert list --cluster c1 --node n1",
            "cert show --cluster c1 019ab2c3d4e5f60718293a4b5c6d7e8f --pem",
        ] {
            let words: Vec<_> = line.split_whitespace().collect();
            assert!(parse(&words).is_ok(), "{line}");
        }
    }

    #[test]
    fn what_cannot_be_meant_does_not_parse() {
        for (line, why) in [
            ("", "no noun"),
            ("cluster", "no verb"),
            ("cluster create c1", "neither max-job nor max-life"),
            ("cluster create c1 --max-job 1d --max-life 1d", "both"),
            ("cluster create C1 --max-job 1d", "upper case"),
            ("cluster create c1 --max-job 5", "no unit"),
            ("cluster create c1 --max-job 0s", "no time at all"),
            ("cluster set c1", "nothing to set"),
            ("cluster set c1 max-job", "no value"),
            ("token create --cluster c1 --role head", "no --out"),
            ("token create --cluster c1 --role boss --out j", "unknown role"),
            ("token create --cluster c1 --role head --uses 0 --out j", "no use"),
            ("token create --cluster c1 --role head --addresses 10.0.0.0/33 --out j", "no range"),
            (
                "token create --cluster c1 --role head --addresses 10.0.0.0/8 --any-address --out j",
                "ranges and any",
            ),
            ("token create --cluster c1 --role head --node w*r --out j", "star inside"),
            ("token create --cluster c1 --role head --replace --out j", "replaces whom"),
            ("token revoke --cluster c1 0123", "short id"),
            ("node revoke --cluster c1 n1", "no reason"),
            ("node revoke --cluster c1 n1 --reason x --wait 121", "longer than the CA waits"),
            ("node revoke --cluster c1 n1 --reason x --ray-address h:1", "an address for nothing"),
            ("token revoke --cluster c1 0123456789abcdef --with-nodes", "no reason"),
            ("token revoke --cluster c1 0123456789abcdef --reason x", "a reason for nothing"),
            ("cert revoke --cluster c1 019ab2c3d4e5f60718293a4b5c6d7e8f", "no reason"),
            ("node list", "no cluster"),
            ("log show --kind nonsense", "no such kind"),
            ("log show --limit 0", "nothing"),
            ("log export", "no file"),
            ("cert show --cluster c1 abc", "short serial"),
        ] {
            let words: Vec<_> = line.split_whitespace().collect();
            let error = parse(&words).expect_err(why);
            assert_eq!(exit_code_of(&error), ExitCode::from(64), "{line}: {why}");
        }
    }

    #[test]
    fn help_and_version_are_no_failure() {
        for word in ["--help", "--version"] {
            assert_eq!(exit_code_of(&parse(&[word]).unwrap_err()), ExitCode::SUCCESS);
        }
        assert_eq!(
            exit_code_of(&parse(&["token", "create", "--help"]).unwrap_err()),
            ExitCode::SUCCESS
        );
    }
}
