//! The QMP client that the QEMU project publishes on PyPI drives updates on one connection.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use testkit::{VmmBuilder, need_kvm, skip_unless};

/// The version that the script was written for.
const PACKAGE: &str = "qemu.qmp==0.0.6";
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qemu_qmp_client.py");
const INSTALLING: Duration = Duration::from_secs(120);
const DRIVING: Duration = Duration::from_secs(120);

/// Runs a program to its end, `limit` at most.
fn run(command: &mut Command, limit: Duration) -> anyhow::Result<Output> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let deadline = Instant::now() + limit;
    // What these programs print fits into a pipe.
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            let output = child.wait_with_output()?;
            let text = [output.stdout, output.stderr].concat();
            bail!("{command:?} does not end: {}", String::from_utf8_lossy(&text));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(child.wait_with_output()?)
}

fn run_well(command: &mut Command, limit: Duration) -> anyhow::Result<String> {
    let output = run(command, limit)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    ensure!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    Ok(stdout)
}

/// A Python with the package, made once and kept with what cargo builds.
fn python_with_client() -> anyhow::Result<PathBuf> {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(PACKAGE.replace("==", "-"));
    let python = |home: &Path| home.join("bin/python");
    if !python(&home).exists() {
        // Under another name until it is complete.
        let draft = tempfile::Builder::new().prefix("venv-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        run_well(Command::new("python3").args(["-m", "venv"]).arg(draft.path()), INSTALLING)?;
        let pip = ["-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--retries", "1"];
        run_well(Command::new(python(draft.path())).args(pip).arg(PACKAGE), INSTALLING)?;
        if std::fs::rename(draft.path(), &home).is_ok() {
            // Nothing is left of it to remove.
            let _ = draft.keep();
        }
    }
    ensure!(python(&home).exists(), "{} is not there", home.display());
    Ok(python(&home))
}

#[test]
fn the_stock_client_of_qemu_drives_updates() -> anyhow::Result<()> {
    need_kvm!();
    let python = python_with_client();
    let reason = python.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
    skip_unless!(python.is_ok(), "no Python with {PACKAGE}: {reason}");

    let mut vmm = VmmBuilder::new().args(&["-name", "stock"]).spawn()?;
    let guest = vmm.guest()?;
    guest.fill(8 << 20, 9)?;
    let mut script = Command::new(python?);
    script.args(["-u", SCRIPT]).arg(vmm.path("qmp")).arg(vmm.pid().to_string()).arg(testkit::binary());
    let told = run_well(script.args(vmm.args()).current_dir(vmm.path("")), DRIVING)
        .with_context(|| format!("cpr-vmm says: {}", vmm.stderr()))?;
    assert!(told.ends_with("ended"), "{told}");
    assert_eq!(told.matches("updated:").count(), 5, "{told}");
    assert_eq!(vmm.wait_exit()?, Some(0), "{}", vmm.stderr());
    Ok(())
}
