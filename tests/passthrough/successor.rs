//! What a dead process leaves in the kernel, and what the next one can do with it: the facts that the backends' `adopt`
//! builds on.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::Command;

use rustix::process::{Signal, getpid, kill_process};
use vhost_device_iommu::address::{Access, Iova, IovaRange};
use vhost_device_iommu::process::inherited::adopt;
use vhost_device_iommu::vfio::{
    AddressSpaces, Attach, Cdev, Container, DmaSource, Group, IommuFd, Type1,
};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::bed::inheritable;
use crate::common::memory::memfd;
use crate::devices::{Edu, Function};
use crate::words;

const PAGE: u64 = 4096;
/// Mapped to the file's first page: by file with iommufd.
const FIRST: u64 = 0x10_0000;
/// Mapped to the second page, by address.
const SECOND: u64 = 0x20_0000;
/// The numbers of the descriptors that the dying process inherits.
const DESCRIPTORS: &str = "VIOMMU_TEST_DESCRIPTORS";
/// Where it leaves the number of its address space.
const NUMBER: &str = "VIOMMU_TEST_NUMBER";

fn page(first: u64) -> IovaRange {
    IovaRange::from_len(Iova(first), PAGE).expect("a page")
}

fn mapped(file: &File) -> MmapRegion {
    let file = FileOffset::new(file.try_clone().expect("a descriptor"), 0);
    MmapRegion::from_file(file, 2 * PAGE as usize).expect("mapped")
}

fn fill(memory: &MmapRegion, at: u64, byte: u8) {
    let slice = memory.as_volatile_slice();
    slice
        .write_slice(&[byte; PAGE as usize], at as usize)
        .expect("written");
}

fn has(memory: &MmapRegion, at: u64, byte: u8) -> bool {
    let mut found = [0; PAGE as usize];
    let slice = memory.as_volatile_slice();
    slice.read_slice(&mut found, at as usize).expect("read");
    found == [byte; PAGE as usize]
}

/// Not a test: the process that maps and dies. Other tests execute this program with its name.
#[test]
#[ignore = "executed by the tests of this file"]
fn the_process_that_dies() {
    let Ok(descriptors) = std::env::var(DESCRIPTORS) else {
        return;
    };
    let mut files = descriptors
        .split(' ')
        .map(|fd| adopt(fd.parse().expect("a number")).expect("inherited"));
    let file = File::from(files.next().expect("guest memory"));
    let memory = mapped(&file);
    let kernel = files.next().expect("a kernel's file");
    if let Some(device) = files.next() {
        let iommufd = IommuFd::adopt(kernel).expect("an iommufd");
        let device = Cdev::adopt(device);
        device.bind(&iommufd, None).expect("bound");
        let ioas = iommufd.alloc().expect("an address space");
        for (first, source) in [
            (FIRST, DmaSource::File(file.as_fd(), 0)),
            (SECOND, DmaSource::Host(&memory, PAGE)),
        ] {
            AddressSpaces::map(&iommufd, ioas, page(first), Access::READ_WRITE, source)
                .expect("mapped");
        }
        device.attach(ioas).expect("attached");
        fs::write(std::env::var(NUMBER).expect("a path"), ioas.to_string()).expect("written");
    } else {
        let container = Container::adopt(kernel).expect("a container");
        for (first, offset) in [(FIRST, 0), (SECOND, PAGE)] {
            Type1::map(&container, page(first), Access::READ_WRITE, &memory, offset)
                .expect("mapped");
        }
    }
    kill_process(getpid(), Signal::KILL).expect("killed");
}

fn live_and_die(descriptors: &[i32], number: &Path) {
    let descriptors: Vec<_> = descriptors
        .iter()
        .map(|fd| inheritable(*fd).to_string())
        .collect();
    let status = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "successor::the_process_that_dies"])
        .env(DESCRIPTORS, descriptors.join(" "))
        .env(NUMBER, number)
        .status()
        .expect("it runs");
    assert_eq!(status.code(), None, "it dies of a signal");
}

/// The device copies the first page to the second one.
fn copies(edu: &Edu, memory: &MmapRegion, byte: u8) -> bool {
    fill(memory, 0, byte);
    fill(memory, PAGE, !byte);
    edu.read(FIRST);
    edu.write(SECOND);
    has(memory, PAGE, byte)
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn address_spaces_outlive_their_process() {
    let name = &words("VIOMMU_EDU")[0];
    let function = Function::new(name);
    let folder = tempfile::tempdir().expect("a folder");
    let number = folder.path().join("number");
    let file = memfd(2 * PAGE);
    let memory = mapped(&file);
    let node = IommuFd::open_node("/dev/iommu".as_ref()).expect("an iommufd");
    let device = Cdev::open(function.node().as_ref()).expect("a device");
    let descriptors = [&file.as_fd(), &node.as_fd(), &device.as_fd()].map(AsRawFd::as_raw_fd);
    live_and_die(&descriptors, &number);
    let ioas: u32 = fs::read_to_string(&number)
        .expect("left")
        .parse()
        .expect("a number");
    let iommufd = IommuFd::adopt(node).expect("an iommufd");
    assert!(device.is_bound());
    function.enable();
    let edu = Edu::new(name);
    assert!(copies(&edu, &memory, 0x5a), "DMA goes on");
    // While the device works: the kernel must not take it out of its address space.
    edu.start_read(FIRST);
    device.attach(ioas).expect("it is there already");
    edu.wait();
    assert!(copies(&edu, &memory, 0x33), "DMA still goes on");
    let busy = iommufd.destroy(ioas).expect_err("in use");
    assert_eq!(busy.raw_os_error(), Some(libc::EBUSY));
    for first in [FIRST, SECOND] {
        let unmapped = AddressSpaces::unmap(&iommufd, ioas, page(first));
        assert_eq!(unmapped.expect("unmapped"), PAGE, "{first:#x}");
    }
    assert!(!copies(&edu, &memory, 0x77), "nothing is mapped");
    device.detach().expect("detached");
    iommufd.destroy(ioas).expect("destroyed");
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn containers_outlive_their_process() {
    let name = &words("VIOMMU_EDU")[0];
    let function = Function::new(name);
    let file = memfd(2 * PAGE);
    let memory = mapped(&file);
    let mut container = Container::open("/dev/vfio/vfio".as_ref()).expect("a container");
    let group = Group::open(format!("/dev/vfio/{}", function.group()).as_ref()).expect("a group");
    container.set_group(group).expect("a type1 IOMMU");
    let _device = container
        .group()
        .expect("just set")
        .device(name, None)
        .expect("a device");
    let available = || container.available().expect("asked").expect("a number");
    let room = available();
    let descriptors = [&file.as_fd(), &container.as_fd()].map(AsRawFd::as_raw_fd);
    live_and_die(&descriptors, Path::new(""));
    assert_eq!(available(), room - 2);
    function.enable();
    let edu = Edu::new(name);
    assert!(copies(&edu, &memory, 0x5a), "DMA goes on");
    let unmapped = Type1::unmap(&container, page(FIRST)).expect("unmapped");
    assert_eq!((unmapped, available()), (PAGE, room - 1));
    container.unmap_all().expect("emptied");
    assert_eq!(available(), room);
    assert!(!copies(&edu, &memory, 0x77), "nothing is mapped");
}
