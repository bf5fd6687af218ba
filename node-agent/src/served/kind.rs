//! What a process says it is: Ray's kinds by command line, title and program file. A claim: a task
//! sets its own title. What it serves is judged by the certificate, never by the kind. Pure.

use raymtls_proto::ports::Port;
use serde::{Deserialize, Serialize};

/// A kind of process that listens for Ray, in the order in which they are asked what they serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The head's global control store.
    GcsServer,
    /// The node's raylet.
    Raylet,
    /// Takes Ray Client connections.
    RayClientServer,
    /// Runs the jobs and metrics of a node.
    DashboardAgent,
    /// Prepares runtime environments.
    RuntimeEnvAgent,
    /// The head's dashboard, and its modules.
    Dashboard,
    /// The head's autoscaler.
    Monitor,
    /// Ships logs.
    LogMonitor,
    /// A program that uses the cluster.
    Driver,
    /// The driver of one Ray Client connection, on the head.
    RayClientDriver,
    /// Runs tasks or an actor.
    Worker,
    /// Listens on a port of the cluster's plan, and is nothing of the above or cannot be seen.
    Other,
}

/// Whether a process can be recycled by whoever looks after the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// A process of the node: it goes with `ray stop`.
    Node,
    /// A user's program: only its owner can start it again.
    Driver,
}

impl Kind {
    /// The word in tables and metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::GcsServer => "gcs_server",
            Self::Raylet => "raylet",
            Self::RayClientServer => "ray_client_server",
            Self::DashboardAgent => "dashboard_agent",
            Self::RuntimeEnvAgent => "runtime_env_agent",
            Self::Dashboard => "dashboard",
            Self::Monitor => "monitor",
            Self::LogMonitor => "log_monitor",
            Self::Driver => "driver",
            Self::RayClientDriver => "ray_client_driver",
            Self::Worker => "worker",
            Self::Other => "other",
        }
    }

    /// Its class.
    #[must_use]
    pub fn class(self) -> Class {
        match self {
            Self::Driver | Self::RayClientDriver => Class::Driver,
            Self::GcsServer
            | Self::Raylet
            | Self::RayClientServer
            | Self::DashboardAgent
            | Self::RuntimeEnvAgent
            | Self::Dashboard
            | Self::Monitor
            | Self::LogMonitor
            | Self::Worker
            | Self::Other => Class::Node,
        }
    }

    /// Whether Ray serves plain HTTP from such a process on this port of the plan (`None`: on a port
    /// outside it). Such a socket is not asked: a TLS greeting would be an error in Ray's log.
    #[must_use]
    pub fn is_plain_on(self, port: Option<Port>) -> bool {
        match self {
            // These have HTTP ports alone.
            Self::Dashboard | Self::RuntimeEnvAgent | Self::Monitor => true,
            Self::DashboardAgent => {
                matches!(port, Some(Port::DashboardAgentHttp | Port::MetricsExport))
            }
            Self::GcsServer
            | Self::Raylet
            | Self::RayClientServer
            | Self::LogMonitor
            | Self::Driver
            | Self::RayClientDriver
            | Self::Worker
            | Self::Other => false,
        }
    }
}

/// What a command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The kind; `None`: no process of Ray's own. A driver does not say so: it has Ray's library.
    pub kind: Option<Kind>,
    /// What to call it: the title or the program, printable and short.
    pub name: String,
    /// The session, where the command line names it.
    pub session: Option<String>,
}

/// Longest name shown, in characters: a title is whatever a task makes of it.
const NAME_LEN_MAX: usize = 160;
/// A script is one of the first arguments; what follows are its own.
const SCRIPT_AMONG: usize = 4;

/// Reads `/proc/PID/cmdline` (arguments that end with a NUL), and the program file's name where it
/// could be seen.
#[must_use]
pub fn claim(cmdline: &[u8], exe_name: Option<&str>) -> Claim {
    let text = String::from_utf8_lossy(cmdline);
    let arguments: Vec<&str> =
        text.split('\0').map(str::trim_end).filter(|argument| !argument.is_empty()).collect();
    let first = arguments.first().copied().unwrap_or_default();
    let kind = by_title(first)
        .or_else(|| by_program(base(first), exe_name))
        .or_else(|| by_script(&arguments));
    Claim { kind, name: name(&arguments), session: session(&arguments) }
}

/// Titles that Ray's Python processes give themselves.
fn by_title(title: &str) -> Option<Kind> {
    if title.starts_with("ray-dashboard-") {
        return Some(Kind::Dashboard);
    }
    match title.strip_prefix("ray::")? {
        "DashboardAgent" => Some(Kind::DashboardAgent),
        "RuntimeEnvAgent" => Some(Kind::RuntimeEnvAgent),
        _ => Some(Kind::Worker),
    }
}

/// The C++ programs. A task that takes their name is still the interpreter it runs in.
fn by_program(program: &str, exe_name: Option<&str>) -> Option<Kind> {
    let kind = match program {
        "gcs_server" => Kind::GcsServer,
        "raylet" => Kind::Raylet,
        _ => return None,
    };
    exe_name.is_none_or(|exe| exe == program).then_some(kind)
}

/// Python programs that keep their command line.
fn by_script(arguments: &[&str]) -> Option<Kind> {
    let head = &arguments[..arguments.len().min(SCRIPT_AMONG)];
    let runs = |end: &str| head.iter().any(|argument| argument.ends_with(end));
    if head.contains(&"ray.util.client.server") {
        let specific = arguments.contains(&"--mode=specific-server");
        return Some(if specific { Kind::RayClientDriver } else { Kind::RayClientServer });
    }
    [
        ("/ray/dashboard/dashboard.py", Kind::Dashboard),
        ("/ray/dashboard/agent.py", Kind::DashboardAgent),
        ("/ray/_private/runtime_env/agent/main.py", Kind::RuntimeEnvAgent),
        ("/ray/_private/log_monitor.py", Kind::LogMonitor),
        ("/ray/autoscaler/_private/monitor.py", Kind::Monitor),
        ("/ray/autoscaler/v2/monitor.py", Kind::Monitor),
        ("/ray/_private/workers/default_worker.py", Kind::Worker),
    ]
    .into_iter()
    .find_map(|(end, kind)| runs(end).then_some(kind))
}

/// A title as it stands; else the program and the script it runs.
fn name(arguments: &[&str]) -> String {
    let Some((first, rest)) = arguments.split_first() else { return String::new() };
    if by_title(first).is_some() {
        return printable(first);
    }
    let script = rest.iter().take(SCRIPT_AMONG).find(|argument| !argument.starts_with('-'));
    let script = script.map(|script| format!(" {}", base(script))).unwrap_or_default();
    printable(&format!("{}{script}", base(first)))
}

fn session(arguments: &[&str]) -> Option<String> {
    let value = |flag: &str| arguments.iter().find_map(|argument| argument.strip_prefix(flag));
    let by_folder =
        || ["--session-dir=", "--session_dir=", "--ray_session_dir="].into_iter().find_map(value);
    let name = value("--session-name=").or_else(|| Some(base(by_folder()?)))?;
    name.starts_with("session_").then(|| printable(name))
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Short, and without anything a terminal would act on.
pub(crate) fn printable(text: &str) -> String {
    text.chars().take(NAME_LEN_MAX).flat_map(char::escape_debug).take(2 * NAME_LEN_MAX).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Command lines of Ray 2.60.0, shortened.
    #[test]
    fn each_process_of_ray_is_known_by_its_command_line() {
        let site = "/v/lib/python3.11/site-packages/ray";
        let python = "/v/bin/python";
        let rows: [(&[&str], Option<Kind>, Option<&str>); 16] = [
            (
                &["/r/core/src/ray/gcs/gcs_server", "--x", "--session-name=session_1"],
                Some(Kind::GcsServer),
                Some("session_1"),
            ),
            (
                &["/r/raylet/raylet", "--session-dir=/t/session_2"],
                Some(Kind::Raylet),
                Some("session_2"),
            ),
            (&["ray::IDLE", "", ""], Some(Kind::Worker), None),
            (&["ray::Counter.add"], Some(Kind::Worker), None),
            (&["ray::DashboardAgent"], Some(Kind::DashboardAgent), None),
            (&["ray::RuntimeEnvAgent"], Some(Kind::RuntimeEnvAgent), None),
            (&["ray-dashboard-JobHead-0 (/v/bin/python ...)"], Some(Kind::Dashboard), None),
            (
                &[python, &format!("{site}/dashboard/dashboard.py"), "--session-dir=/t/session_3"],
                Some(Kind::Dashboard),
                Some("session_3"),
            ),
            (
                &[python, "-u", &format!("{site}/dashboard/agent.py")],
                Some(Kind::DashboardAgent),
                None,
            ),
            (
                &[python, "-u", &format!("{site}/_private/log_monitor.py")],
                Some(Kind::LogMonitor),
                None,
            ),
            (
                &[python, "-u", &format!("{site}/autoscaler/_private/monitor.py")],
                Some(Kind::Monitor),
                None,
            ),
            (
                &[python, "-m", "ray.util.client.server", "--mode=proxy"],
                Some(Kind::RayClientServer),
                None,
            ),
            (
                &[python, "-m", "ray.util.client.server", "--mode=specific-server"],
                Some(Kind::RayClientDriver),
                None,
            ),
            (&[python, "train.py", "--session-dir=/etc"], None, None),
            (&["/usr/sbin/sshd", "-D"], None, None),
            (&[], None, None),
        ];
        for (arguments, kind, session) in rows {
            let said = claim(arguments.join("\0").as_bytes(), None);
            assert_eq!(said.kind, kind, "{arguments:?}");
            assert_eq!(said.session.as_deref(), session, "{arguments:?}");
        }
    }

    #[test]
    fn a_task_that_names_itself_gcs_server_is_not_one() {
        let line = b"gcs_server\0--session-name=session_1\0";
        assert_eq!(claim(line, Some("python3.11")).kind, None);
        assert_eq!(claim(line, Some("gcs_server")).kind, Some(Kind::GcsServer));
    }

    #[test]
    fn a_title_cannot_speak_to_a_terminal_or_fill_a_page() {
        let said = claim(format!("ray::\x1b[2J{}", "x".repeat(9_999)).as_bytes(), None);
        assert!(said.name.starts_with("ray::\\u{1b}[2J"), "{}", said.name);
        assert!(said.name.len() <= 2 * NAME_LEN_MAX && said.name.is_ascii());
    }

    #[test]
    fn the_http_ports_of_the_table_are_plain_in_the_process_that_has_them() {
        assert!(Kind::Dashboard.is_plain_on(Some(Port::Dashboard)));
        assert!(Kind::DashboardAgent.is_plain_on(Some(Port::DashboardAgentHttp)));
        assert!(!Kind::DashboardAgent.is_plain_on(Some(Port::DashboardAgentGrpc)));
        assert!(!Kind::DashboardAgent.is_plain_on(None));
        // Whatever holds Ray's HTTP port and is not Ray is asked.
        assert!(!Kind::Other.is_plain_on(Some(Port::Dashboard)));
        assert!(!Kind::Worker.is_plain_on(Some(Port::Dashboard)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_command_line_is_read_and_shown_within_bounds(
            cmdline in proptest::collection::vec(any::<u8>(), 0..2_000),
            title in "(ray::)?.{0,400}",
        ) {
            for bytes in [&cmdline[..], title.as_bytes()] {
                let said = claim(bytes, None);
                prop_assert!(said.name.chars().count() <= 2 * NAME_LEN_MAX);
                prop_assert!(!said.name.chars().any(char::is_control), "{:?}", said.name);
            }
        }
    }
}
