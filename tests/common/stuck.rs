//! Samples of a silent guest's processor, and the one hang for which a test starts a new VM.
//!
//! docs/testing.md tells the evidence for the rule.

#![allow(
    dead_code,
    reason = "each test binary compiles this module and uses a part of it"
)]

use std::ops::Range;

/// The value of a panic: the guest's only processor waits for itself. The text has the state of the processor.
#[derive(Debug)]
pub struct WaitsForItself(pub String);

/// Samples that [`waits_for_itself`] needs at least.
pub const SAMPLES: usize = 5;
/// Bytes of code in a sample, with the instruction at `RIP` in the middle.
pub const CODE: u64 = 32;
/// The addresses of a 64-bit Linux kernel's own code and static data. Modules lie above.
const KERNEL: Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;
/// Guest-physical addresses below this are RAM or nothing; devices lie above.
const LOW_RAM: u64 = 1 << 31;
/// The `pause` instruction, which is in each loop that waits for a lock.
const PAUSE: [u8; 2] = [0xf3, 0x90];
/// The flag that allows interrupts.
const IF: u64 = 1 << 9;
/// The bit of a held spin lock, and the bit that its first waiter sets. Other waiters set higher bits.
const LOCKED: u32 = 1;
const PENDING: u32 = 1 << 8;

/// The state of a guest's processor at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// RAX to R15, in QEMU's order.
    general: Vec<u64>,
    pub rip: u64,
    rflags: u64,
    runs_kernel: bool,
    /// The code around `RIP`.
    pub code: Vec<u8>,
    /// The word at `RDI`, if that is memory.
    pub word: Option<u32>,
}

impl Sample {
    /// Decodes the answer to `info registers`. `None` if it has no 64-bit registers.
    pub fn new(registers: &str) -> Option<Self> {
        const NAMES: [&str; 16] = [
            "RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RBP", "RSP", "R8 ", "R9 ", "R10", "R11",
            "R12", "R13", "R14", "R15",
        ];
        let text = |name: &str| {
            let (_, rest) = registers.split_once(&format!("{name}="))?;
            rest.split_whitespace().next()
        };
        let hex = |name: &str| u64::from_str_radix(text(name)?, 16).ok();
        Some(Self {
            general: NAMES.iter().copied().map(hex).collect::<Option<_>>()?,
            rip: hex("RIP")?,
            rflags: hex("RFL")?,
            runs_kernel: text("CPL") == Some("0") && text("HLT") == Some("0"),
            code: Vec::new(),
            word: None,
        })
    }

    /// A function's first argument.
    pub fn rdi(&self) -> u64 {
        self.general[5]
    }

    pub fn rsp(&self) -> u64 {
        self.general[7]
    }

    pub fn waits_for_a_lock(&self) -> bool {
        self.runs_kernel
            && self.rflags & IF == 0
            && KERNEL.contains(&self.rip)
            && self.code.windows(2).any(|bytes| bytes == PAUSE)
            && self.word.is_some_and(|word| word & !PENDING == LOCKED)
    }
}

/// Whether a guest's only processor waits for a lock that only this processor could release: with interrupts off, it
/// spins on a held lock in memory and changes no register.
///
/// A device cannot cause that. A driver that polls its device with interrupts off, as virtio-iommu's does, calls
/// functions, which changes registers, and has no `pause` in its loop.
pub fn waits_for_itself(samples: &[Sample]) -> bool {
    let Some(first) = samples.first() else {
        return false;
    };
    samples.len() >= SAMPLES
        && samples.iter().all(Sample::waits_for_a_lock)
        && samples.iter().all(|sample| sample.general == first.general)
        && samples
            .iter()
            .all(|sample| sample.rip.abs_diff(first.rip) < CODE / 2)
}

/// The guest-physical address in an answer to `gva2gpa`, if it lies in the low RAM of q35.
pub fn in_ram(answer: &str) -> bool {
    let gpa = answer.trim().strip_prefix("gpa: 0x");
    gpa.and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .is_some_and(|gpa| gpa < LOW_RAM)
}

/// The bytes in an answer to `x/...xb`: lines of an address, a colon and bytes such as `0xf3`.
pub fn bytes_of(answer: &str) -> Vec<u8> {
    let words = answer
        .lines()
        .filter_map(|line| line.split_once(": "))
        .flat_map(|(_, bytes)| bytes.split_whitespace());
    words
        .filter_map(|byte| u8::from_str_radix(byte.strip_prefix("0x")?, 16).ok())
        .collect()
}
