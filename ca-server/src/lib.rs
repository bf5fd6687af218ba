//! `ca-server`: a certificate authority for Ray clusters. Bootstrap tokens in, short-lived
//! certificates out, one for each node.
//!
//! In reading order: [`serve`] wires everything; [`grpc`] is the edge; [`enroll`], [`renew`],
//! [`issue`], [`sync`], [`leave`] and [`admin`] are the requests, one straight function each;
//! [`token`] and [`policy`] judge, without I/O; [`keys`] signs; [`store`] decides and remembers.
//! [`check`], [`restore`] and [`export_key`] work on the data folder of a server that does not run.
//! [`admin_cli`] is the operator's command line, which speaks gRPC and shares nothing else.

pub mod accept;
pub mod admin;
pub mod admin_cli;
pub mod admin_socket;
pub mod backup;
pub mod ca;
pub mod check;
pub mod checkpoints;
pub mod config;
pub mod contacts;
pub mod crls;
pub mod crowd;
pub mod descriptors;
pub mod directives;
pub mod enroll;
pub mod export_key;
pub mod failpoint;
pub mod grpc;
pub mod http;
pub mod identify;
pub mod init;
pub mod issue;
pub mod jwt;
pub mod keys;
pub mod leave;
pub mod limits;
#[cfg(test)]
mod lying_signer;
pub mod metrics;
pub mod policy;
pub mod proxy_protocol;
pub mod read_once;
pub mod refusal;
pub mod renew;
pub mod restore;
pub mod restoring;
pub mod run;
pub mod serve;
pub mod serving;
pub mod settings;
pub mod store;
pub mod sync;
pub mod tls;
pub mod token;
pub mod trusted_file;
pub mod trusted_folder;
pub mod upkeep;

/// A failed signature is a fault of ours: the caller learns that, and the log learns what.
fn sign_failed(error: keys::signer::SignError) -> refusal::Refusal {
    tracing::error!(%error, "signing failed");
    refusal::Refusal::Internal
}
