//! The daemon is killed and ended again and again while a guest writes files to its emulated disk and reads them back.
//! `launch` starts the daemon again, and the guest notices nothing.

use std::time::Duration;

use crate::bed::{self, DISK, DmaMode, Server, new_image};
use crate::launched::{End, Launched};
use crate::vm::{LONG_ANSWER, Setup, TestDir, Vm, VmOptions, number};

/// Each round writes a file of random data, reads it back past the guest's caches, and compares it with a copy in memory.
/// It also compares a file of an earlier round.
const ROUND: &str = "dd if=/dev/urandom of=/run/data bs=64k count=24 2>/dev/null && \
    cp /run/data /mnt/new && sync && echo 3 >/proc/sys/vm/drop_caches && cmp /run/data /mnt/new && \
    { [ ! -e /mnt/old ] || cmp /run/old /mnt/old; } && mv /mnt/new /mnt/old && mv /run/data /run/old";

/// Kills, and as many planned ends, in each test of a run of the suite; the environment can ask for more.
fn ends() -> u32 {
    let more = std::env::var("VIOMMU_KILLS").ok();
    more.map_or(50, |text| text.parse().expect("VIOMMU_KILLS is a number"))
}

pub fn check(name: &str, dma_mode: DmaMode) {
    let setup = Setup::with_storage();
    let test_dir = TestDir::new(name);
    let image = new_image(&test_dir, "disk.img");
    let server = Server::start(&test_dir, "disk", &image, &bed::dma_of(&test_dir, dma_mode));
    let mut extra = bed::CPU.map(str::to_owned).to_vec();
    if dma_mode == DmaMode::Shadow {
        extra.extend(server.qemu_args("06.0"));
    }
    let options = VmOptions {
        kernel: setup.newest(),
        append: String::new(),
        iommu: Vec::new(),
        extra,
    };
    let config = bed::config_of(&test_dir, &server, dma_mode);
    let (mut vm, launched) = Launched::start(&setup, &test_dir, "socket", &config, &options);
    test_dir.note("up");
    bed::load_drivers(&mut vm, 1);
    vm.run_within("mkfs.ext4 -q /dev/nvme0n1", LONG_ANSWER);
    vm.run("mkdir -p /mnt && mount -t ext4 /dev/nvme0n1 /mnt");
    // A kill while the server's windows change ends its connection, which `lose_the_disk` shows.
    let goes_on_after_any_kill = dma_mode != DmaMode::Mappings;
    let kill = if goes_on_after_any_kill {
        End::Killed
    } else {
        End::Planned
    };
    let (mut all, mut inside, mut pause) = (0, 0, 0u64);
    while all < 2 * ends() {
        vm.begin(&format!("(for _ in $(seq 8); do {ROUND} || exit 1; done)"));
        let (lines, status) = loop {
            // 0 to 292 ms, in an order that does not repeat soon.
            pause = (pause * 31 + 17) % 293;
            if let Some(answer) = vm.finish(Duration::from_millis(1 + pause)) {
                break answer;
            }
            launched.end(if all % 2 == 0 { kill } else { End::Planned });
            all += 1;
            inside += 1;
        };
        assert_eq!((status, &lines), (0, &Vec::new()), "after {all} ends");
        // Also while the disk is idle.
        launched.end(kill);
        launched.end(End::Planned);
        all += 2;
    }
    test_dir.note(&format!("{all} ends, {inside} of them under load"));
    assert!(
        inside > all / 2,
        "only {inside} of {all} ends fell into the load"
    );
    let life = launched.status().0["life"].clone();
    assert_eq!(life["state"], "taken-over", "{life}");
    let lives = number(&life, "number");
    assert!(
        (u64::from(all) / 2..=u64::from(all) + 1).contains(&lives),
        "{life}"
    );
    assert_eq!(launched.status().refusals(), Vec::<String>::new());
    assert_eq!(launched.status().dma_of(DISK), "translated");
    check_files(&mut vm);
    if !goes_on_after_any_kill {
        lose_the_disk(&mut vm, &launched);
    }
}

/// Kills the daemon under load until the disk is lost: the guest sees a disk that went away, and goes on without it.
fn lose_the_disk(vm: &mut Vm, launched: &Launched) {
    const MOST: u32 = 200;
    let is_lost = || {
        let life = launched.status().0["life"].clone();
        life["lost"].as_array().is_some_and(|lost| !lost.is_empty())
    };
    vm.begin("while dd if=/dev/nvme0n1 of=/dev/null bs=64k count=200 iflag=direct 2>/dev/null; do :; done");
    let mut kills = 0;
    while !is_lost() {
        assert!(kills < MOST, "{MOST} kills under load have lost nothing");
        launched.end(End::Killed);
        kills += 1;
    }
    let answer = vm.finish(LONG_ANSWER);
    assert!(answer.is_some(), "the guest still waits for its disk");
    assert_eq!(vm.run("echo alive"), ["alive"]);
    launched.end(End::Planned);
    assert_eq!(vm.run("echo alive"), ["alive"]);
}

/// The file system is whole, and the guest's kernel has logged no error of the disk.
fn check_files(vm: &mut Vm) {
    vm.run("umount /mnt && echo 3 >/proc/sys/vm/drop_caches");
    vm.run_within("fsck.ext4 -fn /dev/nvme0n1", LONG_ANSWER);
    vm.run("mount -t ext4 /dev/nvme0n1 /mnt && cmp /run/old /mnt/old && umount /mnt");
    bed::assert_no_errors(vm);
}
