//! Lines of the documents and units that call our programs: the programs' own parsers must take them,
//! so that no document names a flag that is gone. Configurations must load. Nothing is run.

use clap::CommandFactory;
use raymtls_proto::durable::{self, Access};

use super::{fenced, files, read};

const PROGRAMS: [&str; 3] = ["ca-server", "ca-admin", "node-agent"];
/// Calls that the documents hold at least; fewer mean that they are no longer found.
const CALLS_MIN: usize = 25;

#[test]
fn every_call_in_the_documents_parses() {
    let mut wrong = Vec::new();
    let mut calls = 0;
    for (place, line) in lines().into_iter().filter(|(_, line)| !is_drawing(line)) {
        for call in calls_of(&line) {
            calls += 1;
            if let Err(why) = parse(&call) {
                wrong.push(format!("{place}: {}\n    {why}", call.join(" ")));
            }
        }
    }
    assert!(calls >= CALLS_MIN, "only {calls} calls found: are they still read?");
    assert!(wrong.is_empty(), "what no program takes:\n  {}", wrong.join("\n  "));
}

#[test]
fn every_configuration_in_the_documents_loads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca-server.toml");
    let mut found = 0;
    for document in files(".md") {
        let text = read(&document);
        for written in text.split("ca-server.toml <<'TOML'\n").skip(1) {
            found += 1;
            let toml = written.split("\nTOML\n").next().unwrap();
            durable::replace(&path, toml.as_bytes(), Access::PRIVATE).unwrap();
            let loaded = ca_server::config::Config::load(Some(&path));
            assert!(loaded.is_ok(), "{}: {loaded:?}", document.display());
        }
    }
    assert!(found >= 2, "only {found} configurations found: are they still read?");
}

#[test]
fn a_wrong_call_is_found() {
    for (line, good) in [
        ("ca-admin cluster create c1 --max-job 20d", true),
        ("ca-admin cluster create c1 --max-jobs 20d", false),
        ("sudo -u ray node-agent exec -- ray start --anything", true),
        ("node-agent exec ray start", false),
        ("node-agent status -o json | jq .files_work_until", true),
        ("systemctl stop x && ca-server serve --dir /d --conf f", false),
        ("printf x > y; /usr/local/bin/node-agent run --ray-user ray", false),
    ] {
        let calls = calls_of(line);
        assert_eq!(calls.len(), 1, "{line}: {calls:?}");
        assert_eq!(parse(&calls[0]).is_ok(), good, "{line}");
    }
    for none in
        ["RUN=\"sudo -u ray node-agent exec --\"", "systemctl enable node-agent", "# ca-server"]
    {
        assert!(calls_of(none).is_empty(), "{none}");
    }
}

/// In a drawing of the parts a program's name stands apart from what follows.
fn is_drawing(line: &str) -> bool {
    PROGRAMS.iter().any(|program| line.contains(&format!("{program}  ")))
}

/// Lines of the fenced blocks and of the units, each with its place; continued lines are joined.
fn lines() -> Vec<(String, String)> {
    let mut lines = Vec::new();
    for document in files(".md") {
        let text = read(&document);
        let mut whole = String::new();
        for (number, line) in fenced(&text) {
            whole.push_str(line.strip_suffix('\\').unwrap_or(line));
            if !line.ends_with('\\') {
                let place = format!("{}:{number}", document.display());
                lines.push((place, std::mem::take(&mut whole)));
            }
        }
    }
    for unit in files(".service") {
        let text = read(&unit);
        let starts = text.lines().filter_map(|line| line.strip_prefix("ExecStart="));
        lines.extend(starts.map(|line| (unit.display().to_string(), line.to_owned())));
    }
    lines
}

/// The calls of our programs in a line of shell: the program's words as far as the next `|`, `;`,
/// `&` or `>`.
fn calls_of(line: &str) -> Vec<Vec<String>> {
    let mut calls = Vec::new();
    for words in commands(line) {
        let mut rest = words.as_slice();
        // What runs another program in its own place.
        while let [first, after @ ..] = rest {
            rest = match first.as_str() {
                "sudo" if after.first().is_some_and(|word| word == "-u") => {
                    &after[2.min(after.len())..]
                }
                "sudo" | "exec" | "then" | "if" | "!" | "$" => after,
                word if is_assignment(word) => after,
                _ => break,
            };
        }
        let Some((first, _)) = rest.split_first() else { continue };
        let program = first.rsplit('/').next().unwrap_or_default();
        if PROGRAMS.contains(&program) {
            let mut call = rest.to_vec();
            call[0] = program.to_owned();
            calls.push(call);
        }
    }
    calls
}

fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    })
}

/// Splits a line of shell into commands and these into words, as far as the documents need it:
/// quotes, comments, separators and redirections.
fn commands(line: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut redirected = false;
    for letter in line.chars().chain([' ']) {
        if let Some(end) = quote {
            if letter == end {
                quote = None;
            } else {
                word.get_or_insert_default().push(letter);
            }
            continue;
        }
        match letter {
            '\'' | '"' => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            '#' if word.is_none() => break,
            ' ' | '\t' | '|' | ';' | '&' | '>' | '<' | '(' | ')' => {
                if let Some(word) = word.take().filter(|_| !redirected) {
                    commands.last_mut().unwrap().push(word);
                }
                match letter {
                    '>' | '<' => redirected = true,
                    '|' | ';' | '&' | '(' | ')' => {
                        redirected = false;
                        commands.push(Vec::new());
                    }
                    _ => {}
                }
            }
            letter => word.get_or_insert_default().push(letter),
        }
    }
    commands
}

fn parse(call: &[String]) -> Result<(), String> {
    let command = match call[0].as_str() {
        "ca-server" => ca_server::run::command_line(),
        "ca-admin" => ca_server::admin_cli::CommandLine::command(),
        _ => node_agent::cli::command_line(),
    };
    match command.try_get_matches_from(call) {
        Ok(_) => Ok(()),
        Err(error) if !error.use_stderr() => Ok(()),
        Err(error) => Err(error.to_string().lines().next().unwrap_or_default().to_owned()),
    }
}
