//! A cluster's settings as they are shown, and what differs between two of them.

use std::collections::BTreeMap;

use raymtls_proto::{
    ports::{PORTS, Port},
    v1,
};
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
    trust_ranges: bool,
    revoked_keeps_ray: bool,
    /// What leaves live in mode tunnel, and the grace; zero and none where the defaults hold.
    tunnel_leaf_life_seconds: i64,
    tunnel_grace_seconds: Option<i64>,
    admin_ranges: Vec<String>,
    scraper_ranges: Vec<String>,
    driver_ranges: Vec<String>,
    ports: BTreeMap<String, Option<u16>>,
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
            trust_ranges: settings.trust_ranges,
            revoked_keeps_ray: settings.revoked_keeps_ray,
            tunnel_leaf_life_seconds: settings.tunnel_leaf_life_seconds,
            tunnel_grace_seconds: settings.tunnel_grace_seconds,
            ports: ports_view(&settings.port_plan.unwrap_or_default()),
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
    pub(super) fn lines(&self, now: time::OffsetDateTime) -> Vec<(String, String)> {
        let lines = [
            ("leaf-life", self.leaf_life()),
            ("max-job", life(self.max_job_seconds)),
            ("ends", self.ends.human(now)),
            ("mode", self.mode.to_owned()),
            ("isolation", self.isolation.to_owned()),
            ("lease", life(self.lease_seconds)),
            ("ray-token", on_off(self.ray_token)),
            ("ray-client", on_off(self.ray_client)),
            ("trust-ranges", on_off(self.trust_ranges)),
            ("revoked-keeps-ray", on_off(self.revoked_keeps_ray)),
            (
                "leaf-life in mode tunnel",
                match self.tunnel_leaf_life_seconds {
                    0 => default(),
                    life => duration::human_seconds(life),
                },
            ),
            (
                "tunnel-grace",
                self.tunnel_grace_seconds.map_or_else(default, duration::human_seconds),
            ),
            ("admin-ranges", list(&self.admin_ranges)),
            ("scraper-ranges", list(&self.scraper_ranges)),
            ("driver-ranges", list(&self.driver_ranges)),
        ];
        let lines = lines.into_iter().map(|(key, value)| (key.to_owned(), value));
        lines.chain(self.ports()).collect()
    }

    fn ports(&self) -> impl Iterator<Item = (String, String)> {
        let port = |name: &str| self.ports.get(name).copied().flatten();
        PORTS.iter().flat_map(move |row| match row.port {
            Port::Workers => ["min", "max"]
                .map(|end| format!("worker_{end}"))
                .map(|name| (format!("port.{name}"), port_text(port(&name))))
                .to_vec(),
            Port::Collectives => {
                let value = match (port("collective_min"), port("collective_max")) {
                    (Some(min), Some(max)) => format!("{min}-{max}"),
                    (None, _) | (_, None) => "none".to_owned(),
                };
                vec![("collective-ports".to_owned(), value)]
            }
            Port::Gcs
            | Port::RayClient
            | Port::Dashboard
            | Port::AutoscalerMetrics
            | Port::DashboardMetrics
            | Port::NodeManager
            | Port::ObjectManager
            | Port::RuntimeEnvAgent
            | Port::DashboardAgentGrpc
            | Port::DashboardAgentHttp
            | Port::MetricsExport => {
                vec![(format!("port.{}", row.name), port_text(port(row.name)))]
            }
        })
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

/// Ports of the plan by the names settings have for them; a range has both ends, or none.
fn ports_view(plan: &v1::PortPlan) -> BTreeMap<String, Option<u16>> {
    PORTS
        .iter()
        .flat_map(|row| {
            let range = row.port.range(plan);
            let (min, max) = (range.as_ref().map(|r| *r.start()), range.map(|r| *r.end()));
            match row.port.place(&mut plan.clone()) {
                Some(_) => vec![(row.name.to_owned(), min)],
                None => {
                    vec![(format!("{}_min", row.name), min), (format!("{}_max", row.name), max)]
                }
            }
        })
        .collect()
}

fn port_text(port: Option<u16>) -> String {
    port.map_or_else(|| "none".to_owned(), |port| port.to_string())
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

fn default() -> String {
    "default".to_owned()
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
        let line = |plan: v1::PortPlan| {
            let settings = v1::Settings { port_plan: Some(plan), ..Default::default() };
            let lines = SettingsView::new(Some(&settings)).lines(time::OffsetDateTime::UNIX_EPOCH);
            lines.into_iter().find(|(key, _)| key == "collective-ports").unwrap().1
        };
        assert_eq!(line(v1::PortPlan::default()), "none");
        let plan =
            v1::PortPlan { collective_min: 20_000, collective_max: 20_100, ..Default::default() };
        assert_eq!(line(plan), "20000-20100");
    }

    #[test]
    fn each_port_is_shown_as_it_is_set() {
        let plan = raymtls_proto::ports::default_plan();
        let settings = v1::Settings { port_plan: Some(plan), ..Default::default() };
        let view = SettingsView::new(Some(&settings));
        assert_eq!(view.ports["dashboard_metrics"], Some(44_227));
        assert_eq!(view.ports["worker_max"], Some(10_101));
        assert_eq!(view.ports["collective_max"], None);
        let lines = view.lines(time::OffsetDateTime::UNIX_EPOCH);
        assert!(lines.contains(&("port.worker_min".to_owned(), "10002".to_owned())), "{lines:?}");
    }
}
