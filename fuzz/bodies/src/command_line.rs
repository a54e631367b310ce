//! The command line: arguments between NULs.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use vmm::chardev;
use vmm::cli::config::{Config, DeviceKind, LAST_SLOT, MAX_QUEUES};
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
    check_devices(config);
    for chardev in &config.chardevs {
        chardev::identity(chardev).expect("a path can be made absolute");
    }
}

/// Slots, and what descriptors are called, belong to one device each.
fn check_devices(config: &Config) {
    let (mut slots, mut entries) = (BTreeSet::new(), BTreeSet::new());
    for device in &config.devices {
        assert!((1..=LAST_SLOT).contains(&device.slot) && slots.insert(device.slot), "{device:?}");
        for entry in device.registry_entries() {
            assert!(entries.insert(entry), "{device:?}");
        }
        match &device.kind {
            DeviceKind::Blk(blk) => {
                assert!((1..=MAX_QUEUES).contains(&blk.queues) && blk.queue_size.is_power_of_two());
            }
            DeviceKind::Net(net) => {
                assert!((1..=MAX_QUEUES).contains(&net.queue_pairs()));
                assert!(net.mac.0[0] & 1 == 0);
            }
            DeviceKind::Serial(serial) => {
                let numbers: BTreeSet<_> = serial.ports.iter().map(|port| port.number).collect();
                assert!(numbers.len() == serial.ports.len());
                assert!(numbers.iter().all(|&number| number < serial.max_ports));
                for port in &serial.ports {
                    assert!(config.chardevs.iter().any(|chardev| chardev.id == port.chardev), "{port:?}");
                }
            }
            _ => {}
        }
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
        "-drive file=/i,if=none,id=d,format=raw,readonly=on,cache=unsafe,aio=threads,discard=unmap,file.locking=off -device virtio-blk-pci,drive=d,id=x,addr=0x1f.0,serial=s,num-queues=2,queue-size=512,write-cache=auto,bootindex=1",
        "-smp 2 -drive file=/i,format=raw -drive file=file:/j,format=raw,if=virtio,serial=t -device virtio-rng-pci,addr=2",
        "-blockdev raw,node-name=n,file=f,read-only=on -blockdev file,node-name=f,filename=/i,cache.no-flush=on,discard=unmap -device virtio-blk-pci,drive=n",
        "-blockdev {\"driver\":\"raw\",\"node-name\":\"n\",\"file\":{\"driver\":\"file\",\"filename\":\"/i\",\"aio\":\"io_uring\"}} -device {\"driver\":\"virtio-blk-pci\",\"drive\":\"n\",\"num-queues\":4}",
        "-netdev tap,id=n,ifname=t,script=no,downscript=no,queues=2,vnet_hdr=on,vhost=off -device virtio-net-pci,netdev=n,mq=on,vectors=6,mac=52:54:00:12:34:56",
        "-netdev tap,id=n,fds=3:4,vhost=on,vhostfds=5:6 -nic tap,ifname=t,vhostfd=7 -device virtio-net-pci,netdev=n",
        "-netdev tap,id=n,fds=3:4 -netdev tap,id=m,fd=5 -device virtio-net-pci,netdev=n,host_mtu=9000,csum=off -device virtio-net-pci,netdev=m,guest_tso4=off,mrg_rxbuf=off",
        "-nic tap,ifname=t,mac=02:00:00:00:00:01 -nic tap,fd=9,model=virtio-net-pci -nic none",
        "-object rng-random,id=r,filename=/dev/random -object rng-builtin,id=b -device virtio-rng-pci,rng=r -device virtio-rng-pci,rng=b",
        "-chardev null,id=c -chardev null,id=e -device virtio-serial-pci,id=s,max_ports=2 -device virtconsole,chardev=c,name=x,nr=1,bus=s.0 -device virtconsole,chardev=e",
        "-device virtio-net-pci,help",
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
    "-drive",
    "-blockdev",
    "-netdev",
    "-nic",
    "-device",
    "file=/i,format=raw,if=none,id=",
    "raw,node-name=",
    "file,node-name=",
    ",file=",
    ",filename=",
    ",file.driver=file,file.filename=",
    ",read-only=on",
    ",discard=unmap",
    ",cache.no-flush=on",
    "tap,id=",
    ",ifname=",
    ",fds=3:4",
    ",fd=5",
    ",queues=2",
    "virtio-blk-pci,drive=",
    "virtio-net-pci,netdev=",
    "virtio-rng-pci,rng=",
    "virtio-serial-pci,max_ports=2",
    "virtconsole,chardev=",
    "rng-random,id=",
    ",addr=",
    ",num-queues=",
    ",queue-size=",
    ",mac=52:54:00:12:34:",
    ",nr=1",
    "18446744073709551615",
    "0x",
    ".999999999",
];
