//! NetworkPolicies: one file a cluster, one for the CA. A pod that a policy selects may do only what
//! some policy allows, so each file begins with a policy that allows nothing.

use std::fmt::{self, Write};

use raymtls_proto::{
    ports::{Caller, On, Port, Row},
    v1,
};

use super::{CA_PORTS, reachable};

const RAY_POD: &str = "ray.io/is-ray-node: \"yes\"";
const CA_POD: &str = "app.kubernetes.io/name: ca-server";
const CA_NAMESPACE: &str = "ray-mtls";
const ADMIN_NAMESPACE: &str = "ray-admin";
const SCRAPER_NAMESPACE: &str = "monitoring";

/// What one cluster's pods may do, in a namespace of the cluster's name.
pub(super) fn cluster(cluster: &str, plan: &v1::PortPlan) -> String {
    let mut text = String::new();
    write_cluster(&mut text, cluster, plan).expect("writing into a string");
    text
}

/// Who may reach the CA.
pub(super) fn ca(clusters: &[&str]) -> String {
    let mut text = String::new();
    write_ca(&mut text, clusters).expect("writing into a string");
    text
}

fn write_cluster(out: &mut String, cluster: &str, plan: &v1::PortPlan) -> fmt::Result {
    write!(
        out,
        "# Made from Ray's port table for the cluster {cluster}. Apply it before any pod of the cluster starts.\n\
         # Ray pods carry the labels that KubeRay gives them. Namespaces: {cluster} for the cluster,\n\
         # {CA_NAMESPACE} for ca-server, {ADMIN_NAMESPACE} for admins, {SCRAPER_NAMESPACE} for metrics, {cluster}-drivers for drivers.\n\
         # What no policy here names is refused in both directions: other clusters, the internet, and the\n\
         # cloud's metadata address 169.254.169.254, to which no rule leads.\n"
    )?;
    let peer = Peer::SameNamespace(format!("ray.io/cluster: {cluster}"));
    let (nodes, head) = (selector(cluster, None), selector(cluster, Some("head")));

    let deny = Policy::new("default-deny", cluster, vec![RAY_POD.to_owned()]);
    deny.write(out, &[Way::In, Way::Out], &[])?;
    let members = |on| numbers(reachable(on, Caller::Member), plan);
    let both = [members(On::EachNode), members(On::Head)].concat();
    let policy = Policy::new("members-to-nodes", cluster, nodes.clone());
    policy.write(out, &[Way::In], &[Rule(Way::In, vec![peer.clone()], members(On::EachNode))])?;
    let policy = Policy::new("members-to-head", cluster, head.clone());
    policy.write(out, &[Way::In], &[Rule(Way::In, vec![peer.clone()], members(On::Head))])?;
    let policy = Policy::new("nodes-to-members", cluster, nodes.clone());
    policy.write(out, &[Way::Out], &[Rule(Way::Out, vec![peer], both)])?;

    for (caller, namespace, name) in [
        (Caller::Admin, ADMIN_NAMESPACE.to_owned(), "admins"),
        (Caller::Scraper, SCRAPER_NAMESPACE.to_owned(), "scrapers"),
        (Caller::Driver, format!("{cluster}-drivers"), "drivers"),
    ] {
        let from = vec![Peer::Namespace(namespace)];
        for (on, pods, to) in [(On::Head, &head, "head"), (On::EachNode, &nodes, "nodes")] {
            let ports = numbers(reachable(on, caller), plan);
            if ports.is_empty() {
                continue;
            }
            let policy = Policy::new(&format!("{name}-to-{to}"), cluster, pods.clone());
            policy.write(out, &[Way::In], &[Rule(Way::In, from.clone(), ports)])?;
        }
    }

    let ca = Peer::Pods(CA_NAMESPACE.to_owned(), vec![CA_POD.to_owned()]);
    let policy = Policy::new("nodes-to-ca", cluster, nodes.clone());
    policy.write(out, &[Way::Out], &[Rule(Way::Out, vec![ca], tcp(&CA_PORTS))])?;
    let dns = Peer::Pods("kube-system".to_owned(), vec!["k8s-app: kube-dns".to_owned()]);
    let ports = vec![("UDP", 53, 53), ("TCP", 53, 53)];
    let policy = Policy::new("nodes-to-dns", cluster, nodes);
    policy.write(out, &[Way::Out], &[Rule(Way::Out, vec![dns], ports)])
}

fn write_ca(out: &mut String, clusters: &[&str]) -> fmt::Result {
    writeln!(
        out,
        "# Who may reach ca-server: the Ray pods and drivers of its clusters, and admins. It calls nobody itself."
    )?;
    let pods = vec![CA_POD.to_owned()];
    let deny = Policy::new("ca-default-deny", CA_NAMESPACE, pods.clone());
    deny.write(out, &[Way::In, Way::Out], &[])?;
    let mut peers: Vec<Peer> = clusters
        .iter()
        .flat_map(|cluster| {
            let label = vec![RAY_POD.to_owned(), format!("ray.io/cluster: {cluster}")];
            [
                Peer::Pods((*cluster).to_owned(), label),
                Peer::Namespace(format!("{cluster}-drivers")),
            ]
        })
        .collect();
    peers.push(Peer::Namespace(ADMIN_NAMESPACE.to_owned()));
    let policy = Policy::new("clusters-to-ca", CA_NAMESPACE, pods);
    policy.write(out, &[Way::In], &[Rule(Way::In, peers, tcp(&CA_PORTS))])
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    In,
    Out,
}

#[derive(Clone)]
enum Peer {
    /// Pods of the policy's own namespace with a label.
    SameNamespace(String),
    /// Every pod of a namespace.
    Namespace(String),
    /// Pods of a namespace with labels.
    Pods(String, Vec<String>),
}

type Numbers = (&'static str, u16, u16);

struct Rule(Way, Vec<Peer>, Vec<Numbers>);

struct Policy {
    name: String,
    namespace: String,
    pods: Vec<String>,
}

impl Policy {
    fn new(name: &str, namespace: &str, pods: Vec<String>) -> Self {
        Self { name: name.to_owned(), namespace: namespace.to_owned(), pods }
    }

    fn write(&self, out: &mut String, ways: &[Way], rules: &[Rule]) -> fmt::Result {
        write!(
            out,
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata:\n  name: {}\n  namespace: {}\nspec:\n",
            self.name, self.namespace
        )?;
        write_labels(out, "  podSelector:", 4, &self.pods)?;
        writeln!(out, "  policyTypes:")?;
        for way in ways {
            writeln!(out, "    - {}", if *way == Way::In { "Ingress" } else { "Egress" })?;
        }
        for Rule(way, peers, ports) in rules {
            let (rules, side) =
                if *way == Way::In { ("ingress", "from") } else { ("egress", "to") };
            writeln!(out, "  {rules}:\n    - {side}:")?;
            for peer in peers {
                write_peer(out, peer)?;
            }
            writeln!(out, "      ports:")?;
            for (protocol, first, last) in ports {
                writeln!(out, "        - protocol: {protocol}\n          port: {first}")?;
                if first != last {
                    writeln!(out, "          endPort: {last}")?;
                }
            }
        }
        Ok(())
    }
}

fn write_peer(out: &mut String, peer: &Peer) -> fmt::Result {
    let namespace = |out: &mut String, name: &str| {
        let label = format!("kubernetes.io/metadata.name: {name}");
        write_labels(out, "        - namespaceSelector:", 12, &[label])
    };
    match peer {
        Peer::SameNamespace(label) => {
            let labels = [RAY_POD.to_owned(), label.clone()];
            write_labels(out, "        - podSelector:", 12, &labels)
        }
        Peer::Namespace(name) => namespace(out, name),
        Peer::Pods(name, labels) => {
            namespace(out, name)?;
            write_labels(out, "          podSelector:", 12, labels)
        }
    }
}

fn write_labels(out: &mut String, head: &str, indent: usize, labels: &[String]) -> fmt::Result {
    writeln!(out, "{head}\n{:indent$}matchLabels:", "")?;
    for label in labels {
        writeln!(out, "{:indent$}  {label}", "")?;
    }
    Ok(())
}

fn selector(cluster: &str, kind: Option<&str>) -> Vec<String> {
    let mut labels = vec![RAY_POD.to_owned(), format!("ray.io/cluster: {cluster}")];
    labels.extend(kind.map(|kind| format!("ray.io/node-type: {kind}")));
    labels
}

fn numbers<'a>(rows: impl Iterator<Item = &'a Row>, plan: &v1::PortPlan) -> Vec<Numbers> {
    rows.filter_map(|row| Port::range(row.port, plan))
        .map(|range| ("TCP", *range.start(), *range.end()))
        .collect()
}

fn tcp(ports: &[u16]) -> Vec<Numbers> {
    ports.iter().map(|port| ("TCP", *port, *port)).collect()
}
