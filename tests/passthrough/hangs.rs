//! The one hang of a guest for which a test starts again with a new VM: see [`waits_for_itself`].

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};

use crate::nested::{ATTEMPTS, with_a_working_guest};
use crate::vm::stuck::{SAMPLES, Sample, WaitsForItself, bytes_of, in_ram, waits_for_itself};

/// The registers of a stock guest in whose memory a test set a free lock, the timekeeper's, to 1.
const REGISTERS: &str = "\
CPU#0
RAX=0000000000000001 RBX=ffffffff84001bc8 RCX=00000000fffef85a RDX=0000000000000001
RSI=0000000000000001 RDI=ffffffff84001bc8 RBP=ffffffff83203d28 RSP=ffa0000000003eb0
R8 =ff1100001ec21968 R9 =0000000000000000 R10=0000000000000000 R11=ffa0000000003ff8
R12=00000006879b07af R13=ff1100001ec218c0 R14=00000006879aeacd R15=ff1100001ec218c0
RIP=ffffffff821ca7a4 RFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0
ES =0000 0000000000000000 00000000 00000000
";
/// The code of its `native_queued_spin_lock_slowpath` around `RIP`.
const CODE: &str = "\
ffffffff821ca794: 0xff 0x77 0x55 0x85 0xc0 0x74 0x10 0x0f
ffffffff821ca79c: 0xb6 0x03 0x84 0xc0 0x74 0x09 0xf3 0x90
ffffffff821ca7a4: 0x0f 0xb6 0x03 0x84 0xc0 0x75 0xf7 0xb8
ffffffff821ca7ac: 0x01 0x00 0x00 0x00 0x66 0x89 0x03 0x5b
";
/// The registers of a stock guest in KVM that looked for PCI functions, with interrupts off. Each access was an exit.
const WORKING: &str = "\
RAX=000000008091ffff RBX=ffa0000000013db4 RCX=0000000000000000 RDX=0000000000000cfc
RSI=0000000000000206 RDI=ffffffff840f90b8 RBP=0000000000004000 RSP=ffa0000000013d80
R8 =0000000000000002 R9 =ffa0000000013db4 R10=ff11000004a6e090 R11=fefefefefefefeff
R12=0000000000000000 R13=0000000000000002 R14=0000000000000091 R15=0000000000000170
RIP=ffffffff82173a72 RFL=00000046 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0
";

fn sample(registers: &str) -> Sample {
    let mut sample = Sample::new(registers).expect("registers");
    sample.code = bytes_of(CODE);
    sample.word = Some(0x101);
    sample
}

#[test]
fn a_processor_that_waits_for_its_own_lock_is_recognized() {
    assert_eq!(bytes_of(CODE).len(), 32);
    let stuck = sample(REGISTERS);
    assert!(waits_for_itself(&vec![stuck.clone(); SAMPLES]));
    // The loop has three instructions, and not each waiter marks the lock.
    let mut samples = vec![stuck; SAMPLES];
    samples[1].rip -= 2;
    samples[2].rip += 5;
    samples[3].word = Some(1);
    assert!(waits_for_itself(&samples));
}

#[test]
fn any_other_silence_is_a_failure() {
    let stuck = vec![sample(REGISTERS); SAMPLES];
    let with = |change: &dyn Fn(&mut Vec<Sample>)| {
        let mut samples = stuck.clone();
        change(&mut samples);
        waits_for_itself(&samples)
    };
    let registers = |from: &str, to: &str| {
        assert!(REGISTERS.contains(from));
        sample(&REGISTERS.replace(from, to))
    };
    assert!(!waits_for_itself(&[]));
    assert!(!waits_for_itself(&stuck[1..]), "too few samples");
    for (what, from, to) in [
        ("interrupts on", "RFL=00000002", "RFL=00000202"),
        ("the processor sleeps", "HLT=0", "HLT=1"),
        ("a program runs", "CPL=0", "CPL=3"),
        ("a module runs", "RIP=ffffffff82", "RIP=ffffffffc2"),
    ] {
        let other = registers(from, to);
        assert!(!waits_for_itself(&vec![other; SAMPLES]), "{what}");
    }
    for (what, other) in [
        ("a register changes", registers("R14=0", "R14=1")),
        ("the stack changes", registers("3eb0", "3ea8")),
        ("the loop is longer", registers("ca7a4", "ca7b4")),
    ] {
        assert!(!with(&|all| all[3] = other.clone()), "{what}");
    }
    for word in [None, Some(0), Some(0x100), Some(0x4_0001)] {
        assert!(!with(&|all| all[4].word = word), "{word:?}");
    }
    assert!(!with(&|all| all[0].code[14] = 0), "no pause");
    // It holds the lock of the configuration space, whose address is in RDI.
    let mut working = sample(WORKING);
    working.code.fill(0xed);
    working.word = Some(1);
    assert!(
        !waits_for_itself(&vec![working; SAMPLES]),
        "a working guest"
    );
    assert!(in_ram("gpa: 0x4001bc8\r\n"));
    for answer in ["gpa: 0xfee00000", "Unmapped\r\n", "gpa: 0x", ""] {
        assert!(!in_ram(answer), "{answer}");
    }
    assert_eq!(Sample::new("the VM has ended"), None);
}

#[test]
fn only_a_guest_that_waits_for_itself_is_started_again() {
    let runs = Cell::new(0);
    let hangs = |times: u32| {
        runs.set(0);
        let body = || {
            runs.set(runs.get() + 1);
            if runs.get() <= times {
                panic_any(WaitsForItself("made up by a test".to_owned()));
            }
        };
        catch_unwind(AssertUnwindSafe(|| with_a_working_guest(body))).is_ok()
    };
    assert_eq!((hangs(0), runs.get()), (true, 1));
    assert_eq!((hangs(2), runs.get()), (true, 3));
    assert_eq!((hangs(3), runs.get()), (false, ATTEMPTS));
    runs.set(0);
    let fails = || {
        runs.set(runs.get() + 1);
        panic!("any other failure");
    };
    assert!(catch_unwind(AssertUnwindSafe(|| with_a_working_guest(fails))).is_err());
    assert_eq!(runs.get(), 1);
}
