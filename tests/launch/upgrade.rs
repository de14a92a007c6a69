//! The program is replaced while `launch` and the VM run, as a package manager does it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::{ARRIVE, LaunchDir, Launched, PROGRAM, STAY, is_alive, wait_for};

#[test]
fn the_next_daemon_is_the_program_that_replaced_the_running_one() {
    let dir = LaunchDir::new();
    let program = dir.path("program");
    fs::copy(PROGRAM, &program).expect("copied");
    let mut command = Command::new(&program);
    command
        .args(["launch", "--config", "vm.toml"])
        .current_dir(dir.path(""));
    let mut launched =
        Launched::start(&mut dir.with_vmm(command, &format!("{ARRIVE} {STAY}"), &[]));
    let (vmm, daemon) = launched.children(&dir);
    fs::copy(PROGRAM, dir.path("newer")).expect("copied");
    fs::rename(dir.path("newer"), &program).expect("replaced");
    let file_of = |pid: u32| fs::read_link(format!("/proc/{pid}/exe")).expect("a process");
    assert_eq!(
        file_of(daemon),
        PathBuf::from(format!("{} (deleted)", program.display()))
    );

    let mut upgrade = Command::new(&program);
    let output = upgrade
        .args(["upgrade", "vm.toml"])
        .current_dir(dir.path(""))
        .output()
        .expect("it runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(printed.contains("goes on (life 2)"), "{printed}");

    assert!(is_alive(vmm) && !is_alive(daemon));
    let (same_vmm, next) = launched.children(&dir);
    assert_eq!(same_vmm, vmm);
    assert_eq!(file_of(next), program);
    wait_for("the message", || {
        launched.printed().contains("started again in")
    });
    fs::remove_file(dir.path("vm.toml")).expect("the VMM's sign");
    let run = launched.finish();
    assert!(run.status.success(), "{}", run.stderr);
}
