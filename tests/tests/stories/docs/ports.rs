//! Ports that are written by hand, for who starts Ray without `node-agent ray-flags`: they are those of a
//! new cluster's plan, flag by flag and whole.

use std::path::Path;

use raymtls_proto::{ports, v1};

use super::read;

/// Files with the flags of a worker, each as often as it has them.
const HAND_WRITTEN: [&str; 2] = ["scripts/bootstrap/test.sh", "examples/slurm/ray.sbatch"];
const POD: &str = "deploy/kuberay/raycluster.yaml";

#[test]
fn flags_written_by_hand_are_those_of_the_plan() {
    let settings =
        v1::Settings { port_plan: Some(ports::default_plan()), ..v1::Settings::default() };
    let flags = ports::ray_start_flags(v1::Role::Worker, &settings);
    assert_eq!(flags.len(), 8);
    for file in HAND_WRITTEN {
        let text = read(Path::new(file));
        for flag in &flags {
            assert!(text.contains(flag.as_str()), "{file} lacks {flag}");
        }
        let names = flags.iter().map(|flag| flag.split_once('=').unwrap().0);
        for name in names {
            let name = format!("{name}=");
            for written in text.split(&name).skip(1) {
                let number: String = written.chars().take_while(char::is_ascii_digit).collect();
                let flag = format!("{name}{number}");
                assert!(flags.contains(&flag), "{file}: {flag} is not in the plan");
            }
        }
    }
    let pod = read(Path::new(POD));
    for flag in &flags {
        let (name, number) = flag.trim_start_matches('-').split_once('=').unwrap();
        let line = format!("{name}: \"{number}\"");
        assert_eq!(pod.matches(&line).count(), 2, "{POD}: {line} for head and workers");
    }
}
