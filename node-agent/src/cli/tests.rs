use super::*;

#[test]
fn only_what_an_operator_must_put_right_is_configuration() {
    let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
    let path = || "p".to_owned();
    let state = |error: StateError| ActError::from(error);
    let tls = |error: KeyFolderError| ActError::from(error);
    let read = |error| KeyError::Read { path: path(), error };
    let table: [(&str, ActError, bool); 12] = [
        ("disk full", state(full().into()), false),
        ("locked", state(StateError::Locked(path())), false),
        ("key unreadable", state(read(full()).into()), false),
        ("not enrolled", state(StateError::NotEnrolled(path())), true),
        ("damaged", state(StateError::Damaged { path: path(), why: path() }), true),
        ("exposed", state(StateError::Exposed { path: path(), why: path() }), true),
        ("key damaged", state(KeyError::Damaged(path()).into()), true),
        ("TLS folder: disk full", tls(full().into()), false),
        ("TLS folder: group", tls(KeyFolderError::Group { path: path(), gid: 7 }), true),
        ("TLS folder: exposed", tls(KeyFolderError::Exposed { path: path(), why: "" }), true),
        ("a key", ActError::Key(read(full())), false),
        ("too many folders", ActError::TooManyFolders(16), false),
    ];
    for (name, error, is_config) in table {
        assert_eq!(matches!(open_failure(error), Failure::Config(_)), is_config, "{name}");
    }
}

#[test]
fn a_machine_that_is_given_no_name_asks_for_none() {
    let options = |more: &[&str]| {
        let line = ["node-agent", "enroll", "--join", "j"].iter().chain(more);
        let Command::Enroll(args) = Cli::parse_from(line).command else { panic!("not enroll") };
        enroll_options(args).unwrap()
    };
    assert!(options(&["--name", "n1"]).name_given);
    assert!(!options(&[]).name_given);
}

#[test]
fn only_the_whole_word_agrees() {
    assert!(agreed("yes\n", "it stays").is_ok());
    for no in ["", "\n", "y\n", "YES\n", "yes please\n", "no\n"] {
        assert!(matches!(agreed(no, "it stays"), Err(Failure::Failed(_))), "{no:?}");
    }
    let endless = std::io::repeat(b'y');
    assert_eq!(read_answer(std::io::BufReader::new(endless)).unwrap().len(), 64);
}
