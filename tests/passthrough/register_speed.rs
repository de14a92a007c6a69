//! The time of a register access in a guest: by QEMU's own vfio-pci, and by the client of an exported device.

use crate::nested::{EDU, Nested, with_a_working_guest};
use crate::vm::Setup;
use crate::words;

/// Accesses of one measurement.
const ACCESSES: u32 = 4096;
/// Measurements of each way, whose median counts.
const ROUNDS: usize = 9;

/// A read and a write, in nanoseconds.
type Access = [u64; 2];

/// The medians of an exported device, or of one that QEMU opens.
fn access_with(host_iommu: &str, keys: &str, accesses: u32) -> Access {
    let setup = Setup::from_environment();
    let host = words("VIOMMU_EDU")[0].clone();
    let host_key = format!("host-iommu = \"{host_iommu}\"");
    let endpoint = format!("vfio = \"{host}\"\n{keys}");
    let mut nested = Nested::launch(&setup, "registers", &host_key, &endpoint);
    nested.vm.wait_until_up();
    nested.vm.run(&format!("vfio_bind {EDU}"));
    nested.vm.run(&format!("start edu vfio-edu {EDU}"));
    let mut rounds: Vec<Access> = Vec::new();
    for _ in 0..ROUNDS {
        let answer = nested.ask(&format!("registers {accesses}"));
        let numbers = answer[0].split_whitespace().skip(1);
        let numbers: Vec<u64> = numbers.map(|n| n.parse().expect("a number")).collect();
        rounds.push([numbers[0], numbers[1]]);
    }
    nested.vm.begin("poweroff -f");
    assert_eq!(nested.vm.wait_for_end().code(), Some(0));
    nested.wait_for_end();
    [0, 1].map(|which| {
        let mut all: Vec<_> = rounds.iter().map(|round| round[which]).collect();
        all.sort_unstable();
        all[ROUNDS / 2]
    })
}

/// Prints the figures of docs/performance.md.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn mapped_registers_are_as_fast_as_those_of_vfio() {
    let mapped = "export = \"@/edu.sock\"\nregisters = \"mapped\"";
    let trapped = "export = \"@/edu.sock\"\nregisters = \"trapped\"";
    with_a_working_guest(|| {
        let vfio = access_with("iommufd", "", ACCESSES);
        let mapped_type1 = access_with("type1", mapped, ACCESSES);
        let mapped_iommufd = access_with("iommufd", mapped, ACCESSES);
        let trapped = access_with("type1", trapped, ACCESSES / 16);
        let again = access_with("iommufd", "", ACCESSES);
        for (name, [read, write]) in [
            ("QEMU's vfio-pci", vfio),
            ("exported, mapped, type1", mapped_type1),
            ("exported, mapped, iommufd", mapped_iommufd),
            ("exported, trapped, type1", trapped),
            ("QEMU's vfio-pci, again", again),
        ] {
            eprintln!("{name}: read {read} ns, write {write} ns");
        }
        for mapped in [mapped_type1, mapped_iommufd] {
            for (which, mapped) in mapped.into_iter().enumerate() {
                let slowest = vfio[which].max(again[which]);
                // Within a tenth on an idle machine.
                assert!(
                    mapped * 2 < slowest * 3,
                    "{mapped} ns, vfio-pci: {slowest} ns"
                );
                assert!(mapped * 2 < trapped[which]);
            }
        }
    });
}
