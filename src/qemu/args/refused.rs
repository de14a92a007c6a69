//! The options of the operator that `launch` refuses.

use thiserror::Error;

use super::PREFIX;
use super::vmm_options::ReadConfigError;

/// QEMU arguments with which the guest would have no working IOMMU.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VmmOptionError {
    /// QEMU leaves the process that `launch` watches.
    #[error(
        "with -daemonize QEMU goes on in a process that `launch` does not see, so `launch` would end the daemon \
         under the guest; leave the option out, and put `launch` itself into the background"
    )]
    Daemonize,
    /// The guest's RAM would be QEMU's alone.
    #[error(
        "-mem-path gives the guest RAM that the daemon cannot share; leave it out, or give `-object \
         memory-backend-file,id=ram,mem-path=PATH,size=SIZE,share=on -machine memory-backend=ram` in its place"
    )]
    MemPath,
    /// A memory backend whose memory is QEMU's alone.
    #[error(
        "the memory backend {id:?} is not shared, so neither the daemon nor a device behind it sees the guest's \
         memory there; add share=on to its -object, with memory-backend-memfd or memory-backend-file"
    )]
    NotShared {
        /// The ID of the object.
        id: String,
    },
    /// A second IOMMU.
    #[error(
        "{what} is a second IOMMU, beside the daemon's, and a guest takes one of the two for a device; leave it \
         out, or start this VM without `launch`"
    )]
    SecondIommu {
        /// The device or the machine's property.
        what: String,
    },
    /// A bridge beside the ports of the file.
    #[error(
        "{driver} would take a bus number, and the numbers behind the ports of the file would be others than those in the \
         guest's table; add the port to the file (`[[port]]` with its `address`), and leave the -device out"
    )]
    UndeclaredPort {
        /// The type of the device.
        driver: String,
    },
    /// The guest would not recognize the IOMMU or another device that the daemon serves.
    #[error(
        "{what} changes the IDs of the devices that the daemon serves, by which the guest's drivers find them; leave \
         it out, or give the property to the -device that needs it"
    )]
    ChangedIds {
        /// The option.
        what: String,
    },
    /// The guest gets no ACPI tables, and so no VIOT.
    #[error(
        "{what} takes the ACPI tables from the guest, one of which describes the IOMMU; leave the option out"
    )]
    NoAcpi {
        /// The option.
        what: &'static str,
    },
    /// Firmware would pass ACPI tables to the guest, which do not describe the IOMMU.
    #[error(
        "with -machine acpi=on, firmware gives the guest ACPI tables in place of the device tree, which describes \
         the IOMMU; leave acpi=on out"
    )]
    AcpiOnVirt,
    /// A machine whose guest gets no table of the daemon.
    #[error(
        "the machine {machine} takes no ACPI tables from QEMU's arguments, so no table would describe the IOMMU to the \
         guest; use -machine q35, or virt for an Arm guest"
    )]
    NoTables {
        /// The machine.
        machine: String,
    },
    /// An interrupt controller without an ITS.
    #[error(
        "with -machine gic-version=2, writes to other addresses than those of the MSI region are interrupts; use \
         gic-version=3"
    )]
    Gic,
    /// An ID that may be one of ours.
    #[error(
        "the ID {id:?} of -{option} begins with {PREFIX:?}, as the IDs of the arguments that `launch` adds do; \
         give another ID"
    )]
    TakenId {
        /// The option.
        option: String,
        /// The ID.
        id: String,
    },
    /// A file of options that cannot be read.
    #[error(transparent)]
    ReadConfig(#[from] ReadConfigError),
}
