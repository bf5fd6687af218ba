//! `docs/refusals.md`, from the table of reason words.

use raymtls_proto::reason::{Reaction, Reason};

const HEAD: &str = "\
# Refusals

Generated from `proto/src/reason.rs`; a test holds the two together.

When the CA says no it answers with a gRPC code, a reason word (`google.rpc.ErrorInfo`, domain
`raymtls.v1`) and a sentence for a person. Programs go by the word, never by the sentence. The sentence
names the node, the address or the limit.

A word that an agent does not know, of a newer CA, and an error without a word (a proxy's, say) mean:
try again with backoff. Where the agent has no answer at all its `status` says `CA_AWAY` (nobody
answers) or `CA_UNTRUSTED` (what answers is not this deployment's CA; nothing was sent to it).

What an agent does is one of four things:

";
const TABLE_HEAD: &str = "
| word | gRPC code | meaning | agent | what an operator does next |
|---|---|---|---|---|
";

#[test]
fn the_document_is_what_the_code_says() {
    super::must_be("docs/refusals.md", &text());
}

#[test]
fn every_reason_says_what_it_means_and_what_to_do() {
    for reason in Reason::ALL {
        for words in [reason.meaning(), reason.next_step()] {
            assert!(words.len() >= 10 && !words.contains('|'), "{}: {words:?}", reason.as_str());
        }
    }
}

fn text() -> String {
    let row = |reason: &Reason| {
        format!(
            "| `{}` | `{}` | {} | {} | {} |\n",
            reason.as_str(),
            snake(&format!("{:?}", reason.code())),
            reason.meaning().trim_end_matches('.'),
            reason.reaction().as_str(),
            reason.next_step(),
        )
    };
    let kind =
        |reaction: &Reaction| format!("- *{}*: {}\n", reaction.as_str(), reaction.in_words());
    let kinds: String = Reaction::ALL.iter().map(kind).collect();
    let rows: String = Reason::ALL.iter().map(row).collect();
    format!("{HEAD}{kinds}{TABLE_HEAD}{rows}")
}

/// `FailedPrecondition` to `FAILED_PRECONDITION`, as gRPC's own documents write codes.
fn snake(name: &str) -> String {
    let mut text = String::new();
    for (index, letter) in name.char_indices() {
        if index > 0 && letter.is_ascii_uppercase() {
            text.push('_');
        }
        text.push(letter.to_ascii_uppercase());
    }
    text
}
