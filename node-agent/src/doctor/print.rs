//! Findings for a person: one line each, the next step under it. Pure.

use std::fmt::Write;

use super::{
    Finding, Level,
    fix::{Fixed, Outcome},
};

/// One line that moves no cursor: names of processes, files and peers are anybody's.
pub(super) fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '"' | '\'' | '\\') {
            out.push(c);
        } else {
            out.extend(c.escape_debug());
        }
    }
    out
}

/// The findings, and how many of each level.
pub(super) fn table(findings: &[Finding]) -> String {
    let mut out = String::new();
    let mut line =
        |text: String| writeln!(out, "{}", text.trim_end()).expect("writing to a String");
    for finding in findings {
        line(format!("{:<8} {:<18} {}", finding.level.word(), finding.check, clean(&finding.what)));
        if let Some(next) = &finding.next {
            line(format!("{:<8} {:<18} next: {}", "", "", clean(next)));
        }
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    line(format!(
        "{} ok, {} to look at, {} wrong, {} not seen",
        count(Level::Ok),
        count(Level::Warn),
        count(Level::Fail),
        count(Level::Unknown)
    ));
    out
}

/// What `--fix` did.
pub(super) fn fixed(fixed: &[Fixed]) -> String {
    let mut out = String::new();
    if fixed.is_empty() {
        out.push_str("fix      nothing to do: owners, modes and links are as they must be\n");
    }
    for one in fixed {
        let (word, why) = match &one.done {
            Outcome::Done => ("fixed", String::new()),
            Outcome::Would => ("would", String::new()),
            Outcome::NotSafe(why) => ("left", format!(" ({why})")),
            Outcome::Failed(why) => ("FAILED", format!(" ({why})")),
        };
        let text = clean(&format!("{} {}{why}", one.path, one.what));
        writeln!(out, "{word:<8} {text}").expect("writing to a String");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stranger_named_forges_no_line() {
        let forged = "/t\n1 ok\u{1b}[2K\u{202e}\\ \"é\"";
        let shown = r#"/t\n1 ok\u{1b}[2K\u{202e}\ "é""#;
        let finding = Finding::new("key", Level::Fail, forged, forged);
        let fixed_one = Fixed {
            path: forged.to_owned(),
            what: forged.to_owned(),
            done: Outcome::NotSafe(forged.to_owned()),
        };
        let table = table(&[finding]);
        assert_eq!((table.lines().count(), table.matches(shown).count()), (3, 2), "{table}");
        let fixed = fixed(&[fixed_one]);
        assert_eq!((fixed.lines().count(), fixed.matches(shown).count()), (1, 3), "{fixed}");
    }

    #[test]
    fn a_finding_has_its_next_step_under_it_and_the_counts_come_last() {
        let findings = [
            Finding::ok("key", "it is the leaf's"),
            Finding::new("clock", Level::Fail, "an hour behind", "set it"),
        ];
        assert_eq!(
            table(&findings),
            "ok       key                it is the leaf's\n\
             FAIL     clock              an hour behind\n\
             \x20                           next: set it\n\
             1 ok, 0 to look at, 1 wrong, 0 not seen\n"
        );
    }
}
