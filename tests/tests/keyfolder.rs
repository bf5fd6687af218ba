//! The real `node-agent` on a machine that goes wrong: its key folders are read while they are
//! renewed, it is killed, its disk is full or read-only, folders belong to others, clocks are wrong.
//! Whoever opens the files sees a pair that fits, whole, every time; whoever reads the error knows
//! what to do.
//!
//! Wants `node-agent` and `ca-server` in the target folder, and Python with its `ssl` module (OpenSSL).
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is a failed test")]

#[path = "keyfolder/clocks.rs"]
mod clocks;
#[path = "keyfolder/disk.rs"]
mod disk;
#[path = "keyfolder/killed.rs"]
mod killed;
#[path = "keyfolder/layouts.rs"]
mod layouts;
#[path = "keyfolder/node.rs"]
mod node;
#[path = "keyfolder/printing.rs"]
mod printing;
#[path = "keyfolder/reader.rs"]
mod reader;
#[path = "keyfolder/secrets.rs"]
mod secrets;
