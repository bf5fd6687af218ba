//! A cluster's settings as they are shown, and what differs between two of them.

use raymtls_proto::v1;
use serde::Serialize;

use super::{duration, moment::Moment, output};

/// Settings, named as `cluster set` names them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct SettingsView {
    leaf_life_seconds: i64,
    max_job_seconds: i64,
    ends: Moment,
    mode: &'static str,
    isolation: &'static str,
    lease_seconds: i64,
    ray_token: bool,
    ray_client: bool,
    admin_ranges: Vec<String>,
    scraper_ranges: Vec<String>,
    driver_ranges: Vec<String>,
    ports: PortsView,
}

/// Ports of the plan; a range has both ends, or none.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct PortsView {
    gcs: u32,
    ray_client: u32,
    dashboard: u32,
    node_manager: u32,
    object_manager: u32,
    runtime_env_agent: u32,
    dashboard_agent_grpc: u32,
    dashboard_agent_http: u32,
    metrics_export: u32,
    worker_min: u32,
    worker_max: u32,
    collective_min: Option<u32>,
    collective_max: Option<u32>,
}

impl SettingsView {
    /// What a message says; what it does not say reads as zero or unknown.
    pub(super) fn new(settings: Option<&v1::Settings>) -> Self {
        let settings = settings.cloned().unwrap_or_default();
        Self {
            leaf_life_seconds: settings.leaf_life_seconds,
            max_job_seconds: settings.max_job_seconds,
            ends: Moment::from_unix(settings.ends_unix),
            mode: mode(settings.mode),
            isolation: isolation(settings.isolation),
            lease_seconds: settings.lease_seconds,
            ray_token: settings.ray_token,
            ray_client: settings.ray_client,
            ports: PortsView::new(&settings.port_plan.unwrap_or_default()),
            admin_ranges: settings.admin_ranges,
            scraper_ranges: settings.scraper_ranges,
            driver_ranges: settings.driver_ranges,
        }
    }

    pub(super) fn mode(&self) -> &'static str {
        self.mode
    }

    pub(super) fn isolation(&self) -> &'static str {
        self.isolation
    }

    pub(super) fn leaf_life(&self) -> String {
        life(self.leaf_life_seconds)
    }

    /// Each setting's key and value, for people.
    pub(super) fn lines(&self, now: time::OffsetDateTime) -> Vec<(&'static str, String)> {
        let ports = &self.ports;
        vec![
            ("leaf-life", self.leaf_life()),
            ("max-job", life(self.max_job_seconds)),
            ("ends", self.ends.human(now)),
            ("mode", self.mode.to_owned()),
            ("isolation", self.isolation.to_owned()),
            ("lease", life(self.lease_seconds)),
            ("ray-token", on_off(self.ray_token)),
            ("ray-client", on_off(self.ray_client)),
            ("admin-ranges", list(&self.admin_ranges)),
            ("scraper-ranges", list(&self.scraper_ranges)),
            ("driver-ranges", list(&self.driver_ranges)),
            ("port.gcs", ports.gcs.to_string()),
            ("port.ray_client", ports.ray_client.to_string()),
            ("port.dashboard", ports.dashboard.to_string()),
            ("port.node_manager", ports.node_manager.to_string()),
            ("port.object_manager", ports.object_manager.to_string()),
            ("port.runtime_env_agent", ports.runtime_env_agent.to_string()),
            ("port.dashboard_agent_grpc", ports.dashboard_agent_grpc.to_string()),
            ("port.dashboard_agent_http", ports.dashboard_agent_http.to_string()),
            ("port.metrics_export", ports.metrics_export.to_string()),
            ("port.worker_min", ports.worker_min.to_string()),
            ("port.worker_max", ports.worker_max.to_string()),
            ("collective-ports", ports.collectives()),
        ]
    }

    /// One line for each setting that is another in `after`.
    pub(super) fn differences(&self, after: &Self, now: time::OffsetDateTime) -> Vec<String> {
        let before = self.lines(now);
        let after = after.lines(now);
        before
            .iter()
            .zip(&after)
            .filter(|(old, new)| old.1 != new.1)
            .map(|(old, new)| format!("  {}: {} -> {}", old.0, old.1, new.1))
            .collect()
    }
}

impl PortsView {
    fn new(plan: &v1::PortPlan) -> Self {
        let some = |port: u32| (port != 0).then_some(port);
        Self {
            gcs: plan.gcs,
            ray_client: plan.ray_client,
            dashboard: plan.dashboard,
            node_manager: plan.node_manager,
            object_manager: plan.object_manager,
            runtime_env_agent: plan.runtime_env_agent,
            dashboard_agent_grpc: plan.dashboard_agent_grpc,
            dashboard_agent_http: plan.dashboard_agent_http,
            metrics_export: plan.metrics_export,
            worker_min: plan.worker_min,
            worker_max: plan.worker_max,
            collective_min: some(plan.collective_min),
            collective_max: some(plan.collective_max),
        }
    }

    fn collectives(&self) -> String {
        match (self.collective_min, self.collective_max) {
            (Some(min), Some(max)) => format!("{min}-{max}"),
            (None, _) | (_, None) => "none".to_owned(),
        }
    }
}

fn mode(mode: i32) -> &'static str {
    match v1::Mode::try_from(mode) {
        Ok(v1::Mode::Files) => "files",
        Ok(v1::Mode::Tunnel) => "tunnel",
        Ok(v1::Mode::Unspecified) | Err(_) => "unknown",
    }
}

fn isolation(isolation: i32) -> &'static str {
    match v1::Isolation::try_from(isolation) {
        Ok(v1::Isolation::Off) => "off",
        Ok(v1::Isolation::Audit) => "audit",
        Ok(v1::Isolation::Enforce) => "enforce",
        Ok(v1::Isolation::Unspecified) | Err(_) => "unknown",
    }
}

fn life(seconds: i64) -> String {
    if seconds == 0 { "-".to_owned() } else { duration::human_seconds(seconds) }
}

fn on_off(is: bool) -> String {
    if is { "on" } else { "off" }.to_owned()
}

fn list(ranges: &[String]) -> String {
    output::or_dash(&ranges.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_said() {
        let now = raymtls_proto::clock::from_unix(1_764_000_000).unwrap();
        let before = v1::Settings {
            leaf_life_seconds: 40 * 86_400,
            ray_token: true,
            port_plan: Some(v1::PortPlan { gcs: 6379, ..Default::default() }),
            ..Default::default()
        };
        let mut after = before.clone();
        after.leaf_life_seconds = 60 * 86_400;
        after.port_plan = Some(v1::PortPlan { gcs: 6380, ..Default::default() });
        let [before, after] = [before, after].map(|s| SettingsView::new(Some(&s)));
        assert_eq!(
            before.differences(&after, now),
            ["  leaf-life: 40d -> 60d", "  port.gcs: 6379 -> 6380"]
        );
        assert!(before.differences(&before, now).is_empty());
    }

    #[test]
    fn a_range_has_both_ends_or_none() {
        assert_eq!(PortsView::new(&v1::PortPlan::default()).collectives(), "none");
        let plan =
            v1::PortPlan { collective_min: 20_000, collective_max: 20_100, ..Default::default() };
        assert_eq!(PortsView::new(&plan).collectives(), "20000-20100");
    }
}
