//! The intruder on x86-64.

use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::thread::sleep;
use std::time::{Duration, Instant};

use libc::{c_long, c_void, pid_t, user_regs_struct};

use super::{checked, poke, request, wait_for_stop};

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Distance below the stack pointer at which a string is written: beyond the red zone of the
/// thread's functions.
const BELOW: u64 = 4096;

/// Makes thread `tid`, which sleeps in a system call, make this call instead. A `text` is written
/// into its memory, and the address becomes the argument with the given index. Does not wait for
/// the result.
pub fn call(tid: u32, number: c_long, arguments: [u64; 6], text: Option<(usize, &str)>) {
    let tid = pid_t::try_from(tid).expect("a thread's number");
    let found = stop_in_a_call(tid);
    prepare(tid, &found, number, arguments, text);
    request(libc::PTRACE_DETACH, tid);
}

/// Like [`call`], for a call that returns. The thread then restarts its own call as if nothing had
/// happened. Returns the result of the call: a number below 0 is an errno.
pub fn call_and_return(
    tid: u32,
    number: c_long,
    arguments: [u64; 6],
    text: Option<(usize, &str)>,
) -> i64 {
    let tid = pid_t::try_from(tid).expect("a thread's number");
    let mut found = stop_in_a_call(tid);
    prepare(tid, &found, number, arguments, text);
    for _ in ["its beginning", "its end"] {
        request(libc::PTRACE_SYSCALL, tid);
        wait_for_stop(tid);
    }
    let result = registers(tid).rax.cast_signed();
    found.rax = found.orig_rax;
    found.orig_rax = u64::MAX;
    found.rip -= SYSCALL.len() as u64;
    set_registers(tid, &found);
    request(libc::PTRACE_DETACH, tid);
    result
}

fn prepare(
    tid: pid_t,
    found: &user_regs_struct,
    number: c_long,
    mut arguments: [u64; 6],
    text: Option<(usize, &str)>,
) {
    if let Some((at, text)) = text {
        let address = (found.rsp - BELOW) & !7;
        poke(tid, address, text);
        arguments[at] = address;
    }
    let mut changed = *found;
    [
        changed.rdi,
        changed.rsi,
        changed.rdx,
        changed.r10,
        changed.r8,
        changed.r9,
    ] = arguments;
    changed.rax = u64::try_from(number).expect("a number");
    // The kernel must not restart the interrupted call.
    changed.orig_rax = u64::MAX;
    changed.rip -= SYSCALL.len() as u64;
    set_registers(tid, &changed);
}

/// Stops the thread in a system call that sleeps.
fn stop_in_a_call(tid: pid_t) -> user_regs_struct {
    let none = null_mut::<c_void>();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        request(libc::PTRACE_SEIZE, tid);
        request(libc::PTRACE_INTERRUPT, tid);
        wait_for_stop(tid);
        let registers = registers(tid);
        let before = registers.rip - SYSCALL.len() as u64;
        // SAFETY: reads the tracee's memory, not this process's.
        let code = unsafe { libc::ptrace(libc::PTRACE_PEEKTEXT, tid, before, none) };
        if code.to_ne_bytes()[..2] == SYSCALL && registers.orig_rax.cast_signed() >= 0 {
            return registers;
        }
        request(libc::PTRACE_DETACH, tid);
        assert!(
            Instant::now() < deadline,
            "the thread is not in a system call"
        );
        sleep(Duration::from_millis(5));
    }
}

fn registers(tid: pid_t) -> user_regs_struct {
    let mut found = MaybeUninit::<user_regs_struct>::uninit();
    let none = null_mut::<c_void>();
    let into = found.as_mut_ptr();
    // SAFETY: registers are valid for writes.
    checked(unsafe { libc::ptrace(libc::PTRACE_GETREGS, tid, none, into) }).expect("registers");
    // SAFETY: the call has filled them in.
    unsafe { found.assume_init() }
}

fn set_registers(tid: pid_t, registers: &user_regs_struct) {
    let none = null_mut::<c_void>();
    let from: *const user_regs_struct = registers;
    // SAFETY: registers are only read, and live for the whole call.
    checked(unsafe { libc::ptrace(libc::PTRACE_SETREGS, tid, none, from) }).expect("set");
}
