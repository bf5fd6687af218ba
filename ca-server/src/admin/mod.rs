//! What an operator asks for: who may, and one file a noun.

pub mod applied;
pub mod audit;
pub mod certificates;
pub mod clusters;
pub mod convert;
mod fleet;
mod mode;
pub mod nodes;
pub mod readiness;
pub mod revocation;
pub mod tokens;
pub mod watches;

use raymtls_proto::v1::AdminRole;

use crate::refusal::Refusal;

/// An operator, by the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operator {
    /// As it stands in audit records.
    pub actor: String,
    /// Its role; `Unspecified` for none.
    pub role: AdminRole,
    /// Clusters the role is for; none named means all.
    pub clusters: Vec<String>,
}

impl Operator {
    /// The caller on the unix socket. Who could open it without being root or the server's own user
    /// is in the operator group: the socket's mode says so.
    #[must_use]
    pub fn on_socket(peer_uid: Option<u32>, own_uid: u32, operator_group: bool) -> Self {
        let role = match peer_uid {
            Some(uid) if uid == 0 || uid == own_uid => AdminRole::Admin,
            Some(_) if operator_group => AdminRole::Operator,
            Some(_) | None => AdminRole::Unspecified,
        };
        let actor = peer_uid.map_or_else(|| "uid:unknown".to_owned(), |uid| format!("uid:{uid}"));
        Self { actor, role, clusters: Vec::new() }
    }

    /// Passes who has at least this role for the cluster; `None` means for all clusters.
    ///
    /// # Errors
    /// `RoleTooLow`.
    pub fn require(&self, least: AdminRole, cluster: Option<&str>) -> Result<(), Refusal> {
        let in_scope = self.clusters.is_empty()
            || cluster.is_some_and(|cluster| self.clusters.iter().any(|c| c == cluster));
        if self.role >= least && in_scope && self.role != AdminRole::Unspecified {
            return Ok(());
        }
        let has = if in_scope { name(self.role) } else { "not in charge of this cluster" };
        Err(Refusal::RoleTooLow {
            actor: self.actor.clone(),
            has: has.to_owned(),
            wants: name(least),
        })
    }

    /// Whether the operator may know of the cluster.
    #[must_use]
    pub fn may_see(&self, cluster: &str) -> bool {
        self.require(AdminRole::Viewer, Some(cluster)).is_ok()
    }
}

fn name(role: AdminRole) -> &'static str {
    match role {
        AdminRole::Unspecified => "nobody",
        AdminRole::Viewer => "viewer",
        AdminRole::Operator => "operator",
        AdminRole::Admin => "admin",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_s_peer_decides_the_role() {
        let role = |peer, group| Operator::on_socket(peer, 998, group).role;
        assert_eq!(role(Some(0), false), AdminRole::Admin);
        assert_eq!(role(Some(998), false), AdminRole::Admin);
        assert_eq!(role(Some(1_000), false), AdminRole::Unspecified);
        assert_eq!(role(Some(1_000), true), AdminRole::Operator);
        assert_eq!(role(None, true), AdminRole::Unspecified);
    }

    #[test]
    fn roles_are_ordered_and_scoped() {
        let scoped = Operator {
            actor: "a".to_owned(),
            role: AdminRole::Operator,
            clusters: vec!["c1".to_owned()],
        };
        assert!(scoped.require(AdminRole::Viewer, Some("c1")).is_ok());
        assert!(scoped.require(AdminRole::Operator, Some("c1")).is_ok());
        assert!(scoped.require(AdminRole::Admin, Some("c1")).is_err());
        assert!(scoped.require(AdminRole::Viewer, Some("c2")).is_err());
        assert!(scoped.require(AdminRole::Viewer, None).is_err());
        let nobody = Operator { role: AdminRole::Unspecified, clusters: vec![], ..scoped };
        assert!(nobody.require(AdminRole::Unspecified, None).is_err());
    }
}
