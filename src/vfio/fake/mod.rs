//! A kernel for tests: it obeys the rules of iommufd and type1, and fails on demand. It gets the arguments that the real
//! kernel gets, and is as strict: about sizes, flags, alignment, overlaps, and requests that would split a mapping.
//!
//! It has no calls of exported devices (`VFIO_DEVICE_GET_INFO`, regions, interrupts, resets). Their answers depend on the
//! device and not on rules of the kernel, so a fake would only repeat the structures that it is given. The tests of
//! exported devices replace the device above these calls (`DeviceAccess` in `tests/export/bed.rs`), and make the real calls
//! in L1 (`tests/passthrough/export.rs`, `resets.rs`).

mod checks;
pub(crate) mod nesting;
mod token;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use vfio_bindings::bindings::vfio::{VFIO_DEVICE_FEATURE_CLEAR_MASTER, vfio_iommu_type1_dma_unmap};
use vm_memory::{FileOffset, MmapRegion};

use self::nesting::NestingState;
use super::{
    AddressSpaces, Attach, Bar, DeviceMemory, DmaSource, Type1, cdev, container, ioctl, iommufd,
};
use crate::address::{Access, GpaRange, Iova, IovaRange};

/// The result of one `map` or `copy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub range: IovaRange,
    pub access: Access,
    /// Device and inode of the file.
    pub file: (u64, u64),
    /// Its first byte in the file.
    pub offset: u64,
}

/// The kernel's state.
#[derive(Debug, Default)]
pub(crate) struct KernelState {
    /// Address spaces by id, with their areas by first address.
    pub spaces: BTreeMap<u32, BTreeMap<u64, Area>>,
    /// By group: its address space, and the devices that are attached to it.
    pub groups: BTreeMap<u32, (Option<u32>, Vec<u32>)>,
    /// Groups that are attached but reach nothing: an attach took them out of their address space and then failed.
    pub without_space: BTreeSet<u32>,
    /// By address space: how many groups the kernel counts in it. While the count is 0, it invalidates no cached
    /// translations. As in the VT-d driver (`cache_tag_unassign`), a failed attach takes one off without having added it.
    cache_users: BTreeMap<u32, u32>,
    /// By group: areas that were removed without an invalidation, and that it still reaches.
    pub cached: BTreeMap<u32, Vec<Area>>,
    /// By group: the addresses that its IOMMU does not map, such as an SMMU's window for MSIs (SW_MSI), and all above its
    /// width. Other groups may have another instance of the IOMMU, with other addresses.
    pub reserved: BTreeMap<u32, Vec<IovaRange>>,
    /// Bound devices.
    pub bound: Vec<u32>,
    /// Devices whose bus-master bit was cleared.
    pub stopped: Vec<u32>,
    /// The number of calls so far that could fail.
    pub calls: u64,
    /// The calls that fail, counted from 1, and their errno.
    pub fail: Vec<(u64, i32)>,
    /// The kernel lacks `IOMMU_IOAS_MAP_FILE`.
    pub old: bool,
    /// The kernel destroys no address space.
    pub keeps_spaces: bool,
    /// The kernel of containers removes no mapping when everything is to be unmapped, and reports no error.
    pub keeps_mappings: bool,
    /// The number of mappings by file so far.
    pub mapped_by_file: u64,
    /// Bound devices that do not wake up: attaching and detaching them fails.
    pub asleep: Vec<u32>,
    /// Calls that map wait here.
    pub gate: Option<Arc<MapGate>>,
    /// The objects of nested translation.
    pub nesting: NestingState,
}

/// A gate that calls wait at until it is opened.
#[derive(Debug, Default)]
pub(crate) struct MapGate {
    /// Whether a call has come to the gate, and whether the gate is open.
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl MapGate {
    /// Longer than a test waits unless something hangs.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Waits until a call has come to the gate. Returns whether one has.
    pub fn wait_for_call(&self) -> bool {
        let state = self.state.lock().expect("not poisoned");
        let waited = self
            .changed
            .wait_timeout_while(state, Self::PATIENCE, |(came, _)| !*came);
        waited.expect("not poisoned").0.0
    }

    /// Lets all calls pass from now on.
    pub fn open(&self) {
        self.state.lock().expect("not poisoned").1 = true;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut state = self.state.lock().expect("not poisoned");
        state.0 = true;
        self.changed.notify_all();
        let passed = self
            .changed
            .wait_timeout_while(state, Self::PATIENCE, |(_, is_open)| !*is_open);
        drop(passed.expect("not poisoned"));
    }
}

impl KernelState {
    fn step(&mut self) -> io::Result<()> {
        self.calls += 1;
        match self.fail.iter().find(|(call, _)| *call == self.calls) {
            Some(&(_, errno)) => Err(error(errno)),
            None => Ok(()),
        }
    }

    /// The lowest number that no object has, as the kernel's.
    fn free_id(&self) -> u32 {
        let is_free = |id: &u32| !self.spaces.contains_key(id) && !self.nesting.has(*id);
        (1..).find(is_free).expect("a free number")
    }

    /// The address space behind what a device is attached to.
    fn space_behind(&self, id: u32) -> u32 {
        self.nesting.space_of(id).unwrap_or(id)
    }

    fn space(&mut self, id: u32) -> io::Result<&mut BTreeMap<u64, Area>> {
        self.spaces.get_mut(&id).ok_or_else(|| error(libc::ENOENT))
    }

    fn insert(&mut self, id: u32, areas: &[Area]) -> io::Result<()> {
        for area in areas {
            self.nesting.check_area(id, area)?;
        }
        let space = self.space(id)?;
        for area in areas {
            if area.access == Access::NONE {
                return Err(error(libc::EINVAL));
            }
            if space.values().any(|a| a.range.overlaps(area.range)) {
                return Err(error(libc::EEXIST));
            }
        }
        space.extend(areas.iter().map(|a| (a.range.first().0, *a)));
        Ok(())
    }

    /// Removes the areas that overlap `range`, in their order. Stops with `ENOENT` at an area that `range` splits, as
    /// iommufd does: the areas before it are gone.
    fn remove(&mut self, id: u32, range: IovaRange) -> io::Result<u64> {
        let space = self.space(id)?;
        let mut touched: Vec<_> = space.values().copied().collect();
        touched.retain(|a| a.range.overlaps(range));
        let mut bytes = 0;
        let mut removed = Vec::new();
        for area in touched {
            if !range.covers(area.range) {
                self.keep_cached(id, &removed);
                return Err(error(libc::ENOENT));
            }
            bytes += area.range.span() + 1;
            self.space(id)?.remove(&area.range.first().0);
            removed.push(area);
        }
        self.keep_cached(id, &removed);
        Ok(bytes)
    }

    /// The groups in an address space of iommufd still reach removed areas if the kernel counts no group in it.
    fn keep_cached(&mut self, id: u32, removed: &[Area]) {
        if self.cache_users.get(&id).is_some_and(|users| *users > 0) {
            return;
        }
        for (group, (at, _)) in &self.groups {
            if *at == Some(id) && !self.without_space.contains(group) {
                self.cached.entry(*group).or_default().extend(removed);
            }
        }
    }

    /// Counts a group that enters an address space.
    fn enter(&mut self, id: u32) {
        *self.cache_users.entry(id).or_default() += 1;
    }

    /// Takes a group out of its address space, if it is in one, and empties its cache.
    fn leave(&mut self, group: u32) {
        self.cached.remove(&group);
        let at = self.groups.get(&group).and_then(|(at, _)| *at);
        if let Some(id) = at
            && !self.without_space.contains(&group)
        {
            self.uncount(id);
        }
    }

    fn uncount(&mut self, id: u32) {
        let users = self.cache_users.entry(id).or_default();
        *users = users.saturating_sub(1);
    }

    /// Whether an address space of iommufd has a page table, of a device that is attached or as a nest parent. It then has the
    /// alignment of the IOMMU's pages.
    fn is_attached(&self, id: u32) -> bool {
        self.nesting.has_parent_of(id) || self.groups.values().any(|(at, _)| *at == Some(id))
    }

    /// `EINVAL` if one of `numbers` is not aligned as the address space wants it.
    fn check_alignment(&self, id: u32, numbers: &[u64]) -> io::Result<()> {
        let ends = numbers.iter().fold(0, |all, number| all | number);
        if self.is_attached(id) && ends & (checks::PAGE - 1) != 0 {
            return Err(error(libc::EINVAL));
        }
        Ok(())
    }

    /// Whether the IOMMU of `group` does not map a part of `range`.
    fn is_reserved(&self, group: u32, range: IovaRange) -> bool {
        let mut reserved = self.reserved.get(&group).into_iter().flatten();
        reserved.any(|it| it.overlaps(range))
    }

    /// `EINVAL` if a device in an address space reserves a part of `range` (`iopt_check_iova`).
    fn check_reserved(&self, id: u32, range: IovaRange) -> io::Result<()> {
        let is_inside = |at: &Option<u32>| at.map(|at| self.space_behind(at)) == Some(id);
        let mut inside = self.groups.iter().filter(|(_, (at, _))| is_inside(at));
        if inside.any(|(group, _)| self.is_reserved(*group, range)) {
            return Err(error(libc::EINVAL));
        }
        Ok(())
    }

    /// `EADDRINUSE` if a device of `group` reserves a part of an area, or if the areas of an address space are not aligned
    /// as the device wants them (`iopt_reserve_iova`, `iopt_table_add_domain`). A page table of another instance is no
    /// failure: the kernel makes one for each instance (`iommufd_device_auto_get_domain`).
    fn check_attach(&mut self, id: u32, group: u32) -> io::Result<()> {
        let id = self.space_behind(id);
        let areas: Vec<_> = self.space(id)?.values().map(|a| a.range).collect();
        if areas.iter().any(|area| self.is_reserved(group, *area)) {
            return Err(error(libc::EADDRINUSE));
        }
        self.check_aligned_space(id)
    }

    /// `EADDRINUSE` if an area is not aligned as a page table wants it.
    fn check_aligned_space(&mut self, id: u32) -> io::Result<()> {
        let misaligned = |a: &Area| {
            let ends = a.range.first().0 | (a.range.span() + 1) | a.offset;
            ends & (checks::PAGE - 1) != 0
        };
        if self.space(id)?.values().any(misaligned) {
            return Err(error(libc::EADDRINUSE));
        }
        Ok(())
    }

    /// Whether `range` begins or ends within an area.
    fn splits(&mut self, id: u32, range: IovaRange) -> io::Result<bool> {
        let mut areas = self.space(id)?.values();
        Ok(areas.any(|a| a.range.overlaps(range) && !range.covers(a.range)))
    }
}

fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// The kernel; clones share their state.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakeKernel(Arc<Mutex<KernelState>>);

impl FakeKernel {
    pub fn state(&self) -> MutexGuard<'_, KernelState> {
        self.0.lock().expect("not poisoned")
    }

    /// Waits at the gate, if there is one. The state must not be locked.
    fn pass_gate(&self) {
        let gate = self.state().gate.clone();
        if let Some(gate) = gate {
            gate.pass();
        }
    }

    /// A device that the VMM has bound and attached to an address space of the VMM's, and the id of that space.
    pub fn vmm_device(&self, device: u32, group: u32) -> (FakeDevice, u32) {
        let made = self.device(device, group);
        let ioas = self.alloc().expect("an address space");
        let mut state = self.state();
        state.bound.push(device);
        let entry = state.groups.entry(group).or_default();
        let is_first = entry.0.is_none();
        let ioas = *entry.0.get_or_insert(ioas);
        entry.1.push(device);
        if is_first {
            state.enter(ioas);
        }
        (made, ioas)
    }

    /// A VMM that starts its guest again, with bound devices: it takes each device out of its address space, and puts
    /// it into a new one of its own, whose ID this returns. The devices keep their bus-master bits.
    pub fn reattach_by_vmm(&self, devices: &[FakeDevice]) -> u32 {
        for device in devices {
            device.detach().expect("detached");
        }
        let ioas = self.alloc().expect("an address space");
        for device in devices {
            device.attach(ioas).expect("attached");
        }
        ioas
    }

    /// A device that is not bound.
    pub fn device(&self, device: u32, group: u32) -> FakeDevice {
        FakeDevice {
            kernel: self.clone(),
            device,
            group,
        }
    }

    /// A container, and the id of its address space.
    pub fn container(&self) -> (FakeContainer, u32) {
        let space = self.alloc().expect("an address space");
        let container = FakeContainer {
            kernel: self.clone(),
            space,
        };
        (container, space)
    }
}

fn area_of(range: IovaRange, access: Access, source: DmaSource<'_>) -> Area {
    let (file, offset) = match source {
        DmaSource::File(fd, offset) => {
            let file = File::from(fd.try_clone_to_owned().expect("a descriptor"));
            (identity(&file), offset)
        }
        DmaSource::Host(memory, offset) => {
            assert!(offset + range.span() < memory.size() as u64);
            match memory.file_offset() {
                Some(backing) => (identity(backing.file()), backing.start() + offset),
                // Memory of the process alone.
                None => ((0, 0), offset),
            }
        }
    };
    Area {
        range,
        access,
        file,
        offset,
    }
}

/// Device and inode.
pub(crate) fn identity(file: &File) -> (u64, u64) {
    let metadata = file.metadata().expect("a file");
    (metadata.dev(), metadata.ino())
}

impl AddressSpaces for FakeKernel {
    fn alloc(&self) -> io::Result<u32> {
        let mut state = self.state();
        state.step()?;
        let id = state.free_id();
        state.spaces.insert(id, BTreeMap::new());
        Ok(id)
    }

    fn destroy(&self, ioas: u32) -> io::Result<()> {
        let mut state = self.state();
        state.step()?;
        let is_attached = state.groups.values().any(|(at, _)| *at == Some(ioas));
        if state.keeps_spaces || is_attached || state.nesting.has_parent_of(ioas) {
            return Err(error(libc::EBUSY));
        }
        state.space(ioas)?;
        state.spaces.remove(&ioas);
        Ok(())
    }

    fn map(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        source: DmaSource<'_>,
    ) -> io::Result<()> {
        self.pass_gate();
        let mut state = self.state();
        if state.old && matches!(source, DmaSource::File(..)) {
            return Err(error(libc::ENOTTY));
        }
        state.step()?;
        let argument = iommufd::map_argument(ioas, range, access, source)?;
        let (range, memory) = checks::ioas_map(&argument)?;
        state.check_alignment(ioas, &[range.first().0, range.span() + 1, memory])?;
        state.check_reserved(ioas, range)?;
        state.mapped_by_file += u64::from(matches!(source, DmaSource::File(..)));
        state.insert(ioas, &[area_of(range, access, source)])
    }

    fn copy(
        &self,
        ioas: u32,
        range: IovaRange,
        access: Access,
        from: u32,
        first: Iova,
    ) -> io::Result<()> {
        let mut state = self.state();
        state.step()?;
        let argument = iommufd::copy_argument(ioas, range, access, from, first)?;
        let (range, wanted) = checks::ioas_copy(&argument)?;
        state.check_alignment(ioas, &[range.first().0, range.span() + 1])?;
        state.check_reserved(ioas, range)?;
        let mut parts = Vec::new();
        let mut next = wanted.first();
        for area in state
            .space(from)?
            .values()
            .filter(|a| a.range.overlaps(wanted))
        {
            let shared = area.range.intersection(wanted).expect("they overlap");
            if shared.first() != next {
                break;
            }
            next = Iova(shared.last().0 + 1);
            let at = range.first().0 + (shared.first().0 - first.0);
            parts.push(Area {
                range: IovaRange::new(Iova(at), Iova(at + shared.span())).expect("a range"),
                access,
                file: area.file,
                offset: area.offset + (shared.first().0 - area.range.first().0),
            });
        }
        if next.0 != wanted.last().0 + 1 {
            return Err(error(libc::ENOENT));
        }
        state.insert(ioas, &parts)
    }

    fn unmap(&self, ioas: u32, range: IovaRange) -> io::Result<u64> {
        let mut state = self.state();
        state.step()?;
        match checks::ioas_unmap(&iommufd::unmap_argument(ioas, range))? {
            None => state.remove(ioas, IovaRange::ALL),
            Some(range) => match state.remove(ioas, range)? {
                0 => Err(error(libc::ENOENT)),
                bytes => Ok(bytes),
            },
        }
    }
}

/// One device of a group.
#[derive(Clone, Debug)]
pub(crate) struct FakeDevice {
    kernel: FakeKernel,
    device: u32,
    group: u32,
}

impl Attach for FakeDevice {
    fn is_bound(&self) -> bool {
        self.kernel.state().bound.contains(&self.device)
    }

    fn attach(&self, ioas: u32) -> io::Result<()> {
        let ioas = checks::attach(&ioctl::attach_argument(ioas))?;
        let mut state = self.kernel.state();
        if !state.bound.contains(&self.device) {
            return Err(error(libc::EINVAL));
        }
        if state.asleep.contains(&self.device) {
            return Err(error(libc::EIO));
        }
        let (at, devices) = state.groups.entry(self.group).or_default();
        let (at, replaces) = (*at, devices.contains(&self.device));
        if replaces && at == Some(ioas) {
            return Ok(());
        }
        if state.nesting.has(ioas) {
            state.nesting.check_attach(ioas, self.device)?;
        }
        if let Err(cause) = state.step() {
            if at != Some(ioas) {
                state.leave(self.group);
                state.uncount(ioas);
            }
            state.without_space.insert(self.group);
            return Err(cause);
        }
        state.check_attach(ioas, self.group)?;
        if !replaces && at.is_some_and(|at| at != ioas) {
            return Err(error(libc::EINVAL));
        }
        if at != Some(ioas) {
            state.leave(self.group);
            state.without_space.remove(&self.group);
            state.enter(ioas);
        }
        let (at, devices) = state.groups.entry(self.group).or_default();
        if !replaces {
            devices.push(self.device);
        }
        *at = Some(ioas);
        Ok(())
    }

    fn detach(&self) -> io::Result<()> {
        self.kernel.pass_gate();
        checks::detach(&ioctl::detach_argument())?;
        let mut state = self.kernel.state();
        if !state.bound.contains(&self.device) {
            return Err(error(libc::EINVAL));
        }
        if state.asleep.contains(&self.device) {
            return Err(error(libc::EIO));
        }
        state.step()?;
        let (_, devices) = state.groups.entry(self.group).or_default();
        devices.retain(|d| *d != self.device);
        if devices.is_empty() {
            state.leave(self.group);
            state.without_space.remove(&self.group);
            let left = state.groups.entry(self.group).or_default();
            if let Some(id) = left.0.take()
                && !state.is_attached(id)
            {
                // The kernel's page table of the address space ends with the last device in it.
                state.cache_users.remove(&id);
            }
        }
        Ok(())
    }

    fn clear_bus_master(&self) -> io::Result<()> {
        let clear = VFIO_DEVICE_FEATURE_CLEAR_MASTER;
        let (header, op) = ioctl::bus_master_argument(cdev::CLEAR_MASTER, clear);
        checks::clear_bus_master(&header, op)?;
        self.kernel.state().stopped.push(self.device);
        Ok(())
    }
}

/// A container with its own address space among the kernel's.
#[derive(Clone, Debug)]
pub(crate) struct FakeContainer {
    kernel: FakeKernel,
    space: u32,
}

impl Type1 for FakeContainer {
    fn map(
        &self,
        range: IovaRange,
        access: Access,
        memory: &MmapRegion,
        offset: u64,
    ) -> io::Result<()> {
        self.kernel.pass_gate();
        let mut state = self.kernel.state();
        state.step()?;
        let argument = container::map_argument(range, access)?;
        let vaddr = ioctl::address_in(memory, offset, argument.size)?;
        let range = checks::type1_map(&argument, vaddr)?;
        state.insert(
            self.space,
            &[area_of(range, access, DmaSource::Host(memory, offset))],
        )
    }

    fn unmap(&self, range: IovaRange) -> io::Result<u64> {
        self.unmap_dma(&container::unmap_argument(range)?)
    }

    fn unmap_all(&self) -> io::Result<()> {
        self.unmap_dma(&container::unmap_all_argument()).map(drop)
    }

    fn available(&self) -> io::Result<Option<u32>> {
        /// `dma_entry_limit`.
        const LIMIT: u32 = 65535;
        let mut state = self.kernel.state();
        let used = u32::try_from(state.space(self.space)?.len()).expect("few");
        Ok(Some(LIMIT - used))
    }
}

impl FakeContainer {
    fn unmap_dma(&self, argument: &vfio_iommu_type1_dma_unmap) -> io::Result<u64> {
        self.kernel.pass_gate();
        let mut state = self.kernel.state();
        state.step()?;
        let range = match checks::type1_unmap(argument)? {
            // The kernel of a container refuses to split before it removes anything.
            Some(range) if state.splits(self.space, range)? => return Err(error(libc::EINVAL)),
            Some(range) => range,
            None if state.keeps_mappings => return Ok(0),
            None => IovaRange::ALL,
        };
        state.remove(self.space, range)
    }
}

/// A device with one BAR.
#[derive(Debug)]
pub(crate) struct FakeMemory {
    bar: Bar,
    memory: Arc<MmapRegion>,
}

impl FakeMemory {
    pub fn at(index: u32, range: GpaRange) -> Self {
        let size = usize::try_from(range.span() + 1).expect("small");
        let file = FileOffset::new(memfd(range.span() + 1), 0);
        Self {
            bar: Bar { index, range },
            memory: Arc::new(MmapRegion::from_file(file, size).expect("mapped")),
        }
    }

    /// The file behind the BAR.
    pub fn file(&self) -> (u64, u64) {
        identity(self.memory.file_offset().expect("a file").file())
    }
}

impl DeviceMemory for FakeMemory {
    fn bars(&self) -> io::Result<Vec<Bar>> {
        Ok(vec![self.bar])
    }

    fn export(&self, bar: u32, _offset: u64, _len: u64) -> io::Result<OwnedFd> {
        assert_eq!(bar, self.bar.index);
        let backing = self.memory.file_offset().expect("a file");
        Ok(backing.file().try_clone()?.into())
    }

    fn map(&self, bar: u32) -> io::Result<Arc<MmapRegion>> {
        assert_eq!(bar, self.bar.index);
        Ok(self.memory.clone())
    }
}

/// Shared memory of `len` bytes.
#[expect(unsafe_code, reason = "a memfd")]
pub(crate) fn memfd(len: u64) -> File {
    // SAFETY: the name ends with a zero and is only read.
    let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "a memfd");
    // SAFETY: it was just opened, and nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).expect("room");
    assert!(file.as_raw_fd() >= 0);
    file
}
