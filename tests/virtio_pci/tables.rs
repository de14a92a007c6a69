//! The guest learns its endpoints from the device: the tables of a VMM in guest RAM, and reads of BAR 2.

use super::bed::{CONFIG, RAM, SPACE, Vm};
use crate::common::daemon::Daemon;

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
