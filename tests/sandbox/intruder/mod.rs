//! Makes a thread of another process make system calls that it never makes by itself.
#![expect(unsafe_code, reason = "traces a process")]

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::io;
use std::ptr::null_mut;

use libc::{c_long, c_uint, c_void, pid_t};

#[cfg(target_arch = "aarch64")]
pub use aarch64::{call, call_and_return};
#[cfg(target_arch = "x86_64")]
pub use x86_64::{call, call_and_return};

/// Writes a text into the thread's memory.
fn poke(tid: pid_t, address: u64, text: &str) {
    let padded: Vec<u8> = text.bytes().chain([0; 8]).collect();
    for (n, word) in padded.chunks_exact(8).enumerate() {
        let word = u64::from_ne_bytes(word.try_into().unwrap());
        let to = address + 8 * n as u64;
        // SAFETY: writes into the tracee's memory, not this process's.
        checked(unsafe { libc::ptrace(libc::PTRACE_POKEDATA, tid, to, word) }).expect("poked");
    }
}

/// A request without arguments.
fn request(request: c_uint, tid: pid_t) {
    let none = null_mut::<c_void>();
    // SAFETY: no pointer is passed.
    checked(unsafe { libc::ptrace(request, tid, none, none) })
        .unwrap_or_else(|e| panic!("request {request:#x}: {e}"));
}

fn wait_for_stop(tid: pid_t) {
    let mut status = 0;
    // SAFETY: status is valid for writes.
    let waited = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
    assert!(waited == tid && libc::WIFSTOPPED(status), "{status:#x}");
}

fn checked(done: c_long) -> io::Result<()> {
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
