//! User stories in one process: a real CA behind real TLS, nodes that enrol with it, a clock that
//! the test moves.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is a failed test")]

mod agent;
mod away;
mod certificates;
mod enroll;
mod issuers;
mod operator;
mod renew;
mod revoke;
mod sync;
mod trust;
