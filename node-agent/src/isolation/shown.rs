//! What the kernel holds of our tables, read back for a person. It changes nothing.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    ruleset::GUARDED,
    table::{Kernel, TableError},
};

/// What each table's name begins with; the cluster's follows.
const PREFIX: &str = "raymtls_";

/// One cluster's table as it is in force on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// The cluster it guards.
    pub cluster: String,
    /// `audit` or `enforce`; `unknown` for a table of another release.
    pub mode: &'static str,
    /// Addresses of members.
    pub members: Vec<String>,
    /// Addresses that are cut off.
    pub blocked: Vec<String>,
    /// Ports that are guarded.
    pub guarded_ports: Vec<String>,
    /// Packets counted from or to blocked addresses.
    pub blocked_packets: u64,
    /// Packets counted to guarded ports from those who may not reach them.
    pub refused_packets: u64,
}

/// All tables of ours.
///
/// # Errors
/// See [`TableError`].
pub async fn tables(kernel: &Kernel) -> Result<Vec<Shown>, TableError> {
    let listing = parse(&kernel.run("nft", &["-j", "list", "tables", "inet"], b"").await?)?;
    let mut all = Vec::new();
    for name in listing.nftables.into_iter().filter_map(|item| item.table).map(|table| table.name) {
        let Some(cluster) = name.strip_prefix(PREFIX) else { continue };
        let listing =
            parse(&kernel.run("nft", &["-j", "list", "table", "inet", &name], b"").await?)?;
        all.push(shown(cluster, listing));
    }
    Ok(all)
}

fn parse(json: &[u8]) -> Result<Listing, TableError> {
    serde_json::from_slice(json).map_err(|error| TableError::Form(error.to_string()))
}

fn shown(cluster: &str, listing: Listing) -> Shown {
    let mut shown = Shown { cluster: cluster.to_owned(), mode: "unknown", ..Shown::default() };
    for item in listing.nftables {
        if let Some(counter) = item.counter {
            match counter.name.as_str() {
                "blocked" => shown.blocked_packets = counter.packets,
                "refused" => shown.refused_packets = counter.packets,
                _ => {}
            }
        }
        if let Some(set) = item.set {
            let texts = set.elem.iter().map(text);
            match set.name.trim_end_matches(['4', '6']) {
                "members" => shown.members.extend(texts),
                // On the cluster's ports, and on all.
                "blocked" | "cut" => shown.blocked.extend(texts),
                _ => {}
            }
        }
        let Some(rule) = item.rule else { continue };
        if rule.chain == GUARDED {
            shown.guarded_ports.extend(rule.port().map(text));
        }
        // What is not let through is counted, and dropped or not.
        if rule.counts("refused") {
            shown.mode = if rule.drops() { "enforce" } else { "audit" };
        }
    }
    shown.blocked.sort();
    shown.blocked.dedup();
    shown
}

/// An element of a set, or what a rule compares with: a value, a prefix or a range (libnftables-json(5)).
fn text(element: &Value) -> String {
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if let Some(prefix) = element.get("prefix") {
        return format!("{}/{}", plain(&prefix["addr"]), prefix["len"]);
    }
    match element.get("range").and_then(Value::as_array).map(Vec::as_slice) {
        Some([min, max]) => format!("{}-{}", plain(min), plain(max)),
        Some(_) | None => plain(element),
    }
}

#[derive(Debug, Deserialize)]
struct Listing {
    nftables: Vec<Item>,
}

#[derive(Debug, Deserialize)]
struct Item {
    table: Option<Named>,
    counter: Option<Counter>,
    set: Option<Set>,
    rule: Option<Rule>,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}

#[derive(Debug, Deserialize)]
struct Counter {
    name: String,
    packets: u64,
}

#[derive(Debug, Deserialize)]
struct Set {
    name: String,
    #[serde(default)]
    elem: Vec<Value>,
}

#[derive(Debug, Deserialize)]
struct Rule {
    chain: String,
    expr: Vec<Value>,
}

impl Rule {
    /// The port or the range of ports that a packet must go to.
    fn port(&self) -> Option<&Value> {
        let compared = self.expr.iter().find_map(|part| part.get("match"))?;
        (compared.pointer("/left/payload/field")? == "dport").then(|| compared.get("right"))?
    }

    fn counts(&self, counter: &str) -> bool {
        self.expr.iter().any(|part| part.get("counter").and_then(Value::as_str) == Some(counter))
    }

    fn drops(&self) -> bool {
        self.expr.iter().any(|part| part.get("drop").is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_of_nft_is_read() {
        for (verdict, mode) in [("drop", "enforce"), ("return", "audit")] {
            let json = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}},
                {"table": {"family": "inet", "name": "raymtls_c1", "handle": 1}},
                {"counter": {"family": "inet", "name": "blocked", "table": "raymtls_c1", "handle": 1,
                             "packets": 7, "bytes": 420}},
                {"counter": {"family": "inet", "name": "refused", "table": "raymtls_c1", "handle": 2,
                             "packets": 12, "bytes": 0}},
                {"set": {"name": "members4", "elem": ["10.0.0.1", {"prefix": {"addr": "10.1.0.0", "len": 24}}]}},
                {"set": {"name": "members6"}},
                {"set": {"name": "blocked4", "elem": ["10.0.0.9"]}},
                {"rule": {"chain": "guarded", "expr": [{"match": {"op": "==", "right": 6701,
                    "left": {"payload": {"protocol": "tcp", "field": "dport"}}}}, {"goto": {"target": "judge"}}]}},
                {"rule": {"chain": "guarded", "expr": [{"match": {"op": "==", "right": {"range": [10002, 10101]},
                    "left": {"payload": {"protocol": "tcp", "field": "dport"}}}}, {"goto": {"target": "judge"}}]}},
                {"rule": {"chain": "judge", "expr": [{"counter": "refused"}, {"VERDICT": null}]}}]}"#;
            let json = json.replace("VERDICT", verdict);
            let shown = shown("c1", parse(json.as_bytes()).unwrap());
            let expected = Shown {
                cluster: "c1".to_owned(),
                mode,
                members: vec!["10.0.0.1".to_owned(), "10.1.0.0/24".to_owned()],
                blocked: vec!["10.0.0.9".to_owned()],
                guarded_ports: vec!["6701".to_owned(), "10002-10101".to_owned()],
                blocked_packets: 7,
                refused_packets: 12,
            };
            assert_eq!(shown, expected);
        }
    }
}
