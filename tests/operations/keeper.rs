//! systemd as the keeper of descriptors. The service has this test program in place of the daemon, which leaves one file more
//! in each life.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{env, fs, io};

use vhost_device_iommu::process::supervisor::Supervisor;

use super::machine::{Vm, run_ok};

/// Where the test program is, readable for the user of the service.
const PROGRAM: &str = "/usr/local/bin/operations";

/// The files that a stub leaves right before it dies.
const BURST: usize = 50;

/// The service of the VM `name` with the stub. It ends at once in its lives from number `dies` on.
fn stub_service(name: &'static str, dies: u32) -> Vm {
    let vm = Vm::new(name, "");
    fs::copy(env::current_exe().expect("this program"), PROGRAM).expect("a copy");
    let command = format!("{PROGRAM} --exact keeper::stub --ignored --nocapture");
    let settings =
        format!("ExecStart=\nExecStart={command}\nEnvironment=STUB_DIES={dies}\nWatchdogSec=0\n");
    vm.set(&settings);
    vm
}

fn count(vm: &Vm) -> String {
    vm.property("NFileDescriptorStore")
}

/// What the stubs have printed: the files that each has got.
fn lives(vm: &Vm) -> Vec<String> {
    let journal = vm.journal();
    let lines = journal
        .lines()
        .filter_map(|line| line.split_once("stub got "));
    lines.map(|(_, files)| files.to_owned()).collect()
}

fn wait_for_lives(vm: &Vm, number: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while lives(vm).len() < number {
        assert!(Instant::now() < deadline, "{}", vm.journal());
        sleep(Duration::from_millis(100));
    }
    vm.wait_for("ActiveState", "active");
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn systemd_keeps_descriptors_until_the_service_stops() {
    let vm = stub_service("kept", u32::MAX);
    vm.start();
    assert_eq!(count(&vm), "1");
    run_ok(&["systemctl", "kill", "-s", "KILL", &vm.service()]);
    wait_for_lives(&vm, 2);
    assert_eq!(count(&vm), "2", "after a crash");
    run_ok(&["systemctl", "restart", &vm.service()]);
    assert_eq!(count(&vm), "3", "after a planned restart");
    let expected = [
        "nothing, 0 in all",
        "life-0=0, 1 in all",
        "life-0=0 life-1=1, 2 in all",
    ];
    assert_eq!(lives(&vm), expected, "{}", vm.journal());

    run_ok(&["systemctl", "stop", &vm.service()]);
    assert_eq!(count(&vm), "0", "after a stop");
    vm.start();
    assert_eq!(count(&vm), "1", "anew");
    assert_eq!(lives(&vm).last().expect("a life"), "nothing, 0 in all");
}

#[test]
#[ignore = "in the machine of qemu-scripts/debian.sh"]
fn a_loop_of_crashes_ends_and_drops_the_descriptors() {
    let vm = stub_service("looping", 1);
    vm.start();
    run_ok(&["systemctl", "kill", "-s", "KILL", &vm.service()]);
    vm.wait_for("ActiveState", "failed");
    // The first start counts.
    let lives = lives(&vm);
    assert_eq!(lives.len(), 5, "{lives:?}");
    // Nothing is lost that a daemon has left right before its end.
    let all = format!(", {} in all", 4 + 3 * BURST);
    assert!(lives[4].ends_with(&all), "{lives:?}");
    assert_eq!(count(&vm), "0");
    let journal = vm.journal();
    assert!(
        journal.contains("Start request repeated too quickly"),
        "{journal}"
    );
}

#[test]
#[ignore = "the other tests start it as the daemon"]
fn stub() {
    let Some(dies) = env::var("STUB_DIES")
        .ok()
        .and_then(|text| text.parse().ok())
    else {
        return;
    };
    let Supervisor { service, keeper } = Supervisor::find(None, &[]).expect("systemd");
    assert!(keeper.is_present());
    let content = |name: &String| {
        let file = keeper.claim(name).expect("kept");
        let file = File::from(file.try_clone().expect("a copy"));
        let mut bytes = [0; 16];
        let len = file.read_at(&mut bytes, 0).expect("read");
        format!("{name}={}", String::from_utf8_lossy(&bytes[..len]))
    };
    let mut names = keeper.names();
    let all = names.len();
    names.retain(|name| name.starts_with("life-"));
    let files: Vec<_> = names.iter().map(content).collect();
    let files = if files.is_empty() {
        "nothing".into()
    } else {
        files.join(" ")
    };
    let files = format!("{files}, {all} in all");
    // The output of a test program begins its lines in the middle.
    let _ = write!(io::stdout(), "\nstub got {files}\n");
    let life = names.len();
    let mut file = tempfile::tempfile().expect("a file");
    write!(file, "{life}").expect("written");
    keeper
        .keep_as(&format!("life-{life}"), file.as_fd())
        .expect("kept");
    if u32::try_from(life).expect("few") >= dies {
        // systemd must read these although it learns of the end before.
        for n in 0..BURST {
            let file = tempfile::tempfile().expect("a file");
            let name = format!("burst-{life}-{n}");
            keeper.keep_as(&name, file.as_fd()).expect("kept");
        }
        std::process::abort();
    }
    service.notify("READY=1").expect("sent");
    loop {
        sleep(Duration::from_secs(60));
    }
}
