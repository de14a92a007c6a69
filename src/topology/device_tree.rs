//! The device tree of an Arm guest: adds the IOMMU, and the endpoints that are behind it, to the tree that the VMM has
//! made (Linux's bindings `virtio,pci-iommu` and `pci-iommu`).
//!
//! ```text
//! pcie@10000000 {                       of the VMM
//!     iommu-map = <0x28 &I 0x28 1> ...  the configured endpoints: first requester ID, IOMMU, first endpoint ID, number
//!     I: iommu@5,0 {
//!         compatible = "virtio,pci-iommu", "pci1af4,1057";
//!         reg = <0x2800 0 0 0 0>;       where the IOMMU is on the bus
//!         #iommu-cells = <1>;
//!     };
//! };
//! ```
//!
//! A function that `iommu-map` names and the daemon does not have makes Linux 7.3 give no device a group. So the map has
//! no more than the configured endpoints, and the ranges in which endpoints may be added later.

use dtoolkit::error::FdtParseError;
use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use dtoolkit::{Node, Property};
use thiserror::Error;

use super::{PciAddress, ReservedKind, ReservedRegion, Topology};
use crate::address::Iova;

/// The largest tree, in bytes. QEMU's has 1 MiB.
pub const MAX_TREE: u64 = 4 << 20;
/// The deepest nesting of nodes. QEMU's is 4.
const MAX_DEPTH: u32 = 32;
/// The IOMMU's PCI vendor and device ID: virtio device 23.
const COMPATIBLE: &[u8] = b"virtio,pci-iommu\0pci1af4,1057\0";
/// A host bridge whose configuration space is mapped into memory (`pci-host-ecam-generic`).
const HOST_BRIDGE: &str = "pci-host-ecam-generic";
const IOMMU_MAP: &str = "iommu-map";
/// The doorbells of Arm's interrupt controllers: a node's `compatible`, and where the doorbell is from the node's first
/// address (GITS_TRANSLATER, MSI_SETSPI_NS).
const DOORBELLS: [(&str, u64); 2] = [("arm,gic-v3-its", 0x1_0040), ("arm,gic-v2m-frame", 0x40)];

/// A tree to which the IOMMU cannot be added.
#[derive(Debug, Error)]
pub enum DeviceTreeError {
    /// No device tree.
    #[error(
        "the file is no device tree ({0}); let QEMU write it: the same -machine, -cpu, -smp and -m options, and \
         -machine dumpdtb=FILE"
    )]
    Malformed(FdtParseError),
    /// Nodes that are nested too deeply.
    #[error(
        "the device tree has nodes within more than {MAX_DEPTH} others; use the tree that QEMU writes with -machine \
         dumpdtb=FILE"
    )]
    TooDeep,
    /// Not one PCI host bridge.
    #[error(
        "the device tree has {0} PCI host bridges ({HOST_BRIDGE}) and must have one; let QEMU write it for \
         -machine virt: dumpdtb=FILE"
    )]
    HostBridges(usize),
    /// Another IOMMU is described already.
    #[error(
        "the device tree describes an IOMMU already: {0}; let QEMU write it without one (-machine virt without \
         iommu=, and without the daemon's device)"
    )]
    HasIommu(String),
    /// MSIs of the guest would go to the IOMMU.
    #[error(
        "the device tree has the doorbell for message-signalled interrupts at {doorbell}, outside the MSI region {region}, \
         so the guest's devices would raise no interrupt; let QEMU write it for -machine virt,gic-version=3"
    )]
    Doorbell {
        /// The address of the doorbell.
        doorbell: Iova,
        /// The MSI region of all endpoints.
        region: ReservedRegion,
    },
    /// The IOMMU or an endpoint is on another segment.
    #[error(
        "{0} is not on PCI segment 0, the only one of QEMU's virt machine; give it an address of segment 0, such as \
         00:05.0"
    )]
    Segment(PciAddress),
    /// The IOMMU is behind a bridge, which the tree does not have.
    #[error(
        "the IOMMU's address {0} is not on bus 00, and only there can a device tree of QEMU name a device; give it \
         an address such as `address = \"00:05.0\"`"
    )]
    NotOnRootBus(PciAddress),
    /// All numbers for references are taken.
    #[error(
        "the device tree has no free phandle; use the tree that QEMU writes with -machine dumpdtb=FILE"
    )]
    NoPhandle,
    /// The tree cannot be written.
    #[error(
        "the device tree cannot be extended: {0}; use the tree that QEMU writes with -machine dumpdtb=FILE"
    )]
    Model(#[from] dtoolkit::error::ModelError),
}

/// `base`, the tree of the VMM, with the IOMMU and the endpoints of `topology`, and the ranges in which endpoints may
/// be added later.
///
/// # Errors
///
/// See [`DeviceTreeError`].
pub fn extended(base: &[u8], topology: &Topology) -> Result<Vec<u8>, DeviceTreeError> {
    let fdt = Fdt::new(base).map_err(DeviceTreeError::Malformed)?;
    check_depth(&fdt.root(), 0)?;
    let mut tree = DeviceTree::from_fdt(&fdt);
    let mut found = Found::default();
    found.look_at(&tree.root, "", 2);
    if let Some(path) = found.iommu {
        return Err(DeviceTreeError::HasIommu(path));
    }
    let [bridge] = found.bridges.as_slice() else {
        return Err(DeviceTreeError::HostBridges(found.bridges.len()));
    };
    let bridge = tree
        .find_node_mut(bridge)
        .ok_or(DeviceTreeError::HostBridges(0))?;
    // 0 and u32::MAX are no references.
    let phandle = found
        .last_phandle
        .checked_add(1)
        .filter(|&it| it != u32::MAX);
    let phandle = phandle.ok_or(DeviceTreeError::NoPhandle)?;
    check_doorbells(topology, &found.doorbells)?;
    let iommu = topology.iommu();
    bridge.add_property(DeviceTreeProperty::new(
        IOMMU_MAP,
        iommu_map(topology, phandle)?,
    )?);
    bridge.add_child(iommu_node(iommu, phandle)?);
    Ok(tree.to_dtb())
}

/// Refuses a topology that no device tree can describe.
///
/// # Errors
///
/// [`DeviceTreeError::Segment`] or [`DeviceTreeError::NotOnRootBus`].
pub fn check(topology: &Topology) -> Result<(), DeviceTreeError> {
    iommu_map(topology, 1)?;
    iommu_node(topology.iommu(), 1)?;
    Ok(())
}

/// Refuses a doorbell outside the MSI region. Without such a region the guest maps the doorbell itself.
fn check_doorbells(topology: &Topology, doorbells: &[Iova]) -> Result<(), DeviceTreeError> {
    let mut regions = topology.common_reserved().iter();
    let Some(&region) = regions.find(|region| region.kind == ReservedKind::Msi) else {
        return Ok(());
    };
    let mut outside = doorbells.iter().filter(|it| !region.range.contains(**it));
    outside.next().map_or(Ok(()), |&doorbell| {
        Err(DeviceTreeError::Doorbell { doorbell, region })
    })
}

/// Refuses a tree that is nested so deeply that a recursion could overflow the stack.
fn check_depth(node: &FdtNode<'_>, depth: u32) -> Result<(), DeviceTreeError> {
    if depth > MAX_DEPTH {
        return Err(DeviceTreeError::TooDeep);
    }
    node.children()
        .try_for_each(|child| check_depth(&child, depth + 1))
}

/// The value of `iommu-map`: entries of four cells.
fn iommu_map(topology: &Topology, phandle: u32) -> Result<Vec<u32>, DeviceTreeError> {
    let mut map = Vec::new();
    for range in topology.described() {
        let (first, last) = (range.first(), range.last());
        if first.segment() != 0 {
            return Err(DeviceTreeError::Segment(first));
        }
        let (first, last) = (u32::from(first.bdf()), u32::from(last.bdf()));
        // On segment 0 an endpoint's ID is its requester ID.
        map.extend([first, phandle, first, last - first + 1]);
    }
    Ok(map)
}

fn iommu_node(iommu: PciAddress, phandle: u32) -> Result<DeviceTreeNode, DeviceTreeError> {
    if iommu.segment() != 0 {
        return Err(DeviceTreeError::Segment(iommu));
    }
    if iommu.bus() != 0 {
        return Err(DeviceTreeError::NotOnRootBus(iommu));
    }
    let name = format!("iommu@{:x},{:x}", iommu.device(), iommu.function());
    let mut node = DeviceTreeNode::new(name)?;
    // The first cell of a PCI address has the bus, device and function in its bits 23..=8.
    let place = u32::from(iommu.bdf()) << 8;
    node.add_property(DeviceTreeProperty::new("compatible", COMPATIBLE)?);
    node.add_property(DeviceTreeProperty::new("reg", vec![place, 0, 0, 0, 0])?);
    node.add_property(DeviceTreeProperty::new("#iommu-cells", 1u32)?);
    node.add_property(DeviceTreeProperty::new("phandle", phandle)?);
    Ok(node)
}

/// What a tree has already.
#[derive(Default)]
struct Found {
    /// The paths of the PCI host bridges.
    bridges: Vec<String>,
    /// The path of a node that is an IOMMU, or is behind one.
    iommu: Option<String>,
    /// The addresses to which devices write MSIs.
    doorbells: Vec<Iova>,
    last_phandle: u32,
}

impl Found {
    /// Looks at `node`, whose path is `path`, and at all nodes within. Its addresses have `address_cells` cells.
    fn look_at(&mut self, node: &DeviceTreeNode, path: &str, address_cells: u32) {
        let is_compatible = |name: &str| {
            node.property("compatible").is_some_and(|property| {
                let names = property.value().split(|&byte| byte == 0);
                names.into_iter().any(|it| it == name.as_bytes())
            })
        };
        if is_compatible(HOST_BRIDGE) {
            self.bridges.push(path.to_owned());
        }
        if ["#iommu-cells", IOMMU_MAP]
            .iter()
            .any(|name| node.property(name).is_some())
        {
            self.iommu.get_or_insert_with(|| path.to_owned());
        }
        let cell = |name: &str| {
            let value = node.property(name)?.value().try_into().ok()?;
            Some(u32::from_be_bytes(value))
        };
        for (name, offset) in DOORBELLS {
            let address = first_address(node, address_cells).filter(|_| is_compatible(name));
            let doorbell = address.and_then(|address| address.checked_add(offset));
            self.doorbells.extend(doorbell.map(Iova));
        }
        for name in ["phandle", "linux,phandle"] {
            self.last_phandle = self.last_phandle.max(cell(name).unwrap_or_default());
        }
        // Two cells if the node does not say so: the default of the specification.
        let cells = cell("#address-cells").unwrap_or(2);
        for child in node.children() {
            self.look_at(child, &format!("{path}/{}", child.name()), cells);
        }
    }
}

/// The first address in the node's `reg`, which has `cells` cells; `None` if they are not one or two.
fn first_address(node: &DeviceTreeNode, cells: u32) -> Option<u64> {
    let property = node.property("reg")?;
    let value = property.value();
    match cells {
        1 => Some(u32::from_be_bytes(*value.first_chunk()?).into()),
        2 => Some(u64::from_be_bytes(*value.first_chunk()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::address::IovaRange;
    use crate::topology::{EndpointSpec, ReservedRegions};

    fn property<T: dtoolkit::ToPropertyValue>(name: &str, value: T) -> DeviceTreeProperty {
        DeviceTreeProperty::new(name, value).expect("a name")
    }

    /// A tree like QEMU's, with `extra` in its host bridge.
    fn base(extra: &[DeviceTreeProperty]) -> DeviceTree {
        let mut tree = DeviceTree::new();
        let mut gic = DeviceTreeNode::new("intc@8000000").expect("a name");
        gic.add_property(property("phandle", 0x8005u32));
        let mut bridge = DeviceTreeNode::new("pcie@10000000").expect("a name");
        bridge.add_property(property("compatible", HOST_BRIDGE));
        bridge.add_property(property("msi-map", vec![0u32, 0x8006, 0, 0x1_0000]));
        for property in extra {
            bridge.add_property(property.clone());
        }
        tree.root.add_property(property("#address-cells", 2u32));
        tree.root.add_child(gic);
        tree.root.add_child(bridge);
        tree
    }

    fn topology(iommu: &str, endpoints: &[&str]) -> Topology {
        with_msi(iommu, endpoints, &[])
    }

    /// A topology with these MSI regions, by their first and last address.
    fn with_msi(iommu: &str, endpoints: &[&str], msi: &[(u64, u64)]) -> Topology {
        let region = |&(first, last): &(u64, u64)| ReservedRegion {
            range: IovaRange::new(Iova(first), Iova(last)).expect("a range"),
            kind: ReservedKind::Msi,
        };
        let common = ReservedRegions::new(msi.iter().map(region).collect()).expect("regions");
        let specs: Vec<_> = endpoints
            .iter()
            .map(|range| EndpointSpec {
                range: range.parse().expect("a range"),
                group: None,
                reserved: Vec::new(),
            })
            .collect();
        Topology::new(iommu.parse().expect("an address"), common, &specs).expect("good")
    }

    fn refusal(base: &[u8], topology: &Topology) -> String {
        extended(base, topology).expect_err("refused").to_string()
    }

    #[test]
    fn the_tree_has_the_iommu_and_the_configured_endpoints() {
        let topology = topology(
            "00:05.0",
            &["00:06.0", "00:07.0-00:07.7", "00:08.0", "01:00.1"],
        );
        let base = base(&[]).to_dtb();
        let tree = extended(&base, &topology).expect("extended");
        let tree = DeviceTree::from_fdt(&Fdt::new(&tree).expect("a tree"));
        let bridge = tree.find_node("/pcie@10000000").expect("kept");
        let cells = |node: &DeviceTreeNode, name: &str| -> Vec<u32> {
            let property = node.property(name).expect(name);
            let (cells, rest) = property.value().as_chunks::<4>();
            assert!(rest.is_empty());
            cells.iter().map(|cell| u32::from_be_bytes(*cell)).collect()
        };
        assert_eq!(cells(bridge, "msi-map"), [0, 0x8006, 0, 0x1_0000]);
        // 00:06.0, then 00:07.0 to 00:08.0 without a gap, then 01:00.1.
        let reference = 0x8006;
        assert_eq!(
            cells(bridge, IOMMU_MAP),
            [
                [0x30, reference, 0x30, 1],
                [0x38, reference, 0x38, 9],
                [0x101, reference, 0x101, 1]
            ]
            .concat()
        );
        let iommu = tree.find_node("/pcie@10000000/iommu@5,0").expect("added");
        assert_eq!(
            iommu.property("compatible").expect("known").value(),
            COMPATIBLE
        );
        assert_eq!(cells(iommu, "reg"), [0x2800, 0, 0, 0, 0]);
        assert_eq!(cells(iommu, "#iommu-cells"), [1]);
        assert_eq!(cells(iommu, "phandle"), [reference]);
        assert!(tree.find_node("/intc@8000000").is_some());
    }

    #[test]
    fn trees_that_cannot_be_extended_are_refused() {
        let good = topology("00:05.0", &["00:06.0"]);
        let plain = base(&[]).to_dtb();
        assert!(refusal(b"DSDT", &good).contains("no device tree"));
        assert!(refusal(&plain[..plain.len() - 1], &good).contains("no device tree"));
        assert!(refusal(&DeviceTree::new().to_dtb(), &good).contains("0 PCI host bridges"));
        let mut two = base(&[]);
        let mut other = DeviceTreeNode::new("pcie@20000000").expect("a name");
        other.add_property(property("compatible", HOST_BRIDGE));
        two.root.add_child(other);
        assert!(refusal(&two.to_dtb(), &good).contains("2 PCI host bridges"));
        // A second IOMMU, or the tree of an earlier run.
        let once = extended(&plain, &good).expect("extended");
        assert!(refusal(&once, &good).contains("describes an IOMMU already: /pcie@10000000"));
        let full = base(&[property("phandle", u32::MAX - 1)]).to_dtb();
        assert!(refusal(&full, &good).contains("no free phandle"));
        let mut deep = base(&[]);
        let mut node = DeviceTreeNode::new("leaf").expect("a name");
        for _ in 0..MAX_DEPTH + 1 {
            let mut parent = DeviceTreeNode::new("n").expect("a name");
            parent.add_child(node);
            node = parent;
        }
        deep.root.add_child(node);
        assert!(refusal(&deep.to_dtb(), &good).contains("nodes within more than"));
        for (iommu, endpoint, message) in [
            ("01:05.0", "00:06.0", "not on bus 00"),
            (
                "0001:00:05.0",
                "00:06.0",
                "0001:00:05.0 is not on PCI segment 0",
            ),
            (
                "00:05.0",
                "0001:00:06.0",
                "0001:00:06.0 is not on PCI segment 0",
            ),
        ] {
            let refused = refusal(&plain, &topology(iommu, &[endpoint]));
            assert!(refused.contains(message), "{refused}");
        }
    }

    /// QEMU's `virt` with an ITS has its doorbell in the MSI region; by default QEMU makes a GICv2 with another doorbell.
    #[test]
    fn a_tree_with_its_doorbell_outside_the_msi_region_is_refused() {
        let tree = |compatible: &str, first: u32| {
            let mut controller = DeviceTreeNode::new("msi").expect("a name");
            controller.add_property(property("compatible", compatible));
            controller.add_property(property("reg", vec![0, first, 0, 0x2_0000]));
            let mut tree = base(&[]);
            let gic = tree.find_node_mut("/intc@8000000").expect("it is there");
            gic.add_property(property("#address-cells", 2u32));
            gic.add_child(controller);
            tree.to_dtb()
        };
        let virt = with_msi("00:05.0", &["00:06.0"], &[(0x809_0000, 0x809_ffff)]);
        extended(&tree("arm,gic-v3-its", 0x808_0000), &virt).expect("the machine's own");
        for base in [
            tree("arm,gic-v2m-frame", 0x802_0000),
            tree("arm,gic-v3-its", 0x900_0000),
        ] {
            let refused = refusal(&base, &virt);
            assert!(
                refused.contains("outside the MSI region 0x8090000..=0x809ffff"),
                "{refused}"
            );
            extended(&base, &topology("00:05.0", &["00:06.0"])).expect("no MSI region");
        }
    }

    #[test]
    fn topologies_that_no_tree_describes_are_refused_without_one() {
        let message = |iommu, endpoint| {
            let checked = check(&topology(iommu, &[endpoint]));
            checked.err().map(|error| error.to_string())
        };
        assert_eq!(message("00:05.0", "01:06.0"), None);
        let on_bus = message("01:05.0", "00:06.0").expect("refused");
        assert!(on_bus.contains("not on bus 00"), "{on_bus}");
        let segment = message("00:05.0", "0001:00:06.0").expect("refused");
        assert!(segment.contains("not on PCI segment 0"), "{segment}");
    }

    /// A file that is nested a hundred thousand times must not overflow the stack.
    #[test]
    fn deep_files_are_refused_without_recursion() {
        const DEPTH: usize = 100_000;
        let mut structure = Vec::new();
        structure.extend([0, 0, 0, 1, 0, 0, 0, 0]);
        for _ in 0..DEPTH {
            structure.extend([0, 0, 0, 1, b'n', 0, 0, 0]);
        }
        for _ in 0..=DEPTH {
            structure.extend([0, 0, 0, 2]);
        }
        structure.extend([0, 0, 0, 9]);
        let (header_len, reservations) = (40, [0; 16]);
        let at = header_len + reservations.len();
        let total = at + structure.len();
        let words = [
            0xd00d_feed,
            total,
            at,
            total,
            header_len,
            17,
            16,
            0,
            0,
            structure.len(),
        ];
        let mut file: Vec<u8> = words
            .iter()
            .flat_map(|&word| u32::try_from(word).expect("small").to_be_bytes())
            .collect();
        file.extend(reservations);
        file.extend(structure);
        assert!(
            refusal(&file, &topology("00:05.0", &["00:06.0"])).contains("nodes within more than")
        );
    }

    proptest! {
        /// Any change of a good file is a tree or refused.
        #[test]
        fn no_file_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8), cut in 0usize..8) {
            let mut file = base(&[]).to_dtb();
            for (at, value) in changes {
                let at = at.index(file.len());
                file[at] = value;
            }
            file.truncate(file.len() - cut);
            let _ = extended(&file, &topology("00:05.0", &["00:06.0"]));
        }
    }
}
