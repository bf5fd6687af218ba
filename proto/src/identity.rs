//! Who is who: trust domain, cluster, node and admin names, roles, and the SPIFFE URI that carries
//! them in a certificate. Names are parsed once, at the border; a value of these types is valid.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::v1;

/// Longest trust domain, in characters (SPIFFE allows 255; DNS allows 253).
const TRUST_DOMAIN_LEN_MAX: usize = 200;
/// Longest cluster, node or admin name, in characters: a DNS label.
const NAME_LEN_MAX: usize = 63;

/// A name that was refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NameError {
    /// Not of the form.
    #[error(
        "{what} {name:?} is not a name: use 1 to {max} characters of a-z, 0-9 and '-', \
         beginning and ending with a letter or digit"
    )]
    Form {
        /// Which kind of name.
        what: &'static str,
        /// The text, cut to a bounded length.
        name: String,
        /// Longest allowed, in characters.
        max: usize,
    },
    /// Not a SPIFFE URI of this product.
    #[error("{0:?} is not a URI of the form spiffe://<trust-domain>/cluster/<C>/<kind>/<N>")]
    Uri(String),
}

/// Quotes text from outside in an error without letting it grow the error.
fn excerpt(text: &str) -> String {
    text.chars().take(80).collect()
}

/// RFC 1123 label: letters, digits, inner hyphens, lower case.
fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    (1..=NAME_LEN_MAX).contains(&bytes.len())
        && bytes.iter().all(inner)
        && bytes[0] != b'-'
        && bytes[bytes.len() - 1] != b'-'
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:expr, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) {
                    return Ok(Self(text.to_owned()));
                }
                Err(NameError::Form { what: $what, name: excerpt(text), max: $max })
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// A Ray cluster.
    ClusterId, "cluster", NAME_LEN_MAX, is_label
);
name_type!(
    /// A node of a cluster, whatever its role.
    NodeName, "node", NAME_LEN_MAX, is_label
);
name_type!(
    /// An operator.
    AdminName, "admin", NAME_LEN_MAX, is_label
);
name_type!(
    /// A DNS name a leaf may carry: labels, no wildcard, no trailing dot, at least one letter (so
    /// that no address hides in it).
    DnsName, "DNS name", 253, |text| {
        text.len() <= 253
            && text.split('.').all(is_label)
            && text.bytes().any(|b| b.is_ascii_lowercase())
    }
);
name_type!(
    /// The deployment's name in every URI.
    TrustDomain, "trust domain", TRUST_DOMAIN_LEN_MAX, |text| {
        text.len() <= TRUST_DOMAIN_LEN_MAX && text.split('.').all(is_label)
    }
);

impl TrustDomain {
    /// The one DNS name of every ca-server: agents dial any endpoint and verify this.
    #[must_use]
    pub fn server_name(&self) -> String {
        format!("ca.{self}")
    }
}

/// What a machine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs the GCS.
    Head,
    /// Runs a raylet.
    Worker,
    /// Only connects.
    Driver,
}

impl Role {
    /// The word in CLI, logs and files.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Worker => "worker",
            Self::Driver => "driver",
        }
    }

    /// `None` for unspecified or a role of a newer peer.
    #[must_use]
    pub fn from_proto(role: i32) -> Option<Self> {
        match v1::Role::try_from(role) {
            Ok(v1::Role::Head) => Some(Self::Head),
            Ok(v1::Role::Worker) => Some(Self::Worker),
            Ok(v1::Role::Driver) => Some(Self::Driver),
            Ok(v1::Role::Unspecified) | Err(_) => None,
        }
    }

    /// As it travels.
    #[must_use]
    pub fn to_proto(self) -> v1::Role {
        match self {
            Self::Head => v1::Role::Head,
            Self::Worker => v1::Role::Worker,
            Self::Driver => v1::Role::Driver,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "head" => Ok(Self::Head),
            "worker" => Ok(Self::Worker),
            "driver" => Ok(Self::Driver),
            other => Err(format!("role {:?} is none of head, worker, driver", excerpt(other))),
        }
    }
}

/// Who a certificate speaks for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// An agent towards the CA.
    Agent(ClusterId, NodeName),
    /// An operator towards the CA.
    Admin(AdminName),
    /// A node's Ray processes towards each other.
    RayNode(ClusterId, NodeName),
    /// A driver towards a cluster.
    RayDriver(ClusterId, NodeName),
}

impl Subject {
    /// The SPIFFE URI, as it stands in the SAN.
    #[must_use]
    pub fn uri(&self, domain: &TrustDomain) -> String {
        match self {
            Self::Agent(c, n) => format!("spiffe://{domain}/cluster/{c}/agent/{n}"),
            Self::Admin(n) => format!("spiffe://{domain}/admin/{n}"),
            Self::RayNode(c, n) => format!("spiffe://{domain}/cluster/{c}/node/{n}"),
            Self::RayDriver(c, n) => format!("spiffe://{domain}/cluster/{c}/driver/{n}"),
        }
    }

    /// Reads a URI of the given trust domain.
    ///
    /// # Errors
    /// Another scheme, another trust domain or another shape.
    pub fn parse(uri: &str, domain: &TrustDomain) -> Result<Self, NameError> {
        let bad = || NameError::Uri(excerpt(uri));
        let path = uri
            .strip_prefix("spiffe://")
            .and_then(|rest| rest.strip_prefix(domain.as_str()))
            .and_then(|rest| rest.strip_prefix('/'))
            .ok_or_else(bad)?;
        match path.split('/').collect::<Vec<_>>()[..] {
            ["cluster", c, "agent", n] => Ok(Self::Agent(c.parse()?, n.parse()?)),
            ["cluster", c, "node", n] => Ok(Self::RayNode(c.parse()?, n.parse()?)),
            ["cluster", c, "driver", n] => Ok(Self::RayDriver(c.parse()?, n.parse()?)),
            ["admin", n] => Ok(Self::Admin(n.parse()?)),
            _ => Err(bad()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_at_their_bounds() {
        let long = "a".repeat(63);
        for good in ["a", "0", "a-b", "ray-worker-7", long.as_str()] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        let longer = "a".repeat(64);
        for bad in [
            "",
            "-",
            "-a",
            "a-",
            "A",
            "a.b",
            "a_b",
            "a/b",
            "..",
            "a b",
            "a\n",
            "ä",
            "a\0",
            "*",
            longer.as_str(),
        ] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_dns_name_hides_no_address_and_no_wildcard() {
        assert!("head.ray.svc.cluster.local".parse::<DnsName>().is_ok());
        for bad in ["1.2.3.4", "*.ray", "ray.", ".ray", "ray..svc", "Ray"] {
            assert!(bad.parse::<DnsName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn uri_round_trips_and_another_domain_is_refused() {
        let domain: TrustDomain = "ray.example".parse().unwrap();
        let node = Subject::Agent("c1".parse().unwrap(), "n1".parse().unwrap());
        let uri = node.uri(&domain);
        assert_eq!(uri, "spiffe://ray.example/cluster/c1/agent/n1");
        assert_eq!(Subject::parse(&uri, &domain), Ok(node));
        for bad in [
            "spiffe://ray.example.evil/cluster/c1/agent/n1",
            "spiffe://ray/cluster/c1/agent/n1",
            "spiffe://ray.example/cluster/c1/agent/n1/",
            "spiffe://ray.example/cluster/c1/agent",
            "https://ray.example/cluster/c1/agent/n1",
        ] {
            assert!(Subject::parse(bad, &domain).is_err(), "{bad}");
        }
    }
}
