//! The contract between `ca-server`, `ca-admin` and `node-agent`: the generated code of
//! `raymtls.v1` and the vocabulary both sides share. It decides nothing, opens no socket and makes
//! no key.
//!
//! In reading order: [`identity`] and [`address`] are the names things go by, [`serial`] and
//! [`leaf`] the facts of a certificate, [`bundle`] what is trusted, [`checkpoint`] how the audit log is
//! vouched for, [`join`] the file that brings a
//! node in, [`ports`] what Ray listens on, [`reason`] why the CA says no, [`clock`] what time it is, [`durable`] how a file is
//! replaced, [`process`] how a program keeps its secrets to itself.

pub mod address;
pub mod bundle;
pub mod checkpoint;
pub mod clock;
pub mod digest;
pub mod durable;
pub mod identity;
pub mod join;
pub mod jwt;
pub mod leaf;
pub mod ports;
pub mod process;
pub mod reason;
pub mod serial;
pub mod span;
pub mod token;
pub mod visible;

/// Generated code of the package `raymtls.v1`.
#[allow(
    missing_docs,
    clippy::all,
    unused_qualifications,
    unreachable_pub,
    clippy::wildcard_enum_match_arm,
    reason = "generated; the documentation stands in the .proto files"
)]
pub mod v1 {
    tonic::include_proto!("raymtls.v1");

    /// The descriptor set, for reflection and for the test of the contract.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/raymtls.v1.bin"));
}

mod redacted;
