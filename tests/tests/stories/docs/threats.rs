//! `docs/threat-model.md` says of each attack what happens, and which test shows it: every number
//! stands there once, a green row names tests that exist under that name, and a row that is not green
//! says why.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use super::{cells, files, read};

const DOCUMENT: &str = "docs/threat-model.md";
/// Rows of the table.
const ATTACKS: u32 = 53;
const GREEN: &str = "green";
const NOT_GREEN: [&str; 3] = ["later", "not built", "not testable"];

#[derive(Debug)]
struct Row {
    number: u32,
    what_happens: String,
    state: String,
    why: String,
    tests: Vec<String>,
}

#[test]
fn every_attack_stands_in_the_table_once() {
    let text = read(Path::new(DOCUMENT));
    let mut count = BTreeMap::<u32, u32>::new();
    for row in rows(&text) {
        *count.entry(row.number).or_default() += 1;
    }
    let once: BTreeMap<u32, u32> = (1..=ATTACKS).map(|number| (number, 1)).collect();
    assert_eq!(count, once, "numbers of {DOCUMENT}, and how often each stands there");
}

#[test]
fn every_green_row_names_tests_that_exist_and_every_other_says_why() {
    let tests = all_tests();
    assert!(tests.len() > 150, "only {} tests found: are they still read?", tests.len());
    let faults: Vec<_> =
        rows(&read(Path::new(DOCUMENT))).iter().flat_map(|r| r.faults(&tests)).collect();
    assert!(faults.is_empty(), "{DOCUMENT}:\n  {}", faults.join("\n  "));
}

#[test]
fn a_test_that_is_gone_is_found() {
    let tests = all_tests();
    let row = |cells: &str| rows(cells).remove(0).faults(&tests);
    let here = "`docs::threats::a_test_that_is_gone_is_found`";
    assert_eq!(row(&format!("| 1 | a | b | green | {here} |")), Vec::<String>::new());
    for bad in [
        "| 1 | a | b | green | `docs::threats::a_test_nobody_wrote` |".to_owned(),
        "| 1 | a | b | green | `a_test_that_is_gone_is_found` |".to_owned(),
        "| 1 | a | b | green | none |".to_owned(),
        format!("| 1 | a | b | done | {here} |"),
        format!("| 1 | a |  | green | {here} |"),
        "| 1 | a | b | later | |".to_owned(),
    ] {
        assert_eq!(row(&bad).len(), 1, "{bad}");
    }
    assert!(row("| 1 | a | b | later: the nftables table | |").is_empty());
}

impl Row {
    fn faults(&self, tests: &BTreeSet<String>) -> Vec<String> {
        let mut faults = Vec::new();
        let fault = |text: &str| format!("row {}: {text}", self.number);
        if self.what_happens.is_empty() {
            faults.push(fault("says not what happens"));
        }
        match self.state.as_str() {
            GREEN if self.tests.is_empty() => faults.push(fault("is green and names no test")),
            GREEN => {}
            state if !NOT_GREEN.contains(&state) => {
                faults.push(fault(&format!("{state:?} is neither green nor one of {NOT_GREEN:?}")));
            }
            _ if self.why.is_empty() => faults.push(fault("is not green and says not why")),
            _ => {}
        }
        for name in &self.tests {
            // A module and a name at least: a name alone may be had twice.
            let ending = format!("::{name}");
            let named = name.contains("::") && tests.iter().any(|test| test.ends_with(&ending));
            if !named {
                faults.push(fault(&format!("there is no test {name}")));
            }
        }
        faults
    }
}

/// Rows whose first cell is a number: number, attack, what happens, `state: why`, tests in backticks.
fn rows(text: &str) -> Vec<Row> {
    let row = |line| {
        let cells = cells(line)?;
        let [number, _, what_happens, state, tests] = cells.as_slice() else { return None };
        let (state, why) = state.split_once(':').unwrap_or((state, ""));
        Some(Row {
            number: number.parse().ok()?,
            what_happens: (*what_happens).to_owned(),
            state: state.trim().to_owned(),
            why: why.trim().to_owned(),
            tests: tests.split('`').skip(1).step_by(2).map(str::to_owned).collect(),
        })
    };
    text.lines().filter_map(row).collect()
}

/// Every test of the tree as `package::modules::name`, and every function of the scripts as
/// `scripts::path::name`.
fn all_tests() -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    for file in files(".rs") {
        let text = read(&file);
        let module = module(&file);
        let names = test_names(&text).into_iter().chain(suite_claims(&text));
        tests.extend(names.map(|name| format!("::{module}::{name}")));
    }
    for file in files(".sh") {
        let module = module(&file);
        let functions = read(&file).lines().filter_map(function).collect::<Vec<_>>();
        tests.extend(functions.into_iter().map(|name| format!("::{module}::{name}")));
    }
    tests
}

/// `tests/tests/stories/enroll.rs` to `tests::stories::enroll`.
fn module(file: &Path) -> String {
    let path = file.with_extension("");
    let parts = path.iter().map(|part| part.to_string_lossy().replace('-', "_"));
    let kept = parts.filter(|part| part != "src" && part != "mod" && part != "lib");
    kept.collect::<Vec<_>>().join("::").replacen("tests::tests::", "tests::", 1)
}

/// Functions under `#[test]` or `#[tokio::test...]`, with other attributes between.
fn test_names(text: &str) -> Vec<String> {
    let (mut names, mut is_test) = (Vec::new(), false);
    for line in text.lines().map(str::trim) {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            is_test = true;
        } else if is_test && !line.starts_with("#[") && !line.starts_with("//") {
            let after = line.split_once("fn ").map_or("", |(_, after)| after);
            let name = after.split(['(', '<']).next().unwrap_or_default();
            if !name.is_empty() {
                names.push(name.to_owned());
                is_test = false;
            }
        }
    }
    names
}

/// Claims of a `suite! { file: claim claim; }`, each a test of every backend, as `file::claim`.
fn suite_claims(text: &str) -> Vec<String> {
    let Some((_, suite)) = text.split_once("\nsuite! {") else { return Vec::new() };
    let suite = suite.split('}').next().unwrap_or_default();
    let groups = suite.split(';').filter_map(|group| group.split_once(':'));
    groups
        .flat_map(|(file, claims)| {
            claims.split_whitespace().map(move |claim| format!("{}::{claim}", file.trim()))
        })
        .collect()
}

/// A line that begins a function of a shell script.
fn function(line: &str) -> Option<String> {
    let (name, _) = line.split_once("() {")?;
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (!name.is_empty() && name.bytes().all(fits)).then(|| name.to_owned())
}
