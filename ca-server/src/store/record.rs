//! Reading a value of the store: protobuf decodes a record with anything missing, and the code above
//! relies on what every record is written with.

use prost::Message;
use raymtls_proto::{identity::Role, serial::Serial};

use super::records::{
    AddressRecord, AuditHead, AuditRecord, BlockRecord, CaKey, CertificateRecord, Checkpoint,
    ClusterRecord, ControlRecord, CrlSet, Header, KeyRecord, MemberRecord, NodeRecord,
    RestoresRecord, RevocationRecord, TokenRecord, UseRecord,
};

/// A value of the store.
pub trait Record: Message + Default {
    /// What every such record is written with and this one lacks.
    fn lacks(&self) -> Option<&'static str> {
        None
    }

    /// Reads a value.
    ///
    /// # Errors
    /// What is wrong with it: it does not decode, or lacks what every such record has.
    fn read(value: &[u8]) -> Result<Self, String> {
        let record = Self::decode(value).map_err(|e| e.to_string())?;
        match record.lacks() {
            Some(what) => Err(format!("it lacks {what}")),
            None => Ok(record),
        }
    }
}

impl Record for ClusterRecord {
    fn lacks(&self) -> Option<&'static str> {
        self.settings.is_none().then_some("settings")
    }
}

impl Record for NodeRecord {
    fn lacks(&self) -> Option<&'static str> {
        if self.identity.is_none() {
            return Some("an identity");
        }
        Role::from_proto(self.role).is_none().then_some("a role this program knows")
    }
}

impl Record for CertificateRecord {
    fn lacks(&self) -> Option<&'static str> {
        Serial::from_slice(&self.serial).is_err().then_some("a serial number")
    }
}

macro_rules! whole_as_decoded {
    ($($record:ident),+) => { $(impl Record for $record {})+ };
}

whole_as_decoded!(
    AddressRecord,
    AuditHead,
    AuditRecord,
    BlockRecord,
    CaKey,
    Checkpoint,
    ControlRecord,
    CrlSet,
    Header,
    KeyRecord,
    MemberRecord,
    RestoresRecord,
    RevocationRecord,
    TokenRecord,
    UseRecord
);
