//! Ends the daemon with a message if one of its threads cannot go on.
//!
//! - **A panic.** The thread may have left the state of the core or of a device half changed, and the other threads would
//!   serve the guest from that state, or wait for the thread for ever. The end of the process stops all DMA that the
//!   daemon is responsible for. Rejected: ending only the connection of the VMM, as the end of a ring's worker does.
//!   The threads that serve operators, devices and faults belong to no connection.
//! - **SIGBUS.** Memory that the daemon has mapped has lost its file or its page. The thread cannot go on without the
//!   memory, and zeroes in its place would be requests that no driver has made.
#![expect(
    unsafe_code,
    reason = "_exit, which runs no code of threads whose state is unknown; the reason of a signal"
)]

use std::io;
use std::panic::PanicHookInfo;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, c_void, siginfo_t};
use log::{Level, error};
use vmm_sys_util::signal::register_signal_handler;

use crate::logging::PreparedLine;

/// `BUS_ADRERR` of sigaction(2): there is no memory behind the address.
const BUS_ADRERR: c_int = 2;

/// The last messages of a process that SIGBUS ends. Made beforehand, because a signal handler must not allocate.
static LAST_LINES: OnceLock<LastLines> = OnceLock::new();
/// Another thread has written the last message already.
static IS_SAID: AtomicBool = AtomicBool::new(false);

struct LastLines {
    /// The memory has gone.
    gone: PreparedLine,
    /// Another reason, such as a defect of the memory.
    other: PreparedLine,
}

/// From now on, a panic of any thread and SIGBUS end this process with a message in the log and status 1. The files of
/// its sockets stay, as after SIGKILL.
///
/// The caller must call this once, after [`logging::init`](crate::logging::init) and before it starts threads.
///
/// # Errors
/// The system refuses the signal handler.
pub fn end_on_fatal_faults() -> io::Result<()> {
    let line = |text| PreparedLine::new(Level::Error, module_path!(), text);
    LAST_LINES.get_or_init(|| LastLines {
        gone: line(
            "memory that this daemon has mapped is gone (SIGBUS): the VMM has made a file of guest memory shorter, or \
             the host has no page left for it; the daemon ends. Give the VMM RAM that cannot shrink (QEMU's \
             memory-backend-memfd), and reserve its huge pages",
        ),
        other: line(
            "SIGBUS: memory that this daemon has mapped cannot be read or written; the daemon ends. If the kernel's log \
             names a hardware error, replace the memory",
        ),
    });
    std::panic::set_hook(Box::new(end_after_panic));
    register_signal_handler(libc::SIGBUS, end_after_bus_error)?;
    Ok(())
}

fn end_after_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("without a name");
    error!(
        "the thread {name} has {panic}; the daemon ends, because its state is unknown: report this as a defect"
    );
    exit()
}

extern "C" fn end_after_bus_error(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY:
    // - info: the kernel passes the address of a siginfo to a handler that is installed with SA_SIGINFO
    let reason = unsafe { (*info).si_code };
    if !IS_SAID.swap(true, Ordering::Relaxed)
        && let Some(lines) = LAST_LINES.get()
    {
        if reason == BUS_ADRERR {
            lines.gone.write();
        } else {
            lines.other.write();
        }
    }
    exit()
}

fn exit() -> ! {
    // SAFETY:
    // - the call does not return and runs no exit handler of this process
    unsafe { libc::_exit(1) }
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::fs::File;
    use std::mem::MaybeUninit;
    use std::process::{Command, Output};
    use std::ptr;
    use std::time::Duration;

    use rustix::fs::MemfdFlags;
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::logging;
    use crate::process::sandbox::{self, Needs, Role, Violation};

    /// The test program runs a test again with this variable, as the process that has to end.
    const CHILD: &str = "VIOMMU_FATAL_CHILD";

    /// Runs the calling test again in a process in which a thread calls the function that `prepare` returns. Returns
    /// the outcome there.
    fn outcome_of<F: FnOnce() + Send + 'static>(test: &str, prepare: fn() -> F) -> Output {
        if env::var_os(CHILD).is_some() {
            logging::init("vm0");
            end_on_fatal_faults().expect("a handler");
            let fail = prepare();
            // The filters must allow everything that the end takes.
            sandbox::arm(Needs::default(), Violation::Kill).expect("armed");
            sandbox::spawn(Role::Faults, fail).expect("a thread");
            std::thread::sleep(Duration::from_secs(60));
            std::process::exit(0);
        }
        let name = format!("{}::{test}", module_path!());
        let name = name.split_once("::").expect("a crate").1;
        let mut again = Command::new(env::current_exe().expect("this program"));
        again.args(["--exact", name, "--nocapture"]).env(CHILD, "1");
        again.output().expect("it runs")
    }

    fn assert_ended_with(outcome: &Output, text: &str) {
        let log = String::from_utf8_lossy(&outcome.stderr);
        assert_eq!(outcome.status.code(), Some(1), "{log}");
        assert!(log.contains("ERROR") && log.contains("vm0"), "{log}");
        assert!(log.contains(text), "{log}");
    }

    #[test]
    fn a_thread_that_panics_ends_the_process_with_a_message() {
        let outcome = outcome_of(
            "a_thread_that_panics_ends_the_process_with_a_message",
            || || panic!("on purpose"),
        );
        assert_ended_with(
            &outcome,
            "the thread faults has panicked at src/process/fatal.rs:",
        );
        assert_ended_with(&outcome, "on purpose");
    }

    #[test]
    fn memory_whose_file_has_shrunk_ends_the_process_with_a_message() {
        let outcome = outcome_of(
            "memory_whose_file_has_shrunk_ends_the_process_with_a_message",
            || {
                let file = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).expect("a memfd");
                let file = File::from(file);
                file.set_len(0x1000).expect("sized");
                let backing = FileOffset::new(file.try_clone().expect("a duplicate"), 0);
                let range = (GuestAddress(0), 0x1000, Some(backing));
                let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range]);
                let memory = memory.expect("mapped");
                file.set_len(0).expect("shorter");
                move || {
                    let read = memory.read_obj::<u64>(GuestAddress(0));
                    panic!("there is no memory, and {read:?}");
                }
            },
        );
        assert_ended_with(&outcome, "a file of guest memory shorter");
    }

    #[test]
    fn another_bus_error_has_a_message_of_its_own() {
        let outcome = outcome_of("another_bus_error_has_a_message_of_its_own", || {
            || {
                let mut info = MaybeUninit::<siginfo_t>::zeroed();
                end_after_bus_error(libc::SIGBUS, info.as_mut_ptr(), ptr::null_mut());
            }
        });
        assert_ended_with(
            &outcome,
            "SIGBUS: memory that this daemon has mapped cannot be read",
        );
    }
}
