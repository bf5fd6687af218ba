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
    /// How old the report is.
    age_seconds: i64,
    /// Refused packets that are in the report and older than the isolation it tells of, if known.
    counted_before: Option<u64>,
}

/// What an operator should know who is about to enforce isolation or to end it; nothing where neither
/// is so.
///
/// # Errors
/// The store.
pub async fn notes(
    ca: &Ca,
    cluster: &ClusterId,
    before: v1::Isolation,
    after: v1::Isolation,
) -> Result<Vec<String>, StoreError> {
    if after == v1::Isolation::Off && before != v1::Isolation::Off {
        return Ok(vec![
            "isolation off takes the tables away: Ray's ports are open to whoever reaches these hosts, \
             revoked nodes among them"
                .to_owned(),
        ]);
    }
    if after != v1::Isolation::Enforce || before == v1::Isolation::Enforce {
        return Ok(Vec::new());
    }
    Ok(judge(cluster, before, &tables(ca, cluster).await?))
}

async fn tables(ca: &Ca, cluster: &ClusterId) -> Result<Vec<Table>, StoreError> {
    let (mut tables, mut page) = (Vec::new(), String::new());
    loop {
        let nodes = ca.store.nodes(cluster.clone(), page).await?;
        let with_agent =
            nodes.rows.iter().filter(|node| node.node_status() == NodeStatus::Live && !node.once);
        tables.extend(with_agent.map(|node| {
            let last = ca.contacts.last(&node.cluster, &node.name);
            let now = ca.clock.now();
            let state = convert::node_state(node, &last, ca.started, now);
            let age = last.reported.map_or(0, |at| (now - at).whole_seconds().max(0));
            Table {
                age_seconds: age,
                counted_before: last.counted_before,
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

fn judge(cluster: &ClusterId, before: v1::Isolation, tables: &[Table]) -> Vec<String> {
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
    let is_older = |report: &v1::IsolationReport| {
        before == v1::Isolation::Audit && report.in_force() == v1::Isolation::Enforce
    };
    let counted: Vec<_> = present().filter_map(|t| counted(t, &is_older)).collect();
    let older: Vec<_> =
        reports().filter(|(_, report)| is_older(report)).map(|(node, _)| node.clone()).collect();
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
    say("the last report is older than the change to audit, and counts for nothing, on", &older);
    say("the agent reports a problem with its table on", &problems);
    if before == v1::Isolation::Audit {
        say("no table is loaded on", &without);
    }
    say("nothing was reported since the CA started by", &silent);
    say("silent for long, and no judge of anything", &absent);
    if !counted.is_empty() {
        notes.push(format!(
            "source and port of each stand in the kernel log of these nodes: dmesg | grep 'ray-mtls \
             {cluster} would refuse'"
        ));
    }
    if notes.is_empty() {
        notes.push(format!(
            "audit: all {} nodes have a table, and none had counted a packet that enforce would refuse",
            tables.len()
        ));
    }
    if let Some(oldest) = present().filter(|t| t.report.is_some()).map(|t| t.age_seconds).max() {
        notes.push(format!(
            "as of the nodes' last reports, the oldest {oldest} s ago: what came since is not in it; \
             `node-agent isolation show` on a node has its count of now"
        ));
    }
    notes
}

/// A node whose table refused packets, with how many since when, and as of when.
fn counted(table: &Table, is_older: &dyn Fn(&v1::IsolationReport) -> bool) -> Option<String> {
    let report = table.report.as_ref().filter(|report| !is_older(report))?;
    let packets = report.refused_packets.saturating_sub(table.counted_before.unwrap_or(0));
    let since = match table.counted_before {
        Some(_) => "since its isolation last changed",
        None => "since its table was first loaded",
    };
    let (node, age) = (&table.node, table.age_seconds);
    (packets > 0).then(|| format!("{node} ({packets} {since}, as of {age} s ago)"))
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
        Table {
            node: node.to_owned(),
            absent: false,
            report: Some(report),
            age_seconds: 48,
            counted_before: None,
        }
    }

    fn judge(before: v1::Isolation, tables: &[Table]) -> Vec<String> {
        super::judge(&"c1".parse().unwrap(), before, tables)
    }

    #[test]
    fn what_speaks_against_enforcing_is_said_node_by_node() {
        let audit = v1::Isolation::Audit;
        let silent = Table { report: None, ..table("w5", audit, 0, "") };
        let absent = Table { absent: true, ..silent.clone() };
        let absent = Table { node: "w6".to_owned(), ..absent };
        let tables = [
            table("w1", audit, 0, ""),
            table("w2", audit, 17, ""),
            table("w3", v1::Isolation::Off, 0, "nft is not installed"),
            silent,
            absent,
            Table { counted_before: Some(20), ..table("w7", audit, 25, "") },
            Table { counted_before: Some(18), ..table("w8", audit, 18, "") },
            table("w9", v1::Isolation::Enforce, 30, ""),
        ];
        let text = judge(audit, &tables).join("\n");
        for part in [
            "counted on: w2 (17 since its table was first loaded, as of 48 s ago), w7 (5 since",
            "the oldest 48 s ago",
            "older than the change to audit, and counts for nothing, on: w9",
            "ray-mtls c1 would refuse",
            "a problem with its table on: w3 (\"nft is not installed\")",
            "no table is loaded on: w3",
            "nothing was reported since the CA started by: w5",
            "silent for long, and no judge of anything: w6",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(
            !text.contains("w1") && !text.contains("w8") && !text.contains("is not audit"),
            "{text}"
        );
        let off = judge(v1::Isolation::Off, &tables).join("\n");
        assert!(off.contains("set isolation=audit first"), "{off}");
    }

    #[test]
    fn a_node_s_words_imitate_no_other_node() {
        let lies = table("w1", v1::Isolation::Audit, 0, "x\"), w2 (\"broken");
        let text = judge(v1::Isolation::Audit, &[lies]).join("\n");
        assert!(text.contains(r#"on: w1 ("x\"), w2 (\"broken")"#), "{text}");
    }

    #[test]
    fn where_nothing_speaks_against_it_that_is_said_with_the_count() {
        let tables = ["w1", "w2"].map(|node| table(node, v1::Isolation::Audit, 0, ""));
        let notes = judge(v1::Isolation::Audit, &tables);
        assert_eq!(notes.len(), 2);
        assert!(notes[1].contains("48 s ago"), "{}", notes[1]);
        assert!(notes[0].starts_with("audit: all 2 nodes have a table"), "{}", notes[0]);
    }
}
