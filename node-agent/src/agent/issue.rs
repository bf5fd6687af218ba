//! Fetching certificates: the key is on the disk before the request where a lost reply would cost
//! something, and what comes back is judged before it replaces anything.

use raymtls_proto::{
    clock::{self, Clock},
    leaf::LeafFacts,
    v1,
};
use time::OffsetDateTime;
use tokio::time::Instant;

use super::{ActError, Agent, AgentFolder};
use crate::{
    api::SerialChange,
    client::{CallError, NodeClient},
    hooks::Event as HookEvent,
    keyfolder::FOLDERS_MAX,
    keys::PrivateKey,
    moment::Moment,
    state::Call,
    statedir::{Identity, NodeFile, WaitingKey},
    verify::{self, VerifyError, Wanted},
};

/// A leaf that was judged and found good, with the bundle it chains to.
pub(crate) struct Leaf {
    pub(crate) chain: v1::CertificateChain,
    pub(crate) facts: LeafFacts,
    pub(crate) bundle: v1::TrustBundle,
    pub(crate) server_time_unix: i64,
}

/// Asks for a Ray leaf for this key and judges it.
pub(crate) async fn fetch_leaf(
    client: &NodeClient,
    node: &NodeFile,
    key: &PrivateKey,
    known_bundle: Option<&v1::TrustBundle>,
    clock: &dyn Clock,
) -> Result<Leaf, ActError> {
    let request = v1::IssueLeafRequest {
        csr_der: key.csr_der()?,
        purpose: node.purpose().into(),
        addresses: node.addresses.iter().map(ToString::to_string).collect(),
        dns_names: node.leaf_dns_names().to_vec(),
    };
    let answer = client.issue_leaf(request).await?;
    let chain = answer.leaf.ok_or(VerifyError::Missing("the leaf"))?;
    let bundle = answer
        .bundle
        .or_else(|| known_bundle.cloned())
        .ok_or(VerifyError::Missing("the trust bundle"))?;
    verify::bundle(&bundle)?;
    let roots: Vec<_> = bundle.roots_der.iter().map(|der| der.as_slice().into()).collect();
    let wanted = Wanted {
        subject: &node.ray(),
        trust_domain: &node.trust_domain,
        spki_der: &key.spki_der(),
        addresses: &node.addresses,
        dns_names: node.leaf_dns_names(),
        now: judged_at(answer.server_time_unix, clock),
    };
    let facts = verify::leaf(&chain, &roots, &wanted)?;
    Ok(Leaf { chain, facts, bundle, server_time_unix: answer.server_time_unix })
}

/// What the CA made is judged by the CA's clock, which came with it over verified TLS: a host whose
/// clock is wrong needs certificates too, and its peers look at them with clocks that are right.
fn judged_at(server_time_unix: i64, clock: &dyn Clock) -> OffsetDateTime {
    let said = clock::from_unix(server_time_unix).filter(|at| *at > OffsetDateTime::UNIX_EPOCH);
    said.unwrap_or_else(|| clock.now())
}

/// Judges an identity and puts it together with its key.
pub(crate) fn accept_identity(
    answer: (Option<v1::CertificateChain>, i64),
    key: PrivateKey,
    node: &NodeFile,
    clock: &dyn Clock,
) -> Result<Identity, ActError> {
    let (chain, server_time_unix) = answer;
    let chain = chain.ok_or(VerifyError::Missing("the identity"))?;
    let wanted = Wanted {
        subject: &node.agent(),
        trust_domain: &node.trust_domain,
        spki_der: &key.spki_der(),
        addresses: &[],
        dns_names: &[],
        now: judged_at(server_time_unix, clock),
    };
    verify::identity(&chain, &node.control_roots, &wanted)?;
    Ok(Identity::new(key, chain).map_err(|_| VerifyError::OtherKey)?)
}

impl Agent {
    /// The next identity, for a key that is on the disk before it is sent. After a crash anywhere in
    /// here the next start sends the same key again and gets the same certificate.
    pub(super) async fn renew_identity(&mut self) -> Result<SerialChange, ActError> {
        // A call begun with the old identity must not stand beside one made with the next.
        self.sync.end();
        let key = self.state.waiting_key(WaitingKey::Renewal)?;
        self.renewal_pending = true;
        let asked = self.clock.elapsed();
        let answer = self.client()?.renew_identity(key.csr_der()?).await?;
        self.hear_time(answer.server_time_unix, self.clock.elapsed().saturating_sub(asked));
        self.answered();
        let identity = accept_identity(
            (answer.identity, answer.server_time_unix),
            key,
            &self.node,
            &*self.clock,
        )?;
        self.state.put_identity(&identity)?;
        let change = SerialChange {
            name: "identity".to_owned(),
            old: self.identity.serial().to_string(),
            new: identity.serial().to_string(),
        };
        self.identity = identity;
        self.renewal_pending = false;
        self.client = None;
        self.renewals += 1;
        self.held.remove(&Call::RenewIdentity);
        tracing::info!(old = %change.old, serial = %change.new, not_after = %Moment::from(self.identity.facts.not_after), "identity renewed");
        Ok(change)
    }

    /// Makes what is missing of a valid current key folder, `ray.env` and Ray's token.
    pub(crate) async fn first_files(&mut self) -> Result<(), ActError> {
        let valid = self.files_work_until(self.clock.now()).is_some();
        if !valid {
            self.new_folder().await?;
        }
        let complete = valid && (self.tls.has_token() || !self.with_token());
        match self.sync_once().await {
            // Nothing was missing: news can wait for the daemon.
            Err(ActError::Call(CallError::Away(why))) if complete => {
                tracing::warn!(%why, "the CA cannot be reached; all files are there");
            }
            other => other?,
        }
        self.publish();
        Ok(())
    }

    /// The next leaf for the key of a folder: same key, one rename.
    pub(super) async fn renew_leaf(&mut self, number: u32) -> Result<SerialChange, ActError> {
        let key = self.tls.key(number)?;
        let leaf = match self.fetch(&key).await {
            Ok(leaf) => leaf,
            Err(error) => {
                self.note_key_too_old(number, &error);
                return Err(error);
            }
        };
        // Roots before the leaf that may need them, and after it where the old leaf held them back.
        self.learn_bundle(&leaf)?;
        self.tls.replace_leaf(number, &leaf.chain)?;
        let held = self.folders.iter_mut().find(|f| f.folder.number == number);
        let held = held.expect("a folder that is renewed is in the list");
        let change = SerialChange {
            name: held.folder.name(),
            old: held.folder.facts.serial.to_string(),
            new: leaf.facts.serial.to_string(),
        };
        tracing::info!(key_folder = %change.name, old = %change.old, serial = %change.new, not_after = %Moment::from(leaf.facts.not_after), "leaf renewed");
        held.folder.chain = leaf.chain;
        held.folder.facts = leaf.facts;
        held.leaf_since = self.clock.elapsed();
        let begun = held.life().has_begun(self.clock.now());
        self.tls.put_bundle(number, &leaf.bundle)?;
        self.held.remove(&Call::RenewLeaf(number));
        if !begun {
            // Dated ahead of the time the CA itself says: the next one is not fetched at once.
            self.pause(Call::RenewLeaf(number), self.config.pauses.refused);
        }
        self.key_folder_changed();
        self.hooks.tell(HookEvent::LeafRenewed, &self.tls.folder_path(number));
        self.sync.report_soon();
        Ok(change)
    }

    /// A key folder of its own for what starts from now on.
    pub(super) async fn new_folder(&mut self) -> Result<u32, ActError> {
        if self.folders.len() >= FOLDERS_MAX {
            return Err(ActError::TooManyFolders(self.folders.len()));
        }
        let key = PrivateKey::generate()?;
        let leaf = self.fetch(&key).await?;
        self.learn_bundle(&leaf)?;
        let number = self.tls.next_number()?;
        let folder = self.tls.create(number, &key, leaf.chain, leaf.facts, &leaf.bundle)?;
        tracing::info!(key_folder = %folder.name(), serial = %folder.facts.serial, not_after = %Moment::from(folder.facts.not_after), "new key folder");
        self.folders.push(AgentFolder::new(folder, self.clock.elapsed()));
        self.make_current(number)?;
        self.folder_made_at = Some(Instant::now());
        self.held.remove(&Call::NewFolder);
        if std::mem::take(&mut self.folder_wanted) {
            self.keep(self.memory.clone())?;
        }
        self.hooks.tell(HookEvent::NewKeyFolder, &self.tls.folder_path(number));
        self.sync.report_soon();
        Ok(number)
    }

    async fn fetch(&mut self, key: &PrivateKey) -> Result<Leaf, ActError> {
        let client = self.client()?;
        let known = self.memory.bundle();
        let asked = self.clock.elapsed();
        let leaf = fetch_leaf(&client, &self.node, key, known, &*self.clock).await?;
        self.hear_time(leaf.server_time_unix, self.clock.elapsed().saturating_sub(asked));
        self.renewals += 1;
        self.answered();
        Ok(leaf)
    }

    /// Takes a bundle that came with a leaf over into every folder and the memory.
    fn learn_bundle(&mut self, leaf: &Leaf) -> Result<(), ActError> {
        if self.memory.bundle() == Some(&leaf.bundle) {
            return Ok(());
        }
        self.write_bundle(&leaf.bundle)?;
        let mut memory = self.memory.clone();
        memory.merge(&v1::SyncResponse {
            bundle: Some(leaf.bundle.clone()),
            server_time_unix: leaf.server_time_unix,
            ..v1::SyncResponse::default()
        });
        self.keep(memory)
    }

    fn note_key_too_old(&mut self, number: u32, error: &ActError) {
        if !error.is_key_too_old() {
            return;
        }
        self.answered();
        self.held.remove(&Call::RenewLeaf(number));
        if let Some(held) = self.folders.iter_mut().find(|f| f.folder.number == number) {
            held.key_too_old = true;
            tracing::warn!(key_folder = %held.folder.name(), %error, "its key is renewed no more");
        }
    }
}
