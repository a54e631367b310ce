//! `docs/reference.md` against the real program: nothing is missing there, and nothing is invented.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::ensure;
use serde_json::json;
use testkit::{VmmBuilder, need_kvm};

const REFERENCE: &str = include_str!("../../docs/reference.md");

type Names = BTreeSet<String>;

/// The lines of the chapter (`## `) of that title.
fn chapter(title: &str) -> impl Iterator<Item = &'static str> {
    let heading = format!("## {title}");
    REFERENCE
        .lines()
        .skip_while(move |line| *line != heading)
        .skip(1)
        .take_while(|line| !line.starts_with("## "))
}

/// What stands in backticks.
fn code(text: &str) -> impl Iterator<Item = String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned)
}

/// The code in headings such as "#### `-machine` `-M`".
fn headings(title: &str) -> Names {
    chapter(title).filter_map(|line| line.strip_prefix("#### ")).flat_map(code).collect()
}

/// The code in the first column of the table that begins with this cell.
fn column(lines: impl Iterator<Item = &'static str>, first: &str) -> Names {
    let head = format!("| {first} |");
    let rows = lines.skip_while(move |line| !line.starts_with(&head)).skip(2);
    rows.take_while(|line| line.starts_with('|'))
        .filter_map(|row| row.split('|').nth(1))
        .flat_map(code)
        .collect()
}

/// The properties in the table below this heading.
fn properties(heading: &str) -> Names {
    let section = chapter("Command line")
        .skip_while(|line| !line.starts_with(heading))
        .skip(1)
        .take_while(|line| !line.starts_with('#'));
    column(section, "property")
}

fn same(what: &str, documented: &Names, real: &Names) -> anyhow::Result<()> {
    let missing: Vec<_> = real.difference(documented).collect();
    let invented: Vec<_> = documented.difference(real).collect();
    ensure!(
        missing.is_empty() && invented.is_empty(),
        "docs/reference.md, {what}: missing {missing:?}, not in the program {invented:?}"
    );
    Ok(())
}

#[test]
fn every_option_and_property_is_documented() -> anyhow::Result<()> {
    let help = Command::new(env!("CARGO_BIN_EXE_cpr-vmm")).arg("-help").output()?;
    let help = String::from_utf8(help.stdout)?;
    let (mut options, mut option) = (Names::new(), String::new());
    let mut listed: Vec<(String, Names)> = Vec::new();
    // Options are indented by two; help texts by six, and properties, as `name=VALUE`, by eight.
    for line in help.split("\nExample").next().unwrap_or_default().lines() {
        if let Some(names) = line.strip_prefix("  -") {
            let words = format!("-{names}");
            let names: Vec<_> = words
                .split(", ")
                .map_while(|word| word.split(' ').next().filter(|name| name.starts_with('-')))
                .collect();
            option = names[0].trim_start_matches('-').to_owned();
            options.extend(names.into_iter().map(str::to_owned));
            listed.push((option.clone(), Names::new()));
        } else if let (Some(property), Some((last, names))) =
            (line.strip_prefix("        "), listed.last_mut())
        {
            ensure!(*last == option, "help lists properties below their option");
            names.extend(property.split_once('=').map(|(name, _)| name.to_owned()));
        }
    }
    ensure!(options.len() > 20, "the help was not understood: {options:?}");
    same("options", &headings("Command line"), &options)?;
    for (option, real) in listed {
        let documented = properties(&format!("#### `-{option}`"));
        same(&format!("properties of -{option}"), &documented, &real)?;
    }
    Ok(())
}

#[test]
fn every_device_model_and_its_properties_are_documented() -> anyhow::Result<()> {
    let device = |what: &str| -> anyhow::Result<String> {
        let help = Command::new(env!("CARGO_BIN_EXE_cpr-vmm")).args(["-device", what]).output()?;
        Ok(String::from_utf8(help.stdout)?)
    };
    // Lines such as `name "virtio-blk-pci", alias virtio-blk   a disk`.
    let models: Names = device("help")?.split('"').skip(1).step_by(2).map(str::to_owned).collect();
    let headings = chapter("Command line").filter_map(|line| line.strip_prefix("##### "));
    same("device models", &headings.map(str::to_owned).collect(), &models)?;
    for model in models {
        // Lines such as `  drive=<ID>    - what it is`.
        let help = device(&format!("{model},help"))?;
        let names =
            help.lines().filter_map(|line| Some(line.strip_prefix("  ")?.split_once('=')?.0.to_owned()));
        same(&format!("properties of {model}"), &properties(&format!("##### {model}")), &names.collect())?;
    }
    Ok(())
}

#[test]
fn every_monitor_command_is_documented() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().args(&["-S"]).start()?;

    let commands = vmm.qmp().execute("query-commands", json!({}))?;
    let names = commands.as_array().into_iter().flatten();
    let names: Names = names.filter_map(|command| command["name"].as_str().map(str::to_owned)).collect();
    ensure!(names.len() > 20, "query-commands answered {commands}");
    same("QMP commands", &headings("QMP"), &names)?;

    let mut hmp = |line: &str| -> anyhow::Result<String> {
        let text = vmm.qmp().execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    };
    // Lines such as "quit|q  -- what it does" and "info status -- what it shows".
    let help = hmp("help")?;
    let first_words = help.lines().filter_map(|line| line.split(' ').next());
    let names: Names = first_words.flat_map(|word| word.split('|')).map(str::to_owned).collect();
    same("HMP commands", &column(chapter("HMP"), "command"), &names)?;

    let info = hmp("info")?;
    let topics: Names = info
        .lines()
        .filter_map(|line| line.strip_prefix("info ")?.split(' ').next())
        .map(str::to_owned)
        .collect();
    same("topics of info", &column(chapter("HMP"), "`info` topic"), &topics)?;

    let parameters = vmm.qmp().execute("query-migrate-parameters", json!({}))?;
    let names: Names = parameters.as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect();
    same("migration parameters", &column(chapter("QMP"), "argument"), &names)?;
    vmm.quit()
}
