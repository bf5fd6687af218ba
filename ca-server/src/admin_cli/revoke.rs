//! `ca-admin node revoke`: says what will be done, does it, and shows who has cut the node off and where
//! its leaf still works.

use clap::Args;
use raymtls_proto::v1::{self, admin_service_client::AdminServiceClient};
use serde::Serialize;
use time::OffsetDateTime;
use tonic::transport::Channel;

use super::{
    applied::{self, Acknowledgements, Wait},
    client::{self, Client},
    consent::{ConfirmedHeads, Consent},
    drain::{Drain, Drained},
    failure::Failure,
    node::{NodeView, Which, reason},
    output::{Screen, View, printable},
};

#[derive(Debug, Args)]
pub(super) struct Revoke {
    #[command(flatten)]
    which: Which,

    /// Why: stands in the audit log, and the node is told it too.
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    reason: String,

    /// Leave the unused uses of the node's token as they are.
    #[arg(long)]
    keep_token: bool,

    /// Have it cut off on every port, not on the cluster's alone.
    #[arg(long)]
    all_traffic: bool,

    #[command(flatten)]
    heads: ConfirmedHeads,

    #[command(flatten)]
    wait: Wait,

    #[command(flatten)]
    drain: Drain,

    #[command(flatten)]
    consent: Consent,
}

/// Does it.
pub(super) async fn run(args: Revoke, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let node = NodeView::new(&admin.get_node(args.which.to_get()).await?.into_inner());
    let heads: Vec<_> = (node.role == "head").then(|| node.name.clone()).into_iter().collect();
    let unused = unused_uses(&mut admin, &node).await;
    let plan = args.plan(&node, unused, screen.now());
    args.consent.ask_for_heads(&plan, &heads, &args.heads, screen).await?;
    let request = v1::RevokeNodeRequest {
        cluster: args.which.cluster.to_string(),
        name: args.which.name.to_string(),
        reason: args.reason,
        keep_token: args.keep_token,
        all_traffic: args.all_traffic,
    };
    let answer = admin.revoke_node(request).await?.into_inner();
    let mut view = RevokedView::new(&answer);
    screen.part(&view.opening())?;
    let cluster = args.which.cluster.as_str();
    let watched = applied::watch(&mut admin, cluster, answer.change, args.wait, screen).await;
    // Whatever became of the watch, Ray is told: the node is off.
    view.drain = args.drain.tell(&answer.blocked_addresses).await;
    view.acknowledgements = Some(watched?);
    screen.show(&view)?;
    view.acknowledgements.as_ref().map_or(Ok(()), Acknowledgements::verdict)
}

/// How many more machines the node's token would let in. Where that cannot be told, nobody is kept from
/// revoking.
async fn unused_uses(admin: &mut AdminServiceClient<Channel>, node: &NodeView) -> Option<u32> {
    let tokens = client::all_pages(async |page| {
        let request = v1::ListTokensRequest { cluster: node.cluster.clone(), page };
        let answer = admin.list_tokens(request).await?.into_inner();
        Ok((answer.tokens, answer.next_page))
    });
    let tokens = tokens.await.ok()?;
    let of_node = tokens.iter().find(|token| token.id == node.token)?;
    let is_open = of_node.state() == v1::TokenState::Open;
    Some(if is_open { of_node.uses.saturating_sub(of_node.used) } else { 0 })
}

impl Revoke {
    fn plan(&self, node: &NodeView, unused: Option<u32>, now: OffsetDateTime) -> Vec<String> {
        let mut plan = vec![
            format!("{} will be revoked:", node.introduction()),
            "  its identity and its leaves go on the CRL; it gets no renewal and no leaf"
                .to_owned(),
            "  no machine enrols under its name or from its addresses with a token made before now"
                .to_owned(),
        ];
        let uses = match unused {
            Some(unused) => format!("{unused} unused uses of its token {}", node.token),
            None => format!("the unused uses of its token {}", node.token),
        };
        plan.push(if self.keep_token {
            format!("  {uses} stay good")
        } else if unused == Some(0) {
            format!("  its token {} has no unused uses", node.token)
        } else {
            format!(
                "  {uses} become void: no further host enrols with that join file (--keep-token keeps \
                 them)"
            )
        });
        let ports = if self.all_traffic { "every port" } else { "the cluster's ports" };
        plan.push(format!(
            "  peers with isolation enforced cut it off on {ports} and close its connections"
        ));
        if !node.leaf_not_after.is_none() {
            plan.push(format!(
                "  Ray checks no CRL: its processes accept the node's leaf until {}",
                node.leaf_not_after.human(now)
            ));
        }
        if node.role == "head" {
            plan.push(format!("  it is a head: without it cluster {} does not work", node.cluster));
        }
        plan
    }
}

#[derive(Debug, Serialize)]
struct RevokedView {
    node: NodeView,
    certificates_revoked: u32,
    token_uses_voided: u32,
    blocked_addresses: Vec<String>,
    spared_addresses: Vec<String>,
    notes: Vec<String>,
    #[serde(flatten)]
    acknowledgements: Option<Acknowledgements>,
    drain: Option<Drained>,
}

impl RevokedView {
    fn new(answer: &v1::RevokeNodeResponse) -> Self {
        Self {
            node: NodeView::new(&answer.node.clone().unwrap_or_default()),
            certificates_revoked: answer.certificates_revoked,
            token_uses_voided: answer.token_uses_voided,
            blocked_addresses: answer.blocked_addresses.clone(),
            spared_addresses: answer.spared_addresses.clone(),
            notes: answer.notes.clone(),
            acknowledgements: None,
            drain: None,
        }
    }

    /// What is said before anybody is waited for.
    fn opening(&self) -> String {
        let mut text = printable(&format!(
            "node {} of cluster {} is {}",
            self.node.name, self.node.cluster, self.node.state
        ));
        text.push_str(&format!(
            "\n  certificates put on the CRL: {}\n  uses of its token made void: {}\n",
            self.certificates_revoked, self.token_uses_voided
        ));
        let lines = |what: &str, all: &[String]| {
            all.iter().map(|one| format!("  {what}: {}\n", printable(one))).collect::<String>()
        };
        text.push_str(&lines("address to cut off", &self.blocked_addresses));
        text.push_str(&lines("address left alone", &self.spared_addresses));
        text + &lines("note", &self.notes)
    }
}

impl View for RevokedView {
    /// The end; the rest was printed as it came.
    fn text(&self, now: OffsetDateTime) -> String {
        let closing =
            self.acknowledgements.as_ref().map(|all| all.closing(self.node.leaf_not_after, now));
        closing.unwrap_or_default() + &self.drain.as_ref().map(Drained::text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use raymtls_proto::clock;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        revoke: Revoke,
    }

    fn plan(more: &[&str], role: v1::Role) -> String {
        let words = ["x", "--cluster", "c1", "worker-7", "--reason", "drill"];
        let line = Line::parse_from(words.iter().chain(more));
        let node = v1::Node {
            cluster: "c1".to_owned(),
            name: "worker-7".to_owned(),
            role: role.into(),
            token_id: "0123456789abcdef".to_owned(),
            leaf_not_after_unix: 1_764_000_000 + 86_400,
            ..v1::Node::default()
        };
        let now = clock::from_unix(1_764_000_000).unwrap();
        line.revoke.plan(&NodeView::new(&node), Some(19), now).join("\n")
    }

    #[test]
    fn a_plan_says_how_many_uses_are_lost_and_how_to_keep_them() {
        let text = plan(&[], v1::Role::Worker);
        assert!(text.contains("19 unused") && text.contains("--keep-token keeps them"), "{text}");
    }

    #[test]
    fn a_plan_says_until_when_ray_accepts_the_leaf() {
        let text = plan(&[], v1::Role::Worker);
        assert!(text.contains("worker worker-7 of cluster c1"), "{text}");
        assert!(text.contains("until 2025-11-25 16:00:00Z (in 1d)"), "{text}");
        assert!(
            text.contains("19 unused uses of its token 0123456789abcdef become void"),
            "{text}"
        );
        assert!(text.contains("on the cluster's ports") && !text.contains("is a head"), "{text}");
        let text = plan(&["--keep-token", "--all-traffic"], v1::Role::Head);
        assert!(text.contains("token 0123456789abcdef stay good"), "{text}");
        assert!(text.contains("on every port") && text.contains("is a head"), "{text}");
    }
}
