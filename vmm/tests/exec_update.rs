//! cpr-exec of the real binary under a real guest on KVM.

use testkit::{Vmm, VmmBuilder, need_kvm};

fn start(cpus: u8) -> anyhow::Result<Vmm> {
    VmmBuilder::new().cpus(cpus).start()
}

#[test]
fn the_guest_goes_on_through_updates() -> anyhow::Result<()> {
    need_kvm!();
    for cpus in [1, 2, 4] {
        let mut vmm = start(cpus)?;
        let guest = vmm.guest()?;
        let bytes = 16 << 20;
        guest.fill(bytes, 7)?;
        let pid = vmm.pid();
        for round in 0..3 {
            let before = guest.vcpu(0).beats();
            let info = if round == 0 { vmm.update_by_file()? } else { vmm.update()? };
            assert!(info["cpr"]["blackout-us"].as_u64().is_some_and(|us| us > 0), "{info}");
            for cpu in 0..cpus {
                guest.beats_on(cpu.into())?;
            }
            assert!(guest.vcpu(0).beats() > before, "the counter stepped back");
            assert_eq!(vmm.status()?, "running");
            assert_eq!(vmm.pid(), pid);
        }
        guest.verify(bytes, 7)?;
        vmm.quit()?;
    }
    Ok(())
}
