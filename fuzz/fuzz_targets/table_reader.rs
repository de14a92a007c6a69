//! Any contents of an arena, as a reader in another process may find them.
#![no_main]

use std::sync::atomic::AtomicU64;

use libfuzzer_sys::fuzz_target;
use vhost_device_iommu::address::Iova;
use vhost_device_iommu::page_table::{Encoding, Format, Levels, TableOffset, View, reader};

fuzz_target!(|input: (u64, u64, u64, bool, bool, Vec<u64>)| {
    let (root, iova, base, arm, five, mut words) = input;
    words.truncate(4 * 512);
    let words: Vec<_> = words.into_iter().map(AtomicU64::new).collect();
    let levels = if five { Levels::Five } else { Levels::Four };
    let format = if arm {
        Format::Vmsav8Stage1
    } else {
        Format::X86FirstStage
    };
    // A reader takes no other base from a header.
    let base = base % (format.gpa_limit() - (1 << 20)) & !0xfff;
    let view = View::new(&words, Encoding { format, base });
    let found = reader::walk(view, TableOffset(root), levels, Iova(iova));
    if let Some(found) = found {
        assert!(found.contiguous_last >= Iova(iova));
        assert!(found.gpa.0 < 1 << 52);
    }
});
