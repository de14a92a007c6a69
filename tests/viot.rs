//! The VIOT table reads back as configured: with a parser in this file, and with ACPICA's
//! disassembler if it knows the table (acpica-tools 20210331 or later).

// `expect` in the helpers fails the test, too, but the lint allows it only in the test functions themselves.
#![allow(clippy::expect_used)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::{env, fs};

use proptest::prelude::*;
use vhost_device_iommu::config::Config;
use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::topology::{
    EndpointSpec, PciAddress, PciRange, ReservedRegions, Topology, viot,
};

const EXAMPLE: &str = r#"
address = "0001:02:1e.3"

[[endpoint]]
range = "00:10.0-00:1f.7"

# Adjoins the range above, in another host group: one range for the guest.
[[endpoint]]
address = "01:00.0"
group = "nic0"

[[endpoint]]
address = "01:00.2"

# The same bus, device and function as an endpoint above, in another segment.
[[endpoint]]
address = "0001:01:00.0"

# Neighbours by number only: the end of one segment and the start of the next.
[[endpoint]]
range = "00fe:ff:1f.0-00fe:ff:1f.7"
[[endpoint]]
range = "00ff:00:00.0-00ff:00:00.3"
"#;

/// The nodes of the example, written by hand: endpoint_start, segment, bdf_start, bdf_end.
const EXAMPLE_NODES: [(u32, u16, u16, u16); 5] = [
    (0x0000_0080, 0x0000, 0x0080, 0x0100),
    (0x0000_0102, 0x0000, 0x0102, 0x0102),
    (0x0001_0100, 0x0001, 0x0100, 0x0100),
    (0x00fe_fff8, 0x00fe, 0xfff8, 0xffff),
    (0x00ff_0000, 0x00ff, 0x0000, 0x0003),
];
const EXAMPLE_IOMMU: (u16, u16) = (1, 0x02f3);

#[test]
fn the_example_reads_back_field_by_field() {
    let table = table_of(EXAMPLE);
    let read = read_table(&table);
    assert_eq!(read.iommu, EXAMPLE_IOMMU);
    assert_eq!(read.ranges, EXAMPLE_NODES);
}

/// The table names endpoints behind ports by the numbers that firmware will choose.
#[test]
fn endpoints_behind_ports_are_in_the_table() {
    let read = read_table(&table_of(
        "address = '00:05.0'\n\
         [[endpoint]]\nport = '00:03.0'\n\
         [[port]]\naddress = '00:02.0'\nhotplug = true\nreserve-buses = 2\n\
         [[endpoint]]\nport = '00:1c.0/00.0'\naddress = '03.0'\n\
         [[port]]\naddress = '00:1c.0/00.0'\nkind = 'pcie-pci-bridge'\n\
         [[endpoint]]\nport = '00:04.0/00.0/00.0'\nrange = '00.0-00.1'\n",
    ));
    // Bus 01 with 02 and 03 reserved, 04, 05 to 07, 08 and 09.
    let ranges = [
        (0x0100, 0x0107),
        (0x0400, 0x0400),
        (0x0700, 0x0701),
        // All accesses from behind the bridge carry this ID.
        (0x0900, 0x0900),
        (0x0918, 0x0918),
    ];
    let expected: Vec<_> = ranges
        .iter()
        .map(|&(first, last)| (u32::from(first), 0, first, last))
        .collect();
    assert_eq!(read.ranges, expected);
}

#[test]
fn without_endpoints_there_is_the_iommu_alone() {
    let read = read_table(&table_of("address = '00:05.0'"));
    assert_eq!((read.iommu, read.ranges), ((0, 0x28), Vec::new()));
}

#[test]
fn acpica_reads_the_same() {
    let Some(iasl) = iasl() else {
        eprintln!(
            "skipped: no iasl; install acpica-tools or name the command in VIOMMU_IASL to run this"
        );
        return;
    };
    let dir = tempfile::tempdir().expect("a directory");
    let binary = dir.path().join("viot.dat");
    fs::write(&binary, table_of(EXAMPLE)).expect("written");
    let listing = disassemble(&iasl, &binary);

    // iasl prints nothing about a correct checksum; the damaged table below shows that it checks
    // it.
    assert!(!listing.to_lowercase().contains("incorrect"), "{listing}");
    if listing.contains("Unknown ACPI table signature") {
        let named = env::var_os("VIOMMU_IASL").is_some();
        assert!(!named, "VIOMMU_IASL={iasl} knows no VIOT table: {listing}");
        eprintln!("skipped: {iasl} is older than the VIOT table; name a newer one in VIOMMU_IASL");
        return;
    }
    let mut expected = header_fields(48 + 16 + 5 * 24, 6);
    expected.extend([
        field("Type", "03"),
        field("Reserved", "00"),
        field("Length", "0010"),
        field("PCI Segment", "0001"),
        field("PCI BDF number", "02F3"),
        field("Reserved", "0000000000000000"),
    ]);
    for (endpoint, segment, first, last) in EXAMPLE_NODES {
        expected.extend([
            field("Type", "01"),
            field("Reserved", "00"),
            field("Length", "0018"),
            field("Endpoint start", &format!("{endpoint:08X}")),
            field("PCI Segment start", &format!("{segment:04X}")),
            field("PCI Segment end", &format!("{segment:04X}")),
            field("PCI BDF start", &format!("{first:04X}")),
            field("PCI BDF end", &format!("{last:04X}")),
            field("Output node", "0030"),
            field("Reserved", "000000000000"),
        ]);
    }
    let found: Vec<_> = fields(&listing)
        .into_iter()
        .filter(|(name, _)| name != "Checksum")
        .collect();
    assert_eq!(found, expected, "{listing}");

    let mut damaged = table_of(EXAMPLE);
    damaged[9] = damaged[9].wrapping_add(1);
    fs::write(&binary, damaged).expect("written");
    let listing = disassemble(&iasl, &binary);
    assert!(listing.to_lowercase().contains("incorrect"), "{listing}");
}

proptest! {
    #[test]
    fn every_endpoint_and_no_other_is_in_the_table(
        iommu in 0u32..400,
        ranges in proptest::collection::vec((0u32..400, 0u32..8), 0..40),
    ) {
        let id = |n: u32| 0x0003_ff00 + n;
        let address = |n| PciAddress::from_endpoint_id(EndpointId(id(n)));
        let mut specs: Vec<EndpointSpec> = Vec::new();
        for (first, span) in ranges {
            let Ok(range) = PciRange::new(address(first), address(first + span)) else { continue };
            let taken = specs.iter().any(|spec| spec.range.overlaps(range));
            if !taken && !range.contains(address(iommu)) {
                specs.push(EndpointSpec { range, group: None, reserved: Vec::new() });
            }
        }
        let topology = Topology::new(address(iommu), ReservedRegions::default(), &specs)
            .expect("disjoint");
        let read = read_table(&viot::table(&topology).expect("few ranges"));
        prop_assert_eq!(
            u32::from(read.iommu.0) << 16 | u32::from(read.iommu.1),
            id(iommu)
        );
        // Like a guest, from segment and BDF to the endpoint ID.
        let mut seen = Vec::new();
        for (start, segment, first, last) in &read.ranges {
            for bdf in *first..=*last {
                seen.push((u32::from(*segment) << 16 | u32::from(bdf), start + u32::from(bdf - first)));
            }
        }
        for (function, endpoint) in &seen {
            prop_assert_eq!(function, endpoint);
            prop_assert!(topology.endpoint(EndpointId(*endpoint)).is_some());
        }
        prop_assert_eq!(seen.len() as u64, topology.endpoint_count());
        // Adjacent ranges are joined.
        for pair in read.ranges.windows(2) {
            prop_assert!(pair[0].1 != pair[1].1 || u32::from(pair[0].3) + 1 < u32::from(pair[1].2));
        }
    }
}

fn table_of(text: &str) -> Vec<u8> {
    let config = Config::from_text(Path::new("vm0.toml"), text).expect("a good configuration");
    viot::table(&config.topology).expect("few ranges")
}

/// A table as a guest reads it.
struct Table {
    iommu: (u16, u16),
    ranges: Vec<(u32, u16, u16, u16)>,
}

/// Reads a table by the offsets of the specification, without any code of the writer.
fn read_table(bytes: &[u8]) -> Table {
    let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"));
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));

    assert_eq!(&bytes[0..4], b"VIOT");
    assert_eq!(u32_at(4) as usize, bytes.len());
    assert_eq!(bytes[8], 0, "revision");
    let sum: u32 = bytes.iter().map(|&byte| u32::from(byte)).sum();
    assert_eq!(sum % 256, 0, "checksum");
    for (at, len) in [(10, 6), (16, 8), (28, 4)] {
        assert!(bytes[at..at + len].is_ascii(), "identifiers");
    }
    assert_eq!(&bytes[40..48], [0; 8], "reserved");

    let mut at = usize::from(u16_at(38));
    assert_eq!(at, 48, "node offset");
    let (mut iommus, mut ranges, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..u16_at(36) {
        assert_eq!(bytes[at + 1], 0, "reserved");
        let length = usize::from(u16_at(at + 2));
        match (bytes[at], length) {
            (1, 24) => {
                assert_eq!(u16_at(at + 8), u16_at(at + 10), "one segment");
                ranges.push((
                    u32_at(at + 4),
                    u16_at(at + 8),
                    u16_at(at + 12),
                    u16_at(at + 14),
                ));
                outputs.push(usize::from(u16_at(at + 16)));
                assert_eq!(&bytes[at + 18..at + 24], [0; 6], "reserved");
            }
            (3, 16) => {
                iommus.push((at, (u16_at(at + 4), u16_at(at + 6))));
                assert_eq!(&bytes[at + 8..at + 16], [0; 8], "reserved");
            }
            other => panic!("node of type and length {other:?} at {at}"),
        }
        at += length;
    }
    assert_eq!(at, bytes.len(), "nodes fill the table");
    let [(offset, iommu)] = iommus[..] else {
        panic!("one IOMMU, not {}", iommus.len());
    };
    assert!(outputs.iter().all(|&output| output == offset));
    Table { iommu, ranges }
}

fn iasl() -> Option<String> {
    let named = env::var("VIOMMU_IASL").ok();
    let command = named.clone().unwrap_or_else(|| "iasl".to_owned());
    let runs = Command::new(&command)
        .arg("-v")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    assert!(
        runs || named.is_none(),
        "VIOMMU_IASL={command} cannot be run"
    );
    runs.then_some(command)
}

/// The disassembly of a table, preceded by iasl's own messages.
fn disassemble(iasl: &str, binary: &Path) -> String {
    let output = Command::new(iasl)
        .arg("-d")
        .arg(binary)
        .output()
        .expect("iasl runs");
    let messages = [output.stdout, output.stderr].concat();
    let messages = String::from_utf8_lossy(&messages).into_owned();
    assert!(output.status.success(), "{messages}");
    let listing = fs::read_to_string(binary.with_extension("dsl")).expect("a listing");
    messages + &listing
}

/// The lines `[offset length] name : value` of a listing.
fn fields(listing: &str) -> Vec<(String, String)> {
    listing
        .lines()
        .filter(|line| line.starts_with('['))
        .filter_map(|line| line.split_once(']')?.1.split_once(" : "))
        .map(|(name, value)| {
            let value = value.split('[').next().unwrap_or(value);
            field(name, value)
        })
        .collect()
}

fn field(name: &str, value: &str) -> (String, String) {
    (name.trim().to_owned(), value.trim().to_owned())
}

fn header_fields(length: usize, nodes: usize) -> Vec<(String, String)> {
    vec![
        field("Signature", "\"VIOT\""),
        field("Table Length", &format!("{length:08X}")),
        field("Revision", "00"),
        field("Oem ID", "\"VIOMMU\""),
        field("Oem Table ID", "\"VHOSTDEV\""),
        field("Oem Revision", "00000001"),
        field("Asl Compiler ID", "\"VDIO\""),
        field("Asl Compiler Revision", "00000001"),
        field("Node count", &format!("{nodes:04X}")),
        field("Node offset", "0030"),
        field("Reserved", "0000000000000000"),
    ]
}
