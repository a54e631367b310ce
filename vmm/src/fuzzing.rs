//! The modules of `cpr-vmm` as a library, for the fuzz bodies in `fuzz/bodies`. Nobody else may depend on it: the program
//! has no stable interface but its command line and its monitors.
#![cfg(feature = "fuzzing")]

pub mod app;
pub mod arriving;
pub mod chardev;
pub mod cli;
pub mod devices;
pub mod errors;
pub mod event_loop;
pub mod formats;
pub mod migration;
pub mod monitor;
pub mod sandbox;
pub mod startup;
pub mod trace;
