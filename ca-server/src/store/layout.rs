//! Where each record lies: one ordered key space, a letter for the kind, then the parts of the key.
//! Names cannot hold a `/`, so no key of one kind runs into another.

/// Header of the store.
pub const HEADER: &[u8] = b"!header";
/// Control authority.
pub const CONTROL: &[u8] = b"!control";
/// End of the audit log.
pub const AUDIT_HEAD: &[u8] = b"!audit";
/// Its newest checkpoint.
pub const CHECKPOINT: &[u8] = b"!checkpoint";
/// Its beginning, where what came before was pruned: the checkpoint at the oldest record left.
pub const PRUNED: &[u8] = b"!pruned";
/// The restores this store went through.
pub const RESTORES: &[u8] = b"!restores";

/// All clusters.
pub const CLUSTERS: &[u8] = b"c/";

/// One cluster.
#[must_use]
pub fn cluster(cluster: &str) -> Vec<u8> {
    text(b"c/", &[cluster])
}

/// CRLs of a cluster; the control authority's lie under the empty name.
#[must_use]
pub fn crls(cluster: &str) -> Vec<u8> {
    text(b"l/", &[cluster])
}

/// One token.
#[must_use]
pub fn token(id: &str) -> Vec<u8> {
    text(b"t/", &[id])
}

/// Tokens of a cluster: an index without values.
#[must_use]
pub fn cluster_tokens(cluster: &str) -> Vec<u8> {
    text(b"k/", &[cluster, ""])
}

/// One entry of that index.
#[must_use]
pub fn cluster_token(cluster: &str, id: &str) -> Vec<u8> {
    text(b"k/", &[cluster, id])
}

/// One use of a token.
#[must_use]
pub fn token_use(id: &str, key_hash: &[u8]) -> Vec<u8> {
    bytes(&text(b"u/", &[id, ""]), key_hash)
}

/// Nodes of a cluster.
#[must_use]
pub fn nodes(cluster: &str) -> Vec<u8> {
    text(b"n/", &[cluster, ""])
}

/// One node.
#[must_use]
pub fn node(cluster: &str, name: &str) -> Vec<u8> {
    text(b"n/", &[cluster, name])
}

/// Who holds an address exclusively: the node's name.
#[must_use]
pub fn holder(cluster: &str, address: &str) -> Vec<u8> {
    text(b"h/", &[cluster, address])
}

/// For which exclusive node an address counts, or did last: its name.
#[must_use]
pub fn counted(cluster: &str, address: &str) -> Vec<u8> {
    text(b"p/", &[cluster, address])
}

/// The revocation that blocks an address for older tokens.
#[must_use]
pub fn block(cluster: &str, address: &str) -> Vec<u8> {
    text(b"b/", &[cluster, address])
}

/// Addresses of a cluster that revocations block.
#[must_use]
pub fn blocks(cluster: &str) -> Vec<u8> {
    text(b"b/", &[cluster, ""])
}

/// What the agents of a cluster must know of its nodes, by the version at which it changed.
#[must_use]
pub fn members(cluster: &str) -> Vec<u8> {
    text(b"m/", &[cluster, ""])
}

/// One such change: each node has one, the newest.
#[must_use]
pub fn member(cluster: &str, version: u64) -> Vec<u8> {
    bytes(&members(cluster), &version.to_be_bytes())
}

/// What a public key is used for.
#[must_use]
pub fn key(key_hash: &[u8]) -> Vec<u8> {
    bytes(b"q/", key_hash)
}

/// One certificate.
#[must_use]
pub fn certificate(serial: &[u8]) -> Vec<u8> {
    bytes(b"s/", serial)
}

/// Certificates of a cluster: an index without values, by time of issue.
#[must_use]
pub fn cluster_certificates(cluster: &str) -> Vec<u8> {
    text(b"x/", &[cluster, ""])
}

/// One entry of that index.
#[must_use]
pub fn cluster_certificate(cluster: &str, serial: &[u8]) -> Vec<u8> {
    bytes(&cluster_certificates(cluster), serial)
}

/// Certificates of a node: an index without values, by time of issue.
#[must_use]
pub fn node_certificates(cluster: &str, node: &str) -> Vec<u8> {
    text(b"y/", &[cluster, node, ""])
}

/// One entry of that index.
#[must_use]
pub fn node_certificate(cluster: &str, node: &str, serial: &[u8]) -> Vec<u8> {
    bytes(&node_certificates(cluster, node), serial)
}

/// Revocations of a cluster's leaves; those of identities lie under the empty name.
#[must_use]
pub fn revocations(cluster: &str) -> Vec<u8> {
    text(b"r/", &[cluster, ""])
}

/// One revocation.
#[must_use]
pub fn revocation(cluster: &str, serial: &[u8]) -> Vec<u8> {
    bytes(&revocations(cluster), serial)
}

/// All audit records, in order.
pub const AUDIT: &[u8] = b"a/";

/// One audit record.
#[must_use]
pub fn audit(index: u64) -> Vec<u8> {
    bytes(AUDIT, &index.to_be_bytes())
}

fn text(kind: &[u8], parts: &[&str]) -> Vec<u8> {
    bytes(kind, parts.join("/").as_bytes())
}

fn bytes(prefix: &[u8], rest: &[u8]) -> Vec<u8> {
    [prefix, rest].concat()
}
