//! The core and the backend `Nested`: an SMMUv3 walks the tables that the core writes.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vhost_device_iommu::address::{Access, Gpa, GpaRange, Iova, IovaRange, Mapping, PageMask};
use vhost_device_iommu::backends::MemorySlot;
use vhost_device_iommu::backends::iommufd::PassthroughDevice;
use vhost_device_iommu::backends::iommufd::nested::{Nested, NestedDevice, WalkedTables};
use vhost_device_iommu::ids::{DomainId, EndpointId};
use vhost_device_iommu::iommu::{Iommu, Settings};
use vhost_device_iommu::page_table::{Encoding, Format};
use vhost_device_iommu::topology::{EndpointSpec, ReservedRegions, Topology};
use vhost_device_iommu::vfio::nesting::NestingKernel;
use vhost_device_iommu::vfio::{AddressSpaces, Cdev, IommuFd};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::{PAGE, RAM, TABLE, page};
use crate::common::memory::memfd;
use crate::common::rng::Rng;
use crate::devices::{Edu, Function};
use crate::words;

const RAM_SIZE: u64 = 0x40_0000;
const ARENA: u64 = 1 << 20;
const A: EndpointId = EndpointId(0x30);
const B: EndpointId = EndpointId(0x38);
const DOMAINS: [DomainId; 3] = [DomainId(1), DomainId(2), DomainId(3)];
/// The address at which each domain has a page of its own.
const WINDOW: u64 = 0x7654_3210_0000;

/// Two devices, a guest's memory, and the core.
struct CoreBed {
    iommu: Iommu,
    edus: BTreeMap<EndpointId, Edu>,
    ram: Arc<MmapRegion>,
}

impl CoreBed {
    fn new() -> Self {
        let iommufd = Arc::new(IommuFd::open("/dev/iommu".as_ref()).expect("iommufd"));
        let file = Arc::new(memfd(RAM_SIZE));
        let backing = FileOffset::from_arc(file.clone(), 0);
        let ram = Arc::new(MmapRegion::from_file(backing, RAM_SIZE as usize).expect("mapped"));
        let specs = ["00:06.0", "00:07.0"].map(|address| EndpointSpec {
            range: address.parse().expect("an address"),
            group: None,
            reserved: Vec::new(),
        });
        let at = "00:05.0".parse().expect("an address");
        let topology = Topology::new(at, ReservedRegions::default(), &specs);
        let settings = Settings {
            address_width: 48,
            page_sizes: PageMask::TABLE,
            last_domain: 15,
            bypass_at_boot: true,
            arena_limit: ARENA,
            encoding: Encoding {
                format: Format::Vmsav8Stage1,
                base: TABLE,
            },
        };
        let mut iommu = Iommu::new(settings, topology.expect("a topology")).expect("an arena");
        iommu.arena_mut().pin();
        let names = words("VIOMMU_EDU");
        let mut edus = BTreeMap::new();
        let mut devices = Vec::new();
        for (endpoint, name) in [A, B].into_iter().zip(&names) {
            let function = Function::new(name);
            let cdev = Cdev::open(function.node().as_ref()).expect("a device");
            let bound = cdev.bind(&iommufd, None).expect("bound");
            function.enable();
            edus.insert(endpoint, Edu::new(name));
            let device = PassthroughDevice {
                endpoint,
                name: name.clone(),
                group: endpoint.0,
                shared: false,
                attach: Box::new(cdev.clone()),
                memory: Arc::new(cdev),
            };
            devices.push(NestedDevice {
                device,
                bound,
                instance: 0,
            });
        }
        let tables = WalkedTables {
            file: iommu.arena().fd().try_clone_to_owned().expect("a copy"),
            base: Gpa(TABLE),
            bytes: ARENA,
        };
        let spaces: Arc<dyn AddressSpaces> = iommufd.clone();
        let kernel: Arc<dyn NestingKernel> = iommufd;
        let backend = Nested::new(spaces, &kernel, &tables, devices).expect("it nests");
        iommu
            .add_backend(Box::new(backend), &[A, B])
            .expect("added");
        iommu.connect();
        let metadata = file.metadata().expect("its metadata");
        iommu.set_memory(vec![MemorySlot {
            range: GpaRange::from_len(Gpa(RAM), RAM_SIZE).expect("a range"),
            memory: ram.clone(),
            offset: 0,
            block_len: PAGE,
            is_shared_memory: true,
            identity: (metadata.dev(), metadata.ino()),
            file,
        }]);
        iommu.driver_has_started();
        let bed = Self { iommu, edus, ram };
        bed.fill(20, 1);
        bed.fill(21, 2);
        // Both are in bypass mode.
        bed.edus[&A].read(page(20));
        bed.edus[&B].read(page(21));
        bed
    }

    fn map(&mut self, domain: DomainId, iova: u64, number: u64, access: Access) {
        let mapping = Mapping {
            range: IovaRange::from_len(Iova(iova), PAGE).expect("a range"),
            gpa: Gpa(page(number)),
            access,
            mmio: false,
        };
        self.iommu.map(domain, &mapping).expect("mapped");
    }

    fn fill(&self, number: u64, value: u8) {
        let memory = self.ram.as_volatile_slice();
        let place = (number * PAGE) as usize;
        memory
            .write_slice(&[value; PAGE as usize], place)
            .expect("within the memory");
    }

    /// Checks that a device reads zeros where the tables are, whose first page begins with other bytes. `iova` leads to memory.
    #[track_caller]
    fn expect_no_tables(&self, endpoint: EndpointId, iova: u64) {
        let before = self.reached(endpoint, &[iova, TABLE + PAGE]);
        self.edus[&endpoint].read(TABLE);
        assert_eq!(self.reached(endpoint, &[iova]), [0; 0]);
        let &[number] = &before[..] else {
            panic!("{before:?} are changed");
        };
        self.fill(number, 1);
        self.edus[&endpoint].read(iova);
    }

    /// The pages below 20 that an endpoint's device changes by writing to each of the addresses.
    fn reached(&self, endpoint: EndpointId, iovas: &[u64]) -> Vec<u64> {
        (0..20).for_each(|number| self.fill(number, 0));
        for iova in iovas {
            self.edus[&endpoint].write(*iova);
        }
        let memory = self.ram.as_volatile_slice();
        let mut bytes = [0; PAGE as usize];
        (0..20)
            .filter(|number| {
                let place = (number * PAGE) as usize;
                memory
                    .read_slice(&mut bytes, place)
                    .expect("within the memory");
                bytes.iter().any(|byte| *byte != 0)
            })
            .collect()
    }
}

fn pages(iova: u64, count: u64) -> IovaRange {
    IovaRange::from_len(Iova(iova), count * PAGE).expect("a range")
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh --arch arm64 passthrough"]
fn devices_obey_the_tables_of_the_core() {
    let mut bed = CoreBed::new();
    let [one, two, _] = DOMAINS;
    assert_eq!(bed.reached(A, &[page(3), WINDOW]), [3], "bypass mode");
    bed.expect_no_tables(A, page(3));
    bed.iommu.attach(A, one, false).expect("attached");
    assert_eq!(bed.reached(A, &[page(3), WINDOW]), [0; 0]);
    // A MAP is in force when it returns, also where the device has faulted before.
    bed.map(one, WINDOW, 4, Access::READ_WRITE);
    bed.map(one, WINDOW + PAGE, 5, Access::READ);
    assert_eq!(bed.reached(A, &[WINDOW, WINDOW + PAGE]), [4]);

    // Both devices share a domain, and one of them leaves it.
    bed.iommu.attach(B, one, false).expect("attached");
    assert_eq!(bed.reached(B, &[WINDOW]), [4]);
    bed.iommu.attach(B, two, false).expect("attached");
    bed.map(two, WINDOW, 6, Access::READ_WRITE);
    assert_eq!(bed.reached(B, &[WINDOW]), [6]);
    assert_eq!(bed.reached(A, &[WINDOW]), [4]);

    // An UNMAP is in force when it returns: the SMMU has used these translations.
    bed.iommu.unmap(one, pages(WINDOW, 1)).expect("unmapped");
    assert_eq!(bed.reached(A, &[WINDOW]), [0; 0]);
    assert_eq!(bed.reached(B, &[WINDOW]), [6]);
    // The same addresses lead elsewhere after another MAP.
    bed.map(one, WINDOW, 7, Access::READ_WRITE);
    assert_eq!(bed.reached(A, &[WINDOW]), [7]);

    // Several, in one call.
    let spread: Vec<u64> = (0..6).map(|n| 0x1_0000_0000 * (n + 1)).collect();
    for (number, iova) in (8..).zip(&spread) {
        bed.map(one, *iova, number, Access::READ_WRITE);
    }
    assert_eq!(bed.reached(A, &spread), [8, 9, 10, 11, 12, 13]);
    let mut outcomes = VecDeque::new();
    let ranges = spread.iter().map(|iova| pages(*iova, 1));
    bed.iommu.unmap_all(one, ranges, &mut outcomes);
    assert!(outcomes.len() == 6 && outcomes.iter().all(Result::is_ok));
    assert_eq!(bed.reached(A, &spread), [0; 0]);

    // Nothing leads to the tables.
    let there = Mapping {
        range: pages(0x5000, 1),
        gpa: Gpa(TABLE),
        access: Access::READ_WRITE,
        mmio: false,
    };
    bed.iommu.map(one, &there).expect_err("refused");

    // Guest memory goes, and the mappings that lead there reach nothing.
    bed.iommu.set_memory(Vec::new());
    assert_eq!(bed.reached(A, &[WINDOW]), [0; 0]);
    assert_eq!(bed.reached(B, &[WINDOW]), [0; 0]);
}

/// The place of an endpoint in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Domain(usize),
    Unattached,
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh --arch arm64 passthrough"]
fn ten_thousand_moves_leave_each_device_where_the_model_has_it() {
    const MOVES: u32 = 10_000;
    /// Moves between two looks at what the devices reach: a DMA takes a tenth of a second.
    const LOOK: u32 = 100;
    let mut bed = CoreBed::new();
    let mut rng = Rng::new(0x5eed);
    let mut places = BTreeMap::from([(A, Place::Unattached), (B, Place::Unattached)]);
    // The page at `WINDOW` in each domain; a domain is gone with its last member.
    let mut windows: [Option<u64>; 3] = [None; 3];
    for step in 0..MOVES {
        let endpoint = if rng.below(2) == 0 { A } else { B };
        let before = places[&endpoint];
        match rng.below(8) {
            0 => {
                if let Place::Domain(from) = before {
                    bed.iommu.detach(endpoint, DOMAINS[from]).expect("detached");
                }
                places.insert(endpoint, Place::Unattached);
            }
            1 => bed.iommu.set_bypass(rng.below(2) == 0),
            2 | 3 => {
                let Place::Domain(at) = before else { continue };
                let unmapped = bed.iommu.unmap(DOMAINS[at], pages(WINDOW, 1));
                assert_eq!(
                    unmapped.expect("unmapped").mappings,
                    u64::from(windows[at].is_some())
                );
                let number = rng.below(19);
                bed.map(DOMAINS[at], WINDOW, number, Access::READ_WRITE);
                windows[at] = Some(number);
            }
            _ => {
                let to = rng.below(3) as usize;
                bed.iommu
                    .attach(endpoint, DOMAINS[to], false)
                    .expect("attached");
                places.insert(endpoint, Place::Domain(to));
            }
        }
        for (at, window) in windows.iter_mut().enumerate() {
            if !places.values().any(|place| *place == Place::Domain(at)) {
                *window = None;
            }
        }
        if step % LOOK != 0 {
            continue;
        }
        for endpoint in [A, B] {
            let expected: Vec<u64> = match places[&endpoint] {
                Place::Domain(at) => windows[at].into_iter().collect(),
                Place::Unattached if bed.iommu.bypass() => vec![19],
                Place::Unattached => Vec::new(),
            };
            let found = bed.reached(endpoint, &[WINDOW, page(19)]);
            assert_eq!(found, expected, "step {step}, {endpoint}: {places:?}");
            // The SMMU has used the translation, so an UNMAP without an invalidation would show.
            if let Place::Domain(at) = places[&endpoint]
                && windows[at].take().is_some()
            {
                let unmapped = bed.iommu.unmap(DOMAINS[at], pages(WINDOW, 1));
                unmapped.expect("unmapped");
                let found = bed.reached(endpoint, &[WINDOW]);
                assert_eq!(found, [0; 0], "step {step}, {endpoint}: {places:?}");
            }
        }
    }
}
