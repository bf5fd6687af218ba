//! The host: files and who may write them, room, ports the kernel gives away, isolation. Pure.

use super::super::{
    Finding, Level,
    facts::Facts,
    files::{Fault, Folder, Group, Which, faults},
};

/// Less room than this stops renewals soon: a key folder has some 10 KiB, what Sync brought some MiB.
const ROOM_LOW: u64 = 64 * 1024 * 1024;
/// With less than this the next renewal may fail.
const ROOM_NONE: u64 = 4 * 1024 * 1024;
/// So many more files must fit.
const FILES_LOW: u64 = 256;
/// So many faults of a folder are named.
const NAMED_MAX: usize = 5;

pub(super) fn files(facts: &Facts, group: Group) -> Vec<Finding> {
    let mut all = vec![
        folder(facts, "state_files", &facts.state, Which::State, group),
        folder(facts, "tls_files", &facts.tls, Which::Tls, group),
    ];
    all.push(match facts.exposed.as_slice() {
        [] => {
            Finding::ok("operator_files", "configuration and hooks are root's or the agent's alone")
        }
        exposed => Finding::new(
            "operator_files",
            Level::Fail,
            exposed.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join("; "),
            "whoever writes them commands the agent: `chown root`, `chmod go-w`",
        ),
    });
    all
}

fn folder(
    facts: &Facts,
    check: &'static str,
    seen: &Result<Folder, String>,
    which: Which,
    group: Group,
) -> Finding {
    let folder = match seen {
        Ok(folder) => folder,
        Err(why) => return Finding::unknown(check, why.as_str(), super::more_rights(facts)),
    };
    let wrong = faults(folder, which, group);
    let Some(worst) = wrong.iter().map(|fault| fault.level).max() else {
        let shown = folder.path.display();
        return Finding::ok(
            check,
            format!("owners, modes and links of {shown} are as they must be"),
        );
    };
    let named: Vec<String> =
        wrong.iter().take(NAMED_MAX).map(|fault| named(folder, fault)).collect();
    let more = wrong.len().saturating_sub(NAMED_MAX);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    let next = if wrong.iter().any(|fault| fault.change.is_some()) {
        "`node-agent doctor --fix --dry-run` says what it would do, `node-agent doctor --fix` does it"
    } else {
        "find out who put it there; then move it away, and restart the daemon"
    };
    Finding::new(check, worst, format!("{}{more}", named.join("; ")), next)
}

fn named(folder: &Folder, fault: &Fault) -> String {
    format!("{} {}", folder.path.join(&fault.name).display(), fault.what)
}

pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let mut all = vec![isolation(facts), reserved(facts)];
    all.extend(tunnel(facts));
    all.extend(facts.rooms.iter().map(|(path, room)| {
        let shown = path.display();
        let room = match room {
            Ok(room) => room,
            Err(why) => {
                return Finding::unknown(
                    "room",
                    format!("{shown}: {why}"),
                    super::more_rights(facts),
                );
            }
        };
        let next = "make room there: what cannot be written is not renewed; old files stay whole";
        if room.read_only {
            let what = format!("the file system of {shown} is mounted read-only");
            return Finding::new(
                "room",
                Level::Fail,
                what,
                "mount it for writing: nothing is renewed",
            );
        }
        let what = format!("{} MiB are left at {shown}", room.bytes / (1024 * 1024));
        if room.bytes < ROOM_NONE {
            return Finding::new("room", Level::Fail, what, next);
        }
        if room.counts_files && room.files < FILES_LOW {
            let what = format!("{} more files fit at {shown}", room.files);
            return Finding::new("room", Level::Warn, what, next);
        }
        if room.bytes < ROOM_LOW {
            return Finding::new("room", Level::Warn, what, next);
        }
        Finding::ok("room", what)
    }));
    all
}

/// Mode tunnel; nothing is said of it elsewhere.
fn tunnel(facts: &Facts) -> Option<Finding> {
    let tunnel = facts.agent.status()?.tunnel.as_ref()?;
    Some(match &tunnel.problem {
        Some(problem) => Finding::new(
            "tunnel",
            Level::Fail,
            format!("Ray is not started here: {problem}"),
            "`node-agent tunnel status`; docs/tunnel.md",
        ),
        None => Finding::ok(
            "tunnel",
            format!("it carries {} flows, and capture is proved", tunnel.flows),
        ),
    })
}

fn isolation(facts: &Facts) -> Finding {
    let Some(status) = facts.agent.status() else {
        return Finding::unknown("isolation", "only the daemon knows it", "start the daemon");
    };
    let isolation = &status.isolation;
    if let Some(problem) = &isolation.problem {
        return Finding::new(
            "isolation",
            Level::Fail,
            problem.as_str(),
            "`node-agent isolation show`; docs/isolation.md",
        );
    }
    let what = isolation.line(status.applied.as_deref(), facts.now);
    if isolation.in_force != isolation.wanted {
        let next = "it is loaded within seconds; if not, see `node-agent status`";
        return Finding::new("isolation", Level::Warn, what, next);
    }
    if isolation.wanted == "enforce" {
        return Finding::ok("isolation", what);
    }
    Finding::new(
        "isolation",
        Level::Warn,
        what,
        "a revoked node's leaf works on until it ends: `ca-admin cluster set CLUSTER isolation=enforce`, or \
         close Ray's ports by other means (docs/isolation.md)",
    )
}

fn reserved(facts: &Facts) -> Finding {
    match &facts.reserved {
        Ok(None) => {
            Finding::ok("reserved_ports", "the kernel gives no port of Ray to other programs")
        }
        Ok(Some(problem)) => Finding::new(
            "reserved_ports",
            Level::Warn,
            problem.as_str(),
            "the sysctl above, in a file of /etc/sysctl.d besides",
        ),
        Err(why) => Finding::unknown("reserved_ports", why.as_str(), super::more_rights(facts)),
    }
}
