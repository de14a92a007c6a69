//! An `edu` below a vIOMMU, and tables that its SMMU walks.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost_device_iommu::address::{Access, Gpa, Iova, IovaRange};
use vhost_device_iommu::vfio::nesting::{
    BoundDevice, ContextDescriptor, HardwareKind, NestParent, NestedTable, NestingKernel,
    SmmuCommand, SmmuHardware, StreamEntry, VirtualDevice, VirtualIommu,
};
use vhost_device_iommu::vfio::{AddressSpaces, Attach, Cdev, DmaSource, IommuFd};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::common::memory::memfd;
use crate::devices::{Edu, Function};
use crate::words;

pub const PAGE: u64 = 4096;
/// The guest-physical address of the guest's memory.
pub const RAM: u64 = 0x4000_0000;
const RAM_SIZE: u64 = 0x40_0000;
/// The address of the tables in the second stage, outside of the guest's memory.
pub const TABLE: u64 = 0x70_0000_0000;
const TABLE_SIZE: u64 = 0x10_0000;
/// The stream ID in commands and events.
pub const STREAM: u32 = 0x42;
/// Bits of a pointer to a table that the SMMU ignores. The daemon's tables have a count there.
const IGNORED_IN_POINTERS: u64 = 0x2a5 << 2;
/// The pages of one [`Tables`]: a descriptor, and a table for each of four levels.
const PAGES: u64 = 5;

pub struct NestingBed {
    // Dropped before the device is closed.
    stream: Option<VirtualDevice>,
    pub viommu: Arc<VirtualIommu>,
    pub parent: Arc<NestParent>,
    pub edu: Edu,
    pub device: Cdev,
    pub iommufd: Arc<IommuFd>,
    pub bound: BoundDevice,
    ram: MmapRegion,
    table: MmapRegion,
}

impl NestingBed {
    pub fn new() -> Self {
        let name = words("VIOMMU_EDU")[0].clone();
        let iommufd = Arc::new(IommuFd::open("/dev/iommu".as_ref()).expect("iommufd"));
        let device = Cdev::open(Function::new(&name).node().as_ref()).expect("a device");
        let bound = device.bind(&iommufd, None).expect("bound");
        let ioas = iommufd.alloc().expect("an address space");
        let map = |first, size, access| {
            let file = FileOffset::new(memfd(size), 0);
            let memory = MmapRegion::from_file(file, size as usize).expect("mapped");
            let range = IovaRange::from_len(Iova(first), size).expect("a range");
            let backing = memory.file_offset().expect("a file");
            let source = DmaSource::File(AsFd::as_fd(backing.file()), 0);
            let mapped = iommufd.map(ioas, range, access, source);
            mapped.expect("mapped for devices");
            memory
        };
        let ram = map(RAM, RAM_SIZE, Access::READ_WRITE);
        let table = map(TABLE, TABLE_SIZE, Access::READ);
        let parent = Arc::new(NestParent::new(iommufd.clone(), bound, ioas).expect("a parent"));
        let viommu = Arc::new(VirtualIommu::new(parent.clone(), bound).expect("a vIOMMU"));
        let stream = VirtualDevice::new(viommu.clone(), bound, STREAM).expect("a vDEVICE");
        Function::new(&name).enable();
        Self {
            edu: Edu::new(&name),
            device,
            iommufd,
            bound,
            ram,
            table,
            stream: Some(stream),
            viommu,
            parent,
        }
    }

    pub fn smmu(&self) -> SmmuHardware {
        let info = self.iommufd.hardware_info(self.bound).expect("known");
        match info.kind {
            HardwareKind::Smmu(hardware) => hardware,
            other => panic!("{other:?} is no SMMU"),
        }
    }

    /// Empty tables with an ASID. `number` chooses their place.
    pub fn tables(&self, number: u64, asid: u16) -> Tables<'_> {
        let tables = Tables {
            memory: &self.table,
            first: number * PAGES * PAGE,
        };
        let descriptor = ContextDescriptor {
            table: Gpa(TABLE + tables.first + PAGE),
            asid,
            input_bits: 48,
            output_bits: self.smmu().output_bits,
        };
        let bytes = descriptor.bytes().expect("in range");
        let place = tables.first as usize;
        let memory = self.table.as_volatile_slice();
        memory
            .write_slice(&bytes, place)
            .expect("within the memory");
        for level in 1..4 {
            // All addresses of the tests are in the first gigabyte.
            let below = TABLE + tables.first + (level + 1) * PAGE;
            tables.put(level, 0, below | IGNORED_IN_POINTERS | 0b11);
        }
        tables
    }

    pub fn table(&self, entry: StreamEntry) -> NestedTable {
        NestedTable::for_smmu(self.viommu.clone(), self.bound, entry).expect("a nested table")
    }

    /// Attaches the device to a nested table of `tables`.
    pub fn attach(&self, tables: &Tables<'_>) -> Attached<'_> {
        let entry = StreamEntry::translated(tables.descriptor()).expect("aligned");
        let table = self.table(entry);
        self.device.attach(table.id()).expect("attached");
        Attached {
            table,
            device: &self.device,
        }
    }

    /// Takes the device's stream ID.
    pub fn forget_stream(&mut self) {
        self.stream = None;
    }

    /// Invalidates `pages` pages from an address on.
    pub fn invalidate(&self, asid: u16, first: u64, pages: u64) {
        let range = IovaRange::from_len(Iova(first), pages * PAGE).expect("a range");
        let commands = SmmuCommand::invalidate_range(asid, range, true, true);
        self.viommu.invalidate(&commands).expect("invalidated");
    }

    /// Copies a page by DMA.
    pub fn copy(&self, from: u64, to: u64) {
        self.edu.read(from);
        self.edu.write(to);
    }

    /// Fills a page of the guest's memory.
    pub fn fill(&self, number: u64, value: u8) {
        let memory = self.ram.as_volatile_slice();
        let bytes = [value; PAGE as usize];
        let place = (number * PAGE) as usize;
        memory
            .write_slice(&bytes, place)
            .expect("within the memory");
    }

    pub fn clear(&self, number: u64) {
        self.fill(number, 0);
    }

    /// Checks that all bytes of a page have this value.
    #[track_caller]
    pub fn expect(&self, number: u64, value: u8) {
        let mut found = [0; PAGE as usize];
        let memory = self.ram.as_volatile_slice();
        let place = (number * PAGE) as usize;
        memory
            .read_slice(&mut found, place)
            .expect("within the memory");
        let wrong = found.iter().position(|byte| *byte != value);
        assert_eq!(
            wrong.map(|at| (at, found[at])),
            None,
            "page {number} is not {value}"
        );
    }

    #[track_caller]
    pub fn expect_empty(&self, number: u64) {
        self.expect(number, 0);
    }

    /// A word of the guest's memory.
    pub fn ram_word(&self, number: u64, word: u64) -> u64 {
        let memory = self.ram.as_volatile_slice();
        let place = (number * PAGE + word * 8) as usize;
        memory
            .load(place, Ordering::Relaxed)
            .expect("within the memory")
    }

    pub fn table_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; TABLE_SIZE as usize];
        let memory = self.table.as_volatile_slice();
        memory.read_slice(&mut bytes, 0).expect("within the memory");
        bytes
    }
}

/// A nested table with the device attached; on drop the device is taken out of it.
pub struct Attached<'a> {
    table: NestedTable,
    device: &'a Cdev,
}

impl Attached<'_> {
    pub fn id(&self) -> u32 {
        self.table.id()
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        // It may be in another table.
        let _ = self.device.detach();
    }
}

/// Tables of four levels for the addresses below 1 GiB, with a descriptor.
pub struct Tables<'a> {
    memory: &'a MmapRegion,
    /// The first byte in the memory.
    first: u64,
}

impl Tables<'_> {
    pub fn descriptor(&self) -> Gpa {
        Gpa(TABLE + self.first)
    }

    /// The address of the table with the leaves.
    pub fn leaves(&self) -> u64 {
        TABLE + self.first + 4 * PAGE
    }

    /// Stores the entry of a page below 2 MiB.
    pub fn store(&self, iova: u64, leaf: Leaf) {
        assert!(iova < 0x20_0000);
        let entry = if leaf.0 == 0 { 0 } else { leaf.0 | 0b11 };
        self.put(4, iova >> 12, entry);
    }

    /// Stores the entry of a block of 2 MiB.
    pub fn store_block(&self, iova: u64, leaf: Leaf) {
        assert!((0x20_0000..0x4000_0000).contains(&iova));
        self.put(3, iova >> 21, leaf.0 & !0b11 | 0b01);
    }

    fn put(&self, level: u64, index: u64, entry: u64) {
        let place = (self.first + level * PAGE + index * 8) as usize;
        let memory = self.memory.as_volatile_slice();
        memory
            .store(entry, place, Ordering::Release)
            .expect("within the memory");
    }
}

/// The entry of a page.
#[derive(Clone, Copy)]
pub struct Leaf(pub u64);

impl Leaf {
    pub const NONE: Self = Self(0);

    /// Memory for reads and writes: AP[1], SH, nG; the access flag stays 0.
    pub fn at(address: u64) -> Self {
        Self(address | 1 << 6 | 3 << 8 | 1 << 11 | 0b11)
    }

    /// With all bits that the daemon's tables use for themselves (58 to 55), the access flag, PXN and UXN.
    pub fn marked(self) -> Self {
        Self(self.0 | 0xf << 55 | 1 << 10 | 3 << 53)
    }

    /// AP[2].
    pub fn read_only(self) -> Self {
        Self(self.0 | 1 << 7)
    }

    pub fn device(self) -> Self {
        let index = u64::from(ContextDescriptor::ATTRIBUTES_OF_DEVICES);
        Self(self.0 | index << 2)
    }
}
