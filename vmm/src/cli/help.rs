//! The help text, made of the table of options.

use super::options::{Group, OPTIONS, OptionSpec};

/// Widest line of the help, in characters.
const WIDTH: usize = 100;

const INTRODUCTION: &str = "\
Usage: cpr-vmm [OPTION...]

Runs a virtual machine on KVM that survives the replacement of this program. Options are QEMU's; one or two dashes
make no difference. In a value, ',,' stands for a comma.

";

const EXAMPLE: &str = "\
Example: a guest whose program is replaced while it runs

  cpr-vmm -monitor stdio -object memory-backend-memfd,id=ram0,size=1G -machine memory-backend=ram0
  (qemu) migrate_set_parameter mode cpr-exec
  (qemu) migrate_set_parameter cpr-exec-command cpr-vmm ... -incoming file:vm.state
  (qemu) migrate -d file:vm.state

(the command repeats the options of the first line, with -incoming added)
";

/// The whole help.
pub(super) fn text() -> String {
    let mut out = INTRODUCTION.to_owned();
    for (group, heading) in Group::ALL {
        out += &format!("{heading}:\n");
        for option in OPTIONS.iter().filter(|option| option.group == *group) {
            describe(option, &mut out);
        }
        out.push('\n');
    }
    out + EXAMPLE
}

fn describe(option: &OptionSpec, out: &mut String) {
    let names: Vec<_> = option.names.iter().map(|name| format!("-{name}")).collect();
    let metavar = option.metavar.map(|metavar| format!(" {metavar}")).unwrap_or_default();
    *out += &format!("  {}{metavar}\n", names.join(", "));
    wrap(option.help, 6, out);
    let width = option.properties.iter().map(|property| property.name.len() + property.metavar.len()).max();
    // A property that the value alone says is not worth a line of its own.
    if option.properties.len() > 1 {
        for property in option.properties {
            let name = format!("{}={}", property.name, property.metavar);
            *out += &format!("        {name:<width$}  {}\n", property.help, width = width.unwrap_or(0) + 1);
        }
    }
}

/// Appends text in lines of at most [`WIDTH`] characters, each indented.
fn wrap(text: &str, indent: usize, out: &mut String) {
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && indent + line.len() + 1 + word.len() > WIDTH {
            *out += &format!("{:indent$}{line}\n", "");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line += word;
    }
    *out += &format!("{:indent$}{line}\n", "");
}
