//! Devices that other processes emulate, with stock guests under an unmodified QEMU: `examples/nvme`
//! as an NVMe disk, which the guest's own driver uses, behind the daemon and without it.
//!
//! | module | shows |
//! |---|---|
//! | `files` | a file system is what it should be, whichever way the disk reaches memory |
//! | `reach` | a disk that reaches for more than it may is refused, and the guest told |
//! | `plugged` | a disk comes and goes while the guest runs; a reset |
//! | `bed` | what these need: the disk's server, the daemon, the guest |

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod bed;
mod files;
mod plugged;
mod reach;
#[path = "../common/vm.rs"]
mod vm;

use bed::Manner;

macro_rules! tests {
    ($($name:ident: $module:ident($manner:ident);)*) => {$(
        #[test]
        #[ignore = "needs qemu-scripts/setup.sh; run qemu-scripts/test.sh emulated"]
        fn $name() {
            $module::check(stringify!($name), Manner::$manner);
        }
    )*};
}

tests! {
    files_with_messages: files(Messages);
    files_with_mappings: files(Mappings);
    files_with_shadow: files(Shadow);
    reach_with_messages: reach(Messages);
    reach_with_mappings: reach(Mappings);
    reach_with_shadow: reach(Shadow);
}
