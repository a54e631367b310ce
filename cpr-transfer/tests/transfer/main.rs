//! The mode with real processes and sockets, and without a guest: what goes well, and every way in which a peer can
//! fail. Targets are this program once more, which the standard harness with its threads cannot be; peers that keep no
//! rules are threads with a raw socket.

mod machine;
mod peers;
mod scenarios;

fn main() -> std::process::ExitCode {
    scenarios::main()
}
