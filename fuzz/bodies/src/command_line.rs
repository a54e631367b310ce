//! The command line: arguments between NULs.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use vmm::chardev;
use vmm::cli::config::Config;
use vmm::cli::{self, Invocation, MAX_CPUS};

/// A command line. What is understood holds what the types promise.
pub fn command_line(data: &[u8]) -> bool {
    let args = data.split(|&byte| byte == 0).map(|arg| OsString::from_vec(arg.to_vec()));
    match cli::parse(args) {
        Ok(Invocation::Run(config)) => {
            check(&config);
            true
        }
        Ok(Invocation::Help(text) | Invocation::Version(text)) => !text.is_empty(),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

fn check(config: &Config) {
    assert!((1..=MAX_CPUS).contains(&config.cpus));
    assert!(config.memory.size_bytes > 0 && config.memory.size_bytes.is_multiple_of(4096));
    let ids: BTreeSet<_> = config.chardevs.iter().map(|chardev| chardev.id.as_str()).collect();
    assert_eq!(ids.len(), config.chardevs.len(), "ids are unique");
    let users = config.monitors.iter().map(|monitor| &monitor.chardev).chain(&config.serial);
    for user in users {
        assert!(ids.contains(user.as_str()), "{user}");
    }
    for chardev in &config.chardevs {
        chardev::identity(chardev).expect("a path can be made absolute");
    }
}

/// The configuration that this command line asks for.
pub(crate) fn config(args: &[&str]) -> Config {
    match cli::parse(args.iter().map(OsString::from)) {
        Ok(Invocation::Run(config)) => *config,
        other => panic!("{args:?}: {other:?}"),
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        "-machine microvm,memory-backend=ram0 -object memory-backend-memfd,id=ram0,size=64M,share=on -m 64M",
        "-object memory-backend-file,id=r,size=0x4000000,mem-path=/x,,y,share -machine memory-backend=r -m 64",
        "-object {\"qom-type\":\"memory-backend-ram\",\"id\":\"r\",\"size\":67108864} -M microvm,memory-backend=r -m 64",
        "-smp 4,sockets=2,cores=2,threads=1,maxcpus=4 -accel kvm -cpu host -name n -uuid 12345678-1234-5678-1234-567812345678",
        "-chardev socket,id=c0,path=/s,server=on,wait=off,mux=on -serial chardev:c0 -mon chardev=c0,mode=control -nodefaults",
        "-chardev stdio,id=c,mux=on,signal=off -mon c -qmp unix:/q,server,nowait -monitor none -serial null",
        "-nographic -serial mon:stdio -qmp unix:/q,server=on,wait=off -kernel /k -initrd /i -append console=ttyS0",
        "-incoming file:/x,offset=4K -S -no-reboot -pidfile /p -D /log -trace enable=*,file=/t",
        "-incoming channel-type=main,addr.transport=file,addr.filename=/x,addr.offset=0x1000",
        "-incoming {\"channel-type\":\"main\",\"addr\":{\"transport\":\"file\",\"filename\":\"f\",\"offset\":8}}",
        "-incoming main,addr.transport=file,addr.filename=f -m 1.5G",
        "-incoming defer -smp 64 -m 2T",
        "-incoming memfd: --help",
        "-version",
    ]
    .map(|line| line.replace(' ', "\0").into_bytes())
    .to_vec()
}

pub(crate) const WORDS: &[&str] = &[
    "-machine",
    "-object",
    "-chardev",
    "-mon",
    "-monitor",
    "-qmp",
    "-serial",
    "-smp",
    "-m",
    "-incoming",
    "-nodefaults",
    "-nographic",
    "-uuid",
    "-trace",
    "memory-backend=",
    "memory-backend-memfd,id=",
    "memory-backend-file,id=",
    "memory-backend-ram,id=",
    ",size=",
    ",hugetlb=on",
    ",hugetlbsize=2M",
    ",mem-path=",
    ",share=on",
    ",noshare",
    "socket,id=",
    "stdio,id=",
    "null,id=",
    "file,id=",
    ",path=",
    ",server=on",
    ",wait=off",
    ",mux=on",
    "chardev:",
    "mon:stdio",
    "unix:",
    "file:",
    "memfd:",
    "defer",
    ",offset=",
    "channel-type=main",
    ",addr.transport=file",
    ",addr.filename=",
    ",addr.offset=",
    "18446744073709551615",
    "0x",
    ".999999999",
];
