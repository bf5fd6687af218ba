//! What the CA asks of an agent: computed from what the node reports and what is on record.

use raymtls_proto::{serial::Serial, v1};

use crate::{
    ca::Ca,
    store::{Caller, StoreError, records::ClusterRecord},
};

/// What is asked of the caller now, and whether it is news to an agent that knows the cluster as of
/// `have`. An agent that does not obey is asked again with each answer, and kept waiting no less.
///
/// # Errors
/// The store.
pub async fn wanted(
    ca: &Ca,
    caller: &Caller,
    cluster: &ClusterRecord,
    current: Option<Serial>,
    have: u64,
) -> Result<(Vec<v1::Directive>, bool), StoreError> {
    // Mostly no key was ever revoked: nothing to look up.
    let Some(serial) = current.filter(|_| cluster.keys_version != 0) else {
        return Ok((Vec::new(), false));
    };
    // A claim: what is not on record as the caller's own leaf asks for nothing.
    let record = ca.store.certificate(serial).await.ok();
    let revoked = record.is_some_and(|record| {
        record.revoked_ms != 0
            && record.cluster == caller.cluster.as_str()
            && record.node == caller.node.as_str()
    });
    Ok(if revoked {
        (vec![new_key_folder(&serial)], cluster.keys_version > have)
    } else {
        (Vec::new(), false)
    })
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
