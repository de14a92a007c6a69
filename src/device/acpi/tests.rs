//! The tables of a VMM in guest RAM, laid out at random; an independent parser; mutations of every kind.
//!
//! One file: every test needs the layouts.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;

const RAM: usize = 0x20_0000;
const VIOT: u64 = 112;

fn viot() -> Vec<u8> {
    let mut table = table(*b"VIOT", 0, &[0x5a; 112 - 36]);
    table[10..16].copy_from_slice(b"VIOMMU");
    fix(&mut table);
    table
}

/// Adds the table to tables that are all in RAM.
fn add(memory: &GuestMemoryMmap) -> (Option<Rsdp>, Result<Added, AcpiRefusal>) {
    add_viot(memory, &ReadOnlyWindows::default(), &viot())
}

fn fix(table: &mut [u8]) {
    table[9] = 0;
    table[9] = rsdp::sum(table).wrapping_neg();
}

/// A table with a correct length and checksum.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = signature.to_vec();
    let length = u32::try_from(36 + body.len()).expect("short");
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&[revision, 0]);
    bytes.extend_from_slice(b"VMM   VMMTABLE\x01\0\0\0VMM \x01\0\0\0");
    bytes.extend_from_slice(body);
    fix(&mut bytes);
    bytes
}

fn rsdp(revision: u8, root: u64) -> Vec<u8> {
    let mut bytes = b"RSD PTR \0VMM   ".to_vec();
    bytes.push(revision);
    if revision == 0 {
        bytes.extend_from_slice(&u32::try_from(root).expect("low").to_le_bytes());
    } else {
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&36u32.to_le_bytes());
        bytes.extend_from_slice(&root.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
    }
    fix_rsdp(&mut bytes);
    bytes
}

fn fix_rsdp(bytes: &mut [u8]) {
    bytes[8] = 0;
    bytes[8] = rsdp::sum(&bytes[..20]).wrapping_neg();
    if bytes.len() > 20 {
        bytes[32] = 0;
        bytes[32] = rsdp::sum(bytes).wrapping_neg();
    }
}

/// Guest RAM with the tables of a VMM, and where each is.
#[derive(Clone, Debug)]
struct Image {
    ram: Vec<u8>,
    rsdp: u64,
    root: u64,
    wide: bool,
    /// Of the tables that the root table names.
    children: Vec<u64>,
    fadt: Option<u64>,
}

/// What the strategies choose.
#[derive(Clone, Debug)]
struct Layout {
    rsdp_at: u64,
    revision: u8,
    start: u64,
    bodies: Vec<Vec<u8>>,
    with_fadt: bool,
    with_facs: bool,
    gap: u64,
    root_last: bool,
}

fn layouts() -> impl Strategy<Value = Layout> {
    let body = proptest::collection::vec(any::<u8>(), 0..300);
    (
        (prop_oneof![
            Just(0xa_0000u64),
            (0u64..0x1ff0).prop_map(|step| 0xe_0000 + 16 * step),
        ]),
        prop_oneof![Just(0u8), Just(2)],
        prop_oneof![Just(0xa_0024u64), Just(0xb_0000), Just(0x18_0000)],
        proptest::collection::vec(body, 0..8),
        any::<(bool, bool, bool)>(),
        prop_oneof![Just(0u64), Just(1), Just(40)],
    )
        .prop_map(|(rsdp_at, revision, start, bodies, flags, gap)| Layout {
            rsdp_at,
            revision,
            start,
            bodies,
            with_fadt: flags.0,
            with_facs: flags.1,
            gap,
            root_last: flags.2,
        })
}

impl Layout {
    fn image(&self) -> Image {
        let mut ram = vec![0; RAM];
        let mut next = self.start;
        let gap = self.gap;
        let mut put = |bytes: &[u8], extra: u64| {
            let at = next;
            let index = usize::try_from(at).expect("low");
            ram[index..index + bytes.len()].copy_from_slice(bytes);
            next += bytes.len() as u64 + gap + extra;
            at
        };
        let count = self.bodies.len() + usize::from(self.with_fadt);
        let wide = self.revision == 2;
        let entry = if wide { 8 } else { 4 };
        // A root table in front of the others has room for one more entry.
        let early = (!self.root_last).then(|| put(&vec![0; 36 + entry * count], 8));
        let mut children: Vec<u64> = self
            .bodies
            .iter()
            .map(|body| put(&table(*b"SSDT", 1, body), 0))
            .collect();
        let fadt = self.with_fadt.then(|| {
            let dsdt = put(&table(*b"DSDT", 2, &[0x10; 77]), 0);
            let mut body = vec![0; 240];
            if self.with_facs {
                let mut facs = b"FACS\x40\0\0\0".to_vec();
                facs.resize(64, 0);
                let at = u32::try_from(put(&facs, 0)).expect("low");
                body[0..4].copy_from_slice(&at.to_le_bytes());
            }
            let field = if wide { 140 - 36 } else { 40 - 36 };
            body[field..field + 4]
                .copy_from_slice(&u32::try_from(dsdt).expect("low").to_le_bytes());
            put(&table(*b"FACP", 6, &body), 0)
        });
        children.extend(fadt);
        let mut body = Vec::new();
        for &at in &children {
            body.extend_from_slice(&at.to_le_bytes()[..entry]);
        }
        let root_table = table(if wide { *b"XSDT" } else { *b"RSDT" }, 1, &body);
        let root = match early {
            Some(at) => at,
            None => put(&root_table, 0),
        };
        let index = usize::try_from(root).expect("low");
        ram[index..index + root_table.len()].copy_from_slice(&root_table);
        let pointer = rsdp(self.revision, root);
        let index = usize::try_from(self.rsdp_at).expect("low");
        ram[index..index + pointer.len()].copy_from_slice(&pointer);
        Image {
            ram,
            rsdp: self.rsdp_at,
            root,
            wide,
            children,
            fadt,
        }
    }
}

impl Image {
    fn memory(&self) -> GuestMemoryMmap {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).expect("mapped");
        memory
            .write_slice(&self.ram, GuestAddress(0))
            .expect("written");
        memory
    }

    fn bytes(&mut self, at: u64, len: usize) -> &mut [u8] {
        let at = usize::try_from(at).expect("low");
        &mut self.ram[at..at + len]
    }

    /// Recomputes the checksum of the table at `at`, as a hostile guest would.
    fn fix(&mut self, at: u64) {
        let head: [u8; 4] = self.bytes(at + 4, 4).try_into().expect("four");
        let len = usize::try_from(u32::from_le_bytes(head)).expect("short");
        if usize::try_from(at).expect("low") + len <= RAM && len >= 36 {
            fix(self.bytes(at, len));
        }
    }

    fn refused(&self) -> AcpiRefusal {
        let memory = self.memory();
        let (_, added) = add(&memory);
        let refusal = added.expect_err("refused");
        assert_eq!(ram_of(&memory), self.ram, "{refusal} has changed RAM");
        refusal
    }
}

fn ram_of(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; RAM];
    memory
        .read_slice(&mut bytes, GuestAddress(0))
        .expect("read");
    bytes
}

/// An independent reader: signatures and addresses of the tables that a root table in `ram` names.
fn read_back(ram: &[u8], pointer: &[u8]) -> Vec<([u8; 4], u64)> {
    let number = |bytes: &[u8]| {
        let bytes = bytes.iter().rev();
        usize::try_from(bytes.fold(0u64, |value, &byte| value << 8 | u64::from(byte))).expect("low")
    };
    let whole = |at: usize| {
        let found = &ram[at..at + number(&ram[at + 4..at + 8])];
        assert_eq!(
            found.iter().map(|&byte| u32::from(byte)).sum::<u32>() % 256,
            0
        );
        found
    };
    let wide = pointer[15] == 2;
    let (root, size) = if wide {
        (whole(number(&pointer[24..32])), 8)
    } else {
        (whole(number(&pointer[16..20])), 4)
    };
    assert!(root.starts_with(if wide { b"XSDT" } else { b"RSDT" }));
    let entries = root[36..].chunks(size).map(number);
    entries
        .map(|at| (whole(at)[..4].try_into().expect("four"), at as u64))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn viot_is_added_and_nothing_else_changes(layout in layouts()) {
        let image = layout.image();
        let memory = image.memory();
        let (pointer, added) = add(&memory);
        let pointer = pointer.expect("an RSDP");
        prop_assert_eq!(pointer.at(), image.rsdp);
        let at = match added {
            Ok(Added::Written { at }) => at,
            other => return Err(TestCaseError::fail(format!("{other:?}"))),
        };
        let ram = ram_of(&memory);
        let found = read_back(&ram, pointer.bytes());
        let mut addresses: Vec<u64> = found.iter().map(|table| table.1).collect();
        prop_assert_eq!(found.last(), Some(&(*b"VIOT", at)));
        addresses.pop();
        prop_assert_eq!(&addresses, &image.children);

        // Put back what was announced; all else must be as before.
        let mut expected = ram.clone();
        let index = usize::try_from(at).expect("low");
        prop_assert_eq!(&ram[index..index + viot().len()], &viot()[..]);
        expected[index..index + viot().len()].fill(0);
        let root = usize::try_from(image.root).expect("low");
        let len = 36 + image.children.len() * if image.wide { 8 } else { 4 };
        expected[root..root + len].copy_from_slice(&image.ram[root..root + len]);
        expected[root + len..root + len + if image.wide { 8 } else { 4 }].fill(0);
        prop_assert!(expected == image.ram, "bytes beyond VIOT and the root table changed");

        // The next read changes nothing.
        let (again, added) = add(&memory);
        prop_assert_eq!(again, Some(pointer));
        prop_assert_eq!(added, Ok(Added::Present { at }));
        prop_assert!(ram_of(&memory) == ram);
    }

    /// QEMU maps the pages that SeaBIOS has locked read-only. Their contents are the same as in RAM, and nobody writes there.
    #[test]
    fn the_root_pointer_may_be_in_pages_that_are_mapped_read_only(
        layout in layouts(),
        (first, last) in (0u64..32, 0u64..32).prop_map(|(one, other)| (one.min(other), one.max(other))),
        step in 1u64..4,
        flipped in proptest::option::of(0usize..20),
    ) {
        let mut image = layout.image();
        if let Some(offset) = flipped {
            image.bytes(image.rsdp, 20)[offset] ^= 0x10;
        }
        let file = std::fs::File::from(
            rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd"),
        );
        file.write_all_at(&image.ram, 0).expect("written");
        let mut windows = ReadOnlyWindows::default();
        let page = |number: u64| 0xe_0000 + number * PAGE;
        for number in (first..=last).step_by(usize::try_from(step).expect("small")) {
            let end = page(number + step).min(page(last + 1));
            let (at, copy) = (page(number), file.try_clone().expect("a copy"));
            prop_assert!(windows.add(at, end - at, at, copy));
        }
        let (hole, behind) = (page(first), page(last + 1));
        let len = |bytes: u64| usize::try_from(bytes).expect("low");
        let mut ranges = vec![(GuestAddress(0), len(hole)), (GuestAddress(behind), RAM - len(behind))];
        ranges.retain(|range| range.1 > 0);
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).expect("mapped");
        for (at, bytes) in &ranges {
            let from = len(at.0);
            memory.write_slice(&image.ram[from..from + bytes], *at).expect("written");
        }
        let (pointer, added) = add_viot(&memory, &windows, &viot());

        let mut ram = image.ram.clone();
        for (at, bytes) in &ranges {
            let from = len(at.0);
            memory.read_slice(&mut ram[from..from + bytes], *at).expect("read");
        }
        // VIOT follows the last table. If that is an RSDP in RAM, the place behind it may reach into the read-only pages.
        let rsdp_end = image.rsdp + if image.wide { 36 } else { 20 };
        let viot_at = rsdp_end.next_multiple_of(VIOT_ALIGNMENT);
        let is_last = image.rsdp > layout.start && !(hole..behind).contains(&image.rsdp);
        let blocked = is_last && viot_at < behind && viot_at + viot().len() as u64 > hole;
        if flipped.is_some() || blocked {
            let expected = if flipped.is_some() {
                AcpiRefusal::NoRsdp
            } else {
                AcpiRefusal::NoRoom { at: rsdp_end, bytes: viot().len() as u64 }
            };
            prop_assert_eq!(added, Err(expected));
            prop_assert!(ram == image.ram, "a refusal has changed RAM");
        } else {
            let Ok(Added::Written { at }) = added else {
                return Err(TestCaseError::fail(format!("{added:?}")));
            };
            let pointer = pointer.expect("an RSDP");
            prop_assert_eq!(pointer.at(), image.rsdp);
            let found = read_back(&ram, pointer.bytes());
            prop_assert_eq!(found.last(), Some(&(*b"VIOT", at)));
            prop_assert_eq!(found.len(), image.children.len() + 1);
            let again = add_viot(&memory, &windows, &viot());
            prop_assert_eq!(again, (Some(pointer), Ok(Added::Present { at })));
        }
        let mut found = vec![0; RAM];
        file.read_exact_at(&mut found, 0).expect("read");
        prop_assert!(found == image.ram, "the file of the windows has changed");
    }

    /// The process dies between two of its writes, or within one, and the next process makes them again.
    #[test]
    fn writes_that_a_death_has_interrupted_are_finished(
        layout in layouts(),
        torn in any::<prop::sample::Index>(),
        from_the_end in any::<bool>(),
    ) {
        let image = layout.image();
        let memory = image.memory();
        let Ok(Added::Written { at }) = add(&memory).1 else {
            return Err(TestCaseError::fail("not written"));
        };
        let whole = ram_of(&memory);
        let entry_len = if image.wide { 8 } else { 4 };
        let entry = image.root + 36 + (image.children.len() * entry_len) as u64;
        let writes = [(at, viot().len()), (entry, entry_len), (image.root + 4, 4), (image.root + 9, 1)];
        let mut ram = image.ram.clone();
        for (number, (at, len)) in writes.into_iter().enumerate() {
            let at = usize::try_from(at).expect("low");
            let mut states = Vec::new();
            if number < 2 {
                let split = at + torn.index(len);
                let part = if from_the_end { split..at + len } else { at..split };
                let mut state = ram.clone();
                state[part.clone()].copy_from_slice(&whole[part]);
                states.push(state);
            }
            ram[at..at + len].copy_from_slice(&whole[at..at + len]);
            states.push(ram.clone());
            for state in states {
                let memory = Image { ram: state, ..image.clone() }.memory();
                let (pointer, added) = add(&memory);
                prop_assert!(pointer.is_some());
                prop_assert!(added.is_ok(), "after write {number}: {added:?}");
                prop_assert!(ram_of(&memory) == whole, "after write {number}");
            }
        }
    }

    /// A longer root table is not taken for the work of a dead process unless the table and the entry are this device's.
    #[test]
    fn a_root_table_that_is_too_long_is_refused(layout in layouts(), flipped in 0usize..40, bit in 0u8..8) {
        let image = layout.image();
        let memory = image.memory();
        let Ok(Added::Written { at }) = add(&memory).1 else {
            return Err(TestCaseError::fail("not written"));
        };
        let mut written = Image { ram: ram_of(&memory), ..image.clone() };
        let root = usize::try_from(image.root).expect("low");
        written.bytes(image.root, 36)[9] = image.ram[root + 9];
        written.bytes(at, 40)[flipped] ^= 1 << bit;
        written.refused();
    }

    #[test]
    fn a_flipped_bit_in_any_table_with_a_checksum_is_refused(
        layout in layouts(),
        which in any::<prop::sample::Index>(),
        offset in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let mut image = layout.image();
        let mut tables = image.children.clone();
        tables.push(image.root);
        tables.push(image.rsdp);
        let at = *which.get(&tables);
        let len = if at == image.rsdp {
            if image.wide { 36 } else { 20 }
        } else {
            let head: [u8; 4] = image.bytes(at + 4, 4).try_into().expect("four");
            usize::try_from(u32::from_le_bytes(head)).expect("short")
        };
        let offset = offset.index(len);
        image.bytes(at, len)[offset] ^= 1 << bit;
        image.refused();
    }

    #[test]
    fn garbage_with_correct_checksums_never_breaks_the_tables(
        layout in layouts(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..60, any::<u8>()), 1..6),
    ) {
        let mut image = layout.image();
        let mut tables = image.children.clone();
        tables.push(image.root);
        for (which, offset, value) in changes {
            let at = *which.get(&tables);
            image.bytes(at + offset as u64, 1)[0] = value;
            image.fix(at);
        }
        let memory = image.memory();
        let (pointer, added) = add(&memory);
        if let Ok(Added::Written { .. }) = added {
            let pointer = pointer.expect("an RSDP");
            let found = read_back(&ram_of(&memory), pointer.bytes());
            prop_assert_eq!(found.last().expect("VIOT").0, *b"VIOT");
        } else {
            prop_assert!(ram_of(&memory) == image.ram);
        }
    }
}

/// The layout of cloud-hypervisor: everything from 0xa0000 on, the XSDT last.
fn cloud_hypervisor() -> Image {
    let layout = Layout {
        rsdp_at: 0xa_0000,
        revision: 2,
        start: 0xa_0024,
        bodies: vec![vec![1; 44], vec![2; 60]],
        with_fadt: true,
        with_facs: false,
        gap: 0,
        root_last: true,
    };
    layout.image()
}

#[test]
fn each_defect_has_its_reason() {
    let image = cloud_hypervisor;
    let (root, fadt) = (image().root, image().fadt.expect("a FADT"));
    let child = image().children[0];
    let table_of = |refusal| match refusal {
        AcpiRefusal::Table { at, problem } => (at, problem),
        other => panic!("{other}"),
    };

    let mut none = image();
    none.bytes(0xa_0000, 8).fill(0);
    assert_eq!(none.refused(), AcpiRefusal::NoRsdp);

    let mut unknown = image();
    unknown.bytes(0xa_0000, 36)[15] = 1;
    fix_rsdp(unknown.bytes(0xa_0000, 36));
    assert_eq!(
        unknown.refused(),
        AcpiRefusal::NoRsdp,
        "of an unknown revision"
    );

    let mut rootless = image();
    rootless.bytes(0xa_0000, 36)[24..32].fill(0);
    fix_rsdp(rootless.bytes(0xa_0000, 36));
    assert_eq!(
        rootless.refused(),
        AcpiRefusal::NoRootTable { at: 0xa_0000 }
    );

    for outside in [RAM as u64 - 20, RAM as u64, u64::MAX - 7] {
        let mut image = image();
        image.bytes(0xa_0000, 36)[24..32].copy_from_slice(&outside.to_le_bytes());
        fix_rsdp(image.bytes(0xa_0000, 36));
        let refused = table_of(image.refused());
        assert_eq!(refused, (outside, TableProblem::NotRam));
    }

    let mut revision = image();
    revision.bytes(root + 8, 1)[0] = 2;
    revision.fix(root);
    assert_eq!(
        table_of(revision.refused()),
        (root, TableProblem::Revision(2))
    );

    let mut uneven = image();
    let len = uneven.bytes(root + 4, 1)[0];
    uneven.bytes(root + 4, 1)[0] = len - 4;
    uneven.fix(root);
    let length = TableProblem::Length(u32::from(len) - 4);
    assert_eq!(table_of(uneven.refused()), (root, length));

    let mut short = image();
    short
        .bytes(child + 4, 4)
        .copy_from_slice(&35u32.to_le_bytes());
    let refused = table_of(short.refused());
    assert_eq!(refused, (child, TableProblem::Length(35)));

    let mut long = image();
    long.bytes(child + 4, 4).fill(0xff);
    assert_eq!(long.refused(), AcpiRefusal::TooLong);

    let mut sum = image();
    sum.bytes(child + 40, 1)[0] ^= 1;
    assert_eq!(table_of(sum.refused()), (child, TableProblem::Checksum));

    let mut dsdt = image();
    dsdt.bytes(fadt + 140, 8)
        .copy_from_slice(&child.to_le_bytes());
    dsdt.fix(fadt);
    let problem = TableProblem::Signature(*b"SSDT");
    assert_eq!(table_of(dsdt.refused()), (child, problem));
    assert!(problem.to_string().contains("\"SSDT\""));

    let mut twice = image();
    let second = twice.children[1];
    twice
        .bytes(root + 44, 8)
        .copy_from_slice(&child.to_le_bytes());
    twice.fix(root);
    let (first, second) = (child, second);
    assert_eq!(
        twice.refused(),
        AcpiRefusal::Overlap {
            first,
            second: first
        }
    );
    assert_ne!(first, second);

    let mut many = image();
    many.bytes(root + 4, 4)
        .copy_from_slice(&(36u32 + 8 * 257).to_le_bytes());
    many.fix(root);
    let refused = many.refused();
    assert_eq!(
        refused,
        AcpiRefusal::TooManyTables {
            at: root,
            count: 257
        }
    );

    let root_end = root + 36 + 3 * 8;
    let mut full = image();
    full.bytes(root_end + 7, 1)[0] = 1;
    assert_eq!(full.refused(), AcpiRefusal::NoEntryRoom { at: root_end });

    let mut used = image();
    used.bytes(root_end + 8 + VIOT, 1)[0] = 1;
    assert!(matches!(
        used.refused(),
        AcpiRefusal::NoRoom { bytes: VIOT, .. }
    ));

    let mut other = image();
    let mut foreign = viot();
    foreign[60] ^= 1;
    fix(&mut foreign);
    other
        .bytes(0xc_0000, foreign.len())
        .copy_from_slice(&foreign);
    other
        .bytes(root + 36, 8)
        .copy_from_slice(&0xc_0000u64.to_le_bytes());
    other.fix(root);
    assert_eq!(other.refused(), AcpiRefusal::OtherViot { at: 0xc_0000 });
}

#[test]
fn viot_never_leaves_the_area_of_the_tables() {
    // The last table ends close to the end of the legacy area, and close to the end of a page above it.
    for start in [0xf_fe00u64, 0x18_0e00] {
        for bytes in [0x100usize, 0x180] {
            let layout = Layout {
                rsdp_at: 0xa_0000,
                revision: 2,
                start,
                bodies: vec![vec![0x11; bytes - 36]],
                with_fadt: false,
                with_facs: false,
                gap: 0,
                root_last: true,
            };
            let image = layout.image();
            let memory = image.memory();
            let (_, added) = add(&memory);
            let last = start | 0xfff;
            match added {
                Ok(Added::Written { at }) => assert!(at + VIOT <= last + 1, "{at:#x}"),
                Err(AcpiRefusal::NoRoom { .. }) => assert_eq!(bytes, 0x180),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn a_refusal_still_answers_with_the_root_pointer() {
    let mut image = cloud_hypervisor();
    let root = image.root;
    image.bytes(root + 9, 1)[0] ^= 1;
    let (pointer, added) = add(&image.memory());
    assert_eq!(pointer.expect("an RSDP").bytes(), image.bytes(0xa_0000, 36));
    assert!(added.is_err());
}
