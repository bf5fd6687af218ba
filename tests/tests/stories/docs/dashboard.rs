//! The Grafana dashboard: what its panels ask for is answered by the programs, and each says what it shows
//! and in which unit. Whether its expressions parse is for promtool (`scripts/check alerts`).

use std::collections::BTreeSet;

use serde_json::Value;

use super::read;

const DASHBOARD: &str = "deploy/grafana/ray-mtls.json";

fn panels() -> Vec<Value> {
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD.as_ref())).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let panels: Vec<Value> = panels.filter(|panel| panel["type"] != "row").cloned().collect();
    assert!(panels.len() >= 12, "only {} panels: are they still read?", panels.len());
    panels
}

#[test]
fn a_metric_of_the_dashboard_exists_with_its_labels() {
    let metrics = read("docs/metrics.md".as_ref());
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for panel in panels() {
        for target in panel["targets"].as_array().unwrap() {
            let expression = target["expr"].as_str().unwrap();
            let words: BTreeSet<_> = expression.split(|c| !is_part(c)).collect();
            let named: Vec<_> = words.iter().filter(|word| word.starts_with("raymtls_")).collect();
            assert!(!named.is_empty(), "{expression}");
            for name in named {
                let name = name.strip_suffix("_total").unwrap_or(name);
                let row = metrics.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
                let row = row.unwrap_or_else(|| panic!("no metric {name}"));
                let legend = target["legendFormat"].as_str().unwrap();
                let labels =
                    legend.split("{{").skip(1).map(|rest| rest.split("}}").next().unwrap());
                for label in labels.filter(|label| *label != "instance") {
                    assert!(row.contains(label), "{name} has no label {label}: {row}");
                }
            }
        }
    }
}

#[test]
fn each_panel_says_what_it_shows_and_in_which_unit() {
    for panel in panels() {
        let title = panel["title"].as_str().unwrap();
        let has = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
        assert!(has(&panel["description"]), "{title} has no description");
        assert!(has(&panel["fieldConfig"]["defaults"]["unit"]), "{title} has no unit");
    }
}
