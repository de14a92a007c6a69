//! Real DMA: a device reaches exactly the memory that its domain maps.

use rustix::process::Signal;
use vhost_device_iommu::address::{Access, Iova, IovaRange};
use vhost_device_iommu::vfio::{AddressSpaces, Attach, Cdev, DmaSource, IommuFd};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::bed::{BACKENDS, Backend, Bed, endpoint};
use crate::common::guest::{HIGH_RAM, LOW_RAM};
use crate::common::memory::memfd;
use crate::common::wire::{CONFIG_BYPASS, FAULT, MMIO, OK, READ, RW, WRITE};
use crate::devices::{Edu, FaultLog, Function};
use crate::host::host_iommu;
use crate::words;

const PAGE: u64 = 4096;
/// A guest page with a pattern.
const SOURCE: u64 = HIGH_RAM + 0x10_0000;
/// A guest page that no mapping makes readable.
const SECRET: u64 = HIGH_RAM + 0x20_0000;
/// A guest page that devices write.
const TARGET: u64 = HIGH_RAM + 0x30_0000;
/// Another one.
const OTHER: u64 = LOW_RAM + 0xe0_0000;

fn pattern(seed: u8) -> Vec<u8> {
    (0..PAGE)
        .map(|n| (n as u8).wrapping_mul(31) ^ (n >> 8) as u8 ^ seed)
        .collect()
}

/// A VM with an `edu`.
struct EduBed {
    vm: Bed,
    edu: Edu,
    faults: FaultLog,
}

impl EduBed {
    fn new(backend: Backend, keys: &str) -> Self {
        let name = words("VIOMMU_EDU")[0].clone();
        let vm = Bed::with(backend, &[&name], keys);
        vm.guest.memory.write(SOURCE, &pattern(1));
        vm.guest.memory.write(SECRET, &pattern(2));
        Self {
            vm,
            edu: Edu::new(&name),
            faults: FaultLog::now(),
        }
    }

    fn page(&self, gpa: u64) -> Vec<u8> {
        self.vm.guest.memory.read(gpa, PAGE as usize)
    }

    /// Copies a page through the device. Returns whether it arrived. Nothing else in memory may change.
    fn copies(&self, from: u64, to: u64, source: u64, target: u64) -> bool {
        let zeros = vec![0; PAGE as usize];
        self.vm.guest.memory.write(target, &zeros);
        let before = self.vm.memory();
        self.edu.read(from);
        self.edu.write(to);
        let arrived = self.page(target);
        self.vm.guest.memory.write(target, &zeros);
        assert!(
            self.vm.memory() == before,
            "memory outside the mapping has changed"
        );
        let expected = self.page(source);
        assert!(
            arrived == expected || arrived == zeros,
            "a part of the data arrived"
        );
        arrived == expected
    }

    /// Checks that a write of the device changes nothing, and that the host logs a fault.
    fn write_is_refused(&mut self, iova: u64) {
        let before = self.vm.memory();
        let edu = &self.edu;
        self.faults.expect_fault(|| edu.write(iova));
        assert!(self.vm.memory() == before, "{iova:#x} was written to");
    }

    /// Checks that a write of the device changes nothing. The host's IOMMU may not log it.
    fn write_is_blocked(&self, iova: u64) {
        let before = self.vm.memory();
        self.edu.write(iova);
        assert!(self.vm.memory() == before, "{iova:#x} was written to");
    }

    /// Checks that a read of the device does not return the page at `forbidden`. The device writes its buffer to
    /// `out`, which must lead to `target`.
    fn read_is_refused(&self, iova: u64, out: u64, target: u64, forbidden: u64) {
        self.edu.read(iova);
        self.edu.write(out);
        assert_ne!(
            self.page(target),
            self.page(forbidden),
            "{iova:#x} was read"
        );
    }
}

fn scenario(backend: Backend) {
    eprintln!("{backend:?}");
    let mut bed = EduBed::new(backend, "");
    let ep = endpoint(0);

    let status = bed.vm.daemon.endpoint(ep);
    assert_eq!(status["host"], words("VIOMMU_EDU")[0].as_str());
    eprintln!("bypass mode reaches guest-physical addresses");
    assert!(bed.copies(SOURCE, TARGET, SOURCE, TARGET));

    eprintln!("an empty domain reaches nothing");
    assert_eq!(bed.vm.guest.attach(1, ep), OK);
    bed.write_is_refused(TARGET);

    eprintln!("mappings lead to their guest-physical addresses");
    let guest = &mut bed.vm.guest;
    // Within 44 bits, which some IOMMUs have.
    let (source, target) = (0x10_0000, 0x700_0000_0000);
    assert_eq!(guest.map(1, source, source + PAGE - 1, SOURCE, READ), OK);
    assert_eq!(guest.map(1, target, target + PAGE - 1, TARGET, RW), OK);
    assert!(bed.copies(source, target, SOURCE, TARGET));
    let guest = &mut bed.vm.guest;
    assert_eq!(guest.unmap(1, target, target + PAGE - 1), OK);
    assert_eq!(guest.map(1, target, target + PAGE - 1, OTHER, RW), OK);
    assert!(bed.copies(source, target, SOURCE, OTHER));
    bed.write_is_blocked(TARGET);
    bed.write_is_blocked(target + PAGE);
    bed.write_is_blocked(source - PAGE);

    eprintln!("a read-only mapping cannot be written, nor a write-only mapping read");
    bed.edu.read(target);
    if host_iommu().logs_rights() {
        bed.write_is_refused(source);
    } else {
        bed.write_is_blocked(source);
    }
    let guest = &mut bed.vm.guest;
    assert_eq!(guest.map(1, 0x20_0000, 0x20_0fff, SECRET, WRITE), OK);
    if host_iommu().has_write_only() {
        bed.read_is_refused(0x20_0000, target, OTHER, SECRET);
    } else {
        bed.edu.read(0x20_0000);
        bed.edu.write(target);
        assert_eq!(bed.page(OTHER), pattern(2), "docs/passthrough.md says so");
    }
    // The write-only mapping can be written.
    bed.edu.read(source);
    bed.edu.write(0x20_0000);
    assert_eq!(bed.page(SECRET), pattern(1));
    bed.vm.guest.memory.write(SECRET, &pattern(2));

    eprintln!("the device reaches nothing after UNMAP");
    let guest = &mut bed.vm.guest;
    assert_eq!(guest.unmap(1, target, target + PAGE - 1), OK);
    bed.write_is_refused(target);
    assert_eq!(bed.vm.guest.map(1, 0x30_0000, 0x30_0fff, OTHER, WRITE), OK);
    assert_eq!(bed.vm.guest.unmap(1, source, source + PAGE - 1), OK);
    bed.read_is_refused(source, 0x30_0000, OTHER, SOURCE);

    eprintln!("DETACH returns to bypass mode and removes the domain");
    assert_eq!(bed.vm.guest.detach(1, ep), OK);
    assert!(bed.copies(SOURCE, TARGET, SOURCE, TARGET));
    assert_eq!(bed.vm.guest.attach(1, ep), OK);
    bed.write_is_blocked(0x30_0000);

    eprintln!("a bypass domain bypasses, whatever `bypass` is");
    assert_eq!(bed.vm.guest.attach_bypass(2, ep), OK);
    bed.vm.guest.set_config(CONFIG_BYPASS, &[0]);
    assert!(bed.copies(SOURCE, TARGET, SOURCE, TARGET));

    eprintln!("with `bypass` 0, DETACH blocks");
    assert_eq!(bed.vm.guest.detach(2, ep), OK);
    bed.write_is_blocked(TARGET);
    bed.vm.guest.set_config(CONFIG_BYPASS, &[1]);
    assert!(bed.copies(SOURCE, TARGET, SOURCE, TARGET));

    eprintln!("a reset removes all domains");
    assert_eq!(bed.vm.guest.attach(1, ep), OK);
    assert_eq!(
        bed.vm
            .guest
            .map(1, target, target + PAGE - 1, TARGET, WRITE),
        OK
    );
    bed.vm.guest.reboot();
    assert_eq!(bed.vm.guest.attach(1, ep), OK);
    bed.write_is_blocked(target);

    eprintln!("the device is blocked after the daemon's end");
    assert_eq!(
        bed.vm
            .guest
            .map(1, target, target + PAGE - 1, TARGET, WRITE),
        OK
    );
    bed.vm.daemon.terminate();
    let daemon = &bed.vm.daemon;
    daemon.wait_for_end();
    bed.write_is_blocked(target);
    bed.write_is_blocked(TARGET);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn dma_reaches_mapped_memory_shared() {
    scenario(Backend::SharedAll);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn dma_reaches_mapped_memory_shared_pin_mapped() {
    scenario(Backend::SharedMapped);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn dma_reaches_mapped_memory_taken_over() {
    scenario(Backend::TakenOver);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn dma_reaches_mapped_memory_owned() {
    scenario(Backend::Owned);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn dma_reaches_mapped_memory_type1() {
    scenario(Backend::Type1);
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn dma_reaches_mapped_memory_type1_inherited() {
    scenario(Backend::Type1Inherited);
}

/// Without bypass mode at boot, a device is blocked as soon as the VMM is connected.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn without_bypass_at_boot_a_device_is_blocked() {
    for backend in BACKENDS {
        eprintln!("{backend:?}");
        let mut bed = EduBed::new(backend, "bypass = false");
        bed.write_is_blocked(TARGET);
        assert_eq!(bed.vm.guest.attach(1, endpoint(0)), OK);
        assert_eq!(bed.vm.guest.map(1, 0, PAGE - 1, TARGET, RW), OK);
        assert_eq!(bed.vm.guest.map(1, PAGE, 2 * PAGE - 1, SOURCE, READ), OK);
        assert!(bed.copies(PAGE, 0, SOURCE, TARGET));
        assert_eq!(bed.vm.guest.detach(1, endpoint(0)), OK);
        bed.write_is_blocked(TARGET);
    }
}

/// The helper answers when the ATTACH that has asked it has failed.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn a_device_that_is_taken_over_late_is_where_its_endpoint_is() {
    let mut bed = EduBed::new(Backend::TakenOver, "bypass = false");
    let ep = endpoint(0);
    bed.vm.disconnect();
    bed.vm.without_helper(|vm| vm.replace_vmm(|| ()));
    assert_eq!(bed.vm.daemon.endpoint(ep)["taken_over"], false);
    bed.vm.signal_helper(Signal::STOP);
    assert_ne!(bed.vm.guest.attach(1, ep), OK);
    assert_eq!(bed.vm.daemon.endpoint(ep)["taken_over"], false);
    bed.vm.signal_helper(Signal::CONT);
    let daemon = &bed.vm.daemon;
    daemon.wait_for("the device", || daemon.endpoint(ep)["taken_over"] == true);
    assert_eq!(daemon.endpoint(ep)["dma"], "blocked");
    bed.write_is_blocked(TARGET);
    assert_eq!(bed.vm.guest.attach(1, ep), OK);
    assert_eq!(bed.vm.guest.map(1, 0, PAGE - 1, TARGET, RW), OK);
    assert_eq!(bed.vm.guest.map(1, PAGE, 2 * PAGE - 1, SOURCE, READ), OK);
    assert!(bed.copies(PAGE, 0, SOURCE, TARGET));
}

/// The guest maps the BAR of a device for another device.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn another_devices_memory_can_be_mapped() {
    for backend in BACKENDS {
        eprintln!("{backend:?}");
        let edu = words("VIOMMU_EDU")[0].clone();
        let memory = words("VIOMMU_IVSHMEM")[0].clone();
        let mut vm = Bed::new(backend, &[&edu, &memory]);
        let function = Function::new(&memory);
        let bar_memory = function.map_bar(2);
        // The guest has the BAR at the host's address, since no driver has moved it.
        let bar = function.bar_address(2);
        let edu = Edu::new(&edu);
        vm.guest.memory.write(SOURCE, &pattern(7));
        assert_eq!(vm.guest.attach(1, endpoint(0)), OK);
        assert_eq!(vm.guest.map(1, 0, PAGE - 1, SOURCE, READ), OK);
        let flags = RW | MMIO;
        let first = 0x10_0000;
        assert_eq!(
            vm.guest
                .map(1, first, first + 4 * PAGE - 1, bar + PAGE, flags),
            OK,
            "{}",
            vm.daemon.log()
        );
        edu.read(0);
        edu.write(first + PAGE);
        let mut arrived = vec![0; PAGE as usize];
        let memory = bar_memory.as_volatile_slice();
        memory.read_slice(&mut arrived, 2 * PAGE as usize).unwrap();
        assert_eq!(arrived, pattern(7));
        // Beyond the end of the BAR, and where there is no BAR.
        assert_eq!(
            vm.guest.map(1, 0x40_0000, 0x40_1fff, bar + 0xf_f000, flags),
            FAULT
        );
        assert_eq!(
            vm.guest.map(1, 0x40_0000, 0x40_0fff, 0x9_0000_0000, flags),
            FAULT
        );
    }
}

/// Memory mapped by its address in this process, as on kernels that cannot map a file.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn memory_can_be_mapped_by_address() {
    let name = words("VIOMMU_EDU")[0].clone();
    let iommufd = IommuFd::open("/dev/iommu".as_ref()).expect("iommufd");
    let device = Cdev::open(Function::new(&name).node().as_ref()).expect("a device");
    device.bind(&iommufd, None).expect("bound");
    let file = FileOffset::new(memfd(4 * PAGE), 0);
    let memory = MmapRegion::from_file(file, 4 * PAGE as usize).expect("mapped");
    let ioas = iommufd.alloc().expect("an address space");
    let range = IovaRange::from_len(Iova(0x10_0000), 2 * PAGE).expect("not empty");
    let source = DmaSource::Host(&memory, PAGE);
    iommufd
        .map(ioas, range, Access::READ_WRITE, source)
        .expect("mapped by address");
    let past = DmaSource::Host(&memory, 3 * PAGE);
    assert!(iommufd.map(ioas, range, Access::READ, past).is_err());
    device.attach(ioas).expect("attached");
    Function::new(&name).enable();
    let edu = Edu::new(&name);
    let view = memory.as_volatile_slice();
    view.write_slice(&pattern(3), PAGE as usize).unwrap();
    edu.read(0x10_0000);
    edu.write(0x10_0000 + PAGE);
    let mut arrived = vec![0; PAGE as usize];
    view.read_slice(&mut arrived, 2 * PAGE as usize).unwrap();
    assert_eq!(arrived, pattern(3));
}
