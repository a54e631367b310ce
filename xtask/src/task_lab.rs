//! `cargo xtask lab`: hands over to [`crate::lab`].

use anyhow::Result;

use crate::lab::{self, LabArgs};

/// Runs the lab; false if what it ran failed. A skipped lab says so itself and is no failure.
pub(crate) fn lab(arguments: LabArgs) -> Result<bool> {
    Ok(!lab::lab(arguments)?.is_failure())
}
