//! The fuzz targets without a fuzzer: every input that was ever worth keeping, and a bounded number
//! of mutations of them, the same on every machine.

use std::{fs, path::Path};

use raymtls_tests::fuzz::{Mutator, TARGETS, Target};

/// Mutations of each target's corpus.
const MUTATIONS: usize = 20_000;
/// Longest mutation, in bytes.
const INPUT_LEN_MAX: usize = 16 * 1_024;
const SEED: u64 = 0x5261_796d_544c_5331;

#[test]
fn every_target_holds_on_its_corpus_and_on_mutations_of_it() {
    println!("seed {SEED:#x}, {MUTATIONS} mutations of each target");
    let broken: Vec<_> = TARGETS.into_iter().filter_map(|target| replay(target).err()).collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

fn replay(target: Target) -> Result<(), String> {
    let corpus = corpus(target.0);
    for (name, input) in &corpus {
        run(target, input, name)?;
    }
    let inputs: Vec<_> = corpus.into_iter().map(|(_, input)| input).collect();
    let mut mutator = Mutator::new(SEED, INPUT_LEN_MAX);
    for number in 0..MUTATIONS {
        run(target, &mutator.mutate(&inputs), &format!("mutation {number}"))?;
    }
    Ok(())
}

#[test]
fn every_folder_of_the_corpus_has_its_target() {
    let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
    for entry in fs::read_dir(folder()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(names.contains(&name.as_str()), "tests/corpus/{name} is replayed by no target");
    }
    let document = include_str!("../../../docs/fuzzing.md");
    for name in names {
        let rows = document.matches(&format!("\n| `{name}` |")).count();
        assert_eq!(rows, 2, "docs/fuzzing.md: what must hold of {name}, and how far it was run");
    }
}

/// Runs a target; where it panics, says on what.
fn run((target, function): Target, input: &[u8], name: &str) -> Result<(), String> {
    std::panic::catch_unwind(|| function(input))
        .map_err(|_| format!("{target} does not hold on {name}, which is {}", hex::encode(input)))
}

/// Inputs of a target by name, in a fixed order.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder().join(target))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    assert!(!files.is_empty(), "tests/corpus/{target} is empty");
    files
}

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus"))
}
