//! Safe signatures over the Linux system calls that a live update of a VMM needs.
//!
//! Everything here takes `AsFd` or [`BorrowedFd`](std::os::fd::BorrowedFd) and returns
//! [`OwnedFd`](std::os::fd::OwnedFd), and every descriptor made here is close-on-exec from birth: what survives an
//! exec does so because somebody cleared that flag ([`cloexec`]) on purpose. The crate knows nothing of KVM, VFIO,
//! virtual machines or update modes; it has no thread, no event loop and no global state apart from the record of
//! numbers in [`inherited`] and the one [`keeper`] that a process can have at a time. The manual pages of section 2
//! are the source of truth, with the kernel's own documentation where they lag behind.
//!
//! | for | module |
//! |---|---|
//! | descriptors across exec | [`cloexec`], [`inherited`], [`exec`], [`environment`] |
//! | memory with a descriptor | [`memfd`], [`mod@shared`], [`mapping`], [`populate`](mod@populate) |
//! | files that outlive the process, locks of files | [`storage`], [`locks`] |
//! | files and guest memory, with the feature `guest-io` | `guest_io`, `uring` |
//! | descriptors across processes | [`scm`], [`uds`] |
//! | processes | [`pidfd`], [`process`], [`mod@spawn`], [`keeper`], [`cgroup`], [`seccomp`] |
//! | packets | [`tap`]; with the feature `guest-io`, `packet`, `vhost` |
//! | wake-ups, signals, time, terminals | [`eventfd`], [`signals`], [`clock`], [`term`], [`stream`] |
//! | randomness | [`random`] |
//!
//! Linux 5.14 or later on x86-64. Process and thread ids are `u32`, as in [`std::process::id`]; signals are plain
//! `i32` numbers, because real-time signals have no names.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("oslib makes Linux x86-64 system calls and runs nowhere else");

pub mod cgroup;
pub mod clock;
pub mod cloexec;
pub mod environment;
pub mod eventfd;
pub mod exec;
#[cfg(feature = "guest-io")]
pub mod guest_io;
pub mod inherited;
pub mod keeper;
pub mod locks;
pub mod mapping;
pub mod memfd;
pub mod memory;
#[cfg(feature = "guest-io")]
pub mod packet;
pub mod pidfd;
pub mod populate;
pub mod process;
pub mod random;
pub mod scm;
pub mod seccomp;
pub mod shared;
pub mod signals;
pub mod spawn;
pub mod storage;
pub mod stream;
pub mod tap;
pub mod term;
pub mod thread;
pub mod uds;
#[cfg(feature = "guest-io")]
pub mod uring;
#[cfg(feature = "guest-io")]
pub mod vhost;

mod mmap;
mod retry;
