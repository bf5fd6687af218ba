//! The alert rules and their runbook: each alert leads to a section that is there, each section belongs
//! to an alert, the metrics exist, and each alert has a case in which it fires and one in which it does
//! not. Whether the cases hold is for promtool (`scripts/check alerts`).

use std::collections::BTreeSet;

use super::read;

const RULES: &str = "deploy/alerts/ray-mtls.rules.yaml";
const CASES: &str = "deploy/alerts/ray-mtls.test.yaml";
const RUNBOOK: &str = "docs/runbook.md";

/// Words after `key: ` at the beginning of a line, but for a dash and spaces.
fn values<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    let lines = text.lines().map(|line| line.trim_start().trim_start_matches("- "));
    lines.filter_map(|line| line.strip_prefix(key)?.strip_prefix(": ")).collect()
}

#[test]
fn each_alert_leads_to_its_section_of_the_runbook() {
    let (rules, runbook) = (read(RULES.as_ref()), read(RUNBOOK.as_ref()));
    let alerts = values(&rules, "alert");
    assert!(alerts.len() >= 10, "only {alerts:?} found: are they still read?");
    let links: Vec<_> =
        alerts.iter().map(|alert| format!("{RUNBOOK}#{}", alert.to_lowercase())).collect();
    assert_eq!(values(&rules, "runbook"), links);
    let sections: BTreeSet<_> =
        runbook.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    assert_eq!(sections, alerts.into_iter().collect(), "sections of {RUNBOOK}, and alerts");
}

#[test]
fn each_alert_is_tried_firing_and_silent() {
    let (rules, cases) = (read(RULES.as_ref()), read(CASES.as_ref()));
    for alert in values(&rules, "alert") {
        assert!(cases.contains(&format!("- alertname: {alert}\n")), "{alert} is not seen firing");
        let silent = format!("{{alertname: {alert}, ");
        let silent = cases.lines().find(|line| line.contains(&silent)).unwrap_or_default();
        assert!(silent.ends_with("exp_alerts: []}"), "{alert} is not seen silent");
    }
}

#[test]
fn a_metric_of_a_rule_exists() {
    let (rules, metrics) = (read(RULES.as_ref()), read("docs/metrics.md".as_ref()));
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words: BTreeSet<_> = rules.split(|c| !is_part(c)).collect();
    let named: Vec<_> = words.iter().filter(|word| word.starts_with("raymtls_")).collect();
    assert!(named.len() >= 8, "only {named:?} found: are they still read?");
    for name in named {
        let name = name.strip_suffix("_total").unwrap_or(name);
        assert!(metrics.contains(&format!("| `{name}` |")), "no metric {name}");
    }
}
