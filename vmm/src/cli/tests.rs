use std::os::unix::ffi::OsStringExt;

use proptest::prelude::*;

use super::config::*;
use super::*;
use crate::monitor::{Channel, SocketAddress};

mod devices;

fn invoke(line: &str) -> Result<Invocation, CliError> {
    parse(shlex::split(line).unwrap().into_iter().map(OsString::from))
}

#[track_caller]
fn config(line: &str) -> Config {
    match invoke(line) {
        Ok(Invocation::Run(config)) => *config,
        other => panic!("{line}: {other:?}"),
    }
}

fn error(line: &str) -> String {
    match invoke(line) {
        Err(error) => error.to_string(),
        other => panic!("{line}: {other:?}"),
    }
}

fn chardev(id: &str, backend: ChardevBackend, mux: bool) -> ChardevConfig {
    ChardevConfig { id: id.into(), backend, mux }
}

fn stdio(signal: bool) -> ChardevBackend {
    ChardevBackend::Stdio { signal }
}

fn monitor(kind: MonitorKind, chardev: &str) -> MonitorConfig {
    MonitorConfig { kind, chardev: chardev.into() }
}

#[test]
fn defaults() {
    let config = config("");
    assert_eq!(
        config,
        Config {
            machine: MachineConfig { machine_type: None, aux_ram_share: false },
            memory: MemoryConfig {
                id: "microvm.ram".into(),
                size_bytes: 128 << 20,
                backend: MemoryBackend::Ram { share: false },
            },
            cpus: 1,
            boot: BootConfig::default(),
            devices: vec![],
            chardevs: vec![chardev("serial0", ChardevBackend::Null, false)],
            serial: Some("serial0".into()),
            monitors: vec![],
            name: None,
            uuid: None,
            pidfile: None,
            start_paused: false,
            no_reboot: false,
            incoming: None,
            incoming_cpr: None,
            sandbox: None,
            trace: TraceConfig::default(),
            warnings: vec![],
        }
    );
}

#[test]
fn the_seeds_command_line() {
    let config = config(
        "-monitor stdio -object memory-backend-memfd,id=ram0,size=1G -machine memory-backend=ram0 \
         -machine aux-ram-share=on -incoming file:vm.state",
    );
    assert_eq!(config.memory.id, "ram0");
    assert_eq!(config.memory.size_bytes, 1 << 30);
    assert_eq!(config.memory.backend, MemoryBackend::Memfd { share: true, hugetlb: None });
    assert!(config.machine.aux_ram_share);
    assert_eq!(config.monitors, [monitor(MonitorKind::Hmp, "compat_monitor0")]);
    assert!(config.chardevs.contains(&chardev("compat_monitor0", stdio(true), false)));
    let channel = Channel::File { path: "vm.state".into(), offset: 0 };
    assert_eq!(config.incoming, Some(Incoming::Channel(channel)));
}

#[test]
fn every_option_at_once() {
    let config = config(
        "--machine microvm,accel=kvm,memory-backend=m -accel kvm -cpu host -smp 4,sockets=2,cores=2 -m 1G \
         -object '{\"qom-type\":\"memory-backend-file\",\"id\":\"m\",\"size\":1073741824,\"share\":true,\"mem-path\":\"/dev/shm/x\"}' \
         -name guest=a,,b -uuid 12345678-1234-1234-1234-123456789abc -kernel k -append 'a=b, c' -initrd i -S -no-reboot \
         -serial unix:/s,server=on,wait=off -qmp unix:/q1,server,nowait -qmp unix:/q2,server=on -monitor none \
         -chardev socket,id=c,path=/c -mon c -chardev file,id=f,path=/f -chardev null,id=n -display none -nodefaults \
         -no-user-config -pidfile p -trace 'enable=cpr*,file=t' -trace kvm -D log -sandbox on,spawn=deny -incoming defer",
    );
    let socket = |path: &str, server, wait| ChardevBackend::Socket { path: path.into(), server, wait };
    assert_eq!(
        config,
        Config {
            machine: MachineConfig { machine_type: None, aux_ram_share: false },
            memory: MemoryConfig {
                id: "m".into(),
                size_bytes: 1 << 30,
                backend: MemoryBackend::File { path: "/dev/shm/x".into(), share: true },
            },
            cpus: 4,
            boot: BootConfig {
                kernel: Some("k".into()),
                append: Some("a=b, c".into()),
                initrd: Some("i".into()),
            },
            devices: vec![],
            chardevs: vec![
                chardev("serial0", socket("/s", true, false), false),
                chardev("compat_monitor0", socket("/q1", true, false), false),
                chardev("compat_monitor1", socket("/q2", true, true), false),
                chardev("c", socket("/c", false, false), false),
                chardev("f", ChardevBackend::File { path: "/f".into() }, false),
                chardev("n", ChardevBackend::Null, false),
            ],
            serial: Some("serial0".into()),
            monitors: vec![
                monitor(MonitorKind::Qmp, "compat_monitor0"),
                monitor(MonitorKind::Qmp, "compat_monitor1"),
                monitor(MonitorKind::Hmp, "c"),
            ],
            name: Some("a,b".into()),
            uuid: Some("12345678-1234-1234-1234-123456789abc".parse().unwrap()),
            pidfile: Some("p".into()),
            start_paused: true,
            no_reboot: true,
            incoming: Some(Incoming::Defer),
            incoming_cpr: None,
            sandbox: Some(SandboxConfig { spawn: true, ..SandboxConfig::default() }),
            trace: TraceConfig {
                patterns: vec!["cpr*".into(), "kvm".into()],
                file: Some("t".into()),
                log_file: Some("log".into()),
            },
            warnings: vec![],
        }
    );
}

#[test]
fn front_end_defaults_are_qemus() {
    let with = |line: &str| {
        let config = config(line);
        (config.chardevs, config.serial, config.monitors)
    };
    let serial0 = Some("serial0".to_owned());
    let muxed = (
        vec![chardev("serial0", stdio(false), true)],
        serial0.clone(),
        vec![monitor(MonitorKind::Hmp, "serial0")],
    );
    assert_eq!(with("-nographic"), muxed);
    assert_eq!(with("-serial mon:stdio"), muxed);
    assert_eq!(with("-nographic -serial mon:stdio"), muxed);
    assert_eq!(
        with("-nographic -serial null"),
        (
            vec![
                chardev("serial0", ChardevBackend::Null, false),
                chardev("compat_monitor0", stdio(true), false)
            ],
            serial0.clone(),
            vec![monitor(MonitorKind::Hmp, "compat_monitor0")]
        )
    );
    assert_eq!(
        with("-nographic -monitor none"),
        (vec![chardev("serial0", stdio(true), false)], serial0.clone(), vec![])
    );
    assert_eq!(with("-nographic -nodefaults"), (vec![], None, vec![]));
    assert_eq!(with("-serial none"), (vec![], None, vec![]));
    assert_eq!(
        with("-chardev stdio,id=t,mux=on,signal=off -serial chardev:t -mon chardev=t,mode=readline"),
        (vec![chardev("t", stdio(false), true)], Some("t".into()), vec![monitor(MonitorKind::Hmp, "t")])
    );
    assert_eq!(
        with("-serial file:/a,b -qmp stdio"),
        (
            vec![
                chardev("serial0", ChardevBackend::File { path: "/a,b".into() }, false),
                chardev("compat_monitor0", stdio(true), false)
            ],
            serial0,
            vec![monitor(MonitorKind::Qmp, "compat_monitor0")]
        )
    );
}

#[test]
fn sizes_and_counts() {
    assert_eq!(config("-m 512").memory.size_bytes, 512 << 20);
    assert_eq!(config("-m size=1.5G").memory.size_bytes, 3 << 29);
    assert_eq!(config("-smp cpus=64").cpus, 64);
    assert_eq!(config("-smp sockets=2,cores=3,threads=2").cpus, 12);
    assert_eq!(config("-smp 2,maxcpus=2").cpus, 2);
    let huge =
        "-object memory-backend-memfd,id=r,size=1G,hugetlb=on,hugetlbsize=2M,share=off -M memory-backend=r";
    let hugetlb = Some(HugePages { page_bytes: Some(2 << 20) });
    assert_eq!(config(huge).memory.backend, MemoryBackend::Memfd { share: false, hugetlb });
}

#[test]
fn incoming_forms() {
    let from = |value: &str| config(&format!("-incoming '{value}'")).incoming.unwrap();
    let file = |offset| Incoming::Channel(Channel::File { path: "/f".into(), offset });
    assert_eq!(from("defer"), Incoming::Defer);
    assert_eq!(from("memfd:"), Incoming::Channel(Channel::Memfd));
    assert_eq!(from("file:/f,offset=4K"), file(4096));
    assert_eq!(
        from(r#"{"channel-type":"main","addr":{"transport":"file","filename":"/f","offset":7}}"#),
        file(7)
    );
    assert_eq!(from("main,addr.transport=file,addr.filename=/f,addr.offset=8"), file(8));
    for (value, needle) in [
        ("tcp:0:4444", "'tcp' in 'tcp:0:4444' (supported: file:"),
        ("unix:/x", "'unix:/x': a socket as main channel needs a cpr channel"),
        ("later", "'later'"),
        ("main,addr.transport=rdma,addr.path=/x", "transport 'rdma' is not supported"),
        (r#"{"channel-type":"cpr","addr":{"transport":"socket"}}"#, "'addr.type' is missing"),
        ("cpr,addr.transport=socket,addr.type=unix,addr.path=/x", "needs a main channel"),
        ("{", "bad JSON"),
    ] {
        let text = error(&format!("-incoming '{value}'"));
        assert!(text.starts_with("-incoming: ") && text.contains(needle), "{text}");
    }
}

#[test]
fn two_channels_for_a_transfer() {
    let dotted = "cpr,addr.transport=socket,addr.type=unix,addr.path=/c,,d";
    let json = r#"'{"channel-type":"cpr","addr":{"transport":"socket","type":"unix","path":"/c,d"}}'"#;
    for (main, incoming) in [
        ("defer", Incoming::Defer),
        ("memfd:", Incoming::Channel(Channel::Memfd)),
        ("unix:/m", Incoming::Channel(Channel::Unix { path: "/m".into() })),
        (
            "main,addr.transport=socket,addr.type=unix,addr.path=/m",
            Incoming::Channel(Channel::Unix { path: "/m".into() }),
        ),
    ] {
        for line in
            [format!("-incoming {main} -incoming {dotted}"), format!("-incoming {json} -incoming {main}")]
        {
            let config = config(&line);
            assert_eq!(config.incoming, Some(incoming.clone()), "{line}");
            assert_eq!(config.incoming_cpr, Some(SocketAddress::Unix("/c,d".into())), "{line}");
        }
    }
    let by_fd = config("-incoming defer -incoming cpr,addr.transport=socket,addr.type=fd,addr.str=7");
    assert_eq!(by_fd.incoming_cpr, Some(SocketAddress::Fd("7".into())));
    for (line, needle) in [
        (format!("-incoming file:x -incoming {dotted}"), "'file:x': with a cpr channel"),
        (format!("-incoming defer -incoming {dotted} -incoming {dotted}"), "there is one cpr channel"),
        (format!("-incoming {dotted} -incoming defer -incoming memfd:"), "given twice"),
    ] {
        let text = error(&line);
        assert!(text.starts_with("-incoming: ") && text.contains(needle), "{text}");
    }
}

#[test]
fn sandboxes() {
    let of = |line: &str| config(line).sandbox;
    let default = SandboxConfig::default();
    assert_eq!(of("-sandbox on"), Some(default));
    assert_eq!(of("-sandbox enable=on,obsolete=deny,spawn=allow"), Some(default));
    assert_eq!(of("-sandbox on,obsolete=allow"), Some(SandboxConfig { obsolete: false, ..default }));
    for privileges in ["deny", "children"] {
        let found = of(&format!("-sandbox on,elevateprivileges={privileges}"));
        assert_eq!(found, Some(SandboxConfig { elevate_privileges: true, ..default }));
    }
    // What was denied stays denied.
    let both = SandboxConfig { spawn: true, resource_control: true, ..default };
    assert_eq!(of("-sandbox on,spawn=deny -sandbox on,resourcecontrol=deny,obsolete=allow"), Some(both));
    assert_eq!(of("-sandbox on -sandbox off,spawn=deny"), Some(default));
    assert_eq!(of("-sandbox off,spawn=deny"), None);
}

#[test]
fn mistakes_are_named() {
    for (line, expected) in [
        ("-sandbox maybe", "-sandbox: property 'enable': 'maybe' is neither on nor off"),
        ("-sandbox spawn=deny", "-sandbox: on or off must be said, as in on,spawn=deny"),
        ("-sandbox ''", "-sandbox: on or off must be said"),
        ("-sandbox on,spawn=children", "-sandbox: property 'spawn': 'children' is neither allow nor deny"),
        ("-sandbox off,spawn=no", "-sandbox: property 'spawn': 'no' is neither allow nor deny"),
        (
            "-sandbox on,elevateprivileges=on",
            "-sandbox: property 'elevateprivileges': 'on' is not allow, deny or children",
        ),
        (
            "-sandbox on,network=deny",
            "-sandbox: unknown property 'network' (known: enable, obsolete, elevateprivileges, spawn, resourcecontrol)",
        ),
        ("-foo", "-foo: unknown option (-help lists them)"),
        ("--foo", "--foo: unknown option (-help lists them)"),
        ("disk.img", "unexpected argument 'disk.img' (options start with '-'; -help lists them)"),
        ("''", "unexpected argument ''"),
        ("-", "-: unknown option"),
        ("-m", "-m: a value must follow (-m [size=]SIZE)"),
        ("-M foo=1", "-M: unknown property 'foo' (known: type, memory-backend, aux-ram-share, accel)"),
        (
            "-machine q35",
            "-machine: machine type 'q35' is not supported (supported: microvm, microvm-0.1, microvm-0.2)",
        ),
        (
            "-M microvm-9.9",
            "-M: machine type 'microvm-9.9' is not supported (supported: microvm, microvm-0.1, microvm-0.2)",
        ),
        ("-machine aux-ram-share=maybe", "-machine: property 'aux-ram-share': 'maybe' is neither on nor off"),
        ("-machine memory-backend=x", "-machine: unknown memory backend 'x' (known: none)"),
        ("-machine accel=tcg", "-machine: accelerator 'tcg' is not supported (supported: kvm)"),
        ("-accel hvf", "-accel: accelerator 'hvf'"),
        ("-cpu max", "-cpu: CPU model 'max' is not supported (supported: host"),
        ("-smp 0", "-smp: property 'cpus': '0' is no number from 1 to 64"),
        ("-smp 65", "-smp: property 'cpus': '65'"),
        ("-smp 4,cores=3", "-smp: sockets * cores * threads is 3, but the number of vCPUs is 4"),
        ("-smp 2,maxcpus=4", "-smp: maxcpus is 4"),
        ("-smp sockets=64,cores=64", "-smp: 4096 vCPUs are too many"),
        ("-m 0", "-m: size 0 is no multiple"),
        ("-m 1Q", "-m: property 'size': '1Q' is no size"),
        ("-m 1000B", "-m: size 1000 is no multiple of the page size 4K"),
        ("-m 1G,slots=3", "-m: unknown property 'slots' (known: size)"),
        (
            "-object rng-egd,id=r",
            "-object: object type 'rng-egd' is not supported (supported: memory-backend-memfd,",
        ),
        ("-object memory-backend-memfd,size=1G", "-object: property 'id' is missing"),
        ("-object memory-backend-memfd,id=1,size=1G", "-object: id '1' is malformed"),
        ("-object memory-backend-memfd,id=r", "-object: 'r': property 'size' is missing"),
        (
            "-object memory-backend-memfd,id=r,size=1G",
            "-object: nothing uses 'r'; name it by -machine memory-backend=r",
        ),
        ("-object memory-backend-file,id=r,size=1G", "-object: 'r': property 'mem-path' is missing"),
        (
            "-object memory-backend-ram,id=r,size=1G,mem-path=/x",
            "-object: 'r': property 'mem-path' is for memory-backend-file",
        ),
        ("-object memory-backend-ram,id=r,size=1G,hugetlb=on", "-object: 'r': properties 'hugetlb'"),
        (
            "-object memory-backend-memfd,id=r,size=1G,hugetlbsize=2M",
            "-object: 'r': property 'hugetlbsize' needs hugetlb=on",
        ),
        ("-object memory-backend-memfd,id=r,size=1G,hugetlb=on,hugetlbsize=3M", "3M is no page size"),
        (
            "-object memory-backend-memfd,id=r,size=1M,hugetlb=on,hugetlbsize=2M -M memory-backend=r",
            "-object: 'r': size 1M is no multiple of the page size 2M",
        ),
        (
            "-object memory-backend-memfd,id=r,size=1G -object memory-backend-ram,id=r,size=1G",
            "-object: id 'r' is taken",
        ),
        (
            "-object memory-backend-memfd,id=r,size=1G -M memory-backend=q",
            "-machine: unknown memory backend 'q' (known: r)",
        ),
        (
            "-object memory-backend-memfd,id=r,size=1G -M memory-backend=r -m 2G",
            "-m: 2G is not the size of memory backend 'r', which is 1G",
        ),
        ("-object memory-backend-memfd,id=r,size=1G,foo=1", "-object: unknown property 'foo'"),
        ("-object '{\"qom-type\":1'", "-object: bad JSON"),
        ("-object '{\"qom-type\":\"memory-backend-ram\",\"id\":[]}'", "-object: property 'id': neither text"),
        ("-uuid 12", "-uuid: '12' is no UUID"),
        ("-initrd x", "-initrd: makes sense with -kernel only"),
        ("-kernel ''", "-kernel: a path must not be empty"),
        ("-serial null -serial null", "-serial: 'null': there is one serial line"),
        ("-serial pty", "-serial: 'pty' is not supported (supported: stdio, unix:PATH,"),
        ("-serial tcp:1:2", "-serial: 'tcp:1:2' is not supported"),
        ("-serial unix:", "-serial: backend 'socket': property 'path' is missing"),
        ("-serial unix:/x,wait=off", "-serial: property 'wait' makes sense with server=on only"),
        (
            "-serial unix:/x,telnet=on",
            "-serial: backend 'socket': unknown property 'telnet' (known: path, server, wait)",
        ),
        (
            "-serial stdio -monitor stdio",
            "-monitor: stdio is in use by 'serial0' already; share it by -serial mon:stdio",
        ),
        ("-nographic -qmp stdio", "-nographic: stdio is in use by 'compat_monitor0'"),
        ("-serial chardev:x", "-serial: unknown character device 'x' (known: none)"),
        ("-mon chardev=x", "-mon: unknown character device 'x' (known: serial0)"),
        ("-mon mode=control", "-mon: property 'chardev' is missing"),
        (
            "-chardev null,id=a -mon a,mode=pretty",
            "-mon: mode 'pretty' is not supported (supported: readline, control)",
        ),
        ("-chardev null,id=a -mon a -mon a", "-mon: character device 'a' is in use already; mux=on"),
        ("-chardev null,id=a -chardev null,id=a", "-chardev: id 'a' is taken"),
        ("-chardev null,id=serial0", "-chardev: id 'serial0' is taken"),
        ("-chardev null", "-chardev: property 'id' is missing"),
        ("-chardev id=a", "-chardev: the backend must be named (supported: stdio, socket, file, null)"),
        ("-chardev vc,id=a", "-chardev: backend 'vc' is not supported (supported:"),
        ("-chardev null,id=a,path=/x", "-chardev: backend 'null': unknown property 'path' (known: none)"),
        ("-chardev socket,id=a,host=x", "-chardev: unknown property 'host'"),
        ("-display gtk", "-display: 'gtk' is not supported (supported: none)"),
        ("-incoming defer -incoming defer", "-incoming: 'defer': given twice"),
        ("-name a,process=b", "-name: unknown property 'process' (known: guest)"),
        ("-trace events=x", "-trace: unknown property 'events' (known: enable, file)"),
    ] {
        let text = error(line);
        assert!(text.contains(expected), "{line}: {text}");
    }
    let long = error(&format!("-serial unix:/{}", "x".repeat(107)));
    assert!(long.contains("longer than 107 bytes"), "{long}");
    let bytes = OsString::from_vec(b"\xff".to_vec());
    assert!(matches!(parse([bytes]), Err(CliError::NotUtf8(_))));
}

#[test]
fn help_and_version() {
    assert_eq!(
        invoke("-S --version -nonsense"),
        Ok(Invocation::Version(format!("{}\n", crate::monitor::PACKAGE)))
    );
    for line in ["-h", "-help", "--help", "--h"] {
        let Ok(Invocation::Help(text)) = invoke(line) else { panic!("{line}") };
        assert_eq!(text, help::text());
    }
}

#[test]
fn machine_types_have_versions_and_an_alias() {
    let of = |line| config(line).machine.machine_type.map(MachineType::name);
    assert_eq!(of(""), None);
    assert_eq!(of("-M microvm"), None);
    assert_eq!(of("-M microvm-0.1"), Some("microvm-0.1"));
    assert_eq!(of("-machine microvm-0.1 -machine type=microvm"), None);
    assert_eq!(config("-M microvm").machine.machine_type(), MachineType::newest());
    for line in ["-M help", "-machine type=? -nonsense"] {
        let Ok(Invocation::Help(text)) = invoke(line) else { panic!("{line}") };
        assert_eq!(
            text,
            "Supported machines are:\nmicrovm              alias of microvm-0.2, the default\nmicrovm-0.2\nmicrovm-0.1\n"
        );
    }
}

#[test]
fn help_and_parser_cannot_diverge() {
    let text = help::text();
    assert!(text.lines().all(|line| line.len() <= 120), "help has overlong lines");
    for option in OPTIONS {
        let names: Vec<_> = option.names.iter().map(|name| format!("-{name}")).collect();
        assert!(text.contains(&format!("\n  {}", names.join(", "))), "{names:?}");
        assert!(!option.help.is_empty());
        for (index, name) in option.names.iter().enumerate() {
            let all = OPTIONS.iter().flat_map(|option| option.names);
            assert_eq!(all.filter(|other| *other == name).count(), 1, "{name} is there twice");
            assert!(index == 0 || !name.is_empty());
            // Every option that the help shows is one that the parser knows, and takes a value as shown.
            match invoke(&format!("-{name}")) {
                Err(CliError::MissingValue { .. }) => assert!(option.metavar.is_some()),
                Ok(_) => assert!(option.metavar.is_none()),
                Err(other) => panic!("-{name}: {other}"),
            }
        }
        for property in option.properties {
            assert!(!property.help.is_empty());
            if option.properties.len() > 1 {
                assert!(
                    text.contains(&format!("{}={}", property.name, property.metavar)),
                    "{}",
                    property.name
                );
            }
            let line = format!("-{} {}=x", option.names[0], property.name);
            if let Err(error) = invoke(&line) {
                assert!(!error.to_string().contains("unknown property"), "{line}: {error}");
            }
        }
    }
}

/// Arguments made of what options are made of.
fn argument() -> impl Strategy<Value = String> {
    let names: Vec<&str> = OPTIONS.iter().flat_map(|option| option.names).copied().collect();
    let words: Vec<&str> = OPTIONS
        .iter()
        .flat_map(|option| option.properties)
        .chain(models::MODELS.iter().flat_map(models::Model::properties))
        .map(|property| property.name)
        .chain([
            "stdio",
            "mon:",
            "unix:",
            "file:",
            "chardev:",
            "memory-backend-memfd",
            "on",
            "1G",
            "{",
            "}",
            "null",
            "virtio-blk-pci",
            "virtio-net-pci",
            "virtconsole",
            "raw",
            "tap",
            "rng-random",
        ])
        .collect();
    let text = prop::collection::vec(
        prop_oneof![prop::sample::select(words).prop_map(str::to_owned), "[=,:{}\"0-9a-z]", ".{0,3}"],
        0..8,
    );
    prop_oneof![
        2 => prop::sample::select(names).prop_map(|name| format!("-{name}")),
        3 => text.prop_map(|words| words.concat()),
        1 => any::<String>(),
    ]
}

proptest! {
    #[test]
    fn anything_is_survived(arguments in prop::collection::vec(argument(), 0..12)) {
        let _ = parse(arguments.into_iter().map(OsString::from));
    }

    #[test]
    fn any_bytes_are_survived(arguments: Vec<Vec<u8>>) {
        let _ = parse(arguments.into_iter().map(OsString::from_vec));
    }

    /// Whatever an option is given, the error names the option.
    #[test]
    fn errors_name_their_option(option in prop::sample::select(OPTIONS.iter().map(|option| option.names[0]).collect::<Vec<_>>()), value: String) {
        let arguments = [format!("-{option}"), value].map(OsString::from);
        if let Err(CliError::Invalid { option: named, .. }) = parse(arguments) {
            prop_assert!(named.starts_with('-'));
        }
    }
}
