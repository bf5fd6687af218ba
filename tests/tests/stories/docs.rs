//! The documents and the code say the same: links lead somewhere, lines that call our programs parse,
//! the threat model names tests that exist, and what can be generated is generated. It judges no
//! prose.
//!
//! `docs/refusals.md` and `docs/metrics.md` are written with
//! `UPDATE_SNAPSHOT=1 cargo test -p raymtls-tests --test stories docs`.

mod alerts;
mod commands;
mod dashboard;
mod links;
mod metrics;
mod ports;
mod refusals;
mod threats;

use std::path::{Path, PathBuf};

use raymtls_proto::durable::{self, Access};

const UPDATE: &str = "UPDATE_SNAPSHOT=1 cargo test -p raymtls-tests --test stories docs";
/// Files of the repository that are looked at, at most.
const FILES_MAX: usize = 5_000;

/// The repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Its files with this ending, relative to it, in order; what is built or hidden is left out.
fn files(ending: &str) -> Vec<PathBuf> {
    let root = root();
    let (mut folders, mut found, mut seen) = (vec![root.clone()], Vec::new(), 0);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            seen += 1;
            assert!(seen <= FILES_MAX, "more than {FILES_MAX} files: what fills {name}?");
            if name.starts_with('.') || name == "target" || path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if name.ends_with(ending) {
                found.push(path.strip_prefix(&root).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

/// Compares a generated document with the one that lies there; writes it where that is asked for.
fn must_be(path: &str, text: &str) {
    if std::env::var_os("UPDATE_SNAPSHOT").is_some() {
        durable::replace(&root().join(path), text.as_bytes(), Access::PUBLIC).unwrap();
        return;
    }
    let there = std::fs::read_to_string(root().join(path)).unwrap_or_default();
    let differs = there.lines().zip(text.lines()).find(|(old, new)| old != new);
    assert!(
        there == text,
        "{path} is not what the code says, first at {differs:?}: run `{UPDATE}`"
    );
}

/// Lines of the fenced blocks of a Markdown text, each with its number.
fn fenced(text: &str) -> Vec<(usize, &str)> {
    let mut inside = false;
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            inside = !inside;
        } else if inside {
            lines.push((index + 1, line));
        }
    }
    lines
}

/// Cells of a row of a Markdown table, trimmed; `None` for another line.
fn cells(line: &str) -> Option<Vec<&str>> {
    let inner = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    Some(inner.split('|').map(str::trim).collect())
}
