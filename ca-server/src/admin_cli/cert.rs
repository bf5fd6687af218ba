//! `ca-admin cert`: list, show, revoke. The facts are read from the certificate itself, by the parser the
//! agents use.

use clap::{Args, Subcommand};
use raymtls_proto::{
    bundle,
    identity::{ClusterId, NodeName},
    leaf::LeafFacts,
    serial::Serial,
    v1,
};
use serde::Serialize;
use time::OffsetDateTime;

use super::{
    client::{self, Client},
    consent::Consent,
    failure::Failure,
    moment::Moment,
    node::reason,
    output::{Screen, Table, View, or_dash, printable},
};
use crate::refusal::Refusal;

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Lists a cluster's certificates.
    #[command(after_help = "\
Examples:
  ca-admin cert list --cluster c1
  ca-admin cert list --cluster c1 --node worker-7
  ca-admin -o json cert list --cluster c1")]
    List {
        /// Name of the cluster.
        #[arg(long)]
        cluster: ClusterId,

        /// Only those of this node.
        #[arg(long, value_name = "NAME")]
        node: Option<NodeName>,
    },

    /// Shows what one certificate says.
    #[command(after_help = "\
The serial number is 32 hexadecimal digits, as `cert list` prints it or as OpenSSL does with colons.

Examples:
  ca-admin cert show --cluster c1 019ab697e80007070707070707070707
  ca-admin cert show --cluster c1 019ab697e80007070707070707070707 --pem")]
    Show(Show),

    /// Revokes the key of a Ray leaf: all its certificates go on the CRL, and its node makes a new key.
    #[command(after_help = "\
It blocks no address, and the node stays a member: use `node revoke` to cut a host off. An identity is
not revoked by itself: revoke its node.

Examples:
  ca-admin cert revoke --cluster c1 019ab697e80007070707070707070707 --reason 'key in a backup'
  ca-admin cert revoke --cluster c1 019ab697e80007070707070707070707 --reason drill --yes")]
    Revoke(Revoke),
}

#[derive(Debug, Args)]
pub(super) struct Revoke {
    /// Name of the cluster.
    #[arg(long)]
    cluster: ClusterId,

    /// Serial number of any certificate of the key.
    serial: Serial,

    /// Why: stands in the audit log.
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    reason: String,

    #[command(flatten)]
    consent: Consent,
}

#[derive(Debug, Args)]
pub(super) struct Show {
    /// Name of the cluster.
    #[arg(long)]
    cluster: ClusterId,

    /// Serial number.
    serial: Serial,

    /// Print the certificate itself too.
    #[arg(long)]
    pem: bool,
}

/// Does one verb.
pub(super) async fn run(verb: Verb, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    match verb {
        Verb::List { cluster, node } => list(&cluster, node.as_ref(), client, screen).await,
        Verb::Show(args) => show(&args, client, screen).await,
        Verb::Revoke(args) => revoke(args, client, screen).await,
    }
}

async fn list(
    cluster: &ClusterId,
    node: Option<&NodeName>,
    client: &Client,
    screen: &mut Screen,
) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let certificates = client::all_pages(async |page| {
        let request = v1::ListCertificatesRequest {
            cluster: cluster.to_string(),
            node: node.map(ToString::to_string).unwrap_or_default(),
            page,
        };
        let answer = admin.list_certificates(request).await?.into_inner();
        Ok((answer.certificates, answer.next_page))
    })
    .await?;
    let certificates = certificates.iter().map(RecordView::new).collect();
    Ok(screen.show(&CertificateList { certificates })?)
}

async fn show(args: &Show, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let request = v1::GetCertificateRequest {
        cluster: args.cluster.to_string(),
        serial: args.serial.as_bytes().to_vec(),
    };
    let certificate = client.connect().await?.get_certificate(request).await?.into_inner();
    Ok(screen.show(&CertificateView::new(&certificate, args.pem)?)?)
}

async fn revoke(args: Revoke, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let (cluster, serial) = (args.cluster.to_string(), args.serial.as_bytes().to_vec());
    let asked = v1::GetCertificateRequest { cluster: cluster.clone(), serial: serial.clone() };
    let certificate = admin.get_certificate(asked).await?.into_inner();
    must_be_a_leaf(&certificate)?;
    let certificate = RecordView::new(&certificate);
    args.consent.ask(&certificate.revocation_plan(screen.now()), screen).await?;
    let request = v1::RevokeCertificateRequest { cluster, serial, reason: args.reason };
    let answer = admin.revoke_certificate(request).await?.into_inner();
    Ok(screen.show(&RevokedView::new(&answer))?)
}

/// Asked before anything is said of what will be done. The CA has the last word.
fn must_be_a_leaf(certificate: &v1::Certificate) -> Result<(), Failure> {
    use v1::CertificateKind::{AdminIdentity, AgentIdentity};
    if !matches!(certificate.kind(), AgentIdentity | AdminIdentity) {
        return Ok(());
    }
    let refusal = Refusal::RequestInvalid(format!(
        "certificate {} is an identity, no Ray leaf, and is not revoked by itself: revoke its node, \
         ca-admin node revoke --cluster {} {}",
        RecordView::new(certificate).serial,
        certificate.cluster,
        certificate.node
    ));
    Err(Failure::Refused { reason: refusal.reason(), message: refusal.to_string() })
}

/// What came of a revocation.
#[derive(Debug, Serialize)]
struct RevokedView {
    node: String,
    serials: Vec<String>,
    /// Until when Ray accepts them.
    not_after: Moment,
    notes: Vec<String>,
}

impl RevokedView {
    fn new(answer: &v1::RevokeCertificateResponse) -> Self {
        let serial = |bytes: &Vec<u8>| Serial::from_slice(bytes).ok().map(|s| s.to_string());
        Self {
            node: answer.node.clone(),
            serials: answer.serials.iter().filter_map(serial).collect(),
            not_after: Moment::from_unix(answer.not_after_unix),
            notes: answer.notes.clone(),
        }
    }
}

impl View for RevokedView {
    fn text(&self, _now: OffsetDateTime) -> String {
        let mut text = printable(&format!("the key is revoked; its node is {}", self.node)) + "\n";
        for serial in &self.serials {
            text.push_str(&format!("  on the CRL: {serial}\n"));
        }
        for note in &self.notes {
            text.push_str(&format!("  note: {}\n", printable(note)));
        }
        text
    }
}

/// What the CA's record says of a certificate.
#[derive(Debug, Serialize)]
struct RecordView {
    serial: String,
    kind: &'static str,
    cluster: String,
    node: String,
    issued: Moment,
    not_after: Moment,
    revoked: Moment,
    revoked_reason: String,
}

impl RecordView {
    fn new(certificate: &v1::Certificate) -> Self {
        Self {
            serial: Serial::from_slice(&certificate.serial)
                .map(|serial| serial.to_string())
                .unwrap_or_default(),
            kind: kind(certificate.kind),
            cluster: certificate.cluster.clone(),
            node: certificate.node.clone(),
            issued: Moment::from_unix(certificate.issued_unix),
            not_after: Moment::from_unix(certificate.not_after_unix),
            revoked: Moment::from_unix(certificate.revoked_unix),
            revoked_reason: certificate.revoked_reason.clone(),
        }
    }

    fn revocation_plan(&self, now: OffsetDateTime) -> Vec<String> {
        vec![
            format!("the key of {} {} will be revoked:", self.kind, self.serial),
            "  all its certificates go on the CRL, and it gets no other".to_owned(),
            format!("  node {} starts a new key folder; no address is blocked", self.node),
            format!(
                "  Ray checks no CRL: its processes accept this one until {}",
                self.not_after.human(now)
            ),
        ]
    }

    fn revoked_words(&self, now: OffsetDateTime) -> String {
        if self.revoked.is_none() {
            return "-".to_owned();
        }
        format!("{}: {}", self.revoked.human(now), or_dash(&self.revoked_reason))
    }
}

#[derive(Debug, Serialize)]
struct CertificateList {
    certificates: Vec<RecordView>,
}

impl View for CertificateList {
    fn text(&self, now: OffsetDateTime) -> String {
        if self.certificates.is_empty() {
            return "no certificates\n".to_owned();
        }
        let mut table =
            Table::with_head(&["SERIAL", "KIND", "NODE", "ISSUED", "NOT-AFTER", "REVOKED"]);
        for view in &self.certificates {
            table.row([
                view.serial.clone(),
                view.kind.to_owned(),
                view.node.clone(),
                view.issued.human(now),
                view.not_after.human(now),
                view.revoked_words(now),
            ]);
        }
        table.to_string()
    }
}

/// The record, and what the certificate itself says.
#[derive(Debug, Serialize)]
struct CertificateView {
    #[serde(flatten)]
    record: RecordView,
    not_before: Moment,
    uris: Vec<String>,
    addresses: Vec<String>,
    dns_names: Vec<String>,
    extended_key_usage: Vec<&'static str>,
    is_ca: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pem: Option<String>,
}

impl CertificateView {
    fn new(certificate: &v1::Certificate, with_pem: bool) -> Result<Self, Failure> {
        let facts = LeafFacts::parse(&certificate.certificate_der)
            .map_err(|e| Failure::Failed(format!("the CA's answer holds an {e}")))?;
        let mut record = RecordView::new(certificate);
        // The certificate's own word, not the record's.
        record.serial = facts.serial.to_string();
        record.not_after = Moment::at(facts.not_after);
        Ok(Self {
            record,
            not_before: Moment::at(facts.not_before),
            extended_key_usage: usages(&facts),
            is_ca: facts.is_ca,
            addresses: facts.addresses.iter().map(ToString::to_string).collect(),
            uris: facts.uris,
            dns_names: facts.dns_names,
            pem: with_pem
                .then(|| bundle::certificates_to_pem(&[certificate.certificate_der.as_slice()])),
        })
    }
}

impl View for CertificateView {
    fn text(&self, now: OffsetDateTime) -> String {
        let record = &self.record;
        let mut table = Table::of_facts();
        table.fact("serial", &record.serial);
        table.fact("kind", record.kind);
        table.fact("cluster", &record.cluster);
        table.fact("node", &record.node);
        table.fact("issued", record.issued.human(now));
        table.fact("not before", self.not_before.human(now));
        table.fact("not after", record.not_after.human(now));
        table.fact("revoked", record.revoked_words(now));
        table.facts("uri", &self.uris);
        table.facts("addresses", &self.addresses);
        table.facts("dns names", &self.dns_names);
        table.fact("usage", self.extended_key_usage.join(", "));
        format!("{table}{}", self.pem.as_deref().unwrap_or(""))
    }
}

fn usages(facts: &LeafFacts) -> Vec<&'static str> {
    [
        (facts.server_auth, "serverAuth"),
        (facts.client_auth, "clientAuth"),
        (facts.other_eku, "other"),
    ]
    .into_iter()
    .filter_map(|(is, name)| is.then_some(name))
    .collect()
}

fn kind(kind: i32) -> &'static str {
    match v1::CertificateKind::try_from(kind) {
        Ok(v1::CertificateKind::AgentIdentity) => "agent-identity",
        Ok(v1::CertificateKind::AdminIdentity) => "admin-identity",
        Ok(v1::CertificateKind::RayNode) => "ray-node",
        Ok(v1::CertificateKind::RayDriver) => "ray-driver",
        Ok(v1::CertificateKind::Unspecified) | Err(_) => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> OffsetDateTime {
        raymtls_proto::clock::from_unix(1_764_000_000).unwrap()
    }

    fn certificate() -> v1::Certificate {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let serial = Serial::new(1_764_000_000_000, [7; 10]);
        params.serial_number = Some(rcgen::SerialNumber::from_slice(serial.as_bytes()));
        v1::Certificate {
            serial: serial.as_bytes().to_vec(),
            kind: v1::CertificateKind::RayNode.into(),
            cluster: "c1".to_owned(),
            node: "n1".to_owned(),
            certificate_der: params.self_signed(&key).unwrap().der().to_vec(),
            issued_unix: 1_764_000_000,
            ..Default::default()
        }
    }

    #[test]
    fn the_facts_are_those_of_the_certificate() {
        let text = CertificateView::new(&certificate(), false).unwrap().text(now());
        for part in ["019ab697e80007070707070707070707", "ray-node", "localhost", "clientAuth"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("serverAuth") && !text.contains("BEGIN"), "{text}");
    }

    #[test]
    fn the_pem_comes_only_when_asked_for() {
        let with = CertificateView::new(&certificate(), true).unwrap();
        assert!(with.text(now()).contains("-----BEGIN CERTIFICATE-----"));
        let json = serde_json::to_value(CertificateView::new(&certificate(), false).unwrap());
        let json = json.unwrap();
        assert!(json.get("pem").is_none());
        assert_eq!(json["serial"], "019ab697e80007070707070707070707");
        assert_eq!(json["issued"], "2025-11-24T16:00:00Z");
    }

    #[test]
    fn an_identity_is_refused_before_anything_is_planned() {
        let identity =
            v1::Certificate { kind: v1::CertificateKind::AgentIdentity.into(), ..certificate() };
        let refused = must_be_a_leaf(&identity).unwrap_err().to_string();
        assert!(refused.contains("node revoke --cluster c1 n1"), "{refused}");
        assert!(must_be_a_leaf(&certificate()).is_ok());
    }

    #[test]
    fn an_unreadable_certificate_is_an_error() {
        let broken = v1::Certificate { certificate_der: vec![0x30], ..certificate() };
        assert!(CertificateView::new(&broken, false).is_err());
    }
}
