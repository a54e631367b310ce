#![allow(unsafe_code, reason = "mallopt is called directly")]
//! How the C library's allocator behaves.

/// Sets the allocator up for a program with few allocating threads, whose pauses count:
/// - one arena for all threads, because to make one takes a new thread as long as to start;
/// - what was freed stays mapped, up to `kept` bytes, so that the next one to need it finds its pages.
///
/// Best before the first thread is started.
pub fn tune_allocator(kept: usize) {
    let kept = libc::c_int::try_from(kept).unwrap_or(libc::c_int::MAX);
    for (parameter, value) in
        [(libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, kept), (libc::M_MMAP_THRESHOLD, kept)]
    {
        // SAFETY: takes no pointer. What is refused stays as it was, which is slower.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Has the allocator map `bytes` that it will give out next, so that nobody waits for pages then. After
/// [`tune_allocator`], and no more than what that keeps.
pub fn warm_allocator(bytes: usize) {
    drop(std::hint::black_box(vec![1u8; bytes]));
}
