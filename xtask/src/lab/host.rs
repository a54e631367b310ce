//! Whether this machine can build the lab (root on Debian, x86-64, apt), and the machine's own Debian mirror: the lab
//! downloads from where the machine's packages come from, and from nowhere else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::steps::run_logged;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Why the lab cannot be built here, or `None` if it can.
pub(super) fn obstacle() -> Option<String> {
    if std::env::consts::ARCH != "x86_64" {
        return Some("the lab is for x86-64".into());
    }
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if !release.lines().any(|line| line == "ID=debian") {
        return Some("it is built from Debian packages and this is not Debian".into());
    }
    if !nix::unistd::geteuid().is_root() {
        return Some("building it needs root".into());
    }
    if find_program("apt-get").is_none() {
        return Some("there is no apt-get".into());
    }
    match debian_source() {
        Ok(Some(_)) => None,
        Ok(None) => Some("no Debian archive among the apt sources of this machine".into()),
        Err(error) => Some(format!("the apt sources of this machine cannot be read: {error:#}")),
    }
}

/// Installs the programs among `wanted` (program, package) that are missing.
pub(super) fn install_missing(wanted: &[(&str, &str)], log: &Path) -> Result<()> {
    let missing: Vec<&str> = wanted
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|&(_, package)| package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let install = || {
        let mut apt = Command::new("apt-get");
        apt.args(["install", "-y", "-q", "--no-install-recommends"]).args(&missing);
        run_logged(apt.env("DEBIAN_FRONTEND", "noninteractive"), log)
    };
    // The package lists may be missing (a fresh container) or out of date: fetch them only then.
    install().or_else(|_| {
        run_logged(Command::new("apt-get").args(["update", "-q"]), log)?;
        install()
    })
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    places.map(|place| place.join(name)).find(|file| file.is_file())
}

/// A Debian archive: a stanza of sources(5) without its suites.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct DebianSource {
    uris: String,
    signed_by: Option<String>,
}

impl DebianSource {
    /// The deb822 stanza that offers `suites` of this archive.
    pub(super) fn stanza(&self, suites: &str) -> String {
        let mut stanza = format!("Types: deb\nURIs: {}\nSuites: {suites}\nComponents: main\n", self.uris);
        if let Some(key) = &self.signed_by {
            stanza.push_str(&format!("Signed-By: {key}\n"));
        }
        stanza
    }
}

/// The first Debian archive (not security, not a third party) in the machine's apt sources.
pub(super) fn debian_source() -> Result<Option<DebianSource>> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut more: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        more.sort();
        files.extend(more);
    }
    for file in files {
        let parse = match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => parse_list,
            Some("sources") => parse_deb822,
            _ => continue,
        };
        if !file.exists() {
            continue;
        }
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        if let Some(mut source) = parse(&text) {
            if source.signed_by.is_none() && Path::new(KEYRING).exists() {
                source.signed_by = Some(KEYRING.into());
            }
            return Ok(Some(source));
        }
    }
    Ok(None)
}

fn is_debian_archive(uri: &str) -> bool {
    // ".list": a mirror list, as Debian's cloud images have it.
    matches!(uri.trim_end_matches('/').rsplit('/').next(), Some("debian" | "debian.list"))
}

fn parse_deb822(text: &str) -> Option<DebianSource> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).find_map(|stanza| {
        let field = |name: &str| {
            let mut lines = stanza.iter().skip_while(|line| {
                !line.split_once(':').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name))
            });
            let mut value = lines.next()?.split_once(':')?.1.trim().to_owned();
            for more in lines.take_while(|line| line.starts_with([' ', '\t'])) {
                value.push('\n');
                value.push_str(more);
            }
            Some(value)
        };
        let words = |name: &str| -> Vec<String> {
            field(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        let enabled = field("Enabled").is_none_or(|value| !value.eq_ignore_ascii_case("no"));
        let uri = words("URIs").into_iter().find(|uri| is_debian_archive(uri))?;
        let usable = enabled
            && words("Types").iter().any(|kind| kind == "deb")
            && words("Components").iter().any(|component| component == "main");
        usable.then(|| DebianSource { uris: uri, signed_by: field("Signed-By") })
    })
}

fn parse_list(text: &str) -> Option<DebianSource> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        let _suite = words.next()?;
        let key = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        (is_debian_archive(uri) && words.any(|component| component == "main"))
            .then(|| DebianSource { uris: uri.into(), signed_by: key.map(str::to_owned) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, key: Option<&str>) -> Option<DebianSource> {
        Some(DebianSource { uris: uri.into(), signed_by: key.map(Into::into) })
    }

    #[test]
    fn the_archive_is_found_in_deb822_sources() {
        let text = "Types: deb\nURIs: http://m.example/debian-security\nSuites: s\nComponents: main\n\n\
                    Enabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: s\nComponents: main\n\n\
                    # a comment\nTypes: deb deb-src\nURIs: http://m.example/debian/\nSuites: a b\n\
                    Components: main contrib\nSigned-By: /k.gpg\n";
        assert_eq!(parse_deb822(text), source("http://m.example/debian/", Some("/k.gpg")));
        assert_eq!(
            parse_deb822("Types: deb\nURIs: http://x.example/nodejs\nSuites: n\nComponents: main\n"),
            None
        );
    }

    #[test]
    fn an_inline_key_is_kept_whole() {
        let text = "Types: deb\nURIs: http://m.example/debian\nSuites: s\nComponents: main\nSigned-By:\n -----BEGIN\n abc\n";
        let source = parse_deb822(text).unwrap();
        assert!(source.stanza("x").ends_with("Signed-By: \n -----BEGIN\n abc\n"), "{}", source.stanza("x"));
    }

    #[test]
    fn the_archive_is_found_in_one_line_sources() {
        let text = "# deb http://no.example/debian s main\ndeb http://m.example/debian-security s main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian bookworm main non-free\n";
        assert_eq!(parse_list(text), source("http://m.example/debian", Some("/k.gpg")));
        assert_eq!(parse_list("deb http://m.example/debian s main"), source("http://m.example/debian", None));
        assert_eq!(parse_list("deb http://m.example/debian s contrib"), None);
    }
}
