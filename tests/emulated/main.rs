//! Emulated devices with stock guests under an unmodified QEMU. `examples/nvme` serves an NVMe disk, and the guest's
//! own driver uses it, behind the daemon and without it.
//!
//! | module | shows |
//! |---|---|
//! | `files` | a file system keeps its contents, in each DMA mode |
//! | `reach` | a disk's forbidden accesses are refused and reported to the guest |
//! | `plugged` | devices are plugged and unplugged while the guest runs; the guest is reset |
//! | `restarts` | the daemon is killed and ended under `launch` while the guest uses the disk |
//! | `bed` | the harness: the disk's server, the daemon, the guest |

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod bed;
mod files;
#[path = "../common/launched.rs"]
mod launched;
mod plugged;
mod reach;
mod restarts;
#[path = "../common/vm.rs"]
mod vm;

use bed::DmaMode;

macro_rules! tests {
    ($($name:ident: $module:ident($mode:ident);)*) => {$(
        #[test]
        #[ignore = "needs qemu-scripts/setup.sh; run qemu-scripts/test.sh emulated"]
        fn $name() {
            $module::check(stringify!($name), DmaMode::$mode);
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


    restarts_with_messages: restarts(Messages);
    restarts_with_mappings: restarts(Mappings);
    restarts_with_shadow: restarts(Shadow);
}
