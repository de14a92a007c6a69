//! The guest learns its endpoints from the device: the tables of a VMM in guest RAM, and reads of BAR 2.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use super::bed::{CONFIG, Client, RAM, RW, SPACE, Vm};
use crate::common::daemon::Daemon;
use crate::common::memory::memfd;
use crate::connection::{RESET, dma_map};

/// The region of the BAR with the root pointer.
const TABLE_BAR: u32 = 2;
const RSDP: u64 = 0xa_0000;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

/// The tables of cloud-hypervisor: the RSDP, one table, and the XSDT last.
fn tables() -> Vec<u8> {
    let table = |name: &[u8; 4], body: &[u8]| {
        let mut bytes = name.to_vec();
        bytes.extend_from_slice(&(36 + body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&[1, 0]);
        bytes.extend_from_slice(b"CLOUDHCHTABLE \x01\0\0\0RVAT\x01\0\0\0");
        bytes.extend_from_slice(body);
        bytes[9] = sum(&bytes).wrapping_neg();
        bytes
    };
    let apic = table(b"APIC", &[7; 20]);
    let xsdt = table(b"XSDT", &(RSDP + 36).to_le_bytes());
    let mut bytes = b"RSD PTR \0CLOUDH\x02\0\0\0\0\x24\0\0\0".to_vec();
    bytes.extend_from_slice(&(RSDP + 36 + apic.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes[8] = sum(&bytes[..20]).wrapping_neg();
    bytes[32] = sum(&bytes).wrapping_neg();
    [bytes, apic, xsdt].concat()
}

/// DMA_MAP: the device may only read.
const RO: u32 = 1;
/// Where SeaBIOS has its area, which it locks against writing.
const LOCKED: std::ops::Range<u64> = 0xf_0000..0x10_0000;

/// The tables of QEMU's SeaBIOS: an RSDP of revision 0, and one table with the RSDT behind it at `at`.
fn seabios(at: u32) -> (Vec<u8>, Vec<u8>) {
    let fix = |bytes: &mut [u8], field: usize| bytes[field] = sum(bytes).wrapping_neg();
    let mut rsdp = b"RSD PTR \0BOCHS \0".to_vec();
    rsdp.extend((at + 48).to_le_bytes());
    fix(&mut rsdp, 8);
    let mut tables = b"WAET\x30\0\0\0\x01\0BOCHS BXPC    \x01\0\0\0BXPC\x01\0\0\0".to_vec();
    tables.resize(48, 3);
    fix(&mut tables, 9);
    let mut rsdt = b"RSDT\x28\0\0\0\x01\0BOCHS BXPC    \x01\0\0\0BXPC\x01\0\0\0".to_vec();
    rsdt.extend(at.to_le_bytes());
    fix(&mut rsdt, 9);
    tables.extend(rsdt);
    (rsdp, tables)
}

/// Maps RAM as QEMU does once SeaBIOS has locked its area.
fn map_locked(client: &mut Client, ram: &File) {
    for (flags, range) in [(RW, 0..LOCKED.start), (RO, LOCKED), (RW, LOCKED.end..RAM)] {
        let body = dma_map(flags, range.start, range.start, range.end - range.start);
        assert_eq!(client.map(&body, &[ram.as_fd()]), 0);
    }
}

fn bytes_of(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).expect("read");
    bytes
}

fn state(daemon: &Daemon) -> String {
    let state = &daemon.status()["acpi_tables"]["state"];
    state.as_str().expect("a state").to_owned()
}

#[test]
fn a_read_of_the_root_pointer_adds_viot_to_the_guests_tables() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    assert_eq!(state(&daemon), "not read");
    for boot in 0..3 {
        // As cloud-hypervisor does: a new connection, new memory and new tables at each boot.
        let mut vm = Vm::new(&daemon);
        let before = tables();
        vm.memory.write(RSDP, &before);
        assert_eq!(state(&daemon), "not read", "boot {boot}");
        // The command register is 0: the kernel reads the BAR before any driver. It begins in the middle.
        assert_eq!(vm.client.read(SPACE, 4, 2), 0);
        assert_eq!(vm.client.read_bytes(TABLE_BAR, 24, 8), before[24..32]);
        assert_eq!(vm.client.read_bytes(TABLE_BAR, 0, 36), before[..36]);
        assert_eq!(state(&daemon), "written");

        let xsdt = RSDP + 36 + 56;
        let grown = vm.memory.read(xsdt, 36 + 16);
        assert_eq!((grown[4], sum(&grown)), (36 + 16, 0));
        assert_eq!(grown[36..44], (RSDP + 36).to_le_bytes());
        let viot = u64::from_le_bytes(grown[44..].try_into().expect("eight"));
        let table = vm.memory.read(viot, 48);
        assert_eq!(&table[..4], b"VIOT");
        let table = vm.memory.read(viot, usize::from(table[4]));
        assert_eq!(sum(&table), 0);
        // The IOMMU at 00:05.0, and its three endpoints, of which the first is at 00:06.0.
        assert_eq!(table[36], 4);
        assert_eq!(table[48..56], [3, 0, 16, 0, 0, 0, 0x28, 0]);
        assert_eq!(table[64..72], [1, 0, 24, 0, 0x30, 0, 0, 0]);
        assert_eq!(table[76..80], [0x30, 0, 0x30, 0]);
    }
}

#[test]
fn broken_tables_stay_as_they_are_and_the_status_says_why() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::new(&daemon);
    assert_eq!(vm.client.read(TABLE_BAR, 0x100, 4), 0);
    assert_eq!(state(&daemon), "read elsewhere");
    assert_eq!(vm.client.read(TABLE_BAR, 0, 8), 0);
    assert_eq!(state(&daemon), "refused");
    let mut broken = tables();
    broken[36 + 40] ^= 1;
    vm.memory.write(RSDP, &broken);
    let before = vm.memory.read(0, RAM as usize);
    // The guest boots with the tables that it has.
    assert_eq!(vm.client.read_bytes(TABLE_BAR, 0, 36), broken[..36]);
    assert_eq!(vm.memory.read(0, RAM as usize), before);
    let text = daemon.status()["acpi_tables"]["text"].to_string();
    assert!(text.contains("0xa0024 has a wrong checksum"), "{text}");

    // Sizing, as that VMM and firmware do.
    vm.client.write(SPACE, 0x18, &[0xff; 4]);
    assert_eq!(vm.client.read(SPACE, 0x18, 4), 0xffff_f000);
}

/// QEMU maps the area read-only in which SeaBIOS has the RSDP. At each reset of the VM it is RAM again for a while, and
/// SeaBIOS writes new tables.
#[test]
fn a_root_pointer_in_memory_that_is_mapped_read_only_is_found() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut client = Client::connect(&daemon);
    let ram = memfd(RAM);
    for (boot, (pointer_at, tables_at)) in [(0xf_5270, 0x3e_0040), (0xf_ffe0, 0x3c_0000)]
        .into_iter()
        .enumerate()
    {
        assert_eq!(client.map(&dma_map(RW, 0, 0, RAM), &[ram.as_fd()]), 0);
        assert_eq!(state(&daemon), "not read", "boot {boot}");
        let (rsdp, tables) = seabios(tables_at);
        ram.write_all_at(&vec![0; RAM as usize], 0)
            .expect("written");
        ram.write_all_at(&rsdp, pointer_at).expect("written");
        ram.write_all_at(&tables, tables_at.into())
            .expect("written");
        assert_eq!(client.unmap(0, RAM).errno(), 0);
        map_locked(&mut client, &ram);
        let locked = bytes_of(&ram, LOCKED.start, 0x1_0000);

        assert_eq!(client.read_bytes(TABLE_BAR, 0, 20), rsdp);
        assert_eq!(client.read_bytes(TABLE_BAR, 20, 16), [0; 16]);
        assert_eq!(state(&daemon), "written", "boot {boot}");
        let rsdt = bytes_of(&ram, u64::from(tables_at) + 48, 44);
        assert_eq!((rsdt[4], sum(&rsdt)), (44, 0));
        let viot = u32::from_le_bytes(rsdt[40..].try_into().expect("four"));
        assert!(viot > tables_at, "{viot:#x}");
        assert_eq!(bytes_of(&ram, viot.into(), 4), b"VIOT");
        assert_eq!(bytes_of(&ram, LOCKED.start, 0x1_0000), locked);

        for range in [0..LOCKED.start, LOCKED, LOCKED.end..RAM] {
            let reply = client.unmap(range.start, range.end - range.start);
            assert_eq!(reply.errno(), 0);
        }
        assert_eq!(client.connection.call(RESET, &[], &[]).errno(), 0);
    }
    let log = daemon.log();
    let written = log.matches("the VIOT table is in guest RAM").count();
    assert_eq!(written, 2, "once for each boot: {log}");
}

/// No window that a client maps read-only keeps the daemon from answering, or makes it keep a descriptor.
#[test]
fn read_only_windows_that_are_no_memory_have_no_root_pointer() {
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut client = Client::connect(&daemon);
    let ram = memfd(RAM);
    let (rsdp, tables) = seabios(0x3e_0000);
    ram.write_all_at(&rsdp, 0xf_5270).expect("written");
    ram.write_all_at(&tables, 0x3e_0000).expect("written");
    let body = dma_map(RW, 0x10_0000, 0x10_0000, RAM - 0x10_0000);
    assert_eq!(client.map(&body, &[ram.as_fd()]), 0);
    let before = daemon.fd_count();

    let (pipe, _end) = std::io::pipe().expect("a pipe");
    let stranger = File::open("/proc/self/maps").expect("a file");
    let empty = memfd(0);
    let mut hostile: Vec<(u64, u64, u64, &[BorrowedFd<'_>])> = Vec::new();
    let (ram_fd, pipe_fd) = ([ram.as_fd()], [pipe.as_fd()]);
    let (stranger_fd, empty_fd) = ([stranger.as_fd()], [empty.as_fd()]);
    hostile.push((0xf_0000, 0xf_0000, 0x1_0000, &pipe_fd));
    hostile.push((0xf_0000, 0xf_0000, 0x1_0000, &stranger_fd));
    hostile.push((0, 0xf_0000, 0x1_0000, &empty_fd));
    hostile.push((u64::MAX - 0xfff, 0xf_0000, 0x1_0000, &ram_fd));
    hostile.push((0xf_0000, 0xf_0000, 0x1_0000, &[]));
    hostile.push((0xf_5000, 0xf_5000, 0xfff, &ram_fd));
    for (offset, address, size, fds) in hostile {
        let body = dma_map(RO, offset, address, size);
        assert_eq!(client.map(&body, fds), 0, "{offset:#x} {address:#x}");
        assert_eq!(client.read(TABLE_BAR, 0, 8), 0, "{offset:#x} {address:#x}");
        assert_eq!(state(&daemon), "refused");
        assert_eq!(client.unmap(address, size).errno(), 0);
    }
    // A window for each page, most of them outside the area with the root pointer.
    for page in 0..0x100 {
        let body = dma_map(RO, page * 0x1000, page * 0x1000, 0x1000);
        assert_eq!(client.map(&body, &[ram.as_fd()]), 0);
    }
    assert!(daemon.fd_count() <= before + 32, "{}", daemon.fd_count());
    assert_eq!(client.read_bytes(TABLE_BAR, 0, 20), rsdp);
    assert_eq!(state(&daemon), "written");
    for page in 0..0x100 {
        assert_eq!(client.unmap(page * 0x1000, 0x1000).errno(), 0);
    }
    daemon.wait_for("closed descriptors", || daemon.fd_count() == before);
}

#[test]
fn the_log_says_when_the_guest_does_not_read_the_root_pointer() {
    const MISSED: &str =
        "the guest's driver has started the device, but the guest has not read the root pointer";
    let daemon = Daemon::over_vfio_user(CONFIG);
    let mut vm = Vm::started(&daemon);
    assert_eq!(state(&daemon), "not read");
    vm.start(64);
    let count = |text: &str| daemon.log().matches(text).count();
    assert_eq!(count(MISSED), 1, "{}", daemon.log());
    assert_eq!(vm.client.connection.call(RESET, &[], &[]).errno(), 0);
    vm.start(64);
    assert_eq!(count(MISSED), 2, "once for each boot");

    assert_eq!(vm.client.read(TABLE_BAR, 0x124, 4), 0);
    assert_eq!(state(&daemon), "read elsewhere");
    let text = daemon.status()["acpi_tables"]["text"].to_string();
    assert!(text.contains("at offset 0x124 only"), "{text}");
    assert_eq!(count("BAR 2 of this device at offset 0x124 only"), 1);
}
