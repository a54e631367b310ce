//! The reserved environment variables. Every variable of the prefix is reserved from the first release on, so that a
//! later source can ask an earlier target for something and be refused instead of misunderstood.

use std::ffi::OsString;

/// Variables of this prefix belong to live updates; a program that finds one it does not know must exit.
pub const RESERVED_PREFIX: &str = "CPR_VMM_";
/// Decimal number of the descriptor that holds the early frame.
pub const STATE_VARIABLE: &str = "CPR_VMM_STATE";

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
    /// The state variable is no descriptor number.
    #[error("environment variable {STATE_VARIABLE} is '{}', which is no descriptor number", .0.display())]
    NotANumber(OsString),
    /// The environment could not be changed.
    #[error("the environment could not be changed: {0}")]
    Unset(#[source] std::io::Error),
}

/// Checks the reserved variables, removes them, and gives the state descriptor's number, if this is an update.
pub(crate) fn take_state_variable() -> Result<Option<i32>, EnvironmentError> {
    let mut state = None;
    for (name, value) in reserved() {
        if name != STATE_VARIABLE {
            return Err(EnvironmentError::Unknown(name));
        }
        let number = value.to_str().and_then(|v| v.parse().ok()).filter(|&fd: &i32| fd >= 0);
        state = Some(number.ok_or(EnvironmentError::NotANumber(value))?);
    }
    if state.is_some() {
        oslib::environment::remove(STATE_VARIABLE).map_err(EnvironmentError::Unset)?;
    }
    Ok(state)
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
