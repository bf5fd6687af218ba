//! Tunnel mode: Ray's connections between nodes go through TLS 1.3 that this host's `ray-tunnel`
//! speaks with the other node's. In the order of the data: [`rules`] is what the agent writes,
//! [`control`] how it asks. Nothing here speaks with the CA or writes a file.

pub mod control;
pub mod reason;
pub mod rules;
