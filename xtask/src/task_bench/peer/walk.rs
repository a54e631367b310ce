//! The brownout: how long after its first beat a guest that walks its RAM, page after page, is slow, as every page must
//! be mapped anew. It is over when the guest is back at 95 % of its former speed.
//!
//! The payload walks and counts; a thread of ours reads its counter, and its clock, once a millisecond.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use testkit::{Guest, Meter};
use vmm_core::payload::{Command, field};

/// The part of the former speed that counts as full speed again.
const FULL: f64 = 0.95;

/// A speed is measured over this long.
const WINDOW: Duration = Duration::from_millis(5);

/// A guest may have beaten for this long when its VMM tells that the update is done.
const MARGIN: Duration = Duration::from_millis(5);

/// How often the counter is read.
const TICK: Duration = Duration::from_millis(1);

/// How long the former speed is measured.
const BEFORE: Duration = Duration::from_millis(200);

/// The counter at a moment of the guest's clock.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Point {
    tsc: u64,
    pages: u64,
}

/// Runs `update` while the guest walks the first `bytes` of its RAM; gives its brownout, or `None` if that was not over
/// within `limit`.
pub(super) fn brownout(
    guest: &Guest,
    meter: &Meter,
    tsc_hz: f64,
    bytes: u64,
    limit: Duration,
    update: impl FnOnce() -> Result<()>,
) -> Result<Option<Duration>> {
    guest.run(Command::Walk { offset: 0, bytes })?;
    let points = Mutex::new(Vec::new());
    let end = AtomicBool::new(false);
    let found = thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                let vcpu = guest.vcpu(0);
                let point = Point { tsc: vcpu.last_tsc(), pages: vcpu.walked_pages() };
                points.lock().expect("nobody panics with it").push(point);
                thread::sleep(TICK);
            }
        });
        let outcome = (|| {
            thread::sleep(BEFORE);
            let window = cycles(WINDOW, tsc_hz);
            let former = usual_speed(&points.lock().expect("nobody panics with it"), window);
            let mut handed_over = 0;
            meter.gap(guest, || {
                update()?;
                handed_over = guest.vcpu(0).last_tsc();
                Ok(())
            })?;
            let gap_at = guest.vcpu(0).read(field::MAX_GAP_AT_TSC);
            let first_beat = first_beat(gap_at, handed_over, cycles(MARGIN, tsc_hz));
            let deadline = Instant::now() + limit;
            loop {
                let found =
                    full_speed_at(&points.lock().expect("nobody panics with it"), first_beat, window, former);
                if found.is_some() || Instant::now() > deadline {
                    let since = |tsc: u64| tsc.saturating_sub(first_beat) as f64 / tsc_hz;
                    return Ok(found.map(|tsc| Duration::from_secs_f64(since(tsc))));
                }
                thread::sleep(10 * TICK);
            }
        })();
        end.store(true, Ordering::Relaxed);
        outcome
    });
    guest.run(Command::Walk { offset: 0, bytes: 0 })?;
    found
}

/// When the guest beat again. That is where its largest gap ended, unless that was the host's doing, long before the
/// program was replaced.
fn first_beat(gap_at: u64, handed_over: u64, margin: u64) -> u64 {
    if gap_at + margin >= handed_over { gap_at } else { handed_over }
}

fn cycles(time: Duration, tsc_hz: f64) -> u64 {
    (time.as_secs_f64() * tsc_hz) as u64
}

/// Pages per cycle in each window of at least `window` cycles, with the clock at its begin. Windows do not overlap.
fn speeds(points: &[Point], window: u64) -> Vec<(u64, f64)> {
    let mut speeds = Vec::new();
    let Some(mut begin) = points.first().copied() else { return speeds };
    for point in points {
        let cycles = point.tsc.saturating_sub(begin.tsc);
        if cycles >= window {
            speeds.push((begin.tsc, (point.pages - begin.pages) as f64 / cycles as f64));
            begin = *point;
        }
    }
    speeds
}

/// The median speed.
fn usual_speed(points: &[Point], window: u64) -> f64 {
    let mut speeds: Vec<f64> = speeds(points, window).into_iter().map(|(_, speed)| speed).collect();
    speeds.sort_by(f64::total_cmp);
    speeds.get(speeds.len() / 2).copied().unwrap_or(f64::INFINITY)
}

/// When the guest was at full speed again after `first_beat`: at the begin of the first two windows in a row at which it
/// was. One alone may be luck.
fn full_speed_at(points: &[Point], first_beat: u64, window: u64, former: f64) -> Option<u64> {
    let after = points.partition_point(|point| point.tsc < first_beat);
    let speeds = speeds(&points[after..], window);
    let full = |speed: f64| speed >= FULL * former;
    speeds.windows(2).find(|pair| full(pair[0].1) && full(pair[1].1)).map(|pair| pair[0].0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A point every 100 cycles, from pages walked in each step.
    fn points(from: u64, steps: impl IntoIterator<Item = u64>) -> Vec<Point> {
        let mut pages = 1000;
        let mut tsc = from;
        let mut points = vec![Point { tsc, pages }];
        for step in steps {
            pages += step;
            tsc += 100;
            points.push(Point { tsc, pages });
        }
        points
    }

    #[test]
    fn speeds_are_those_of_whole_windows() {
        let points = points(0, [50, 50, 50, 50, 10, 10, 7]);
        assert_eq!(speeds(&points, 200), [(0, 0.5), (200, 0.5), (400, 0.1)]);
        assert_eq!(usual_speed(&points, 200), 0.5);
        assert_eq!(usual_speed(&[], 200), f64::INFINITY);
    }

    #[test]
    fn a_gap_before_the_update_is_not_its_own() {
        // Told at once while the guest still stands, and told somewhat late.
        assert_eq!(first_beat(9000, 5000, 100), 9000);
        assert_eq!(first_beat(4950, 5000, 100), 4950);
        assert_eq!(first_beat(1000, 5000, 100), 5000);
    }

    #[test]
    fn a_brownout_ends_with_two_full_windows() {
        // 4 slow windows, a lucky one, a slow one, and then full speed.
        let slow = [1; 8];
        let steps = slow.into_iter().chain([50, 50, 1, 1]).chain([48; 10]);
        let points = points(5000, steps);
        assert_eq!(full_speed_at(&points, 5000, 200, 0.5), Some(5000 + 1200));
        assert_eq!(full_speed_at(&points[..14], 5000, 200, 0.5), None);
        assert_eq!(full_speed_at(&points, 5000, 200, 0.6), None);
        // What was before the first beat does not count.
        assert_eq!(full_speed_at(&points, 6300, 200, 0.5), Some(6300));
    }
}
