//! A machine to be updated: a number in shared memory, which the machine that runs adds to, and one in its state.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::preflight::Manifest;
use cpr_core::{
    Backing, CprMode, FdKind, FdPolicy, GuestActivity, Host, MemoryRegion, Outcome, Services, Step,
    TerminalAction, Update,
};
use oslib::memfd::Memfd;

const RAM_LEN: u64 = 1 << 16;

pub(crate) struct Machine {
    pub(crate) services: Services,
    pub(crate) activity: GuestActivity,
    ram: Option<Arc<File>>,
    others: Vec<Arc<OwnedFd>>,
    pub(crate) in_state: u64,
    /// The target is shown what the machine is made of.
    pub(crate) asks: bool,
}

impl Machine {
    /// One that waits for its parts.
    pub(crate) fn empty(services: &Services) -> Machine {
        Machine {
            services: services.clone(),
            activity: GuestActivity::Paused,
            ram: None,
            others: Vec::new(),
            in_state: 0,
            asks: false,
        }
    }

    /// One that runs, with `others` more descriptors to be carried, and one that is to stay.
    pub(crate) fn create(others: u64) -> Machine {
        let services = Services::default();
        let mut machine = Machine::empty(&services);
        let ram = Arc::new(File::from(Memfd::new("ram").len(RAM_LEN).seal_size().create().unwrap()));
        services.registry.save("ram", 0, FdKind::Memfd, FdPolicy::MustSurvive, &ram).unwrap();
        for id in 0..others {
            let fd = Arc::new(Memfd::new(format!("other{id}")).len(id).create().unwrap());
            services.registry.save("other", id, FdKind::Other, FdPolicy::MustSurvive, &fd).unwrap();
            machine.others.push(fd);
        }
        let stays = Arc::new(Memfd::new("stays").create().unwrap());
        services.registry.save("stays", 0, FdKind::Other, FdPolicy::MustSurvive, &stays).unwrap();
        machine.others.push(stays);
        machine.ram = Some(ram);
        machine.activity = GuestActivity::Running;
        machine.in_state = 7;
        machine
    }

    pub(crate) fn beats(&self) -> u64 {
        let mut word = [0; 8];
        self.ram.as_ref().unwrap().read_exact_at(&mut word, 0).unwrap();
        u64::from_ne_bytes(word)
    }

    pub(crate) fn beat(&self) {
        assert_eq!(self.activity, GuestActivity::Running);
        let next = self.beats() + 1;
        self.ram.as_ref().unwrap().write_all_at(&next.to_ne_bytes(), 0).unwrap();
    }

    /// A whole update, by a loop that has nothing else to do than to let the machine beat.
    pub(crate) fn update(&mut self, mode: Box<dyn CprMode>) -> Result<Outcome, BoxError> {
        self.update_until(mode, |_| false)
    }

    /// The same, cancelled as soon as `enough` says so.
    pub(crate) fn update_until(
        &mut self,
        mode: Box<dyn CprMode>,
        enough: impl Fn(&Update) -> bool,
    ) -> Result<Outcome, BoxError> {
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
                        if self.activity == GuestActivity::Running {
                            self.beat();
                        }
                        if enough(&update) {
                            return Ok(update.cancel(self));
                        }
                        std::thread::sleep(Duration::from_millis(1));
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

    fn manifest(&self, _: &cpr_core::ModeInfo) -> Option<Manifest> {
        self.asks.then(|| Manifest::default().section("others", 0, 1..=1).section("machine", 0, 1..=1))
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

    fn save_early(&mut self, _: &cpr_core::ModeInfo, early: &mut FrameWriter) -> Result<(), BoxError> {
        Ok(early.put_value("others", 0, 1, &(self.others.len() as u64 - 1))?)
    }

    fn save(&mut self, main: &mut FrameWriter) -> Result<(), BoxError> {
        Ok(main.put_value("machine", 0, 1, &self.in_state)?)
    }

    fn load(&mut self, main: &mut Frame) -> Result<(), BoxError> {
        self.in_state = main.require("machine", 0)?.decode(1)?;
        Ok(())
    }

    fn request_terminal(&mut self, action: TerminalAction) {
        drop(action);
    }
}

impl Machine {
    /// Claims what came.
    pub(crate) fn build(&mut self, early: &mut Frame) -> Result<(), BoxError> {
        let others: u64 = early.require("others", 0)?.decode(1)?;
        let registry = &self.services.registry;
        self.ram = registry.find("ram", 0);
        if registry.contains("stays", 0) {
            return Err("what was to stay has come".into());
        }
        for id in 0..others {
            let fd: Arc<OwnedFd> =
                registry.find("other", id).ok_or_else(|| format!("other {id} did not come"))?;
            // Each is the one of its name.
            assert_eq!(oslib::memfd::len(&fd)?, id);
            self.others.push(fd);
        }
        self.ram.is_some().then_some(()).ok_or_else(|| "no memory came".into())
    }
}
