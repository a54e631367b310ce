//! Warnings of what a guest does: as it can do so as often as it likes, few of them are logged.
//!
//! The log is shared with everything else that happens on the host, and may be on a disk: a guest must not be able to fill
//! it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Warnings that are logged in each [`PERIOD`].
const AT_MOST: u32 = 10;
/// How long it takes until others are logged.
const PERIOD: Duration = Duration::from_secs(30);

/// How often one kind of warning has been logged.
#[derive(Debug)]
pub(crate) struct Limit(Mutex<Count>);

#[derive(Debug)]
struct Count {
    /// When the period began.
    began: Option<Instant>,
    logged: u32,
    left_out: u64,
}

impl Limit {
    pub(crate) const fn new() -> Limit {
        Limit(Mutex::new(Count { began: None, logged: 0, left_out: 0 }))
    }

    /// Asks to log one more at this time. If it may be, says how many were left out since the last one.
    pub(crate) fn pass(&self, now: Instant) -> Option<u64> {
        let mut count = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if count.began.is_none_or(|began| now.saturating_duration_since(began) >= PERIOD) {
            (count.began, count.logged) = (Some(now), 0);
        }
        if count.logged == AT_MOST {
            count.left_out += 1;
            return None;
        }
        count.logged += 1;
        Some(std::mem::take(&mut count.left_out))
    }
}

/// As `tracing::warn!`, of something that a guest can bring about as often as it likes: each place logs ten in half a minute,
/// with the number of those that were left out.
macro_rules! warn_of_guest {
    ($($what:tt)*) => {{
        static LIMIT: $crate::guest_log::Limit = $crate::guest_log::Limit::new();
        if let Some(left_out) = LIMIT.pass(std::time::Instant::now()) {
            let left_out = (left_out > 0).then_some(left_out);
            tracing::warn!(left_out, $($what)*);
        }
    }};
}

pub(crate) use warn_of_guest;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_logged_in_part_and_what_was_left_out_is_counted() {
        let (limit, start) = (Limit::new(), Instant::now());
        let logged =
            |after: Duration, times: u32| (0..times).filter_map(|_| limit.pass(start + after)).collect();
        let all: Vec<_> = logged(Duration::ZERO, 1000);
        assert_eq!(all, [0; AT_MOST as usize]);
        let all: Vec<_> = logged(PERIOD - Duration::from_nanos(1), 1);
        assert_eq!(all, [0; 0]);
        let all: Vec<_> = logged(PERIOD, 2);
        assert_eq!(all, [1001 - u64::from(AT_MOST), 0]);
        // Whoever keeps within the limit has everything logged.
        let all: Vec<_> = (2..100).flat_map(|period| logged(period * PERIOD, AT_MOST)).collect::<Vec<u64>>();
        assert_eq!(all, [0; 98 * AT_MOST as usize]);
    }
}
