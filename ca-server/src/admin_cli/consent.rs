//! Before the fleet is changed: says what will be done, and wants a yes for it.

use std::io::{self, BufRead};

use clap::Args;
use raymtls_proto::identity::NodeName;

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
        if is_yes(&asked("type yes to do it: ", screen).await?) {
            return Ok(());
        }
        Err(Failure::Failed("nothing was changed: the answer was not yes".to_owned()))
    }

    /// The same where the named heads are among the nodes to be thrown out: each wants its name typed
    /// again, and a yes alone is not enough.
    pub(super) async fn ask_for_heads(
        self,
        plan: &[String],
        heads: &[String],
        confirmed: &ConfirmedHeads,
        screen: &mut Screen,
    ) -> Result<(), Failure> {
        if let Some(other) = confirmed.names.iter().find(|n| !heads.iter().any(|h| h == n.as_str()))
        {
            let text = format!(
                "nothing was changed: --confirm-head {other} names no head that would be revoked"
            );
            return Err(Failure::Usage(text));
        }
        let unconfirmed: Vec<_> = heads
            .iter()
            .filter(|head| !confirmed.names.iter().any(|n| n.as_str() == *head))
            .collect();
        if unconfirmed.is_empty() {
            return self.ask(plan, screen).await;
        }
        for line in plan {
            screen.say(line)?;
        }
        if self.yes || !screen.has_terminal() {
            let flags: Vec<_> = unconfirmed.iter().map(|h| format!("--confirm-head {h}")).collect();
            return Err(Failure::Usage(format!(
                "nothing was changed: this cuts off a head, and with it its cluster; agree to that \
                 by its name: {}",
                flags.join(" ")
            )));
        }
        for head in unconfirmed {
            let question = format!("{head} is a head: type its name to revoke it: ");
            if asked(&question, screen).await?.trim() != head {
                let text = "nothing was changed: the answer was not the head's name";
                return Err(Failure::Failed(text.to_owned()));
            }
        }
        Ok(())
    }
}

/// The option of every command that may throw a head out.
#[derive(Clone, Debug, Args)]
pub(super) struct ConfirmedHeads {
    /// Name of the head, once more: its cluster does not work without it.
    #[arg(long = "confirm-head", value_name = "NAME")]
    names: Vec<NodeName>,
}

async fn asked(question: &str, screen: &mut Screen) -> Result<String, Failure> {
    screen.prompt(question)?;
    // Off the runtime's thread, so that the connection is served while the person thinks.
    let answer = tokio::task::spawn_blocking(|| read_answer(io::stdin().lock()))
        .await
        .map_err(|e| Failure::Failed(format!("cannot read the answer: {e}")))??;
    Ok(answer)
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
