//! User stories in one process: a real CA behind real TLS, nodes that enrol with it, a clock that
//! the test moves.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is a failed test")]

mod abuse;
mod addresses;
mod agent;
mod away;
mod bad_files;
mod bad_names;
mod bad_requests;
mod bad_tokens;
mod bounds;
mod certificates;
mod check;
mod checkpoints;
mod corpus;
mod docs;
mod doors;
mod enroll;
mod host;
mod issuers;
mod log;
mod members;
mod newer_peers;
mod operator;
mod peers;
mod property;
mod races;
mod reach;
mod renew;
mod restore;
mod revoke;
mod sync;
mod time;
mod trust;
mod workloads;
