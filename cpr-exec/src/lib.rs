//! cpr-exec
