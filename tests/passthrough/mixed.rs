//! A passthrough device, an emulated device and a shadow reader in one domain: they see the same memory.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use tempfile::TempDir;
use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::shadow::ShadowReader;
use vm_memory::{Bytes, GuestAddress};

use crate::bed::{Backend, Bed, endpoint};
use crate::common::guest::HIGH_RAM;
use crate::common::wire::{FAULT, NOMEM, OK, READ, RW, WRITE};
use crate::connection::{Connection, VERSION, version_body};
use crate::devices::Edu;
use crate::host::host_iommu;
use crate::server::Server;
use crate::words;

const PAGE: u64 = 4096;
const SOURCE: u64 = HIGH_RAM + 0x10_0000;
const TARGET: u64 = HIGH_RAM + 0x20_0000;
const OTHER: u64 = HIGH_RAM + 0x30_0000;
/// The I/O virtual addresses of these pages.
const FROM: u64 = 0x10_0000;
const TO: u64 = 0x7000_0000_0000;
const ONWARD: u64 = 0x20_0000;

/// The endpoint of the emulated device.
const EMULATED: u32 = 0x50;
/// The endpoint of the shadow reader.
const SHADOW: u32 = 0x58;

const CLIENT_TEXT: &str = r#"{"capabilities":{"max_msg_fds":16}}"#;

fn pattern(seed: u8) -> Vec<u8> {
    (0..PAGE)
        .map(|n| (n as u8).wrapping_mul(13) ^ (n >> 8) as u8 ^ seed)
        .collect()
}

/// A VM with a passthrough `edu`, an emulated device and a shadow reader.
struct MixedBed {
    vm: Bed,
    edu: Edu,
    server: Server,
    _client: Connection,
    reader: ShadowReader,
    _folder: TempDir,
}

impl MixedBed {
    fn new(backend: Backend, isolation: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| -> PathBuf { folder.path().join(name) };
        let (listen, connect, shadow) = (path("listen"), path("connect"), path("shadow"));
        let keys = format!(
            "bypass = false\n[[endpoint]]\naddress = '00:0a.0'\n\
             vfio-user = {{ listen = {listen:?}, connect = {connect:?}, isolation = '{isolation}', announce = 'exact' }}\n\
             [[endpoint]]\naddress = '00:0b.0'\nshadow = {shadow:?}\n"
        );
        let name = words("VIOMMU_EDU")[0].clone();
        let vm = Bed::with(backend, &[&name], &keys);
        let mut client = Connection::new(UnixStream::connect(&listen).expect("connected"));
        let server = Server::start(&connect, || {
            client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
        });
        assert_eq!(client.recv().expect("an answer").errno(), 0);
        let reader =
            ShadowReader::connect(&shadow, EndpointId(SHADOW)).expect("the reader is accepted");
        vm.guest.memory.write(SOURCE, &pattern(1));
        Self {
            vm,
            edu: Edu::new(&name),
            server,
            _client: client,
            reader,
            _folder: folder,
        }
    }

    fn page(&self, gpa: u64) -> Vec<u8> {
        self.vm.guest.memory.read(gpa, PAGE as usize)
    }

    fn map(&mut self, iova: u64, gpa: u64, flags: u32) -> u8 {
        let last = iova + PAGE - 1;
        self.vm.guest.map(1, iova, last, gpa, flags)
    }

    fn unmap(&mut self, iova: u64) {
        assert_eq!(self.vm.guest.unmap(1, iova, iova + PAGE - 1), OK);
    }

    fn read_by_shadow(&self, iova: u64) -> Option<Vec<u8>> {
        let mut data = vec![0; PAGE as usize];
        let memory = self.reader.memory();
        memory.read_slice(&mut data, GuestAddress(iova)).ok()?;
        Some(data)
    }

    /// Checks that none of the three can write at an address.
    fn all_writes_are_blocked(&mut self, iova: u64) {
        let before = self.vm.memory();
        self.edu.write(iova);
        assert_eq!(self.server.write(iova, &pattern(9)), Err(libc::EFAULT));
        let memory = self.reader.memory();
        memory
            .write_slice(&pattern(9), GuestAddress(iova))
            .expect_err("refused");
        assert!(self.vm.memory() == before, "{iova:#x} was written to");
    }
}

fn scenario(backend: Backend, isolation: &str) {
    eprintln!("{backend:?}, {isolation}");
    let mut bed = MixedBed::new(backend, isolation);
    for endpoint in [endpoint(0), EMULATED, SHADOW] {
        assert_eq!(bed.vm.guest.attach(1, endpoint), OK);
    }
    bed.all_writes_are_blocked(TARGET);
    assert_eq!(bed.map(FROM, SOURCE, READ), OK);
    assert_eq!(bed.map(TO, TARGET, RW), OK);
    assert_eq!(bed.map(ONWARD, OTHER, RW), OK);
    assert_eq!(bed.server.windows(), [FROM, ONWARD, TO]);

    eprintln!("each device reads what another has written");
    bed.edu.read(FROM);
    bed.edu.write(TO);
    assert_eq!(bed.page(TARGET), pattern(1));
    assert_eq!(bed.server.read(TO, PAGE as usize), Ok(pattern(1)));
    bed.vm
        .daemon
        .wait_for("the reader's memory", || bed.read_by_shadow(TO).is_some());
    assert_eq!(bed.read_by_shadow(TO), Some(pattern(1)));
    assert_eq!(bed.server.write(TO, &pattern(2)), Ok(()));
    bed.edu.read(TO);
    bed.edu.write(ONWARD);
    assert_eq!(bed.page(OTHER), pattern(2));
    let memory = bed.reader.memory();
    memory
        .write_slice(&pattern(3), GuestAddress(ONWARD))
        .expect("mapped");
    drop(memory);
    assert_eq!(bed.server.read(ONWARD, PAGE as usize), Ok(pattern(3)));
    bed.edu.read(ONWARD);
    bed.edu.write(TO);
    assert_eq!(bed.page(TARGET), pattern(3));

    eprintln!("no device reaches an unmapped page");
    bed.unmap(TO);
    bed.all_writes_are_blocked(TO);
    assert_eq!(bed.server.read(TO, 1), Err(libc::EFAULT));
    assert_eq!(bed.read_by_shadow(TO), None);
    if isolation == "messages" {
        // Not with mappings: a server with guest RAM can also write pages that it may only read.
        bed.all_writes_are_blocked(FROM);
    }

    eprintln!("a MAP that one device refuses changes nothing for the others");
    let windows = bed.server.windows();
    assert_eq!(bed.map(TO, 0x9_0000_0000, WRITE), FAULT);
    assert_eq!(bed.server.windows(), windows, "the server gets no window");
    bed.all_writes_are_blocked(TO);
    bed.server.refuse(true);
    assert_eq!(bed.map(TO, TARGET, RW), NOMEM);
    bed.all_writes_are_blocked(TO);
    bed.server.refuse(false);
    assert_eq!(bed.map(TO, TARGET, RW), OK);
    bed.edu.write(TO);
    assert_eq!(bed.server.read(TO, PAGE as usize), Ok(pattern(3)));

    eprintln!("a device that leaves the domain reaches nothing, and the others still work");
    assert_eq!(bed.vm.guest.detach(1, EMULATED), OK);
    assert_eq!(bed.server.read(TO, 1), Err(libc::EFAULT));
    assert_eq!(bed.server.windows(), Vec::<u64>::new());
    bed.edu.read(FROM);
    bed.edu.write(TO);
    assert_eq!(bed.page(TARGET), pattern(1));
    assert_eq!(bed.read_by_shadow(TO), Some(pattern(1)));
    assert_eq!(bed.vm.guest.detach(1, endpoint(0)), OK);
    assert_eq!(bed.vm.guest.attach(1, EMULATED), OK);
    assert_eq!(bed.server.write(TO, &pattern(5)), Ok(()));
    let before = bed.vm.memory();
    bed.edu.write(TO);
    assert!(bed.vm.memory() == before);
    assert_eq!(bed.read_by_shadow(TO), Some(pattern(5)));
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn all_kinds_of_devices_share_a_domain() {
    if host_iommu().is_amd() {
        scenario(Backend::Owned, "mappings");
    } else {
        scenario(Backend::SharedAll, "messages");
        scenario(Backend::Type1, "messages");
    }
}
