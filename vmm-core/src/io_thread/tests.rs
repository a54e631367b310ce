use super::*;

impl IoThread {
    /// What an exec and the move of this memory into another process do to a thread that rests.
    pub(crate) fn lose_thread(&self) {
        assert_eq!(self.shared.rest.swap(rest::QUIT, Ordering::SeqCst), rest::YES);
        let mut thread = self.thread();
        let thread = thread.as_mut().unwrap();
        thread.handle.unpark();
        while !thread.handle.is_finished() {
            std::thread::yield_now();
        }
        thread.process = 0;
        self.shared.rest.store(rest::YES, Ordering::SeqCst);
    }
}

#[test]
fn an_end_is_news_for_either_direction_but_told_once() {
    let watched = |read, write| Source::Watched { index: 0, read, write };
    let (readable, writable) = (EventSet::IN.bits(), EventSet::OUT.bits());
    let both = watched(Some(1), Some(2));
    assert_eq!(both.narrowed(readable), watched(Some(1), None));
    assert_eq!(both.narrowed(writable), watched(None, Some(2)));
    assert_eq!(both.narrowed(EventSet::HANG_UP.bits()), both);
    assert_eq!(watched(Some(1), Some(1)).narrowed(readable | writable), watched(Some(1), None));
    assert_eq!(watched(Some(1), Some(1)).narrowed(writable), watched(None, Some(1)));
    assert_eq!(watched(None, Some(1)).narrowed(EventSet::ERROR.bits()), watched(None, Some(1)));
    assert_eq!(both.set(), EventSet::IN | EventSet::OUT);
}
