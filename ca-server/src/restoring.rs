//! What the nodes say to a restored CA before an operator accepts it: which identity each holds, which
//! leaves, and the CRLs it was given last. All of it is signed by this CA's own keys, or it counts for
//! nothing. Nothing is written here: a restart asks the nodes again.

mod crl;

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use raymtls_proto::{
    address::NodeAddress,
    identity::{ClusterId, NodeName, Role, Subject},
    leaf::LeafFacts,
    v1,
};
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    ca::Ca,
    checkpoints,
    identify::admit,
    keys::{authority::LiveAuthority, csr::key_hash},
    limits::NodeCall,
    refusal::Refusal,
    restoring::crl::Crls,
    store::{Adoption, Authority, Caller, Heard, Signed, Standing, StoreError, unix_ms},
    sync,
};

/// Nodes that are remembered.
const NODES_MAX: usize = 100_000;
/// Leaves of one node.
const LEAVES_MAX: usize = 16;
/// Longest certificate, in bytes.
const CERTIFICATE_LEN_MAX: usize = 8 * 1024;

/// What was heard.
#[derive(Debug, Default)]
pub struct Restoring {
    said: Mutex<Said>,
    accepted: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Said {
    nodes: BTreeMap<(ClusterId, NodeName), Node>,
    crls: Crls,
}

#[derive(Clone, Debug)]
struct Node {
    standing: Standing,
    identity_der: Vec<u8>,
    source: Option<NodeAddress>,
    holding: Option<v1::Holding>,
}

/// What was heard, put together, and what must be known of it besides.
#[derive(Debug, Default)]
pub struct Summary {
    /// For the store.
    pub heard: Heard,
    /// Nodes with the identity of the backup.
    pub in_force: u64,
    /// What is left out, in words.
    pub notes: Vec<String>,
}

impl Restoring {
    /// An operator has accepted: whoever waits goes on as ever.
    pub fn end(&self) {
        self.accepted.send_replace(true);
        *self.lock() = Said::default();
    }

    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().expect("no code panics while it holds what was heard")
    }
}

/// Answers one `Sync` of a restored CA: the node's version as it is, and what is wanted of it.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn sync(
    ca: &Ca,
    caller: &Caller,
    identity_der: Option<Vec<u8>>,
    mut request: v1::SyncRequest,
) -> Result<v1::SyncResponse, StoreError> {
    admit(ca, caller, NodeCall::Sync).await?;
    let mut accepted = ca.restoring.accepted.subscribe();
    let standing = ca.store.standing(caller.clone()).await?;
    if let Standing::Refused(refusal) = standing {
        return Err(refusal.into());
    }
    if let Some(report) = &request.report {
        sync::check_report(report)?;
    }
    ca.contacts.note(caller, ca.clock.now());
    let kept = request.checkpoint.take();
    let restored = note(ca, caller, standing, identity_der.unwrap_or_default(), request.holding);
    let wants = restored.holding_wanted || restored.piece_wanted.is_some();
    if !wants {
        let wait = Duration::from_secs(request.wait_seconds.into()).min(sync::WAIT_MAX);
        tokio::select! {
            _ = accepted.wait_for(|accepted| *accepted) => {}
            () = tokio::time::sleep(wait) => {}
            () = ca.stopped() => {}
        }
    }
    ca.metrics.synced();
    Ok(v1::SyncResponse {
        // Nothing that the node has is to be replaced by what may be older.
        version: request.have,
        server_time_unix: ca.clock.now().unix_timestamp(),
        log: Some(checkpoints::compare(ca, caller, kept.as_ref()).await?),
        restored: Some(restored),
        ..v1::SyncResponse::default()
    })
}

/// Notes what a node said; what is wanted of it next.
fn note(
    ca: &Ca,
    caller: &Caller,
    standing: Standing,
    identity_der: Vec<u8>,
    holding: Option<v1::Holding>,
) -> v1::Restored {
    let elapsed = ca.clock.elapsed();
    let mut said = ca.restoring.lock();
    if let Some(holding) = &holding {
        said.crls.note(ca, caller, holding, elapsed);
    }
    let key = (caller.cluster.clone(), caller.node.clone());
    if said.nodes.len() >= NODES_MAX && !said.nodes.contains_key(&key) {
        return v1::Restored::default();
    }
    let known = said.nodes.get(&key).filter(|node| node.identity_der == identity_der);
    let leaves = holding.map(|mut holding| {
        holding.leaves_der.truncate(LEAVES_MAX);
        holding.leaves_der.retain(|der| der.len() <= CERTIFICATE_LEN_MAX);
        (holding.crls, holding.piece) = (Vec::new(), None);
        holding
    });
    let holding = leaves.or_else(|| known.and_then(|node| node.holding.clone()));
    // A node that was to send a CRL has gone: another may have it.
    let holding_wanted = holding.is_none() || said.crls.has_stalled(elapsed);
    let node = Node { standing, identity_der, source: caller.source, holding };
    said.nodes.insert(key, node);
    let piece_wanted = said.crls.wanted(caller, elapsed);
    v1::Restored { holding_wanted, piece_wanted }
}

/// What was heard so far.
///
/// # Errors
/// No such authority.
pub fn summary(ca: &Ca) -> Result<Summary, Refusal> {
    let control = ca.authority(&Authority::Control)?;
    let (nodes, (revocations, crl_numbers), in_the_making) = {
        let said = ca.restoring.lock();
        (said.nodes.clone(), said.crls.taken(), said.crls.in_the_making())
    };
    let mut summary = Summary::default();
    if in_the_making > 0 {
        let text = format!("{in_the_making} CRLs are being taken back: look again in a moment");
        summary.notes.push(text);
    }
    for ((cluster, node), said) in nodes {
        if said.standing == Standing::InForce {
            summary.in_force += 1;
            continue;
        }
        match adoption(ca, &control, &cluster, &node, &said) {
            Some(adoption) => summary.heard.adoptions.push(adoption),
            None => summary.notes.push(format!(
                "node {node} of cluster {cluster} has an identity of an issuer that was made after the \
                 backup: enrol it again"
            )),
        }
    }
    summary.heard.revocations = revocations;
    summary.heard.crl_numbers = crl_numbers;
    summary.heard.ca_addresses = ca.endpoints.addresses();
    Ok(summary)
}

/// `None`: its identity is of no issuer that this CA has.
fn adoption(
    ca: &Ca,
    control: &LiveAuthority,
    cluster: &ClusterId,
    node: &NodeName,
    said: &Node,
) -> Option<Adoption> {
    let (identity, _) = signed_by(control, &said.identity_der)?;
    let mut adoption = Adoption {
        cluster: cluster.clone(),
        node: node.clone(),
        role: Role::Worker,
        source: said.source,
        identity,
        leaves: Vec::new(),
        addresses: Vec::new(),
        dns_names: Vec::new(),
    };
    let Some(holding) = &said.holding else { return Some(adoption) };
    let claimed = Role::from_proto(holding.role).unwrap_or(Role::Worker);
    adoption.role = if claimed == Role::Head { Role::Head } else { Role::Worker };
    let live = ca.authority(&Authority::Cluster(cluster.clone())).ok()?;
    let now_ms = unix_ms(ca.clock.now());
    for der in &holding.leaves_der {
        let Some((leaf, facts)) = signed_by(&live, der) else { continue };
        let subject = facts.uris.first().and_then(|uri| Subject::parse(uri, &ca.trust_domain).ok());
        let kind = match subject {
            Some(Subject::RayNode(c, n)) if (&c, &n) == (cluster, node) => {
                v1::CertificateKind::RayNode
            }
            Some(Subject::RayDriver(c, n)) if (&c, &n) == (cluster, node) => {
                adoption.role = Role::Driver;
                v1::CertificateKind::RayDriver
            }
            Some(_) | None => continue,
        };
        if leaf.not_after_ms <= now_ms {
            continue;
        }
        for address in &facts.addresses {
            let Ok(address) = NodeAddress::new(*address) else { continue };
            let address = address.to_string();
            if !adoption.addresses.contains(&address) {
                adoption.addresses.push(address);
            }
        }
        for name in facts.dns_names.iter().filter(|name| *name != "localhost") {
            if !adoption.dns_names.contains(name) {
                adoption.dns_names.push(name.clone());
            }
        }
        adoption.leaves.push((kind, leaf));
    }
    Some(adoption)
}

/// A certificate that one of the authority's issuers signed, as it would be put on record.
fn signed_by(authority: &LiveAuthority, der: &[u8]) -> Option<(Signed, LeafFacts)> {
    let facts = LeafFacts::parse(der).ok()?;
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let issuer = authority.issuers().iter().find(|issuer| {
        X509Certificate::from_der(issuer.certificate_der()).is_ok_and(|(_, issuer)| {
            certificate.verify_signature(Some(issuer.public_key())).is_ok()
        })
    })?;
    let signed = Signed {
        serial: facts.serial,
        certificate_der: der.to_vec(),
        issued_ms: i64::try_from(facts.serial.unix_ms()).ok()?,
        not_after_ms: unix_ms(facts.not_after),
        issuer_key_id: issuer.key_id().to_vec(),
        key_hash: key_hash(&facts.spki_der),
    };
    (!facts.is_ca).then_some((signed, facts))
}
