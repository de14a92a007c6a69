//! The intruder on AArch64. It changes the number of a call between the thread's entry into the kernel and the filter.
//!
//! Not the way of x86-64, which changes the thread's registers while it sleeps in a call: the kernel of AArch64 replaces
//! the number by that of `restart_syscall` when a thread goes on that has slept with a time limit.

use std::mem::MaybeUninit;

use libc::{c_int, c_long, c_uint, iovec, pid_t, user_regs_struct};

use super::{checked, poke, request, wait_for_stop};

/// Length in bytes of the instruction `svc`.
const SVC: u64 = 4;
/// Distance below the stack pointer at which a string is written.
const BELOW: u64 = 4096;
/// Sets of registers of `linux/elf.h`: the general ones, and the number of the call.
const NT_PRSTATUS: c_long = 1;
const NT_ARM_SYSTEM_CALL: c_long = 0x404;

/// Makes thread `tid`, which sleeps in a system call, make this call instead. A `text` is written
/// into its memory, and the address becomes the argument with the given index. Does not wait for
/// the result.
pub fn call(tid: u32, number: c_long, arguments: [u64; 6], text: Option<(usize, &str)>) {
    let tid = pid_t::try_from(tid).expect("a thread's number");
    let found = stop_at_a_call(tid);
    prepare(tid, &found, number, arguments, text);
    request(libc::PTRACE_DETACH, tid);
}

/// Like [`call`], for a call that returns. The thread then makes its own call as if nothing had
/// happened. Returns the result of the call: a number below 0 is an errno.
pub fn call_and_return(
    tid: u32,
    number: c_long,
    arguments: [u64; 6],
    text: Option<(usize, &str)>,
) -> i64 {
    let tid = pid_t::try_from(tid).expect("a thread's number");
    let mut found = stop_at_a_call(tid);
    prepare(tid, &found, number, arguments, text);
    request(libc::PTRACE_SYSCALL, tid);
    wait_for_stop(tid);
    let result = registers(tid).regs[0].cast_signed();
    found.pc -= SVC;
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
        let address = (found.sp - BELOW) & !7;
        poke(tid, address, text);
        arguments[at] = address;
    }
    let mut changed = *found;
    changed.regs[..6].copy_from_slice(&arguments);
    set_registers(tid, &changed);
    let mut number = c_int::try_from(number).expect("a number");
    // SAFETY: the number is valid for reads and lives for the whole call.
    unsafe {
        register_set(
            libc::PTRACE_SETREGSET,
            tid,
            NT_ARM_SYSTEM_CALL,
            &raw mut number,
        );
    }
}

/// Stops the thread at the entry of its next call. A thread that sleeps in one makes it again.
fn stop_at_a_call(tid: pid_t) -> user_regs_struct {
    request(libc::PTRACE_SEIZE, tid);
    request(libc::PTRACE_INTERRUPT, tid);
    wait_for_stop(tid);
    request(libc::PTRACE_SYSCALL, tid);
    wait_for_stop(tid);
    registers(tid)
}

fn registers(tid: pid_t) -> user_regs_struct {
    let mut found = MaybeUninit::<user_regs_struct>::uninit();
    // SAFETY: registers are valid for writes and live for the whole call.
    unsafe { register_set(libc::PTRACE_GETREGSET, tid, NT_PRSTATUS, found.as_mut_ptr()) };
    // SAFETY: the call has filled them in.
    unsafe { found.assume_init() }
}

fn set_registers(tid: pid_t, registers: &user_regs_struct) {
    let mut registers = *registers;
    // SAFETY: registers are valid for reads and live for the whole call.
    unsafe { register_set(libc::PTRACE_SETREGSET, tid, NT_PRSTATUS, &raw mut registers) };
}

/// Reads or writes one set of registers.
///
/// # Safety
/// `value` is valid for reads and writes.
unsafe fn register_set<T>(what: c_uint, tid: pid_t, set: c_long, value: *mut T) {
    let mut part = iovec {
        iov_base: value.cast(),
        iov_len: size_of::<T>(),
    };
    // SAFETY: the part describes the value, and both live for the whole call.
    checked(unsafe { libc::ptrace(what, tid, set, &raw mut part) }).expect("registers");
}
