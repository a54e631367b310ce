#![allow(unsafe_code, reason = "prctl and seccomp are asked directly")]
//! Filters of system calls that a process gets once, however often it executes another program.
//!
//! A filter stays for good: new threads and children have it, and execve(2) keeps it, so a program that is followed by
//! another one in its process must not add the same filter again. Nobody without privileges is told by the kernel what a
//! filter does. So the filters say it themselves: beside them goes one that answers a question of prctl(2), one
//! that the kernel would refuse, with an error number of its own. The kernel, not a note from the program before, is the
//! witness.
//!
//! What is denied is for the caller to say, by [`seccompiler`], which makes a program of it. See seccomp(2).

use std::io;

use nix::errno::Errno;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};
use thiserror::Error;

/// An option that prctl(2) does not have: "CPRS". Its arguments are a filter's kind and, for one of just this content, its
/// fingerprint, or 0 for one of any content.
const QUESTION: libc::c_int = 0x4350_5253;
/// The answer of a filter that is there. The kernel's own is `EINVAL`.
const PRESENT: libc::c_int = libc::EEXIST;

/// System call numbers from here on belong to another table than that of x86-64 (`__X32_SYSCALL_BIT` of `asm/unistd.h`).
const X32: u32 = 0x4000_0000;
/// The number of a system call that a tracer has cancelled.
const CANCELLED: u32 = u32::MAX;

/// Why a filter could not be made or installed.
#[derive(Debug, Error)]
#[error("filter of system calls")]
pub struct SeccompError(#[from] seccompiler::Error);

impl From<seccompiler::BackendError> for SeccompError {
    fn from(error: seccompiler::BackendError) -> SeccompError {
        seccompiler::Error::from(error).into()
    }
}

/// System calls that are denied.
#[derive(Debug, Clone)]
pub struct Filter {
    kind: u32,
    program: BpfProgram,
}

impl Filter {
    /// A filter that answers `calls` by `denial`, in each case in which one of its rules matches, or always without rules, and
    /// calls of the table for 32-bit programs by the end of the process. It lets everything else pass.
    ///
    /// `kind` is the same for all versions of this filter, and is no other filter's.
    ///
    /// # Errors
    /// There are too many calls.
    pub fn denying(
        kind: u32,
        calls: impl IntoIterator<Item = (libc::c_long, Vec<SeccompRule>)>,
        denial: SeccompAction,
    ) -> Result<Filter, SeccompError> {
        let calls = calls.into_iter().collect();
        let filter = SeccompFilter::new(calls, SeccompAction::Allow, denial, TargetArch::x86_64)?;
        Ok(Filter { kind, program: filter.try_into()? })
    }

    /// A filter that answers all calls of the x32 table by `denial`: each is another way to a call that has an ordinary number.
    pub fn denying_x32(kind: u32, denial: SeccompAction) -> Filter {
        let statement = |code: u32, k| sock_filter { code: code as u16, jt: 0, jf: 0, k };
        let jump = |code: u32, k, jt, jf| sock_filter { code: code as u16, jt, jf, k };
        let program = vec![
            // The number is the first word of what the kernel shows.
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
            jump(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, CANCELLED, 2, 0),
            jump(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, X32, 0, 1),
            statement(libc::BPF_RET | libc::BPF_K, denial.into()),
            statement(libc::BPF_RET | libc::BPF_K, SeccompAction::Allow.into()),
        ];
        Filter { kind, program }
    }

    /// Whether this process has just this filter.
    pub fn is_installed(&self) -> bool {
        ask(self.kind, self.fingerprint())
    }

    /// FNV-1a of the program.
    fn fingerprint(&self) -> u64 {
        let bytes = self.program.iter().flat_map(|&sock_filter { code, jt, jf, k }| {
            let ([a, b], [c, d, e, f]) = (code.to_le_bytes(), k.to_le_bytes());
            [a, b, jt, jf, c, d, e, f]
        });
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    /// The calls that ask for this filter.
    fn questions(&self) -> Result<[SeccompRule; 2], SeccompError> {
        let is = |argument, length, value| SeccompCondition::new(argument, length, SeccompCmpOp::Eq, value);
        let question = |fingerprint| {
            SeccompRule::new(vec![
                is(0, SeccompCmpArgLen::Dword, QUESTION as u64)?,
                is(1, SeccompCmpArgLen::Qword, self.kind.into())?,
                is(2, SeccompCmpArgLen::Qword, fingerprint)?,
            ])
        };
        Ok([question(self.fingerprint())?, question(0)?])
    }
}

/// Whether this process has a filter of this kind, whatever its content.
pub fn has_kind(kind: u32) -> bool {
    ask(kind, 0)
}

fn ask(kind: u32, fingerprint: u64) -> bool {
    // SAFETY: takes no pointer; the kernel knows no such option, and so does nothing.
    let answer = unsafe { libc::prctl(QUESTION, u64::from(kind), fingerprint, 0, 0) };
    answer == -1 && Errno::last_raw() == PRESENT
}

/// Whether this kernel has filters of system calls.
///
/// # Errors
/// Those of seccomp(2): it has none, or not those that deny by a signal.
pub fn check_kernel() -> io::Result<()> {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the kernel reads one word, which outlives the call.
    let answer =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    Errno::result(answer)?;
    Ok(())
}

/// Installs `filters` in all threads of this process, for good. What it executes from here on gets no privileges from its
/// file (`PR_SET_NO_NEW_PRIVS`).
///
/// # Errors
/// Those of seccomp(2), with some of the filters installed; or a thread has filters that the calling one has not.
pub fn install(filters: &[Filter]) -> Result<(), SeccompError> {
    let mut questions = Vec::new();
    for filter in filters {
        seccompiler::apply_filter_all_threads(&filter.program)?;
        questions.extend(filter.questions()?);
    }
    if questions.is_empty() {
        return Ok(());
    }
    // The last, so that who finds it finds the filters.
    let answers = [(libc::SYS_prctl, questions)].into_iter().collect();
    let answers = SeccompFilter::new(
        answers,
        SeccompAction::Allow,
        SeccompAction::Errno(PRESENT.cast_unsigned()),
        TargetArch::x86_64,
    )?;
    Ok(seccompiler::apply_filter_all_threads(&BpfProgram::try_from(answers)?)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    use super::*;

    const CASE: &str = "OSLIB_SECCOMP_CASE";
    const KINDS: [u32; 3] = [1, 2, 3];

    /// Runs [`child`] with this case: a filter is for good.
    fn run(case: &str) -> ExitStatus {
        let mut test = Command::new(std::env::current_exe().unwrap());
        test.args(["--exact", "seccomp::tests::child", "--ignored", "--nocapture", "--test-threads=1"]);
        test.env(CASE, case).status().unwrap()
    }

    fn filters() -> [Filter; 3] {
        let refused = SeccompAction::Errno(libc::EDOM.cast_unsigned());
        let to_zero = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, 0).unwrap();
        [
            Filter::denying(1, [(libc::SYS_sethostname, vec![])], SeccompAction::Trap).unwrap(),
            Filter::denying(
                2,
                [(libc::SYS_getpgid, vec![SeccompRule::new(vec![to_zero]).unwrap()])],
                refused,
            )
            .unwrap(),
            Filter::denying_x32(3, SeccompAction::Trap),
        ]
    }

    fn number_of_filters() -> u32 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let count = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"));
        count.unwrap().trim().parse().unwrap()
    }

    fn call(number: libc::c_long, argument: u64) -> io::Result<libc::c_long> {
        // SAFETY: takes no pointer that the kernel would use: the calls below have numbers, or fail before.
        Ok(Errno::result(unsafe { libc::syscall(number, argument, 0) })?)
    }

    #[test]
    #[ignore = "a child of the other tests"]
    fn child() {
        let case = std::env::var(CASE).unwrap();
        let filters = filters();
        assert!(filters.iter().all(|filter| !filter.is_installed()) && !KINDS.into_iter().any(has_kind));
        let before = number_of_filters();
        // One that is there before them.
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            let _ = stopped.recv();
            number_of_filters()
        });
        install(&filters).unwrap();
        assert_eq!(number_of_filters(), before + 4);
        drop(stop);
        assert_eq!(other.join().unwrap(), before + 4);
        assert!(filters.iter().all(Filter::is_installed) && KINDS.into_iter().all(has_kind));
        match case.as_str() {
            "marks" => {
                let changed = Filter::denying(1, [(libc::SYS_swapoff, vec![])], SeccompAction::Trap).unwrap();
                assert!(!changed.is_installed() && has_kind(1) && !has_kind(4));
                let of_another_kind = Filter { kind: 4, ..filters[0].clone() };
                assert!(!of_another_kind.is_installed());
                install(&[]).unwrap();
                assert_eq!(number_of_filters(), before + 4);
            }
            "refused" => {
                assert_eq!(call(libc::SYS_getpgid, 0).unwrap_err().raw_os_error(), Some(libc::EDOM));
                assert!(call(libc::SYS_getpgid, std::process::id().into()).is_ok());
            }
            "trap" => drop(call(libc::SYS_sethostname, 0)),
            "x32" => drop(call(libc::SYS_getpid | libc::c_long::from(X32.cast_signed()), 0)),
            "none" => assert_eq!(call(-1, 0).unwrap_err().raw_os_error(), Some(libc::ENOSYS)),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_filter_is_known_by_its_kind_and_by_its_content() {
        assert!(run("marks").success());
    }

    #[test]
    fn calls_are_denied_as_the_filter_says() {
        assert!(run("refused").success());
        assert_eq!(run("trap").signal(), Some(libc::SIGSYS));
        assert_eq!(run("x32").signal(), Some(libc::SIGSYS));
        assert!(run("none").success());
    }

    #[test]
    fn this_kernel_has_filters() {
        check_kernel().unwrap();
    }
}
