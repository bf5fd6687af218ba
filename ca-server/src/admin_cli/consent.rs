//! Before the fleet is changed: says what will be done, and wants a yes for it.

use std::io::{self, BufRead};

use clap::Args;

use super::{failure::Failure, output::Screen};

/// Longest answer that is read, in bytes.
const ANSWER_LEN_MAX: u64 = 64;

/// The option of every command that changes the fleet.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct Consent {
    /// Do it without asking.
    #[arg(long)]
    yes: bool,
}

impl Consent {
    /// Says the plan on stderr; comes back once it is agreed to.
    pub(super) async fn ask(self, plan: &[String], screen: &mut Screen) -> Result<(), Failure> {
        for line in plan {
            screen.say(line)?;
        }
        if self.yes {
            return Ok(());
        }
        if !screen.has_terminal() {
            return Err(Failure::Usage(
                "nothing was changed: there is no terminal to ask on; add --yes to agree to the \
                 above"
                    .to_owned(),
            ));
        }
        screen.prompt("type yes to do it: ")?;
        // Off the runtime's thread, so that the connection is served while the person thinks.
        let answer = tokio::task::spawn_blocking(|| read_answer(io::stdin().lock()))
            .await
            .map_err(|e| Failure::Failed(format!("cannot read the answer: {e}")))??;
        if is_yes(&answer) {
            return Ok(());
        }
        Err(Failure::Failed("nothing was changed: the answer was not yes".to_owned()))
    }
}

fn read_answer(input: impl BufRead) -> io::Result<String> {
    let mut answer = String::new();
    input.take(ANSWER_LEN_MAX).read_line(&mut answer)?;
    Ok(answer)
}

fn is_yes(answer: &str) -> bool {
    answer.trim() == "yes"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_word_agrees() {
        assert!(is_yes("yes\n") && is_yes(" yes "));
        for no in ["", "\n", "y\n", "YES\n", "yes please\n", "no\n"] {
            assert!(!is_yes(no), "{no:?}");
        }
    }

    #[test]
    fn an_endless_answer_is_cut() {
        let answer = read_answer(io::BufReader::new(io::repeat(b'y'))).unwrap();
        assert_eq!(answer.len() as u64, ANSWER_LEN_MAX);
    }
}
