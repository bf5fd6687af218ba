//! The contract on the wire may grow; what was in it once keeps its meaning. `contract.snapshot` is
//! what it was; these tests compare it with what it is. A new item is written to the snapshot with
//! `UPDATE_SNAPSHOT=1 cargo test -p raymtls-proto --test contract`; a broken one never is.

use std::{collections::BTreeMap, path::PathBuf};

use prost::Message;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    FileDescriptorSet, ServiceDescriptorProto,
    field_descriptor_proto::{Label, Type},
};
use raymtls_proto::{durable, v1::FILE_DESCRIPTOR_SET};

const UPDATE: &str = "UPDATE_SNAPSHOT=1 cargo test -p raymtls-proto --test contract";
/// Most numbers one `reserved` range may hold.
const RESERVED_MAX: i32 = 1_000;

/// Item to shape: `field M 3` to `name: type, label`; `value E 0`, `rpc S/M`, `reserved M 3`.
type Items = BTreeMap<String, String>;

#[test]
fn nothing_that_was_promised_is_broken() {
    let now = items(&descriptors());
    let before = parse(&std::fs::read_to_string(snapshot_path()).unwrap_or_default());
    let (broken, added) = compare(&before, &now);
    assert!(broken.is_empty(), "the contract is broken:\n  {}", broken.join("\n  "));
    if std::env::var_os("UPDATE_SNAPSHOT").is_some() {
        let text = render(&now);
        durable::replace(&snapshot_path(), text.as_bytes(), durable::Access::PUBLIC).unwrap();
        return;
    }
    assert!(
        added.is_empty(),
        "new in the contract:\n  {}\nif that is meant, run `{UPDATE}`",
        added.join("\n  ")
    );
}

#[test]
fn every_enum_begins_with_unspecified() {
    for (name, values) in enums(&descriptors()) {
        let zero = values.value.iter().find(|value| value.number() == 0);
        let zero = zero.map(|value| value.name().to_owned()).unwrap_or_default();
        assert!(zero.ends_with("_UNSPECIFIED"), "{name}: 0 is {zero:?}, not ..._UNSPECIFIED");
    }
}

#[test]
fn every_package_has_a_version() {
    for file in ours(&descriptors()) {
        let last = file.package().rsplit('.').next().unwrap_or_default();
        let number = last.strip_prefix('v').unwrap_or_default();
        let good = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        assert!(good, "{}: package {:?} ends in no version", file.name(), file.package());
    }
}

#[test]
fn every_rpc_says_in_its_last_sentence_who_may_call_it() {
    let callers = ["viewer", "operator", "admin", "caller"];
    for (rpc, comment) in rpc_comments(&descriptors()) {
        let last = last_sentence(&comment).to_lowercase();
        let said = callers.iter().any(|caller| last.contains(caller));
        assert!(said, "{rpc}: the last sentence of its comment names no caller: {last:?}");
    }
}

#[test]
fn the_comparison_bites() {
    let before = || {
        parse(
            "field m.A 1 = name: string, singular\nfield m.A 2 = old: bytes, singular\n\
             value m.E 1 = E_ONE\nrpc m.S/Do = m.A -> m.A\nreserved m.A 9 = number\n",
        )
    };
    type Change = fn(&mut Items);
    let cases: [(&str, Change, &str); 8] = [
        ("nothing changed", |_| {}, ""),
        ("field gone", |now| drop(now.remove("field m.A 2")), "was removed"),
        (
            "field gone, number reserved, name not",
            |now| {
                now.remove("field m.A 2");
                now.insert("reserved m.A 2".into(), "number".into());
            },
            "was removed",
        ),
        (
            "field gone, both reserved",
            |now| {
                now.remove("field m.A 2");
                now.insert("reserved m.A 2".into(), "number".into());
                now.insert("reserved m.A \"old\"".into(), "name".into());
            },
            "",
        ),
        (
            "number reused",
            |now| drop(now.insert("field m.A 2".into(), "new: bytes, singular".into())),
            "was `old: bytes, singular`",
        ),
        (
            "type changed",
            |now| drop(now.insert("field m.A 1".into(), "name: bytes, singular".into())),
            "was `name: string, singular`",
        ),
        ("enum value gone", |now| drop(now.remove("value m.E 1")), "was removed"),
        ("reservation gone", |now| drop(now.remove("reserved m.A 9")), "was removed"),
    ];
    for (name, change, wanted) in cases {
        let mut now = before();
        change(&mut now);
        let (broken, _) = compare(&before(), &now);
        assert_eq!(broken.is_empty(), wanted.is_empty(), "{name}: {broken:?}");
        assert!(broken.iter().all(|line| line.contains(wanted)), "{name}: {broken:?}");
    }
}

/// What is broken, and what is new.
fn compare(before: &Items, now: &Items) -> (Vec<String>, Vec<String>) {
    let broken = before.iter().filter_map(|(item, shape)| match now.get(item) {
        Some(same) if same == shape => None,
        Some(other) => Some(format!(
            "{item} was `{shape}`, is `{other}`: a number keeps its name and type for good; \
             reserve it and take the next one"
        )),
        None if is_reserved(item, shape, now) => None,
        None => Some(format!(
            "{item} = {shape} was removed: old peers still speak it; write `reserved NUMBER;` and \
             `reserved \"NAME\";` in its place (an rpc stays)"
        )),
    });
    let added = now.iter().filter(|(item, _)| !before.contains_key(*item));
    (broken.collect(), added.map(|(item, shape)| format!("{item} = {shape}")).collect())
}

/// Whether a field or value that is gone has its number and its name reserved.
fn is_reserved(item: &str, shape: &str, now: &Items) -> bool {
    let [kind @ ("field" | "value"), owner, number] = item.split(' ').collect::<Vec<_>>()[..]
    else {
        return false;
    };
    let name = if kind == "field" { shape.split(':').next().unwrap_or_default() } else { shape };
    now.contains_key(&format!("reserved {owner} {number}"))
        && now.contains_key(&format!("reserved {owner} \"{name}\""))
}

fn items(set: &FileDescriptorSet) -> Items {
    let mut items = Items::new();
    for file in ours(set) {
        for message in &file.message_type {
            add_message(&mut items, file.package(), message);
        }
        for service in &file.service {
            add_service(&mut items, file.package(), service);
        }
    }
    for (name, values) in enums(set) {
        add_enum(&mut items, &name, &values);
    }
    items
}

fn add_message(items: &mut Items, scope: &str, message: &DescriptorProto) {
    let name = format!("{scope}.{}", message.name());
    for field in &message.field {
        items.insert(format!("field {name} {}", field.number()), field_shape(message, field));
    }
    for range in &message.reserved_range {
        assert!(range.end() - range.start() <= RESERVED_MAX, "{name}: reserve single numbers");
        for number in range.start()..range.end() {
            items.insert(format!("reserved {name} {number}"), "number".to_owned());
        }
    }
    for reserved in &message.reserved_name {
        items.insert(format!("reserved {name} \"{reserved}\""), "name".to_owned());
    }
    for nested in &message.nested_type {
        add_message(items, &name, nested);
    }
}

#[allow(clippy::wildcard_enum_match_arm, reason = "the descriptor's enum, not ours")]
fn field_shape(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let kind = match field.r#type() {
        Type::Message | Type::Enum | Type::Group => field.type_name().to_owned(),
        plain => format!("{plain:?}").to_lowercase(),
    };
    let oneof = field.oneof_index.and_then(|at| message.oneof_decl.get(usize::try_from(at).ok()?));
    let label = match (field.label(), oneof) {
        (Label::Repeated, _) => "repeated".to_owned(),
        (Label::Optional | Label::Required, Some(oneof)) => format!("oneof {}", oneof.name()),
        (Label::Optional | Label::Required, None) => "singular".to_owned(),
    };
    format!("{}: {kind}, {label}", field.name())
}

fn add_enum(items: &mut Items, name: &str, values: &EnumDescriptorProto) {
    for value in &values.value {
        items.insert(format!("value {name} {}", value.number()), value.name().to_owned());
    }
    for range in &values.reserved_range {
        assert!(range.end() - range.start() < RESERVED_MAX, "{name}: reserve single numbers");
        // Unlike a message's, an enum's range holds its end.
        for number in range.start()..=range.end() {
            items.insert(format!("reserved {name} {number}"), "number".to_owned());
        }
    }
    for reserved in &values.reserved_name {
        items.insert(format!("reserved {name} \"{reserved}\""), "name".to_owned());
    }
}

fn add_service(items: &mut Items, scope: &str, service: &ServiceDescriptorProto) {
    let stream = |is: bool| if is { "stream " } else { "" };
    for method in &service.method {
        let shape = format!(
            "{}{} -> {}{}",
            stream(method.client_streaming()),
            method.input_type(),
            stream(method.server_streaming()),
            method.output_type()
        );
        items.insert(format!("rpc {scope}.{}/{}", service.name(), method.name()), shape);
    }
}

/// Every enum with its full name, those inside messages too.
fn enums(set: &FileDescriptorSet) -> Vec<(String, EnumDescriptorProto)> {
    fn inside(scope: &str, message: &DescriptorProto) -> Vec<(String, EnumDescriptorProto)> {
        let name = format!("{scope}.{}", message.name());
        let own = message.enum_type.iter().map(|e| (format!("{name}.{}", e.name()), e.clone()));
        own.chain(message.nested_type.iter().flat_map(|nested| inside(&name, nested))).collect()
    }
    ours(set)
        .flat_map(|file| {
            let own = file.enum_type.iter();
            let own = own.map(|e| (format!("{}.{}", file.package(), e.name()), e.clone()));
            own.chain(file.message_type.iter().flat_map(|m| inside(file.package(), m)))
        })
        .collect()
}

/// Every RPC with the comment before it.
fn rpc_comments(set: &FileDescriptorSet) -> Vec<(String, String)> {
    // Numbers of `service` in FileDescriptorProto and of `method` in ServiceDescriptorProto.
    const SERVICE: i32 = 6;
    const METHOD: i32 = 2;
    let mut found = Vec::new();
    for file in ours(set) {
        let source = file.source_code_info.as_ref().expect("the set is built with source info");
        for (s, service) in (0..).zip(&file.service) {
            for (m, method) in (0..).zip(&service.method) {
                let path = [SERVICE, s, METHOD, m];
                let comment = source.location.iter().find(|location| location.path == path);
                let comment = comment.map(|location| location.leading_comments().to_owned());
                let name = format!("{}/{}", service.name(), method.name());
                found.push((name, comment.unwrap_or_default()));
            }
        }
    }
    assert!(!found.is_empty(), "the descriptor set has no rpc");
    found
}

fn last_sentence(comment: &str) -> String {
    let line = comment.split_whitespace().collect::<Vec<_>>().join(" ");
    line.trim_end_matches('.').rsplit(". ").next().unwrap_or_default().to_owned()
}

fn ours(set: &FileDescriptorSet) -> impl Iterator<Item = &FileDescriptorProto> {
    set.file.iter().filter(|file| file.package().starts_with("raymtls."))
}

fn descriptors() -> FileDescriptorSet {
    FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("our own build wrote it")
}

fn snapshot_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/contract.snapshot")
}

fn parse(text: &str) -> Items {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let pairs = lines.map(|line| line.split_once(" = ").expect("a line is ITEM = SHAPE"));
    pairs.map(|(item, shape)| (item.to_owned(), shape.to_owned())).collect()
}

fn render(items: &Items) -> String {
    let mut text = format!("# What the contract promises. Renew it with `{UPDATE}`.\n");
    for (item, shape) in items {
        text.push_str(&format!("{item} = {shape}\n"));
    }
    text
}
