//! Guest RAM of any contents where a VMM puts its ACPI tables. With an odd first byte, the VMM has mapped the last pages
//! of the BIOS area read-only.
#![no_main]

use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use vhost_device_iommu::device::acpi::{Added, ReadOnlyWindows, add_viot};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::tempfile::TempFile;

const RAM: usize = 0x11_0000;
const TABLES: u64 = 0xa_0000;
/// Where the BIOS area ends.
const BIOS_END: usize = 0x10_0000;

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
    let (first, data) = data.split_first().unwrap_or((&0, &[]));
    let mut tables = data[..data.len().min(0x6_0000)].to_vec();
    fix_checksums(&mut tables);
    let locked = if first & 1 == 0 {
        BIOS_END
    } else {
        BIOS_END - (usize::from(first >> 1) % 32 + 1) * 0x1000
    };
    let ranges = [
        (GuestAddress(0), locked),
        (GuestAddress(BIOS_END as u64), RAM - BIOS_END),
    ];
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).expect("mapped");
    let mut windows = ReadOnlyWindows::default();
    let ram = tables.len().min(locked - TABLES as usize);
    memory
        .write_slice(&tables[..ram], GuestAddress(TABLES))
        .expect("fits");
    if locked < BIOS_END {
        // The daemon reads no other file system.
        let file = TempFile::new_in("/dev/shm".as_ref())
            .expect("a file")
            .into_file();
        let len = (BIOS_END - locked) as u64;
        file.set_len(len).expect("longer");
        let behind = &tables[ram..tables.len().min(BIOS_END - TABLES as usize)];
        file.write_all_at(behind, 0).expect("written");
        assert!(windows.add(locked as u64, len, 0, file));
    }
    if tables.len() > BIOS_END - TABLES as usize {
        let rest = &tables[BIOS_END - TABLES as usize..];
        let rest = &rest[..rest.len().min(RAM - BIOS_END)];
        memory
            .write_slice(rest, GuestAddress(BIOS_END as u64))
            .expect("fits");
    }
    let read = || {
        let mut bytes = vec![0; RAM];
        for (at, len) in ranges {
            let from = at.0 as usize;
            memory
                .read_slice(&mut bytes[from..from + len], at)
                .expect("read");
        }
        bytes
    };
    let before = read();
    let mut viot = b"VIOT\x70\0\0\0".to_vec();
    viot.resize(0x70, 0);
    viot[9] = sum(&viot).wrapping_neg();
    match add_viot(&memory, &windows, &viot) {
        (pointer, Ok(Added::Written { at })) => {
            assert!(pointer.is_some());
            let (_, again) = add_viot(&memory, &windows, &viot);
            assert_eq!(again, Ok(Added::Present { at }));
        }
        (_, _) => assert!(read() == before, "guest RAM changed without a table"),
    }
});
