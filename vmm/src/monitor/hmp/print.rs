//! What QMP's values look like to people, in the shape of QEMU's `monitor/hmp-cmds.c` and
//! `migration/migration-hmp-cmds.c`.
//!
//! Values come from the backend; a member that is missing is left out rather than an error.

use std::fmt::Write as _;

use serde_json::Value;

use crate::monitor::QmpError;

pub(super) fn error(error: &QmpError) -> String {
    format!("Error: {}\n", error.desc)
}

pub(super) fn version() -> String {
    let (major, minor, micro) = crate::monitor::version();
    format!("{major}.{minor}.{micro} ({})\n", crate::monitor::PACKAGE)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("")
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or(0)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn on_off(state: bool) -> &'static str {
    if state { "on" } else { "off" }
}

pub(super) fn status(value: &Value) -> String {
    match (value["running"].as_bool(), text(value, "status")) {
        (Some(true), _) => "VM status: running\n".into(),
        (_, "paused") => "VM status: paused\n".into(),
        (_, status) => format!("VM status: paused ({status})\n"),
    }
}

pub(super) fn kvm(value: &Value) -> String {
    let state = match (value["present"].as_bool(), value["enabled"].as_bool()) {
        (Some(false), _) => "not compiled",
        (_, Some(true)) => "enabled",
        _ => "disabled",
    };
    format!("kvm support: {state}\n")
}

pub(super) fn name(value: &Value) -> String {
    value["name"].as_str().map(|name| format!("{name}\n")).unwrap_or_default()
}

pub(super) fn uuid(value: &Value) -> String {
    format!("{}\n", text(value, "UUID"))
}

pub(super) fn cpus(value: &Value) -> String {
    let line = |cpu: &Value| {
        let index = number(cpu, "cpu-index");
        let mark = if index == 0 { '*' } else { ' ' };
        format!("{mark} CPU #{index}: thread_id={}\n", number(cpu, "thread-id"))
    };
    list(value).map(line).collect()
}

pub(super) fn chardevs(value: &Value) -> String {
    list(value)
        .map(|device| format!("{}: filename={}\n", text(device, "label"), text(device, "filename")))
        .collect()
}

pub(super) fn disks(value: &Value) -> String {
    let mut out = String::new();
    for disk in list(value) {
        let inserted = &disk["inserted"];
        let read_only = if inserted["ro"].as_bool() == Some(true) { ", read-only" } else { "" };
        let (device, file, driver) = (text(disk, "device"), text(inserted, "file"), text(inserted, "drv"));
        let _ = writeln!(out, "{device}: {file} ({driver}{read_only})");
        if let Some(qdev) = disk["qdev"].as_str() {
            let _ = writeln!(out, "    Attached to:      {qdev}");
        }
        let cache = &inserted["cache"];
        let on = |key: &str| cache[key].as_bool() == Some(true);
        let writeback = if on("writeback") { "writeback" } else { "writethrough" };
        let ignored = if on("no-flush") { ", ignore flushes" } else { "" };
        let _ = writeln!(out, "    Cache mode:       {writeback}{ignored}");
    }
    out
}

pub(super) fn networks(value: &Value) -> String {
    let mut out = String::new();
    for net in list(value) {
        let (name, model, mac) = (text(net, "name"), text(net, "model"), text(net, "mac"));
        let _ = writeln!(out, "{name}: model={model},macaddr={mac},queues={}", number(net, "queues"));
        let _ = writeln!(out, " \\ {}: {}", text(net, "netdev"), text(net, "peer"));
    }
    out
}

pub(super) fn pci(value: &Value) -> String {
    let mut out = String::new();
    for device in list(value).flat_map(|bus| list(&bus["devices"])) {
        let (bus, slot, function) =
            (number(device, "bus"), number(device, "slot"), number(device, "function"));
        let _ = writeln!(out, "  Bus {bus:2}, device {slot:3}, function {function}:");
        let (vendor, id) = (number(&device["id"], "vendor"), number(&device["id"], "device"));
        let _ = writeln!(out, "    {}: PCI device {vendor:04x}:{id:04x}", text(device, "model"));
        let _ = writeln!(out, "      id \"{}\"", text(device, "qdev_id"));
    }
    out
}

pub(super) fn memdevs(value: &Value) -> String {
    let mut out = String::new();
    for device in list(value) {
        let _ = writeln!(out, "memory backend: {}", text(device, "id"));
        let _ = writeln!(out, "  size:  {}", number(device, "size"));
        for key in ["merge", "dump", "prealloc", "share", "reserve"] {
            if let Some(state) = device[key].as_bool() {
                let _ = writeln!(out, "  {key}: {state}");
            }
        }
        let _ = writeln!(out, "  policy: {}", text(device, "policy"));
        let nodes: Vec<_> = list(&device["host-nodes"]).map(Value::to_string).collect();
        let _ = writeln!(out, "  host nodes: {}", nodes.join(","));
    }
    out + "\n"
}

pub(super) fn capabilities(value: &Value) -> String {
    list(value)
        .map(|entry| {
            format!("{}: {}\n", text(entry, "capability"), on_off(entry["state"].as_bool().unwrap_or(false)))
        })
        .collect()
}

/// A word as one would type it: quoted only if it has to be.
fn quoted(word: &Value) -> String {
    let word = word.as_str().unwrap_or("");
    shlex::try_quote(word).map_or_else(|_| word.to_owned(), String::from)
}

pub(super) fn parameters(value: &Value) -> String {
    let mut members: Vec<_> = value.as_object().into_iter().flatten().collect();
    // The mode decides which of the others matter, so it goes first.
    members.sort_by_key(|(key, _)| *key != "mode");
    let mut out = String::new();
    for (key, value) in members {
        let value = match value {
            Value::Array(words) => words.iter().map(quoted).collect::<Vec<_>>().join(" "),
            Value::String(text) => text.clone(),
            Value::Bool(state) => on_off(*state).into(),
            other => other.to_string(),
        };
        let _ = writeln!(out, "{}", format!("{key}: {value}").trim_end());
    }
    out
}

pub(super) fn migrate(value: &Value) -> String {
    let mut out = String::new();
    if list(&value["blocked-reasons"]).next().is_some() {
        out += "Outgoing migration blocked:\n";
        for reason in list(&value["blocked-reasons"]) {
            let _ = writeln!(out, "  {}", reason.as_str().unwrap_or(""));
        }
    }
    let status = value["status"].as_str().unwrap_or("none");
    match value["error-desc"].as_str() {
        Some(why) if status == "failed" => out += &format!("Status: \t\t{status} ({why})\n"),
        _ => out += &format!("Status: \t\t{status}\n"),
    }
    if let Some(total) = value["total-time"].as_u64() {
        let _ = write!(out, "Time (ms): \t\ttotal={total}");
        for (key, label) in [("setup-time", "setup"), ("downtime", "down")] {
            if let Some(time) = value[key].as_u64() {
                let _ = write!(out, ", {label}={time}");
            }
        }
        out.push('\n');
    }
    let cpr = &value["cpr"];
    if cpr.is_object() {
        let _ = write!(out, "CPR: \t\t\tmode={}", text(cpr, "mode"));
        if let Some(generation) = cpr["generation"].as_u64() {
            let _ = write!(out, ", generation={generation}");
        }
        out.push('\n');
        if let Some(preflight) = cpr["preflight"].as_str() {
            let _ = writeln!(out, "Preflight: \t\t{preflight}");
        }
        if let Some(departure) = cpr["departure-us"].as_u64() {
            let _ = writeln!(out, "Departure (us): \t{departure}");
        }
        if let Some(blackout) = cpr["blackout-us"].as_u64() {
            let _ = writeln!(out, "Blackout (us): \t\t{blackout}");
        }
        for phase in list(&cpr["phases"]) {
            let name = format!("{}:", text(phase, "name"));
            let _ = writeln!(out, "  {name:<21} {:>8}", number(phase, "us"));
        }
    }
    out
}
