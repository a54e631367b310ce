//! cpr-core
