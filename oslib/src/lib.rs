//! oslib
