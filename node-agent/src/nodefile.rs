//! `node.toml`: what enrolment bound to this node. It is text and types; reading and writing the file
//! is `statedir`'s.

use std::net::IpAddr;

use raymtls_proto::{
    bundle,
    identity::{ClusterId, NodeName, Role, Subject, TrustDomain},
    token::TokenId,
    v1,
};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

/// Format of `node.toml` this code writes.
const FORMAT: u32 = 1;

/// What enrolment bound to this node, and how to reach the CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFile {
    /// The deployment.
    pub trust_domain: TrustDomain,
    /// The cluster.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeName,
    /// What it is for.
    pub role: Role,
    /// Addresses the CA bound to it.
    pub addresses: Vec<IpAddr>,
    /// DNS names the CA bound to it.
    pub dns_names: Vec<String>,
    /// `host:port` of the CA's node listeners, tried in order.
    pub node_endpoints: Vec<String>,
    /// What the CA's certificate must chain to.
    pub control_roots: Vec<CertificateDer<'static>>,
    /// Group that may read the Ray leaf key, as given at enrolment.
    pub ray_gid: Option<u32>,
    /// Token the identity was obtained with; absent where an earlier release enrolled.
    pub token_id: Option<TokenId>,
}

#[derive(Serialize, Deserialize)]
struct NodeText {
    format: u32,
    trust_domain: TrustDomain,
    cluster: ClusterId,
    node: NodeName,
    role: Role,
    addresses: Vec<IpAddr>,
    dns_names: Vec<String>,
    node_endpoints: Vec<String>,
    ray_gid: Option<u32>,
    token_id: Option<TokenId>,
    // Last: a file cut short does not parse.
    control_roots: String,
}

impl NodeFile {
    /// Who the identity speaks for.
    #[must_use]
    pub fn agent(&self) -> Subject {
        Subject::Agent(self.cluster.clone(), self.node.clone())
    }

    /// Who the Ray leaf speaks for.
    #[must_use]
    pub fn ray(&self) -> Subject {
        match self.role {
            Role::Head | Role::Worker => Subject::RayNode(self.cluster.clone(), self.node.clone()),
            Role::Driver => Subject::RayDriver(self.cluster.clone(), self.node.clone()),
        }
    }

    /// DNS names its Ray leaf has: a driver's has none.
    #[must_use]
    pub fn leaf_dns_names(&self) -> &[String] {
        match self.role {
            Role::Head | Role::Worker => &self.dns_names,
            Role::Driver => &[],
        }
    }

    /// What its Ray leaf is for.
    #[must_use]
    pub fn purpose(&self) -> v1::LeafPurpose {
        match self.role {
            Role::Head | Role::Worker => v1::LeafPurpose::Node,
            Role::Driver => v1::LeafPurpose::Driver,
        }
    }

    pub(crate) fn to_text(&self) -> String {
        let text = NodeText {
            format: FORMAT,
            trust_domain: self.trust_domain.clone(),
            cluster: self.cluster.clone(),
            node: self.node.clone(),
            role: self.role,
            addresses: self.addresses.clone(),
            dns_names: self.dns_names.clone(),
            node_endpoints: self.node_endpoints.clone(),
            ray_gid: self.ray_gid,
            token_id: self.token_id.clone(),
            control_roots: bundle::certificates_to_pem(&self.control_roots),
        };
        toml::to_string(&text).expect("names, addresses and strings are valid TOML")
    }

    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        // First and alone: a newer format need not have the fields of this one.
        let format: Format = toml::from_str(text).map_err(|e| e.message().to_owned())?;
        if format.format != FORMAT {
            return Err(format!(
                "it has format {}, this program reads format {FORMAT}: upgrade node-agent",
                format.format
            ));
        }
        let text: NodeText = toml::from_str(text).map_err(|e| e.message().to_owned())?;
        Ok(Self {
            trust_domain: text.trust_domain,
            cluster: text.cluster,
            node: text.node,
            role: text.role,
            addresses: text.addresses,
            dns_names: text.dns_names,
            node_endpoints: text.node_endpoints,
            ray_gid: text.ray_gid,
            token_id: text.token_id,
            control_roots: bundle::certificates_from_pem(text.control_roots.as_bytes())
                .map_err(|e| e.to_string())?,
        })
    }
}
