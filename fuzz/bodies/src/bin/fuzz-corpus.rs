//! Writes the seeds and the dictionary of each target into a folder, for libFuzzer, and lists the targets with the longest
//! input that each is worth: what `cargo xtask fuzz` knows of them.

use std::fs;
use std::io;
use std::path::PathBuf;

use fuzz_bodies::TARGETS;

fn main() -> io::Result<()> {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err(io::Error::other("usage: fuzz-corpus FOLDER"));
    };
    for target in TARGETS {
        let seeds = folder.join(target.name);
        fs::create_dir_all(&seeds)?;
        for (number, seed) in (target.seeds)().iter().enumerate() {
            fs::write(seeds.join(format!("seed-{number:02}")), seed)?;
        }
        println!("{} {}", target.name, target.max_len);
        // libFuzzer refuses an empty dictionary.
        if target.words.is_empty() {
            continue;
        }
        let words: String = target.words.iter().map(|word| format!("\"{}\"\n", escaped(word))).collect();
        fs::write(folder.join(format!("{}.dict", target.name)), words)?;
    }
    Ok(())
}

/// A word as libFuzzer's dictionaries have it.
fn escaped(word: &str) -> String {
    word.bytes()
        .map(|byte| match byte {
            b'"' | b'\\' => format!("\\{}", char::from(byte)),
            b' '..=b'~' => char::from(byte).to_string(),
            _ => format!("\\x{byte:02x}"),
        })
        .collect()
}
