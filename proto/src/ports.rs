//! Ray's ports: what listens where, who must reach it, and how Ray is told. One table; settings, the
//! flags of `ray start`, the firewall and the documents are made from it or checked against it.
//!
//! Flags and defaults are those of Ray 2.60.0. Port numbers live in a cluster's
//! [`PortPlan`](crate::v1::PortPlan); this file decides nothing about them but their names.

use std::ops::RangeInclusive;

use crate::v1;

/// A port, or a range of ports, of Ray.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Port {
    /// Global control store: gRPC.
    Gcs,
    /// Ray Client (`ray://`): gRPC.
    RayClient,
    /// Dashboard and Jobs API: HTTP, never TLS. For members too: each node's agent posts what its raylet
    /// reports (`/report_events`) to it, once every 30 s for as long as it gets no answer, and Ray's state
    /// commands ask it from any node. Whoever is a member runs code on the cluster anyhow; Ray's token is
    /// asked of him as of anybody.
    Dashboard,
    /// Autoscaler's metrics: HTTP, never TLS, no token.
    AutoscalerMetrics,
    /// Dashboard's metrics: HTTP, never TLS, no token.
    DashboardMetrics,
    /// Raylet: gRPC.
    NodeManager,
    /// Object transfer: gRPC.
    ObjectManager,
    /// Runtime environments: HTTP, for the raylet of the same host.
    RuntimeEnvAgent,
    /// Dashboard agent: gRPC.
    DashboardAgentGrpc,
    /// Dashboard agent: HTTP, never TLS, runs jobs.
    DashboardAgentHttp,
    /// The node's metrics: HTTP, never TLS, no token.
    MetricsExport,
    /// Workers and drivers: gRPC.
    Workers,
    /// NCCL, Gloo and their like: whatever they speak, never TLS.
    Collectives,
}

/// Which hosts have a listener on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// The head alone.
    Head,
    /// Each node.
    EachNode,
}

/// Who may open a connection to a port. The host itself always may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A member of the same cluster.
    Member,
    /// An address of the cluster's admin ranges.
    Admin,
    /// An address of the cluster's scraper ranges.
    Scraper,
    /// An enrolled driver, or an address of the cluster's driver ranges.
    Driver,
}

impl Caller {
    /// Each of them.
    pub const ALL: [Self; 4] = [Self::Member, Self::Admin, Self::Scraper, Self::Driver];
}

/// How Ray learns of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// A flag of `ray start`.
    Flag(&'static str),
    /// Two flags of `ray start`, for both ends of a range.
    Flags(&'static str, &'static str),
    /// A variable of the environment `ray start` runs in.
    Variable(&'static str),
    /// Not Ray, but the library that opens it, is told.
    Elsewhere,
}

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The port.
    pub port: Port,
    /// As settings name it.
    pub name: &'static str,
    /// Where it listens.
    pub on: On,
    /// Who may reach it from another host.
    pub callers: &'static [Caller],
    /// How Ray is told.
    pub told: Told,
    /// Whether Ray's own TLS covers it.
    pub tls: bool,
}

/// Every port of Ray.
pub const PORTS: [Row; 13] = {
    use Caller::{Admin, Driver, Member, Scraper};
    use On::{EachNode, Head};
    use Told::{Elsewhere, Flag, Flags, Variable};
    const fn row(
        port: Port,
        name: &'static str,
        on: On,
        callers: &'static [Caller],
        told: Told,
        tls: bool,
    ) -> Row {
        Row { port, name, on, callers, told, tls }
    }
    [
        row(Port::Gcs, "gcs", Head, &[Member], Flag("--port"), true),
        row(
            Port::RayClient,
            "ray_client",
            Head,
            &[Member, Admin, Driver],
            Flag("--ray-client-server-port"),
            true,
        ),
        row(Port::Dashboard, "dashboard", Head, &[Member, Admin], Flag("--dashboard-port"), false),
        row(
            Port::AutoscalerMetrics,
            "autoscaler_metrics",
            Head,
            &[Scraper],
            Variable("AUTOSCALER_METRIC_PORT"),
            false,
        ),
        row(
            Port::DashboardMetrics,
            "dashboard_metrics",
            Head,
            &[Scraper],
            Variable("DASHBOARD_METRIC_PORT"),
            false,
        ),
        row(
            Port::NodeManager,
            "node_manager",
            EachNode,
            &[Member],
            Flag("--node-manager-port"),
            true,
        ),
        row(
            Port::ObjectManager,
            "object_manager",
            EachNode,
            &[Member],
            Flag("--object-manager-port"),
            true,
        ),
        row(
            Port::RuntimeEnvAgent,
            "runtime_env_agent",
            EachNode,
            &[],
            Flag("--runtime-env-agent-port"),
            false,
        ),
        row(
            Port::DashboardAgentGrpc,
            "dashboard_agent_grpc",
            EachNode,
            &[Member],
            Flag("--dashboard-agent-grpc-port"),
            true,
        ),
        row(
            Port::DashboardAgentHttp,
            "dashboard_agent_http",
            EachNode,
            &[Member],
            Flag("--dashboard-agent-listen-port"),
            false,
        ),
        row(
            Port::MetricsExport,
            "metrics_export",
            EachNode,
            &[Scraper],
            Flag("--metrics-export-port"),
            false,
        ),
        row(
            Port::Workers,
            "worker",
            EachNode,
            &[Member],
            Flags("--min-worker-port", "--max-worker-port"),
            true,
        ),
        row(Port::Collectives, "collective", EachNode, &[Member], Elsewhere, false),
    ]
};

impl Port {
    /// Its line of the table.
    #[must_use]
    pub fn row(self) -> &'static Row {
        PORTS.iter().find(|row| row.port == self).expect("each port has a row")
    }

    /// Its numbers in a plan; none where the plan leaves it out.
    #[must_use]
    pub fn range(self, plan: &v1::PortPlan) -> Option<RangeInclusive<u16>> {
        let (min, max) = match self {
            Self::Gcs => (plan.gcs, plan.gcs),
            Self::RayClient => (plan.ray_client, plan.ray_client),
            Self::Dashboard => (plan.dashboard, plan.dashboard),
            Self::AutoscalerMetrics => (plan.autoscaler_metrics, plan.autoscaler_metrics),
            Self::DashboardMetrics => (plan.dashboard_metrics, plan.dashboard_metrics),
            Self::NodeManager => (plan.node_manager, plan.node_manager),
            Self::ObjectManager => (plan.object_manager, plan.object_manager),
            Self::RuntimeEnvAgent => (plan.runtime_env_agent, plan.runtime_env_agent),
            Self::DashboardAgentGrpc => (plan.dashboard_agent_grpc, plan.dashboard_agent_grpc),
            Self::DashboardAgentHttp => (plan.dashboard_agent_http, plan.dashboard_agent_http),
            Self::MetricsExport => (plan.metrics_export, plan.metrics_export),
            Self::Workers => (plan.worker_min, plan.worker_max),
            Self::Collectives => (plan.collective_min, plan.collective_max),
        };
        let (min, max) = (u16::try_from(min).ok()?, u16::try_from(max).ok()?);
        (min != 0 && min <= max).then_some(min..=max)
    }

    /// The place of a single port in a plan; a range has none.
    #[must_use]
    pub fn place(self, plan: &mut v1::PortPlan) -> Option<&mut u32> {
        match self {
            Self::Gcs => Some(&mut plan.gcs),
            Self::RayClient => Some(&mut plan.ray_client),
            Self::Dashboard => Some(&mut plan.dashboard),
            Self::AutoscalerMetrics => Some(&mut plan.autoscaler_metrics),
            Self::DashboardMetrics => Some(&mut plan.dashboard_metrics),
            Self::NodeManager => Some(&mut plan.node_manager),
            Self::ObjectManager => Some(&mut plan.object_manager),
            Self::RuntimeEnvAgent => Some(&mut plan.runtime_env_agent),
            Self::DashboardAgentGrpc => Some(&mut plan.dashboard_agent_grpc),
            Self::DashboardAgentHttp => Some(&mut plan.dashboard_agent_http),
            Self::MetricsExport => Some(&mut plan.metrics_export),
            Self::Workers | Self::Collectives => None,
        }
    }
}

/// The plan of a new cluster: the ports at which real clusters were tried, each fixed.
#[must_use]
pub fn default_plan() -> v1::PortPlan {
    v1::PortPlan {
        gcs: 6_379,
        ray_client: 10_001,
        dashboard: 8_265,
        node_manager: 6_701,
        object_manager: 6_702,
        runtime_env_agent: 6_703,
        dashboard_agent_grpc: 6_704,
        dashboard_agent_http: 6_705,
        metrics_export: 6_706,
        worker_min: 10_002,
        worker_max: 10_101,
        collective_min: 0,
        collective_max: 0,
        autoscaler_metrics: 44_217,
        dashboard_metrics: 44_227,
    }
}

/// Ports of other services that no plan may cover, with what listens there: where isolation is enforced,
/// they would be shut to whoever is no member, and the agent would stay without the setting that
/// opens them again.
pub const NEVER_GUARDED: [(RangeInclusive<u16>, &str); 9] = [
    (22..=22, "SSH"),
    (111..=111, "rpcbind"),
    (2_049..=2_049, "NFS"),
    (6_443..=6_443, "the API server of Kubernetes"),
    (6_817..=6_819, "Slurm"),
    (7_443..=7_447, "the CA"),
    (10_250..=10_250, "the kubelet"),
    (10_255..=10_257, "Kubernetes"),
    (10_259..=10_259, "Kubernetes"),
];

/// Ports below this one are for services that root starts.
pub const UNPRIVILEGED_MIN: u16 = 1_024;

/// From where Linux dials unless told otherwise: answers to a host's own calls, to the CA among them,
/// come to such ports.
pub const DIALLED_FROM: RangeInclusive<u16> = 32_768..=60_999;

/// What else is found in a range that a plan must leave alone: the first of [`NEVER_GUARDED`].
#[must_use]
pub fn never_guarded(
    range: &RangeInclusive<u16>,
) -> Option<&'static (RangeInclusive<u16>, &'static str)> {
    NEVER_GUARDED.iter().find(|(other, _)| overlap(range, other) > 0)
}

/// How many ports two ranges share.
#[must_use]
pub fn overlap(one: &RangeInclusive<u16>, other: &RangeInclusive<u16>) -> u32 {
    let (first, last) = (one.start().max(other.start()), one.end().min(other.end()));
    u32::from(*last).checked_sub(u32::from(*first)).map_or(0, |length| length + 1)
}

/// The ports a host of this role listens on, with who may reach them.
pub fn of_role(role: v1::Role, settings: &v1::Settings) -> impl Iterator<Item = &'static Row> {
    let ray_client = settings.ray_client;
    PORTS.iter().filter(move |row| match (role, row.on) {
        (v1::Role::Head, On::Head) => row.port != Port::RayClient || ray_client,
        (v1::Role::Head | v1::Role::Worker, On::EachNode) => true,
        (v1::Role::Worker, On::Head) | (v1::Role::Driver | v1::Role::Unspecified, _) => false,
    })
}

/// The flags with which `ray start` keeps to the plan.
#[must_use]
pub fn ray_start_flags(role: v1::Role, settings: &v1::Settings) -> Vec<String> {
    let plan = settings.port_plan.unwrap_or_default();
    of_role(role, settings)
        .filter_map(|row| Some((row, row.port.range(&plan)?)))
        .flat_map(|(row, range)| match row.told {
            Told::Flag(flag) => vec![format!("{flag}={}", range.start())],
            Told::Flags(min, max) => {
                vec![format!("{min}={}", range.start()), format!("{max}={}", range.end())]
            }
            Told::Variable(_) | Told::Elsewhere => Vec::new(),
        })
        .collect()
}

/// The variables with which Ray keeps to the plan where no flag exists.
#[must_use]
pub fn ray_variables(role: v1::Role, settings: &v1::Settings) -> Vec<(&'static str, u16)> {
    let plan = settings.port_plan.unwrap_or_default();
    of_role(role, settings)
        .filter_map(|row| match row.told {
            Told::Variable(name) => Some((name, *row.port.range(&plan)?.start())),
            Told::Flag(_) | Told::Flags(..) | Told::Elsewhere => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(ray_client: bool) -> v1::Settings {
        v1::Settings { port_plan: Some(default_plan()), ray_client, ..v1::Settings::default() }
    }

    #[test]
    fn each_port_has_one_row_and_one_name() {
        for (index, row) in PORTS.iter().enumerate() {
            assert_eq!(row.port.row().name, row.name);
            assert!(PORTS[..index].iter().all(|other| other.name != row.name), "{}", row.name);
        }
    }

    #[test]
    fn the_default_plan_leaves_other_services_alone() {
        for range in PORTS.iter().filter_map(|row| row.port.range(&default_plan())) {
            assert_eq!(never_guarded(&range), None, "{range:?}");
            assert!(*range.start() >= UNPRIVILEGED_MIN);
        }
        assert!(never_guarded(&(20..=30)).is_some_and(|(_, what)| *what == "SSH"));
        assert!(
            never_guarded(&(7_447..=7_447)).is_some() && never_guarded(&(7_448..=7_448)).is_none()
        );
    }

    #[test]
    fn an_overlap_counts_both_ends() {
        for (one, other, count) in [
            (1..=5, 5..=9, 1),
            (1..=4, 5..=9, 0),
            (5..=9, 1..=4, 0),
            (1..=9, 3..=4, 2),
            (0..=u16::MAX, 0..=u16::MAX, 65_536),
        ] {
            assert_eq!(overlap(&one, &other), count, "{one:?} {other:?}");
        }
    }

    #[test]
    fn no_two_ports_of_the_default_plan_overlap() {
        let plan = default_plan();
        let ranges: Vec<_> = PORTS.iter().filter_map(|row| row.port.range(&plan)).collect();
        assert_eq!(ranges.len(), 12, "all but the collectives");
        for (index, range) in ranges.iter().enumerate() {
            for other in &ranges[..index] {
                assert!(range.end() < other.start() || other.end() < range.start(), "{range:?}");
            }
        }
    }

    #[test]
    fn a_place_is_what_the_range_reads() {
        for row in &PORTS {
            let mut plan = default_plan();
            let Some(place) = row.port.place(&mut plan) else { continue };
            *place = 7_000;
            assert_eq!(row.port.range(&plan), Some(7_000..=7_000), "{}", row.name);
        }
    }

    #[test]
    fn a_port_that_runs_code_without_tls_is_open_to_no_scraper_and_no_driver() {
        for port in [Port::Dashboard, Port::DashboardAgentHttp, Port::RuntimeEnvAgent] {
            let callers = port.row().callers;
            assert!(!callers.contains(&Caller::Scraper) && !callers.contains(&Caller::Driver));
        }
    }

    #[test]
    fn the_flags_are_those_a_role_needs() {
        assert_eq!(
            ray_start_flags(v1::Role::Worker, &settings(true)),
            [
                "--node-manager-port=6701",
                "--object-manager-port=6702",
                "--runtime-env-agent-port=6703",
                "--dashboard-agent-grpc-port=6704",
                "--dashboard-agent-listen-port=6705",
                "--metrics-export-port=6706",
                "--min-worker-port=10002",
                "--max-worker-port=10101",
            ]
        );
        let head = ray_start_flags(v1::Role::Head, &settings(false));
        assert_eq!(head[..2], ["--port=6379", "--dashboard-port=8265"]);
        let head = ray_start_flags(v1::Role::Head, &settings(true));
        assert!(head.contains(&"--ray-client-server-port=10001".to_owned()));
        assert!(ray_start_flags(v1::Role::Driver, &settings(true)).is_empty());
        assert_eq!(
            ray_variables(v1::Role::Head, &settings(false)),
            [("AUTOSCALER_METRIC_PORT", 44_217), ("DASHBOARD_METRIC_PORT", 44_227)]
        );
    }
}
