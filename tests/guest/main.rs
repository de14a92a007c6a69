//! Stock guests under an unmodified QEMU, with the daemon as their IOMMU.
//!
//! Most endpoints are `edu` devices; the guest binds them to vfio-pci and uses them for nothing
//! else. A program in the guest maps and unmaps through VFIO, and the stock driver makes requests of that. The tests
//! compare the mappings that the program expects with those that the daemon holds.
//!
//! One endpoint is a network interface, whose driver maps through the kernel's DMA interface: lazy
//! mode differs from strict mode only there. Its link is down, because QEMU's own devices access
//! guest memory without the daemon: the driver maps its receive buffers, but no packet ever uses
//! one.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

#[path = "../common/launched.rs"]
mod launched;
#[path = "../common/vm.rs"]
mod vm;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use ports::{a_wrong_number, ports_under_ovmf, ports_under_seabios};
use serde_json::json;
use tables::{tables_by_grub, tables_by_the_bar};
use vm::machine::Machine;
use vm::{
    ANSWER, Daemon, Kernel, LONG_ANSWER, Setup, Status, Table, TestDir, Vm, VmOptions, hex_of,
    number, wait_for,
};

/// The endpoints that are bound to vfio-pci.
const FIRST: &str = "0000:00:06.0";
const SECOND: &str = "0000:00:07.0";
const THIRD: &str = "0000:00:08.0";
const FOR_VFIO: [&str; 3] = [FIRST, SECOND, THIRD];
/// The network interface.
const NIC: &str = "0000:00:09.0";
const ENDPOINTS: [&str; 4] = [FIRST, SECOND, THIRD, NIC];

/// See [`Transport::rounds`].
const ROUNDS: u64 = 100_000;
/// How often the guest opens and closes the network interface meanwhile.
const OPENED: u64 = 15;
/// The interface maps this many receive buffers each time, and a few rings.
const NIC_BUFFERS: u64 = 255;

/// The configuration of a VM. All endpoints have the reserved range of the machine's interrupts; the first endpoint has
/// one more. The range is given for x86, and is the daemon's default for Arm.
fn config_of(machine: Machine, kernel: &Kernel) -> String {
    let memory = if kernel.page > 16 << 10 {
        "1536M"
    } else {
        "512M"
    };
    let reserved = match machine {
        Machine::Q35 => MSI_OF_Q35,
        Machine::Virt => "",
    };
    format!("memory = \"{memory}\"\n{reserved}{CONFIG}")
}

const MSI_OF_Q35: &str = "
reserved = [{ first = 0xfee00000, last = 0xfeefffff, kind = \"msi\" }]
";
const CONFIG: &str = r#"
address = "00:05.0"

[[endpoint]]
address = "00:06.0"

[[endpoint.reserved]]
first = 0x4567_0000
last = 0x4788_ffff
kind = "reserved"

[[endpoint]]
range = "00:07.0-00:09.0"
"#;
/// Addresses of the machine's interrupts, as the guest prints them.
fn msi(machine: Machine) -> &'static str {
    match machine {
        Machine::Q35 => "0x00000000fee00000 0x00000000feefffff msi",
        Machine::Virt => "0x0000000008090000 0x000000000809ffff msi",
    }
}
/// The ranges between these and [`OWN`], which VFIO offers to the first endpoint.
fn offered(machine: Machine) -> [&'static str; 3] {
    match machine {
        Machine::Q35 => [
            "r 0 4566ffff",
            "r 47890000 fedfffff",
            "r fef00000 ffffffffffff",
        ],
        Machine::Virt => [
            "r 0 808ffff",
            "r 80a0000 4566ffff",
            "r 47890000 ffffffffffff",
        ],
    }
}
const OWN: &str = "0x0000000045670000 0x000000004788ffff reserved";

#[derive(Clone, Copy, Debug)]
enum Mode {
    Strict,
    Lazy,
}

impl Mode {
    fn append(self) -> &'static str {
        match self {
            Self::Strict => "iommu.strict=1",
            Self::Lazy => "iommu.strict=0",
        }
    }

    /// The type of a translated default domain in sysfs.
    fn group_type(self) -> &'static str {
        match self {
            Self::Strict => "DMA",
            Self::Lazy => "DMA-FQ",
        }
    }
}

/// How QEMU reaches the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    VhostUser,
    VirtioPci,
}

impl Transport {
    /// The key of the socket in the configuration.
    fn key(self) -> &'static str {
        match self {
            Self::VhostUser => "socket",
            Self::VirtioPci => "vfio-user-socket",
        }
    }

    /// The number of mappings that each traffic test makes through VFIO. Over virtio-pci most requests cost a message, for
    /// which the guest's only processor waits. An emulated Arm processor is slower than one of x86.
    fn rounds(self) -> u64 {
        match (self, Machine::from_environment()) {
            (Self::VhostUser, Machine::Q35) => ROUNDS,
            (Self::VirtioPci, Machine::Q35) => ROUNDS / 5,
            (_, Machine::Virt) => ROUNDS / 10,
        }
    }
}

macro_rules! guest_tests {
    ($($name:ident: $scenario:ident($kernel:ident, $mode:ident, $transport:ident);)*) => {$(
        #[test]
        #[ignore = "needs qemu-scripts/setup.sh; run qemu-scripts/test.sh guest"]
        fn $name() {
            let setup = Setup::from_environment();
            let kernel = setup.$kernel();
            let test_dir = TestDir::new(stringify!($name));
            test_dir.note(&format!("kernel {}", kernel.version));
            $scenario(&setup, kernel, Mode::$mode, Transport::$transport, &test_dir);
            test_dir.note("done");
        }
    )*};
}

mod arm;
mod ports;
mod resolve;
mod restart;
mod tables;

guest_tests! {
    traffic_oldest_strict: traffic(oldest, Strict, VhostUser);
    traffic_oldest_lazy: traffic(oldest, Lazy, VhostUser);
    traffic_newest_strict: traffic(newest, Strict, VhostUser);
    traffic_newest_lazy: traffic(newest, Lazy, VhostUser);
    lives_of_a_vm_oldest_strict: lives_of_a_vm(oldest, Strict, VhostUser);
    lives_of_a_vm_oldest_lazy: lives_of_a_vm(oldest, Lazy, VhostUser);
    lives_of_a_vm_newest_strict: lives_of_a_vm(newest, Strict, VhostUser);
    lives_of_a_vm_newest_lazy: lives_of_a_vm(newest, Lazy, VhostUser);
    passthrough_oldest_strict: passthrough(oldest, Strict, VhostUser);
    passthrough_oldest_lazy: passthrough(oldest, Lazy, VhostUser);
    passthrough_newest_strict: passthrough(newest, Strict, VhostUser);
    passthrough_newest_lazy: passthrough(newest, Lazy, VhostUser);
    launched_newest_strict: launched(newest, Strict, VhostUser);
    traffic_oldest_strict_over_virtio_pci: traffic(oldest, Strict, VirtioPci);
    traffic_oldest_lazy_over_virtio_pci: traffic(oldest, Lazy, VirtioPci);
    traffic_newest_strict_over_virtio_pci: traffic(newest, Strict, VirtioPci);
    traffic_newest_lazy_over_virtio_pci: traffic(newest, Lazy, VirtioPci);
    lives_of_a_vm_oldest_strict_over_virtio_pci: lives_of_a_vm(oldest, Strict, VirtioPci);
    lives_of_a_vm_oldest_lazy_over_virtio_pci: lives_of_a_vm(oldest, Lazy, VirtioPci);
    lives_of_a_vm_newest_strict_over_virtio_pci: lives_of_a_vm(newest, Strict, VirtioPci);
    lives_of_a_vm_newest_lazy_over_virtio_pci: lives_of_a_vm(newest, Lazy, VirtioPci);
    passthrough_oldest_strict_over_virtio_pci: passthrough(oldest, Strict, VirtioPci);
    passthrough_oldest_lazy_over_virtio_pci: passthrough(oldest, Lazy, VirtioPci);
    passthrough_newest_strict_over_virtio_pci: passthrough(newest, Strict, VirtioPci);
    passthrough_newest_lazy_over_virtio_pci: passthrough(newest, Lazy, VirtioPci);
    launched_newest_strict_over_virtio_pci: launched(newest, Strict, VirtioPci);
    tables_by_the_bar_oldest_strict: tables_by_the_bar(oldest, Strict, VirtioPci);
    tables_by_the_bar_newest_lazy: tables_by_the_bar(newest, Lazy, VirtioPci);
    ports_under_seabios_oldest_strict: ports_under_seabios(oldest, Strict, VhostUser);
    ports_under_ovmf_newest_lazy: ports_under_ovmf(newest, Lazy, VirtioPci);
    a_wrong_number_newest_strict: a_wrong_number(newest, Strict, VhostUser);
    tables_by_grub_newest_lazy: tables_by_grub(newest, Lazy, VirtioPci);
}

/// The driver probes the endpoints and finds the configured properties. The daemon holds exactly
/// the 10^5 mappings that the guest makes while the VM is paused and continued. After a reboot there are
/// no mappings.
fn traffic(setup: &Setup, kernel: &Kernel, mode: Mode, transport: Transport, test_dir: &TestDir) {
    let config = config_of(setup.machine, kernel);
    let mut daemon = Daemon::start_over(transport.key(), test_dir, &config);
    let mut vm = boot(setup, kernel, mode, test_dir, &daemon, "vm", "");
    test_dir.note("up");
    probed_as_configured(&mut vm, &mut daemon, setup, kernel, mode);
    vm.qmp("set_link", json!({"name": "nic", "up": false}));

    // Two endpoints in one container share a domain; the third has its own.
    start_mapper(&mut vm, "pair", 1, &[FIRST, SECOND]);
    start_mapper(&mut vm, "single", 2, &[THIRD]);
    let status = daemon.status();
    let pair = status.domain_of(FIRST);
    assert_eq!(pair, status.domain_of(SECOND));
    assert_ne!(pair, status.domain_of(THIRD));
    let (ranges, _) = vm.try_run("ask pair ranges", ANSWER);
    for range in offered(setup.machine) {
        assert!(ranges.contains(&range.to_owned()), "{ranges:?}");
    }

    let pauses = churn_with_pauses(&mut vm, &mut daemon, transport, test_dir);
    let rounds = transport.rounds();
    test_dir.note(&format!("{rounds} mappings made, {pauses} pauses"));
    // The guest would not notice a refused MAP or UNMAP, so the daemon's counters must show none.
    assert_eq!(daemon.status().refusals(), Vec::<String>::new());
    assert!(pauses >= 5, "only {pauses} pauses fell into the traffic");
    // In lazy mode, the unmaps come a moment later.
    wait_for("the end of the interface's mappings", ANSWER, || {
        (mappings_of(&mut daemon, NIC) == 0).then_some(())
    });
    tables_agree(&mut vm, &mut daemon, &[("pair", FIRST), ("single", THIRD)]);
    test_dir.note("tables agree");

    // The end of the program ends its domain and no other.
    vm.run("ask single quit");
    wait_for("the third endpoint's default domain", ANSWER, || {
        (daemon
            .tables()
            .values()
            .filter(|table| !table.0.is_empty())
            .count()
            == 1)
            .then_some(())
    });
    assert_eq!(daemon.status().dma_of(THIRD), "translated");
    tables_agree(&mut vm, &mut daemon, &[("pair", FIRST)]);

    vm.run("ifconfig eth0 up");
    assert!(mappings_of(&mut daemon, NIC) >= NIC_BUFFERS);
    vm.qmp("system_reset", json!({}));
    vm.wait_until_up();
    test_dir.note("up again");
    nothing_is_mapped(&mut daemon);
    probed_as_configured(&mut vm, &mut daemon, setup, kernel, mode);
    nothing_is_mapped(&mut daemon);
    start_mapper(&mut vm, "again", 3, &[SECOND, THIRD]);
    vm.run_within(&format!("ask again churn {}", rounds / 10), LONG_ANSWER);
    tables_agree(&mut vm, &mut daemon, &[("again", SECOND)]);
    drop(vm);
    daemon.stop();
}

/// `launch` alone is enough: it starts the daemon and gives QEMU the device, the shared memory and
/// the table, so that the guest's endpoint is translated. SIGTERM ends all of it.
fn launched(setup: &Setup, kernel: &Kernel, mode: Mode, transport: Transport, test_dir: &TestDir) {
    let binary = env!("CARGO_BIN_EXE_vhost-device-iommu");
    let config = test_dir.path("vm.toml");
    let key = transport.key();
    let sockets = format!("{key} = 'iommu.sock'\ncontrol = 'control.sock'\n");
    // Of its machine the file says nothing: `launch` recognises it.
    let text = sockets + &config_of(setup.machine, kernel);
    fs::write(&config, text).expect("the configuration written");
    let append = format!("console={} {}", setup.machine.console(), mode.append());
    let log = File::create(test_dir.path("launch.log")).expect("a log");
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", binary, "launch"])
        .args(["--config", "vm.toml", "--"])
        .arg(&setup.qemu)
        .args(match setup.machine {
            Machine::Q35 => &[][..],
            Machine::Virt => &["-M", "virt"],
        })
        .args(setup.machine.accel())
        .args(["-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-serial", "file:console.log"])
        .args(["-serial", "file:agent.log"])
        .args(["-device", "edu,addr=06.0"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(&kernel.initramfs)
        .args(["-append", &append])
        .current_dir(config.parent().expect("a folder"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a descriptor"))
        .stderr(log)
        .spawn()
        .expect("launch starts");
    let control = test_dir.path("control.sock");
    wait_for("a translated endpoint", LONG_ANSWER, || {
        assert_eq!(child.try_wait().expect("a child"), None, "launch ended");
        let answer = Command::new(binary)
            .args(["ctl".as_ref(), control.as_os_str(), "status".as_ref()])
            .output()
            .expect("it runs");
        let text = String::from_utf8_lossy(&answer.stdout);
        let mut lines = text.lines();
        lines
            .any(|line| line.contains(FIRST) && line.contains("translated"))
            .then_some(())
    });
    test_dir.note("translated");
    // The guest uses both serial ports, which an Arm guest finds in the device tree.
    let agent = test_dir.path("agent.log");
    wait_for("the second serial port", ANSWER, || {
        let text = fs::read_to_string(&agent).unwrap_or_default();
        text.contains("= ready").then_some(())
    });
    let kill = Command::new("sh")
        .args(["-c", &format!("kill -TERM {}", child.id())])
        .status();
    assert!(kill.expect("sh runs").success());
    let status = wait_for("the end", ANSWER, || child.try_wait().expect("a child"));
    assert_eq!(status.code(), Some(0), "QEMU's status after SIGTERM");
    assert!(!control.exists() && !test_dir.path("iommu.sock").exists());
}

/// The VMM adds memory while the guest runs, and the guest can map it at once. A VMM that is killed
/// leaves nothing behind for the next VMM, which the same daemon serves.
fn lives_of_a_vm(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    let config = config_of(setup.machine, kernel);
    let mut daemon = Daemon::start_over(transport.key(), test_dir, &config);
    let pid = daemon.pid();
    let mut vm = boot(setup, kernel, mode, test_dir, &daemon, "first", "");
    test_dir.note("up");
    vm.run(&bind_all());
    start_mapper(&mut vm, "mapper", 4, &FOR_VFIO);
    vm.run_within("ask mapper churn 2000", LONG_ANSWER);

    let answer = match setup.machine {
        Machine::Q35 => {
            let (first, last) = hot_add(&mut vm);
            let answer = vm.run_within(&format!("ask mapper hot {first:x} {last:x}"), LONG_ANSWER);
            let (gpa, _) = Table::from_dump(&answer).0.pop_first().expect("a page").1;
            assert!((first..=last).contains(&gpa), "{gpa:#x}");
            answer
        }
        // QEMU adds memory to an Arm machine only if the guest has ACPI, and Debian's kernels for Arm do not take it.
        Machine::Virt => vm.run("ask mapper one"),
    };
    let (iova, (gpa, _)) = Table::from_dump(&answer).0.pop_first().expect("a page");
    for endpoint in FOR_VFIO {
        let found = daemon.ask(&format!("translate {endpoint} {iova:#x}"));
        assert_eq!(found["result"], "ok", "{found}");
        assert_eq!(hex_of(&found, "gpa"), gpa, "{found}");
        assert_eq!(found["backed"], true, "{found}");
    }
    test_dir.note("the page is mapped");
    vm.run_within("ask mapper churn 5000", LONG_ANSWER);
    tables_agree(&mut vm, &mut daemon, &[("mapper", FIRST)]);

    vm.kill();
    let status = wait_for("a daemon without VMM and domains", ANSWER, || {
        let status = daemon.status();
        (status.0["connected"] == false && status.domains().is_empty()).then_some(status)
    });
    for endpoint in ENDPOINTS {
        assert_eq!(status.endpoint(endpoint)["state"], "unattached");
        let found = daemon.ask(&format!("translate {endpoint} {iova:#x}"));
        assert_ne!(found["backed"], true, "{found}");
    }

    let mut vm = boot(setup, kernel, mode, test_dir, &daemon, "second", "");
    test_dir.note("the second VM is up");
    nothing_is_mapped(&mut daemon);
    probed_as_configured(&mut vm, &mut daemon, setup, kernel, mode);
    start_mapper(&mut vm, "mapper", 5, &FOR_VFIO);
    vm.run_within("ask mapper churn 5000", LONG_ANSWER);
    tables_agree(&mut vm, &mut daemon, &[("mapper", FIRST)]);
    assert_eq!(daemon.pid(), pid);
    drop(vm);
    daemon.stop();
}

/// With passthrough, the default domains are bypass domains; those of VFIO are not.
fn passthrough(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    transport: Transport,
    test_dir: &TestDir,
) {
    let config = config_of(setup.machine, kernel);
    let mut daemon = Daemon::start_over(transport.key(), test_dir, &config);
    let append = match setup.machine {
        Machine::Q35 => "iommu=pt",
        // The kernel of another architecture does not know the other word.
        Machine::Virt => "iommu.passthrough=1",
    };
    let mut vm = boot(setup, kernel, mode, test_dir, &daemon, "vm", append);
    vm.run(&bind_all());
    for endpoint in ENDPOINTS {
        assert_eq!(group_type(&mut vm, endpoint), "identity");
    }
    all_bypass(&daemon.status(), &ENDPOINTS);

    start_mapper(&mut vm, "mapper", 6, &[SECOND]);
    vm.run("ask mapper churn 1000");
    let status = daemon.status();
    assert_eq!(status.dma_of(SECOND), "translated");
    all_bypass(&status, &[FIRST, THIRD, NIC]);
    tables_agree(&mut vm, &mut daemon, &[("mapper", SECOND)]);

    vm.run("ask mapper quit");
    wait_for("the second endpoint's default domain", ANSWER, || {
        (daemon.status().dma_of(SECOND) == "bypass").then_some(())
    });
    all_bypass(&daemon.status(), &ENDPOINTS);
    nothing_is_mapped(&mut daemon);
    drop(vm);
    daemon.stop();
}

fn all_bypass(status: &Status, endpoints: &[&str]) {
    for endpoint in endpoints {
        let domain = status.domain_of(endpoint);
        let entry = status.domains().iter().find(|d| d["id"] == domain);
        assert_eq!(entry.expect("listed")["bypass"], true);
        assert_eq!(status.dma_of(endpoint), "bypass");
    }
}

/// Boots a guest with the endpoints.
fn boot(
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
    test_dir: &TestDir,
    daemon: &Daemon,
    name: &str,
    append: &str,
) -> Vm {
    let options = options(kernel, mode, &daemon.qemu_args, "slots=2,maxmem=4G", append);
    let mut vm = Vm::start(setup, test_dir, name, &options);
    vm.wait_until_up();
    vm
}

/// The parts of a VM with the endpoints, and with places for more memory.
fn options<'a>(
    kernel: &'a Kernel,
    mode: Mode,
    iommu: &[String],
    slots: &str,
    append: &str,
) -> VmOptions<'a> {
    let mut extra = vec!["-m".to_owned(), slots.to_owned()];
    for slot in ["06.0", "07.0", "08.0"] {
        extra.extend(["-device".to_owned(), format!("edu,addr={slot}")]);
    }
    extra.extend([
        "-device".to_owned(),
        "e1000e,addr=09.0,id=nic,romfile=".to_owned(),
    ]);
    VmOptions {
        kernel,
        append: format!("{} memhp_default_state=online {append}", mode.append()),
        iommu: iommu.to_vec(),
        extra,
    }
}

/// Adds memory to the VM, and waits until the guest has it. Returns its first and last guest-physical address.
fn hot_add(vm: &mut Vm) -> (u64, u64) {
    const ADDED: u64 = 256 << 20;
    let before = memory_of(vm);
    vm.qmp(
        "object-add",
        json!({"qom-type": "memory-backend-memfd", "id": "added", "size": ADDED, "share": true}),
    );
    vm.qmp(
        "device_add",
        json!({"driver": "pc-dimm", "id": "dimm", "memdev": "added"}),
    );
    let devices = vm.qmp("query-memory-devices", json!({}));
    let first = number(&devices[0]["data"], "addr");
    let last = first + number(&devices[0]["data"], "size") - 1;
    assert_eq!(last - first + 1, ADDED);
    // In kB, the guest's unit; the guest's kernel keeps a little of the memory for itself.
    let enough = ADDED / 1024 * 9 / 10;
    wait_for("the added memory", ANSWER, || {
        (memory_of(vm) >= before + enough).then_some(())
    });
    (first, last)
}

fn bind_all() -> String {
    format!("vfio_bind {}", FOR_VFIO.join(" "))
}

/// Binds the endpoints, and checks what the guest and the daemon report about them.
fn probed_as_configured(
    vm: &mut Vm,
    daemon: &mut Daemon,
    setup: &Setup,
    kernel: &Kernel,
    mode: Mode,
) {
    let page = vm.run("awk '/KernelPageSize/ { print $2; exit }' /proc/self/smaps");
    assert_eq!(
        page.join(""),
        (kernel.page >> 10).to_string(),
        "KiB in a page"
    );
    let release = vm.run("uname -r").join("");
    assert!(release.starts_with(&kernel.version), "{release}");
    vm.run("ls /sys/bus/virtio/drivers/virtio_iommu/virtio0");
    vm.run(&format!("ls -d /sys/bus/pci/drivers/e1000e/{NIC}"));
    // A guest that wakes up from S3 waits for the IOMMU for ever.
    let sleeps = vm.run("cat /sys/power/mem_sleep").join("");
    assert!(!sleeps.contains("deep"), "{sleeps}");
    // Older kernels put a device into its group only when a driver binds it.
    vm.run(&bind_all());
    let mut groups = Vec::new();
    let msi = msi(setup.machine);
    for endpoint in ENDPOINTS {
        let link = format!("/sys/bus/pci/devices/{endpoint}/iommu_group");
        groups.extend(vm.run(&format!("basename $(readlink {link})")));
        let mut regions = vm.run(&format!("cat {link}/reserved_regions"));
        regions.sort();
        let expected = if endpoint == FIRST {
            let mut both = vec![OWN, msi];
            both.sort_unstable();
            both
        } else {
            vec![msi]
        };
        assert_eq!(regions, expected, "{endpoint}");
        assert_eq!(group_type(vm, endpoint), mode.group_type(), "{endpoint}");
    }
    groups.sort();
    groups.dedup();
    assert_eq!(groups.len(), ENDPOINTS.len(), "groups {groups:?}");

    let status = daemon.status();
    assert_eq!(status.0["connected"], true);
    for endpoint in ENDPOINTS {
        let domain = status.domain_of(endpoint);
        assert_eq!(status.dma_of(endpoint), "translated");
        let entry = status.domains().iter().find(|d| d["id"] == domain);
        assert_eq!(entry.expect("listed")["bypass"], false);
    }
}

fn group_type(vm: &mut Vm, endpoint: &str) -> String {
    vm.run(&format!(
        "cat /sys/bus/pci/devices/{endpoint}/iommu_group/type"
    ))
    .join("")
}

fn start_mapper(vm: &mut Vm, name: &str, seed: u32, endpoints: &[&str]) {
    let endpoints = endpoints.join(" ");
    vm.run(&format!("start {name} vfio-map --seed {seed} {endpoints}"));
}

/// Makes [`Transport::rounds`] mappings, and more through the second program and the network interface, while
/// the VM is paused and continued over and over. Returns the number of pauses that ended before the
/// traffic did.
fn churn_with_pauses(
    vm: &mut Vm,
    daemon: &mut Daemon,
    transport: Transport,
    test_dir: &TestDir,
) -> u32 {
    let rounds = transport.rounds();
    vm.begin(&format!(
        "ask single churn {} >/run/single.answer & single=$!; \
         for _ in $(seq {OPENED}); do ifconfig eth0 up && ifconfig eth0 down || exit; done & \
         nic=$!; ask pair churn {rounds} && wait $single && wait $nic && cat /run/single.answer",
        rounds / 5
    ));
    let maps = |daemon: &mut Daemon| daemon.status().requests("map", "ok");
    let mut pauses = 0;
    let (mut lines, mut status) = (Vec::new(), None);
    while status.is_none() && pauses < 60 {
        let before = maps(daemon);
        let mut answer = None;
        // Each pause comes in the middle of the traffic, and never without progress since the last
        // one.
        wait_for("traffic", LONG_ANSWER, || {
            answer = vm.finish(Duration::from_millis(30));
            (answer.is_some() || maps(daemon) > before).then_some(())
        });
        if let Some((text, code)) = answer {
            (lines, status) = (text, Some(code));
            break;
        }
        vm.qmp("stop", json!({}));
        let stopped = maps(daemon);
        thread::sleep(Duration::from_millis(20));
        // Over virtio-pci the VMM stops its processors alone, so requests in the ring are answered.
        if transport == Transport::VhostUser {
            assert_eq!(maps(daemon), stopped, "requests while the VM is stopped");
        }
        vm.qmp("cont", json!({}));
        pauses += 1;
    }
    if status.is_none() {
        let answer = vm.finish(LONG_ANSWER).expect("an answer after the pauses");
        (lines, status) = (answer.0, Some(answer.1));
    }
    test_dir.note(&lines.join("; "));
    assert_eq!(status, Some(0));
    assert!(
        lines.iter().filter(|line| line.starts_with("ok")).count() == 2,
        "{lines:?}"
    );
    pauses
}

fn mappings_of(daemon: &mut Daemon, endpoint: &str) -> u64 {
    let status = daemon.status();
    let domain = status.domain_of(endpoint);
    let entry = status.domains().iter().find(|d| d["id"] == domain);
    number(entry.expect("listed"), "mappings")
}

/// Requires that the domain of each program, identified by one of its endpoints, holds exactly the
/// mappings that the program reports, and that all other domains are empty.
#[track_caller]
fn tables_agree(vm: &mut Vm, daemon: &mut Daemon, programs: &[(&str, &str)]) {
    let mut expected = BTreeMap::new();
    for (program, endpoint) in programs {
        let dump = vm.run_within(&format!("ask {program} dump"), LONG_ANSWER);
        let table = Table::from_dump(&dump);
        assert!(!table.0.is_empty(), "{program} has mapped nothing");
        expected.insert(daemon.status().domain_of(endpoint), table);
    }
    for (domain, table) in daemon.tables() {
        let believed = expected.remove(&domain).unwrap_or_default();
        Table::assert_same(&believed, &table, &format!("domain {domain}"));
    }
    assert!(
        expected.is_empty(),
        "domains the daemon lacks: {:?}",
        expected.keys()
    );
}

#[track_caller]
fn nothing_is_mapped(daemon: &mut Daemon) {
    for (domain, table) in daemon.tables() {
        Table::assert_same(&Table::default(), &table, &format!("domain {domain}"));
    }
}

/// The guest's memory in kB.
fn memory_of(vm: &mut Vm) -> u64 {
    let line = vm.run("grep MemTotal /proc/meminfo").join("");
    let figure = line.split_whitespace().nth(1);
    figure
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| panic!("the guest printed `{line}`"))
}
