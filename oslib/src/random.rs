//! Randomness of the kernel, fit for keys. See getrandom(2).

use std::io;

use crate::retry;

/// Fills `buffer`. Waits only while the kernel itself has no randomness yet, early in its boot.
///
/// # Errors
/// Those of getrandom(2).
pub fn fill(mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        let got = retry::on_eintr(|| getrandom(buffer))?;
        buffer = &mut buffer[got..];
    }
    Ok(())
}

#[allow(unsafe_code, reason = "nix has no getrandom(2)")]
fn getrandom(buffer: &mut [u8]) -> nix::Result<usize> {
    // SAFETY: the pointer and the length are those of a buffer that is ours to write for the length of the call.
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    nix::errno::Errno::result(got).map(|got| got.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_buffer_is_filled() {
        // More than one call gives at a time once a signal came, and an odd end.
        let mut buffer = vec![0; (1 << 20) + 7];
        fill(&mut buffer).unwrap();
        assert!(
            buffer
                .chunks(64)
                .filter(|chunk| chunk.len() == 64)
                .all(|chunk| chunk.iter().any(|&byte| byte != 0))
        );
        let mut again = vec![0; 64];
        fill(&mut again).unwrap();
        assert_ne!(buffer[..64], again);
        fill(&mut []).unwrap();
    }
}
