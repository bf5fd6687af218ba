//! Findings for a person: one line each, the next step under it. Pure.

use std::fmt::Write;

use super::{
    Finding, Level,
    fix::{Fixed, Outcome},
};

/// The findings, and how many of each level.
pub(super) fn table(findings: &[Finding]) -> String {
    let mut out = String::new();
    let mut line =
        |text: String| writeln!(out, "{}", text.trim_end()).expect("writing to a String");
    for finding in findings {
        line(format!("{:<8} {:<18} {}", finding.level.word(), finding.check, finding.what));
        if let Some(next) = &finding.next {
            line(format!("{:<8} {:<18} next: {next}", "", ""));
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
        writeln!(out, "{word:<8} {} {}{why}", one.path, one.what).expect("writing to a String");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

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
