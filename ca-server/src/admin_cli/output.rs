//! What is printed and where: the answer on stdout, as an aligned table or as one JSON document;
//! everything said along the way on stderr.

use std::{
    fmt,
    io::{self, IsTerminal, Write},
};

use clap::ValueEnum;
use raymtls_proto::visible::is_visible;
use serde::Serialize;
use time::OffsetDateTime;

/// Gap between two columns.
const GAP: &str = "  ";

/// How the answer is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Aligned columns, times for people.
    Table,
    /// One document, times in RFC 3339, serial numbers in hexadecimal digits.
    Json,
}

/// An answer that can be shown in both forms. The serialized field names are a promise to scripts.
pub(super) trait View: Serialize {
    /// The form for people.
    fn text(&self, now: OffsetDateTime) -> String;
}

/// Where a command prints.
pub(super) struct Screen {
    out: Box<dyn Write>,
    err: Box<dyn Write>,
    format: Format,
    now: OffsetDateTime,
    terminal: bool,
}

impl Screen {
    /// Of the process: its stdout, stderr and terminal.
    pub(super) fn of_process(format: Format, now: OffsetDateTime) -> Self {
        // Messages hold whole seconds: "in 1h" of a token made just now, not "in 59m 59s".
        let now = now.truncate_to_second();
        let terminal = io::stdin().is_terminal() && io::stderr().is_terminal();
        Self { out: Box::new(io::stdout()), err: Box::new(io::stderr()), format, now, terminal }
    }

    /// Without a terminal, printing where a test can read it.
    #[cfg(test)]
    pub(super) fn of_test(out: Box<dyn Write>, err: Box<dyn Write>, format: Format) -> Self {
        let now = raymtls_proto::clock::from_unix(1_764_000_000).unwrap();
        Self { out, err, format, now, terminal: false }
    }

    /// Whether somebody can be asked.
    pub(super) fn has_terminal(&self) -> bool {
        self.terminal
    }

    /// The moment the command began, for relative times.
    pub(super) fn now(&self) -> OffsetDateTime {
        self.now
    }

    /// Prints the answer; a command does it once.
    pub(super) fn show(&mut self, view: &impl View) -> io::Result<()> {
        let text = match self.format {
            Format::Table => view.text(self.now),
            Format::Json => escaped(&serde_json::to_string_pretty(view)?) + "\n",
        };
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    /// One entry of an answer that has no end: a line each, for people and for programs.
    pub(super) fn entry(&mut self, view: &impl View) -> io::Result<()> {
        let text = match self.format {
            Format::Table => view.text(self.now),
            Format::Json => json_line(view)?,
        };
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    /// A part of an answer that comes in parts: printed as it comes for people, and for programs
    /// only with the whole.
    pub(super) fn part(&mut self, text: &str) -> io::Result<()> {
        match self.format {
            Format::Table => {
                self.out.write_all(text.as_bytes())?;
                self.out.flush()
            }
            Format::Json => Ok(()),
        }
    }

    /// One line beside the answer.
    pub(super) fn say(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.err, "{}", printable(line))
    }

    /// A question; the answer is typed behind it.
    pub(super) fn prompt(&mut self, question: &str) -> io::Result<()> {
        write!(self.err, "{question}")?;
        self.err.flush()
    }

    /// What went wrong. A reader who went away is told nothing.
    pub(super) fn complain(&mut self, failure: &super::failure::Failure) -> io::Result<()> {
        use super::failure::Failure;
        match failure {
            Failure::Output(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Failure::Refused { .. } => self.say(&failure.to_string()),
            Failure::Failed(_)
            | Failure::Usage(_)
            | Failure::Configuration(_)
            | Failure::Output(_) => self.say(&format!("error: {failure}")),
        }
    }
}

/// One line of JSON that steers no terminal.
pub(super) fn json_line(value: &impl Serialize) -> io::Result<String> {
    Ok(escaped(&serde_json::to_string(value)?) + "\n")
}

/// A word of a line of words: as it is where nothing in it could be taken for something else, else as
/// a JSON string.
pub(super) fn word(text: &str) -> String {
    let plain = |c: char| is_visible(c) && !c.is_whitespace() && !matches!(c, '"' | '\\' | '=');
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    escaped(&serde_json::Value::from(text).to_string())
}

/// JSON with everything that would steer a terminal escaped. JSON's own characters are plain ASCII, so
/// what is escaped here stands inside a string, where `\u` means the same to every reader.
fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c == '\n' || is_visible(c) {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    text
}

/// Rows of equal length, printed with aligned columns. A cell may come from a node's claims: what
/// would steer a terminal is shown as `?`.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with a line of column heads.
    pub(super) fn with_head(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(ToString::to_string).collect()] }
    }

    /// Two columns, name and value, without a head.
    pub(super) fn of_facts() -> Self {
        Self { rows: Vec::new() }
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.iter().map(|cell| printable(cell)).collect());
    }

    /// One fact; an empty value reads as `-`.
    pub(super) fn fact(&mut self, name: &str, value: impl fmt::Display) {
        self.row([name.to_owned(), or_dash(&value.to_string())]);
    }

    /// A fact of several lines; none is a single `-`.
    pub(super) fn facts(&mut self, name: &str, values: &[String]) {
        if values.is_empty() {
            return self.fact(name, "");
        }
        for (at, value) in values.iter().enumerate() {
            self.fact(if at == 0 { name } else { "" }, value);
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
            let line = cells.collect::<Vec<_>>().join(GAP);
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// `-` for nothing.
pub(super) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// `yes` or `no`.
pub(super) fn yes_no(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}

/// Text in which no character steers a terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if is_visible(c) { c } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_steers_no_terminal_and_reads_back_the_same() {
        let claim = "a\u{9b}31mb\u{202e}c\u{1b}d";
        let json = escaped(&serde_json::to_string_pretty(&claim).unwrap());
        assert!(json.chars().all(is_visible), "{json:?}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), claim);
    }

    #[test]
    fn columns_are_aligned_and_no_line_ends_in_spaces() {
        let mut table = Table::with_head(&["NAME", "ROLE", "STATE"]);
        table.row(["a".to_owned(), "worker".to_owned(), "live".to_owned()]);
        table.row(["longer".to_owned(), "head".to_owned(), String::new()]);
        let text = table.to_string();
        assert_eq!(text, "NAME    ROLE    STATE\na       worker  live\nlonger  head\n");
    }

    #[test]
    fn a_claim_cannot_steer_the_terminal() {
        let mut table = Table::of_facts();
        table.fact("agent", "\x1b[2Jv1\n\u{202e}x");
        assert_eq!(table.to_string(), "agent  ?[2Jv1??x\n");
    }

    #[test]
    fn a_fact_of_several_lines_names_itself_once() {
        let mut table = Table::of_facts();
        table.facts("address", &["10.0.0.1".to_owned(), "10.0.0.2".to_owned()]);
        table.facts("dns name", &[]);
        assert_eq!(table.to_string(), "address   10.0.0.1\n          10.0.0.2\ndns name  -\n");
    }
}
