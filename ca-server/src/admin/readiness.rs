//! Before isolation is enforced: what the nodes' tables have counted so far, from their reports. Claims,
//! and no guarantee: who did not call meanwhile was not counted.

use raymtls_proto::{identity::ClusterId, v1};

use super::convert;
use crate::{
    ca::Ca,
    store::{StoreError, records::NodeStatus},
};

/// Nodes named in one note, at most.
const NAMED_MAX: usize = 10;

/// A node and what its table does, as far as it said so since the server started.
#[derive(Clone, Debug)]
struct Table {
    node: String,
    absent: bool,
    report: Option<v1::IsolationReport>,
}

/// What an operator should know who is about to enforce isolation; nothing where it is enforced, or
/// will not be.
///
/// # Errors
/// The store.
pub async fn notes(
    ca: &Ca,
    cluster: &ClusterId,
    before: v1::Isolation,
    after: v1::Isolation,
) -> Result<Vec<String>, StoreError> {
    if after != v1::Isolation::Enforce || before == v1::Isolation::Enforce {
        return Ok(Vec::new());
    }
    Ok(judge(before, &tables(ca, cluster).await?))
}

async fn tables(ca: &Ca, cluster: &ClusterId) -> Result<Vec<Table>, StoreError> {
    let (mut tables, mut page) = (Vec::new(), String::new());
    loop {
        let nodes = ca.store.nodes(cluster.clone(), page).await?;
        let with_agent =
            nodes.rows.iter().filter(|node| node.node_status() == NodeStatus::Live && !node.once);
        tables.extend(with_agent.map(|node| {
            let last = ca.contacts.last(&node.cluster, &node.name);
            let state = convert::node_state(node, &last, ca.started, ca.clock.now());
            Table {
                node: node.name.clone(),
                absent: state == v1::NodeState::Absent,
                report: last.report.and_then(|report| report.isolation),
            }
        }));
        if nodes.next.is_empty() {
            return Ok(tables);
        }
        page = nodes.next;
    }
}

fn judge(before: v1::Isolation, tables: &[Table]) -> Vec<String> {
    let mut notes = Vec::new();
    if before != v1::Isolation::Audit {
        notes.push(
            "isolation is not audit, so nobody has counted what enforce would refuse: set \
             isolation=audit first, let the cluster work, and ask again"
                .to_owned(),
        );
    }
    let present = || tables.iter().filter(|table| !table.absent);
    let reports = || present().filter_map(|table| Some((&table.node, table.report.as_ref()?)));
    let counted = reports()
        .filter(|(_, report)| report.refused_packets > 0)
        .map(|(node, report)| format!("{node} ({})", report.refused_packets));
    let counted: Vec<_> = counted.collect();
    let problems: Vec<_> = reports()
        .filter(|(_, report)| !report.problem.is_empty())
        // In quotes, with its own escaped: a node's words are no names of other nodes.
        .map(|(node, report)| format!("{node} ({:?})", report.problem))
        .collect();
    let has_none = |report: &v1::IsolationReport| {
        matches!(report.in_force(), v1::Isolation::Off | v1::Isolation::Unspecified)
    };
    let without: Vec<_> =
        reports().filter(|(_, report)| has_none(report)).map(|(node, _)| node.clone()).collect();
    let silent: Vec<_> =
        present().filter(|table| table.report.is_none()).map(|table| table.node.clone()).collect();
    let absent: Vec<_> =
        tables.iter().filter(|table| table.absent).map(|table| table.node.clone()).collect();
    let mut say = |what: &str, nodes: &[String]| {
        if !nodes.is_empty() {
            notes.push(format!("{what}: {}", named(nodes)));
        }
    };
    say("packets that enforce would refuse were counted on", &counted);
    say("the agent reports a problem with its table on", &problems);
    if before == v1::Isolation::Audit {
        say("no table is loaded on", &without);
    }
    say("nothing was reported since the CA started by", &silent);
    say("silent for long, and no judge of anything", &absent);
    if notes.is_empty() {
        notes.push(format!(
            "audit: all {} nodes have a table, and none has counted a packet that enforce would refuse",
            tables.len()
        ));
    }
    notes
}

fn named(nodes: &[String]) -> String {
    let mut text = nodes.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
    if nodes.len() > NAMED_MAX {
        text.push_str(&format!(" and {} more", nodes.len() - NAMED_MAX));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(node: &str, in_force: v1::Isolation, refused_packets: u64, problem: &str) -> Table {
        let report = v1::IsolationReport {
            in_force: in_force.into(),
            refused_packets,
            problem: problem.to_owned(),
            ..v1::IsolationReport::default()
        };
        Table { node: node.to_owned(), absent: false, report: Some(report) }
    }

    #[test]
    fn what_speaks_against_enforcing_is_said_node_by_node() {
        let audit = v1::Isolation::Audit;
        let silent = Table { node: "w5".to_owned(), absent: false, report: None };
        let absent = Table { node: "w6".to_owned(), absent: true, report: None };
        let tables = [
            table("w1", audit, 0, ""),
            table("w2", audit, 17, ""),
            table("w3", v1::Isolation::Off, 0, "nft is not installed"),
            silent,
            absent,
        ];
        let text = judge(audit, &tables).join("\n");
        for part in [
            "would refuse were counted on: w2 (17)",
            "a problem with its table on: w3 (\"nft is not installed\")",
            "no table is loaded on: w3",
            "nothing was reported since the CA started by: w5",
            "silent for long, and no judge of anything: w6",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("w1") && !text.contains("is not audit"), "{text}");
        let off = judge(v1::Isolation::Off, &tables).join("\n");
        assert!(off.contains("set isolation=audit first"), "{off}");
    }

    #[test]
    fn a_node_s_words_imitate_no_other_node() {
        let lies = table("w1", v1::Isolation::Audit, 0, "x\"), w2 (\"broken");
        let text = judge(v1::Isolation::Audit, &[lies]).join("\n");
        assert!(text.ends_with(r#"on: w1 ("x\"), w2 (\"broken")"#), "{text}");
    }

    #[test]
    fn where_nothing_speaks_against_it_that_is_said_with_the_count() {
        let tables = ["w1", "w2"].map(|node| table(node, v1::Isolation::Audit, 0, ""));
        let notes = judge(v1::Isolation::Audit, &tables);
        assert_eq!(notes.len(), 1);
        assert!(notes[0].starts_with("audit: all 2 nodes have a table"), "{}", notes[0]);
    }
}
