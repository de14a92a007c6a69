//! A VM that `launch` starts: an unmodified QEMU and a stock kernel, whose VFIO drives a device of the host.
//!
//! The host is an emulated machine (L1), and the VM runs in it (L2). L1's emulated processor can virtualize, so QEMU
//! uses KVM in L1. Emulation within emulation would take more than two minutes for each boot.

use std::fs;
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vhost_device_iommu::vfio::{Cdev, IommuFd};

use crate::devices::{FaultLog, Function};
use crate::vm::stuck::WaitsForItself;
use crate::vm::{Control, Launcher, PAGE, Setup, Status, Table, TestDir, Vm, VmOptions, wait_for};
use crate::words;

/// The device's address in the VM.
pub const EDU: &str = "0000:00:10.0";
/// Time limit of a command in the VM.
const ANSWER: Duration = Duration::from_secs(60);
/// Time limit until all processes of a VM have ended.
const END: Duration = Duration::from_secs(10);
/// VMs that a test starts at most if their guests hang without a device's help.
pub const ATTEMPTS: u32 = 3;

/// I/O virtual addresses. None is an address of guest memory.
const SOURCE: u64 = 0x4000_0000;
const TARGET: u64 = 0x7654_3210_0000;
const SINK: u64 = 0xf_fff0_0000;

#[test]
#[ignore = "needs the L1 machine; run qemu-scripts/test.sh passthrough"]
fn a_stock_guest_drives_a_passthrough_device() {
    with_a_working_guest(drive_a_passthrough_device);
}

fn drive_a_passthrough_device() {
    let setup = Setup::from_environment();
    let host = words("VIOMMU_EDU")[0].clone();
    let mut nested = Nested::launch(&setup, "nested", "", &format!("vfio = \"{host}\""));
    // QEMU has made all devices, and the guest's driver does not run yet. Firmware may use the device.
    let status = nested.control.status();
    assert_eq!(status.dma_of(EDU), "bypass", "{}", status.0);

    nested.vm.wait_until_up();
    nested.test_dir.note("up");
    let mut faults = FaultLog::now();
    nested.drive(&mut faults);
    nested.test_dir.note("driven");

    // The guest reboots with its mappings in place.
    let resets = nested.resets();
    nested.vm.begin("reboot -f");
    nested.vm.wait_until_up();
    nested.test_dir.note("up again");
    assert_eq!(nested.resets(), resets + 1);
    let left = nested.control.tables();
    assert!(left.values().all(|table| table.0.is_empty()), "{left:?}");
    nested.drive(&mut faults);
    nested.test_dir.note("driven again");

    nested.vm.begin("poweroff -f");
    let status = nested.vm.wait_for_end();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
    nested.wait_for_end();
    for socket in ["iommu.sock", "control.sock"] {
        assert!(!nested.test_dir.path(socket).exists(), "{socket} is left");
    }
    let device = Cdev::open(Function::new(&host).node().as_ref()).expect("the device");
    let iommufd = IommuFd::open("/dev/iommu".as_ref()).expect("iommufd");
    device.bind(&iommufd, None).expect("the device is free");
}

/// Runs a test's body. Runs it again with a new VM, at most twice, if the guest's only processor waits for itself: see
/// [`waits_for_itself`](crate::vm::stuck::waits_for_itself). Any other failure is final.
pub fn with_a_working_guest(body: impl Fn()) {
    for left in (0..ATTEMPTS).rev() {
        let Err(panic) = catch_unwind(AssertUnwindSafe(&body)) else {
            return;
        };
        match panic.downcast_ref::<WaitsForItself>() {
            Some(WaitsForItself(report)) if left > 0 => {
                // Not by a macro, whose output the test runner hides if the next attempt passes.
                let _ = writeln!(
                    io::stderr(),
                    "\n==== The guest's only processor waits for a lock that it holds itself. No device causes that \
                     (docs/testing.md). The test starts again with a new VM, {left} attempts are left. ====\n{report}"
                );
            }
            _ => resume_unwind(panic),
        }
    }
}

/// A VM and the daemon behind it.
pub struct Nested {
    pub vm: Vm,
    pub control: Control,
    pub test_dir: TestDir,
    // Dropped last, after the VM.
    _ends: WaitOnDrop,
}

/// Waits on drop until no process has a path below this directory in its arguments: the next VM needs the device.
struct WaitOnDrop(PathBuf);

impl Drop for WaitOnDrop {
    fn drop(&mut self) {
        let deadline = Instant::now() + END;
        while !processes_of(&self.0).is_empty() && Instant::now() < deadline {
            sleep(Duration::from_millis(20));
        }
    }
}

impl Nested {
    /// A VM that was started in another way.
    pub fn of(vm: Vm, control: Control, test_dir: TestDir) -> Self {
        Self {
            vm,
            control,
            _ends: WaitOnDrop(test_dir.path("")),
            test_dir,
        }
    }

    /// Goes on after [`Self::drive`]: the device reaches what is mapped, and nothing else.
    pub fn drive_on(&mut self) {
        self.tables_agree(4);
        self.copies(SOURCE, TARGET, &[(40, "0")]);
        self.copies(SOURCE, TARGET + PAGE, &[]);
        self.ask(&format!("unmap {TARGET:x} 1"));
        self.copies(SOURCE, TARGET, &[]);
        self.ask(&format!("map {TARGET:x} 1 rw 41"));
        self.copies(SOURCE, TARGET, &[(41, "0")]);
    }

    /// Starts a VM with more keys in the configuration and in its one endpoint. In `endpoint`, `@` stands for the VM's
    /// directory.
    pub fn launch(setup: &Setup, name: &str, keys: &str, endpoint: &str) -> Self {
        let test_dir = TestDir::new(name);
        let text = |path: &Path| path.display().to_string();
        let (config, control) = (test_dir.path("vm.toml"), test_dir.path("control.sock"));
        let socket = test_dir.path("iommu.sock");
        let keys = format!(
            "socket = \"{}\"\ncontrol = \"{}\"\nmemory = \"512M\"\naddress = \"00:05.0\"\n\
             {keys}\n[[endpoint]]\naddress = \"{EDU}\"\n{}\n",
            socket.display(),
            control.display(),
            endpoint.replace('@', test_dir.path("").to_str().expect("text")),
        );
        fs::write(&config, keys).expect("the configuration written");
        let launcher = Launcher {
            words: vec![
                env!("CARGO_BIN_EXE_vhost-device-iommu").to_owned(),
                "launch".to_owned(),
                "--config".to_owned(),
                text(&config),
                "--".to_owned(),
            ],
            // Without the TSC deadline timer: L1's emulated time stamp counter may never reach the deadline. Without
            // `kvm-pv-eoi`, so that the guest leaves KVM at the end of each interrupt: an interrupt that QEMU's SVM
            // delivers twice (docs/testing.md) comes before that, when the guest holds no lock of its timers.
            accel: ["-accel", "kvm", "-cpu", "max,-tsc-deadline,-kvm-pv-eoi"]
                .map(str::to_owned)
                .into(),
        };
        let options = VmOptions {
            kernel: setup.newest(),
            // Quiet, because each character on the console costs time.
            append: "quiet no_timer_check".to_owned(),
            iommu: Vec::new(),
            extra: Vec::new(),
        };
        let vm = Vm::launch(setup, &test_dir, "vm", &launcher, &options);
        let nested = Self {
            vm,
            control: Control(control),
            _ends: WaitOnDrop(test_dir.path("")),
            test_dir,
        };
        // `launch` itself, the daemon and QEMU.
        assert_eq!(nested.processes().len(), 3, "{:?}", nested.processes());
        nested
    }

    /// Lets the guest's VFIO copy pages with the device, also where it must not reach memory.
    pub fn drive(&mut self, faults: &mut FaultLog) {
        self.vm.run(&format!("vfio_bind {EDU}"));
        self.vm.run(&format!("start edu vfio-edu {EDU}"));
        let status = self.control.status();
        let domain = status.domain_of(EDU);
        assert_eq!(status.dma_of(EDU), "translated");
        assert!(!is_bypass(&status, domain));

        self.ask(&format!("map {SOURCE:x} 2 r- 0"));
        self.ask(&format!("map {TARGET:x} 3 rw 8"));
        self.ask(&format!("map {SINK:x} 1 -w 20"));
        self.tables_agree(6);

        self.test_dir.note("pages arrive at mapped addresses");
        self.copies(SOURCE, TARGET + PAGE, &[(9, "0")]);
        self.copies(SOURCE + PAGE, TARGET, &[(8, "1")]);
        self.copies(TARGET + 2 * PAGE, SINK, &[(20, "10")]);
        self.copies(SOURCE, TARGET + 2 * PAGE, &[(10, "0")]);

        self.test_dir.note("nothing arrives at other addresses");
        let past = TARGET + 3 * PAGE;
        faults.expect_fault(|| self.copies(SOURCE, past, &[]));
        self.copies(SOURCE, SOURCE + PAGE, &[]);
        let gpa = self.gpa_of(9);
        self.copies(SOURCE, gpa, &[]);
        let secret = self.gpa_of(30);
        for forbidden in [secret, SINK] {
            let changes = self.copy(forbidden, TARGET);
            for (index, source) in &changes {
                assert_eq!(*index, 8, "{forbidden:#x}: {changes:?}");
                assert!(!["20", "30"].contains(&source.as_str()), "{changes:?}");
            }
        }

        self.test_dir.note("nothing arrives after UNMAP");
        self.ask(&format!("unmap {TARGET:x} 3"));
        self.tables_agree(3);
        self.copies(SOURCE, TARGET, &[]);
        self.copies(SOURCE, TARGET + PAGE, &[]);
        self.ask(&format!("map {TARGET:x} 1 rw 40"));
        self.copies(SOURCE, TARGET, &[(40, "0")]);
        self.tables_agree(4);
    }

    /// Copies a page. Checks that exactly the `expected` pages of the buffer change: index and source.
    fn copies(&mut self, from: u64, to: u64, expected: &[(u64, &str)]) {
        let changes = self.copy(from, to);
        let changes: Vec<_> = changes.iter().map(|(n, s)| (*n, s.as_str())).collect();
        assert_eq!(changes, expected, "{from:#x} to {to:#x}");
    }

    /// Copies a page. Returns the pages of the buffer that have changed: index and source.
    fn copy(&mut self, from: u64, to: u64) -> Vec<(u64, String)> {
        let answer = self.ask(&format!("copy {from:x} {to:x}"));
        let changes = answer.iter().filter_map(|line| line.strip_prefix("c "));
        changes
            .map(|change| {
                let (index, source) = change.split_once(' ').expect("two words");
                (index.parse().expect("a number"), source.to_owned())
            })
            .collect()
    }

    pub fn ask(&mut self, line: &str) -> Vec<String> {
        self.vm.run_within(&format!("ask edu {line}"), ANSWER)
    }

    /// The guest-physical address of a page of the program's buffer.
    fn gpa_of(&mut self, page: u64) -> u64 {
        let answer = self.ask(&format!("where {page}"));
        let gpa = answer[0].rsplit(' ').next().expect("a word");
        u64::from_str_radix(gpa, 16).expect("hexadecimal")
    }

    /// Checks that the daemon's mappings are the program's mappings.
    #[track_caller]
    fn tables_agree(&mut self, pages: usize) {
        let program = Table::from_dump(&self.ask("dump"));
        assert_eq!(program.0.len(), pages);
        let domain = self.control.status().domain_of(EDU);
        for (id, table) in self.control.tables() {
            let none = Table::default();
            let expected = if id == domain { &program } else { &none };
            Table::assert_same(expected, &table, &format!("domain {id}"));
        }
    }

    fn resets(&self) -> u64 {
        crate::vm::number(&self.control.status().0, "resets")
    }

    /// Waits until all processes of the VM have ended.
    pub fn wait_for_end(&self) {
        wait_for("the end of the daemon", END, || {
            self.processes().is_empty().then_some(())
        });
    }

    /// The number of the process of this VM that has `word` in its arguments.
    pub fn process_with(&self, word: &str) -> u32 {
        let mut found = self
            .processes()
            .into_iter()
            .filter(|(_, l)| l.contains(word));
        let (pid, _) = found.next().expect("running");
        assert_eq!(found.next(), None, "{word}");
        pid
    }

    /// The processes of this VM: number and arguments, which name the VM's directory.
    fn processes(&self) -> Vec<(u32, String)> {
        processes_of(&self.test_dir.path(""))
    }
}

/// The processes that have a path beginning with `start` in their arguments: number and arguments.
fn processes_of(start: &Path) -> Vec<(u32, String)> {
    let start = start.to_str().expect("text").trim_end_matches('/');
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    processes
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read_to_string(entry.path().join("cmdline")).ok()?;
            Some((pid, line))
        })
        .filter(|(_, line)| line.contains(start))
        .collect()
}

fn is_bypass(status: &Status, domain: u64) -> bool {
    let entry = status.domains().iter().find(|d| d["id"] == domain);
    entry.expect("listed")["bypass"] == true
}
