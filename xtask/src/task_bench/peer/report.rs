//! The result as Markdown: tables that read well on a terminal, too, and the words without which they mean nothing.

use std::fmt::Write;
use std::time::Duration;

use super::figures::{Figure, Figures, Verdict};
use super::host::Host;
use super::plan::{MODES, Mode, Who};

/// What a report tells beside the figures.
pub(super) struct Context {
    pub(super) host: Host,
    /// Name and version.
    pub(super) versions: Vec<(&'static str, String)>,
    /// What was left out, and why.
    pub(super) skipped: Vec<(String, String)>,
}

/// The tables, without the words around them.
pub(super) fn tables(figures: &Figures, context: &Context) -> String {
    let mut text = doubts(figures, context);
    for mode in MODES {
        let rows = blackout_rows(figures, mode);
        if !rows.is_empty() {
            let head = [
                "RAM populated",
                "vCPUs",
                "VMM",
                "N",
                "median",
                "p99",
                "worst",
                "ambient",
                "brownout (N)",
                "QEMU's median is",
            ];
            let _ = writeln!(text, "## {}: the guest's pause, ms\n\n{}", mode.name(), table(&head, &rows));
        }
    }
    for mode in MODES {
        if let Some(sentence) = figures.largest_phase(mode) {
            let (head, rows) = phase_rows(figures, mode);
            let head: Vec<&str> = head.iter().map(String::as_str).collect();
            let _ = writeln!(
                text,
                "## {}: phases of the pause of cpr-vmm, median, ms\n\n{}\n{sentence}\n",
                mode.name(),
                table(&head, &rows)
            );
        }
    }
    let busy = if figures.doubtful(context.host.cpus).is_empty() { "" } else { ", on a busy host" };
    let limits: Vec<Vec<String>> = figures
        .limits()
        .into_iter()
        .map(|limit| {
            let measured = limit.verdict != Verdict::NotMeasured;
            let verdict = format!("{}{}", limit.verdict.name(), if measured { busy } else { "" });
            vec![limit.what, limit.wanted, limit.measured, verdict]
        })
        .collect();
    let _ = writeln!(text, "## Limits\n\n{}", table(&["figure", "limit", "measured", ""], &limits));
    if !context.skipped.is_empty() {
        let rows: Vec<_> =
            context.skipped.iter().map(|(what, why)| vec![what.clone(), why.clone()]).collect();
        let _ = writeln!(text, "## Left out\n\n{}", table(&["what", "why"], &rows));
    }
    text
}

/// The whole page; `plot` is the picture beside it.
pub(super) fn page(figures: &Figures, context: &Context, plot: &str) -> String {
    let Host { cpu, cpus, memory_gib, kernel, kvm } = &context.host;
    let mut machine = vec![
        vec!["CPU".to_owned(), format!("{cpu}, {cpus} for this run")],
        vec!["memory".to_owned(), format!("{memory_gib} GiB")],
        vec!["kernel".to_owned(), format!("{kernel}, {kvm}")],
    ];
    machine.extend(context.versions.iter().map(|(name, version)| vec![(*name).to_owned(), version.clone()]));
    format!(
        "# Live update: cpr-vmm and QEMU\n\n\
         How long a guest stands still while the program under it is replaced. `cargo xtask bench --peer qemu` writes \
         this page.\n\n\
         ![Medians, with a line from the best to the worst]({plot})\n\n\
         {}\n{}{}",
        table(&["", ""], &machine),
        tables(figures, context),
        WORDS
    )
}

const WORDS: &str = "\
## How it is measured

- Both VMMs boot the same file: the payload of this workspace, which reads the TSC in a loop on every vCPU and keeps
  the largest gap. RAM is a shared memfd. QEMU runs `-M microvm` with `aux-ram-share=on`, no default devices and
  qboot. The machine of `cpr-vmm` is its only one.
- Before each update the guest writes to all of its populated RAM. The gap is read from guest RAM 3 ms after
  every vCPU beats again. A vCPU that waits for a CPU of the host has a gap as well: where there are more vCPUs than
  CPUs, look at *ambient*.
- *ambient* is the median of the same reading in a window as long, without an update.
- *brownout* is measured in updates of their own: the guest walks its RAM, a page with every beat, and this is the time
  from its first beat to the first of two 5 ms in a row at 95 % of its former speed. Its median, with the longer of
  the middle two; `>` means that it was not over within the limit.
- cpr-exec: `cpr-vmm` carries its state in a memfd, QEMU in a file that stays in the page cache; its new program has
  `-incoming file:`, so no monitor client is waited for. cpr-transfer: the target listens before the window begins.
- A round visits every cell with every VMM in turn, in another order each round; each visit boots the VMM anew.
  At the end of a visit the guest checks every word of its RAM. p99 is shown from 200 updates on.
- *QEMU* is Debian's `qemu-system-x86_64`. *QEMU, small build* is Debian's `qemu-system-x86_64-microvm`, which has
  less to load at its start. Both run by the dynamic loader of a Debian root of their own. The limits are held against
  the former.
";

/// Says where the host was too busy; nothing if it was not.
fn doubts(figures: &Figures, context: &Context) -> String {
    let cells: Vec<String> = figures
        .doubtful(context.host.cpus)
        .iter()
        .map(|figure| format!("{} with {} at {}", figure.mode.name(), figure.who.name(), figure.cell))
        .collect();
    if cells.is_empty() {
        return String::new();
    }
    format!(
        "**The host was busy: measure again on a quiet one.** Without an update, too, the guest stood still for more \
         than half of the figure: {}.\n\n",
        cells.join("; ")
    )
}

fn blackout_rows(figures: &Figures, mode: Mode) -> Vec<Vec<String>> {
    let of_mode = figures.iter().filter(|figure| figure.mode == mode);
    of_mode
        .map(|figure| {
            let ratio = figures.ratio(figure.cell.name, mode).filter(|_| figure.who == Who::CprVmm);
            vec![
                figure.cell.ram(),
                figure.cell.vcpus.to_string(),
                figure.who.name().to_owned(),
                figure.count().to_string(),
                ms(figure.median()),
                figure.p99().map_or_else(|| "-".to_owned(), ms),
                ms(figure.worst()),
                ms(figure.ambient),
                brownout(figure),
                ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.1} times")),
            ]
        })
        .collect()
}

fn brownout(figure: &Figure) -> String {
    match (figure.walks(), figure.brownout()) {
        (0, _) => "-".to_owned(),
        (count, Some(time)) => format!("{} ({count})", ms(time)),
        (count, None) => format!("> {} ({count})", ms(super::measure::walk_limit(figure.cell))),
    }
}

/// The head and the rows of the second table; a phase that a cell has not is a dash.
fn phase_rows(figures: &Figures, mode: Mode) -> (Vec<String>, Vec<Vec<String>>) {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in figures.phased(mode).flat_map(|figure| &figure.phases) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let head = ["RAM populated", "vCPUs"].into_iter().chain(names.iter().copied()).chain(["sum"]);
    let rows = figures.phased(mode).map(|figure| {
        let time = |name: &&str| figure.phases.iter().find(|phase| phase.0 == *name).map(|phase| phase.1);
        let times = names.iter().map(|name| time(name).map_or_else(|| "-".to_owned(), ms));
        let sum = ms(figure.phases.iter().map(|phase| phase.1).sum());
        [figure.cell.ram(), figure.cell.vcpus.to_string()].into_iter().chain(times).chain([sum]).collect()
    });
    (head.map(str::to_owned).collect(), rows.collect())
}

/// Milliseconds with three digits or so.
fn ms(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    match ms {
        ..100.0 => format!("{ms:.2}"),
        _ => format!("{ms:.0}"),
    }
}

/// A Markdown table with its columns in line: words to the left, numbers to the right.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let is_number = |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit() || c == '-' || c == '>');
    let columns: Vec<(usize, bool)> = (0..head.len())
        .map(|column| {
            let cells = || rows.iter().map(|row| &row[column]);
            let width = cells().map(|cell| cell.chars().count()).max().unwrap_or(0);
            (
                width.max(head[column].chars().count()).max(3),
                !head[column].is_empty() && cells().all(is_number),
            )
        })
        .collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded = cells.zip(&columns).map(|(cell, &(width, right))| {
            if right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        format!("| {} |\n", padded.collect::<Vec<_>>().join(" | "))
    };
    let rule = columns.iter().map(|&(width, right)| {
        let dashes = "-".repeat(width - usize::from(right));
        if right { format!("{dashes}:") } else { dashes }
    });
    let mut text = line(&mut head.iter().copied());
    let _ = writeln!(text, "| {} |", rule.collect::<Vec<_>>().join(" | "));
    for row in rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::{figure, figures};
    use super::*;

    fn context() -> Context {
        Context {
            host: Host {
                cpu: "Some CPU".into(),
                cpus: 2,
                memory_gib: 24,
                kernel: "6.18.5".into(),
                kvm: "kvm_intel".into(),
            },
            versions: vec![("QEMU", "11.1.3".into())],
            skipped: vec![("cpr-vmm, cpr-transfer".into(), "not in this build".into())],
        }
    }

    #[test]
    fn tables_are_in_line() {
        let rows = [["a", "1.00"], ["bcde", "-"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(
            table(&["what", "ms"], &rows),
            "| what |   ms |\n| ---- | ---: |\n| a    | 1.00 |\n| bcde |    - |\n"
        );
    }

    #[test]
    fn a_page_has_all_that_was_measured() {
        let all = figures(vec![
            figure("1G", Who::CprVmm, Mode::CprExec, [3000, 5000, 4000]),
            figure("1G", Who::Qemu, Mode::CprExec, [100_000]),
        ]);
        let page = page(&all, &context(), "qemu.svg");
        // Widths are another test's affair.
        let squeezed = page.split_whitespace().collect::<Vec<_>>().join(" ");
        for line in [
            "| CPU | Some CPU, 2 for this run |",
            "| 1 GiB | 1 | cpr-vmm | 3 | 4.00 | - | 5.00 | 0.08 | > 8000 (2) | 25.0 times |",
            "| 1 GiB | 1 | QEMU | 1 | 100 | - | 100 | 0.08 | > 8000 (2) | - |",
            "| 1 GiB | 1 | 0.25 | 0.90 | 1.15 |",
            "| at least 20 | 25.00 | reached |",
            "| cpr-vmm, cpr-transfer | not in this build |",
        ] {
            assert!(squeezed.contains(line), "{line}\n{page}");
        }
        assert!(!page.contains("busy"), "{page}");
        assert!(!page.contains("cpr-transfer: the guest's pause"), "{page}");
    }
}
