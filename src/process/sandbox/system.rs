//! System and library calls of the sandbox: a check for filters, a setting of the allocator, and the signal
//! handler that names a forbidden call.

#![expect(
    unsafe_code,
    reason = "installs a signal handler, queries the kernel, and sets up the C library"
)]

use std::io;
use std::mem::MaybeUninit;

use libc::{c_int, c_void, siginfo_t};

use super::{CONFINED, SandboxError};

/// Checks that the kernel has filters that can kill a process.
///
/// # Errors
/// [`SandboxError::NoFilters`].
pub(super) fn check_filters() -> Result<(), SandboxError> {
    let action: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY:
    // - action: read only, and there for the whole call
    let answer = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    };
    if answer == 0 {
        return Ok(());
    }
    Err(SandboxError::NoFilters {
        scope: format!("in this kernel ({})", io::Error::last_os_error()),
    })
}

/// Limits glibc to one arena for all threads. With several arenas, glibc opens files in any thread: it counts the
/// processors before it creates another arena, and reads the overcommit mode before it shrinks an
/// arena.
/// Each thread still has a cache of small blocks, so threads hardly wait for each other.
pub(super) fn limit_the_allocator_to_one_arena() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: sets a parameter of the allocator, and passes no pointer.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
}

/// Installs a handler of SIGSYS that names the forbidden call. The same signal then ends the process.
///
/// # Errors
/// The kernel refuses.
pub(super) fn name_violations() -> Result<(), SandboxError> {
    // SAFETY: zero is a value of every field.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = name_the_call;
    action.sa_sigaction = handler as libc::sighandler_t;
    // Reset after the first signal, so that the second one, from the handler, ends the process.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND | libc::SA_NODEFER;
    // SAFETY:
    // - action: a handler of the kind that the flags say, which makes only system calls that a
    //   handler may make
    // - the old action is not asked for
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } == 0 {
        return Ok(());
    }
    Err(SandboxError::System {
        step: "install the handler of forbidden system calls",
        source: io::Error::last_os_error(),
    })
}

extern "C" fn name_the_call(_signal: c_int, about: *mut siginfo_t, _context: *mut c_void) {
    // `si_syscall` of `asm-generic/siginfo.h` is at byte 24 on 64-bit machines. Filters exist only for those.
    let number = about.cast::<c_int>().wrapping_add(6);
    // SAFETY:
    // - number: inside the structure, which the kernel has filled in and this handler has to itself
    let number = unsafe { number.read() };
    let role = CONFINED.try_with(std::cell::Cell::get).ok().flatten();
    let role = role.map_or("?", super::Role::name);
    let mut digits = [0; 10];
    let parts: [&[u8]; 5] = [
        b"vhost-device-iommu: the thread ",
        role.as_bytes(),
        b" makes system call ",
        decimal(number, &mut digits),
        b", which its filter does not allow; please report it\n",
    ];
    for part in parts {
        let mut out = libc::pollfd {
            fd: libc::STDERR_FILENO,
            events: libc::POLLOUT,
            revents: 0,
        };
        // A full pipe must not keep the process from ending.
        // SAFETY:
        // - out: valid for reads and writes; a handler may make this call
        if unsafe { libc::poll(&raw mut out, 1, 0) } == 1 {
            // SAFETY:
            // - part: valid for reads of its length; the call keeps nothing
            unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
        }
    }
    // SAFETY: no pointers are passed; the action was reset, so that it ends the process.
    unsafe { libc::raise(libc::SIGSYS) };
    // SAFETY: does not return.
    unsafe { libc::_exit(1) }
}

/// The decimal digits of a number. Allocates nothing, as a signal handler must not.
fn decimal(number: c_int, room: &mut [u8; 10]) -> &[u8] {
    let mut rest = number.unsigned_abs();
    let mut first = room.len();
    for (at, digit) in room.iter_mut().enumerate().rev() {
        *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        first = at;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    room.get(first..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_decimal() {
        for number in [0, 7, 59, 435, c_int::MAX] {
            let mut room = [0; 10];
            assert_eq!(decimal(number, &mut room), number.to_string().as_bytes());
        }
    }
}
