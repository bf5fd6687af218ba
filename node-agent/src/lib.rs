//! The daemon on each Ray node: it enrols the node, keeps and renews the TLS files Ray reads, and
//! tells what it knows.
//!
//! In the order of the data: [`cli`] parses and calls; [`enroll`] brings a node in; [`agent`] is the
//! loop of the daemon (look, decide, act), which uses [`client`] (the CA), [`keyfolder`] and
//! [`statedir`] (files), [`hooks`], [`socket`] and [`http`]; [`state`] decides and [`verify`] judges,
//! both without file, network or clock of their own.

pub mod agent;
pub mod api;
pub mod caclock;
mod capture;
pub mod cli;
pub mod client;
pub mod config;
mod doctor;
pub mod enroll;
pub mod ephemeral;
pub mod exec;
pub mod failure;
pub mod hooks;
pub mod http;
pub mod isolation;
pub mod keyfolder;
pub mod keys;
mod memory;
pub mod moment;
mod nodefile;
mod notify;
pub mod rayenv;
pub mod served;
pub mod socket;
pub mod state;
pub mod statedir;
pub mod status;
pub mod stopray;
#[cfg(test)]
mod stories;
mod supervise;
#[cfg(test)]
mod testca;
pub mod tunnel;
mod tunnelrules;
pub mod verify;
