//! Security groups as a CloudFormation template: for each cluster one group for all nodes and one more
//! for the head, and a group for the CA. What no rule lets in is refused by AWS itself.

use std::fmt::{self, Write};

use raymtls_proto::{
    ports::{Caller, On, Port},
    v1,
};

use super::{CA_PORTS, caller_name, reachable};

/// The template for these clusters.
pub(super) fn template(clusters: &[&str], plan: &v1::PortPlan) -> String {
    let mut text = String::new();
    write_template(&mut text, clusters, plan).expect("writing into a string");
    text
}

fn write_template(out: &mut String, clusters: &[&str], plan: &v1::PortPlan) -> fmt::Result {
    out.write_str(
        "# Made from Ray's port table. A worker gets its cluster's Nodes group, the head that and the Head group.\n\
         # A security group refuses whatever no rule lets in, over IPv4 and IPv6; ranges are IPv4, and an IPv6\n\
         # range is one more rule with CidrIpv6. What instances send is left as AWS has it: open.\n\
         AWSTemplateFormatVersion: \"2010-09-09\"\n\
         Description: Who may reach Ray's ports and the CA, for clusters side by side\n\
         Parameters:\n  \
           VpcId:\n    Type: AWS::EC2::VPC::Id\n",
    )?;
    let cidr = |out: &mut String, name: &str, what: &str| {
        writeln!(
            out,
            "  {name}:\n    Type: String\n    Description: {what}\n    \
             AllowedPattern: '(\\d{{1,3}}\\.){{3}}\\d{{1,3}}/([89]|[12]\\d|3[0-2])'"
        )
    };
    cidr(out, "AdminRange", "Addresses of admins. A prefix shorter than 8 is refused")?;
    cidr(out, "ScraperRange", "Addresses of what collects metrics")?;
    for cluster in clusters {
        cidr(
            out,
            &format!("{}DriverRange", id(cluster)),
            &format!("Addresses of drivers of {cluster}"),
        )?;
    }
    writeln!(out, "Resources:")?;
    group(out, "Ca", "ca-server")?;
    for cluster in clusters {
        write_cluster(out, cluster, plan)?;
    }
    rules(out, "Ca", "Admin", &Source::Range("AdminRange".to_owned()), &ca_ports())?;
    write_outputs(out, clusters)
}

fn write_cluster(out: &mut String, cluster: &str, plan: &v1::PortPlan) -> fmt::Result {
    let id = id(cluster);
    let (nodes, head) = (format!("{id}Nodes"), format!("{id}Head"));
    group(out, &nodes, &format!("Ray nodes of {cluster}"))?;
    group(out, &head, &format!("Ray head of {cluster}"))?;
    for (target, on) in [(&nodes, On::EachNode), (&head, On::Head)] {
        for caller in Caller::ALL {
            let source = match caller {
                Caller::Member => Source::Group(nodes.clone()),
                Caller::Admin => Source::Range("AdminRange".to_owned()),
                Caller::Scraper => Source::Range("ScraperRange".to_owned()),
                Caller::Driver => Source::Range(format!("{id}DriverRange")),
            };
            let ports: Vec<_> = reachable(on, caller)
                .filter_map(|row| Some((row.name.to_owned(), Port::range(row.port, plan)?)))
                .map(|(name, range)| (name, *range.start(), *range.end()))
                .collect();
            rules(out, target, &word(caller_name(caller)), &source, &ports)?;
        }
    }
    rules(out, "Ca", &nodes, &Source::Group(nodes.clone()), &ca_ports())?;
    let drivers = Source::Range(format!("{id}DriverRange"));
    rules(out, "Ca", &format!("{id}Driver"), &drivers, &ca_ports())
}

enum Source {
    Group(String),
    Range(String),
}

fn group(out: &mut String, name: &str, what: &str) -> fmt::Result {
    writeln!(
        out,
        "  {name}:\n    Type: AWS::EC2::SecurityGroup\n    Properties:\n      GroupDescription: {what}\n      VpcId: !Ref VpcId"
    )
}

/// Rules stand apart from their group, or two groups that name each other could not be made.
fn rules(
    out: &mut String,
    target: &str,
    from: &str,
    source: &Source,
    ports: &[(String, u16, u16)],
) -> fmt::Result {
    for (name, first, last) in ports {
        let port = name.split('_').map(word).collect::<String>();
        write!(
            out,
            "  {target}{port}From{from}:\n    Type: AWS::EC2::SecurityGroupIngress\n    Properties:\n      \
             GroupId: !GetAtt {target}.GroupId\n      Description: {name} from {from}\n      \
             IpProtocol: tcp\n      FromPort: {first}\n      ToPort: {last}\n"
        )?;
        match source {
            Source::Group(group) => {
                writeln!(out, "      SourceSecurityGroupId: !GetAtt {group}.GroupId")?;
            }
            Source::Range(parameter) => writeln!(out, "      CidrIp: !Ref {parameter}")?,
        }
    }
    Ok(())
}

fn write_outputs(out: &mut String, clusters: &[&str]) -> fmt::Result {
    writeln!(out, "Outputs:\n  CaGroup:\n    Value: !GetAtt Ca.GroupId")?;
    for id in clusters.iter().map(|cluster| id(cluster)) {
        writeln!(out, "  {id}NodesGroup:\n    Value: !GetAtt {id}Nodes.GroupId")?;
        writeln!(out, "  {id}HeadGroup:\n    Value: !GetAtt {id}Head.GroupId")?;
    }
    Ok(())
}

fn ca_ports() -> Vec<(String, u16, u16)> {
    let names = ["enrollment", "nodes"];
    names.iter().zip(CA_PORTS).map(|(name, port)| ((*name).to_owned(), port, port)).collect()
}

/// `team-a` as CloudFormation names things: `TeamA`.
fn id(cluster: &str) -> String {
    cluster.split('-').map(word).collect()
}

fn word(text: &str) -> String {
    let mut letters = text.chars();
    letters
        .next()
        .map(|first| first.to_ascii_uppercase().to_string() + letters.as_str())
        .unwrap_or_default()
}
