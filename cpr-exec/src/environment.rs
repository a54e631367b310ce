//! The reserved environment variables. Every variable of the prefix is reserved from the first release on, so that a
//! later source can ask an earlier target for something and be refused instead of misunderstood.

use std::ffi::OsString;

/// Variables of this prefix belong to live updates; a program that finds one it does not know must exit.
pub const RESERVED_PREFIX: &str = "CPR_VMM_";
/// Decimal number of the descriptor that holds the early frame.
pub const STATE_VARIABLE: &str = "CPR_VMM_STATE";

/// Decimal numbers of two descriptors, with a comma between them: the manifest to give a verdict on, and where to write that.
pub const PREFLIGHT_VARIABLE: &str = "CPR_VMM_PREFLIGHT";

/// Why the environment is not acceptable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnvironmentError {
    /// A reserved variable that this version does not know.
    #[error(
        "environment variable {} is reserved for live updates and unknown to this version; \
         unset it, or start the version that it is meant for",
        .0.display()
    )]
    Unknown(OsString),
    /// A variable is no descriptor number, or not as many as it should be.
    #[error("environment variable {variable} is '{}', which is no descriptor number", value.display())]
    NotANumber {
        /// The variable.
        variable: &'static str,
        /// What it is.
        value: OsString,
    },
    /// The environment could not be changed.
    #[error("the environment could not be changed: {0}")]
    Unset(#[source] std::io::Error),
}

/// Checks the reserved variables, removes them, and gives the state descriptor's number, if this is an update.
pub(crate) fn take_state_variable() -> Result<Option<i32>, EnvironmentError> {
    let [number] = match take(STATE_VARIABLE)? {
        Some(numbers) => numbers,
        None => return Ok(None),
    };
    Ok(Some(number))
}

/// Checks the reserved variables; if the program is asked, removes them and gives the numbers of the manifest's descriptor and
/// of the verdict's.
pub(crate) fn take_preflight_variable() -> Result<Option<[i32; 2]>, EnvironmentError> {
    if std::env::var_os(PREFLIGHT_VARIABLE).is_none() {
        return Ok(None);
    }
    take(PREFLIGHT_VARIABLE)
}

/// The numbers in the only reserved variable that there may be.
fn take<const N: usize>(variable: &'static str) -> Result<Option<[i32; N]>, EnvironmentError> {
    let mut found = None;
    for (name, value) in reserved() {
        if name != variable {
            return Err(EnvironmentError::Unknown(name));
        }
        let number = |word: &str| word.parse().ok().filter(|&fd: &i32| fd >= 0);
        let numbers =
            value.to_str().and_then(|value| value.split(',').map(number).collect::<Option<Vec<_>>>());
        let numbers = numbers.and_then(|numbers| numbers.try_into().ok());
        found = Some(numbers.ok_or(EnvironmentError::NotANumber { variable, value })?);
    }
    if found.is_some() {
        oslib::environment::remove(variable).map_err(EnvironmentError::Unset)?;
    }
    Ok(found)
}

/// This process's environment without reserved variables.
pub(crate) fn own() -> impl Iterator<Item = (OsString, OsString)> {
    std::env::vars_os().filter(|(name, _)| !is_reserved(name))
}

/// `environment` with the state variable set to `fd`.
pub(crate) fn with_state(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    fd: i32,
) -> Vec<(OsString, OsString)> {
    environment.into_iter().chain([(STATE_VARIABLE.into(), fd.to_string().into())]).collect()
}

fn reserved() -> impl Iterator<Item = (OsString, OsString)> {
    std::env::vars_os().filter(|(name, _)| is_reserved(name))
}

fn is_reserved(name: &OsString) -> bool {
    name.as_encoded_bytes().starts_with(RESERVED_PREFIX.as_bytes())
}
