//! The walk through the store: every record is read once, in the order of its key, and whatever it
//! points at is looked up. Its memory does not grow with the store.

use std::panic::{AssertUnwindSafe, catch_unwind};

use raymtls_proto::{
    checkpoint,
    digest::sha256,
    identity::{ClusterId, NodeName},
    leaf::LeafFacts,
    v1::{self, AuditKind, AuditRecord},
};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _};

use super::{Report, State};
use crate::{
    keys::{authority::LiveAuthority, kek::Kek},
    store::{
        Authority, FORMAT, StoreError, layout,
        record::Record,
        records::{
            AuditHead, BlockRecord, CaKey, CertificateRecord, Checkpoint, ClusterRecord,
            ControlRecord, CrlSet, Header, IdentityRecord, KeyRecord, MemberRecord, NodeRecord,
            NodeStatus, RestoresRecord, RevocationRecord, TokenRecord, UseRecord,
        },
        unix_ms,
        view::{Reader, audit_hash, empty_audit_head},
    },
};

/// Pairs read at once.
const PAGE: usize = 512;
/// Records between two words of progress.
const PROGRESS_EVERY: u64 = 50_000;
/// First byte of the engine's own keys.
const ENGINES_OWN: u8 = b'~';

type Checked = Result<(), String>;

/// Walks through all of it.
pub(super) fn walk(
    reader: &dyn Reader,
    now_ms: i64,
    kek: Option<&Kek>,
    report: &mut Report,
    progress: &mut dyn FnMut(u64),
) {
    let mut walk = Walk {
        reader,
        now_ms,
        kek,
        state: State([0; 32]),
        audit: empty_audit_head(),
        report,
        progress,
    };
    for first in 0..=u8::MAX {
        if first != ENGINES_OWN {
            walk.below(first);
        }
    }
    walk.ends();
    walk.report.state_sha256 = hex::encode(walk.state.0);
}

struct Walk<'a> {
    reader: &'a dyn Reader,
    now_ms: i64,
    kek: Option<&'a Kek>,
    state: State,
    /// The newest audit record passed.
    audit: AuditHead,
    report: &'a mut Report,
    progress: &'a mut dyn FnMut(u64),
}

impl Walk<'_> {
    /// All keys that begin with this byte.
    fn below(&mut self, first: u8) {
        let mut after: Option<Vec<u8>> = None;
        loop {
            let reader = self.reader;
            // sled panics on some damage.
            let page =
                catch_unwind(AssertUnwindSafe(|| reader.scan(&[first], after.as_deref(), PAGE)));
            let pairs = match page {
                Ok(Ok(pairs)) => pairs,
                Ok(Err(error)) => {
                    return self.unreadable(first, after.as_deref(), &error.to_string());
                }
                Err(_) => {
                    return self.unreadable(first, after.as_deref(), "the database is damaged");
                }
            };
            let ended = pairs.len() < PAGE;
            after = pairs.last().map(|(key, _)| key.clone());
            for (key, value) in pairs {
                self.pair(&key, &value);
            }
            if ended {
                return;
            }
        }
    }

    fn unreadable(&mut self, first: u8, after: Option<&[u8]>, why: &str) {
        let at = after.map_or_else(|| named(&[first]), named);
        self.report.find(format!("behind {at}"), format!("cannot be read: {why}"));
    }

    fn pair(&mut self, key: &[u8], value: &[u8]) {
        self.state.add(key, value);
        self.report.records += 1;
        if self.report.records.is_multiple_of(PROGRESS_EVERY) {
            (self.progress)(self.report.records);
        }
        let judged = catch_unwind(AssertUnwindSafe(|| self.judge(key, value)));
        let judged = judged.unwrap_or_else(|_| Err("the database is damaged".to_owned()));
        if let Err(what) = judged {
            self.report.find(named(key), what);
        }
    }

    fn judge(&mut self, key: &[u8], value: &[u8]) -> Checked {
        if key == layout::HEADER {
            let header: Header = read(value)?;
            return is(header.format == FORMAT, || {
                format!("format {}: this program reads {FORMAT}", header.format)
            });
        }
        if key == layout::CONTROL {
            return self.control(&read(value)?);
        }
        if key == layout::AUDIT_HEAD {
            return read::<AuditHead>(value).map(drop);
        }
        if key == layout::CHECKPOINT {
            return self.checkpoint(&read(value)?);
        }
        if key == layout::PRUNED {
            return self.pruned(&read(value)?);
        }
        if key == layout::RESTORES {
            return read::<RestoresRecord>(value).map(drop);
        }
        let (kind, rest) = match key {
            [kind, b'/', rest @ ..] => (*kind, rest),
            _ => return Err("no record of a CA has such a key".to_owned()),
        };
        match kind {
            b'a' => self.audit(rest, value),
            b'b' => self.block(rest, value),
            b'c' => self.cluster(rest, &read(value)?),
            b'h' => self.holder(rest, value),
            b'k' => self.token_index(rest, value),
            b'l' => self.crls(rest, &read(value)?),
            b'm' => self.member(rest, &read(value)?),
            b'n' => self.node(rest, &read(value)?),
            b'p' => self.counted(rest, value),
            b'q' => self.key_use(rest, &read(value)?),
            b'r' => self.revocation(rest, &read(value)?),
            b's' => self.certificate(rest, &read(value)?),
            b't' => self.token(rest, &read(value)?),
            b'u' => self.token_use(rest, &read(value)?),
            b'x' => self.certificate_index(rest, value, false),
            b'y' => self.certificate_index(rest, value, true),
            _ => Err("no record of a CA has such a key".to_owned()),
        }
    }

    /// What must be there at the end.
    fn ends(&mut self) {
        for key in [layout::HEADER, layout::CONTROL, layout::AUDIT_HEAD] {
            if !matches!(self.reader.get(key), Ok(Some(_))) {
                self.report.find(named(key), "missing");
            }
        }
        let head = self.get::<AuditHead>(layout::AUDIT_HEAD).ok().flatten();
        if let Some(head) = head.filter(|head| *head != self.audit) {
            let what = format!(
                "the log ends at record {}, and was written up to {}",
                self.audit.index, head.index
            );
            self.report.find("audit log", what);
        }
        self.report.audit_last = self.audit.index;
        self.report.audit_last_sha256 = hex::encode(&self.audit.hash);
    }

    /// The log holds what a checkpoint names, and the control authority vouches for it.
    fn checkpoint(&self, record: &Checkpoint) -> Checked {
        let control: ControlRecord = self.must(layout::CONTROL)?;
        let root = control.root.ok_or("the control authority has no root")?;
        checkpoint::check(record, [root.certificate_der.as_slice()]).map_err(|e| e.to_string())?;
        let named = self.reader.get(&layout::audit(record.index)).map_err(|e| e.to_string())?;
        is(named.is_some_and(|named| audit_hash(&named)[..] == record.hash), || {
            format!(
                "the log has another record {} than the one that was signed: it was edited, cut or \
                 rolled back",
                record.index
            )
        })
    }

    /// Where the log begins: its key comes before those of the log.
    fn pruned(&mut self, record: &Checkpoint) -> Checked {
        self.checkpoint(record)?;
        let oldest: AuditRecord = self.must(&layout::audit(record.index))?;
        self.audit = AuditHead { index: record.index - 1, hash: oldest.previous_hash };
        self.report.audit_first = record.index;
        Ok(())
    }

    fn audit(&mut self, rest: &[u8], value: &[u8]) -> Checked {
        let index = <[u8; 8]>::try_from(rest).map(u64::from_be_bytes);
        let index = index.map_err(|_| "no index of the audit log".to_owned())?;
        if index < self.report.audit_first {
            // A pruning that was cut short: the next one removes it.
            return Ok(());
        }
        self.report.audit_records += 1;
        let before = std::mem::replace(
            &mut self.audit,
            AuditHead { index, hash: audit_hash(value).to_vec() },
        );
        let record: AuditRecord = read(value)?;
        is(record.index == index, || format!("it is record {}", record.index))?;
        if index != before.index + 1 {
            return Err(format!("records {} to {} are missing", before.index + 1, index - 1));
        }
        if record.previous_hash != before.hash {
            return Err("the record before it is not the one it was written after".to_owned());
        }
        let issued = matches!(
            record.kind(),
            AuditKind::Enrolled | AuditKind::IdentityRenewed | AuditKind::LeafIssued
        );
        if issued && !self.has(&layout::certificate(&record.serial))? {
            let serial = hex::encode(&record.serial);
            return Err(format!("the certificate {serial} it tells of is missing"));
        }
        Ok(())
    }

    fn control(&self, record: &ControlRecord) -> Checked {
        ca_keys(&Authority::Control, record.root.as_ref(), &record.issuers)?;
        match self.kek {
            Some(kek) => LiveAuthority::control(kek, record).map(drop).map_err(|e| e.to_string()),
            None => Ok(()),
        }
    }

    fn cluster(&self, rest: &[u8], record: &ClusterRecord) -> Checked {
        let name: ClusterId = parse(rest)?;
        is(record.cluster == name.as_str(), || format!("it is cluster {:?}'s", record.cluster))?;
        is(record.pressing_version().max(record.members_version) <= record.version, || {
            "a part of it is newer than the whole".to_owned()
        })?;
        ca_keys(&Authority::Cluster(name.clone()), record.root.as_ref(), &record.issuers)?;
        match self.kek {
            Some(kek) => {
                LiveAuthority::cluster(kek, &name, record).map(drop).map_err(|e| e.to_string())
            }
            None => Ok(()),
        }
    }

    fn crls(&self, rest: &[u8], record: &CrlSet) -> Checked {
        let cluster = text(rest)?;
        let revocations = if cluster.is_empty() {
            self.must::<ControlRecord>(layout::CONTROL)?.revocations
        } else {
            self.must::<ClusterRecord>(&layout::cluster(cluster))?.revocations
        };
        is(record.covers <= revocations, || {
            format!("covers {} revocations of {revocations}", record.covers)
        })?;
        for der in &record.crls_der {
            CertificateRevocationList::from_der(der).map_err(|e| format!("no CRL: {e}"))?;
        }
        Ok(())
    }

    fn token(&self, rest: &[u8], record: &TokenRecord) -> Checked {
        let id = text(rest)?;
        is(record.id == id, || format!("it is token {:?}'s", record.id))?;
        is(record.secret_hash.len() == 32, || "its secret's hash is cut".to_owned())?;
        self.must::<ClusterRecord>(&layout::cluster(&record.cluster))?;
        self.indexed(&layout::cluster_token(&record.cluster, id))?;
        is(record.used <= record.uses, || "it was used more often than it may be".to_owned())?;
        let most = usize::try_from(record.used).unwrap_or(usize::MAX).saturating_add(1);
        let uses = self.reader.scan(&layout::token_use(id, &[]), None, most);
        let uses = uses.map_err(|e| e.to_string())?.len();
        is(uses + 1 == most, || format!("it was used {} times, {uses} are on record", record.used))
    }

    fn token_index(&self, rest: &[u8], value: &[u8]) -> Checked {
        let (cluster, id) = two(rest)?;
        is(value.is_empty(), || "an index has a value".to_owned())?;
        let token: TokenRecord = self.must(&layout::token(id))?;
        is(token.cluster == cluster, || format!("the token is cluster {:?}'s", token.cluster))
    }

    fn token_use(&self, rest: &[u8], record: &UseRecord) -> Checked {
        let (id, key_hash) = split(rest)?;
        is(key_hash.len() == 32, || "no hash of a key".to_owned())?;
        let token: TokenRecord = self.must(&layout::token(text(id)?))?;
        is(token.used > 0, || "the token was never used".to_owned())?;
        let certificate: CertificateRecord = self.must(&layout::certificate(&record.serial))?;
        is(certificate.key_hash == key_hash && certificate.node == record.node, || {
            "the identity it tells of is another's".to_owned()
        })
    }

    fn node(&self, rest: &[u8], record: &NodeRecord) -> Checked {
        let (cluster, name) = two(rest)?;
        is(record.cluster == cluster && record.name == name, || {
            format!("it is node {}/{}'s", record.cluster, record.name)
        })?;
        parse::<NodeName>(name.as_bytes())?;
        let of: ClusterRecord = self.must(&layout::cluster(cluster))?;
        for identity in record.identity.iter().chain(&record.pending) {
            self.identity(record, identity)?;
        }
        if record.node_status() != NodeStatus::Live {
            return Ok(());
        }
        is(record.member_version <= of.version, || "it is newer than its cluster".to_owned())?;
        if record.member_version != 0 {
            let told: MemberRecord = self.must(&layout::member(cluster, record.member_version))?;
            is(told.name == name, || format!("its peers were told of {:?}", told.name))?;
        }
        let counted = record.addresses.iter().filter(|bound| bound.proved && !bound.lost);
        for bound in counted.filter(|_| record.holds_exclusively()) {
            let key = layout::counted(cluster, &bound.address);
            let counts = self.reader.get(&key).map_err(|e| e.to_string())?;
            is(counts.is_some_and(|name| name == record.name.as_bytes()), || {
                format!("nobody is on record as counting at its {}", bound.address)
            })?;
        }
        let held = record.addresses.iter().filter(|bound| !bound.lost);
        // Who was silent for long may have lost an address to one that has it no more either.
        let keeps = record.holds_exclusively() && !record.is_absent(self.now_ms, 0);
        for bound in held.filter(|_| keeps) {
            if !self.has(&layout::holder(cluster, &bound.address))?
                && !self.has_another(record, &bound.address)?
            {
                return Err(format!("nobody is on record as the holder of its {}", bound.address));
            }
        }
        Ok(())
    }

    fn identity(&self, node: &NodeRecord, identity: &IdentityRecord) -> Checked {
        let record: CertificateRecord = self.must(&layout::certificate(&identity.serial))?;
        let fits = record.kind() == v1::CertificateKind::AgentIdentity
            && record.cluster == node.cluster
            && record.node == node.name
            && record.key_hash == identity.key_hash
            && record.not_after_ms == identity.not_after_ms;
        is(fits, || format!("its identity {} is another's", hex::encode(&identity.serial)))
    }

    /// Whether another node of the cluster has the address: who went absent may have lost it to one
    /// that has left since.
    fn has_another(&self, node: &NodeRecord, address: &str) -> Result<bool, String> {
        let prefix = layout::nodes(&node.cluster);
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.reader.scan(&prefix, after.as_deref(), PAGE);
            let page = page.map_err(|e| e.to_string())?;
            let ended = page.len() < PAGE;
            after = page.last().map(|(key, _)| key.clone());
            for (_, value) in page {
                let other: NodeRecord = read(&value)?;
                if other.name != node.name && other.addresses.iter().any(|b| b.address == address) {
                    return Ok(true);
                }
            }
            if ended {
                return Ok(false);
            }
        }
    }

    fn holder(&self, rest: &[u8], value: &[u8]) -> Checked {
        let (cluster, address) = two(rest)?;
        let node: NodeRecord = self.must(&layout::node(cluster, text(value)?))?;
        let bound = node.addresses.iter().any(|bound| bound.address == address);
        is(bound && node.node_status() == NodeStatus::Live && node.holds_exclusively(), || {
            format!("node {} does not hold it", node.name)
        })
    }

    /// The node may have gone since.
    fn counted(&self, rest: &[u8], value: &[u8]) -> Checked {
        let (cluster, address) = two(rest)?;
        self.must::<ClusterRecord>(&layout::cluster(cluster))?;
        is(address.parse::<std::net::IpAddr>().is_ok(), || "no address".to_owned())?;
        parse::<NodeName>(value).map(drop)
    }

    fn block(&self, rest: &[u8], value: &[u8]) -> Checked {
        let (cluster, address) = two(rest)?;
        let record: BlockRecord = read(value)?;
        self.must::<ClusterRecord>(&layout::cluster(cluster))?;
        is(address.parse::<std::net::IpAddr>().is_ok(), || "no address".to_owned())?;
        parse::<NodeName>(record.node.as_bytes()).map(drop)
    }

    fn member(&self, rest: &[u8], record: &MemberRecord) -> Checked {
        let (cluster, version) = split(rest)?;
        let cluster = text(cluster)?;
        let version = <[u8; 8]>::try_from(version).map(u64::from_be_bytes);
        let version = version.map_err(|_| "no version of a cluster".to_owned())?;
        let of: ClusterRecord = self.must(&layout::cluster(cluster))?;
        is(version <= of.members_version, || "it is newer than its cluster".to_owned())?;
        if matches!(record.state(), v1::MemberState::Gone | v1::MemberState::Unspecified) {
            // Of one that is gone it may be all that is left.
            return Ok(());
        }
        let node: NodeRecord = self.must(&layout::node(cluster, &record.name))?;
        is(node.member_version == version, || {
            format!("its node was told of at version {}", node.member_version)
        })
    }

    fn key_use(&self, rest: &[u8], record: &KeyRecord) -> Checked {
        is(rest.len() == 32, || "no hash of a key".to_owned())?;
        let known = record.kind() != v1::CertificateKind::Unspecified;
        is(known, || "it has no use that this program knows".to_owned())?;
        parse::<NodeName>(record.node.as_bytes())?;
        self.must::<ClusterRecord>(&layout::cluster(&record.cluster)).map(drop)
    }

    fn certificate(&self, rest: &[u8], record: &CertificateRecord) -> Checked {
        is(record.serial == rest, || format!("it is {}'s", hex::encode(&record.serial)))?;
        let facts = LeafFacts::parse(&record.certificate_der).map_err(|e| e.to_string())?;
        is(facts.serial.as_bytes() == rest, || "its certificate has another serial".to_owned())?;
        is(unix_ms(facts.not_after) == record.not_after_ms, || {
            "its certificate ends at another time".to_owned()
        })?;
        is(sha256(&facts.spki_der)[..] == record.key_hash[..], || {
            "its certificate has another key".to_owned()
        })?;
        self.must::<ClusterRecord>(&layout::cluster(&record.cluster))?;
        self.indexed(&layout::cluster_certificate(&record.cluster, rest))?;
        self.indexed(&layout::node_certificate(&record.cluster, &record.node, rest))?;
        let used: KeyRecord = self.must(&layout::key(&record.key_hash))?;
        let fits =
            used.kind == record.kind && used.cluster == record.cluster && used.node == record.node;
        is(fits, || "its key is on record for another use".to_owned())?;
        if record.revoked_ms != 0 && record.not_after_ms > self.now_ms {
            let authority = authority_of(record);
            let revocation: RevocationRecord = self.must(&layout::revocation(authority, rest))?;
            is(revocation.revoked_ms == record.revoked_ms, || {
                "it was revoked at another time than its CRL says".to_owned()
            })?;
        }
        Ok(())
    }

    fn certificate_index(&self, rest: &[u8], value: &[u8], of_node: bool) -> Checked {
        is(value.is_empty(), || "an index has a value".to_owned())?;
        let (cluster, rest) = split(rest)?;
        let (node, serial) = if of_node { split(rest)? } else { (&b""[..], rest) };
        let record: CertificateRecord = self.must(&layout::certificate(serial))?;
        let fits =
            record.cluster.as_bytes() == cluster && (!of_node || record.node.as_bytes() == node);
        is(fits, || format!("the certificate is {}/{}'s", record.cluster, record.node))
    }

    fn revocation(&self, rest: &[u8], record: &RevocationRecord) -> Checked {
        let (authority, serial) = split(rest)?;
        is(record.serial == serial, || format!("it is {}'s", hex::encode(&record.serial)))?;
        if record.taken_back && !self.has(&layout::certificate(serial))? {
            return Ok(());
        }
        let certificate: CertificateRecord = self.must(&layout::certificate(serial))?;
        let fits = certificate.revoked_ms == record.revoked_ms
            && certificate.not_after_ms == record.not_after_ms
            && authority_of(&certificate).as_bytes() == authority;
        is(fits, || "the certificate is not revoked so".to_owned())
    }

    fn get<M: Record>(&self, key: &[u8]) -> Result<Option<M>, String> {
        let value = self.reader.get(key).map_err(|e| e.to_string())?;
        value.map(|value| read(&value)).transpose()
    }

    /// A record that what is looked at points to.
    fn must<M: Record>(&self, key: &[u8]) -> Result<M, String> {
        match self.get(key) {
            Ok(Some(record)) => Ok(record),
            Ok(None) => Err(format!("{} is missing, which it points to", named(key))),
            Err(why) => Err(format!("{}, which it points to: {why}", named(key))),
        }
    }

    fn has(&self, key: &[u8]) -> Result<bool, String> {
        self.reader.get(key).map(|value| value.is_some()).map_err(|e: StoreError| e.to_string())
    }

    fn indexed(&self, key: &[u8]) -> Checked {
        is(self.has(key)?, || format!("it is missing from the index: {}", named(key)))
    }
}

fn authority_of(record: &CertificateRecord) -> &str {
    if record.kind() == v1::CertificateKind::AgentIdentity { "" } else { &record.cluster }
}

fn ca_keys(authority: &Authority, root: Option<&CaKey>, issuers: &[CaKey]) -> Checked {
    let root = root.ok_or("it has no root")?;
    is(!issuers.is_empty(), || "it has no issuer".to_owned())?;
    for key in std::iter::once(root).chain(issuers) {
        let facts = LeafFacts::parse(&key.certificate_der).map_err(|e| e.to_string())?;
        is(facts.is_ca, || "a certificate of it is no CA's".to_owned())?;
        is(unix_ms(facts.not_after) == key.not_after_ms, || {
            "a certificate of it ends at another time".to_owned()
        })?;
    }
    crate::keys::authority::check_signatures(authority, root, issuers).map_err(|e| e.to_string())
}

fn is(holds: bool, what: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(what()) }
}

fn read<M: Record>(value: &[u8]) -> Result<M, String> {
    let record = M::read(value).map_err(|why| format!("does not decode: {why}"))?;
    // What this program does not know, it did not write.
    is(record.encode_to_vec() == value, || "it is not as it was written".to_owned())?;
    Ok(record)
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|_| "a name in its key is no text".to_owned())
}

fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(bytes: &[u8]) -> Result<T, String> {
    text(bytes)?.parse().map_err(|e: T::Err| e.to_string())
}

/// Up to the first `/`, and the rest.
fn split(bytes: &[u8]) -> Result<(&[u8], &[u8]), String> {
    let at = bytes.iter().position(|byte| *byte == b'/');
    let at = at.ok_or("a part of its key is missing")?;
    Ok((&bytes[..at], &bytes[at + 1..]))
}

fn two(bytes: &[u8]) -> Result<(&str, &str), String> {
    let (first, second) = split(bytes)?;
    Ok((text(first)?, text(second)?))
}

/// A key for people: its kind in words, then the key, with what is no text in hexadecimal digits.
fn named(key: &[u8]) -> String {
    let kind = match key {
        b"!header" => return "header".to_owned(),
        b"!control" => return "control authority".to_owned(),
        b"!audit" => return "end of the audit log".to_owned(),
        b"!checkpoint" => return "newest checkpoint of the audit log".to_owned(),
        b"!pruned" => return "beginning of the audit log".to_owned(),
        b"!restores" => return "restores".to_owned(),
        [b'a', b'/', rest @ ..] => {
            let index = <[u8; 8]>::try_from(rest).map(u64::from_be_bytes);
            return index
                .map_or_else(|_| "audit record".to_owned(), |i| format!("audit record {i}"));
        }
        [b'b', ..] => "block",
        [b'c', ..] => "cluster",
        [b'h', ..] => "holder of address",
        [b'k', ..] => "token in its cluster's index",
        [b'l', ..] => "CRLs",
        [b'm', ..] => "member",
        [b'n', ..] => "node",
        [b'p', ..] => "node for which an address counts",
        [b'q', ..] => "use of key",
        [b'r', ..] => "revocation",
        [b's', ..] => "certificate",
        [b't', ..] => "token",
        [b'u', ..] => "use of token",
        [b'x', ..] => "certificate in its cluster's index",
        [b'y', ..] => "certificate in its node's index",
        _ => "key",
    };
    let parts = key.get(2..).unwrap_or(key);
    let plain = parts.iter().take_while(|byte| byte.is_ascii_graphic()).count();
    if plain == parts.len() {
        return format!("{kind} {}", String::from_utf8_lossy(parts));
    }
    // Names end with the last `/` before what is no text.
    let names = parts[..plain].iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    let (names, rest) = parts.split_at(names);
    format!("{kind} {}{}", String::from_utf8_lossy(names), hex::encode(rest))
}
