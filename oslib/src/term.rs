#![allow(unsafe_code, reason = "the window size has no wrapper")]
//! Terminal modes as plain data, so that a monitor on a terminal survives an update with the modes it began with.
//!
//! [`Termios`] can be saved and restored by another program image; what it means is the kernel's affair, and bits that
//! this build does not know are kept. See termios(3) and ioctl_tty(2).

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::Mode;
use nix::sys::termios::{self, SetArg};

use crate::retry;

/// Number of special characters in [`Termios`] (`NCCS` of the C library).
pub const SPECIAL_CHARACTERS: usize = 32;

/// The modes of a terminal, field by field as in termios(3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Termios {
    /// `c_iflag`
    pub input: u32,
    /// `c_oflag`
    pub output: u32,
    /// `c_cflag`
    pub control: u32,
    /// `c_lflag`
    pub local: u32,
    /// `c_line`
    pub line_discipline: u8,
    /// `c_cc`
    pub special: [u8; SPECIAL_CHARACTERS],
    /// `c_ispeed`
    pub input_speed: u32,
    /// `c_ospeed`
    pub output_speed: u32,
}

/// The size of a terminal's window in characters; 0 where it is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Characters per line.
    pub columns: u16,
}

impl Termios {
    /// These modes changed to what a monitor with a line editor of its own wants, as QEMU does for `-serial stdio`: each
    /// byte as typed and at once, no echo, 8 bits; output is still post-processed, so that a newline returns the carriage.
    ///
    /// With `signals`, Ctrl-C and its kin still raise signals; without, they are bytes like any other.
    #[must_use]
    pub fn make_raw(mut self, signals: bool) -> Self {
        self.input &= !(libc::IGNBRK
            | libc::BRKINT
            | libc::PARMRK
            | libc::ISTRIP
            | libc::INLCR
            | libc::IGNCR
            | libc::ICRNL
            | libc::IXON);
        self.output |= libc::OPOST;
        self.local &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::IEXTEN);
        if !signals {
            self.local &= !libc::ISIG;
        }
        self.control &= !(libc::CSIZE | libc::PARENB);
        self.control |= libc::CS8;
        self.special[libc::VMIN] = 1;
        self.special[libc::VTIME] = 0;
        self
    }
}

impl From<libc::termios> for Termios {
    fn from(raw: libc::termios) -> Self {
        Termios {
            input: raw.c_iflag,
            output: raw.c_oflag,
            control: raw.c_cflag,
            local: raw.c_lflag,
            line_discipline: raw.c_line,
            special: raw.c_cc,
            input_speed: raw.c_ispeed,
            output_speed: raw.c_ospeed,
        }
    }
}

impl From<Termios> for libc::termios {
    fn from(modes: Termios) -> Self {
        libc::termios {
            c_iflag: modes.input,
            c_oflag: modes.output,
            c_cflag: modes.control,
            c_lflag: modes.local,
            c_line: modes.line_discipline,
            c_cc: modes.special,
            c_ispeed: modes.input_speed,
            c_ospeed: modes.output_speed,
        }
    }
}

/// The modes of the terminal `fd`.
///
/// # Errors
/// ENOTTY if it is no terminal.
pub fn get(fd: impl AsFd) -> io::Result<Termios> {
    let fd = fd.as_fd();
    Ok(libc::termios::from(retry::on_eintr(|| termios::tcgetattr(fd))?).into())
}

/// Sets the modes of the terminal `fd` at once; input typed but not read yet is kept.
///
/// A background job that does this is stopped by SIGTTOU, unless it blocks or ignores that signal.
///
/// # Errors
/// ENOTTY if it is no terminal; EIO if its session has gone.
pub fn set(fd: impl AsFd, modes: &Termios) -> io::Result<()> {
    let fd = fd.as_fd();
    let modes = termios::Termios::from(libc::termios::from(*modes));
    retry::on_eintr(|| termios::tcsetattr(fd, SetArg::TCSANOW, &modes))
}

/// Whether `fd` is a terminal.
pub fn is_tty(fd: impl AsFd) -> bool {
    fd.as_fd().is_terminal()
}

/// The window size of the terminal `fd`.
///
/// # Errors
/// ENOTTY if it is no terminal.
pub fn window(fd: impl AsFd) -> io::Result<Window> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize to the pointer.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) })?;
    Ok(Window { rows: size.ws_row, columns: size.ws_col })
}

/// A new pseudoterminal as `(master, slave)`, both close-on-exec, of which neither becomes the controlling terminal.
///
/// # Errors
/// Those of posix_openpt(3) and of opening the slave.
pub fn openpty() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = posix_openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = open(ptsname_r(&master)?.as_str(), flags, Mode::empty())?;
    Ok((master.into(), slave))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_travel_as_plain_data() {
        let (master, slave) = openpty().unwrap();
        assert!(crate::cloexec::is_set(&master).unwrap() && crate::cloexec::is_set(&slave).unwrap());
        let original = get(&slave).unwrap();
        assert_ne!(original.local & libc::ICANON, 0);

        set(&slave, &original.make_raw(false)).unwrap();
        let raw = get(&slave).unwrap();
        assert_eq!(raw.local & (libc::ICANON | libc::ECHO | libc::ISIG | libc::IEXTEN), 0);
        assert_ne!(raw.output & libc::OPOST, 0);
        assert_eq!((raw.special[libc::VMIN], raw.special[libc::VTIME]), (1, 0));

        set(&slave, &original).unwrap();
        assert_eq!(get(&slave).unwrap(), original);
    }

    #[test]
    fn signals_stay_if_asked_for() {
        let (_master, slave) = openpty().unwrap();
        let original = get(&slave).unwrap();
        assert_eq!(original.make_raw(true).local & libc::ISIG, libc::ISIG);
        assert_eq!(original.make_raw(false).local & libc::ISIG, 0);
    }

    #[test]
    fn raw_mode_passes_each_byte_and_returns_the_carriage() {
        let (master, slave) = openpty().unwrap();
        set(&slave, &get(&slave).unwrap().make_raw(false)).unwrap();
        nix::unistd::write(&master, b"\x03x\r").unwrap();
        let mut bytes = [0; 16];
        assert_eq!(nix::unistd::read(&slave, &mut bytes).unwrap(), 3);
        assert_eq!(&bytes[..3], b"\x03x\r");
        nix::unistd::write(&slave, b"a\nb").unwrap();
        assert_eq!(nix::unistd::read(&master, &mut bytes).unwrap(), 4);
        assert_eq!(&bytes[..4], b"a\r\nb");
    }

    #[test]
    fn what_is_no_terminal() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(!is_tty(&file));
        assert_eq!(get(&file).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(window(&file).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        let (_master, slave) = openpty().unwrap();
        assert!(is_tty(&slave));
        assert_eq!(window(&slave).unwrap(), Window { rows: 0, columns: 0 });
    }
}
