//! One audit record as one line, whatever stands in it: names, actors and details come from peers and
//! operators, and none of them may look like a line, a field or a command to the terminal.

use prost::Message as _;
use raymtls_proto::{
    digest::sha256,
    v1::{AuditKind, AuditRecord},
};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::admin_cli::{
    failure::Failure,
    output::{View, word},
};

/// No kind has a greater number.
const KIND_MAX: i32 = 127;

/// What a record says. The names of the fields are a promise to scripts.
#[derive(Debug, Serialize)]
pub(super) struct RecordView {
    pub(super) index: u64,
    /// RFC 3339, to the millisecond.
    at: String,
    kind: String,
    actor: String,
    cluster: String,
    node: String,
    serial: String,
    token: String,
    detail: String,
    /// Hash of the record's bytes: the next record carries it.
    pub(super) sha256: String,
}

impl RecordView {
    /// A record by its stored bytes.
    pub(super) fn new(record: &AuditRecord, stored: &[u8]) -> Self {
        Self {
            index: record.index,
            at: moment(record.at_ms),
            kind: kind_word(record.kind),
            actor: record.actor.clone(),
            cluster: record.cluster.clone(),
            node: record.node.clone(),
            serial: hex::encode(&record.serial),
            token: record.token_id.clone(),
            detail: record.detail.clone(),
            sha256: hex::encode(sha256(stored)),
        }
    }

    /// A record of an answer of the CA.
    pub(super) fn of_answer(stored: &[u8]) -> Result<Self, Failure> {
        Ok(Self::new(&decoded(stored)?, stored))
    }
}

/// Reads a record of an answer of the CA.
pub(super) fn decoded(stored: &[u8]) -> Result<AuditRecord, Failure> {
    AuditRecord::decode(stored)
        .map_err(|e| Failure::Failed(format!("the CA's answer holds a record that is none: {e}")))
}

impl View for RecordView {
    fn text(&self, _now: OffsetDateTime) -> String {
        let (kind, actor) = (word(&self.kind), word(&self.actor));
        let mut line = format!("{:>6}  {:<24}  {kind:<18}  {actor}", self.index, self.at);
        for (name, value) in [
            ("cluster", &self.cluster),
            ("node", &self.node),
            ("serial", &self.serial),
            ("token", &self.token),
            ("detail", &self.detail),
        ] {
            if !value.is_empty() {
                line.push_str(&format!("  {name}={}", word(value)));
            }
        }
        line + "\n"
    }
}

/// `node-revoked` for `AUDIT_KIND_NODE_REVOKED`; one of a newer CA by its number.
fn kind_word(kind: i32) -> String {
    AuditKind::try_from(kind).map_or_else(|_| format!("kind-{kind}"), word_of)
}

fn word_of(kind: AuditKind) -> String {
    let name = kind.as_str_name().trim_start_matches("AUDIT_KIND_");
    name.to_ascii_lowercase().replace('_', "-")
}

/// The kind of a word.
pub(super) fn kind_of(text: &str) -> Option<AuditKind> {
    kinds().find(|kind| word_of(*kind) == text)
}

/// All words there are.
pub(super) fn kind_words() -> Vec<String> {
    kinds().map(word_of).collect()
}

fn kinds() -> impl Iterator<Item = AuditKind> {
    // Numbers have gaps.
    (1..=KIND_MAX).filter_map(|number| AuditKind::try_from(number).ok())
}

fn moment(at_ms: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(at_ms) * 1_000_000).ok();
    let text = at.and_then(|at| at.format(&Rfc3339).ok());
    text.unwrap_or_else(|| format!("{at_ms}ms"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::admin_cli::output::json_line;

    /// Takes a line apart again: fields are divided by two blanks, a quoted one is JSON.
    fn fields(line: &str) -> Vec<(String, String)> {
        let mut rest = line;
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (name, after) = match rest.find(['=', '"', ' ']) {
                Some(at) if rest[at..].starts_with('=') => (&rest[..at], &rest[at + 1..]),
                Some(_) | None => ("", rest),
            };
            let (value, after) = if after.starts_with('"') {
                let mut read = serde_json::Deserializer::from_str(after).into_iter::<String>();
                let value = read.next().unwrap().unwrap();
                (value, &after[read.byte_offset()..])
            } else {
                let end = after.find(' ').unwrap_or(after.len());
                (after[..end].to_owned(), &after[end..])
            };
            found.push((name.to_owned(), value));
            rest = after.trim_start_matches(' ');
        }
        found
    }

    proptest! {
        #[test]
        fn one_record_is_one_line_and_says_what_the_record_says(
            actor in "\\PC{0,12}|(?s).{0,12}",
            cluster in "(?s).{0,8}",
            node in "(?s).{0,12}|[\n\r\u{85}\u{2028}\u{1b}\u{202e} =\"]{1,6}",
            token_id in "(?s).{0,8}",
            detail in "(?s).{0,24}|(\n|  node=x|\u{1b}\\[2J){1,4}",
            kind in -3_i32..40,
            at_ms in any::<i64>(),
        ) {
            let record = AuditRecord {
                index: 7, actor, cluster, node, token_id, detail, kind, at_ms,
                ..AuditRecord::default()
            };
            let view = RecordView::new(&record, &record.encode_to_vec());
            let text = view.text(OffsetDateTime::UNIX_EPOCH);
            let line = text.strip_suffix('\n').unwrap();
            let steers = |c: char| {
                c.is_control()
                    || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
            };
            prop_assert!(!line.contains(steers), "{line:?}");
            let said = fields(line.trim_start());
            prop_assert_eq!(&said[3].1, &record.actor);
            let mut wanted = vec![
                ("cluster", &record.cluster), ("node", &record.node),
                ("token", &record.token_id), ("detail", &record.detail),
            ];
            wanted.retain(|(_, value)| !value.is_empty());
            let rest: Vec<_> = said[4..].iter().map(|(name, value)| (name.as_str(), value)).collect();
            prop_assert_eq!(rest, wanted);

            let json = json_line(&view).unwrap();
            let json_line = json.strip_suffix('\n').unwrap();
            prop_assert!(!json_line.contains(steers), "{json_line:?}");
            let read: serde_json::Value = serde_json::from_str(json_line).unwrap();
            prop_assert_eq!(read["detail"].as_str().unwrap(), &record.detail);
            prop_assert_eq!(read["node"].as_str().unwrap(), &record.node);
        }
    }

    #[test]
    fn every_kind_has_a_word_of_its_own() {
        let words = kind_words();
        assert_eq!(words.len(), 27);
        assert!(words.iter().all(|word| kind_of(word).is_some()));
        assert_eq!(kind_word(999), "kind-999");
        assert_eq!(kind_of("unspecified"), None);
    }
}
