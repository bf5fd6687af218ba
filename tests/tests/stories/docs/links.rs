//! Links between the documents: the file is there, and so is the heading.

use std::path::Path;

use super::{files, read, root};

#[test]
fn every_relative_link_leads_somewhere() {
    let mut broken = Vec::new();
    let mut links = 0;
    for document in files(".md") {
        let text = read(&document);
        for target in targets(&text) {
            links += 1;
            if let Some(why) = fault(&document, &text, target) {
                broken.push(format!("{}: ({target}) {why}", document.display()));
            }
        }
    }
    assert!(links > 10, "only {links} links found: are they still read?");
    assert!(broken.is_empty(), "broken links:\n  {}", broken.join("\n  "));
}

#[test]
fn a_link_to_nowhere_is_found() {
    let text = "# One two\n\nSee [a](gone.md), [b](#one-two), [c](#three), [d](https://ray.io).\n";
    let faults: Vec<_> = targets(text)
        .into_iter()
        .filter(|target| fault(Path::new("docs/x.md"), text, target).is_some())
        .collect();
    assert_eq!(faults, ["gone.md", "#three"]);
}

/// What is wrong with a link, if anything.
fn fault(document: &Path, text: &str, target: &str) -> Option<String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
    let path = root().join(document).parent()?.join(file);
    if !file.is_empty() && !path.exists() {
        return Some("is not there".to_owned());
    }
    if anchor.is_empty() {
        return None;
    }
    let linked =
        if file.is_empty() { text.to_owned() } else { std::fs::read_to_string(path).ok()? };
    let found = linked.lines().filter(|l| l.starts_with('#')).any(|l| slug(l) == anchor);
    (!found).then(|| "has no such heading".to_owned())
}

/// Targets of `[text](target)` outside fenced blocks.
fn targets(text: &str) -> Vec<&str> {
    let fenced: Vec<usize> = super::fenced(text).into_iter().map(|(number, _)| number).collect();
    let lines = text.lines().enumerate().filter(|(index, _)| !fenced.contains(&(index + 1)));
    let links = lines.flat_map(|(_, line)| line.split("](").skip(1));
    links.filter_map(|rest| rest.split(')').next()).collect()
}

/// The anchor that GitHub gives a heading.
fn slug(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = words.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}
