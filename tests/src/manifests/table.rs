//! The port table itself: as tab-separated lines for the scripts, as Markdown for people.

use std::ops::RangeInclusive;

use raymtls_proto::{
    ports::{NEVER_GUARDED, On, PORTS, Row, Told},
    v1,
};

use super::caller_name;

/// One line a port: name, where it listens, who may reach it, first and last number.
pub(super) fn tsv(plan: &v1::PortPlan) -> String {
    let mut text = String::from(
        "# Made from Ray's port table: change it there, or copy this file for a plan of your own.\n\
         # name\thost\tcallers\tfirst\tlast\n",
    );
    for row in &PORTS {
        let Some(range) = row.port.range(plan) else { continue };
        text.push_str(&format!(
            "{}\t{}\t{}\t{}\t{}\n",
            row.name,
            host(row),
            callers(row, ","),
            range.start(),
            range.end()
        ));
    }
    text
}

/// What no plan may cover, as the script has it.
pub(super) fn never_guarded() -> String {
    let line = |(range, what): &(RangeInclusive<u16>, &str)| {
        format!("  \"{} {} {what}\"\n", range.start(), range.end())
    };
    let lines: String = NEVER_GUARDED.iter().map(line).collect();
    format!("NEVER_GUARDED=(\n{lines})\n")
}

/// The port table for people, with the numbers of both plans.
pub(super) fn markdown(plan: &v1::PortPlan, second: &v1::PortPlan) -> String {
    let mut text = String::from(
        "| port | default | second plan | on | from other hosts | Ray's TLS covers it | Ray is told by |\n\
         | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for row in &PORTS {
        text.push_str(&format!(
            "| {} | {} | {} | {} | {} | {} | {} |\n",
            row.name,
            numbers(row, plan),
            numbers(row, second),
            if row.on == On::Head { "head" } else { "each node" },
            callers(row, ", ").replace('-', "nobody"),
            if row.tls { "yes" } else { "**no**" },
            told(row.told),
        ));
    }
    text
}

fn host(row: &Row) -> &'static str {
    match row.on {
        On::Head => "head",
        On::EachNode => "node",
    }
}

fn callers(row: &Row, between: &str) -> String {
    if row.callers.is_empty() {
        return "-".to_owned();
    }
    row.callers.iter().map(|caller| caller_name(*caller)).collect::<Vec<_>>().join(between)
}

fn numbers(row: &Row, plan: &v1::PortPlan) -> String {
    match row.port.range(plan) {
        None => "not set".to_owned(),
        Some(range) if range.start() == range.end() => range.start().to_string(),
        Some(range) => format!("{}–{}", range.start(), range.end()),
    }
}

fn told(told: Told) -> String {
    match told {
        Told::Flag(flag) => format!("`{flag}`"),
        Told::Flags(min, max) => format!("`{min}`, `{max}`"),
        Told::Variable(name) => format!("`{name}`"),
        Told::Elsewhere => "the library that opens it".to_owned(),
    }
}
