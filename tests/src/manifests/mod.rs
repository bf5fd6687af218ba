//! The committed files of `scripts/isolation/` and the tables of `docs/isolation.md`, made from Ray's
//! port table. The test here fails when a file says something else than the table does;
//! `UPDATE_SNAPSHOT=1 cargo test -p raymtls-tests --lib manifests` writes them anew.

mod aws;
mod kubernetes;
#[cfg(test)]
mod nftables;
mod table;

use raymtls_proto::{
    ports::{self, Caller, On, PORTS, Row},
    v1,
};

/// The two clusters the manifests are for, side by side.
pub const CLUSTERS: [&str; 2] = ["team-a", "team-b"];
/// Where nodes reach the CA: enrollment, then everything else.
pub const CA_PORTS: [u16; 2] = [7_443, 7_444];

/// The plan of a second cluster whose nodes share hosts with the first: no number in common.
#[must_use]
pub fn second_plan() -> v1::PortPlan {
    v1::PortPlan {
        gcs: 7_379,
        ray_client: 11_001,
        dashboard: 9_265,
        node_manager: 7_701,
        object_manager: 7_702,
        runtime_env_agent: 7_703,
        dashboard_agent_grpc: 7_704,
        dashboard_agent_http: 7_705,
        metrics_export: 7_706,
        worker_min: 11_002,
        worker_max: 11_101,
        collective_min: 21_000,
        collective_max: 21_100,
        autoscaler_metrics: 45_217,
        dashboard_metrics: 45_227,
    }
}

/// Each file, by its path in the repository.
#[must_use]
pub fn files() -> Vec<(String, String)> {
    let plan = ports::default_plan();
    let mut files = vec![
        ("scripts/isolation/ports/default.tsv".to_owned(), table::tsv(&plan)),
        ("scripts/isolation/ports/second.tsv".to_owned(), table::tsv(&second_plan())),
        ("scripts/isolation/kubernetes/ca.yaml".to_owned(), kubernetes::ca(&CLUSTERS)),
        ("scripts/isolation/aws/cloudformation.yaml".to_owned(), aws::template(&CLUSTERS, &plan)),
    ];
    files.extend(CLUSTERS.map(|cluster| {
        let path = format!("scripts/isolation/kubernetes/{cluster}.yaml");
        (path, kubernetes::cluster(cluster, &plan))
    }));
    files
}

/// The table of `docs/isolation.md`, as Markdown.
#[must_use]
pub fn docs_table() -> String {
    table::markdown(&ports::default_plan(), &second_plan())
}

/// What no plan may cover, as `scripts/isolation/nftables.sh` has it.
#[must_use]
pub fn never_guarded() -> String {
    table::never_guarded()
}

/// What a caller may reach on hosts of one kind.
fn reachable(on: On, caller: Caller) -> impl Iterator<Item = &'static Row> {
    PORTS.iter().filter(move |row| row.on == on && row.callers.contains(&caller))
}

fn caller_name(caller: Caller) -> &'static str {
    match caller {
        Caller::Member => "member",
        Caller::Admin => "admin",
        Caller::Scraper => "scraper",
        Caller::Driver => "driver",
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    /// Between two marks of each file: what is made from the port table.
    fn parts() -> [(&'static str, [&'static str; 2], String); 2] {
        let table = ["<!-- ports: made from the port table -->\n", "<!-- /ports -->\n"];
        let never = ["# never guarded: made from the port table\n", "# /never guarded\n"];
        [
            ("docs/isolation.md", table, docs_table()),
            ("scripts/isolation/nftables.sh", never, never_guarded()),
        ]
    }

    fn path(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(name)
    }

    /// Compares with what is committed, or writes it.
    #[track_caller]
    fn agree(name: &str, wanted: &str) {
        if std::env::var_os("UPDATE_SNAPSHOT").is_some() {
            std::fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            #[allow(clippy::disallowed_methods, reason = "a file of the source tree, by hand")]
            std::fs::write(path(name), wanted).unwrap();
        }
        let committed = std::fs::read_to_string(path(name)).unwrap_or_default();
        assert_eq!(committed, wanted, "{name}: UPDATE_SNAPSHOT=1 rewrites it");
    }

    #[test]
    fn the_files_say_what_the_port_table_says() {
        for (name, wanted) in files() {
            agree(&name, &wanted);
        }
    }

    #[test]
    fn the_parts_say_what_the_port_table_says() {
        for (name, [begin, end], wanted) in parts() {
            let text = std::fs::read_to_string(path(name)).unwrap();
            let (before, rest) = text.split_once(begin).expect("the mark before it");
            let (_, after) = rest.split_once(end).expect("the mark after it");
            agree(name, &format!("{before}{begin}{wanted}{end}{after}"));
        }
    }

    #[test]
    fn the_two_plans_share_no_port() {
        let (first, second) = (ports::default_plan(), second_plan());
        for one in PORTS.iter().filter_map(|row| row.port.range(&first)) {
            for other in PORTS.iter().filter_map(|row| row.port.range(&second)) {
                assert!(
                    one.end() < other.start() || other.end() < one.start(),
                    "{one:?} {other:?}"
                );
            }
        }
    }
}
