//! The arguments and results of the kernel's calls about nested translation. The fake kernel of the tests checks the same
//! arguments.

use std::io;

use iommufd_bindings::{
    iommu_hwpt_alloc, iommu_hwpt_arm_smmuv3, iommu_hwpt_invalidate, iommu_hwpt_vtd_s1,
    iommu_hwpt_vtd_s1_invalidate,
    iommu_hwpt_vtd_s1_invalidate_flags_IOMMU_VTD_INV_FLAGS_LEAF as LEAF, iommu_vdevice_alloc,
    iommu_veventq_alloc, iommu_veventq_type_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3 as EVENTS_SMMU,
    iommu_viommu_alloc, iommu_viommu_arm_smmuv3_invalidate,
    iommu_viommu_type_IOMMU_VIOMMU_TYPE_ARM_SMMUV3 as VIOMMU_SMMU,
    iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_NEST_PARENT as NEST_PARENT,
};

use super::{
    BoundDevice, InvalidationError, NestingError, SmmuCommand, StreamEntry, VtdInvalidation,
    VtdRoot,
};
use crate::vfio::ioctl::size_of_u32;

/// `without` is the cure if the kernel does not have the thing at all (`EOPNOTSUPP`).
pub(in crate::vfio) fn refused(
    call: &'static str,
    object: String,
    source: io::Error,
    without: Option<&'static str>,
) -> NestingError {
    let cure = match source.raw_os_error() {
        Some(libc::EOPNOTSUPP) => without,
        Some(libc::ENOTTY) => {
            Some("the kernel is too old: nested translation needs Linux 6.15 or later")
        }
        _ => None,
    };
    NestingError {
        call,
        object,
        source,
        cure,
    }
}

/// The result of an invalidation. The kernel may report success and yet fewer commands, which is an error as well.
pub(in crate::vfio) fn outcome(
    answer: io::Result<()>,
    done: usize,
    wanted: usize,
    object: impl FnOnce() -> String,
) -> Result<(), InvalidationError> {
    let source = match answer {
        Ok(()) if done == wanted => return Ok(()),
        Ok(()) => io::Error::from_raw_os_error(libc::EIO),
        Err(source) => source,
    };
    Err(InvalidationError {
        object: object(),
        done: done.min(wanted),
        wanted,
        source,
    })
}

pub(in crate::vfio) fn parent_argument(device: BoundDevice, ioas: u32) -> iommu_hwpt_alloc {
    iommu_hwpt_alloc {
        size: size_of_u32::<iommu_hwpt_alloc>(),
        flags: NEST_PARENT,
        dev_id: device.0,
        pt_id: ioas,
        ..Default::default()
    }
}

pub(in crate::vfio) fn nested_argument(
    device: BoundDevice,
    parent: u32,
    data_type: u32,
) -> iommu_hwpt_alloc {
    iommu_hwpt_alloc {
        size: size_of_u32::<iommu_hwpt_alloc>(),
        dev_id: device.0,
        pt_id: parent,
        data_type,
        ..Default::default()
    }
}

pub(in crate::vfio) fn viommu_argument(device: BoundDevice, parent: u32) -> iommu_viommu_alloc {
    iommu_viommu_alloc {
        size: size_of_u32::<iommu_viommu_alloc>(),
        type_: VIOMMU_SMMU,
        dev_id: device.0,
        hwpt_id: parent,
        ..Default::default()
    }
}

pub(in crate::vfio) fn vdevice_argument(
    viommu: u32,
    device: BoundDevice,
    stream: u32,
) -> iommu_vdevice_alloc {
    iommu_vdevice_alloc {
        size: size_of_u32::<iommu_vdevice_alloc>(),
        viommu_id: viommu,
        dev_id: device.0,
        virt_id: stream.into(),
        ..Default::default()
    }
}

pub(in crate::vfio) fn event_queue_argument(viommu: u32, depth: u32) -> iommu_veventq_alloc {
    iommu_veventq_alloc {
        size: size_of_u32::<iommu_veventq_alloc>(),
        viommu_id: viommu,
        type_: EVENTS_SMMU,
        veventq_depth: depth,
        ..Default::default()
    }
}

pub(in crate::vfio) fn invalidate_argument(object: u32, data_type: u32) -> iommu_hwpt_invalidate {
    iommu_hwpt_invalidate {
        size: size_of_u32::<iommu_hwpt_invalidate>(),
        hwpt_id: object,
        data_type,
        ..Default::default()
    }
}

pub(in crate::vfio) fn smmu_data(entry: StreamEntry) -> iommu_hwpt_arm_smmuv3 {
    iommu_hwpt_arm_smmuv3 {
        ste: entry.words().map(u64::to_le),
    }
}

pub(in crate::vfio) fn vtd_data(root: VtdRoot) -> iommu_hwpt_vtd_s1 {
    iommu_hwpt_vtd_s1 {
        pgtbl_addr: root.table.0,
        addr_width: root.input_bits.into(),
        ..Default::default()
    }
}

pub(in crate::vfio) fn smmu_invalidation(
    command: SmmuCommand,
) -> iommu_viommu_arm_smmuv3_invalidate {
    iommu_viommu_arm_smmuv3_invalidate {
        cmd: command.words().map(u64::to_le),
    }
}

pub(in crate::vfio) fn vtd_invalidation(range: VtdInvalidation) -> iommu_hwpt_vtd_s1_invalidate {
    iommu_hwpt_vtd_s1_invalidate {
        addr: range.first.0,
        npages: range.pages,
        flags: if range.only_leaves { LEAF } else { 0 },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CURE: &str = "use the device without nested translation";

    #[test]
    fn an_error_names_the_call_the_object_and_the_cure() {
        let not_there = || io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        let object = || "the vIOMMU for device 3 below nest parent 4".to_owned();
        let error = refused("IOMMU_VIOMMU_ALLOC", object(), not_there(), Some(CURE));
        let text = error.to_string();
        assert!(
            text.starts_with("IOMMU_VIOMMU_ALLOC of the vIOMMU for device 3"),
            "{text}"
        );
        assert!(text.ends_with("without nested translation"), "{text}");
        let busy = io::Error::from_raw_os_error(libc::EBUSY);
        let error = refused("IOMMU_VIOMMU_ALLOC", object(), busy, Some(CURE));
        assert_eq!((error.cure, error.errno()), (None, libc::EBUSY));
        let old = io::Error::from_raw_os_error(libc::ENOTTY);
        let error = refused("IOMMU_VIOMMU_ALLOC", object(), old, Some(CURE));
        assert!(error.to_string().contains("too old"), "{error}");
    }

    #[test]
    fn an_invalidation_succeeds_only_if_every_command_was_done() {
        let of = |answer, done| outcome(answer, done, 3, || "vIOMMU 5".to_owned());
        assert!(of(Ok(()), 3).is_ok());
        let part = of(Ok(()), 2).expect_err("one is left");
        assert_eq!((part.done, part.wanted), (2, 3));
        let refused = io::Error::from_raw_os_error(libc::EIO);
        let error = of(Err(refused), 1).expect_err("refused");
        assert_eq!(error.done, 1);
        assert!(
            error.to_string().contains("took 1 of 3 commands"),
            "{error}"
        );
    }
}
