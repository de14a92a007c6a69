//! A device that records the calls of the server, and the server.

use std::fs::File;
use std::io::{self, PipeReader};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vhost_device_iommu::export::{DeviceServer, ExportedDevice, serve};
use vhost_device_iommu::vfio::{
    AffectedDevice, BusReset, Capability, DeviceAccess, DeviceInfo, DeviceMark, GroupFile,
    HotResetScope, IrqChange, IrqInfo, IrqSelection, RegionInfo,
};

use crate::common::memory::memfd;
use crate::connection::{Connection, VERSION, version_body};

/// The regions of the device: a BAR that can be mapped, one that cannot, the ROM, the configuration space, and one
/// with a type of its own. The other regions are empty.
pub const BAR: u32 = 0;
pub const TRAPPED: u32 = 2;
pub const ROM: u32 = 6;
pub const CONFIG: u32 = 7;
pub const OWN: u32 = 9;
pub const REGIONS: u32 = 10;
pub const BAR_LEN: u64 = 0x4000;

/// The kinds of interrupts.
pub const INTX: u32 = 0;
pub const MSI: u32 = 1;
pub const MSIX: u32 = 2;

pub const READ: u32 = 1;
pub const WRITE: u32 = 2;
pub const MMAP: u32 = 4;
pub const CAPS: u32 = 8;
pub const NORESIZE: u32 = 8;

pub const CLIENT_TEXT: &str = r#"{"capabilities":{"max_msg_fds":16,"max_dma_maps":65535,
    "max_data_xfer_size":1048576,"pgsizes":4096,"write_multiple":true}}"#;

/// The register whose value VFIO keeps while the device is open.
const INTERRUPT_LINE: usize = 0x3c;

/// The state of the device.
pub struct State {
    /// The bytes of each region.
    pub bytes: Vec<Vec<u8>>,
    /// The file of the BAR, on kernels that export one.
    pub file: Option<File>,
    /// The changes to interrupts so far.
    pub changes: Vec<String>,
    /// The present events, by kind and number.
    pub events: Vec<Vec<Option<OwnedFd>>>,
    pub resets: u32,
    /// The errno with which accesses and resets fail.
    pub error: Option<i32>,
    /// The number of accesses that reached the device.
    pub accesses: u32,
    /// The device has a reset of its own.
    pub resets_alone: bool,
    /// The functions that a hot reset resets; none if there is no hot reset.
    pub bus: Vec<AffectedDevice>,
    pub hot_resets: u32,
    pub hot_reset_error: Option<i32>,
    /// The open group of the device; `None` for a device that is bound to an iommufd.
    pub group: Option<Arc<OwnedFd>>,
    /// The descriptors of groups that came with the last hot reset.
    pub reset_with: Vec<RawFd>,
    /// Closed and opened again, in this order; shared by the devices of a bus.
    pub reopened: Arc<Mutex<Vec<&'static str>>>,
    pub reopen_error: Option<i32>,
    /// How often the device is still open when this process has closed it: another process has it.
    pub held: u32,
    /// The open file stands for a pipe's end. The device is closed when no process has that end.
    open: (PipeReader, Option<OwnedFd>),
    /// Called whenever this process closes the device.
    pub closing: Option<Box<dyn FnMut() + Send>>,
    /// The value of [`INTERRUPT_LINE`] in the hardware.
    pub hardware_line: u8,
}

/// A device that records the calls of the server.
#[derive(Clone)]
pub struct RecordingDevice(Arc<Mutex<State>>);

impl RecordingDevice {
    pub fn new() -> Self {
        let (closed, open) = io::pipe().expect("a pipe");
        let mut bytes = vec![Vec::new(); REGIONS as usize];
        for (index, len) in [
            (BAR, BAR_LEN as usize),
            (TRAPPED, 2 << 20),
            (ROM, 0x1000),
            (CONFIG, 0x1000),
            (OWN, 0x100),
        ] {
            bytes[index as usize] = (0..len).map(|n| (n as u8) ^ index as u8).collect();
        }
        Self(Arc::new(Mutex::new(State {
            bytes,
            file: None,
            changes: Vec::new(),
            events: vec![Vec::new(), Vec::new(), Vec::new(), Vec::new()],
            resets: 0,
            error: None,
            accesses: 0,
            resets_alone: true,
            bus: Vec::new(),
            hot_resets: 0,
            hot_reset_error: None,
            group: None,
            reset_with: Vec::new(),
            reopened: Arc::default(),
            reopen_error: None,
            held: 0,
            open: (closed, Some(open.into())),
            closing: None,
            hardware_line: 11,
        })))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Takes the changes to interrupts since the last call.
    pub fn changes(&self) -> Vec<String> {
        std::mem::take(&mut self.state().changes)
    }

    /// Raises an interrupt. Returns whether it has an event.
    pub fn raise(&self, kind: u32, number: usize) -> bool {
        let state = self.state();
        let event = state.events[kind as usize].get(number);
        let Some(Some(event)) = event else {
            return false;
        };
        rustix::io::write(event, &1u64.to_ne_bytes()).expect("an event");
        true
    }

    fn access(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        if let Some(error) = state.error {
            return Err(io::Error::from_raw_os_error(error));
        }
        state.accesses += 1;
        Ok(state)
    }
}

fn errno(error: i32) -> io::Error {
    io::Error::from_raw_os_error(error)
}

/// Where a region begins in the device's file.
pub fn offset_of(index: u32) -> u64 {
    u64::from(index + 1) << 40
}

fn index_of(region: &RegionInfo) -> usize {
    (region.offset >> 40) as usize - 1
}

/// The capabilities of a region as the kernel gives them: one area that may be mapped, and MSIX_MAPPABLE.
fn mapping_capabilities() -> Vec<Capability> {
    let mut sparse = [1u32.to_ne_bytes(), [0; 4]].concat();
    sparse.extend(0x1000u64.to_ne_bytes());
    sparse.extend(0x2000u64.to_ne_bytes());
    let capability = |id, data: &[u8]| Capability {
        id,
        version: 1,
        data: data.to_vec(),
    };
    // A capability with an unknown ID stands between the two.
    vec![
        capability(1, &sparse),
        capability(77, b"new"),
        capability(3, &[]),
    ]
}

impl DeviceAccess for RecordingDevice {
    fn info(&self) -> io::Result<DeviceInfo> {
        Ok(DeviceInfo {
            flags: 2 | u32::from(self.state().resets_alone) | 1 << 7,
            regions: REGIONS,
            irqs: 4,
        })
    }

    fn region(&self, index: u32) -> io::Result<RegionInfo> {
        let size = self.state().bytes.get(index as usize).map(Vec::len);
        let size = size
            .filter(|len| *len > 0)
            .ok_or_else(|| errno(libc::EINVAL))?;
        let (flags, capabilities) = match index {
            BAR => (READ | WRITE | MMAP | CAPS, mapping_capabilities()),
            ROM => (READ, Vec::new()),
            OWN => {
                let kind = Capability {
                    id: 2,
                    version: 1,
                    data: [0x8000_8086u32.to_ne_bytes(), 1u32.to_ne_bytes()].concat(),
                };
                (READ | WRITE | CAPS, vec![kind])
            }
            _ => (READ | WRITE, Vec::new()),
        };
        Ok(RegionInfo {
            flags,
            size: size as u64,
            offset: offset_of(index),
            capabilities,
        })
    }

    fn irq(&self, index: u32) -> io::Result<IrqInfo> {
        let (flags, count) = [(7, 1), (1 | NORESIZE, 32), (1, 64), (1 | NORESIZE, 1)]
            .get(index as usize)
            .copied()
            .ok_or_else(|| errno(libc::EINVAL))?;
        Ok(IrqInfo { flags, count })
    }

    /// Like the kernel, allows one kind of interrupts at a time, and no more MSIs than the first request had.
    fn set_irqs(&self, change: &IrqChange<'_>) -> io::Result<()> {
        let mut state = self.state();
        if let Some(error) = state.error {
            return Err(errno(error));
        }
        let (action, index) = (change.action, change.index);
        let start = change.start as usize;
        let selection = match change.selection {
            IrqSelection::All(count) => format!("all {count}"),
            IrqSelection::Chosen(bools) => format!("chosen {bools:?}"),
            IrqSelection::Events(events) => {
                let present = events.iter().map(|e| if e.is_some() { 'e' } else { '-' });
                format!("events {}", present.collect::<String>())
            }
        };
        state.changes.push(format!(
            "kind {index} action {action:#x} from {start}: {selection}"
        ));
        if action != 0x20 {
            return Ok(());
        }
        match change.selection {
            IrqSelection::All(0) => state.events[index as usize].clear(),
            IrqSelection::All(_) | IrqSelection::Chosen(_) => {}
            IrqSelection::Events(events) => {
                let kinds = state.events.iter().take(3).enumerate();
                let mut others = kinds.filter(|(n, _)| *n != index as usize);
                if index < 3 && others.any(|(_, e)| !e.is_empty()) {
                    return Err(errno(libc::EINVAL));
                }
                let held = &mut state.events[index as usize];
                let end = start + events.len();
                if index == MSI && !held.is_empty() && end > held.len() {
                    return Err(errno(libc::EINVAL));
                }
                held.resize_with(held.len().max(end), || None);
                for (slot, event) in held[start..].iter_mut().zip(events) {
                    *slot = event.map(duplicate_event).transpose()?;
                }
            }
        }
        Ok(())
    }

    fn read(&self, region: &RegionInfo, at: u64, into: &mut [u8]) -> io::Result<usize> {
        let state = self.access()?;
        let at = at as usize;
        into.copy_from_slice(&state.bytes[index_of(region)][at..at + into.len()]);
        Ok(into.len())
    }

    fn write(&self, region: &RegionInfo, at: u64, from: &[u8]) -> io::Result<usize> {
        let mut state = self.access()?;
        let at = at as usize;
        state.bytes[index_of(region)][at..at + from.len()].copy_from_slice(from);
        Ok(from.len())
    }

    fn region_file(&self, index: u32, _: &RegionInfo) -> Option<OwnedFd> {
        assert_eq!(
            index, BAR,
            "the server asks for regions that can be mapped alone"
        );
        let state = self.state();
        Some(state.file.as_ref()?.try_clone().expect("cloned").into())
    }

    /// The other processes that have it keep the device open.
    fn device_file(&self) -> io::Result<OwnedFd> {
        self.duplicate()
    }

    fn reset(&self) -> io::Result<()> {
        let mut state = self.access()?;
        state.accesses -= 1;
        state.resets += 1;
        Ok(())
    }

    fn hot_reset_scope(&self) -> io::Result<HotResetScope> {
        let devices = self.state().bus.clone();
        if devices.is_empty() {
            return Err(errno(libc::ENODEV));
        }
        Ok(HotResetScope { devices })
    }

    fn bus_reset(&self) -> Arc<dyn BusReset> {
        Arc::new(self.clone())
    }

    fn stop_dma(&self) -> io::Result<()> {
        panic!("the device has a configuration space, whose command register stops DMA");
    }
}

impl BusReset for RecordingDevice {
    fn group(&self) -> Option<GroupFile> {
        let group: GroupFile = self.state().group.clone()?;
        Some(group)
    }

    fn hot_reset(&self, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut state = self.state();
        if let Some(error) = state.hot_reset_error {
            return Err(errno(error));
        }
        // As in the kernel, groups come with devices of groups and with no others.
        if groups.is_empty() != state.group.is_none() {
            return Err(errno(libc::EINVAL));
        }
        state.reset_with = groups.iter().map(AsRawFd::as_raw_fd).collect();
        state.hot_resets += 1;
        Ok(())
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        let state = self.state();
        let open = state.open.1.as_ref();
        open.ok_or_else(|| errno(libc::EBADF))?.try_clone()
    }

    fn close(&self) -> io::Result<()> {
        let mut state = self.state();
        state.open.1 = None;
        state.reopened.lock().unwrap().push("closed");
        if let Some(closing) = &mut state.closing {
            closing();
        }
        Ok(())
    }

    fn open_again(&self) -> io::Result<()> {
        let mut state = self.state();
        state.reopened.lock().unwrap().push("opened");
        let mut ends = [PollFd::new(&state.open.0, PollFlags::IN)];
        rustix::event::poll(&mut ends, Some(&Timespec::default()))?;
        let is_closed = ends[0].revents().contains(PollFlags::HUP);
        if let Some(left) = state.held.checked_sub(1) {
            state.held = left;
        } else if is_closed {
            state.bytes[CONFIG as usize][INTERRUPT_LINE] = state.hardware_line;
        }
        // One more of these ends, also if another process has one.
        let path = format!("/proc/self/fd/{}", state.open.0.as_raw_fd());
        let open = File::options().write(true).open(path)?;
        state.open.1 = Some(open.into());
        state.reopen_error.map_or(Ok(()), |error| Err(errno(error)))
    }

    fn mark(&self, line: u8) -> io::Result<DeviceMark> {
        self.state().bytes[CONFIG as usize][INTERRUPT_LINE] = line;
        Ok(DeviceMark::Line(line))
    }

    fn has_mark(&self, mark: &DeviceMark) -> io::Result<bool> {
        let DeviceMark::Line(line) = mark else {
            panic!("the device takes no events");
        };
        Ok(self.state().bytes[CONFIG as usize][INTERRUPT_LINE] == *line)
    }
}

/// Duplicates an event. Like the kernel, refuses other files.
fn duplicate_event(event: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let copy = event.try_clone_to_owned()?;
    let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
    let target = std::fs::read_link(path)?;
    if target.display().to_string() != "anon_inode:[eventfd]" {
        return Err(errno(libc::EINVAL));
    }
    Ok(copy)
}

/// A server and its device.
pub struct Bed {
    pub device: RecordingDevice,
    pub path: PathBuf,
    pub server: Option<DeviceServer>,
    /// See [`ExportedDevice::leftover`].
    pub leftover: Arc<AtomicBool>,
    _folder: tempfile::TempDir,
}

impl Bed {
    pub fn new() -> Self {
        Self::of(RecordingDevice::new(), |offered| offered)
    }

    /// A server of `device` after `change`.
    pub fn of(
        device: RecordingDevice,
        change: impl FnOnce(ExportedDevice) -> ExportedDevice,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        let offered =
            ExportedDevice::new("device".into(), Box::new(device.clone())).expect("a device");
        let server = serve(listener, change(offered), None).expect("a server");
        Self {
            device,
            path,
            server: Some(server),
            leftover: Arc::default(),
            _folder: folder,
        }
    }

    /// A client that has sent nothing.
    pub fn connect(&self) -> Connection {
        Connection::new(UnixStream::connect(&self.path).expect("connected"))
    }

    /// A client that has negotiated.
    pub fn client(&self) -> Connection {
        let mut client = self.connect();
        let answer = client.call(VERSION, &version_body(CLIENT_TEXT), &[]);
        assert_eq!(answer.errno(), 0);
        client
    }

    /// Gives the BAR a file of its own. Returns the file's device and inode numbers.
    pub fn give_file(&self) -> (u64, u64) {
        let file = memfd(BAR_LEN);
        let metadata = file.metadata().expect("known");
        self.device.state().file = Some(file);
        (metadata.dev(), metadata.ino())
    }
}

/// Waits until `holds` returns true. Fails the test with `what` after 20 s.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
