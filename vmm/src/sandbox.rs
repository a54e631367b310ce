//! `-sandbox`: which system calls this program does without, and when it gives them up.
//!
//! Calls are denied by classes, which are QEMU's (`system/qemu-seccomp.c`), and everything else is let through. A list of what
//! is allowed would be tighter, but a filter outlives the program: it would decide what every later program in this process
//! may do, and keep out the one that needs a harmless call more. What is denied here, no version will need.
//!
//! A program in a fresh process enters its sandbox before it makes anything. A target of an exec has that of the program
//! before it, and adds what is new at the last moment before it has the guest: until then the older program may be executed
//! again in its place, and must not find less than it left.

use anyhow::Context;
use cpr_core::{Blocker, Blockers, ModeSet, Properties};
use oslib::seccomp::{self, Filter, SeccompError};
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule,
};

use crate::cli::config::SandboxConfig;

/// What `-sandbox` can deny.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// What administrates the host, which no VMM does.
    On,
    Obsolete,
    ElevatePrivileges,
    Spawn,
    ResourceControl,
}

/// Numbers of filters, which mean the same in every release.
mod kind {
    pub(super) const ON: u32 = 1;
    pub(super) const X32: u32 = 2;
    pub(super) const OBSOLETE: u32 = 3;
    pub(super) const ELEVATE_PRIVILEGES: u32 = 4;
    pub(super) const SPAWN: u32 = 5;
    pub(super) const SPAWN_BY_CLONE3: u32 = 6;
    pub(super) const RESOURCE_CONTROL: u32 = 7;
}

/// A denied call, and in which cases: in each that one of the rules fits, or in all without rules.
type Denied = (libc::c_long, Vec<SeccompRule>);

/// Calls that change the host, its devices or its clocks, look into other processes, or load code into the kernel.
const HOST: &[libc::c_long] = &[
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_syslog,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_open_by_handle_at,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_afs_syscall,
    libc::SYS_getpmsg,
    libc::SYS_putpmsg,
    libc::SYS_security,
    libc::SYS_tuxcall,
    libc::SYS_vserver,
];

// What `libc` does not list any more, by asm/unistd_64.h.
const CREATE_MODULE: libc::c_long = 174;
const GET_KERNEL_SYMS: libc::c_long = 177;
const QUERY_MODULE: libc::c_long = 178;

/// Calls that nothing of today uses.
const OBSOLETE: &[libc::c_long] = &[
    libc::SYS__sysctl,
    CREATE_MODULE,
    GET_KERNEL_SYMS,
    QUERY_MODULE,
    libc::SYS_sysfs,
    libc::SYS_uselib,
    libc::SYS_ustat,
];

/// Calls that make a process somebody else's.
const IDENTITY: &[libc::c_long] = &[
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setsid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
];

/// Calls that start or become another program, or enter another namespace.
const SPAWN: &[libc::c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_setns,
    libc::SYS_unshare,
];

/// What clone(2) may not be asked for beside a thread.
const MORE_THAN_A_THREAD: [libc::c_int; 8] = [
    libc::CLONE_PTRACE,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// Calls that take CPU time from others.
const RESOURCES: &[libc::c_long] = &[
    libc::SYS_setpriority,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setaffinity,
    libc::SYS_ioprio_set,
];

/// One argument of a call, of which the lower 32 bits count.
fn argument(
    index: u8,
    comparison: SeccompCmpOp,
    value: libc::c_int,
) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, comparison, u64::from(value.cast_unsigned()))
}

fn always(calls: &[libc::c_long]) -> Vec<Denied> {
    calls.iter().map(|&call| (call, Vec::new())).collect()
}

fn identity() -> Result<Vec<Denied>, BackendError> {
    // A process may make itself the leader of a group of its own, as the program that is asked before an update is.
    let another = |index| SeccompRule::new(vec![argument(index, SeccompCmpOp::Ne, 0)?]);
    let mut calls = always(IDENTITY);
    calls.push((libc::SYS_setpgid, vec![another(0)?, another(1)?]));
    Ok(calls)
}

fn spawn() -> Result<Vec<Denied>, BackendError> {
    let flag = |flag: libc::c_int, value| {
        let mask = SeccompCmpOp::MaskedEq(u64::from(flag.cast_unsigned()));
        SeccompRule::new(vec![argument(0, mask, value)?])
    };
    let mut cases = vec![flag(libc::CLONE_THREAD, 0)?];
    for more in MORE_THAN_A_THREAD {
        cases.push(flag(more, more)?);
    }
    let mut calls = always(SPAWN);
    calls.push((libc::SYS_clone, cases));
    Ok(calls)
}

fn resources() -> Result<Vec<Denied>, BackendError> {
    // To step down is nobody's loss; the flag belongs to the call, not to the policy.
    let mut stays_up = Vec::new();
    for policy in [libc::SCHED_IDLE, libc::SCHED_BATCH] {
        stays_up.push(argument(1, SeccompCmpOp::Ne, policy)?);
        stays_up.push(argument(1, SeccompCmpOp::Ne, policy | libc::SCHED_RESET_ON_FORK)?);
    }
    let mut calls = always(RESOURCES);
    calls.push((libc::SYS_sched_setscheduler, vec![SeccompRule::new(stays_up)?]));
    Ok(calls)
}

impl Class {
    const ALL: [Class; 5] =
        [Class::On, Class::Obsolete, Class::ElevatePrivileges, Class::Spawn, Class::ResourceControl];

    /// As `-sandbox` spells it.
    fn name(self) -> &'static str {
        match self {
            Class::On => "on",
            Class::Obsolete => "obsolete=deny",
            Class::ElevatePrivileges => "elevateprivileges=deny",
            Class::Spawn => "spawn=deny",
            Class::ResourceControl => "resourcecontrol=deny",
        }
    }

    fn kinds(self) -> &'static [u32] {
        match self {
            Class::On => &[kind::ON, kind::X32],
            Class::Obsolete => &[kind::OBSOLETE],
            Class::ElevatePrivileges => &[kind::ELEVATE_PRIVILEGES],
            Class::Spawn => &[kind::SPAWN, kind::SPAWN_BY_CLONE3],
            Class::ResourceControl => &[kind::RESOURCE_CONTROL],
        }
    }

    /// One per kind.
    fn filters(self) -> Result<Vec<Filter>, SeccompError> {
        // Not the end of the process at once: a target that has no guest yet hears the signal, and gives the guest back.
        let end = SeccompAction::Trap;
        let error = |number: libc::c_int| SeccompAction::Errno(number.cast_unsigned());
        Ok(match self {
            Class::On => {
                vec![
                    Filter::denying(kind::ON, always(HOST), end.clone())?,
                    Filter::denying_x32(kind::X32, end),
                ]
            }
            Class::Obsolete => vec![Filter::denying(kind::OBSOLETE, always(OBSOLETE), end)?],
            Class::ElevatePrivileges => vec![Filter::denying(kind::ELEVATE_PRIVILEGES, identity()?, end)?],
            Class::Spawn => vec![
                Filter::denying(kind::SPAWN, spawn()?, end)?,
                // Its flags are in memory, which a filter does not see. The C library does with clone(2) then.
                Filter::denying(kind::SPAWN_BY_CLONE3, always(&[libc::SYS_clone3]), error(libc::ENOSYS))?,
            ],
            // What is refused is an optimisation.
            Class::ResourceControl => {
                vec![Filter::denying(kind::RESOURCE_CONTROL, resources()?, error(libc::EPERM))?]
            }
        })
    }

    fn is_denied_by(self, config: Option<SandboxConfig>) -> bool {
        config.is_some_and(|config| match self {
            Class::On => true,
            Class::Obsolete => config.obsolete,
            Class::ElevatePrivileges => config.elevate_privileges,
            Class::Spawn => config.spawn,
            Class::ResourceControl => config.resource_control,
        })
    }
}

/// The sandbox of this program.
#[derive(Debug)]
pub struct Sandbox {
    /// What the process does not have yet.
    missing: Vec<Filter>,
    _blocker: Option<Blocker>,
}

impl Sandbox {
    /// Makes ready what the command line asks for, and adds a blocker if no update can execute another program then. What is
    /// in force already, from a program before in this process, stays, and is told if nobody asked for it.
    ///
    /// # Errors
    /// This kernel has no filters of system calls.
    pub fn new(config: Option<SandboxConfig>, blockers: &Blockers) -> anyhow::Result<Sandbox> {
        check(config)?;
        let mut missing = Vec::new();
        for class in Class::ALL.into_iter().filter(|class| class.is_denied_by(config)) {
            missing.extend(class.filters()?.into_iter().filter(|filter| !filter.is_installed()));
        }
        let kept = kept(config);
        if !kept.is_empty() {
            tracing::warn!(
                "-sandbox {}: asked for by a program before in this process, and in force until its end",
                kept.join(",")
            );
        }
        let blocker = Class::Spawn.is_denied_by(config).then(|| {
            blockers.add(
                ModeSet::having(Properties::SAME_PID),
                "-sandbox spawn=deny: this program must not execute another one; cpr-transfer takes the guest to a process \
                 that you start",
            )
        });
        Ok(Sandbox { missing, _blocker: blocker })
    }

    /// Enters it, for good, with all threads. Again does nothing.
    ///
    /// # Errors
    /// The kernel refuses; part of the filters may be in force.
    pub fn enter(&mut self) -> anyhow::Result<()> {
        if self.missing.is_empty() {
            return Ok(());
        }
        seccomp::install(&self.missing).context("-sandbox")?;
        self.missing.clear();
        Ok(())
    }
}

/// What is in force without being asked for.
fn kept(config: Option<SandboxConfig>) -> Vec<&'static str> {
    let in_force = |class: &Class| class.kinds().iter().any(|&kind| seccomp::has_kind(kind));
    let kept = Class::ALL.into_iter().filter(|class| !class.is_denied_by(config));
    kept.filter(in_force).map(Class::name).collect()
}

/// Whether a sandbox like this can be entered here.
///
/// # Errors
/// It cannot: this kernel has no filters of system calls.
pub fn check(config: Option<SandboxConfig>) -> anyhow::Result<()> {
    if config.is_none() {
        return Ok(());
    }
    seccomp::check_kernel().context("-sandbox on: this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)")
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    use super::*;
    use crate::cli;

    const ARGUMENT: &str = "CPR_TEST_SANDBOX";
    const PROGRAM: &str = "CPR_TEST_SANDBOX_PROGRAM";
    /// signal(7).
    const SIGSYS: i32 = 31;

    /// Has a process of its own enter this sandbox and then execute, or start, a shell with this script.
    fn run(sandbox: &str, way: &str, script: &str) -> ExitStatus {
        let mut test = Command::new(std::env::current_exe().unwrap());
        test.args(["--exact", "sandbox::tests::child", "--ignored", "--nocapture", "--test-threads=1"]);
        test.env(ARGUMENT, sandbox).env(PROGRAM, format!("{way} {script}")).status().unwrap()
    }

    #[test]
    #[ignore = "a child of the other tests"]
    fn child() {
        use std::os::unix::process::CommandExt;
        let sandbox = std::env::var(ARGUMENT).unwrap();
        let cli::Invocation::Run(config) = cli::parse(["-sandbox", &sandbox].map(Into::into)).unwrap() else {
            panic!()
        };
        let mut sandbox = Sandbox::new(config.sandbox, &Blockers::default()).unwrap();
        sandbox.enter().unwrap();
        // A later program in this process, which asks for as much, for less or for nothing.
        let again = Sandbox::new(config.sandbox, &Blockers::default()).unwrap();
        assert!(again.missing.is_empty() && kept(config.sandbox).is_empty());
        let denied = Class::ALL.into_iter().filter(|class| class.is_denied_by(config.sandbox));
        assert_eq!(kept(None), denied.map(Class::name).collect::<Vec<_>>());
        // Threads are no spawn.
        std::thread::spawn(|| ()).join().unwrap();
        let program = std::env::var(PROGRAM).unwrap();
        let (way, script) = program.split_once(' ').unwrap();
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", script]);
        match way {
            "exec" => panic!("{}", shell.exec()),
            "spawn" => assert!(shell.status().unwrap().success()),
            other => panic!("{other}"),
        }
    }

    /// Runs a script under no sandbox, under one that is to deny it and under one that denies everything else: `denied`
    /// says how the second ends.
    #[track_caller]
    fn is_denied(script: &str, by: &str, unless: &str, denied: impl Fn(ExitStatus) -> bool) {
        for allows in ["off", unless] {
            let status = run(allows, "exec", script);
            assert!(status.success(), "{script} under {allows}: {status}");
        }
        let status = run(by, "exec", script);
        assert!(denied(status), "{script} under {by}: {status}");
    }

    fn by_signal(status: ExitStatus) -> bool {
        // Of the shell's child, or of the shell that became it.
        status.signal() == Some(SIGSYS) || status.code() == Some(128 + SIGSYS)
    }

    #[test]
    fn each_class_denies_its_calls_and_no_others() {
        // These come from util-linux and coreutils, and make the call first of all.
        is_denied("setsid true", "on,elevateprivileges=deny", "on,resourcecontrol=deny", by_signal);
        is_denied("setsid true", "on,elevateprivileges=children", "on,resourcecontrol=deny", by_signal);
        let refused = |status: ExitStatus| status.code() == Some(1);
        let priorities = ["taskset -p $(taskset -p $$ | sed 's/.* //') $$", "renice -n 19 -p $$"];
        for script in priorities {
            is_denied(script, "on,resourcecontrol=deny", "on,elevateprivileges=deny", refused);
        }
        // To step down, and a group of one's own, are let through.
        let all_but_spawn = "on,elevateprivileges=deny,resourcecontrol=deny";
        for script in ["chrt --idle 0 true", "chrt --batch 0 true", "true | cat"] {
            let status = run(all_but_spawn, "exec", script);
            assert!(status.success(), "{script}: {status}");
        }
        let status = run(all_but_spawn, "exec", "chrt --other 0 true");
        assert!(refused(status), "{status}");
    }

    #[test]
    fn the_host_is_out_of_reach() {
        // Reads the kernel's log by syslog(2), or is not allowed to.
        let script = "dmesg --syslog >/dev/null 2>&1";
        let status = run("off", "exec", script);
        assert!(status.code().is_some_and(|code| code < 2), "{status}");
        assert!(by_signal(run("on,obsolete=allow", "exec", script)));
    }

    #[test]
    fn nothing_is_executed_or_started_under_spawn_deny() {
        for way in ["exec", "spawn"] {
            let status = run("on", way, "true");
            assert!(status.success(), "{way}: {status}");
            let status = run("on,spawn=deny", way, "true");
            assert_eq!(status.signal(), Some(SIGSYS), "{way}: {status}");
        }
    }

    #[test]
    fn what_starts_a_program_is_in_the_way_of_updates_by_exec_alone() {
        use cpr_core::{ModeId, ModeInfo};
        let info = |id, properties| ModeInfo { id: ModeId::from_static(id), properties };
        let exec = info("cpr-exec", cpr_exec::PROPERTIES);
        let others =
            [info("cpr-transfer", cpr_transfer::PROPERTIES), info("cpr-reboot", Properties::empty())];
        let blockers = Blockers::default();
        let sandbox = |spawn| {
            let config = SandboxConfig::default();
            Sandbox::new(Some(SandboxConfig { spawn, ..config }), &blockers).unwrap()
        };
        let free = sandbox(false);
        assert_eq!(blockers.reasons(&exec), []);
        drop(free);
        let _sandbox = sandbox(true);
        assert!(blockers.reasons(&exec)[0].to_string().starts_with("-sandbox spawn=deny: "));
        assert!(others.iter().all(|mode| blockers.reasons(mode).is_empty()));
    }
}
