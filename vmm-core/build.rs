//! Assembles and links the built-in guest, `payload/payload.S`, for `src/payload.rs` to include.
//!
//! It takes the system's C compiler driver (`cc`, or what `CC` names) for its preprocessor, assembler and
//! linker; the guest itself has no line of C.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let source = Path::new("payload/payload.S");
    let script = Path::new("payload/payload.ld");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={}", source.display());
    println!("cargo:rerun-if-changed={}", script.display());
    println!("cargo:rerun-if-env-changed=CC");

    let out_dir = std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run this through cargo")?;
    let elf = PathBuf::from(out_dir).join("payload.elf");
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let output = Command::new(&cc)
        .args([
            "-nostdlib",
            "-static",
            "-no-pie",
            "-m64",
            "-Wl,--build-id=none",
            "-Wl,-z,max-page-size=0x1000",
        ])
        .arg("-T")
        .args([script, Path::new("-o"), &elf, source])
        .output()
        .map_err(|error| {
            format!(
                "cannot run the C compiler driver `{cc}` to assemble {}: {error}; \
                 install gcc and binutils, or name a driver in CC",
                source.display()
            )
        })?;
    if !output.status.success() {
        return Err(format!(
            "`{cc}` could not assemble and link {} ({}):\n{}",
            source.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    Ok(())
}
