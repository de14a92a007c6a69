//! Devices of L1 that do DMA on command. The tests drive them through their registers.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::host::HostIommu;

/// A PCI function of the host.
pub struct Function {
    address: String,
}

impl Function {
    pub fn new(address: &str) -> Self {
        Self {
            address: address.to_owned(),
        }
    }

    pub fn path(&self, entry: &str) -> String {
        format!("/sys/bus/pci/devices/{}/{entry}", self.address)
    }

    /// The number of the function's IOMMU group.
    pub fn group(&self) -> String {
        let target = fs::read_link(self.path("iommu_group")).expect("a group");
        target.file_name().unwrap().to_string_lossy().into_owned()
    }

    /// The bridge above the function at `address`.
    pub fn bridge_of(address: &str) -> Self {
        let path = fs::canonicalize(Self::new(address).path("")).expect("a function");
        let bridge = path.parent().and_then(Path::file_name).expect("a bridge");
        Self::new(&bridge.to_string_lossy())
    }

    /// The function's `/dev/vfio/devices/vfioN`.
    pub fn node(&self) -> String {
        let mut names = fs::read_dir(self.path("vfio-dev")).expect("bound to vfio-pci");
        let name = names.next().expect("one").unwrap().file_name();
        format!("/dev/vfio/devices/{}", name.to_string_lossy())
    }

    /// Switches on memory accesses and DMA in the command register, as a driver does.
    pub fn enable(&self) {
        self.command(|command| command | 1 << 1 | 1 << 2);
    }

    fn command(&self, change: impl Fn(u16) -> u16) {
        let config = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.path("config"))
            .expect("configuration space");
        let mut command = [0; 2];
        config.read_exact_at(&mut command, 4).unwrap();
        let changed = change(u16::from_le_bytes(command));
        config.write_all_at(&changed.to_le_bytes(), 4).unwrap();
    }

    /// Maps a BAR.
    pub fn map_bar(&self, index: u32) -> MmapRegion {
        let path = self.path(&format!("resource{index}"));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap_or_else(|e| panic!("{path}: {e}"));
        let len = file.metadata().unwrap().len();
        MmapRegion::from_file(FileOffset::new(file, 0), len as usize).expect("a BAR maps")
    }

    /// The host-physical address of a BAR.
    pub fn bar_address(&self, index: usize) -> u64 {
        let text = fs::read_to_string(self.path("resource")).expect("resources");
        let line = text.lines().nth(index).expect("a BAR");
        let first = line.split_whitespace().next().expect("an address");
        u64::from_str_radix(first.trim_start_matches("0x"), 16).expect("a number")
    }
}

/// QEMU's `edu`, which copies up to 4 KiB between memory and its own buffer in 100 ms.
pub struct Edu {
    registers: MmapRegion,
}

impl Edu {
    const BUFFER: u64 = 0x4_0000;
    const LEN: u64 = 4096;

    pub fn new(address: &str) -> Self {
        let registers = Function::new(address).map_bar(0);
        Self { registers }
    }

    /// Copies memory at `iova` to the device's buffer.
    pub fn read(&self, iova: u64) {
        self.start_read(iova);
        self.wait();
    }

    /// Copies the device's buffer to memory at `iova`.
    pub fn write(&self, iova: u64) {
        self.start_write(iova);
        self.wait();
    }

    pub fn start_read(&self, iova: u64) {
        self.start(iova, Self::BUFFER, Self::LEN, 0);
    }

    pub fn start_write(&self, iova: u64) {
        self.start(Self::BUFFER, iova, Self::LEN, 2);
    }

    /// Waits until the copy is done.
    pub fn wait(&self) {
        let since = Instant::now();
        while self.load(0x98) & 1 != 0 {
            assert!(since.elapsed() < Duration::from_secs(30), "a DMA ends");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends an interrupt, and acknowledges it at the device.
    pub fn interrupt(&self) {
        self.store_u32(0x60, 1);
        self.store_u32(0x64, 1);
    }

    fn start(&self, from: u64, to: u64, len: u64, direction: u64) {
        self.store(0x80, from);
        self.store(0x88, to);
        self.store(0x90, len);
        self.store(0x98, 1 | direction);
    }

    fn store(&self, at: usize, value: u64) {
        let registers = self.registers.as_volatile_slice();
        registers
            .store(value, at, std::sync::atomic::Ordering::Relaxed)
            .expect("a register");
    }

    fn store_u32(&self, at: usize, value: u32) {
        let registers = self.registers.as_volatile_slice();
        registers
            .store(value, at, std::sync::atomic::Ordering::Relaxed)
            .expect("a register");
    }

    fn load(&self, at: usize) -> u64 {
        let registers = self.registers.as_volatile_slice();
        registers
            .load(at, std::sync::atomic::Ordering::Relaxed)
            .expect("a register")
    }
}

/// QEMU's `iommu-testdev`, which writes a pattern to an address at once and tells whether the IOMMU allowed it.
pub struct TestDev {
    registers: MmapRegion,
}

impl TestDev {
    /// The pattern that it writes repeatedly.
    pub const PATTERN: u32 = 0x1234_5678;

    pub fn new(address: &str) -> Self {
        let registers = Function::new(address).map_bar(0);
        Self { registers }
    }

    /// Writes `len` bytes at `iova`. Returns whether the IOMMU allowed it.
    pub fn write(&self, iova: u64, len: u32) -> bool {
        self.store(0x04, iova as u32);
        self.store(0x08, (iova >> 32) as u32);
        self.store(0x0c, len);
        self.store(0x14, 1);
        self.load(0x00);
        self.load(0x10) != 0xdead_0002
    }

    fn store(&self, at: usize, value: u32) {
        let registers = self.registers.as_volatile_slice();
        registers
            .store(value, at, std::sync::atomic::Ordering::Relaxed)
            .expect("a register");
    }

    fn load(&self, at: usize) -> u32 {
        let registers = self.registers.as_volatile_slice();
        registers
            .load(at, std::sync::atomic::Ordering::Relaxed)
            .expect("a register")
    }
}

/// The faults of the host's IOMMU in the kernel's log. The kernel logs only a few in five seconds.
pub struct FaultLog {
    seen: usize,
}

impl FaultLog {
    pub fn now() -> Self {
        Self {
            seen: Self::lines(),
        }
    }

    /// Repeats `dma` until the log has a new fault.
    pub fn expect_fault(&mut self, mut dma: impl FnMut()) {
        for _ in 0..4 {
            dma();
            let now = Self::lines();
            if now > self.seen {
                self.seen = now;
                return;
            }
            thread::sleep(Duration::from_secs(6));
            self.seen = Self::lines();
        }
        panic!("the host IOMMU logged no fault");
    }

    fn lines() -> usize {
        let output = std::process::Command::new("dmesg").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines()
            .filter(|line| HostIommu::is_fault(line))
            .count()
    }
}
