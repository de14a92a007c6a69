//! The nesting objects of the fake kernel, with the rules and errnos of Linux 7.3: `hw_pagetable.c`, `viommu.c`, `eventq.c` and
//! `main.c` of iommufd, `arm-smmu-v3-iommufd.c`, and `nested.c` and `generic_pt/fmt/vtdss.h` of VT-d.
//!
//! It walks no tables. [`NestingState::nested`] tells the entry of a table, so that a test can read the
//! descriptor and the tables from the memory that the parent's address space maps.

mod checks;
mod iommu;
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use iommufd_bindings::{
    iommu_hwpt_alloc, iommu_hwpt_data_type_IOMMU_HWPT_DATA_ARM_SMMUV3 as DATA_SMMU,
    iommu_hwpt_data_type_IOMMU_HWPT_DATA_VTD_S1 as DATA_VTD,
    iommu_hwpt_invalidate_data_type_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1 as INVALIDATE_VTD,
    iommu_hwpt_invalidate_data_type_IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3 as INVALIDATE_SMMU,
    iommu_veventq_type_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3 as EVENTS_SMMU,
    iommu_viommu_type_IOMMU_VIOMMU_TYPE_ARM_SMMUV3 as VIOMMU_SMMU,
    iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_NEST_PARENT as NEST_PARENT,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::ioctl_fionread;
use rustix::pipe::{PipeFlags, pipe_with};

use self::checks::{check_entry, check_invalidation, check_vtd_range, unless};
pub(crate) use self::iommu::FakeIommu;
use super::{Area, FakeKernel, KernelState, error};
use crate::vfio::nesting::arguments as argument;
use crate::vfio::nesting::{
    BoundDevice, FirstStage, HardwareInfo, HardwareKind, InvalidationError, NestingError,
    NestingKernel, SmmuCommand, StreamEntry, VtdInvalidation,
};

#[derive(Debug)]
enum FakeObject {
    Parent {
        ioas: u32,
    },
    Viommu {
        parent: u32,
    },
    Vdevice {
        viommu: u32,
        device: u32,
        stream: u32,
    },
    Nested {
        above: u32,
        stage: FirstStage,
    },
    EventQueue {
        viommu: u32,
        depth: usize,
        writer: File,
        /// The number of the next event.
        sequence: u32,
    },
}

impl FakeObject {
    /// The object that this one keeps busy.
    fn above(&self) -> u32 {
        match self {
            Self::Parent { ioas } => *ioas,
            Self::Viommu { parent } => *parent,
            Self::Vdevice { viommu, .. } | Self::EventQueue { viommu, .. } => *viommu,
            Self::Nested { above, .. } => *above,
        }
    }
}

/// The nesting objects and what was done with them.
#[derive(Debug, Default)]
pub(crate) struct NestingState {
    pub iommu: FakeIommu,
    objects: BTreeMap<u32, FakeObject>,
    /// The commands that reached the SMMU, in order.
    pub commands: Vec<SmmuCommand>,
    /// The ranges that a VT-d unit has invalidated, with the ID of the nested table.
    pub ranges: Vec<(u32, VtdInvalidation)>,
}

impl NestingState {
    pub fn has(&self, id: u32) -> bool {
        self.objects.contains_key(&id)
    }

    /// The number of objects.
    pub fn count(&self) -> usize {
        self.objects.len()
    }

    /// The address space behind a nest parent or nested table.
    pub fn space_of(&self, id: u32) -> Option<u32> {
        match self.objects.get(&id)? {
            FakeObject::Parent { ioas } => Some(*ioas),
            FakeObject::Viommu { parent: above } | FakeObject::Nested { above, .. } => {
                self.space_of(*above)
            }
            FakeObject::Vdevice { .. } | FakeObject::EventQueue { .. } => None,
        }
    }

    /// The first stage of a nested table.
    pub fn nested(&self, id: u32) -> Option<FirstStage> {
        match self.objects.get(&id)? {
            FakeObject::Nested { stage, .. } => Some(*stage),
            _ => None,
        }
    }

    /// Whether an address space has a nest parent, and so a page table.
    pub fn has_parent_of(&self, ioas: u32) -> bool {
        self.uses(ioas)
    }

    /// Whether an object is below `id`.
    fn uses(&self, id: u32) -> bool {
        self.objects.values().any(|object| object.above() == id)
    }

    /// `EINVAL` if a nest parent of the address space takes no area like this one.
    pub fn check_area(&self, ioas: u32, area: &Area) -> io::Result<()> {
        let is_read_only = area.access.read && !area.access.write;
        if matches!(self.iommu, FakeIommu::Vtd(_)) && is_read_only && self.has_parent_of(ioas) {
            return Err(error(libc::EINVAL));
        }
        Ok(())
    }

    /// Whether a device may be attached to a nest parent or nested table (`arm_smmu_attach_prepare_vmaster`,
    /// `intel_pasid_setup_nested`).
    pub fn check_attach(&self, id: u32, device: u32) -> io::Result<()> {
        match self.objects.get(&id) {
            Some(FakeObject::Parent { .. }) => Ok(()),
            Some(FakeObject::Nested { above, stage }) => match stage {
                FirstStage::Smmu(entry) if is_translated(*entry) => self
                    .stream_of(*above, device)
                    .map(drop)
                    .ok_or_else(|| error(libc::ENOENT)),
                FirstStage::Smmu(_) => Ok(()),
                FirstStage::Vtd(root) => match (root.input_bits, &self.iommu) {
                    (48, _) => Ok(()),
                    (57, FakeIommu::Vtd(hardware)) if hardware.has_five_levels => Ok(()),
                    _ => Err(error(libc::EINVAL)),
                },
            },
            _ => Err(error(libc::EINVAL)),
        }
    }

    fn stream_of(&self, viommu: u32, device: u32) -> Option<u32> {
        self.objects.values().find_map(|object| match object {
            FakeObject::Vdevice {
                viommu: of,
                device: named,
                stream,
            } if *of == viommu && *named == device => Some(*stream),
            _ => None,
        })
    }

    fn is_viommu(&self, id: u32) -> bool {
        matches!(self.objects.get(&id), Some(FakeObject::Viommu { .. }))
    }
}

fn is_translated(entry: StreamEntry) -> bool {
    let [first, _] = entry.words();
    first & 1 != 0 && first >> 1 & 7 == 5
}

impl KernelState {
    fn device(&self, device: BoundDevice) -> io::Result<u32> {
        unless(!self.bound.contains(&device.0), libc::ENOENT)?;
        Ok(device.0)
    }

    fn add_object(&mut self, object: FakeObject) -> u32 {
        let id = self.free_id();
        self.nesting.objects.insert(id, object);
        id
    }

    /// `iommufd_hwpt_alloc`.
    fn alloc_table(
        &mut self,
        request: &iommu_hwpt_alloc,
        stage: Option<FirstStage>,
    ) -> io::Result<u32> {
        self.step()?;
        unless(request.size != 48, libc::EINVAL)?;
        unless(request.__reserved != 0, libc::EOPNOTSUPP)?;
        self.device(BoundDevice(request.dev_id))?;
        let above = request.pt_id;
        let Some(stage) = stage else {
            unless(!self.spaces.contains_key(&above), libc::EINVAL)?;
            unless(request.flags != NEST_PARENT, libc::EOPNOTSUPP)?;
            unless(!self.nesting.iommu.nests(), libc::EOPNOTSUPP)?;
            self.check_aligned_space(above)?;
            let areas: Vec<Area> = self.space(above)?.values().copied().collect();
            let id = self.add_object(FakeObject::Parent { ioas: above });
            let fits = areas
                .iter()
                .try_for_each(|area| self.nesting.check_area(above, area));
            if fits.is_err() {
                self.nesting.objects.remove(&id);
            }
            return fits.map(|()| id);
        };
        unless(request.flags != 0, libc::EOPNOTSUPP)?;
        match (self.nesting.objects.get(&above), stage) {
            (Some(FakeObject::Viommu { .. }), FirstStage::Smmu(entry)) => {
                unless(request.data_type != DATA_SMMU, libc::EINVAL)?;
                check_entry(argument::smmu_data(entry).ste.map(u64::from_le))?;
            }
            (Some(FakeObject::Parent { .. }), FirstStage::Vtd(_))
                if matches!(self.nesting.iommu, FakeIommu::Vtd(_)) =>
            {
                unless(request.data_type != DATA_VTD, libc::EOPNOTSUPP)?;
            }
            // The SMMU driver nests below vIOMMUs only, and does not know VT-d's data.
            (Some(FakeObject::Parent { .. }), _) => return Err(error(libc::EOPNOTSUPP)),
            _ => return Err(error(libc::EINVAL)),
        }
        Ok(self.add_object(FakeObject::Nested { above, stage }))
    }

    fn destroy_nesting(&mut self, id: u32) -> io::Result<()> {
        self.step()?;
        let object = self.nesting.objects.get(&id);
        let object = object.ok_or_else(|| error(libc::ENOENT))?;
        let is_open = match object {
            // The reader of the pipe is the file of the queue.
            FakeObject::EventQueue { writer, .. } => {
                let mut fds = [PollFd::new(writer, PollFlags::empty())];
                poll(&mut fds, Some(&Default::default()))?;
                !fds[0].revents().contains(PollFlags::ERR)
            }
            _ => false,
        };
        let is_attached = self.groups.values().any(|(at, _)| *at == Some(id));
        unless(is_open || is_attached || self.nesting.uses(id), libc::EBUSY)?;
        self.nesting.objects.remove(&id);
        Ok(())
    }
}

fn outcome<T>(call: &'static str, done: io::Result<T>) -> Result<T, NestingError> {
    done.map_err(|source| argument::refused(call, "a fake object".to_owned(), source, None))
}

impl NestingKernel for FakeKernel {
    fn hardware_info(&self, device: BoundDevice) -> Result<HardwareInfo, NestingError> {
        let mut state = self.state();
        let found = state.step().and_then(|()| state.device(device));
        outcome("IOMMU_GET_HW_INFO", found)?;
        Ok(HardwareInfo {
            kind: match &state.nesting.iommu {
                FakeIommu::OneStage => HardwareKind::Other(0),
                FakeIommu::Smmu(hardware, _) => HardwareKind::Smmu(*hardware),
                FakeIommu::Vtd(hardware) => HardwareKind::Vtd(*hardware),
            },
            tracks_dirty_pages: false,
            may_use_ats: false,
            pasid_bits: 0,
        })
    }

    fn alloc_parent(&self, device: BoundDevice, ioas: u32) -> Result<u32, NestingError> {
        let request = argument::parent_argument(device, ioas);
        outcome("IOMMU_HWPT_ALLOC", self.state().alloc_table(&request, None))
    }

    fn alloc_viommu(&self, device: BoundDevice, parent: u32) -> Result<u32, NestingError> {
        let request = argument::viommu_argument(device, parent);
        let mut state = self.state();
        let made = (|| {
            state.step()?;
            let is_smmu = request.type_ == VIOMMU_SMMU;
            unless(request.size != 40 || !is_smmu, libc::EINVAL)?;
            state.device(device)?;
            let can = matches!(state.nesting.iommu, FakeIommu::Smmu(_, true));
            unless(!can, libc::EOPNOTSUPP)?;
            let parent = request.hwpt_id;
            let object = state.nesting.objects.get(&parent);
            let is_parent = matches!(object, Some(FakeObject::Parent { .. }));
            unless(!is_parent, libc::ENOENT)?;
            Ok(state.add_object(FakeObject::Viommu { parent }))
        })();
        outcome("IOMMU_VIOMMU_ALLOC", made)
    }

    fn alloc_vdevice(
        &self,
        viommu: u32,
        device: BoundDevice,
        stream: u32,
    ) -> Result<u32, NestingError> {
        let request = argument::vdevice_argument(viommu, device, stream);
        let mut state = self.state();
        let made = (|| {
            state.step()?;
            unless(request.size != 24, libc::EINVAL)?;
            unless(!state.nesting.is_viommu(viommu), libc::ENOENT)?;
            let device = state.device(device)?;
            let is_taken = state.nesting.objects.values().any(|object| {
                matches!(object, FakeObject::Vdevice { viommu: of, device: named, stream: used }
                    if *named == device || (*of == viommu && *used == stream))
            });
            unless(is_taken, libc::EEXIST)?;
            Ok(state.add_object(FakeObject::Vdevice {
                viommu,
                device,
                stream,
            }))
        })();
        outcome("IOMMU_VDEVICE_ALLOC", made)
    }

    fn alloc_nested(
        &self,
        device: BoundDevice,
        parent: u32,
        stage: FirstStage,
    ) -> Result<u32, NestingError> {
        let data_type = match stage {
            FirstStage::Smmu(_) => DATA_SMMU,
            FirstStage::Vtd(_) => DATA_VTD,
        };
        let request = argument::nested_argument(device, parent, data_type);
        let made = self.state().alloc_table(&request, Some(stage));
        outcome("IOMMU_HWPT_ALLOC", made)
    }

    fn invalidate_smmu(
        &self,
        viommu: u32,
        commands: &[SmmuCommand],
    ) -> Result<(), InvalidationError> {
        /// `CMDQ_BATCH_ENTRIES` less the SYNC.
        const BATCH: usize = 63;
        let request = argument::invalidate_argument(viommu, INVALIDATE_SMMU);
        let mut state = self.state();
        let mut done = 0;
        let answer = (|| {
            state.step()?;
            check_invalidation(&request, commands.len())?;
            match state.nesting.objects.get(&viommu) {
                Some(FakeObject::Viommu { .. }) => {}
                // A nested table of an SMMU has no invalidation of its own.
                Some(FakeObject::Nested { .. }) => return Err(error(libc::EOPNOTSUPP)),
                Some(_) => return Err(error(libc::EINVAL)),
                None => return Err(error(libc::ENOENT)),
            }
            for command in commands {
                let words = argument::smmu_invalidation(*command).cmd.map(u64::from_le);
                state.nesting.check_command(viommu, words)?;
                done += 1;
            }
            Ok(())
        })();
        // The kernel counts a command that it has checked, and issues commands in batches: after a refused command the rest
        // of its batch is counted, but was never issued.
        let issued = if answer.is_ok() {
            done
        } else {
            done - done % BATCH
        };
        state.nesting.commands.extend(&commands[..issued]);
        argument::outcome(answer, done, commands.len(), || format!("vIOMMU {viommu}"))
    }

    fn invalidate_vtd(
        &self,
        nested: u32,
        ranges: &[VtdInvalidation],
    ) -> Result<(), InvalidationError> {
        let request = argument::invalidate_argument(nested, INVALIDATE_VTD);
        let mut state = self.state();
        let mut done = 0;
        let answer = (|| {
            state.step()?;
            check_invalidation(&request, ranges.len())?;
            match state.nesting.objects.get(&nested) {
                Some(FakeObject::Nested {
                    stage: FirstStage::Vtd(_),
                    ..
                }) => {}
                Some(FakeObject::Nested { .. } | FakeObject::Viommu { .. }) => {
                    return Err(error(libc::EOPNOTSUPP));
                }
                Some(_) => return Err(error(libc::EINVAL)),
                None => return Err(error(libc::ENOENT)),
            }
            for range in ranges {
                check_vtd_range(&argument::vtd_invalidation(*range))?;
                state.nesting.ranges.push((nested, *range));
                done += 1;
            }
            Ok(())
        })();
        argument::outcome(answer, done, ranges.len(), || {
            format!("nested table {nested}")
        })
    }

    fn alloc_event_queue(&self, viommu: u32, depth: u32) -> Result<(u32, OwnedFd), NestingError> {
        let request = argument::event_queue_argument(viommu, depth);
        let mut state = self.state();
        let made = (|| {
            state.step()?;
            let is_smmu = request.type_ == EVENTS_SMMU;
            unless(request.size != 32 || !is_smmu, libc::EINVAL)?;
            unless(!(1..=1 << 19).contains(&depth), libc::EINVAL)?;
            unless(!state.nesting.is_viommu(viommu), libc::ENOENT)?;
            let is_taken = state.nesting.objects.values().any(|object| {
                matches!(object, FakeObject::EventQueue { viommu: of, .. } if *of == viommu)
            });
            unless(is_taken, libc::EEXIST)?;
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
            let id = state.add_object(FakeObject::EventQueue {
                viommu,
                depth: depth as usize,
                writer: writer.into(),
                sequence: 0,
            });
            Ok((id, reader))
        })();
        outcome("IOMMU_VEVENTQ_ALLOC", made)
    }

    fn destroy_object(&self, object: u32) -> io::Result<()> {
        self.state().destroy_nesting(object)
    }
}

impl FakeKernel {
    /// An event of the SMMU about a device: `words` as in the SMMU's own queue, without the stream ID. Nobody hears of it unless
    /// the device has a vDEVICE, whose vIOMMU has a queue (`arm_vmaster_report_event`).
    pub fn report(&self, device: u32, words: [u64; 4]) {
        const RECORD: u64 = 40;
        let mut state = self.state();
        let objects = &state.nesting.objects;
        let named = objects.values().find_map(|object| match object {
            FakeObject::Vdevice {
                viommu,
                device: named,
                stream,
            } if *named == device => Some((*viommu, *stream)),
            _ => None,
        });
        let Some((viommu, stream)) = named else {
            return;
        };
        for object in state.nesting.objects.values_mut() {
            let FakeObject::EventQueue {
                viommu: of,
                depth,
                writer,
                sequence,
            } = object
            else {
                continue;
            };
            if *of != viommu {
                continue;
            }
            let waiting = ioctl_fionread(&*writer).expect("a pipe") / RECORD;
            if waiting < *depth as u64 {
                let first = words[0] & 0xffff_ffff | u64::from(stream) << 32;
                let mut record = [0, *sequence].map(u32::to_ne_bytes).concat();
                let rest = [first, words[1], words[2], words[3]];
                record.extend(rest.map(u64::to_le_bytes).concat());
                writer.write_all(&record).expect("room");
            }
            // A queue that is full loses the event; the next one's number tells.
            *sequence += 1;
        }
    }
}
