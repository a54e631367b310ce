//! Takes the uncompressed kernel out of a bzImage. It follows the boot header (`Documentation/arch/x86/boot.rst`)
//! and knows zstd only, which is what Debian's kernels are compressed with.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

const SETUP_SECTORS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL_VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Writes the ELF kernel inside `bzimage` to `vmlinux`.
pub(super) fn extract(bzimage: &Path, vmlinux: &Path) -> Result<()> {
    let image = std::fs::read(bzimage).with_context(|| format!("cannot read {}", bzimage.display()))?;
    let payload =
        payload(&image).with_context(|| format!("{} is no kernel we can open", bzimage.display()))?;
    let out =
        std::fs::File::create(vmlinux).with_context(|| format!("cannot create {}", vmlinux.display()))?;
    let mut zstd = Command::new("zstd")
        .args(["-d", "-q", "-c"])
        .stdin(Stdio::piped())
        .stdout(out)
        .spawn()
        .context("cannot run zstd (apt-get install zstd)")?;
    let fed = zstd.stdin.take().expect("stdin is a pipe").write_all(payload);
    let status = zstd.wait()?;
    ensure!(status.success(), "zstd could not decompress {}", bzimage.display());
    fed?;
    Ok(())
}

/// The compressed kernel within a bzImage, without the four bytes of uncompressed size that follow it.
fn payload(image: &[u8]) -> Result<&[u8]> {
    let u32_at = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("the file ends within its header")?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes")) as usize)
    };
    ensure!(image.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS"), "no boot header");
    ensure!(u32_at(PROTOCOL_VERSION)? & 0xffff >= 0x208, "boot protocol older than 2.08");
    let start = (usize::from(image[SETUP_SECTORS]) + 1) * 512 + u32_at(PAYLOAD_OFFSET)?;
    let length = u32_at(PAYLOAD_LENGTH)?;
    let Some(payload) = length.checked_sub(4).and_then(|length| image.get(start..start + length)) else {
        bail!("the payload lies outside the file");
    };
    ensure!(payload.starts_with(&ZSTD_MAGIC), "it is not compressed with zstd");
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::payload;

    fn image(sectors: u8, offset: u32, length: u32, body: &[u8]) -> Vec<u8> {
        let mut image = vec![0; (usize::from(sectors) + 1) * 512];
        image[0x1f1] = sectors;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(body);
        image
    }

    #[test]
    fn the_payload_is_found_without_its_size_suffix() {
        let image = image(2, 1, 8, b"x\x28\xb5\x2f\xfdSIZE");
        assert_eq!(payload(&image).unwrap(), b"\x28\xb5\x2f\xfd");
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(payload(b"").is_err());
        assert!(payload(&[0; 4096]).is_err());
        assert!(payload(&image(2, 0, 100, b"short")).is_err());
        assert!(payload(&image(2, 0, 8, b"gzipSIZE")).is_err());
        assert!(payload(&image(2, 0, 2, b"")).is_err());
    }
}
