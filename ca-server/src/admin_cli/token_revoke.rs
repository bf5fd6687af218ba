//! `ca-admin token revoke`: the token alone, or with every node that ever enrolled with it.

use clap::Args;
use raymtls_proto::{
    identity::ClusterId,
    token::TokenId,
    v1::{self, admin_service_client::AdminServiceClient},
};
use serde::Serialize;
use time::OffsetDateTime;
use tonic::transport::Channel;

use super::{
    applied::{self, Acknowledgements, Wait},
    client::{self, Client},
    consent::{ConfirmedHeads, Consent},
    failure::Failure,
    moment::Moment,
    node::{NodeView, reason},
    output::{Screen, View, printable},
    token::TokenView,
};

#[derive(Debug, Args)]
pub(super) struct Revoke {
    /// Name of the cluster.
    #[arg(long)]
    cluster: ClusterId,

    /// Id of the token: the part before the dot.
    id: TokenId,

    /// Revoke every node that ever enrolled with it, too.
    #[arg(long, requires = "reason")]
    with_nodes: bool,

    /// Why the nodes are revoked: stands in the audit log, and they are told it too.
    #[arg(long, value_name = "TEXT", value_parser = reason, requires = "with_nodes")]
    reason: Option<String>,

    #[command(flatten)]
    heads: ConfirmedHeads,

    #[command(flatten)]
    wait: Wait,

    #[command(flatten)]
    consent: Consent,
}

/// Does it.
pub(super) async fn run(args: Revoke, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let nodes = if args.with_nodes { args.nodes(&mut admin).await? } else { Vec::new() };
    let heads: Vec<_> =
        nodes.iter().filter(|node| node.role == "head").map(|node| node.name.clone()).collect();
    args.consent.ask_for_heads(&args.plan(&nodes), &heads, &args.heads, screen).await?;
    let (cluster, id) = (args.cluster.to_string(), args.id.to_string());
    let Some(reason) = args.reason.filter(|_| args.with_nodes) else {
        let request = v1::RevokeTokenRequest { cluster, id };
        let token = admin.revoke_token(request).await?.into_inner();
        return Ok(screen.show(&TokenView::new(&token))?);
    };
    let request = v1::RevokeTokenNodesRequest { cluster: cluster.clone(), id, reason };
    let answer = admin.revoke_token_nodes(request).await?.into_inner();
    let token = TokenView::new(&answer.token.unwrap_or_default());
    let mut view = WithNodes {
        token,
        leaf_not_after: last_leaf(&nodes),
        nodes: answer.nodes,
        notes: answer.notes,
        stopped_by: Some(answer.stopped_by).filter(|why| !why.is_empty()),
        acknowledgements: None,
    };
    screen.part(&view.opening(screen.now()))?;
    let watched = applied::watch(&mut admin, &cluster, answer.change, args.wait, screen).await?;
    view.acknowledgements = Some(watched);
    screen.show(&view)?;
    if let Some(why) = &view.stopped_by {
        return Err(Failure::Failed(format!(
            "the token and {} of its nodes are revoked, but not all: {why}; the same command goes on \
             with the rest",
            view.nodes.len()
        )));
    }
    view.acknowledgements.as_ref().map_or(Ok(()), Acknowledgements::verdict)
}

impl Revoke {
    /// Those that would be revoked with the token.
    async fn nodes(
        &self,
        admin: &mut AdminServiceClient<Channel>,
    ) -> Result<Vec<NodeView>, Failure> {
        let all = client::all_pages(async |page| {
            let request = v1::ListNodesRequest { cluster: self.cluster.to_string(), page };
            let answer = admin.list_nodes(request).await?.into_inner();
            Ok((answer.nodes, answer.next_page))
        })
        .await?;
        let id = self.id.to_string();
        let is_of = |node: &&v1::Node| {
            let enrolled_with_it = node.token_id == id || node.earlier_token_ids.contains(&id);
            enrolled_with_it && node.state() != v1::NodeState::Revoked
        };
        Ok(all.iter().filter(is_of).map(NodeView::new).collect())
    }

    fn plan(&self, nodes: &[NodeView]) -> Vec<String> {
        let rest = match (self.with_nodes, nodes.len()) {
            (false, _) => "those that have enrolled stay".to_owned(),
            (true, 0) => "no node enrolled with it that is not revoked already".to_owned(),
            (true, count) => format!("{count} that enrolled with it will be revoked, too:"),
        };
        let mut plan = vec![format!(
            "token {} of cluster {} will be revoked: no machine can enrol with it any more; {rest}",
            self.id, self.cluster
        )];
        plan.extend(nodes.iter().map(|node| format!("  {}", node.introduction())));
        plan
    }
}

/// The last moment at which Ray accepts a leaf of them.
fn last_leaf(nodes: &[NodeView]) -> Moment {
    let ends = nodes.iter().map(|node| node.leaf_not_after);
    ends.max().unwrap_or_else(|| Moment::from_unix(0))
}

#[derive(Debug, Serialize)]
struct WithNodes {
    token: TokenView,
    /// Revoked with it.
    nodes: Vec<String>,
    /// Until when Ray accepts some leaf of theirs.
    leaf_not_after: Moment,
    notes: Vec<String>,
    /// Why not all of them were revoked.
    stopped_by: Option<String>,
    #[serde(flatten)]
    acknowledgements: Option<Acknowledgements>,
}

impl WithNodes {
    fn opening(&self, now: OffsetDateTime) -> String {
        let mut text = self.token.text(now);
        for node in &self.nodes {
            text.push_str(&format!("  revoked with it: {}\n", printable(node)));
        }
        for note in &self.notes {
            text.push_str(&format!("  note: {}\n", printable(note)));
        }
        text
    }
}

impl View for WithNodes {
    /// The end; the rest was printed as it came.
    fn text(&self, now: OffsetDateTime) -> String {
        let closing = self.acknowledgements.as_ref().filter(|_| !self.nodes.is_empty());
        closing.map(|all| all.closing(self.leaf_not_after, now)).unwrap_or_default()
    }
}
