//! `node-agent doctor`: words to a look, findings to text and an exit code.

use std::sync::Arc;

use raymtls_proto::{clock::SystemClock, process};
use serde::Serialize;

use super::{
    Finding, Level, explain,
    facts::Agent,
    files::{Which, faults},
    fix::{self, Fixed, Leave, Outcome},
    gather::{self, Places},
    judge, own, print,
};
use crate::{
    cli::{self, Output, PlaceArgs, print_json},
    config::{CONFIG_PATH, Config, Partial},
    failure::Failure,
    statedir::{StateDir, StateLock},
};

/// What is asked for.
#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    places: PlaceArgs,
    /// Put right what is safe: modes, groups, links and leftovers in the agent's two folders
    #[arg(long, conflicts_with = "explain")]
    fix: bool,
    /// With --fix: say what it would do, and do nothing
    #[arg(long, requires = "fix")]
    dry_run: bool,
    /// Exit with 1 for a warning too
    #[arg(long)]
    strict: bool,
    /// Instead: why this host and this port of Ray do not come together
    #[arg(long, value_name = "HOST:PORT")]
    explain: Option<String>,
    /// Output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Serialize)]
struct Report<'a> {
    worst: Level,
    findings: &'a [Finding],
    fixed: &'a [Fixed],
}

pub(crate) async fn run(args: DoctorArgs) -> Result<(), Failure> {
    let (config, broken) = config(&args);
    let config = config?;
    if let Err(error) = process::harden() {
        eprintln!("node-agent: {error}");
    }
    match &args.explain {
        Some(target) => explained(&args, target, &config).await,
        None => examined(&args, &config, broken).await,
    }
}

/// A configuration that cannot be used is a finding, and the defaults go on.
fn config(args: &DoctorArgs) -> (Result<Config, Failure>, Option<String>) {
    let flags = args.places.partial();
    let read = Partial::read(args.places.config.as_deref()).map_err(|e| e.to_string());
    let complete = |file: Partial| flags.clone().or(file).complete();
    match read.and_then(|file| complete(file).map_err(|e| e.to_string())) {
        Ok(config) => (Ok(config), None),
        Err(why) => (complete(Partial::default()).map_err(Failure::config), Some(why)),
    }
}

async fn explained(args: &DoctorArgs, target: &str, config: &Config) -> Result<(), Failure> {
    let own = own::Own::load(&config.tls_dir);
    let bounds = explain::Bounds::default();
    let said = explain::explain(target, &own, Arc::new(SystemClock), bounds).await?;
    match args.output {
        Output::Json => print_json(&said)?,
        Output::Table => cli::print(&said.text())?,
    }
    if said.is_good() {
        return Ok(());
    }
    Err(Failure::Failed(format!("{target} and this host do not come together: see above")))
}

async fn examined(
    args: &DoctorArgs,
    config: &Config,
    broken: Option<String>,
) -> Result<(), Failure> {
    if let Some(why) = broken.as_ref().filter(|_| args.fix) {
        return Err(Failure::config(format!(
            "--fix changes nothing by a configuration that cannot be used: put it right first: {why}"
        )));
    }
    let places = Places {
        config_file: args.places.config.clone().unwrap_or_else(|| CONFIG_PATH.into()),
        proc: "/proc".into(),
    };
    let look = async || gather::gather(config, &places, Arc::new(SystemClock)).await;
    let mut facts = look().await;
    let mut fixed = Vec::new();
    if args.fix {
        let group = judge::group(&facts, config);
        let held = held(config, args.dry_run);
        let daemon = held.is_none() || matches!(facts.agent, Agent::Answers(_));
        let leave = Leave { daemon, group: config.ray_gid.is_some(), dry_run: args.dry_run };
        for (folder, which) in [(&facts.state, Which::State), (&facts.tls, Which::Tls)] {
            let Ok(folder) = folder else { continue };
            fixed.extend(fix::fix(folder, &faults(folder, which, group), leave));
        }
        if fixed.iter().any(|one| one.done == Outcome::Done) {
            facts = look().await;
        }
    }
    let mut findings = judge::judge(&facts, config);
    findings.extend(broken.map(|why| {
        Finding::new(
            "config",
            Level::Fail,
            why,
            "put the configuration right; the daemon refuses it",
        )
    }));
    tell(args, &findings, &fixed)?;
    verdict(&findings, args.strict)
}

/// The daemon's lock, held while something is changed; `None` where a daemon has it, or that cannot be
/// told. A dry run takes it where it is there already.
fn held(config: &Config, dry_run: bool) -> Option<Option<StateLock>> {
    let state = StateDir::open(&config.state_dir).ok()?;
    if dry_run && !state.path().join("lock").exists() {
        return Some(None);
    }
    state.lock().ok().map(Some)
}

fn tell(args: &DoctorArgs, findings: &[Finding], fixed: &[Fixed]) -> Result<(), Failure> {
    let worst = worst(findings);
    match args.output {
        Output::Json => print_json(&Report { worst, findings, fixed }),
        Output::Table => {
            if args.fix {
                cli::print(&print::fixed(fixed))?;
            }
            cli::print(&print::table(findings))
        }
    }
}

fn worst(findings: &[Finding]) -> Level {
    findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok)
}

fn verdict(findings: &[Finding], strict: bool) -> Result<(), Failure> {
    let bar = if strict { Level::Warn } else { Level::Fail };
    let bad: std::collections::BTreeSet<&str> = findings
        .iter()
        .filter(|finding| finding.level >= bar)
        .map(|finding| finding.check)
        .collect();
    if bad.is_empty() {
        return Ok(());
    }
    let bad: Vec<&str> = bad.into_iter().collect();
    Err(Failure::Failed(format!("look at: {}", bad.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_is_put_right_by_a_broken_configuration() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: DoctorArgs,
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("agent.toml");
        let text = b"ray_gruop = \"ray\"\n";
        raymtls_proto::durable::replace(&file, text, raymtls_proto::durable::Access::PUBLIC)
            .unwrap();
        let words = ["doctor", "--fix", "--config", file.to_str().unwrap()];
        let line = <Line as clap::Parser>::parse_from(words);
        let (config, broken) = config(&line.args);
        assert!(broken.is_some());
        let failure = examined(&line.args, &config.unwrap(), broken).await.unwrap_err();
        assert!(matches!(&failure, Failure::Config(why) if why.contains("ray_gruop")), "{failure}");
    }

    #[test]
    fn a_lock_that_a_daemon_has_is_seen() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let config = Config::in_process(path.clone(), folder.path().join("tls"));
        assert!(held(&config, false).is_none(), "no folder");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert!(held(&config, true).is_some() && !path.join("lock").exists());
        let daemons = held(&config, false);
        assert!(daemons.is_some());
        assert!(held(&config, false).is_none() && held(&config, true).is_none());
        drop(daemons);
        assert!(held(&config, true).is_some());
    }

    #[test]
    fn a_warning_costs_the_exit_code_where_that_is_asked_for_and_what_is_unknown_never() {
        let of = |level| [Finding::new("x", level, "", "")];
        for (level, strict, good) in [
            (Level::Ok, true, true),
            (Level::Unknown, true, true),
            (Level::Warn, false, true),
            (Level::Warn, true, false),
            (Level::Fail, false, false),
        ] {
            assert_eq!(verdict(&of(level), strict).is_ok(), good, "{level:?} {strict}");
        }
    }
}
