//! A VFIO device behind the vfio-user server: implements the server's trait [`ServedDevice`].

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::{info, warn};
use serde::{Deserialize, Serialize};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_ROM_REGION_INDEX,
};
use zerocopy::FromBytes;

use super::hot_reset::{HotResetRegistry, Names, RegisteredDevice, Release, StaleReason};
use super::irqs::{ExportedIrqs, IrqsRecord, errno_of};
use super::lending::Lending;
use super::regions::{ABSENT, ExportedRegion, exported_region};
use crate::process::keeper::Keeper;
use crate::vfio::{DeviceAccess, DeviceInfo, HostFunction, RegionInfo};
use crate::vfio_user::ClientWindows;
use crate::vfio_user::message::{Command, DmaMapBody, DmaUnmapBody, RegionAccessBody};
use crate::vfio_user::server::{
    ClientFiles, DescriptorKeeping, DeviceRecord, DeviceSummary, IrqKind, IrqSet, RegionFile,
    ServedDevice, ServedRegion,
};
use crate::vfio_user::version::{Capabilities, Version};
use crate::{info_limited, warn_limited};

/// The client gets at most this many regions and kinds of interrupts; VFIO devices have a dozen.
const MAX_PARTS: u32 = 64;
/// The command register of PCI (Local Bus 3.0, 6.2.2).
const COMMAND: u64 = 0x04;
/// The bits of the command register for I/O and memory accesses to the device and for its DMA (bus master).
const COMMAND_ENABLES: u16 = 0b111;
/// A VFIO device that a vfio-user client drives.
pub struct ExportedDevice {
    name: String,
    device: Box<dyn DeviceAccess>,
    info: DeviceInfo,
    regions: BTreeMap<u32, ExportedRegion>,
    kinds: Vec<IrqKind>,
    irqs: ExportedIrqs,
    /// `None` if the device takes part in no hot resets.
    registered: Option<RegisteredDevice>,
    lending: Lending,
    /// The present client is refused, and has not had the device.
    is_refused: bool,
    /// See [`Self::is_silent`].
    is_silent: Arc<AtomicBool>,
    answers_all_accesses: bool,
    /// The client's windows, which are only checked: the VMM's memory table names the RAM, and the
    /// guest's mappings decide what the device reaches (`docs/export.md`).
    windows: ClientWindows,
    keeping: DescriptorKeeping,
    /// A later process must know something that is not recorded.
    has_changed: bool,
}

/// What a later process must know of a client.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportRecord {
    irqs: IrqsRecord,
    /// The first and the last address of each window.
    windows: Vec<(u64, u64)>,
    /// The client may have got the device's own descriptor. Absent if not, because older daemons refuse the field.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    lent: bool,
}

impl ExportedDevice {
    /// The device, with its name in log messages.
    ///
    /// # Errors
    /// It is not a PCI device, or the kernel does not describe it.
    pub fn new(name: String, device: Box<dyn DeviceAccess>) -> io::Result<Self> {
        let mut info = device.info()?;
        info.flags &= VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
        info.regions = info.regions.min(MAX_PARTS);
        info.irqs = info.irqs.min(MAX_PARTS);
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::other("it is no PCI device"));
        }
        // The kernel refuses numbers of regions and interrupts that the device lacks.
        let regions = (0..info.regions)
            .filter_map(|index| Some((index, exported_region(device.region(index).ok()?))))
            .collect();
        let kinds = (0..info.irqs)
            .map(|index| {
                let kind = device.irq(index).ok();
                kind.map_or(IrqKind::default(), |kind| IrqKind {
                    flags: kind.flags,
                    count: kind.count,
                })
            })
            .collect();
        Ok(Self {
            name,
            device,
            info,
            regions,
            kinds,
            irqs: ExportedIrqs::default(),
            registered: None,
            lending: Lending::default(),
            is_refused: false,
            is_silent: Arc::default(),
            answers_all_accesses: false,
            windows: ClientWindows::default(),
            keeping: DescriptorKeeping::default(),
            has_changed: false,
        })
    }

    /// Has `keeper` keep what a later process needs to go on with the client. It must have the device, too, under `name`.
    pub fn kept_with(mut self, keeper: Arc<Keeper>, name: &str) -> Self {
        if let Some(registered) = &self.registered {
            registered.keep_with(keeper.clone(), name.into());
        }
        self.keeping = DescriptorKeeping::new(keeper);
        self
    }

    /// The client of an earlier process has the device. Must be called before another device of the daemon is released: it
    /// could be reset together with this one.
    pub fn reserve(&self) {
        if let Some(registered) = &self.registered {
            registered.take();
        }
    }

    /// Gives the device's own descriptor to clients, so that they map BARs, if `is_allowed` and the kernel has no file of a
    /// BAR alone.
    pub fn lending(mut self, is_allowed: bool) -> Self {
        self.lending = Lending::new(is_allowed);
        self
    }

    /// The process before has left the device, and nobody goes on with its client: [`ServedDevice::release`] must follow.
    pub fn abandon(&mut self) {
        self.lending.resume(false);
    }

    /// Answers accesses that it would refuse, see [`ServedDevice::answers_all_accesses`].
    pub fn answering_all_accesses(mut self, answers_all_accesses: bool) -> Self {
        self.answers_all_accesses = answers_all_accesses;
        self
    }

    /// Lets the device take part in hot resets of the daemon's devices. `function` is its place on the host.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn with_hot_reset(
        mut self,
        registry: &HotResetRegistry,
        function: HostFunction,
    ) -> io::Result<Self> {
        let scope = self.device.hot_reset_scope();
        let registered = registry.register(function, scope.ok(), self.device.bus_reset())?;
        if self.info.flags & VFIO_DEVICE_FLAGS_RESET == 0 {
            match registered.mates() {
                Some(mates) if mates.is_empty() => {}
                Some(mates) => info!(
                    "{}: {function} has no reset of its own; between two clients it is reset together with {}, if \
                     this daemon exports all of them and no client has one",
                    self.name,
                    Names(&mates)
                ),
                None => warn!(
                    "{}: {function} cannot be reset: the next VMM gets it with the state of the last one, unless \
                     this daemon ends between them",
                    self.name
                ),
            }
        }
        self.registered = Some(registered);
        Ok(self)
    }

    /// True once the device is dropped and does no DMA.
    pub fn is_silent(&self) -> Arc<AtomicBool> {
        self.is_silent.clone()
    }

    /// Whether the device has, or may have, the state of a client that has gone. The flag follows the device; it stays
    /// false for a device without [`Self::with_hot_reset`].
    pub fn leftover(&self) -> Arc<AtomicBool> {
        let registered = self.registered.as_ref();
        registered.map_or_else(Arc::default, |registered| registered.leftover().clone())
    }

    /// Whether a process of a client that has gone has the device's own descriptor, or may have it. The flag follows the
    /// device.
    pub fn held(&self) -> Arc<AtomicBool> {
        self.lending.held()
    }

    fn vfio_region(&self, index: u32) -> Result<&RegionInfo, i32> {
        let region = self.regions.get(&index).ok_or(libc::EINVAL)?;
        Ok(&region.vfio)
    }

    fn reset_device(&self) -> Result<(), i32> {
        if self.info.flags & VFIO_DEVICE_FLAGS_RESET == 0 {
            return Err(libc::ENOTTY);
        }
        errno_of(self.device.reset())
    }

    /// Clears the bits of the command register that let the device answer and do DMA.
    fn silence(&self) -> io::Result<()> {
        let Some(config) = self.regions.get(&VFIO_PCI_CONFIG_REGION_INDEX) else {
            return self.device.stop_dma();
        };
        let mut command = [0; 2];
        self.device.read(&config.vfio, COMMAND, &mut command)?;
        let silent = u16::from_le_bytes(command) & !COMMAND_ENABLES;
        let silent = silent.to_le_bytes();
        let written = self.device.write(&config.vfio, COMMAND, &silent)?;
        if written != command.len() {
            return self.device.stop_dma();
        }
        Ok(())
    }
}

impl ServedDevice for ExportedDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn answers_all_accesses(&self) -> bool {
        self.answers_all_accesses
    }

    fn negotiate(&mut self, _client: &Version, _answer: &mut Capabilities) -> Result<(), String> {
        if self.lending.is_refusing() {
            // The process that had the descriptor may have closed it.
            self.release();
            if self.lending.is_refusing() {
                self.is_refused = true;
                return Err("a process of a former client may have the device's descriptor".into());
            }
        }
        self.has_changed = true;
        if let Some(registered) = &self.registered
            && registered.take()
        {
            warn_limited!(
                "{}: the client gets a device that keeps, or may keep, the state of the last client",
                self.name
            );
        }
        if self.lending.is_lent() {
            warn_limited!(
                "{}: the client gets a device whose descriptor a process of a former client may have",
                self.name
            );
        }
        Ok(())
    }

    fn info(&self) -> DeviceSummary {
        DeviceSummary {
            flags: self.info.flags,
            regions: self.info.regions,
            irqs: self.info.irqs,
        }
    }

    fn region(&self, index: u32) -> Option<&ServedRegion> {
        if index >= self.info.regions {
            return None;
        }
        let region = self.regions.get(&index);
        Some(region.map_or(ABSENT, |region| &region.served))
    }

    fn region_file(&mut self, index: u32) -> Option<RegionFile> {
        let region = self.regions.get(&index)?;
        // A file of the region alone is less than the whole device.
        if let Some(file) = self.device.region_file(index, &region.vfio) {
            return Some(RegionFile { file, offset: 0 });
        }
        if !self.lending.is_allowed() {
            return None;
        }
        match self.device.device_file() {
            Ok(file) => {
                self.has_changed |= self.lending.lend();
                Some(RegionFile {
                    file,
                    offset: region.vfio.offset,
                })
            }
            Err(cause) => {
                let name = &self.name;
                warn_limited!("{name}: the client cannot map region {index}: {cause}");
                None
            }
        }
    }

    fn irq(&self, index: u32) -> Option<IrqKind> {
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        self.kinds.get(at).copied()
    }

    fn set_irqs(&mut self, set: IrqSet<'_>) -> Result<(), i32> {
        let kind = self.irq(set.index).ok_or(libc::EINVAL)?;
        self.has_changed = true;
        self.irqs.set(&*self.device, kind, set, &self.keeping)
    }

    fn read_region(&mut self, index: u32, offset: u64, into: &mut [u8]) -> Result<usize, i32> {
        let region = self.vfio_region(index)?;
        errno_of(self.device.read(region, offset, into))
    }

    fn write_region(&mut self, index: u32, offset: u64, data: &[u8]) -> Result<usize, i32> {
        let region = self.vfio_region(index)?;
        errno_of(self.device.write(region, offset, data))
    }

    fn reset(&mut self) -> Result<(), i32> {
        self.reset_device()
    }

    fn dma_map(&mut self, window: &DmaMapBody, _file: Option<OwnedFd>) -> Result<(), i32> {
        self.has_changed = true;
        self.windows.map(window)
    }

    fn dma_unmap(&mut self, window: &DmaUnmapBody) -> Result<(), i32> {
        self.has_changed = true;
        self.windows.unmap(window)
    }

    fn take_record(&mut self) -> Option<DeviceRecord> {
        if !self.keeping.is_present() || !std::mem::take(&mut self.has_changed) {
            return None;
        }
        let record = ExportRecord {
            irqs: self.irqs.record(),
            windows: self.windows.record(),
            lent: self.lending.is_lent(),
        };
        let fixed = record.irqs.fixed.iter();
        Some(DeviceRecord {
            names: fixed
                .flat_map(|(_, names)| names)
                .flatten()
                .cloned()
                .collect(),
            kept: self.keeping.take_kept(),
            // It has only numbers and names: it cannot fail.
            bytes: serde_json::to_vec(&record).unwrap_or_default(),
        })
    }

    /// A BAR may have a register that counts, or that a read clears. The configuration space of PCI has none, and neither has
    /// the ROM. A reset, and what the kernel does for interrupts, leads to the same state twice; an interrupt that the client
    /// asks for comes twice.
    fn can_repeat(&self, command: Option<Command>, body: &[u8]) -> bool {
        let region =
            RegionAccessBody::read_from_prefix(body).map(|(access, _)| access.region.get());
        let is_plain = |index| {
            index == VFIO_PCI_CONFIG_REGION_INDEX
                || index == VFIO_PCI_ROM_REGION_INDEX && command == Some(Command::RegionRead)
        };
        match command {
            Some(Command::RegionRead | Command::RegionWrite) => region.is_ok_and(is_plain),
            Some(Command::RegionWriteMulti) => false,
            _ => true,
        }
    }

    /// The device has gone on by itself: its descriptor was kept.
    fn resume(&mut self, record: &[u8], files: &ClientFiles) -> io::Result<()> {
        let record: io::Result<ExportRecord> =
            serde_json::from_slice(record).map_err(io::Error::other);
        // The client of a record that is refused may have the descriptor.
        self.lending
            .resume(record.as_ref().is_ok_and(|record| record.lent));
        let record = record?;
        let windows = ClientWindows::resumed(&record.windows);
        self.windows = windows.ok_or_else(|| io::Error::other("its windows overlap"))?;
        self.irqs = ExportedIrqs::resumed(&record.irqs, &self.kinds, files)?;
        self.reserve();
        Ok(())
    }

    /// Disables the device's interrupts. Clears the enable bits of its command register, so that it does no
    /// DMA and answers no access until the next client sets these bits.
    /// Resets the device if it can be reset, alone or with its bus. Makes sure that no other process has it.
    fn release(&mut self) {
        if std::mem::take(&mut self.is_refused) {
            return;
        }
        self.windows = ClientWindows::default();
        if self.lending.is_lent() {
            self.irqs.use_all(&self.kinds);
        }
        self.irqs.release(&*self.device, &self.name);
        self.silence_after_client();
        let reset = self.reset_device();
        if let Err(errno) = reset
            && errno != libc::ENOTTY
        {
            let cause = io::Error::from_raw_os_error(errno);
            warn_limited!(
                "{}: the kernel cannot reset the device alone: {cause}",
                self.name
            );
        }
        if self.lending.is_lent() {
            if let Some(held) = self.lending.take_back(self.registered.as_ref()) {
                warn_limited!("{}: {held}", self.name);
            }
            // VFIO switches the memory of a device on when it opens the device.
            self.silence_after_client();
        }
        self.finish_release(reset.is_ok());
    }

    fn is_waiting(&self) -> bool {
        self.lending.is_refusing()
    }

    /// Tries once more to take the device back from the process that has its descriptor.
    fn retry_release(&mut self) {
        let held = self.lending.take_back(self.registered.as_ref());
        self.silence_after_client();
        if held.is_some() {
            return;
        }
        info!("{}: no other process has the device any more", self.name);
        let reset = self.reset_device();
        self.silence_after_client();
        self.finish_release(reset.is_ok());
    }
}

impl ExportedDevice {
    fn silence_after_client(&self) {
        if let Err(cause) = self.silence() {
            warn_limited!(
                "{}: cannot stop the device's DMA after its client has gone: {cause}",
                self.name
            );
        }
    }

    /// Makes a hot reset where it is needed and possible, and logs what the next client gets.
    fn finish_release(&self, is_reset: bool) {
        let outcome = match &self.registered {
            Some(registered) => registered.release(is_reset),
            None if is_reset => Release::Reset,
            None => Release::Stale(StaleReason::NoHotReset),
        };
        let name = &self.name;
        match outcome {
            Release::Reset => {}
            Release::Waits(others) => info_limited!(
                "{name}: the device is reset together with {}, once their clients have gone",
                Names(&others)
            ),
            Release::Reopened(others) => warn_limited!(
                "{name}: the device has no reset of its own, and was closed and opened again; VFIO has reset it if no \
                 process has {} open; export these devices, too, for a reset that is certain",
                Names(&others)
            ),
            Release::Stale(reason) => warn_limited!(
                "{name}: the device keeps the state of its last client: {reason}; end this daemon before \
                 another VM gets the device"
            ),
        }
    }
}

impl Drop for ExportedDevice {
    /// Ends the device's DMA, also if it has never had a client.
    fn drop(&mut self) {
        let is_silent = self.silence().is_ok();
        self.is_silent.store(is_silent, Ordering::Release);
    }
}
