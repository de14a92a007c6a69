//! Guest RAM of any contents where a VMM puts its ACPI tables.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_device_iommu::device::acpi::{Added, ReadOnlyWindows, add_viot};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RAM: usize = 0x11_0000;
const TABLES: u64 = 0xa_0000;

/// Corrects the checksum of every structure that begins on a multiple of 16, so that inputs get past it.
fn fix_checksums(bytes: &mut [u8]) {
    for at in (0..bytes.len()).step_by(16) {
        let rest = &mut bytes[at..];
        if rest.len() >= 36 && rest.starts_with(b"RSD PTR ") {
            rest[8] = 0;
            rest[8] = sum(&rest[..20]).wrapping_neg();
            rest[32] = 0;
            rest[32] = sum(&rest[..36]).wrapping_neg();
        } else if rest.len() >= 36 && rest[..4].iter().all(u8::is_ascii_uppercase) {
            let length = u32::from_le_bytes([rest[4], rest[5], rest[6], rest[7]]) as usize;
            if (36..=rest.len()).contains(&length) {
                rest[9] = 0;
                rest[9] = sum(&rest[..length]).wrapping_neg();
            }
        }
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fuzz_target!(|data: &[u8]| {
    let mut tables = data[..data.len().min(0x6_0000)].to_vec();
    fix_checksums(&mut tables);
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM)]).expect("mapped");
    memory.write_slice(&tables, GuestAddress(TABLES)).expect("fits");
    let read = || {
        let mut bytes = vec![0; RAM];
        memory.read_slice(&mut bytes, GuestAddress(0)).expect("read");
        bytes
    };
    let before = read();
    let mut viot = b"VIOT\x70\0\0\0".to_vec();
    viot.resize(0x70, 0);
    viot[9] = sum(&viot).wrapping_neg();
    let none = ReadOnlyWindows::default();
    match add_viot(&memory, &none, &viot) {
        (pointer, Ok(Added::Written { at })) => {
            assert!(pointer.is_some());
            let (_, again) = add_viot(&memory, &none, &viot);
            assert_eq!(again, Ok(Added::Present { at }));
        }
        (_, _) => assert!(read() == before, "guest RAM changed without a table"),
    }
});
