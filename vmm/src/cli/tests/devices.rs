//! Disks, networks and other devices.

use super::*;

/// The devices of a machine with PCI.
fn devices(line: &str) -> Vec<DeviceConfig> {
    config(line).devices
}

fn drive(line: &str) -> DriveConfig {
    let all = devices(line);
    match &all[..] {
        [DeviceConfig { kind: DeviceKind::Blk(blk), .. }] => blk.drive.clone(),
        other => panic!("{line}: {other:?}"),
    }
}

fn nets(line: &str) -> Vec<NetConfig> {
    let nets = devices(line).into_iter().filter_map(|device| match device.kind {
        DeviceKind::Net(net) => Some(net),
        _ => None,
    });
    nets.collect()
}

fn image() -> DriveConfig {
    DriveConfig {
        id: "d".into(),
        path: "/i".into(),
        read_only: false,
        cache: Cache::Writeback,
        discard: false,
        locking: true,
        share_rw: false,
        aio: Aio::IoUring,
    }
}

fn blk(drive: DriveConfig) -> BlkConfig {
    BlkConfig { drive, serial: None, queues: 1, queue_size: 256, discard: true, write_zeroes: true }
}

#[test]
fn a_drive_and_its_device() {
    let expected = [DeviceConfig { id: None, slot: 1, kind: DeviceKind::Blk(blk(image())) }];
    for line in [
        "-drive file=/i,if=none,id=d,format=raw -device virtio-blk-pci,drive=d",
        "-device virtio-blk,drive=d -drive file=file:/i,if=none,id=d,driver=raw,readonly=off,detect-zeroes=off",
        "-drive file=/i,id=d,format=raw,media=disk,snapshot=off,werror=report",
        "-drive file=/i,id=d,format=raw,if=virtio,cache=writeback,file.locking=auto",
        "-blockdev raw,node-name=d,file.driver=file,file.filename=/i -device '{\"driver\":\"virtio-blk-pci\",\"drive\":\"d\"}'",
        "-device virtio-blk-pci,drive=d,bus=pcie.0,disable-legacy=on,bootindex=1 -blockdev \
         '{\"driver\":\"raw\",\"node-name\":\"d\",\"file\":{\"driver\":\"file\",\"filename\":\"/i\"}}'",
        "-blockdev file,node-name=f,filename=/i -blockdev driver=raw,node-name=d,file=f -device virtio-blk-pci,drive=d",
        "-blockdev file,node-name=d,filename=/i -device virtio-blk-pci,drive=d",
    ] {
        assert_eq!(devices(line), expected, "{line}");
        assert_eq!(config(line).warnings, Vec::<String>::new(), "{line}");
    }
    let names: Vec<_> = devices("-drive file=a,format=raw -drive file=b,format=raw")
        .iter()
        .flat_map(DeviceConfig::registry_entries)
        .collect();
    assert_eq!(names, [("drive/virtio0".into(), 0), ("drive/virtio1".into(), 0)]);
}

#[test]
fn every_property_of_a_disk() {
    let all = devices(
        "-smp 3 -drive file=/i,if=none,id=d,format=raw,readonly=on,cache=writeback,aio=threads,discard=unmap,\
         file.locking=off,serial=other -device virtio-blk-pci,drive=d,id=disk0,addr=0x1f.0,serial=1-2,num-queues=2,\
         queue-size=512,write-cache=off,discard=off,write-zeroes=off,share-rw=on",
    );
    let drive = DriveConfig {
        read_only: true,
        cache: Cache::Writethrough,
        discard: true,
        locking: false,
        share_rw: true,
        aio: Aio::Threads,
        ..image()
    };
    let expected = BlkConfig {
        drive,
        serial: Some("1-2".into()),
        queues: 2,
        queue_size: 512,
        discard: false,
        write_zeroes: false,
    };
    assert_eq!(all, [DeviceConfig { id: Some("disk0".into()), slot: 31, kind: DeviceKind::Blk(expected) }]);
    let all = devices("-smp 3 -drive file=/i,id=d,format=raw,serial=x");
    let expected = BlkConfig { queues: 3, serial: Some("x".into()), ..blk(image()) };
    assert_eq!(all[0].kind, DeviceKind::Blk(expected));
}

#[test]
fn caches_are_qemus() {
    let cache = |drive: &str, device: &str| {
        let line =
            format!("-drive if=none,id=d,file=/i,format=raw{drive} -device virtio-blk-pci,drive=d{device}");
        self::drive(&line).cache
    };
    assert_eq!(cache("", ""), Cache::Writeback);
    assert_eq!(cache(",cache=writeback", ",write-cache=auto"), Cache::Writeback);
    assert_eq!(cache(",cache=writethrough", ""), Cache::Writethrough);
    assert_eq!(cache(",cache=writethrough", ",write-cache=on"), Cache::Writeback);
    assert_eq!(cache("", ",write-cache=off"), Cache::Writethrough);
    assert_eq!(cache(",cache=unsafe", ""), Cache::Unsafe);
    assert_eq!(cache(",cache=unsafe,cache.no-flush=off", ",write-cache=on"), Cache::Writeback);
    assert_eq!(cache(",cache.no-flush=on,cache.direct=off", ""), Cache::Unsafe);
    assert_eq!(cache(",cache.writeback=off", ""), Cache::Writethrough);
}

#[test]
fn nodes_inherit_as_in_qemu() {
    let device = "-device virtio-blk-pci,drive=d";
    // A file inside a node has what the node has, and lets discards through.
    let inside = "-blockdev raw,node-name=d,file.driver=file,file.filename=/i,read-only=on,cache.no-flush=on,discard=unmap";
    let expected = DriveConfig { read_only: true, cache: Cache::Unsafe, discard: true, ..image() };
    assert_eq!(drive(&format!("{inside} {device}")), expected);
    let kept = DriveConfig { discard: false, cache: Cache::Writeback, ..expected.clone() };
    assert_eq!(drive(&format!("{inside},file.discard=ignore,file.cache.no-flush=off {device}")), kept);
    // A node of its own has what it says itself.
    let upon =
        "-blockdev raw,node-name=d,file=f,read-only=on,discard=unmap -blockdev file,node-name=f,filename=/i";
    assert_eq!(drive(&format!("{upon} {device}")), kept);
    let told = "read-only=on,cache.no-flush=on,discard=unmap,aio=threads,locking=off,auto-read-only=off";
    let expected = DriveConfig { aio: Aio::Threads, locking: false, ..expected };
    assert_eq!(drive(&format!("{upon},{told} {device}")), expected);
}

#[test]
fn tap_devices() {
    let named = |name: &str, queues| TapConfig::Named { name: name.into(), queues };
    let tap = |options: &str| {
        let line = format!("-netdev tap,id=n,{options} -device virtio-net-pci,netdev=n");
        nets(&line).remove(0).netdev
    };
    assert_eq!(tap("ifname=t0").tap, named("t0", 1));
    assert_eq!(tap("ifname=t0,queues=4,vnet_hdr=on,script=no,downscript=no,vhost=off").tap, named("t0", 4));
    assert_eq!(tap("fd=3,script=no").tap, TapConfig::Inherited { fds: vec![3] });
    let several = tap("fds=7:5:6");
    assert_eq!(several.tap, TapConfig::Inherited { fds: vec![7, 5, 6] });
    assert_eq!(several.queues(), 3);
    let entries = devices("-netdev tap,id=n,fds=7:5 -device virtio-net-pci,netdev=n")[0].registry_entries();
    assert_eq!(entries, [("netdev/n".into(), 0), ("netdev/n".into(), 1)]);
    // Carried by the kernel.
    let vhost = |options: &str| tap(options).vhost;
    let inherited = |fds: &[i32]| Some(VhostConfig::Inherited { fds: fds.to_vec() });
    assert_eq!(vhost("ifname=t0"), None);
    assert_eq!(vhost("ifname=t0,queues=4,vhost=on"), Some(VhostConfig::Opened));
    assert_eq!(vhost("fd=3,vhost=on,vhostfd=4"), inherited(&[4]));
    assert_eq!(vhost("fds=7:5,vhostfds=9:8"), inherited(&[9, 8]));
    assert_eq!(nets("-nic tap,ifname=t0,vhost=on")[0].netdev.vhost, Some(VhostConfig::Opened));
    let json = r#"{"type":"tap","id":"n","fds":"7:5","vhostfds":"9:8","vhost":true}"#;
    assert_eq!(
        nets(&format!("-netdev '{json}' -device virtio-net-pci,netdev=n"))[0].netdev.vhost,
        inherited(&[9, 8])
    );
    // Both at once.
    let short = nets("-nic tap,ifname=t0,mac=02:00:00:00:00:01 -nic none -nic tap,fd=9,model=virtio");
    let ids: Vec<_> = short.iter().map(|net| (net.netdev.id.as_str(), net.mac.to_string())).collect();
    assert_eq!(ids, [("nic0", "02:00:00:00:00:01".into()), ("nic1", "52:54:00:12:34:56".into())]);
}

#[test]
fn addresses_are_qemus_and_stay() {
    let macs = |options: [&str; 3]| {
        let one = |(at, options)| {
            format!("-netdev tap,id=n{at},ifname=t{at} -device virtio-net-pci,netdev=n{at},{options} ")
        };
        let line: String = options.into_iter().enumerate().map(one).collect();
        nets(&line).iter().map(|net| net.mac.to_string()).collect::<Vec<_>>()
    };
    let id = ["id=a", "id=b", "id=c"];
    assert_eq!(macs(id), ["52:54:00:12:34:56", "52:54:00:12:34:57", "52:54:00:12:34:58"]);
    let named = ["id=a", "mac=52:54:00:12:34:56", "mac=02-AA-00-00-00-01"];
    assert_eq!(macs(named), ["52:54:00:12:34:57", "52:54:00:12:34:56", "02:aa:00:00:00:01"]);
}

#[test]
fn offloads_need_each_other() {
    let device = |options: &str| {
        devices(&format!("-netdev tap,id=n,ifname=t -device virtio-net-pci,netdev=n{options}")).remove(0)
    };
    let with = |options: &str| match device(options).kind {
        DeviceKind::Net(net) => net.offloads,
        other => panic!("{other:?}"),
    };
    let all = Offloads {
        csum: true,
        guest_csum: true,
        host_tso4: true,
        host_tso6: true,
        host_ecn: true,
        host_ufo: true,
        guest_tso4: true,
        guest_tso6: true,
        guest_ecn: true,
        guest_ufo: true,
        mrg_rxbuf: true,
    };
    assert_eq!(with(""), all);
    let none = Offloads {
        csum: false,
        guest_csum: false,
        host_tso4: false,
        host_tso6: false,
        host_ecn: false,
        host_ufo: false,
        guest_tso4: false,
        guest_tso6: false,
        guest_ecn: false,
        guest_ufo: false,
        mrg_rxbuf: true,
    };
    assert_eq!(with(",csum=off,guest_csum=off"), none);
    assert_eq!(
        with(",host_tso4=off,host_tso6=off"),
        Offloads { host_tso4: false, host_tso6: false, host_ecn: false, ..all }
    );
    assert_eq!(with(",guest_ufo=off,mrg_rxbuf=off"), Offloads { guest_ufo: false, mrg_rxbuf: false, ..all });
    // VIRTIO_NET_F_GUEST_UFO and VIRTIO_NET_F_MRG_RXBUF; VIRTIO_BLK_F_DISCARD.
    assert_eq!(device("").withheld_features(), 0);
    assert_eq!(device(",guest_ufo=off,mrg_rxbuf=off").withheld_features(), 1 << 10 | 1 << 15);
    let disk = "-drive file=/i,if=none,id=d,format=raw -device virtio-blk-pci,drive=d,discard=off";
    assert_eq!(devices(disk)[0].withheld_features(), 1 << 13);
}

#[test]
fn slots_are_the_same_with_the_same_command_line() {
    let slots = |line: &str| {
        let devices = devices(line);
        devices.iter().map(|device| (device.slot, device.id.clone().unwrap_or_default())).collect::<Vec<_>>()
    };
    let rng = |options: &str| format!("-device virtio-rng-pci,{options} ");
    let of = |options: [&str; 4]| slots(&options.map(rng).concat());
    let expected = |ids: [(u8, &str); 4]| ids.map(|(slot, id)| (slot, id.to_owned())).to_vec();
    assert_eq!(of(["id=a", "id=b", "id=c", "id=d"]), expected([(1, "a"), (2, "b"), (3, "c"), (4, "d")]));
    // What is named is kept free, wherever it stands; numbers are hexadecimal.
    assert_eq!(
        of(["id=a", "id=b,addr=10", "id=c", "id=d,addr=1"]),
        expected([(1, "d"), (2, "a"), (3, "c"), (16, "b")])
    );
    // The disk of a drive stands where its option does.
    let mixed = slots("-device virtio-rng-pci,id=a -drive file=/i,format=raw -device virtio-rng-pci,id=b");
    assert_eq!(mixed, [(1, "a".to_owned()), (2, String::new()), (3, "b".to_owned())]);
}

#[test]
fn randomness_and_consoles() {
    let source = |line: &str| match devices(line).remove(0).kind {
        DeviceKind::Rng(rng) => rng.source,
        other => panic!("{line}: {other:?}"),
    };
    assert_eq!(source("-device virtio-rng"), RngSource::Builtin);
    assert_eq!(source("-object rng-builtin,id=r -device virtio-rng-pci,rng=r"), RngSource::Builtin);
    assert_eq!(
        source("-device virtio-rng-pci,rng=r -object rng-random,id=r"),
        RngSource::File("/dev/urandom".into())
    );
    let json = "-object '{\"qom-type\":\"rng-random\",\"id\":\"r\",\"filename\":\"/dev/hwrng\"}'";
    let file = RngSource::File("/dev/hwrng".into());
    assert_eq!(source(&format!("{json} -device virtio-rng-pci,rng=r")), file);

    let line = "-chardev null,id=c0 -chardev null,id=c1 -chardev null,id=c2 -device virtconsole,chardev=c0,bus=s1.0 \
                -device virtio-serial -device virtio-serial-pci,id=s1,max_ports=2 -device virtconsole,chardev=c1,name=x,nr=5 \
                -device virtconsole,chardev=c2,nr=0,bus=s1.0,id=p";
    let port = |number, chardev: &str, name: Option<&str>| PortConfig {
        number,
        chardev: chardev.into(),
        name: name.map(Into::into),
    };
    assert_eq!(
        devices(line),
        [
            DeviceConfig {
                id: None,
                slot: 1,
                kind: DeviceKind::Serial(SerialConfig {
                    max_ports: 31,
                    ports: vec![port(5, "c1", Some("x"))]
                }),
            },
            DeviceConfig {
                id: Some("s1".into()),
                slot: 2,
                kind: DeviceKind::Serial(SerialConfig {
                    max_ports: 2,
                    ports: vec![port(0, "c2", None), port(1, "c0", None)],
                }),
            },
        ]
    );
}

#[test]
fn what_nothing_uses_is_told() {
    let warnings = config("-drive file=/i,if=none,id=d,format=raw -netdev tap,id=n,ifname=t").warnings;
    assert_eq!(
        warnings,
        [
            "drive 'd' is used by no device; name it by -device virtio-blk-pci,drive=d",
            "netdev 'n' has no peer; name it by -device virtio-net-pci,netdev=n",
        ]
    );
}

#[test]
fn help_on_devices() {
    for line in ["-device help", "-device '?' -nonsense"] {
        let Ok(Invocation::Help(text)) = invoke(line) else { panic!("{line}") };
        assert!(text.contains("name \"virtio-blk-pci\", alias virtio-blk "), "{text}");
    }
    for name in ["virtio-blk-pci", "virtio-blk"] {
        let Ok(Invocation::Help(text)) = invoke(&format!("-device {name},help")) else { panic!("{name}") };
        assert!(text.starts_with("virtio-blk-pci options:\n") && text.contains("  drive=<ID> "), "{text}");
    }
    // Every property that a model's help has is one that its parser knows, and takes out of what it was given.
    for model in models::MODELS {
        for name in model.property_names() {
            let text = error(&format!("-device {},{name}=@", model.name));
            assert!(!text.contains("unknown property"), "{text}");
        }
    }
}

#[test]
fn mistakes_with_devices_are_named() {
    const DRIVE: &str = "-drive file=/i,if=none,id=d,format=raw";
    const NETDEV: &str = "-netdev tap,id=n,ifname=t";
    const NET: &str = "-netdev tap,id=n,ifname=t -device virtio-net-pci,netdev=n";
    for (line, expected) in [
        // Drives.
        ("-drive if=none,id=d,format=raw", "-drive: drive 'd': property 'file' is missing"),
        (
            "-drive file=/i,format=raw,if=none",
            "-drive: property 'id' is missing: with if=none a -device names",
        ),
        (
            "-drive file=/i,format=raw,if=ide",
            "-drive: property 'if': 'ide' is not supported (supported: none, virtio)",
        ),
        (
            "-drive file=/i,id=d",
            "-drive: drive 'd': property 'format' is missing: images are not probed; say format=raw",
        ),
        (
            "-drive file=/i,id=d,format=qcow2",
            "drive 'd': format 'qcow2' is not supported (supported: raw; 'qemu-img",
        ),
        (
            "-drive file=nbd://x,id=d,format=raw",
            "property 'file': 'nbd://x': protocol 'nbd' is not supported",
        ),
        ("-drive file=,id=d,format=raw", "drive 'd': property 'file': a path must not be empty"),
        ("-drive file=/i,id=1,format=raw", "-drive: id '1' is malformed"),
        (
            "-drive file=/i,format=raw,cache=fast",
            "property 'cache': 'fast' is not supported (supported: writeback,",
        ),
        (
            "-drive file=/i,format=raw,aio=native",
            "property 'aio': 'native' is not supported (supported: threads, io_uring)",
        ),
        (
            "-drive file=/i,format=raw,detect-zeroes=unmap",
            "property 'detect-zeroes': 'unmap' is not supported (supported: off)",
        ),
        (
            "-drive file=/i,format=raw,snapshot=on",
            "property 'snapshot': 'on' is not supported (supported: off)",
        ),
        ("-drive file=/i,format=raw,readonly=maybe", "property 'readonly': 'maybe' is neither on nor off"),
        ("-drive file=/i,format=raw,bps=7", "-drive: unknown property 'bps' (known: file, format,"),
        (
            "-drive file=/i,format=raw,serial=123456789012345678901",
            "-drive: property 'serial': '123456789012345678901' has more than 20",
        ),
        (
            "-drive file=/i,id=d,format=raw -drive file=/j,id=d,format=raw",
            "-drive: id 'd' is taken by another -drive or -blockdev",
        ),
        // Nodes.
        ("-blockdev raw,file.driver=file,file.filename=/i", "-blockdev: property 'node-name' is missing"),
        ("-blockdev node-name=x", "-blockdev: property 'driver' is missing"),
        (
            "-blockdev qcow2,node-name=x,file=f",
            "-blockdev: node 'x': driver 'qcow2' is not supported (supported: raw, file;",
        ),
        ("-blockdev raw,node-name=x", "node 'x': property 'file.driver' is missing"),
        (
            "-blockdev raw,node-name=x,file.driver=nbd",
            "property 'file.driver': 'nbd' is not supported (supported: file)",
        ),
        ("-blockdev raw,node-name=x,file.driver=file", "node 'x': property 'file.filename' is missing"),
        (
            "-blockdev raw,node-name=x,file=f,file.filename=/i",
            "node 'x': driver raw with file=NODE: unknown property 'file.filename'",
        ),
        ("-blockdev raw,node-name=x,filename=/i", "node 'x': driver raw: unknown property 'filename'"),
        ("-blockdev file,node-name=x,filename=/i,file=f", "node 'x': driver file: unknown property 'file'"),
        (
            "-blockdev file,node-name=x,filename=/i,file.aio=threads",
            "node 'x': property 'file.aio' does not belong",
        ),
        ("-blockdev raw,node-name=x,foo=1", "-blockdev: unknown property 'foo' (known: driver, node-name,"),
        (
            "-blockdev '{\"driver\":\"raw\",\"node-name\":\"x\",\"file\":{\"foo\":1}}'",
            "-blockdev: unknown property 'file.foo'",
        ),
        ("-blockdev '{'", "-blockdev: bad JSON"),
        (
            "-blockdev raw,node-name=x,file=f -device virtio-blk-pci,drive=x",
            "node 'x': unknown node 'f' (known: none)",
        ),
        (
            "-blockdev raw,node-name=x,file=x -device virtio-blk-pci,drive=x",
            "node 'x': unknown node 'x' (known: none)",
        ),
        (
            "-blockdev raw,node-name=x,file=y -blockdev raw,node-name=y,file=x -device virtio-blk-pci,drive=x",
            "node 'x': 'y' is no node of driver file",
        ),
        (
            "-blockdev raw,node-name=x,file=f -blockdev file,node-name=f,filename=/i,read-only=on -device virtio-blk-pci,drive=x",
            "node 'x' is to be written, but its file 'f' is read-only",
        ),
        (
            "-blockdev raw,node-name=x,file=f -blockdev raw,node-name=y,file=f -blockdev file,node-name=f,filename=/i \
             -device virtio-blk-pci,drive=x -device virtio-blk-pci,drive=y",
            "-device: virtio-blk-pci,drive=y: drive 'f' is in use by virtio-blk-pci,drive=x already",
        ),
        // Disks.
        ("-device virtio-blk-pci", "-device: virtio-blk-pci: property 'drive' is missing"),
        (
            "-device virtio-blk-pci,drive=x -drive file=/i,if=none,id=d,format=raw -drive file=/j,id=e,format=raw",
            "-device: virtio-blk-pci,drive=x: unknown drive 'x' (known: d, e)",
        ),
        (
            "-drive file=/i,id=d,format=raw -device virtio-blk-pci,drive=d,id=x",
            "-device: virtio-blk-pci,id=x: drive 'd' is in use by virtio-blk-pci,drive=d already",
        ),
        (
            &format!("{DRIVE} -device virtio-blk-pci,drive=d,foo=1"),
            "virtio-blk-pci,drive=d: unknown property 'foo' (known: drive,",
        ),
        (
            &format!("{DRIVE} -device virtio-blk-pci,drive=d,num-queues=65"),
            "property 'num-queues': '65' is no number from 1 to 64",
        ),
        (
            &format!("{DRIVE} -device virtio-blk-pci,drive=d,queue-size=100"),
            "property 'queue-size': 100 is no power of two",
        ),
        (
            &format!("{DRIVE} -device virtio-blk-pci,drive=d,queue-size=2048"),
            "'2048' is no number from 4 to 1024",
        ),
        (
            &format!("{DRIVE} -device virtio-blk-pci,drive=d,serial=\u{e9}"),
            "property 'serial': '\u{e9}' has more than 20 characters, or others",
        ),
        (
            &format!("{DRIVE} -device virtio-blk-pci,drive=d,write-cache=maybe"),
            "'maybe' is not supported (supported: on, off, auto)",
        ),
        // Slots and ids.
        (
            &format!("{DRIVE} -device virtio-blk-pci,drive=d,addr=0"),
            "property 'addr': '0' is no slot from 1 to 1f, hexadecimal",
        ),
        (&format!("{DRIVE} -device virtio-blk-pci,drive=d,addr=20"), "'20' is no slot from 1 to 1f"),
        (&format!("{DRIVE} -device virtio-blk-pci,drive=d,addr=2.1"), "'2.1': a device has function 0 only"),
        (&format!("{DRIVE} -device virtio-blk-pci,drive=d,addr=+2"), "'+2' is no slot"),
        (
            &format!("{DRIVE} -device virtio-blk-pci,drive=d,bus=pci.1"),
            "property 'bus': 'pci.1' is not supported (supported: pcie.0, pci.0)",
        ),
        (
            &format!("{DRIVE} -device virtio-blk-pci,drive=d,disable-modern=on"),
            "property 'disable-modern': 'on'",
        ),
        (
            "-device virtio-rng-pci,id=a,addr=1e -device virtio-rng-pci,id=b,addr=0x1e",
            "-device: virtio-rng-pci,id=b: slot 1e is taken by virtio-rng-pci,id=a",
        ),
        (&"-device virtio-rng-pci ".repeat(32), "-device: virtio-rng-pci: no slot is left (there are 31)"),
        (
            "-device virtio-rng-pci,id=a -device virtio-rng-pci,id=a",
            "-device: virtio-rng-pci,id=a: id 'a' is taken by another -device",
        ),
        ("-device virtio-rng-pci,id=1", "virtio-rng-pci,id=1: id '1' is malformed"),
        // Models.
        (
            "-device e1000",
            "-device: device model 'e1000' is not supported (supported: virtio-blk-pci, virtio-net-pci,",
        ),
        ("-device virtserialport,chardev=x", "device model 'virtserialport' is not supported"),
        ("-device id=x", "-device: the model must stand first, as in virtio-blk-pci,drive=ID"),
        ("-device ''", "-device: the model must stand first"),
        ("-device '{\"id\":\"x\"}'", "-device: the model must stand first"),
        ("-device '{\"driver\":\"virtio-rng-pci\",\"x\":[1]}'", "-device: property 'x': neither text"),
        (
            "-M microvm-0.1 -device virtio-rng-pci",
            "-device: virtio-rng-pci: machine type 'microvm-0.1' has no PCI bus; use -machine microvm",
        ),
        (
            "-drive file=/i,format=raw,id=d -M microvm-0.1",
            "-drive: virtio-blk-pci,drive=d: machine type 'microvm-0.1'",
        ),
        ("-nic tap,ifname=t -M microvm-0.1", "-nic: virtio-net-pci,netdev=nic0: machine type 'microvm-0.1'"),
        // Networks.
        ("-netdev user,id=n", "-netdev: network backend 'user' is not supported (supported: tap;"),
        ("-netdev tap", "-netdev: property 'id' is missing"),
        ("-netdev id=n", "-netdev: property 'type' is missing"),
        ("-netdev tap,id=n", "-netdev: netdev 'n': which tap device? Name it by ifname=NAME, or hand over"),
        (
            "-netdev tap,id=n,ifname=t,script=/etc/up",
            "netdev 'n': property 'script': no script is run; say script=no, and set",
        ),
        (
            "-netdev tap,id=n,ifname=t,downscript=x",
            "property 'downscript': no script is run; say downscript=no",
        ),
        ("-netdev tap,id=n,ifname=t,vhost=maybe", "netdev 'n': property 'vhost': 'maybe'"),
        (
            "-netdev tap,id=n,ifname=t,vhostfd=3,vhostfds=4:5",
            "netdev 'n': properties 'vhostfd' and 'vhostfds' exclude each other",
        ),
        (
            "-netdev tap,id=n,ifname=t,vhost=off,vhostfd=3",
            "netdev 'n': property 'vhostfd': is of no use with vhost=off",
        ),
        (
            "-netdev tap,id=n,fds=3:4,vhostfds=5",
            "netdev 'n': 1 vhost descriptors for 2 queues: pass one for each by vhostfds=N:M:... or have",
        ),
        (
            "-netdev tap,id=n,ifname=t,vhostfd=2",
            "netdev 'n': property 'vhostfd': '2' is no number of a descriptor that the program was started with",
        ),
        ("-netdev tap,id=n,fd=3,vhostfd=3", "netdev 'n': descriptor 3 is named twice"),
        (
            "-netdev tap,id=m,fd=3,vhostfd=4 -netdev tap,id=n,fd=5,vhostfd=4",
            "netdev 'n': descriptor 4 is that of netdev 'm'",
        ),
        ("-netdev tap,id=n,ifname=t,br=x", "-netdev: unknown property 'br' (known: type,"),
        ("-netdev tap,id=n,ifname=t,queues=0", "property 'queues': '0' is no number from 1 to 64"),
        (
            "-netdev tap,id=n,ifname=0123456789abcdef",
            "property 'ifname': '0123456789abcdef' has not 1 to 15 bytes",
        ),
        ("-netdev tap,id=n,ifname=", "property 'ifname': '' has not 1 to 15 bytes"),
        ("-netdev tap,id=n,ifname=tap%d", "property 'ifname': 'tap%d' is no name of an interface"),
        ("-netdev tap,id=n,fd=3,fds=4:5", "netdev 'n': properties 'fd' and 'fds' exclude each other"),
        ("-netdev tap,id=n,fd=3,ifname=t", "netdev 'n': properties 'fd' and 'ifname' exclude each other"),
        ("-netdev tap,id=n,fds=3:4,queues=2", "properties 'fds' and 'queues' exclude each other"),
        (
            "-netdev tap,id=n,fd=2",
            "property 'fd': '2' is no number of a descriptor that the program was started with",
        ),
        ("-netdev tap,id=n,fd=mytap", "property 'fd': 'mytap' is no number of a descriptor"),
        ("-netdev tap,id=n,fds=3:", "property 'fds': '' is no number"),
        ("-netdev tap,id=n,fds=3:+4", "property 'fds': '+4' is no number"),
        ("-netdev tap,id=n,fds=3:3", "netdev 'n': descriptor 3 is named twice"),
        ("-netdev tap,id=n,fd=3 -netdev tap,id=m,fds=4:3", "netdev 'm': descriptor 3 is that of netdev 'n'"),
        ("-netdev tap,id=n,fd=3 -netdev tap,id=n,fd=4", "-netdev: id 'n' is taken by another -netdev"),
        ("-device virtio-net-pci", "-device: virtio-net-pci: property 'netdev' is missing"),
        (
            &format!("{NETDEV} -device virtio-net-pci,netdev=m"),
            "virtio-net-pci,netdev=m: unknown netdev 'm' (known: n)",
        ),
        (
            &format!("{NET} -device virtio-net-pci,netdev=n,id=x"),
            "-device: virtio-net-pci,id=x: netdev 'n' is in use by virtio-net-pci,netdev=n already",
        ),
        (
            &format!("{NET},mac=53:54:00:12:34:56"),
            "property 'mac': '53:54:00:12:34:56' is no address of one interface",
        ),
        (&format!("{NET},mac=00:00:00:00:00:00"), "property 'mac': '00:00:00:00:00:00' is no address"),
        (&format!("{NET},mac=52:54:00:12:34"), "property 'mac': '52:54:00:12:34' is no address"),
        (&format!("{NET},mac=52:54:00:12:34:5"), "property 'mac'"),
        (&format!("{NET},mac=52:54:00:12:34:56:78"), "property 'mac'"),
        (
            "-netdev tap,id=n,fds=3:4 -device virtio-net-pci,netdev=n,mq=off",
            "netdev 'n' has 2 queues, which mq=off leaves unused",
        ),
        (
            "-netdev tap,id=n,fds=3:4 -device virtio-net-pci,netdev=n,vectors=4",
            "property 'vectors': 4 is not what 2 pairs of queues have, which is 6; leave it out",
        ),
        (&format!("{NET},host_mtu=60"), "property 'host_mtu': '60' is no number from 68 to 65535"),
        (
            &format!("{NET},rx_queue_size=64"),
            "property 'rx_queue_size': '64' is not supported (supported: 256)",
        ),
        (
            &format!("{NET},csum=off,host_tso4=on"),
            "virtio-net-pci,netdev=n: property 'host_tso4': on needs csum=on",
        ),
        (
            &format!("{NET},guest_tso4=off,guest_tso6=off,guest_ecn=on"),
            "property 'guest_ecn': on needs guest_tso4=on or",
        ),
        (
            "-netdev tap,id=n,ifname=t,vnet_hdr=off",
            "netdev 'n': property 'vnet_hdr': off is not supported: packets have headers; leave it out",
        ),
        (
            "-drive file=/i,format=raw,id=d,cache=none",
            "drive 'd': property 'cache': 'none' is not supported: images go through the page cache; say cache=writeback",
        ),
        ("-drive file=/i,format=raw,cache=directsync", "say cache=writethrough"),
        (
            "-blockdev file,node-name=f,filename=/i,cache.direct=on",
            "property 'cache.direct': on is not supported",
        ),
        (
            "-blockdev raw,node-name=d,file=f,cache.no-flush=on -blockdev file,node-name=f,filename=/i -device \
             virtio-blk-pci,drive=d",
            "node 'd': cache.no-flush=on is in vain, as its file 'f' is flushed; say cache.no-flush=on for both",
        ),
        (
            "-drive file=/i,format=raw,cache=unsafe,cache.writeback=off",
            "cache.no-flush=on and cache.writeback=off exclude",
        ),
        (
            "-drive file=/i,format=raw,if=none,id=d,cache=unsafe -device virtio-blk-pci,drive=d,write-cache=off",
            "property 'write-cache': off is in vain",
        ),
        ("-nic user", "-nic: network backend 'user' is not supported"),
        ("-nic tap,ifname=t,model=e1000", "-nic: property 'model': 'e1000' is not supported"),
        // Randomness and consoles.
        ("-device virtio-rng-pci,rng=r", "-device: virtio-rng-pci,rng=r: unknown object 'r' (known: none)"),
        ("-object rng-builtin,id=r", "-object: nothing uses 'r'; name it by -device virtio-rng-pci,rng=r"),
        ("-object rng-builtin", "-object: property 'id' is missing"),
        (
            "-object rng-builtin,id=r,filename=/x",
            "-object: unknown property 'filename' (known: qom-type, id)",
        ),
        (
            "-object rng-random,id=r,size=1G",
            "-object: unknown property 'size' (known: qom-type, id, filename)",
        ),
        (
            "-object rng-builtin,id=r -object memory-backend-ram,id=r,size=1G",
            "-object: id 'r' is taken by another -object",
        ),
        (
            "-object memory-backend-ram,id=r,size=1G,filename=/x",
            "-object: property 'filename' is for rng-random only",
        ),
        ("-device virtconsole,chardev=serial0x", "-device: unknown character device 'serial0x'"),
        (
            "-chardev null,id=c -device virtconsole,chardev=c",
            "virtconsole,chardev=c: it needs a -device virtio-serial-pci",
        ),
        (
            "-device virtio-serial-pci -device virtconsole,chardev=serial0",
            "-device: character device 'serial0' is in use already; mux=on",
        ),
        ("-device virtconsole", "-device: virtconsole: property 'chardev' is missing"),
        (
            "-chardev null,id=c -device virtio-serial-pci,id=s -device virtconsole,chardev=c,bus=t.0",
            "there is no virtio-serial-pci of the id 't'",
        ),
        (
            "-chardev null,id=c -device virtconsole,chardev=c,bus=s",
            "property 'bus': 's' is no bus of a virtio-serial-pci",
        ),
        (
            "-chardev null,id=c -device virtio-serial-pci,max_ports=1 -device virtconsole,chardev=c,nr=1",
            "virtconsole,chardev=c: number 1 is beyond max_ports=1",
        ),
        (
            "-chardev null,id=c -chardev null,id=d -device virtio-serial-pci,max_ports=1 -device virtconsole,chardev=c \
             -device virtconsole,chardev=d",
            "virtconsole,chardev=d: no port is left of max_ports=1",
        ),
        (
            "-chardev null,id=c -chardev null,id=d -device virtio-serial-pci -device virtconsole,chardev=c,nr=2 \
             -device virtconsole,chardev=d,nr=2",
            "virtconsole,chardev=d: number 2 is taken by another port",
        ),
        ("-device virtio-serial-pci,max_ports=32", "property 'max_ports': '32' is no number from 1 to 31"),
    ] {
        let text = error(line);
        assert!(text.contains(expected), "{line}: {text}");
    }
}
