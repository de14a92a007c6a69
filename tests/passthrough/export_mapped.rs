//! Exported devices whose registers the client maps.

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vhost_device_iommu::vfio::{Attach, DeviceAccess};

use crate::bed::{Backend, Bed, endpoint};
use crate::common::daemon::Daemon;
use crate::common::guest::HIGH_RAM;
use crate::common::kept::Keeper;
use crate::common::wire::{OK, READ, RW};
use crate::connection::{
    Connection, REGION_READ, RESET, SET_IRQS, VERSION, irqs, region, version_body,
};
use crate::edu_driver::{BAR, CONFIG, Driver, EDU_BUFFER, MASTER, MEMORY, PAGE};
use crate::export::{command_of, is_raised};
use crate::mapped_bar::{LentRegion, MappedBar, request};
use crate::words;

const SOURCE: u64 = HIGH_RAM + 0x10_0000;
const TARGET: u64 = HIGH_RAM + 0x20_0000;
const BYTES: [u8; PAGE as usize] = [0x5a; PAGE as usize];
const IDENTITY: u32 = 0x0100_00ed;
/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT` and the request that undoes it.
const ATTACH_PT: libc::c_ulong = 0x3b77;
const DETACH_PT: libc::c_ulong = 0x3b78;
const BIND_IOMMUFD: libc::c_ulong = 0x3b76;
const HOT_RESET: libc::c_ulong = 0x3b71;
const IOEVENTFD: libc::c_ulong = 0x3b74;

/// An `edu` that a client drives through its own mapping.
struct MappedEdu {
    region: LentRegion,
    bar: MappedBar,
}

impl MappedEdu {
    fn of(driver: &mut Driver) -> Self {
        let region = LentRegion::ask(&mut driver.0, BAR).expect("BAR 0 can be mapped");
        let bar = region.map();
        assert_eq!(bar.load(0), IDENTITY);
        Self { region, bar }
    }

    fn store(&self, at: usize, value: u64) {
        self.bar.store(at, value as u32);
        self.bar.store(at + 4, (value >> 32) as u32);
    }

    /// Has the device copy a page.
    fn copy(&self, from: u64, to: u64, direction: u64) {
        self.store(0x80, from);
        self.store(0x88, to);
        self.store(0x90, PAGE);
        self.bar.store(0x98, 1 | direction as u32);
        while self.bar.load(0x98) & 1 != 0 {
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn dma_read(&self, iova: u64) {
        self.copy(iova, EDU_BUFFER, 0);
    }

    /// Whether the page at `TARGET` has the device's bytes after it has written to `iova`.
    fn arrives(&self, bed: &Bed, iova: u64) -> bool {
        bed.guest.memory.write(TARGET, &[0; PAGE as usize]);
        self.copy(EDU_BUFFER, iova, 2);
        bed.guest.memory.read(TARGET, PAGE as usize) == BYTES
    }

    /// Switches memory and DMA on through the descriptor, without the daemon.
    fn switch_on(&self) {
        let device = self.region.device();
        let config = device.region(CONFIG).expect("a configuration space");
        device.write(&config, 4, &[6, 0]).expect("written");
        assert_eq!(self.bar.load(0), IDENTITY);
    }
}

fn endpoint_keys(name: &str, path: &Path) -> String {
    format!("address = '00:06.0', vfio = '{name}', export = {path:?}, registers = 'mapped'")
}

/// The same, in lines.
fn endpoint_table(name: &str, path: &Path) -> String {
    format!(
        "[[endpoint]]\n{}\n",
        endpoint_keys(name, path).replace(", ", "\n")
    )
}

/// A VM with an exported `edu` whose guest has mapped a page to read and one to write.
struct MappedBed {
    bed: Bed,
    name: String,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl MappedBed {
    fn new(backend: Backend, keeper: Option<&Keeper>) -> Self {
        eprintln!("{backend:?}");
        let name = words("VIOMMU_EDU")[0].clone();
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("edu");
        let keys = endpoint_table(&name, &path);
        let bed = match keeper {
            Some(keeper) => Bed::kept_with(backend, &[], &keys, keeper),
            None => Bed::with(backend, &[], &keys),
        };
        let mut all = Self {
            bed,
            name,
            path,
            _folder: folder,
        };
        all.map();
        all
    }

    fn map(&mut self) {
        let guest = &mut self.bed.guest;
        guest.memory.write(SOURCE, &BYTES);
        assert_eq!(guest.attach(1, endpoint(0)), OK);
        assert_eq!(guest.map(1, 0x1000, 0x1fff, SOURCE, READ), OK);
        assert_eq!(guest.map(1, 0x2000, 0x2fff, TARGET, RW), OK);
    }

    fn is_held(&self) -> bool {
        self.bed.daemon.control("stats")["exports"][0]["held"] == true
    }

    /// Waits until the device has no client, and is switched off.
    fn wait_for_release(&self) {
        let daemon = &self.bed.daemon;
        daemon.wait_for("the release", || {
            daemon.control("stats")["exports"][0]["client"] == false
        });
        assert_eq!(command_of(&self.name) & (MASTER | MEMORY), 0);
    }

    /// Whether the daemon closes the connection of a VMM that has sent nothing.
    fn refuses_a_vmm(&self) -> bool {
        let mut stream = self.bed.daemon.stream();
        let limit = Duration::from_secs(3);
        stream.set_read_timeout(Some(limit)).expect("a limit");
        match stream.read(&mut [0]) {
            Ok(length) => length == 0,
            Err(cause) => {
                assert_eq!(cause.kind(), ErrorKind::WouldBlock);
                false
            }
        }
    }

    /// Whether the device takes a client.
    fn takes_a_client(&self) -> bool {
        let stream = UnixStream::connect(&self.path).expect("connected");
        let mut client = Connection::new(stream);
        client.ask(VERSION, &version_body("{}"), &[]);
        client.recv().is_some_and(|answer| answer.errno() == 0)
    }
}

fn drive(backend: Backend) {
    let mut all = MappedBed::new(backend, None);
    let mut driver = Driver::connect(&all.path);
    let edu = MappedEdu::of(&mut driver);
    let link = format!("/proc/self/fd/{}", edu.region.file.as_raw_fd());
    let target = fs::read_link(link).expect("open").display().to_string();
    let expected = if backend.is_type1() {
        "[vfio-device]"
    } else {
        "/dev/vfio/devices/"
    };
    assert!(target.contains(expected), "{target}");

    eprintln!("DMA follows the guest's mappings");
    edu.dma_read(0x1000);
    assert!(edu.arrives(&all.bed, 0x2000));
    assert!(!edu.arrives(&all.bed, 0x3000) && !edu.arrives(&all.bed, TARGET));
    assert_eq!(all.bed.guest.unmap(1, 0x2000, 0x2fff), OK);
    assert!(!edu.arrives(&all.bed, 0x2000), "unmapped");
    assert_eq!(all.bed.guest.map(1, 0x2000, 0x2fff, TARGET, RW), OK);
    assert!(edu.arrives(&all.bed, 0x2000));

    eprintln!("interrupts arrive");
    for kind in [0, 1] {
        let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an event");
        let set = irqs(0x24, kind, 0, 1);
        assert_eq!(driver.0.call(SET_IRQS, &set, &[event.as_fd()]).errno(), 0);
        edu.bar.store(0x60, 7);
        assert!(is_raised(&event, Duration::from_secs(20)));
        edu.bar.store(0x64, 7);
        let disable = irqs(0x21, kind, 0, 0);
        assert_eq!(driver.0.call(SET_IRQS, &disable, &[]).errno(), 0);
    }

    eprintln!("the mapping goes and comes with the device's memory");
    for _ in 0..2 {
        assert!(edu.bar.is_there(0));
        driver.write(CONFIG, 4, &[4, 0]);
        assert!(!edu.bar.is_there(0), "memory is off");
        driver.write(CONFIG, 4, &[6, 0]);
        assert!(edu.bar.is_there(0));
        assert_eq!(edu.bar.load(0), IDENTITY);
    }

    eprintln!("the device is off, and without interrupts, once the client has gone");
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an event");
    let set = irqs(0x24, 1, 0, 1);
    assert_eq!(driver.0.call(SET_IRQS, &set, &[event.as_fd()]).errno(), 0);
    drop((edu, driver));
    all.wait_for_release();
    assert_eq!(all.is_held(), !backend.is_type1());
    let mut driver = Driver::connect(&all.path);
    let edu = MappedEdu::of(&mut driver);
    edu.bar.store(0x60, 7);
    assert!(!is_raised(&event, Duration::from_millis(100)));
    edu.bar.store(0x64, 7);
    edu.dma_read(0x1000);
    assert!(edu.arrives(&all.bed, 0x2000), "it is still in the domain");
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn a_client_drives_a_device_through_its_own_mapping() {
    drive(Backend::Type1);
    drive(Backend::Owned);
}

/// What the descriptor of each interface can do to DMA: the table in docs/export.md.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn a_client_with_the_descriptor_cannot_leave_its_domain() {
    let all = MappedBed::new(Backend::Type1, None);
    let mut driver = Driver::connect(&all.path);
    let edu = MappedEdu::of(&mut driver);
    let device = edu.region.file.as_fd();
    edu.dma_read(0x1000);
    for (number, argument) in [
        (ATTACH_PT, &mut [12, 0, 1][..]),
        (DETACH_PT, &mut [8, 0]),
        (BIND_IOMMUFD, &mut [16, 0, 0, 0]),
        // Neither without groups nor with the device's own file in the place of one.
        (HOT_RESET, &mut [12, 0, 0]),
        (
            HOT_RESET,
            &mut [16, 0, 1, device.as_raw_fd().cast_unsigned()],
        ),
    ] {
        let errno = request(device, number, argument);
        assert!(
            [libc::ENOTTY, libc::EINVAL, libc::ENODEV].contains(&errno),
            "{number:#x}: {errno}"
        );
        assert!(edu.arrives(&all.bed, 0x2000));
        assert!(!edu.arrives(&all.bed, TARGET));
    }
    drop((edu, driver, all));

    // A node can, as the table says. If this ever fails, the table is wrong.
    let all = MappedBed::new(Backend::Owned, None);
    let mut driver = Driver::connect(&all.path);
    let edu = MappedEdu::of(&mut driver);
    edu.dma_read(0x1000);
    assert!(edu.arrives(&all.bed, 0x2000));
    let mut reached = Vec::new();
    for space in 1..12 {
        let attached = edu.region.device().attach(space);
        let at = (edu.arrives(&all.bed, TARGET), edu.arrives(&all.bed, 0x2000));
        eprintln!("{space}: {attached:?} {at:?}");
        reached.extend(attached.is_ok().then_some(at.1));
    }
    // Spaces without the page, and the guest's domain again.
    assert!(reached.contains(&false) && reached.contains(&true));
    edu.region.device().detach().expect("detached");
    assert!(!edu.arrives(&all.bed, 0x2000));
}

fn outlive(backend: Backend) {
    let mut all = MappedBed::new(backend, None);
    let mut driver = Driver::connect(&all.path);
    let edu = MappedEdu::of(&mut driver);
    edu.dma_read(0x1000);
    drop(driver);
    all.wait_for_release();
    assert!(all.is_held());
    assert!(!edu.bar.is_there(0), "the daemon has switched memory off");
    assert_eq!(all.takes_a_client(), !backend.is_type1());
    all.wait_for_release();

    eprintln!("it can be driven by its former client, within the guest's mappings");
    edu.switch_on();
    edu.dma_read(0x1000);
    assert!(edu.arrives(&all.bed, 0x2000));
    assert!(!edu.arrives(&all.bed, TARGET));
    eprintln!("without a VMM it reaches nothing");
    all.bed.disconnect();
    edu.switch_on();
    assert!(!edu.arrives(&all.bed, 0x2000) && !edu.arrives(&all.bed, TARGET));

    eprintln!("the next client gets the device when the former one has closed it");
    assert_eq!(all.refuses_a_vmm(), backend.is_type1());
    assert_eq!(all.takes_a_client(), !backend.is_type1());
    drop(edu);
    if backend.is_type1() {
        let daemon = &all.bed.daemon;
        daemon.wait_for("the end of the refusal", || !all.is_held());
    }
    all.bed.reconnect();
    all.map();
    let mut driver = Driver::connect(&all.path);
    assert_eq!(all.is_held(), !backend.is_type1());
    let edu = MappedEdu::of(&mut driver);
    edu.dma_read(0x1000);
    assert!(edu.arrives(&all.bed, 0x2000));

    eprintln!("nothing is reached after the end of the daemon");
    all.bed.daemon.terminate();
    all.bed.daemon.wait_for_end();
    assert!(!edu.bar.is_there(0));
    edu.switch_on();
    assert!(!edu.arrives(&all.bed, 0x2000) && !edu.arrives(&all.bed, TARGET));
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn a_descriptor_that_outlives_its_client_reaches_no_memory() {
    outlive(Backend::Type1);
    outlive(Backend::Owned);
}

fn remove(backend: Backend) {
    eprintln!("{backend:?}");
    let name = words("VIOMMU_EDU")[0].clone();
    let mut bed = Bed::with(backend, &[], "hotplug = ['00:06.0']");
    let path = bed.daemon.socket().with_file_name("edu");
    let add = format!("add-endpoint {}", endpoint_keys(&name, &path));
    let map = |bed: &mut Bed| {
        bed.guest.memory.write(SOURCE, &BYTES);
        assert_eq!(bed.guest.attach(1, endpoint(0)), OK);
        assert_eq!(bed.guest.map(1, 0x1000, 0x1fff, SOURCE, READ), OK);
        assert_eq!(bed.guest.map(1, 0x2000, 0x2fff, TARGET, RW), OK);
    };
    for _ in 0..2 {
        let added = bed.daemon.control(&add);
        assert!(added["error"].is_null(), "{added}");
        map(&mut bed);
        let mut driver = Driver::connect(&path);
        let edu = MappedEdu::of(&mut driver);
        edu.dma_read(0x1000);
        assert!(edu.arrives(&bed, 0x2000));
        let removed = bed.daemon.control("remove-endpoint 00:06.0");
        assert!(removed["error"].is_null(), "{removed}");
        assert!(driver.0.is_closed());
        // The kernel keeps the device open for whoever has it, and for nobody else.
        edu.switch_on();
        assert!(!edu.arrives(&bed, 0x2000) && !edu.arrives(&bed, TARGET));
        let added = bed.daemon.control(&add);
        assert!(!added["error"].is_null(), "{added}");
        assert!(!edu.arrives(&bed, 0x2000) && !edu.arrives(&bed, TARGET));
    }
    bed.disconnect();
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn a_removed_device_whose_client_stays_reaches_no_memory() {
    remove(Backend::Type1);
    remove(Backend::Owned);
}

/// Calls `action` while the keeper closes what the daemon has it close.
fn while_kept<T>(keeper: &mut Keeper, action: impl FnOnce() -> T) -> T {
    let (done, is_done) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let pause = Duration::from_millis(5);
            while is_done.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                keeper.take();
            }
        });
        // Dropped when the action has ended, also by a panic.
        let _done = done;
        action()
    })
}

fn restart(backend: Backend) {
    let mut keeper = Keeper::empty();
    let mut all = MappedBed::new(backend, Some(&keeper));
    let mut driver = Driver::connect(&all.path);
    let edu = MappedEdu::of(&mut driver);
    // After this answer the daemon has recorded the one before.
    assert_eq!(driver.load(0), IDENTITY);
    for round in 0u32..3 {
        eprintln!("round {round}");
        all.bed.daemon.kill();
        edu.bar.store(4, round);
        assert_eq!(edu.bar.load(4), !round, "without a daemon");
        edu.dma_read(0x1000);
        assert!(edu.arrives(&all.bed, 0x2000));
        let asked = driver.0.ask(REGION_READ, &region(4, BAR, 4, &[]), &[]);
        all.bed.daemon.start_again(&mut keeper);
        let reply = driver.0.recv().expect("a reply");
        assert_eq!((reply.id, reply.errno()), (asked, 0));
        assert_eq!(reply.u32_at(16), !round, "the device was not reset");
        assert!(edu.arrives(&all.bed, 0x2000));
        assert!(!all.is_held());
    }
    eprintln!("the last daemon knows what the client has");
    let MappedEdu { region, bar } = edu;
    drop((driver, bar));
    all.wait_for_release();
    assert!(all.is_held());
    assert_eq!(all.takes_a_client(), !backend.is_type1());
    eprintln!("so does the next one, to which a device without a client is left");
    all.bed.daemon.die(&mut keeper);
    assert!(all.is_held());
    assert_eq!(all.takes_a_client(), !backend.is_type1());
    drop(region);
    let mut driver = while_kept(&mut keeper, || Driver::connect(&all.path));
    assert_eq!(all.is_held(), !backend.is_type1());
    let edu = MappedEdu::of(&mut driver);
    edu.dma_read(0x1000);
    assert!(edu.arrives(&all.bed, 0x2000));
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn mapped_registers_outlive_kills_of_the_daemon() {
    restart(Backend::Type1);
    restart(Backend::Owned);
}

/// The network card: three BARs that can be mapped, one of which has the MSI-X table, and a reset of its own.
fn card(host_iommu: &str) {
    eprintln!("{host_iommu}");
    const COMMAND: u64 = 4;
    /// The base of the transmit ring.
    const TDBAL: usize = 0xe000;
    const MARK: u32 = 0x1234_5680;
    const TABLE_BAR: u32 = 3;
    let name = words("VIOMMU_IGB")[0].clone();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("card");
    let keys = endpoint_table(&name, &path);
    let text = format!("address = '00:05.0'\nhost-iommu = '{host_iommu}'\n{keys}");
    let daemon = Daemon::with_config(&text);
    let mut driver = Driver(Connection::new(
        UnixStream::connect(&path).expect("connected"),
    ));
    let answer = driver.0.call(VERSION, &version_body("{}"), &[]);
    assert_eq!(answer.errno(), 0);
    driver.write(CONFIG, COMMAND, &MEMORY.to_le_bytes());
    let mut found = Vec::new();
    for index in 0..6 {
        let Some(region) = LentRegion::ask(&mut driver.0, index) else {
            continue;
        };
        let vfio = region.device().region(index).expect("a region");
        assert_eq!((region.offset, region.size), (vfio.offset, vfio.size));
        assert_eq!(region.has_table, index == TABLE_BAR);
        found.push((index, region.map()));
    }
    let indices: Vec<_> = found.iter().map(|(index, _)| *index).collect();
    assert_eq!(indices, [0, 1, TABLE_BAR]);
    let (registers, table) = (&found[0].1, &found[2].1);
    registers.store(TDBAL, MARK);
    let mut load = |index: u32, at: u64| {
        let body = region(at, index, 4, &[]);
        let reply = driver.0.call(REGION_READ, &body, &[]);
        assert_eq!(reply.errno(), 0);
        reply.u32_at(16)
    };
    assert_eq!(load(0, TDBAL as u64), MARK, "the same registers");
    // The first message of the table can be written through the mapping alone.
    table.store(8, 0x55);
    assert_eq!(table.load(8), 0x55);
    assert_eq!(load(TABLE_BAR, 8), u32::MAX);

    assert_eq!(driver.0.call(RESET, &[], &[]).errno(), 0);
    assert!(
        registers.is_there(TDBAL),
        "memory is on as before the reset"
    );
    assert_eq!((registers.load(TDBAL), table.load(8)), (0, 0));
    registers.store(TDBAL, MARK);
    drop(driver);
    daemon.wait_for("the release", || {
        daemon.control("stats")["exports"][0]["client"] == false
    });
    assert!(!registers.is_there(TDBAL) && !table.is_there(8));
    drop(found);
    let mut driver = Driver(Connection::new(
        UnixStream::connect(&path).expect("connected"),
    ));
    let answer = driver.0.call(VERSION, &version_body("{}"), &[]);
    assert_eq!(answer.errno(), 0);
    driver.write(CONFIG, COMMAND, &MEMORY.to_le_bytes());
    let registers = LentRegion::ask(&mut driver.0, BAR).expect("BAR 0").map();
    assert_eq!(registers.load(TDBAL), 0);
    daemon.terminate();
    daemon.wait_for_end();
}

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn each_bar_of_a_device_is_mapped_and_survives_its_reset() {
    card("type1");
    card("iommufd");
}

/// What is set up through the descriptor ends when nobody has the device any more.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn nothing_of_a_former_client_writes_registers_of_a_closed_device() {
    let all = MappedBed::new(Backend::Type1, None);
    let mut driver = Driver::connect(&all.path);
    let edu = MappedEdu::of(&mut driver);
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an event");
    assert_eq!(write_at_event(&edu, 0x77, &event), 0);
    let trigger = || rustix::io::write(&event, &1u64.to_ne_bytes()).expect("an event");
    trigger();
    all.bed
        .daemon
        .wait_for("the write", || edu.bar.load(4) == !0x77);
    edu.bar.store(4, 1);
    drop((edu, driver));
    all.wait_for_release();
    assert!(!all.is_held());
    let mut driver = Driver::connect(&all.path);
    let edu = MappedEdu::of(&mut driver);
    edu.bar.store(4, 2);
    trigger();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(edu.bar.load(4), !2);
}

/// Has `event` write `data` to a register of BAR 0. Returns the errno.
fn write_at_event(edu: &MappedEdu, data: u32, event: &OwnedFd) -> i32 {
    // vfio_device_ioeventfd: argsz, flags (4 bytes), offset, data, fd, reserved.
    let fd = event.as_raw_fd().cast_unsigned();
    let mut argument = [32, 4, 4, 0, data, 0, fd, 0];
    request(edu.region.file.as_fd(), IOEVENTFD, &mut argument)
}

/// A process that has the descriptor writes the registers that VFIO keeps, so that the device seems to be newly opened.
#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh emulated"]
fn a_former_client_cannot_hide_that_it_has_the_descriptor() {
    const INTERRUPT_LINE: u64 = 0x3c;
    let all = MappedBed::new(Backend::Type1, None);
    let mut driver = Driver::connect(&all.path);
    let edu = MappedEdu::of(&mut driver);
    let device = edu.region.device();
    let config = device.region(CONFIG).expect("a configuration space");
    let mut hardware = [0];
    device
        .read(&config, INTERRUPT_LINE, &mut hardware)
        .expect("read");
    thread::scope(|scope| {
        let (done, is_done) = mpsc::channel::<()>();
        let device = &device;
        let config = &config;
        scope.spawn(move || {
            while is_done.try_recv() == Err(TryRecvError::Empty) {
                device
                    .write(config, INTERRUPT_LINE, &hardware)
                    .expect("written");
            }
        });
        // Dropped at the end, also by a panic.
        let _done = done;
        drop(driver);
        all.wait_for_release();
        assert!(all.is_held());
        for _ in 0..3 {
            assert!(!all.takes_a_client());
        }
        all.wait_for_release();
        assert!(all.is_held());
    });

    eprintln!("it leaves no room for events");
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an event");
    let added = (0..2000).take_while(|n| write_at_event(&edu, *n, &event) == 0);
    assert!(added.count() > 900);
    assert_eq!(write_at_event(&edu, 2000, &event), libc::ENOSPC);
    assert!(!all.takes_a_client());
    all.wait_for_release();
    assert!(all.is_held());
    drop((edu, device));
    let mut driver = Driver::connect(&all.path);
    assert!(!all.is_held());

    eprintln!("a client that has ended may leave it without room");
    let edu = MappedEdu::of(&mut driver);
    let added = (0..2000).take_while(|n| write_at_event(&edu, *n, &event) == 0);
    assert!(added.count() > 900);
    drop((edu, driver));
    all.wait_for_release();
    assert!(!all.is_held());
    let mut driver = Driver::connect(&all.path);
    let edu = MappedEdu::of(&mut driver);
    assert_eq!(write_at_event(&edu, 0, &event), 0);
}
