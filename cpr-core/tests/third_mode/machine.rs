//! A machine to be updated: some memory in a memfd, one connection to a client, and a number that only the state knows.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::{
    Backing, CprMode, FdKind, FdPolicy, GuestActivity, Host, MemoryRegion, Outcome, Services, Step,
    TerminalAction, Update,
};
use oslib::memfd::Memfd;

/// Bytes of its memory.
pub(crate) const RAM_LEN: u64 = 1 << 20;

pub(crate) struct Machine {
    pub(crate) services: Services,
    pub(crate) activity: GuestActivity,
    parts: Option<Parts>,
    /// Commands served so far: state that no descriptor holds.
    commands: u64,
}

struct Parts {
    ram: Arc<File>,
    client: Arc<UnixStream>,
}

impl Machine {
    pub(crate) fn new(services: &Services) -> Machine {
        Machine { services: services.clone(), activity: GuestActivity::Paused, parts: None, commands: 0 }
    }

    /// A machine from nothing, with a client.
    pub(crate) fn create(services: &Services, client: UnixStream) -> Result<Machine, BoxError> {
        let ram = Arc::new(File::from(Memfd::new("ram").len(RAM_LEN).seal_size().create()?));
        let client = Arc::new(client);
        services.registry.save("ram", 0, FdKind::Memfd, FdPolicy::MustSurvive, &ram)?;
        services.registry.save("client", 7, FdKind::Socket, FdPolicy::MustSurvive, &client)?;
        let mut machine = Machine::new(services);
        machine.parts = Some(Parts { ram, client });
        machine.activity = GuestActivity::Running;
        Ok(machine)
    }

    fn parts(&self) -> Result<&Parts, BoxError> {
        self.parts.as_ref().ok_or_else(|| "there is no machine".into())
    }

    pub(crate) fn ram(&self) -> Result<Arc<File>, BoxError> {
        Ok(self.parts()?.ram.clone())
    }

    /// Serves one command of the client; `None` when the client has gone or wants an update.
    pub(crate) fn serve(&mut self) -> Result<Option<String>, BoxError> {
        let Parts { ram, client } = self.parts()?;
        let mut command = String::new();
        // A reader of one byte takes nothing that belongs to the next program.
        BufReader::with_capacity(1, &**client).read_line(&mut command)?;
        let answer = match command.trim_end() {
            "who" => format!("{} {} {}", std::process::id(), self.services.generation, self.commands),
            "poke" => {
                let at = self.commands * 8 % RAM_LEN;
                ram.write_all_at(&self.commands.to_ne_bytes(), at)?;
                format!("{at}")
            }
            other => return Ok(Some(other.to_owned())),
        };
        writeln!(&**client, "{answer}")?;
        self.commands += 1;
        Ok(None)
    }

    /// A whole update, by a loop that has nothing else to do.
    pub(crate) fn update(&mut self, mode: Box<dyn CprMode>) -> Result<Outcome, BoxError> {
        let services = self.services.clone();
        let mut update = Update::begin(&services, mode, self)?;
        loop {
            match update.step(self) {
                Step::Again => {}
                Step::Wait(wait) => {
                    let ready = |fd: &Arc<OwnedFd>| oslib::stream::is_readable(&**fd).unwrap();
                    while !wait.fds.iter().any(ready)
                        && wait.deadline.is_none_or(|deadline| Instant::now() < deadline)
                    {
                        std::thread::sleep(std::time::Duration::from_millis(1));
                    }
                }
                Step::Terminal => return Err("this mode has no last act".into()),
                Step::Finished(outcome) => return Ok(outcome),
            }
        }
    }
}

impl Host for Machine {
    fn memory(&self) -> Vec<MemoryRegion> {
        let backing = Backing::Shared { name: "ram".into(), id: 0 };
        vec![MemoryRegion { name: "ram".into(), len: RAM_LEN, backing }]
    }

    fn activity(&self) -> GuestActivity {
        self.activity
    }

    fn stop(&mut self, _: Instant) -> Result<GuestActivity, BoxError> {
        Ok(std::mem::replace(&mut self.activity, GuestActivity::Paused))
    }

    fn resume(&mut self, activity: GuestActivity) -> Result<(), BoxError> {
        self.activity = activity;
        Ok(())
    }

    fn save(&mut self, main: &mut FrameWriter) -> Result<(), BoxError> {
        Ok(main.put_value("machine", 0, 1, &self.commands)?)
    }

    fn load(&mut self, main: &mut Frame) -> Result<(), BoxError> {
        self.commands = main.require("machine", 0)?.decode(1)?;
        let ram = self.services.registry.find("ram", 0).ok_or("no memory came")?;
        let client = self.services.registry.find("client", 7).ok_or("no client came")?;
        self.parts = Some(Parts { ram, client });
        Ok(())
    }

    fn request_terminal(&mut self, action: TerminalAction) {
        // Such a mode is refused by `update`; the action was never run, so nothing is lost.
        drop(action);
    }
}

/// Asks a machine something from outside.
pub(crate) fn ask(client: &mut UnixStream, command: &str) -> io::Result<String> {
    writeln!(client, "{command}")?;
    let mut answer = String::new();
    BufReader::with_capacity(1, client).read_line(&mut answer)?;
    match answer.strip_suffix('\n') {
        Some(answer) => Ok(answer.to_owned()),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
