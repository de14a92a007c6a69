//! QEMU without a guest: a test drives its PCI bus. Emulated guests of an emulated host are too slow for long transfers.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::vm::Setup;

/// The ports of configuration accesses, and the bit that enables them (PCI Local Bus 3.0, 3.2.2.3.2).
const CONFIG_ADDRESS: u32 = 0xcf8;
const CONFIG_DATA: u32 = 0xcfc;
const CONFIG_ENABLE: u32 = 1 << 31;
/// The device's slot.
const SLOT: u32 = 0x10;

/// A running QEMU with a device in [`SLOT`].
pub struct Qtest {
    qemu: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Qtest {
    /// `arguments` end with a `-device` of which the address is missing.
    pub fn start(arguments: &[&str]) -> Self {
        let (device, others) = arguments.split_last().expect("a device");
        let mut qemu = Command::new(Setup::from_environment().qemu)
            .args([
                "-accel",
                "qtest",
                "-qtest",
                "stdio",
                "-qtest-log",
                "/dev/null",
            ])
            .args([
                "-machine",
                "q35",
                "-m",
                "64",
                "-nodefaults",
                "-display",
                "none",
            ])
            .args(others)
            .arg(device.replace("SLOT", &format!("{SLOT:#x}")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("QEMU starts");
        let commands = qemu.stdin.take().expect("a pipe");
        let answers = BufReader::new(qemu.stdout.take().expect("a pipe"));
        Self {
            qemu,
            commands,
            answers,
        }
    }

    /// Returns what follows `OK` in the answer.
    fn ask(&mut self, command: &str) -> String {
        writeln!(self.commands, "{command}").expect("QEMU runs");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        let answer = line.trim().strip_prefix("OK");
        let answer = answer.unwrap_or_else(|| panic!("{command}: {line:?}"));
        answer.trim().to_owned()
    }

    fn select(&mut self, register: u32) {
        let address = CONFIG_ENABLE | SLOT << 11 | register;
        self.ask(&format!("outl {CONFIG_ADDRESS:#x} {address:#x}"));
    }

    /// Reads 4 bytes of the configuration space.
    pub fn config(&mut self, register: u32) -> u32 {
        self.select(register);
        number(&self.ask(&format!("inl {CONFIG_DATA:#x}")))
    }

    /// Writes 4 bytes of the configuration space.
    pub fn set_config(&mut self, register: u32, value: u32) {
        self.select(register);
        self.ask(&format!("outl {CONFIG_DATA:#x} {value:#x}"));
    }

    /// Reads 4 bytes at a physical address.
    pub fn load(&mut self, address: u64) -> u32 {
        number(&self.ask(&format!("readl {address:#x}")))
    }

    /// Reads memory. Returns it in hexadecimal digits.
    pub fn read(&mut self, address: u64, len: u64) -> String {
        self.ask(&format!("read {address:#x} {len:#x}"))
    }
}

fn number(text: &str) -> u32 {
    let digits = text.strip_prefix("0x").expect("hexadecimal digits");
    u64::from_str_radix(digits, 16).expect("hexadecimal digits") as u32
}

impl Drop for Qtest {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
