//! A Linux guest at its shell prompt, and the program under it, which comes and goes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{BOOT_LIMIT, COMMAND_LIMIT, Lab, Mode, Target};
use crate::{GuestShell, Vmm, VmmBuilder, current_test};

/// RAM of a guest.
pub(super) const RAM: u64 = 256 << 20;

/// The environment variable that names the step of a restore to leave out.
const SKIP_VARIABLE: &str = "CPR_TEST_SKIP_RESTORE";

/// What is booted.
#[derive(Clone)]
pub struct Boot {
    kernel: String,
    /// vCPUs.
    pub cpus: u8,
    /// The way that [`Linux::update`] takes.
    pub mode: Mode,
    builder: VmmBuilder,
}

impl Boot {
    /// The ELF kernel, over PVH.
    pub fn new(lab: &Lab, mode: Mode, cpus: u8) -> Boot {
        let builder = VmmBuilder::new().binary(&lab.vmm);
        Boot { kernel: lab.vmlinux.clone(), cpus, mode, builder }
    }

    /// Another kernel.
    #[must_use]
    pub fn kernel(mut self, kernel: &str) -> Boot {
        kernel.clone_into(&mut self.kernel);
        self
    }

    /// Further arguments of the VMM, the same in every update.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Boot {
        self.builder = self.builder.args(args);
        self
    }

    /// Another program, which also gets this environment.
    #[must_use]
    pub fn program(mut self, program: PathBuf, environment: &[(&str, &str)]) -> Boot {
        self.builder = self.builder.binary(program);
        for (name, value) in environment {
            self.builder = self.builder.env(name, *value);
        }
        self
    }

    /// Starts to boot.
    ///
    /// # Errors
    /// The VMM does not come up.
    pub fn start(self, lab: Lab) -> anyhow::Result<Linux> {
        let begin = Instant::now();
        // In a folder of its own, as each process of a transfer has one.
        let folder = tempfile::Builder::new().prefix("lab-").tempdir()?;
        let serial = folder.path().join("serial");
        let chardev = format!("unix:{},server=on,wait=off", serial.display());
        let boot = ["-kernel", &self.kernel, "-initrd", &lab.initrd, "-append", &lab.append];
        let builder = self.builder.memory(RAM).cpus(self.cpus).args(&["-serial", &chardev]).args(&boot);
        let vmm = builder.clone().start()?;
        let shell = GuestShell::connect(&serial, &lab.prompt)?;
        let longest_blackout = Duration::ZERO;
        let mode = self.mode;
        Ok(Linux {
            vmm,
            shell,
            lab,
            begin,
            mode,
            updates: 0,
            longest_blackout,
            builder,
            folder,
            earlier: Vec::new(),
        })
    }

    /// Boots up to the prompt.
    ///
    /// # Errors
    /// It does not come up; the error says what it printed.
    pub fn boot(self, lab: Lab) -> anyhow::Result<Linux> {
        let mut linux = self.start(lab)?;
        linux.at_prompt()?;
        Ok(linux)
    }
}

/// A guest at its shell prompt.
pub struct Linux {
    /// The program that runs it now.
    pub vmm: Vmm,
    /// Its shell.
    pub shell: GuestShell,
    /// Where it lives.
    pub lab: Lab,
    /// When it was started.
    pub begin: Instant,
    /// The way that [`update`](Linux::update) takes.
    pub mode: Mode,
    /// How many updates there were.
    pub updates: u32,
    /// The longest blackout so far, as the VMM tells it.
    pub longest_blackout: Duration,
    builder: VmmBuilder,
    folder: TempDir,
    /// What the programs before this one said on standard error.
    earlier: Vec<String>,
}

impl Linux {
    /// Waits for the end of a boot.
    ///
    /// # Errors
    /// It does not come.
    pub fn at_prompt(&mut self) -> anyhow::Result<()> {
        let printed = self.shell.ready(BOOT_LIMIT).with_context(|| format!("says: {}", self.vmm.stderr()))?;
        let up = printed.lines().find(|line| line.starts_with("guest: up after ")).unwrap_or("guest: up");
        self.step(up);
        // No notices of background jobs between a command's output and the prompt.
        self.run("set +m").map(drop)
    }

    /// Notes what was done; seen when the test fails, or with --nocapture.
    pub fn step(&self, what: &str) {
        println!("  {:7.1} s  {what}", self.begin.elapsed().as_secs_f64());
    }

    /// Runs a line of the shell's language.
    ///
    /// # Errors
    /// The prompt does not come back.
    pub fn run(&mut self, line: &str) -> anyhow::Result<String> {
        self.shell.run_within(line, COMMAND_LIMIT)
    }

    /// Runs a command whose output is a number.
    ///
    /// # Errors
    /// It is none.
    pub fn number(&mut self, line: &str) -> anyhow::Result<u64> {
        let output = self.run(line)?;
        output.trim().parse().with_context(|| format!("{line:?} printed {output:?}"))
    }

    /// Updates in the guest's mode.
    ///
    /// # Errors
    /// The update fails.
    pub fn update(&mut self, target: Target<'_>) -> anyhow::Result<()> {
        self.updates += 1;
        let (info, how) = match self.mode {
            Mode::Exec => self.update_by_exec(target)?,
            Mode::Transfer => (self.update_by_transfer(target)?, "cpr-transfer".to_owned()),
        };
        let blackout = info["cpr"]["blackout-us"].as_u64().map(Duration::from_micros);
        let blackout = blackout.with_context(|| format!("no blackout: {info}"))?;
        self.longest_blackout = self.longest_blackout.max(blackout);
        self.step(&format!("update {} through {how}: blackout {blackout:?}", self.updates));
        Ok(())
    }

    /// By turns through a memfd and a state file.
    fn update_by_exec(&mut self, target: Target<'_>) -> anyhow::Result<(Value, String)> {
        let uri = match self.updates % 2 {
            1 => "memfd:".to_owned(),
            _ => format!("file:{}", self.folder.path().join("state").display()),
        };
        let mut command = match target {
            Target::Good => self.vmm.exec_command(&uri),
            Target::Faulty(step) => {
                let skip = format!("{SKIP_VARIABLE}={}", step.unwrap_or_default());
                let mut command = vec!["/usr/bin/env".to_owned(), skip];
                command.extend(self.vmm.exec_command_of(&self.faulty()?, &uri));
                command
            }
        };
        // What a guest without a step of its restore does may be a reset: then it is over.
        if matches!(target, Target::Faulty(_)) {
            command.push("-no-reboot".into());
        }
        Ok((self.exec(&command, &uri)?, uri))
    }

    fn update_by_transfer(&mut self, target: Target<'_>) -> anyhow::Result<Value> {
        let mut builder = self.builder.clone().target("unix:main.sock");
        if let Target::Faulty(step) = target {
            let step = step.unwrap_or_default();
            builder = builder.binary(self.faulty()?).env(SKIP_VARIABLE, step).args(&["-no-reboot"]);
        }
        self.transfer(builder.start()?)
    }

    fn faulty(&self) -> anyhow::Result<PathBuf> {
        self.lab.faulty.clone().context("no CPR_LAB_FAULTY_VMM")
    }

    /// Updates by cpr-exec with this command.
    ///
    /// # Errors
    /// The update fails.
    pub fn exec(&mut self, command: &[String], uri: &str) -> anyhow::Result<Value> {
        self.vmm.set_exec(command)?;
        self.vmm.migrate(uri).with_context(|| format!("says: {}", self.vmm.stderr()))
    }

    /// A target of cpr-transfer for this guest.
    pub fn target(&self) -> VmmBuilder {
        self.builder.clone().target("unix:main.sock")
    }

    /// Updates by cpr-transfer to this target, and ends the source.
    ///
    /// # Errors
    /// The update fails.
    pub fn transfer(&mut self, mut target: Vmm) -> anyhow::Result<Value> {
        let says = |vmm: &Vmm, target: &Vmm| format!("says: {}; target: {}", vmm.stderr(), target.stderr());
        let info = self.vmm.transfer(&mut target);
        let info = info.with_context(|| says(&self.vmm, &target))?;
        let source = std::mem::replace(&mut self.vmm, target);
        self.earlier.push(source.stderr());
        source.quit()?;
        Ok(info)
    }

    /// Powers the guest off, and waits for the end of the process. The kernel does it by itself, once the shell has printed its
    /// prompt: from a program to its devices' shutdown the emulated CPUs may not get.
    ///
    /// # Errors
    /// It ends otherwise, or complained.
    pub fn power_off(mut self) -> anyhow::Result<()> {
        self.shell.type_line("echo o > /proc/sysrq-trigger")?;
        self.ends("guest-shutdown")
    }

    /// Waits for the end of the process, and checks that it is a good one for this reason. A reset instead is an error at
    /// once.
    ///
    /// # Errors
    /// It ends otherwise, or complained.
    pub fn ends(mut self, reason: &str) -> anyhow::Result<()> {
        self.ends_by(reason).with_context(|| {
            // What it prints, and what it may go on to do.
            let _ = self.shell.expect("what nobody prints", Duration::from_secs(10));
            format!("the VMM says {:?}; the guest {:?}", self.said(), self.shell.transcript())
        })?;
        let code = self.vmm.wait_exit()?;
        ensure!(code == Some(0), "exit code {code:?}: {}", self.said());
        ensure!(self.said().is_empty(), "it complained: {}", self.said());
        self.step(&format!("the end: {reason}"));
        Ok(())
    }

    fn ends_by(&mut self, reason: &str) -> anyhow::Result<()> {
        // Those of the past.
        self.vmm.qmp().take_events();
        let event = self.vmm.qmp().event_of(&["SHUTDOWN", "RESET"])?;
        ensure!(event["data"] == json!({ "guest": true, "reason": reason }), "{event}");
        Ok(())
    }

    /// Everything that the programs of this guest said on standard error.
    pub fn said(&self) -> String {
        self.earlier.concat() + &self.vmm.stderr()
    }
}

impl Drop for Linux {
    fn drop(&mut self) {
        // For whoever looks into a failure. What the VMM said may be all of it: the guest's reset is no error of a step.
        let name = current_test().replace("::", "-");
        let said = self.said();
        if !said.is_empty() {
            self.step(&format!("the VMM said {said:?}"));
        }
        let _ = std::fs::write(self.lab.out().join(format!("{name}.serial")), self.shell.transcript());
        let _ = std::fs::write(self.lab.out().join(format!("{name}.stderr")), said);
    }
}
