//! How the link finds out whether a server removes all windows with one message.
//!
//! DMA_UNMAP has a flag for it, which a server may refuse, or ignore and answer with success. UNMAP and DETACH must not
//! succeed while a server has a window, so the link tries the flag once for each connection, in a batch of five messages:
//!
//! 1. DMA_UNMAP of one window, which must succeed.
//! 2. The same again. Its answer is what the server says about a window that it does not have. libvfio-user answers
//!    ENOENT, the `vfio_user` crate errno 0.
//! 3. DMA_UNMAP of all windows.
//! 4. DMA_UNMAP of the lowest window that is left, and 5. of the highest one.
//!
//! The server removes all windows if it answers the third message with success, and 4 and 5 exactly as it has answered 2,
//! which was a refusal with ENOENT, EINVAL or errno 0. Another errno, such as EBUSY, may pass and says nothing about the
//! window. Otherwise the answers to 1, 4 and 5 count as those to any DMA_UNMAP, and the link removes each
//! window by itself, for the rest of the connection. One probe would not do: a server may remove a part of the windows.
//! The answers may come in any order, so the link judges them together.

/// The number of messages of a trial.
pub(super) const MESSAGES: usize = 5;
/// The number of windows that it removes by themselves.
pub(super) const WINDOWS: u64 = 3;

/// The errno of an answer; `None` for a success.
pub(super) type Errno = Option<i32>;

/// What is known of a server's removal of all windows with one message.
#[derive(Debug, Default)]
pub(super) enum UnmapAll {
    /// Nothing.
    #[default]
    Untried,
    /// The trial is in progress.
    Trial {
        /// The number of its first update. The others follow.
        first: u64,
        /// The answers so far.
        answers: [Option<Errno>; MESSAGES],
    },
    /// The server removes all windows.
    Works,
    /// The server refuses the message, or does not do what it says.
    Fails,
}

/// What an answer means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// It belongs to no trial: it counts as that to any DMA_UNMAP.
    Ordinary,
    /// Others must come.
    Open,
    /// All windows are gone.
    AllGone,
    /// The server does not remove all windows at once. The three windows count as removed by themselves, with this outcome.
    Singles(Errno),
}

impl UnmapAll {
    /// A trial whose first update gets the number `first`.
    pub(super) fn trial(first: u64) -> Self {
        Self::Trial {
            first,
            answers: [None; MESSAGES],
        }
    }

    /// Takes the answer to the update `serial`. The last one of a trial ends it.
    pub(super) fn answered(&mut self, serial: u64, errno: Errno) -> Meaning {
        let Self::Trial { first, answers } = self else {
            return Meaning::Ordinary;
        };
        let at = serial.checked_sub(*first).map(usize::try_from);
        let Some(Ok(at)) = at else {
            return Meaning::Ordinary;
        };
        let Some(answer) = answers.get_mut(at) else {
            return Meaning::Ordinary;
        };
        *answer = Some(errno);
        let all = *answers;
        let meaning = match all {
            [Some(single), Some(again), Some(all), Some(low), Some(high)] => {
                conclude(single, again, all, [low, high])
            }
            _ => Meaning::Open,
        };
        match meaning {
            Meaning::AllGone => *self = Self::Works,
            Meaning::Singles(_) => *self = Self::Fails,
            Meaning::Ordinary | Meaning::Open => {}
        }
        meaning
    }
}

fn conclude(single: Errno, again: Errno, all: Errno, probes: [Errno; 2]) -> Meaning {
    let is_unknown = matches!(again, Some(0 | libc::ENOENT | libc::EINVAL));
    let says_gone = |errno: &Errno| all.is_none() && is_unknown && *errno == again;
    if single.is_none() && probes.iter().all(says_gone) {
        return Meaning::AllGone;
    }
    let refused = probes.into_iter().filter(|errno| !says_gone(errno));
    Meaning::Singles(single.or(refused.flatten().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENOENT: Errno = Some(libc::ENOENT);
    const EBUSY: Errno = Some(libc::EBUSY);

    fn outcome(answers: [Errno; MESSAGES]) -> Meaning {
        let mut state = UnmapAll::trial(7);
        assert_eq!(state.answered(6, EBUSY), Meaning::Ordinary);
        assert_eq!(state.answered(12, EBUSY), Meaning::Ordinary);
        let meanings = answers.map({
            let mut serial = 6;
            let state = &mut state;
            move |errno| {
                serial += 1;
                state.answered(serial, errno)
            }
        });
        let [rest @ .., last] = meanings;
        assert_eq!(rest, [Meaning::Open; 4]);
        let works = matches!(state, UnmapAll::Works);
        assert_eq!(works, last == Meaning::AllGone);
        assert!(works || matches!(state, UnmapAll::Fails));
        last
    }

    #[test]
    fn only_refusals_like_that_of_a_window_that_is_gone_show_that_all_are() {
        for gone in [ENOENT, Some(0), Some(libc::EINVAL)] {
            assert_eq!(outcome([None, gone, None, gone, gone]), Meaning::AllGone);
        }
        for (answers, kept) in [
            // Refused, ignored, and a server that knows no unknown window.
            ([None, ENOENT, EBUSY, None, None], None),
            ([None, ENOENT, None, None, None], None),
            ([None, None, None, None, None], None),
            // A part is gone.
            ([None, ENOENT, None, ENOENT, None], None),
            ([None, ENOENT, None, None, ENOENT], None),
            // The server refuses for another reason.
            ([None, ENOENT, None, EBUSY, EBUSY], EBUSY),
            ([None, ENOENT, None, ENOENT, EBUSY], EBUSY),
            ([None, None, None, EBUSY, EBUSY], EBUSY),
            ([None, EBUSY, None, EBUSY, EBUSY], EBUSY),
            ([None, ENOENT, EBUSY, ENOENT, ENOENT], ENOENT),
            // It has not shown that it removes anything.
            ([EBUSY, EBUSY, None, EBUSY, EBUSY], EBUSY),
            ([EBUSY, None, None, None, None], EBUSY),
        ] {
            assert_eq!(outcome(answers), Meaning::Singles(kept), "{answers:?}");
        }
    }

    /// A server may send the answers in any order.
    #[test]
    fn the_last_answer_ends_the_trial_whichever_it_is() {
        let gone = [None, ENOENT, None, ENOENT, ENOENT];
        let kept = [None, ENOENT, None, EBUSY, EBUSY];
        for (answers, end) in [(gone, Meaning::AllGone), (kept, Meaning::Singles(EBUSY))] {
            for last in 0..MESSAGES {
                let mut state = UnmapAll::trial(7);
                for at in (0..MESSAGES).filter(|at| *at != last) {
                    let meaning = state.answered(7 + at as u64, answers[at]);
                    assert_eq!(meaning, Meaning::Open);
                }
                assert_eq!(state.answered(7 + last as u64, answers[last]), end);
            }
        }
    }
}
