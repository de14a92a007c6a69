//! Eventfds that another process has given to this one, such as the call descriptors of a VMM.
//!
//! A `write` to an eventfd blocks while its counter is full. `O_NONBLOCK` prevents that, but it is a property of the
//! open file, which the peer shares: the peer can fill the counter and clear the flag at any time, also between a look
//! at both and the `write`. The kernel supports no `RWF_NOWAIT` for such a `write`.
//!
//! So this process does not write. The kernel signals the eventfd (`eventfd_signal`), as it does for its own devices:
//! that never waits, and a counter that is full stays full. Asynchronous I/O asks it to: an operation signals an
//! eventfd when it completes. The operation here reads no bytes from a pipe of our own, so it completes at once.
//!
//! The kernel takes tens of milliseconds to end a process with a context of asynchronous I/O: it waits for two grace periods of
//! RCU (35 ms on Linux 6.18 with two processors). A process that leaves its VM to the next one gives the context back
//! before it stops serving ([`retire`]), so that the guest does not wait for that.
//!
//! Not io_uring: many hosts disable it, and a ring serves one eventfd. Not a thread for each peer that may block in
//! `write`: the end of the connection would have to interrupt it.

#![expect(
    unsafe_code,
    reason = "io_setup, io_submit, io_getevents, io_destroy, which no library offers"
)]

use std::io::{self, PipeReader};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_long, c_ulong};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// `IOCB_CMD_PREAD` of `linux/aio_abi.h`.
const READ: u16 = 0;
/// `IOCB_CMD_PWRITE`.
const WRITE: u16 = 1;
/// `IOCB_FLAG_RESFD`: the operation has an eventfd.
const HAS_EVENT: u32 = 1;
/// How often an operation is tried while other threads take the room that this one makes.
const TRIES: usize = 16;

static KERNEL: OnceLock<AsyncIo> = OnceLock::new();

/// An eventfd that another process shares. No method waits for that process.
#[derive(Debug)]
pub struct PeerEvent(OwnedFd);

impl PeerEvent {
    /// Takes over `fd`.
    ///
    /// # Errors
    /// `InvalidInput`: it is not an eventfd. Others: see [`prepare`].
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        check(fd.as_fd())?;
        Ok(Self(fd))
    }

    /// Adds 1 to the counter. A counter that is full has been signalled.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn signal(&self) -> io::Result<()> {
        async_io()?.signal(self.0.as_fd())
    }
}

impl AsFd for PeerEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Checks that `fd` is an eventfd. For a descriptor that this process only passes on, and never signals.
///
/// # Errors
/// As for [`PeerEvent::new`].
pub fn check(fd: BorrowedFd<'_>) -> io::Result<()> {
    let kernel = async_io()?;
    // The kernel looks at the eventfd first, and then finds that the pipe cannot be written to.
    let refusal = kernel.start(WRITE, fd).err();
    if kernel.is_retired() {
        // The next process checks it: this one ends at once, and must not refuse what the VMM may send.
        return Ok(());
    }
    match refusal.as_ref().and_then(io::Error::raw_os_error) {
        Some(libc::EBADF) => Ok(()),
        Some(libc::EINVAL) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not an eventfd",
        )),
        _ => Err(refusal.unwrap_or_else(|| io::Error::other("a pipe was written to"))),
    }
}

/// Sets up what [`PeerEvent`] needs. Without this call the first [`PeerEvent`] does it, which the sandbox does not
/// allow.
///
/// # Errors
/// The kernel has no asynchronous I/O, or its limit for all processes (`fs.aio-max-nr`) is reached.
pub fn prepare() -> io::Result<()> {
    async_io().map(drop)
}

/// Gives back what [`prepare`] has set up. Takes as long as the kernel, and must be called by a thread that serves nobody. From
/// now on signals are written, which waits for a peer that makes its counter full at the wrong moment: the process must end
/// soon, whether its threads do or not.
pub fn retire() {
    if let Some(kernel) = KERNEL.get() {
        kernel.retire();
    }
}

fn async_io() -> io::Result<&'static AsyncIo> {
    if let Some(kernel) = KERNEL.get() {
        return Ok(kernel);
    }
    let made = AsyncIo::new()?;
    Ok(KERNEL.get_or_init(|| made))
}

/// A context of asynchronous I/O.
#[derive(Debug)]
struct AsyncIo {
    context: c_ulong,
    /// The end of a pipe that reads, and that fails to write.
    pipe: PipeReader,
    /// The context is given back.
    retired: AtomicBool,
}

/// `struct iocb` of `linux/aio_abi.h`.
#[derive(Default)]
#[repr(C)]
struct Operation {
    data: u64,
    key_and_flags: [u32; 2],
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event: u32,
}

const _: () = assert!(size_of::<Operation>() == 64);

/// `struct io_event`.
type Completion = [u64; 4];

impl AsyncIo {
    fn new() -> io::Result<Self> {
        let (pipe, _) = io::pipe()?;
        let mut context: c_ulong = 0;
        // SAFETY:
        // - context: valid for writes for the whole call, and 0 as the call demands
        let done = unsafe { libc::syscall(libc::SYS_io_setup, 1 as c_long, &raw mut context) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            context,
            pipe,
            retired: AtomicBool::new(false),
        })
    }

    fn signal(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        match self.start(READ, event) {
            // It may have been given back meanwhile.
            Err(_) if self.is_retired() => write_if_ready(event),
            outcome => outcome,
        }
    }

    fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    fn retire(&self) {
        // First: a call that fails because of what follows looks at it.
        if !self.retired.swap(true, Ordering::AcqRel) {
            // SAFETY: the context is ours. The kernel refuses further calls with it, which other threads may make.
            unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
        }
    }

    /// Starts an operation on no bytes of the pipe, and completes it: pipes are not asynchronous.
    fn start(&self, opcode: u16, event: BorrowedFd<'_>) -> io::Result<()> {
        for _ in 0..TRIES {
            match self.submit(opcode, event) {
                // Completions that nobody has taken occupy the room for new ones.
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => self.take_completions(),
                outcome => return outcome,
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn submit(&self, opcode: u16, event: BorrowedFd<'_>) -> io::Result<()> {
        let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().unsigned_abs();
        let mut operation = Operation {
            opcode,
            fd: number(self.pipe.as_fd()),
            flags: HAS_EVENT,
            event: number(event),
            ..Operation::default()
        };
        let mut list = [&raw mut operation];
        // SAFETY:
        // - list and operation: valid for reads and writes for the whole call; the kernel keeps neither
        // - memory: the operation has no buffer
        let started = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.context,
                1 as c_long,
                list.as_mut_ptr(),
            )
        };
        if started == 1 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn take_completions(&self) {
        const MANY: usize = 64;
        let mut completions = [const { MaybeUninit::<Completion>::uninit() }; MANY];
        let at_once = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY:
        // - completions: valid for writes of `MANY` elements for the whole call
        // - at_once: valid for reads
        // If it fails, the next submission does, too.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0 as c_long,
                MANY as c_long,
                completions.as_mut_ptr(),
                &raw const at_once,
            )
        };
    }
}

impl Drop for AsyncIo {
    fn drop(&mut self) {
        self.retire();
    }
}

/// Adds 1 to the counter of an eventfd, unless it is full.
fn write_if_ready(event: BorrowedFd<'_>) -> io::Result<()> {
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut wanted = [PollFd::new(&event, PollFlags::OUT)];
    if poll(&mut wanted, Some(&at_once))? > 0 {
        rustix::io::write(event, &1u64.to_ne_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use rustix::event::{EventfdFlags, epoll, eventfd};
    use rustix::io::{read, write};

    use super::*;

    /// A blocking eventfd, and a second descriptor of it.
    fn event(count: u32) -> (PeerEvent, OwnedFd) {
        let event = eventfd(count, EventfdFlags::CLOEXEC).expect("an eventfd");
        let peer = event.try_clone().expect("a duplicate");
        (PeerEvent::new(event).expect("an eventfd"), peer)
    }

    fn count(event: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(read(event, &mut bytes), Ok(8));
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn descriptors_of_other_kinds_are_refused() {
        let (reader, writer) = io::pipe().expect("a pipe");
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let others: [OwnedFd; 7] = [
            reader.into(),
            writer.into(),
            ours.into(),
            theirs.into(),
            epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll set"),
            File::open("/dev/null").expect("a device").into(),
            File::open("/proc/self/exe").expect("a file").into(),
        ];
        for other in others {
            let kind = std::fs::read_link(format!("/proc/self/fd/{}", other.as_raw_fd()));
            let refused = PeerEvent::new(other).expect_err("not an eventfd");
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{kind:?}");
        }
    }

    #[test]
    fn being_taken_over_signals_nothing() {
        let (_event, peer) = event(3);
        assert_eq!(count(&peer), 3);
    }

    #[test]
    fn every_signal_is_counted() {
        let (event, peer) = event(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        event.signal().expect("signalled");
                    }
                });
            }
        });
        assert_eq!(count(&peer), 4000);
    }

    /// With a context of its own, because other tests use that of the process.
    #[test]
    fn no_signal_is_lost_while_the_context_is_given_back() {
        let kernel = AsyncIo::new().expect("a context");
        let (event, peer) = event(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let signal = || kernel.signal(event.as_fd()).expect("signalled");
                    (0..1000).for_each(|_| signal());
                    while !kernel.is_retired() {
                        std::thread::yield_now();
                    }
                    (0..1000).for_each(|_| signal());
                });
            }
            kernel.retire();
        });
        assert_eq!(count(&peer), 8000);
        assert_eq!(write(&peer, &(u64::MAX - 1).to_ne_bytes()), Ok(8));
        kernel
            .signal(event.as_fd())
            .expect("full: it counts as signalled");
    }

    #[test]
    fn a_full_counter_counts_as_signalled_and_keeps_nobody_waiting() {
        let (event, peer) = event(0);
        assert_eq!(write(&peer, &(u64::MAX - 1).to_ne_bytes()), Ok(8));
        let (done, waiting) = std::sync::mpsc::channel();
        // In a thread of its own, because a hang would otherwise hang the test.
        std::thread::spawn(move || {
            let outcome = (0..1000).try_for_each(|_| event.signal());
            done.send(outcome.map_err(|cause| cause.to_string()))
        });
        let outcome = waiting.recv_timeout(Duration::from_secs(30));
        assert_eq!(outcome, Ok(Ok(())));
        assert!(count(&peer) >= u64::MAX - 1);
    }
}
