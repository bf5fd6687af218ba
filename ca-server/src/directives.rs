//! What the CA asks of an agent: computed from what the node reports and what is on record.

use raymtls_proto::{serial::Serial, v1};

use crate::{
    ca::Ca,
    store::{Caller, records::ClusterRecord},
};

/// What is asked of a caller, as of one version of the cluster's revoked keys.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Zero while no key was ever revoked: nothing is asked then.
    keys_version: u64,
    directives: Vec<v1::Directive>,
}

impl Wanted {
    /// Looks again if a key was revoked since: a change of anything else wakes every waiting call, and
    /// none of them is to ask the store for what it knows.
    pub async fn keep_up(
        &mut self,
        ca: &Ca,
        caller: &Caller,
        cluster: &ClusterRecord,
        current: Option<Serial>,
    ) {
        if self.keys_version == cluster.keys_version {
            return;
        }
        self.keys_version = cluster.keys_version;
        self.directives.clear();
        let Some(serial) = current else { return };
        // A claim: what is not on record as the caller's own leaf asks for nothing.
        let record = ca.store.certificate(serial).await.ok();
        let revoked = record.is_some_and(|record| {
            record.revoked_ms != 0
                && record.cluster == caller.cluster.as_str()
                && record.node == caller.node.as_str()
        });
        if revoked {
            self.directives.push(new_key_folder(&serial));
        }
    }

    /// What is asked. An agent that does not obey is asked again with each answer.
    #[must_use]
    pub fn directives(&self) -> Vec<v1::Directive> {
        self.directives.clone()
    }

    /// Whether it is news to an agent that knows the cluster as of `have`; one that does not obey is kept
    /// waiting no less.
    #[must_use]
    pub fn is_news(&self, have: u64) -> bool {
        !self.directives.is_empty() && self.keys_version > have
    }
}

/// Serial of the leaf that a node's Ray processes start with, as it says.
#[must_use]
pub fn current_leaf(report: Option<&v1::Report>) -> Option<Serial> {
    let folder = report?.key_folders.iter().find(|folder| folder.current)?;
    Serial::from_slice(&folder.serial).ok()
}

fn new_key_folder(serial: &Serial) -> v1::Directive {
    let reason = format!("the key of leaf {serial} is revoked");
    v1::Directive { act: Some(v1::directive::Act::NewKeyFolder(v1::NewKeyFolder { reason })) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_folder_s_serial_is_meant_and_no_other() {
        let serial = |byte: u8| Serial::new(1, [byte; 10]);
        let folder = |byte, current| v1::KeyFolder {
            serial: serial(byte).as_bytes().to_vec(),
            current,
            ..v1::KeyFolder::default()
        };
        let report = |key_folders| v1::Report { key_folders, ..v1::Report::default() };
        let with_current = report(vec![folder(1, false), folder(2, true)]);
        assert_eq!(current_leaf(Some(&with_current)), Some(serial(2)));
        assert_eq!(current_leaf(Some(&report(vec![folder(1, false)]))), None);
        let odd = v1::KeyFolder { serial: vec![1; 17], current: true, ..v1::KeyFolder::default() };
        assert_eq!(current_leaf(Some(&report(vec![odd]))), None);
        assert_eq!(current_leaf(None), None);
    }
}
