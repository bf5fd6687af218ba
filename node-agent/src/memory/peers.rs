//! Members and blocks as the CA told them, in bounds and parsed: what cannot be understood is left out
//! with a warning, never guessed. It does not decide who may reach what.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use raymtls_proto::{
    identity::{NodeName, Role},
    v1,
};

/// Most members that are known at once.
pub(super) const MEMBERS_MAX: usize = 20_000;
/// Most blocks that are known at once.
pub(super) const BLOCKS_MAX: usize = 100_000;
/// Most addresses of one member.
pub(super) const ADDRESSES_MAX: usize = 16;

/// A member, by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// What it is for.
    pub(crate) role: Role,
    /// Those that may stand in a set of addresses, without IPv4-mapped forms.
    pub(crate) addresses: BTreeSet<IpAddr>,
}

/// An address to cut off, without IPv4-mapped forms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blocked {
    /// The address.
    pub(crate) address: IpAddr,
    /// The revoked node.
    pub(crate) node: String,
    /// When the CA takes it off its list. Kept and not looked at: a CA that is away ends nothing.
    until_unix: i64,
    /// On every port.
    pub(crate) all_traffic: bool,
}

/// All members.
#[derive(Clone, Debug, Default)]
pub(super) struct Peers {
    known: BTreeMap<String, Peer>,
    /// Members of before a snapshot whose pages are still coming, as far as it did not name them.
    old: Option<BTreeMap<String, Peer>>,
    /// A whole snapshot was there once.
    was_whole: bool,
}

impl Peers {
    pub(super) fn is_filling(&self) -> bool {
        self.old.is_some()
    }

    /// Whether this is a part of the first snapshot.
    pub(super) fn is_partial(&self) -> bool {
        !self.was_whole
    }

    pub(super) fn end_snapshot(&mut self) {
        self.old = None;
        self.was_whole = true;
    }

    /// By name, those of before a snapshot last.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Peer)> {
        let old = self.old.iter().flatten();
        self.known.iter().chain(old).map(|(name, peer)| (name.as_str(), peer))
    }

    pub(super) fn get(&self, name: &str) -> Option<&Peer> {
        self.known.get(name)
    }

    /// Takes a page over.
    pub(super) fn take(&mut self, page: &v1::Members) {
        if page.snapshot {
            let mut old = self.old.take().unwrap_or_default();
            old.append(&mut self.known);
            self.old = Some(old);
        }
        for member in &page.members {
            if let Some(old) = &mut self.old {
                old.remove(&member.name);
            }
            match read_member(member) {
                Ok(Some(peer)) => self.put(&member.name, peer),
                Ok(None) => drop(self.known.remove(&member.name)),
                Err(why) => {
                    self.known.remove(&member.name);
                    tracing::warn!(member = ?member.name, %why, "a member was left out");
                }
            }
        }
    }

    fn put(&mut self, name: &str, peer: Peer) {
        if self.known.len() >= MEMBERS_MAX && !self.known.contains_key(name) {
            tracing::warn!(member = %name, "a member was left out: {MEMBERS_MAX} are the most");
            return;
        }
        self.known.insert(name.to_owned(), peer);
    }

    pub(super) fn to_proto(&self) -> v1::Members {
        let member = |(name, peer): (&str, &Peer)| v1::Member {
            name: name.to_owned(),
            role: peer.role.to_proto().into(),
            state: v1::MemberState::Member.into(),
            addresses: peer.addresses.iter().map(ToString::to_string).collect(),
        };
        v1::Members { snapshot: true, members: self.iter().map(member).collect(), more: false }
    }
}

/// A member, `None` for a node that is none, or why it cannot be understood.
fn read_member(member: &v1::Member) -> Result<Option<Peer>, String> {
    let _: NodeName = member.name.parse().map_err(|_| "its name is none".to_owned())?;
    match v1::MemberState::try_from(member.state) {
        Ok(v1::MemberState::Member) => {}
        Ok(
            v1::MemberState::Lapsed
            | v1::MemberState::Gone
            | v1::MemberState::Revoked
            | v1::MemberState::Unspecified,
        )
        | Err(_) => return Ok(None),
    }
    let role = Role::from_proto(member.role)
        .ok_or_else(|| format!("its role ({}) is none this release knows", member.role))?;
    if member.addresses.len() > ADDRESSES_MAX {
        tracing::warn!(member = %member.name, "only {ADDRESSES_MAX} of its addresses are used");
    }
    let texts = member.addresses.iter().take(ADDRESSES_MAX);
    Ok(Some(Peer { role, addresses: texts.filter_map(|text| read_address(text)).collect() }))
}

/// The whole list of blocks.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    all: Vec<Blocked>,
    by_name: BTreeMap<String, BTreeSet<IpAddr>>,
}

impl Blocks {
    pub(super) fn read(blocks: &v1::Blocks) -> Self {
        if blocks.blocks.len() > BLOCKS_MAX {
            tracing::warn!(told = blocks.blocks.len(), "only {BLOCKS_MAX} blocks are used");
        }
        let block = |block: &v1::Block| {
            Some(Blocked {
                address: read_address(&block.address)?,
                node: block.node.parse::<NodeName>().map(|n| n.to_string()).unwrap_or_default(),
                until_unix: block.until_unix,
                all_traffic: block.all_traffic,
            })
        };
        let all: Vec<Blocked> = blocks.blocks.iter().take(BLOCKS_MAX).filter_map(block).collect();
        let mut by_name = BTreeMap::<String, BTreeSet<IpAddr>>::new();
        for block in &all {
            by_name.entry(block.node.clone()).or_default().insert(block.address);
        }
        Self { all, by_name }
    }

    pub(super) fn all(&self) -> &[Blocked] {
        &self.all
    }

    /// The member without those of its addresses that are blocked in its own name: a page that is
    /// still to come, or never came, must not let a revoked node cancel its block. `None` where
    /// nothing is left of it. Blocked in another's name, an address is the member's.
    pub(super) fn apart<'a>(&self, name: &str, peer: &'a Peer) -> Option<Cow<'a, Peer>> {
        let Some(blocked) = self.by_name.get(name) else { return Some(Cow::Borrowed(peer)) };
        if blocked.is_disjoint(&peer.addresses) {
            return Some(Cow::Borrowed(peer));
        }
        let addresses = &peer.addresses - blocked;
        (!addresses.is_empty()).then_some(Cow::Owned(Peer { role: peer.role, addresses }))
    }

    pub(super) fn to_proto(&self) -> v1::Blocks {
        let block = |blocked: &Blocked| v1::Block {
            address: blocked.address.to_string(),
            node: blocked.node.clone(),
            until_unix: blocked.until_unix,
            all_traffic: blocked.all_traffic,
        };
        v1::Blocks { blocks: self.all.iter().map(block).collect() }
    }
}

fn read_address(text: &str) -> Option<IpAddr> {
    let Ok(address) = text.parse::<IpAddr>() else {
        tracing::warn!(address = ?text.chars().take(64).collect::<String>(), "no address: left out");
        return None;
    };
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::{super::Memory, *};

    fn member(name: &str, state: v1::MemberState, addresses: &[&str]) -> v1::Member {
        v1::Member {
            name: name.to_owned(),
            role: v1::Role::Worker.into(),
            state: state.into(),
            addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
        }
    }

    fn page(snapshot: bool, members: Vec<v1::Member>) -> v1::SyncResponse {
        v1::SyncResponse {
            version: Some(v1::SyncVersion { epoch: 1, counter: 5 }),
            members: Some(v1::Members { snapshot, members, more: false }),
            ..v1::SyncResponse::default()
        }
    }

    fn names(memory: &Memory) -> Vec<&str> {
        memory.members().map(|(name, _)| name).collect()
    }

    fn known(memory: &Memory) -> Memory {
        Memory::decode(&memory.encode())
    }

    use v1::MemberState::{Gone, Lapsed, Member, Revoked};

    #[test]
    fn only_members_are_members_and_the_newest_word_counts() {
        let mut memory = Memory::default();
        assert!(!memory.knows_members());
        let states = [("a", Member), ("b", Lapsed), ("c", Gone), ("d", Revoked), ("e", Member)];
        memory.merge(&page(true, states.map(|(n, s)| member(n, s, &["10.0.0.1"])).to_vec()));
        memory.end_snapshot();
        assert_eq!(names(&memory), ["a", "e"]);
        memory.merge(&page(false, vec![member("a", Lapsed, &[]), member("b", Member, &[])]));
        assert_eq!(names(&memory), ["b", "e"]);
        assert_eq!(names(&known(&memory)), ["b", "e"]);
        assert_eq!(known(&memory).version(), memory.version());
    }

    #[test]
    fn a_snapshot_takes_nobody_out_before_its_last_page() {
        let mut memory = Memory::default();
        memory.merge(&page(true, vec![member("a", Member, &[]), member("b", Member, &[])]));
        memory.end_snapshot();
        memory.merge(&page(true, vec![member("b", Gone, &[]), member("c", Member, &[])]));
        assert!(memory.is_filling());
        assert_eq!(names(&memory), ["c", "a"], "b was named, a not yet");
        // A crash here asks for all of it again, and knows who was there.
        assert_eq!(known(&memory).version(), None);
        assert_eq!(names(&known(&memory)), ["a", "c"]);
        memory.merge(&page(false, vec![member("d", Member, &[])]));
        memory.end_snapshot();
        assert_eq!(names(&memory), ["c", "d"]);
        assert!(known(&memory).version().is_some());
    }

    #[test]
    fn a_part_of_the_first_snapshot_is_not_kept_as_the_whole() {
        let mut memory = Memory::default();
        memory.merge(&page(true, vec![member("a", Member, &[])]));
        assert!(!memory.knows_members() && !known(&memory).knows_members());
        memory.end_snapshot();
        assert!(memory.knows_members() && known(&memory).knows_members());
    }

    #[test]
    fn who_is_blocked_while_a_snapshot_comes_is_no_member_from_before() {
        let mut memory = Memory::default();
        memory.merge(&page(true, vec![member("a", Member, &["10.0.0.1"])]));
        memory.end_snapshot();
        let block = v1::Block {
            address: "::ffff:10.0.0.1".to_owned(),
            node: "a".to_owned(),
            until_unix: 9,
            all_traffic: true,
        };
        memory.merge(&v1::SyncResponse {
            blocks: Some(v1::Blocks { blocks: vec![block] }),
            ..page(true, vec![member("b", Member, &["10.0.0.2"])])
        });
        assert_eq!(names(&memory), ["b"]);
        assert_eq!(memory.blocks()[0].address, "10.0.0.1".parse::<IpAddr>().unwrap());
        assert_eq!(known(&memory).blocks(), memory.blocks());
    }

    /// Changes in pages: the block comes with the first, the word that its node is revoked with the last, or
    /// never.
    #[test]
    fn no_member_cancels_the_block_of_its_own_address_and_another_s_name_changes_nothing() {
        let mut memory = Memory::default();
        memory.merge(&page(
            true,
            vec![
                member("a", Member, &["10.0.0.1"]),
                member("again", Member, &["10.0.0.7", "10.0.0.8"]),
                member("c", Member, &["10.0.0.3"]),
            ],
        ));
        memory.end_snapshot();
        let block = |address: &str, node: &str| v1::Block {
            address: address.to_owned(),
            node: node.to_owned(),
            ..v1::Block::default()
        };
        memory.merge(&v1::SyncResponse {
            blocks: Some(v1::Blocks {
                blocks: vec![
                    block("10.0.0.1", "a"),
                    // An earlier node of that name, which had other addresses.
                    block("10.0.0.6", "again"),
                    block("10.0.0.7", "again"),
                    block("10.0.0.3", "a"),
                ],
            }),
            ..page(false, vec![])
        });
        assert_eq!(names(&memory), ["again", "c"]);
        let of = |name: &str| {
            let (_, peer) = memory.members().find(|(n, _)| *n == name).unwrap();
            peer.addresses.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!((of("again"), of("c")), (vec!["10.0.0.8".into()], vec!["10.0.0.3".into()]));
    }

    #[test]
    fn what_cannot_be_understood_is_left_out_and_the_rest_counts() {
        let mut memory = Memory::default();
        let mut of_a_newer_release = member("n", Member, &["10.0.0.8"]);
        of_a_newer_release.role = 77;
        let many: Vec<String> = (0..40).map(|i| format!("10.1.0.{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        memory.merge(&page(
            true,
            vec![
                member("a", Member, &["10.0.0.1", "nonsense", "", "::ffff:10.0.0.2"]),
                member("../etc", Member, &["10.0.0.3"]),
                member("", Member, &["10.0.0.4"]),
                of_a_newer_release,
                member("many", Member, &many),
            ],
        ));
        assert_eq!(names(&memory), ["a", "many"]);
        let of = |name| memory.member(name).unwrap().addresses.clone();
        let wanted = ["10.0.0.1", "10.0.0.2"].map(|a| a.parse::<IpAddr>().unwrap());
        assert_eq!(of("a"), BTreeSet::from(wanted));
        assert_eq!(of("many").len(), ADDRESSES_MAX);
        let blocks = ["10.0.0.9", "no address", ""]
            .map(|address| v1::Block { address: address.to_owned(), ..v1::Block::default() });
        memory.merge(&v1::SyncResponse {
            blocks: Some(v1::Blocks { blocks: blocks.to_vec() }),
            ..v1::SyncResponse::default()
        });
        assert_eq!(memory.blocks().len(), 1);
    }

    #[test]
    fn there_is_a_most_of_everything() {
        let mut memory = Memory::default();
        let members =
            (0..MEMBERS_MAX + 10).map(|i| member(&format!("n{i}"), Member, &["10.0.0.1"]));
        memory.merge(&page(true, members.collect()));
        assert_eq!(memory.members().count(), MEMBERS_MAX);
        // One that is known may still change, and leave.
        memory.merge(&page(false, vec![member("n0", Gone, &[]), member("n1", Member, &[])]));
        assert_eq!(memory.members().count(), MEMBERS_MAX - 1);
        let block = v1::Block { address: "10.0.0.9".to_owned(), ..v1::Block::default() };
        memory.merge(&v1::SyncResponse {
            blocks: Some(v1::Blocks { blocks: vec![block; BLOCKS_MAX + 1] }),
            ..v1::SyncResponse::default()
        });
        assert_eq!(memory.blocks().len(), BLOCKS_MAX);
    }
}
