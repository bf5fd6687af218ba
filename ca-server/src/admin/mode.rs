//! Before the mode of a cluster changes: what must be stopped first, by what its nodes report. Claims.

use raymtls_proto::{identity::ClusterId, v1};

use crate::{
    ca::Ca,
    store::{StoreError, records::NodeStatus},
};

/// Nodes that are named, at most.
const NAMED_MAX: usize = 10;

/// What an operator should know who is about to change the mode.
///
/// # Errors
/// The store.
pub(super) async fn note(
    ca: &Ca,
    cluster: &ClusterId,
    after: v1::Mode,
) -> Result<String, StoreError> {
    let (mut busy, mut page) = (Vec::new(), String::new());
    loop {
        let nodes = ca.store.nodes(cluster.clone(), page).await?;
        let live = nodes.rows.iter().filter(|node| node.node_status() == NodeStatus::Live);
        busy.extend(
            live.filter(|node| {
                let report = ca.contacts.last(&node.cluster, &node.name).report;
                report.is_some_and(|report| is_busy(&report))
            })
            .map(|node| node.name.clone()),
        );
        if nodes.next.is_empty() {
            break;
        }
        page = nodes.next;
    }
    Ok(text(after, &busy))
}

/// Processes of Ray listen there, or its tunnel carries something.
fn is_busy(report: &v1::Report) -> bool {
    let runs = report.running.as_ref().is_some_and(|running| running.processes > 0);
    runs || report.tunnel.as_ref().is_some_and(|tunnel| tunnel.flows > 0)
}

fn text(after: v1::Mode, busy: &[String]) -> String {
    let what = match after {
        v1::Mode::Tunnel => {
            "mode=tunnel: stop Ray on every node of the cluster before and start it after by `node-agent \
             exec`: a Ray that was started with TLS reaches none that was started without"
        }
        v1::Mode::Files | v1::Mode::Unspecified => {
            "mode=files: stop Ray on every node of the cluster before and start it after by `node-agent \
             exec`: the tunnels end at once, and a Ray without TLS reaches none that has it"
        }
    };
    if busy.is_empty() {
        return format!("{what}; no node reports a Ray that runs");
    }
    let named = busy[..busy.len().min(NAMED_MAX)].join(", ");
    let more = busy.len().saturating_sub(NAMED_MAX);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!("{what}; it runs on {named}{more}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_with_a_ray_are_named_and_the_rest_counted() {
        let names: Vec<String> = (0..12).map(|n| format!("n{n}")).collect();
        let said = text(v1::Mode::Tunnel, &names);
        assert!(said.contains("it runs on n0, ") && said.ends_with("n9 and 2 more"), "{said}");
        assert!(text(v1::Mode::Files, &[]).ends_with("no node reports a Ray that runs"));
    }

    #[test]
    fn a_tunnel_with_flows_is_busy_and_an_idle_one_is_not() {
        let with = |flows, processes| v1::Report {
            tunnel: Some(v1::TunnelReport { flows, ..v1::TunnelReport::default() }),
            running: Some(v1::Running { processes, ..v1::Running::default() }),
            ..v1::Report::default()
        };
        assert!(is_busy(&with(1, 0)) && is_busy(&with(0, 1)) && !is_busy(&with(0, 0)));
        assert!(!is_busy(&v1::Report::default()));
    }
}
